package main

import (
	"fmt"
	"time"
)

// simWatcher follows all events from some version on, as a client does whose
// connections break: it reads the window of a node, and goes on at another one.
// How the hub wakes watchers is tested elsewhere, with real goroutines.
type simWatcher struct {
	sim   *sim
	from  uint64 // version
	seen  []event
	count int // of events, ever
}

// watchEvery is the mean time between two looks.
const watchEvery = 100 * time.Millisecond

func (s *sim) addWatchers(n int) {
	for range n {
		w := &simWatcher{sim: s}
		s.watchers = append(s.watchers, w)
		s.after(s.around(watchEvery), w.look)
	}
}

// cursor is the version after which the watcher goes on.
func (w *simWatcher) cursor() uint64 {
	if n := len(w.seen); n > 0 {
		return w.seen[n-1].rv
	}
	return w.from
}

// look reads what any node has after the cursor.
func (w *simWatcher) look() {
	s := w.sim
	defer s.after(s.around(watchEvery), w.look)
	p := pick(s, s.nodes).process
	if p == nil || p.store.version() < w.cursor() {
		return // it would wait
	}
	at, ok := p.store.seekEvent(w.cursor())
	if !ok {
		// Told that it is too late: it would list everything and go on from there.
		w.check()
		w.from, w.seen = p.store.version(), nil
		return
	}
	for {
		events, _, ok := p.store.eventsFrom(at)
		if !ok {
			s.check.violate("watch", "node %d loses event %d that it has just found", p.node.id, at)
		}
		if !ok || len(events) == 0 {
			return
		}
		w.seen = append(w.seen, events...)
		w.count += len(events)
		at += uint64(len(events))
	}
}

// check compares what the watcher has seen with all that happened.
func (w *simWatcher) check() {
	if err := w.sim.check.model.sameEvents(w.from, w.seen); err != nil {
		w.sim.check.violate("watch", "%v", err)
	}
}

// sameEvents wants events to be those after a version, without a gap.
func (m *model) sameEvents(from uint64, events []event) error {
	at := 0
	for at < len(m.events) && m.events[at].rv <= from {
		at++
	}
	for i, e := range events {
		if at+i >= len(m.events) {
			return fmt.Errorf("a watch from version %d saw %+v, which nobody has applied", from, e)
		}
		if want := m.events[at+i]; e != want {
			return fmt.Errorf("a watch from version %d saw %+v instead of %+v", from, e, want)
		}
	}
	return nil
}

// validateWatchers: every watcher has seen everything once, in order.
func validateWatchers(s *sim) error {
	for _, w := range s.watchers {
		w.check()
	}
	return nil
}
