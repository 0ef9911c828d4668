package main

import (
	"container/heap"
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
)

// This file tells watchers of events. There is no queue for each of them: all
// read the window of the store, each at its own pace, and a watcher that has
// read everything arms itself at the hub. One goroutine, the hub's, looks at
// each new event and wakes those who wait for it. It never waits for a watcher,
// applying never waits for the hub, and a watcher that does not read costs no
// memory beyond the window, which is there anyway.

// What one read passes on at most, so that a slow watcher keeps little of it.
const (
	readEventsMax = 256
	readBytesMax  = 32 << 10 // of keys and values; one larger event makes its own
)

// hub wakes the watchers of a store.
type hub struct {
	store *kvstore
	wake  chan struct{} // holds one token: something was applied
	busy  atomic.Bool   // somebody waits; without it notify has nothing to do

	closed atomic.Pointer[apiError] // why nobody is told of anything; nil = all are
	stats  watchStats

	mu       sync.Mutex
	ended    bool   // run has: it stays closed
	next     uint64 // number of the next event to look at
	rv       uint64 // all events up to this version were looked at
	armed    int    // watchers in the sets; without any the hub looks at nothing
	keys     watchSets
	prefixes watchSets
	lengths  map[int]int // of the prefixes: how many sets
	waiters  versionHeap
}

// watchStats counts what watchers do.
type watchStats struct {
	open          atomic.Int64
	events        atomic.Uint64 // passed on
	slow, expired atomic.Uint64 // watches that ended with errSlow or errExpired
}

// note counts what one read came to.
func (s *watchStats) note(n int, err error) {
	s.events.Add(uint64(n))
	switch {
	case errors.Is(err, errSlow):
		s.slow.Add(1)
	case errors.Is(err, errExpired):
		s.expired.Add(1)
	}
}

// watchSets holds the armed watchers by the key or the prefix that they want.
type watchSets map[string]map[*watcher]struct{}

func newHub(store *kvstore) *hub {
	return &hub{
		store:    store,
		wake:     make(chan struct{}, 1),
		keys:     watchSets{},
		prefixes: watchSets{},
		lengths:  map[int]int{},
	}
}

// notify says that something was applied. It does not block.
func (h *hub) notify() {
	if !h.busy.Load() {
		return
	}
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// run wakes watchers until ctx ends. Then every watch ends with it.
func (h *hub) run(ctx context.Context) error {
	for {
		select {
		case <-h.wake:
			h.distribute()
		case <-ctx.Done():
			h.close(errShuttingDown)
			return nil
		}
	}
}

// distribute looks at all that was applied since the last time.
func (h *hub) distribute() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.releaseWaiters(h.store.version())
	for h.armed > 0 {
		events, _, ok := h.store.eventsFrom(h.next)
		if !ok { // a snapshot skipped them
			h.wakeAll()
			return
		}
		if len(events) == 0 {
			return
		}
		for i := range events {
			h.look(&events[i])
		}
	}
}

// look wakes those who want the next event.
func (h *hub) look(e *event) {
	h.wakeSet(h.keys, e.key)
	for length := range h.lengths {
		if length <= len(e.key) {
			h.wakeSet(h.prefixes, e.key[:length])
		}
	}
	h.next++
	if e.last {
		h.rv = e.rv
	}
}

func (h *hub) wakeSet(sets watchSets, name string) {
	for w := range sets[name] {
		if w.next <= h.next { // otherwise it has read this event already
			h.disarm(w)
			w.signal()
		}
	}
}

func (h *hub) wakeAll() {
	for _, sets := range []watchSets{h.keys, h.prefixes} {
		for name := range sets {
			for w := range sets[name] {
				h.disarm(w)
				w.signal()
			}
		}
	}
}

// arm makes the hub wake w for the next event that w wants, unless the hub has
// ended, or has looked at events that w has not read.
func (h *hub) arm(w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.armed == 0 {
		h.next, h.rv = w.next, w.rv
	}
	if h.closed.Load() != nil || w.next < h.next {
		return
	}
	sets := h.setsOf(w)
	set := sets[w.key]
	if set == nil {
		set = map[*watcher]struct{}{}
		sets[w.key] = set
		if w.isPrefix {
			h.lengths[len(w.key)]++
		}
	}
	set[w] = struct{}{}
	w.caughtUp = true
	w.armed.Store(true)
	h.armed++
	h.busy.Store(true)
	h.notify() // what was applied before busy was set
}

// disarm takes an armed watcher out of its set. It goes on where the hub is.
func (h *hub) disarm(w *watcher) {
	sets := h.setsOf(w)
	delete(sets[w.key], w)
	if len(sets[w.key]) == 0 {
		delete(sets, w.key)
		if w.isPrefix {
			if h.lengths[len(w.key)]--; h.lengths[len(w.key)] == 0 {
				delete(h.lengths, len(w.key))
			}
		}
	}
	w.next, w.rv = max(w.next, h.next), max(w.rv, h.rv)
	w.armed.Store(false)
	h.armed--
	h.updateBusy()
}

func (h *hub) setsOf(w *watcher) watchSets {
	if w.isPrefix {
		return h.prefixes
	}
	return h.keys
}

func (h *hub) updateBusy() { h.busy.Store(h.armed > 0 || len(h.waiters) > 0) }

// close ends all watches and waits, and what begins until the hub is reopened.
// With errShuttingDown that is never.
func (h *hub) close(err *apiError) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		return
	}
	h.ended = err == errShuttingDown
	h.closed.Store(err)
	h.wakeAll()
	for len(h.waiters) > 0 {
		v := heap.Pop(&h.waiters).(*versionWaiter)
		v.err = err
		close(v.done)
	}
	h.updateBusy()
}

// reopen lets new watches start again.
func (h *hub) reopen() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.ended {
		h.closed.Store(nil)
	}
}

// gate closes the hub because of err, or reopens it.
func (h *hub) gate(err *apiError) {
	if err != nil {
		h.close(err)
	} else {
		h.reopen()
	}
}

// watcher is one watch. Its methods are for one goroutine.
type watcher struct {
	hub      *hub
	key      string
	isPrefix bool
	patient  bool          // never gets errSlow
	closed   bool          // guarded by the hub's mutex
	wake     chan struct{} // holds one token: read may return something new

	// armed is set by the watcher and reset by the hub, under its mutex. Meanwhile
	// the rest is the hub's, guarded by the mutex, and otherwise the watcher's.
	armed    atomic.Bool
	caughtUp bool   // it was armed once
	next     uint64 // number of the next event to read
	rv       uint64 // it wants no more events up to this version
}

// watch starts a watch of one key, or of all keys with a prefix, for the events
// above rv, which the store must have reached. The caller must close it.
func (h *hub) watch(key string, isPrefix bool, rv uint64) (*watcher, error) {
	n, ok := h.store.seekEvent(rv)
	if !ok {
		return nil, errExpired
	}
	h.stats.open.Add(1)
	return &watcher{hub: h, key: key, isPrefix: isPrefix, next: n, rv: rv, wake: make(chan struct{}, 1)}, nil
}

// close ends the watch.
func (w *watcher) close() {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	if !w.closed {
		w.closed = true
		w.hub.stats.open.Add(-1)
	}
	if w.armed.Load() {
		w.hub.disarm(w)
	}
}

func (w *watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// read passes the next events to take, in order and without a gap, and returns
// how many there were. When there are none at present, wake tells when to read
// again. last means that w gets no more events of that version; the rest of
// others comes with the next read. All events up to version rv were passed on.
// take must not block nor keep the event.
//
// An error is final, and comes without events. What w got after rv is then an
// incomplete version.
func (w *watcher) read(take func(e *event, last bool)) (n int, rv uint64, err error) {
	for {
		if armed, rv, err := w.state(); armed || err != nil {
			return 0, rv, err
		}
		if n, err := w.scan(take); n > 0 || err != nil {
			w.hub.stats.note(n, err)
			return n, w.rv, err
		}
		w.hub.arm(w) // if that fails there is more to read
	}
}

// state says whether there is nothing to read because the hub has not seen
// anything for w.
func (w *watcher) state() (armed bool, rv uint64, err error) {
	h := w.hub
	if w.armed.Load() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if armed = w.armed.Load(); armed { // still
			w.rv = max(w.rv, h.rv)
		}
	}
	if err := h.closed.Load(); err != nil {
		return false, w.rv, err
	}
	return armed, w.rv, nil
}

// scan reads the window until it has passed on events enough, or is at the end.
// It stops within a version only before an event that w wants.
func (w *watcher) scan(take func(e *event, last bool)) (n int, err error) {
	size := uint64(0)
	var found *event // to be passed on once it is known whether it is the last of its version
	pass := func(last bool) (full bool) {
		take(found, last)
		n++
		size += found.size()
		found = nil
		return n >= readEventsMax || size >= readBytesMax
	}
	for {
		chunk, aging, ok := w.hub.store.eventsFrom(w.next)
		switch {
		case !ok && n > 0:
			return n, nil // the next read fails
		case !ok:
			return 0, errExpired
		case aging && w.caughtUp && !w.patient && n == 0 && found == nil:
			return 0, errSlow
		case len(chunk) == 0:
			return n, nil
		}
		for i := range chunk {
			e := &chunk[i]
			if w.wants(e.key) {
				if found != nil && pass(false) {
					return n, nil
				}
				found = e
			}
			w.next++
			if e.last {
				w.rv = e.rv
				if found != nil && pass(true) {
					return n, nil
				}
			}
		}
	}
}

func (w *watcher) wants(key string) bool {
	if w.isPrefix {
		return strings.HasPrefix(key, w.key)
	}
	return key == w.key
}

// waitVersion returns once the store holds version rv.
func (h *hub) waitVersion(ctx context.Context, rv uint64) error {
	if h.store.version() >= rv {
		return nil
	}
	v := &versionWaiter{rv: rv, done: make(chan struct{})}
	h.mu.Lock()
	if err := h.closed.Load(); err != nil {
		h.mu.Unlock()
		return err
	}
	heap.Push(&h.waiters, v)
	h.busy.Store(true)
	h.mu.Unlock()
	h.notify() // what was applied before busy was set
	select {
	case <-v.done:
		return v.err
	case <-ctx.Done():
		h.mu.Lock()
		defer h.mu.Unlock()
		if v.place >= 0 {
			heap.Remove(&h.waiters, v.place)
			h.updateBusy()
		}
		return ctx.Err()
	}
}

func (h *hub) releaseWaiters(rv uint64) {
	for len(h.waiters) > 0 && h.waiters[0].rv <= rv {
		close(heap.Pop(&h.waiters).(*versionWaiter).done)
	}
	h.updateBusy()
}

// versionWaiter waits for a version; versionHeap has the lowest first.
type versionWaiter struct {
	rv    uint64
	place int // in the heap; -1 = not there
	done  chan struct{}
	err   error
}

type versionHeap []*versionWaiter

func (h versionHeap) Len() int           { return len(h) }
func (h versionHeap) Less(i, j int) bool { return h[i].rv < h[j].rv }
func (h versionHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}

func (h *versionHeap) Push(x any) {
	v := x.(*versionWaiter)
	v.place = len(*h)
	*h = append(*h, v)
}

func (h *versionHeap) Pop() any {
	old := *h
	v := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	v.place = -1
	return v
}
