package main

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
	"raftrv/internal/watch"
)

// This file is a member's data directory:
//
//	LOCK                            held while the member runs
//	unfinished                      there until the directory is complete, see restore.go
//	secret                          by which a copy of the directory is known, see member.go
//	founding                        there until the node has a cluster, see founding.go
//	watermark                       how far the log was on disk, see watermark.go
//	wal/                            etcd's write-ahead log
//	snap/<term>-<index>.snap        etcd's snapshot file: index, term, configuration
//	snap/<index>.snap.db            its body: the state, see internal/store/snapshot.go
//
// A snapshot counts once the log has a record of it. The body is on disk
// before the .snap file, and that before the record, so whatever a crash leaves
// behind is either complete or never looked at.

const (
	lockName = "LOCK"

	// unfinishedName is there while a directory is made from a backup.
	unfinishedName = "unfinished"

	walDir  = "wal"
	snapDir = "snap"

	bodySuffix = ".snap.db"
	metaSuffix = ".snap"
	tempPrefix = "tmp" // as snap.SaveDBFrom names the files that it is writing

	// snapshotsKept: the second one is there in case the newest is damaged.
	snapshotsKept = 2
)

// segmentBytesDefault is the size of one file of the log. It is preallocated,
// and the next one too.
const segmentBytesDefault = 64 << 20

// setSegmentBytes sets that size for all logs of this process, before the first
// one is opened. That they share it is etcd's: its log takes it from a variable.
// Nothing else that a node may be told is shared by all nodes of a process.
func setSegmentBytes(n uint64) { wal.SegmentSizeBytes = int64(n) }

func segmentBytes() uint64 { return uint64(wal.SegmentSizeBytes) }

// freeBytes returns how much may still be written to the disk that holds path.
func freeBytes(path string) (uint64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("find free space of %s: %w", path, err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// identity is the metadata of the log: whose directory it is.
type identity struct {
	Format  int    `json:"format"`
	Member  uint64 `json:"member"`
	Cluster uint64 `json:"cluster"`
	// Directory is a random number: a directory that was made anew is another one.
	Directory uint64 `json:"directory"`
	// Joined members start empty and get their first state from a leader.
	Joined bool `json:"joined,omitempty"`
	// Founders are who founded the cluster, with their directories: nobody if this
	// member joined, or if the cluster was recovered or is of before.
	Founders []store.Member `json:"founders,omitempty"`
	// Backup is the digest of the backup that the cluster was restored from.
	Backup string `json:"backup,omitempty"`
	// Recovered: the cluster has a number of its own, see recover.
	Recovered bool `json:"recovered,omitempty"`
}

const dirFormat = 1

// storage is an open data directory. It implements disk.
type storage struct {
	dir    string
	logger *zap.Logger
	lock   *fileutil.LockedFile
	snap   *snap.Snapshotter
	wal    *wal.WAL // nil until load or create
	mark   *watermarkFile

	// Closed by interrupt: then whatever takes long ends with errInterrupted.
	interrupted chan struct{}
	interruptOn sync.Once

	free func() (uint64, error) // bytes that the disk has

	marking sync.Mutex // held while the watermark is written; taken before mu
	proven  bool       // this process has written it; belongs to who saves

	mu        sync.Mutex        // orders the loop's goroutine and those in the background
	snapshots []*walpb.Snapshot // recorded in the log, oldest first
	reached   extent            // what the log has on disk
	marked    watermark         // what the watermark says, or will when it is written

	// Invariant: reached covers marked, and so does whatever a crash in the middle
	// of a write leaves of the log.
}

// recovered is what a data directory holds: where a replica goes on.
type recovered struct {
	identity  identity
	log       *raft.MemoryStorage
	state     store.State
	confState *raftpb.ConfState

	// replay leaves the rest of the log behind if it finds an entry that this
	// program cannot apply.
	unreadable error
	left       uint64 // entries
}

// openStorage makes the data directory if need be and takes its lock.
func openStorage(dir string, logger *zap.Logger) (*storage, error) {
	if err := os.MkdirAll(dir, fsx.DirMode); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	if err := checkPrivateDir(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, snapDir), fsx.DirMode); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	lock, err := fileutil.TryLockFile(filepath.Join(dir, lockName), os.O_WRONLY|os.O_CREATE, fsx.FileMode)
	if errors.Is(err, fileutil.ErrLocked) {
		return nil, fmt.Errorf("data directory %s is in use by another process", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	s := &storage{dir: dir, logger: logger, lock: lock, interrupted: make(chan struct{}), free: func() (uint64, error) { return freeBytes(dir) }}
	s.snap = snap.New(logger, s.path(snapDir))
	return s, nil
}

const secretName = "secret"

// loadSecret returns the secret of this directory, and makes it if need be.
func (s *storage) loadSecret() (secret, error) {
	b, err := os.ReadFile(s.path(secretName))
	if err == nil && len(b) > 0 || err != nil && !errors.Is(err, os.ErrNotExist) {
		return b, err
	}
	made := secret(rand.Text())
	err = replaceFile(s.path(secretName), made)
	if errors.Is(err, syscall.ENOSPC) { // the next start makes one
		s.logger.Warn("no room to write down the secret of the data directory: a copy of it would not be noticed", zap.Error(err))
		err = nil
	}
	return made, err
}

// errInterrupted ends what takes long when the node stops.
var errInterrupted = errors.New("interrupted since the node stops")

// interrupt ends soon all reading and writing of snapshots and all deleting,
// now and later. What is half written is deleted. The log is not concerned.
func (s *storage) interrupt() { s.interruptOn.Do(func() { close(s.interrupted) }) }

// goOn says whether nobody has interrupted.
func (s *storage) goOn() error {
	select {
	case <-s.interrupted:
		return errInterrupted
	default:
		return nil
	}
}

// interruptible is a file of which reading can be interrupted.
type interruptible struct {
	*os.File
	storage *storage
}

func (f interruptible) Read(p []byte) (int, error) {
	if err := f.storage.goOn(); err != nil {
		return 0, err
	}
	return f.File.Read(p)
}

func (s *storage) path(name string) string { return filepath.Join(s.dir, name) }

// bodyPath returns where the body of the snapshot at index is.
func (s *storage) bodyPath(index uint64) string {
	return filepath.Join(s.dir, snapDir, fmt.Sprintf("%016x%s", index, bodySuffix))
}

func (s *storage) metaPath(w *walpb.Snapshot) string {
	return filepath.Join(s.dir, snapDir, fmt.Sprintf("%016x-%016x%s", w.GetTerm(), w.GetIndex(), metaSuffix))
}

// create starts a log in an empty directory.
func (s *storage) create(id identity) (*recovered, error) {
	id.Format = dirFormat
	metadata, err := json.Marshal(id)
	if err != nil {
		return nil, err
	}
	// Before the log: a log without a watermark is one that lost it.
	if s.mark, err = openWatermark(s.dir, true); err != nil {
		return nil, fmt.Errorf("create watermark: %w", err)
	}
	if err := errors.Join(s.mark.write(watermark{}), fsx.SyncDir(s.dir)); err != nil {
		return nil, fmt.Errorf("create watermark: %w", err)
	}
	if s.wal, err = wal.Create(s.logger, s.path(walDir), metadata); err != nil {
		return nil, fmt.Errorf("create log: %w", err)
	}
	return &recovered{identity: id, log: raft.NewMemoryStorage(), state: store.NewState(), confState: &raftpb.ConfState{}}, nil
}

// recreate starts the log anew, of a member that has joined and is empty.
func (s *storage) recreate(id identity) (*recovered, error) {
	err := errors.Join(s.wal.Close(), s.mark.file.Close())
	if s.wal = nil; err != nil {
		return nil, err
	}
	if err := os.Rename(s.path(walDir), s.path(walDir)+".tmp"); err != nil { // which wal.Create deletes
		return nil, err
	}
	return s.create(id)
}

// empty says whether nothing has been saved yet: the first start did not get
// far, or the member has joined and not heard from a leader.
func (r *recovered) empty() bool {
	hs, _, err := r.log.InitialState()
	last, _ := r.log.LastIndex()
	return err == nil && raft.IsEmptyHardState(hs) && last == 0
}

// untouched says whether nothing has happened since bootstrap: not even a vote.
func (r *recovered) untouched() bool {
	hs, _, err := r.log.InitialState()
	last, _ := r.log.LastIndex()
	return err == nil && last == store.FirstIndex && hs.GetTerm() == store.FirstTerm && hs.GetVote() == raft.None
}

// bootstrap makes st the first state of a new cluster, as a snapshot. Every
// member writes the same one, which takes the place of the log entries that
// would add the members; so a member's addresses are never only in the log.
func (s *storage) bootstrap(r *recovered, st store.State) error {
	confState := &raftpb.ConfState{}
	for _, m := range st.SortedMembers() {
		confState.Voters = append(confState.Voters, m.ID)
	}
	first := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		ConfState: confState, Index: new(st.Index), Term: new(st.Term),
	}}
	hs := &raftpb.HardState{Term: new(st.Term), Commit: new(st.Index)}
	if err := s.writeSnapshot(first, &st); err != nil {
		return err
	}
	if err := s.commitSnapshot(first); err != nil {
		return err
	}
	if err := s.save(hs, nil); err != nil {
		return err
	}
	if err := s.sync(); err != nil {
		return err
	}
	if err := r.log.ApplySnapshot(first); err != nil {
		return err
	}
	r.state, r.confState = st, confState
	return r.log.SetHardState(hs)
}

// saveFirstState writes the body of what bootstrap will make the first state.
func (s *storage) saveFirstState(st *store.State) error {
	return s.writeSnapshot(&raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(st.Index), Term: new(st.Term)}}, st)
}

// load reads what the directory holds. It returns nil if it holds nothing yet.
func (s *storage) load() (*recovered, error) {
	if err := s.checkFinished(); err != nil {
		return nil, err
	}
	if !wal.Exist(s.path(walDir)) {
		if f, err := s.loadFounding(); err != nil || f != nil && f.Backup != "" { // it has its first state already
			return nil, err
		}
		return nil, s.checkUnused()
	}
	if err := s.removeTemporary(); err != nil {
		return nil, err
	}
	if err := s.checkLog(); err != nil {
		return nil, err
	}
	r := &recovered{log: raft.NewMemoryStorage(), state: store.NewState(), confState: &raftpb.ConfState{}}
	start, err := s.loadSnapshot(r)
	if err != nil {
		return nil, err
	}
	metadata, hs, ents, err := s.openLog(start)
	if err != nil {
		return nil, fmt.Errorf("read log %s from entry %d: %w%s", s.path(walDir), start.GetIndex(), err, adviceFor(err))
	}
	if err := json.Unmarshal(metadata, &r.identity); err != nil {
		return nil, fmt.Errorf("read log %s: metadata: %w", s.path(walDir), err)
	}
	if r.identity.Format != dirFormat {
		return nil, fmt.Errorf("data directory %s has format %d, this program knows %d: use the version that wrote it",
			s.dir, r.identity.Format, dirFormat)
	}
	// A process that was killed may have written what nobody synced. From here on
	// it counts as promised. Segments before the last were synced as that began.
	last, err := filepath.Glob(filepath.Join(s.path(walDir), "*.wal"))
	if err != nil || len(last) == 0 {
		return nil, fmt.Errorf("find the end of log %s: %w", s.path(walDir), cmp.Or(err, os.ErrNotExist))
	}
	if err := syncFile(last[len(last)-1]); err != nil {
		return nil, fmt.Errorf("sync log %s: %w", s.path(walDir), err)
	}
	if err := r.log.SetHardState(hs); err != nil {
		return nil, err
	}
	// Behind a snapshot that was received there may be the rest of a log that it
	// took the place of. Until other entries take its place there, each start
	// finds it, and each start leaves it out.
	ents = ents[:min(len(ents), int(max(s.reached.index, start.GetIndex())-start.GetIndex()))]
	if start.GetIndex() < s.reached.base {
		return nil, fmt.Errorf("log %s goes back to entry %d, but the newest snapshot that is usable is at entry %d: %s",
			s.path(walDir), s.reached.base+1, start.GetIndex(), adviceForDamage)
	}
	if err := r.log.Append(ents); err != nil {
		return nil, err
	}
	if last, _ := r.log.LastIndex(); hs.GetCommit() > last {
		return nil, fmt.Errorf("log %s ends at entry %d but %d entries were committed: %s",
			s.path(walDir), last, hs.GetCommit(), adviceForDamage)
	}
	return r, nil
}

// replay applies the whole log to the state, as far as it goes.
func (r *recovered) replay() error {
	st := &store.Store{State: r.state}
	last, err := r.log.LastIndex()
	if err != nil || last <= r.state.Index {
		return err
	}
	ents, err := r.log.Entries(r.state.Index+1, last+1, noLimit)
	if err != nil {
		return err
	}
	for _, e := range ents {
		if err := st.State.Follows(e.GetIndex()); err != nil {
			return fmt.Errorf("apply entry %d: %w", e.GetIndex(), err)
		}
		if err := applyEntry(st, e); err != nil {
			r.unreadable = fmt.Errorf("entry %d of term %d: %w", e.GetIndex(), e.GetTerm(), err)
			r.left = last - e.GetIndex() + 1
			break
		}
	}
	r.state = st.State
	return nil
}

// checkReadable refuses a log with an entry that this program cannot apply, whether
// or not it is committed: a leader could not get it to any follower.
func (r *recovered) checkReadable() error {
	last, err := r.log.LastIndex()
	if err != nil || last <= r.state.Index {
		return err
	}
	ents, err := r.log.Entries(r.state.Index+1, last+1, noLimit)
	if err != nil {
		return err
	}
	for _, e := range ents {
		if err := readable(e); err != nil {
			return errUnreadable(e, err)
		}
	}
	return nil
}

// readable says whether all of an entry is known, as applying it would find out. What
// is put into a log now is also checked for what is of use, see checkEntry.
func readable(e *raftpb.Entry) error {
	if e.GetType() == raftpb.EntryConfChange {
		_, _, _, err := decodeMemberChange(e)
		return err
	}
	if len(e.GetData()) == 0 {
		return nil
	}
	_, commands, err := store.DecodeBatch(e.GetData())
	if err != nil {
		return err
	}
	for d := (store.Fields{Data: commands}); len(d.Data) > 0; {
		if d.Command(false); d.Err != nil {
			return d.Err
		}
	}
	return nil
}

// applyEntry applies an entry that nobody waits for, outside of a replica.
func applyEntry(s *store.Store, e *raftpb.Entry) error {
	switch {
	case e.GetType() == raftpb.EntryConfChange:
		_, h, change, err := decodeMemberChange(e)
		if err != nil {
			return err
		}
		_, _, err = s.ApplyMember(e.GetIndex(), e.GetTerm(), h, change)
		return err
	case len(e.GetData()) == 0:
		return s.Skip(e.GetIndex(), e.GetTerm())
	default:
		h, commands, err := store.DecodeBatch(e.GetData())
		if err != nil {
			return err
		}
		_, err = s.Apply(e.GetIndex(), e.GetTerm(), h, commands, nil)
		return err
	}
}

const adviceForDamage = "acknowledged writes are missing here, and a member that forgets them could make the cluster lose them; " +
	"leave this directory alone, add a new member with another ID (curl -X POST -d PEER-URL http://NODE/NEW-ID) " +
	"and start it with that --id, an empty --data-dir and --join; " +
	"if no majority of the others is left, use raftrv recover on one of them or raftrv backup restore, and as the last resort raftrv recover --damaged here"

// adviceFor returns what to do about an error that may be damage. A file that
// cannot be opened at all is not damage.
func adviceFor(err error) string {
	if _, ok := errors.AsType[*os.PathError](err); ok {
		return ""
	}
	return ": " + adviceForDamage
}

// checkFinished refuses a directory that backup restore or recover has not
// completed: as what it is now it would be the empty member of a new cluster.
func (s *storage) checkFinished() error {
	path := s.path(unfinishedName)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return errors.Join(fmt.Errorf("%s says that this data directory was not completed: delete %s and run raftrv backup restore or raftrv recover again", path, s.dir), err)
	}
	return nil
}

// checkUnused refuses a directory that has no log but must have had one: to
// start it as a new one would forget all that the log held.
func (s *storage) checkUnused() error {
	var rest string
	names, err := fileutil.ReadDir(s.path(snapDir))
	if err != nil {
		return err
	}
	for _, name := range names {
		if _, ok := snapshotIndex(name); ok {
			rest = filepath.Join(s.path(snapDir), name)
		}
	}
	if mark, err := openWatermark(s.dir, false); err == nil {
		if mark.last != (watermark{}) { // a first start that did not get far leaves an empty one
			rest = s.path(watermarkName)
		}
		if err := mark.file.Close(); err != nil {
			return err
		}
	}
	if rest == "" {
		return nil
	}
	return fmt.Errorf("log %s is missing, although %s shows that there was one: %s", s.path(walDir), rest, adviceForDamage)
}

// checkLog refuses a log that is damaged, or shorter than it was.
func (s *storage) checkLog() error {
	var err error
	if s.mark, err = openWatermark(s.dir, false); err != nil {
		return fmt.Errorf("the watermark of %s is missing or damaged (%w): nobody can tell whether its log is whole; %s", s.dir, err, adviceForDamage)
	}
	end, err := scanLog(s.path(walDir), s.mark.last)
	if err != nil {
		return fmt.Errorf("read log %s: %w", s.path(walDir), err)
	}
	if !end.covers(s.mark.last) {
		return fmt.Errorf("log %s ends at byte %d with %v (%w), but it had reached %v: %s",
			end.path, end.offset, end.watermark, cmp.Or(end.err, io.EOF), s.mark.last, adviceForDamage)
	}
	// A record that breaks off behind the watermark is a write that a crash cut
	// short; openLog cuts it. Anything else is damage.
	if end.err != nil && !errors.Is(end.err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("log %s is damaged at byte %d (%w): %s", end.path, end.offset, end.err, adviceForDamage)
	}
	s.reached, s.marked = end.extent, s.mark.last
	s.reached.received = nil // the hard state never came
	if err := s.rewrite(end); err != nil {
		return fmt.Errorf("sync log %s: %w", s.path(walDir), err)
	}
	return nil
}

// rewrite makes durable what was read of the log.
//
// It need not be: what is read comes from the kernel's cache. After a process
// whose fsync has failed the pages are still there, clean, as if they had been
// written, and another fsync finds nothing to do and reports success: it proves
// nothing about them. A member that goes by what it reads would promise, with the
// next power cut, what is not on its disk. So the bytes are written again, which
// makes the pages dirty, and synced; then success means that they are there.
//
// That is enough for the last segment, and of it behind the watermark. The
// watermark was written after a sync up to there had succeeded, and a segment is
// begun after the one before was synced; a process ends with the first error.
// Snapshots have their record in the log only after their files were synced. These
// are synced once more, as are the names, for directories that were copied here.
func (s *storage) rewrite(end logEnd) error {
	segments, err := filepath.Glob(filepath.Join(s.path(walDir), "*.wal"))
	if err != nil {
		return err
	}
	for _, path := range segments {
		f, err := os.OpenFile(path, os.O_RDWR, fsx.FileMode)
		if err != nil {
			return err
		}
		if path == end.path {
			part := io.NewSectionReader(f, end.unproven, max(0, end.offset-end.unproven))
			_, err = io.Copy(io.NewOffsetWriter(f, end.unproven), part)
		}
		if err := errors.Join(err, fileutil.Fsync(f), f.Close()); err != nil {
			return err
		}
	}
	return errors.Join(fsx.SyncDir(s.path(walDir)), fsx.SyncDir(s.path(snapDir)), fsx.SyncDir(s.dir))
}

// loadSnapshot reads the newest usable snapshot that the log has a record of.
// It returns where the log must be read from.
func (s *storage) loadSnapshot(r *recovered) (*walpb.Snapshot, error) {
	// Only snapshots at or below the committed index: a crash may have come
	// between a received snapshot's record and the hard state that goes with it.
	valid, err := wal.ValidSnapshotEntries(s.logger, s.path(walDir))
	if err != nil {
		return nil, fmt.Errorf("read log %s: %w", s.path(walDir), err)
	}
	var damage error
	for i, w := range slices.Backward(valid) {
		if w.GetIndex() == 0 { // every log starts with this record
			continue
		}
		meta, st, err := s.readSnapshot(w)
		if errors.Is(err, errInterrupted) {
			return nil, err
		}
		if errors.Is(err, store.ErrSnapshotFormat) { // nothing is missing, and what follows an older one is as new
			return nil, err
		}
		if err != nil {
			damage = errors.Join(damage, err)
			continue
		}
		if damage != nil {
			s.logger.Warn("the newest snapshot is damaged, starting from an older one", zap.Error(damage))
		}
		if err := r.log.ApplySnapshot(meta); err != nil {
			return nil, err
		}
		if err := errors.Join(syncFile(s.metaPath(w)), syncFile(s.bodyPath(w.GetIndex()))); err != nil {
			return nil, err
		}
		r.state, r.confState = st, meta.GetMetadata().GetConfState()
		s.snapshots = valid[:i+1]
		return w, nil
	}
	if damage != nil {
		return nil, fmt.Errorf("no snapshot in %s is usable: %w: %s", s.path(snapDir), damage, adviceForDamage)
	}
	return &walpb.Snapshot{}, nil
}

func (s *storage) readSnapshot(w *walpb.Snapshot) (*raftpb.Snapshot, store.State, error) {
	path := s.metaPath(w)
	meta, err := snap.Read(s.logger, path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, store.State{}, err
	}
	if err != nil { // it has one checksum, over all of it
		return nil, store.State{}, fmt.Errorf("%s, at byte 0: %w", path, err)
	}
	if m := meta.GetMetadata(); m.GetIndex() != w.GetIndex() || m.GetTerm() != w.GetTerm() {
		return nil, store.State{}, fmt.Errorf("%s: %w: it is of index %d, term %d", path, store.ErrSnapshotDamage, m.GetIndex(), m.GetTerm())
	}
	st, err := s.readBody(w.GetIndex(), w.GetTerm())
	return meta, st, err
}

// readBody reads the body of a snapshot, which must be at index and term.
func (s *storage) readBody(index, term uint64) (store.State, error) {
	f, err := os.Open(s.bodyPath(index))
	if err != nil {
		return store.State{}, err
	}
	defer f.Close()
	return s.readStateOf(f, index, term)
}

func (s *storage) readStateOf(f *os.File, index, term uint64) (store.State, error) {
	st, err := store.ReadState(interruptible{f, s})
	if err != nil {
		return store.State{}, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if st.Index != index || st.Term != term {
		return store.State{}, fmt.Errorf("%s: %w: it holds index %d, term %d", f.Name(), store.ErrSnapshotDamage, st.Index, st.Term)
	}
	return st, nil
}

// openLog opens the log for appending and returns what it holds after start.
func (s *storage) openLog(start *walpb.Snapshot) (metadata []byte, hs *raftpb.HardState, ents []*raftpb.Entry, err error) {
	for repaired := false; ; repaired = true {
		w, err := wal.Open(s.logger, s.path(walDir), start)
		if err != nil {
			return nil, nil, nil, err
		}
		metadata, hs, ents, err = w.ReadAll()
		if err == nil {
			s.wal = w
			return metadata, hs, ents, nil
		}
		if cerr := w.Close(); cerr != nil {
			s.logger.Debug("close unreadable log", zap.Error(cerr))
		}
		// A record that breaks off at the end of the log is a write that a crash
		// cut short. Nobody was told that it succeeded, so it can go.
		if repaired || !errors.Is(err, io.ErrUnexpectedEOF) || !wal.Repair(s.logger, s.path(walDir)) {
			return nil, nil, nil, err
		}
	}
}

func (s *storage) removeTemporary() error {
	entries, err := os.ReadDir(s.path(snapDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if err := os.Remove(filepath.Join(s.path(snapDir), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *storage) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if len(ents) > 0 {
		// Of several entries a crash may leave the first ones.
		if err := s.goBack(watermark{term: ents[0].GetTerm(), index: ents[0].GetIndex()}); err != nil {
			return err
		}
	}
	if err := s.wal.Save(hs, ents); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// A hard state in which only the commit index moved is not synced by itself.
	if s.reached.received != nil {
		if err := s.wal.Sync(); err != nil {
			return err
		}
	}
	for _, e := range ents {
		s.reached.entry(e.GetIndex(), e.GetTerm())
	}
	if !raft.IsEmptyHardState(hs) {
		s.reached.hardState(hs)
	}
	return nil
}

// goBack makes the watermark say no more than to, if the end of the log is to
// become that: the log may end there before the watermark is written again.
func (s *storage) goBack(to watermark) error {
	if !s.proven { // the disk may have another watermark than the one that was read
		s.marking.Lock()
		s.mark.last = watermark{} // so that it is written even if it is the same
		s.marking.Unlock()
		if err := s.writeMark(); err != nil {
			return err
		}
		s.proven = true
	}
	s.mu.Lock()
	to.vote, to.voted = s.marked.vote, s.marked.voted // these never go back
	back := !to.covers(s.marked)
	s.mu.Unlock()
	if !back {
		return nil
	}
	s.marking.Lock() // one that is on its way may say more
	defer s.marking.Unlock()
	s.mu.Lock()
	to.vote, to.voted = s.marked.vote, s.marked.voted
	s.marked, s.reached.term, s.reached.index = to, to.term, to.index
	s.mu.Unlock()
	return s.mark.write(to)
}

// writeMark writes down how far the log is on disk.
func (s *storage) writeMark() error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	s.marked = s.reached.watermark
	s.mu.Unlock()
	return s.mark.write(s.marked)
}

func (s *storage) sync() error {
	s.mu.Lock() // wal.Sync takes no lock of its own, and purge shrinks what it reads
	defer s.mu.Unlock()
	return s.wal.Sync()
}

func (s *storage) writeSnapshot(meta *raftpb.Snapshot, st *store.State) error {
	// The log comes first: without space for it the member cannot go on.
	if err := s.hasRoom(st.SnapshotSize()); err != nil {
		return err
	}
	err := s.writeBody(meta, st)
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w for a snapshot: %w", errNoSpace, err) // nothing of it is left
	}
	return err
}

// hasRoom says whether the disk has room for so many bytes of a snapshot, and for
// the log too.
func (s *storage) hasRoom(size uint64) error {
	free, err := s.free()
	if err != nil {
		return err
	}
	if free < size+floorSegments*segmentBytes() {
		return fmt.Errorf("%w for a snapshot: %d bytes are free", errNoSpace, free)
	}
	return nil
}

func (s *storage) writeBody(meta *raftpb.Snapshot, st *store.State) error {
	return s.writeFile(s.bodyPath(meta.GetMetadata().GetIndex()), func(f *os.File) error {
		return st.Encode(&syncingWriter{storage: s, file: f, rests: true})
	})
}

// receive saves the body of a snapshot that another member sent, and returns the
// state in it. A body that is damaged gets no name.
func (s *storage) receive(body io.Reader, index, term uint64) (st store.State, err error) {
	err = s.writeFile(s.bodyPath(index), func(f *os.File) error {
		// Without rests: who receives a snapshot serves nobody. In pieces, whatever body could do.
		if _, err := io.Copy(&syncingWriter{storage: s, file: f}, struct{ io.Reader }{body}); err != nil {
			return err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		st, err = s.readStateOf(f, index, term)
		return err
	})
	return st, err
}

// writeFile makes a file of what write writes, all of it or nothing.
func (s *storage) writeFile(path string, write func(*os.File) error) error {
	f, err := os.CreateTemp(s.path(snapDir), tempPrefix)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // fails after the rename
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return fsx.SyncDir(s.path(snapDir))
}

// syncEvery is how much of a large file is written between two syncs. A sync of
// a gigabyte would hold up those of the log for seconds, and with them the
// heartbeats.
const syncEvery = 1 << 20 // bytes

// restMax bounds the pause after each piece, which is as long as the piece took.
const restMax = 50 * time.Millisecond

// syncingWriter writes a file in pieces that are synced. Between two of them it
// may leave the disk and the processor to the log and to requests.
type syncingWriter struct {
	storage  *storage
	file     *os.File
	rests    bool      // between two pieces
	began    time.Time // of this piece
	unsynced int
}

func (w *syncingWriter) Write(p []byte) (int, error) {
	if err := w.storage.goOn(); err != nil {
		return 0, err
	}
	if w.unsynced == 0 {
		w.began = time.Now()
	}
	n, err := w.file.Write(p)
	if w.unsynced += n; err == nil && w.unsynced >= syncEvery {
		w.unsynced = 0
		err = errors.Join(fileutil.Fdatasync(w.file), w.storage.hasRoom(0)) // others write, too
		if w.rests {
			select {
			case <-time.After(min(time.Since(w.began), restMax)):
			case <-w.storage.interrupted:
			}
		}
	}
	return n, err
}

// syncFile makes what is in a file durable, whoever wrote it. It is a variable,
// like syncDir, so that tests know what a power cut takes.
var syncFile = func(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(fileutil.Fdatasync(f), f.Close())
}

func (s *storage) commitSnapshot(meta *raftpb.Snapshot) error {
	m := meta.GetMetadata()
	record := &walpb.Snapshot{Index: new(m.GetIndex()), Term: new(m.GetTerm()), ConfState: m.GetConfState()}
	s.mu.Lock()
	received := !s.reached.leadsTo(m.GetIndex(), m.GetTerm())
	s.mu.Unlock()
	if received {
		if err := s.goBack(watermark{term: m.GetTerm(), index: m.GetIndex()}); err != nil {
			return err
		}
	}
	if err := s.snap.SaveSnap(meta); err != nil {
		return err
	}
	if err := os.Chmod(s.metaPath(record), fsx.FileMode); err != nil { // SaveSnap leaves it to the umask
		return err
	}
	if err := fsx.SyncDir(s.path(snapDir)); err != nil {
		return err
	}
	if err := s.wal.SaveSnapshot(record); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshots = append(s.snapshots, record)
	s.reached.snapshot(record)
	return nil
}

// purge deletes snapshots beyond the newest two, and the segments of the log
// that neither of them needs.
func (s *storage) purge() error {
	oldest, err := s.release()
	if err != nil || oldest == 0 {
		return err
	}
	return errors.Join(s.purgeLog(), s.purgeSnapshots(oldest))
}

// release forgets old snapshots, gives up the locks of the segments before
// them, and returns the index of the oldest snapshot that is kept.
func (s *storage) release() (oldest uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if extra := len(s.snapshots) - snapshotsKept; extra > 0 {
		s.snapshots = slices.Clone(s.snapshots[extra:])
	}
	if len(s.snapshots) == 0 {
		return 0, nil
	}
	oldest = s.snapshots[0].GetIndex()
	s.reached.forget(oldest)
	return oldest, s.wal.ReleaseLockTo(oldest)
}

// purgeLog deletes the segments whose lock the log has given up.
func (s *storage) purgeLog() error {
	names, err := fileutil.ReadDir(s.path(walDir), fileutil.WithExt(".wal"))
	if err != nil {
		return err
	}
	for _, name := range names[:max(len(names)-1, 0)] {
		if err := s.goOn(); err != nil {
			return err
		}
		path := filepath.Join(s.path(walDir), name)
		l, err := fileutil.TryLockFile(path, os.O_WRONLY, fsx.FileMode)
		if errors.Is(err, fileutil.ErrLocked) {
			return nil // this one and all after it are in use
		}
		if err != nil {
			return err
		}
		if err := errors.Join(os.Remove(path), l.Close()); err != nil {
			return err
		}
	}
	return nil
}

func (s *storage) purgeSnapshots(oldest uint64) error {
	names, err := fileutil.ReadDir(s.path(snapDir))
	if err != nil {
		return err
	}
	for _, name := range names {
		index, ok := snapshotIndex(name)
		if !ok || index >= oldest {
			continue
		}
		if err := s.goOn(); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(s.path(snapDir), name)); err != nil {
			return err
		}
	}
	return nil
}

// snapshotIndex returns the raft index in a snapshot file's name.
func snapshotIndex(name string) (index uint64, ok bool) {
	digits, ok := strings.CutSuffix(name, bodySuffix)
	if meta, isMeta := strings.CutSuffix(name, metaSuffix); isMeta {
		_, digits, ok = strings.Cut(meta, "-") // after the term
	}
	index, err := strconv.ParseUint(digits, 16, 64)
	return index, ok && err == nil && len(digits) == 16
}

// close makes the log durable and gives up the directory.
func (s *storage) close() error {
	var err error
	if s.wal != nil {
		// First the log, which syncs it, then the watermark. After an error of the
		// log nobody knows what it holds, and the last watermark stands.
		if err = s.wal.Close(); err == nil {
			err = s.writeMark()
		}
	}
	if s.mark != nil {
		err = errors.Join(err, s.mark.file.Close())
	}
	return errors.Join(err, s.lock.Close())
}

// checkPrivateDir refuses a data directory that is not this user's, or that others
// can write to, and anything in it that was put there by others or leads
// elsewhere. The directory itself may be behind a link: who named it knows.
func checkPrivateDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if err := fsx.CheckOwner(dir, info, fsx.OthersWrite); err != nil {
		return fmt.Errorf("data directory %w; or choose a --data-dir inside of it, which the node makes by itself", err)
	}
	for _, part := range []string{"", walDir, snapDir} {
		part = filepath.Join(dir, part)
		names, err := os.ReadDir(part)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if part == filepath.Clean(dir) && !isOurs(name.Name()) {
				continue // lost+found, say
			}
			if err := fsx.CheckPrivate(filepath.Join(part, name.Name())); err != nil {
				return fmt.Errorf("data directory %s: %w", dir, err)
			}
		}
	}
	return nil
}

// isOurs says whether a node uses this name in its data directory.
func isOurs(name string) bool {
	name = strings.TrimSuffix(name, ".tmp")
	return slices.Contains([]string{lockName, unfinishedName, foundingName, divergedName, watermarkName, secretName, watch.JournalPositionName, walDir, snapDir}, name)
}
