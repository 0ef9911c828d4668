package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file finds out who is at the addresses of the members. An address is what
// somebody has told the cluster, and it may be wrong, or a trap. So a node asks
// there who it is. It has a link to a member, over which it sends, reads streams and
// takes messages, only once that has said, at the address, that it is this
// member of this cluster. Until then nothing is sent there but the question, less
// and less often.
//
// Who answers can still lie, as there are no certificates. But it cannot take
// the place of a member that runs: while that answers at its old address, nobody
// else is believed at a new one.

const (
	// An address that is silent is asked again after a pause, which doubles each time.
	askPauseMin = 50 * time.Millisecond
	askPauseMax = 5 * time.Second
	// askAgainEvery is how often a member is asked whether it still is who it was.
	askAgainEvery = 5 * time.Second
	// knockEvery is how often a node is asked at most because it has called.
	knockEvery = 200 * time.Millisecond
	knocksMax  = 16 // that wait

	// Why a member is not linked is logged so often, if it is the same.
	strangerWarnEvery = time.Minute
)

// acquaintance is what a node knows of the address of a member.
type acquaintance struct {
	url     string // as the cluster has it
	proven  string // where the member has said who it is; "" = nowhere
	asking  bool
	asked   time.Time
	next    time.Time // to ask
	pause   time.Duration
	failure string // that was logged
	warned  time.Time
}

// introduction is what came of asking.
type introduction struct {
	id  uint64
	url string
	is  error // nil, errSilent, or why it is not that member
	// moved says that the address before is not that of the member any more.
	moved bool
}

var (
	// errSilent is of an address where nobody answers, or who is there has no cluster yet.
	errSilent = errors.New("nobody answers there yet")
	// errFounds is of who waits to found a cluster. The members of one found it
	// one after the other.
	errFounds = errors.New("the node that answers there waits to found a cluster: start it with --join")
)

// nobodyYet says that there may be a member soon.
func nobodyYet(is error) bool { return errors.Is(is, errSilent) || errors.Is(is, errFounds) }

// recognize says whether an answer is that of a member of this cluster: nil,
// errSilent, or why not.
func recognize(id, cluster uint64, info *peerInfo, err error) error {
	who := id
	if err == nil {
		who = cmp.Or(info.Node, info.Health.Member, id) // there are versions that do not say
	}
	switch {
	case errors.Is(err, errSaysNothing):
		return nil
	case err != nil && isSilence(err):
		return errSilent
	case err != nil:
		return errors.New("what answers there is no peer port of a raftrv node")
	case info.Cluster != "" && info.Cluster != fmt.Sprintf("%x", cluster):
		return fmt.Errorf("a node of another cluster, %s, answers there", info.Cluster)
	case who != id:
		return fmt.Errorf("node %d answers there", who)
	case info.Cluster != "":
		return nil
	case info.Founding != nil:
		return errFounds
	default:
		return errSilent // it will join
	}
}

// isSilence says whether an error of a request means that there was no answer,
// rather than another one.
func isSilence(err error) bool {
	if call, ok := errors.AsType[*url.Error](err); ok {
		err = call.Err // which is a net.Error whatever it is about
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true // connecting, resolving, a timeout
	}
	return slices.ContainsFunc([]error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, context.Canceled, errUnavailable}, func(e error) bool { return errors.Is(err, e) })
}

// acquaint asks who is at the addresses of the members, until ctx ends.
func (n *peerNetwork) acquaint(ctx context.Context) error {
	var asking sync.WaitGroup
	defer asking.Wait()
	known, answers := map[uint64]*acquaintance{}, make(chan introduction)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		wanted, now := n.wanted(), time.Now()
		maps.DeleteFunc(known, func(id uint64, _ *acquaintance) bool {
			_, ok := wanted[id]
			return !ok
		})
		next := now.Add(askAgainEvery)
		for id, m := range wanted {
			a := known[id]
			if a == nil {
				a = new(acquaintance)
				known[id] = a
			}
			if a.url != m.PeerURL {
				a.url, a.next, a.pause = m.PeerURL, now, 0
			}
			if !a.asking && !now.Before(a.next) {
				a.asking, a.asked = true, now
				url, before := a.url, a.proven
				asking.Go(func() {
					in := n.introduce(ctx, id, url, before)
					select {
					case answers <- in:
					case <-ctx.Done():
					}
				})
			}
			if !a.asking && a.next.Before(next) {
				next = a.next
			}
		}
		n.publish(known)
		timer.Reset(time.Until(next))
		select {
		case in := <-answers:
			if a := known[in.id]; a != nil {
				n.hear(a, in)
			}
		case id := <-n.knocks:
			if a := known[id]; a != nil && a.proven != a.url && now.Sub(a.asked) >= knockEvery {
				a.next = now
			}
		case <-n.renamed:
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// introduce asks at url whether it is the address of a member, and at the one
// where the member was before, if that is another.
func (n *peerNetwork) introduce(ctx context.Context, id uint64, url, before string) introduction {
	in := introduction{id: id, url: url}
	info, err := askPeer(ctx, url)
	in.is = recognize(id, n.cluster, info, err)
	if before == "" || before == url {
		return in
	}
	old, err := askPeer(ctx, before)
	was := recognize(id, n.cluster, old, err)
	switch {
	case was == nil && in.is == nil && old.process() != info.process():
		in.is = fmt.Errorf("the member still runs at %s, and another process says there that it is this member", before)
	case was != nil && !nobodyYet(was):
		in.moved = true
	}
	return in
}

// hear notes what came of asking.
func (n *peerNetwork) hear(a *acquaintance, in introduction) {
	a.asking = false
	if in.moved && a.proven != in.url {
		a.proven = ""
	}
	if in.url != a.url {
		return // it has another one by now
	}
	now := time.Now()
	if in.is == nil {
		a.proven, a.pause, a.next, a.failure = a.url, 0, now.Add(askAgainEvery), ""
		return
	}
	a.pause = min(max(2*a.pause, askPauseMin), askPauseMax)
	a.next = now.Add(a.pause)
	if nobodyYet(in.is) {
		if a.proven == a.url {
			a.next = now.Add(askAgainEvery) // a member may be down for a while
		}
		return
	}
	if a.proven == a.url {
		a.proven = ""
	}
	if why := in.is.Error(); why != a.failure || now.Sub(a.warned) >= strangerWarnEvery {
		a.failure, a.warned = why, now
		n.logger.Warn("nothing is sent to the address of a member, as somebody else is there: is it right, and is that node of this cluster?",
			zap.Uint64("member", in.id), zap.String("address", in.url), zap.String("reason", why))
	}
}

// publish makes known where members have said who they are.
func (n *peerNetwork) publish(known map[uint64]*acquaintance) {
	proven := map[uint64]string{}
	for id, a := range known {
		if a.proven != "" {
			proven[id] = a.proven
		}
	}
	if !maps.Equal(proven, *n.proven.Load()) {
		n.proven.Store(&proven)
		wake(n.changed)
	}
}

// knock notes that a node has called which says that it is a member.
func (n *peerNetwork) knock(id uint64) {
	select {
	case n.knocks <- id:
	default: // others have called before
	}
}

// found returns those of members that have said who they are, with the addresses
// where they did.
func (n *peerNetwork) found(members []store.Member) (found []store.Member) {
	if n == nil {
		return members // there is no network in this test
	}
	proven := *n.proven.Load()
	for _, m := range members {
		if address, ok := proven[m.ID]; ok {
			m.PeerURL = address
			found = append(found, m)
		}
	}
	return found
}

// checkAddress refuses to give a member an address where somebody else answers.
// That nobody does is fine: members are added before they are started.
func (s *kvstore) checkAddress(ctx context.Context, m store.Member) error {
	if m.PeerURL == "" || slices.ContainsFunc(s.store.Members(), func(o store.Member) bool { return o.PeerURL == m.PeerURL }) {
		return nil // nothing new, or refused as that of another
	}
	info, err := askPeer(ctx, m.PeerURL)
	is := recognize(m.ID, s.cluster, info, err)
	switch {
	case errors.Is(is, errSilent):
		return nil
	case is != nil && err == nil && info.Cluster == fmt.Sprintf("%x", s.cluster) && slices.Contains(s.store.Removed(), info.Node):
		return nil // it is about to end
	case is != nil:
		return fault.ErrMember.WithDetail("%s is not the peer URL of node %d of this cluster: %v", m.PeerURL, m.ID, is)
	}
	// It may be the same process, at two addresses.
	twice := m.ID == s.config.id && info.process() != s.process
	for _, now := range s.network.found([]store.Member{{ID: m.ID}}) {
		old, err := askPeer(ctx, now.PeerURL)
		twice = recognize(m.ID, s.cluster, old, err) == nil && old.process() != info.process()
	}
	if twice {
		return fault.ErrMember.WithDetail("node %d still runs at another address, and what answers at %s is another process that says that it is node %d, too: stop one of them first",
			m.ID, m.PeerURL, m.ID)
	}
	return nil
}

// isRemoved says whether this node was removed from its cluster. Anybody may say so,
// so a majority of the other voters that it knows must list it. If it has applied
// that itself, one that knows, too, is enough: see applyConfChange.
func (n *node) isRemoved(ctx context.Context) (removed bool, by, of []uint64) {
	var voters []store.Member
	for _, m := range n.store.Members() {
		if m.ID != n.config.id && !m.Learner {
			voters, of = append(voters, m), append(of, m.ID)
		}
	}
	for id, a := range askPeers(ctx, n.network.found(voters)) {
		if recognize(id, n.cluster, a.info, a.err) == nil && a.info != nil && a.info.informed && slices.Contains(a.info.Removed, n.config.id) {
			by = append(by, id)
		}
	}
	slices.Sort(by)
	known := slices.Contains(n.store.Removed(), n.config.id)
	return len(by) > len(voters)/2 || known && len(by) > 0, by, of
}

// awaitRemoval ends this node when it was removed. That is looked at when
// somebody refuses to talk to it for that reason.
func (n *node) awaitRemoval(ctx context.Context, told <-chan error) error {
	var since, warned time.Time
	for {
		select {
		case <-told: //nolint:errcheck // that somebody says so is enough to ask
		case <-ctx.Done():
			return nil
		}
		if since.IsZero() {
			since = time.Now()
		}
		removed, by, of := n.isRemoved(ctx)
		if removed {
			return errRemoved
		}
		// The others apply it one after the other.
		if now := time.Now(); now.Sub(since) >= leftOutMax && now.Sub(warned) >= strangerWarnEvery && ctx.Err() == nil {
			warned = now
			n.logger.Warn("somebody says that this node was removed from the cluster, and no majority of the voters that it knows confirms that: it goes on; "+
				"if it is true, stop this node, and keep its data directory until you know that the cluster has all that you need",
				zap.Uint64s("confirmedBy", by), zap.Uint64s("voters", of))
		}
		select {
		case <-time.After(keepPlaceEvery):
		case <-ctx.Done():
			return nil
		}
	}
}
