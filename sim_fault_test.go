package main

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"go.etcd.io/raft/v3"

	"raftrv/internal/store"
)

// This file is what goes wrong in TestSim, and when: storms, in which faults of
// many kinds come one after the other, take turns with calm, in which all is
// repaired and clients must be served.

// simFault makes one thing go wrong.
type simFault func(s *sim)

// simFaults are all kinds. A seed uses about half of them, so that runs differ
// more than if each had a little of everything.
var simFaults = []simFault{
	faultCrash, faultCrash, faultTrap, faultTrap, faultTrap, faultDisk, faultFull, faultPowerCut, faultStop,
	faultPartition, faultIsolateLeader, faultIsolate, faultOneWay, faultBridge, faultSlow,
	faultPause, faultPauseLeader, faultTransfer, faultMembers, faultMembers, faultWrongStart,
}

// weather is how a run goes.
type weather struct {
	storm, calm time.Duration
	mean        time.Duration // between two faults of a storm
	faults      []simFault
	outage      time.Duration // mean time until something is repaired
	net         netConfig     // in a storm
	disk        diskConfig    // in a storm
}

// clockOffsetMax is how far clocks are off that are not wrong. Two that are an hour
// apart make an Idempotency-Key too old to be remembered, at level 1.
const clockOffsetMax = store.RetryAgeMillis * time.Millisecond * 4 / 10

// drawConfig draws a cluster from a seed.
func drawConfig(seed uint64) simConfig {
	r := rand.New(rand.NewPCG(seed, 1))
	between := func(low, high time.Duration) time.Duration { return low + time.Duration(r.Int64N(int64(high-low))) }
	sizes := []int{1, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5, 7}
	if *simSmall {
		sizes = []int{1, 2}
	}
	cfg := defaultSimConfig(seed, sizes[r.IntN(len(sizes))])
	if r.IntN(2) == 0 {
		cfg.appendBytes = 64 + r.Uint64N(4096)
	}
	if r.IntN(4) == 0 {
		cfg.applyBytes = 64 + r.Uint64N(4096)
	}
	if r.IntN(3) == 0 {
		cfg.oldVersions = 0.5
	}
	if r.IntN(4) == 0 {
		cfg.learners = 1
	}
	if r.IntN(2) == 0 {
		cfg.readEvents = 1 + r.IntN(3)
	}
	cfg.eventsMax = []uint64{1, 64, 1024}[r.IntN(3)]
	cfg.largeValues = r.IntN(8) == 0
	cfg.snapshotEntries = 3 + r.Uint64N(48)
	cfg.catchUpEntries = 5 + r.IntN(15)
	cfg.net.delayMin = between(20*time.Microsecond, time.Millisecond)
	cfg.net.delayMax = cfg.net.delayMin + between(100*time.Microsecond, 5*time.Millisecond)
	cfg.disk.syncMax = cfg.disk.syncMin + between(100*time.Microsecond, 4*time.Millisecond)
	cfg.disk.background = between(time.Millisecond, 50*time.Millisecond)
	cfg.brokenStarts, cfg.announces = 0.3, true
	if r.IntN(2) == 0 {
		cfg.wrongStarts = 0.3
	}
	cfg.hiccups = 0.002
	if r.IntN(2) == 0 {
		cfg.clockRate, cfg.clockOffset = 0.2, clockOffsetMax
		cfg.clocksWrong = r.IntN(2) == 0
	}
	return cfg
}

func (s *sim) drawWeather() *weather {
	w := &weather{
		storm:  s.between(5*time.Second, 15*time.Second),
		calm:   s.between(5*time.Second, 7*time.Second),
		mean:   s.between(100*time.Millisecond, 2*time.Second),
		outage: s.between(200*time.Millisecond, 2*time.Second),
		net:    s.net,
		disk:   s.disk,
	}
	for _, f := range simFaults {
		if s.chance(0.5) {
			w.faults = append(w.faults, f)
		}
	}
	if len(w.faults) == 0 {
		w.faults = simFaults
	}
	if s.chance(0.7) {
		w.net.loss = s.rand.Float64() * 0.1
	}
	if s.chance(0.7) {
		w.net.duplicate = s.rand.Float64() * 0.05
	}
	if s.chance(0.7) {
		w.net.late, w.net.lateMax = s.rand.Float64()*0.05, s.between(10*time.Millisecond, 2500*time.Millisecond)
	}
	if s.chance(0.5) {
		w.disk.slow, w.disk.slowMax = 0.005, s.between(10*time.Millisecond, 500*time.Millisecond)
	}
	return w
}

// live lets storms and calm take turns until the time is over, and ends with
// calm.
func (s *sim) live(w *weather, d time.Duration) {
	end := s.now + d - w.calm
	s.outage = w.outage
	s.died = func(n *simNode) { // as a supervisor does
		if s.healthy.on {
			s.after(0, n.startRight)
			return
		}
		if s.chance(0.5) {
			n.flags = simFlags{}
		}
		s.repair(n.start)
	}
	for s.now < end && !s.check.failed() {
		s.beginStorm(w)
		s.run(min(w.storm, end-s.now))
		s.beginCalm()
		s.run(w.calm)
		s.check.overdue()
	}
}

func (s *sim) beginStorm(w *weather) {
	s.healthy.end(s.now)
	s.network.netConfig, s.disk = w.net, w.disk
	s.storms++
	storm := s.storms
	var strike func()
	strike = func() {
		if s.storms != storm || s.healthy.on {
			return
		}
		pick(s, w.faults)(s)
		s.after(s.around(w.mean), strike)
	}
	s.after(s.around(w.mean), strike)
}

func (s *sim) beginCalm() {
	s.network.netConfig, s.disk.slow = s.net, 0
	s.network.heal()
	for _, n := range s.nodes {
		if n.flags.wrong && n.seeking != nil {
			n.seeking.die()
		}
	}
	for _, n := range s.nodes {
		n.full = false
		n.pausedUntil = s.now
		n.resume()
		if n.process != nil && n.process.disk.broken {
			n.crash(tailClean) // before it has noticed
		}
		if n.process != nil {
			n.process.trap = trap{}
		} else {
			n.startRight()
		}
	}
	s.healthy.begin(s.now)
}

// quiet lets the clients finish and the members catch up.
func (s *sim) quiet() {
	for _, n := range s.nodes {
		n.startRight()
	}
	s.runUntil(30*time.Second, func() bool {
		return !slices.ContainsFunc(s.history.ops, func(op *simOp) bool { return op.returned == 0 })
	})
	s.runUntil(recoveryMax, func() bool { return validateConverged(s) == nil })
}

// repair runs f some time later.
func (s *sim) repair(f func()) { s.after(s.around(s.outage), f) }

// up returns the nodes that run.
func (s *sim) up() []*simNode {
	var up []*simNode
	for _, n := range s.nodes {
		if n.process != nil {
			up = append(up, n)
		}
	}
	return up
}

// leader returns the node that leads the highest term, or any one.
func (s *sim) leader() *simNode {
	var leader *simNode
	for _, n := range s.up() {
		if r := n.process.replica; r.role == raft.StateLeader && (leader == nil || r.term > leader.process.replica.term) {
			leader = n
		}
	}
	if leader == nil {
		return pick(s, s.nodes)
	}
	return leader
}

func (s *sim) someTail() tail { return tail(s.rand.IntN(3)) }

func faultCrash(s *sim) { pick(s, s.nodes).crash(s.someTail()) }

// faultTrap lets a process die at a named point.
func faultTrap(s *sim) {
	if n := pick(s, s.nodes); n.process != nil {
		n.process.trap = trap{point: pick(s, crashPoints), fault: errCrashed, tail: s.someTail()}
	}
}

// faultDisk lets a write fail.
func faultDisk(s *sim) {
	if n := pick(s, s.nodes); n.process != nil {
		n.process.trap = trap{point: pick(s, diskPoints), fault: errDisk, tail: s.someTail()}
	}
}

// faultFull fills the disk of a node, up to what admission keeps for the log.
func faultFull(s *sim) { pick(s, s.nodes).full = true }

func faultPowerCut(s *sim) {
	for _, n := range s.nodes {
		n.crash(s.someTail())
	}
}

func faultStop(s *sim) { pick(s, s.nodes).stop() }

func faultPartition(s *sim) {
	side := s.rand.Uint64()
	s.network.partition(func(id uint64) bool { return side>>id&1 == 1 })
	s.repair(s.network.heal)
}

func faultIsolate(s *sim) {
	id := pick(s, s.nodes).id
	s.network.isolate(id, true)
	s.repair(func() { s.network.isolate(id, false) })
}

func faultIsolateLeader(s *sim) {
	id := s.leader().id
	s.network.isolate(id, true)
	s.repair(func() { s.network.isolate(id, false) })
}

// faultOneWay cuts one direction of one link, or all that one node sends.
func faultOneWay(s *sim) {
	from, to := pick(s, s.nodes).id, pick(s, s.nodes).id
	all := s.chance(0.3)
	for other := range s.network.cut[from] {
		if all || uint64(other) == to {
			s.network.cut[from][other] = true
		}
	}
	s.repair(s.network.heal)
}

// faultBridge splits the nodes into two halves that one node still connects.
func faultBridge(s *sim) {
	side, bridge := s.rand.Uint64(), pick(s, s.nodes).id
	s.network.partition(func(id uint64) bool { return side>>id&1 == 1 })
	s.network.isolate(bridge, false)
	s.repair(s.network.heal)
}

func faultSlow(s *sim) {
	from, to := pick(s, s.nodes).id, pick(s, s.nodes).id
	s.network.slow[from][to] = s.between(0, 2500*time.Millisecond)
	s.repair(func() { s.network.slow[from][to] = 0 })
}

func faultPause(s *sim) { pick(s, s.nodes).pause(s.around(s.outage)) }

func faultPauseLeader(s *sim) { s.leader().pause(s.around(s.outage)) }

func faultTransfer(s *sim) {
	if p := s.leader().process; p != nil {
		p.transfer()
	}
}

// Membership.

const (
	membersMax    = 7
	changeTimeout = 1500 * time.Millisecond
)

// faultMembers adds, promotes or removes a member.
func faultMembers(s *sim) {
	members := slices.SortedFunc(maps.Values(s.check.model.members), func(a, b store.Member) int { return cmp.Compare(a.ID, b.ID) })
	if len(members) == 0 || s.now < s.changing {
		return
	}
	s.changing = s.now + changeTimeout
	m := pick(s, members)
	if s.node(m.ID).stays {
		return
	}
	switch {
	case m.Learner && s.chance(0.5):
		s.changeMember(store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: m.ID}})
	case len(members) < membersMax && len(s.nodes) < nodesMax && s.chance(0.5):
		n := s.addNode(fmt.Sprintf("http://n%d", len(s.nodes)+1), true)
		s.changeMember(store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: n.id, PeerURL: n.url, Promote: s.chance(0.7)}})
		s.after(s.around(100*time.Millisecond), n.start)
	default: // the last voter, and a majority that is needed, are safe
		s.changeMember(store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: m.ID}})
	}
}

// addLearners adds members that are never promoted.
func (s *sim) addLearners() {
	for range s.learners {
		n := s.addNode(fmt.Sprintf("http://n%d", len(s.nodes)+1), true)
		n.stays = true
		var try func()
		try = func() {
			if _, added := s.check.model.members[n.id]; !added {
				s.changeMember(store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: n.id, PeerURL: n.url}})
				s.after(changeTimeout, try)
				return
			}
			n.start()
		}
		s.after(time.Second, try)
	}
}

// changeMember proposes a change at some member. Whether it succeeds is seen in
// the log.
func (s *sim) changeMember(c store.MemberChange) {
	if n := pick(s, s.nodes); n.process != nil {
		n.proposeChange(c, changeTimeout)
	}
}

// proposeChange hands a change to a node that is up, and does not wait.
func (n *simNode) proposeChange(c store.MemberChange, timeout time.Duration) *batch {
	p := n.process
	b, err := newMemberChange(c, n.clock().Add(time.Duration(float64(timeout)*n.rate)))
	if err != nil {
		panic(err) // a member that is no JSON
	}
	p.loop.mu.Lock()
	p.loop.push(b)
	p.loop.mu.Unlock()
	p.wake()
	return b
}
