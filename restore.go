package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
)

// This file makes data directories of new clusters: from a backup, or from what
// a member of a cluster that has lost its majority still has.
//
// The new cluster has another number than the old one, so their nodes do not
// talk to each other if old ones come back.

// restoreBackup makes the data directory of one member of a new cluster, which
// will be founded by all of them together, see founding.go. Its versions are above
// another one, too.
func restoreBackup(cfg config, b *store.BackupFile, above uint64, logger *zap.Logger) error {
	b.State.Begin(cfg.members, nil)
	f := newFounding(&cfg)
	f.Backup = b.Digest
	if above != 0 {
		if err := b.State.GoAbove(above); err != nil {
			return err
		}
		f.Backup += fmt.Sprintf(" --versions-above %d", above) // the same at all nodes
	}
	return makeDirectory(cfg.dataDir, logger, func(s *storage) error {
		if err := s.saveFirstState(&b.State); err != nil {
			return err
		}
		return s.saveFounding(f)
	})
}

// makeDirectory makes a data directory that holds a first state.
func makeDirectory(dir string, logger *zap.Logger, fill func(*storage) error) (err error) {
	if err := checkEmpty(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, fsx.DirMode); err != nil {
		return err
	}
	if err := checkPrivateDir(dir); err != nil {
		return err
	}
	unfinished := filepath.Join(dir, unfinishedName)
	if err := os.WriteFile(unfinished, nil, fsx.FileMode); err != nil {
		return err
	}
	if err := fsx.SyncDir(dir); err != nil {
		return err
	}
	if err := fillDirectory(dir, logger, fill); err != nil {
		return fmt.Errorf("make data directory %s: %w; delete it before you try again", dir, err)
	}
	return errors.Join(os.Remove(unfinished), fsx.SyncDir(dir), fsx.SyncDir(filepath.Dir(filepath.Clean(dir))))
}

func fillDirectory(dir string, logger *zap.Logger, fill func(*storage) error) (err error) {
	s, err := openStorage(dir, logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	return fill(s)
}

func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case len(entries) > 0:
		return fmt.Errorf("directory %s is not empty (it has %s): choose another --data-dir, or move that one away", dir, entries[0].Name())
	}
	return nil
}

// recovery is what came of recover.
type recovery struct {
	old, made identity
	self      store.Member
	lost      []store.Member // the other members of the old cluster
	index     uint64         // of the last entry in the log
	term      uint64         // and its term
	commit    uint64         // as far as this member knew
	newest    time.Time
	before    uint64 // resource version of the old cluster, as far as this member knew
	after     uint64
	damage    error // that was passed over

	unreadable error  // why some entries of the log were left behind
	left       uint64 // how many
}

// recoverDirectory makes a cluster of one member from what the data directory of
// a survivor holds, in a directory of its own. The survivor gets another number
// if id is not 0.
//
// All entries of the log count, those too of which this member did not know that
// they were committed: it may have acknowledged them. What nobody was told the
// outcome of may thereby happen, which it may at any time.
//
// It ends before an entry that it cannot apply, which ended the node.
//
// Of a directory that is refused as damaged it takes what can be read, if
// anyway is set, and then it takes one whose state was found wrong, too.
func recoverDirectory(from, to string, id, above uint64, anyway bool, logger *zap.Logger) (*recovery, error) {
	if _, err := os.Stat(from); err != nil {
		return nil, err
	}
	if err := checkEmpty(to); err != nil {
		return nil, err
	}
	if note := filepath.Join(from, divergedName); !anyway {
		if _, err := os.Stat(note); !errors.Is(err, os.ErrNotExist) {
			return nil, errors.Join(fmt.Errorf("%s says that the state in this directory is not that of the majority: recover from another node, "+
				"or with --damaged if there is none", note), err)
		}
	}
	var damage error
	rec, err := readDirectory(from, logger)
	if err != nil && anyway && !fsx.IsNotPrivate(err) {
		damage = err
		rec, err = readWhatIsLeft(from, to, logger)
	}
	if err != nil {
		return nil, errors.Join(damage, err)
	}
	st := &rec.state
	self, ok := st.Members[rec.identity.Member]
	switch {
	case st.Removed[rec.identity.Member]:
		return nil, fmt.Errorf("node %d was removed from its cluster: recover from a node that is a member", rec.identity.Member)
	case !ok:
		return nil, fmt.Errorf("%s holds no state yet: recover from another node", from)
	}
	r := &recovery{old: rec.identity, index: st.Index, term: st.Term, before: st.RV, newest: time.UnixMilli(st.Now).UTC(), damage: damage,
		unreadable: rec.unreadable, left: rec.left}
	hs, _, err := rec.log.InitialState()
	if err != nil {
		return nil, err
	}
	r.commit = hs.GetCommit()
	delete(st.Members, self.ID)
	r.lost = st.SortedMembers()
	// No ID of the old cluster may come back: who had it would be taken for
	// somebody else by programs that remember.
	removed := slices.Collect(maps.Keys(st.Removed))
	for _, m := range r.lost {
		removed = append(removed, m.ID)
	}
	if id != 0 && id != self.ID {
		removed = append(removed, self.ID)
		if self.ID = id; slices.Contains(removed, id) {
			return nil, fmt.Errorf("--id %d: there was a member with this ID, and an ID is never used again: take another one", id)
		}
	}
	r.self = store.Member{ID: self.ID, Name: self.Name, PeerURL: self.PeerURL}
	st.Begin([]store.Member{r.self}, removed)
	if err := st.GoAbove(above); err != nil {
		return nil, err
	}
	r.after = st.RV
	r.made = identity{Member: self.ID, Cluster: cmp.Or(randomID(), 1), Directory: randomID(), Recovered: true}
	return r, makeDirectory(to, logger, func(s *storage) error {
		made, err := s.create(r.made)
		if err != nil {
			return err
		}
		return s.bootstrap(made, *st)
	})
}

// readDirectory reads a data directory and applies the whole log.
func readDirectory(dir string, logger *zap.Logger) (rec *recovered, err error) {
	s, err := openStorage(dir, logger)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if rec, err = s.load(); err != nil {
		return nil, err
	}
	if rec == nil || rec.empty() {
		return nil, fmt.Errorf("%s holds no state yet: recover from another node", dir)
	}
	return rec, rec.replay()
}

// readWhatIsLeft reads a damaged data directory as far as that goes: a copy of
// it, next to the directory to make, of which the log is cut where it ends.
func readWhatIsLeft(from, to string, logger *zap.Logger) (rec *recovered, err error) {
	part, err := os.MkdirTemp(filepath.Dir(filepath.Clean(to)), "raftrv-reading-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(part)) }()
	if err := os.CopyFS(part, os.DirFS(from)); err != nil {
		return nil, err
	}
	if err := cutLog(filepath.Join(part, walDir)); err != nil {
		return nil, err
	}
	mark := filepath.Join(part, watermarkName)
	if err := os.Remove(mark); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	w, err := openWatermark(part, true)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(w.write(watermark{}), w.file.Close()); err != nil {
		return nil, err
	}
	return readDirectory(part, logger)
}
