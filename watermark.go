package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
)

// This file notices that a log lost something that was on disk.
//
// etcd's log cannot tell a record that a crash cut short from one that the disk
// damaged: both end the log, and what follows is cut off without a word. For
// the first that is right, since nobody was told that the write succeeded. After
// the second this member would have forgotten what it promised, and a cluster
// with such a member can lose acknowledged writes.
//
// So a second file, the watermark, says how far the log was known to be on
// disk. It is written every markEvery and when the log is closed. A log that
// ends before its watermark is refused.

const watermarkName = "watermark"

// watermark is a position that the log reached: whatever it ends with later is
// not older. Raft may replace the end of a log by entries of an older term, or by
// a snapshot that ends earlier; then the watermark goes back first, see goBack.
// The zero value is a log that reached nothing.
type watermark struct {
	term  uint64 // of the last entry
	index uint64 // of the last entry
	vote  uint64 // term of the hard state
	voted uint64 // for whom in that term; 0 = nobody yet
}

// covers says whether a log that ends at m is missing nothing of w. A later
// term may have replaced entries by fewer ones, as raft compares logs.
func (m watermark) covers(w watermark) bool {
	entries := m.term > w.term || m.term == w.term && m.index >= w.index
	votes := m.vote > w.vote || m.vote == w.vote && (w.voted == 0 || m.voted == w.voted)
	return entries && votes
}

func (m watermark) String() string {
	return fmt.Sprintf("entry %d of term %d, hard state of term %d", m.index, m.term, m.vote)
}

// The file has two slots that are written in turn, so a crash while one is
// written leaves the other. A slot is magic, number, term, index, vote, voted
// and a CRC-32C of these, little endian, 8 bytes each but for the CRC.
const (
	watermarkMagic = 0x4b524d5652544652 // "RFTRVMRK"
	watermarkSlot  = 512                // bytes, a sector: a write of one does not touch the other
	watermarkWords = 6
	watermarkSize  = watermarkWords*8 + 4
)

// watermarkFile is the open file.
type watermarkFile struct {
	file   *os.File
	number uint64 // of the last write
	last   watermark
}

// openWatermark opens the watermark of a data directory. With create it makes
// the file if there is none; without, a missing or unreadable file is an error.
func openWatermark(dir string, create bool) (*watermarkFile, error) {
	path := filepath.Join(dir, watermarkName)
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(path, flags, fsx.FileMode)
	if err != nil {
		return nil, err
	}
	w := &watermarkFile{file: f}
	if err := w.read(create); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return w, nil
}

func (w *watermarkFile) read(mayBeEmpty bool) error {
	buf := make([]byte, 2*watermarkSlot)
	n, err := w.file.ReadAt(buf, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for slot := range 2 {
		b := buf[slot*watermarkSlot:][:watermarkSize]
		if crc32.Checksum(b[:watermarkWords*8], store.Castagnoli) != binary.LittleEndian.Uint32(b[watermarkWords*8:]) ||
			binary.LittleEndian.Uint64(b) != watermarkMagic {
			continue
		}
		if number := binary.LittleEndian.Uint64(b[8:]); number > w.number {
			w.number = number
			w.last = watermark{
				term:  binary.LittleEndian.Uint64(b[16:]),
				index: binary.LittleEndian.Uint64(b[24:]),
				vote:  binary.LittleEndian.Uint64(b[32:]),
				voted: binary.LittleEndian.Uint64(b[40:]),
			}
		}
	}
	if w.number == 0 && (!mayBeEmpty || n > 0) {
		return errors.New("no slot is readable")
	}
	return nil
}

// write makes m the watermark. It is durable when write returns.
func (w *watermarkFile) write(m watermark) error {
	if m == w.last && w.number > 0 {
		return nil
	}
	b := make([]byte, 0, watermarkSize)
	for _, v := range []uint64{watermarkMagic, w.number + 1, m.term, m.index, m.vote, m.voted} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, store.Castagnoli))
	slot := int64(w.number+1) % 2
	if _, err := w.file.WriteAt(b, slot*watermarkSlot); err != nil {
		return err
	}
	if err := fileutil.Fdatasync(w.file); err != nil {
		return err
	}
	w.number++
	w.last = m
	return nil
}

// extent follows what a log holds while records are written or read. The order
// counts: a snapshot that was received takes the place of all that was written
// before it, also of what is behind its index.
type extent struct {
	watermark // the end
	commit    uint64
	base      uint64    // index before the first entry
	terms     []termRun // of the entries

	// received is a snapshot that the log did not lead to. It counts from the hard
	// state on that follows it at once. Without that a crash came in between, and
	// the log still is what it was.
	received *walpb.Snapshot
}

// termRun says which entry is the first of those with a term.
type termRun struct{ first, term uint64 }

// entry moves the end to an entry, which may replace others.
func (x *extent) entry(index, term uint64) {
	x.received = nil
	if len(x.terms) == 0 && x.index == 0 || index > x.index+1 {
		x.base, x.terms = index-1, nil // what was before has been purged
	}
	x.base = min(x.base, index-1)
	for len(x.terms) > 0 && x.terms[len(x.terms)-1].first >= index {
		x.terms = x.terms[:len(x.terms)-1]
	}
	if n := len(x.terms); n == 0 || x.terms[n-1].term != term {
		x.terms = append(x.terms, termRun{index, term})
	}
	x.index, x.term = index, term
}

// leadsTo says whether the log has led to the state at index, as far as it
// goes back.
func (x *extent) leadsTo(index, term uint64) bool {
	if index <= x.base && x.base > 0 {
		return true
	}
	if index > x.index {
		return false
	}
	at := uint64(0)
	for _, run := range x.terms {
		if run.first <= index {
			at = run.term
		}
	}
	return at == term
}

// snapshot notes the record of a snapshot.
func (x *extent) snapshot(rec *walpb.Snapshot) {
	x.received = nil
	if rec.GetIndex() > 0 && !x.leadsTo(rec.GetIndex(), rec.GetTerm()) {
		x.received = rec
	}
}

// hardState notes a hard state.
func (x *extent) hardState(hs *raftpb.HardState) {
	x.vote, x.voted, x.commit = hs.GetTerm(), hs.GetVote(), hs.GetCommit()
	if rec := x.received; rec != nil && rec.GetIndex() <= x.commit {
		x.index, x.term, x.base, x.terms = rec.GetIndex(), rec.GetTerm(), rec.GetIndex(), nil
	}
	x.received = nil
}

// forget drops what nobody needs to know of the entries up to index.
func (x *extent) forget(index uint64) {
	for len(x.terms) > 1 && x.terms[1].first <= index {
		x.terms = x.terms[1:]
	}
	x.base = max(x.base, index)
}

// logEnd is what a look through the log found.
type logEnd struct {
	extent
	path     string // of the segment in which reading ended
	offset   int64  // of the first byte behind the last whole record
	unproven int64  // in that segment, the first byte of which the watermark does not say that it is on disk
	err      error  // nil if the log ends where nothing was written yet
}

// scanLog reads a log without changing it.
func scanLog(dir string, mark watermark) (logEnd, error) {
	var end logEnd
	names, err := fileutil.ReadDir(dir, fileutil.WithExt(".wal"))
	if err != nil {
		return end, err
	}
	if end.path, end.err = missingSegment(dir, names); end.err != nil {
		return end, nil
	}
	readers := make([]fileutil.FileReader, len(names))
	for i, name := range names {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return end, err
		}
		defer f.Close()
		readers[i] = fileutil.NewFileReader(f)
	}
	decoder := wal.NewDecoder(readers...)
	segments, proven := 0, false
	for rec := (&walpb.Record{}); ; {
		end.offset = decoder.LastOffset()
		if err := decoder.Decode(rec); err != nil {
			if offset := decoder.LastOffset(); offset < end.offset { // in the next segment
				end.offset = offset
				segments++
			}
			if !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				end.err = err
			}
			break
		}
		isFirst := segments == 0 || decoder.LastOffset() <= end.offset // offsets start again
		if isFirst {
			segments++
			end.offset, end.unproven = 0, 0
		}
		if end.err = checkChain(decoder, rec, isFirst); end.err == nil {
			end.err = end.note(rec)
		}
		if end.err != nil {
			break
		}
		if !proven && end.covers(mark) {
			proven, end.unproven = true, end.offset
		}
	}
	end.path = filepath.Join(dir, names[max(segments, 1)-1])
	return end, nil
}

// missingSegment returns the path of a segment that should be between two that
// are there.
func missingSegment(dir string, names []string) (path string, err error) {
	var next uint64
	for i, name := range names {
		var seq, index uint64
		if _, err := fmt.Sscanf(name, "%016x-%016x.wal", &seq, &index); err != nil {
			return filepath.Join(dir, name), fmt.Errorf("not the name of a segment: %w", err)
		}
		if i > 0 && seq != next {
			return filepath.Join(dir, fmt.Sprintf("%016x-*.wal", next)), os.ErrNotExist
		}
		next = seq + 1
	}
	return "", nil
}

// checkChain checks a record that is or should be the first of its segment: it
// carries on the checksum of the segment before.
func checkChain(decoder wal.Decoder, rec *walpb.Record, isFirst bool) error {
	if isCRC := rec.GetType() == wal.CrcType; isFirst != isCRC {
		return errRecordType
	} else if !isCRC {
		return nil
	}
	if crc := decoder.LastCRC(); crc != 0 && rec.Validate(crc) != nil {
		return wal.ErrCRCMismatch // the segment before ended early
	}
	decoder.UpdateCRC(rec.GetCrc())
	return nil
}

// errRecordType is damage that the log's checksums do not notice, because they
// do not cover the type of a record. What is in a record must make sense for
// its type: one bit turns an entry into a hard state or a hard state into an
// entry, and that would replace a committed one.
var errRecordType = errors.New("a record is not of the type that it says")

// note moves the end behind a record.
func (e *logEnd) note(rec *walpb.Record) error {
	switch rec.GetType() {
	case wal.CrcType, wal.MetadataType:
	case wal.EntryType:
		var entry raftpb.Entry
		if err := proto.Unmarshal(rec.GetData(), &entry); err != nil {
			return err
		}
		if t := entry.GetType(); t > raftpb.EntryConfChange || t == raftpb.EntryConfChange && len(entry.GetData()) == 0 {
			return errRecordType
		}
		e.entry(entry.GetIndex(), entry.GetTerm())
	case wal.StateType:
		var hs raftpb.HardState
		if err := proto.Unmarshal(rec.GetData(), &hs); err != nil {
			return err
		}
		if hs.GetTerm() == 0 || len(hs.ProtoReflect().GetUnknown()) > 0 {
			return errRecordType
		}
		e.hardState(&hs)
	case wal.SnapshotType:
		var snap walpb.Snapshot
		if err := proto.Unmarshal(rec.GetData(), &snap); err != nil {
			return err
		}
		e.snapshot(&snap)
	default:
		return errRecordType
	}
	return nil
}

// cutLog cuts off what of a log cannot be read, whether or not it was promised.
func cutLog(dir string) error {
	end, err := scanLog(dir, watermark{})
	if err != nil || end.err == nil {
		return err
	}
	names, err := fileutil.ReadDir(dir, fileutil.WithExt(".wal"))
	if err != nil {
		return err
	}
	for _, name := range names {
		path := filepath.Join(dir, name)
		switch {
		case path < end.path:
		case path == end.path && end.offset > 0:
			err = os.Truncate(path, end.offset)
		default:
			err = os.Remove(path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
