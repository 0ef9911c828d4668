package store

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
	SnapshotMagic = "RAFTRVSS"
	FrameSize     = 256 << 10

	recordEnd     = 0
	RecordSession = 1
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
var snapshotFormats = [LevelNewest + 1]uint64{1: 2, 2: 3, 3: 4}

var (
	Castagnoli        = crc32.MakeTable(crc32.Castagnoli)
	ErrSnapshotDamage = errors.New("the file is damaged") // a backup is such a file, too
	ErrSnapshotFormat = errors.New("the snapshot has another format")
)

// Encode streams the state to w.
func (s *State) Encode(w io.Writer) error {
	e := NewSnapshotEncoder(w)
	if err := s.writeHead(e); err != nil {
		return err
	}
	s.Items.Scan(func(key string, it Item) bool {
		e.keyItem(key, it)
		return e.err == nil
	})
	return s.writeEnd(e, s.Items.Len())
}

func NewSnapshotEncoder(w io.Writer) *snapshotEncoder {
	return &snapshotEncoder{W: bufio.NewWriterSize(&FrameWriter{W: w}, FrameSize)}
}

// writeHead writes what comes before the items.
func (s *State) writeHead(e *snapshotEncoder) error {
	e.level = s.Level
	e.Bytes([]byte(SnapshotMagic))
	e.Uint(snapshotFormats[s.Level])
	e.Uint(s.Index)
	e.Uint(s.Term)
	e.Uint(s.RV)
	e.Uint(uint64(s.Now))
	e.Uint(s.Retries.next)
	e.Uint(s.Sum)
	if s.Level >= 2 {
		e.Uint(uint64(s.Level))
		e.Uint(uint64(s.elapsed))
		e.Uint(uint64(s.seen))
	}
	if err := s.writeCluster(e); err != nil {
		return err
	}
	s.Retries.Records.Scan(func(n uint64, r RetryRecord) bool {
		e.Uint(recordRetry)
		e.Uint(n)
		e.retry(&r)
		return e.err == nil
	})
	return e.err
}

// writeEnd writes what comes after so many items.
func (s *State) writeEnd(e *snapshotEncoder, items int) error {
	e.Uint(recordEvents)
	e.Uint(s.Events.First)
	e.Uint(s.Events.Dropped)
	for _, chunk := range s.Events.Chunks {
		for i := range chunk.Events {
			e.event(&chunk.Events[i])
		}
	}
	e.Uint(recordEnd)
	e.Uint(uint64(items))
	if e.err != nil {
		return e.err
	}
	return e.W.Flush()
}

// writeCluster writes what the state knows of sessions and members.
func (s *State) writeCluster(e *snapshotEncoder) error {
	for _, id := range slices.Sorted(maps.Keys(s.Sessions)) {
		t := s.Sessions[id]
		e.Uint(RecordSession)
		e.Uint(id)
		e.Uint(t.used)
		e.Uint(t.max)
		for _, word := range t.seen {
			e.Uint(word)
		}
	}
	for _, m := range s.SortedMembers() {
		b, err := json.Marshal(m)
		if err != nil {
			return fmt.Errorf("encode member %d: %w", m.ID, err)
		}
		e.Uint(recordMember)
		e.string(string(b))
	}
	for _, id := range slices.Sorted(maps.Keys(s.Removed)) {
		e.Uint(recordRemoved)
		e.Uint(id)
	}
	return nil
}

// ReadState reads what writeTo wrote, and nothing more than that: bytes after
// the end are damage.
func ReadState(r io.Reader) (State, error) { return readStateAt(r, 0) }

// readStateAt is readState for a state that starts at a byte of its file.
func readStateAt(r io.Reader, offset int64) (State, error) {
	frames := &FrameReader{R: r, read: offset}
	d := SnapshotDecoder{R: bufio.NewReaderSize(frames, FrameSize)}
	st, err := d.state()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = frames.damage("it breaks off")
	}
	if err != nil {
		return State{}, err
	}
	if _, err := d.R.ReadByte(); !errors.Is(err, io.EOF) {
		return State{}, frames.damage("bytes after its end")
	}
	return st, nil
}

func (d *SnapshotDecoder) state() (State, error) {
	st := NewState()
	magic := make([]byte, len(SnapshotMagic))
	if _, err := io.ReadFull(d.R, magic); err != nil {
		return st, err
	}
	if string(magic) != SnapshotMagic {
		return st, fmt.Errorf("%w: not a snapshot file", ErrSnapshotDamage)
	}
	format := d.Uint()
	if d.Err == nil && !slices.Contains(snapshotFormats[LevelFirst:], format) {
		return st, fmt.Errorf("%w: it is %d, this program knows %d: use the version that wrote it", ErrSnapshotFormat, format, snapshotFormats[LevelFirst:])
	}
	st.Index, st.Term, st.RV = d.Uint(), d.Uint(), d.Uint()
	st.Now, st.Retries.next, st.Sum = int64(d.Uint()), d.Uint(), d.Uint()
	if format > snapshotFormats[LevelFirst] {
		level := d.Uint()
		if d.Err == nil && (level > LevelNewest || snapshotFormats[level] != format) {
			return st, fmt.Errorf("%w: it is %d of feature level %d, this program knows up to level %d: use the version that wrote it", ErrSnapshotFormat, format, level, LevelNewest)
		}
		if d.Err == nil {
			st.SetLevel(int(level))
		}
		st.elapsed, st.seen = int64(d.Uint()), int64(d.Uint())
	}
	d.level = st.Level
	for d.Err == nil {
		kind := d.Uint()
		if d.Err != nil {
			break
		}
		if kind == recordEnd {
			if n := d.Uint(); d.Err == nil && n != uint64(st.Items.Len()) {
				return st, fmt.Errorf("%w: %d items instead of %d", ErrSnapshotDamage, st.Items.Len(), n)
			}
			return st, d.Err
		}
		if err := d.Record(kind, &st); err != nil {
			return st, err
		}
	}
	return st, d.Err
}

// Record reads one record of any kind but end into st.
func (d *SnapshotDecoder) Record(kind uint64, st *State) error {
	switch kind {
	case RecordSession:
		id := d.Uint()
		t := &session{used: d.Uint(), max: d.Uint()}
		for i := range t.seen {
			t.seen[i] = d.Uint()
		}
		st.SessionsDigest += t.digest(id) - st.Sessions[id].digest(id)
		st.Sessions[id] = t
	case recordMember:
		var m Member
		if b := d.string(); d.Err == nil {
			if err := json.Unmarshal([]byte(b), &m); err != nil {
				return fmt.Errorf("%w: member: %w", ErrSnapshotDamage, err)
			}
		}
		st.Members[m.ID] = m
	case recordRemoved:
		st.Removed[d.Uint()] = true
	case recordRetry:
		st.Retries.insert(d.Uint(), d.retry())
	case recordItem:
		key, it := d.string(), d.item()
		if d.Err == nil {
			st.Items.Load(key, it)
			st.Remember(key, it)
		}
	case recordEvents:
		st.Events.First, st.Events.Dropped = d.Uint(), d.Uint()
	case recordEvent:
		e := d.event()
		if d.Err == nil && (e.Kind == 0 || e.Kind > EventExpired) {
			return fmt.Errorf("%w: event of unknown kind %d", ErrSnapshotDamage, e.Kind)
		}
		if d.Err == nil {
			st.Events.add(e) // whoever restores the state has the bounds
		}
	default:
		return fmt.Errorf("%w: record of unknown kind %d", ErrSnapshotDamage, kind)
	}
	return nil
}

type snapshotEncoder struct {
	W     *bufio.Writer
	level int // of the state
	buf   [binary.MaxVarintLen64]byte
	err   error // the first one; bufio.Writer keeps it too
}

func (e *snapshotEncoder) Bytes(b []byte) {
	if _, err := e.W.Write(b); err != nil {
		e.err = err
	}
}

func (e *snapshotEncoder) Uint(v uint64) {
	e.Bytes(e.buf[:binary.PutUvarint(e.buf[:], v)])
}

func (e *snapshotEncoder) string(s string) {
	e.Uint(uint64(len(s)))
	if _, err := e.W.WriteString(s); err != nil {
		e.err = err
	}
}

func (e *snapshotEncoder) keyItem(key string, it Item) {
	e.Uint(recordItem)
	e.string(key)
	e.item(it)
}

func (e *snapshotEncoder) item(it Item) {
	e.string(it.Value)
	e.Uint(it.RV)
	e.Uint(it.Created)
	e.Uint(uint64(it.Expires))
	if e.level >= 3 {
		e.string(it.ContentType)
	}
}

func (e *snapshotEncoder) event(v *Event) {
	e.Uint(recordEvent)
	e.Uint(v.RV)
	e.Uint(v.Prev)
	e.Uint(uint64(v.Time))
	e.Uint(uint64(v.Kind))
	e.Uint(eventFlags(v))
	e.string(v.Key)
	e.item(v.Item)
}

func (e *snapshotEncoder) retry(r *RetryRecord) {
	e.string(r.ID.Key)
	e.Bytes(r.ID.Digest[:])
	e.Uint(uint64(r.Time))
	e.Uint(uint64(r.First.Status))
	e.Uint(r.First.RV)
	e.Uint(r.First.Current)
	e.Uint(r.First.Count)
	e.string(r.First.Key)
	e.Uint(uint64(len(r.First.Ops)))
	for _, op := range r.First.Ops {
		e.Uint(uint64(op.Status))
		e.item(op.Item)
	}
	if e.level >= 3 {
		e.Uint(r.ID.Client)
	}
}

// Flags of an event.
const (
	eventIsLast = 1 << 0
	eventIsCut  = 1 << 1 // from format 3 on
)

func eventFlags(v *Event) (flags uint64) {
	if v.Last {
		flags |= eventIsLast
	}
	if v.Cut {
		flags |= eventIsCut
	}
	return flags
}

// SnapshotDecoder reads fields; after an error all of them are zero.
type SnapshotDecoder struct {
	R     *bufio.Reader
	level int // of the state
	Err   error
}

func (d *SnapshotDecoder) Uint() uint64 {
	if d.Err != nil {
		return 0
	}
	v, err := binary.ReadUvarint(d.R)
	if err != nil {
		d.Err = err
		return 0
	}
	return v
}

func (d *SnapshotDecoder) string() string {
	n := d.Uint()
	if d.Err != nil {
		return ""
	}
	if n > recordFieldMax {
		d.Err = fmt.Errorf("%w: field of %d bytes", ErrSnapshotDamage, n)
		return ""
	}
	var b strings.Builder // so that the bytes are not copied once more
	for left := int(n); left > 0; {
		// It grows as bytes arrive, not by the announced length.
		if b.Len() == b.Cap() {
			b.Grow(min(left, max(b.Len(), FrameSize)))
		}
		part, err := d.R.Peek(min(left, d.R.Size(), b.Cap()-b.Len()))
		b.Write(part)
		left -= len(part)
		if _, discardErr := d.R.Discard(len(part)); err != nil || discardErr != nil {
			d.Err = cmp.Or(err, discardErr)
			return ""
		}
	}
	return b.String()
}

func (d *SnapshotDecoder) item() Item {
	it := Item{Value: d.string(), RV: d.Uint(), Created: d.Uint(), Expires: int64(d.Uint())}
	if d.level >= 3 {
		it.ContentType = intern(d.string())
	}
	return it
}

func (d *SnapshotDecoder) event() Event {
	e := Event{RV: d.Uint(), Prev: d.Uint(), Time: int64(d.Uint()), Kind: EventKind(d.Uint())}
	flags := d.Uint()
	if flags > eventIsLast|eventIsCut {
		d.Err = fmt.Errorf("%w: event with unknown flags %d", ErrSnapshotDamage, flags)
	}
	e.Last, e.Cut = flags&eventIsLast != 0, flags&eventIsCut != 0
	e.Key, e.Item = d.string(), d.item()
	return e
}

func (d *SnapshotDecoder) retry() RetryRecord {
	r := RetryRecord{ID: RetryID{Key: d.string()}}
	if d.Err == nil {
		_, d.Err = io.ReadFull(d.R, r.ID.Digest[:])
	}
	r.Time = int64(d.Uint())
	r.First = Result{Status: Status(d.Uint()), RV: d.Uint(), Current: d.Uint(), Count: d.Uint(), Key: d.string()}
	for n := d.Uint(); n > 0 && d.Err == nil; n-- {
		r.First.Ops = append(r.First.Ops, OpResult{Status: Status(d.Uint()), Item: d.item()})
	}
	if d.level >= 3 {
		r.ID.Client = d.Uint()
	}
	return r
}

// FrameWriter puts each Write into frames.
type FrameWriter struct{ W io.Writer }

func (f *FrameWriter) Write(p []byte) (int, error) {
	n := 0
	for len(p) > 0 {
		payload := p[:min(len(p), FrameSize)]
		var head [8]byte
		binary.LittleEndian.PutUint32(head[0:], uint32(len(payload)))
		binary.LittleEndian.PutUint32(head[4:], crc32.Checksum(payload, Castagnoli))
		if _, err := f.W.Write(head[:]); err != nil {
			return n, err
		}
		if _, err := f.W.Write(payload); err != nil {
			return n, err
		}
		n += len(payload)
		p = p[len(payload):]
	}
	return n, nil
}

// FrameReader checks frames and yields their payloads.
type FrameReader struct {
	R    io.Reader
	buf  []byte // one frame
	rest []byte // what is left of it
	read int64  // where in the file the next frame starts
}

func (f *FrameReader) Read(p []byte) (int, error) {
	if len(f.rest) == 0 {
		if err := f.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

func (f *FrameReader) next() error {
	var head [8]byte
	if _, err := io.ReadFull(f.R, head[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return f.damage("it breaks off")
		}
		return err // io.EOF between frames is the end
	}
	length := binary.LittleEndian.Uint32(head[0:])
	if length == 0 || length > FrameSize {
		return f.damage(fmt.Sprintf("frame of %d bytes", length))
	}
	if f.buf == nil {
		f.buf = make([]byte, FrameSize)
	}
	f.rest = nil
	payload := f.buf[:length]
	if _, err := io.ReadFull(f.R, payload); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return f.damage("it breaks off")
		}
		return err
	}
	if crc32.Checksum(payload, Castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
		return f.damage("checksum mismatch")
	}
	f.rest = payload
	f.read += int64(len(head) + len(payload))
	return nil
}

// damage says where the frame is that cannot be read.
func (f *FrameReader) damage(what string) error {
	return fmt.Errorf("%w: %s, in the frame at byte %d", ErrSnapshotDamage, what, f.read)
}
