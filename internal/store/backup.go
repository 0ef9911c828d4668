package store

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
	BackupFormat  = 1
	backupHeadMax = 64 << 10 // bytes
)

// BackupHead says where a backup comes from.
type BackupHead struct {
	Format  int       `json:"format"`
	Cluster string    `json:"cluster"` // hexadecimal
	Member  uint64    `json:"member"`
	Time    time.Time `json:"time"`
	Version string    `json:"version"` // of the program
}

// Backup reads the state as it was at one version while writes go on. Like a
// list it reads the live tree in small parts, so it takes no memory that
// grows with the state. Its methods are for one goroutine.
type Backup struct {
	Rest  State // everything but the items
	items *Scan
}

// Backup begins a backup. The caller must close it.
func (s *Store) Backup() (*Backup, error) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	items, err := s.scanLocked("", "")
	if err != nil {
		return nil, err
	}
	rest := NewState()
	rest.SetLevel(s.State.Level)
	rest.elapsed, rest.seen = s.State.elapsed, s.State.seen
	rest.Index, rest.Term, rest.RV, rest.Now = s.State.Index, s.State.Term, s.State.RV, s.State.Now
	rest.Retries = s.State.Retries.copy()
	rest.Members, rest.Removed = maps.Clone(s.State.Members), maps.Clone(s.State.Removed)
	rest.Events.Dropped = rest.RV
	return &Backup{Rest: rest, items: items}, nil
}

func (b *Backup) Close() { b.items.Close() }

// Encode streams the backup. Between two parts it calls rest.
func (b *Backup) Encode(w io.Writer, head BackupHead, rest func()) error {
	digest := sha256.New()
	out := io.MultiWriter(w, digest)
	if err := head.writeTo(out); err != nil {
		return err
	}
	e := NewSnapshotEncoder(out)
	if err := b.Rest.writeHead(e); err != nil {
		return err
	}
	for n := 0; ; {
		rest()
		items, err := b.items.Read()
		if err != nil {
			return err
		}
		if len(items) == 0 {
			if err := b.Rest.writeEnd(e, n); err != nil {
				return err
			}
			break
		}
		for _, it := range items {
			e.keyItem(it.Key, it.Item)
		}
		if e.err != nil {
			return e.err
		}
		n += len(items)
	}
	_, err := w.Write(digest.Sum(nil))
	return err
}

func (h BackupHead) writeTo(w io.Writer) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	b = append(binary.LittleEndian.AppendUint32([]byte(backupMagic), uint32(len(b))), b...)
	_, err = w.Write(b)
	return err
}

// BackupFile is a backup that was read and found whole.
type BackupFile struct {
	BackupHead
	Digest string // hexadecimal
	Size   int64
	State  State
}

// ReadBackup reads a backup and checks all of it.
func ReadBackup(path string) (*BackupFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := &BackupFile{Size: info.Size()}
	if err := b.Read(f); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

func (b *BackupFile) Read(f io.ReaderAt) error {
	if b.Size < sha256.Size {
		return fmt.Errorf("%w: it has %d bytes", ErrSnapshotDamage, b.Size)
	}
	digest := sha256.New()
	body := io.TeeReader(io.NewSectionReader(f, 0, b.Size-sha256.Size), digest)
	start, err := b.readHead(body)
	if err != nil {
		return err
	}
	if b.State, err = readStateAt(body, start); err != nil {
		return err
	}
	b.Digest = hex.EncodeToString(digest.Sum(nil))
	var want [sha256.Size]byte
	if _, err := f.ReadAt(want[:], b.Size-sha256.Size); err != nil {
		return err
	}
	if b.Digest != hex.EncodeToString(want[:]) {
		return fmt.Errorf("%w: its SHA-256 is %s, at byte %d it says %x", ErrSnapshotDamage, b.Digest, b.Size-sha256.Size, want)
	}
	return nil
}

// readHead reads the head and returns its size.
func (b *BackupFile) readHead(r io.Reader) (int64, error) {
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
		return 0, fmt.Errorf("%w: head of %d bytes, at byte 8", ErrSnapshotDamage, length)
	}
	head := make([]byte, length)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, headError(err)
	}
	if err := json.Unmarshal(head, &b.BackupHead); err != nil {
		return 0, fmt.Errorf("%w: head, at byte %d: %w", ErrSnapshotDamage, len(magic)+len(size), err)
	}
	if b.Format != BackupFormat {
		return 0, fmt.Errorf("backup format %d is not known to this program (knows %d): use the version that wrote it, %q", b.Format, BackupFormat, b.Version)
	}
	return int64(len(magic)+len(size)) + int64(length), nil
}

func headError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it breaks off in its head", ErrSnapshotDamage)
	}
	return err
}

// Bytes returns how many bytes the keys and values have.
func (b *BackupFile) Bytes() (n int64) {
	b.State.Items.Scan(func(key string, it Item) bool {
		n += int64(len(key) + len(it.Value))
		return true
	})
	return n
}
