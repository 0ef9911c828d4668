package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"raftrv/internal/testkit"
)

// backupBytes returns a backup of a store.
func backupBytes(t *testing.T, s *Store) []byte {
	t.Helper()
	b, err := s.Backup()
	testkit.Must(t, err)
	defer b.Close()
	var out bytes.Buffer
	testkit.Must(t, b.Encode(&out, BackupHead{Format: BackupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {}))
	return out.Bytes()
}

func parseBackup(b []byte) (*BackupFile, error) {
	f := &BackupFile{Size: int64(len(b))}
	return f, f.Read(bytes.NewReader(b))
}

// sameItems compares the items of two states.
func sameItems(t *testing.T, got, want *State) {
	t.Helper()
	if got.RV != want.RV || got.Items.Len() != want.Items.Len() {
		t.Errorf("version %d and %d items, want %d and %d", got.RV, got.Items.Len(), want.RV, want.Items.Len())
	}
	want.Items.Scan(func(key string, it Item) bool {
		if other, ok := got.Items.Get(key); !ok || other != it {
			t.Errorf("%q is %+v, want %+v", key, other, it)
		}
		return true
	})
}

// A backup holds the state of the moment at which it began.
func TestBackup_IsOfOneMoment(t *testing.T) {
	w := &writer{t: t, store: New()}
	for i := range 5000 {
		w.put(fmt.Sprintf("key-%04d", i), fmt.Sprint(i))
	}
	want := w.store.Snapshot()
	b, err := w.store.Backup()
	testkit.Must(t, err)
	var out bytes.Buffer
	testkit.Must(t, b.Encode(&out, BackupHead{Format: BackupFormat}, func() {
		for range 50 {
			w.put(fmt.Sprintf("key-%04d", rand.IntN(6000)), "new")
			w.apply(Command{Op: OpDelete, Key: fmt.Sprintf("key-%04d", rand.IntN(6000))})
		}
	}))
	b.Close()
	got, err := parseBackup(out.Bytes())
	testkit.Must(t, err)
	sameItems(t, &got.State, &want)
	if w.store.Version() == want.RV || len(w.store.State.Scans) != 0 {
		t.Errorf("version %d, %d scans are left", w.store.Version(), len(w.store.State.Scans))
	}
}

// A backup takes no memory that grows with the state.
func TestBackup_TakesLittleMemory(t *testing.T) {
	w := &writer{t: t, store: New()}
	for i := range 100_000 {
		w.put(fmt.Sprintf("key-%06d", i), strings.Repeat("v", 500))
	}
	b, err := w.store.Backup()
	testkit.Must(t, err)
	defer b.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	testkit.Must(t, b.Encode(io.Discard, BackupHead{Format: BackupFormat}, func() {}))
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 2<<20 {
		t.Errorf("a backup of %d bytes allocated %d", w.store.Size(), n)
	}
}

// Any flipped bit, any lost byte and anything added is noticed.
func TestBackup_NoticesDamage(t *testing.T) {
	whole := backupBytes(t, &Store{State: smallState(t)})
	got, err := parseBackup(whole)
	testkit.Must(t, err)
	if got.Digest != fmt.Sprintf("%x", sha256.Sum256(whole[:len(whole)-sha256.Size])) || got.Cluster != "7" {
		t.Errorf("%+v", got)
	}
	for i := range whole {
		damaged := bytes.Clone(whole)
		damaged[i] ^= 1 << (i % 8)
		if _, err := parseBackup(damaged); err == nil {
			t.Errorf("byte %d of %d", i, len(whole))
		}
		if _, err := parseBackup(whole[:i]); !errors.Is(err, ErrSnapshotDamage) {
			t.Errorf("%d bytes of %d: %v", i, len(whole), err)
		}
	}
	if _, err := parseBackup(append(whole, 0)); !errors.Is(err, ErrSnapshotDamage) {
		t.Error(err)
	}
}

// TestBackup_Head: a backup of a format that comes later says who can read it, and a head has a limit.
func TestBackup_Head(t *testing.T) {
	w := &writer{t: t, store: New()}
	w.put("a", "12345")
	w.put("bc", "")
	write := func(head BackupHead) []byte {
		b, err := w.store.Backup()
		testkit.Must(t, err)
		defer b.Close()
		var out bytes.Buffer
		testkit.Must(t, b.Encode(&out, head, func() {}))
		return out.Bytes()
	}
	head := BackupHead{Format: BackupFormat, Version: "v0"}
	empty, err := json.Marshal(head)
	testkit.Must(t, err)
	head.Version += strings.Repeat("0", backupHeadMax-len(empty))
	got, err := parseBackup(write(head))
	testkit.Must(t, err)
	if got.Version != head.Version || got.Bytes() != 1+5+2 {
		t.Errorf("version of %d bytes, keys and values of %d", len(got.Version), got.Bytes())
	}
	head.Version += "0"
	if _, err := parseBackup(write(head)); !errors.Is(err, ErrSnapshotDamage) || !strings.Contains(err.Error(), fmt.Sprintf("head of %d bytes", backupHeadMax+1)) {
		t.Errorf("a head that is too long: %v", err)
	}
	for _, format := range []int{0, BackupFormat + 1} {
		_, err := parseBackup(write(BackupHead{Format: format, Version: "v9"}))
		if err == nil || errors.Is(err, ErrSnapshotDamage) || !strings.Contains(err.Error(), `the version that wrote it, "v9"`) {
			t.Errorf("format %d: %v", format, err)
		}
	}
}

// TestBackup_Fails: what cannot be begun or written to its end says so.
func TestBackup_Fails(t *testing.T) {
	s := &Store{State: smallState(t)}
	size := len(backupBytes(t, s))
	for n := range size {
		b, err := s.Backup()
		testkit.Must(t, err)
		err = b.Encode(&limitedWriter{left: n, err: io.ErrShortWrite}, BackupHead{Format: BackupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {})
		b.Close()
		if !errors.Is(err, io.ErrShortWrite) {
			t.Fatalf("room for %d of %d bytes: %v", n, size, err)
		}
	}
	for range ScansMax {
		_, err := s.Scan("", "")
		testkit.Must(t, err)
	}
	if b, err := s.Backup(); b != nil || !errors.Is(err, errScans) {
		t.Errorf("%v, %v", b, err)
	}
}

func FuzzBackupRead(f *testing.F) {
	w := &writer{t: f, store: New()}
	w.put("a", "1")
	b, err := w.store.Backup()
	if err != nil {
		f.Fatal(err)
	}
	var out bytes.Buffer
	if err := b.Encode(&out, BackupHead{Format: BackupFormat}, func() {}); err != nil {
		f.Fatal(err)
	}
	f.Add(out.Bytes())
	f.Fuzz(func(_ *testing.T, data []byte) {
		_, _ = parseBackup(data) // must only return
	})
}
