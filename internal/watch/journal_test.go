package watch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"raftrv/internal/fault"
	"raftrv/internal/fsx"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
	"raftrv/internal/watchcheck"
)

// journalRig is a watchRig with a journal.
type journalRig struct {
	*watchRig
	path string
	dir  string // of the data

	hangUps chan os.Signal
	logs    *observer.ObservedLogs
}

func newJournalRig(t testing.TB) *journalRig {
	return &journalRig{watchRig: newWatchRig(t), path: filepath.Join(t.TempDir(), "journal"), dir: t.TempDir()}
}

func (r *journalRig) open() (*Journal, error) {
	core, logs := observer.New(zap.DebugLevel)
	r.logs = logs
	return OpenJournal(r.path, r.dir, 0xabc, zap.New(core))
}

func (r *journalRig) mustOpen() *Journal {
	r.t.Helper()
	j, err := r.open()
	if err != nil {
		r.t.Fatal(err)
	}
	j.lease = func(*os.File) error { return errors.ErrUnsupported } // or content would wait for it
	return j
}

// start runs the journal as a node does; stop stops them.
func (r *journalRig) start() (stop func() error) {
	r.t.Helper()
	j := r.mustOpen()
	r.hub = NewHub(r.store)
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	src := JournalSource{Store: r.store, Hub: r.hub, Stopped: stopped, Reopen: r.hangUps, Linearize: func(context.Context, time.Duration) error { return nil }}
	var wg sync.WaitGroup
	wg.Go(func() { _ = r.hub.Run(ctx) })
	var err error
	wg.Go(func() { err = j.Run(ctx, src, time.Second) })
	return func() error {
		cancel()
		close(stopped)
		wg.Wait()
		return errors.Join(err, j.Close())
	}
}

// cycle lets a journal write what there is.
func (r *journalRig) cycle() {
	r.t.Helper()
	if err := r.start()(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *journalRig) content() string {
	r.t.Helper()
	b, err := os.ReadFile(r.path)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

func (r *journalRig) setContent(s string) {
	r.t.Helper()
	if err := os.WriteFile(r.path, []byte(s), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// setMark changes what the data directory remembers.
func (r *journalRig) setMark(rv uint64) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, JournalPositionName), fmt.Appendf(nil, "%020d\n", rv), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// story writes one of everything.
func (r *journalRig) story() {
	r.put("a", `{"b": [1,
	2.50]}`)
	r.put("a", "no JSON: \"\n")
	r.apply(store.Command{Op: store.OpExpire, Key: "a", Condition: store.Condition{Kind: store.IfMatch, RV: 2}})
	r.apply(
		store.Command{Op: store.OpPut, Key: "\xff", Value: "\xfe{}"},
		store.Command{Op: store.OpDelete, Key: "\xff"},
		store.Command{Op: store.OpPut, Key: "k/1", Value: ""},
		store.Command{Op: store.OpPut, Key: "k/2", Value: "12345678901234567890.0"},
		store.Command{Op: store.OpPut, Key: "k/3", Value: "\"\xff\""},
		store.Command{Op: store.OpDeletePrefix, Key: "k/"},
	)
}

const storyHead = `{"journal":1,"cluster":"abc","from":1}
`

const storyJournal = storyHead + `{"rv":1,"key":"a","timestamp":1000000,"obj":{"b":[1,2.50]},"objText":"{\"b\": [1,\n\t2.50]}"}
{"rv":2,"key":"a","timestamp":2000000,"objText":"no JSON: \"\n"}
{"rv":3,"key":"a","timestamp":3000000,"deleted":true,"reason":"expired"}
{"rv":4,"keyBase64":"/w==","timestamp":4000000,"objBase64":"/nt9"}
{"rv":5,"keyBase64":"/w==","timestamp":4000000,"deleted":true}
{"rv":6,"key":"k/1","timestamp":4000000,"objText":""}
{"rv":7,"key":"k/2","timestamp":4000000,"obj":12345678901234567890.0}
{"rv":8,"key":"k/3","timestamp":4000000,"objBase64":"Iv8i"}
{"rv":9,"key":"k/1","timestamp":4000000,"deleted":true,"more":true}
{"rv":9,"key":"k/2","timestamp":4000000,"deleted":true,"more":true}
{"rv":9,"key":"k/3","timestamp":4000000,"deleted":true}
`

func (r *journalRig) want(want string) {
	r.t.Helper()
	if got := r.content(); got != want {
		r.t.Errorf("journal\n%s\nwant\n%s", got, want)
	}
}

func TestJournal_Lines(t *testing.T) {
	r := newJournalRig(t)
	stop := r.start()
	r.story()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	r.want(storyJournal)
	info, err := os.Stat(r.path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	r.cycle() // nothing to do
	r.want(storyJournal)
}

// TestJournal_CutAnywhere: whatever a crash leaves of the file, the next run
// makes it whole.
func TestJournal_CutAnywhere(t *testing.T) {
	r := newJournalRig(t)
	r.story()
	for cut := range len(storyJournal) + 1 {
		r.setContent(storyJournal[:cut])
		r.setMark(0) // which counts if the file is a new one
		r.cycle()
		if got := r.content(); got != storyJournal {
			t.Fatalf("cut at %d of %d, after %.60q:\n%s", cut, len(storyJournal), storyJournal[max(0, cut-60):cut], got)
		}
	}
	r.setContent(storyJournal[:500] + strings.Repeat("\x00", 5000)) // what some file systems leave
	r.cycle()
	r.want(storyJournal)
	if logs := r.logs.FilterMessage("cut off an incomplete version").Len(); logs != 1 {
		t.Errorf("%d warnings", logs)
	}
}

// TestJournal_Random: runs that are cut short at random while writes go on.
func TestJournal_Random(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	r := newJournalRig(t)
	cuts := 0
	for range 30 {
		stop := r.start()
		for range random.IntN(100) {
			r.apply(randomBatch(random)...)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		if content := r.content(); random.IntN(2) == 0 {
			r.setContent(content[:len(content)-random.IntN(min(len(content)-len(storyHead), 10_000)+1)])
			cuts++
		}
	}
	r.cycle()
	r.checkJournal(r.content(), 0)
	t.Logf("%d events, %d cuts", len(r.history.Messages), cuts)
}

// checkJournal compares a journal with what happened.
func (r *journalRig) checkJournal(content string, gaps int) {
	r.t.Helper()
	i := 0
	for text := range strings.Lines(strings.TrimPrefix(content, storyHead)) {
		var line struct {
			RV      uint64
			Key     string
			Deleted bool
			More    bool
			Obj     json.RawMessage
			ObjText string
			Gap     *struct{ From, To uint64 }
		}
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			r.t.Fatal(err)
		}
		if g := line.Gap; g != nil {
			gaps--
			if g.From > g.To || g.To != line.RV || i > 0 && r.history.Messages[i-1].RV != g.From-1 {
				r.t.Errorf("gap %s", text)
			}
			for i < len(r.history.Messages) && r.history.Messages[i].RV <= g.To {
				i++
			}
			continue
		}
		if i == len(r.history.Messages) {
			r.t.Fatalf("this never happened: %s", text)
		}
		m := r.history.Messages[i]
		i++
		if line.RV != m.RV || line.Key != m.Key || line.More != m.More || line.Deleted != (m.Kind == "DELETED") || !line.Deleted && string(line.Obj) != m.Value && line.ObjText != m.Value {
			r.t.Fatalf("%v is in the journal as %s", m, text)
		}
	}
	if i != len(r.history.Messages) || gaps != 0 {
		r.t.Errorf("%d of %d events, %d more gaps expected", i, len(r.history.Messages), gaps)
	}
}

func TestJournal_Gap(t *testing.T) {
	r := newJournalRig(t)
	r.put("a", "1")
	r.cycle()
	r.setContent(r.content() + `{"rv":2,"key":"k/00000","timestamp":1,"obj":1,"more":true}` + "\n")
	r.fill(3 * store.ChunkEventsMax)
	r.history.Messages = nil
	r.smallWindow(1) // of which a chunk is left
	dropped := r.store.EventsDropped()
	r.cycle()
	want := fmt.Sprintf(storyHead+`{"rv":1,"key":"a","timestamp":1000000,"obj":1}`+"\n"+`{"rv":%d,"gap":{"from":2,"to":%[1]d}}`+"\n", dropped)
	if got := r.content(); !strings.HasPrefix(got, want+fmt.Sprintf(`{"rv":%d,"key":`, dropped+1)) {
		t.Errorf("journal %.300s", got)
	}
	if entries := r.logs.FilterMessageSnippet("events are missing").All(); len(entries) != 1 || entries[0].Level != zap.WarnLevel {
		t.Errorf("logged %v", entries)
	}
	before := r.content()
	r.cycle()
	r.want(before)
	r.setContent(want) // the gap is where it resumes
	r.cycle()
	r.want(before)

	// A new journal of an old store begins with a gap.
	r.setContent("")
	r.setMark(0)
	r.cycle()
	if got := r.content(); !strings.HasPrefix(got, storyHead+fmt.Sprintf(`{"rv":%d,"gap":{"from":1,"to":%[1]d}}`+"\n", dropped)) {
		t.Errorf("journal %.300s", got)
	}
}

// TestJournal_GapWhileRunning: a snapshot takes the place of events.
func TestJournal_GapWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leader := newWatchRig(t)
		leader.fill(3 * store.ChunkEventsMax)
		leader.smallWindow(store.ChunkEventsMax)
		r := newJournalRig(t)
		stop := r.start()
		r.put("k/000000", "v")
		synctest.Wait()
		r.store.Restore(leader.store.Snapshot())
		r.hub.Notify()
		synctest.Wait()
		r.index = r.store.Applied()
		r.put("z", "v")
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		r.history.Messages = append(leader.history.Messages, r.history.Messages[1:]...)
		r.checkJournal(r.content(), 1)
	})
}

func TestJournal_Refused(t *testing.T) {
	tests := map[string]string{
		"foreign lines":       "hello\nworld\n",
		"foreign text":        "hello",
		"foreign JSON":        `{"a":1}` + "\n",
		"no version":          `{"rv":0,"key":"a"}` + "\n",
		"no key":              `{"rv":1}` + "\n",
		"damage":              `{"rv":1,"key":"a"}` + "\n\x00\x00\x00" + `{"rv":2,"key":"a"}` + "\n",
		"version without end": `{"rv":1,"key":"a","more":true}` + "\n" + `{"rv":2,"key":"a","more":true}` + "\n",
		"empty line":          "{\"rv\":1,\"key\":\"a\"}\n\n",
	}
	for name, content := range tests {
		t.Run(name, func(t *testing.T) {
			r := newJournalRig(t)
			r.setContent(content)
			if _, err := r.open(); !errors.Is(err, errJournalDamage) || !strings.Contains(err.Error(), "offset") {
				t.Errorf("opened: %v", err)
			}
			r.want(content)
		})
	}
	t.Run("in use", func(t *testing.T) {
		r := newJournalRig(t)
		j := r.mustOpen()
		if _, err := r.open(); err == nil || !strings.Contains(err.Error(), "another process") {
			t.Errorf("opened twice: %v", err)
		}
		testkit.Must(t, j.Close())
		testkit.Must(t, r.mustOpen().Close())
	})
	t.Run("no file", func(t *testing.T) {
		for _, path := range []string{"/dev/null", t.TempDir(), filepath.Join(t.TempDir(), "no/directory")} {
			if _, err := OpenJournal(path, t.TempDir(), 1, zap.NewNop()); err == nil {
				t.Errorf("%s was opened", path)
			}
		}
	})
	t.Run("another cluster", func(t *testing.T) {
		r := newJournalRig(t)
		r.setContent(`{"rv":7,"key":"a","obj":1}` + "\n")
		r.put("a", "1")
		if err := r.start()(); err == nil || !strings.Contains(err.Error(), "another cluster") {
			t.Errorf("run: %v", err)
		}
	})
	t.Run("another cluster, by the first line", func(t *testing.T) {
		r := newJournalRig(t)
		content := strings.Replace(storyJournal, `"abc"`, `"abd"`, 1)
		r.setContent(content)
		if _, err := r.open(); err == nil || !strings.Contains(err.Error(), "cluster abd") || !strings.Contains(err.Error(), "move it away") {
			t.Errorf("opened: %v", err)
		}
		r.want(content)
	})
	t.Run("a newer format", func(t *testing.T) {
		r := newJournalRig(t)
		r.setContent(strings.Replace(storyJournal, `"journal":1`, `"journal":2`, 1))
		if _, err := r.open(); err == nil || !strings.Contains(err.Error(), "format 2") {
			t.Errorf("opened: %v", err)
		}
	})
	t.Run("write fails", func(t *testing.T) {
		r := newJournalRig(t)
		j := r.mustOpen()
		testkit.Must(t, j.Close())
		r.put("a", "1")
		r.run()
		src := JournalSource{Store: r.store, Hub: r.hub}
		if err := j.Run(t.Context(), src, time.Second); err == nil || !strings.Contains(err.Error(), r.path) {
			t.Errorf("run: %v", err)
		}
	})
}

// TestJournal_OlderVersion: one without a first line goes on, and it is said.
func TestJournal_OlderVersion(t *testing.T) {
	r := newJournalRig(t)
	r.story()
	old := strings.TrimPrefix(storyJournal, storyHead)
	r.setContent(old[:strings.Index(old, `{"rv":4`)])
	r.cycle()
	r.want(old)
	if n := r.logs.FilterMessageSnippet("older version").Len(); n != 1 {
		t.Errorf("said %d times", n)
	}
}

// rotation is what is left of a journal that was rotated, one file after the other.
type rotation []string

// add moves or copies and empties the present file.
func (f *rotation) add(r *journalRig, rename bool) {
	*f = append(*f, r.content())
	if rename {
		testkit.Must(r.t, os.Rename(r.path, fmt.Sprint(r.path, ".", len(*f))))
	} else {
		testkit.Must(r.t, os.Truncate(r.path, 0))
	}
}

// TestJournal_Rotated: whichever way its file is rotated, with or without a signal or a restart, versions are
// neither lost nor repeated.
func TestJournal_Rotated(t *testing.T) {
	for _, way := range []string{"rename, signal", "rename, restart", "copytruncate", "copytruncate, signal", "copytruncate, restart", "nothing, signal", "a directory, signal"} {
		t.Run(way, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newJournalRig(t)
				hangUps := make(chan os.Signal, 1)
				r.hangUps = hangUps
				var files rotation
				stop := r.start()
				for i := range 4 {
					r.put("a", fmt.Sprint(i))
					r.apply(store.Command{Op: store.OpPut, Key: "k/1"}, store.Command{Op: store.OpPut, Key: "k/2"}, store.Command{Op: store.OpDeletePrefix, Key: "k/"})
					synctest.Wait()
					rename, failing := strings.HasPrefix(way, "rename"), strings.HasPrefix(way, "a directory")
					switch {
					case failing:
						testkit.Must(t, os.Rename(r.path, r.path+".1"))
						testkit.Must(t, os.Mkdir(r.path, 0o700))
					case !strings.HasPrefix(way, "nothing"):
						files.add(r, rename)
					}
					if strings.HasSuffix(way, "signal") {
						hangUps <- syscall.SIGHUP
						synctest.Wait()
						if rename {
							if want := fmt.Sprintf(`{"journal":1,"cluster":"abc","from":%d}`+"\n", 4*i+5); r.content() != want {
								t.Errorf("the next file has %q, want %q", r.content(), want)
							}
						}
					}
					if failing { // it goes on where it was, and later in the right place
						r.put("b", "1")
						synctest.Wait()
						testkit.Must(t, os.Remove(r.path))
						testkit.Must(t, os.Rename(r.path+".1", r.path))
					}
					if strings.HasSuffix(way, "restart") {
						testkit.Must(t, stop())
						stop = r.start()
					}
				}
				r.put("z", "v")
				testkit.Must(t, stop())
				files = append(files, r.content())
				whole := strings.Join(files, "")
				lines, err := watchcheck.ReadJournals(files)
				testkit.Must(t, err)
				r.checkJournal(strings.Join(lines, ""), 0)
				raw := 0 // nobody was killed, so there is nothing that does not count
				for text := range strings.Lines(whole) {
					if !strings.HasPrefix(text, `{"journal"`) {
						raw++
					}
				}
				if raw != len(lines) {
					t.Errorf("%d lines, %d of them count", raw, len(lines))
				}
			})
		})
	}
}

// TestJournal_KilledAndRotated: whatever a kill leaves in a file that is rotated before the node is back, a reader
// of both files finds everything once.
func TestJournal_KilledAndRotated(t *testing.T) {
	r := newJournalRig(t)
	r.story()
	for cut := len(storyHead); cut <= len(storyJournal); cut += 3 {
		for behind := range 2 { // the mark is written after the file
			rv, _, err := findJournalEnd(strings.NewReader(storyJournal), int64(cut))
			testkit.Must(t, err)
			if rv < uint64(behind) {
				continue
			}
			r.setMark(rv - uint64(behind))
			testkit.Must(t, os.RemoveAll(r.path))
			r.cycle()
			lines, err := watchcheck.ReadJournals([]string{storyJournal[:cut], r.content()})
			if got := storyHead + strings.Join(lines, ""); err != nil || got != storyJournal {
				t.Fatalf("cut at %d, marked %d: %v\n%s", cut, rv-uint64(behind), err, got)
			}
		}
	}
}

// TestJournal_Lease: who opens the file waits until it ends with a whole version, and while he has it open
// nothing is written, unless it takes too long.
func TestJournal_Lease(t *testing.T) {
	r := newJournalRig(t)
	j := r.mustOpen()
	defer j.Close()
	j.lease = fsx.TakeLease
	testkit.Must(t, j.begin())
	r.run()
	if err := j.claim(t.Context(), r.store); err != nil {
		t.Fatal(err)
	}
	if !j.leased {
		t.Skip("SKIPPED: this file system has no leases")
	}
	j.appendEvent(&store.Event{RV: 1, Key: "a"}, false)
	testkit.Must(t, j.append(t.Context(), r.store))
	opened := make(chan *os.File)
	go func() {
		f, err := os.Open(r.path)
		if err != nil {
			t.Error(err)
		}
		opened <- f
	}()
	for !fsx.LeaseWanted(j.file) {
		runtime.Gosched()
	}
	j.appendEvent(&store.Event{RV: 1, Key: "b"}, true)
	testkit.Must(t, j.append(t.Context(), r.store)) // the rest of the version, and nobody has opened it
	select {
	case <-opened:
		t.Error("opened within a version")
	default:
	}
	j.yield() // and not claim: a signal may interrupt who opens it, who begins anew and would wait again
	f := <-opened
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	j.appendEvent(&store.Event{RV: 2, Key: "a"}, true)
	if err := j.append(ctx, r.store); !errors.Is(err, fault.ErrShuttingDown) {
		t.Errorf("written while it is open: %v", err)
	}
	start := time.Now()
	testkit.Must(t, j.append(t.Context(), r.store)) // he follows the file
	if took := time.Since(start); took < journalShareMin/2 {
		t.Errorf("written after %v", took)
	}
	testkit.Must(t, f.Close())
	j.appendEvent(&store.Event{RV: 3, Key: "a"}, true)
	testkit.Must(t, j.append(t.Context(), r.store))
	if !j.leased {
		t.Error("no lease, although nobody else has the file open")
	}
	fsx.DropLease(j.file)
	j.leased = false
	testkit.Must(t, j.file.Truncate(0))
	j.lease = func(*os.File) error { return errors.ErrUnsupported }
	j.appendEvent(&store.Event{RV: 4, Key: "a"}, true)
	if err := j.append(t.Context(), r.store); !errors.Is(err, errJournalCut) {
		t.Errorf("cut: %v", err)
	}
	testkit.Must(t, j.resumeCut())
	testkit.Must(t, j.begin())
	if got, want := r.content(), `{"journal":1,"cluster":"abc","from":4}`+"\n"; got != want {
		t.Errorf("it begins with %q, want %q", got, want)
	}
}

// TestJournal_WaitsForStore: after a restart the store is behind the journal
// until the log was applied again.
func TestJournal_WaitsForStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newJournalRig(t)
		r.story()
		r.cycle()
		again := &journalRig{watchRig: newWatchRig(t), path: r.path, dir: r.dir}
		j := again.mustOpen()
		stopped := make(chan struct{})
		leader := false
		src := JournalSource{Store: again.store, Hub: again.hub, Stopped: stopped, Linearize: func(context.Context, time.Duration) error {
			if leader {
				return nil
			}
			return fault.ErrNoLeader
		}}
		done := make(chan error)
		go func() { done <- j.Run(t.Context(), src, time.Second) }()
		time.Sleep(time.Minute)
		synctest.Wait()
		again.story()
		leader = true
		time.Sleep(time.Second)
		synctest.Wait()
		again.put("b", "2")
		again.hub.Distribute()
		synctest.Wait()
		again.hub.Close(fault.ErrShuttingDown)
		again.put("b", "3") // the last request that was answered
		close(stopped)
		testkit.Must(t, <-done)
		testkit.Must(t, j.Close())
		again.want(storyJournal + `{"rv":10,"key":"b","timestamp":5000000,"obj":2}` + "\n" + `{"rv":11,"key":"b","timestamp":6000000,"obj":3}` + "\n")
	})
}

// TestJournal_StopsWhileItWaits: for a leader that does not come.
func TestJournal_StopsWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newJournalRig(t)
		r.setContent(storyJournal)
		j := r.mustOpen()
		stopped := make(chan struct{})
		src := JournalSource{Store: r.store, Hub: r.hub, Stopped: stopped, Linearize: func(context.Context, time.Duration) error { return fault.ErrNoLeader }}
		done := make(chan error)
		go func() { done <- j.Run(t.Context(), src, time.Second) }()
		time.Sleep(time.Minute)
		r.hub.Close(fault.ErrShuttingDown)
		close(stopped)
		testkit.Must(t, <-done)
		testkit.Must(t, j.Close())
		r.want(storyJournal)
	})
}

func TestJournal_Sync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newJournalRig(t)
		j := r.mustOpen()
		r.follow(j)
		for range 3 {
			r.put("a", "1")
			synctest.Wait()
			time.Sleep(time.Second / 2)
			synctest.Wait()
			if j.dirty.IsZero() {
				t.Error("synced early, or not written")
			}
			r.put("a", "2") // does not put it off
			time.Sleep(time.Second/2 + time.Millisecond)
			synctest.Wait()
			if !j.dirty.IsZero() {
				t.Error("not synced in time")
			}
			time.Sleep(time.Minute)
		}
	})
}

// follow runs hub and journal until the test ends.
func (r *journalRig) follow(j *Journal) {
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { _ = r.hub.Run(ctx) })
	wg.Go(func() {
		if err := j.Run(ctx, JournalSource{Store: r.store, Hub: r.hub, Stopped: stopped}, time.Second); err != nil {
			r.t.Error(err)
		}
	})
	r.t.Cleanup(func() {
		cancel()
		close(stopped)
		wg.Wait()
		testkit.Must(r.t, j.Close())
	})
}

// A value comes out of the journal as it went in, on one line.
func FuzzJournalLine(f *testing.F) {
	for _, s := range []string{"", "a", "1", `"a"`, "{\"a\": [1, 2,\n3]}", "\xff", "\"\xff\"", "null", "\u2028", `{"a":1}{"b":2}`, "1e999", `"\ud800"`, "\x00", strings.Repeat("[", 100)} {
		f.Add(s, s, true)
	}
	f.Fuzz(func(t *testing.T, key, value string, last bool) {
		e := store.Event{RV: 7, Time: 1, Kind: store.EventModified, Key: key, Item: store.Item{Value: value}}
		text := appendJournalLine(nil, &e, last)
		if !utf8.Valid(text) || bytes.IndexByte(text, '\n') != len(text)-1 {
			t.Fatalf("line %q", text)
		}
		var line struct {
			RV        uint64
			Key       *string
			KeyBase64 []byte
			Obj       json.RawMessage
			ObjText   *string
			ObjBase64 []byte
			More      bool
		}
		if err := json.Unmarshal(text, &line); err != nil {
			t.Fatalf("line %q: %v", text, err)
		}
		if line.RV != 7 || line.More == last {
			t.Fatalf("line %q", text)
		}
		if line.Key != nil && *line.Key != key || line.Key == nil && string(line.KeyBase64) != key {
			t.Fatalf("key of %q", text)
		}
		back := string(line.Obj)
		if line.ObjText != nil {
			back = *line.ObjText
		} else if line.ObjBase64 != nil {
			back = string(line.ObjBase64)
		}
		if back != value || (line.Obj != nil) != (json.Valid([]byte(value)) && utf8.ValidString(value)) {
			t.Fatalf("%q comes back as %q from the line %q", value, back, text)
		}
		if rv, end, err := findJournalEnd(bytes.NewReader(text), int64(len(text))); err != nil || (rv == 7) != last || (end == int64(len(text))) != last {
			t.Fatalf("line %q is complete up to %d, %d, %v", text, rv, end, err)
		}
	})
}

// Whatever the file holds, the place to resume is after a complete line, and
// cutting there changes nothing.
func FuzzJournalResume(f *testing.F) {
	f.Add([]byte(storyJournal))
	f.Add([]byte(storyJournal[:len(storyJournal)-5]))
	f.Add([]byte(storyJournal[:len(storyJournal)-80]))
	f.Add([]byte("{\"rv\":3,\"gap\":{\"from\":1,\"to\":3}}\n{\"rv\":"))
	f.Add([]byte(""))
	f.Add([]byte("\n\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		rv, end, err := findJournalEnd(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			if !errors.Is(err, errJournalDamage) {
				t.Fatal(err)
			}
			return
		}
		if end < 0 || end > int64(len(data)) || (end == 0) != (rv == 0) || end > 0 && data[end-1] != '\n' {
			t.Fatalf("version %d ends at %d of %q", rv, end, data)
		}
		if rv2, end2, err := findJournalEnd(bytes.NewReader(data[:end]), end); rv2 != rv || end2 != end || err != nil {
			t.Fatalf("%q: %d at %d, then %d at %d, %v", data, rv, end, rv2, end2, err)
		}
		// A whole line and a torn one more change only the version.
		more := append(bytes.Clone(data[:end]), `{"rv":18446744073709551615,"key":"k"}`+"\n"+`{"rv":9`...)
		if rv3, end3, err := findJournalEnd(bytes.NewReader(more), int64(len(more))); rv3 != 1<<64-1 || end3 != int64(len(more))-7 || err != nil {
			t.Fatalf("%q and two lines: %d at %d, %v", data, rv3, end3, err)
		}
	})
}

// TestJournal_LongLines: the end is found behind lines that are longer than what
// is read at a time, and among many.
func TestJournal_LongLines(t *testing.T) {
	long := fmt.Sprintf(`{"rv":1,"key":"a","obj":"%s"}`+"\n", strings.Repeat("x", 1<<20))
	var b strings.Builder
	b.WriteString(long)
	want := b.Len()
	for i := range 10_000 {
		fmt.Fprintf(&b, `{"rv":2,"key":"%d","deleted":true,"more":true}`+"\n", i)
	}
	for _, tail := range []string{"", `{"rv":2,`, strings.Replace(long[:len(long)-1], `"rv":1`, `"rv":2`, 1)} {
		content := b.String() + tail
		if rv, end, err := findJournalEnd(strings.NewReader(content), int64(len(content))); rv != 1 || end != int64(want) || err != nil {
			t.Errorf("with %.20q: %d at %d of %d, %v", tail, rv, end, len(content), err)
		}
	}
}

// TestJournal_WaitsForSound: while the node does not serve the journal waits, and then goes on without a gap.
func TestJournal_WaitsForSound(t *testing.T) {
	for _, why := range []*fault.Error{fault.ErrUnchecked, fault.ErrDiverged} {
		synctest.Test(t, func(t *testing.T) {
			r := newJournalRig(t)
			stop := r.start()
			want := func(lines int) {
				t.Helper()
				time.Sleep(2 * journalRetry)
				synctest.Wait()
				if got := strings.Count(r.content(), "\n") - 1; got != lines {
					t.Errorf("%s: it has %d lines, want %d:\n%s", why.Code, got, lines, r.content())
				}
			}
			r.put("a", "1")
			want(1)
			r.hub.Close(why)
			r.put("b", "2")
			want(1)
			r.hub.reopen()
			want(2)
			r.put("c", "3")
			want(3)
			r.hub.Close(why)
			r.put("d", "4")
			want(3)
			testkit.Must(t, stop()) // without an error, and without what was applied in doubt
			want(3)
			r.cycle()
			want(4)
		})
	}
}

// TestJournal_Overtaken: a journal that would miss something ends its node.
func TestJournal_Overtaken(t *testing.T) {
	for _, n := range []int{store.HoldEventsMax / 2, store.HoldEventsMax + 4*store.ChunkEventsMax} {
		synctest.Test(t, func(t *testing.T) {
			r := newJournalRig(t)
			r.record = false
			r.smallWindow(1)
			stop := r.start()
			r.put("a", "v")
			synctest.Wait()
			put := store.Command{Op: store.OpPut, Key: "k", Value: "v"}
			for range n { // the journal does not read before it is told to
				index := r.store.Applied() + 1
				_, err := r.store.Apply(index, 1, store.BatchHeader{Session: 1, Seq: index}, put.AppendTo(nil), nil)
				testkit.Must(t, err)
			}
			r.hub.Notify()
			synctest.Wait()
			err := stop()
			lost := n > store.HoldEventsMax
			if errors.Is(err, errJournalSlow) != lost || !lost && err != nil {
				t.Errorf("%d events: %v", n, err)
			}
			if got := r.content(); strings.Contains(got, `"gap"`) || !lost && strings.Count(got, "\n") != n+2 {
				t.Errorf("%d events: %d lines", n, strings.Count(got, "\n"))
			}
		})
	}
}
