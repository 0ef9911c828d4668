package tests

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// These tests run real nodes and treat them badly. What they show is shown for the size that they run at; see
// -heavy.

// TestProcess_WriteHereReadThere: a read anywhere sees every write that was acknowledged anywhere before.
func TestProcess_WriteHereReadThere(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	pairs := testkit.Sized(1000, 10_000)
	start := time.Now()
	var done atomic.Int64
	var wg sync.WaitGroup
	for worker := range 6 {
		wg.Go(func() {
			// Six workers, six ways to choose a writer and two readers in some order.
			here := c.client(c.Nodes[worker%3])
			others := c.others(here.node)
			if worker >= 3 {
				slices.Reverse(others)
			}
			there := []*liveClient{c.client(others[0]), c.client(others[1])}
			for done.Add(1) <= int64(pairs) {
				o := here.putNew()
				for _, l := range there {
					if r := l.get(o.key); o.outcome != liveDone || !r.found || r.value != o.value || r.itemRV != o.rv {
						t.Errorf("written and read:\n\t%v\n\t%v", o, r)
					}
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d writes, each read at both other nodes at once, in %v", pairs, time.Since(start).Round(time.Millisecond))
	c.verdict()
}

// TestProcess_StopAnyNode: the other two go on, and the third catches up when it is back.
func TestProcess_StopAnyNode(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	for _, n := range c.Nodes {
		was := c.leader()
		load := c.load(6, c.others(n), func(l *liveClient) {
			o := l.putNew()
			if r := l.get(o.key); o.outcome != liveDone || r.outcome != liveDone {
				t.Errorf("failed while another node stopped:\n\t%v\n\t%v", o, r)
			}
		})
		c.waitForAcks(50)
		start := time.Now()
		c.stop(n)
		t.Logf("node %d (leader: %v) stopped within %v", n.ID, n == was, time.Since(start).Round(time.Millisecond))
		c.waitForAcks(200)
		c.start()
		c.waitForAcks(50)
		load.stop()

		c.verdict() // it has everything, linearizable and by itself
	}
}

// TestProcess_StopAnswers: a node that is asked to stop answers every request that it has taken. One that came
// too late may find its connection closed, and then it has not happened.
func TestProcess_StopAnswers(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	for range testkit.Sized(2, 20) {
		n := c.leader()
		stopped := make(chan struct{})
		load := c.load(8, []*proc.Node{n}, func(l *liveClient) {
			select {
			case <-stopped:
			default:
				l.putNew()
			}
		})
		c.waitForAcks(50)
		start := time.Now()
		c.stop(n)
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("stopping took %v", took)
		}
		close(stopped)
		load.stop()
		c.start()
	}
	c.verdict()
	for _, o := range c.history.snapshot() {
		if o.kind == livePut && o.outcome == liveUnknown && o.rv != 0 { // a read has found it
			t.Errorf("done by a node that stops, and not answered: %v", o)
		}
	}
	t.Log(c.history.count())
}

// TestProcess_KillAll: all nodes die at once, under load. What was acknowledged is there afterwards.
func TestProcess_KillAll(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Args: []string{"--snapshot-entries", "500"}})
	for range testkit.Sized(2, 10) {
		load := c.load(12, c.Nodes, putNewOrWait)
		c.waitForAcks(testkit.Sized(500, 2000))
		c.kill(c.Nodes...)
		load.stop()
		start := time.Now()
		c.start()
		t.Logf("ready again after %v", time.Since(start).Round(time.Millisecond))
	}
	c.verdict()
	t.Log(c.history.count())
}

// TestProcess_KillLeader: clients of the survivors see a pause and no error.
func TestProcess_KillLeader(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	var pauses []time.Duration
	for range testkit.Sized(3, 20) {
		n := c.leader()
		load := c.load(4, c.others(n), func(l *liveClient) {
			if o := l.putNew(); o.outcome != liveDone {
				t.Errorf("failed while the leader died: %v", o)
			}
		})
		c.waitForAcks(100)
		killed := c.history.now()
		c.kill(n)
		c.waitForAcks(100)
		load.stop()
		pauses = append(pauses, c.history.longestSince(killed))
		c.start()
	}
	c.verdict()
	reportPauses(t, "leader killed", pauses)
}

// reportPauses prints how long clients waited. The bounds hold for a machine that does nothing else, so they
// are only enforced at full size.
func reportPauses(t *testing.T, what string, pauses []time.Duration) {
	t.Helper()
	if len(pauses) == 0 {
		t.Errorf("%s: never happened", what)
		return
	}
	slices.Sort(pauses)
	p50, p95 := durationQuantile(pauses, 0.50), durationQuantile(pauses, 0.95)
	t.Logf("%s: longest pause of a client, p50 %v, p95 %v, max %v (%d times)", what,
		p50.Round(time.Millisecond), p95.Round(time.Millisecond), pauses[len(pauses)-1].Round(time.Millisecond), len(pauses))
	const p50Max, p95Max = 300 * time.Millisecond, 600 * time.Millisecond
	if (*testkit.Heavy || *chaosTime > 0) && (p50 > p50Max || p95 > p95Max) {
		t.Errorf("%s: pauses of p50 %v and p95 %v are longer than %v and %v; was the machine busy with something else?",
			what, p50, p95, p50Max, p95Max)
	}
}

// durationQuantile returns the value that a share q of the sorted values does not exceed.
func durationQuantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// TestProcess_FullLoad: however busy the nodes are, the leader stays.
func TestProcess_FullLoad(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	const clients = 64
	before := c.terms()
	var slowest, writes atomic.Int64
	value := strings.Repeat("v", 64)
	start := time.Now()
	load := c.load(clients, c.Nodes, func(l *liveClient) {
		key := fmt.Sprint("load/", writes.Add(1)%100_000)
		r := l.raw(http.MethodPut, key, "", value)
		if r.err != nil || r.status/100 != 2 {
			t.Errorf("PUT: %d %s %v", r.status, r.body, r.err)
		}
		for s := slowest.Load(); int64(r.took) > s && !slowest.CompareAndSwap(s, int64(r.took)); s = slowest.Load() {
		}
	})
	time.Sleep(testkit.Sized(2*time.Second, time.Minute))
	load.stop()
	took := time.Since(start)
	if after := c.terms(); !slices.Equal(before, after) {
		t.Errorf("the leader changed: terms %v, then %v", before, after)
	}
	t.Logf("%d clients: %.0f writes/s for %v, slowest %v", clients, float64(writes.Load())/took.Seconds(),
		took.Round(time.Second), time.Duration(slowest.Load()).Round(time.Millisecond))
	if got := c.client(c.Nodes[0]).version(); got != uint64(writes.Load()) {
		t.Errorf("%d writes were acknowledged, the store counts %d", writes.Load(), got)
	}
}

// TestProcess_MajorityDown: everybody gets an answer in time, and it is a true one.
func TestProcess_MajorityDown(t *testing.T) {
	for _, survivor := range []string{"leader", "follower"} {
		t.Run(survivor, func(t *testing.T) {
			c := newLiveCluster(t, proc.Options{})
			n := c.leader()
			if survivor == "follower" {
				if !*testkit.Heavy {
					t.Skip("needs -heavy")
				}
				n = c.others(n)[0]
			}
			l := c.client(n)
			kept := l.mustPut("kept", c.newValue(10))
			idle := resourcesOf(t, n)

			c.kill(c.others(n)...)
			c.ask(n, testkit.Sized(100, 1000), 400*time.Millisecond)

			readKept := func() error {
				if r := l.raw(http.MethodGet, "kept", "?resourceVersion=0", ""); r.status != http.StatusOK || string(r.body) != kept.value {
					return fmt.Errorf("GET of what the node has: %d %s %v", r.status, r.body, r.err)
				}
				return nil
			}
			testkit.Must(t, readKept())
			if r := l.raw(http.MethodGet, "kept", "?timeout=300ms", ""); r.status != http.StatusServiceUnavailable {
				t.Errorf("linearizable GET: %d %s %v", r.status, r.body, r.err)
			}
			if r := l.do(http.MethodGet, n.URL()+"/-/livez", ""); r.status != http.StatusOK {
				t.Errorf("livez: %d %s %v", r.status, r.body, r.err)
			}
			if r := l.do(http.MethodGet, n.URL()+"/-/readyz", ""); r.status != http.StatusServiceUnavailable {
				t.Errorf("readyz: %d %s %v", r.status, r.body, r.err)
			}
			l.close()
			c.eventually(func() error { return resourcesOf(t, n).compare(idle) })
			c.kill(n)
			testkit.Must(t, n.Start())
			c.eventually(readKept)

			c.start()
			c.verdict() // none of the refused writes has happened
			t.Log(c.history.count())
		})
	}
}

// ask sends writes and reads to a node from many clients. They come one after the other, because the time
// that it takes to open a thousand connections is not the node's.
func (c *liveCluster) ask(n *proc.Node, requests int, timeout time.Duration) {
	const clients = 50
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			l := c.client(n)
			defer l.close()
			l.timeout = timeout
			time.Sleep(time.Duration(i) * timeout / clients)
			for j := range requests / clients {
				o := l.putNew()
				if j%2 == 0 {
					o = l.get("kept")
				}
				if o.outcome == liveDone {
					c.surprise("without a majority: %v", o)
				}
			}
		})
	}
	wg.Wait()
}

// resources are what a process may leak, as far as the kernel knows. (That its goroutines do not leak is shown
// inside one process, see TestServe_LeavesNoGoroutines.)
type resources struct{ threads, files int }

func resourcesOf(t *testing.T, n *proc.Node) resources {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.PID()))
	if errors.Is(err, os.ErrNotExist) {
		return resources{} // not Linux
	}
	testkit.Must(t, err)
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", n.PID()))
	testkit.Must(t, err)
	return resources{threads: len(threads), files: len(files)}
}

// compare says what is left over. Connections between nodes come and go, and Go keeps the threads that it once
// had to start; neither may grow with the number of requests.
func (r resources) compare(idle resources) error {
	if r.files > idle.files+10 || r.threads > idle.threads+20 {
		return fmt.Errorf("the node has %+v, had %+v before", r, idle)
	}
	return nil
}
