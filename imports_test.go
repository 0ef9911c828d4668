package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"raftrv/internal/testkit"
)

// The imports are the architecture: whoever needs another line in these tables is
// about to blur one that the rest depends on. A line that nobody needs goes.

// rooms has all packages, and which of ours each may import. Tests may import the
// kits, too.
var rooms = []struct {
	room string
	may  []string
	why  string
}{
	{"internal/fault", nil, "what can go wrong is said in everybody's words: each front has its own table to its protocol"},
	{"internal/fsx", nil, "files are what they are, whoever writes them"},
	{"internal/shares", nil, "it counts, and does not know what"},
	{"internal/store", nil, "the state machine depends on its input alone"},
	{"internal/watch", []string{"internal/fault", "internal/fsx", "internal/store"}, "who watches sees the store, through whichever front"},
	{"internal/httpapi", []string{"internal/fault", "internal/shares", "internal/store", "internal/watch"},
		"a front knows commands and results, and what is behind it by an interface"},
	{".", []string{"internal/fault", "internal/fsx", "internal/httpapi", "internal/shares", "internal/store", "internal/watch"},
		"the node is built from the rooms; it has nothing of what only tests have"},

	{"internal/testkit", nil, "a kit: every room's tests may have it"},
	{"internal/store/storetest", []string{"internal/store", "internal/testkit"}, "a kit: states for the tests of other rooms"},
	{"internal/watchcheck", []string{"internal/store"}, "a kit: it checks what watches are told without asking the hub"},
	{"internal/hostile", []string{"internal/store", "internal/testkit"}, "a kit: it speaks to nodes as a stranger does"},
	{"internal/linkproxy", nil, "a kit: it passes bytes on and knows none of them"},
	{"internal/proc", nil, "a kit: it drives the program from outside"},
	{"tests", []string{"internal/fault", "internal/fsx", "internal/httpapi", "internal/shares", "internal/store"}, "real processes are judged by the words of the rooms"},
	{"internal/cmd/benchhttp", []string{"internal/proc"}, "a tool: it measures the program from outside"},
	{"internal/cmd/mutate", nil, "a tool: it changes the source as text"},
	{"internal/cmd/withcluster", []string{"internal/proc"}, "a tool: it runs the program"},
}

// kits are for tests and tools alone.
var kits = []string{"internal/hostile", "internal/linkproxy", "internal/proc", "internal/store/storetest", "internal/testkit", "internal/watchcheck"}

// doors say which files of a place ("" is everywhere) may import a package of others,
// or one below it. The first that fits a file counts.
var doors = []struct {
	place, path string
	only        []string
	why         string
}{
	// What is replicated must come out the same on every member, and in every run of the simulator.
	{"internal/store/", "time", []string{"backup.go", "item.go", "level.go"}, "the state machine has no clock: time is in the batch"},
	{"internal/store/", "os", []string{"backup.go"}, "the state machine has no files, but for a backup that is read"},
	{"internal/store/", "sync", []string{"events.go", "state.go"}, "one lock, and it is the store's"},
	{"internal/store/", "net/url", []string{"members.go"}, "only the address of a member is one"},
	{"internal/store/", "net", nil, "the state machine talks to nobody"},
	{"internal/store/", "context", nil, "nothing of the state machine waits"},
	{"internal/store/", "math/rand", nil, "the state machine does not draw lots"},
	{"internal/store/", "crypto/rand", nil, "the state machine does not draw lots"},
	{"internal/store/", "go.uber.org", nil, "the state machine tells its callers, not a log"},
	{"raft.go", "os", nil, "the replica has a disk that a simulator can be"},
	{"raft.go", "net", nil, "the replica has a transport that a simulator can be"},
	{"raft.go", "sync", nil, "the replica has one owner"},
	{"raft.go", "context", nil, "nothing of the replica waits"},
	{"raft.go", "math/rand", nil, "the replica does not draw lots"},
	{"raft.go", "crypto/rand", nil, "the replica does not draw lots"},

	{"internal/fault/", "net", nil, "no front's protocol is everybody's"},
	{"internal/fault/", "os", nil, "an error is a text"},
	{"internal/fault/", "time", nil, "an error is a text"},
	{"kvstore.go", "net/http", nil, "the replicated store serves every front"},
	{"internal/watch/", "net", nil, "the hub serves every front"},

	{"", "go.etcd.io/raft", []string{"raft.go", "loop.go", "peercheck.go", "peerstream.go", "transport.go", "link.go", "transfer.go", "storage.go", "watermark.go",
		"diskmetrics.go", "internal/hostile/hostile.go"}, "only the replica and its edges speak raft; the rest knows commands and results"},
	{"", "go.etcd.io/etcd/server/v3/storage/wal", []string{"storage.go", "watermark.go"}, "only the storage knows what the log looks like on disk"},
	{"", "go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp", []string{"transport.go", "link.go", "peerstream.go", "transfer.go", "internal/hostile/hostile.go"},
		"only the transport knows how members talk"},
	{"", "go.etcd.io/etcd", []string{"storage.go", "watermark.go", "transport.go", "link.go", "transfer.go"},
		"etcd's server packages stay behind disk and transport"},
	{"", "github.com/prometheus", []string{"metrics.go", "admission.go", "diskmetrics.go", "internal/httpapi/httpmetrics.go", "internal/httpapi/nodeapi.go",
		"internal/httpapi/api.go", "internal/testkit/testkit.go"}, "the parts count in their own words; only the edges measure"},
	{"", "github.com/spf13/cobra", []string{"main.go", "backupcli.go"}, "the command line ends where a config begins"},
}

const ours = "raftrv/"

// TestRooms: each package imports of ours what its line allows.
func TestRooms(t *testing.T) {
	may, used := map[string][]string{}, map[[2]string]bool{}
	for _, r := range rooms {
		may[r.room] = r.may
	}
	for file, imports := range sources(t) {
		room := path.Dir(file)
		allowed, ok := may[room]
		if !ok {
			t.Errorf("%s is in a room that the table does not have", file)
		}
		if strings.HasSuffix(file, "_test.go") {
			allowed = append(slices.Clone(allowed), kits...)
		}
		for _, imported := range imports {
			other, ok := strings.CutPrefix(imported, ours)
			if !ok || other == room { // a test outside of its package
				continue
			}
			used[[2]string{room, other}] = true
			if !slices.Contains(allowed, other) {
				t.Errorf("%s imports %s: %s", file, other, reason(room))
			}
		}
	}
	for _, r := range rooms {
		for _, other := range r.may {
			if !used[[2]string{r.room, other}] {
				t.Errorf("%s may import %s and does not", r.room, other)
			}
		}
	}
}

func reason(room string) string {
	for _, r := range rooms {
		if r.room == room {
			return r.why
		}
	}
	return "it has no line in the table"
}

// TestDoors: what others have made is let in where it belongs.
func TestDoors(t *testing.T) {
	used := map[string]bool{}
	for file, imports := range sources(t) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		for _, imported := range imports {
			for _, d := range doors {
				if !strings.HasPrefix(file, d.place) || imported != d.path && !strings.HasPrefix(imported, d.path+"/") {
					continue
				}
				name := strings.TrimPrefix(file, d.place)
				used[d.place+" "+d.path+" "+name] = true
				if !slices.Contains(d.only, name) {
					t.Errorf("%s imports %s: %s", file, imported, d.why)
				}
				break // the first door that fits is the narrowest
			}
		}
	}
	for _, d := range doors {
		for _, name := range d.only {
			if !used[d.place+" "+d.path+" "+name] {
				t.Errorf("%s may import %s and does not", d.place+name, d.path)
			}
		}
	}
}

// TestReplica_IsAStepMachine: the replica starts nothing, waits for nothing and reads no clock, see replica.tick. Only
// the type of times, and durations, may be used there.
func TestReplica_IsAStepMachine(t *testing.T) {
	clock := []string{"Now", "Since", "Until", "After", "AfterFunc", "NewTimer", "NewTicker", "Sleep", "Tick"}
	f := parse(t, "raft.go", 0)
	function := ""
	ast.Inspect(f, func(n ast.Node) bool {
		broken := ""
		switch n := n.(type) {
		case *ast.FuncDecl:
			function = n.Name.Name
		case *ast.GoStmt:
			broken = "starts a goroutine"
		case *ast.SelectStmt, *ast.SendStmt:
			broken = "waits at a channel"
		case *ast.UnaryExpr:
			if n.Op == token.ARROW {
				broken = "waits at a channel"
			}
		case *ast.CallExpr:
			if len(n.Args) > 0 && function != "newBatch" { // whose channel is the driver's
				if _, ok := n.Args[0].(*ast.ChanType); ok {
					broken = "makes a channel"
				}
			}
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clock, n.Sel.Name) {
				broken = "uses time." + n.Sel.Name
			}
		}
		if broken != "" {
			t.Errorf("raft.go: %s %s", function, broken)
		}
		return true
	})
}

// replicaTests put a replica into a loop, or look into the one that they drive.
var replicaTests = []string{"level_test.go", "loop_test.go", "sim_node_test.go", "synctest_cluster_test.go", "transport_test.go"}

// TestLoop_IsTheOnlyDoor: everybody else has methods of the loop, which act on its goroutine.
func TestLoop_IsTheOnlyDoor(t *testing.T) {
	for file := range sources(t) {
		if path.Dir(file) != "." || file == "loop.go" || file == "raft.go" || slices.Contains(replicaTests, file) {
			continue // raft.go has the type
		}
		test := strings.HasSuffix(file, "_test.go")
		ast.Inspect(parse(t, file, 0), func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok || s.Sel.Name != "replica" {
				return true
			}
			of := ""
			switch x := s.X.(type) {
			case *ast.Ident:
				of = x.Name
			case *ast.SelectorExpr:
				of = x.Sel.Name
			}
			if !test || of == "loop" || of == "l" { // the simulator's processes have a replica themselves
				t.Errorf("%s reaches for %s.replica: only the loop may", file, of)
			}
			return true
		})
	}
}

// ofTheProcess is what all nodes of a process would share, and where it is used all the same.
var ofTheProcess = []struct {
	name string // of a package, a dot, and one of its names
	only []string
	why  string
}{
	{"prometheus.DefaultGatherer", nil, "a node has its own registry"},
	{"prometheus.DefaultRegisterer", nil, "a node has its own registry"},
	{"prometheus.MustRegister", nil, "a node has its own registry"},
	{"prometheus.Register", nil, "a node has its own registry"},
	{"http.DefaultClient", nil, "what one node does must not use up the connections of another"},
	{"http.DefaultTransport", nil, "what one node does must not use up the connections of another"},
	{"http.DefaultServeMux", nil, "a node has its own table of routes"},
	{"http.Handle", nil, "a node has its own table of routes"},
	{"http.HandleFunc", nil, "a node has its own table of routes"},
	{"zap.L", nil, "a node has its own log"},
	{"zap.ReplaceGlobals", nil, "a node has its own log"},
	{"wal.SegmentSizeBytes", []string{"storage.go"}, "etcd's log has no other way to be told"},
	{"debug.SetGCPercent", []string{"gc.go"}, "there is one heap"},
	{"syscall.Umask", []string{"main.go", "backupcli.go"}, "it is the command's: it is set once, before there is a node"},
}

// TestNodes_FitInOneProcess: two nodes share nothing that is not named here, and no package does anything at its start.
func TestNodes_FitInOneProcess(t *testing.T) {
	used := map[string]bool{}
	for file := range sources(t) {
		room := path.Dir(file)
		if strings.HasSuffix(file, "_test.go") || slices.Contains(kits, room) || strings.HasPrefix(room, "internal/cmd/") {
			continue
		}
		ast.Inspect(parse(t, file, 0), func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Recv == nil && n.Name.Name == "init" {
					t.Errorf("%s has an init", file)
				}
			case *ast.SelectorExpr:
				x, ok := n.X.(*ast.Ident)
				if !ok {
					return true
				}
				for _, p := range ofTheProcess {
					if x.Name+"."+n.Sel.Name != p.name {
						continue
					}
					used[p.name+" "+file] = true
					if !slices.Contains(p.only, file) {
						t.Errorf("%s uses %s: %s", file, p.name, p.why)
					}
				}
			}
			return true
		})
	}
	for _, p := range ofTheProcess {
		for _, file := range p.only {
			if !used[p.name+" "+file] {
				t.Errorf("%s may use %s and does not", file, p.name)
			}
		}
	}
}

// sources returns the source files of this module and what each imports.
func sources(t *testing.T) map[string][]string {
	t.Helper()
	imports := map[string][]string{}
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			_, err := os.Stat(filepath.Join(name, "go.mod"))
			if name != "." && (err == nil || strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata") {
				return filepath.SkipDir
			}
		case strings.HasSuffix(name, ".go"):
			name = filepath.ToSlash(name)
			imports[name] = []string{}
			for _, spec := range parse(t, name, parser.ImportsOnly).Imports {
				imported, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				imports[name] = append(imports[name], imported)
			}
		}
		return nil
	})
	testkit.Must(t, err)
	if len(imports) < 100 {
		t.Fatalf("these are all files that were found: %v", slices.Sorted(maps.Keys(imports)))
	}
	return imports
}

func parse(t *testing.T, file string, mode parser.Mode) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, mode|parser.SkipObjectResolution)
	testkit.Must(t, err)
	return f
}
