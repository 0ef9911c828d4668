package watch

import (
	"bytes"
	"container/heap"
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file tells watchers of events. There is no queue for each of them: all
// read the window of the store, each at its own pace, and a watcher that has
// read everything arms itself at the hub. One goroutine, the hub's, looks at
// each new event and wakes those who wait for it. It never waits for a watcher,
// applying never waits for the hub, and a watcher that does not read costs no
// memory beyond the window, which is there anyway.

// What one read passes on at most, so that a slow watcher keeps little of it.
const (
	ReadEventsMax = 256
	ReadBytesMax  = 32 << 10 // of keys and values; one larger event makes its own
)

// Hub wakes the watchers of a store.
type Hub struct {
	store *store.Store
	Wake  chan struct{} // holds one token: something was applied
	busy  atomic.Bool   // a watcher is armed

	ReadEvents int // that one read passes on at most

	Closed atomic.Pointer[fault.Error] // why nobody is told of anything; nil = all are
	Stats  watchStats

	Mu       sync.Mutex
	ended    bool   // run has: it stays closed
	next     uint64 // number of the next event to look at
	rv       uint64 // all events up to this version were looked at
	Armed    int    // watchers; without any the hub looks at nothing
	keys     map[string]*watchNode
	prefixes watchNode // the root of a tree

	versions versionWaiters // with a mutex of its own: its deadlines do not wait for the hub
}

// hubTurn is how many events the hub looks at before it lets others in.
const hubTurn = 256

// watchStats counts what watchers do.
type watchStats struct {
	Open          atomic.Int64
	Events        atomic.Uint64 // passed on
	Slow, Expired atomic.Uint64 // watches that ended with errSlow or errExpired
}

// note counts what one read came to.
func (s *watchStats) note(n int, err error) {
	s.Events.Add(uint64(n))
	switch {
	case errors.Is(err, fault.ErrSlow):
		s.Slow.Add(1)
	case errors.Is(err, fault.ErrExpired):
		s.Expired.Add(1)
	}
}

func NewHub(kv *store.Store) *Hub {
	return &Hub{store: kv, Wake: make(chan struct{}, 1), ReadEvents: ReadEventsMax, keys: map[string]*watchNode{}}
}

// Notify says that something was applied. It does not block.
func (h *Hub) Notify() {
	if h.busy.Load() || h.versions.busy.Load() {
		wakeUp(h.Wake)
	}
}

// Run wakes watchers until ctx ends. Then every watch ends with it.
func (h *Hub) Run(ctx context.Context) error {
	for {
		select {
		case <-h.Wake:
			h.Distribute()
		case <-ctx.Done():
			h.Close(fault.ErrShuttingDown)
			return nil
		}
	}
}

// Distribute looks at all that was applied since the last time.
func (h *Hub) Distribute() {
	for more := true; more; {
		h.versions.release(h.store.Version())
		more = h.lookAtSome()
	}
}

// lookAtSome looks at the next events, if somebody waits for any.
func (h *Hub) lookAtSome() (more bool) {
	h.Mu.Lock()
	defer h.Mu.Unlock()
	if h.Armed == 0 {
		return false
	}
	events, _, ok := h.store.EventsFrom(h.next)
	if !ok { // a snapshot skipped them
		h.wakeAll()
		return false
	}
	for i := range events[:min(len(events), hubTurn)] {
		h.look(&events[i])
	}
	return len(events) > 0
}

// look wakes those who want the next event.
func (h *Hub) look(e *store.Event) {
	if n := h.keys[e.Key]; n != nil {
		h.wakeNode(n)
	}
	h.prefixes.eachPrefix(e.Key, h.wakeNode)
	h.next++
	if e.Last {
		h.rv = e.RV
	}
}

func (h *Hub) wakeNode(n *watchNode) {
	for w := range n.armed {
		if w.next <= h.next { // otherwise it has read this event already
			h.disarm(w)
			w.signal()
		}
	}
}

func (h *Hub) wakeAll() {
	wake := func(n *watchNode) {
		for w := range n.armed {
			h.disarm(w)
			w.signal()
		}
	}
	for _, n := range h.keys {
		wake(n)
	}
	h.prefixes.each(wake)
}

// arm makes the hub wake w for the next event that w wants, unless the hub has
// ended, or has looked at events that w has not read.
func (h *Hub) arm(w *Watcher) {
	h.Mu.Lock()
	defer h.Mu.Unlock()
	if h.Armed == 0 {
		h.next, h.rv = w.next, w.rv
	}
	if h.Closed.Load() != nil || w.next < h.next {
		return
	}
	w.node.armed[w] = struct{}{}
	w.caughtUp = true
	w.armed.Store(true)
	h.Armed++
	h.busy.Store(true)
	h.Notify() // what was applied before busy was set
}

// disarm lets an armed watcher go on where the hub is.
func (h *Hub) disarm(w *Watcher) {
	delete(w.node.armed, w)
	w.next, w.rv = max(w.next, h.next), max(w.rv, h.rv)
	w.armed.Store(false)
	h.Armed--
	h.busy.Store(h.Armed > 0)
}

// enter gives a watcher its node, which it keeps until it leaves.
func (h *Hub) enter(w *Watcher) {
	h.Mu.Lock()
	defer h.Mu.Unlock()
	if w.isPrefix {
		w.node = h.prefixes.find(w.key)
	} else if w.node = h.keys[w.key]; w.node == nil {
		w.node = &watchNode{name: w.key}
		h.keys[w.key] = w.node
	}
	if w.node.armed == nil {
		w.node.armed = map[*Watcher]struct{}{}
	}
	w.node.users++
}

func (h *Hub) leave(w *Watcher) {
	switch w.node.users--; {
	case w.node.users > 0:
	case w.isPrefix:
		h.prefixes.forget(w.key)
	default:
		delete(h.keys, w.key)
	}
}

// Close ends all watches and waits, and what begins until the hub is reopened.
// With errShuttingDown that is never.
func (h *Hub) Close(err *fault.Error) {
	h.Mu.Lock()
	defer h.Mu.Unlock()
	if h.ended {
		return
	}
	h.ended = err == fault.ErrShuttingDown
	h.Closed.Store(err)
	h.wakeAll()
	h.versions.end(err)
}

// reopen lets new watches start again.
func (h *Hub) reopen() {
	h.Mu.Lock()
	defer h.Mu.Unlock()
	if !h.ended {
		h.Closed.Store(nil)
	}
}

// Gate closes the hub because of err, or reopens it.
func (h *Hub) Gate(err *fault.Error) {
	if err != nil {
		h.Close(err)
	} else {
		h.reopen()
	}
}

// Watcher is one watch. Its methods are for one goroutine.
type Watcher struct {
	hub      *Hub
	key      string
	isPrefix bool
	patient  bool          // never gets errSlow
	closed   bool          // guarded by the hub's mutex
	node     *watchNode    // where the hub looks for it
	Wake     chan struct{} // holds one token: read may return something new

	// Invariant: a watcher that is armed has read all events that concern it up to the
	// version that the hub had looked at; the hub wakes it for the next one.
	//
	// armed is set by the watcher and reset by the hub, under its mutex. Meanwhile
	// the rest is the hub's, guarded by the mutex, and otherwise the watcher's.
	armed    atomic.Bool
	caughtUp bool   // it was armed once
	next     uint64 // number of the next event to read
	rv       uint64 // it wants no more events up to this version
}

// Watch starts a watch of one key, or of all keys with a prefix, for the events
// above rv, which the store must have reached. The caller must close it.
func (h *Hub) Watch(key string, isPrefix bool, rv uint64) (*Watcher, error) {
	n, ok := h.store.SeekEvent(rv)
	if !ok {
		return nil, fault.ErrExpired
	}
	h.Stats.Open.Add(1)
	w := &Watcher{hub: h, key: key, isPrefix: isPrefix, next: n, rv: rv, Wake: make(chan struct{}, 1)}
	h.enter(w)
	return w, nil
}

// Close ends the watch.
func (w *Watcher) Close() {
	w.hub.Mu.Lock()
	defer w.hub.Mu.Unlock()
	if w.closed {
		return
	}
	w.closed = true
	w.hub.Stats.Open.Add(-1)
	if w.armed.Load() {
		w.hub.disarm(w)
	}
	w.hub.leave(w)
}

func (w *Watcher) signal() { wakeUp(w.Wake) }

// Read passes the next events to take, in order and without a gap, and returns
// how many there were. When there are none at present, wake tells when to read
// again. last marks the last event that w gets of a version; a version without it
// goes on with the next read. All events up to version rv were passed on.
// take must not block nor keep the event.
//
// An error is final, and comes without events. What w got after rv is then an
// incomplete version.
func (w *Watcher) Read(take func(e *store.Event, last bool)) (n int, rv uint64, err error) {
	for {
		if armed, rv, err := w.State(); armed || err != nil {
			return 0, rv, err
		}
		if n, err := w.scan(take); n > 0 || err != nil {
			w.hub.Stats.note(n, err)
			return n, w.rv, err
		}
		w.hub.arm(w) // if that fails there is more to read
	}
}

// State says whether there is nothing to read because the hub has not seen
// anything for w.
func (w *Watcher) State() (armed bool, rv uint64, err error) {
	h := w.hub
	if w.armed.Load() {
		h.Mu.Lock()
		defer h.Mu.Unlock()
		if armed = w.armed.Load(); armed { // still
			w.rv = max(w.rv, h.rv)
		}
	}
	if err := h.Closed.Load(); err != nil {
		return false, w.rv, err
	}
	return armed, w.rv, nil
}

// scan reads the window until it has passed on events enough, or is at the end.
// It stops within a version only before an event that w wants.
func (w *Watcher) scan(take func(e *store.Event, last bool)) (n int, err error) {
	size := uint64(0)
	var found *store.Event // to be passed on once it is known whether it is the last of its version
	pass := func(last bool) (full bool) {
		take(found, last)
		n++
		size += found.Size()
		found = nil
		return n >= w.hub.ReadEvents || size >= ReadBytesMax
	}
	for {
		chunk, aging, ok := w.hub.store.EventsFrom(w.next)
		switch {
		case !ok && n > 0:
			return n, nil // the next read fails
		case !ok:
			return 0, fault.ErrExpired
		case aging && w.caughtUp && !w.patient && n == 0 && found == nil:
			return 0, fault.ErrSlow
		case len(chunk) == 0:
			return n, nil
		}
		for i := range chunk {
			e := &chunk[i]
			if w.wants(e.Key) {
				if found != nil && pass(false) {
					return n, nil
				}
				found = e
			}
			w.next++
			if e.Last {
				w.rv = e.RV
				if found != nil && pass(true) {
					return n, nil
				}
			}
		}
	}
}

func (w *Watcher) wants(key string) bool {
	if w.isPrefix {
		return strings.HasPrefix(key, w.key)
	}
	return key == w.key
}

// WaitVersion returns once the store holds version rv.
func (h *Hub) WaitVersion(ctx context.Context, rv uint64) error {
	if h.store.Version() >= rv {
		return nil
	}
	v := &versionWaiter{rv: rv, done: make(chan struct{})}
	if err := h.versions.add(v, &h.Closed); err != nil {
		return err
	}
	h.Notify() // what was applied before it waited
	select {
	case <-v.done:
		return v.err
	case <-ctx.Done():
		h.versions.remove(v)
		return ctx.Err()
	}
}

// watchNode holds the armed watchers of one key or prefix. Those of prefixes make a
// tree, in which the nodes above one are prefixes of its own, so all that a key
// has are on one way down from the root, which takes no longer than to read the
// key. A node stays as long as there are watchers that use it, armed or not.
type watchNode struct {
	name     string
	children []*watchNode
	firsts   []byte // for each child the first byte of its name after this one's; no two are equal
	armed    map[*Watcher]struct{}
	users    int // watchers; without any the node is where ways part, or the root
}

// child returns the place of the child on the way to a longer name, or -1.
func (n *watchNode) child(name string) int { return bytes.IndexByte(n.firsts, name[len(n.name)]) }

// eachPrefix calls f with the nodes whose names are prefixes of a key.
func (n *watchNode) eachPrefix(key string, f func(*watchNode)) {
	for {
		if len(n.armed) > 0 {
			f(n)
		}
		above := len(n.name)
		if above == len(key) {
			return
		}
		i := n.child(key)
		if i < 0 {
			return
		}
		if n = n.children[i]; !strings.HasPrefix(key[above+1:], n.name[above+1:]) {
			return
		}
	}
}

// each calls f with all nodes from n down.
func (n *watchNode) each(f func(*watchNode)) {
	f(n)
	for _, c := range n.children {
		c.each(f)
	}
}

// find returns the node with a name, which begins with that of n. It makes it if
// there is none.
func (n *watchNode) find(name string) *watchNode {
	for len(n.name) < len(name) {
		i := n.child(name)
		if i < 0 {
			c := &watchNode{name: name}
			n.children, n.firsts = append(n.children, c), append(n.firsts, name[len(n.name)])
			return c
		}
		c := n.children[i]
		same := len(n.name)
		for same < min(len(name), len(c.name)) && name[same] == c.name[same] {
			same++
		}
		if same < len(c.name) {
			c = &watchNode{name: name[:same], children: []*watchNode{c}, firsts: []byte{c.name[same]}}
			n.children[i] = c
		}
		n = c
	}
	return n
}

// forget removes the node with a name, if nobody uses it, and that above it if it
// is not needed any more.
func (n *watchNode) forget(name string) {
	if len(n.name) == len(name) {
		return
	}
	i := n.child(name)
	c := n.children[i]
	c.forget(name)
	if c.users > 0 {
		return
	}
	switch len(c.children) {
	case 0:
		n.children, n.firsts = slices.Delete(n.children, i, i+1), slices.Delete(n.firsts, i, i+1)
	case 1:
		n.children[i] = c.children[0]
	}
}

// versionWaiters are those who wait for a version of the store.
type versionWaiters struct {
	busy atomic.Bool // there are some
	mu   sync.Mutex
	heap versionHeap
}

// add adds a waiter unless closed says why it would wait in vain.
func (w *versionWaiters) add(v *versionWaiter, closed *atomic.Pointer[fault.Error]) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := closed.Load(); err != nil {
		return err
	}
	heap.Push(&w.heap, v)
	w.busy.Store(true)
	return nil
}

// remove ends a wait. It may have ended already.
func (w *versionWaiters) remove(v *versionWaiter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if v.place >= 0 {
		heap.Remove(&w.heap, v.place)
		w.busy.Store(len(w.heap) > 0)
	}
}

// release ends the waits for versions up to rv.
func (w *versionWaiters) release(rv uint64) {
	if w.busy.Load() {
		w.endUpTo(rv, nil)
	}
}

// end ends all waits.
func (w *versionWaiters) end(err error) { w.endUpTo(math.MaxUint64, err) }

func (w *versionWaiters) endUpTo(rv uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.heap) > 0 && w.heap[0].rv <= rv {
		v := heap.Pop(&w.heap).(*versionWaiter)
		v.err = err
		close(v.done)
	}
	w.busy.Store(len(w.heap) > 0)
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

// wakeUp puts the one token into c that it holds, unless it is there.
func wakeUp(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
