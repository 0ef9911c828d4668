package main

import (
	"slices"
	"sort"
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
	time int64  // unix milliseconds at the proposer
	kind eventKind
	last bool // no other event has the same rv after this one
	key  string
	item item // as written; of a deletion the last one
}

func (e *event) size() uint64 {
	const overhead = 96 // the struct itself
	return uint64(len(e.key)+len(e.item.value)) + overhead
}

// Default bounds of the window.
const (
	eventsMaxDefault     = 65_536
	eventBytesMaxDefault = 64 << 20
)

// eventChunk is how many events are kept and dropped together. Chunks start at
// multiples of it in the sequence of all events, not wherever a member happened
// to restore a snapshot, so that every member drops the same ones.
const eventChunk = 512

// eventLog is the window. Appending does not disturb a copy.
type eventLog struct {
	chunks  [][]event // all but the last are full
	first   uint64    // number of chunks[0][0] among all events ever
	count   uint64
	bytes   uint64
	dropped uint64 // version of the newest event that is gone, or partly gone

	countMax uint64
	bytesMax uint64
}

func newEventLog() eventLog {
	return eventLog{countMax: eventsMaxDefault, bytesMax: eventBytesMaxDefault}
}

// copy returns a log that later appends do not change.
func (l *eventLog) copy() eventLog {
	c := *l
	c.chunks = slices.Clone(l.chunks)
	return c
}

func (l *eventLog) append(e event) {
	n := len(l.chunks)
	if n == 0 || len(l.chunks[n-1]) == eventChunk {
		l.chunks = append(l.chunks, make([]event, 0, eventChunk))
		n++
	}
	l.chunks[n-1] = append(l.chunks[n-1], e)
	l.count++
	l.bytes += e.size()
	l.trim()
}

// trim drops the oldest chunks while the rest is still at its bounds, so the
// window holds up to one chunk more.
func (l *eventLog) trim() {
	for len(l.chunks) > 1 {
		oldest := l.chunks[0]
		tooMany := l.count-eventChunk >= l.countMax
		tooLarge := l.bytes >= l.bytesMax && l.bytes-chunkBytes(oldest) >= l.bytesMax
		if !tooMany && !tooLarge {
			return
		}
		l.dropped = oldest[eventChunk-1].rv
		l.first += eventChunk
		l.count -= eventChunk
		l.bytes -= chunkBytes(oldest)
		l.chunks = slices.Delete(l.chunks, 0, 1)
	}
}

func chunkBytes(chunk []event) uint64 {
	n := uint64(0)
	for i := range chunk {
		n += chunk[i].size()
	}
	return n
}

// end returns the number that the next event gets.
func (l *eventLog) end() uint64 { return l.first + l.count }

// seek returns the number of the first event above rv. ok is false if events
// above rv have left the window.
func (l *eventLog) seek(rv uint64) (n uint64, ok bool) {
	if rv < l.dropped {
		return 0, false
	}
	i := sort.Search(int(l.count), func(i int) bool {
		return l.chunks[i/eventChunk][i%eventChunk].rv > rv
	})
	return l.first + uint64(i), true
}

// from returns events from number n on, up to the end of their chunk; none if n
// is the end. ok is false if event n has left the window. The caller must not
// change what it gets.
func (l *eventLog) from(n uint64) (events []event, ok bool) {
	if n < l.first {
		return nil, false
	}
	if n >= l.end() {
		return nil, true
	}
	i := n - l.first
	return l.chunks[i/eventChunk][i%eventChunk:], true
}
