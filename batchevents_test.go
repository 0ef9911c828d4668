package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/testkit"
)

// eventsRig applies what a loop would have put into batches.
type eventsRig struct {
	t     *testing.T
	store *kvstore
}

func (r *eventsRig) apply(commands ...command) (out []result) {
	r.t.Helper()
	var data []byte
	for i := range commands {
		data = commands[i].appendTo(data)
	}
	n := r.store.applied() + 1
	_, err := r.store.apply(n, 1, batchHeader{session: 1, seq: n, time: int64(n)}, data, &out)
	testkit.Must(r.t, err)
	return out
}

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
			r := &eventsRig{t: t, store: newKVStore()}
			r.apply(raiseLevel(2))
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
func (r *eventsRig) applyAsLoop(commands []command) {
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
func (r *eventsRig) applyChecked(batch ...command) {
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
