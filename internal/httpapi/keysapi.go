package httpapi

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/shares"
	"raftrv/internal/store"
)

// This file is the HTTP front's view of keys as JSON: one item, lists, and the
// stream that may have a million of them.

// Limits of responses that are written in parts.
const (
	streamBufferSize   = 64 << 10
	streamWriteTimeout = 30 * time.Second // for the client to take streamPaceSize
	streamPaceSize     = 1 << 20
	streamPieceSize    = 12 << 10 // of a value; divisible by three, as base64 wants

	// listSizeMax bounds a JSON list, in bytes, unless one item is larger.
	listSizeMax = 8 << 20
	listEndMax  = 64 + 6*store.KeySizeMax

	// A list of no more than this needs no place. It comes to less than a part.
	fewItems = 128
	fewBytes = 16 << 10

	listsMax     = store.ScansMax - backupsMax // that are more, and streams, at a time
	placeTimeout = 2 * time.Second
)

// While there are writes a stream of keys takes turns with them: it works for
// streamTurn, then it rests for twice as long.
const (
	streamTurn    = 2 * time.Millisecond
	streamRestMax = 8 * time.Millisecond // when most of the work was to wait for the client
)

var (
	typeNDJSON  = []string{"application/x-ndjson"}
	varyAccept  = []string{"Accept"}
	errNoPrefix = fault.ErrInvalid.WithDetail("a prefix is needed, and not an empty one: that would be every key")
)

// getItem answers an item as JSON. Unlike GET /{key} it reaches every key with
// plain escapes, and tells all that is known.
func (h *httpAPI) getItem(w http.ResponseWriter, r request) error {
	it, rv, err := h.read(w, r)
	if err != nil {
		return err
	}
	if isUnchanged(r, it) {
		writeNotModified(w, it, rv)
		return nil
	}
	setETag(w.Header(), it.RV)
	setResourceVersion(w.Header(), rv)
	setExpires(w.Header(), it)
	if len(it.Value) <= streamBufferSize {
		WriteBody(w, r.Request, http.StatusOK, typeJSON, append(store.AppendItemJSON(nil, r.name, it, false), '\n'))
		return nil
	}
	s := newStream(w, r, typeJSON)
	defer s.free()
	s.appendItem(r.name, it, false)
	s.buf = append(s.buf, '\n')
	s.end()
	return nil
}

// listKeys answers items in key order, as one JSON document or, if the client
// asks for that, as a stream.
func (h *httpAPI) listKeys(w http.ResponseWriter, r request) error {
	p := &r.params
	asStream := prefers(r.Header, typeNDJSON[0], typeJSON[0])
	if !asStream && p.limit > listLimitMax {
		return fault.ErrInvalid.WithDetail("limit must be at most %d; with Accept: %s there is no limit", listLimitMax, typeNDJSON[0])
	}
	if p.exact && p.resourceVersion == 0 {
		return fault.ErrInvalid.WithDetail("resourceVersionMatch needs a resourceVersion, that of the first page")
	}
	if err := h.Store.Fresh(r.Context(), r.freshness()); err != nil {
		return err
	}
	if asStream {
		return h.streamKeys(w, r)
	}
	if p.limit == 0 {
		p.limit = listLimitDefault
	}
	list, err := h.openList(r, p.prefix, p.after, p.limit+1) // one more than asked for tells whether there are more
	if err != nil {
		return err
	}
	defer list.close()
	if err := h.asOf(p, list); err != nil {
		return err
	}
	setResourceVersion(w.Header(), list.rv)
	h.setCluster(w.Header())
	w.Header()["Vary"] = h.browsers.varyAccept
	s := newStream(w, r, typeJSON)
	defer s.free()
	s.buf = append(s.buf, `{"resourceVersion":`...)
	s.buf = strconv.AppendUint(s.buf, list.rv, 10)
	s.buf = append(s.buf, `,"items":[`...)
	last, n, more := "", 0, false
	for items := h.mustRead(s, list); len(items) > 0 && !more; items = h.mustRead(s, list) {
		for _, it := range items {
			if more = n == p.limit || n > 0 && !s.hasRoom(it, p.keysOnly); more {
				break
			}
			if n > 0 {
				s.buf = append(s.buf, ',')
			}
			s.appendItem(it.Key, it.Item, p.keysOnly)
			last = it.Key
			n++
		}
	}
	s.buf = append(s.buf, ']')
	if more {
		s.buf = append(s.buf, ',')
		s.buf = store.AppendBytesField(s.buf, "after", last)
	}
	s.buf = append(s.buf, "}\n"...)
	s.end()
	return nil
}

// mustRead returns the next items of an answer that has begun, and breaks that off
// if there is no way to know them any more.
func (h *httpAPI) mustRead(s *stream, list *keyList) []store.KeyItem {
	items, err := list.read()
	if err != nil {
		h.Logger.Warn("cut off a stream of keys", zap.Error(err))
		s.abort(http.StatusInternalServerError)
	}
	return items
}

// hasRoom says whether a JSON list can take one more item, and then its end.
func (s *stream) hasRoom(it store.KeyItem, keysOnly bool) bool {
	room := listSizeMax - listEndMax - s.written - len(s.buf)
	return store.ItemSizeMax(it, keysOnly) <= room || store.ItemJSONSize(it, keysOnly) <= room
}

// keyList reads items, all from one version.
type keyList struct {
	rv    uint64
	items []store.KeyItem // if they are few
	scan  *store.Scan     // otherwise
	leave func()          // its place
}

// openList reads the first n items with a prefix whose keys come after a key. What
// is more than little takes one of the places for lists.
func (h *httpAPI) openList(r request, prefix, after string, n int) (*keyList, error) {
	items, rv, err := h.Store.List(r.Context(), r.here(), prefix, after, min(n, fewItems+1))
	if err != nil {
		return nil, err
	}
	size := uint64(0)
	for _, it := range items {
		size += store.ItemSize(it.Key, it.Item)
	}
	if len(items) <= fewItems && size <= fewBytes {
		return &keyList{rv: rv, items: items}, nil
	}
	return h.openScan(r, prefix, after)
}

// openScan reads any number of items, if there is a place for that, or soon is.
func (h *httpAPI) openScan(r request, prefix, after string) (*keyList, error) {
	ctx, cancel := context.WithTimeout(r.Context(), min(r.params.timeout, placeTimeout))
	defer cancel()
	address := shares.AddressOf(r.RemoteAddr)
	if h.lists.Await(ctx, address, 1) {
		if sc, err := h.Store.Scan(r.Context(), r.here(), prefix, after); err == nil {
			return &keyList{rv: sc.RV, scan: sc, leave: func() { h.lists.Give(address, 1) }}, nil
		}
		h.lists.Give(address, 1)
	}
	return nil, fault.ErrTooManyRequests.WithDetail("%d lists are on their way already, or as many of this address as may be; retry later or at another node", listsMax)
}

// read returns the next items, none at the end.
func (l *keyList) read() ([]store.KeyItem, error) {
	if l.scan != nil {
		return l.scan.Read()
	}
	items := l.items
	l.items = nil
	return items, nil
}

func (l *keyList) close() {
	if l.scan != nil {
		l.scan.Close()
		l.leave()
	}
}

// asOf makes a list one at exactly the version that was asked for, if nothing that it is about has
// changed since.
func (h *httpAPI) asOf(p *params, list *keyList) error {
	if !p.exact || p.resourceVersion == list.rv {
		return nil
	}
	if !h.Store.Unchanged(p.prefix, p.after, p.resourceVersion, list.rv) {
		return fault.ErrExpired.WithDetail("keys of the list have changed after resource version %d, or too much has changed since for the node to know: "+
			"begin again with the first page, or take the stream (Accept: %s), which is of one version", p.resourceVersion, typeNDJSON[0])
	}
	list.rv = p.resourceVersion
	return nil
}

// streamKeys answers any number of items, one a line, all as they were at one
// version. The last line is no item but says how many there were:
//
//	{"resourceVersion":7,"count":2}
//
// and "after", as that of a page, if the limit has ended the stream. Without that
// line the client does not have all of them, whatever became of the connection:
// over HTTP/1.0, and behind some proxies, one that breaks ends like any other.
func (h *httpAPI) streamKeys(w http.ResponseWriter, r request) error {
	list, err := h.openScan(r, r.params.prefix, r.params.after)
	if err != nil {
		return err
	}
	defer list.close()
	if err := h.asOf(&r.params, list); err != nil {
		return err
	}
	setResourceVersion(w.Header(), list.rv)
	h.setCluster(w.Header())
	w.Header()["Vary"] = h.browsers.varyAccept
	s := newStream(w, r, typeNDJSON)
	defer s.free()
	if s.isHead {
		return nil
	}
	t := turns{store: h.Store, began: time.Now(), rv: list.rv}
	last := ""
	for n := 0; ; {
		t.rest()
		items := h.mustRead(s, list)
		for _, it := range items {
			if r.params.limit > 0 && n == r.params.limit {
				s.buf = appendListEnd(s.buf, list.rv, n, &last)
				s.end()
				return nil
			}
			n++
			last = it.Key
			s.appendItem(it.Key, it.Item, r.params.keysOnly)
			s.buf = append(s.buf, '\n')
		}
		if len(items) == 0 {
			s.buf = appendListEnd(s.buf, list.rv, n, nil)
			s.end()
			return nil
		}
	}
}

// appendListEnd appends the last line of a stream. after is nil if that was all.
func appendListEnd(buf []byte, rv uint64, count int, after *string) []byte {
	buf = append(buf, `{"resourceVersion":`...)
	buf = strconv.AppendUint(buf, rv, 10)
	buf = append(buf, `,"count":`...)
	buf = strconv.AppendInt(buf, int64(count), 10)
	if after != nil {
		buf = append(buf, ',')
		buf = store.AppendBytesField(buf, "after", *after)
	}
	return append(buf, "}\n"...)
}

// turns makes a long read give way to writes.
type turns struct {
	store interface{ Version() uint64 }
	began time.Time // the present turn
	rv    uint64    // of the store at the last rest
}

// rest ends a turn if it is long enough, with a rest if there were writes.
func (t *turns) rest() {
	worked := time.Since(t.began)
	if worked <= streamTurn {
		return
	}
	if now := t.store.Version(); now != t.rv {
		t.rv = now
		time.Sleep(min(2*worked, streamRestMax))
	}
	t.began = time.Now()
}

// deletePrefix deletes all keys with a prefix, at one version.
func (h *httpAPI) deletePrefix(w http.ResponseWriter, r request) error {
	switch n := len(r.params.prefix); {
	case n == 0:
		return errNoPrefix
	case n > store.KeySizeMax:
		return fault.ErrInvalid.WithDetail("the prefix has %d bytes; no key has more than %d", n, store.KeySizeMax)
	}
	res, err := h.propose(w, r, store.Command{Op: store.OpDeletePrefix, Key: r.params.prefix}, "")
	if err != nil {
		return err
	}
	setResourceVersion(w.Header(), res.RV)
	if res.Status == store.StatusTooMany {
		return fault.ErrTooManyKeys.WithDetail("more than %d keys have the prefix, or they are so long that their events do not fit into one step; delete by longer prefixes", h.Store.Rules().DeletePrefixMax)
	}
	return writeJSON(w, r, struct {
		Deleted         uint64 `json:"deleted"`
		ResourceVersion uint64 `json:"resourceVersion"`
	}{res.Count, res.RV})
}

// stream is a response that is written in large parts. The deadline of the
// server does not end it, but the client must take each part in time.
type stream struct {
	w       http.ResponseWriter
	control *http.ResponseController
	isHead  bool
	started bool   // a part was written
	buf     []byte // append to it, then call flushLarge
	written int    // bytes

	// The client has kept this node waiting for so long with the last bytes.
	waited time.Duration
	paced  int
}

var streamBuffers = sync.Pool{New: func() any { return new([]byte) }}

// newStream begins a response. The caller must free the stream.
func newStream(w http.ResponseWriter, r request, contentType []string) *stream {
	w.Header()["Content-Type"] = contentType
	return &stream{
		w:       w,
		control: http.NewResponseController(w),
		isHead:  r.Method == http.MethodHead,
		buf:     *streamBuffers.Get().(*[]byte),
	}
}

func (s *stream) free() {
	if cap(s.buf) <= 2*streamBufferSize { // not one that an extraordinary value has grown
		s.buf = s.buf[:0]
		streamBuffers.Put(&s.buf)
	}
}

// appendItem appends an item. A large value goes out in pieces, so that it takes no
// more memory than others.
func (s *stream) appendItem(key string, it store.Item, keysOnly bool) {
	if keysOnly || len(it.Value) <= streamBufferSize {
		s.buf = store.AppendItemJSON(s.buf, key, it, keysOnly)
		s.flushLarge()
		return
	}
	isText := utf8.ValidString(it.Value)
	s.buf = store.AppendItemStart(s.buf, key, isText)
	for rest := it.Value; rest != ""; {
		piece := rest[:min(len(rest), streamPieceSize)]
		rest = rest[len(piece):]
		s.buf = store.AppendPiece(s.buf, piece, isText)
		s.flushLarge()
	}
	s.buf = store.AppendItemEnd(append(s.buf, '"'), it)
}

// flushLarge writes what was appended if that is enough for a part.
func (s *stream) flushLarge() {
	if len(s.buf) >= streamBufferSize {
		s.flush()
	}
}

func (s *stream) flush() {
	_, _ = s.Write(s.buf) // it aborts on an error
	s.buf = s.buf[:0]
}

// Write writes a part. It implements io.Writer for parts that are large by
// themselves.
func (s *stream) Write(part []byte) (int, error) {
	if s.isHead {
		return len(part), nil
	}
	if !s.started {
		_ = s.control.SetReadDeadline(time.Time{}) // not supported by a test's writer
		s.started = true
	}
	for piece := range slices.Chunk(part, streamPaceSize) {
		s.writePiece(piece)
	}
	return len(part), nil
}

// writePiece breaks off if the client takes less than streamPaceSize in streamWriteTimeout.
// Only the time counts for which this node waits for it.
func (s *stream) writePiece(piece []byte) {
	if s.paced >= streamPaceSize {
		s.paced, s.waited = 0, 0
	}
	start := time.Now()
	_ = s.control.SetWriteDeadline(start.Add(streamWriteTimeout - s.waited))
	if _, err := s.w.Write(piece); err != nil {
		s.abort(statusClientGone)
	}
	s.waited += time.Since(start)
	s.paced += len(piece)
	s.written += len(piece)
}

// end writes the rest. A response of one part gets its length.
func (s *stream) end() {
	if !s.started && !s.isHead {
		s.w.Header()["Content-Length"] = []string{strconv.Itoa(len(s.buf))}
	}
	s.flush()
}

// abort breaks the connection, so that what the client has cannot pass for the
// whole. The request counts as one with this status.
func (s *stream) abort(status int) {
	if rec, ok := s.w.(*recorder); ok {
		rec.status = status
	}
	panic(http.ErrAbortHandler)
}
