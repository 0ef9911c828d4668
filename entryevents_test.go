package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
)

// TestEntryEvents_Bounded: whatever the commands are, the events of one entry take
// at most half of the default window, in bytes and in number. So who watches can
// read one entry before the next one makes it leave.
func TestEntryEvents_Bounded(t *testing.T) {
	const many = 40_000
	keyOf := func(size int) func(i int) string {
		return func(i int) string { return fmt.Sprintf("%0*x", size, i) }
	}
	tests := []struct {
		name  string
		keys  func(i int) string
		n     int
		value int // size
		ttl   bool
		do    func(key func(i int) string) []command // nil = let them expire
	}{
		{name: "prefix, large values", keys: keyOf(8), n: 70, value: 1 << 20, do: deleteAll},
		{name: "prefix, many keys", keys: keyOf(8), n: deletePrefixMax, value: deletedValueMax, do: deleteAll},
		{name: "prefix, many long keys", keys: keyOf(400), n: deletePrefixMax, value: deletedValueMax, do: deleteAll},
		{name: "prefix, longest keys", keys: keyOf(keySizeMax), n: 3900, value: deletedValueMax, do: deleteAll},
		{name: "prefixes", keys: keyOf(4), n: many, do: func(func(int) string) (cs []command) {
			for i := range 16 {
				cs = append(cs, command{op: opDeletePrefix, key: fmt.Sprintf("%x", i)})
			}
			return cs
		}},
		{name: "deletes", keys: keyOf(4), n: many, value: deletedValueMax, do: func(key func(int) string) (cs []command) {
			for i := range many {
				cs = append(cs, command{op: opDelete, key: key(i)})
			}
			return cs
		}},
		{name: "puts and deletes of overdue keys", keys: keyOf(4), n: many, value: deletedValueMax, ttl: true, do: func(key func(int) string) (cs []command) {
			for i := range many {
				cs = append(cs, command{op: opPut, key: key(i)}, command{op: opDelete, key: key(i)})
			}
			return cs
		}},
		{name: "transactions", keys: keyOf(4), n: many, value: deletedValueMax, ttl: true, do: func(key func(int) string) (cs []command) {
			for i := 0; i+3*txnOpsMax <= many; i += 3 * txnOpsMax {
				var x txn
				for j := range txnOpsMax {
					x.compare = append(x.compare, comparison{kind: byAbsent, key: key(i + j)})
					x.then = append(x.then, command{op: opPut, key: key(i + txnOpsMax + j)})
					x.otherwise = append(x.otherwise, command{op: opDelete, key: key(i + 2*txnOpsMax + j)})
				}
				cs = append(cs, command{op: opTxn, value: x.encode()})
			}
			return cs
		}},
		{name: "expiry of long keys", keys: keyOf(keySizeMax), n: 3000, value: deletedValueMax, ttl: true},
		{name: "expiry of large values", keys: keyOf(8), n: 1200, value: 64 << 10, ttl: true},
		{name: "mixed", keys: keyOf(4), n: many, value: 100, ttl: true, do: func(key func(int) string) (cs []command) {
			random := rand.New(rand.NewPCG(1, 2))
			for range many {
				switch k := key(random.IntN(2 * many)); random.IntN(200) {
				case 0:
					cs = append(cs, command{op: opDeletePrefix, key: k[:2]})
				case 1:
					cs = append(cs, command{op: opPut, key: k, value: strings.Repeat("x", 100_000)})
				default:
					cs = append(cs, command{op: []op{opPut, opDelete}[random.IntN(2)], key: k})
				}
			}
			return cs
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newWatchRig(t)
			r.record = false
			r.apply(raiseCommand(2))
			value := strings.Repeat("v", tt.value)
			var load []command
			for i := range tt.n {
				c := command{op: opPut, key: tt.keys(i), value: value}
				if tt.ttl {
					c.expires = 1
				}
				load = append(load, c)
			}
			r.applyAsLoop(load)
			if tt.do != nil {
				r.applyAsLoop(tt.do(tt.keys))
			}
			for tt.do == nil {
				due := r.store.expired(1<<40, expireMax, batchSizeMax)
				if len(due) == 0 {
					break
				}
				r.applyChecked(due...)
			}
		})
	}
}

func deleteAll(func(int) string) []command { return []command{{op: opDeletePrefix, key: "0"}} }

// applyAsLoop applies commands in the batches that a loop makes of them.
func (r *watchRig) applyAsLoop(commands []command) {
	r.t.Helper()
	l := newLoop(time.Millisecond, func() {}, zap.NewNop())
	l.status.Store(&replicaStatus{level: levelNewest})
	batches := []*batch{nil}
	var batch []command
	flush := func() {
		if len(batch) > 0 {
			r.applyChecked(batch...)
		}
		batch = nil
	}
	for i := range commands {
		b, _, err := l.enqueue(&commands[i], time.Time{})
		if err != nil {
			r.t.Fatal(err)
		}
		if b != batches[0] {
			flush()
			l.inbox.queue, l.inbox.queueSize = l.inbox.queue[len(l.inbox.queue)-1:], len(b.data)
			batches[0] = b
		}
		batch = append(batch, commands[i])
	}
	flush()
}

// applyChecked applies a batch and looks at the events that it makes.
func (r *watchRig) applyChecked(batch ...command) {
	r.t.Helper()
	events := &r.store.state.events
	before := events.end()
	for i, res := range r.apply(batch...) {
		if res.status == statusTooMany {
			r.t.Errorf("command %d, %d of %q, is refused", i, batch[i].op, batch[i].key)
		}
	}
	size, n := uint64(0), before
	for n < events.end() {
		part, _, ok := events.from(n)
		if !ok {
			r.t.Fatal("events of the newest entry have left the window")
		}
		for i := range part {
			size += part[i].size()
		}
		n += uint64(len(part))
	}
	if size > eventBytesMaxDefault/2 || n-before > eventsMaxDefault/2 {
		r.t.Errorf("%d commands make %d events of %d bytes", len(batch), n-before, size)
	}
}

// TestEntryEvents_PrefixTooLong: more than that is refused, and nothing happens.
func TestEntryEvents_PrefixTooLong(t *testing.T) {
	r := newWatchRig(t)
	r.record = false
	r.apply(raiseCommand(2))
	for i := range 5000 {
		r.put(fmt.Sprintf("%0*d", keySizeMax, i), "")
	}
	before := r.store.version()
	if res := r.apply(command{op: opDeletePrefix, key: "0"}); res[0].status != statusTooMany || r.store.version() != before {
		t.Errorf("%+v", res[0])
	}
}

// TestEntryEvents_OthersDoNotNotice: large deletions, of whatever kind, end no
// watch, of whatever key.
func TestEntryEvents_OthersDoNotNotice(t *testing.T) {
	const n = 90
	keyOf := func(i int) string { return fmt.Sprintf("big/%d", i) }
	var each, expire []command
	var x txn
	for i := range n {
		each = append(each, command{op: opDelete, key: keyOf(i)})
		expire = append(expire, command{op: opExpire, key: keyOf(i)})
		x.then = append(x.then, command{op: opDelete, key: keyOf(i)})
	}
	for name, batch := range map[string][]command{
		"prefix":      {{op: opDeletePrefix, key: "big/"}},
		"deletes":     each,
		"expiries":    expire,
		"transaction": {{op: opTxn, value: x.encode()}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newWatchRig(t)
			r.record = false
			r.apply(raiseCommand(2))
			value := strings.Repeat("x", 1<<20)
			for i := range n {
				r.put(keyOf(i), value)
			}
			rv := r.put("other", "1")
			watches := map[string]*watcher{"the key of another": r.watch("other", false, rv), "the prefix": r.watch("big/", true, rv)}
			for _, w := range watches {
				if _, _, err := drain(w); err != nil {
					t.Fatal(err)
				}
			}
			r.apply(batch...)
			r.put("other", "2")
			r.hub.distribute()
			for name, w := range watches {
				want := map[bool]int{true: n, false: 1}[w.isPrefix]
				if got, _, err := drain(w); err != nil || len(got) != want {
					t.Errorf("who watches %s gets %d events, %v", name, len(got), err)
				}
			}
		})
	}
}

// TestEntryEvents_DeletedValue: what a deletion says of the value.
func TestEntryEvents_DeletedValue(t *testing.T) {
	for level, want := range map[int][]bool{1: {true, true}, 2: {true, false}} {
		r := newWatchRig(t)
		if level > 1 {
			r.apply(raiseCommand(level))
		}
		for i, size := range []int{deletedValueMax, deletedValueMax + 1} {
			r.put("k", strings.Repeat("x", size))
			n := r.store.state.events.end()
			r.apply(command{op: opDelete, key: "k"})
			events, _, _ := r.store.eventsFrom(n)
			if e := events[0]; e.cut == want[i] || len(e.item.value) != map[bool]int{true: size}[want[i]] || e.item.created == 0 {
				t.Errorf("level %d: of %d bytes %d are kept, cut %v", level, size, len(e.item.value), e.cut)
			}
			s := &watchStream{}
			s.appendEvent(&events[0], true)
			if got := strings.Contains(string(*s.buf), `"value":"`); got != want[i] {
				t.Errorf("level %d: %.200s", level, *s.buf)
			}
		}
		snap := r.store.snapshot()
		st, err := readState(bytes.NewReader(stateBytes(t, snap)))
		if err != nil {
			t.Fatal(err)
		}
		got, _, _ := st.events.from(0)
		for i, e := range snap.events.chunks[0].events {
			if got[i] != e {
				t.Errorf("level %d: event %d is %+v in a snapshot", level, i, got[i])
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

// TestJournal_Overtaken: a journal that would miss something ends its node.
func TestJournal_Overtaken(t *testing.T) {
	for _, n := range []int{holdEventsMax / 2, holdEventsMax + 4*chunkEventsMax} {
		synctest.Test(t, func(t *testing.T) {
			r := newJournalRig(t)
			r.record = false
			r.smallWindow(1)
			stop := r.start()
			r.put("a", "v")
			synctest.Wait()
			r.store.mu.Lock() // so that the journal cannot read meanwhile
			st := &r.store.state
			for range n {
				first := st.events.end()
				st.put("k", "v", 0)
				st.commit(&result{})
				st.events.endEntry(first)
			}
			r.store.mu.Unlock()
			r.hub.notify()
			synctest.Wait()
			err := stop()
			lost := n > holdEventsMax
			if errors.Is(err, errJournalSlow) != lost || !lost && err != nil {
				t.Errorf("%d events: %v", n, err)
			}
			if got := r.content(); strings.Contains(got, `"gap"`) || !lost && strings.Count(got, "\n") != n+1 {
				t.Errorf("%d events: %d lines", n, strings.Count(got, "\n"))
			}
		})
	}
}

// TestEventLog_NewestEntry: however small the window is, the events of an entry
// stay until the next one, and who has read all before is not too slow for them.
func TestEventLog_NewestEntry(t *testing.T) {
	r := newWatchRig(t)
	r.record = false
	r.store.shrinkWindow(1, 1)
	r.fill(2 * chunkEventsMax)
	w := r.watch("k/", true, r.store.version())
	if _, _, err := drain(w); err != nil {
		t.Fatal(err)
	}
	var batch []command
	for i := range 5 * chunkEventsMax {
		batch = append(batch, command{op: opPut, key: fmt.Sprintf("k/%d", i)})
	}
	for range 3 {
		r.apply(batch...)
		r.hub.distribute()
		if got, _, err := drain(w); err != nil || len(got) != len(batch) {
			t.Fatalf("%d events of %d, %v", len(got), len(batch), err)
		}
	}
	r.put("k/0", "v")
	r.put("k/0", "v")
	if n := r.store.state.events.count; n > chunkEventsMax {
		t.Errorf("%d events are left", n)
	}
}
