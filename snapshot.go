package main

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"slices"
	"strings"
)

// This file is the snapshot format: a state as a stream of bytes. The bytes
// are a function of the state alone, so two members that applied the same
// entries write the same file, if they keep the same window of events.
//
// Outer layer, against damage: frames of
//
//	length   4 bytes   little endian, at most frameSize
//	crc      4 bytes   little endian, CRC-32C of the payload
//	payload  length bytes
//
// Inner layer, the payloads joined: magic, format, index, term, rv, time,
// number of the next retry, sum, from format 3 on level, elapsed and seen, then
// records {kind, fields...} with integers
// as uvarints and strings as length + bytes, in the order session, member,
// removed, retry, item, event, and a record of kind end with the number of
// items. A file that breaks off lacks the end record. From format 4 on items have
// a content type, and retries say who sent the request.

const (
	snapshotMagic = "RAFTRVSS"
	frameSize     = 256 << 10

	recordEnd     = 0
	recordSession = 1
	recordMember  = 2
	recordRemoved = 3
	recordItem    = 4
	recordRetry   = 5
	recordEvents  = 6 // what the window has dropped; before the first event
	recordEvent   = 7

	// recordFieldMax bounds a string field, so that damage that got past the
	// checksum cannot make the reader allocate without limit.
	recordFieldMax = 1 << 30
)

// snapshotFormats has the format of each level. All of them are read for ever;
// 1 had no sum.
var snapshotFormats = [levelNewest + 1]uint64{1: 2, 2: 3, 3: 4}

var (
	castagnoli        = crc32.MakeTable(crc32.Castagnoli)
	errSnapshotDamage = errors.New("snapshot is damaged")
	errSnapshotFormat = errors.New("the snapshot has another format")
)

// writeTo streams the state to w.
func (s *state) writeTo(w io.Writer) error {
	e := newSnapshotEncoder(w)
	if err := s.writeHead(e); err != nil {
		return err
	}
	s.items.Scan(func(key string, it item) bool {
		e.keyItem(key, it)
		return e.err == nil
	})
	return s.writeEnd(e, s.items.Len())
}

func newSnapshotEncoder(w io.Writer) *snapshotEncoder {
	return &snapshotEncoder{w: bufio.NewWriterSize(&frameWriter{w: w}, frameSize)}
}

// writeHead writes what comes before the items.
func (s *state) writeHead(e *snapshotEncoder) error {
	e.level = s.level
	e.bytes([]byte(snapshotMagic))
	e.uint(snapshotFormats[s.level])
	e.uint(s.index)
	e.uint(s.term)
	e.uint(s.rv)
	e.uint(uint64(s.now))
	e.uint(s.retries.next)
	e.uint(s.sum)
	if s.level >= 2 {
		e.uint(uint64(s.level))
		e.uint(uint64(s.elapsed))
		e.uint(uint64(s.seen))
	}
	if err := s.writeCluster(e); err != nil {
		return err
	}
	s.retries.records.Scan(func(n uint64, r retryRecord) bool {
		e.uint(recordRetry)
		e.uint(n)
		e.retry(&r)
		return e.err == nil
	})
	return e.err
}

// writeEnd writes what comes after so many items.
func (s *state) writeEnd(e *snapshotEncoder, items int) error {
	e.uint(recordEvents)
	e.uint(s.events.first)
	e.uint(s.events.dropped)
	for _, chunk := range s.events.chunks {
		for i := range chunk.events {
			e.event(&chunk.events[i])
		}
	}
	e.uint(recordEnd)
	e.uint(uint64(items))
	if e.err != nil {
		return e.err
	}
	return e.w.Flush()
}

// writeCluster writes what the state knows of sessions and members.
func (s *state) writeCluster(e *snapshotEncoder) error {
	for _, id := range slices.Sorted(maps.Keys(s.sessions)) {
		t := s.sessions[id]
		e.uint(recordSession)
		e.uint(id)
		e.uint(t.used)
		e.uint(t.max)
		for _, word := range t.seen {
			e.uint(word)
		}
	}
	for _, m := range s.sortedMembers() {
		b, err := json.Marshal(m)
		if err != nil {
			return fmt.Errorf("encode member %d: %w", m.ID, err)
		}
		e.uint(recordMember)
		e.string(string(b))
	}
	for _, id := range slices.Sorted(maps.Keys(s.removed)) {
		e.uint(recordRemoved)
		e.uint(id)
	}
	return nil
}

// readState reads what writeTo wrote, and nothing more than that: bytes after
// the end are damage.
func readState(r io.Reader) (state, error) { return readStateAt(r, 0) }

// readStateAt is readState for a state that starts at a byte of its file.
func readStateAt(r io.Reader, offset int64) (state, error) {
	frames := &frameReader{r: r, read: offset}
	d := snapshotDecoder{r: bufio.NewReaderSize(frames, frameSize)}
	st, err := d.state()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = frames.damage("it breaks off")
	}
	if err != nil {
		return state{}, err
	}
	if _, err := d.r.ReadByte(); !errors.Is(err, io.EOF) {
		return state{}, frames.damage("bytes after its end")
	}
	return st, nil
}

func (d *snapshotDecoder) state() (state, error) {
	st := newState()
	magic := make([]byte, len(snapshotMagic))
	if _, err := io.ReadFull(d.r, magic); err != nil {
		return st, err
	}
	if string(magic) != snapshotMagic {
		return st, fmt.Errorf("%w: not a snapshot file", errSnapshotDamage)
	}
	format := d.uint()
	if d.err == nil && !slices.Contains(snapshotFormats[levelFirst:], format) {
		return st, fmt.Errorf("%w: it is %d, this program knows %d: use the version that wrote it", errSnapshotFormat, format, snapshotFormats[levelFirst:])
	}
	st.index, st.term, st.rv = d.uint(), d.uint(), d.uint()
	st.now, st.retries.next, st.sum = int64(d.uint()), d.uint(), d.uint()
	if format > snapshotFormats[levelFirst] {
		level := d.uint()
		if d.err == nil && (level > levelNewest || snapshotFormats[level] != format) {
			return st, fmt.Errorf("%w: it is %d of feature level %d, this program knows up to level %d: use the version that wrote it", errSnapshotFormat, format, level, levelNewest)
		}
		if d.err == nil {
			st.setLevel(int(level))
		}
		st.elapsed, st.seen = int64(d.uint()), int64(d.uint())
	}
	d.level = st.level
	for d.err == nil {
		kind := d.uint()
		if d.err != nil {
			break
		}
		if kind == recordEnd {
			if n := d.uint(); d.err == nil && n != uint64(st.items.Len()) {
				return st, fmt.Errorf("%w: %d items instead of %d", errSnapshotDamage, st.items.Len(), n)
			}
			return st, d.err
		}
		if err := d.record(kind, &st); err != nil {
			return st, err
		}
	}
	return st, d.err
}

// record reads one record of any kind but end into st.
func (d *snapshotDecoder) record(kind uint64, st *state) error {
	switch kind {
	case recordSession:
		id := d.uint()
		t := &session{used: d.uint(), max: d.uint()}
		for i := range t.seen {
			t.seen[i] = d.uint()
		}
		st.sessionsDigest += t.digest(id) - st.sessions[id].digest(id)
		st.sessions[id] = t
	case recordMember:
		var m member
		if b := d.string(); d.err == nil {
			if err := json.Unmarshal([]byte(b), &m); err != nil {
				return fmt.Errorf("%w: member: %w", errSnapshotDamage, err)
			}
		}
		st.members[m.ID] = m
	case recordRemoved:
		st.removed[d.uint()] = true
	case recordRetry:
		st.retries.insert(d.uint(), d.retry())
	case recordItem:
		key, it := d.string(), d.item()
		if d.err == nil {
			st.items.Load(key, it)
			st.remember(key, it)
		}
	case recordEvents:
		st.events.first, st.events.dropped = d.uint(), d.uint()
	case recordEvent:
		e := d.event()
		if d.err == nil && (e.kind == 0 || e.kind > eventExpired) {
			return fmt.Errorf("%w: event of unknown kind %d", errSnapshotDamage, e.kind)
		}
		if d.err == nil {
			st.events.add(e) // whoever restores the state has the bounds
		}
	default:
		return fmt.Errorf("%w: record of unknown kind %d", errSnapshotDamage, kind)
	}
	return nil
}

type snapshotEncoder struct {
	w     *bufio.Writer
	level int // of the state
	buf   [binary.MaxVarintLen64]byte
	err   error // the first one; bufio.Writer keeps it too
}

func (e *snapshotEncoder) bytes(b []byte) {
	if _, err := e.w.Write(b); err != nil {
		e.err = err
	}
}

func (e *snapshotEncoder) uint(v uint64) {
	e.bytes(e.buf[:binary.PutUvarint(e.buf[:], v)])
}

func (e *snapshotEncoder) string(s string) {
	e.uint(uint64(len(s)))
	if _, err := e.w.WriteString(s); err != nil {
		e.err = err
	}
}

func (e *snapshotEncoder) keyItem(key string, it item) {
	e.uint(recordItem)
	e.string(key)
	e.item(it)
}

func (e *snapshotEncoder) item(it item) {
	e.string(it.value)
	e.uint(it.rv)
	e.uint(it.created)
	e.uint(uint64(it.expires))
	if e.level >= 3 {
		e.string(it.contentType)
	}
}

func (e *snapshotEncoder) event(v *event) {
	e.uint(recordEvent)
	e.uint(v.rv)
	e.uint(v.prev)
	e.uint(uint64(v.time))
	e.uint(uint64(v.kind))
	e.uint(eventFlags(v))
	e.string(v.key)
	e.item(v.item)
}

func (e *snapshotEncoder) retry(r *retryRecord) {
	e.string(r.id.key)
	e.bytes(r.id.digest[:])
	e.uint(uint64(r.time))
	e.uint(uint64(r.first.status))
	e.uint(r.first.rv)
	e.uint(r.first.current)
	e.uint(r.first.count)
	e.string(r.first.key)
	e.uint(uint64(len(r.first.ops)))
	for _, op := range r.first.ops {
		e.uint(uint64(op.status))
		e.item(op.item)
	}
	if e.level >= 3 {
		e.uint(r.id.client)
	}
}

// Flags of an event.
const (
	eventIsLast = 1 << 0
	eventIsCut  = 1 << 1 // from format 3 on
)

func eventFlags(v *event) (flags uint64) {
	if v.last {
		flags |= eventIsLast
	}
	if v.cut {
		flags |= eventIsCut
	}
	return flags
}

// snapshotDecoder reads fields; after an error all of them are zero.
type snapshotDecoder struct {
	r     *bufio.Reader
	level int // of the state
	err   error
}

func (d *snapshotDecoder) uint() uint64 {
	if d.err != nil {
		return 0
	}
	v, err := binary.ReadUvarint(d.r)
	if err != nil {
		d.err = err
		return 0
	}
	return v
}

func (d *snapshotDecoder) string() string {
	n := d.uint()
	if d.err != nil {
		return ""
	}
	if n > recordFieldMax {
		d.err = fmt.Errorf("%w: field of %d bytes", errSnapshotDamage, n)
		return ""
	}
	var b strings.Builder // so that the bytes are not copied once more
	for left := int(n); left > 0; {
		// It grows as bytes arrive, not by the announced length.
		if b.Len() == b.Cap() {
			b.Grow(min(left, max(b.Len(), frameSize)))
		}
		part, err := d.r.Peek(min(left, d.r.Size(), b.Cap()-b.Len()))
		b.Write(part)
		left -= len(part)
		if _, discardErr := d.r.Discard(len(part)); err != nil || discardErr != nil {
			d.err = cmp.Or(err, discardErr)
			return ""
		}
	}
	return b.String()
}

func (d *snapshotDecoder) item() item {
	it := item{value: d.string(), rv: d.uint(), created: d.uint(), expires: int64(d.uint())}
	if d.level >= 3 {
		it.contentType = intern(d.string())
	}
	return it
}

func (d *snapshotDecoder) event() event {
	e := event{rv: d.uint(), prev: d.uint(), time: int64(d.uint()), kind: eventKind(d.uint())}
	flags := d.uint()
	if flags > eventIsLast|eventIsCut {
		d.err = fmt.Errorf("%w: event with unknown flags %d", errSnapshotDamage, flags)
	}
	e.last, e.cut = flags&eventIsLast != 0, flags&eventIsCut != 0
	e.key, e.item = d.string(), d.item()
	return e
}

func (d *snapshotDecoder) retry() retryRecord {
	r := retryRecord{id: retryID{key: d.string()}}
	if d.err == nil {
		_, d.err = io.ReadFull(d.r, r.id.digest[:])
	}
	r.time = int64(d.uint())
	r.first = result{status: status(d.uint()), rv: d.uint(), current: d.uint(), count: d.uint(), key: d.string()}
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		r.first.ops = append(r.first.ops, opResult{status: status(d.uint()), item: d.item()})
	}
	if d.level >= 3 {
		r.id.client = d.uint()
	}
	return r
}

// frameWriter puts each Write into frames.
type frameWriter struct{ w io.Writer }

func (f *frameWriter) Write(p []byte) (int, error) {
	n := 0
	for len(p) > 0 {
		payload := p[:min(len(p), frameSize)]
		var head [8]byte
		binary.LittleEndian.PutUint32(head[0:], uint32(len(payload)))
		binary.LittleEndian.PutUint32(head[4:], crc32.Checksum(payload, castagnoli))
		if _, err := f.w.Write(head[:]); err != nil {
			return n, err
		}
		if _, err := f.w.Write(payload); err != nil {
			return n, err
		}
		n += len(payload)
		p = p[len(payload):]
	}
	return n, nil
}

// frameReader checks frames and yields their payloads.
type frameReader struct {
	r    io.Reader
	buf  []byte // one frame
	rest []byte // what is left of it
	read int64  // where in the file the next frame starts
}

func (f *frameReader) Read(p []byte) (int, error) {
	if len(f.rest) == 0 {
		if err := f.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

func (f *frameReader) next() error {
	var head [8]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return f.damage("it breaks off")
		}
		return err // io.EOF between frames is the end
	}
	length := binary.LittleEndian.Uint32(head[0:])
	if length == 0 || length > frameSize {
		return f.damage(fmt.Sprintf("frame of %d bytes", length))
	}
	if f.buf == nil {
		f.buf = make([]byte, frameSize)
	}
	f.rest = nil
	payload := f.buf[:length]
	if _, err := io.ReadFull(f.r, payload); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return f.damage("it breaks off")
		}
		return err
	}
	if crc32.Checksum(payload, castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
		return f.damage("checksum mismatch")
	}
	f.rest = payload
	f.read += int64(len(head) + len(payload))
	return nil
}

// damage says where the frame is that cannot be read.
func (f *frameReader) damage(what string) error {
	return fmt.Errorf("%w: %s, in the frame at byte %d", errSnapshotDamage, what, f.read)
}
