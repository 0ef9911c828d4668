package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/store"
)

// This file is how a node finds its place in a cluster: whose data directory it
// has, and what the other members know about it.

// place is a node that looks for its place: its data directory holds no state
// of a cluster yet.
type place struct {
	cfg     config
	disk    *storage
	process uint64 // a number of this life of the node
	around  surroundings
	logger  *zap.Logger
}

// surroundings are the other nodes and the clock, for a node that looks for its
// place. In production they are its ports.
type surroundings interface {
	// tell says what others are told who ask this node.
	tell(info peerInfo)
	// waiting says for whom the node waits, for its clients.
	waiting(whom []string)
	// ask asks the nodes at the members' addresses who they are.
	ask(ctx context.Context, members []store.Member) map[uint64]peerAnswer
	now() time.Time
	// pause lets so much time pass, and says whether it did before ctx ended.
	pause(ctx context.Context, d time.Duration) bool
}

const (
	placeRetry = 50 * time.Millisecond // between two rounds of questions

	// Somebody who waits for other nodes says so, first after waitFirst.
	waitFirst = time.Second
	waitEvery = 5 * time.Second

	// conflictMax is how long nodes that disagree wait for somebody to start one of
	// them with other flags.
	conflictMax = 3 * time.Second
)

// find returns what a data directory holds that load has read (nil if it was
// empty), and fills it if it holds nothing yet: founds a cluster with the other
// nodes in --cluster, or joins one. It returns nil if ctx ends before.
func (p *place) find(ctx context.Context, rec *recovered) (*recovered, error) {
	if rec != nil {
		if err := checkMember(p.cfg, rec.identity.Member); err != nil {
			return nil, err
		}
		if !rec.empty() {
			return rec, p.disk.removeFounding() // a crash may have left it
		}
		if len(rec.identity.Founders) > 0 {
			return rec, p.disk.writeFirstState(rec, rec.identity.Founders)
		}
	}
	own, err := p.disk.loadFounding()
	if err != nil {
		return nil, err
	}
	if own != nil {
		if err := checkMember(p.cfg, own.Member); err != nil {
			return nil, err
		}
	}
	switch {
	case rec != nil && rec.identity.Joined, rec == nil && p.cfg.join && (own == nil || own.Backup == ""):
		return p.join(ctx, rec, own)
	case rec != nil: // the first start by an older version did not get far
		return rec, p.disk.writeFirstState(rec, p.cfg.members)
	}
	if own, err = p.record(ctx, own); err != nil {
		return nil, err
	}
	return p.found(ctx, own)
}

// record returns the founding record of this node, and makes it if need be.
func (p *place) record(ctx context.Context, own *founding) (*founding, error) {
	flags := newFounding(&p.cfg)
	switch {
	case own == nil:
	case own.Backup != "" || own.agrees(flags):
		return own, nil
	default:
		// What this node said with the flags of before may have been enough for
		// others to found that cluster. Then it is a founder of it.
		for _, a := range p.around.ask(ctx, own.Members) {
			if a.info != nil && own.isFounder(a.info) {
				return own, nil
			}
		}
		p.logger.Warn("this node is started with another --cluster or --cluster-token than before, and waits for nodes with these",
			zap.String("before", formatList(own.Members)), zap.String("now", formatList(flags.Members)))
	}
	return flags, p.disk.saveFounding(flags)
}

// found waits for the others, and founds the cluster with them.
func (p *place) found(ctx context.Context, own *founding) (*recovered, error) {
	p.around.tell(peerInfo{Node: own.Member, Process: p.process, Founding: own})
	var step foundingStep
	type conflict struct {
		err   error
		since time.Time
	}
	conflicts := map[uint64]conflict{} // they end when the member agrees
	err := p.poll(ctx, "waiting to found the cluster", func() (done bool, waiting []string, err error) {
		step = own.decide(p.process, p.around.ask(ctx, own.Members))
		if step.refusal != nil || step.cluster != 0 || ctx.Err() != nil {
			return step.cluster != 0, nil, step.refusal
		}
		for _, m := range step.founders {
			if m.Directory != 0 {
				delete(conflicts, m.ID)
			}
		}
		for id, err := range step.conflicts {
			if _, known := conflicts[id]; !known {
				conflicts[id] = conflict{err, p.around.now()}
			}
		}
		for _, c := range conflicts {
			if p.around.now().Sub(c.since) > conflictMax {
				return false, nil, c.err
			}
		}
		return false, step.waiting, nil
	})
	if err != nil || step.cluster == 0 {
		return nil, err
	}
	p.logger.Info("founding the cluster", zap.String("cluster", fmt.Sprintf("%x", step.cluster)), zap.String("members", formatList(step.founders)))
	return p.disk.found(own, step.cluster, step.founders)
}

// join asks the other nodes in --cluster until one tells which cluster it is in,
// and makes the directory that of a member that joins it.
func (p *place) join(ctx context.Context, rec *recovered, own *founding) (*recovered, error) {
	id := identity{Member: p.cfg.id, Joined: true, Directory: randomID()}
	if rec != nil {
		id = rec.identity
	} else if own != nil {
		id.Directory = own.Directory // a founder may be told to join what the others have founded
	}
	p.around.tell(peerInfo{Node: id.Member, Process: p.process})
	others := slices.DeleteFunc(slices.Clone(p.cfg.members), func(m store.Member) bool { return m.ID == id.Member })
	var info *peerInfo
	err := p.poll(ctx, "waiting for a node of the cluster to answer", func() (done bool, waiting []string, err error) {
		answers := p.around.ask(ctx, others)
		for _, m := range others {
			a := answers[m.ID]
			if a.info != nil && a.info.informed {
				info = a.info
				return true, nil, nil
			}
			waiting = append(waiting, fmt.Sprintf("node %d (%s): %s", m.ID, m.PeerURL, a.describe()))
		}
		return false, waiting, nil
	})
	if err != nil || info == nil {
		return nil, err
	}
	if err := checkDirectory(p.cfg, info, id.Directory); err != nil {
		return nil, err
	}
	before := id.Cluster
	if id.Cluster, err = info.clusterID(); err != nil {
		return nil, err
	}
	switch {
	case rec == nil:
		rec, err = p.disk.create(id)
	case id.Cluster != before:
		p.logger.Info("this node has joined a cluster, has nothing of it, and joins another", zap.String("before", fmt.Sprintf("%x", before)),
			zap.String("now", info.Cluster))
		rec, err = p.disk.recreate(id)
	}
	if err != nil {
		return nil, err
	}
	for _, m := range info.Members {
		rec.state.Members[m.ID] = m
	}
	return rec, p.disk.removeFounding() // a leader will send the state
}

// poll repeats step until it is done or fails, or ctx ends, and says now and then
// for whom it waits.
func (p *place) poll(ctx context.Context, message string, step func() (done bool, waiting []string, err error)) error {
	sayAt := p.around.now().Add(waitFirst)
	for {
		done, waiting, err := step()
		if done || err != nil {
			return err
		}
		p.around.waiting(waiting)
		if now := p.around.now(); now.After(sayAt) {
			sayAt = now.Add(waitEvery)
			p.logger.Warn(message, zap.Strings("for", waiting))
		}
		if !p.around.pause(ctx, placeRetry) {
			return nil
		}
	}
}

// checkDirectory refuses a member that was part of the cluster with another
// data directory. It has forgotten which entries it acknowledged and for whom it
// voted, so if it took part again, acknowledged writes could be lost.
func checkDirectory(cfg config, info *peerInfo, directory uint64) error {
	if slices.Contains(info.Removed, cfg.id) {
		return errRemovedID(cfg.id)
	}
	if known := info.directoryOf(cfg.id); known != 0 && known != directory {
		return errForgotten(cfg.id, cfg.dataDir)
	}
	return nil
}

func errRemovedID(id uint64) error {
	return fmt.Errorf("node %d was removed from the cluster; add it again under a new ID", id)
}

func errForgotten(id uint64, dir string) error {
	return fmt.Errorf("node %d was part of this cluster with another data directory than %s, and must not come back without what that held: "+
		"remove it (curl -X DELETE http://NODE/-/v1/members/%d), then add it under a new ID", id, dir, id)
}

// admit says whether this node may take part. Before, it must not vote.
func (n *node) admit(ctx context.Context) error {
	if err := n.checkTwin(ctx); err != nil {
		return err
	}
	return n.checkFresh(ctx)
}

// checkTwin looks whether another process serves at the address of this member.
// Two that have one directory between them, or a copy of it, could vote twice.
// Whoever else answers there does not matter: no other node believes them while
// this one answers.
func (n *node) checkTwin(ctx context.Context) error {
	self, ok := n.store.Member(n.config.id)
	if !ok {
		return nil
	}
	challenge := rand.Text()
	info, err := askPeerTo(ctx, self.PeerURL, challenge)
	isMember := err == nil && info.Process != n.process && info.Node == self.ID && info.Cluster == fmt.Sprintf("%x", n.cluster)
	// Anybody can say that it is this member, and an address can be given to the
	// cluster by anybody. Who has the directory, or a copy of it, can prove it.
	if !isMember || !hmac.Equal([]byte(info.Proof), []byte(n.secret.prove(challenge, info.Process))) {
		return nil
	}
	return fmt.Errorf("another process runs as node %d of this cluster, at %s: a member must not run twice, nor on a copy of its data directory; "+
		"stop one of them, or add this one under a new ID, with another --data-dir and --join", self.ID, self.PeerURL)
}

// secret is what only who has a data directory knows, or a copy of it.
type secret []byte

// prove shows it to who knows it, without telling it to anybody else. What was
// proven is good for one question, and for one life of a process.
func (s secret) prove(challenge string, process uint64) string {
	h := hmac.New(sha256.New, s)
	fmt.Fprintf(h, "%s %d", challenge, process)
	return hex.EncodeToString(h.Sum(nil))
}

// checkFresh asks the other members whether this one is really new that has a
// directory without founders in which nothing has happened: an older version has
// made it, which founded clusters with a majority. All must answer, for the
// reason in founding.go.
func (n *node) checkFresh(ctx context.Context) error {
	if !n.fresh {
		return nil
	}
	n.informed.Store(true) // all that a new cluster knows
	retry := time.NewTicker(freshRetry)
	defer retry.Stop()
	for {
		answers := 1 // this member
		for _, m := range n.store.Members() {
			if m.ID == n.config.id {
				continue
			}
			info, err := fetchPeerInfo(ctx, m.PeerURL)
			if err != nil || info.Cluster != fmt.Sprintf("%x", n.cluster) {
				continue
			}
			if err := checkDirectory(n.config, info, n.directory); err != nil {
				return err
			}
			answers++
		}
		if answers == len(n.store.Members()) {
			return nil
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return nil
		}
	}
}

const freshRetry = 50 * time.Millisecond

// announce makes known to the cluster where this node serves clients and which
// data directory it has.
func (n *node) announce(ctx context.Context) error {
	update := store.Member{ID: n.config.id, ClientURL: n.config.clientURL, Directory: n.directory}
	value, err := json.Marshal(update)
	if err != nil {
		return err
	}
	retry := time.NewTicker(announceRetry)
	defer retry.Stop()
	for {
		if n.loop.linearize(ctx, n.config.requestTimeout) == nil { // before the node serves anybody else
			n.informed.Store(true)
			m, ok := n.store.Member(n.config.id)
			if ok && m.ClientURL == update.ClientURL && m.Directory == update.Directory {
				return nil
			}
			if _, err := n.loop.propose(ctx, n.config.requestTimeout, store.Command{Op: store.OpMember, Value: string(value)}); err != nil {
				n.logger.Debug("announce this node", zap.Error(err))
			}
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return nil
		}
	}
}

const announceRetry = 20 * time.Millisecond

// errRemoved ends a node that was removed from its cluster.
var errRemoved = errors.New("this node was removed from the cluster, as the others have confirmed; to come back it needs a new ID and a new --data-dir; " +
	"keep the one that it has until you know that the cluster has all that you need")

// checkMember refuses the directory of another node.
func checkMember(cfg config, id uint64) error {
	if id != cfg.id {
		return fmt.Errorf("data directory %s belongs to node %d, not to --id %d", cfg.dataDir, id, cfg.id)
	}
	return nil
}

const (
	keepPlaceEvery = 500 * time.Millisecond
	// leaderlessEvery is how often a node without a leader says so.
	leaderlessEvery = 15 * time.Second
	// leftOutMax is how long a node without a leader waits for one that has moved.
	leftOutMax = 3 * time.Second
)

// keepPlace ends the node when it cannot be what it takes itself for, and says
// why there is no leader.
func (n *node) keepPlace(ctx context.Context) error {
	tick := time.NewTicker(keepPlaceEvery)
	defer tick.Stop()
	leftAt := time.Now()
	sayAt := leftAt.Add(leftOutMax)
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if err := n.checkTwin(ctx); err != nil {
			return err
		}
		var left error
		if n.loop.status.Load().leader == 0 {
			members := slices.DeleteFunc(n.store.Members(), func(m store.Member) bool { return m.Learner })
			answers := askPeers(ctx, members)
			left = leftOut(n.config, n.cluster, members, answers)
			if now := time.Now(); now.After(sayAt) {
				sayAt = now.Add(leaderlessEvery)
				n.logger.Warn("there is no leader, so this node takes no writes, and reads only with resourceVersion=0: more than half of the voters must be up and reach each other",
					zap.Strings("without", n.unreached(members, answers)))
			}
		} else {
			sayAt = time.Now().Add(leftOutMax)
		}
		if left == nil {
			leftAt = time.Now()
		}
		if time.Since(leftAt) > leftOutMax {
			return left
		}
	}
}

// unreached says which other voters a node does not reach, and what came instead.
func (n *node) unreached(members []store.Member, answers map[uint64]peerAnswer) (whom []string) {
	for _, m := range members {
		if a := answers[m.ID]; m.ID != n.config.id && !m.Learner && (a.info == nil || a.info.Cluster != fmt.Sprintf("%x", n.cluster)) {
			whom = append(whom, fmt.Sprintf("node %d (%s): %s", m.ID, m.PeerURL, a.describe()))
		}
	}
	return whom
}

// leftOut says that a node's cluster can have no majority any more, since so many
// others are in another one, which was founded without this node.
func leftOut(cfg config, cluster uint64, members []store.Member, answers map[uint64]peerAnswer) error {
	var voters int
	var gone []string
	var theirs string
	for _, m := range members {
		if m.Learner {
			continue
		}
		voters++
		info := answers[m.ID].info
		if m.ID != cfg.id && info != nil && info.Cluster != "" && info.Cluster != fmt.Sprintf("%x", cluster) && (info.Node == m.ID || info.Node == 0) {
			gone, theirs = append(gone, fmt.Sprintf("%d (%s)", m.ID, m.PeerURL)), info.Cluster
		}
	}
	if voters-len(gone) > voters/2 {
		return nil
	}
	return fmt.Errorf("other members, %s, are in another cluster now, %s, which was founded without this node; its own cluster, %x, can have no majority, "+
		"so it does not serve: if what %s holds is what you want, stop the others and start over from it (raftrv recover --data-dir %s); "+
		"if not, move it away and add this node to the other cluster under a new ID, with --join", strings.Join(gone, ", "), theirs, cluster, cfg.dataDir, cfg.dataDir)
}
