package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// eventsRig applies what a loop would have put into batches.
type eventsRig struct {
	t     *testing.T
	store *store.Store
}

func (r *eventsRig) apply(commands ...store.Command) (out []store.Result) {
	r.t.Helper()
	var data []byte
	for i := range commands {
		data = commands[i].AppendTo(data)
	}
	n := r.store.Applied() + 1
	_, err := r.store.Apply(n, 1, store.BatchHeader{Session: 1, Seq: n, Time: int64(n)}, data, &out)
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
		do    func(key func(i int) string) []store.Command // nil = let them expire
	}{
		{name: "prefix, large values", keys: keyOf(8), n: 70, value: 1 << 20, do: deleteAll},
		{name: "prefix, many keys", keys: keyOf(8), n: store.DeletePrefixMax, value: store.DeletedValueMax, do: deleteAll},
		{name: "prefix, many long keys", keys: keyOf(400), n: store.DeletePrefixMax, value: store.DeletedValueMax, do: deleteAll},
		{name: "prefix, longest keys", keys: keyOf(store.KeySizeMax), n: 3900, value: store.DeletedValueMax, do: deleteAll},
		{name: "prefixes", keys: keyOf(4), n: many, do: func(func(int) string) (cs []store.Command) {
			for i := range 16 {
				cs = append(cs, store.Command{Op: store.OpDeletePrefix, Key: fmt.Sprintf("%x", i)})
			}
			return cs
		}},
		{name: "deletes", keys: keyOf(4), n: many, value: store.DeletedValueMax, do: func(key func(int) string) (cs []store.Command) {
			for i := range many {
				cs = append(cs, store.Command{Op: store.OpDelete, Key: key(i)})
			}
			return cs
		}},
		{name: "puts and deletes of overdue keys", keys: keyOf(4), n: many, value: store.DeletedValueMax, ttl: true, do: func(key func(int) string) (cs []store.Command) {
			for i := range many {
				cs = append(cs, store.Command{Op: store.OpPut, Key: key(i)}, store.Command{Op: store.OpDelete, Key: key(i)})
			}
			return cs
		}},
		{name: "transactions", keys: keyOf(4), n: many, value: store.DeletedValueMax, ttl: true, do: func(key func(int) string) (cs []store.Command) {
			for i := 0; i+3*store.TxnOpsMax <= many; i += 3 * store.TxnOpsMax {
				var x store.Txn
				for j := range store.TxnOpsMax {
					x.Compare = append(x.Compare, store.Comparison{Kind: store.ByAbsent, Key: key(i + j)})
					x.Then = append(x.Then, store.Command{Op: store.OpPut, Key: key(i + store.TxnOpsMax + j)})
					x.Otherwise = append(x.Otherwise, store.Command{Op: store.OpDelete, Key: key(i + 2*store.TxnOpsMax + j)})
				}
				cs = append(cs, store.Command{Op: store.OpTxn, Value: x.Encode()})
			}
			return cs
		}},
		{name: "expiry of long keys", keys: keyOf(store.KeySizeMax), n: 3000, value: store.DeletedValueMax, ttl: true},
		{name: "expiry of large values", keys: keyOf(8), n: 1200, value: 64 << 10, ttl: true},
		{name: "mixed", keys: keyOf(4), n: many, value: 100, ttl: true, do: func(key func(int) string) (cs []store.Command) {
			random := rand.New(rand.NewPCG(1, 2))
			for range many {
				switch k := key(random.IntN(2 * many)); random.IntN(200) {
				case 0:
					cs = append(cs, store.Command{Op: store.OpDeletePrefix, Key: k[:2]})
				case 1:
					cs = append(cs, store.Command{Op: store.OpPut, Key: k, Value: strings.Repeat("x", 100_000)})
				default:
					cs = append(cs, store.Command{Op: []store.Op{store.OpPut, store.OpDelete}[random.IntN(2)], Key: k})
				}
			}
			return cs
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := &eventsRig{t: t, store: store.New()}
			r.apply(store.RaiseLevel(2))
			value := strings.Repeat("v", tt.value)
			var load []store.Command
			for i := range tt.n {
				c := store.Command{Op: store.OpPut, Key: tt.keys(i), Value: value}
				if tt.ttl {
					c.Expires = 1
				}
				load = append(load, c)
			}
			r.applyAsLoop(load)
			if tt.do != nil {
				r.applyAsLoop(tt.do(tt.keys))
			}
			for tt.do == nil {
				due := r.store.Expired(1<<40, expireMax, batchSizeMax)
				if len(due) == 0 {
					break
				}
				r.applyChecked(due...)
			}
		})
	}
}

func deleteAll(func(int) string) []store.Command {
	return []store.Command{{Op: store.OpDeletePrefix, Key: "0"}}
}

// applyAsLoop applies commands in the batches that a loop makes of them.
func (r *eventsRig) applyAsLoop(commands []store.Command) {
	r.t.Helper()
	l := newLoop(time.Millisecond, func() {}, zap.NewNop())
	l.status.Store(&replicaStatus{level: store.LevelNewest})
	batches := []*batch{nil}
	var batch []store.Command
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
func (r *eventsRig) applyChecked(batch ...store.Command) {
	r.t.Helper()
	events := &r.store.State.Events
	before := events.End()
	for i, res := range r.apply(batch...) {
		if res.Status == store.StatusTooMany {
			r.t.Errorf("command %d, %d of %q, is refused", i, batch[i].Op, batch[i].Key)
		}
	}
	size, n := uint64(0), before
	for n < events.End() {
		part, _, ok := events.From(n)
		if !ok {
			r.t.Fatal("events of the newest entry have left the window")
		}
		for i := range part {
			size += part[i].Size()
		}
		n += uint64(len(part))
	}
	if size > store.EventBytesMaxDefault/2 || n-before > store.EventsMaxDefault/2 {
		r.t.Errorf("%d commands make %d events of %d bytes", len(batch), n-before, size)
	}
}
