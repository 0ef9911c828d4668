package proc

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// newFakes starts a cluster of fakes that ends with the test.
func newFakes(t *testing.T, opts Options) *Cluster {
	t.Helper()
	c := newIdleFakes(t, opts)
	if err := c.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	return c
}

// newIdleFakes is newFakes before the start.
func newIdleFakes(t *testing.T, opts Options) *Cluster {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	opts.Binary = binary
	opts.Env = fakeEnv
	c, err := NewCluster(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// testContext bounds every wait of a test, so that a bug is a failure and not a hang.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// starts returns how often the node has started on its data directory.
func starts(t *testing.T, n *Node) uint64 {
	t.Helper()
	s, err := n.Status(testContext(t))
	must(t, err)
	return s.AppliedIndex
}

func TestCluster_StopRemovesItsDirAndFreesItsPorts(t *testing.T) {
	c := newFakes(t, Options{})
	dir := c.dir
	must(t, c.Stop())
	for _, n := range c.Nodes {
		if n.Running() {
			t.Errorf("node %d still runs", n.ID)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory still there: %v", err)
	}
	if !c.ports[0].free(portsPerNode * len(c.Nodes)) {
		t.Error("ports still in use")
	}
	must(t, c.Stop()) // a second Stop does nothing
}

func TestCluster_KeepsTheDirOfItsCaller(t *testing.T) {
	dir := t.TempDir()
	c := newFakes(t, Options{Dir: dir, Nodes: 1})
	must(t, c.Stop())
	if _, err := os.Stat(c.Nodes[0].LogFile); err != nil {
		t.Error(err)
	}
}

func TestCluster_PortsDoNotOverlap(t *testing.T) {
	seen := make(map[int]bool)
	for range 5 {
		c := newIdleFakes(t, Options{}) // nothing runs: only the reservation keeps them apart
		for _, n := range c.Nodes {
			for _, port := range []int{n.RaftPort, n.HTTPPort, n.RedisPort} {
				if seen[port] {
					t.Fatalf("port %d given out twice", port)
				}
				seen[port] = true
			}
		}
	}
	if _, err := NewCluster(Options{Binary: os.Args[0], Nodes: 11}); err == nil {
		t.Error("more nodes than a block of ports holds, and no error")
	}
}

func TestNode_KeepsItsDataAcrossStopAndKill(t *testing.T) {
	c := newFakes(t, Options{})
	ctx, n := testContext(t), c.Nodes[1]
	must(t, n.Kill())
	if n.Running() {
		t.Error("runs after a kill")
	}
	must(t, n.Start())
	must(t, n.WaitReady(ctx))
	must(t, n.Stop(ctx))
	must(t, n.Stop(ctx)) // already gone
	must(t, n.Kill())
	must(t, c.Start(ctx)) // starts what is missing
	if got := starts(t, n); got != 3 {
		t.Errorf("started %d times on its data, want 3", got)
	}
	if got := starts(t, c.Nodes[0]); got != 1 {
		t.Errorf("another node started %d times, want 1", got)
	}
	if err := n.Start(); err == nil {
		t.Error("started twice at the same time")
	}
}

func TestNode_PauseAndResume(t *testing.T) {
	c := newFakes(t, Options{Nodes: 1})
	ctx, n := testContext(t), c.Nodes[0]
	must(t, n.Pause())
	if _, err := n.Status(ctx); err == nil {
		t.Error("a paused node was asked for its status")
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := n.WaitReady(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a paused node is ready: %v", err)
	}
	must(t, n.Resume())
	must(t, n.WaitReady(ctx))

	must(t, n.Pause())
	must(t, n.Stop(ctx)) // leaves in peace, because Stop resumes it
	must(t, n.Start())
	must(t, n.WaitReady(ctx))
	must(t, n.Pause())
	must(t, n.Kill())
}

func TestNode_StopKillsOneThatDoesNotLeave(t *testing.T) {
	c := newFakes(t, Options{Nodes: 1, Args: []string{"--deaf"}})
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	n := c.Nodes[0]
	if err := n.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
	if n.Running() {
		t.Error("still runs")
	}
}

func TestCluster_StartFailsWithTheLogOfANodeThatEnds(t *testing.T) {
	broken := true
	c := newIdleFakes(t, Options{NodeArgs: func(n *Node) []string {
		if broken && n.ID == 2 {
			return []string{"--broken"}
		}
		return nil
	}})
	ctx, n := testContext(t), c.Nodes[1]
	wantCrash := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "node 2") || !strings.Contains(err.Error(), "disk on fire") {
			t.Errorf("%s: error %v does not say which node and why", what, err)
		}
	}
	wantCrash("Start", c.Start(ctx))
	wantCrash("Start again", n.Start())
	exit, ok := errors.AsType[*exec.ExitError](n.Wait(ctx))
	if !ok || exit.ExitCode() != 3 {
		t.Errorf("exit %v, want status 3", exit)
	}
	must(t, n.Start()) // its end has been seen, so it may try again
	wantCrash("WaitReady", n.WaitReady(ctx))
	wantCrash("Stop", n.Stop(ctx))

	broken = false
	must(t, c.Start(ctx))
}

func TestCluster_PeerURLsPerNode(t *testing.T) {
	const proxy = "http://127.0.0.1:1"
	c := newFakes(t, Options{Token: "t", PeerURLs: func(n *Node, urls []string) []string {
		peers := slices.Repeat([]string{proxy}, len(urls))
		peers[n.ID-1] = urls[n.ID-1]
		return peers
	}})
	peers := strings.Join([]string{proxy, c.Nodes[1].RaftURL(), proxy}, ",")
	want := "cluster " + peers + " token t"
	if log := c.Nodes[1].LogTail(); !strings.Contains(log, want) {
		t.Errorf("log %q does not have %q", log, want)
	}
}

func TestCluster_LeaderNeedsAQuorum(t *testing.T) {
	// What each node says of leader and term.
	tests := []struct {
		name   string
		leader [3]int
		term   [3]int
		want   int // 0: nobody
	}{
		{"agreed", [3]int{2, 2, 2}, [3]int{5, 5, 5}, 2},
		{"one knows none", [3]int{0, 3, 3}, [3]int{5, 5, 5}, 3},
		{"deposed one believes in itself", [3]int{1, 2, 2}, [3]int{4, 5, 5}, 2},
		{"same name, other terms", [3]int{1, 1, 1}, [3]int{3, 4, 5}, 0},
		{"outside the cluster", [3]int{9, 9, 9}, [3]int{5, 5, 5}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newFakes(t, Options{NodeArgs: func(n *Node) []string {
				i := n.ID - 1
				return []string{"--leader", strconv.Itoa(tt.leader[i]), "--term", strconv.Itoa(tt.term[i])}
			}})
			ctx, cancel := context.WithTimeout(testContext(t), 10*time.Second)
			defer cancel()
			if tt.want == 0 { // no answer is the answer: do not wait the whole time for it
				if n, err := c.findLeader(ctx); err == nil {
					t.Errorf("got leader %d, want none", n.ID)
				}
				return
			}
			n, err := c.Leader(ctx)
			must(t, err)
			if n.ID != tt.want {
				t.Errorf("got leader %d, want %d", n.ID, tt.want)
			}
		})
	}
}

func TestCluster_LeaderWithNodesAway(t *testing.T) {
	c := newFakes(t, Options{})
	ctx := testContext(t)
	must(t, c.Nodes[2].Pause())
	n, err := c.Leader(ctx)
	must(t, err)
	if n != c.Nodes[0] {
		t.Errorf("got leader %d, want 1", n.ID)
	}
	must(t, c.Nodes[1].Kill())
	if _, err := c.findLeader(ctx); err == nil {
		t.Error("one node of three is no quorum")
	}
}

func TestNewCluster_NamesAMissingBinary(t *testing.T) {
	_, err := NewCluster(Options{Binary: "no-such-raftrv"})
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "no-such-raftrv") {
		t.Errorf("got %v", err)
	}
}
