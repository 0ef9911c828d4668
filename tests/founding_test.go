package tests

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// Wrong ways to start a cluster. Each ends in a refusal that says what to do, or in the right cluster, and none with
// two nodes that lead and acknowledge. (A backup that is restored on two of three nodes is in
// TestProcess_BackupAndRestore.)

// starts is a cluster whose nodes are started with flags that change.
type starts struct {
	*liveCluster
	mu    sync.Mutex
	flags map[int][]string // by node, after those that it has anyway
}

func newStarts(t *testing.T, nodes int) *starts {
	s := &starts{flags: map[int][]string{}}
	s.liveCluster = newIdleLiveCluster(t, proc.Options{
		Nodes: nodes,
		Args:  []string{"--wal-segment-bytes", "1048576"},
		NodeArgs: func(n *proc.Node) []string {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.flags[n.ID]
		},
	})
	return s
}

// node returns the node that was given an ID.
func (s *starts) node(id int) *proc.Node { return s.Nodes[id-1] }

// list is a --cluster of some nodes, by their places.
func (s *starts) list(ids ...int) string {
	var urls []string
	for _, id := range ids {
		urls = append(urls, s.node(id).RaftURL())
	}
	return strings.Join(urls, ",")
}

// up starts a node with further flags.
func (s *starts) up(id int, flags ...string) *proc.Node {
	s.t.Helper()
	s.mu.Lock()
	s.flags[id] = flags
	s.mu.Unlock()
	testkit.Must(s.t, s.node(id).Start())
	return s.node(id)
}

// upAll starts nodes with the same flags, waits until they are ready, and writes a key.
func (s *starts) upAll(ids []int, flags ...string) {
	s.t.Helper()
	for _, id := range ids {
		s.up(id, flags...)
	}
	for _, id := range ids {
		testkit.Must(s.t, s.node(id).WaitReady(s.context()))
	}
	s.write(s.node(ids[0]), "k", "v")
}

// wantRefused waits until a node has ended, saying all these words.
func (c *liveCluster) wantRefused(n *proc.Node, words ...string) {
	c.t.Helper()
	var exit *exec.ExitError
	if err := n.Wait(c.context()); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		c.t.Errorf("node %d ended with %v, want status 1\n%s", n.ID, err, n.LogTail())
	}
	for _, w := range words {
		if err := c.says(n, w); err != nil {
			c.t.Error(err)
		}
	}
}

func (c *liveCluster) says(n *proc.Node, words string) error {
	if text := n.LogTail(); !strings.Contains(text, words) {
		return fmt.Errorf("node %d does not say %q:\n%s", n.ID, words, text)
	}
	return nil
}

// wantWaiting waits until a node says for whom it waits. It must not serve.
func (s *starts) wantWaiting(n *proc.Node, words ...string) {
	s.t.Helper()
	for _, w := range words {
		s.eventually(func() error { return s.says(n, w) })
	}
	l := s.client(n)
	defer l.close()
	if r := l.raw(http.MethodPut, "x", "?timeout=100ms", "x"); r.err == nil && r.status/100 == 2 {
		s.t.Errorf("node %d acknowledges: %d", n.ID, r.status)
	}
}

// end ends nodes, which may have ended by themselves.
func (s *starts) end(ids ...int) {
	for _, id := range ids {
		_ = s.node(id).Kill()
	}
}

// wrongStarts are the ways, and what comes of each.
var wrongStarts = []struct {
	name  string
	nodes int
	run   func(s *starts)
}{
	{"another list", 4, func(s *starts) {
		s.up(1, "--cluster", s.list(1, 2, 3))
		s.up(2, "--cluster", s.list(1, 2, 3))
		three := s.up(3, "--cluster", s.list(1, 4, 3))
		s.wantWaiting(s.node(2), "waiting to found the cluster", "node 3 ("+three.RaftURL()+") has another list, 1="+s.node(1).RaftURL())
		s.wantRefused(three, "has another list", "start all nodes with the same --cluster")
		s.end(1, 2)
		s.upAll([]int{1, 2, 3}, "--cluster", s.list(1, 2, 3)) // and then right
	}},
	{"the list in another order", 3, func(s *starts) {
		s.up(1)
		two := s.up(2, "--cluster", s.list(3, 2, 1))
		s.wantRefused(two, "has another list")
		s.end(1)
		// With IDs there is no order.
		s.up(1, "--cluster", peerURLs(s.node(1), s.node(2), s.node(3)))
		s.up(2, "--cluster", peerURLs(s.node(3), s.node(2), s.node(1)))
		s.up(3)
		s.start()
	}},
	{"a cluster of one, grown by its flags", 3, func(s *starts) {
		s.upAll([]int{1}, "--cluster", s.list(1))
		s.stop(s.node(1))
		for _, flags := range [][]string{nil, {"--cluster-token", "t"}} {
			one := s.up(1, flags...)
			s.wantRefused(s.up(2, flags...), "has data, of cluster", "with --join")
			s.wantRefused(s.up(3, flags...), "has data, of cluster", "with --join")
			testkit.Must(s.t, one.WaitReady(s.context()))
			s.wantValue(one, "k", "v")
			s.wantMembers(one)
			s.stop(one)
		}
	}},
	{"a founded cluster, whose list is a hint", 5, func(s *starts) {
		s.upAll([]int{1, 2, 3}, "--cluster", s.list(1, 2, 3))
		for _, id := range []int{1, 2, 3} {
			s.stop(s.node(id))
		}
		s.up(1, "--cluster", s.list(2, 3, 1), "--cluster-token", "another") // another order
		s.up(2, "--cluster", s.list(1, 2, 3, 4, 5))                         // grown
		s.up(3, "--cluster", s.list(1, 2))                                  // without itself
		for _, id := range []int{1, 2, 3} {
			testkit.Must(s.t, s.node(id).WaitReady(s.context()))
			s.wantValue(s.node(id), "k", "v")
			s.wantMembers(s.Nodes[:3]...)
		}
	}},
	{"overlapping lists", 5, func(s *starts) {
		few, all := s.list(1, 2, 3), s.list(1, 2, 3, 4, 5)
		s.up(1, "--cluster", few, "--cluster-token", "t")
		s.up(2, "--cluster", few, "--cluster-token", "t")
		for _, id := range []int{3, 4, 5} {
			s.up(id, "--cluster", all, "--cluster-token", "t")
		}
		s.wantRefused(s.node(3), "has another list")
		s.end(1, 2, 4, 5)
	}},
	{"another token", 3, func(s *starts) {
		s.up(1, "--cluster-token", "t")
		s.up(2, "--cluster-token", "t")
		three := s.up(3)
		s.wantWaiting(s.node(1), "has another token")
		s.wantRefused(three, "has another token", "start all nodes with the same --cluster-token")
		s.end(1, 2)
	}},
	{"one that joins, and no cluster", 3, func(s *starts) {
		s.up(1)
		s.up(2)
		three := s.up(3, "--join")
		s.wantWaiting(s.node(1), "was started with --join")
		s.wantWaiting(three, "waiting for a node of the cluster to answer", "waits to found a cluster of 1=")
		l := s.client(three)
		defer l.close()
		if r := l.do(http.MethodGet, three.URL()+"/-/readyz", ""); r.status != http.StatusServiceUnavailable || !strings.Contains(string(r.body), "waits to found") {
			s.t.Errorf("readyz: %d %s", r.status, r.body)
		}
		if r := l.do(http.MethodGet, three.URL()+"/-/livez", ""); r.status != http.StatusOK {
			s.t.Errorf("livez: %d %s", r.status, r.body)
		}
		s.stop(three)
		s.upAll([]int{3})
	}},
	{"one of three wiped", 3, func(s *starts) {
		s.upAll([]int{1, 2, 3})
		s.stop(s.node(3))
		testkit.Must(s.t, os.RemoveAll(s.node(3).DataDir))
		for range 2 {
			s.wantRefused(s.up(3), "node 3 was part of this cluster with another data directory", "curl -X DELETE", "under a new ID")
		}
	}},
	{"two of three wiped", 3, func(s *starts) {
		s.upAll([]int{1, 2, 3})
		for _, n := range s.Nodes {
			s.stop(n)
		}
		testkit.Must(s.t, os.RemoveAll(s.node(1).DataDir))
		testkit.Must(s.t, os.RemoveAll(s.node(2).DataDir))
		s.up(1)
		s.up(2)
		s.wantWaiting(s.node(1), "waiting to found the cluster", "node 3 ("+s.node(3).RaftURL()+"): nothing")
		three := s.up(3) // which has no leader
		for _, id := range []int{1, 2} {
			s.wantRefused(s.node(id), "was part of this cluster with another data directory")
		}
		l := s.client(three)
		defer l.close()
		if r := l.raw(http.MethodGet, "k", "?resourceVersion=0", ""); string(r.body) != "v" {
			s.t.Errorf("the third has %d %q", r.status, r.body)
		}
		if r := l.raw(http.MethodGet, "k", "?timeout=200ms", ""); r.status != http.StatusServiceUnavailable {
			s.t.Errorf("a linearizable read there: %d %q", r.status, r.body)
		}
	}},
	{"two wiped, and a cluster without the third", 3, func(s *starts) {
		s.upAll([]int{1, 2, 3})
		for _, n := range s.Nodes {
			s.stop(n)
		}
		testkit.Must(s.t, os.RemoveAll(s.node(1).DataDir))
		testkit.Must(s.t, os.RemoveAll(s.node(2).DataDir))
		s.upAll([]int{1, 2}, "--cluster", s.list(1, 2))
		s.wantRefused(s.up(3), "are in another cluster now", "founded without this node", "raftrv recover --data-dir "+s.node(3).DataDir)
	}},
	{"directories of two nodes swapped", 3, func(s *starts) {
		s.upAll([]int{1, 2, 3})
		two, three := s.node(2), s.node(3)
		s.stop(two)
		s.stop(three)
		two.DataDir, three.DataDir = three.DataDir, two.DataDir
		s.wantRefused(s.up(2), "belongs to node 3, not to --id 2")
		s.wantRefused(s.up(3), "belongs to node 2, not to --id 3")
	}},
	{"an old directory of another cluster", 3, func(s *starts) {
		s.upAll([]int{1, 2, 3})
		for _, n := range s.Nodes {
			s.stop(n)
		}
		s.node(1).DataDir += "-new"
		s.node(2).DataDir += "-new"
		s.up(1)
		s.up(2)
		s.up(3) // somebody has forgotten this one
		s.wantRefused(s.node(1), "node 1 was part of this cluster with another data directory")
		s.wantRefused(s.node(2), "node 2 was part of this cluster with another data directory")
		s.stop(s.node(3))
		kept := s.node(3).DataDir
		s.node(3).DataDir += "-new"
		s.upAll([]int{1, 2, 3})
		s.stop(s.node(3))
		s.node(3).DataDir = kept
		s.wantRefused(s.up(3), "are in another cluster now")
	}},
	{"an empty directory that joined, at another cluster", 3, func(s *starts) {
		s.upAll([]int{1}, "--cluster", s.list(1))
		s.upAll([]int{2}, "--cluster", "2="+s.list(2))
		three := s.up(3, "--join", "--cluster", peerURLs(s.node(1), s.node(3))) // which nobody has added
		s.eventually(func() error { return s.says(three, "serving") })
		s.stop(three)
		testkit.Must(s.t, changed(s.memberCall(s.node(2), http.MethodPost, "/3", three.RaftURL())))
		s.up(3, "--join", "--cluster", peerURLs(s.node(2), s.node(3)))
		testkit.Must(s.t, three.WaitReady(s.context()))
		s.wantVoter(s.node(2), three)
		s.wantMembers(s.node(2), three)
	}},
	{"the ID of another", 4, func(s *starts) {
		s.upAll([]int{1, 2, 3}, "--cluster", s.list(1, 2, 3))
		twin := s.up(4, "--id", "2", "--cluster", s.list(1, 2, 3), "--listen-peer", strings.TrimPrefix(s.node(4).RaftURL(), "http://"))
		s.wantRefused(twin, "node 2 was part of this cluster with another data directory")
	}},
	{"the ID of another, before the cluster is founded", 4, func(s *starts) {
		list := s.list(1, 2, 3)
		s.up(1, "--cluster", list)
		s.up(2, "--cluster", list)
		twin := s.up(4, "--id", "2", "--cluster", list, "--listen-peer", strings.TrimPrefix(s.node(4).RaftURL(), "http://"))
		s.wantRefused(twin, "another process answers at the address that --cluster has for this node")
		s.upAll([]int{3}, "--cluster", list)
	}},
	{"a copy of a directory", 4, func(s *starts) {
		list := s.list(1, 2, 3)
		s.upAll([]int{1, 2, 3}, "--cluster", list)
		s.stop(s.node(3))
		testkit.Must(s.t, os.CopyFS(s.node(4).DataDir, os.DirFS(s.node(3).DataDir)))
		s.up(3, "--cluster", list)
		testkit.Must(s.t, s.node(3).WaitReady(s.context()))
		twin := []string{"--id", "3", "--cluster", list, "--listen-peer", strings.TrimPrefix(s.node(4).RaftURL(), "http://")}
		s.wantRefused(s.up(4, twin...), "another process runs as node 3 of this cluster")
		s.wantValue(s.node(3), "k", "v")
	}},
	{"a directory used twice", 2, func(s *starts) {
		s.upAll([]int{1}, "--cluster", s.list(1))
		s.node(2).DataDir = s.node(1).DataDir
		s.wantRefused(s.up(2), "is in use by another process")
	}},
}

func TestProcess_WrongStarts(t *testing.T) {
	for _, tt := range wrongStarts {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.run(newStarts(t, tt.nodes))
		})
	}
}
