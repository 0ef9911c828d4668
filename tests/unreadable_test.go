package tests

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/hostile"
	"raftrv/internal/proc"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// spoil appends an entry to the log of a node that is down, which may seem committed, and returns its index.
func spoil(t *testing.T, n *proc.Node, committed bool, commands []byte) uint64 {
	t.Helper()
	dir := filepath.Join(n.DataDir, "wal")
	snapshots, err := wal.ValidSnapshotEntries(zap.NewNop(), dir)
	testkit.Must(t, err)
	w, err := wal.Open(zap.NewNop(), dir, snapshots[len(snapshots)-1])
	testkit.Must(t, err)
	_, hs, entries, err := w.ReadAll()
	testkit.Must(t, err)
	last := entries[len(entries)-1].GetIndex()
	if committed {
		hs.Commit = new(last + 1)
	}
	testkit.Must(t, errors.Join(w.Save(hs, []*raftpb.Entry{hostile.Entry(last+1, hs.GetTerm(), commands)}), w.Close()))
	return last + 1
}

// wantStopped starts a node whose log has an entry that nobody can apply.
func (c *liveCluster) wantStopped(n *proc.Node, entry uint64) {
	c.t.Helper()
	testkit.Must(c.t, n.Start())
	var exit *exec.ExitError
	if err := n.Wait(c.context()); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		c.t.Errorf("node %d ended with %v, want status 1\n%s", n.ID, err, n.LogTail())
	}
	for _, words := range []string{fmt.Sprintf("apply entry %d of term", entry), "raftrv recover"} {
		if err := c.says(n, words); err != nil {
			c.t.Error(err)
		}
	}
}

// TestProcess_Unreadable: a log with an entry that cannot be applied, as older versions let strangers write. The
// nodes say which it is and what to do, and that leaves the entry behind and nothing else.
func TestProcess_Unreadable(t *testing.T) {
	for name, commands := range map[string]string{
		"garbage":     "\x01\x00garbage",
		"a new kind":  "\x4d\x00\x00\x00",
		"a bad txn":   string((&store.Command{Op: store.OpTxn, Value: "\xff\xff"}).AppendTo(nil)),
		"a bad level": string((&store.Command{Op: store.OpLevel, Value: "\xff"}).AppendTo(nil)),
	} {
		t.Run(name, func(t *testing.T) {
			c := newLiveCluster(t, proc.Options{Args: []string{"--wal-segment-bytes", "1048576"}})
			one, two, three := c.Nodes[0], c.Nodes[1], c.Nodes[2]
			c.write(one, "k", "v")
			for _, n := range c.Nodes { // so that all have the same log
				c.wantValue(n, "k", "v")
			}
			c.kill(c.Nodes...)

			// Only one node has it, and nobody can tell whether it is committed: the others go on.
			c.wantStopped(three, spoil(t, three, false, []byte(commands)))
			testkit.Must(t, errors.Join(one.Start(), two.Start()))
			testkit.Must(t, errors.Join(one.WaitReady(c.context()), two.WaitReady(c.context())))
			c.write(two, "without", "it")
			c.wantValue(one, "without", "it")
			c.kill(one, two)

			// All have it.
			for _, n := range []*proc.Node{one, two} {
				c.wantStopped(n, spoil(t, n, true, []byte(commands)))
			}
			out := c.command("recover", "--data-dir", two.DataDir)
			if !strings.Contains(out, "The last 1 entries of its log are left behind, since this program") {
				t.Errorf("recover says:\n%s", out)
			}
			two.DataDir += "-recovered"
			testkit.Must(t, two.Start())
			testkit.Must(t, two.WaitReady(c.context()))
			c.wantValue(two, "k", "v")
			c.wantValue(two, "without", "it")
			c.write(two, "after", "it")
			c.Nodes = []*proc.Node{two}
		})
	}
}
