package store

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
	n, count, size := l.First, uint64(0), uint64(0)
	for i, c := range l.Chunks {
		if c.first != n || len(c.Events) == 0 || len(c.Events) > ChunkEventsMax {
			t.Fatalf("chunk %d starts at %d with %d events, want %d", i, c.first, len(c.Events), n)
		}
		if !c.full(&rulesOf[1]) && i < len(l.Chunks)-1 {
			t.Fatalf("chunk %d of %d is not full", i, len(l.Chunks))
		}
		chunkSize := uint64(0)
		for _, e := range c.Events {
			chunkSize += e.Size()
		}
		if c.bytes != chunkSize {
			t.Fatalf("chunk %d claims %d bytes, has %d", i, c.bytes, chunkSize)
		}
		size += chunkSize
		n += uint64(len(c.Events))
		count += uint64(len(c.Events))
	}
	if l.Count != count || l.bytes != size || l.End() != n {
		t.Fatalf("window claims %d events, %d bytes, end %d; has %d, %d, %d", l.Count, l.bytes, l.End(), count, size, n)
	}
}

// append adds the one event of an entry.
func (l *eventLog) append(e Event) {
	first := l.End()
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
				before := l.Count
				l.append(Event{RV: uint64(i + 1), Last: true, Item: Item{Value: value[:tt.valueSize(i)]}})
				if l.Count > tt.countMax+ChunkEventsMax || l.bytes > tt.bytesMax+chunkBytesMax+1<<20+96 {
					t.Fatalf("event %d: window of %d events, %d bytes", i, l.Count, l.bytes)
				}
				if l.Count < before && l.Count < tt.countMax && l.bytes < tt.bytesMax {
					t.Fatalf("event %d: dropped too much, %d events and %d bytes are left", i, l.Count, l.bytes)
				}
				if i%1000 == 0 {
					checkWindow(t, &l)
				}
			}
			checkWindow(t, &l)
			if l.Dropped != l.First || l.End() != 10_000 {
				t.Errorf("dropped %d, first %d, end %d", l.Dropped, l.First, l.End())
			}
		})
	}
}

func TestEventLog_SeekAndFrom(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	l := eventLog{countMax: 3000, bytesMax: 1 << 40}
	var all []Event
	for rv := uint64(1); len(all) < 10_000; rv += 1 + random.Uint64N(2) {
		n := 1 + random.IntN(4)
		for i := range n {
			e := Event{RV: rv, Last: i == n-1, Key: fmt.Sprint(len(all))}
			all = append(all, e)
			l.append(e)
		}
	}
	for range 1000 {
		rv := all[random.IntN(len(all))].RV + random.Uint64N(2)
		n, ok := l.Seek(rv)
		if gone := rv < l.Dropped; ok == gone {
			t.Fatalf("seek(%d) = %v, dropped %d", rv, ok, l.Dropped)
		}
		if !ok {
			continue
		}
		for {
			events, _, ok := l.From(n)
			if !ok {
				t.Fatalf("from(%d), the window starts at %d", n, l.First)
			}
			if len(events) == 0 {
				break
			}
			for _, e := range events {
				if e != all[n] || e.RV <= rv {
					t.Fatalf("event %d is %v, want %v, above %d", n, e, all[n], rv)
				}
				n++
			}
		}
		if n != uint64(len(all)) {
			t.Fatalf("ends at %d of %d", n, len(all))
		}
	}
	if _, _, ok := l.From(l.First - 1); ok {
		t.Error("an event that is gone was found")
	}
	_, aging, _ := l.From(l.First)
	if _, fresh, _ := l.From(l.End() - 1); !aging || fresh {
		t.Errorf("the oldest is aging: %v, the newest: %v", aging, fresh)
	}
}

// TestEventLog_Aging: only once events have been dropped, and only the oldest quarter of the chunks.
func TestEventLog_Aging(t *testing.T) {
	l := eventLog{countMax: 8 * ChunkEventsMax, bytesMax: 1 << 40}
	for l.Dropped == 0 {
		if _, aging, ok := l.From(0); aging || !ok {
			t.Fatalf("of %d events none was dropped, and the oldest is aging", l.Count)
		}
		l.append(Event{RV: l.End() + 1, Last: true})
	}
	if len(l.Chunks) != 8 {
		t.Fatalf("%d chunks", len(l.Chunks))
	}
	for i, c := range l.Chunks {
		if _, aging, _ := l.From(c.first); aging != (i < 2) {
			t.Errorf("chunk %d of 8 is aging: %v", i, aging)
		}
	}
}

// TestEventLog_Copy: a copy and its original go separate ways.
func TestEventLog_Copy(t *testing.T) {
	for _, both := range []int{1, 10, ChunkEventsMax, ChunkEventsMax + 10} {
		testEventLogCopy(t, both)
	}
}

func testEventLogCopy(t *testing.T, both int) {
	l := eventLog{countMax: 1000, bytesMax: 1 << 40}
	add := func(l *eventLog, key string, n int) {
		for range n {
			l.append(Event{RV: l.End() + 1, Last: true, Key: key})
		}
	}
	add(&l, "both", both)
	c := l.Copy()
	add(&l, "original", 5)
	add(&c, "copy", 3*ChunkEventsMax)
	add(&l, "original", 5)
	checkWindow(t, &l)
	checkWindow(t, &c)
	for name, log := range map[string]*eventLog{"original": &l, "copy": &c} {
		events, _, _ := log.From(uint64(both))
		for _, e := range events {
			if e.Key != name {
				t.Fatalf("after %d events the %s has one of the other", both, name)
			}
		}
	}
}

// TestEventLog_Holds: the window waits for who has to read all of it, but not for
// ever.
func TestEventLog_Holds(t *testing.T) {
	l := eventLog{countMax: 1, bytesMax: 1, hold: &Hold{}}
	rv := uint64(0)
	add := func(n int) {
		for range n {
			rv++
			l.append(Event{RV: rv, Last: true})
		}
	}
	add(10 * ChunkEventsMax)
	if l.Dropped != 0 || l.hold.Overtaken.Load() {
		t.Fatalf("dropped up to %d", l.Dropped)
	}
	l.hold.RV.Store(5*ChunkEventsMax + 1)
	add(1)
	if l.Dropped != 5*ChunkEventsMax || l.hold.Overtaken.Load() {
		t.Fatalf("dropped up to %d", l.Dropped)
	}
	add(HoldEventsMax)
	if l.Dropped <= 5*ChunkEventsMax+1 || !l.hold.Overtaken.Load() || l.Count > HoldEventsMax+2*ChunkEventsMax {
		t.Fatalf("dropped up to %d", l.Dropped)
	}
}

// TestEventLog_Snapshot: a member that restores a snapshot drops the same events
// at the same time as one that has applied all of them, whatever the bounds.
func TestEventLog_Snapshot(t *testing.T) {
	for _, bounds := range [][2]uint64{{EventsMaxDefault, EventBytesMaxDefault}, {2000, 1 << 36}, {1 << 24, 3 << 20}} {
		whole, restored := New(), New()
		for _, s := range []*Store{whole, restored} {
			s.SetWindow(bounds[0], bounds[1])
			s.TrimWindow()
		}
		random := rand.New(rand.NewPCG(3, 4))
		write := func(n int, stores ...*Store) {
			for range n {
				batch := []Command{{Op: OpPut, Key: "large", Value: strings.Repeat("x", random.IntN(30_000))}}
				for range random.IntN(8) {
					key := fmt.Sprint("k", random.IntN(20))
					batch = append(batch, Command{Op: []Op{OpPut, OpDelete}[random.IntN(2)], Key: key, Value: "v"})
				}
				index := stores[0].Applied() + 1
				var data []byte
				for i := range batch {
					data = batch[i].AppendTo(data)
				}
				for _, s := range stores {
					if _, err := s.Apply(index, 1, BatchHeader{Session: 1, Seq: index, Time: 1}, data, nil); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		bytesOf := func(s *Store) []byte {
			var b bytes.Buffer
			st := s.Snapshot()
			testkit.Must(t, st.Encode(&b))
			return b.Bytes()
		}
		write(300, whole)
		st, err := ReadState(bytes.NewReader(bytesOf(whole)))
		testkit.Must(t, err)
		restored.Restore(st)
		for range 4 {
			if !bytes.Equal(bytesOf(whole), bytesOf(restored)) {
				t.Fatalf("bounds %v: the snapshots differ", bounds)
			}
			write(50, whole, restored)
			checkWindow(t, &restored.State.Events)
		}
		t.Logf("bounds %v: %d events, %d bytes, dropped up to version %d of %d", bounds,
			whole.State.Events.Count, whole.State.Events.bytes, whole.EventsDropped(), whole.Version())
	}
}
