package main

import (
	"container/heap"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// This file hands events to watchers. One goroutine, the hub's, reads what was
// applied and puts each event into the queues of those who asked for it; it
// never waits for any of them, and applying never waits for it.
//
// A watch starts by reading the window of past events on its own. When it has
// caught up the hub takes over.

// Bounds of what waits for one watcher. Who falls behind further is ended with
// an error that says where to resume.
const (
	watchQueueMax      = 4096 // events
	watchQueueBytesMax = 1 << 20
)

var (
	errExpired = errors.New("events after the resource version have left the window")
	errSlow    = errors.New("the watcher did not keep up")
)

// hub distributes the events of a store.
type hub struct {
	store *kvstore
	wake  chan struct{} // holds one token: something was applied
	busy  atomic.Bool   // somebody waits; without it notify has nothing to do

	mu      sync.Mutex
	closed  error  // set once run has ended
	next    uint64 // number of the next event to hand out
	rv      uint64 // all events up to this version were handed out
	all     map[*watcher]struct{}
	keys    map[string]map[*watcher]struct{}
	prefix  map[string]map[*watcher]struct{}
	lengths map[int]int // of the prefixes: how many of them
	waiters versionHeap
}

func newHub(store *kvstore) *hub {
	return &hub{
		store:   store,
		wake:    make(chan struct{}, 1),
		all:     map[*watcher]struct{}{},
		keys:    map[string]map[*watcher]struct{}{},
		prefix:  map[string]map[*watcher]struct{}{},
		lengths: map[int]int{},
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

// run hands out events until ctx ends. Then every watch ends with it.
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

// distribute hands out all that was applied since the last time.
func (h *hub) distribute() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.releaseWaiters(h.store.version())
	for len(h.all) > 0 {
		events, ok := h.store.eventsFrom(h.next)
		if !ok {
			h.end(errExpired) // a snapshot skipped them
			return
		}
		if len(events) == 0 {
			return
		}
		for i := range events {
			h.offer(&events[i])
		}
	}
}

// offer puts the next event into the queues of those who want it.
func (h *hub) offer(e *event) {
	n := h.next
	h.next++
	if e.last {
		h.rv = e.rv
	}
	for w := range h.keys[e.key] {
		h.enqueue(w, n, e)
	}
	for length := range h.lengths {
		if length <= len(e.key) {
			for w := range h.prefix[e.key[:length]] {
				h.enqueue(w, n, e)
			}
		}
	}
}

func (h *hub) enqueue(w *watcher, n uint64, e *event) {
	if n < w.next {
		return // it read this one from the window
	}
	if len(w.queue) == watchQueueMax || w.queueSize+e.size() > watchQueueBytesMax && len(w.queue) > 0 {
		// All events of one version, or none of them.
		w.queue = slices.DeleteFunc(w.queue, func(q event) bool { return q.rv == e.rv })
		h.remove(w, errSlow)
		return
	}
	w.queue = append(w.queue, *e)
	w.queueSize += e.size()
	w.signal()
}

// add makes w a live watcher, unless the hub has handed out events that w has
// not read yet.
func (h *hub) add(w *watcher) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed != nil {
		w.live, w.err = true, h.closed
		return true
	}
	if len(h.all) == 0 { // nobody listened, so the hub did not either
		h.next, h.rv = w.next, w.rv
	}
	if w.next < h.next {
		return false
	}
	h.all[w] = struct{}{}
	set, name := h.keys, w.key
	if w.isPrefix {
		set = h.prefix
		if set[name] == nil {
			h.lengths[len(name)]++
		}
	}
	if set[name] == nil {
		set[name] = map[*watcher]struct{}{}
	}
	set[name][w] = struct{}{}
	w.live = true
	h.busy.Store(true)
	h.notify() // what was applied before busy was set
	return true
}

// remove ends a live watcher. It still gets what is in its queue.
func (h *hub) remove(w *watcher, err error) {
	if _, ok := h.all[w]; !ok {
		return
	}
	delete(h.all, w)
	set := h.keys
	if w.isPrefix {
		set = h.prefix
	}
	delete(set[w.key], w)
	if len(set[w.key]) == 0 {
		delete(set, w.key)
		if w.isPrefix {
			if h.lengths[len(w.key)]--; h.lengths[len(w.key)] == 0 {
				delete(h.lengths, len(w.key))
			}
		}
	}
	w.rv = max(w.rv, h.rv)
	w.err = err
	w.signal()
	h.busy.Store(len(h.all) > 0 || len(h.waiters) > 0)
}

func (h *hub) end(err error) {
	for w := range h.all {
		h.remove(w, err)
	}
}

func (h *hub) close(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = err
	h.end(err)
	for _, v := range h.waiters {
		v.err = err
		close(v.done)
	}
	h.waiters = nil
}

// watcher is one watch. Its methods are for one goroutine.
type watcher struct {
	hub      *hub
	key      string
	isPrefix bool
	next     uint64 // number of the next event to read from the window
	wake     chan struct{}
	live     bool // the hub has taken over

	// Guarded by hub.mu once it is live.
	rv        uint64 // it gets no more events up to this version, but for those in queue
	queue     []event
	queueSize uint64
	err       error
}

// watch starts a watch of one key, or of all keys with a prefix, for the events
// above rv. The caller must close it.
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
	w.hub.remove(w, nil)
}

func (w *watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// read returns the next events, in order, without a gap and never only some of
// those that share a version; none if there are none at present. Then wake tells
// when to read again. After each read all events up to version rv were returned.
// An error is final: no event above rv was returned.
func (w *watcher) read() (events []event, rv uint64, err error) {
	if !w.live {
		events, err = w.readWindow()
		return events, w.rv, err
	}
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	events, w.queue, w.queueSize = w.queue, nil, 0
	if w.err == nil {
		w.rv = max(w.rv, w.hub.rv)
	} else if len(events) == 0 {
		return nil, w.rv, w.err
	}
	return events, w.rv, nil
}

// readWindow reads past events until there are some that w wants, and makes it
// live when there are no more.
func (w *watcher) readWindow() (wanted []event, err error) {
	for {
		chunk, ok := w.hub.store.eventsFrom(w.next)
		if !ok {
			return nil, errExpired
		}
		if len(chunk) == 0 {
			if w.hub.add(w) {
				w.signal() // its queue may hold something already
				return nil, nil
			}
			continue
		}
		w.next += uint64(len(chunk))
		for _, e := range chunk {
			if w.wants(e.key) {
				wanted = append(wanted, e)
			}
		}
		newest := chunk[len(chunk)-1]
		if !newest.last {
			continue // the rest of its version is in the next chunk
		}
		w.rv = newest.rv
		if len(wanted) > 0 {
			return wanted, nil
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
		}
		return ctx.Err()
	}
}

func (h *hub) releaseWaiters(rv uint64) {
	for len(h.waiters) > 0 && h.waiters[0].rv <= rv {
		close(heap.Pop(&h.waiters).(*versionWaiter).done)
	}
	h.busy.Store(len(h.all) > 0 || len(h.waiters) > 0)
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
