package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"time"
)

// This file is a backup: what the whole cluster holds, as it was at one version.
//
//	magic   8 bytes
//	length  4 bytes, little endian
//	head    JSON of this length: where the backup comes from
//	state   see snapshot.go; without the window of events and without sessions
//	digest  32 bytes, SHA-256 of all before
//
// The call that streams it carries the digest of all of it in a trailer, too, so
// that a client knows at once whether it has everything. A file that another
// program has fetched is checked when it is read.

const (
	backupMagic   = "RAFTRVBK"
	backupFormat  = 1
	backupHeadMax = 64 << 10 // bytes
)

// backupHead says where a backup comes from.
type backupHead struct {
	Format  int       `json:"format"`
	Cluster string    `json:"cluster"` // hexadecimal
	Member  uint64    `json:"member"`
	Time    time.Time `json:"time"`
	Version string    `json:"version"` // of the program
}

// backup reads the state as it was at one version while writes go on. Like a
// list it reads the live tree in small parts, so it takes no memory that
// grows with the state. Its methods are for one goroutine.
type backup struct {
	rest  state // everything but the items
	items *scan
}

// backup begins a backup. The caller must close it.
func (s *kvstore) backup() (*backup, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	items, err := s.scanLocked("", "")
	if err != nil {
		return nil, err
	}
	rest := newState()
	rest.setLevel(s.state.level)
	rest.elapsed, rest.seen = s.state.elapsed, s.state.seen
	rest.index, rest.term, rest.rv, rest.now = s.state.index, s.state.term, s.state.rv, s.state.now
	rest.retries = s.state.retries.copy()
	rest.members, rest.removed = maps.Clone(s.state.members), maps.Clone(s.state.removed)
	rest.events.dropped = rest.rv
	return &backup{rest: rest, items: items}, nil
}

func (b *backup) close() { b.items.close() }

// writeTo streams the backup. Between two parts it calls rest.
func (b *backup) writeTo(w io.Writer, head backupHead, rest func()) error {
	digest := sha256.New()
	out := io.MultiWriter(w, digest)
	if err := head.writeTo(out); err != nil {
		return err
	}
	e := newSnapshotEncoder(out)
	if err := b.rest.writeHead(e); err != nil {
		return err
	}
	for n := 0; ; {
		rest()
		items, err := b.items.read()
		if err != nil {
			return err
		}
		if len(items) == 0 {
			if err := b.rest.writeEnd(e, n); err != nil {
				return err
			}
			break
		}
		for _, it := range items {
			e.keyItem(it.key, it.item)
		}
		if e.err != nil {
			return e.err
		}
		n += len(items)
	}
	_, err := w.Write(digest.Sum(nil))
	return err
}

func (h backupHead) writeTo(w io.Writer) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	b = append(binary.LittleEndian.AppendUint32([]byte(backupMagic), uint32(len(b))), b...)
	_, err = w.Write(b)
	return err
}

// backupFile is a backup that was read and found whole.
type backupFile struct {
	backupHead
	digest string // hexadecimal
	size   int64
	state  state
}

// readBackup reads a backup and checks all of it.
func readBackup(path string) (*backupFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := &backupFile{size: info.Size()}
	if err := b.read(f); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

func (b *backupFile) read(f io.ReaderAt) error {
	if b.size < sha256.Size {
		return fmt.Errorf("%w: it has %d bytes", errSnapshotDamage, b.size)
	}
	digest := sha256.New()
	body := io.TeeReader(io.NewSectionReader(f, 0, b.size-sha256.Size), digest)
	start, err := b.readHead(body)
	if err != nil {
		return err
	}
	if b.state, err = readStateAt(body, start); err != nil {
		return err
	}
	b.digest = hex.EncodeToString(digest.Sum(nil))
	var want [sha256.Size]byte
	if _, err := f.ReadAt(want[:], b.size-sha256.Size); err != nil {
		return err
	}
	if b.digest != hex.EncodeToString(want[:]) {
		return fmt.Errorf("%w: its SHA-256 is %s, at byte %d it says %x", errSnapshotDamage, b.digest, b.size-sha256.Size, want)
	}
	return nil
}

// readHead reads the head and returns its size.
func (b *backupFile) readHead(r io.Reader) (int64, error) {
	var magic [len(backupMagic)]byte
	if _, err := io.ReadFull(r, magic[:]); err != nil {
		return 0, headError(err)
	}
	if string(magic[:]) != backupMagic {
		return 0, errors.New("this is no backup of raftrv: it does not start with " + backupMagic)
	}
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return 0, headError(err)
	}
	length := binary.LittleEndian.Uint32(size[:])
	if length > backupHeadMax {
		return 0, fmt.Errorf("%w: head of %d bytes, at byte 8", errSnapshotDamage, length)
	}
	head := make([]byte, length)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, headError(err)
	}
	if err := json.Unmarshal(head, &b.backupHead); err != nil {
		return 0, fmt.Errorf("%w: head, at byte %d: %w", errSnapshotDamage, len(magic)+len(size), err)
	}
	if b.Format != backupFormat {
		return 0, fmt.Errorf("backup format %d is not known to this program (knows %d): use the version that wrote it, %q", b.Format, backupFormat, b.Version)
	}
	return int64(len(magic)+len(size)) + int64(length), nil
}

func headError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it breaks off in its head", errSnapshotDamage)
	}
	return err
}

// bytes returns how many bytes the keys and values have.
func (b *backupFile) bytes() (n int64) {
	b.state.items.Scan(func(key string, it item) bool {
		n += int64(len(key) + len(it.value))
		return true
	})
	return n
}
