package watchcheck

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

// Message is one message of a watch.
type Message struct {
	Kind    string // ADDED, MODIFIED, DELETED, BOOKMARK or ERROR
	RV      uint64
	Prev    uint64
	Key     string
	Value   string
	Expired bool
	More    bool
	Code    string // of ERROR
}

func (m Message) String() string {
	s := fmt.Sprintf("%s %d", m.Kind, m.RV)
	if m.Key != "" {
		s += fmt.Sprintf(" %q=%.20q prev=%d", m.Key, m.Value, m.Prev)
	}
	if m.Expired {
		s += " expired"
	}
	if m.More {
		s += " more"
	}
	return s + m.Code
}

// MessageOf is the message that tells of an event.
func MessageOf(e store.Event) Message {
	m := Message{RV: e.RV, Prev: e.Prev, Key: e.Key, Value: e.Item.Value, More: !e.Last}
	switch e.Kind {
	case store.EventAdded:
		m.Kind = "ADDED"
	case store.EventModified:
		m.Kind = "MODIFIED"
	case store.EventDeleted, store.EventExpired:
		m.Kind, m.Expired = "DELETED", e.Kind == store.EventExpired
	}
	return m
}

// Parse reads what a node sends.
func Parse(line []byte) (Message, error) {
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
		return Message{}, fmt.Errorf("%w in %.200q", err, line)
	}
	o := &wire.Object
	if o.ResourceVersion == nil {
		if wire.Type != "ERROR" { // which may be within the list at the start
			return Message{}, fmt.Errorf("no resourceVersion in %.200q", line)
		}
		o.ResourceVersion = new(uint64)
	}
	return Message{
		Kind: wire.Type, RV: *o.ResourceVersion, Prev: o.PreviousResourceVersion,
		Key: o.Key + string(o.KeyBase64), Value: o.Value + string(o.ValueBase64),
		Expired: o.Reason == "expired", More: wire.More, Code: o.Code,
	}, nil
}

var watchSeed = maphash.MakeSeed()

// digest identifies a message, but for what depends on the filter.
func (m *Message) digest() uint64 {
	return maphash.Comparable(watchSeed, Message{Kind: m.Kind, RV: m.RV, Prev: m.Prev, Key: m.Key, Value: m.Value, Expired: m.Expired})
}

// watchRecord is what a validator keeps of an event.
type watchRecord struct{ rv, digest uint64 }

// Validator checks one watch while it goes on, across all of its
// connections: filter, order, uniqueness, atomic versions, true bookmarks,
// previous versions. What was left out without a trace, check finds.
type Validator struct {
	Name     string
	Key      string
	IsPrefix bool

	Start    uint64 // the watch is for the events above
	Done     uint64 // it was told of all events up to this version
	list     bool   // of the items at the start comes first
	Listing  bool   // it is coming
	Listed   map[string]watchRecord
	known    map[string]uint64 // version of each key as last told; 0 = deleted
	records  []watchRecord     // of all events up to done
	Part     []Message         // of a version that is not complete
	lastKey  string            // in the list
	complete bool              // what is not in known did not exist at the start

	Events     int // seen, repeats after a resume too
	Bookmarks  int
	Resumes    int
	violations []string
}

// New expects the events above start, or a list of items first.
func New(name, key string, isPrefix, initial bool, start uint64) *Validator {
	return &Validator{
		Name: name, Key: key, IsPrefix: isPrefix, list: initial, Listing: initial, Start: start, Done: start,
		known: map[string]uint64{}, Listed: map[string]watchRecord{}, complete: initial || start == 0,
	}
}

func (v *Validator) Violation(format string, args ...any) {
	if len(v.violations) < 10 {
		v.violations = append(v.violations, v.Name+": "+fmt.Sprintf(format, args...))
	}
}

func (v *Validator) wants(key string) bool {
	return key == v.Key || v.IsPrefix && strings.HasPrefix(key, v.Key)
}

// Observe takes the next message, but for errors.
func (v *Validator) Observe(m Message) {
	switch {
	case m.Kind == "BOOKMARK":
		v.observeBookmark(m)
		return
	case !v.wants(m.Key):
		v.Violation("filter: %v", m)
		return
	case v.Listing:
		v.observeItem(m)
		return
	}
	v.Events++
	switch n := len(v.Part); {
	case m.RV <= v.Done:
		v.Violation("not ordered, or not unique: %v after everything up to %d", m, v.Done)
	case n > 0 && m.RV != v.Part[0].RV:
		v.Violation("not atomic: %v within version %d", m, v.Part[0].RV)
		v.Part = nil
	}
	v.Part = append(v.Part, m)
	if m.More {
		return
	}
	for i := range v.Part {
		v.checkPrevious(&v.Part[i])
		v.records = append(v.records, watchRecord{m.RV, v.Part[i].digest()})
	}
	v.Part = v.Part[:0]
	v.Done = max(v.Done, m.RV)
}

func (v *Validator) observeItem(m Message) {
	switch {
	case m.Kind != "ADDED" || !m.More || m.Prev != 0:
		v.Violation("list: %v", m)
	case m.Key <= v.lastKey && len(v.Listed) > 0:
		v.Violation("list: %v after %q", m, v.lastKey)
	}
	v.lastKey = m.Key
	v.Listed[m.Key] = watchRecord{m.RV, maphash.String(watchSeed, m.Value)}
	v.known[m.Key] = m.RV
}

func (v *Validator) observeBookmark(m Message) {
	v.Bookmarks++
	if v.Listing {
		v.Listing, v.Start, v.Done = false, m.RV, m.RV
		for key, rec := range v.Listed {
			if rec.rv > m.RV {
				v.Violation("list at %d has %q at version %d", m.RV, key, rec.rv)
			}
		}
		return
	}
	switch {
	case len(v.Part) > 0:
		v.Violation("not atomic: %v within version %d", m, v.Part[0].RV)
	case m.RV < v.Done:
		v.Violation("bookmark: %v after %d", m, v.Done)
	}
	v.Done = max(v.Done, m.RV)
}

// checkPrevious holds an event against what was said of its key before. Of a key
// that it never heard of a watch that began in the middle knows nothing.
func (v *Validator) checkPrevious(m *Message) {
	was, known := v.known[m.Key]
	if (known || v.complete) && was != m.Prev {
		v.Violation("previous state: %v, but the key was at %d", *m, was)
	}
	switch m.Kind {
	case "ADDED":
		if m.Prev != 0 {
			v.Violation("previous state: %v", *m)
		}
	case "MODIFIED", "DELETED":
		if m.Prev == 0 || m.Prev > m.RV {
			v.Violation("previous state: %v", *m)
		}
	default:
		v.Violation("kind: %v", *m)
	}
	v.known[m.Key] = m.RV
	if m.Kind == "DELETED" {
		v.known[m.Key] = 0
	}
}

// Resume is called when a stream has ended, however. It forgets what came of an
// incomplete version, or list, and returns where to go on.
func (v *Validator) Resume() uint64 {
	v.Resumes++
	v.Part = v.Part[:0]
	if v.Listing {
		clear(v.Listed)
		clear(v.known)
		v.lastKey = ""
	}
	return v.Done
}

// History is what happened: every event, in order.
type History struct{ Messages []Message }

// Dense says what is missing in the history from version 1 on.
func (h *History) Dense() error {
	rv, more := uint64(0), false
	for _, m := range h.Messages {
		if want := rv + 1; !more && m.RV != want || more && m.RV != rv {
			return fmt.Errorf("%v follows version %d, more=%v", m, rv, more)
		}
		rv, more = m.RV, m.More
	}
	return nil
}

// Last returns the version of the last event.
func (h *History) Last() uint64 {
	if len(h.Messages) == 0 {
		return 0
	}
	return h.Messages[len(h.Messages)-1].RV
}

// Check compares what a watch was told with what happened, up to the version up
// to which it claims to know everything.
func (v *Validator) Check(h *History) {
	if v.Listing {
		v.Violation("there was no end of the list")
		return
	}
	if v.Done > h.Last() {
		v.Violation("bookmark: everything up to %d, but there is nothing above %d", v.Done, h.Last())
	}
	v.checkList(h)
	from, _ := slices.BinarySearchFunc(h.Messages, v.Start+1, func(m Message, rv uint64) int { return int(m.RV) - int(rv) })
	records := v.records
	for i := from; i < len(h.Messages) && h.Messages[i].RV <= v.Done; i++ {
		m := &h.Messages[i]
		if !v.wants(m.Key) {
			continue
		}
		if want := (watchRecord{m.RV, m.digest()}); len(records) == 0 || records[0] != want {
			v.Violation("gap: %v was not told, of %d events it was told %d", *m, len(h.Messages), len(v.records)-len(records))
			return
		}
		records = records[1:]
	}
	if len(records) > 0 {
		v.Violation("told of %d events that did not happen, the first at %d", len(records), records[0].rv)
	}
}

// checkList compares the items at the start with what happened before.
func (v *Validator) checkList(h *History) {
	if !v.list {
		return
	}
	items := map[string]watchRecord{}
	for i := range h.Messages {
		m := &h.Messages[i]
		if m.RV > v.Start {
			break
		}
		switch {
		case !v.wants(m.Key):
		case m.Kind == "DELETED":
			delete(items, m.Key)
		default:
			items[m.Key] = watchRecord{m.RV, maphash.String(watchSeed, m.Value)}
		}
	}
	if len(items) != len(v.Listed) {
		v.Violation("list: %d items at %d, there were %d", len(v.Listed), v.Start, len(items))
	}
	for key, want := range items {
		if v.Listed[key] != want {
			v.Violation("list: %q at %d is of version %d, it was %d", key, v.Start, v.Listed[key].rv, want.rv)
		}
	}
}

// Report fails the test with what was found.
func (v *Validator) Report(t testing.TB) {
	t.Helper()
	for _, s := range v.violations {
		t.Error(s)
	}
}

// ReadJournals makes one journal of several, as docs/operations.md tells readers to: what an older file has
// from the first version of a newer one on does not count, and they fit together.
func ReadJournals(files []string) (lines []string, err error) {
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
