package main

import (
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
)

// TestRestore_NoVersionTwice: of two clusters that were made from the same file the
// later one gives out no version of the other, and takes none for its own.
func TestRestore_NoVersionTwice(t *testing.T) {
	const taken = leapEpoch + 200_000_000_000
	made := func(level int, start int64, writes int) *watchRig {
		r := newWatchRig(t)
		r.record = false
		r.now = taken
		r.apply(raiseCommand(level))
		r.put("k", "v")
		r.store.state.begin([]member{{ID: 1}}, nil)
		r.index, r.now = r.store.state.index, start
		st := r.store.snapshot() // as a node that was restored reads it
		r.store.restore(st)
		for range writes {
			r.put("k", "w")
		}
		return r
	}
	for level := 1; level <= 2; level++ {
		first, second := made(level, taken+5000, 50), made(level, taken+5001, 8)
		seen := first.store.version()
		_, err := second.hub.watch("k", false, seen)
		if apart := err != nil; apart != (level == 2) {
			t.Errorf("level %d: a watch from version %d of the first cluster in the second, which is at %d: %v", level, seen, second.store.version(), err)
		}
		it, rv, _ := second.store.get("k")
		if level == 2 && (rv-8 <= seen || it.rv != rv || second.store.eventsDropped() != rv-8 || it.rv >= 1<<53) {
			t.Errorf("the second cluster is at version %d, the first at %d", rv, seen)
		}
	}
	// It happens once, and only after a restore.
	r := newWatchRig(t)
	r.now = taken
	r.apply(raiseCommand(2))
	for want := range uint64(3) {
		if rv := r.put("k", "v"); rv != want+1 {
			t.Errorf("version %d", rv)
		}
	}
}

// TestRestore_VersionsAbove: a person may know better how high the versions are.
func TestRestore_VersionsAbove(t *testing.T) {
	path := backupOf(t, smallState(t))
	for above, want := range map[uint64]uint64{1: 0, 1 << 40: 1 << 40, versionsAboveMax + 1: 0} {
		dir := filepath.Join(t.TempDir(), "data")
		cfg := configOf(t, "--id", "1", "--cluster", restoreMembers, "--data-dir", dir)
		b, err := readBackup(path)
		must(t, err)
		before := b.state.rv
		if err := restoreBackup(cfg, b, above, zap.NewNop()); (err != nil) != (above > versionsAboveMax) {
			t.Errorf("above %d: %v", above, err)
		} else if err != nil {
			continue
		}
		if b.state.rv != max(want, before+versionJump) || b.state.events.dropped != b.state.rv {
			t.Errorf("above %d: version %d, dropped %d", above, b.state.rv, b.state.events.dropped)
		}
		with := &founding{Backup: b.digest + " --versions-above 7"}
		if got := restored(with); !strings.HasSuffix(got, b.digest[:12]+" --versions-above 7") || with.agrees(&founding{Backup: b.digest}) {
			t.Errorf("%s", got)
		}
	}
}
