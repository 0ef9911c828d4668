package store

import (
	"cmp"
	"slices"
	"sort"
	"sync/atomic"
)

// This file is the window of recent events: what changed, in the order of
// resource versions, so that a watch can start in the past. It is part of the
// replicated state.

// EventKind says what happened to a key. The numbers are in snapshots.
type EventKind byte

const (
	EventAdded    EventKind = 1
	EventModified EventKind = 2
	EventDeleted  EventKind = 3
	EventExpired  EventKind = 4 // deleted because its time had come
)

// Event is one change of one key.
type Event struct {
	RV   uint64
	Prev uint64 // the key's version before; 0 if it did not exist
	Time int64  // unix milliseconds, that of its entry; see state.pass
	Kind EventKind
	Last bool // no other event has the same rv after this one
	Cut  bool // of a deletion: the value was not kept
	Key  string
	Item Item // as written; of a deletion the last one
}

const eventOverhead = 96 // the struct itself

func (e *Event) Size() uint64 {
	return uint64(len(e.Key)+len(e.Item.Value)) + eventOverhead
}

// Default bounds of the window.
const (
	EventsMaxDefault     = 65_536
	EventBytesMaxDefault = 64 << 20
)

// Events are kept and dropped in chunks, whose size is a rule of the feature
// level. Since the window always starts with a chunk and ends of chunks follow
// from what is in them, members with the same bounds drop the same ones, whether
// they have applied them or read them from a snapshot. Members with other bounds
// have more or fewer of them, and nothing else depends on that.

type eventChunk struct {
	first  uint64 // number of events[0] among all events ever
	bytes  uint64
	Events []Event // not empty
}

func (c *eventChunk) full(r *Rules) bool {
	return len(c.Events) >= r.chunkEventsMax || c.bytes >= r.chunkBytesMax
}

// eventLog is the window. Appending does not disturb a copy.
type eventLog struct {
	Chunks  []eventChunk // all but the last are full
	First   uint64       // number of the oldest event among all events ever
	Count   uint64
	bytes   uint64
	Dropped uint64 // version of the newest event that is gone, or partly gone

	countMax uint64
	bytesMax uint64
	rules    *Rules // nil = those of level 1

	newest uint64 // number of the first event of the newest entry that has any
	hold   *Hold  // for whom the window waits; nil = for nobody
}

// Hold is how far somebody has read for whom the window waits: it drops nothing
// that he has not, but for a bound.
type Hold struct {
	RV        atomic.Uint64 // all up to this version were read
	Overtaken atomic.Bool   // the bound was reached
}

// By how much the window exceeds its bounds while it waits.
const (
	HoldEventsMax = EventsMaxDefault
	holdBytesMax  = EventBytesMaxDefault
)

func (l *eventLog) limits() *Rules { return cmp.Or(l.rules, &rulesOf[LevelFirst]) }

func newEventLog() eventLog {
	return eventLog{countMax: EventsMaxDefault, bytesMax: EventBytesMaxDefault}
}

// Copy returns a log that later appends do not change.
func (l *eventLog) Copy() eventLog {
	c := *l
	c.Chunks = slices.Clone(l.Chunks)
	if n := len(c.Chunks); n > 0 {
		c.Chunks[n-1].Events = slices.Clip(c.Chunks[n-1].Events) // so that appends to the copy do not meet ours
	}
	return c
}

// add adds an event.
func (l *eventLog) add(e Event) {
	n := len(l.Chunks)
	if n == 0 || l.Chunks[n-1].full(l.limits()) {
		l.Chunks = append(l.Chunks, eventChunk{first: l.End(), Events: make([]Event, 0, l.limits().chunkEventsMax)})
		n++
	}
	c := &l.Chunks[n-1]
	c.Events = append(c.Events, e)
	c.bytes += e.Size()
	l.bytes += e.Size()
	l.Count++
}

// endEntry ends an entry whose events began with number first, and drops what is
// too much.
func (l *eventLog) endEntry(first uint64) {
	if l.End() > first {
		l.newest = first
		l.trim()
	}
}

// trim drops the oldest chunks while the rest is still at its bounds, so the
// window holds up to one chunk more. It never drops what nobody can have read
// yet, the events of the newest entry.
func (l *eventLog) trim() {
	for len(l.Chunks) > 1 {
		oldest := &l.Chunks[0]
		n := uint64(len(oldest.Events))
		last := oldest.Events[n-1].RV
		if l.Count-n < l.countMax && l.bytes-oldest.bytes < l.bytesMax || oldest.first+n > l.newest {
			return
		}
		if l.hold != nil && l.hold.RV.Load() < last {
			if l.Count-n < l.countMax+HoldEventsMax && l.bytes-oldest.bytes < l.bytesMax+holdBytesMax {
				return
			}
			l.hold.Overtaken.Store(true)
		}
		l.Dropped = last
		l.First += n
		l.Count -= n
		l.bytes -= oldest.bytes
		l.Chunks = slices.Delete(l.Chunks, 0, 1)
	}
}

// End returns the number that the next event gets.
func (l *eventLog) End() uint64 { return l.First + l.Count }

// Seek returns the number of the first event above rv. ok is false if events
// above rv have left the window.
func (l *eventLog) Seek(rv uint64) (n uint64, ok bool) {
	if rv < l.Dropped {
		return 0, false
	}
	i := sort.Search(len(l.Chunks), func(i int) bool {
		events := l.Chunks[i].Events
		return events[len(events)-1].RV > rv
	})
	if i == len(l.Chunks) {
		return l.End(), true
	}
	c := &l.Chunks[i]
	j := sort.Search(len(c.Events), func(j int) bool { return c.Events[j].RV > rv })
	return c.first + uint64(j), true
}

// From returns events from number n on, up to the end of their chunk; none if n
// is the end. ok is false if event n has left the window, and aging says that it
// soon will: events were dropped before, and it is in the oldest quarter of what
// is left, but not of the newest entry. The caller must not change what it gets.
func (l *eventLog) From(n uint64) (events []Event, aging, ok bool) {
	if n < l.First {
		return nil, false, false
	}
	if n >= l.End() {
		return nil, false, true
	}
	i := sort.Search(len(l.Chunks), func(i int) bool { return l.Chunks[i].first > n }) - 1
	c := &l.Chunks[i]
	return c.Events[n-c.first:], l.Dropped > 0 && i < len(l.Chunks)/4 && n < l.newest, true
}
