package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"raftrv/internal/fault"
	"raftrv/internal/store"
	"raftrv/internal/watch"
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
// message without it, and the id of the server-sent event is that version with the cluster's
// ID before it, since a version of a cluster means nothing to another one. Who has to
// stop at one with it finds the version before its own in "resumeFrom"; from
// half a list there is nothing to resume.
//
// A browser that resumes too late, and has asked for initial=true, gets a new list,
// which begins with RELIST: what the client had until then may be gone.

const (
	// watchWriteTimeout is how long a client may take to read watchPartSize bytes
	// before it is cut off.
	watchWriteTimeout = 10 * time.Second
	WatchPartSize     = 32 << 10

	watchTimeoutMax = 24 * time.Hour
	watchRetry      = "retry: 1000\n\n" // milliseconds until a browser connects again
)

var (
	typeEvents   = []string{"text/event-stream"}
	noStore      = []string{"no-store"}
	noBuffering  = []string{"no"}
	errKeyPrefix = fault.ErrInvalid.WithDetail("key and prefix exclude each other")
)

// watch answers the events above a version as they happen.
func (h *httpAPI) watch(w http.ResponseWriter, r request) error {
	s := &WatchStream{
		W:        w,
		Control:  http.NewResponseController(w),
		Cluster:  h.Cluster,
		Events:   prefers(r.Header, typeEvents[0], typeNDJSON[0]),
		Bookmark: h.Bookmark * 4 / 5, // so that the promise holds on a busy node, too
		Now:      time.Now,
	}
	if r.params.duration > 0 {
		s.end = time.Now().Add(r.params.duration)
	}
	list, err := h.startWatch(s, r)
	if err != nil {
		return err
	}
	defer s.Watcher.Close()
	if list != nil {
		defer list.close()
	}
	header := w.Header()
	header["Content-Type"] = typeNDJSON
	if s.Events {
		header["Content-Type"] = typeEvents
	}
	header["Vary"] = h.browsers.varyAccept
	header["X-Accel-Buffering"] = noBuffering // asks a proxy to pass on each part at once
	setResourceVersion(header, s.RV)
	h.setCluster(header)
	if r.Method == http.MethodHead {
		return nil
	}
	// Without a deadline for more of the request, which was read whole, only the
	// end of the connection ends the watch early.
	_ = s.Control.SetReadDeadline(time.Time{}) // fails with a writer that has no connection
	_ = s.run(r.Context(), list)               // fails if the client is gone
	return nil
}

// startWatch finds where the watch starts. list is what to send before.
func (h *httpAPI) startWatch(s *WatchStream, r request) (list *keyList, err error) {
	p := &r.params
	filter, isPrefix := p.prefix, true
	if p.has(paramKey) {
		filter, isPrefix = p.key, false
	}
	switch n := len(filter); {
	case p.has(paramKey) && p.has(paramPrefix):
		return nil, errKeyPrefix
	case n > store.KeySizeMax || n == 0 && !isPrefix:
		return nil, fault.ErrInvalid.WithDetail("the key or prefix has %d bytes; a key has 1 to %d", n, store.KeySizeMax)
	}
	resumed, err := p.setLastEventID(r.Header)
	if err != nil {
		return nil, err
	}
	rv, known := p.resourceVersion, resumed || p.has(paramResourceVersion)
	if p.cluster != "" && p.cluster != h.Cluster {
		if !p.initial {
			return nil, fault.ErrExpired.WithDetail("that is a version of cluster %s, and this is cluster %s, whose versions stand for something else: list again, or watch with initial=true", p.cluster, h.Cluster)
		}
		s.relist = true
		p.seen &^= paramResourceVersion // which does not say how new a list is
		return h.listAndWatch(s, r, filter, isPrefix)
	}
	if p.initial && !resumed {
		return h.listAndWatch(s, r, filter, isPrefix)
	}
	from := &rv
	if !known {
		from, s.hello = nil, true
	}
	s.Watcher, s.RV, err = h.Store.Watch(r.Context(), p.timeout, filter, isPrefix, from)
	if errors.Is(err, fault.ErrExpired) && p.initial {
		s.relist = true
		return h.listAndWatch(s, r, filter, isPrefix)
	}
	return nil, err
}

// listAndWatch starts a watch with what there is.
func (h *httpAPI) listAndWatch(s *WatchStream, r request, filter string, isPrefix bool) (*keyList, error) {
	if err := h.Store.Fresh(r.Context(), r.freshness()); err != nil {
		return nil, err
	}
	list, err := h.newWatchList(r, filter, isPrefix)
	if err != nil {
		return nil, err
	}
	if s.Watcher, s.RV, err = h.Store.Watch(r.Context(), r.params.timeout, filter, isPrefix, &list.rv); err != nil {
		list.close()
		return nil, err
	}
	return list, nil
}

// setLastEventID reads where a server-sent stream was interrupted, which counts more than the query.
func (p *params) setLastEventID(header http.Header) (resumed bool, err error) {
	values := header["Last-Event-Id"]
	if len(values) == 0 || values[0] == "" {
		return false, nil
	}
	if p.cluster, p.resourceVersion, err = ParseResume(values[0]); err != nil {
		return false, fault.ErrInvalid.WithDetail("Last-Event-ID must be the id of an event, or a decimal number")
	}
	return true, nil
}

// setCluster says of which cluster the resource versions of an answer are.
func (h *httpAPI) setCluster(header http.Header) { header[HeaderCluster] = []string{h.Cluster} }

func (h *httpAPI) newWatchList(r request, filter string, isPrefix bool) (*keyList, error) {
	if isPrefix {
		return h.openList(r, filter, "", math.MaxInt)
	}
	it, rv, ok, err := h.Store.Get(r.Context(), r.here(), filter)
	if err != nil {
		return nil, err
	}
	l := &keyList{rv: rv}
	if ok {
		l.items = []store.KeyItem{{Key: filter, Item: it}}
	}
	return l, nil
}

// WatchStream writes one watch. Between two messages it holds no buffer, so that a
// watch on which nothing happens costs little.
type WatchStream struct {
	W        http.ResponseWriter
	Control  *http.ResponseController
	Watcher  *watch.Watcher
	Cluster  string
	Events   bool // server-sent events
	hello    bool // the client does not know where the watch starts
	relist   bool // nor that it starts with a list, since it asked for later events
	Bookmark time.Duration
	end      time.Time // zero = never
	Now      func() time.Time

	RV        uint64 // the client was told of all events up to it
	Bookmarks time.Time
	listing   bool // there is nothing to resume yet
	Part      bool // the last version is not complete

	buf *[]byte // what is to be written; nil = nothing
	// large is a value whose text goes where buf is split. It is not copied, since
	// thousands of watchers may be about to write it. "" = none
	large string
	split int
}

var watchBuffers = sync.Pool{New: func() any { return new([]byte) }}

// run writes until the watch ends. An error means that the client is gone.
func (s *WatchStream) run(ctx context.Context, list *keyList) error {
	if err := s.Begin(list); err != nil {
		return s.Fail(err)
	}
	timer := time.NewTimer(s.Bookmark)
	defer timer.Stop()
	for {
		idle, ended, err := s.Turn()
		if err != nil {
			return s.Fail(err)
		}
		if ended {
			return nil
		}
		if !idle {
			continue
		}
		now := s.Now()
		wait := s.Bookmark - now.Sub(s.Bookmarks)
		if left := s.end.Sub(now); !s.end.IsZero() && left < wait {
			wait = left
		}
		timer.Reset(wait)
		select {
		case <-s.Watcher.Wake:
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Begin writes what comes before the first event.
func (s *WatchStream) Begin(list *keyList) error {
	if s.Events {
		s.append(func(buf []byte) []byte { return append(buf, watchRetry...) })
	}
	if s.relist {
		s.append(func(buf []byte) []byte {
			return s.appendTail(s.appendVersion(buf, "RELIST", false), moreOfList)
		})
	}
	if list != nil {
		if err := s.writeList(list); err != nil {
			return err
		}
	}
	s.Bookmarks = s.Now()
	if s.hello || list != nil {
		return s.WriteBookmark()
	}
	return s.flush()
}

func (s *WatchStream) writeList(list *keyList) error {
	s.listing = true
	for {
		items, err := list.read()
		if err != nil {
			return fault.ErrExpired.WithDetail("the list took so long that too much has changed since it began; try again, and read faster")
		}
		if len(items) == 0 {
			s.listing, s.Part = false, false // the bookmark that follows ends the list
			return nil
		}
		if _, _, err := s.Watcher.State(); err != nil {
			return err // the node stops
		}
		for i := range items {
			e := store.Event{RV: items[i].RV, Kind: store.EventAdded, Key: items[i].Key, Item: items[i].Item}
			s.appendEvent(&e, false)
			if len(*s.buf) >= WatchPartSize || s.large != "" {
				if err := s.write(); err != nil {
					return err
				}
			}
		}
	}
}

// Turn writes the next events, and a bookmark if it is time for one, but never
// within a version.
func (s *WatchStream) Turn() (idle, ended bool, err error) {
	if idle, err = s.step(); err != nil || s.Part {
		return idle, false, err
	}
	now := s.Now()
	ended = !s.end.IsZero() && !now.Before(s.end)
	if ended || now.Sub(s.Bookmarks) >= s.Bookmark {
		err = s.WriteBookmark()
	}
	return idle, ended, err
}

// step writes the next events. idle says that there are none.
func (s *WatchStream) step() (idle bool, err error) {
	n, rv, err := s.Watcher.Read(s.appendEvent)
	if err != nil {
		return false, err
	}
	s.RV = rv
	if n == 0 {
		return true, nil
	}
	return false, s.flush()
}

// Fail ends the watch with a message that says why, unless the client is gone.
func (s *WatchStream) Fail(err error) error {
	e, ok := errors.AsType[*fault.Error](err)
	if !ok {
		return err
	}
	object := struct {
		Problem
		ResourceVersion *uint64 `json:"resourceVersion,omitempty"` // to resume from
	}{Problem: newProblem(e)}
	object.Outcome = "" // of a write
	if !s.listing && !errors.Is(e, fault.ErrExpired) {
		object.ResourceVersion = &s.RV
	}
	text, err := json.Marshal(object)
	if err != nil {
		return err
	}
	s.append(func(buf []byte) []byte {
		buf = s.appendHead(buf, "ERROR", s.RV, !s.listing)
		buf = append(buf, text...)
		return s.appendTail(buf, noMore)
	})
	return s.flush()
}

// WriteBookmark tells the client up to where it knows everything.
func (s *WatchStream) WriteBookmark() error {
	s.append(func(buf []byte) []byte {
		return s.appendTail(s.appendVersion(buf, "BOOKMARK", true), noMore)
	})
	s.Bookmarks = s.Now()
	return s.flush()
}

// appendVersion begins a message that has a version and no more.
func (s *WatchStream) appendVersion(buf []byte, kind string, hasID bool) []byte {
	buf = s.appendHead(buf, kind, s.RV, hasID)
	buf = append(buf, `{"resourceVersion":`...)
	buf = strconv.AppendUint(buf, s.RV, 10)
	return append(buf, '}')
}

// What the kinds of events are called.
var eventTypes = [...]string{store.EventAdded: "ADDED", store.EventModified: "MODIFIED", store.EventDeleted: "DELETED", store.EventExpired: "DELETED"}

// appendEvent adds the message of an event; if it is not the last of its version
// others follow.
func (s *WatchStream) appendEvent(e *store.Event, last bool) {
	s.Part = !last
	s.append(func(buf []byte) []byte {
		// No id sooner, or a client that resumes would lose half a version.
		buf = s.appendHead(buf, eventTypes[e.Kind], e.RV, last)
		it := e.Item
		it.RV = e.RV // of a deletion: its own
		buf = s.appendItem(buf, e.Key, it, e.Cut)
		if e.Prev != 0 {
			buf = append(buf[:len(buf)-1], `,"previousResourceVersion":`...)
			buf = strconv.AppendUint(buf, e.Prev, 10)
			if e.Kind == store.EventExpired {
				buf = append(buf, `,"reason":"expired"`...)
			}
			buf = append(buf, '}')
		}
		more := int64(noMore)
		switch {
		case last:
		case s.listing:
			more = moreOfList
		default:
			more = int64(e.RV) - 1
		}
		return s.appendTail(buf, more)
	})
}

// appendItem appends an item. One that makes a read of its own is written in pieces.
func (s *WatchStream) appendItem(buf []byte, key string, it store.Item, cut bool) []byte {
	if cut || len(it.Value) < watch.ReadBytesMax {
		return store.AppendItemJSON(buf, key, it, cut)
	}
	buf = store.AppendItemStart(buf, key, utf8.ValidString(it.Value))
	s.large, s.split = it.Value, len(buf)
	return store.AppendItemEnd(append(buf, '"'), it)
}

// append adds to what is to be written.
func (s *WatchStream) append(message func(buf []byte) []byte) {
	if s.buf == nil {
		s.buf = watchBuffers.Get().(*[]byte)
	}
	*s.buf = message(*s.buf)
}

// appendHead begins a message. hasID says that the client can resume after it.
func (s *WatchStream) appendHead(buf []byte, kind string, id uint64, hasID bool) []byte {
	if s.Events {
		buf = append(buf, "event: "...)
		buf = append(buf, kind...)
		if hasID {
			buf = append(buf, "\nid: "...)
			buf = append(buf, s.Cluster...)
			buf = append(buf, '-')
			buf = strconv.AppendUint(buf, id, 10)
		}
		buf = append(buf, "\ndata: "...)
	}
	buf = append(buf, `{"type":"`...)
	buf = append(buf, kind...)
	return append(buf, `","object":`...)
}

// What appendTail says of what follows, if it is not the version to resume from.
const (
	noMore     = -1
	moreOfList = -2
)

// appendTail ends a message. more is not negative if others of the same version
// follow: then it is the version before.
func (s *WatchStream) appendTail(buf []byte, more int64) []byte {
	if more != noMore {
		buf = append(buf, `,"more":true`...)
	}
	if more >= 0 {
		buf = append(buf, `,"resumeFrom":`...)
		buf = strconv.AppendInt(buf, more, 10)
	}
	buf = append(buf, "}\n"...)
	if s.Events {
		buf = append(buf, '\n')
	}
	return buf
}

func (s *WatchStream) write() error {
	if s.buf == nil {
		return nil
	}
	rest := *s.buf
	if s.large != "" {
		if err := s.writeParts(rest[:s.split]); err != nil {
			return err
		}
		if err := s.writeLarge(); err != nil {
			return err
		}
		rest, s.large = rest[s.split:], ""
	}
	if err := s.writeParts(rest); err != nil {
		return err
	}
	if cap(*s.buf) <= 4*WatchPartSize { // not one that an extraordinary value has grown
		*s.buf = (*s.buf)[:0]
		watchBuffers.Put(s.buf)
	}
	s.buf = nil
	return nil
}

// writeLarge writes the text of the large value.
func (s *WatchStream) writeLarge() error {
	buf := watchBuffers.Get().(*[]byte)
	defer func() {
		*buf = (*buf)[:0]
		watchBuffers.Put(buf)
	}()
	isText := utf8.ValidString(s.large)
	for rest := s.large; rest != ""; {
		piece := rest[:min(len(rest), streamPieceSize)]
		rest = rest[len(piece):]
		*buf = store.AppendPiece((*buf)[:0], piece, isText)
		if err := s.writeParts(*buf); err != nil {
			return err
		}
	}
	return nil
}

// writeParts gives the client time for each part, so that it may be slow but must not
// stand still.
func (s *WatchStream) writeParts(b []byte) error {
	for part := range slices.Chunk(b, WatchPartSize) {
		_ = s.Control.SetWriteDeadline(time.Now().Add(watchWriteTimeout)) // as above
		if _, err := s.W.Write(part); err != nil {
			return err
		}
	}
	return nil
}

func (s *WatchStream) flush() error {
	if err := s.write(); err != nil {
		return err
	}
	return s.Control.Flush()
}
