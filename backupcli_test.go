package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
)

// backupOf writes a backup of a state to a file.
func backupOf(t *testing.T, st store.State) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backup")
	testkit.Must(t, os.WriteFile(path, storetest.Backup(t, st), fsx.FileMode))
	return path
}

// What does not arrive whole does not replace what was there.
func TestSaveBackup(t *testing.T) {
	old := storetest.SomeState(t)
	whole := storetest.Backup(t, old)
	digest := sha256.Sum256(whole)
	path := filepath.Join(t.TempDir(), "backup")
	node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "Repr-Digest")
		_, _ = w.Write(whole)
		w.Header().Set("Repr-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(digest[:])+":")
	}))
	defer node.Close()
	saved, err := saveBackup(t.Context(), node.URL+"/", path)
	testkit.Must(t, err)
	got, err := store.ReadBackup(path)
	testkit.Must(t, err)
	if got.State.RV != old.RV || saved.size != got.Size {
		t.Errorf("%+v", got)
	}
	info, err := os.Stat(path)
	testkit.Must(t, err)
	if info.Mode().Perm() != fsx.FileMode {
		t.Errorf("mode %v", info.Mode())
	}
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
			_, _ = w.Write([]byte(`{"code":"no-leader","message":"no leader"}`))
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
	if testkit.ReadFile(t, path) != string(whole) {
		t.Error("the backup that was there has changed")
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	testkit.Must(t, err)
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

func TestCommand_BackupInspect(t *testing.T) {
	path := backupOf(t, storetest.SomeState(t))
	out, err := runCommand(t, "backup", "inspect", path)
	testkit.Must(t, err)
	for _, want := range []string{"checksum          ok, SHA-256 ", "format            1\n", "cluster           7\n", "members           1=http://a:1,2=http://b:1\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	b := []byte(testkit.ReadFile(t, path))
	b[len(b)/2] ^= 1
	testkit.Must(t, os.WriteFile(path, b, fsx.FileMode))
	if out, err := runCommand(t, "backup", "inspect", path); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "byte") {
		t.Errorf("%v\n%s", err, out)
	}
	testkit.Must(t, os.WriteFile(path, []byte("something else that is longer than a digest"), fsx.FileMode))
	if _, err := runCommand(t, "backup", "inspect", path); err == nil || !strings.Contains(err.Error(), "no backup of raftrv") {
		t.Error(err)
	}
}

// Backups were called snapshots once; who types that is told how they are called now.
func TestCommand_Snapshot(t *testing.T) {
	for _, args := range [][]string{{}, {"--help"}, {"save", "--from", "http://127.0.0.1:1", "file"}, {"inspect", "file"}} {
		out, err := runCommand(t, append([]string{"snapshot"}, args...)...)
		if err == nil || out != "" || !strings.Contains(err.Error(), "raftrv backup") {
			t.Errorf("%q: %v\n%s", args, err, out)
		}
	}
}

const restoreMembers = "http://127.0.0.1:1,http://127.0.0.1:2,http://127.0.0.1:3"

// Every node comes to the same state and the same cluster, which is a new one
// each time.
func TestCommand_BackupRestore(t *testing.T) {
	smallSegments(t)
	old := storetest.SomeState(t)
	path := backupOf(t, old)
	parent := t.TempDir()
	var clusters []uint64
	for round := range 2 { // with the same file and the same flags
		bodies, directories := map[string]bool{}, map[uint64]bool{}
		var records []*founding
		for id := range 3 {
			dir := filepath.Join(parent, fmt.Sprint(round), fmt.Sprint(id+1))
			args := []string{"backup", "restore", path, "--data-dir", dir, "--id", fmt.Sprint(id + 1), "--cluster", restoreMembers}
			out, err := runCommand(t, args...)
			testkit.Must(t, err)
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
			testkit.Must(t, err)
			records = append(records, own)
			testkit.Must(t, s.close())
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
			testkit.Must(t, err)
			testkit.Must(t, s.close())
			s, rec := openRestored(t, dir)
			checkRestored(t, rec, &old)
			bodies[testkit.ReadFile(t, s.bodyPath(store.FirstIndex))], directories[rec.identity.Directory] = true, true
			if own, err := s.loadFounding(); own != nil || err != nil || rec.identity.Cluster != step.cluster {
				t.Errorf("%+v, %v, cluster %x", own, err, rec.identity.Cluster)
			}
			if i == 0 {
				clusters = append(clusters, step.cluster)
			} else if step.cluster != clusters[len(clusters)-1] {
				t.Errorf("clusters %x, then %x", clusters, step.cluster)
			}
			testkit.Must(t, s.close())
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
	testkit.Must(t, err)
	rec, err := s.load()
	testkit.Must(t, err)
	return s, rec
}

// checkRestored looks at a restored state, of which old is the origin.
func checkRestored(t *testing.T, rec *recovered, old *store.State) {
	t.Helper()
	got := rec.state
	if got.RV != old.RV+store.VersionJump || got.Index != store.FirstIndex || !rec.untouched() {
		t.Errorf("version %d, index %d, untouched %v; version in the backup %d", got.RV, got.Index, rec.untouched(), old.RV)
	}
	if len(got.Sessions) != 0 || len(got.Removed) != 0 || len(got.Members) != 3 || got.Members[2].Learner || len(rec.confState.GetVoters()) != 3 {
		t.Errorf("sessions %v, members %v, removed %v, %v", got.Sessions, got.Members, got.Removed, rec.confState)
	}
	if _, ok := got.Events.Seek(got.RV - 1); ok {
		t.Error("a watch could go on from an old version")
	}
	if _, ok := got.Events.Seek(got.RV); !ok {
		t.Error("no watch can begin")
	}
	got.RV = old.RV
	storetest.SameItems(t, &got, old)
	if got.Retries.Records.Len() != old.Retries.Records.Len() {
		t.Errorf("%d outcomes of retries, want %d", got.Retries.Records.Len(), old.Retries.Records.Len())
	}
}

// A survivor gives all that its log has, known to be committed or not, and its
// own directory stays.
func TestCommand_Recover(t *testing.T) {
	smallSegments(t)
	parent := t.TempDir()
	from, to := filepath.Join(parent, "data"), filepath.Join(parent, "data-recovered")
	s, rec := newDisk(t, from)
	rec.state.Members[2] = store.Member{ID: 2, PeerURL: "http://127.0.0.1:2"}
	rec.state.Members[3] = store.Member{ID: 3, PeerURL: "http://127.0.0.1:3"}
	rec.state.Removed[4] = true
	st := &store.Store{State: rec.state}
	snapshotAt(t, s, st, 20)
	e := putEntry(21, 3, "not known to be committed", "v")
	testkit.Must(t, s.save(&raftpb.HardState{Term: new(uint64(3)), Commit: new(uint64(20))}, []*raftpb.Entry{e}))
	testkit.Must(t, applyEntry(st, e))
	if _, err := runCommand(t, "recover", "--data-dir", from); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("recovered from a node that runs: %v", err)
	}
	testkit.Must(t, s.close())
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
	testkit.Must(t, err)
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
	if len(got.Members) != 1 || got.Members[1].PeerURL != "http://127.0.0.1:1" || !got.Removed[2] || !got.Removed[3] || !got.Removed[4] || got.Removed[1] {
		t.Errorf("members %v, removed %v", got.Members, got.Removed)
	}
	if rec.identity.Cluster == 7 || got.RV != st.Version()+store.VersionJump {
		t.Errorf("cluster %x, version %d", rec.identity.Cluster, got.RV)
	}
	got.RV = st.Version()
	storetest.SameItems(t, &got, &st.State)
}

// What cannot be made completely is not taken for something that it is not.
func TestMakeDirectory_Fails(t *testing.T) {
	dir := t.TempDir()
	cfg := configOf(t, "--id", "1", "--cluster", restoreMembers, "--data-dir", filepath.Join(dir, "file", "data"))
	testkit.Must(t, os.WriteFile(filepath.Join(dir, "file"), nil, fsx.FileMode))
	b, err := store.ReadBackup(backupOf(t, storetest.SomeState(t)))
	testkit.Must(t, err)
	if err := restoreBackup(cfg, b, 0, zap.NewNop()); err == nil {
		t.Error("made a directory in a file")
	}
}
