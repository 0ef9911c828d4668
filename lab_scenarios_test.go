package main

import (
	"time"
)

// labScenarios are the 25, in the order and with the names of the course.
var labScenarios = []scenario{
	{"2A", "initial election", 3, nil, labInitialElection},
	{"2A", "election after network failure", 3, nil, labReElection},
	{"2A", "multiple elections", 7, nil, labManyElections},
	{"2B", "basic agreement", 3, nil, labBasicAgreement},
	{"2B", "RPC byte count", 3, nil, labByteCount},
	{"2B", "agreement after follower reconnects", 3, nil, labFollowerReconnects},
	{"2B", "no agreement if too many followers disconnect", 5, nil, labNoMajority},
	{"2B", "concurrent Start()s", 3, nil, labConcurrentStarts},
	{"2B", "rejoin of partitioned leader", 3, nil, labRejoin},
	{"2B", "leader backs up quickly over incorrect follower logs", 5, nil, labBackup},
	{"2B", "RPC counts aren't too high", 3, nil, labCounts},
	{"2C", "basic persistence", 3, nil, labPersistence},
	{"2C", "more persistence", 5, nil, labMorePersistence},
	{"2C", "partitioned leader and one follower crash, leader restarts", 3, nil, labLeaderRestarts},
	{"2C", "Figure 8", 5, nil, labFigure8},
	{"2C", "unreliable agreement", 5, unreliable, labUnreliableAgreement},
	{"2C", "Figure 8 (unreliable)", 5, unreliable, labFigure8Unreliable},
	{"2C", "churn", 5, nil, labChurn},
	{"2C", "unreliable churn", 5, unreliable, labChurn},
	{"2D", "snapshots basic", 3, snapshotEvery10, func(l *lab) { labSnapshots(l, nil, nil) }},
	{"2D", "install snapshots (disconnect)", 3, shortLog, func(l *lab) { labSnapshots(l, (*lab).disconnect, (*lab).connect) }},
	{"2D", "install snapshots (disconnect+unreliable)", 3, both(shortLog, unreliable), func(l *lab) { labSnapshots(l, (*lab).disconnect, (*lab).connect) }},
	{"2D", "install snapshots (crash)", 3, shortLog, func(l *lab) { labSnapshots(l, (*lab).crash, (*lab).restart) }},
	{"2D", "install snapshots (unreliable+crash)", 3, both(shortLog, unreliable), func(l *lab) { labSnapshots(l, (*lab).crash, (*lab).restart) }},
	{"2D", "crash and restart all servers", 3, snapshotEvery10, labCrashAll},
}

func both(a, b func(*simConfig)) func(*simConfig) {
	return func(cfg *simConfig) { a(cfg); b(cfg) }
}

// 2A: elections.

func labInitialElection(l *lab) {
	l.oneLeader()
	l.sim.run(50 * time.Millisecond)
	term := l.term()
	if term < 1 {
		l.Fatalf("term %d", term)
	}
	l.sim.run(2 * electionWait)
	if now := l.term(); now != term {
		l.Fatalf("term went from %d to %d without a failure", term, now)
	}
	l.oneLeader()
}

func labReElection(l *lab) {
	first := l.oneLeader()
	l.disconnect(first)
	l.oneLeader()
	l.connect(first) // must not disturb the new leader
	second := l.oneLeader()
	if leads(first) && first != second {
		l.Fatalf("node %d did not step down", first.id)
	}
	other := l.next(second, 1)
	l.disconnect(second, other)
	l.sim.run(2 * electionWait)
	l.noLeader()
	if leads(second) {
		l.Fatalf("node %d still leads, without a majority", second.id)
	}
	l.connect(other)
	l.oneLeader()
	l.connect(second)
	l.oneLeader()
}

func labManyElections(l *lab) {
	l.oneLeader()
	for range 10 {
		away := []*simNode{pick(l.sim, l.nodes), pick(l.sim, l.nodes), pick(l.sim, l.nodes)}
		l.disconnect(away...)
		l.oneLeader() // either the old one or a new one
		l.connect(away...)
	}
	l.oneLeader()
}

// 2B: agreement.

func labBasicAgreement(l *lab) {
	first := uint64(0)
	for i := range uint64(3) {
		if rv := l.check.model.rv; rv != i {
			l.Fatalf("version %d before write %d was begun", rv, i+1)
		}
		op := l.one(len(l.nodes))
		index, _ := l.index(op)
		if i == 0 {
			first = index
		}
		if op.result.RV != i+1 || index != first+i {
			l.Fatalf("write %d has version %d and entry %d, the first one has entry %d", i+1, op.result.RV, index, first)
		}
	}
}

func labByteCount(l *lab) {
	l.one(len(l.nodes))
	before, sent := l.network.bytes, 0
	for range 10 {
		value := l.value() + string(make([]byte, 5000))
		sent += len(value)
		l.wait(l.T, l.begin(l.highestLeader(), putOp("x", value), time.Second))
	}
	if got, limit := l.network.bytes-before, len(l.nodes)*sent+50000; got > limit {
		l.Fatalf("%d bytes, at most %d are needed", got, limit)
	}
}

func labFollowerReconnects(l *lab) {
	l.one(len(l.nodes))
	away := l.next(l.oneLeader(), 1)
	l.disconnect(away)
	l.one(len(l.nodes) - 1)
	l.one(len(l.nodes) - 1)
	l.sim.run(electionWait)
	l.one(len(l.nodes) - 1)
	l.one(len(l.nodes) - 1)
	l.connect(away)
	l.one(len(l.nodes))
	l.sim.run(electionWait)
	l.one(len(l.nodes))
}

func labNoMajority(l *lab) {
	l.one(len(l.nodes))
	leader := l.oneLeader()
	away := []*simNode{l.next(leader, 1), l.next(leader, 2), l.next(leader, 3)}
	l.disconnect(away...)
	op := l.start(leader, electionWait)
	l.sim.run(2 * electionWait)
	if l.holders(op) > 0 || op.outcome == opDone {
		l.Fatalf("without a majority: %v", op)
	}
	if !op.ended() {
		l.Fatalf("no answer after its deadline: %v", op)
	}
	l.connect(away...)
	l.wait(l.T, l.start(l.oneLeader(), 2*time.Second))
	if rv := l.check.model.rv; rv != 2 && rv != 3 {
		l.Fatalf("version %d after two or three writes", rv)
	}
	l.one(len(l.nodes))
}

func labConcurrentStarts(l *lab) {
	leader := l.oneLeader()
	term := leader.process.replica.term
	var ops []*simOp
	for range 5 {
		ops = append(ops, l.start(leader, 2*time.Second))
	}
	versions := map[uint64]bool{}
	for _, op := range ops {
		l.wait(l.T, op)
		versions[op.result.RV] = true
	}
	if len(versions) != len(ops) {
		l.Fatalf("%d writes have %d versions", len(ops), len(versions))
	}
	if now := l.term(); now != term {
		l.Fatalf("term went from %d to %d", term, now)
	}
}

func labRejoin(l *lab) {
	l.one(len(l.nodes))
	first := l.oneLeader()
	l.disconnect(first)
	var lost []*simOp
	for range 3 {
		lost = append(lost, l.start(first, 200*time.Millisecond))
	}
	l.sim.run(electionWait)
	l.one(2)
	second := l.oneLeader()
	l.disconnect(second)
	l.connect(first)
	l.one(2)
	l.connect(second)
	l.one(len(l.nodes))
	for _, op := range lost {
		if _, _, applied := l.applied(op); applied || op.outcome == opDone {
			l.Fatalf("of a leader that was alone: %v", op)
		}
	}
}

func labBackup(l *lab) {
	const entries = 50
	l.one(len(l.nodes))
	first := l.oneLeader()
	friend, others := l.next(first, 1), []*simNode{l.next(first, 2), l.next(first, 3), l.next(first, 4)}
	l.disconnect(others...)
	l.flood(first, entries, 100*time.Millisecond) // none of them commits
	l.sim.run(electionWait / 2)
	l.disconnect(first, friend)

	l.connect(others...)
	for range entries {
		l.one(3)
	}
	second := l.oneLeader()
	away := others[0]
	if second == away {
		away = others[1]
	}
	l.disconnect(away)
	l.flood(second, entries, 100*time.Millisecond) // nor do these
	l.sim.run(electionWait / 2)
	l.disconnect(l.nodes...)

	before := l.network.rejects
	l.connect(first, friend, away)
	for range entries {
		l.one(3)
	}
	l.connect(l.nodes...)
	l.one(len(l.nodes))
	// Going back one entry at a time would take a hundred.
	if n, limit := l.network.rejects-before, 10*len(l.nodes); n > limit {
		l.Fatalf("%d appends were rejected, at most %d are needed", n, limit)
	}
}

func labCounts(l *lab) {
	leader := l.oneLeader()
	if n := l.network.requests; n < 1 || n > 30 {
		l.Fatalf("%d RPCs to elect a leader", n)
	}
	const writes = 10
	before := l.network.requests
	var ops []*simOp
	for range writes {
		ops = append(ops, l.start(leader, time.Second))
	}
	for _, op := range ops {
		l.wait(l.T, op)
	}
	if n, limit := l.network.requests-before, (writes+1+3)*3; n > limit {
		l.Fatalf("%d RPCs for %d writes, at most %d are needed", n, writes, limit)
	}
	l.sim.run(100 * time.Millisecond)
	before = l.network.requests
	l.sim.run(time.Second)
	if n := l.network.requests - before; n > 3*20 {
		l.Fatalf("%d RPCs in one idle second", n)
	}
}

// 2C: persistence.

func labPersistence(l *lab) {
	l.one(len(l.nodes))
	l.crash(l.nodes...)
	l.restart(l.nodes...)
	l.one(len(l.nodes))
	l.restart(l.oneLeader())
	l.one(len(l.nodes))
	leader := l.oneLeader()
	l.crash(leader)
	l.one(len(l.nodes) - 1)
	l.restart(leader)
	l.one(len(l.nodes))
	follower := l.next(l.oneLeader(), 1)
	l.crash(follower)
	l.one(len(l.nodes) - 1)
	l.restart(follower)
	l.one(len(l.nodes))
}

func labMorePersistence(l *lab) {
	for range 5 {
		l.one(len(l.nodes))
		leader := l.oneLeader()
		l.crash(l.next(leader, 1), l.next(leader, 2))
		l.one(len(l.nodes) - 2)
		l.crash(leader, l.next(leader, 3), l.next(leader, 4))
		l.restart(l.next(leader, 1), l.next(leader, 2))
		l.sim.run(electionWait)
		l.restart(l.next(leader, 3))
		l.one(len(l.nodes) - 2)
		l.restart(leader, l.next(leader, 4))
	}
	l.one(len(l.nodes))
}

func labLeaderRestarts(l *lab) {
	l.one(3)
	leader := l.oneLeader()
	follower, stale := l.next(leader, 1), l.next(leader, 2)
	l.disconnect(stale)
	op := l.one(2)
	l.crash(leader, follower)
	l.connect(stale)
	l.restart(leader) // only it has all that is committed
	l.one(2)
	if _, _, applied := l.applied(op); !applied || l.holders(op) < 2 {
		l.Fatalf("lost: %v", op)
	}
	l.restart(follower)
	l.one(3)
}

// pause is the lab's pause between two writes of both Figure 8 scenarios.
func (l *lab) pause() {
	if l.chance(0.1) {
		l.sim.run(l.between(0, electionWait/2))
	} else {
		l.sim.run(l.between(0, 13*time.Millisecond))
	}
}

// startAtLeaders begins a write on every node that believes it leads, and
// returns the last one.
func (l *lab) startAtLeaders() *simNode {
	var leader *simNode
	for _, n := range l.nodes {
		if leads(n) {
			l.start(n, time.Second)
			leader = n
		}
	}
	return leader
}

// labFigure8 is the figure of the Raft paper: leaders crash again and again
// before or after their entries reach a majority. No entry of an earlier term
// may count as committed because a majority has it.
func labFigure8(l *lab) {
	l.one(1)
	for range 1000 {
		leader := l.startAtLeaders()
		l.pause()
		if leader != nil {
			l.crash(leader)
		}
		if len(l.up()) < 3 {
			pick(l.sim, l.nodes).start()
		}
	}
	for _, n := range l.nodes {
		n.start()
	}
	l.one(len(l.nodes))
}

func labFigure8Unreliable(l *lab) {
	l.one(1)
	for i := range 1000 {
		if i == 200 { // answers come late and in any order
			l.network.late, l.network.lateMax = 2.0/3, 2200*time.Millisecond
		}
		leader := l.startAtLeaders()
		l.pause()
		if leader != nil && !l.cut[leader.id] && l.chance(0.5) {
			l.disconnect(leader)
		}
		if len(l.reachable()) < 3 {
			l.connect(pick(l.sim, l.nodes))
		}
	}
	l.network.late = 0
	l.connect(l.nodes...)
	l.one(len(l.nodes))
}

func labUnreliableAgreement(l *lab) {
	var ops []*simOp
	for range 49 {
		for range 4 {
			leader := l.highestLeader()
			if leader == nil {
				leader = l.oneLeader()
			}
			ops = append(ops, l.start(leader, 10*time.Second))
		}
		l.one(1)
	}
	l.network.netConfig = defaultSimConfig(0, 1).net
	for _, op := range ops {
		l.wait(l.T, op)
	}
	l.one(len(l.nodes))
}

// labChurn has clients that write while nodes crash, restart, come and go.
// That all they saw committed is in the final log is seen at the end. How much
// that is depends on the seed: there may be no majority most of the time.
func labChurn(l *lab) {
	stop := false
	for id := range 3 {
		var write func()
		write = func() {
			if stop {
				return
			}
			patience := []time.Duration{10, 20, 50, 100, 200}[l.rand.IntN(5)] * time.Millisecond
			l.startAtLeaders()
			l.after(patience+time.Duration(79+17*id)*time.Millisecond, write)
		}
		l.after(0, write)
	}
	for range 20 {
		if l.chance(0.2) {
			l.disconnect(pick(l.sim, l.nodes))
		}
		if l.chance(0.5) {
			n := pick(l.sim, l.nodes)
			n.start()
			l.connect(n)
		}
		if l.chance(0.2) {
			l.crash(pick(l.sim, l.nodes))
		}
		l.sim.run(electionWait * 7 / 10)
	}
	stop = true
	l.network.netConfig = defaultSimConfig(0, 1).net
	for _, n := range l.nodes {
		n.start()
	}
	l.connect(l.nodes...)
	l.one(len(l.nodes))
}

// 2D: snapshots.

const logSizeMax = 2000 // bytes, as in the course

// labSnapshots writes enough for snapshots, while one node is away if leave is
// set, so that it must be sent one when it is back.
func labSnapshots(l *lab, leave, enter func(*lab, ...*simNode)) {
	const rounds = 30
	l.one(len(l.nodes))
	leader := l.oneLeader()
	for i := range rounds {
		victim, sender := l.next(leader, 1), leader
		if i%3 == 1 {
			victim, sender = sender, victim
		}
		all := len(l.nodes)
		if leave != nil {
			leave(l, victim)
			all--
			l.one(all)
		}
		l.flood(sender, 5+l.rand.IntN(10), 5*time.Second)
		l.one(all)
		l.logsAreShort()
		if leave != nil {
			enter(l, victim)
			l.one(len(l.nodes))
			leader = l.oneLeader()
		}
	}
	switch {
	case leave == nil && l.network.snapshots > 0:
		l.Fatalf("%d snapshots were sent to nodes that were never away", l.network.snapshots)
	case leave != nil && l.network.snapshots < rounds/3:
		l.Fatalf("only %d snapshots were sent", l.network.snapshots)
	}
}

// logsAreShort wants the logs in memory to end soon behind a snapshot.
func (l *lab) logsAreShort() {
	l.Helper()
	l.sim.run(50 * time.Millisecond) // snapshots are written beside the log
	for _, n := range l.up() {
		log := n.process.replica.log
		first, _ := log.FirstIndex()
		last, _ := log.LastIndex()
		ents, err := log.Entries(first, last+1, noLimit)
		if err != nil && last >= first {
			l.Fatal(err)
		}
		size := 0
		for _, e := range ents {
			size += len(e.GetData())
		}
		if size > logSizeMax {
			l.Fatalf("the log of node %d has %d bytes in %d entries", n.id, size, len(ents))
		}
	}
}

func labCrashAll(l *lab) {
	l.one(len(l.nodes))
	for range 5 {
		for range 5 + l.rand.IntN(10) {
			l.one(len(l.nodes))
		}
		before := l.one(len(l.nodes))
		l.crash(l.nodes...)
		l.restart(l.nodes...)
		l.oneLeader()
		after := l.one(len(l.nodes))
		i, _ := l.index(before)
		j, _ := l.index(after)
		if j < i+1 || after.result.RV != before.result.RV+1 {
			l.Fatalf("entry %d, version %d, came after %d and %d", j, after.result.RV, i, before.result.RV)
		}
	}
}
