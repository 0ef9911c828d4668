package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/store"
)

// This file is how a process finds its place in a cluster: the product's code,
// with other nodes of the simulation to ask, and with flags that may be wrong. What
// comes of wrong flags must be a refusal, or the right cluster.

// simFlags are those of a node that matter here. The zero value stands for the
// right ones.
type simFlags struct {
	wrong bool
	list  []store.Member
	token string
	join  bool
	dir   string // instead of its own, if it is not ""
}

// simToken is the right one.
const simToken = "sim"

// rightFlags are what a node should be started with: the founders, or if it joins
// everybody, as some may be gone.
func (n *simNode) rightFlags() simFlags {
	f := simFlags{token: simToken, join: n.joins}
	for _, m := range n.sim.nodes {
		if !m.joins || n.joins {
			f.list = append(f.list, store.Member{ID: m.id, PeerURL: m.url})
		}
	}
	return f
}

// wrongFlags are the right ones with one mistake.
func (n *simNode) wrongFlags() simFlags {
	s, f := n.sim, n.rightFlags()
	f.wrong = true
	swap := func(i, j int) { f.list[i].PeerURL, f.list[j].PeerURL = f.list[j].PeerURL, f.list[i].PeerURL }
	switch other := pick(s, s.nodes); s.rand.IntN(9) {
	case 0: // the addresses in another order
		s.rand.Shuffle(len(f.list), swap)
	case 1: // with a member that is not there
		f.list = append(f.list, store.Member{ID: nodesMax - 1, PeerURL: "http://nowhere"})
	case 2, 7, 8: // without one; two clusters that share no member would both be right
		left := slices.IndexFunc(f.list, func(m store.Member) bool { return m.ID != 1 && m.ID != n.id })
		if left >= 0 {
			f.list = slices.Delete(f.list, left, left+1)
		}
	case 3:
		f.list[s.rand.IntN(len(f.list))].PeerURL = "http://elsewhere"
	case 4:
		f.token = pick(s, []string{"", "other"})
	case 5:
		f.join = !f.join
	case 6: // the directory of another, or an empty one, instead of one with data
		if n.identity.Member == 0 || slices.ContainsFunc(s.nodes, func(o *simNode) bool { return o.flags.dir != "" }) {
			break // two of two with empty ones would be right to found another cluster
		}
		if len(f.list) > 1 && n.known { // or there is nobody to ask, or nobody knows it
			f.dir = n.dir + "-empty"
		}
		if other != n && other.identity.Member != 0 && s.chance(0.5) {
			f.dir = other.dir
		}
	}
	return f
}

// startRight starts a node that is not up with the right flags.
func (n *simNode) startRight() {
	if n.process != nil {
		return
	}
	if n.flags.wrong && n.seeking != nil {
		n.seeking.die()
	}
	n.flags = simFlags{}
	n.start()
}

// faultWrongStart starts a node again, with a mistake in its flags.
func faultWrongStart(s *sim) {
	if n := pick(s, s.nodes); s.wrongStarts > 0 && !n.retired {
		n.crash(s.someTail())
		n.flags = n.wrongFlags()
		n.start()
	}
}

// simPlace is a process that looks for its place. It implements surroundings.
//
// Like the loop it is a coroutine, which gives control back while it waits.
type simPlace struct {
	sim    *sim
	node   *simNode
	files  *storage
	number uint64
	info   peerInfo // what it tells others
	dead   bool

	resume func() (struct{}, bool)
	unwind func()
	yield  func(struct{}) bool

	ended bool // and came to
	rec   *recovered
	err   error
}

// seek begins to look for the place of a node.
func (n *simNode) seek() {
	s, flags := n.sim, n.flags
	if !flags.wrong {
		flags = n.rightFlags()
	}
	dir := n.dir
	if flags.dir != "" {
		dir = flags.dir
		if dir == n.dir+"-empty" {
			if err := os.RemoveAll(dir); err != nil {
				s.check.violate("simulator", "%v", err)
			}
		} else if slices.ContainsFunc(s.nodes, func(o *simNode) bool { return o.dir == dir && (o.process != nil || o.seeking != nil) }) {
			n.refused(errors.New("the directory is in use"))
			return
		}
	}
	n.resynced = false
	logger := s.logger.Named(fmt.Sprintf("node%d", n.id))
	files, err := openStorage(dir, logger)
	if err != nil {
		n.refused(err)
		return
	}
	rec, err := files.load()
	if err != nil {
		n.refused(errors.Join(err, files.close()))
		return
	}
	f := &simPlace{sim: s, node: n, files: files, number: randomID()}
	f.info = peerInfo{Node: n.id, Process: f.number}
	cfg := config{id: n.id, members: flags.list, token: flags.token, join: flags.join, dataDir: dir}
	f.resume, f.unwind = iter.Pull(func(yield func(struct{}) bool) {
		defer func() {
			if v := recover(); v != nil {
				s.check.violate("panic", "node %d looks for its place: %v\n%s", n.id, v, debug.Stack())
			}
		}()
		f.yield = yield
		f.rec, f.err = (&place{cfg: cfg, disk: files, process: f.number, around: f, logger: logger}).find(context.Background(), rec)
		f.ended = true
	})
	n.seeking = f
	f.step()
}

// step lets the process look once more.
func (f *simPlace) step() {
	n := f.node
	switch {
	case f.dead:
		return
	case n.paused():
		n.held = append(n.held, f.step)
		return
	}
	if f.resume(); !f.ended {
		return
	}
	n.seeking = nil
	switch {
	case f.err != nil:
		n.refused(errors.Join(f.err, f.files.close()))
	case n.lives == 1 && !n.flags.wrong && f.sim.chance(f.sim.brokenStarts):
		if err := errors.Join(f.files.close(), n.breakOff(f.rec.identity)); err != nil {
			f.sim.check.violate("simulator", "first start of node %d: %v", n.id, err)
		}
		n.start()
	default:
		n.identity = f.rec.identity
		n.enter(f.files, f.rec, f.number)
	}
}

// die ends the process where it is.
func (f *simPlace) die() {
	f.dead, f.node.seeking = true, nil
	f.unwind()
	if err := f.files.close(); err != nil {
		f.sim.check.violate("simulator", "%v", err)
	}
	if f.sim.died != nil {
		f.sim.died(f.node)
	}
}

// refused is the end of a process that does not start. With the right flags all
// do, sooner or later: those who have waited for others with wrong ones may give up.
func (n *simNode) refused(err error) {
	s := n.sim
	_, isMember := s.check.model.members[n.id]
	switch conflict := n.identity.Member == 0; {
	case s.plant != nil && s.plant.afterCrash != nil:
		n.retired = true // it is right to refuse a damaged directory
		return
	case s.check.model.removed[n.id]:
		n.retired = true
		return
	case n.flags.wrong:
		s.check.reached["refused"]++
	case s.check.cluster != 0 && !isMember && !n.joins:
		n.retired = true // founded without it
		return
	case n.borrowed():
	case conflict && s.wrongStarts > 0 && !s.healthy.on:
	default:
		s.check.violate("start", "node %d does not start: %v", n.id, err)
	}
	if s.died != nil {
		s.died(n)
	} else {
		s.after(time.Second, n.startRight)
	}
}

// borrowed says whether another node, which is started wrongly, has the directory of
// this one open: it was paused on its way to see that.
func (n *simNode) borrowed() bool {
	return slices.ContainsFunc(n.sim.nodes, func(o *simNode) bool { return o != n && o.seeking != nil && o.flags.dir == n.dir })
}

func (f *simPlace) tell(info peerInfo) { f.info = info }
func (f *simPlace) waiting([]string)   {}
func (f *simPlace) now() time.Time     { return f.node.clock() }

func (f *simPlace) pause(_ context.Context, d time.Duration) bool {
	f.sim.after(d, f.step)
	return f.yield(struct{}{})
}

// ask asks whoever lives at these addresses. Not every network leads a node to
// itself.
func (f *simPlace) ask(_ context.Context, members []store.Member) map[uint64]peerAnswer {
	s, answers := f.sim, map[uint64]peerAnswer{}
	for _, m := range members {
		answers[m.ID] = peerAnswer{err: errors.New("nothing")}
		if i := slices.IndexFunc(s.nodes, func(n *simNode) bool { return n.url == m.PeerURL }); i >= 0 {
			if info, ok := s.nodes[i].tells(f.node); ok {
				answers[m.ID] = peerAnswer{info: &info}
			}
		}
	}
	if s.plant != nil && s.plant.answers != nil {
		s.plant.answers(f, answers)
	}
	return answers
}

// tells returns what a node says to another one that looks for its place.
func (n *simNode) tells(to *simNode) (info peerInfo, ok bool) {
	s, p := n.sim, n.process
	switch cut := &s.network.cut; {
	case cut[n.id][to.id] || cut[to.id][n.id] || n.paused() || s.chance(s.network.loss) || n == to && s.chance(0.5):
		return peerInfo{}, false
	case n.seeking != nil:
		return n.seeking.info, true
	case p == nil:
		return peerInfo{}, false
	}
	info = peerInfo{Cluster: fmt.Sprintf("%x", p.identity.Cluster), Node: n.id, Process: p.number, Founders: p.identity.Founders}
	if info.informed = p.informed; p.informed {
		info.Members, info.Removed = p.store.Members(), p.store.Removed()
	}
	return info, true
}

// announceEvery is how often a node tries to find out what happened while it was
// away.
const announceEvery = 20 * time.Millisecond

// announce reads, as a node does before it serves, until that succeeds, and then
// tells the others which directory it has. Who joined gets no vote before it has.
func (p *process) announce() {
	switch m, ok := p.store.Member(p.node.id); {
	case !p.sim.announces && (!p.identity.Joined || p.sim.silent):
		p.informed = true
		return
	case !p.informed:
		if _, err := p.loop.joinRound(); err == nil {
			p.wake()
		}
	case ok && m.Directory == p.identity.Directory:
		p.node.known = true
		return
	case p.announced == nil || isClosed(p.announced.done):
		update, err := json.Marshal(store.Member{ID: p.node.id, Directory: p.identity.Directory})
		if err == nil {
			p.announced, _, err = p.loop.enqueue(&store.Command{Op: store.OpMember, Value: string(update)}, p.node.clock().Add(time.Second))
		}
		if err != nil {
			p.announced = nil // it tries again
		}
		p.wake()
	}
	p.after(announceEvery, p.announce)
}

// breakOff leaves the directory as a crash in the middle of the first start
// does: with an empty log, or with the first snapshot too, which may have its
// record or not. The next start must go on from there.
func (n *simNode) breakOff(id identity) error {
	if err := os.RemoveAll(n.dir); err != nil {
		return err
	}
	files, err := openStorage(n.dir, n.sim.logger)
	if err != nil {
		return err
	}
	rec, err := files.create(id)
	if err == nil && !n.joins && n.sim.chance(0.7) {
		st, cs := rec.state, &raftpb.ConfState{}
		st.Index, st.Term = modelBase, 1
		for _, m := range id.Founders {
			st.Members[m.ID] = m
			cs.Voters = append(cs.Voters, m.ID)
		}
		meta := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{ConfState: cs, Index: new(st.Index), Term: new(st.Term)}}
		err = files.writeSnapshot(meta, &st)
		if err == nil && n.sim.chance(0.5) {
			err = files.commitSnapshot(meta)
		}
	}
	return errors.Join(err, files.close())
}
