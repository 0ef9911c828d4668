package tests

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// These tests move whole states: through a restart, and to a node that has fallen behind.

// oddKeys are keys as clients may spell them, and their bytes.
var oddKeys = []struct{ spelt, key string }{
	{"a/b//c", "a/b//c"},
	{"..", ".."},
	{"%2e%2e/x", "../x"},
	{"a%00b", "a\x00b"},
	{"%3Fx", "?x"},
	{"%ff%FEq%c3%28", "\xff\xfeq\xc3\x28"},
	{"%2D/v1/status", "-/v1/status"},
	{strings.Repeat("k", 4096), strings.Repeat("k", 4096)},
	{strings.Repeat("%e2", 4096), strings.Repeat("\xe2", 4096)},
}

// oddValue has every byte, in an order of its own for each key.
func oddValue(i int) string {
	v := make([]byte, 0, 4*256)
	for b := range cap(v) {
		v = append(v, byte(b*(2*i+1)))
	}
	return string(v) + "\x00\x00\xff\xfe\xed\xa0\x80" + strings.Repeat("\x00", i)
}

// everyByte spells a key with each byte escaped, which is another spelling than that of oddKeys.
func everyByte(key string) string {
	var b strings.Builder
	for _, c := range []byte(key) {
		fmt.Fprintf(&b, "%%%02X", c)
	}
	return b.String()
}

// TestProcess_RawBytesSurvive: keys and values come back byte for byte, from a streamed snapshot as well as
// from a restart.
func TestProcess_RawBytesSurvive(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Args: []string{"--snapshot-bytes", strconv.Itoa(4 << 20)}})
	behind := c.Nodes[2]
	c.stop(behind)
	l := c.client(c.Nodes[0])
	var rv uint64
	for i, k := range oddKeys {
		r := l.do(http.MethodPut, l.node.URL()+"/"+k.spelt, oddValue(i))
		if r.err != nil || r.status != http.StatusCreated {
			t.Fatalf("PUT %.20q: %d %s %v", k.spelt, r.status, r.body, r.err)
		}
		rv = r.rv()
	}
	for path, want := range map[string]int{
		"/":                             http.StatusMethodNotAllowed, // the empty key
		"/" + strings.Repeat("k", 4097): http.StatusBadRequest,
		"/-/anything":                   http.StatusNotFound,
	} {
		r := l.do(http.MethodPut, l.node.URL()+path, "v")
		if r.status != want || r.problem.Detail == "" || r.problem.Outcome != fault.NotApplied {
			t.Errorf("PUT %.20q: %d %s, want %d and a reason", path, r.status, r.body, want)
		}
	}
	c.fill(64<<20, 64<<10)

	testkit.Must(t, behind.Start())
	c.checkOddKeys(behind, rv)
	wantInstalled(t, behind)
	c.kill(c.Nodes...)
	c.start()
	for _, n := range c.Nodes {
		c.checkOddKeys(n, rv)
	}
}

// checkOddKeys reads the odd keys from what one node has.
func (c *liveCluster) checkOddKeys(n *proc.Node, rv uint64) {
	c.t.Helper()
	testkit.Must(c.t, n.WaitReady(c.context()))
	l := c.client(n)
	defer l.close()
	if got := l.version(); got < rv {
		c.t.Errorf("node %d has version %d, want at least %d", n.ID, got, rv)
	}
	for i, k := range oddKeys {
		r := l.do(http.MethodGet, n.URL()+"/"+everyByte(k.key)+"?resourceVersion=0", "")
		if r.status != http.StatusOK || string(r.body) != oddValue(i) {
			c.t.Errorf("node %d: GET %.20q: %d %.60q %v", n.ID, k.key, r.status, r.body, r.err)
		}
	}
}

// fill writes so many bytes of log, over few keys.
func (c *liveCluster) fill(bytes, valueSize int) {
	c.t.Helper()
	c.fillKeyed(bytes, valueSize, 256)
}

func (c *liveCluster) fillKeyed(bytes, valueSize, keys int) {
	c.t.Helper()
	leader := c.leader()
	value := strings.Repeat("f", valueSize)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			l := c.client(leader)
			defer l.close()
			for i := next.Add(1); i <= int64(bytes/valueSize); i = next.Add(1) {
				r := l.raw(http.MethodPut, fmt.Sprint("fill/", i%int64(keys)), "", value)
				if r.err != nil || r.status/100 != 2 {
					c.t.Errorf("PUT: %d %s %v", r.status, r.body, r.err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// wantInstalled checks that the node's state came as a snapshot and not as log entries.
func wantInstalled(t *testing.T, n *proc.Node) {
	t.Helper()
	b, err := os.ReadFile(n.LogFile)
	testkit.Must(t, err)
	if !bytes.Contains(b, []byte("installed snapshot")) {
		t.Errorf("node %d got no snapshot; is the test too small?", n.ID)
	}
}

// TestProcess_FarBehind: a node that misses a gigabyte of log gets it as a snapshot, and nobody else notices.
func TestProcess_FarBehind(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Args: []string{"--snapshot-bytes", strconv.Itoa(testkit.Sized(8<<20, 64<<20))}})
	behind := c.others(c.leader())[0]
	c.stop(behind)
	start := time.Now()
	size := testkit.Sized(48<<20, 1<<30+1<<28)
	c.fill(size, testkit.Sized(64<<10, 1<<20))
	t.Logf("%d MiB of log written in %v", size>>20, time.Since(start).Round(time.Second))
	c.catchUp(behind)
}

// TestProcess_ManyKeys: a state of very many keys arrives as a snapshot, and nobody else notices.
func TestProcess_ManyKeys(t *testing.T) {
	if !*testkit.Heavy {
		t.Skip("needs -heavy; TestProcess_FarBehind is the same with few keys")
	}
	const keys = 1_000_000
	c := newLiveCluster(t, proc.Options{})
	behind := c.others(c.leader())[0]
	c.stop(behind)
	start := time.Now()
	var next atomic.Int64
	value := strings.Repeat("v", 64)
	many := func(l *liveClient) {
		i := next.Add(1)
		if i > keys {
			return
		}
		r := l.raw(http.MethodPut, fmt.Sprintf("many/%07d", i), "", value)
		if r.err != nil || r.status != http.StatusCreated {
			t.Errorf("PUT: %d %s %v", r.status, r.body, r.err)
		}
	}
	load := c.load(128, c.others(behind), many)
	for next.Load() <= keys {
		time.Sleep(10 * time.Millisecond)
	}
	load.stop()
	took := time.Since(start)
	t.Logf("%d keys written in %v, %.0f/s", keys, took.Round(time.Second), keys/took.Seconds())
	c.catchUp(behind)
	l := c.client(behind)
	for i := 1; i <= keys; i += keys / 1000 {
		if r := l.raw(http.MethodGet, fmt.Sprintf("many/%07d", i), "?resourceVersion=0", ""); r.status != http.StatusOK || string(r.body) != value {
			t.Errorf("GET of key %d: %d %.60s %v", i, r.status, r.body, r.err)
		}
	}
	c.kill(c.Nodes...)
	start = time.Now()
	c.start()
	took = time.Since(start)
	t.Logf("all nodes ready %v after their start", round(took))
	if took > 5*time.Second {
		t.Errorf("with %d keys nodes need %v until they are ready", keys, took)
	}
}

// TestProcess_JoinLargeState: a state of a gigabyte goes to a new member. No leader changes, clients wait little
// longer, and neither side needs more than about twice the memory of the state.
func TestProcess_JoinLargeState(t *testing.T) {
	if !*testkit.Heavy {
		t.Skip("needs -heavy; TestProcess_FarBehind is the same with less")
	}
	const state, valueSize = 1 << 30, 256 << 10
	c := newLiveCluster(t, proc.Options{})
	c.fillKeyed(state, valueSize, state/valueSize)
	leader := c.leader()
	terms := c.terms()

	var mu sync.Mutex
	var took []time.Duration
	load := c.load(4, c.Nodes, func(l *liveClient) {
		start := time.Now()
		if o := l.putNew(); o.outcome != liveDone {
			t.Errorf("failed while a node joins: %v", o)
		}
		mu.Lock()
		took = append(took, time.Since(start))
		mu.Unlock()
		time.Sleep(2 * time.Millisecond)
	})
	p99 := func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(took)
		q := durationQuantile(took, 0.99)
		took = nil
		return q
	}
	time.Sleep(10 * time.Second)
	alone := p99()
	start := time.Now()
	joined := c.join(leader)
	within := time.Since(start)
	beside := p99()
	load.stop()
	wantInstalled(t, joined)
	t.Logf("a state of %d MiB moved within %v; p99 of writes %v, before that %v; most memory: new member %d MiB, leader %d MiB",
		state>>20, round(within), beside, alone, peakMemory(joined)>>20, peakMemory(leader)>>20)
	if now := c.terms()[:3]; !slices.Equal(now, terms) {
		t.Errorf("the leader changed: terms %v, then %v", terms, now)
	}
	if beside > 3*alone {
		t.Errorf("p99 of writes goes from %v to %v", alone, beside)
	}
	for _, n := range []*proc.Node{joined, leader} {
		if most := peakMemory(n); most > state*22/10+128<<20 {
			t.Errorf("node %d takes %d MiB for a state of %d MiB", n.ID, most>>20, state>>20)
		}
	}
}

// catchUp starts a node and waits until it has everything, while clients of the others go on.
func (c *liveCluster) catchUp(n *proc.Node) {
	c.t.Helper()
	leader := c.leader()
	term := func() uint64 {
		s, err := leader.Status(c.context())
		testkit.Must(c.t, err)
		return s.Term
	}
	before := term()
	want := c.client(leader).version()
	load := c.load(4, c.others(n), func(l *liveClient) {
		if o := l.putNew(); o.outcome != liveDone {
			c.t.Errorf("failed while another node catches up: %v", o)
		}
	})
	c.waitForAcks(100)
	alone := c.history.longestSince(0)

	began := c.history.now()
	testkit.Must(c.t, n.Start())
	c.eventually(func() error {
		s, err := n.Status(c.context())
		if err == nil && s.ResourceVersion < want {
			err = fmt.Errorf("node %d is at version %d, want %d", n.ID, s.ResourceVersion, want)
		}
		return err
	})
	took := c.history.now() - began
	testkit.Must(c.t, n.WaitReady(c.context()))
	c.waitForAcks(100)
	load.stop()
	if after := term(); after != before {
		c.t.Errorf("the leader changed: term %d, then %d", before, after)
	}
	wantInstalled(c.t, n)
	c.t.Logf("caught up within %v; slowest of the others' writes %v, before that %v; most memory: node that caught up %d MiB, leader %d MiB",
		took.Round(time.Millisecond), c.history.longestSince(began).Round(time.Millisecond), alone.Round(time.Millisecond),
		peakMemory(n)>>20, peakMemory(leader)>>20)
	c.readBack()
	if err := c.history.checkVersions(0, 0); err != nil {
		c.t.Error(err)
	}
}

// peakMemory returns the most memory that a process has ever had, in bytes; 0 where nobody counts.
func peakMemory(n *proc.Node) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.PID()))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	var kilobytes int
	_, _ = fmt.Sscan(rest, &kilobytes)
	return kilobytes << 10
}
