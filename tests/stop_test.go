package tests

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// stopMax is within which every node ends, whatever it does.
const stopMax = 5 * time.Second

// TestProcess_StopDuringSnapshot: SIGTERM gives up a snapshot that is being written. Nothing is left of it, and
// nothing is lost.
func TestProcess_StopDuringSnapshot(t *testing.T) {
	const mebibytes = 96
	c := newLiveCluster(t, proc.Options{Nodes: 1, Args: []string{"--snapshot-bytes", strconv.Itoa(1 << 40),
		"--snapshot-entries", strconv.Itoa(mebibytes + 20)}})
	n := c.Nodes[0]
	l := c.client(n)
	value := strings.Repeat("v", 1<<20)
	for i := range mebibytes {
		if r := l.raw(http.MethodPut, fmt.Sprint("large/", i), "", value); r.status != http.StatusCreated {
			t.Fatalf("PUT: %d %s %v", r.status, r.body, r.err)
		}
	}
	list := func(pattern string) []string {
		paths, err := filepath.Glob(filepath.Join(n.DataDir, "snap", pattern))
		testkit.Must(t, err)
		return paths
	}
	before := len(list("*.snap.db"))
	for i := 0; len(list("tmp*")) == 0; i++ {
		if i == 1000 {
			t.Fatal("no snapshot is written")
		}
		l.mustPut("small", c.newValue(10))
	}
	start := time.Now()
	c.stop(n) // with status 0
	took := time.Since(start)
	t.Logf("stopped after %v", took.Round(time.Millisecond))
	if took > stopMax {
		t.Errorf("the stop took %v", took)
	}
	if now := len(list("*.snap.db")); now != before {
		t.Errorf("the snapshot was written to its end: %d bodies, then %d", before, now)
	}
	if left := list("tmp*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	c.start()
	if r := c.client(n).raw(http.MethodGet, fmt.Sprint("large/", mebibytes-1), "", ""); string(r.body) != value {
		t.Errorf("GET after it: %d, %d bytes", r.status, len(r.body))
	}
}

// TestProcess_FatalError: when the disk fails, who waits gets an answer, and the process ends with an error that
// says what failed.
func TestProcess_FatalError(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Nodes: 1, Args: []string{"--snapshot-entries", "500"}})
	n := c.Nodes[0]
	const clients = 8
	last := make(chan *liveReply, clients)
	testkit.Must(t, os.RemoveAll(filepath.Join(n.DataDir, "snap")))
	var first time.Time
	for i := range clients {
		go func() {
			l := c.client(n)
			defer l.close()
			for {
				r := l.raw(http.MethodPut, fmt.Sprint("k", i), "", "v")
				if r.status/100 != 2 {
					last <- r
					return
				}
			}
		}()
	}
	for range clients {
		r := <-last
		if first.IsZero() {
			first = time.Now()
		}
		refused := r.status == http.StatusServiceUnavailable && r.problem.Outcome == fault.NotApplied
		open := r.status == http.StatusGatewayTimeout && r.problem.Outcome == fault.Unknown
		if !refused && !open {
			t.Errorf("PUT while the node fails: %d %s %v", r.status, r.body, r.err)
		}
	}
	err := n.Wait(c.context())
	took := time.Since(first)
	t.Logf("ended %v after the first refusal: %v", took.Round(time.Millisecond), err)
	if took > stopMax {
		t.Errorf("the process took %v to end", took)
	}
	if e, ok := errors.AsType[interface {
		error
		ExitCode() int
	}](err); !ok || e.ExitCode() != 1 {
		t.Errorf("it ended with %v, want status 1", err)
	}
	if log := n.LogTail(); !strings.Contains(log, "snapshot") || !strings.Contains(log, "snap") {
		t.Errorf("the log does not say what failed:\n%s", log)
	}
}

// TestProcess_StopAnswersWithoutMajority: who waits for a majority that is not there is answered when the node stops,
// not cut off.
func TestProcess_StopAnswersWithoutMajority(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	n := c.leader()
	watcher := c.client(n)
	watcher.mustPut("k", "v")
	c.kill(c.others(n)...)
	replies := make(chan *liveReply)
	const clients = 8
	for i := range clients {
		go func() {
			l := c.client(n)
			defer l.close()
			l.timeout = time.Minute
			replies <- l.raw([...]string{http.MethodPut, http.MethodGet}[i%2], "k", "?timeout=1m", "v")
		}()
	}
	c.eventually(func() error {
		r := watcher.do(http.MethodGet, n.URL()+"/-/metrics", "")
		if !strings.Contains(string(r.body), fmt.Sprintf("raftrv_connections %d", clients+1)) {
			return fmt.Errorf("not all requests have come: %v", r.err)
		}
		return nil
	})
	start := time.Now()
	c.stop(n)
	if took := time.Since(start); took > stopMax {
		t.Errorf("the stop took %v", took)
	}
	for range clients {
		if r := <-replies; r.err != nil || r.status != http.StatusServiceUnavailable && r.status != http.StatusGatewayTimeout {
			t.Errorf("%d %s %v", r.status, r.body, r.err)
		}
	}
}
