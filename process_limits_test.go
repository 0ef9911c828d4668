package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"raftrv/internal/proc"
)

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
		must(t, os.MkdirAll(d.dir(id), 0o700))
		if err := syscall.Mount("tmpfs", d.dir(id), "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
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
	must(d.t, syscall.Mount("tmpfs", d.dir(id), "tmpfs", syscall.MS_REMOUNT, fmt.Sprintf("size=%d", size)))
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
			if r.status != http.StatusInsufficientStorage || r.problem.Code != "disk-full" || r.problem.Outcome != notApplied || r.header.Get("Retry-After") == "" {
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
	for round := range sized(1, 3) {
		size := small + round*8<<20
		for _, n := range c.Nodes {
			d.resize(n.ID, size)
		}
		load := c.load(12, c.Nodes, putLarge)
		c.wantFull(c.Nodes...)
		time.Sleep(sized(2*time.Second, 20*time.Second)) // the load goes on
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
			free, err := freeBytes(d.dir(n.ID))
			must(t, err)
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
	c.verdictBut("again", "refused")
	t.Log(c.history.count())
}

// verdictBut is verdict after writes that are no part of the history took versions.
func (c *liveCluster) verdictBut(...string) {
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
			c.waitForAcks(sized(2000, 20_000)) // many times what it has room for
			r := c.client(n).raw(http.MethodGet, "large/v1", "?resourceVersion=0", "")
			if r.status != http.StatusOK || !n.Running() {
				t.Errorf("GET of what it has: %d %s %v", r.status, r.body, r.err)
			}
			free, err := freeBytes(d.dir(n.ID))
			must(t, err)
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
			c.verdictBut()
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
	c.verdictBut()
	t.Log(c.history.count())
}
