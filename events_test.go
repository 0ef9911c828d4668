package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"raftrv/internal/testkit"
)

// checkWindow holds a window against what is true of every one.
func checkWindow(t *testing.T, l *eventLog) {
	t.Helper()
	n, count, size := l.first, uint64(0), uint64(0)
	for i, c := range l.chunks {
		if c.first != n || len(c.events) == 0 || len(c.events) > chunkEventsMax {
			t.Fatalf("chunk %d starts at %d with %d events, want %d", i, c.first, len(c.events), n)
		}
		if !c.full(&rulesOf[1]) && i < len(l.chunks)-1 {
			t.Fatalf("chunk %d of %d is not full", i, len(l.chunks))
		}
		chunkSize := uint64(0)
		for _, e := range c.events {
			chunkSize += e.size()
		}
		if c.bytes != chunkSize {
			t.Fatalf("chunk %d claims %d bytes, has %d", i, c.bytes, chunkSize)
		}
		size += chunkSize
		n += uint64(len(c.events))
		count += uint64(len(c.events))
	}
	if l.count != count || l.bytes != size || l.end() != n {
		t.Fatalf("window claims %d events, %d bytes, end %d; has %d, %d, %d", l.count, l.bytes, l.end(), count, size, n)
	}
}

// append adds the one event of an entry.
func (l *eventLog) append(e event) {
	first := l.end()
	l.add(e)
	l.endEntry(first)
}

func TestEventLog_Bounds(t *testing.T) {
	tests := []struct {
		name               string
		valueSize          func(i int) int
		countMax, bytesMax uint64
	}{
		{"small", func(int) int { return 1 }, 4096, 1 << 40},
		{"large", func(int) int { return 1 << 20 }, 1 << 40, 16 << 20},
		{"mixed", func(i int) int { return i * i % 50_000 }, 2000, 8 << 20},
		{"one", func(int) int { return 1 }, 1, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := eventLog{countMax: tt.countMax, bytesMax: tt.bytesMax}
			value := strings.Repeat("x", 1<<20)
			for i := range 10_000 {
				before := l.count
				l.append(event{rv: uint64(i + 1), last: true, item: item{value: value[:tt.valueSize(i)]}})
				if l.count > tt.countMax+chunkEventsMax || l.bytes > tt.bytesMax+chunkBytesMax+1<<20+96 {
					t.Fatalf("event %d: window of %d events, %d bytes", i, l.count, l.bytes)
				}
				if l.count < before && l.count < tt.countMax && l.bytes < tt.bytesMax {
					t.Fatalf("event %d: dropped too much, %d events and %d bytes are left", i, l.count, l.bytes)
				}
				if i%1000 == 0 {
					checkWindow(t, &l)
				}
			}
			checkWindow(t, &l)
			if l.dropped != l.first || l.end() != 10_000 {
				t.Errorf("dropped %d, first %d, end %d", l.dropped, l.first, l.end())
			}
		})
	}
}

func TestEventLog_SeekAndFrom(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	l := eventLog{countMax: 3000, bytesMax: 1 << 40}
	var all []event
	for rv := uint64(1); len(all) < 10_000; rv += 1 + random.Uint64N(2) {
		n := 1 + random.IntN(4)
		for i := range n {
			e := event{rv: rv, last: i == n-1, key: fmt.Sprint(len(all))}
			all = append(all, e)
			l.append(e)
		}
	}
	for range 1000 {
		rv := all[random.IntN(len(all))].rv + random.Uint64N(2)
		n, ok := l.seek(rv)
		if gone := rv < l.dropped; ok == gone {
			t.Fatalf("seek(%d) = %v, dropped %d", rv, ok, l.dropped)
		}
		if !ok {
			continue
		}
		for {
			events, _, ok := l.from(n)
			if !ok {
				t.Fatalf("from(%d), the window starts at %d", n, l.first)
			}
			if len(events) == 0 {
				break
			}
			for _, e := range events {
				if e != all[n] || e.rv <= rv {
					t.Fatalf("event %d is %v, want %v, above %d", n, e, all[n], rv)
				}
				n++
			}
		}
		if n != uint64(len(all)) {
			t.Fatalf("ends at %d of %d", n, len(all))
		}
	}
	if _, _, ok := l.from(l.first - 1); ok {
		t.Error("an event that is gone was found")
	}
	_, aging, _ := l.from(l.first)
	if _, fresh, _ := l.from(l.end() - 1); !aging || fresh {
		t.Errorf("the oldest is aging: %v, the newest: %v", aging, fresh)
	}
}

// TestEventLog_Aging: only once events have been dropped, and only the oldest quarter of the chunks.
func TestEventLog_Aging(t *testing.T) {
	l := eventLog{countMax: 8 * chunkEventsMax, bytesMax: 1 << 40}
	for l.dropped == 0 {
		if _, aging, ok := l.from(0); aging || !ok {
			t.Fatalf("of %d events none was dropped, and the oldest is aging", l.count)
		}
		l.append(event{rv: l.end() + 1, last: true})
	}
	if len(l.chunks) != 8 {
		t.Fatalf("%d chunks", len(l.chunks))
	}
	for i, c := range l.chunks {
		if _, aging, _ := l.from(c.first); aging != (i < 2) {
			t.Errorf("chunk %d of 8 is aging: %v", i, aging)
		}
	}
}

// TestEventLog_Copy: a copy and its original go separate ways.
func TestEventLog_Copy(t *testing.T) {
	for _, both := range []int{1, 10, chunkEventsMax, chunkEventsMax + 10} {
		testEventLogCopy(t, both)
	}
}

func testEventLogCopy(t *testing.T, both int) {
	l := eventLog{countMax: 1000, bytesMax: 1 << 40}
	add := func(l *eventLog, key string, n int) {
		for range n {
			l.append(event{rv: l.end() + 1, last: true, key: key})
		}
	}
	add(&l, "both", both)
	c := l.copy()
	add(&l, "original", 5)
	add(&c, "copy", 3*chunkEventsMax)
	add(&l, "original", 5)
	checkWindow(t, &l)
	checkWindow(t, &c)
	for name, log := range map[string]*eventLog{"original": &l, "copy": &c} {
		events, _, _ := log.from(uint64(both))
		for _, e := range events {
			if e.key != name {
				t.Fatalf("after %d events the %s has one of the other", both, name)
			}
		}
	}
}

// TestEventLog_Holds: the window waits for who has to read all of it, but not for
// ever.
func TestEventLog_Holds(t *testing.T) {
	l := eventLog{countMax: 1, bytesMax: 1, hold: &hold{}}
	rv := uint64(0)
	add := func(n int) {
		for range n {
			rv++
			l.append(event{rv: rv, last: true})
		}
	}
	add(10 * chunkEventsMax)
	if l.dropped != 0 || l.hold.overtaken.Load() {
		t.Fatalf("dropped up to %d", l.dropped)
	}
	l.hold.rv.Store(5*chunkEventsMax + 1)
	add(1)
	if l.dropped != 5*chunkEventsMax || l.hold.overtaken.Load() {
		t.Fatalf("dropped up to %d", l.dropped)
	}
	add(holdEventsMax)
	if l.dropped <= 5*chunkEventsMax+1 || !l.hold.overtaken.Load() || l.count > holdEventsMax+2*chunkEventsMax {
		t.Fatalf("dropped up to %d", l.dropped)
	}
}

// TestEventLog_Snapshot: a member that restores a snapshot drops the same events
// at the same time as one that has applied all of them, whatever the bounds.
func TestEventLog_Snapshot(t *testing.T) {
	for _, bounds := range [][2]uint64{{eventsMaxDefault, eventBytesMaxDefault}, {2000, 1 << 36}, {1 << 24, 3 << 20}} {
		whole, restored := newKVStore(), newKVStore()
		for _, s := range []*kvstore{whole, restored} {
			s.setWindow(bounds[0], bounds[1])
			s.trimWindow()
		}
		random := rand.New(rand.NewPCG(3, 4))
		write := func(n int, stores ...*kvstore) {
			for range n {
				batch := []command{{op: opPut, key: "large", value: strings.Repeat("x", random.IntN(30_000))}}
				for range random.IntN(8) {
					key := fmt.Sprint("k", random.IntN(20))
					batch = append(batch, command{op: []op{opPut, opDelete}[random.IntN(2)], key: key, value: "v"})
				}
				index := stores[0].applied() + 1
				var data []byte
				for i := range batch {
					data = batch[i].appendTo(data)
				}
				for _, s := range stores {
					if _, err := s.apply(index, 1, batchHeader{session: 1, seq: index, time: 1}, data, nil); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		bytesOf := func(s *kvstore) []byte {
			var b bytes.Buffer
			st := s.snapshot()
			testkit.Must(t, st.writeTo(&b))
			return b.Bytes()
		}
		write(300, whole)
		st, err := readState(bytes.NewReader(bytesOf(whole)))
		testkit.Must(t, err)
		restored.restore(st)
		for range 4 {
			if !bytes.Equal(bytesOf(whole), bytesOf(restored)) {
				t.Fatalf("bounds %v: the snapshots differ", bounds)
			}
			write(50, whole, restored)
			checkWindow(t, &restored.state.events)
		}
		t.Logf("bounds %v: %d events, %d bytes, dropped up to version %d of %d", bounds,
			whole.state.events.count, whole.state.events.bytes, whole.eventsDropped(), whole.version())
	}
}
