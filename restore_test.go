package main

import (
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
)

// TestRestore_VersionsAbove: a person may know better how high the versions are.
func TestRestore_VersionsAbove(t *testing.T) {
	path := backupOf(t, exampleState(t))
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
