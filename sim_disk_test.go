package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
)

// diskConfig says how slow a disk is.
type diskConfig struct {
	syncMin, syncMax time.Duration // of a sync
	slow             float64       // probability that it takes
	slowMax          time.Duration // up to this
	background       time.Duration // mean delay of work beside the loop, and again of noticing its end
}

// simDisk is the product's storage on a real directory, with time, crashes and
// errors. It implements disk.
//
// What a power cut leaves: etcd's log buffers what need not be synced, so between
// two calls the file holds exactly what was synced. Of what the present call
// writes, and of the buffer, any sectors may have reached the disk; a sector is
// never half old and half new. Names in the directory of snapshots are there only
// if the directory was synced since.
//
// What a killed process leaves is all that it wrote. The next one reads it, but
// until somebody syncs it the next power cut takes it.
type simDisk struct {
	*storage
	process  *process
	state    *raftpb.HardState        // the last one saved
	log      logShadow                // what the log holds
	arrived  *raftpb.SnapshotMetadata // of a snapshot that counts once the hard state that goes with it is there
	inFlight func() error             // the write that a turn waits for
	failed   *image                   // what was on disk before a call failed on its way
	broken   bool                     // a call has failed
	closed   bool
}

// tail says what becomes of bytes that were written and not yet synced.
type tail int

const (
	tailLost  tail = iota // a power cut
	tailTorn              // a power cut that leaves any of their sectors
	tailKept              // the process was killed
	tailClean             // it has closed its files
)

const sectorSize = 512

// image is the end of the log, and the watermark, as they are on disk.
type image struct {
	path    string // of the last segment
	content []byte
	mark    []byte
}

func (d *simDisk) image() (image, error) {
	paths, err := filepath.Glob(filepath.Join(d.path(walDir), "*.wal"))
	if err != nil || len(paths) == 0 {
		return image{}, err
	}
	last := paths[len(paths)-1]
	content, err := os.ReadFile(last)
	if err != nil {
		return image{}, err
	}
	mark, err := os.ReadFile(d.path(watermarkName))
	return image{path: last, content: content, mark: mark}, err
}

// crash leaves the directory as the end of the process does.
func (d *simDisk) crash(t tail) {
	if d.closed {
		return
	}
	before, err := d.image()
	if d.failed != nil {
		before = *d.failed
	}
	if err == nil && d.inFlight != nil && t != tailClean {
		err = d.inFlight()
	}
	if err == nil {
		err = d.leave(before, t)
	}
	if err != nil {
		d.process.sim.check.violate("simulator", "crash of node %d: %v", d.process.node.id, err)
	}
}

// leave closes the files, which writes what is still buffered, and then takes
// back what t says of all that was written since before.
func (d *simDisk) leave(before image, t tail) error {
	n := d.process.node
	d.closed = true
	if err := d.storage.close(); err != nil && !d.broken { // a log that has failed may fail again
		return err
	}
	switch {
	case before.path == "":
		return nil
	case t == tailClean && d.broken:
		n.volatile = cmp.Or(n.volatile, &before)
		return nil
	case t == tailClean:
		n.volatile = nil
		return nil
	}
	after, err := d.image()
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.path(watermarkName), before.mark, fsx.FileMode); err != nil {
		return err
	}
	if t == tailKept {
		if after.path != before.path { // to begin a segment syncs it and the one before
			n.volatile = nil
		} else {
			n.volatile = cmp.Or(n.volatile, &before)
		}
		return nil
	}
	if err := d.dropNames(t); err != nil {
		return err
	}
	if v := n.volatile; v != nil && v.path == before.path {
		before.content = v.content
	}
	n.volatile = nil
	if after.path != before.path {
		// A new segment was begun, after the old one was complete and synced.
		if t == tailTorn && d.process.sim.chance(0.5) {
			return nil
		}
		if err := os.Remove(after.path); err != nil {
			return err
		}
		if after.content, err = os.ReadFile(before.path); err != nil {
			return err
		}
	}
	content := before.content
	if t == tailTorn {
		content = d.tear(before.content, after.content)
	}
	return os.WriteFile(before.path, content, fsx.FileMode)
}

// dropNames takes the names in the directory of snapshots that are not durable.
func (d *simDisk) dropNames(t tail) error {
	n := d.process.node
	names, err := fileutil.ReadDir(d.path(snapDir))
	if err != nil {
		return err
	}
	for _, name := range names {
		if _, ok := snapshotIndex(name); !ok || n.names[name] || t == tailTorn && n.sim.chance(0.5) {
			continue
		}
		if err := os.Remove(filepath.Join(d.path(snapDir), name)); err != nil {
			return err
		}
		n.sim.check.reached["name lost"]++
	}
	return nil
}

// syncDir takes the place of the product's: it notes which names are durable.
func (s *sim) syncDir(path string) error {
	if s.plant != nil && s.plant.noDirSync {
		return nil
	}
	for _, n := range s.nodes {
		if path != filepath.Join(n.dir, snapDir) {
			continue
		}
		if p := n.process; p != nil && p.disk.springs(inDirSync) && p.trap.fault == errDisk {
			return p.disk.spring()
		}
		names, err := fileutil.ReadDir(path)
		if err != nil {
			return err
		}
		n.names = map[string]bool{}
		for _, name := range names {
			n.names[name] = true
		}
	}
	return nil
}

// syncFile takes the place of the product's: what a process reads when it starts
// is on disk from then on.
func (s *sim) syncFile(path string) error {
	if s.plant != nil && s.plant.noStartSync {
		return nil
	}
	for _, n := range s.nodes {
		if filepath.Dir(path) == filepath.Join(n.dir, walDir) {
			n.volatile, n.resynced = nil, true
		}
	}
	return nil
}

// tear returns before with some of the sectors of after.
func (d *simDisk) tear(before, after []byte) []byte {
	torn := append([]byte(nil), before...)
	for i := 0; i < min(len(before), len(after)); i += sectorSize {
		end := min(i+sectorSize, len(before), len(after))
		if string(before[i:end]) != string(after[i:end]) && d.process.sim.chance(0.5) {
			copy(torn[i:end], after[i:end])
		}
	}
	return torn
}

// write carries out a write to the log, if nothing goes wrong at point. If it
// does, part of the write has happened.
func (d *simDisk) write(point string, synced bool, do func() error) error {
	if err := d.usable(); err != nil {
		return err
	}
	p := d.process
	if synced {
		d.inFlight = do
		p.waitOutside(p.sim.syncTime())
		if err := d.usable(); err != nil {
			return err
		}
		d.inFlight = nil
	}
	if !d.springs(point) {
		return do()
	}
	before, err := d.image()
	if err != nil {
		return err
	}
	if p.trap.fault == errDisk && p.sim.chance(0.7) {
		return d.failInside(before, point, do)
	}
	if err := do(); err != nil {
		return err
	}
	if p.trap.tail != tailLost { // before the log goes back, the watermark does, and is synced
		if before.mark, err = os.ReadFile(d.path(watermarkName)); err != nil {
			return err
		}
	}
	if err := d.leave(before, p.trap.tail); err != nil {
		return err
	}
	return d.spring()
}

// failInside lets a write fail on its way, as on a disk that is full: some whole
// sectors of it are on disk, and the product has to deal with what the call has
// left behind.
func (d *simDisk) failInside(before image, point string, do func() error) error {
	room := (len(bytes.TrimRight(before.content, "\x00")) + d.process.sim.rand.IntN(4*sectorSize)) / sectorSize * sectorSize
	if point == inMark {
		room = d.process.sim.rand.IntN(2 * watermarkSlot)
	}
	return d.limit(room, &before, do)
}

// limit carries out a call while no file may grow beyond some size. If it fails
// the disk has failed.
func (d *simDisk) limit(room int, before *image, do func() error) error {
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		return err
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: uint64(room), Max: old.Max}); err != nil {
		return err
	}
	err := do()
	if reset := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); reset != nil {
		return reset
	}
	if err == nil {
		return nil // it needed less: the trap waits for the next call
	}
	d.failed = before
	_ = d.spring() // counts
	return fmt.Errorf("%w: %w", errDisk, err)
}

func (d *simDisk) usable() error {
	switch {
	case d.process.dead:
		return errCrashed
	case d.broken:
		return errDisk
	}
	return nil
}

// springs says whether something goes wrong at point.
func (d *simDisk) springs(point string) bool {
	return d.process.trap.point == point && !d.process.dead && !d.broken
}

// spring makes it happen.
func (d *simDisk) spring() error {
	p := d.process
	p.sim.check.reached[p.trap.point]++
	if p.trap.fault == errCrashed {
		p.die(p.trap.tail)
	} else {
		d.broken = true
		p.sim.check.diskErrors++
	}
	return p.trap.fault
}

// syncTime draws how long a sync takes.
func (s *sim) syncTime() time.Duration {
	d := s.between(s.disk.syncMin, s.disk.syncMax)
	if s.chance(s.disk.slow) {
		d += s.between(0, s.disk.slowMax)
	}
	return d
}

// synced notes that all that the log holds is on disk.
func (d *simDisk) synced() {
	d.process.node.durable, d.process.node.volatile = d.log, nil
}

func (d *simDisk) save(hs *raftpb.HardState, ents []*raftpb.Entry) (err error) {
	synced := len(ents) > 0
	defer func(arrived bool) {
		if arrived && err == nil {
			d.synced() // storage syncs the hard state that goes with a snapshot
		}
	}(d.arrived != nil)
	if !raft.IsEmptyHardState(hs) {
		before := d.state
		if before == nil {
			before = &raftpb.HardState{}
		}
		synced = raft.MustSync(hs, before, len(ents))
		d.state = hs
	}
	d.process.sim.check.stamped(d.process, ents)
	d.process.node.saving = ents
	if err := d.write(inSave, synced, func() error { return d.storage.save(hs, ents) }); err != nil {
		return err
	}
	if d.arrived != nil {
		d.log.snapshot(d.arrived)
		d.arrived = nil
	}
	d.process.node.saving = nil
	d.log.save(hs, ents)
	if synced {
		d.synced()
	}
	return nil
}

func (d *simDisk) sync() error {
	if err := d.write(inSync, true, d.storage.sync); err != nil {
		return err
	}
	d.synced()
	return nil
}

func (d *simDisk) writeMark() error {
	return d.write(inMark, false, d.storage.writeMark)
}

func (d *simDisk) writeSnapshot(meta *raftpb.Snapshot, st *store.State) error {
	if d.springs(inSnapshotBody) {
		if d.process.trap.fault == errCrashed {
			if err := d.writePart(st); err != nil {
				return err
			}
			return d.spring()
		}
		return d.limit(d.process.sim.rand.IntN(200), nil, func() error { return d.storage.writeSnapshot(meta, st) })
	}
	if err := d.usable(); err != nil {
		return err
	}
	if d.process.node.full {
		return errNoSpace
	}
	if err := d.storage.writeSnapshot(meta, st); err != nil {
		return err
	}
	body, err := os.ReadFile(d.bodyPath(st.Index))
	if err == nil {
		d.process.sim.check.body(d.process, st.Index, body)
	}
	return err
}

// writePart writes a temporary file that breaks off.
func (d *simDisk) writePart(st *store.State) error {
	f, err := os.CreateTemp(d.path(snapDir), tempPrefix)
	if err != nil {
		return err
	}
	var body bytes.Buffer
	if err := st.Encode(&body); err != nil {
		return err
	}
	_, err = f.Write(body.Bytes()[:d.process.sim.rand.IntN(body.Len())])
	return errors.Join(err, f.Close())
}

func (d *simDisk) commitSnapshot(meta *raftpb.Snapshot) error {
	switch {
	case d.springs(beforeSnapshotMeta):
		return d.spring()
	case d.springs(afterSnapshotMeta):
		if err := d.snap.SaveSnap(meta); err != nil {
			return err
		}
		return d.spring()
	case d.springs(inSnapshotMeta):
		if err := d.limit(d.process.sim.rand.IntN(32), nil, func() error { return d.snap.SaveSnap(meta) }); err != nil {
			return err
		}
	}
	if err := d.write(inSnapshotRecord, true, func() error { return d.storage.commitSnapshot(meta) }); err != nil {
		return err
	}
	if m := meta.GetMetadata(); d.log.fits(m) {
		d.log.snapshot(m)
		d.synced()
	} else {
		d.arrived = m
	}
	return nil
}

func (d *simDisk) purge() error {
	if d.springs(inPurge) {
		if _, err := d.release(); err != nil {
			return err
		}
		if err := d.purgeLog(); err != nil {
			return err
		}
		return d.spring()
	}
	if err := d.usable(); err != nil {
		return err
	}
	return d.storage.purge()
}

// receiveBody puts a snapshot's body in place as rafthttp does: beside the
// loop, and not a second time.
func (d *simDisk) receiveBody(index uint64, body []byte) error {
	path := d.bodyPath(index)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	d.process.sim.check.body(d.process, index, body)
	temp := filepath.Join(d.path(snapDir), fmt.Sprintf("%s-%016x", tempPrefix, index))
	if err := os.WriteFile(temp, body, fsx.FileMode); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
