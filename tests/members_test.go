package tests

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// A cluster whose members change, as a person changes them: by HTTP, and by starting and stopping processes.

// memberCall changes the membership at a node, and returns the answer.
func (c *liveCluster) memberCall(at *proc.Node, method, path, body string) *liveReply {
	c.t.Helper()
	l := c.client(at)
	defer l.close()
	return l.do(method, at.URL()+path, body)
}

// join adds a member and starts it, and returns when it is a voter.
func (c *liveCluster) join(at *proc.Node) *proc.Node {
	c.t.Helper()
	n, err := c.Add()
	testkit.Must(c.t, err)
	c.eventually(func() error {
		r := c.memberCall(at, http.MethodPost, fmt.Sprintf("/-/v1/members/%d", n.ID), fmt.Sprintf(`{"peerUrl":%q}`, n.RaftURL()))
		return changed(r, "already exists", "exists already")
	})
	testkit.Must(c.t, n.Start())
	c.wantVoter(at, n)
	testkit.Must(c.t, n.WaitReady(c.context()))
	return n
}

// TestProcess_UnknownLeader: a node comes back and does not know the leader, who joined while it was away.
func TestProcess_UnknownLeader(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	away := c.Nodes[2]
	c.write(c.Nodes[0], "before", "1")
	c.kill(away)
	four := c.join(c.Nodes[0])
	testkit.Must(t, changed(c.memberCall(c.Nodes[0], http.MethodPost, fmt.Sprintf("/-/v1/leader/%d", four.ID), "")))
	c.eventually(func() error {
		if s, err := four.Status(t.Context()); err != nil || s.LeaderID != uint64(four.ID) {
			return fmt.Errorf("it does not lead: %+v %w", s, err)
		}
		return nil
	})
	c.write(four, "after", "2")

	start := time.Now()
	testkit.Must(t, away.Start())
	testkit.Must(t, away.WaitReady(c.context()))
	took := time.Since(start)
	c.wantValue(away, "after", "2")
	if leader := c.leader(); leader != four {
		t.Errorf("node %d leads by now: what this test is about did not happen", leader.ID)
	}
	t.Logf("caught up after %v", took.Round(time.Millisecond))
	if most := 5 * time.Second; took > most {
		t.Errorf("want at most %v", most)
	}
}

// changed says what is wrong with the answer to a change. One that timed out may have happened: then the next
// attempt is told so, with one of the given words.
func changed(r *liveReply, already ...string) error {
	if r.err == nil && r.status == http.StatusNoContent {
		return nil
	}
	for _, words := range already {
		if r.status == http.StatusConflict && strings.Contains(string(r.body), words) {
			return nil
		}
	}
	return fmt.Errorf("%d %s %w", r.status, r.body, r.err)
}

// leave removes a member and waits until it has ended.
func (c *liveCluster) leave(at, n *proc.Node) {
	c.t.Helper()
	c.disturb(n)
	c.eventually(func() error {
		return changed(c.memberCall(at, http.MethodDelete, fmt.Sprintf("/-/v1/members/%d", n.ID), ""), "was removed")
	})
	c.Forget(n)
	c.wantRemoved(n)
}

// wantRemoved waits until a node has ended because it was removed.
func (c *liveCluster) wantRemoved(n *proc.Node) {
	c.t.Helper()
	var exit *exec.ExitError
	if err := n.Wait(c.context()); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		c.t.Errorf("node %d, which was removed: %v, want status %d\n%s", n.ID, err, 3, n.LogTail())
	}
	if !strings.Contains(n.LogTail(), "was removed from the cluster") {
		c.t.Errorf("node %d does not say that it was removed:\n%s", n.ID, n.LogTail())
	}
}

func (c *liveCluster) members(at *proc.Node) []httpapi.Member {
	c.t.Helper()
	var answer struct{ Members []httpapi.Member }
	r := c.memberCall(at, http.MethodGet, "/-/v1/members", "")
	if r.err != nil || json.Unmarshal(r.body, &answer) != nil {
		return nil
	}
	return answer.Members
}

// wantVoter waits until a member votes.
func (c *liveCluster) wantVoter(at, n *proc.Node) {
	c.t.Helper()
	c.eventually(func() error {
		members := c.members(at)
		for _, m := range members {
			if m.ID == uint64(n.ID) && !m.Learner {
				return nil
			}
		}
		return fmt.Errorf("node %d is no voter: %+v", n.ID, members)
	})
}

func (c *liveCluster) wantMembers(want ...*proc.Node) {
	c.t.Helper()
	for _, at := range want {
		c.eventually(func() error {
			members := c.members(at)
			same := slices.EqualFunc(members, want, func(m httpapi.Member, n *proc.Node) bool {
				return m.ID == uint64(n.ID) && m.PeerURL == n.RaftURL() && !m.Learner
			})
			if !same {
				return fmt.Errorf("node %d says that the members are %+v", at.ID, members)
			}
			return nil
		})
	}
}

func (c *liveCluster) wantValue(at *proc.Node, key, want string) {
	c.t.Helper()
	l := c.client(at)
	defer l.close()
	if r := l.raw(http.MethodGet, key, "", ""); r.err != nil || r.status != http.StatusOK || string(r.body) != want {
		c.t.Errorf("node %d: GET %s: %d %q %v, want %q", at.ID, key, r.status, r.body, r.err, want)
	}
}

func (c *liveCluster) write(at *proc.Node, key, value string) {
	c.t.Helper()
	l := c.client(at)
	defer l.close()
	if r := l.raw(http.MethodPut, key, "", value); r.err != nil || r.status >= 300 {
		c.t.Errorf("node %d: PUT %s: %d %s %v", at.ID, key, r.status, r.body, r.err)
	}
}

// TestProcess_Walk is what the README of etcd's raftexample walks through, and then a restart of all nodes
// with the flags of their first day, when the log that told of the changes is gone.
func TestProcess_Walk(t *testing.T) {
	single := newLiveCluster(t, proc.Options{Nodes: 1})
	single.write(single.Nodes[0], "my-key", "hello")
	single.wantValue(single.Nodes[0], "my-key", "hello")

	c := newLiveCluster(t, proc.Options{Args: []string{"--snapshot-entries", "50"}})
	one, two, three := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	c.write(one, "my-key", "foo")
	c.kill(two)
	c.write(one, "my-key", "bar")
	c.wantValue(three, "my-key", "bar")
	c.start()
	c.wantValue(two, "my-key", "bar")

	four, err := c.Add()
	testkit.Must(t, err)
	testkit.Must(t, changed(c.memberCall(one, http.MethodPost, "/4", four.RaftURL())))
	testkit.Must(t, four.Start())
	c.wantVoter(one, four)
	testkit.Must(t, four.WaitReady(c.context()))
	c.write(four, "my-key", "written at the new one")
	c.wantValue(one, "my-key", "written at the new one")

	for i := range 200 { // more than a snapshot and the log that is kept behind it
		c.write(c.Nodes[i%4], fmt.Sprint("filler/", i), "x")
	}
	for _, n := range c.Nodes {
		c.stop(n)
	}
	c.start()
	c.wantMembers(one, two, three, four)
	c.write(two, "my-key", "after the restart")
	c.wantValue(four, "my-key", "after the restart")

	c.leave(one, three)
	c.wantMembers(one, two, four)
	testkit.Must(t, three.Start()) // it comes back
	c.wantRemoved(three)
	r := c.memberCall(one, http.MethodPost, "/3", three.RaftURL())
	if r.status != http.StatusConflict || !strings.Contains(string(r.body), "never used again") {
		t.Errorf("adding a removed id again: %d %s", r.status, r.body)
	}
	c.write(two, "my-key", "without the third")
	c.wantValue(four, "my-key", "without the third")
}

// TestProcess_ShrinkAndGrow goes from three members to one and back, and removes the leader each time.
func TestProcess_ShrinkAndGrow(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	load := c.memberLoad(4)
	for len(c.Nodes) > 1 {
		gone := c.leader()
		c.waitForAcks(20)
		c.leave(gone, gone)
	}
	c.waitForAcks(20)
	last := c.Nodes[0]
	r := c.memberCall(last, http.MethodDelete, fmt.Sprintf("/-/v1/members/%d", last.ID), "")
	if r.status != http.StatusConflict || !strings.Contains(string(r.body), "last voter") {
		t.Errorf("removing the last voter: %d %s", r.status, r.body)
	}
	for len(c.Nodes) < 3 {
		c.join(last)
		c.waitForAcks(20)
	}
	load.stop()
	c.wantMembers(c.Nodes...)
	c.verdict()
}

// memberLoad starts clients that write at whoever is a member, some of whom may be down.
func (c *liveCluster) memberLoad(clients int) *memberLoad {
	load := &memberLoad{nodes: slices.Clone(c.Nodes)}
	load.liveLoad = c.load(clients, c.Nodes, func(l *liveClient) {
		if o := l.putNew(); o.outcome == liveDone {
			return
		}
		time.Sleep(10 * time.Millisecond)
		l.close()
		load.mu.Lock()
		l.node = load.nodes[rand.IntN(len(load.nodes))]
		load.mu.Unlock()
	})
	return load
}

type memberLoad struct {
	*liveLoad
	mu    sync.Mutex
	nodes []*proc.Node
}

// use tells the clients who is a member now.
func (load *memberLoad) use(nodes []*proc.Node) {
	load.mu.Lock()
	load.nodes = slices.Clone(nodes)
	load.mu.Unlock()
}

// TestProcess_MemberChanges adds, removes and replaces members under load, while one of them dies now and then.
func TestProcess_MemberChanges(t *testing.T) {
	const most = 5
	c := newLiveCluster(t, proc.Options{Args: []string{"--snapshot-entries", "300"}})
	load := c.memberLoad(8)
	count := map[string]int{}
	for range testkit.Sized(6, 50) {
		c.waitForAcks(50)
		at, n := c.pickTwo()
		var killed *proc.Node
		if rand.IntN(2) == 0 {
			killed = c.Nodes[rand.IntN(len(c.Nodes))]
			for killed == at || killed == n {
				killed = c.Nodes[rand.IntN(len(c.Nodes))]
			}
			c.kill(killed)
			count["killed"]++
			// It comes back while the change is made: a majority may have to wait for it.
			go func() {
				time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
				if err := killed.Start(); err != nil {
					t.Error(err)
				}
			}()
		}
		what := "replaced"
		switch r := rand.IntN(3); {
		case len(c.Nodes) < most && r == 0:
			what = "added"
		case len(c.Nodes) > 3 && r == 1:
			what = "removed"
		}
		start := time.Now()
		if what != "removed" {
			c.join(at)
			load.use(c.Nodes)
		}
		if what != "added" {
			load.use(c.others(n))
			c.leave(at, n)
		}
		count[what]++
		if killed != nil {
			c.eventually(func() error {
				if !killed.Running() {
					return fmt.Errorf("node %d was not started again", killed.ID)
				}
				return nil
			})
			testkit.Must(t, killed.WaitReady(c.context()))
		}
		c.undisturbed()
		t.Logf("%s within %v: %d members", what, round(time.Since(start)), len(c.Nodes))
		if t.Failed() {
			break
		}
	}
	load.stop()
	c.wantMembers(c.Nodes...)
	c.verdict()
	t.Log(count, c.history.count())
}

// pickTwo returns two different nodes.
func (c *liveCluster) pickTwo() (a, b *proc.Node) {
	i := rand.Perm(len(c.Nodes))
	return c.Nodes[i[0]], c.Nodes[i[1]]
}

// TestProcess_WipedDirectory: a node that has forgotten what it acknowledged is told so and stays away. The
// way back is another id.
func TestProcess_WipedDirectory(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	one, two := c.Nodes[0], c.Nodes[1]
	c.write(one, "k", "v")
	c.kill(c.Nodes...) // so that the others have to find out first what they know
	testkit.Must(t, os.RemoveAll(two.DataDir))
	for i := range 2 { // the second time its directory is not empty any more
		testkit.Must(t, two.Start())
		if i == 0 {
			testkit.Must(t, one.Start())
			testkit.Must(t, c.Nodes[2].Start())
		}
		var exit *exec.ExitError
		if err := two.Wait(c.context()); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Fatalf("a node with an empty directory and the id of another: %v\n%s", err, two.LogTail())
		}
	}
	for _, words := range []string{"node 2 was part of this cluster with another data directory", "curl -X DELETE", "under a new ID"} {
		if !strings.Contains(two.LogTail(), words) {
			t.Errorf("the log does not say %q:\n%s", words, two.LogTail())
		}
	}
	testkit.Must(t, changed(c.memberCall(one, http.MethodDelete, "/-/v1/members/2", "")))
	c.Forget(two)
	four := c.join(one)
	c.wantValue(four, "k", "v")
	c.wantMembers(one, c.Nodes[1], four)
}

// TestProcess_NewAddress: a member moves to another port, by a name instead of a number.
func TestProcess_NewAddress(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	one, two, three := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	c.stop(three)
	three.Host, three.RaftPort = "localhost", three.RedisPort // which nobody uses here
	testkit.Must(t, changed(c.memberCall(two, http.MethodPut, "/-/v1/members/3", fmt.Sprintf(`{"peerUrl":%q,"name":"third"}`, three.RaftURL()))))
	c.start()
	c.wantMembers(one, two, three)
	c.write(three, "k", "v")
	c.kill(c.leader()) // the others must find each other at the new address
	for _, n := range c.Nodes {
		if n.Running() {
			c.write(n, "k", "w")
			c.wantValue(n, "k", "w")
		}
	}
}

// TestProcess_OneChangeAtATime: of changes at the same time none hangs, and each is made or refused.
func TestProcess_OneChangeAtATime(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	const changes = 6
	replies := make([]*liveReply, changes)
	var wg sync.WaitGroup
	for i := range changes {
		wg.Go(func() {
			id := 10 + i
			replies[i] = c.memberCall(c.Nodes[i%3], http.MethodPost, fmt.Sprintf("/-/v1/members/%d", id), fmt.Sprintf(`{"peerUrl":"http://127.0.0.1:%d","learner":true}`, 1000+id))
		})
	}
	wg.Wait()
	made := 0
	for i, r := range replies {
		switch {
		case r.err == nil && r.status == http.StatusNoContent:
			made++
		case r.status == http.StatusConflict && strings.Contains(string(r.body), "in progress"):
		case r.status == http.StatusConflict && strings.Contains(string(r.body), "at most 4 learners"):
		default:
			t.Errorf("change %d: %d %s %v", i, r.status, r.body, r.err)
		}
	}
	if members := c.members(c.Nodes[0]); made == 0 || len(members) != 3+made {
		t.Errorf("%d changes were made: %+v", made, members)
	}
	// However they come, there are no more than a cluster may have.
	c.eventually(func() error {
		id := 100 + len(c.members(c.Nodes[0]))
		r := c.memberCall(c.Nodes[id%3], http.MethodPost, fmt.Sprintf("/-/v1/members/%d", id), fmt.Sprintf(`{"peerUrl":"http://127.0.0.1:%d","learner":true}`, 900+id))
		if !strings.Contains(string(r.body), "at most 4 learners") {
			return fmt.Errorf("%d %s %w", r.status, r.body, r.err)
		}
		return nil
	})
	if members := c.members(c.Nodes[0]); len(members) != 7 {
		t.Errorf("members %+v", members)
	}
}
