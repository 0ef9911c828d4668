package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"raftrv/internal/httpapi"
	"raftrv/internal/store"
	"raftrv/internal/watchcheck"
)

// simWatcher is a client that watches over HTTP: it reads what the product writes,
// and goes on at another node when its connection breaks, as its protocol says. Of
// the product run the hub, without its goroutine, and what writes a watch.
type simWatcher struct {
	sim      *sim
	key      string
	isPrefix bool
	events   bool // server-sent events
	bookmark time.Duration

	process *process // it is connected to; nil = to none
	stream  *httpapi.WatchStream
	out     bytes.Buffer // what it has not read
	idle    bool         // it has got all, until it is woken

	cursor uint64 // version to resume from
	next   int    // of the model's events: the first that it has not seen
	part   bool   // more of the last version follows
	count  int    // of events, ever
}

// watchEvery is the mean time between two looks.
const watchEvery = 100 * time.Millisecond

func (s *sim) addWatchers(n int) {
	for i := range n {
		w := &simWatcher{sim: s, isPrefix: true, events: s.chance(0.5), bookmark: s.between(50*time.Millisecond, 2*time.Second)}
		if i > 0 { // the first one gets everything
			w.key = pick(s, []string{"k", "k0", txnGroup, prefixGroup + "/", expiringGroup})
			w.isPrefix = s.chance(0.8)
		}
		s.watchers = append(s.watchers, w)
		s.after(s.around(watchEvery), w.look)
	}
}

// look gives the watch some turns, and the client what they have written.
func (w *simWatcher) look() {
	s := w.sim
	defer s.after(s.around(watchEvery), w.look)
	if w.process == nil {
		w.connect(pick(s, s.nodes).process)
		return
	}
	if w.process.node.paused() {
		return
	}
	for range 1 + s.rand.IntN(8) {
		w.turn()
	}
	w.read(w.out.Len())
	if s.chance(0.1) {
		w.disconnect()
	}
}

// connect starts to watch at a node.
func (w *simWatcher) connect(p *process) {
	if p == nil || p.store.Version() < w.cursor {
		return // it would wait
	}
	watcher, err := p.hub.Watch(w.key, w.isPrefix, w.cursor)
	if err != nil {
		w.start(p.store.Version()) // it would list everything and go on from there
		return
	}
	w.start(w.cursor)
	w.process = p
	w.stream = &httpapi.WatchStream{
		W: w, Control: http.NewResponseController(w), Watcher: watcher, Events: w.events, Bookmark: w.bookmark, Now: w.sim.watchClock, RV: w.cursor,
		Cluster: fmt.Sprintf("%x", p.identity.Cluster),
	}
	if err := w.stream.Begin(nil); err != nil {
		w.sim.check.violate("watch", "%v", err)
	}
}

func (s *sim) watchClock() time.Time { return simEpoch.Add(s.now) }

// start makes it resume after a version.
func (w *simWatcher) start(rv uint64) {
	w.cursor, w.part, w.idle = rv, false, false
	all := w.sim.check.model.events
	for w.next = min(w.next, len(all)); w.next > 0 && all[w.next-1].RV > rv; {
		w.next--
	}
	for w.next < len(all) && all[w.next].RV <= rv {
		w.next++
	}
}

// turn is one of watchStream.run: it does nothing before it is woken or a bookmark
// is due.
func (w *simWatcher) turn() {
	st := w.stream
	if st == nil {
		return
	}
	select {
	case <-st.Watcher.Wake:
		w.idle = false
	default:
	}
	if w.idle && st.Now().Sub(st.Bookmarks) < st.Bookmark {
		return
	}
	idle, _, err := st.Turn()
	if plant := w.sim.plant; plant != nil && plant.watched != nil && err == nil {
		plant.watched(w.process, st)
	}
	w.process.wakeHub() // it may be armed now
	w.idle = idle
	if err != nil {
		_ = st.Fail(err) // returns it
		w.read(w.out.Len())
		w.disconnect()
	}
}

// disconnect breaks the connection: of what is on its way only a part arrives.
func (w *simWatcher) disconnect() {
	if w.process == nil {
		return
	}
	w.read(w.sim.rand.IntN(w.out.Len() + 1))
	w.out.Reset()
	w.stream.Watcher.Close()
	w.process, w.stream = nil, nil
}

// It implements http.ResponseWriter.
func (w *simWatcher) Header() http.Header         { return http.Header{} }
func (w *simWatcher) WriteHeader(int)             {}
func (w *simWatcher) Flush()                      {}
func (w *simWatcher) Write(b []byte) (int, error) { return w.out.Write(b) }

// read reads the messages that n bytes hold.
func (w *simWatcher) read(n int) {
	end := []byte("\n")
	if w.events {
		end = []byte("\n\n")
	}
	part := w.out.Bytes()[:n]
	for !w.sim.check.failed() {
		text, rest, whole := bytes.Cut(part, end)
		if !whole {
			break
		}
		part = rest
		if err := w.take(string(text)); err != nil {
			w.sim.check.violate("watch", "a watch of %q, prefix %v, resumed at version %d, at node %d: %v in %s",
				w.key, w.isPrefix, w.cursor, w.process.node.id, err, text)
		}
	}
	w.out.Next(n - len(part))
}

// take reads a message.
func (w *simWatcher) take(text string) error {
	id, hasID := uint64(0), false
	if w.events {
		for line := range strings.Lines(text) {
			switch name, value, _ := strings.Cut(strings.TrimSpace(line), ": "); name {
			case "id":
				cluster, rv, err := httpapi.ParseResume(value)
				if err != nil || cluster != w.stream.Cluster {
					return fmt.Errorf("id %q: %w", value, err)
				}
				id, hasID = rv, true
			case "data":
				text = value
			}
		}
	}
	if strings.HasPrefix(text, "retry") {
		return nil
	}
	m, err := watchcheck.Parse([]byte(text))
	switch {
	case err != nil:
		return err
	case m.Kind == "ERROR" && m.RV == 0:
		return nil // there is nothing to resume from
	case m.Kind == "ERROR":
		return w.reached(m.RV)
	case w.events && (hasID == m.More || hasID && id != m.RV):
		return fmt.Errorf("id %d", id)
	case m.More && !strings.Contains(text, fmt.Sprintf(`"resumeFrom":%d}`, m.RV-1)):
		return errors.New("no version to resume from")
	case m.Kind == "BOOKMARK" && w.part:
		return errors.New("a bookmark within a version")
	case m.Kind == "BOOKMARK":
		return w.reached(m.RV)
	}
	return w.event(m)
}

// wanted returns the next event that the watcher has not seen and wants, nil if
// there is none.
func (w *simWatcher) wanted() *store.Event {
	for all := w.sim.check.model.events; w.next < len(all); w.next++ {
		if e := &all[w.next]; e.Key == w.key || w.isPrefix && strings.HasPrefix(e.Key, w.key) {
			return e
		}
	}
	return nil
}

// reached: the watcher is told that it knows all up to a version.
func (w *simWatcher) reached(rv uint64) error {
	if e := w.wanted(); e != nil && e.RV <= rv {
		return fmt.Errorf("%+v comes before that", *e)
	}
	if now := w.sim.check.model.rv; rv > now || rv < w.cursor {
		return fmt.Errorf("the watcher was at %d, and the store is at %d", w.cursor, now)
	}
	w.cursor, w.part = rv, false
	return nil
}

func (w *simWatcher) event(m watchcheck.Message) error {
	e := w.wanted()
	if e == nil {
		return errors.New("an event that nobody has applied")
	}
	want := watchcheck.MessageOf(*e)
	w.next++
	w.count++
	next := w.wanted()
	if want.More = next != nil && next.RV == want.RV; m != want {
		return fmt.Errorf("instead of %v", want)
	}
	if w.part = m.More; !w.part {
		w.cursor = m.RV
	}
	return nil
}

// applied tells the hub that there is something to look at.
func (p *process) applied() {
	if plant := p.sim.plant; plant != nil && plant.deaf {
		return
	}
	p.hub.Notify()
	p.wakeHub()
}

// wakeHub gives the hub a turn, if it waits for one.
func (p *process) wakeHub() {
	if len(p.hub.Wake) == 0 {
		return
	}
	p.after(p.sim.around(time.Millisecond), func() {
		select {
		case <-p.hub.Wake:
			p.hub.Distribute()
		default:
		}
	})
}

// validateWatchers: every watcher has seen everything once, in order, and those
// that wait have nothing to wait for.
func validateWatchers(s *sim) error {
	for _, w := range s.watchers {
		if w.process == nil {
			continue
		}
		select {
		case <-w.process.hub.Wake:
			w.process.hub.Distribute()
		default:
		}
		for len(w.stream.Watcher.Wake) > 0 || !w.idle {
			if w.turn(); w.process == nil {
				break
			}
		}
		if w.process == nil {
			continue
		}
		w.read(w.out.Len())
		if e := w.wanted(); e != nil && !s.check.failed() {
			return fmt.Errorf("a watch of %q at node %d was not woken for %+v", w.key, w.process.node.id, *e)
		}
	}
	return nil
}
