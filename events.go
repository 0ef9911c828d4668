package main

import (
	"cmp"
	"slices"
	"sort"
	"sync/atomic"
)

// This file is the window of recent events: what changed, in the order of
// resource versions, so that a watch can start in the past. It is part of the
// replicated state.

// eventKind says what happened to a key. The numbers are in snapshots.
type eventKind byte

const (
	eventAdded    eventKind = 1
	eventModified eventKind = 2
	eventDeleted  eventKind = 3
	eventExpired  eventKind = 4 // deleted because its time had come
)

// event is one change of one key.
type event struct {
	rv   uint64
	prev uint64 // the key's version before; 0 if it did not exist
	time int64  // unix milliseconds, that of its entry; see state.pass
	kind eventKind
	last bool // no other event has the same rv after this one
	cut  bool // of a deletion: the value was not kept
	key  string
	item item // as written; of a deletion the last one
}

const eventOverhead = 96 // the struct itself

func (e *event) size() uint64 {
	return uint64(len(e.key)+len(e.item.value)) + eventOverhead
}

// Default bounds of the window.
const (
	eventsMaxDefault     = 65_536
	eventBytesMaxDefault = 64 << 20
)

// Events are kept and dropped in chunks, whose size is a rule of the feature
// level. Since the window always starts with a chunk and ends of chunks follow
// from what is in them, members with the same bounds drop the same ones, whether
// they have applied them or read them from a snapshot. Members with other bounds
// have more or fewer of them, and nothing else depends on that.

type eventChunk struct {
	first  uint64 // number of events[0] among all events ever
	bytes  uint64
	events []event // not empty
}

func (c *eventChunk) full(r *rules) bool {
	return len(c.events) >= r.chunkEventsMax || c.bytes >= r.chunkBytesMax
}

// eventLog is the window. Appending does not disturb a copy.
type eventLog struct {
	chunks  []eventChunk // all but the last are full
	first   uint64       // number of the oldest event among all events ever
	count   uint64
	bytes   uint64
	dropped uint64 // version of the newest event that is gone, or partly gone

	countMax uint64
	bytesMax uint64
	rules    *rules // nil = those of level 1

	newest uint64 // number of the first event of the newest entry that has any
	hold   *hold  // for whom the window waits; nil = for nobody
}

// hold is how far somebody has read for whom the window waits: it drops nothing
// that he has not, but for a bound.
type hold struct {
	rv        atomic.Uint64 // all up to this version were read
	overtaken atomic.Bool   // the bound was reached
}

// By how much the window exceeds its bounds while it waits.
const (
	holdEventsMax = eventsMaxDefault
	holdBytesMax  = eventBytesMaxDefault
)

func (l *eventLog) limits() *rules { return cmp.Or(l.rules, &rulesOf[levelFirst]) }

func newEventLog() eventLog {
	return eventLog{countMax: eventsMaxDefault, bytesMax: eventBytesMaxDefault}
}

// copy returns a log that later appends do not change.
func (l *eventLog) copy() eventLog {
	c := *l
	c.chunks = slices.Clone(l.chunks)
	if n := len(c.chunks); n > 0 {
		c.chunks[n-1].events = slices.Clip(c.chunks[n-1].events) // so that appends to the copy do not meet ours
	}
	return c
}

// add adds an event.
func (l *eventLog) add(e event) {
	n := len(l.chunks)
	if n == 0 || l.chunks[n-1].full(l.limits()) {
		l.chunks = append(l.chunks, eventChunk{first: l.end(), events: make([]event, 0, l.limits().chunkEventsMax)})
		n++
	}
	c := &l.chunks[n-1]
	c.events = append(c.events, e)
	c.bytes += e.size()
	l.bytes += e.size()
	l.count++
}

// endEntry ends an entry whose events began with number first, and drops what is
// too much.
func (l *eventLog) endEntry(first uint64) {
	if l.end() > first {
		l.newest = first
		l.trim()
	}
}

// trim drops the oldest chunks while the rest is still at its bounds, so the
// window holds up to one chunk more. It never drops what nobody can have read
// yet, the events of the newest entry.
func (l *eventLog) trim() {
	for len(l.chunks) > 1 {
		oldest := &l.chunks[0]
		n := uint64(len(oldest.events))
		last := oldest.events[n-1].rv
		if l.count-n < l.countMax && l.bytes-oldest.bytes < l.bytesMax || oldest.first+n > l.newest {
			return
		}
		if l.hold != nil && l.hold.rv.Load() < last {
			if l.count-n < l.countMax+holdEventsMax && l.bytes-oldest.bytes < l.bytesMax+holdBytesMax {
				return
			}
			l.hold.overtaken.Store(true)
		}
		l.dropped = last
		l.first += n
		l.count -= n
		l.bytes -= oldest.bytes
		l.chunks = slices.Delete(l.chunks, 0, 1)
	}
}

// end returns the number that the next event gets.
func (l *eventLog) end() uint64 { return l.first + l.count }

// seek returns the number of the first event above rv. ok is false if events
// above rv have left the window.
func (l *eventLog) seek(rv uint64) (n uint64, ok bool) {
	if rv < l.dropped {
		return 0, false
	}
	i := sort.Search(len(l.chunks), func(i int) bool {
		events := l.chunks[i].events
		return events[len(events)-1].rv > rv
	})
	if i == len(l.chunks) {
		return l.end(), true
	}
	c := &l.chunks[i]
	j := sort.Search(len(c.events), func(j int) bool { return c.events[j].rv > rv })
	return c.first + uint64(j), true
}

// from returns events from number n on, up to the end of their chunk; none if n
// is the end. ok is false if event n has left the window, and aging says that it
// soon will: events were dropped before, and it is in the oldest quarter of what
// is left, but not of the newest entry. The caller must not change what it gets.
func (l *eventLog) from(n uint64) (events []event, aging, ok bool) {
	if n < l.first {
		return nil, false, false
	}
	if n >= l.end() {
		return nil, false, true
	}
	i := sort.Search(len(l.chunks), func(i int) bool { return l.chunks[i].first > n }) - 1
	c := &l.chunks[i]
	return c.events[n-c.first:], l.dropped > 0 && i < len(l.chunks)/4 && n < l.newest, true
}
