package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// backupBytes returns a backup of a store.
func backupBytes(t *testing.T, s *kvstore) []byte {
	t.Helper()
	b, err := s.backup()
	must(t, err)
	defer b.close()
	var out bytes.Buffer
	must(t, b.writeTo(&out, backupHead{Format: backupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {}))
	return out.Bytes()
}

// backupOf writes a backup of a state to a file.
func backupOf(t *testing.T, st state) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backup")
	must(t, os.WriteFile(path, backupBytes(t, &kvstore{state: st}), fileMode))
	return path
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
	must(t, err)
	var out bytes.Buffer
	must(t, b.writeTo(&out, backupHead{Format: backupFormat}, func() {
		for range 50 {
			w.put(fmt.Sprintf("key-%04d", rand.IntN(6000)), "new")
			w.apply(command{op: opDelete, key: fmt.Sprintf("key-%04d", rand.IntN(6000))})
		}
	}))
	b.close()
	got, err := parseBackup(out.Bytes())
	must(t, err)
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
	must(t, err)
	defer b.close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	must(t, b.writeTo(io.Discard, backupHead{Format: backupFormat}, func() {}))
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 2<<20 {
		t.Errorf("a backup of %d bytes allocated %d", w.store.size(), n)
	}
}

// Any flipped bit, any lost byte and anything added is noticed.
func TestBackup_NoticesDamage(t *testing.T) {
	whole := backupBytes(t, &kvstore{state: smallState(t)})
	got, err := parseBackup(whole)
	must(t, err)
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
		must(t, err)
		defer b.close()
		var out bytes.Buffer
		must(t, b.writeTo(&out, head, func() {}))
		return out.Bytes()
	}
	head := backupHead{Format: backupFormat, Version: "v0"}
	empty, err := json.Marshal(head)
	must(t, err)
	head.Version += strings.Repeat("0", backupHeadMax-len(empty))
	got, err := parseBackup(write(head))
	must(t, err)
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
		must(t, err)
		err = b.writeTo(&limitedWriter{left: n, err: io.ErrShortWrite}, backupHead{Format: backupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {})
		b.close()
		if !errors.Is(err, io.ErrShortWrite) {
			t.Fatalf("room for %d of %d bytes: %v", n, size, err)
		}
	}
	for range scansMax {
		_, err := s.scan("", "")
		must(t, err)
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

func TestHTTP_Snapshot(t *testing.T) {
	f := newFront(t)
	for i := range 1000 {
		f.put(fmt.Sprint("key-", i), strings.Repeat("v", i))
	}
	a := f.do("GET", "/-/v1/snapshot", "")
	a.want(t, 200)
	a.wantHeader(t, "Resource-Version", "1000")
	a.wantHeader(t, "Raft-Index", fmt.Sprint(f.store.applied()))
	a.wantHeader(t, "Content-Type", "application/octet-stream")
	got, err := parseBackup([]byte(a.body))
	must(t, err)
	want := f.store.snapshot()
	sameItems(t, &got.state, &want)
	if a.header.Get("Cluster-Id") != got.Cluster || got.Member != 1 || got.Version != "v0" {
		t.Errorf("%+v, header %v", got.backupHead, a.header)
	}
	f.do("HEAD", "/-/v1/snapshot", "").wantHeader(t, "Resource-Version", "1000")
	f.do("GET", "/-/v1/snapshot?prefix=key", "").want(t, 400)
	f.do("GET", "/-/v1/snapshot?resourceVersion=1000", "").want(t, 200)
	if left := len(f.store.state.scans); left != 0 {
		t.Errorf("%d scans are left", left)
	}
}

// Who reads slowly gets all of it. Who does not read is cut off.
func TestHTTP_SlowSnapshot(t *testing.T) {
	for _, pause := range []time.Duration{streamWriteTimeout - time.Second, streamWriteTimeout + time.Second} {
		t.Run(pause.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newPipeFront(t)
				for i := range 50 {
					f.put(fmt.Sprintf("key-%02d", i), strings.Repeat("v", 64<<10))
				}
				c := f.mustDial()
				_, err := io.WriteString(c, "GET /-/v1/snapshot HTTP/1.1\r\nHost: x\r\n\r\n")
				must(t, err)
				res, err := http.ReadResponse(bufio.NewReader(c), nil)
				must(t, err)
				digest, part := sha256.New(), make([]byte, 2*frameSize) // a write never waits for two of them
				for err == nil {
					time.Sleep(pause)
					var n int
					n, err = io.ReadFull(res.Body, part)
					digest.Write(part[:n])
				}
				isWhole := res.Trailer.Get("Repr-Digest") == formatDigest(digest)
				if want := pause < streamWriteTimeout; isWhole != want {
					t.Errorf("whole: %v; %v, trailer %v", isWhole, err, res.Trailer)
				}
				synctest.Wait()
				if left := len(f.store.state.scans); left != 0 {
					t.Errorf("%d scans are left", left)
				}
			})
		})
	}
}

// What does not arrive whole does not replace what was there.
func TestSaveBackup(t *testing.T) {
	f := newFront(t)
	f.put("a", "1")
	path := filepath.Join(t.TempDir(), "backup")
	saved, err := saveBackup(t.Context(), "http://"+f.mustDial().RemoteAddr().String()+"/", path)
	must(t, err)
	got, err := readBackup(path)
	must(t, err)
	if got.state.rv != 1 || saved.size != got.size {
		t.Errorf("%+v", got)
	}
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != fileMode {
		t.Errorf("mode %v", info.Mode())
	}
	whole := []byte(readFile(t, path))
	for name, serve := range map[string]func(w http.ResponseWriter){
		"a wrong digest": func(w http.ResponseWriter) {
			w.Header().Set("Trailer", "Repr-Digest")
			_, _ = w.Write(whole)
			w.Header().Set("Repr-Digest", "sha-256=:AAAA:")
		},
		"no digest": func(w http.ResponseWriter) { _, _ = w.Write(whole) },
		"broken off": func(w http.ResponseWriter) {
			_, _ = w.Write(whole[:10])
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		},
		"refused": func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = w.Write(newProblem(errNoLeader).encode())
		},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { serve(w) }))
		if _, err := saveBackup(t.Context(), server.URL, path); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
		server.Close()
	}
	if readFile(t, path) != string(whole) {
		t.Error("the backup that was there has changed")
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

// runCommand runs the program in this process.
func runCommand(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := run(context.Background(), args, &out, io.Discard)
	return out.String(), err
}

func TestCommand_SnapshotInspect(t *testing.T) {
	path := backupOf(t, smallState(t))
	out, err := runCommand(t, "snapshot", "inspect", path)
	must(t, err)
	for _, want := range []string{"checksum          ok, SHA-256 ", "format            1\n", "cluster           7\n", "members           1=http://a:1,2=http://b:1\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	b := []byte(readFile(t, path))
	b[len(b)/2] ^= 1
	must(t, os.WriteFile(path, b, fileMode))
	if out, err := runCommand(t, "snapshot", "inspect", path); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "byte") {
		t.Errorf("%v\n%s", err, out)
	}
	must(t, os.WriteFile(path, []byte("something else that is longer than a digest"), fileMode))
	if _, err := runCommand(t, "snapshot", "inspect", path); err == nil || !strings.Contains(err.Error(), "no backup of raftrv") {
		t.Error(err)
	}
}

const restoreMembers = "http://127.0.0.1:1,http://127.0.0.1:2,http://127.0.0.1:3"

// Every node comes to the same state and the same cluster, which is a new one
// each time.
func TestCommand_SnapshotRestore(t *testing.T) {
	smallSegments(t)
	old := smallState(t)
	path := backupOf(t, old)
	parent := t.TempDir()
	var clusters []uint64
	for round := range 2 { // with the same file and the same flags
		bodies, directories := map[string]bool{}, map[uint64]bool{}
		var records []*founding
		for id := range 3 {
			dir := filepath.Join(parent, fmt.Sprint(round), fmt.Sprint(id+1))
			args := []string{"snapshot", "restore", path, "--data-dir", dir, "--id", fmt.Sprint(id + 1), "--cluster", restoreMembers}
			out, err := runCommand(t, args...)
			must(t, err)
			if !strings.Contains(out, fmt.Sprintf("raftrv --id %d --cluster %s --data-dir %s\n", id+1, restoreMembers, dir)) {
				t.Errorf("it does not say how to start:\n%s", out)
			}
			if _, err := runCommand(t, args...); err == nil || !strings.Contains(err.Error(), "is not empty") {
				t.Errorf("restored into what it restored: %v", err)
			}
			s, rec := openRestored(t, dir)
			if rec != nil {
				t.Error("it is in a cluster already")
			}
			own, err := s.loadFounding()
			must(t, err)
			records = append(records, own)
			must(t, s.close())
		}
		for i, own := range records {
			answers := map[uint64]peerAnswer{}
			for _, other := range records {
				answers[other.Member] = peerAnswer{info: &peerInfo{Node: other.Member, Process: other.Member, Founding: other}}
			}
			step := own.decide(own.Member, answers)
			if step.cluster == 0 {
				t.Fatalf("%+v", step)
			}
			dir := filepath.Join(parent, fmt.Sprint(round), fmt.Sprint(i+1))
			s, _ := openRestored(t, dir)
			_, err := s.found(own, step.cluster, step.founders)
			must(t, err)
			must(t, s.close())
			s, rec := openRestored(t, dir)
			checkRestored(t, rec, &old)
			bodies[readFile(t, s.bodyPath(firstIndex))], directories[rec.identity.Directory] = true, true
			if own, err := s.loadFounding(); own != nil || err != nil || rec.identity.Cluster != step.cluster {
				t.Errorf("%+v, %v, cluster %x", own, err, rec.identity.Cluster)
			}
			if i == 0 {
				clusters = append(clusters, step.cluster)
			} else if step.cluster != clusters[len(clusters)-1] {
				t.Errorf("clusters %x, then %x", clusters, step.cluster)
			}
			must(t, s.close())
		}
		if len(bodies) != 1 || len(directories) != 3 {
			t.Errorf("%d different states, directories %v", len(bodies), directories)
		}
	}
	if clusters[0] == clusters[1] {
		t.Error("restored twice, it is the same cluster")
	}
}

func openRestored(t *testing.T, dir string) (*storage, *recovered) {
	t.Helper()
	s, err := openStorage(dir, zap.NewNop())
	must(t, err)
	rec, err := s.load()
	must(t, err)
	return s, rec
}

// checkRestored looks at a restored state, of which old is the origin.
func checkRestored(t *testing.T, rec *recovered, old *state) {
	t.Helper()
	got := rec.state
	if got.rv != old.rv+versionJump || got.index != firstIndex || !rec.untouched() {
		t.Errorf("version %d, index %d, untouched %v; version in the backup %d", got.rv, got.index, rec.untouched(), old.rv)
	}
	if len(got.sessions) != 0 || len(got.removed) != 0 || len(got.members) != 3 || got.members[2].Learner || len(rec.confState.GetVoters()) != 3 {
		t.Errorf("sessions %v, members %v, removed %v, %v", got.sessions, got.members, got.removed, rec.confState)
	}
	if _, ok := got.events.seek(got.rv - 1); ok {
		t.Error("a watch could go on from an old version")
	}
	if _, ok := got.events.seek(got.rv); !ok {
		t.Error("no watch can begin")
	}
	got.rv = old.rv
	sameItems(t, &got, old)
	if got.retries.records.Len() != old.retries.records.Len() {
		t.Errorf("%d outcomes of retries, want %d", got.retries.records.Len(), old.retries.records.Len())
	}
}

// A survivor gives all that its log has, known to be committed or not, and its
// own directory stays.
func TestCommand_Recover(t *testing.T) {
	smallSegments(t)
	parent := t.TempDir()
	from, to := filepath.Join(parent, "data"), filepath.Join(parent, "data-recovered")
	s, rec := newDisk(t, from)
	rec.state.members[2] = member{ID: 2, PeerURL: "http://127.0.0.1:2"}
	rec.state.members[3] = member{ID: 3, PeerURL: "http://127.0.0.1:3"}
	rec.state.removed[4] = true
	st := &kvstore{state: rec.state}
	snapshotAt(t, s, st, 20)
	e := putEntry(21, 3, "not known to be committed", "v")
	must(t, s.save(&raftpb.HardState{Term: new(uint64(3)), Commit: new(uint64(20))}, []*raftpb.Entry{e}))
	applyEntry(t, st, e)
	if _, err := runCommand(t, "recover", "--data-dir", from); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("recovered from a node that runs: %v", err)
	}
	must(t, s.close())
	before := readTree(t, from)

	for id, want := range map[string]string{"2": "never used again", "4": "never used again"} {
		if _, err := runCommand(t, "recover", "--data-dir", from, "--id", id); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("--id %s: %v", id, err)
		}
	}
	if _, err := runCommand(t, "recover", "--data-dir", parent, "--to", from); err == nil {
		t.Error("recovered into a directory that is not empty")
	}
	if _, err := runCommand(t, "recover", "--data-dir", filepath.Join(parent, "none")); err == nil {
		t.Error("recovered from nothing")
	}
	out, err := runCommand(t, "recover", "--data-dir", from)
	must(t, err)
	for _, want := range []string{
		"entries up to 21 of term 3", "those after 20 were committed", "2 (http://127.0.0.1:2), 3 (http://127.0.0.1:3), are missing",
		"raftrv --id 1 --cluster 1=http://127.0.0.1:1 --data-dir " + to + "\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	after := readTree(t, from)
	for name, b := range before {
		if kindOf(name) != "" && !bytes.Equal(after[name], b) {
			t.Errorf("%s has changed", name)
		}
	}
	s, rec = openRestored(t, to)
	defer s.close()
	got := rec.state
	if len(got.members) != 1 || got.members[1].PeerURL != "http://127.0.0.1:1" || !got.removed[2] || !got.removed[3] || !got.removed[4] || got.removed[1] {
		t.Errorf("members %v, removed %v", got.members, got.removed)
	}
	if rec.identity.Cluster == 7 || got.rv != st.version()+versionJump {
		t.Errorf("cluster %x, version %d", rec.identity.Cluster, got.rv)
	}
	got.rv = st.version()
	sameItems(t, &got, &st.state)
}

// What cannot be made completely is not taken for something that it is not.
func TestMakeDirectory_Fails(t *testing.T) {
	dir := t.TempDir()
	cfg := configOf(t, "--id", "1", "--cluster", restoreMembers, "--data-dir", filepath.Join(dir, "file", "data"))
	must(t, os.WriteFile(filepath.Join(dir, "file"), nil, fileMode))
	b, err := readBackup(backupOf(t, smallState(t)))
	must(t, err)
	if err := restoreBackup(cfg, b, 0, zap.NewNop()); err == nil {
		t.Error("made a directory in a file")
	}
}
