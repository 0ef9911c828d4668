package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"raftrv/internal/proc"
)

// These tests open what programs of each feature level wrote: testdata/level-N.tar.gz has the data directory
// of a node (data), a backup (backup), and its keys and events as it listed them. It is never written again
// once a program of that level was released:
//
//	go test -run TestProcess_WriteGolden -golden .    # writes that of the newest level, and what is missing

var golden = flag.Bool("golden", false, "write the files in testdata that programs of the newest feature level leave")

func goldenPath(level int) string { return fmt.Sprintf("testdata/level-%d.tar.gz", level) }

// TestProcess_WriteGolden lets a node do everything that leaves its own traces in files.
func TestProcess_WriteGolden(t *testing.T) {
	if !*golden {
		t.Skip("needs -golden")
	}
	for level := levelFirst; level <= levelNewest; level++ {
		_, err := os.Stat(goldenPath(level))
		if err == nil && level != levelNewest {
			continue
		}
		binary := buildLiveBinary(t)
		args := []string{"--wal-segment-bytes", "65536", "--snapshot-entries", "20", "--feature-level-max", fmt.Sprint(level)}
		if level == levelFirst {
			binary, args = buildOldBinary(t, level), args[:4] // which has no such flag
		}
		c := newIdleLiveCluster(t, proc.Options{Binary: binary, Nodes: 1, Args: args})
		c.start()
		writeGolden(t, c, level)
	}
}

func writeGolden(t *testing.T, c *liveCluster, level int) {
	n := c.Nodes[0]
	l := c.client(n)
	defer l.close()
	call := func(method, path, body string, headers ...string) []byte {
		t.Helper()
		r := l.do(method, n.URL()+path, body, headers...)
		if r.err != nil || r.status/100 != 2 {
			t.Fatalf("%s %s: %d %s %v", method, path, r.status, r.body, r.err)
		}
		return r.body
	}
	if level > levelFirst {
		c.eventually(func() error {
			var st nodeStatus
			must(t, json.Unmarshal(call("GET", "/-/v1/status", ""), &st))
			if st.FeatureLevel != level {
				return fmt.Errorf("the level is %d", st.FeatureLevel)
			}
			return nil
		})
	}
	write := func(round string) {
		for i := range 10 {
			call("PUT", fmt.Sprintf("/g/%d", i), round)
		}
		call("PUT", "/g/ttl-"+round+"?ttl=87600h", "in ten years")
		call("PUT", "/g/once-"+round, "once", "Idempotency-Key", "invoice-"+round)
		call("PUT", "/g/%00%ff", "\x00\xff") // no text
		call("PUT", "/g/large", strings.Repeat(round, 2000))
		call("PUT", "/g/9", "if", "If-Match", "*")
		call("DELETE", "/g/large", "")
		call("DELETE", "/-/v1/keys?prefix=g/1", "")
		call("POST", "/-/v1/txn", `{"if":[{"key":"g/2","value":"`+round+`"}],"then":[{"op":"put","key":"g/txn","value":"t"},{"op":"delete","key":"g/3"}],"else":[]}`,
			"Idempotency-Key", "txn-"+round)
	}
	write("one")
	call("POST", "/-/v1/members/2", `{"peerURL":"http://127.0.0.1:1","name":"never there"}`)
	write("two")
	c.stop(n)
	c.start() // a second session
	write("three")
	backup := filepath.Join(t.TempDir(), "backup")
	c.command("snapshot", "save", "--from", n.URL(), backup)
	files := map[string][]byte{
		"items":  call("GET", "/-/v1/keys?prefix=g/", "", "Accept", "application/x-ndjson"),
		"events": call("GET", "/-/v1/watch?prefix=g/&resourceVersion=0&timeout=500ms", ""),
		"backup": []byte(readFile(t, backup)),
	}
	c.kill(n)
	must(t, filepath.WalkDir(n.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(n.DataDir, path)
		files[filepath.ToSlash(filepath.Join("data", name))] = []byte(readFile(t, path))
		return err
	}))
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	archive := tar.NewWriter(zip)
	for name, content := range files {
		must(t, archive.WriteHeader(&tar.Header{Name: name, Mode: fileMode, Size: int64(len(content))}))
		_, err := archive.Write(content)
		must(t, err)
	}
	must(t, errors.Join(archive.Close(), zip.Close(), os.MkdirAll("testdata", 0o755), os.WriteFile(goldenPath(level), out.Bytes(), 0o644)))
	t.Logf("level %d: %d files, %d bytes", level, len(files), out.Len())
}

// unpackGolden returns a directory with what a program of a level wrote.
func unpackGolden(t *testing.T, level int) string {
	t.Helper()
	f, err := os.Open(goldenPath(level))
	must(t, err)
	defer f.Close()
	unzip, err := gzip.NewReader(f)
	must(t, err)
	dir := t.TempDir()
	for archive := tar.NewReader(unzip); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		must(t, err)
		content, err := io.ReadAll(archive)
		must(t, err)
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		must(t, os.MkdirAll(filepath.Dir(path), dirMode))
		must(t, os.WriteFile(path, content, fileMode))
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
		must(t, rec.replay())
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
		must(t, s.close())
	}
}

// wantSameAfresh: with the snapshot before, more of the log is applied, as it was by the program that wrote the
// newest snapshot.
func wantSameAfresh(t *testing.T, level int, want *state) {
	t.Helper()
	dir := filepath.Join(unpackGolden(t, level), "data")
	for _, kind := range []string{"*.snap", "*.snap.db"} {
		names, err := filepath.Glob(filepath.Join(dir, "snap", kind))
		must(t, err)
		must(t, os.Remove(slices.Max(names)))
	}
	s, rec := openRestored(t, dir)
	began := rec.state.index
	must(t, rec.replay())
	if st := &rec.state; began >= want.index-10 || st.index != want.index || st.sum != want.sum {
		t.Errorf("level %d: from entry %d on, state %x at entry %d, want %x at entry %d", level, began, st.sum, st.index, want.sum, want.index)
	}
	must(t, s.close())
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
		must(t, err)
		s, _ := openRestored(t, to)
		st, err := s.readBody(firstIndex, firstTerm)
		must(t, err)
		if st.level != level || len(st.members) != 3 {
			t.Errorf("level %d: level %d, members %v", level, st.level, st.members)
		}
		wantGoldenItems(t, dir, &st)
		must(t, s.close())
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
	for line := range strings.Lines(readFile(t, filepath.Join(dir, "items"))) {
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
	for line := range strings.Lines(readFile(t, filepath.Join(dir, "events"))) {
		var e struct {
			Type   string
			Object struct {
				Key             string
				KeyBase64       string
				ResourceVersion uint64
			}
		}
		must(t, json.Unmarshal([]byte(line), &e))
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
