package tests

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"raftrv/internal/proc"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// These tests lose clusters, and bring back what they held.

// command runs the program as an operator does.
func (c *liveCluster) command(args ...string) string {
	c.t.Helper()
	out, err := exec.CommandContext(c.context(), buildLiveBinary(c.t), args...).CombinedOutput()
	if err != nil {
		c.t.Fatalf("raftrv %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// peerURLs is the --cluster of some nodes, with their IDs.
func peerURLs(nodes ...*proc.Node) string {
	var urls []string
	for _, n := range nodes {
		urls = append(urls, fmt.Sprintf("%d=%s", n.ID, n.RaftURL()))
	}
	return strings.Join(urls, ",")
}

// restore puts a new data directory with what the backup holds in the place of
// the node's.
func (c *liveCluster) restore(n *proc.Node, backup string) {
	c.t.Helper()
	var urls []string
	for _, m := range c.Nodes {
		urls = append(urls, m.RaftURL())
	}
	n.DataDir += "-restored"
	c.command("backup", "restore", backup, "--id", fmt.Sprint(n.ID), "--cluster", strings.Join(urls, ","),
		"--data-dir", n.DataDir)
}

// inspected returns a figure of what inspect prints.
func inspected(t *testing.T, out, name string) uint64 {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + name + ` +(\d+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no %q in\n%s", name, out)
	}
	return parseRV(m[1])
}

// TestProcess_BackupAndRestore: a backup that is taken under load has exactly
// the writes up to its version. Restored at the same addresses, while a node of
// the old cluster still runs, it is a cluster of its own.
func TestProcess_BackupAndRestore(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Args: []string{"--snapshot-entries", "500"}})
	load := c.load(8, c.Nodes, func(l *liveClient) { l.putNew() })
	c.waitForAcks(testkit.Sized(1000, 50_000))
	var backups []string
	for _, n := range c.Nodes {
		backup := filepath.Join(c.dir, fmt.Sprint("backup-", n.ID))
		c.command("backup", "save", "--from", n.URL(), backup)
		backups = append(backups, backup)
		c.waitForAcks(100)
	}
	load.stop()
	newest := c.client(c.Nodes[0]).version()
	var clusters []string
	for _, backup := range backups {
		out := c.command("backup", "inspect", backup)
		clusters = append(clusters, regexp.MustCompile(`(?m)^cluster .*$`).FindString(out))
		if rv, keys := inspected(t, out, "resource version"), inspected(t, out, "keys"); rv != keys || rv > newest {
			t.Errorf("each write made a key, but the backup has %d keys at version %d", keys, rv)
		}
	}
	if len(slices.Compact(clusters)) != 1 {
		t.Errorf("one cluster has the IDs %q", clusters)
	}
	chosen := backups[1]
	taken := inspected(t, c.command("backup", "inspect", chosen), "resource version")
	old := c.history.snapshot()

	stays := c.Nodes[2] // with the old data, at its address
	for _, n := range c.Nodes[:2] {
		c.stop(n)
		c.restore(n, chosen)
	}
	for _, n := range c.Nodes[:2] { // one of the old cluster still runs: nothing is founded around it
		testkit.Must(t, n.Start())
		c.wantRefused(n, "if the backup is to replace that cluster", "stop all nodes and restore all of them")
	}
	if r := c.client(stays).raw(http.MethodPut, "after", "?timeout=500ms", "old"); r.status/100 == 2 {
		t.Errorf("the old node has found a majority: %d", r.status)
	}
	c.stop(stays)
	stays.DataDir += "-empty" // somebody has forgotten to restore it
	for _, n := range c.Nodes {
		testkit.Must(t, n.Start())
	}
	c.wantRefused(stays, "was restored from the backup", "and this node is empty", "restore all nodes from the same file")
	for _, n := range c.Nodes[:2] {
		_ = n.Kill() // it may have ended for the same reason
	}
	c.restore(stays, chosen)
	c.start()
	l := c.client(c.Nodes[0])
	if rv := l.version(); rv < taken+store.VersionJump {
		t.Errorf("the restored cluster is at version %d, the backup was at %d", rv, taken)
	}

	wantRestored(t, c, old, taken)
	for _, rv := range []uint64{1, taken, newest} {
		r := l.do(http.MethodGet, fmt.Sprintf("%s/-/v1/watch?resourceVersion=%d", c.Nodes[1].URL(), rv), "")
		if r.status != http.StatusGone {
			t.Errorf("a watch from the old version %d: %d %s %v", rv, r.status, r.body, r.err)
		}
	}
	if r := l.raw(http.MethodPut, "after", "", "new"); r.status != http.StatusCreated || r.rv() <= taken+store.VersionJump {
		t.Errorf("the first write after: %d, version %d", r.status, r.rv())
	}
	var ids []string
	for _, n := range c.Nodes {
		r := l.do(http.MethodGet, n.URL()+"/-/v1/status", "")
		ids = append(ids, regexp.MustCompile(`"clusterId":"[^"]*"`).FindString(string(r.body)))
	}
	if len(slices.Compact(ids)) != 1 || strings.Contains(clusters[0], ids[0]) {
		t.Errorf("cluster IDs %q, the backup is of %q", ids, clusters[0])
	}
	t.Logf("%d writes, backups at full load; restored the one at version %d", newest, taken)
}

// wantRestored checks that every node has what was written up to version taken,
// and nothing else.
func wantRestored(t *testing.T, c *liveCluster, old []*liveOp, taken uint64) {
	t.Helper()
	for _, n := range c.Nodes {
		r := c.client(n).do(http.MethodGet, n.URL()+"/-/v1/keys?keysOnly=true", "", "Accept", "application/x-ndjson")
		if got := strings.Count(string(r.body), "\n"); r.status != http.StatusOK || uint64(got) != taken+1 { // the last line is no key
			t.Errorf("node %d: %d, %d keys, want %d", n.ID, r.status, got, taken)
		}
	}
	reader := c.client(c.Nodes[0])
	for i, o := range old {
		if o.kind != livePut || o.outcome != liveDone {
			continue
		}
		reader.node = c.Nodes[i%len(c.Nodes)]
		r := reader.raw(http.MethodGet, o.key, "", "")
		switch kept := o.rv <= taken; {
		case kept && (r.status != http.StatusOK || digest(string(r.body)) != o.value || r.etag() != o.rv):
			t.Errorf("not in the restored cluster: %v: %d %.60q", o, r.status, r.body)
		case !kept && r.status != http.StatusNotFound:
			t.Errorf("written after the backup: %v: %d %.60q", o, r.status, r.body)
		}
	}
}

// TestProcess_LostQuorum: two of three nodes are gone for good. The third one
// gives what it has to a new cluster, which two fresh nodes join.
func TestProcess_LostQuorum(t *testing.T) {
	var c *liveCluster
	var survivor *proc.Node
	c = newIdleLiveCluster(t, proc.Options{Nodes: 5, NodeArgs: func(n *proc.Node) []string {
		if n.ID <= 3 {
			return []string{"--cluster", peerURLs(c.Nodes[:3]...), "--snapshot-entries", "200"}
		}
		return []string{"--join", "--cluster", peerURLs(survivor, n)}
	}})
	for _, n := range c.Nodes[:3] {
		testkit.Must(t, n.Start())
	}
	for _, n := range c.Nodes[:3] {
		testkit.Must(t, n.WaitReady(c.context()))
	}
	load := c.load(6, c.Nodes[:3], putNewOrWait)
	c.waitForAcks(testkit.Sized(1000, 20_000))
	load.stop()
	survivor = c.Nodes[1]
	want := c.client(survivor).version() // so it has everything
	c.kill(c.Nodes[0], c.Nodes[2])
	if r := c.client(survivor).raw(http.MethodPut, "k", "?timeout=500ms", "v"); r.status/100 == 2 {
		t.Errorf("a write without a majority: %d", r.status)
	}
	c.kill(survivor)

	out := c.command("recover", "--data-dir", survivor.DataDir)
	t.Log("\n" + out)
	if !strings.Contains(out, "1 ("+c.Nodes[0].RaftURL()+"), 3 ("+c.Nodes[2].RaftURL()+"), are missing") {
		t.Error("it does not say who is lost")
	}
	survivor.DataDir += "-recovered"
	testkit.Must(t, survivor.Start()) // with its original flags
	testkit.Must(t, survivor.WaitReady(c.context()))
	l := c.client(survivor)
	if r := l.do(http.MethodGet, fmt.Sprintf("%s/-/v1/watch?resourceVersion=%d", survivor.URL(), want), ""); r.status != http.StatusGone {
		t.Errorf("a watch from an old version: %d %s", r.status, r.body)
	}
	testkit.Must(t, c.Nodes[0].Start()) // an old node comes back, and is a stranger
	for _, n := range c.Nodes[3:] {
		r := l.do(http.MethodPost, fmt.Sprintf("%s/%d", survivor.URL(), n.ID), n.RaftURL())
		if r.status != http.StatusNoContent {
			t.Fatalf("add node %d: %d %s", n.ID, r.status, r.body)
		}
		testkit.Must(t, n.Start())
		c.eventually(func() error { return c.votes(survivor, n) })
	}
	if r := l.do(http.MethodPost, survivor.URL()+"/3", "http://127.0.0.1:1"); r.status != http.StatusConflict {
		t.Errorf("an old ID is used again: %d %s", r.status, r.body)
	}
	c.Nodes = append([]*proc.Node{survivor}, c.Nodes[3:]...)
	for _, o := range c.history.snapshot() {
		if o.kind != livePut || o.outcome != liveDone {
			continue
		}
		for _, n := range c.Nodes {
			l.node = n
			if r := l.raw(http.MethodGet, o.key, "", ""); r.status != http.StatusOK || digest(string(r.body)) != o.value {
				t.Errorf("lost at node %d: %v: %d %.60q", n.ID, o, r.status, r.body)
			}
		}
	}
	c.kill(survivor) // the two that joined are a majority
	l.node = c.Nodes[1]
	if o := l.put("after", "value"); o.outcome != liveDone || o.rv <= want+store.VersionJump {
		t.Errorf("a write after: %v", o)
	}
}

// votes says whether a node has become a voter.
func (c *liveCluster) votes(at, n *proc.Node) error {
	r := c.client(at).do(http.MethodGet, at.URL()+"/-/v1/members", "")
	for _, m := range strings.Split(string(r.body), "},{") {
		if strings.Contains(m, fmt.Sprintf(`"id":%d,`, n.ID)) && !strings.Contains(m, "learner") {
			return nil
		}
	}
	return fmt.Errorf("node %d is no voter: %s", n.ID, r.body)
}

// TestProcess_RestoreTwice: a node that is restored again, after the cluster has
// begun to work, would have forgotten what it promised since.
func TestProcess_RestoreTwice(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	c.client(c.Nodes[0]).mustPut("k", "v")
	backup := filepath.Join(c.dir, "backup")
	c.command("backup", "save", "--from", c.Nodes[0].URL(), backup)
	for _, n := range c.Nodes {
		c.stop(n)
		c.restore(n, backup)
	}
	c.start()
	again := c.Nodes[2]
	c.eventually(func() error { // its directory is known
		r := c.client(c.Nodes[0]).do(http.MethodGet, c.Nodes[0].URL()+"/-/v1/members", "")
		if strings.Count(string(r.body), `"instanceId"`) != 3 {
			return fmt.Errorf("members %s", r.body)
		}
		return nil
	})
	c.stop(again)
	c.restore(again, backup)
	testkit.Must(t, again.Start())
	err := again.Wait(c.context())
	if err == nil || !strings.Contains(again.LogTail(), "with another data directory") {
		t.Errorf("it ended with %v\n%s", err, again.LogTail())
	}
}

// TestProcess_RestoredIsAnother: what clients of a restored cluster have, versions, ETags and ids of events, means
// nothing to a cluster that is restored from the same file later.
func TestProcess_RestoredIsAnother(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Nodes: 1})
	n := c.Nodes[0]
	l := c.client(n)
	l.mustPut("k", "v")
	backup := filepath.Join(c.dir, "backup")
	c.command("backup", "save", "--from", n.URL(), backup)
	type client struct{ id, etag, version string }
	var old []client
	for i := range 3 {
		var now client
		for j := range 3 + 5*i { // so that a number alone would be one that the next cluster has reached
			now.version = fmt.Sprint(l.mustPut("k", fmt.Sprint(i, j)).rv)
		}
		w := &liveWatch{c: c, node: n, query: url.Values{"initial": {"true"}, "timeout": {"1s"}}, events: true}
		testkit.Must(t, w.open())
		for w.lastID == "" {
			_, err := w.next()
			testkit.Must(t, err)
		}
		now.id = w.lastID
		w.close()
		now.etag = l.raw(http.MethodGet, "k", "", "").header.Get("ETag")
		for _, o := range old {
			if o.id == now.id || o.etag == now.etag || o.version == now.version {
				t.Errorf("restore %d has %v, one before had %v", i, now, o)
			}
			for _, how := range []*liveWatch{{lastID: o.id}, {query: url.Values{"resourceVersion": {o.id}}}, {query: url.Values{"resourceVersion": {o.version}}}} {
				how.c, how.node = c, n
				err := how.open()
				how.close()
				if refused, ok := errors.AsType[*errWatchRefused](err); !ok || refused.status != http.StatusGone {
					t.Errorf("%v of a cluster before, in restore %d: %v", o, i, err)
				}
			}
			req, err := http.NewRequest(http.MethodPut, n.URL()+"/k", strings.NewReader("wrong"))
			testkit.Must(t, err)
			req.Header.Set("If-Match", o.etag)
			res, err := http.DefaultClient.Do(req)
			testkit.Must(t, err)
			res.Body.Close()
			if res.StatusCode != http.StatusPreconditionFailed {
				t.Errorf("ETag %s of a cluster before, in restore %d: %d", o.etag, i, res.StatusCode)
			}
		}
		old = append(old, now)
		c.stop(n)
		c.restore(n, backup)
		c.start()
		l = c.client(n)
	}
}
