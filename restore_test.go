package main

import (
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
)

// TestRestore_VersionsAbove: a person may know better how high the versions are.
func TestRestore_VersionsAbove(t *testing.T) {
	path := backupOf(t, storetest.SomeState(t))
	for above, want := range map[uint64]uint64{1: 0, 1 << 40: 1 << 40, store.VersionsAboveMax + 1: 0} {
		dir := filepath.Join(t.TempDir(), "data")
		cfg := configOf(t, "--id", "1", "--cluster", restoreMembers, "--data-dir", dir)
		b, err := store.ReadBackup(path)
		testkit.Must(t, err)
		before := b.State.RV
		if err := restoreBackup(cfg, b, above, zap.NewNop()); (err != nil) != (above > store.VersionsAboveMax) {
			t.Errorf("above %d: %v", above, err)
		} else if err != nil {
			continue
		}
		if b.State.RV != max(want, before+store.VersionJump) || b.State.Events.Dropped != b.State.RV {
			t.Errorf("above %d: version %d, dropped %d", above, b.State.RV, b.State.Events.Dropped)
		}
		with := &founding{Backup: b.Digest + " --versions-above 7"}
		if got := restored(with); !strings.HasSuffix(got, b.Digest[:12]+" --versions-above 7") || with.agrees(&founding{Backup: b.Digest}) {
			t.Errorf("%s", got)
		}
	}
}

// lineage is a cluster, in a family in which all are made from backups and directories of others.
type lineage struct {
	store *store.Store
	index uint64
	kept  []store.State // backups, and directories of nodes that were lost
}

// put writes, and returns the version.
func (l *lineage) put(t *rapid.T, now int64) uint64 {
	l.index++
	c := store.Command{Op: store.OpPut, Key: "k", Value: "v"}
	h := store.BatchHeader{Session: 1, Seq: l.index, Time: now}
	if _, err := l.store.Apply(l.index, 1, h, c.AppendTo(nil), nil); err != nil {
		t.Fatal(err)
	}
	return l.store.Version()
}

// TestRestore_Family: whatever is restored or recovered from whatever, also again, and while the others go on, no
// version is given out by two clusters. (The simulator has one cluster; a second one would need a second model.)
func TestRestore_Family(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := int64(store.LeapEpoch + 200_000_000_000)
		first := &lineage{store: store.New()}
		first.store.State.SetLevel(3)
		family, givenBy := []*lineage{first}, map[uint64]*lineage{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			now += rapid.Int64Range(1, 1000).Draw(t, "ms")
			l := rapid.SampledFrom(family).Draw(t, "cluster")
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0, 1:
				for range rapid.IntRange(1, 50).Draw(t, "writes") {
					rv := l.put(t, now)
					if other := givenBy[rv]; other != nil {
						t.Fatalf("version %d was given out twice", rv)
					}
					givenBy[rv] = l
				}
			case 2:
				l.kept = append(l.kept, l.store.Snapshot())
			case 3: // both restore and recover begin like this
				if len(l.kept) == 0 {
					break
				}
				made := &lineage{store: store.New(), index: store.FirstIndex}
				kept := rapid.SampledFrom(l.kept).Draw(t, "kept")
				st := kept.Copy()
				st.Begin([]store.Member{{ID: 1}}, nil)
				made.store.Restore(st)
				family = append(family, made)
			}
		}
	})
}
