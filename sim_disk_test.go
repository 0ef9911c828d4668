package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
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
// What a crash leaves: etcd's log buffers what need not be synced, so between
// two calls the file holds exactly what was synced. Of what the last call
// wrote, and of the buffer, any sectors may have reached the disk; a sector is
// never half old and half new. File names are as durable as their directory.
type simDisk struct {
	*storage
	process *process
	state   *raftpb.HardState // the last one saved
	broken  bool              // a call has failed
	closed  bool
}

// tail says what becomes of bytes that were written and not yet synced.
type tail int

const (
	tailLost tail = iota
	tailTorn      // any of their sectors are lost
	tailKept
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

// crash leaves the directory as a power cut does.
func (d *simDisk) crash(t tail) {
	if d.closed {
		return
	}
	before, err := d.image()
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
	d.closed = true
	if err := d.storage.close(); err != nil || before.path == "" || t == tailKept {
		return err
	}
	after, err := d.image()
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.path(watermarkName), before.mark, fileMode); err != nil {
		return err
	}
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
	return os.WriteFile(before.path, content, fileMode)
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
func (d *simDisk) write(point string, do func() error) error {
	if err := d.usable(); err != nil {
		return err
	}
	p := d.process
	if p.trap.point != point {
		return do()
	}
	before, err := d.image()
	if err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	if err := d.leave(before, p.trap.tail); err != nil {
		return err
	}
	return d.spring()
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

// spend lets the turn wait for the disk.
func (d *simDisk) spend() {
	s := d.process.sim
	if s.chance(s.disk.slow) {
		d.process.spent += s.between(0, s.disk.slowMax)
	}
	d.process.spent += s.between(s.disk.syncMin, s.disk.syncMax)
}

func (d *simDisk) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	synced := len(ents) > 0
	if !raft.IsEmptyHardState(hs) {
		before := d.state
		if before == nil {
			before = &raftpb.HardState{}
		}
		synced = raft.MustSync(hs, before, len(ents))
		d.state = hs
	}
	if synced {
		d.spend()
	}
	return d.write(inSave, func() error { return d.storage.save(hs, ents) })
}

func (d *simDisk) sync() error {
	d.spend()
	return d.write(inSync, d.storage.sync)
}

func (d *simDisk) writeMark() error {
	return d.write(inMark, d.storage.writeMark)
}

func (d *simDisk) writeSnapshot(meta *raftpb.Snapshot, st *state) error {
	if d.springs(inSnapshotBody) {
		if err := d.writePart(st); err != nil {
			return err
		}
		return d.spring()
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
	body, err := os.ReadFile(d.bodyPath(st.index))
	if err == nil {
		d.process.sim.check.body(d.process, st.index, body)
	}
	return err
}

// writePart writes a temporary file that breaks off.
func (d *simDisk) writePart(st *state) error {
	f, err := os.CreateTemp(d.path(snapDir), tempPrefix)
	if err != nil {
		return err
	}
	var body strings.Builder
	if err := st.writeTo(&body); err != nil {
		return err
	}
	_, err = f.WriteString(body.String()[:d.process.sim.rand.IntN(body.Len())])
	return errors.Join(err, f.Close())
}

func (d *simDisk) commitSnapshot(meta *raftpb.Snapshot) error {
	d.spend()
	if d.springs(beforeSnapshotMeta) {
		return d.spring()
	}
	if d.springs(afterSnapshotMeta) {
		if err := d.snap.SaveSnap(meta); err != nil {
			return err
		}
		return d.spring()
	}
	return d.write(inSnapshotRecord, func() error { return d.storage.commitSnapshot(meta) })
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
	if err := os.WriteFile(temp, body, fileMode); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
