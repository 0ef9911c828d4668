package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"slices"
)

// This file is the snapshot format: a state as a stream of bytes. The bytes
// are a function of the state alone, so two members that applied the same
// entries write the same file.
//
// Outer layer, against damage: frames of
//
//	length   4 bytes   little endian, at most frameSize
//	crc      4 bytes   little endian, CRC-32C of the payload
//	payload  length bytes
//
// Inner layer, the payloads joined: magic, format, index, term, rv, then
// records {kind, fields...} with integers as uvarints and strings as length +
// bytes, in the order session, member, removed, item, and a record of kind end
// with the number of items. A file that breaks off lacks the end record.

const (
	snapshotMagic  = "RAFTRVSS"
	snapshotFormat = 1
	frameSize      = 256 << 10

	recordEnd     = 0
	recordSession = 1
	recordMember  = 2
	recordRemoved = 3
	recordItem    = 4

	// recordFieldMax bounds a string field, so that damage that got past the
	// checksum cannot make the reader allocate without limit.
	recordFieldMax = 1 << 30
)

var (
	castagnoli        = crc32.MakeTable(crc32.Castagnoli)
	errSnapshotDamage = errors.New("snapshot is damaged")
)

// writeTo streams the state to w.
func (s *state) writeTo(w io.Writer) error {
	e := snapshotEncoder{w: bufio.NewWriterSize(&frameWriter{w: w}, frameSize)}
	e.bytes([]byte(snapshotMagic))
	e.uint(snapshotFormat)
	e.uint(s.index)
	e.uint(s.term)
	e.uint(s.rv)
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
	for _, id := range slices.Sorted(maps.Keys(s.members)) {
		b, err := json.Marshal(s.members[id])
		if err != nil {
			return fmt.Errorf("encode member %d: %w", id, err)
		}
		e.uint(recordMember)
		e.string(string(b))
	}
	for _, id := range slices.Sorted(maps.Keys(s.removed)) {
		e.uint(recordRemoved)
		e.uint(id)
	}
	s.items.Scan(func(key string, it item) bool {
		e.uint(recordItem)
		e.string(key)
		e.string(it.value)
		e.uint(it.rv)
		e.uint(it.created)
		return e.err == nil
	})
	e.uint(recordEnd)
	e.uint(uint64(s.items.Len()))
	if e.err != nil {
		return e.err
	}
	return e.w.Flush()
}

// readState reads what writeTo wrote, and nothing more than that: bytes after
// the end are damage.
func readState(r io.Reader) (state, error) {
	d := snapshotDecoder{r: bufio.NewReaderSize(&frameReader{r: r}, frameSize)}
	st, err := d.state()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("%w: it breaks off", errSnapshotDamage)
	}
	if err != nil {
		return state{}, err
	}
	if _, err := d.r.ReadByte(); !errors.Is(err, io.EOF) {
		return state{}, fmt.Errorf("%w: bytes after its end", errSnapshotDamage)
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
	if format := d.uint(); d.err == nil && format != snapshotFormat {
		return st, fmt.Errorf("snapshot format %d is newer than this program (knows %d): upgrade it", format, snapshotFormat)
	}
	st.index, st.term, st.rv = d.uint(), d.uint(), d.uint()
	for d.err == nil {
		switch kind := d.uint(); kind {
		case recordSession:
			id := d.uint()
			t := &session{used: d.uint(), max: d.uint()}
			for i := range t.seen {
				t.seen[i] = d.uint()
			}
			st.sessions[id] = t
		case recordMember:
			var m member
			if b := d.string(); d.err == nil {
				if err := json.Unmarshal([]byte(b), &m); err != nil {
					return st, fmt.Errorf("%w: member: %v", errSnapshotDamage, err)
				}
			}
			st.members[m.ID] = m
		case recordRemoved:
			st.removed[d.uint()] = true
		case recordItem:
			key := d.string()
			it := item{value: d.string(), rv: d.uint(), created: d.uint()}
			if d.err == nil {
				st.items.Load(key, it) // Load is Set, faster for a key that sorts last
				st.size += itemSize(key, it)
			}
		case recordEnd:
			if d.err != nil { // a zero that uint returned for an error
				break
			}
			if n := d.uint(); d.err == nil && n != uint64(st.items.Len()) {
				return st, fmt.Errorf("%w: %d items instead of %d", errSnapshotDamage, st.items.Len(), n)
			}
			return st, d.err
		default:
			return st, fmt.Errorf("%w: record of unknown kind %d", errSnapshotDamage, kind)
		}
	}
	return st, d.err
}

type snapshotEncoder struct {
	w   *bufio.Writer
	buf [binary.MaxVarintLen64]byte
	err error // the first one; bufio.Writer keeps it too
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

// snapshotDecoder reads fields; after an error all of them are zero.
type snapshotDecoder struct {
	r   *bufio.Reader
	err error
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
	b := make([]byte, 0, min(n, frameSize)) // grows as bytes arrive, not by the announced length
	for uint64(len(b)) < n {
		part := b[len(b):min(uint64(cap(b)), n)]
		if len(part) == 0 {
			b = slices.Grow(b, int(min(n-uint64(len(b)), uint64(len(b)))))
			continue
		}
		if _, err := io.ReadFull(d.r, part); err != nil {
			d.err = err
			return ""
		}
		b = b[:len(b)+len(part)]
	}
	return string(b)
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
		return err // io.EOF between frames is the end
	}
	length := binary.LittleEndian.Uint32(head[0:])
	if length == 0 || length > frameSize {
		return fmt.Errorf("%w: frame of %d bytes", errSnapshotDamage, length)
	}
	if f.buf == nil {
		f.buf = make([]byte, frameSize)
	}
	f.rest = f.buf[:length]
	if _, err := io.ReadFull(f.r, f.rest); err != nil {
		f.rest = nil
		return fmt.Errorf("%w: it breaks off", errSnapshotDamage)
	}
	if crc32.Checksum(f.rest, castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
		f.rest = nil
		return fmt.Errorf("%w: checksum mismatch", errSnapshotDamage)
	}
	return nil
}
