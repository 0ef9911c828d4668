package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// A log may go back, by what raft does and by crashes. A healthy node is never
// refused for that.

// entriesOf returns empty entries of one term.
func entriesOf(term, first, last uint64) []*raftpb.Entry {
	var ents []*raftpb.Entry
	for i := first; i <= last; i++ {
		ents = append(ents, &raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Term: new(term), Index: new(i)})
	}
	return ents
}

func hardStateOf(term, commit uint64) *raftpb.HardState {
	return &raftpb.HardState{Term: new(term), Commit: new(commit)}
}

// receivedSnapshotAt puts the body of a snapshot of another member in place.
func receivedSnapshotAt(t *testing.T, s *storage, index, term uint64) *raftpb.Snapshot {
	t.Helper()
	st := store.NewState()
	st.Index, st.Term = index, term
	st.Members[1] = store.Member{ID: 1, PeerURL: "http://127.0.0.1:1"}
	snap := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(index), Term: new(term), ConfState: &raftpb.ConfState{Voters: []uint64{1}}}}
	testkit.Must(t, s.writeSnapshot(snap, &st))
	return snap
}

// wantLogEnd opens a directory and wants its log to end at an entry.
func wantLogEnd(t *testing.T, dir string, index, term uint64) *storage {
	t.Helper()
	s, r := newDisk(t, dir)
	last, err := r.log.LastIndex()
	testkit.Must(t, err)
	got, err := r.log.Term(last)
	testkit.Must(t, err)
	if last != index || got != term {
		t.Errorf("the log ends at entry %d of term %d, want %d of term %d", last, got, index, term)
	}
	if s.reached.index != index || s.reached.term != term {
		t.Errorf("it has reached %v", s.reached.watermark)
	}
	return s
}

// Raft replaces entries by fewer ones of an older term: whatever a crash leaves
// of that, before and after, starts.
func TestWatermark_LogGoesBack(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	testkit.Must(t, s.save(hardStateOf(3, 1), entriesOf(3, 2, 9)))
	testkit.Must(t, s.writeMark())
	before := crashImage(t, dir)
	testkit.Must(t, s.save(hardStateOf(5, 1), slices.Concat(entriesOf(2, 5, 5), entriesOf(5, 6, 6))))
	after := crashImage(t, dir)

	// The watermark that goes first, with none of the write and with its first entry.
	none, part := crashImage(t, before), crashImage(t, after)
	testkit.Must(t, os.WriteFile(filepath.Join(none, watermarkName), []byte(testkit.ReadFile(t, filepath.Join(after, watermarkName))), fsx.FileMode))
	segments, err := filepath.Glob(filepath.Join(part, walDir, "*.wal"))
	testkit.Must(t, err)
	torn := []byte(testkit.ReadFile(t, segments[len(segments)-1]))
	offsets := recordOffsets(t, torn)
	clear(torn[offsets[len(offsets)-2]:]) // the last entry and the hard state
	testkit.Must(t, os.WriteFile(segments[len(segments)-1], torn, fsx.FileMode))
	testkit.Must(t, wantLogEnd(t, none, 9, 3).close())
	testkit.Must(t, wantLogEnd(t, part, 5, 2).close())
	testkit.Must(t, wantLogEnd(t, before, 9, 3).close())
	testkit.Must(t, wantLogEnd(t, after, 6, 5).close())
	testkit.Must(t, s.close())
	testkit.Must(t, wantLogEnd(t, dir, 6, 5).close())
}

// waitsIn says whether a goroutine waits for a mutex in this method of storage.
func waitsIn(method string) bool {
	stacks := make([]byte, 1<<20)
	for stack := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
		if strings.Contains(stack, "[sync.Mutex.Lock") && strings.Contains(stack, "(*storage)."+method) {
			return true
		}
	}
	return false
}

// A watermark that is being written while the log goes back must not come after
// the one that goes back first.
func TestWatermark_OneOnItsWay(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	testkit.Must(t, s.save(hardStateOf(3, 1), entriesOf(3, 2, 9)))
	s.marking.Lock() // as writeMark does, in the middle of it
	s.mu.Lock()
	s.marked = s.reached.watermark
	s.mu.Unlock()
	saved := make(chan error, 1)
	go func() { saved <- s.save(nil, entriesOf(2, 5, 5)) }()
	for end := time.Now().Add(5 * time.Second); !waitsIn("goBack"); time.Sleep(time.Millisecond) {
		if len(saved) > 0 || time.Now().After(end) {
			s.marking.Unlock()
			t.Fatal("the log goes back although a watermark is on its way")
		}
	}
	testkit.Must(t, s.mark.write(s.marked))
	s.marking.Unlock()
	testkit.Must(t, <-saved)
	testkit.Must(t, wantLogEnd(t, crashImage(t, dir), 5, 2).close())
	testkit.Must(t, s.close())
}

// The record of a snapshot that was received counts with its hard state, which a
// crash may come before.
func TestWatermark_SnapshotWithoutItsHardState(t *testing.T) {
	smallSegments(t)
	for _, term := range []uint64{2, 5} { // of the log; it has entries that were never committed
		t.Run(fmt.Sprint("term ", term), func(t *testing.T) {
			dir := t.TempDir()
			s, _ := newDisk(t, dir)
			testkit.Must(t, s.save(hardStateOf(5, 1), entriesOf(term, 2, 10)))
			testkit.Must(t, s.writeMark())
			testkit.Must(t, s.commitSnapshot(receivedSnapshotAt(t, s, 8, 3)))
			testkit.Must(t, s.writeMark())
			without := crashImage(t, dir)
			testkit.Must(t, s.save(hardStateOf(6, 8), nil))
			testkit.Must(t, s.writeMark())
			with := crashImage(t, dir)
			testkit.Must(t, s.close())

			testkit.Must(t, wantLogEnd(t, with, 8, 3).close())
			s = wantLogEnd(t, without, 10, term)
			testkit.Must(t, s.writeMark())
			testkit.Must(t, s.save(hardStateOf(6, 1), entriesOf(1, 3, 4))) // from another leader
			image := crashImage(t, without)
			testkit.Must(t, s.close())
			testkit.Must(t, wantLogEnd(t, image, 4, 1).close())
		})
	}
}

// What was behind a snapshot that was received does not come back, neither at the
// next start nor later.
func TestStorage_OldTailIsGone(t *testing.T) {
	smallSegments(t)
	for _, term := range []uint64{2, 5} {
		t.Run(fmt.Sprint("term ", term), func(t *testing.T) {
			dir := t.TempDir()
			s, _ := newDisk(t, dir)
			testkit.Must(t, s.save(hardStateOf(5, 1), entriesOf(term, 2, 10)))
			testkit.Must(t, s.commitSnapshot(receivedSnapshotAt(t, s, 8, 3)))
			testkit.Must(t, s.save(hardStateOf(6, 8), nil))
			testkit.Must(t, s.close())
			for range 2 {
				testkit.Must(t, wantLogEnd(t, dir, 8, 3).close())
			}
			s = wantLogEnd(t, dir, 8, 3)
			testkit.Must(t, s.save(hardStateOf(6, 8), entriesOf(6, 9, 9)))
			testkit.Must(t, s.close())
			testkit.Must(t, wantLogEnd(t, dir, 9, 6).close())

			// An own snapshot takes nothing away.
			s, r := newDisk(t, dir)
			testkit.Must(t, s.save(hardStateOf(6, 12), entriesOf(6, 10, 14)))
			st := &store.Store{State: r.state}
			for i := uint64(9); i <= 12; i++ {
				testkit.Must(t, st.Skip(i, 6))
			}
			view := st.Snapshot()
			own := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(view.Index), Term: new(view.Term), ConfState: &raftpb.ConfState{Voters: []uint64{1}}}}
			testkit.Must(t, s.writeSnapshot(own, &view))
			testkit.Must(t, s.commitSnapshot(own))
			testkit.Must(t, s.close())
			testkit.Must(t, wantLogEnd(t, dir, 14, 6).close())
		})
	}
}

// The newest snapshot was received and is damaged: what the log was before it is
// not taken for what was committed.
func TestStorage_OldTailDoesNotStandIn(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	testkit.Must(t, s.save(hardStateOf(2, 1), entriesOf(2, 2, 10)))
	testkit.Must(t, s.commitSnapshot(receivedSnapshotAt(t, s, 8, 3)))
	testkit.Must(t, s.save(hardStateOf(3, 8), nil))
	path := s.bodyPath(8)
	testkit.Must(t, s.close())
	testkit.Must(t, os.Truncate(path, 20))
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	defer s.close()
	if _, err := s.load(); err == nil || !strings.Contains(err.Error(), "goes back to entry 9, but the newest snapshot that is usable is at entry 1") {
		t.Errorf("load: %v", err)
	}
}

// A snapshot counts once its record is in the log; every name was made durable
// before.
func TestStorage_NamesBeforeTheRecord(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, r := newDisk(t, dir)
	durable := map[string]bool{}
	defer func(before func(string) error) { fsx.SyncDir = before }(fsx.SyncDir)
	sync := fsx.SyncDir
	fsx.SyncDir = func(path string) error {
		names, err := os.ReadDir(path)
		for _, name := range names {
			durable[filepath.Join(path, name.Name())] = true
		}
		return errors.Join(err, sync(path))
	}
	snap := snapshotAt(t, s, &store.Store{State: r.state}, 5)
	for _, path := range []string{s.bodyPath(5), s.metaPath(s.snapshots[len(s.snapshots)-1])} {
		if !durable[path] {
			t.Errorf("snapshot %d has a record, but a power cut may take %s", snap.GetMetadata().GetIndex(), path)
		}
	}
	// What a directory brings along is made durable before it is used.
	clear(durable)
	testkit.Must(t, s.close())
	s, _ = newDisk(t, dir)
	defer s.close()
	for _, sub := range []string{"", walDir, snapDir} {
		names, err := os.ReadDir(filepath.Join(dir, sub))
		testkit.Must(t, err)
		if !slices.ContainsFunc(names, func(e os.DirEntry) bool { return durable[filepath.Join(dir, sub, e.Name())] }) {
			t.Errorf("%q was not synced at the start", sub)
		}
	}
}

// What of the log is behind the watermark is written again at the start, since it
// may be in the kernel's cache only; and so is the watermark.
func TestStorage_RewritesWhatIsNotProven(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	writeEntries(t, s, 5)
	testkit.Must(t, s.writeMark())
	writeEntries(t, s, 9)
	image := crashImage(t, dir)
	testkit.Must(t, s.close())
	mark, err := openWatermark(image, false)
	testkit.Must(t, err)
	testkit.Must(t, mark.file.Close())
	end, err := scanLog(filepath.Join(image, walDir), mark.last)
	testkit.Must(t, err)
	whole := testkit.ReadFile(t, end.path)
	if end.unproven <= 0 || end.unproven >= end.offset || !strings.Contains(whole[end.unproven:end.offset], "vvvv") {
		t.Errorf("behind the watermark: bytes %d to %d", end.unproven, end.offset)
	}
	past := time.Now().Add(-time.Hour).Truncate(time.Second)
	testkit.Must(t, os.Chtimes(end.path, past, past))
	s, err = openStorage(image, zap.NewNop())
	testkit.Must(t, err)
	defer s.close()
	testkit.Must(t, s.checkLog())
	if info, err := os.Stat(end.path); err != nil || info.ModTime().Equal(past) || testkit.ReadFile(t, end.path) != whole {
		t.Errorf("the log was not written again, or differs: %v", err)
	}
	testkit.Must(t, s.mark.file.Close())
	s.mark = nil
	rec, err := s.load()
	testkit.Must(t, err)
	testkit.Must(t, s.save(nil, entriesOf(1, 10, 10)))
	if last, _ := rec.log.LastIndex(); last != 9 || s.mark.number != mark.number+1 || s.mark.last.index != 9 {
		t.Errorf("the log ends at %d, the watermark was written %d times and is %v", last, s.mark.number-mark.number, s.mark.last)
	}
}

// A call that fails must not move the watermark, nor leave anything that counts.
func TestStorage_FailingWrites(t *testing.T) {
	smallSegments(t)
	for name, fail := range map[string]func(t *testing.T, s *storage) error{
		"log": func(t *testing.T, s *storage) error {
			testkit.Must(t, s.wal.Close())
			return s.save(hardStateOf(2, 1), entriesOf(2, 4, 4))
		},
		"record": func(t *testing.T, s *storage) error {
			snap := receivedSnapshotAt(t, s, 7, 2)
			testkit.Must(t, s.wal.Close())
			return s.commitSnapshot(snap)
		},
		"name of the body": func(t *testing.T, s *storage) error {
			testkit.Must(t, os.MkdirAll(filepath.Join(s.bodyPath(7), "x"), fsx.DirMode))
			st := store.NewState()
			st.Index, st.Term = 7, 2
			return s.writeSnapshot(&raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(7)), Term: new(uint64(2))}}, &st)
		},
		"metadata": func(t *testing.T, s *storage) error {
			snap := receivedSnapshotAt(t, s, 7, 2)
			testkit.Must(t, os.MkdirAll(filepath.Join(s.dir, snapDir, fmt.Sprintf("%016x-%016x%s", 2, 7, metaSuffix), "x"), fsx.DirMode))
			return s.commitSnapshot(snap)
		},
		"directory": func(t *testing.T, s *storage) error {
			snap := receivedSnapshotAt(t, s, 7, 2)
			before := fsx.SyncDir
			defer func() { fsx.SyncDir = before }()
			fsx.SyncDir = func(string) error { return errors.New("no such luck") }
			return s.commitSnapshot(snap)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, _ := newDisk(t, dir)
			testkit.Must(t, s.save(hardStateOf(1, 1), entriesOf(1, 2, 3)))
			testkit.Must(t, s.writeMark())
			before := s.reached.watermark
			if err := fail(t, s); err == nil {
				t.Fatal("it did not fail")
			}
			if s.reached.watermark != before || len(s.snapshots) != 1 {
				t.Errorf("reached %v, before %v; %d snapshots", s.reached.watermark, before, len(s.snapshots))
			}
			if left, _ := filepath.Glob(filepath.Join(dir, snapDir, tempPrefix+"*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			_ = s.close()                                       // the log may be closed
			_ = os.RemoveAll(filepath.Join(s.bodyPath(7), "x")) // if it is there
			testkit.Must(t, wantLogEnd(t, crashImage(t, dir), 3, 1).close())
		})
	}
}

// A snapshot that is damaged is none of the two that are kept.
func TestStorage_DamagedSnapshotDoesNotCount(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, r := newDisk(t, dir)
	st := &store.Store{State: r.state}
	snapshotAt(t, s, st, 300)
	snapshotAt(t, s, st, 600)
	testkit.Must(t, s.close())
	testkit.Must(t, os.Truncate(s.bodyPath(600), 100))
	s, r = newDisk(t, dir)
	if r.state.Index != 300 {
		t.Fatalf("started from %d", r.state.Index)
	}
	testkit.Must(t, r.replay())
	snapshotAt(t, s, &store.Store{State: r.state}, 700)
	testkit.Must(t, s.purge())
	testkit.Must(t, s.close())
	testkit.Must(t, os.Truncate(s.bodyPath(700), 100))
	s, r = newDisk(t, dir)
	defer s.close()
	if r.state.Index != 300 {
		t.Errorf("started from %d", r.state.Index)
	}
}
