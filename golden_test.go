package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

func goldenPath(level int) string { return fmt.Sprintf("testdata/level-%d.tar.gz", level) }

// unpackGolden returns a directory with what a program of a level wrote.
func unpackGolden(t *testing.T, level int) string {
	t.Helper()
	f, err := os.Open(goldenPath(level))
	testkit.Must(t, err)
	defer f.Close()
	unzip, err := gzip.NewReader(f)
	testkit.Must(t, err)
	dir := t.TempDir()
	for archive := tar.NewReader(unzip); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		testkit.Must(t, err)
		content, err := io.ReadAll(archive)
		testkit.Must(t, err)
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		testkit.Must(t, os.MkdirAll(filepath.Dir(path), fsx.DirMode))
		testkit.Must(t, os.WriteFile(path, content, fsx.FileMode))
	}
}

// TestGolden_DataDirectory: what a program of any level left is opened, and holds what it listed. So there is a file
// for each level, and the program of a next level opens those of this one.
func TestGolden_DataDirectory(t *testing.T) {
	smallSegments(t)
	for level := store.LevelFirst; level <= store.LevelNewest; level++ {
		dir := unpackGolden(t, level)
		s, rec := openRestored(t, filepath.Join(dir, "data"))
		began := rec.state.Index
		testkit.Must(t, rec.replay())
		st := &rec.state
		if began == 0 || st.Index <= began {
			t.Errorf("level %d: a snapshot at entry %d, and a log up to %d", level, began, st.Index)
		}
		if st.Level != level || rec.identity.Member != 1 {
			t.Errorf("level %d: level %d of member %d", level, st.Level, rec.identity.Member)
		}
		if m := st.Members[2]; len(st.Members) != 2 || m.PeerURL != "http://127.0.0.1:1" || m.Name != "never there" || !m.Learner {
			t.Errorf("level %d: members %v", level, st.Members)
		}
		if len(st.Sessions) != 2 {
			t.Errorf("level %d: %d sessions", level, len(st.Sessions))
		}
		wantGoldenItems(t, dir, st)
		wantGoldenEvents(t, dir, st)

		wantSameAfresh(t, level, st)

		// It goes on as it was: with a snapshot of the same level, which is read again.
		again, err := store.ReadState(bytes.NewReader(encodeState(t, st)))
		if err != nil || again.Level != level || again.Sum != st.Sum || again.Retries.Digest != st.Retries.Digest || again.SessionsDigest != st.SessionsDigest {
			t.Errorf("level %d: written and read: %v", level, err)
		}
		testkit.Must(t, s.close())
	}
}

// wantSameAfresh: with the snapshot before, more of the log is applied, as it was by the program that wrote the
// newest snapshot.
func wantSameAfresh(t *testing.T, level int, want *store.State) {
	t.Helper()
	dir := filepath.Join(unpackGolden(t, level), "data")
	for _, kind := range []string{"*.snap", "*.snap.db"} {
		names, err := filepath.Glob(filepath.Join(dir, "snap", kind))
		testkit.Must(t, err)
		testkit.Must(t, os.Remove(slices.Max(names)))
	}
	s, rec := openRestored(t, dir)
	began := rec.state.Index
	testkit.Must(t, rec.replay())
	if st := &rec.state; began >= want.Index-10 || st.Index != want.Index || st.Sum != want.Sum {
		t.Errorf("level %d: from entry %d on, state %x at entry %d, want %x at entry %d", level, began, st.Sum, st.Index, want.Sum, want.Index)
	}
	testkit.Must(t, s.close())
}

// TestGolden_Backup: a backup of any level is inspected, and restored at its level.
func TestGolden_Backup(t *testing.T) {
	smallSegments(t)
	for level := store.LevelFirst; level <= store.LevelNewest; level++ {
		dir := unpackGolden(t, level)
		out, err := runCommand(t, "backup", "inspect", filepath.Join(dir, "backup"))
		if err != nil || !strings.Contains(out, "checksum          ok") {
			t.Errorf("level %d: %v %s", level, err, out)
		}
		to := filepath.Join(dir, "restored")
		_, err = runCommand(t, "backup", "restore", filepath.Join(dir, "backup"), "--data-dir", to, "--id", "1", "--cluster", restoreMembers)
		testkit.Must(t, err)
		s, _ := openRestored(t, to)
		st, err := s.readBody(store.FirstIndex, store.FirstTerm)
		testkit.Must(t, err)
		if st.Level != level || len(st.Members) != 3 {
			t.Errorf("level %d: level %d, members %v", level, st.Level, st.Members)
		}
		wantGoldenItems(t, dir, &st)
		testkit.Must(t, s.close())
	}
}

// wantGoldenItems compares the keys of a state, and the outcomes of requests, with what its node listed.
func wantGoldenItems(t *testing.T, dir string, st *store.State) {
	t.Helper()
	var lines []string
	st.Items.Scan(func(key string, it store.Item) bool {
		lines = append(lines, string(store.AppendItemJSON(nil, key, it, false)))
		return true
	})
	var want []string
	for line := range strings.Lines(testkit.ReadFile(t, filepath.Join(dir, "items"))) {
		if strings.Contains(line, `"key`) { // else it is the end of the list
			want = append(want, strings.TrimSpace(line))
		}
	}
	if len(want) == 0 || !slices.Equal(lines, want) {
		t.Errorf("level %d: holds\n%s\nwant\n%s", st.Level, strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	for _, round := range []string{"one", "two", "three"} {
		n, known := st.Retries.Numbers.Get("invoice-" + round)
		r, _ := st.Retries.Records.Get(n)
		it, exists := st.Items.Get("g/once-" + round)
		first, replayed := st.Retries.Lookup(r.ID, st.Clock())
		if !known || !exists || !replayed || first.RV != it.RV || first.Status != store.StatusCreated {
			t.Errorf("level %d: the request invoice-%s: %+v, %v", st.Level, round, first, replayed)
		}
		if it, _ := st.Items.Get("g/ttl-" + round); it.Expires == 0 {
			t.Errorf("level %d: g/ttl-%s has no deadline", st.Level, round)
		}
	}
}

// wantGoldenEvents compares the window of events with what a watch of its node saw.
func wantGoldenEvents(t *testing.T, dir string, st *store.State) {
	t.Helper()
	var want, got []string
	for line := range strings.Lines(testkit.ReadFile(t, filepath.Join(dir, "events"))) {
		var e struct {
			Type   string
			Object struct {
				Key             string
				KeyBase64       string
				ResourceVersion uint64
			}
		}
		testkit.Must(t, json.Unmarshal([]byte(line), &e))
		if e.Object.Key+e.Object.KeyBase64 != "" {
			want = append(want, fmt.Sprint(e.Type, " ", e.Object.KeyBase64 != "" || e.Object.Key == "", " ", e.Object.ResourceVersion))
		}
	}
	s := &store.Store{State: *st}
	n, ok := s.SeekEvent(0)
	for ok {
		events, _, _ := s.EventsFrom(n)
		if len(events) == 0 {
			break
		}
		for _, e := range events {
			kind := map[store.EventKind]string{store.EventAdded: "ADDED", store.EventModified: "MODIFIED", store.EventDeleted: "DELETED", store.EventExpired: "DELETED"}[e.Kind]
			got = append(got, fmt.Sprint(kind, " ", e.Key == "g/\x00\xff", " ", e.RV))
		}
		n += uint64(len(events))
	}
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("level %d: events\n%q\nwant\n%q", st.Level, got, want)
	}
}
