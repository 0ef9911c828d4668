package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// Bounds of the node, in bytes, from which these tests derive what its memory may come to.
const (
	logKeptMax  = 16 << 20 // of entries for a member that is behind
	inFlightMax = 32 << 20 // of entries on their way to one member
	queueMax    = 64 << 20 // of writes that wait
)

// freeOnDisk returns how many bytes are left for others than root.
func freeOnDisk(path string) (uint64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, err
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// These tests take from real nodes what they need: space, memory, a peer that listens, a state like that of
// the others.

// smallDisks are file systems of their own for the data directories, in memory.
type smallDisks struct {
	t    *testing.T
	root string
}

// smallDiskArgs make a node live on a few megabytes.
var smallDiskArgs = []string{"--wal-segment-bytes", strconv.Itoa(256 << 10), "--snapshot-bytes", strconv.Itoa(512 << 10),
	"--watch-bytes", strconv.Itoa(1 << 20)}

// newSmallDisks mounts a file system of so many bytes for each node. They outlive the cluster that is made after.
func newSmallDisks(t *testing.T, sizes map[int]int) *smallDisks {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can mount file systems")
	}
	d := &smallDisks{t: t, root: t.TempDir()}
	for id, size := range sizes {
		testkit.Must(t, os.MkdirAll(d.dir(id), 0o700))
		if err := syscall.Mount("tmpfs", d.dir(id), "tmpfs", 0, fmt.Sprintf("mode=0700,size=%d", size)); err != nil {
			t.Skipf("mounting file systems is not allowed here: %v", err)
		}
		t.Cleanup(func() {
			if err := syscall.Unmount(d.dir(id), 0); err != nil {
				t.Errorf("unmount %s: %v", d.dir(id), err)
			}
		})
	}
	return d
}

func (d *smallDisks) dir(id int) string { return filepath.Join(d.root, strconv.Itoa(id)) }

// args makes the nodes use them.
func (d *smallDisks) args(n *proc.Node) []string {
	if _, err := os.Stat(d.dir(n.ID)); err != nil {
		return nil
	}
	return []string{"--data-dir", d.dir(n.ID)}
}

// resize gives a node another size of disk.
func (d *smallDisks) resize(id, size int) {
	d.t.Helper()
	testkit.Must(d.t, syscall.Mount("tmpfs", d.dir(id), "tmpfs", syscall.MS_REMOUNT, fmt.Sprintf("size=%d", size)))
}

// putLarge is the step of clients that fill a disk.
func putLarge(l *liveClient) {
	v := l.c.newValue(8 << 10)
	if o := l.put("large/"+strings.TrimRight(v, "."), v); o.outcome != liveDone {
		time.Sleep(5 * time.Millisecond)
	}
}

// wantFull waits until the nodes say that their disks are full, and refuse writes.
func (c *liveCluster) wantFull(nodes ...*proc.Node) {
	c.t.Helper()
	for _, n := range nodes {
		l := c.client(n)
		c.eventually(func() error {
			r := l.raw(http.MethodPut, "refused", "", "v")
			if r.status != http.StatusInsufficientStorage || r.problem.Code != "disk-full" || r.problem.Outcome != fault.NotApplied || r.header.Get("Retry-After") == "" {
				return fmt.Errorf("PUT at node %d, whose disk is full: %d %s %v", n.ID, r.status, r.body, r.err)
			}
			return nil
		})
		l.close()
	}
}

// TestProcess_DiskFull: small disks are filled under load. Nothing that was acknowledged is lost, reads and
// deletes go on, and when there is space again so do writes.
func TestProcess_DiskFull(t *testing.T) {
	const small, large = 6 << 20, 64 << 20
	d := newSmallDisks(t, map[int]int{1: small, 2: small, 3: small})
	c := newLiveCluster(t, proc.Options{Args: smallDiskArgs, NodeArgs: d.args})
	for round := range testkit.Sized(1, 3) {
		size := small + round*8<<20
		for _, n := range c.Nodes {
			d.resize(n.ID, size)
		}
		load := c.load(12, c.Nodes, putLarge)
		c.wantFull(c.Nodes...)
		time.Sleep(testkit.Sized(2*time.Second, 20*time.Second)) // the load goes on
		for _, n := range c.Nodes {
			l := c.client(n)
			if r := l.do(http.MethodGet, n.URL()+"/-/readyz", ""); r.status != http.StatusOK || !bytes.Contains(r.body, []byte("read-only: Disk full")) {
				t.Errorf("readyz of node %d: %d %s", n.ID, r.status, r.body)
			}
			if o := l.get("large/v1"); o.outcome != liveDone {
				t.Errorf("GET while the disk is full: %v", o)
			}
			if o := l.delete("none"); o.outcome != liveDone {
				t.Errorf("DELETE while the disk is full: %v", o)
			}
			l.close()
		}
		if round == 0 { // a restart changes nothing
			c.stop(c.Nodes[0])
			c.start()
			c.wantFull(c.Nodes[0])
		}
		for _, n := range c.Nodes {
			free, err := freeOnDisk(d.dir(n.ID))
			testkit.Must(t, err)
			t.Logf("node %d: %d of %d bytes are free", n.ID, free, size)
			d.resize(n.ID, large)
		}
		start := time.Now()
		for _, n := range c.Nodes {
			l := c.client(n)
			c.eventually(func() error {
				if r := l.raw(http.MethodPut, "again", "", "v"); r.status/100 != 2 {
					return fmt.Errorf("PUT at node %d: %d %s %v", n.ID, r.status, r.body, r.err)
				}
				return nil
			})
			l.close()
		}
		took := time.Since(start)
		t.Logf("all nodes take writes %v after there is space", took.Round(time.Millisecond))
		if took > 5*time.Second {
			t.Errorf("that took longer than 5 s")
		}
		c.waitForAcks(50)
		load.stop()
	}
	c.nothingLost()
	t.Log(c.history.count())
}

// nothingLost is verdict in a test with writes that are not in the history: their versions are not looked at.
func (c *liveCluster) nothingLost() {
	c.t.Helper()
	c.readBack()
	if err := c.history.checkLinearizable(c.dir); err != nil {
		c.t.Error(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.surprises.err(); err != nil {
		c.t.Errorf("answers that clients should not get:\n%v", err)
	}
}

// TestProcess_DiskFullOfOne: a cluster goes on without a node that has no room, be it the leader or not. That
// node goes on serving reads of what it has, and catches up when it has room.
func TestProcess_DiskFullOfOne(t *testing.T) {
	for _, who := range []string{"leader", "follower"} {
		t.Run(who, func(t *testing.T) {
			d := newSmallDisks(t, map[int]int{2: 6 << 20})
			c := newLiveCluster(t, proc.Options{Args: smallDiskArgs, NodeArgs: d.args})
			n, leader := c.Nodes[1], c.leader()
			l := c.client(leader)
			if to := map[string]int{"leader": 2, "follower": 1}[who]; leader.ID != to {
				if r := l.do(http.MethodPost, fmt.Sprintf("%s/-/v1/leader/%d", leader.URL(), to), ""); r.status != http.StatusNoContent {
					t.Fatalf("transfer: %d %s %v", r.status, r.body, r.err)
				}
			}
			load := c.load(6, c.others(n), putLarge)
			c.wantFull(n)
			c.eventually(func() error {
				if c.leader() == n {
					return errors.New("it still leads")
				}
				return nil
			})
			c.waitForAcks(testkit.Sized(2000, 20_000)) // many times what it has room for
			r := c.client(n).raw(http.MethodGet, "large/v1", "?resourceVersion=0", "")
			if r.status != http.StatusOK || !n.Running() {
				t.Errorf("GET of what it has: %d %s %v", r.status, r.body, r.err)
			}
			free, err := freeOnDisk(d.dir(n.ID))
			testkit.Must(t, err)
			t.Logf("%d bytes are free", free)
			load.stop()
			d.resize(n.ID, 256<<20)
			rv := c.client(c.others(n)[0]).version()
			start := time.Now()
			c.eventually(func() error {
				if r := c.client(n).do(http.MethodGet, fmt.Sprintf("%s/?resourceVersion=%d", n.URL(), rv), ""); r.status != http.StatusOK {
					return fmt.Errorf("it does not catch up: %d %s %v", r.status, r.body, r.err)
				}
				return nil
			})
			t.Logf("it caught up %v after there was space", time.Since(start).Round(time.Millisecond))
			c.nothingLost()
		})
	}
}

// TestProcess_DiskError: a write to the log that fails ends the node, and nothing is acknowledged after it.
func TestProcess_DiskError(t *testing.T) {
	d := newSmallDisks(t, map[int]int{1: 4 << 20})
	c := newLiveCluster(t, proc.Options{Nodes: 1, NodeArgs: d.args,
		Args: append(slices.Clone(smallDiskArgs), "--disk-reserve-bytes", "1")}) // so that it does not save itself
	n := c.Nodes[0]
	c.disturb(n)
	load := c.load(6, c.Nodes, putLarge)
	c.eventually(func() error {
		if n.Running() {
			return errors.New("it still runs, with a full disk")
		}
		return nil
	})
	load.stop()
	if err := n.Wait(c.context()); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("it ended with %v, want exit status 1", err)
	}
	if log, err := os.ReadFile(n.LogFile); err != nil || !bytes.Contains(log, []byte("no space left on device")) {
		t.Errorf("the log does not say why: %v", err)
	}
	d.resize(1, 64<<20)
	c.start()
	c.nothingLost()
	t.Log(c.history.count())
}

// TestProcess_Quota: at the quota writes are refused and deletes are not, at every node, and there is room again
// after them.
func TestProcess_Quota(t *testing.T) {
	const quota, value = 4 << 20, 16 << 10
	c := newLiveCluster(t, proc.Options{Args: []string{"--quota-bytes", strconv.Itoa(quota)}})
	load := c.load(6, c.Nodes, putLarge)
	var tries atomic.Int64 // each a new key: replacing a value may be all right
	for _, n := range c.Nodes {
		l := c.client(n)
		c.eventually(func() error {
			r := l.raw(http.MethodPut, fmt.Sprint("refused/", tries.Add(1)), "", strings.Repeat("v", value))
			if r.status != http.StatusInsufficientStorage || r.problem.Code != "quota-exceeded" || r.problem.Outcome != fault.NotApplied {
				return fmt.Errorf("PUT at node %d beyond the quota: %d %s %v", n.ID, r.status, r.body, r.err)
			}
			return nil
		})
	}
	load.stop()
	for _, n := range c.Nodes {
		l := c.client(n)
		st := l.status()
		if st.StateBytes > quota+quota/8 || st.StateBytes < quota/2 || st.QuotaBytes != quota {
			t.Errorf("node %d has %d bytes, with a quota of %d", n.ID, st.StateBytes, st.QuotaBytes)
		}
		if o := l.get("large/v1"); o.outcome != liveDone {
			t.Errorf("GET at the quota: %v", o)
		}
		// What does not make the store larger is taken.
		if o := l.put("large/v1", l.c.newValue(100)); o.outcome != liveDone {
			t.Errorf("PUT of a smaller value: %v", o)
		}
		txn := fmt.Sprintf(`{"then":[{"op":"put","key":"txn","value":"%s"}]}`, strings.Repeat("v", value))
		if r := l.do(http.MethodPost, n.URL()+"/-/v1/txn", txn); r.status != http.StatusInsufficientStorage {
			t.Errorf("transaction beyond the quota: %d %s", r.status, r.body)
		}
		if r := l.do(http.MethodPost, n.URL()+"/-/v1/txn", `{"then":[{"op":"delete","key":"none"}]}`); r.status != http.StatusOK {
			t.Errorf("transaction that only deletes: %d %s", r.status, r.body)
		}
	}
	c.nothingLost()
	l := c.client(c.Nodes[0])
	if r := l.do(http.MethodDelete, l.node.URL()+"/-/v1/keys?prefix=large", ""); r.status != http.StatusOK {
		t.Fatalf("delete: %d %s %v", r.status, r.body, r.err)
	}
	for _, n := range c.Nodes {
		l := c.client(n)
		c.eventually(func() error { // this node applies the delete
			if r := l.raw(http.MethodPut, "again", "", strings.Repeat("v", value)); r.status/100 != 2 {
				return fmt.Errorf("PUT at node %d after a delete: %d %s %v", n.ID, r.status, r.body, r.err)
			}
			return nil
		})
	}
}

// status returns what the node says of itself.
func (l *liveClient) status() (st httpapi.NodeStatus) {
	l.c.t.Helper()
	r := l.do(http.MethodGet, l.node.URL()+"/-/v1/status", "")
	testkit.Must(l.c.t, r.err)
	testkit.Must(l.c.t, json.Unmarshal(r.body, &st))
	return st
}

// rss returns how much memory a process has.
func rss(t *testing.T, n *proc.Node) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.PID()))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("only Linux tells how much memory a process has")
	}
	testkit.Must(t, err)
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	var kilobytes int
	_, err = fmt.Sscan(rest, &kilobytes)
	testkit.Must(t, err)
	return kilobytes << 10
}

// TestProcess_FrozenFollower: a member that does not read costs the leader no more memory than its flags allow,
// and catches up when it reads again. Nobody is elected meanwhile.
func TestProcess_FrozenFollower(t *testing.T) {
	const (
		quota, watching, snapshot = 64 << 20, 8 << 20, 8 << 20
		// See "Memory" in docs/operations.md.
		rssMax = 2*(quota+watching+2*snapshot+logKeptMax+2*inFlightMax) + 96<<20
	)
	c := newLiveCluster(t, proc.Options{Args: []string{"--quota-bytes", strconv.Itoa(quota),
		"--watch-bytes", strconv.Itoa(watching), "--snapshot-bytes", strconv.Itoa(snapshot)}})
	leader := c.leader()
	frozen := c.others(leader)[0]
	before, terms := rss(t, leader), c.terms()
	var writes atomic.Int64
	value := strings.Repeat("v", 32<<10)
	load := c.load(16, []*proc.Node{leader}, func(l *liveClient) {
		r := l.raw(http.MethodPut, fmt.Sprint("frozen/", writes.Add(1)%1000), "", value)
		if r.err != nil || r.status/100 != 2 {
			t.Errorf("PUT: %d %s %v", r.status, r.body, r.err)
		}
	})
	testkit.Must(t, frozen.Pause())
	highest := 0
	for end := time.Now().Add(testkit.Sized(6*time.Second, time.Minute)); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		highest = max(highest, rss(t, leader))
	}
	testkit.Must(t, frozen.Resume())
	start := time.Now()
	rv := c.client(leader).version()
	c.eventually(func() error {
		if r := c.client(frozen).do(http.MethodGet, fmt.Sprintf("%s/?resourceVersion=%d", frozen.URL(), rv), ""); r.status != http.StatusOK {
			return fmt.Errorf("it does not catch up: %d %s %v", r.status, r.body, r.err)
		}
		return nil
	})
	t.Logf("%d MiB written; the leader had %d MiB, then at most %d of %d; caught up %v after SIGCONT", writes.Load()*int64(len(value))>>20,
		before>>20, highest>>20, rssMax>>20, time.Since(start).Round(time.Millisecond))
	load.stop()
	if highest > rssMax {
		t.Errorf("the leader had %d bytes, more than %d", highest, rssMax)
	}
	if after := c.terms(); !slices.Equal(terms, after) {
		t.Errorf("there was an election: terms %v, then %v", terms, after)
	}
}

// TestProcess_VanishedFollower: a follower that takes no bytes any more, as one whose host is gone without a
// word, holds up nobody at the others, however much is on its way to it.
func TestProcess_VanishedFollower(t *testing.T) {
	const (
		most = time.Second
		size = 256 << 10
		gone = 3 * time.Second // a silent member gets new connections after one
	)
	c := newLiveCluster(t, proc.Options{})
	var slowest []time.Duration
	for range testkit.Sized(1, 20) {
		leader := c.leader()
		follower := c.others(leader)[0]
		var longest, writes atomic.Int64
		write := func(l *liveClient, key, value string) {
			start := c.history.now()
			r := l.raw(http.MethodPut, key, "", value)
			if r.err != nil || r.status/100 != 2 {
				t.Errorf("PUT: %d %s %v", r.status, r.body, r.err)
			}
			took := int64(r.took - c.history.stalled(start, c.history.now()))
			for s := longest.Load(); took > s && !longest.CompareAndSwap(s, took); s = longest.Load() {
			}
		}
		value := strings.Repeat("v", size)
		large := c.load(8, []*proc.Node{leader}, func(l *liveClient) {
			write(l, fmt.Sprint("large/", writes.Add(1)%20), value)
		})
		small := c.load(4, c.others(follower), func(l *liveClient) {
			write(l, "small", "v")
			time.Sleep(10 * time.Millisecond)
		})
		start := time.Now()
		time.Sleep(time.Second)
		testkit.Must(t, follower.Pause())
		time.Sleep(gone)
		rate := float64(writes.Load()*size) / 1e6 / time.Since(start).Seconds()
		large.stop()
		small.stop()
		slowest = append(slowest, time.Duration(longest.Load()))
		t.Logf("%.0f MB/s, slowest answer %v", rate, round(slowest[len(slowest)-1]))
		testkit.Must(t, follower.Resume())
		c.start()
	}
	if worst := slices.Max(slowest); worst > most {
		t.Errorf("the slowest answer took %v, want at most %v: %v", worst, most, slowest)
	}
}

// TestProcess_Overload: writes that cannot be replicated are refused before they fill the memory.
func TestProcess_Overload(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	n := c.leader()
	c.kill(c.others(n)...)
	// Bodies that are read, the queue that has copies of them, and garbage as much.
	const rssMax = 2*(2*httpapi.BodiesSizeMax+queueMax) + 128<<20
	value := strings.Repeat("v", store.ValueSizeMaxDefault)
	codes := map[string]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 800 {
		wg.Go(func() {
			l := c.client(n)
			defer l.close()
			r := l.raw(http.MethodPut, "k", "?timeout=3s", value)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case r.err != nil:
				codes["connection closed"]++ // it was refused while the body was on its way
			case r.status == http.StatusServiceUnavailable && r.problem.Outcome == fault.NotApplied && r.header.Get("Retry-After") != "",
				r.status == http.StatusGatewayTimeout:
				codes[r.problem.Code]++
			default:
				t.Errorf("PUT: %d %s", r.status, r.body)
			}
		})
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	highest := 0
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(20 * time.Millisecond):
			highest = max(highest, rss(t, n))
		}
	}
	t.Logf("%v; at most %d of %d MiB", codes, highest>>20, rssMax>>20)
	if codes["overloaded"] == 0 || highest > rssMax {
		t.Errorf("%v; %d bytes, at most %d are all right", codes, highest, rssMax)
	}
	c.start()
	if r := c.client(n).raw(http.MethodPut, "kept", "", value); r.status/100 != 2 { // what was refused holds nothing any more
		t.Errorf("PUT after it: %d %s %v", r.status, r.body, r.err)
	}
}

// damage changes a value in the newest snapshot of a node that is down, as a fault of the program would: the file
// is whole.
func (c *liveCluster) damage(n *proc.Node, key string) {
	c.t.Helper()
	paths, err := filepath.Glob(filepath.Join(n.DataDir, "snap", "*.snap.db"))
	testkit.Must(c.t, err)
	slices.Sort(paths)
	path := paths[len(paths)-1]
	f, err := os.Open(path)
	testkit.Must(c.t, err)
	st, err := store.ReadState(f)
	testkit.Must(c.t, err)
	testkit.Must(c.t, f.Close())
	it, ok := st.Items.Get(key)
	if !ok {
		c.t.Fatalf("%q is not in %s", key, path)
	}
	it.Value += " (damaged)"
	st.Items.Set(key, it)
	f, err = os.Create(path)
	testkit.Must(c.t, err)
	testkit.Must(c.t, errors.Join(st.Encode(f), f.Close()))
}

// restartDamaged writes "right" to the key k, by way of good, and makes bad start with something else there.
func (c *liveCluster) restartDamaged(bad *proc.Node, good *liveClient) {
	c.t.Helper()
	good.mustPut("k", "right")
	for range 100 {
		good.putNew()
	}
	c.eventually(func() error {
		paths, err := filepath.Glob(filepath.Join(bad.DataDir, "snap", "*.snap.db"))
		if err == nil && len(paths) < 2 {
			err = errors.New("no snapshot yet")
		}
		return err
	})
	c.stop(bad)
	c.damage(bad, "k")
	testkit.Must(c.t, bad.Start())
	l := c.client(bad)
	defer l.close()
	c.eventually(func() error { return l.do(http.MethodGet, bad.URL()+"/-/livez", "").err })
}

// journalArgs gives each node a journal.
func journalArgs() func(*proc.Node) []string {
	return func(n *proc.Node) []string { return []string{"--journal", journalOf(n)} }
}

// TestProcess_Diverged: a member that holds another state than the others stops serving within 10 s, says so, and
// does not come to lead; the others go on. One that joins in its place is whole.
func TestProcess_Diverged(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Args: []string{"--snapshot-entries", "20"}, NodeArgs: journalArgs()})
	bad := c.leader()
	good := c.client(c.others(bad)[0])
	c.restartDamaged(bad, good)
	good.putNew()
	start := time.Now()
	l := c.client(bad)
	c.eventually(func() error {
		if r := l.raw(http.MethodGet, "k", "?resourceVersion=0", ""); r.status != http.StatusServiceUnavailable || r.problem.Code != "diverged" {
			return fmt.Errorf("node %d serves its own state: %d %s %v", bad.ID, r.status, r.body, r.err)
		}
		return nil
	})
	t.Logf("noticed within %v of the first write", time.Since(start).Round(time.Millisecond))
	for _, call := range [][2]string{{"GET", "/k"}, {"PUT", "/k"}, {"DELETE", "/k"}, {"GET", "/-/v1/keys?resourceVersion=0"},
		{"GET", "/-/v1/watch"}, {"POST", "/-/v1/txn"}} {
		body := ""
		if call[0] == "POST" {
			body = `{"then":[{"op":"get","key":"k"}]}`
		}
		if r := l.do(call[0], bad.URL()+call[1], body); r.status != http.StatusServiceUnavailable || r.problem.Code != "diverged" {
			t.Errorf("%s %s: %d %s %v", call[0], call[1], r.status, r.body, r.err)
		}
	}
	if r := l.do("GET", bad.URL()+"/-/readyz", ""); r.status != http.StatusServiceUnavailable || !strings.Contains(r.problem.Detail, "state: Diverged") {
		t.Errorf("readyz: %d %s %v", r.status, r.body, r.err)
	}
	if st := l.status(); st.Divergence != "diverged" || st.ReadOnly != "diverged" {
		t.Errorf("status: %+v", st)
	}
	if log, err := os.ReadFile(bad.LogFile); err != nil || !bytes.Contains(log, []byte("/-/v1/members/"+strconv.Itoa(bad.ID))) {
		t.Errorf("the log does not say what to do: %v", err)
	}
	for _, n := range c.others(bad) {
		l := c.client(n)
		if st := l.status(); st.Divergence != "sound" {
			t.Errorf("node %d: %+v", n.ID, st)
		}
		if o := l.get("k"); o.value != "right" {
			t.Errorf("%v", o)
		}
		l.mustPut("after", c.newValue(10))
	}
	if c.leader() == bad {
		t.Errorf("node %d leads", bad.ID)
	}

	// A restart makes it no better, and its log and journal do not end it.
	c.stop(bad)
	testkit.Must(t, bad.Start())
	c.eventually(func() error { return l.do(http.MethodGet, bad.URL()+"/-/livez", "").err })
	for range 100 {
		good.putNew()
	}
	c.eventually(func() error {
		if st, now := l.status(), good.status(); st.AppliedIndex < now.AppliedIndex {
			return fmt.Errorf("it does not store what the others write: %+v", st)
		}
		return nil
	})
	time.Sleep(time.Second) // two looks at the other members
	if st := l.status(); st.Divergence != "diverged" {
		t.Errorf("after a restart: %+v", st)
	}
	if r := l.raw(http.MethodGet, "k", "?resourceVersion=0", ""); r.problem.Code != "diverged" {
		t.Errorf("after a restart: %d %s %v", r.status, r.body, r.err)
	}
	c.stop(bad)
	recovery := func(flags ...string) ([]byte, error) {
		args := append([]string{"recover", "--data-dir", bad.DataDir, "--to", filepath.Join(t.TempDir(), "made")}, flags...)
		return exec.Command(buildLiveBinary(t), args...).CombinedOutput()
	}
	if out, err := recovery(); err == nil || !bytes.Contains(out, []byte("diverged")) {
		t.Errorf("recover takes a directory whose state is wrong: %s", out)
	}
	if out, err := recovery("--damaged"); err != nil {
		t.Errorf("recover --damaged: %v\n%s", err, out)
	}
}

// TestProcess_Doubtful: of two members that differ both stop serving, since nobody can tell which one is right,
// until a person has decided.
func TestProcess_Doubtful(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Nodes: 2, Args: []string{"--snapshot-entries", "20"}, NodeArgs: journalArgs()})
	bad := c.others(c.leader())[0]
	good := c.client(c.leader())
	c.restartDamaged(bad, good)
	for _, n := range c.Nodes {
		l := c.client(n)
		c.eventually(func() error {
			if st := l.status(); st.Divergence != "doubtful" {
				return fmt.Errorf("node %d: %+v", n.ID, st)
			}
			return nil
		})
		if r := l.raw(http.MethodGet, "k", "", ""); r.problem.Code != "diverged" {
			t.Errorf("GET at node %d: %d %s", n.ID, r.status, r.body)
		}
	}
	if r := good.do(http.MethodDelete, fmt.Sprintf("%s/-/v1/members/%d", good.node.URL(), bad.ID), ""); r.status != http.StatusNoContent {
		t.Fatalf("remove: %d %s %v", r.status, r.body, r.err)
	}
	c.eventually(func() error {
		if r := good.raw(http.MethodGet, "k", "", ""); string(r.body) != "right" {
			return fmt.Errorf("GET at the one that is left: %d %s", r.status, r.body)
		}
		return nil
	})
	// It serves watches again, too, and its journal has gone on, without a gap.
	after := good.mustPut("after", c.newValue(10))
	r := good.do(http.MethodGet, fmt.Sprintf("%s/-/v1/watch?timeout=1s&resourceVersion=%d", good.node.URL(), after.rv-1), "")
	if r.status != http.StatusOK || !bytes.Contains(r.body, []byte(after.value)) || bytes.Contains(r.body, []byte("ERROR")) {
		t.Errorf("watch at the one that is left: %d %s", r.status, r.body)
	}
	c.eventually(func() error {
		lines, err := os.ReadFile(journalOf(good.node))
		if err != nil || !bytes.Contains(lines, []byte(after.value)) || bytes.Contains(lines, []byte(`"gap"`)) {
			return fmt.Errorf("its journal: %s %v", lines, err)
		}
		return nil
	})
	_ = bad.Wait(c.context()) // it ends because it was removed
}
