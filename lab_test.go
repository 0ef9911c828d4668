package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"testing"
	"time"

	"go.etcd.io/raft/v3"

	"raftrv/internal/store"
)

// This file is the harness of the lab: the 25 scenarios of the raft course MIT
// 6.824, on this program's replica, storage and state machine, in virtual time.
// The scenarios are in lab_scenarios_test.go.

var (
	labReport = flag.Bool("lab.report", false, "print the lab's lines")
	labSeed   = flag.Uint64("lab.seed", 1, "first `seed`")
	labSeeds  = flag.Int("lab.seeds", 1, "`number` of seeds")
	labWorker = flag.Bool("lab.worker", false, "print results as JSON; set by the process that shares out the seeds")
)

// scenario is one of the 25.
type scenario struct {
	part  string // of the course
	name  string
	peers int
	setup func(cfg *simConfig) // may be nil
	run   func(l *lab)
}

// electionWait is what the lab grants an election at first.
const electionWait = time.Second

// labConfig is a cluster as slow as the lab's: it allows about ten heartbeats a
// second, and an election within some seconds.
func labConfig(seed uint64, peers int) simConfig {
	cfg := defaultSimConfig(seed, peers)
	cfg.tick, cfg.heartbeatTicks, cfg.electionTicks = 25*time.Millisecond, 4, 20
	return cfg
}

// unreliable is the lab's bad network: a tenth of the messages is lost, the
// others take up to 27 ms.
func unreliable(cfg *simConfig) {
	cfg.net.delayMax, cfg.net.loss = 27*time.Millisecond, 0.1
}

// snapshotEvery10 is the lab's snapshot interval.
func snapshotEvery10(cfg *simConfig) {
	cfg.snapshotEntries, cfg.catchUpEntries = 10, 15
}

// shortLog lets the log lose at once what a snapshot holds, so that a member
// that was away needs the snapshot.
func shortLog(cfg *simConfig) {
	cfg.snapshotEntries, cfg.catchUpEntries = 10, 2
}

// TestLab runs the 25 scenarios. With -lab.report it prints what the course's
// tests print: simulated seconds, peers, RPCs, bytes, and commits.
func TestLab(t *testing.T) {
	if *labSeeds > 1 && !*labWorker {
		labManySeeds(t)
		return
	}
	start := time.Now()
	var total labResult
	for seed := *labSeed; seed < *labSeed+uint64(*labSeeds); seed++ {
		for _, sc := range labScenarios {
			name := sc.name
			if *labSeeds > 1 {
				name = fmt.Sprintf("%s/-lab.seed=%d", name, seed)
			}
			t.Run(name, func(t *testing.T) {
				r := runLab(t, sc, seed)
				total.add(r)
				if *labWorker {
					_ = json.NewEncoder(os.Stdout).Encode(r)
				}
			})
		}
	}
	if *labReport {
		fmt.Printf("%d scenarios, %.1f simulated s in %.1f s: %d RPCs, %d bytes, %d commits\n",
			len(labScenarios), total.Seconds, time.Since(start).Seconds(), total.RPCs, total.Bytes, total.Commits)
	}
}

// labResult is a line of the lab.
type labResult struct {
	Seed    uint64  `json:"seed"`
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
	RPCs    int     `json:"rpcs"`
	Bytes   int     `json:"bytes"`
	Commits uint64  `json:"commits"`
}

func (r *labResult) add(o labResult) {
	r.Seconds += o.Seconds
	r.RPCs += o.RPCs
	r.Bytes += o.Bytes
	r.Commits += o.Commits
}

func runLab(t *testing.T, sc scenario, seed uint64) (r labResult) {
	if *labReport {
		fmt.Printf("Test (%s): %s ...\n", sc.part, sc.name)
	}
	cfg := labConfig(seed, sc.peers)
	if sc.setup != nil {
		sc.setup(&cfg)
	}
	l := &lab{T: t, sim: newSim(t, cfg)}
	l.network.countBytes = true
	r = labResult{Seed: seed, Name: sc.name}
	defer func() {
		r.Seconds, r.RPCs, r.Bytes = l.now.Seconds(), l.network.requests, l.network.bytes
		r.Commits = l.check.model.index() - modelBase
		if *labReport && !t.Failed() {
			fmt.Printf("  ... Passed --  %4.1f  %d %4d %7d %4d\n", r.Seconds, sc.peers, r.RPCs, r.Bytes, r.Commits)
		}
	}()
	l.startAll()
	sc.run(l)
	l.end()
	return r
}

// lab is a scenario that runs.
type lab struct {
	*testing.T
	*sim
	cut   map[uint64]bool // nodes without a network
	count int             // of values
}

// end repairs everything, and wants all nodes to agree and all promises to have
// been kept.
func (l *lab) end() {
	l.Helper()
	l.network.heal()
	l.network.netConfig = defaultSimConfig(0, 1).net
	l.cut = nil
	for _, n := range l.nodes {
		n.start()
	}
	if !l.runUntil(10*time.Second, func() bool {
		for _, op := range l.history.ops {
			if !op.ended() {
				return false
			}
		}
		return validateConverged(l.sim) == nil
	}) {
		l.Errorf("no convergence: %v", validateConverged(l.sim))
	}
	l.judge(l.T)
}

// Nodes.

func (l *lab) disconnect(nodes ...*simNode) {
	if l.cut == nil {
		l.cut = map[uint64]bool{}
	}
	for _, n := range nodes {
		l.cut[n.id] = true
		l.network.isolate(n.id, true)
	}
}

func (l *lab) connect(nodes ...*simNode) {
	for _, n := range nodes {
		delete(l.cut, n.id)
	}
	l.network.heal()
	for id := range l.cut {
		l.network.isolate(id, true)
	}
}

func (l *lab) crash(nodes ...*simNode) {
	for _, n := range nodes {
		n.crash(l.someTail())
	}
}

func (l *lab) restart(nodes ...*simNode) {
	for _, n := range nodes {
		n.crash(l.someTail())
		n.start()
	}
}

// next returns the node that is k places behind n.
func (l *lab) next(n *simNode, k int) *simNode {
	return l.nodes[(int(n.id)-1+k)%len(l.nodes)]
}

// reachable returns the nodes that are up and connected.
func (l *lab) reachable() []*simNode {
	var nodes []*simNode
	for _, n := range l.up() {
		if !l.cut[n.id] {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

func leads(n *simNode) bool {
	return n.process != nil && n.process.replica.role == raft.StateLeader
}

// Checks of the lab.

// oneLeader waits until one of the reachable nodes leads the highest term.
func (l *lab) oneLeader() *simNode {
	l.Helper()
	for range 10 {
		l.sim.run(450*time.Millisecond + l.between(0, 100*time.Millisecond))
		if leader := l.highestLeader(); leader != nil {
			return leader
		}
	}
	l.Fatalf("no leader among %d reachable nodes; %v", len(l.reachable()), l.check.violations)
	return nil
}

func (l *lab) highestLeader() *simNode {
	l.Helper()
	var leader *simNode
	for _, n := range l.reachable() {
		if !leads(n) {
			continue
		}
		switch {
		case leader == nil || n.process.replica.term > leader.process.replica.term:
			leader = n
		case n.process.replica.term == leader.process.replica.term:
			l.Fatalf("nodes %d and %d lead term %d", leader.id, n.id, n.process.replica.term)
		}
	}
	return leader
}

// noLeader wants no reachable node to lead.
func (l *lab) noLeader() {
	l.Helper()
	if n := l.highestLeader(); n != nil {
		l.Fatalf("node %d leads without a majority", n.id)
	}
}

// term wants the reachable nodes to agree on their term.
func (l *lab) term() uint64 {
	l.Helper()
	term := uint64(0)
	for _, n := range l.reachable() {
		if t := n.process.replica.term; term != 0 && t != term {
			l.Fatalf("nodes are in terms %d and %d", term, t)
		} else {
			term = t
		}
	}
	return term
}

// Writes.

// value returns a value that was not used before.
func (l *lab) value() string {
	l.count++
	return fmt.Sprintf("%d", 100000+l.count)
}

// start begins a write on a node.
func (l *lab) start(n *simNode, timeout time.Duration) *simOp {
	return l.begin(n, putOp("x", l.value()), timeout)
}

// flood proposes n writes at once, each as an entry of its own, and waits for
// none. Nobody gives them up, nor are they proposed again after timeout.
func (l *lab) flood(n *simNode, count int, timeout time.Duration) {
	p := n.process
	p.loop.call(func() error {
		for range count {
			b := newBatch(nil)
			b.add(&store.Command{Op: store.OpPut, Key: "x", Value: l.value()})
			b.deadline = n.clock().Add(timeout)
			p.replica.propose(b)
		}
		return nil
	})
	p.wake()
}

// index returns where in the log a write is, if it is committed.
func (l *lab) index(op *simOp) (uint64, bool) {
	a := op.attempts[len(op.attempts)-1]
	b := l.check.model.batches[batchID{a.session, a.batch.seq}]
	if b == nil {
		return 0, false
	}
	return b.index, true
}

// holders returns how many nodes have applied a write.
func (l *lab) holders(op *simOp) int {
	index, ok := l.index(op)
	if !ok {
		return 0
	}
	n := 0
	for _, node := range l.up() {
		if node.process.store.Applied() >= index {
			n++
		}
	}
	return n
}

// one writes a value and wants at least n nodes to apply it. It tries again for
// ten seconds, since leaders may change meanwhile.
func (l *lab) one(n int) *simOp {
	l.Helper()
	for end := l.now + 10*time.Second; l.now < end; {
		leader := l.highestLeader()
		if leader == nil {
			l.sim.run(20 * time.Millisecond)
			continue
		}
		op := l.start(leader, 2*time.Second)
		if l.runUntil(2*time.Second, func() bool {
			return op.ended() && (op.outcome != opDone || l.holders(op) >= n)
		}) && op.outcome == opDone {
			return op
		}
		if l.check.failed() {
			break
		}
	}
	l.Fatalf("%d nodes do not agree; %v", n, l.check.violations)
	return nil
}

// labManySeeds runs all scenarios for many seeds in several processes.
func labManySeeds(t *testing.T) {
	start := time.Now()
	var total labResult
	runs := 0
	cpu := shareSeeds(t, *labSeed, *labSeeds, func(from uint64, n int) []string {
		return []string{"-test.run=^TestLab$", "-lab.worker", fmt.Sprintf("-lab.seed=%d", from), fmt.Sprintf("-lab.seeds=%d", n)}
	}, func(line []byte) {
		var r labResult
		if json.Unmarshal(line, &r) == nil && r.Seed != 0 {
			runs++
			total.add(r)
		}
	})
	if want := *labSeeds * len(labScenarios); runs != want {
		t.Errorf("%d runs of %d passed", runs, want)
	}
	t.Logf("%d seeds of %d scenarios, %.2f simulated hours in %.1f s, %.1f s of processor time: %d RPCs, %d commits",
		*labSeeds, len(labScenarios), total.Seconds/3600, time.Since(start).Seconds(), cpu.Seconds(), total.RPCs, total.Commits)
}
