package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// smallSegments makes the log cut segments often, and writes less to create one.
func smallSegments(t *testing.T) {
	old := wal.SegmentSizeBytes
	wal.SegmentSizeBytes = 64 << 10
	t.Cleanup(func() { wal.SegmentSizeBytes = old })
}

// newDisk opens dir and makes it that of the only member of a new cluster, or
// reads what it holds.
func newDisk(t *testing.T, dir string) (*storage, *recovered) {
	t.Helper()
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	r, err := s.load()
	testkit.Must(t, err)
	if r == nil {
		r, err = s.create(identity{Member: 1, Cluster: 7})
		testkit.Must(t, err)
	}
	if r.empty() {
		r.state.Members[1] = store.Member{ID: 1, PeerURL: "http://127.0.0.1:1"}
		r.state.Index, r.state.Term = 1, 1
		testkit.Must(t, s.bootstrap(r, r.state))
	}
	return s, r
}

// putEntry returns a log entry that puts one key.
func putEntry(index, term uint64, key, value string) *raftpb.Entry {
	b := newBatch(nil)
	b.add(&store.Command{Op: store.OpPut, Key: key, Value: value})
	store.BatchHeader{Session: 9, Seq: index}.Put(b.data)
	return &raftpb.Entry{Index: new(index), Term: new(term), Data: b.data}
}

func encodeState(t *testing.T, st *store.State) []byte {
	t.Helper()
	var buf bytes.Buffer
	testkit.Must(t, st.Encode(&buf))
	return buf.Bytes()
}

func TestStorage_KeepsLogAndIdentity(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	entry := putEntry(2, 1, "k", "v")
	testkit.Must(t, s.save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(uint64(2))}, []*raftpb.Entry{entry}))
	testkit.Must(t, s.close())

	s, r := newDisk(t, dir)
	defer s.close()
	if !reflect.DeepEqual(r.identity, identity{Format: dirFormat, Member: 1, Cluster: 7}) {
		t.Errorf("identity is %+v", r.identity)
	}
	hs, _, err := r.log.InitialState()
	testkit.Must(t, err)
	if hs.GetVote() != 1 || hs.GetCommit() != 2 {
		t.Errorf("hard state is %v", hs)
	}
	ents, err := r.log.Entries(2, 3, noLimit)
	testkit.Must(t, err)
	if len(ents) != 1 || !bytes.Equal(ents[0].GetData(), entry.GetData()) {
		t.Errorf("entries are %v", ents)
	}
}

func TestStorage_IsLockedAndPrivate(t *testing.T) {
	smallSegments(t)
	dir := filepath.Join(t.TempDir(), "data")
	s, _ := newDisk(t, dir)
	defer s.close()
	if _, err := openStorage(dir, zap.NewNop()); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("opened a directory that is in use: %v", err)
	}
	testkit.Must(t, filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v: others can look into it", path, info.Mode())
		}
		return err
	}))
}

// TestStorage_FirstStartIsAtomic: whatever the first start got done before it
// died, the second one finishes it.
func TestStorage_FirstStartIsAtomic(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	_, err = s.create(identity{Member: 1, Cluster: 7})
	testkit.Must(t, err)
	testkit.Must(t, s.close()) // died before bootstrap

	s, r := newDisk(t, dir)
	testkit.Must(t, s.close())
	if r.state.Index != 1 || len(r.confState.GetVoters()) != 1 {
		t.Errorf("second start came to index %d, configuration %v", r.state.Index, r.confState)
	}
}

// snapshotAt applies entries up to index and makes a snapshot there.
func snapshotAt(t *testing.T, s *storage, st *store.Store, index uint64) *raftpb.Snapshot {
	t.Helper()
	for i := st.Applied() + 1; i <= index; i++ {
		e := putEntry(i, 1, fmt.Sprintf("key-%d", i), strings.Repeat("v", 500))
		testkit.Must(t, s.save(&raftpb.HardState{Term: new(uint64(1)), Commit: new(i)}, []*raftpb.Entry{e}))
		testkit.Must(t, applyEntry(st, e))
	}
	view := st.Snapshot()
	snap := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		Index: new(view.Index), Term: new(view.Term), ConfState: &raftpb.ConfState{Voters: []uint64{1}},
	}}
	testkit.Must(t, s.writeSnapshot(snap, &view))
	testkit.Must(t, s.commitSnapshot(snap))
	return snap
}

func TestStorage_PurgeKeepsTwoSnapshotsAndTheLogForBoth(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, r := newDisk(t, dir)
	st := &store.Store{State: r.state}
	for _, index := range []uint64{300, 600, 900} {
		snapshotAt(t, s, st, index)
		testkit.Must(t, s.purge())
	}
	want := encodeState(t, &st.State)
	testkit.Must(t, s.close())

	if bodies, _ := filepath.Glob(filepath.Join(dir, snapDir, "*"+bodySuffix)); len(bodies) != 2 {
		t.Errorf("snapshots on disk: %v", bodies)
	}
	segments, _ := filepath.Glob(filepath.Join(dir, walDir, "*.wal"))
	if strings.HasSuffix(segments[0], "0000000000000000-0000000000000000.wal") {
		t.Errorf("the first segment is still there: %v", segments)
	}
	s, r = newDisk(t, dir)
	if got := encodeState(t, &r.state); !bytes.Equal(got, want) {
		t.Error("the newest snapshot is not the state that was saved")
	}
	testkit.Must(t, s.close())

	// The newest one is damaged: the older one and the log lead to the same state.
	damaged := filepath.Join(dir, snapDir, fmt.Sprintf("%016x%s", 900, bodySuffix))
	b := []byte(testkit.ReadFile(t, damaged))
	b[len(b)/2] ^= 1
	testkit.Must(t, os.WriteFile(damaged, b, fsx.FileMode))
	s, r = newDisk(t, dir)
	defer s.close()
	if r.state.Index != 600 {
		t.Fatalf("started from index %d", r.state.Index)
	}
	st = &store.Store{State: r.state}
	ents, err := r.log.Entries(601, 901, noLimit)
	testkit.Must(t, err)
	for _, e := range ents {
		testkit.Must(t, applyEntry(st, e))
	}
	if got := encodeState(t, &st.State); !bytes.Equal(got, want) {
		t.Error("the older snapshot and the log do not lead to the state that was saved")
	}
}

// TestStorage_OrphanSnapshotIsIgnored: a body and a .snap file without a record
// in the log are what a crash between the two leaves.
func TestStorage_OrphanSnapshotIsIgnored(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, r := newDisk(t, dir)
	st := &store.Store{State: r.state}
	for i := uint64(2); i <= 20; i++ {
		e := putEntry(i, 1, "k", fmt.Sprint(i))
		testkit.Must(t, s.save(&raftpb.HardState{Term: new(uint64(1)), Commit: new(i)}, []*raftpb.Entry{e}))
		testkit.Must(t, applyEntry(st, e))
	}
	view := st.Snapshot()
	snap := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		Index: new(view.Index), Term: new(view.Term), ConfState: &raftpb.ConfState{Voters: []uint64{1}},
	}}
	testkit.Must(t, s.writeSnapshot(snap, &view))
	testkit.Must(t, s.snap.SaveSnap(snap))
	testkit.Must(t, s.close())

	s, r = newDisk(t, dir)
	defer s.close()
	if r.state.Index != 1 {
		t.Errorf("started from index %d of a snapshot that does not count", r.state.Index)
	}
	if last, _ := r.log.LastIndex(); last != 20 {
		t.Errorf("the log ends at %d", last)
	}
}

// crashImage returns a copy of a data directory in use: what a crash leaves.
func crashImage(t *testing.T, dir string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	testkit.Must(t, os.CopyFS(image, os.DirFS(dir)))
	testkit.Must(t, filepath.Walk(image, func(path string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() {
			err = os.Chmod(path, fsx.FileMode)
		}
		return err
	}))
	return image
}

// tearTail makes the last record of a log break off in its middle.
func tearTail(t *testing.T, dir string) {
	t.Helper()
	segments, err := filepath.Glob(filepath.Join(dir, walDir, "*.wal"))
	testkit.Must(t, err)
	path := segments[len(segments)-1]
	b := []byte(testkit.ReadFile(t, path))
	end := bytes.LastIndex(b, []byte("vvvv"))
	clear(b[end-1500:])
	testkit.Must(t, os.WriteFile(path, b, fsx.FileMode))
}

// writeEntries saves entries 2 to last, each of about 2 kB.
func writeEntries(t *testing.T, s *storage, last uint64) {
	t.Helper()
	for i := uint64(2); i <= last; i++ {
		hs := &raftpb.HardState{Term: new(uint64(1)), Commit: new(i - 1)}
		testkit.Must(t, s.save(hs, []*raftpb.Entry{putEntry(i, 1, "k", strings.Repeat("v", 2000))}))
	}
}

// TestStorage_TornTail: a record that a crash cut short was acknowledged to
// nobody. The same record, once the watermark is behind it, was.
func TestStorage_TornTail(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	writeEntries(t, s, 9)
	testkit.Must(t, s.writeMark())
	writeEntries(t, s, 10)
	torn := crashImage(t, dir)
	tearTail(t, torn)
	testkit.Must(t, s.close())

	s, r := newDisk(t, torn)
	if last, _ := r.log.LastIndex(); last != 9 {
		t.Errorf("the log ends at %d", last)
	}
	testkit.Must(t, s.close())

	tearTail(t, dir) // closed, so the watermark is at entry 10
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	defer s.close()
	_, err = s.load()
	if err == nil || !strings.Contains(err.Error(), ".wal ends at byte") || !strings.Contains(err.Error(), "entry 10 of term 1") {
		t.Errorf("load: %v", err)
	}
}

// TestStorage_NoticesEveryFlippedBit: whatever bit of a closed log is damaged,
// either nothing is missing or the directory is refused. The values are zeros,
// since etcd's log takes a damaged record with a zeroed sector for a torn one.
func TestStorage_NoticesEveryFlippedBit(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	for i := uint64(2); i <= 6; i++ {
		hs := &raftpb.HardState{Term: new(uint64(1)), Commit: new(i - 1)}
		testkit.Must(t, s.save(hs, []*raftpb.Entry{putEntry(i, 1, "k", strings.Repeat("\x00", 1500))}))
	}
	testkit.Must(t, s.close())
	segments, err := filepath.Glob(filepath.Join(dir, walDir, "*.wal"))
	testkit.Must(t, err)
	whole := []byte(testkit.ReadFile(t, segments[0]))
	end, err := scanLog(filepath.Join(dir, walDir), watermark{})
	testkit.Must(t, err)
	refused, served := 0, 0
	for offset := int64(0); offset < end.offset; offset += 7 {
		damaged := bytes.Clone(whole)
		damaged[offset] ^= 1 << (offset % 8)
		testkit.Must(t, os.WriteFile(segments[0], damaged, fsx.FileMode))
		if last, err := lastEntryOf(dir); err != nil {
			refused++
		} else if served++; last != 6 {
			t.Errorf("bit %d of byte %d: the log ends at %d and nobody noticed", offset%8, offset, last)
		}
	}
	t.Logf("%d flips: %d refused, %d without effect", refused+served, refused, served)
}

func lastEntryOf(dir string) (uint64, error) {
	s, err := openStorage(dir, zap.NewNop())
	if err != nil {
		return 0, err
	}
	defer s.lock.Close()
	r, err := s.load()
	if s.mark != nil {
		defer s.mark.file.Close()
	}
	if err != nil {
		return 0, err
	}
	defer s.wal.Close()
	return r.log.LastIndex()
}

func TestStorage_RefusesALogThatLostCommittedEntries(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	testkit.Must(t, s.save(&raftpb.HardState{Term: new(uint64(1)), Commit: new(uint64(9))}, []*raftpb.Entry{putEntry(2, 1, "k", "v")}))
	testkit.Must(t, s.close())
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	defer s.close()
	if _, err := s.load(); err == nil || !strings.Contains(err.Error(), "9 entries were committed") {
		t.Errorf("load: %v", err)
	}
}

func TestStorage_RefusesADirectoryThatLostItsWatermark(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, _ := newDisk(t, dir)
	testkit.Must(t, s.close())
	testkit.Must(t, os.Remove(filepath.Join(dir, watermarkName)))
	if _, err := lastEntryOf(dir); err == nil || !strings.Contains(err.Error(), "watermark") {
		t.Errorf("load: %v", err)
	}
}

// TestWatermark_SurvivesATornWrite: one slot is always whole.
func TestWatermark_SurvivesATornWrite(t *testing.T) {
	dir := t.TempDir()
	w, err := openWatermark(dir, true)
	testkit.Must(t, err)
	for i := range uint64(5) {
		testkit.Must(t, w.write(watermark{term: 1, index: i}))
	}
	testkit.Must(t, w.file.Close())
	path := filepath.Join(dir, watermarkName)
	whole := []byte(testkit.ReadFile(t, path))
	for i := range watermarkSize { // the fifth write went to slot 1
		torn := bytes.Clone(whole)
		clear(torn[watermarkSlot+i:])
		testkit.Must(t, os.WriteFile(path, torn, fsx.FileMode))
		w, err := openWatermark(dir, false)
		testkit.Must(t, err)
		if w.last.index < 3 {
			t.Errorf("torn at byte %d: read %v", i, w.last)
		}
		testkit.Must(t, w.file.Close())
	}
}

func TestWatermark_ShorterLogOfALaterTermCovers(t *testing.T) {
	for _, c := range []struct {
		end, mark watermark
		want      bool
	}{
		{watermark{1, 5, 1, 0}, watermark{1, 5, 1, 0}, true},
		{watermark{1, 4, 1, 0}, watermark{1, 5, 1, 0}, false},
		{watermark{2, 4, 2, 0}, watermark{1, 5, 1, 0}, true}, // a new leader replaced the end
		{watermark{1, 9, 1, 0}, watermark{2, 5, 2, 0}, false},
		{watermark{1, 5, 1, 0}, watermark{1, 5, 2, 0}, false}, // the term is gone
		{watermark{1, 5, 2, 0}, watermark{1, 5, 2, 3}, false}, // the vote is gone
		{watermark{1, 5, 2, 3}, watermark{1, 5, 2, 0}, true},
		{watermark{1, 5, 2, 3}, watermark{1, 5, 1, 2}, true},
	} {
		if got := c.end.covers(c.mark); got != c.want {
			t.Errorf("%v covers %v: %v", c.end, c.mark, got)
		}
	}
}

// TestStorage_NewerSnapshot: what a newer program wrote is not taken for damage: neither is an older snapshot used,
// nor does the text say that anything is lost.
func TestStorage_NewerSnapshot(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	s, rec := newDisk(t, dir)
	st := &store.Store{State: rec.state}
	snapshotAt(t, s, st, 20)
	snapshotAt(t, s, st, 30)
	newest := s.bodyPath(30)
	testkit.Must(t, s.close())
	var b bytes.Buffer
	e := store.NewSnapshotEncoder(&b)
	e.Bytes([]byte(store.SnapshotMagic))
	e.Uint(99)
	testkit.Must(t, e.W.Flush())
	testkit.Must(t, os.WriteFile(newest, b.Bytes(), fsx.FileMode))
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	defer s.close()
	if _, err := s.load(); !errors.Is(err, store.ErrSnapshotFormat) || !strings.Contains(err.Error(), "use the version that wrote it") || strings.Contains(err.Error(), adviceForDamage) {
		t.Errorf("%v", err)
	}
}
