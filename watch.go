package main

import (
	"container/heap"
	"context"
	"slices"
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

// What one read returns at most. A watcher keeps these events alive while it
// writes them, however long that takes.
const (
	readEventsMax = 256
	readBytesMax  = 32 << 10 // of keys and values; one larger event makes its own
)

// hub wakes the watchers of a store.
type hub struct {
	store *kvstore
	wake  chan struct{} // holds one token: something was applied
	busy  atomic.Bool   // somebody waits; without it notify has nothing to do

	mu       sync.Mutex
	closed   error  // set once run has ended
	next     uint64 // number of the next event to look at
	rv       uint64 // all events up to this version were looked at
	armed    int    // watchers in the sets; without any the hub looks at nothing
	keys     watchSets
	prefixes watchSets
	lengths  map[int]int // of the prefixes: how many sets
	waiters  versionHeap
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
	if h.closed != nil || w.next < h.next {
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
	w.armed, w.caughtUp = true, true
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
	w.armed = false
	w.next, w.rv = max(w.next, h.next), max(w.rv, h.rv)
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

func (h *hub) close(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = err
	h.wakeAll()
	for len(h.waiters) > 0 {
		v := heap.Pop(&h.waiters).(*versionWaiter)
		v.err = err
		close(v.done)
	}
	h.updateBusy()
}

// watcher is one watch. Its methods are for one goroutine.
type watcher struct {
	hub      *hub
	key      string
	isPrefix bool
	patient  bool          // never gets errSlow
	wake     chan struct{} // holds one token: read may return something new

	// The hub's while it is armed, guarded by its mutex, and otherwise the
	// watcher's.
	armed    bool
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
	return &watcher{hub: h, key: key, isPrefix: isPrefix, next: n, rv: rv, wake: make(chan struct{}, 1)}, nil
}

// close ends the watch.
func (w *watcher) close() {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	if w.armed {
		w.hub.disarm(w)
	}
}

func (w *watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// read returns the next events in buf, in order and without a gap. When there
// are none at present, wake tells when to read again. last is set in those after
// which w gets no more events of their version; the others of the version may
// come with the next read. All events up to version rv were returned.
//
// An error is final, and no event comes with it. What a watcher got after rv is
// an incomplete version.
func (w *watcher) read(buf []event) (events []event, rv uint64, err error) {
	for {
		if armed, rv, err := w.state(); armed || err != nil {
			return nil, rv, err
		}
		events, err := w.scan(buf[:0])
		if len(events) > 0 || err != nil {
			return events, w.rv, err
		}
		w.hub.arm(w) // if that fails there is more to read
	}
}

// state says whether there is nothing to read because the hub has not seen
// anything for w.
func (w *watcher) state() (armed bool, rv uint64, err error) {
	h := w.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if w.armed {
		w.rv = max(w.rv, h.rv)
	}
	return w.armed, w.rv, h.closed
}

// scan reads the window until it has events enough, or is at the end. It stops
// within a version only before an event that w wants.
func (w *watcher) scan(events []event) ([]event, error) {
	size := uint64(0)
	for {
		chunk, aging, ok := w.hub.store.eventsFrom(w.next)
		switch {
		case !ok:
			// What was found of an incomplete version may lack its end.
			events = slices.DeleteFunc(events, func(e event) bool { return e.rv > w.rv })
			if len(events) > 0 {
				return events, nil // the next read fails again
			}
			return nil, errExpired
		case aging && w.caughtUp && !w.patient && len(events) == 0:
			return nil, errSlow
		case len(chunk) == 0:
			return events, nil
		}
		for i := range chunk {
			e := &chunk[i]
			full := len(events) >= readEventsMax || size >= readBytesMax
			if n := len(events); w.wants(e.key) {
				if n > 0 && events[n-1].rv == e.rv {
					events[n-1].last = false
				}
				if full {
					return events, nil
				}
				events = append(events, *e)
				events[n].last = true // as far as w is concerned, until another one comes
				size += e.size()
			}
			w.next++
			if e.last {
				w.rv = e.rv
				if full {
					return events, nil
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
	if h.closed != nil {
		h.mu.Unlock()
		return h.closed
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
