package main

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
func backupBytes(t *testing.T, s *kvstore) []byte {
	t.Helper()
	b, err := s.backup()
	testkit.Must(t, err)
	defer b.close()
	var out bytes.Buffer
	testkit.Must(t, b.writeTo(&out, backupHead{Format: backupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {}))
	return out.Bytes()
}

func parseBackup(b []byte) (*backupFile, error) {
	f := &backupFile{size: int64(len(b))}
	return f, f.read(bytes.NewReader(b))
}

// sameItems compares the items of two states.
func sameItems(t *testing.T, got, want *state) {
	t.Helper()
	if got.rv != want.rv || got.items.Len() != want.items.Len() {
		t.Errorf("version %d and %d items, want %d and %d", got.rv, got.items.Len(), want.rv, want.items.Len())
	}
	want.items.Scan(func(key string, it item) bool {
		if other, ok := got.items.Get(key); !ok || other != it {
			t.Errorf("%q is %+v, want %+v", key, other, it)
		}
		return true
	})
}

// A backup holds the state of the moment at which it began.
func TestBackup_IsOfOneMoment(t *testing.T) {
	w := &writer{t: t, store: newKVStore()}
	for i := range 5000 {
		w.put(fmt.Sprintf("key-%04d", i), fmt.Sprint(i))
	}
	want := w.store.snapshot()
	b, err := w.store.backup()
	testkit.Must(t, err)
	var out bytes.Buffer
	testkit.Must(t, b.writeTo(&out, backupHead{Format: backupFormat}, func() {
		for range 50 {
			w.put(fmt.Sprintf("key-%04d", rand.IntN(6000)), "new")
			w.apply(command{op: opDelete, key: fmt.Sprintf("key-%04d", rand.IntN(6000))})
		}
	}))
	b.close()
	got, err := parseBackup(out.Bytes())
	testkit.Must(t, err)
	sameItems(t, &got.state, &want)
	if w.store.version() == want.rv || len(w.store.state.scans) != 0 {
		t.Errorf("version %d, %d scans are left", w.store.version(), len(w.store.state.scans))
	}
}

// A backup takes no memory that grows with the state.
func TestBackup_TakesLittleMemory(t *testing.T) {
	w := &writer{t: t, store: newKVStore()}
	for i := range 100_000 {
		w.put(fmt.Sprintf("key-%06d", i), strings.Repeat("v", 500))
	}
	b, err := w.store.backup()
	testkit.Must(t, err)
	defer b.close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	testkit.Must(t, b.writeTo(io.Discard, backupHead{Format: backupFormat}, func() {}))
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 2<<20 {
		t.Errorf("a backup of %d bytes allocated %d", w.store.size(), n)
	}
}

// Any flipped bit, any lost byte and anything added is noticed.
func TestBackup_NoticesDamage(t *testing.T) {
	whole := backupBytes(t, &kvstore{state: smallState(t)})
	got, err := parseBackup(whole)
	testkit.Must(t, err)
	if got.digest != fmt.Sprintf("%x", sha256.Sum256(whole[:len(whole)-sha256.Size])) || got.Cluster != "7" {
		t.Errorf("%+v", got)
	}
	for i := range whole {
		damaged := bytes.Clone(whole)
		damaged[i] ^= 1 << (i % 8)
		if _, err := parseBackup(damaged); err == nil {
			t.Errorf("byte %d of %d", i, len(whole))
		}
		if _, err := parseBackup(whole[:i]); !errors.Is(err, errSnapshotDamage) {
			t.Errorf("%d bytes of %d: %v", i, len(whole), err)
		}
	}
	if _, err := parseBackup(append(whole, 0)); !errors.Is(err, errSnapshotDamage) {
		t.Error(err)
	}
}

// TestBackup_Head: a backup of a format that comes later says who can read it, and a head has a limit.
func TestBackup_Head(t *testing.T) {
	w := &writer{t: t, store: newKVStore()}
	w.put("a", "12345")
	w.put("bc", "")
	write := func(head backupHead) []byte {
		b, err := w.store.backup()
		testkit.Must(t, err)
		defer b.close()
		var out bytes.Buffer
		testkit.Must(t, b.writeTo(&out, head, func() {}))
		return out.Bytes()
	}
	head := backupHead{Format: backupFormat, Version: "v0"}
	empty, err := json.Marshal(head)
	testkit.Must(t, err)
	head.Version += strings.Repeat("0", backupHeadMax-len(empty))
	got, err := parseBackup(write(head))
	testkit.Must(t, err)
	if got.Version != head.Version || got.bytes() != 1+5+2 {
		t.Errorf("version of %d bytes, keys and values of %d", len(got.Version), got.bytes())
	}
	head.Version += "0"
	if _, err := parseBackup(write(head)); !errors.Is(err, errSnapshotDamage) || !strings.Contains(err.Error(), fmt.Sprintf("head of %d bytes", backupHeadMax+1)) {
		t.Errorf("a head that is too long: %v", err)
	}
	for _, format := range []int{0, backupFormat + 1} {
		_, err := parseBackup(write(backupHead{Format: format, Version: "v9"}))
		if err == nil || errors.Is(err, errSnapshotDamage) || !strings.Contains(err.Error(), `the version that wrote it, "v9"`) {
			t.Errorf("format %d: %v", format, err)
		}
	}
}

// TestBackup_Fails: what cannot be begun or written to its end says so.
func TestBackup_Fails(t *testing.T) {
	s := &kvstore{state: smallState(t)}
	size := len(backupBytes(t, s))
	for n := range size {
		b, err := s.backup()
		testkit.Must(t, err)
		err = b.writeTo(&limitedWriter{left: n, err: io.ErrShortWrite}, backupHead{Format: backupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {})
		b.close()
		if !errors.Is(err, io.ErrShortWrite) {
			t.Fatalf("room for %d of %d bytes: %v", n, size, err)
		}
	}
	for range scansMax {
		_, err := s.scan("", "")
		testkit.Must(t, err)
	}
	if b, err := s.backup(); b != nil || !errors.Is(err, errScans) {
		t.Errorf("%v, %v", b, err)
	}
}

func FuzzBackupRead(f *testing.F) {
	w := &writer{t: f, store: newKVStore()}
	w.put("a", "1")
	b, err := w.store.backup()
	if err != nil {
		f.Fatal(err)
	}
	var out bytes.Buffer
	if err := b.writeTo(&out, backupHead{Format: backupFormat}, func() {}); err != nil {
		f.Fatal(err)
	}
	f.Add(out.Bytes())
	f.Fuzz(func(_ *testing.T, data []byte) {
		_, _ = parseBackup(data) // must only return
	})
}
