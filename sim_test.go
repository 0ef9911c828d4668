package main

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/cryptotest"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/fsx"
	"raftrv/internal/watch"
)

// This file is the heart of the simulator: a cluster whose clock, network,
// disks and clients live in one goroutine, and in which one seed decides
// everything. docs/testing.md says what it proves; the files are
//
//	sim_test.go          events, time and chance
//	sim_node_test.go     a machine, and the processes that live on it
//	sim_place_test.go    how processes find their place in a cluster, with right flags and wrong ones
//	sim_net_test.go      the network
//	sim_disk_test.go     the disk, and what a crash leaves on it
//	sim_client_test.go   clients, and the history of what they saw
//	sim_watch_test.go    clients that watch
//	sim_fault_test.go    what goes wrong, and when
//	sim_model_test.go    what the state machine should do, written a second time
//	sim_check_test.go    what must hold
//	sim_promise_test.go  what must hold at every moment
//	sim_run_test.go      TestSim: many seeds in several processes
//	sim_planted_test.go  TestPlanted: bugs that the checks must find
//	sim_directed_test.go scenarios by hand, down to single messages
//	sim_reads_test.go    more of them, about reads
//	lab_test.go          TestLab: the 25 scenarios of the raft course
//
// The code under test is the product's: the replica, its loop without the
// goroutine, the state machine, and the storage on etcd's log in a real
// directory.

// simConfig is what a cluster is made of. All of it is drawn from the seed in
// TestSim, and chosen in scenarios.
type simConfig struct {
	seed  uint64
	nodes int

	tick            time.Duration
	electionTicks   int
	heartbeatTicks  int
	snapshotEntries uint64
	catchUpEntries  int // of the log that stay in memory behind a snapshot
	eventsMax       uint64
	readEvents      int // that a watcher is passed at once

	net         netConfig
	disk        diskConfig
	clockRate   float64       // clocks go this much too fast or slow
	clockOffset time.Duration // and are this much ahead or behind
	clocksWrong bool          // or, half of them, by hours or decades

	appendBytes uint64  // of entries in one message; 0 = the product's
	applyBytes  uint64  // and applied at once
	oldVersions float64 // probability that a process knows only the first level, until that was raised
	learners    int     // that stay learners
	largeValues bool    // now and then one as large as values may be

	hiccups      float64 // probability that a process has to wait for a processor, at each step
	brokenStarts float64 // probability that a crash comes in the middle of a first start
	wrongStarts  float64 // and that flags are wrong
	announces    bool    // a node must read before it knows who the members are
	silent       bool    // nobody announces which directory it has, nor do those that join

	plant *plant // a planted bug, or nil
	logs  bool
}

// defaultSimConfig is a quiet cluster on good hardware.
func defaultSimConfig(seed uint64, nodes int) simConfig {
	return simConfig{
		seed:            seed,
		nodes:           nodes,
		tick:            10 * time.Millisecond,
		electionTicks:   20,
		heartbeatTicks:  2,
		snapshotEntries: 1000,
		catchUpEntries:  100,
		eventsMax:       1,
		readEvents:      watch.ReadEventsMax,
		net:             netConfig{delayMin: 100 * time.Microsecond, delayMax: time.Millisecond},
		disk:            diskConfig{syncMin: 100 * time.Microsecond, syncMax: 500 * time.Microsecond},
	}
}

// sim is a cluster and everything around it.
type sim struct {
	simConfig
	rand   *rand.Rand
	logger *zap.Logger
	dir    string

	now    time.Duration // since the beginning
	events eventQueue
	count  uint64 // of events so far
	trace  uint64 // hash of all that happened

	nodes   []*simNode // by id - 1
	network *simNetwork
	history *history
	check   *checker

	watchers []*simWatcher

	raising bool // somebody has proposed to raise the level: nobody goes back

	// Of the weather.
	healthy  healthSpan
	storms   int
	outage   time.Duration    // mean time until something is repaired
	died     func(n *simNode) // called when a process has died; may be nil
	changing time.Duration    // until then the members change
}

// newSim makes a cluster whose nodes are down.
func newSim(t *testing.T, cfg simConfig) *sim {
	cryptotest.SetGlobalRandom(t, cfg.seed) // raft draws election timeouts from crypto/rand
	smallSegments(t)
	dirs, files := fsx.SyncDir, syncFile
	t.Cleanup(func() { fsx.SyncDir, syncFile = dirs, files })
	s := &sim{
		simConfig: cfg,
		rand:      rand.New(rand.NewPCG(cfg.seed, 0)),
		logger:    zap.NewNop(),
		dir:       memoryDir(t),
		history:   &history{},
	}
	if cfg.logs {
		s.logger = simLogger(s)
	}
	fsx.SyncDir, syncFile = s.syncDir, s.syncFile
	s.check = newChecker(s)
	s.network = newSimNetwork(s, cfg.net)
	for i := range cfg.nodes {
		s.addNode(fmt.Sprintf("http://n%d", i+1), false)
	}
	t.Cleanup(s.close)
	return s
}

func (s *sim) addNode(peerURL string, joins bool) *simNode {
	id := uint64(len(s.nodes) + 1)
	n := &simNode{
		sim:   s,
		id:    id,
		url:   peerURL,
		joins: joins,
		dir:   filepath.Join(s.dir, fmt.Sprintf("%d", id)),
		rate:  1 + s.clockRate*(2*s.rand.Float64()-1),
	}
	s.nodes = append(s.nodes, n)
	return n
}

func (s *sim) node(id uint64) *simNode { return s.nodes[id-1] }

// startAll starts all nodes, and lets them find each other.
func (s *sim) startAll() {
	for _, n := range s.nodes {
		if s.chance(s.wrongStarts) {
			n.flags = n.wrongFlags()
		}
		n.start()
	}
	s.runUntil(time.Second, func() bool { return len(s.up()) == len(s.nodes) })
}

func (s *sim) close() {
	for _, n := range s.nodes {
		n.crash(tailLost)
	}
}

// memoryDir returns a temporary directory in memory, if there is such a thing:
// syncing a disk costs a hundred times what everything else here does.
func memoryDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "raftrv-sim-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Time.

// at runs f when the time has come.
func (s *sim) at(when time.Duration, f func()) {
	s.count++
	s.events.push(simEvent{at: max(when, s.now), seq: s.count, run: f})
}

func (s *sim) after(d time.Duration, f func()) { s.at(s.now+d, f) }

// step runs the next event.
func (s *sim) step() {
	e := s.events.pop()
	s.now = e.at
	e.run()
}

// runUntil lets time pass until done says so, and says whether it did within
// the limit. It stops early when something is wrong.
func (s *sim) runUntil(limit time.Duration, done func() bool) bool {
	end := s.now + limit
	for !s.check.failed() {
		if done() {
			return true
		}
		if s.events.len() == 0 || s.events.next() > end {
			s.now = end
			return done()
		}
		s.step()
	}
	return false
}

// run lets time pass.
func (s *sim) run(d time.Duration) { s.runUntil(d, func() bool { return false }) }

// eventQueue is a heap: the earliest first, and of two at the same time the one
// that was scheduled first.
type eventQueue struct{ heap []simEvent }

type simEvent struct {
	at  time.Duration
	seq uint64
	run func()
}

func (e *simEvent) before(f *simEvent) bool {
	return e.at < f.at || e.at == f.at && e.seq < f.seq
}

func (q *eventQueue) len() int            { return len(q.heap) }
func (q *eventQueue) next() time.Duration { return q.heap[0].at }

func (q *eventQueue) push(e simEvent) {
	q.heap = append(q.heap, e)
	h := q.heap
	for i := len(h) - 1; i > 0; {
		parent := (i - 1) / 2
		if !h[i].before(&h[parent]) {
			return
		}
		h[i], h[parent] = h[parent], h[i]
		i = parent
	}
}

func (q *eventQueue) pop() simEvent {
	h := q.heap
	top, last := h[0], len(h)-1
	h[0], h[last] = h[last], simEvent{}
	h = h[:last]
	q.heap = h
	for i := 0; ; {
		least := i
		for child := 2*i + 1; child <= 2*i+2 && child < last; child++ {
			if h[child].before(&h[least]) {
				least = child
			}
		}
		if least == i {
			return top
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
}

// Chance.

// chance is true with probability p.
func (s *sim) chance(p float64) bool { return p > 0 && s.rand.Float64() < p }

// between draws a time, all equally likely.
func (s *sim) between(low, high time.Duration) time.Duration {
	if high <= low {
		return low
	}
	return low + time.Duration(s.rand.Int64N(int64(high-low)))
}

// around draws a time, mostly below mean and sometimes far above it.
func (s *sim) around(mean time.Duration) time.Duration {
	return time.Duration(s.rand.ExpFloat64() * float64(mean))
}

func pick[T any](s *sim, of []T) T { return of[s.rand.IntN(len(of))] }

// record adds what happened to the trace.
func (s *sim) record(facts ...uint64) {
	h := s.trace
	h = (h ^ uint64(s.now)) * fnvPrime
	for _, f := range facts {
		h = (h ^ f) * fnvPrime
	}
	s.trace = h ^ h>>29
}

const fnvPrime = 1099511628211

func hashBytes(b []byte) uint64 {
	h := fnv.New64a()
	_, _ = h.Write(b) // never fails
	return h.Sum64()
}
