package main

import (
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"raftrv/internal/testkit"
)

// The imports are the architecture: whoever needs one of these packages in
// another file is about to blur a line that the tests depend on. Each rule says
// what the line is for.
var importRules = []struct {
	prefix string
	files  []string
	why    string
}{
	{"go.etcd.io/raft/", []string{"raft.go", "loop.go", "peercheck.go", "peerstream.go", "transport.go", "link.go", "transfer.go", "storage.go", "watermark.go", "diskmetrics.go"},
		"only the replica speaks raft; the rest knows commands and results"},
	{"go.etcd.io/etcd/server/v3/storage/wal", []string{"storage.go", "watermark.go"},
		"only storage knows what the log looks like on disk"},
	{"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp", []string{"transport.go", "link.go", "peerstream.go", "transfer.go"},
		"only the transport knows how members talk"},
	{"go.etcd.io/etcd/", []string{"storage.go", "watermark.go", "peercheck.go", "peerstream.go", "transport.go", "link.go", "transfer.go"},
		"etcd's server packages stay behind disk and transport"},
	{"github.com/prometheus/", []string{"metrics.go", "admission.go", "httpmetrics.go", "diskmetrics.go", "nodeapi.go", "httpapi.go"},
		"the parts count in their own words; only the edges measure"},
	{"github.com/spf13/cobra", []string{"main.go", "backupcli.go"},
		"the command line ends where a config begins"},
}

// pureFiles decide what is replicated and what it does: they must come to the
// same conclusion on every member, so no clock, no randomness, no I/O. Nor does
// the replica have a clock: time is an input.
var pureFiles = map[string][]string{
	"items.go": {"time", "math/rand", "math/rand/v2", "crypto/rand", "os", "net", "net/http", "sync"},
	"raft.go":  {"math/rand", "math/rand/v2", "crypto/rand", "os", "net", "net/http", "sync", "context"},
}

func TestImports(t *testing.T) {
	for file, imports := range sourceImports(t) {
		for _, path := range imports {
			for _, rule := range importRules {
				if strings.HasPrefix(path, rule.prefix) {
					if !slices.Contains(rule.files, file) {
						t.Errorf("%s imports %s: %s", file, path, rule.why)
					}
					break // the first rule that fits is the narrowest
				}
			}
			if slices.Contains(pureFiles[file], path) {
				t.Errorf("%s imports %s, but what it does must be a function of its input", file, path)
			}
		}
	}
}

// TestReplicaReadsNoClock: time is an input of the step machine, see
// replica.tick. Only the type and durations may be used there.
func TestReplicaReadsNoClock(t *testing.T) {
	source := testkit.ReadFile(t, "raft.go")
	for _, call := range []string{"time.Now", "time.Since", "time.After", "time.NewTimer", "time.NewTicker", "time.Sleep", "go func", "make(chan int"} {
		if strings.Contains(source, call) {
			t.Errorf("raft.go uses %s", call)
		}
	}
}

// sourceImports returns what each of the package's own files imports.
func sourceImports(t *testing.T) map[string][]string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	imports := map[string][]string{}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range f.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			imports[file] = append(imports[file], path)
		}
	}
	return imports
}
