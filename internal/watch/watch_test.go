package watch

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
	"raftrv/internal/watchcheck"
)

// watchRig is a store whose writes come from a test, and its hub.
type watchRig struct {
	t     testing.TB
	store *store.Store
	hub   *Hub

	mu      sync.Mutex // one writer at a time
	index   uint64
	now     int64 // time of the entries; 0 = their index
	history watchcheck.History
	record  bool
}

func newWatchRig(t testing.TB) *watchRig {
	kv := store.New()
	return &watchRig{t: t, store: kv, hub: NewHub(kv), record: true}
}

// run runs the hub until the test ends.
func (r *watchRig) run() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = r.hub.Run(ctx) })
	r.t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

// apply applies a batch of commands and tells the hub.
func (r *watchRig) apply(commands ...store.Command) []store.Result {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	var data []byte
	for i := range commands {
		data = commands[i].AppendTo(data)
	}
	r.index++
	before := r.store.State.Events.End()
	var out []store.Result
	h := store.BatchHeader{Session: 1, Seq: r.index, Time: cmp.Or(r.now, int64(r.index))}
	if _, err := r.store.Apply(r.index, 1, h, data, &out); err != nil {
		r.t.Fatal(err)
	}
	for r.record {
		events, _, ok := r.store.EventsFrom(before)
		if !ok {
			r.t.Fatal("events left the window before they were recorded")
		}
		if len(events) == 0 {
			break
		}
		before += uint64(len(events))
		for _, e := range events {
			r.history.Messages = append(r.history.Messages, watchcheck.MessageOf(e))
		}
	}
	r.hub.Notify()
	return out
}

func (r *watchRig) put(key, value string) uint64 {
	r.t.Helper()
	return r.apply(store.Command{Op: store.OpPut, Key: key, Value: value})[0].RV
}

// fill puts n keys below k/, some in each batch.
func (r *watchRig) fill(n int) {
	r.t.Helper()
	for i := 0; i < n; i += 1000 {
		var batch []store.Command
		for j := i; j < min(i+1000, n); j++ {
			batch = append(batch, store.Command{Op: store.OpPut, Key: fmt.Sprintf("k/%06d", j), Value: "v"})
		}
		r.apply(batch...)
	}
}

func (r *watchRig) watch(key string, isPrefix bool, rv uint64) *Watcher {
	r.t.Helper()
	w, err := r.hub.Watch(key, isPrefix, rv)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(w.Close)
	return w
}

// ReadAll returns what one read passes on.
func readAll(w *Watcher) (events []store.Event, rv uint64, err error) {
	n, rv, err := w.Read(func(e *store.Event, last bool) {
		c := *e
		c.Last = last
		events = append(events, c)
	})
	if n != len(events) {
		w.hub.Close(fault.ErrInternal) // no test goes on from here
	}
	return events, rv, err
}

// drain reads until there is nothing at present, and shows what came: key@rv,
// with a + if more of the version follow.
func drain(w *Watcher) (got []string, rv uint64, err error) {
	for {
		events, rv, err := readAll(w)
		if len(events) == 0 {
			return got, rv, err
		}
		for _, e := range events {
			s := fmt.Sprintf("%s@%d", e.Key, e.RV)
			if !e.Last {
				s += "+"
			}
			got = append(got, s)
		}
	}
}

func wantDrained(t *testing.T, w *Watcher, rv uint64, want ...string) {
	t.Helper()
	got, gotRV, err := drain(w)
	if err != nil || !slices.Equal(got, want) || gotRV != rv {
		t.Errorf("read %v up to %d, %v; want %v up to %d", got, gotRV, err, want, rv)
	}
}

// idle says what is left of watches that were closed, and of waits that are over.
func (h *Hub) idle() error {
	if h.Armed != 0 || len(h.keys) != 0 || len(h.prefixes.children) != 0 || h.prefixes.users != 0 || h.busy.Load() || h.versions.busy.Load() || len(h.versions.heap) > 0 {
		return fmt.Errorf("%d armed, %v %v, %d wait for versions", h.Armed, h.keys, h.prefixes, len(h.versions.heap))
	}
	return nil
}

func TestHub_StartInThePast(t *testing.T) {
	r := newWatchRig(t)
	for _, key := range []string{"a", "b", "c", "a"} {
		r.put(key, "v")
	}
	wantDrained(t, r.watch("", true, 0), 4, "a@1", "b@2", "c@3", "a@4")
	wantDrained(t, r.watch("", true, 2), 4, "c@3", "a@4")
	wantDrained(t, r.watch("a", false, 1), 4, "a@4")
	wantDrained(t, r.watch("b", false, 2), 4)
	wantDrained(t, r.watch("", true, 4), 4)
}

func TestHub_Filter(t *testing.T) {
	r := newWatchRig(t)
	for _, key := range []string{"a", "ab", "abc", "b", "\xff", "\xff\xff", "ab/"} {
		r.put(key, "v")
	}
	check := func(stage string, from uint64) {
		for filter, want := range map[string][]string{
			"a": {"a"}, "ab": {"ab"}, "x": {}, "\xff": {"\xff"},
		} {
			got, _, err := drain(r.watch(filter, false, from))
			if err != nil || len(got) != len(want) {
				t.Errorf("%s: key %q got %v, %v", stage, filter, got, err)
			}
		}
		for filter, want := range map[string]int{"": 7, "a": 4, "ab": 3, "abc": 1, "abcd": 0, "\xff": 2} {
			got, _, err := drain(r.watch(filter, true, from))
			if err != nil || len(got) != want {
				t.Errorf("%s: prefix %q got %v, %v", stage, filter, got, err)
			}
		}
	}
	check("past", 0)

	// The same, live.
	type filter struct {
		key      string
		isPrefix bool
	}
	live := map[filter]*Watcher{}
	for _, key := range []string{"", "a", "ab", "abc", "abcd", "x", "\xff"} {
		for _, isPrefix := range []bool{true, false} {
			w := r.watch(key, isPrefix, 7)
			wantDrained(t, w, 7)
			live[filter{key, isPrefix}] = w
		}
	}
	for _, key := range []string{"a", "ab", "abc", "b", "\xff", "\xff\xff", "ab/"} {
		r.put(key, "w")
		r.hub.Distribute()
	}
	for f, w := range live {
		past, _, err := drain(r.watch(f.key, f.isPrefix, 7))
		if err != nil {
			t.Fatal(err)
		}
		wantDrained(t, w, 14, past...)
	}
}

// TestHub_Armed: what the hub does with those that have read everything.
func TestHub_Armed(t *testing.T) {
	r := newWatchRig(t)
	r.put("a", "1")
	w, other := r.watch("a", false, 1), r.watch("b", false, 1)
	wantDrained(t, w, 1)
	wantDrained(t, other, 1)
	if r.hub.Armed != 2 {
		t.Fatalf("%d armed", r.hub.Armed)
	}
	r.put("c", "1")
	wantDrained(t, w, 1) // the hub has not looked yet
	r.hub.Distribute()
	wantDrained(t, w, 2) // it has
	if len(w.Wake) != 0 {
		t.Error("woken by a key that it does not want")
	}
	r.put("a", "2")
	r.put("a", "3")
	r.hub.Distribute()
	if len(w.Wake) != 1 || r.hub.Armed != 1 {
		t.Errorf("%d wakes, %d armed", len(w.Wake), r.hub.Armed)
	}
	r.put("a", "4") // while it is not armed
	wantDrained(t, w, 5, "a@3", "a@4", "a@5")
	r.hub.Distribute()
	wantDrained(t, w, 5)
	w.Close()
	other.Close()
	other.Close() // again
	if err := r.hub.idle(); err != nil {
		t.Errorf("after close: %v", err)
	}
}

// TestHub_ArmBehindAndAhead: two watchers that are not equally far, around what
// the hub has looked at.
func TestHub_ArmBehindAndAhead(t *testing.T) {
	r := newWatchRig(t)
	first := r.watch("x", false, 0)
	wantDrained(t, first, 0)
	second := r.watch("", true, 0)
	r.put("a", "1")
	wantDrained(t, second, 1, "a@1") // is ahead of the hub now
	r.hub.Distribute()               // must not tell it again
	wantDrained(t, second, 1)
	wantDrained(t, first, 1)
	third := r.watch("a", false, 0) // is behind it
	wantDrained(t, third, 1, "a@1")
	r.put("a", "2")
	r.hub.Distribute()
	wantDrained(t, third, 2, "a@2")
	wantDrained(t, second, 2, "a@2")
	wantDrained(t, first, 2)
}

// TestHub_Versions: a version is complete when its last event that the watcher
// wants was read, wherever in it, in the chunks and in the reads that is.
func TestHub_Versions(t *testing.T) {
	r := newWatchRig(t)
	mixed := store.Txn{Then: []store.Command{
		{Op: store.OpPut, Key: "a1", Value: "v"}, {Op: store.OpPut, Key: "b1", Value: "v"},
		{Op: store.OpPut, Key: "a2", Value: "v"}, {Op: store.OpPut, Key: "b2", Value: "v"},
	}}
	r.apply(store.Command{Op: store.OpTxn, Value: mixed.Encode()})
	r.put("a3", "v")
	wantDrained(t, r.watch("a", true, 0), 2, "a1@1+", "a2@1", "a3@2")
	wantDrained(t, r.watch("b", true, 0), 2, "b1@1+", "b2@1")
	wantDrained(t, r.watch("b1", false, 0), 2, "b1@1")
	wantDrained(t, r.watch("", true, 0), 2, "a1@1+", "b1@1+", "a2@1+", "b2@1", "a3@2")
}

func TestHub_LargeVersion(t *testing.T) {
	const n = 30_000
	for _, live := range []bool{false, true} {
		r := newWatchRig(t)
		r.fill(n)
		start := r.put("z", "v")
		// All of them, every one but in the middle of others, and the last one.
		watchers := map[int]*Watcher{
			n: r.watch("k/", true, start), n / 3: r.watch("k/01", true, start), 1: r.watch("k/029999", false, start),
		}
		if live {
			for _, w := range watchers {
				wantDrained(t, w, start)
			}
		}
		if got := r.apply(store.Command{Op: store.OpDeletePrefix, Key: "k/"})[0]; got.Count != n {
			t.Fatalf("%d deleted", got.Count)
		}
		r.put("z", "w")
		r.hub.Distribute()
		for want, w := range watchers {
			events := 0
			for {
				batch, rv, err := readAll(w)
				if err != nil {
					t.Fatal(err)
				}
				if len(batch) > ReadEventsMax {
					t.Errorf("a read of %d events", len(batch))
				}
				if len(batch) == 0 {
					break
				}
				for i, e := range batch {
					events++
					if e.RV != start+1 || e.Last != (events == want) {
						t.Fatalf("event %d of %d: %s at %d, last=%v", events, want, e.Key, e.RV, e.Last)
					}
					if i == len(batch)-1 && (rv > start) != e.Last {
						t.Errorf("version %d is said to be complete after %d of %d", rv, events, want)
					}
				}
			}
			if events != want {
				t.Errorf("%d events, want %d", events, want)
			}
			wantDrained(t, w, start+2)
		}
	}
}

// TestHub_ReadSize: one read keeps few bytes alive, unless one event is large.
func TestHub_ReadSize(t *testing.T) {
	r := newWatchRig(t)
	for range 20 {
		r.put("k", strings.Repeat("x", 10<<10))
	}
	r.put("k", strings.Repeat("x", 1<<20))
	r.put("k", "small")
	w := r.watch("k", false, 0)
	var sizes []int
	for {
		events, _, err := readAll(w)
		if err != nil {
			t.Fatal(err)
		}
		if len(events) == 0 {
			break
		}
		size := 0
		for _, e := range events {
			size += len(e.Item.Value)
		}
		sizes = append(sizes, size)
		if size > ReadBytesMax+10<<10 && size < 1<<20 || size > 1<<20+ReadBytesMax {
			t.Errorf("a read of %d bytes", size)
		}
	}
	if len(sizes) < 5 {
		t.Errorf("reads of %v bytes", sizes)
	}
}

// smallWindow keeps about n events.
func (r *watchRig) smallWindow(n uint64) { storetest.ShrinkWindow(r.store, n, 64<<20) }

func TestHub_Slow(t *testing.T) {
	r := newWatchRig(t)
	r.smallWindow(16 * store.ChunkEventsMax)
	w, patient := r.watch("", true, 0), r.watch("", true, 0)
	patient.patient = true
	fresh := r.watch("", true, 0)
	r.put("a", "v")
	wantDrained(t, w, 1, "a@1")
	wantDrained(t, patient, 1, "a@1")
	// As long as nothing was dropped nobody is slow.
	r.fill(15 * store.ChunkEventsMax)
	r.hub.Distribute()
	for range 2 * store.ChunkEventsMax / ReadEventsMax {
		if events, _, err := readAll(w); len(events) != ReadEventsMax || err != nil {
			t.Fatalf("%d events, %v", len(events), err)
		}
	}
	// When the oldest chunk is gone and w is in the second of those that are left:
	for r.store.EventsDropped() == 0 {
		r.fill(100)
		r.hub.Distribute()
	}
	_, rv, err := readAll(w)
	if !errors.Is(err, fault.ErrSlow) || rv != 1+2*store.ChunkEventsMax {
		t.Fatalf("read up to %d, %v; want errSlow after %d", rv, err, 1+2*store.ChunkEventsMax)
	}
	if _, again, err := readAll(w); again != rv || !errors.Is(err, fault.ErrSlow) {
		t.Errorf("then read up to %d, %v", again, err)
	}
	// It can be resumed, and then gets everything.
	v := watchcheck.New("resumed", "", true, false, rv)
	resumed := r.watch("", true, rv)
	for {
		events, _, err := readAll(resumed)
		if err != nil {
			t.Fatal(err)
		}
		if len(events) == 0 {
			break
		}
		for _, e := range events {
			v.Observe(watchcheck.MessageOf(e))
		}
	}
	v.Check(&r.history)
	v.Report(t)
	if v.Done != r.store.Version() {
		t.Errorf("resumed up to %d of %d", v.Done, r.store.Version())
	}
	// Who is behind the window is not resumed, whether or not it was live.
	for name, w := range map[string]*Watcher{"patient": patient, "fresh": fresh} {
		if _, rv, err := readAll(w); !errors.Is(err, fault.ErrExpired) || rv != w.rv {
			t.Errorf("%s: up to %d, %v; want errExpired", name, rv, err)
		}
	}
	if _, err := r.hub.Watch("", true, r.store.EventsDropped()-1); !errors.Is(err, fault.ErrExpired) {
		t.Errorf("watch from before the window: %v", err)
	}
	wantDrained(t, r.watch("nothing", false, r.store.EventsDropped()), r.store.Version())
}

// TestHub_SnapshotSkips: a snapshot takes the place of events that this node
// never had.
func TestHub_SnapshotSkips(t *testing.T) {
	leader := newWatchRig(t)
	leader.fill(3 * store.ChunkEventsMax)
	leader.smallWindow(store.ChunkEventsMax)

	r := newWatchRig(t)
	r.put("k/000000", "v")
	armed, caughtUp := r.watch("other", false, 0), r.watch("", true, 1)
	wantDrained(t, armed, 1)
	wantDrained(t, caughtUp, 1)
	notArmed := r.watch("k/", true, 0)
	r.store.Restore(leader.store.Snapshot())
	r.hub.Distribute()
	for name, w := range map[string]*Watcher{"armed": armed, "caught up": caughtUp, "not armed": notArmed} {
		if got, _, err := drain(w); !errors.Is(err, fault.ErrExpired) || len(got) > 0 {
			t.Errorf("%s: read %v, %v; want errExpired", name, got, err)
		}
	}

	// If the window of the snapshot reaches back far enough nobody loses anything.
	overlap := newWatchRig(t)
	overlap.fill(2 * store.ChunkEventsMax)
	w := overlap.watch("k/", true, 0)
	if _, _, err := drain(w); err != nil {
		t.Fatal(err)
	}
	ahead := newWatchRig(t)
	ahead.fill(2 * store.ChunkEventsMax)
	ahead.fill(1)
	overlap.store.Restore(ahead.store.Snapshot())
	overlap.hub.Distribute()
	wantDrained(t, w, 2*store.ChunkEventsMax+1, fmt.Sprintf("k/000000@%d", 2*store.ChunkEventsMax+1))
}

func TestHub_NotifyNeverBlocks(t *testing.T) {
	r := newWatchRig(t) // and nobody runs the hub
	w := r.watch("a", false, 0)
	wantDrained(t, w, 0)
	for range 10 {
		r.put("a", "v")
		r.hub.Notify()
	}
	if len(r.hub.Wake) != 1 {
		t.Errorf("%d wakes", len(r.hub.Wake))
	}
}

func TestHub_Close(t *testing.T) {
	r := newWatchRig(t)
	armed, fresh := r.watch("a", false, 0), r.watch("a", false, 0)
	wantDrained(t, armed, 0)
	r.put("a", "v")
	r.hub.Close(fault.ErrShuttingDown)
	if len(armed.Wake) != 1 {
		t.Error("the armed watcher was not woken")
	}
	for range 2 {
		for _, w := range []*Watcher{armed, fresh, r.watch("a", false, 0)} {
			if events, _, err := readAll(w); len(events) > 0 || !errors.Is(err, fault.ErrShuttingDown) {
				t.Errorf("read %v, %v", events, err)
			}
		}
	}
	if err := r.hub.WaitVersion(t.Context(), 2); !errors.Is(err, fault.ErrShuttingDown) {
		t.Errorf("waitVersion: %v", err)
	}
	if err := r.hub.WaitVersion(t.Context(), 1); err != nil {
		t.Errorf("waitVersion of what is there: %v", err)
	}
}

func TestHub_WaitVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newWatchRig(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = r.hub.Run(ctx) }()
		if err := r.hub.WaitVersion(ctx, 0); err != nil {
			t.Error(err)
		}
		errs := map[uint64]error{}
		var mu sync.Mutex
		impatient, giveUp := context.WithTimeout(ctx, time.Second)
		defer giveUp()
		var wg sync.WaitGroup
		for rv := uint64(1); rv <= 6; rv++ {
			wg.Go(func() {
				waitCtx := ctx
				if rv == 4 {
					waitCtx = impatient
				}
				err := r.hub.WaitVersion(waitCtx, rv)
				mu.Lock()
				defer mu.Unlock()
				errs[rv] = err
			})
		}
		check := func(when string, want ...uint64) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			for _, rv := range want {
				if err := errs[rv]; rv == 4 && !errors.Is(err, context.DeadlineExceeded) || rv != 4 && err != nil {
					t.Errorf("%s: %d got %v", when, rv, err)
				}
			}
			if got := slices.Sorted(maps.Keys(errs)); !slices.Equal(got, want) {
				t.Errorf("%s: released %v, want %v", when, got, want)
			}
		}
		check("at first")
		r.put("a", "v")
		r.put("a", "v")
		check("at version 2", 1, 2)
		time.Sleep(2 * time.Second)
		check("after the deadline", 1, 2, 4)
		r.put("a", "v")
		check("at version 3", 1, 2, 3, 4)
		cancel()
		wg.Wait()
		for rv := uint64(5); rv <= 6; rv++ {
			if err := errs[rv]; !errors.Is(err, fault.ErrShuttingDown) && !errors.Is(err, context.Canceled) {
				t.Errorf("%d at the end: %v", rv, err)
			}
		}
		if err := r.hub.idle(); err != nil {
			t.Error(err)
		}
	})
}

// TestHub_WaitVersionInTime: however long the hub is busy with watches, who waits for
// a version is told that it came too late, when that is so.
func TestHub_WaitVersionInTime(t *testing.T) {
	r := newWatchRig(t)
	r.hub.Mu.Lock() // it looks at events
	defer r.hub.Mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.hub.WaitVersion(ctx, 1) }()
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits for the hub")
	}
}

// TestHub_LetsOthersIn: while the hub looks at many events, others get in between.
func TestHub_LetsOthersIn(t *testing.T) {
	r := newWatchRig(t)
	w := r.watch("none", false, 0)
	wantDrained(t, w, 0)
	r.fill(10 * hubTurn)
	for n := uint64(1); r.hub.lookAtSome(); n++ { // each holds the mutex once
		if got := r.hub.next; got > n*hubTurn {
			t.Fatalf("%d events in %d turns", got, n)
		}
	}
	wantDrained(t, w, 10*hubTurn)
}

// TestWatchNode_Model compares the tree of prefixes with a list of them.
func TestWatchNode_Model(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	name := func(most int) string {
		b := make([]byte, random.IntN(most))
		for i := range b {
			b[i] = "ab\x00\xff"[random.IntN(2+2*random.IntN(2))]
		}
		return string(b)
	}
	h := NewHub(store.New())
	var open []*Watcher
	for range 20_000 {
		switch n := random.IntN(4); {
		case n == 0 && len(open) > 0:
			i := random.IntN(len(open))
			open[i].Close()
			open = slices.Delete(open, i, i+1)
		case n == 1 && len(open) < 100:
			w, err := h.Watch(name(12), random.IntN(4) > 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			h.arm(w)
			open = append(open, w)
		default:
			e := store.Event{Key: name(16)}
			h.next = 0
			h.look(&e)
			for _, w := range open {
				if woken := !w.armed.Load(); woken != w.wants(e.Key) {
					t.Fatalf("key %q, watch of %q (prefix: %v): woken %v", e.Key, w.key, w.isPrefix, woken)
				}
			}
			h.next = 0
			for _, w := range open {
				w.next = 0
				if !w.armed.Load() {
					h.arm(w)
				}
			}
		}
		nodes, used := 0, map[string]bool{}
		h.prefixes.each(func(n *watchNode) {
			nodes++
			if n != &h.prefixes && n.users == 0 && len(n.children) < 2 {
				t.Fatalf("the node %q is for nobody", n.name)
			}
		})
		for _, w := range open {
			used[w.key] = used[w.key] || w.isPrefix
		}
		if nodes > 2*len(used)+1 {
			t.Fatalf("%d nodes for %d prefixes", nodes, len(used))
		}
	}
	for _, w := range open {
		w.Close()
	}
	if err := h.idle(); err != nil {
		t.Error(err)
	}
}

// BenchmarkHub_Look: what an event costs the hub that nobody waits for.
func BenchmarkHub_Look(b *testing.B) {
	long := strings.Repeat("a", store.KeySizeMax-1)
	for _, bb := range []struct {
		name     string
		prefixes int
		prefix   func(i int) string
		key      string
	}{
		{"one prefix", 1, func(int) string { return "none/" }, long + "b"},
		{"4096 prefixes of other lengths", 4095, func(i int) string { return long[:i] + "c" }, long + "b"},
		{"4096 prefixes of other lengths/another key", 4095, func(i int) string { return "b" + long[:i] }, long + "b"},
		{"4096 prefixes of one length", 4095, func(i int) string { return fmt.Sprintf("k/%04d/", i) }, "k/none"},
	} {
		b.Run(bb.name, func(b *testing.B) {
			r := newWatchRig(b)
			for i := range bb.prefixes {
				r.hub.arm(r.watch(bb.prefix(i), true, 0))
			}
			e := store.Event{Key: bb.key}
			for b.Loop() {
				r.hub.look(&e)
			}
		})
	}
}

// TestHub_WaitVersionEndsTwice: a deadline that passes when the hub closes.
func TestHub_WaitVersionEndsTwice(t *testing.T) {
	for range 200 {
		h := NewHub(store.New())
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for rv := uint64(1); rv <= 4; rv++ {
			wg.Go(func() { _ = h.WaitVersion(ctx, rv) })
		}
		wg.Go(cancel)
		wg.Go(func() { h.Close(fault.ErrShuttingDown) })
		wg.Wait()
	}
}

// TestHub_Random: watchers come, go, resume, dawdle and stop, while writers
// write all that can be written and the window moves on.
func TestHub_Random(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := newWatchRig(t)
	r.smallWindow(8 * store.ChunkEventsMax)
	r.run()
	var stop atomic.Bool
	var writers, watchers sync.WaitGroup
	for i := range 2 {
		writers.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(i)))
			for !stop.Load() {
				r.apply(randomBatch(random)...)
				if random.IntN(20) == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	validators := make([]*watchcheck.Validator, 30)
	var ended [3]atomic.Int64
	var mu sync.Mutex
	var retired []*watchcheck.Validator // guarded by mu
	for i := range validators {
		random := rand.New(rand.NewPCG(seed, uint64(100+i)))
		key := randomKey(random)[:random.IntN(3)]
		v := watchcheck.New(fmt.Sprintf("watch %d of %q", i, key), key, true, false, r.store.Version())
		if random.IntN(3) == 0 {
			v.Key, v.IsPrefix = randomKey(random), false
		}
		validators[i] = v
		watchers.Go(func() {
			for from := v.Start; ; from = v.Resume() {
				w, err := r.hub.Watch(v.Key, v.IsPrefix, from)
				if err != nil { // it must begin anew
					ended[2].Add(1)
					old := *v
					mu.Lock()
					retired = append(retired, &old)
					mu.Unlock()
					*v = *watchcheck.New(v.Name, v.Key, v.IsPrefix, false, r.store.Version())
					continue
				}
				done, err := observeSome(w, v, random, &stop)
				w.Close()
				switch {
				case done:
					return
				case errors.Is(err, fault.ErrSlow):
					ended[0].Add(1)
				case errors.Is(err, fault.ErrExpired):
					ended[1].Add(1)
				case err != nil:
					t.Error(err)
				}
			}
		})
	}
	time.Sleep(testkit.Sized(time.Second, 30*time.Second))
	stop.Store(true)
	writers.Wait()
	r.put("the end", "v")
	watchers.Wait()
	events, resumes := 0, 0
	for _, v := range append(validators, retired...) {
		v.Check(&r.history)
		v.Report(t)
		events, resumes = events+v.Events, resumes+v.Resumes
	}
	if err := r.history.Dense(); err != nil {
		t.Error(err)
	}
	t.Logf("%d events in %d versions; %d seen by watchers, %d resumes, %d ended as slow, %d behind the window, %d refused",
		len(r.history.Messages), r.history.Last(), events, resumes, ended[0].Load(), ended[1].Load(), ended[2].Load())
}

// observeSome reads for a while, and when the writers have stopped to the end.
func observeSome(w *Watcher, v *watchcheck.Validator, random *rand.Rand, stop *atomic.Bool) (done bool, err error) {
	for reads := random.IntN(80); ; reads-- {
		events, rv, err := readAll(w)
		if err != nil {
			return false, err
		}
		for _, e := range events {
			v.Observe(watchcheck.MessageOf(e))
		}
		switch {
		case len(events) > 0:
			if rv >= events[len(events)-1].RV != events[len(events)-1].Last {
				v.Violation("up to %d after %v", rv, watchcheck.MessageOf(events[len(events)-1]))
			}
			if random.IntN(50) == 0 { // enough to fall behind
				time.Sleep(time.Duration(random.IntN(250)) * time.Millisecond)
			}
		case stop.Load() && rv == w.hub.store.Version():
			v.Observe(watchcheck.Message{Kind: "BOOKMARK", RV: rv})
			return true, nil
		default:
			v.Observe(watchcheck.Message{Kind: "BOOKMARK", RV: rv})
			select {
			case <-w.Wake:
			case <-time.After(10 * time.Millisecond):
			}
		}
		if reads <= 0 && !stop.Load() {
			return false, nil
		}
	}
}

func randomKey(random *rand.Rand) string {
	return string([]byte{'a' + byte(random.IntN(3)), '/', 'a' + byte(random.IntN(10)), 'a' + byte(random.IntN(3))})
}

// randomBatch returns commands as they may come in one entry.
func randomBatch(random *rand.Rand) []store.Command {
	var batch []store.Command
	one := func() store.Command {
		if random.IntN(3) == 0 {
			return store.Command{Op: store.OpDelete, Key: randomKey(random)}
		}
		return store.Command{Op: store.OpPut, Key: randomKey(random), Value: fmt.Sprint(random.Uint64())}
	}
	for range 1 + random.IntN(20) {
		switch random.IntN(20) {
		case 0:
			batch = append(batch, store.Command{Op: store.OpDeletePrefix, Key: randomKey(random)[:3]})
		case 1, 2:
			var t store.Txn
			for range 1 + random.IntN(20) {
				t.Then = append(t.Then, one())
			}
			batch = append(batch, store.Command{Op: store.OpTxn, Value: t.Encode()})
		default:
			batch = append(batch, one())
		}
	}
	return batch
}

// TestHub_CloseRaces: watchers come and go while the hub ends.
func TestHub_CloseRaces(t *testing.T) {
	for range testkit.Sized(20, 1000) {
		r := newWatchRig(t)
		r.record = false
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = r.hub.Run(ctx) })
		for i := range 8 {
			wg.Go(func() {
				for {
					w, err := r.hub.Watch([]string{"", "k", "k1"}[i%3], i%2 == 0, r.store.Version())
					if err != nil {
						t.Error(err)
						return
					}
					for range i + 1 {
						if _, _, err = readAll(w); err != nil {
							break
						}
						select {
						case <-w.Wake:
						case <-time.After(time.Millisecond):
						}
					}
					w.Close()
					if err != nil {
						if !errors.Is(err, fault.ErrShuttingDown) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		for i := range 50 {
			r.put(fmt.Sprint("k", i%3), "v")
		}
		cancel()
		r.put("k1", "v")
		wg.Wait()
		if err := r.hub.idle(); err != nil {
			t.Fatalf("after the end: %v", err)
		}
	}
}

func TestMetrics_Watches(t *testing.T) {
	r := newWatchRig(t)
	r.run()
	s := &r.hub.Stats
	a, b := r.watch("k/", true, 0), r.watch("k/", true, 0)
	r.put("k/1", "v")
	if _, _, err := readAll(a); err != nil {
		t.Fatal(err)
	}
	b.Close()
	b.Close()
	if s.Open.Load() != 1 || s.Events.Load() != 1 {
		t.Errorf("%d open, %d events", s.Open.Load(), s.Events.Load())
	}
	r.record = false
	storetest.ShrinkWindow(r.store, 1, 1)
	r.fill(20_000) // a has read to the first and waits
	for {
		n, _, err := a.Read(func(*store.Event, bool) {})
		if err != nil {
			break
		}
		if n == 0 {
			t.Fatal("it kept up")
		}
	}
	if s.Slow.Load()+s.Expired.Load() != 1 {
		t.Errorf("%d slow, %d expired", s.Slow.Load(), s.Expired.Load())
	}
}

// TestRestore_NoVersionTwice: of two clusters that were made from the same file the
// later one gives out no version of the other, and takes none for its own.
func TestRestore_NoVersionTwice(t *testing.T) {
	const taken = store.LeapEpoch + 200_000_000_000
	made := func(level int, start int64, writes int) *watchRig {
		r := newWatchRig(t)
		r.record = false
		r.now = taken
		r.apply(store.RaiseLevel(level))
		r.put("k", "v")
		r.store.State.Begin([]store.Member{{ID: 1}}, nil)
		r.index, r.now = r.store.State.Index, start
		st := r.store.Snapshot() // as a node that was restored reads it
		r.store.Restore(st)
		for range writes {
			r.put("k", "w")
		}
		return r
	}
	for level := 1; level <= 2; level++ {
		first, second := made(level, taken+5000, 50), made(level, taken+5001, 8)
		seen := first.store.Version()
		_, err := second.hub.Watch("k", false, seen)
		if apart := err != nil; apart != (level == 2) {
			t.Errorf("level %d: a watch from version %d of the first cluster in the second, which is at %d: %v", level, seen, second.store.Version(), err)
		}
		it, rv, _ := second.store.Get("k")
		if level == 2 && (rv-8 <= seen || it.RV != rv || second.store.EventsDropped() != rv-8 || it.RV >= 1<<53) {
			t.Errorf("the second cluster is at version %d, the first at %d", rv, seen)
		}
	}
	// It happens once, and only after a restore.
	r := newWatchRig(t)
	r.now = taken
	r.apply(store.RaiseLevel(2))
	for want := range uint64(3) {
		if rv := r.put("k", "v"); rv != want+1 {
			t.Errorf("version %d", rv)
		}
	}
}

// TestHub_Ends: a hub that has ended is not reopened, and its reason stays.
func TestHub_Ends(t *testing.T) {
	h := NewHub(store.New())
	h.Close(fault.ErrDiverged)
	h.Close(fault.ErrShuttingDown)
	h.Close(fault.ErrDiverged)
	h.reopen()
	w, err := h.Watch("", true, 0)
	testkit.Must(t, err)
	if _, _, err := w.Read(func(*store.Event, bool) {}); !errors.Is(err, fault.ErrShuttingDown) {
		t.Errorf("read: %v", err)
	}
	if err := h.WaitVersion(t.Context(), 1); !errors.Is(err, fault.ErrShuttingDown) {
		t.Errorf("waitVersion: %v", err)
	}
}

// TestHub_LooksForTheFirst: what was applied just before the first watcher or waiter came is not missed until the
// next write: they make the hub look.
func TestHub_LooksForTheFirst(t *testing.T) {
	s := store.New()
	h := NewHub(s)
	w, err := h.Watch("", true, 0)
	testkit.Must(t, err)
	if _, err := w.scan(func(*store.Event, bool) {}); err != nil {
		t.Fatal(err)
	}
	storetest.Apply(t, s, store.Command{Op: store.OpPut, Key: "k", Value: "v"})
	h.Notify() // nobody waits, so this does nothing
	if len(h.Wake) != 0 {
		t.Fatal("it looks although nobody waits")
	}
	h.arm(w)
	if len(h.Wake) != 1 {
		t.Error("a watcher that arms itself does not make the hub look")
	}
	h.Distribute()
	if n, _, err := w.Read(func(*store.Event, bool) {}); n != 1 || err != nil {
		t.Errorf("read %d events: %v", n, err)
	}
	w.Close()

	h = NewHub(s)
	done := make(chan error, 1)
	go func() { done <- h.WaitVersion(t.Context(), s.Version()+1) }()
	select {
	case <-h.Wake:
	case <-time.After(5 * time.Second):
		t.Fatal("one that waits for a version does not make the hub look")
	}
	storetest.Apply(t, s, store.Command{Op: store.OpPut, Key: "k", Value: "v"})
	h.Distribute()
	testkit.Must(t, <-done)
}

// TestHub_PrefixTooLong: more than that is refused, and nothing happens.
func TestHub_PrefixTooLong(t *testing.T) {
	r := newWatchRig(t)
	r.record = false
	r.apply(store.RaiseLevel(2))
	for i := range 5000 {
		r.put(fmt.Sprintf("%0*d", store.KeySizeMax, i), "")
	}
	before := r.store.Version()
	if res := r.apply(store.Command{Op: store.OpDeletePrefix, Key: "0"}); res[0].Status != store.StatusTooMany || r.store.Version() != before {
		t.Errorf("%+v", res[0])
	}
}

// TestHub_OthersDoNotNotice: large deletions, of whatever kind, end no
// watch, of whatever key.
func TestHub_OthersDoNotNotice(t *testing.T) {
	const n = 90
	keyOf := func(i int) string { return fmt.Sprintf("big/%d", i) }
	var each, expire []store.Command
	var x store.Txn
	for i := range n {
		each = append(each, store.Command{Op: store.OpDelete, Key: keyOf(i)})
		expire = append(expire, store.Command{Op: store.OpExpire, Key: keyOf(i)})
		x.Then = append(x.Then, store.Command{Op: store.OpDelete, Key: keyOf(i)})
	}
	for name, batch := range map[string][]store.Command{
		"prefix":      {{Op: store.OpDeletePrefix, Key: "big/"}},
		"deletes":     each,
		"expiries":    expire,
		"transaction": {{Op: store.OpTxn, Value: x.Encode()}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newWatchRig(t)
			r.record = false
			r.apply(store.RaiseLevel(2))
			value := strings.Repeat("x", 1<<20)
			for i := range n {
				r.put(keyOf(i), value)
			}
			rv := r.put("other", "1")
			watches := map[string]*Watcher{"the key of another": r.watch("other", false, rv), "the prefix": r.watch("big/", true, rv)}
			for _, w := range watches {
				if _, _, err := drain(w); err != nil {
					t.Fatal(err)
				}
			}
			r.apply(batch...)
			r.put("other", "2")
			r.hub.Distribute()
			for name, w := range watches {
				want := map[bool]int{true: n, false: 1}[w.isPrefix]
				if got, _, err := drain(w); err != nil || len(got) != want {
					t.Errorf("who watches %s gets %d events, %v", name, len(got), err)
				}
			}
		})
	}
}

// TestHub_DeletedValue: what a deletion says of the value.
func TestHub_DeletedValue(t *testing.T) {
	for level, want := range map[int][]bool{1: {true, true}, 2: {true, false}} {
		r := newWatchRig(t)
		if level > 1 {
			r.apply(store.RaiseLevel(level))
		}
		for i, size := range []int{store.DeletedValueMax, store.DeletedValueMax + 1} {
			r.put("k", strings.Repeat("x", size))
			n := r.store.State.Events.End()
			r.apply(store.Command{Op: store.OpDelete, Key: "k"})
			events, _, _ := r.store.EventsFrom(n)
			if e := events[0]; e.Cut == want[i] || len(e.Item.Value) != map[bool]int{true: size}[want[i]] || e.Item.Created == 0 {
				t.Errorf("level %d: of %d bytes %d are kept, cut %v", level, size, len(e.Item.Value), e.Cut)
			}
		}
		snap := r.store.Snapshot()
		var written bytes.Buffer
		testkit.Must(t, snap.Encode(&written))
		st, err := store.ReadState(&written)
		if err != nil {
			t.Fatal(err)
		}
		got, _, _ := st.Events.From(0)
		for i, e := range snap.Events.Chunks[0].Events {
			if got[i] != e {
				t.Errorf("level %d: event %d is %+v in a snapshot", level, i, got[i])
			}
		}
	}
}

// TestEventLog_NewestEntry: however small the window is, the events of an entry
// stay until the next one, and who has read all before is not too slow for them.
func TestEventLog_NewestEntry(t *testing.T) {
	r := newWatchRig(t)
	r.record = false
	storetest.ShrinkWindow(r.store, 1, 1)
	r.fill(2 * store.ChunkEventsMax)
	w := r.watch("k/", true, r.store.Version())
	if _, _, err := drain(w); err != nil {
		t.Fatal(err)
	}
	var batch []store.Command
	for i := range 5 * store.ChunkEventsMax {
		batch = append(batch, store.Command{Op: store.OpPut, Key: fmt.Sprintf("k/%d", i)})
	}
	for range 3 {
		r.apply(batch...)
		r.hub.Distribute()
		if got, _, err := drain(w); err != nil || len(got) != len(batch) {
			t.Fatalf("%d events of %d, %v", len(got), len(batch), err)
		}
	}
	r.put("k/0", "v")
	r.put("k/0", "v")
	if n := r.store.State.Events.Count; n > store.ChunkEventsMax {
		t.Errorf("%d events are left", n)
	}
}
