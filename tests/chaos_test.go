package tests

import (
	"cmp"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"raftrv/internal/linkproxy"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// These tests let real nodes work while one bad thing after the other happens to them, and then judge what
// clients saw. The order of bad things comes from a seed; what exactly happens does not, because real
// processes and clocks take part. To find a failure again by its seed is what the simulator is for.

var (
	chaosTime = flag.Duration("chaos", 0, "run the chaos tests for this long altogether, instead of a short slice")
	chaosSeed = flag.Uint64("chaos-seed", 0, "order of the faults; 0 chooses one")
	chaosOnly = flag.String("chaos-only", "", "only faults whose name contains this")
)

// chaosSlice is how long each cluster suffers if -chaos does not say.
const chaosSlice = 4 * time.Second

func TestChaos(t *testing.T) {
	start := time.Now()
	var cycles, requests int
	for _, nodes := range []int{3, 5} {
		t.Run(fmt.Sprintf("nodes=%d", nodes), func(t *testing.T) {
			c := newChaos(t, nodes)
			c.run(max(*chaosTime/2, chaosSlice))
			cycles += c.total()
			requests += len(c.history.snapshot())
		})
	}
	t.Logf("%d fault cycles and %d requests in %v", cycles, requests, time.Since(start).Round(time.Second))
	const full, cyclesMin, requestsMin = 5 * time.Minute, 300, 100_000
	if *chaosTime >= full && *chaosOnly == "" && (cycles < cyclesMin || requests < requestsMin) {
		t.Errorf("want at least %d cycles and %d requests; was the machine busy with something else?", cyclesMin, requestsMin)
	}
}

// chaos is a cluster that faults happen to. One goroutine makes them happen.
type chaos struct {
	*liveCluster
	network  network
	rng      *rand.Rand
	stopping sync.WaitGroup // nodes that were asked to
	faults   []disturbance  // that this cluster is large enough for
	deck     []*disturbance // that come next

	cycles     map[string]int             // by fault
	failovers  map[string][]time.Duration // from a fault until all nodes that can serve have
	recoveries []time.Duration            // from the end of a fault until all nodes have served
}

// network is what connects the nodes, and what can happen to it.
type network interface {
	Cut(from, to int)
	Slow(from, to int, delay time.Duration, bytesPerSecond int)
	Reset(a, b int)
	Heal()
}

// newChaos starts a cluster whose nodes reach each other through proxies only.
func newChaos(t *testing.T, nodes int) *chaos {
	t.Helper()
	var proxies *linkproxy.Network
	opts := proc.Options{
		Nodes: nodes,
		NodeArgs: func(n *proc.Node) []string {
			return []string{"--listen-peer", strings.TrimPrefix(n.RaftURL(), "http://")}
		},
		// The nodes call each other by the addresses of the proxies.
		PeerURLs: func(_ *proc.Node, urls []string) []string {
			for i := range urls {
				urls[i] = proxies.URL(i + 1)
			}
			return urls
		},
	}
	c := newIdleChaos(t, opts)
	targets := map[int]string{}
	for _, n := range c.Nodes {
		targets[n.ID] = strings.TrimPrefix(n.RaftURL(), "http://")
	}
	var err error
	proxies, err = linkproxy.New(targets)
	testkit.Must(t, err)
	t.Cleanup(func() { testkit.Must(t, proxies.Close()) })
	c.network = proxies
	c.start()
	return c
}

// newChaosOn starts a cluster on a network that is there already.
func newChaosOn(t *testing.T, nodes int, network network, opts proc.Options) *chaos {
	t.Helper()
	opts.Nodes = nodes
	c := newIdleChaos(t, opts)
	c.network = network
	c.faults = slices.DeleteFunc(c.faults, func(f disturbance) bool { return f.proxyOnly })
	c.start()
	return c
}

func newIdleChaos(t *testing.T, opts proc.Options) *chaos {
	t.Helper()
	seed := cmp.Or(*chaosSeed, rand.Uint64())
	t.Logf("-chaos-seed %d", seed)
	opts.Args = append(opts.Args, "--snapshot-entries", "300")
	return &chaos{
		liveCluster: newIdleLiveCluster(t, opts),
		rng:         rand.New(rand.NewPCG(seed, seed)),
		faults:      slices.DeleteFunc(slices.Clone(faults), func(f disturbance) bool { return f.nodesMin > opts.Nodes }),
		cycles:      map[string]int{},
		failovers:   map[string][]time.Duration{},
	}
}

// run makes faults happen for a while and judges the outcome.
func (c *chaos) run(d time.Duration) {
	versions := c.watchVersions()
	load := c.chaosLoad()
	// Some of the time is for reading back.
	end := time.Now().Add(d * 85 / 100)
	for time.Now().Before(end) && !c.t.Failed() {
		c.cycle(c.draw())
	}
	load.stop()
	versions()
	c.report()
	c.verdict()
	c.t.Log(c.history.count())
}

// draw returns the next fault: all of them come up equally often, but for the one whose times are promised.
func (c *chaos) draw() *disturbance {
	for len(c.deck) == 0 {
		for i := range c.faults {
			f := &c.faults[i]
			if !strings.Contains(f.name, *chaosOnly) {
				continue
			}
			c.deck = append(c.deck, f)
			if f.name == leaderKilled && *chaosTime > 0 {
				c.deck = append(c.deck, f, f)
			}
		}
		if len(c.deck) == 0 {
			c.t.Fatalf("no fault is called %q", *chaosOnly)
		}
		c.rng.Shuffle(len(c.deck), func(i, j int) { c.deck[i], c.deck[j] = c.deck[j], c.deck[i] })
	}
	f := c.deck[0]
	c.deck = c.deck[1:]
	return f
}

// cycle makes one fault happen, sees that those who can serve do, and heals it.
func (c *chaos) cycle(f *disturbance) {
	leader := c.leader()
	start := time.Now()
	serving := f.inject(c, leader)
	if took, ok := c.pulse(f.name, serving, start); ok {
		c.failovers[f.name] = append(c.failovers[f.name], took)
	}
	// Long enough for an election or two, short enough for many cycles.
	hold := time.Duration(c.rng.IntN(300)) * time.Millisecond
	time.Sleep(time.Until(start.Add(hold)))
	healed := time.Now()
	c.heal()
	if took, ok := c.pulse("after "+f.name, c.Nodes, healed); ok {
		c.recoveries = append(c.recoveries, took)
	}
	c.cycles[f.name]++
}

// pulseMax is how long an answer may take whatever happened: a second, and two elections.
const pulseMax = time.Second + 2*400*time.Millisecond

// pulse writes at each of the nodes at the same time, and returns how long after start the last of the writes
// was acknowledged. None may fail, or take longer than pulseMax. (The clients of the load wait less than that.)
func (c *chaos) pulse(when string, nodes []*proc.Node, start time.Time) (took time.Duration, ok bool) {
	if len(nodes) == 0 {
		return 0, false
	}
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			l := c.client(n)
			defer l.close()
			if o := l.putNew(); o.outcome != liveDone {
				c.t.Errorf("%s: a node that should serve does not: %v", when, o)
			} else if took := o.end - o.start - c.history.stalled(o.start, o.end); took > pulseMax {
				c.t.Errorf("%s: an answer took %v, want at most %v: %v", when, round(took), pulseMax, o)
			}
		})
	}
	wg.Wait()
	return time.Since(start), true
}

// heal ends all faults and waits until every node is ready.
func (c *chaos) heal() {
	c.t.Helper()
	c.stopping.Wait()
	c.network.Heal()
	if c.rng.IntN(2) == 0 {
		// Half of the time connections break instead of going on where they stopped.
		for _, a := range c.Nodes {
			for _, b := range c.Nodes[a.ID:] {
				c.network.Reset(a.ID, b.ID)
			}
		}
	}
	for _, n := range c.Nodes {
		if n.Running() {
			testkit.Must(c.t, n.Resume())
		}
	}
	c.start()
}

// chaosLoad starts clients. Half of them write new keys, so that each write can be told apart later; half of
// them read and write few keys, so that reads have something to be wrong about.
func (c *chaos) chaosLoad() *liveLoad {
	began := time.Now()
	const (
		clients   = 10
		think     = 4 * time.Millisecond // leaves some of the machine to the nodes
		keys      = 5
		keyLife   = 2 * time.Second // then clients turn to other keys, which keeps histories short
		timeout   = 800 * time.Millisecond
		moveAfter = 20 // requests at one node
	)
	return c.load(clients, c.Nodes, func(l *liveClient) {
		l.timeout, l.patience = timeout, 300*time.Millisecond
		time.Sleep(time.Duration(rand.Int64N(int64(2 * think))))
		var o *liveOp
		key := fmt.Sprintf("shared/%d/%d", time.Since(began)/keyLife, rand.IntN(keys))
		switch r := rand.IntN(10); {
		case l.writesNew && r < 5:
			o = l.putNew()
		case l.writesNew:
			o = l.putOnce()
		case r == 0:
			o = l.delete(key)
		case r < 4:
			o = l.put(key, l.c.newValue(20))
		case r < 6:
			if o = l.get(key); o.outcome == liveDone {
				o = l.replace(o, l.c.newValue(20))
			}
		default:
			o = l.get(key)
		}
		if l.requests++; o.outcome != liveDone || l.requests%moveAfter == 0 {
			// As real clients do: try the next node.
			l.node = c.Nodes[rand.IntN(len(c.Nodes))]
			l.close()
			l.writesNew = !l.writesNew
		}
	})
}

// watchVersions looks at what each node has by itself, all the time: as long as a process lives, its version
// never goes back. The function that it returns ends that.
func (c *chaos) watchVersions() (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, n := range c.Nodes {
		wg.Go(func() {
			var pid int
			var last uint64
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-done:
					return
				case <-tick.C:
				}
				before := n.PID()
				s, err := n.Status(c.t.Context())
				if err != nil || before != n.PID() {
					continue
				}
				if before == pid && s.ResourceVersion < last {
					c.t.Errorf("node %d went from version %d back to %d", n.ID, last, s.ResourceVersion)
				}
				pid, last = before, s.ResourceVersion
			}
		})
	}
	return func() {
		close(done)
		wg.Wait()
	}
}

// total returns how many faults have happened.
func (c *chaos) total() int {
	total := 0
	for _, n := range c.cycles {
		total += n
	}
	return total
}

// report prints what happened.
func (c *chaos) report() {
	for _, name := range slices.Sorted(maps.Keys(c.cycles)) {
		c.t.Logf("%-28s %3d times%s", name, c.cycles[name], describe(", served again", c.failovers[name]))
	}
	c.t.Logf("%d fault cycles%s", c.total(), describe("; once healed, all nodes served", c.recoveries))
	if *chaosTime > 0 && *chaosOnly == "" {
		reportPauses(c.t, leaderKilled, c.failovers[leaderKilled])
	}
}

// describe returns the distribution of times, or nothing if there are none.
func describe(what string, times []time.Duration) string {
	if len(times) == 0 {
		return ""
	}
	slices.Sort(times)
	return fmt.Sprintf("%s after p50 %v, p95 %v, max %v", what,
		round(durationQuantile(times, 0.5)), round(durationQuantile(times, 0.95)), round(times[len(times)-1]))
}

func round(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
