package tests

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"raftrv/internal/fsx"
	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// These tests open what programs of each feature level wrote: testdata/level-N.tar.gz has the data directory
// of a node (data), a backup (backup), and its keys and events as it listed them. It is never written again
// once a program of that level was released:
//
//	go test ./tests -run TestProcess_WriteGolden -golden    # writes that of the newest level, and what is missing

var golden = flag.Bool("golden", false, "write the files in testdata that programs of the newest feature level leave")

// TestProcess_WriteGolden lets a node do everything that leaves its own traces in files.
func TestProcess_WriteGolden(t *testing.T) {
	if !*golden {
		t.Skip("needs -golden")
	}
	for level := store.LevelFirst; level <= store.LevelNewest; level++ {
		_, err := os.Stat(goldenFile(level))
		if err == nil && level != store.LevelNewest {
			continue
		}
		binary := buildLiveBinary(t)
		args := []string{"--wal-segment-bytes", "65536", "--snapshot-entries", "20", "--feature-level-max", fmt.Sprint(level)}
		if level == store.LevelFirst {
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
	if level > store.LevelFirst {
		c.eventually(func() error {
			var st httpapi.NodeStatus
			testkit.Must(t, json.Unmarshal(call("GET", "/-/v1/status", ""), &st))
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
		call("PUT", "/g/typed-"+round, round, "Content-Type", "text/plain") // which is kept from level 3 on
		call("POST", "/-/v1/txn", `{"if":[{"key":"g/2","value":"`+round+`"}],"then":[{"op":"put","key":"g/txn","value":"t"},{"op":"delete","key":"g/3"}],"else":[]}`,
			"Idempotency-Key", "txn-"+round)
	}
	write("one")
	call("POST", "/-/v1/members/2", `{"peerUrl":"http://127.0.0.1:1","name":"never there"}`)
	write("two")
	c.stop(n)
	c.start() // a second session
	write("three")
	backup := filepath.Join(t.TempDir(), "backup")
	c.command("backup", "save", "--from", n.URL(), backup)
	files := map[string][]byte{
		"items":  call("GET", "/-/v1/keys?prefix=g/", "", "Accept", "application/x-ndjson"),
		"events": call("GET", "/-/v1/watch?prefix=g/&resourceVersion=0&timeout=500ms", ""),
		"backup": []byte(testkit.ReadFile(t, backup)),
	}
	c.kill(n)
	testkit.Must(t, filepath.WalkDir(n.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(n.DataDir, path)
		files[filepath.ToSlash(filepath.Join("data", name))] = []byte(testkit.ReadFile(t, path))
		return err
	}))
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	archive := tar.NewWriter(zip)
	for name, content := range files {
		testkit.Must(t, archive.WriteHeader(&tar.Header{Name: name, Mode: fsx.FileMode, Size: int64(len(content))}))
		_, err := archive.Write(content)
		testkit.Must(t, err)
	}
	testkit.Must(t, errors.Join(archive.Close(), zip.Close(), os.MkdirAll("testdata", 0o755), os.WriteFile(goldenFile(level), out.Bytes(), 0o644)))
	t.Logf("level %d: %d files, %d bytes", level, len(files), out.Len())
}

func goldenFile(level int) string { return fmt.Sprintf("testdata/level-%d.tar.gz", level) }
