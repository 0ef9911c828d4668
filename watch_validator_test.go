package main

import (
	"encoding/json"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"testing"

	"raftrv/internal/store"
)

// This file judges watches: whatever a watcher was told, by whichever node and
// over however many connections, goes through a watchValidator.

// watchMessage is one message of a watch.
type watchMessage struct {
	kind    string // ADDED, MODIFIED, DELETED, BOOKMARK or ERROR
	rv      uint64
	prev    uint64
	key     string
	value   string
	expired bool
	more    bool
	code    string // of ERROR
}

func (m watchMessage) String() string {
	s := fmt.Sprintf("%s %d", m.kind, m.rv)
	if m.key != "" {
		s += fmt.Sprintf(" %q=%.20q prev=%d", m.key, m.value, m.prev)
	}
	if m.expired {
		s += " expired"
	}
	if m.more {
		s += " more"
	}
	return s + m.code
}

// messageOf is the message that tells of an event.
func messageOf(e store.Event) watchMessage {
	m := watchMessage{rv: e.RV, prev: e.Prev, key: e.Key, value: e.Item.Value, more: !e.Last}
	switch e.Kind {
	case store.EventAdded:
		m.kind = "ADDED"
	case store.EventModified:
		m.kind = "MODIFIED"
	case store.EventDeleted, store.EventExpired:
		m.kind, m.expired = "DELETED", e.Kind == store.EventExpired
	}
	return m
}

// parseWatchMessage reads what a node sends.
func parseWatchMessage(line []byte) (watchMessage, error) {
	var wire struct {
		Type   string
		More   bool
		Object struct {
			Key                     string
			KeyBase64               []byte
			Value                   string
			ValueBase64             []byte
			ResourceVersion         *uint64
			PreviousResourceVersion uint64
			Reason                  string
			Code                    string
		}
	}
	if err := json.Unmarshal(line, &wire); err != nil {
		return watchMessage{}, fmt.Errorf("%w in %.200q", err, line)
	}
	o := &wire.Object
	if o.ResourceVersion == nil {
		if wire.Type != "ERROR" { // which may be within the list at the start
			return watchMessage{}, fmt.Errorf("no resourceVersion in %.200q", line)
		}
		o.ResourceVersion = new(uint64)
	}
	return watchMessage{
		kind: wire.Type, rv: *o.ResourceVersion, prev: o.PreviousResourceVersion,
		key: o.Key + string(o.KeyBase64), value: o.Value + string(o.ValueBase64),
		expired: o.Reason == "expired", more: wire.More, code: o.Code,
	}, nil
}

var watchSeed = maphash.MakeSeed()

// digest identifies a message, but for what depends on the filter.
func (m *watchMessage) digest() uint64 {
	return maphash.Comparable(watchSeed, watchMessage{kind: m.kind, rv: m.rv, prev: m.prev, key: m.key, value: m.value, expired: m.expired})
}

// watchRecord is what a validator keeps of an event.
type watchRecord struct{ rv, digest uint64 }

// watchValidator checks one watch while it goes on, across all of its
// connections: filter, order, uniqueness, atomic versions, true bookmarks,
// previous versions. What was left out without a trace, check finds.
type watchValidator struct {
	name     string
	key      string
	isPrefix bool

	start    uint64 // the watch is for the events above
	done     uint64 // it was told of all events up to this version
	list     bool   // of the items at the start comes first
	listing  bool   // it is coming
	listed   map[string]watchRecord
	known    map[string]uint64 // version of each key as last told; 0 = deleted
	records  []watchRecord     // of all events up to done
	part     []watchMessage    // of a version that is not complete
	lastKey  string            // in the list
	complete bool              // what is not in known did not exist at the start

	events     int // seen, repeats after a resume too
	bookmarks  int
	resumes    int
	violations []string
}

// newWatchValidator expects the events above start, or a list of items first.
func newWatchValidator(name, key string, isPrefix, initial bool, start uint64) *watchValidator {
	return &watchValidator{
		name: name, key: key, isPrefix: isPrefix, list: initial, listing: initial, start: start, done: start,
		known: map[string]uint64{}, listed: map[string]watchRecord{}, complete: initial || start == 0,
	}
}

func (v *watchValidator) violation(format string, args ...any) {
	if len(v.violations) < 10 {
		v.violations = append(v.violations, v.name+": "+fmt.Sprintf(format, args...))
	}
}

func (v *watchValidator) wants(key string) bool {
	return key == v.key || v.isPrefix && strings.HasPrefix(key, v.key)
}

// observe takes the next message, but for errors.
func (v *watchValidator) observe(m watchMessage) {
	switch {
	case m.kind == "BOOKMARK":
		v.observeBookmark(m)
		return
	case !v.wants(m.key):
		v.violation("filter: %v", m)
		return
	case v.listing:
		v.observeItem(m)
		return
	}
	v.events++
	switch n := len(v.part); {
	case m.rv <= v.done:
		v.violation("not ordered, or not unique: %v after everything up to %d", m, v.done)
	case n > 0 && m.rv != v.part[0].rv:
		v.violation("not atomic: %v within version %d", m, v.part[0].rv)
		v.part = nil
	}
	v.part = append(v.part, m)
	if m.more {
		return
	}
	for i := range v.part {
		v.checkPrevious(&v.part[i])
		v.records = append(v.records, watchRecord{m.rv, v.part[i].digest()})
	}
	v.part = v.part[:0]
	v.done = max(v.done, m.rv)
}

func (v *watchValidator) observeItem(m watchMessage) {
	switch {
	case m.kind != "ADDED" || !m.more || m.prev != 0:
		v.violation("list: %v", m)
	case m.key <= v.lastKey && len(v.listed) > 0:
		v.violation("list: %v after %q", m, v.lastKey)
	}
	v.lastKey = m.key
	v.listed[m.key] = watchRecord{m.rv, maphash.String(watchSeed, m.value)}
	v.known[m.key] = m.rv
}

func (v *watchValidator) observeBookmark(m watchMessage) {
	v.bookmarks++
	if v.listing {
		v.listing, v.start, v.done = false, m.rv, m.rv
		for key, rec := range v.listed {
			if rec.rv > m.rv {
				v.violation("list at %d has %q at version %d", m.rv, key, rec.rv)
			}
		}
		return
	}
	switch {
	case len(v.part) > 0:
		v.violation("not atomic: %v within version %d", m, v.part[0].rv)
	case m.rv < v.done:
		v.violation("bookmark: %v after %d", m, v.done)
	}
	v.done = max(v.done, m.rv)
}

// checkPrevious holds an event against what was said of its key before. Of a key
// that it never heard of a watch that began in the middle knows nothing.
func (v *watchValidator) checkPrevious(m *watchMessage) {
	was, known := v.known[m.key]
	if (known || v.complete) && was != m.prev {
		v.violation("previous state: %v, but the key was at %d", *m, was)
	}
	switch m.kind {
	case "ADDED":
		if m.prev != 0 {
			v.violation("previous state: %v", *m)
		}
	case "MODIFIED", "DELETED":
		if m.prev == 0 || m.prev > m.rv {
			v.violation("previous state: %v", *m)
		}
	default:
		v.violation("kind: %v", *m)
	}
	v.known[m.key] = m.rv
	if m.kind == "DELETED" {
		v.known[m.key] = 0
	}
}

// resume is called when a stream has ended, however. It forgets what came of an
// incomplete version, or list, and returns where to go on.
func (v *watchValidator) resume() uint64 {
	v.resumes++
	v.part = v.part[:0]
	if v.listing {
		clear(v.listed)
		clear(v.known)
		v.lastKey = ""
	}
	return v.done
}

// watchHistory is what happened: every event, in order.
type watchHistory struct{ messages []watchMessage }

// dense says what is missing in the history from version 1 on.
func (h *watchHistory) dense() error {
	rv, more := uint64(0), false
	for _, m := range h.messages {
		if want := rv + 1; !more && m.rv != want || more && m.rv != rv {
			return fmt.Errorf("%v follows version %d, more=%v", m, rv, more)
		}
		rv, more = m.rv, m.more
	}
	return nil
}

// last returns the version of the last event.
func (h *watchHistory) last() uint64 {
	if len(h.messages) == 0 {
		return 0
	}
	return h.messages[len(h.messages)-1].rv
}

// check compares what a watch was told with what happened, up to the version up
// to which it claims to know everything.
func (v *watchValidator) check(h *watchHistory) {
	if v.listing {
		v.violation("there was no end of the list")
		return
	}
	if v.done > h.last() {
		v.violation("bookmark: everything up to %d, but there is nothing above %d", v.done, h.last())
	}
	v.checkList(h)
	from, _ := slices.BinarySearchFunc(h.messages, v.start+1, func(m watchMessage, rv uint64) int { return int(m.rv) - int(rv) })
	records := v.records
	for i := from; i < len(h.messages) && h.messages[i].rv <= v.done; i++ {
		m := &h.messages[i]
		if !v.wants(m.key) {
			continue
		}
		if want := (watchRecord{m.rv, m.digest()}); len(records) == 0 || records[0] != want {
			v.violation("gap: %v was not told, of %d events it was told %d", *m, len(h.messages), len(v.records)-len(records))
			return
		}
		records = records[1:]
	}
	if len(records) > 0 {
		v.violation("told of %d events that did not happen, the first at %d", len(records), records[0].rv)
	}
}

// checkList compares the items at the start with what happened before.
func (v *watchValidator) checkList(h *watchHistory) {
	if !v.list {
		return
	}
	items := map[string]watchRecord{}
	for i := range h.messages {
		m := &h.messages[i]
		if m.rv > v.start {
			break
		}
		switch {
		case !v.wants(m.key):
		case m.kind == "DELETED":
			delete(items, m.key)
		default:
			items[m.key] = watchRecord{m.rv, maphash.String(watchSeed, m.value)}
		}
	}
	if len(items) != len(v.listed) {
		v.violation("list: %d items at %d, there were %d", len(v.listed), v.start, len(items))
	}
	for key, want := range items {
		if v.listed[key] != want {
			v.violation("list: %q at %d is of version %d, it was %d", key, v.start, v.listed[key].rv, want.rv)
		}
	}
}

// report fails the test with what was found.
func (v *watchValidator) report(t testing.TB) {
	t.Helper()
	for _, s := range v.violations {
		t.Error(s)
	}
}

// readJournals makes one journal of several, as docs/operations.md tells readers to: what an older file has
// from the first version of a newer one on does not count, and they fit together.
func readJournals(files []string) (lines []string, err error) {
	var versions []uint64 // of lines
	for i, content := range files {
		for text := range strings.Lines(content) {
			var line struct {
				Journal  int // of the head only
				RV, From uint64
			}
			if err := json.Unmarshal([]byte(text), &line); err != nil {
				if strings.HasSuffix(text, "\n") || i == len(files)-1 {
					return nil, fmt.Errorf("file %d: %q: %w", i, text, err)
				}
				continue // torn by a crash, and at the start of the next file
			}
			if line.Journal == 0 {
				lines, versions = append(lines, text), append(versions, line.RV)
				continue
			}
			n, _ := slices.BinarySearch(versions, line.From)
			lines, versions = lines[:n], versions[:n]
			if n > 0 && versions[n-1] != line.From-1 || n == 0 && line.From != 1 {
				return nil, fmt.Errorf("file %d begins with version %d", i, line.From)
			}
		}
	}
	return lines, nil
}
