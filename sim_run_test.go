package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Flags of the simulator; go test passes them on: go test -run TestSim -sim.seed=7.
var (
	simSeed     = flag.Uint64("sim.seed", 1, "first `seed`")
	simSeeds    = flag.Int("sim.seeds", 0, "`number` of seeds; 0 = a few")
	simDuration = flag.Duration("sim.duration", time.Minute, "simulated `time` of each seed")
	simWorkers  = flag.Int("sim.workers", 2, "`processes` that share the seeds")
	simTwice    = flag.Bool("sim.twice", false, "run each seed twice and compare the traces")
	simLogs     = flag.Bool("sim.logs", false, "print what the product logs; for one seed")
	simMembers  = flag.Bool("sim.members", false, "change the members often, in each seed")
	simSmall    = flag.Bool("sim.small", false, "only clusters of one or two voters")
	simReport   = flag.Bool("sim.report", false, "print the figures")
	simWorker   = flag.Bool("sim.worker", false, "print results as JSON; set by the process that shares out the seeds")
)

// simResult is what one seed came to.
type simResult struct {
	Seed       uint64         `json:"seed"`
	Trace      uint64         `json:"trace"`
	Simulated  time.Duration  `json:"simulated"`
	Wall       time.Duration  `json:"wall"`
	Events     uint64         `json:"events"`
	Nodes      int            `json:"nodes"`
	Lives      int            `json:"lives"` // processes that were started
	Ops        int            `json:"ops"`
	Acked      int            `json:"acked"`
	Messages   int            `json:"messages"`
	Snapshots  int            `json:"snapshots"` // sent
	Entries    uint64         `json:"entries"`
	Changes    int            `json:"changes"` // of the members
	Watched    int            `json:"watched"` // events
	Violations []violation    `json:"violations"`
	Reached    map[string]int `json:"reached"`
}

// TestSim runs random clusters under random faults, by seed.
func TestSim(t *testing.T) {
	seeds := *simSeeds
	if seeds == 0 {
		seeds = 24
		if testing.Short() {
			seeds = 4
		}
		if raceEnabled {
			seeds = max(2, seeds/8)
		}
	}
	if *simWorker || seeds == 1 {
		for seed := *simSeed; seed < *simSeed+uint64(seeds); seed++ {
			r := runSeed(t, seed, *simDuration, nil)
			if *simWorker {
				if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
					t.Fatal(err)
				}
			} else {
				reportSeed(t, r)
			}
		}
		return
	}
	start := time.Now()
	var sum simSummary
	sum.cpu = shareSeeds(t, *simSeed, seeds, func(from uint64, n int) []string {
		return []string{
			"-test.run=^TestSim$", "-sim.worker", fmt.Sprintf("-sim.seed=%d", from), fmt.Sprintf("-sim.seeds=%d", n),
			fmt.Sprintf("-sim.duration=%v", *simDuration), fmt.Sprintf("-sim.twice=%v", *simTwice), fmt.Sprintf("-sim.members=%v", *simMembers),
			fmt.Sprintf("-sim.small=%v", *simSmall),
		}
	}, func(line []byte) {
		var r simResult
		if json.Unmarshal(line, &r) == nil && r.Seed != 0 {
			reportSeed(t, r)
			sum.add(r)
		}
	})
	if sum.seeds != seeds {
		t.Errorf("%d results of %d", sum.seeds, seeds)
	}
	if *simReport {
		sum.print(time.Since(start))
	}
}

// TestSimReproducible wants a seed to do the same each time.
func TestSimReproducible(t *testing.T) {
	seeds := uint64(5)
	if testing.Short() || raceEnabled {
		seeds = 1
	}
	for seed := range seeds {
		first := runOnce(t, seed, 10*time.Second, nil)
		if again := runOnce(t, seed, 10*time.Second, nil); again.Trace != first.Trace || again.Events != first.Events {
			t.Errorf("seed %d: %d events, trace %x, and then %d, %x", seed, first.Events, first.Trace, again.Events, again.Trace)
		}
	}
}

// runSeed runs one seed, or twice if asked for.
func runSeed(t *testing.T, seed uint64, d time.Duration, bug *plant) simResult {
	r := runOnce(t, seed, d, bug)
	if *simTwice {
		if again := runOnce(t, seed, d, bug); again.Trace != r.Trace {
			r.Violations = append(r.Violations, violation{Check: "reproducible", Text: fmt.Sprintf("traces %x and %x", r.Trace, again.Trace)})
		}
	}
	return r
}

func runOnce(t *testing.T, seed uint64, d time.Duration, bug *plant) (r simResult) {
	start := time.Now()
	t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
		cfg := drawConfig(seed)
		cfg.plant, cfg.logs = bug, *simLogs
		if bug != nil && bug.answers != nil {
			cfg.wrongStarts = 0.7
		}
		defer debug.SetGCPercent(debug.SetGCPercent(1600)) // little is alive, much is allocated
		s := newSim(t, cfg)
		s.startAll()
		w := s.drawWeather()
		l := s.drawLoad()
		if *simMembers {
			w.faults = append(w.faults, faultMembers, faultMembers, faultMembers, faultTransfer, faultCrash)
			w.mean /= 4
		}
		if bug != nil && bug.prepare != nil {
			bug.prepare(w, l)
		}
		s.addClients(4+s.rand.IntN(9), l)
		s.addWatchers(3)
		s.addLearners()
		s.live(w, d)
		l.stopped = true
		s.quiet()
		s.check.finish()
		r = s.result(time.Since(start))
	})
	return r
}

// drawLoad draws what the clients do.
func (s *sim) drawLoad() *load {
	makers := opMakers
	if s.largeValues {
		makers = slices.Concat(opMakers, opMakers, opMakers, opMakers, opMakers, []opMaker{makePutLarge})
	}
	return &load{
		think:    s.between(50*time.Millisecond, 200*time.Millisecond),
		keys:     3 + s.rand.IntN(20),
		timeouts: []time.Duration{3 * time.Millisecond, 100 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second, 5 * time.Second, 20 * time.Second, time.Minute},
		makers:   makers,
	}
}

func (s *sim) result(wall time.Duration) simResult {
	r := simResult{
		Seed: s.seed, Trace: s.trace, Simulated: s.now, Wall: wall, Events: s.count, Nodes: len(s.nodes),
		Ops: len(s.history.ops), Acked: s.history.acked, Messages: s.network.messages, Snapshots: s.network.snapshots,
		Entries: s.check.model.index(), Changes: len(s.check.configs) - 1, Violations: s.check.violations, Reached: s.check.reached,
	}
	for _, n := range s.nodes {
		r.Lives += n.lives
	}
	for _, w := range s.watchers {
		r.Watched += w.count
	}
	return r
}

func reportSeed(t *testing.T, r simResult) {
	if len(r.Violations) == 0 {
		return
	}
	var b strings.Builder
	for _, v := range r.Violations {
		fmt.Fprintf(&b, "  at %v: %s: %s\n", v.At, v.Check, v.Text)
	}
	t.Errorf("seed %d:\n%sreplay with: go test -run 'TestSim$' -sim.seeds=1 -sim.seed=%d -sim.duration=%v -sim.members=%v -sim.small=%v", r.Seed, b.String(), r.Seed, *simDuration, *simMembers, *simSmall)
}

// shareSeeds runs seeds in several processes, since raft's randomness, which a
// seed must fix, belongs to the process. Each process is this test binary with
// the arguments for a few seeds; the lines that it prints are handed to line,
// one at a time. shareSeeds returns how long processors were busy.
func shareSeeds(t *testing.T, first uint64, seeds int, args func(from uint64, n int) []string, line func([]byte)) (cpu time.Duration) {
	const share = 4 // seeds that a process gets at a time
	var (
		mu   sync.Mutex
		next = first
		end  = first + uint64(seeds)
		wg   sync.WaitGroup
	)
	take := func() (from uint64, n int) {
		mu.Lock()
		defer mu.Unlock()
		from, n = next, int(min(share, end-next))
		next += uint64(n)
		return from, n
	}
	work := func() {
		for from, n := take(); n > 0; from, n = take() {
			cmd := exec.Command(os.Args[0], args(from, n)...)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			mu.Lock()
			cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			var text []byte
			for l := range bytes.Lines(out) {
				if l[0] == '{' {
					line(l)
				} else {
					text = append(text, l...)
				}
			}
			if err != nil {
				t.Errorf("seeds %d to %d: %v\n%s%s", from, from+uint64(n)-1, err, text, stderr.Bytes())
			}
			mu.Unlock()
		}
	}
	for range *simWorkers {
		wg.Go(work)
	}
	wg.Wait()
	return cpu
}

// simSummary adds up results.
type simSummary struct {
	simResult
	seeds, violated int
	worst, cpu      time.Duration
}

func (s *simSummary) add(r simResult) {
	s.seeds++
	s.Simulated += r.Simulated
	s.Wall += r.Wall
	s.Events += r.Events
	s.Lives += r.Lives
	s.Ops += r.Ops
	s.Acked += r.Acked
	s.Messages += r.Messages
	s.Snapshots += r.Snapshots
	s.Entries += r.Entries
	s.Changes += r.Changes
	s.Watched += r.Watched
	s.worst = max(s.worst, r.Wall)
	if len(r.Violations) > 0 {
		s.violated++
	}
	if s.Reached == nil {
		s.Reached = map[string]int{}
	}
	for point, n := range r.Reached {
		s.Reached[point] += n
	}
}

func (s *simSummary) print(wall time.Duration) {
	fmt.Printf("%d seeds, %.2f simulated hours in %.1f s (%.0f times real time), %.1f s of processor time; the slowest seed took %.2f s\n",
		s.seeds, s.Simulated.Hours(), wall.Seconds(), s.Simulated.Seconds()/wall.Seconds(), s.cpu.Seconds(), s.worst.Seconds())
	fmt.Printf("%d operations, %d acknowledged; %d events watched\n", s.Ops, s.Acked, s.Watched)
	fmt.Printf("%d entries, %d messages, %d snapshots sent, %d processes, %d membership changes\n",
		s.Entries, s.Messages, s.Snapshots, s.Lives, s.Changes)
	fmt.Printf("crashed or failed at: %v\n", s.Reached)
	fmt.Printf("%d seeds with violations\n", s.violated)
}
