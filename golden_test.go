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
	for level := levelFirst; level <= levelNewest; level++ {
		dir := unpackGolden(t, level)
		s, rec := openRestored(t, filepath.Join(dir, "data"))
		began := rec.state.index
		testkit.Must(t, rec.replay())
		st := &rec.state
		if began == 0 || st.index <= began {
			t.Errorf("level %d: a snapshot at entry %d, and a log up to %d", level, began, st.index)
		}
		if st.level != level || rec.identity.Member != 1 {
			t.Errorf("level %d: level %d of member %d", level, st.level, rec.identity.Member)
		}
		if m := st.members[2]; len(st.members) != 2 || m.PeerURL != "http://127.0.0.1:1" || m.Name != "never there" || !m.Learner {
			t.Errorf("level %d: members %v", level, st.members)
		}
		if len(st.sessions) != 2 {
			t.Errorf("level %d: %d sessions", level, len(st.sessions))
		}
		wantGoldenItems(t, dir, st)
		wantGoldenEvents(t, dir, st)

		wantSameAfresh(t, level, st)

		// It goes on as it was: with a snapshot of the same level, which is read again.
		again, err := readState(bytes.NewReader(encodeState(t, st)))
		if err != nil || again.level != level || again.sum != st.sum || again.retries.digest != st.retries.digest || again.sessionsDigest != st.sessionsDigest {
			t.Errorf("level %d: written and read: %v", level, err)
		}
		testkit.Must(t, s.close())
	}
}

// wantSameAfresh: with the snapshot before, more of the log is applied, as it was by the program that wrote the
// newest snapshot.
func wantSameAfresh(t *testing.T, level int, want *state) {
	t.Helper()
	dir := filepath.Join(unpackGolden(t, level), "data")
	for _, kind := range []string{"*.snap", "*.snap.db"} {
		names, err := filepath.Glob(filepath.Join(dir, "snap", kind))
		testkit.Must(t, err)
		testkit.Must(t, os.Remove(slices.Max(names)))
	}
	s, rec := openRestored(t, dir)
	began := rec.state.index
	testkit.Must(t, rec.replay())
	if st := &rec.state; began >= want.index-10 || st.index != want.index || st.sum != want.sum {
		t.Errorf("level %d: from entry %d on, state %x at entry %d, want %x at entry %d", level, began, st.sum, st.index, want.sum, want.index)
	}
	testkit.Must(t, s.close())
}

// TestGolden_Backup: a backup of any level is inspected, and restored at its level.
func TestGolden_Backup(t *testing.T) {
	smallSegments(t)
	for level := levelFirst; level <= levelNewest; level++ {
		dir := unpackGolden(t, level)
		out, err := runCommand(t, "snapshot", "inspect", filepath.Join(dir, "backup"))
		if err != nil || !strings.Contains(out, "checksum          ok") {
			t.Errorf("level %d: %v %s", level, err, out)
		}
		to := filepath.Join(dir, "restored")
		_, err = runCommand(t, "snapshot", "restore", filepath.Join(dir, "backup"), "--data-dir", to, "--id", "1", "--cluster", restoreMembers)
		testkit.Must(t, err)
		s, _ := openRestored(t, to)
		st, err := s.readBody(firstIndex, firstTerm)
		testkit.Must(t, err)
		if st.level != level || len(st.members) != 3 {
			t.Errorf("level %d: level %d, members %v", level, st.level, st.members)
		}
		wantGoldenItems(t, dir, &st)
		testkit.Must(t, s.close())
	}
}

// wantGoldenItems compares the keys of a state, and the outcomes of requests, with what its node listed.
func wantGoldenItems(t *testing.T, dir string, st *state) {
	t.Helper()
	var lines []string
	st.items.Scan(func(key string, it item) bool {
		lines = append(lines, string(appendItemJSON(nil, key, it, false)))
		return true
	})
	var want []string
	for line := range strings.Lines(testkit.ReadFile(t, filepath.Join(dir, "items"))) {
		if strings.Contains(line, `"key`) { // else it is the end of the list
			want = append(want, strings.TrimSpace(line))
		}
	}
	if len(want) == 0 || !slices.Equal(lines, want) {
		t.Errorf("level %d: holds\n%s\nwant\n%s", st.level, strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	for _, round := range []string{"one", "two", "three"} {
		n, known := st.retries.numbers.Get("invoice-" + round)
		r, _ := st.retries.records.Get(n)
		it, exists := st.items.Get("g/once-" + round)
		first, replayed := st.retries.lookup(r.id, st.clock())
		if !known || !exists || !replayed || first.rv != it.rv || first.status != statusCreated {
			t.Errorf("level %d: the request invoice-%s: %+v, %v", st.level, round, first, replayed)
		}
		if it, _ := st.items.Get("g/ttl-" + round); it.expires == 0 {
			t.Errorf("level %d: g/ttl-%s has no deadline", st.level, round)
		}
	}
}

// wantGoldenEvents compares the window of events with what a watch of its node saw.
func wantGoldenEvents(t *testing.T, dir string, st *state) {
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
	s := &kvstore{state: *st}
	n, ok := s.seekEvent(0)
	for ok {
		events, _, _ := s.eventsFrom(n)
		if len(events) == 0 {
			break
		}
		for _, e := range events {
			kind := map[eventKind]string{eventAdded: "ADDED", eventModified: "MODIFIED", eventDeleted: "DELETED", eventExpired: "DELETED"}[e.kind]
			got = append(got, fmt.Sprint(kind, " ", e.key == "g/\x00\xff", " ", e.rv))
		}
		n += uint64(len(events))
	}
	if len(want) == 0 || !slices.Equal(got, want) {
		t.Errorf("level %d: events\n%q\nwant\n%q", st.level, got, want)
	}
}
