package main

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
)

// This file is the HTTP front's watch: a response that does not end. It is a
// stream of messages, each a JSON object on a line of its own:
//
//	{"type":"ADDED","object":{"key":"a","value":"1","resourceVersion":7,"createdResourceVersion":7}}
//	{"type":"MODIFIED","object":{...,"previousResourceVersion":7}}
//	{"type":"DELETED","object":{...,"previousResourceVersion":8,"reason":"expired"}}
//	{"type":"BOOKMARK","object":{"resourceVersion":12}}
//	{"type":"ERROR","object":{"code":"watch-too-slow",...,"resourceVersion":12}}
//
// or the same as server-sent events. A message with "more":true is followed by
// others that belong to it: those of the same version, or the rest of the list
// that initial=true asks for. So the version to resume from is that of the last
// message without it, and it is also the id of the server-sent event.

const (
	// watchWriteTimeout is how long a client may take to read watchPartSize bytes
	// before it is cut off.
	watchWriteTimeout = 10 * time.Second
	watchPartSize     = 32 << 10

	// watchListMax is how many items a list may have for which no scan is opened,
	// of which there can be only so many.
	watchListMax = 512

	watchTimeoutMax = 24 * time.Hour
	watchRetry      = "retry: 1000\n\n" // milliseconds until a browser connects again
)

var (
	typeEvents   = []string{"text/event-stream"}
	noStore      = []string{"no-store"}
	noBuffering  = []string{"no"}
	errKeyPrefix = errInvalid.withDetail("key and prefix exclude each other")
)

// watch answers the events above a version as they happen.
func (h *httpAPI) watch(w http.ResponseWriter, r request) error {
	s := &watchStream{
		w:        w,
		control:  http.NewResponseController(w),
		events:   accepts(r.Header, typeEvents[0]),
		bookmark: h.bookmark * 4 / 5, // so that the promise holds on a busy node, too
	}
	if r.params.duration > 0 {
		s.end = time.Now().Add(r.params.duration)
	}
	list, err := h.startWatch(s, r)
	if err != nil {
		return err
	}
	defer s.watcher.close()
	if list != nil {
		defer list.close()
	}
	header := w.Header()
	header["Content-Type"] = typeNDJSON
	if s.events {
		header["Content-Type"] = typeEvents
	}
	header["Cache-Control"] = noStore
	header["Vary"] = varyAccept
	header["X-Accel-Buffering"] = noBuffering // asks a proxy to pass on each part at once
	header["X-Content-Type-Options"] = noSniff
	setResourceVersion(header, s.rv)
	if r.Method == http.MethodHead {
		return nil
	}
	// Without a deadline for more of the request, which was read whole, only the
	// end of the connection ends the watch early.
	_ = s.control.SetReadDeadline(time.Time{}) // fails with a writer that has no connection
	_ = s.run(r.Context(), list)               // fails if the client is gone
	return nil
}

// startWatch finds where the watch starts. list is what to send before.
func (h *httpAPI) startWatch(s *watchStream, r request) (list *watchList, err error) {
	p := &r.params
	filter, isPrefix := p.prefix, true
	if p.has(paramKey) {
		filter, isPrefix = p.key, false
	}
	switch n := len(filter); {
	case p.has(paramKey) && p.has(paramPrefix):
		return nil, errKeyPrefix
	case n > keySizeMax || n == 0 && !isPrefix:
		return nil, errInvalid.withDetail("the key or prefix has %d bytes; a key has 1 to %d", n, keySizeMax)
	}
	rv, resumed, err := lastEventID(r.Header)
	if err != nil {
		return nil, err
	}
	known := resumed || p.has(paramResourceVersion)
	if !resumed {
		rv = p.resourceVersion
	}
	switch {
	case p.initial && !resumed:
		if err := h.catchUp(r); err != nil {
			return nil, err
		}
		if list, err = h.newWatchList(filter, isPrefix); err != nil {
			return nil, err
		}
		rv = list.rv
	case known && rv <= h.store.version():
	default:
		// From now on means after every write that was acknowledged. And a version
		// that this node does not have may be one that it will hear of soon.
		if err := h.backend.linearize(r.Context(), p.timeout); err != nil {
			return nil, err
		}
		now := h.store.version()
		if known && rv > now {
			return nil, errInvalid.withDetail("resource version %d is in the future: the store is at %d", rv, now)
		}
		if !known {
			rv = now
			s.hello = true
		}
	}
	s.rv = rv
	if s.watcher, err = h.hub.watch(filter, isPrefix, rv); err != nil {
		if list != nil {
			list.close()
		}
		return nil, expired(h.store.version())
	}
	return list, nil
}

// expired is the answer to a watch that would start before the window.
func expired(now uint64) error {
	e := errExpired.withDetail("events after the resource version have left the window of this node, which is now at %d: list again, or watch with initial=true", now)
	e.resourceVersion = now
	return e
}

// lastEventID reads where a server-sent stream was interrupted.
func lastEventID(header http.Header) (rv uint64, ok bool, err error) {
	values := header["Last-Event-Id"]
	if len(values) == 0 || values[0] == "" {
		return 0, false, nil
	}
	if rv, err = strconv.ParseUint(values[0], 10, 64); err != nil {
		return 0, false, errInvalid.withDetail("Last-Event-ID must be the id of an event, a decimal number")
	}
	return rv, true, nil
}

// watchList reads the items at the start of a watch, all from one version.
type watchList struct {
	rv    uint64
	items []keyItem // if they are few
	scan  *scan     // otherwise
}

func (h *httpAPI) newWatchList(filter string, isPrefix bool) (*watchList, error) {
	l := &watchList{}
	if !isPrefix {
		it, rv, ok := h.store.get(filter)
		l.rv = rv
		if ok {
			l.items = []keyItem{{filter, it}}
		}
		return l, nil
	}
	if l.items, l.rv = h.store.list(filter, "", watchListMax+1); len(l.items) <= watchListMax {
		return l, nil
	}
	sc, err := h.store.scan(filter, "")
	if err != nil {
		return nil, errTooManyRequests.withDetail("%d lists are on their way already, at most that many can be; retry later or at another node", scansMax)
	}
	return &watchList{rv: sc.rv, scan: sc}, nil
}

// read returns the next items, none at the end.
func (l *watchList) read() ([]keyItem, error) {
	if l.scan != nil {
		return l.scan.read()
	}
	items := l.items
	l.items = nil
	return items, nil
}

func (l *watchList) close() {
	if l.scan != nil {
		l.scan.close()
	}
}

// watchStream writes one watch. Between two batches of messages it holds no
// buffer, so that a watch on which nothing happens costs little.
type watchStream struct {
	w        http.ResponseWriter
	control  *http.ResponseController
	watcher  *watcher
	events   bool // server-sent events
	hello    bool // the client does not know where the watch starts
	bookmark time.Duration
	end      time.Time // zero = never

	rv        uint64 // the client was told of all events up to it
	bookmarks time.Time
	part      bool // the last version is not complete
}

// watchBatch is what a stream needs to write.
type watchBatch struct {
	events []event
	buf    []byte
}

var watchBatches = sync.Pool{New: func() any {
	return &watchBatch{events: make([]event, 0, readEventsMax), buf: make([]byte, 0, watchPartSize)}
}}

// free keeps the batch for the next stream, unless an extraordinary value has
// grown it.
func (b *watchBatch) free() {
	clear(b.events)
	b.events, b.buf = b.events[:0], b.buf[:0]
	if cap(b.buf) <= 4*watchPartSize {
		watchBatches.Put(b)
	}
}

// run writes until the watch ends. An error means that the client is gone.
func (s *watchStream) run(ctx context.Context, list *watchList) error {
	if err := s.begin(list); err != nil {
		return s.fail(err)
	}
	timer := time.NewTimer(s.bookmark)
	defer timer.Stop()
	for {
		idle, err := s.step()
		if err != nil {
			return s.fail(err)
		}
		now := time.Now()
		ended := !s.end.IsZero() && !now.Before(s.end)
		if !s.part && (ended || now.Sub(s.bookmarks) >= s.bookmark) {
			if err := s.writeBookmark(); err != nil || ended {
				return err
			}
		}
		if !idle {
			continue
		}
		wait := s.bookmark - now.Sub(s.bookmarks)
		if left := s.end.Sub(now); !s.end.IsZero() && left < wait {
			wait = left
		}
		timer.Reset(wait)
		select {
		case <-s.watcher.wake:
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// begin writes what comes before the first event.
func (s *watchStream) begin(list *watchList) error {
	b := watchBatches.Get().(*watchBatch)
	defer b.free()
	if s.events {
		b.buf = append(b.buf, watchRetry...)
	}
	if list != nil {
		s.hello, s.rv = true, 0 // without the whole list there is nothing to resume
		if err := s.writeList(b, list); err != nil {
			return err
		}
		s.rv = list.rv
	}
	if s.hello {
		b.buf = s.appendBookmark(b.buf)
	}
	s.bookmarks = time.Now()
	return s.flush(b)
}

func (s *watchStream) writeList(b *watchBatch, list *watchList) error {
	for {
		items, err := list.read()
		if err != nil {
			return errExpired.withDetail("the list took so long that too much has changed since it began; try again, and read faster")
		}
		if len(items) == 0 {
			return nil
		}
		if _, _, err := s.watcher.state(); err != nil {
			return err // the node stops
		}
		for i := range items {
			e := event{rv: items[i].rv, kind: eventAdded, key: items[i].key, item: items[i].item}
			b.buf = s.appendEvent(b.buf, &e)
			if err := s.writeLarge(b); err != nil {
				return err
			}
		}
	}
}

// step writes the next events. idle says that there are none.
func (s *watchStream) step() (idle bool, err error) {
	b := watchBatches.Get().(*watchBatch)
	defer b.free()
	events, rv, err := s.watcher.read(b.events)
	if err != nil {
		return false, err
	}
	if len(events) == 0 {
		s.rv = rv
		return true, nil
	}
	b.events = events
	for i := range events {
		b.buf = s.appendEvent(b.buf, &events[i])
		s.part = !events[i].last
		if err := s.writeLarge(b); err != nil {
			return false, err
		}
	}
	s.rv = rv
	return false, s.flush(b)
}

// fail ends the watch with a message that says why, unless the client is gone.
func (s *watchStream) fail(err error) error {
	e, ok := errors.AsType[*apiError](err)
	if !ok {
		return err
	}
	b := watchBatches.Get().(*watchBatch)
	defer b.free()
	e = e.withDetail("%s", e.detail)
	e.resourceVersion = s.rv
	b.buf = s.appendHead(b.buf, "ERROR", s.rv)
	b.buf = append(b.buf, bytes.TrimSpace(newProblem(e).encode())...)
	b.buf = s.appendTail(b.buf, false)
	return s.flush(b)
}

// writeBookmark tells the client up to where it knows everything.
func (s *watchStream) writeBookmark() error {
	b := watchBatches.Get().(*watchBatch)
	defer b.free()
	b.buf = s.appendBookmark(b.buf)
	s.bookmarks = time.Now()
	return s.flush(b)
}

func (s *watchStream) appendBookmark(buf []byte) []byte {
	buf = s.appendHead(buf, "BOOKMARK", s.rv)
	buf = append(buf, `{"resourceVersion":`...)
	buf = strconv.AppendUint(buf, s.rv, 10)
	buf = append(buf, '}')
	return s.appendTail(buf, false)
}

// What the kinds of events are called.
var eventTypes = [...]string{eventAdded: "ADDED", eventModified: "MODIFIED", eventDeleted: "DELETED", eventExpired: "DELETED"}

func (s *watchStream) appendEvent(buf []byte, e *event) []byte {
	id := uint64(0)
	if e.last {
		id = e.rv // no sooner, or a client that resumes would lose half a version
	}
	buf = s.appendHead(buf, eventTypes[e.kind], id)
	it := e.item
	it.rv = e.rv // of a deletion: its own
	buf = appendItemJSON(buf, e.key, it, false)
	if e.prev != 0 {
		buf = append(buf[:len(buf)-1], `,"previousResourceVersion":`...)
		buf = strconv.AppendUint(buf, e.prev, 10)
		if e.kind == eventExpired {
			buf = append(buf, `,"reason":"expired"`...)
		}
		buf = append(buf, '}')
	}
	return s.appendTail(buf, !e.last)
}

// appendHead begins a message; id 0 is none.
func (s *watchStream) appendHead(buf []byte, kind string, id uint64) []byte {
	if s.events {
		buf = append(buf, "event: "...)
		buf = append(buf, kind...)
		if id != 0 {
			buf = append(buf, "\nid: "...)
			buf = strconv.AppendUint(buf, id, 10)
		}
		buf = append(buf, "\ndata: "...)
	}
	buf = append(buf, `{"type":"`...)
	buf = append(buf, kind...)
	return append(buf, `","object":`...)
}

func (s *watchStream) appendTail(buf []byte, more bool) []byte {
	if more {
		buf = append(buf, `,"more":true`...)
	}
	buf = append(buf, "}\n"...)
	if s.events {
		buf = append(buf, '\n')
	}
	return buf
}

// writeLarge writes what was appended if it is enough for a part.
func (s *watchStream) writeLarge(b *watchBatch) error {
	if len(b.buf) < watchPartSize {
		return nil
	}
	return s.write(b)
}

// write gives the client time for each part, so that it may be slow but must not
// stand still.
func (s *watchStream) write(b *watchBatch) error {
	for part := range slices.Chunk(b.buf, watchPartSize) {
		_ = s.control.SetWriteDeadline(time.Now().Add(watchWriteTimeout)) // as above
		if _, err := s.w.Write(part); err != nil {
			return err
		}
	}
	b.buf = b.buf[:0]
	return nil
}

func (s *watchStream) flush(b *watchBatch) error {
	if err := s.write(b); err != nil {
		return err
	}
	return s.control.Flush()
}
