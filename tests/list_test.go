package tests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"raftrv/internal/proc"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// TestProcess_ListBesideWrites streams every key, again and again, while clients write at random keys as
// fast as they can: the stream is fast, the writes go on, and the node's memory does not grow.
func TestProcess_ListBesideWrites(t *testing.T) {
	keys := testkit.Sized(100_000, 1_000_000)
	span := testkit.Sized(200*time.Millisecond, 3*time.Second)
	c := newLiveCluster(t, proc.Options{Nodes: 1})
	n := c.Nodes[0]
	c.fillKeys(n, keys)

	var writes atomic.Int64
	value := strings.Repeat("w", 64)
	load := c.load(16, c.Nodes, func(l *liveClient) {
		r := l.raw(http.MethodPut, manyKey(rand.IntN(keys)), "", value)
		if r.err != nil || r.status != http.StatusNoContent {
			t.Errorf("PUT: %d %s %v", r.status, r.body, r.err)
		}
		writes.Add(1)
	})
	// Spans with and without lists take turns, since the machine may be busy with
	// something else for a while. The first of each does not count: the heap grows
	// until it knows the load.
	var wrote, most [2]int
	var spent [2]time.Duration
	var lists int
	for i := range 2 * 5 {
		beside := i % 2
		start, before := time.Now(), writes.Load()
		stop := make(chan struct{})
		var sampler sync.WaitGroup
		sampler.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
					if i >= 2 {
						most[beside] = max(most[beside], residentMemory(n))
					}
				}
			}
		})
		for time.Since(start) < span {
			if beside == 0 {
				time.Sleep(time.Millisecond)
				continue
			}
			if count := countLines(t, n.URL()+"/-/v1/keys?prefix=many%2F"); count != keys {
				t.Fatalf("a list of %d items, want %d", count, keys)
			}
			if i >= 2 {
				lists++
			}
		}
		close(stop)
		sampler.Wait()
		if i >= 2 {
			wrote[beside] += int(writes.Load() - before)
			spent[beside] += time.Since(start)
		}
	}
	load.stop()

	speed := float64(lists*keys) / spent[1].Seconds()
	alone, beside := float64(wrote[0])/spent[0].Seconds(), float64(wrote[1])/spent[1].Seconds()
	share, growth := beside/alone, most[1]-most[0]
	t.Logf("%d lists of %d keys: %.0f items/s; writes %.0f/s, without lists %.0f/s (%.0f %%); memory %d MiB, without lists %d MiB (%+d)",
		lists, keys, speed, beside, alone, 100*share, most[1]>>20, most[0]>>20, growth>>20)
	if !*testkit.Heavy {
		return // too small to judge
	}
	if speed < 300_000 {
		t.Errorf("%.0f items/s", speed)
	}
	if share < 0.5 {
		t.Errorf("writes fall to %.0f %%", 100*share)
	}
	if growth > 64<<20 {
		t.Errorf("memory grows by %d MiB", growth>>20)
	}
}

func manyKey(i int) string { return fmt.Sprintf("many/%07d", i) }

// fillKeys writes many keys with values of 64 bytes.
func (c *liveCluster) fillKeys(n *proc.Node, keys int) {
	c.t.Helper()
	value := strings.Repeat("v", 64)
	var next atomic.Int64
	load := c.load(16, []*proc.Node{n}, func(l *liveClient) {
		first := int(next.Add(store.TxnOpsMax)) - store.TxnOpsMax
		if first >= keys {
			return
		}
		var body struct {
			Then []map[string]string `json:"then"`
		}
		for i := first; i < min(first+store.TxnOpsMax, keys); i++ {
			body.Then = append(body.Then, map[string]string{"op": "put", "key": manyKey(i), "value": value})
		}
		b, err := json.Marshal(body)
		if err != nil {
			c.t.Error(err)
		}
		if r := l.do(http.MethodPost, n.URL()+"/-/v1/txn", string(b)); r.err != nil || r.status != http.StatusOK {
			c.t.Errorf("POST: %d %s %v", r.status, r.body, r.err)
		}
	})
	for int(next.Load()) < keys {
		time.Sleep(10 * time.Millisecond)
	}
	load.stop()
}

// countLines reads a stream and returns how many items it has.
func countLines(t *testing.T, url string) int {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Error(err)
		return 0
	}
	req.Header.Set("Accept", "application/x-ndjson")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer res.Body.Close()
	lines := 0
	buf := make([]byte, 256<<10)
	for {
		n, err := res.Body.Read(buf)
		lines += bytes.Count(buf[:n], []byte("\n"))
		if err == io.EOF {
			return lines - 1 // the last one says that it is whole
		}
		if err != nil {
			t.Error(err)
			return 0
		}
	}
}

// residentMemory returns how much memory a process has now, in bytes; 0 where nobody counts.
func residentMemory(n *proc.Node) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", n.PID()))
	if err != nil {
		return 0
	}
	var size, resident int
	_, _ = fmt.Sscan(string(b), &size, &resident)
	return resident * os.Getpagesize()
}
