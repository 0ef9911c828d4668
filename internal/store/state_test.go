package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// plainModel is what the state machine does, told as plainly as can be.
type plainModel struct {
	level   int
	elapsed int64 // of level 2: by which outcomes age
	counted int64 // up to which time elapsed was counted
	items   map[string]Item
	rv      uint64
	now     int64
	events  []Event
	retries map[string]plainRetry
	read    []string           // what the last command has read
	seen    map[[2]uint64]bool // session and seq of the batches that were applied
}

type plainRetry struct {
	digest [16]byte
	time   int64
	first  Result
}

func newPlainModel() *plainModel {
	return &plainModel{items: map[string]Item{}, retries: map[string]plainRetry{}, seen: map[[2]uint64]bool{}}
}

// batch applies commands, unless it has done so before.
func (m *plainModel) batch(h BatchHeader, commands []Command) (results []Result) {
	id := [2]uint64{h.Session, h.Seq}
	if m.seen[id] {
		return nil
	}
	m.seen[id] = true
	if m.level == 1 {
		m.now = max(m.now, h.Time)
		m.elapsed = m.now
	} else {
		m.now = h.Time
		if h.Time > m.counted {
			m.elapsed += min(h.Time-m.counted, AgeStepMillis)
		}
		if h.Time > m.counted || m.counted-h.Time > AgeStepMillis {
			m.counted = h.Time
		}
	}
	for _, c := range commands {
		results = append(results, m.apply(c))
	}
	return results
}

func (m *plainModel) apply(c Command) Result {
	if old, ok := m.retries[c.Retry.Key]; ok && c.Op != OpNop && m.elapsed-old.time <= RetryAgeMillis {
		if old.digest != c.Retry.Digest {
			return Result{Status: StatusRetryOther}
		}
		r := old.first
		r.Replayed = true
		return r
	}
	if c.Op == OpNop {
		return Result{}
	}
	m.version(func() { m.expireOverdue(c) })
	var r Result
	m.version(func() { r = m.execute(c) })
	r.RV, r.Key = m.rv, c.Key
	if c.Retry.Key != "" {
		kept := r
		if m.level >= 3 && len(m.read) > 0 {
			kept.Ops = nil
		}
		m.retries[c.Retry.Key] = plainRetry{c.Retry.Digest, m.elapsed, kept}
	}
	return r
}

// version gives the changes that f makes a version.
func (m *plainModel) version(f func()) {
	before := len(m.events)
	f()
	if len(m.events) > before {
		m.rv++
		m.events[len(m.events)-1].Last = true
	}
}

// expireOverdue expires what a command names and is overdue, at level 2.
func (m *plainModel) expireOverdue(c Command) {
	ops := []Command{c}
	if c.Op == OpTxn {
		t, err := DecodeTxn(c.Value)
		if err != nil {
			panic(err)
		}
		ops = nil
		for _, cond := range t.Compare {
			ops = append(ops, Command{Op: OpGet, Key: cond.Key})
		}
		ops = append(append(ops, t.Then...), t.Otherwise...)
	}
	for _, o := range ops {
		it, ok := m.items[o.Key]
		if m.level >= 2 && ok && it.Expires != 0 && it.Expires <= m.now && (o.Op == OpPut || o.Op == OpDelete || o.Op == OpGet) {
			m.change(Command{Op: OpExpire, Key: o.Key})
		}
	}
}

func (m *plainModel) execute(c Command) Result {
	m.read = nil
	old, exists := m.items[c.Key]
	ok := map[ConditionKind]bool{Always: true, IfMatch: exists && old.RV == c.Condition.RV, IfExists: exists, IfAbsent: !exists}[c.Condition.Kind]
	switch c.Op {
	case OpPut, OpDelete, OpExpire:
		if !ok {
			return Result{Status: StatusPrecondition, Current: old.RV}
		}
		return Result{Status: m.change(c)}
	case OpDeletePrefix:
		r := Result{Status: StatusDeleted}
		for _, key := range slices.Sorted(maps.Keys(m.items)) {
			if strings.HasPrefix(key, c.Key) {
				m.change(Command{Op: OpDelete, Key: key})
				r.Count++
			}
		}
		return r
	default:
		t, err := DecodeTxn(c.Value)
		if err != nil {
			panic(err)
		}
		r, ops := Result{Status: StatusSucceeded}, t.Then
		for _, cond := range t.Compare {
			it, exists := m.items[cond.Key]
			if !map[ComparisonKind]bool{
				ByVersion: it.RV == cond.RV, ByCreated: it.Created == cond.RV,
				ByExists: exists, ByAbsent: !exists, ByValue: exists && it.Value == cond.Value,
			}[cond.Kind] {
				r.Status, ops = StatusFailed, t.Otherwise
			}
		}
		for _, o := range ops {
			if o.Op == OpGet {
				m.read = append(m.read, o.Key)
			}
			if o.Op != OpGet {
				r.Ops = append(r.Ops, OpResult{Status: m.change(o)})
			} else if it, ok := m.items[o.Key]; ok {
				r.Ops = append(r.Ops, OpResult{Status: StatusFound, Item: it})
			} else {
				r.Ops = append(r.Ops, OpResult{Status: StatusNotFound})
			}
		}
		return r
	}
}

// change puts or deletes one key.
func (m *plainModel) change(c Command) Status {
	old, exists := m.items[c.Key]
	e := Event{RV: m.rv + 1, Prev: old.RV, Time: m.now, Key: c.Key, Item: old}
	r := StatusDeleted
	switch {
	case c.Op == OpPut:
		e.Item = Item{Value: c.Value, RV: e.RV, Created: e.RV, Expires: c.Deadline(m.now), ContentType: c.ContentType}
		e.Kind, r = EventAdded, StatusCreated
		if exists {
			e.Item.Created = old.Created
			e.Kind, r = EventModified, StatusReplaced
		}
		m.items[c.Key] = e.Item
	case !exists:
		return StatusNotFound
	default:
		e.Kind = EventDeleted
		if c.Op == OpExpire {
			e.Kind = EventExpired
		}
		delete(m.items, c.Key)
	}
	m.events = append(m.events, e)
	return r
}

// drawCommand returns a command that may do something: few keys, few versions.
func drawCommand(t *rapid.T, m *plainModel) Command {
	key := rapid.SampledFrom([]string{"a", "a/1", "a/2", "a/2/x", "b", "b\xff", "\xff\xff", "c"})
	value := rapid.SampledFrom([]string{"", "x", "y", "\x00\xff"})
	version := rapid.Uint64Range(0, m.rv+1)
	expires := func(t *rapid.T) int64 {
		if rapid.IntRange(0, 2).Draw(t, "ttl") > 0 {
			return 0
		}
		return max(m.now, 1_000_000) + rapid.Int64Range(-10, 5000).Draw(t, "expires")
	}
	contentType := func(t *rapid.T) string {
		if m.level < 3 {
			return ""
		}
		return rapid.SampledFrom([]string{"", "", "a/b", "text/plain; charset=utf-8"}).Draw(t, "content type")
	}
	c := Command{Key: key.Draw(t, "key")}
	switch rapid.SampledFrom([]Op{OpNop, OpPut, OpPut, OpPut, OpDelete, OpDelete, OpDeletePrefix, OpTxn, OpTxn}).Draw(t, "op") {
	case OpNop:
		c.Op = OpNop
	case OpPut:
		c.Op, c.Value, c.Expires, c.ContentType = OpPut, value.Draw(t, "value"), expires(t), contentType(t)
	case OpDelete:
		c.Op = OpDelete
	case OpDeletePrefix:
		c.Op, c.Key = OpDeletePrefix, c.Key[:1]
	case OpTxn:
		var tx Txn
		for range rapid.IntRange(0, 2).Draw(t, "compare") {
			k := key.Draw(t, "key")
			rv := m.items[k].RV // so that it often holds
			if rapid.IntRange(0, 3).Draw(t, "other") == 0 {
				rv = version.Draw(t, "version")
			}
			tx.Compare = append(tx.Compare, Comparison{Kind: rapid.SampledFrom([]ComparisonKind{ByVersion, ByCreated, ByExists, ByAbsent, ByValue}).Draw(t, "comparison"), Key: k, RV: rv, Value: value.Draw(t, "value")})
		}
		for _, ops := range []*[]Command{&tx.Then, &tx.Otherwise} {
			for range rapid.IntRange(0, 4).Draw(t, "ops") {
				o := Command{Op: rapid.SampledFrom([]Op{OpPut, OpDelete, OpGet}).Draw(t, "op"), Key: key.Draw(t, "key")}
				if o.Op == OpPut {
					o.Value, o.Expires, o.ContentType = value.Draw(t, "value"), expires(t), contentType(t)
				}
				*ops = append(*ops, o)
			}
		}
		c = Command{Op: OpTxn, Value: tx.Encode()}
	}
	if c.Op == OpPut || c.Op == OpDelete {
		c.Condition.Kind = rapid.SampledFrom([]ConditionKind{Always, Always, IfMatch, IfMatch, IfExists, IfAbsent}).Draw(t, "condition")
		if c.Condition.Kind == IfMatch {
			c.Condition.RV = m.items[c.Key].RV
			if rapid.IntRange(0, 3).Draw(t, "other") == 0 {
				c.Condition.RV = version.Draw(t, "version")
			}
		}
	}
	if rapid.IntRange(0, 2).Draw(t, "retry") == 0 {
		c.Retry.Key = rapid.SampledFrom([]string{"r", "s", "t"}).Draw(t, "retry key")
		c.Retry.Digest[0] = rapid.ByteRange(0, 1).Draw(t, "digest")
		if m.level >= 3 {
			c.Retry.Client = rapid.Uint64Range(0, 2).Draw(t, "client")
		}
	}
	return c
}

// The state machine does what the plain model does, whatever is restored, sent
// twice or late in between.
func TestKVStore_Model(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m, s := newPlainModel(), New()
		other := New() // of another member: applies the same, restores at other times
		m.level = rapid.IntRange(LevelFirst, LevelNewest).Draw(t, "level")
		for _, s := range []*Store{s, other} {
			s.State.SetLevel(m.level)
		}
		now := int64(1_000_000)
		type sent struct {
			h        BatchHeader
			commands []Command
		}
		var batches []sent
		seqs := map[uint64]uint64{}
		apply := func(b sent) {
			var data []byte
			for i := range b.commands {
				data = b.commands[i].AppendTo(data)
			}
			var out []Result
			fresh, err := s.Apply(s.Applied()+1, 1, b.h, data, &out)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := other.Apply(other.Applied()+1, 1, b.h, data, nil); err != nil {
				t.Fatal(err)
			}
			for i := range out {
				if len(out[i].Ops) == 0 {
					out[i].Ops = nil // a snapshot does not tell it from an empty one
				}
			}
			wantFresh := !m.seen[[2]uint64{b.h.Session, b.h.Seq}]
			if want := m.batch(b.h, b.commands); fresh != wantFresh || !reflect.DeepEqual(out, want) {
				t.Fatalf("%+v\nfresh %v, %+v\nwant %v, %+v", b, fresh, out, wantFresh, want)
			}
		}
		propose := func(commands []Command) {
			session := rapid.Uint64Range(1, 3).Draw(t, "session")
			// Some numbers are lost on their way, or arrive later.
			seqs[session] += rapid.SampledFrom([]uint64{1, 1, 1, 2, 7}).Draw(t, "step")
			now += rapid.SampledFrom([]int64{0, 1, 1000, -500, AgeStepMillis, -2 * AgeStepMillis, RetryAgeMillis / 2}).Draw(t, "time")
			b := sent{BatchHeader{Session: session, Seq: seqs[session], Time: now}, commands}
			batches = append(batches, b)
			apply(b)
		}
		roundTrip := func(s *Store) {
			b := stateBytes(t, s.Snapshot())
			st, err := ReadState(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if again := stateBytes(t, st); !bytes.Equal(b, again) {
				t.Fatalf("a restored state is written as %d other bytes, not %d", len(again), len(b))
			}
			s.Restore(st)
		}
		t.Repeat(map[string]func(*rapid.T){
			"batch": func(t *rapid.T) {
				var commands []Command
				for range rapid.IntRange(0, 4).Draw(t, "commands") {
					commands = append(commands, drawCommand(t, m))
				}
				propose(commands)
			},
			"send again": func(t *rapid.T) {
				if len(batches) == 0 {
					t.Skip("none")
				}
				apply(rapid.SampledFrom(batches).Draw(t, "batch"))
			},
			"expire": func(t *rapid.T) {
				at := m.now + rapid.Int64Range(0, 2000).Draw(t, "after")
				due := s.Expired(at, 3, 1<<20)
				want := 0
				for _, it := range m.items {
					if it.Expires != 0 && it.Expires <= at {
						want++
					}
				}
				if len(due) != min(want, 3) {
					t.Fatalf("%d are due, want %d", len(due), want)
				}
				for i, c := range due {
					it := m.items[c.Key]
					if it.Expires == 0 || it.Expires > at || i > 0 && it.Expires < m.items[due[i-1].Key].Expires {
						t.Fatalf("%+v is due at %d", c, at)
					}
				}
				if rapid.Bool().Draw(t, "too late") && len(due) > 0 {
					propose([]Command{{Op: OpPut, Key: due[0].Key, Value: "newer"}})
				}
				propose(due)
			},
			"snapshot":              func(*rapid.T) { roundTrip(s) },
			"snapshot of the other": func(*rapid.T) { roundTrip(other) },
			"": func(t *rapid.T) {
				checkStore(t, s, m)
				if !bytes.Equal(stateBytes(t, s.Snapshot()), stateBytes(t, other.Snapshot())) {
					t.Fatal("two members at the same index write different snapshots")
				}
			},
		})
	})
}

func stateBytes(t tester, st State) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := st.Encode(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// checkStore compares all that can be read.
func checkStore(t tester, s *Store, m *plainModel) {
	t.Helper()
	items, rv := s.List("", "", len(m.items)+1)
	if rv != m.rv || s.Version() != m.rv || !slices.Equal(items, modelList(m.items, "", "")) {
		t.Fatalf("version %d, %+v\nwant %d, %+v", rv, items, m.rv, m.items)
	}
	size, expiring := uint64(0), 0
	for key, it := range m.items {
		if got, _, ok := s.Get(key); !ok || got != it {
			t.Fatalf("%q is %+v, want %+v", key, got, it)
		}
		size += ItemSize(key, it)
		if it.Expires != 0 {
			expiring++
		}
	}
	if s.Size() != size || s.State.Expiry.Len() != expiring {
		t.Fatalf("size %d, want %d; %d expire, want %d", s.Size(), size, s.State.Expiry.Len(), expiring)
	}
	var events []Event
	n, ok := s.SeekEvent(0)
	for part := []Event{{}}; len(part) > 0; n += uint64(len(part)) {
		var inWindow bool
		if part, _, inWindow = s.EventsFrom(n); !ok || !inWindow {
			t.Fatalf("event %d is not in the window", n)
		}
		events = append(events, part...)
	}
	if !slices.Equal(events, m.events) {
		t.Fatalf("events %+v\nwant %+v", events, m.events)
	}
}

// A command that was withdrawn never happened, so its Idempotency-Key is free.
func TestKVStore_WithdrawnCommandIsNotRemembered(t *testing.T) {
	w := &writer{t: t, store: New()}
	c := Command{Op: OpPut, Key: "k", Value: "v", Retry: RetryID{Key: "r"}}
	data := c.AppendTo(nil)
	data[0] = byte(OpNop) // as batch.withdraw does
	if _, err := w.store.Apply(1, 1, BatchHeader{Session: 2, Seq: 1}, data, nil); err != nil {
		t.Fatal(err)
	}
	if r := w.apply(c); r.Status != StatusCreated || r.Replayed || r.RV != 1 {
		t.Errorf("%+v", r)
	}
	if r := w.apply(c); r.Status != StatusCreated || !r.Replayed || r.RV != 1 {
		t.Errorf("%+v", r)
	}
}

func TestKVStore_TxnResultIsBounded(t *testing.T) {
	w := &writer{t: t, store: New()}
	half := strings.Repeat("v", TxnResultMax/2)
	w.put("old", half)
	get := func(key string, n int) []Command {
		return slices.Repeat([]Command{{Op: OpGet, Key: key}}, n)
	}
	put := []Command{{Op: OpPut, Key: "new", Value: half}}
	for i, tt := range []struct {
		then []Command
		want Status
	}{
		{get("old", 2), StatusSucceeded},
		{get("old", 3), StatusTooMany},
		{append(get("none", 3), get("old", 2)...), StatusSucceeded},
		{append(slices.Clone(put), get("new", 3)...), StatusTooMany},
		{append(slices.Clone(put), get("new", 2)...), StatusSucceeded},
		{append([]Command{{Op: OpDelete, Key: "old"}}, get("old", 9)...), StatusSucceeded},
	} {
		before := w.store.Version()
		r := w.apply(Command{Op: OpTxn, Value: (&Txn{Then: tt.then}).Encode()})
		if r.Status != tt.want || r.Status == StatusTooMany && (r.Ops != nil || w.store.Version() != before) {
			t.Errorf("%d: status %d, %d results", i, r.Status, len(r.Ops))
		}
	}
}

func TestKVStore_RefusesGapsAndUnknownCommands(t *testing.T) {
	s := New()
	if _, err := s.Apply(2, 1, BatchHeader{Session: 1, Seq: 1}, nil, nil); err == nil {
		t.Error("index 2 was applied after 0")
	}
	if err := s.Skip(2, 1); err == nil {
		t.Error("index 2 was skipped after 0")
	}
	unknown := Command{Op: 200, Key: "k"}
	if _, err := s.Apply(1, 1, BatchHeader{Session: 1, Seq: 1}, unknown.AppendTo(nil), nil); err == nil || !strings.Contains(err.Error(), "newer than this program") {
		t.Error(err)
	}
	if _, err := s.Apply(1, 1, BatchHeader{Session: 1, Seq: 2}, []byte{byte(OpPut)}, nil); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}

// randomHistory applies entries that follow from a seed, through restarts at
// some places, and returns the digest of the last snapshot.
func randomHistory(t tester, seed uint64, restart bool) string {
	random := rand.New(rand.NewPCG(seed, 1))
	s := New()
	s.State.SetLevel(LevelFirst + int(seed%LevelNewest))
	s.State.Members[2] = Member{ID: 2, PeerURL: "http://b:1", extra: `{"b":1,"c":2}`}
	s.State.Members[1] = Member{ID: 1, PeerURL: "http://a:1"}
	for id := range uint64(20) {
		s.State.Removed[id+10] = true
	}
	key := func() string { return fmt.Sprintf("key-%d", random.IntN(500)) }
	now := int64(1_700_000_000_000)
	for i := range uint64(3000) {
		var data []byte
		for range random.IntN(4) {
			c := Command{Op: OpPut, Key: key(), Value: strings.Repeat("v", random.IntN(300))}
			switch random.IntN(10) {
			case 0:
				c = Command{Op: OpDelete, Key: key()}
			case 1:
				c = Command{Op: OpDeletePrefix, Key: key()}
			case 2:
				c.Expires = now + random.Int64N(100_000)
			case 3:
				c = Command{Op: OpTxn, Value: (&Txn{Then: []Command{{Op: OpGet, Key: key()}, c, {Op: OpDelete, Key: "x"}}}).Encode()}
			}
			if random.IntN(3) == 0 {
				c.Retry = RetryID{Key: strconv.Itoa(random.IntN(400)), Digest: [16]byte{byte(random.IntN(2))}}
			}
			data = c.AppendTo(data)
		}
		now += random.Int64N(20_000)
		for _, c := range s.Expired(now-random.Int64N(10_000), 10, 1<<20) {
			data = c.AppendTo(data)
		}
		h := BatchHeader{Session: random.Uint64N(200), Seq: i, Time: now}
		if _, err := s.Apply(i+1, 1, h, data, nil); err != nil {
			t.Fatal(err)
		}
		if restart && random.IntN(300) == 0 {
			st, err := ReadState(bytes.NewReader(stateBytes(t, s.Snapshot())))
			if err != nil {
				t.Fatal(err)
			}
			s.Restore(st)
		} else if !restart {
			random.IntN(300)
		}
	}
	return fmt.Sprintf("%x", sha256.Sum256(stateBytes(t, s.Snapshot())))
}

const historySeedVariable = "RAFTRV_TEST_HISTORY_SEED"

// Equal states are written as equal bytes in every process, whatever its map
// iteration, scheduling and history of restarts.
func TestKVStore_SameBytesInEveryProcess(t *testing.T) {
	if s := os.Getenv(historySeedVariable); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("digest", randomHistory(t, seed, false))
		return
	}
	seed := rand.Uint64()
	want := randomHistory(t, seed, true)
	for _, procs := range []string{"1", "4"} {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), "GOMAXPROCS="+procs, fmt.Sprintf("%s=%d", historySeedVariable, seed))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if !strings.Contains(string(out), "digest "+want+"\n") {
			t.Errorf("seed %d, GOMAXPROCS %s: %s, want %s", seed, procs, out, want)
		}
	}
}

// A batch is applied once, in whatever order those of a session arrive. What
// lies too far back counts as applied.
func TestSessions_Window(t *testing.T) {
	st := NewState()
	s := st.Sessions
	first := func(session, seq uint64) bool {
		st.Index++
		return st.first(BatchHeader{Session: session, Seq: seq})
	}
	const far = 5 * sessionWindow
	for i, step := range []struct {
		seq  uint64
		want bool
	}{
		{3, true}, {1, true}, {3, false}, {1, false}, {2, true}, {2, false},
		{sessionWindow, true}, {4, true}, {4, false},
		{far, true}, {far, false}, {far - sessionWindow, false}, {far - sessionWindow + 1, true}, {far - sessionWindow + 1, false},
		{far + 1, true}, {far - sessionWindow + 1, false}, {far - sessionWindow + 2, true}, {5, false},
	} {
		if got := first(7, step.seq); got != step.want {
			t.Errorf("step %d, %d: %v", i, step.seq, got)
		}
	}
	// The sessions that were used longest ago make room, be one of them 0.
	for id := range uint64(sessionsMax) {
		if id != 7 && !first(id, 1) {
			t.Errorf("session %d is known", id)
		}
	}
	if first(7, far) || first(0, 1) || len(s) != sessionsMax { // which makes 1 the oldest
		t.Errorf("%d sessions", len(s))
	}
	if !first(sessionsMax, 1) || len(s) != sessionsMax {
		t.Errorf("%d sessions", len(s))
	}
	if s[1] != nil || s[0] == nil || s[7] == nil || s[2] == nil {
		t.Error("another session than 1 was forgotten")
	}
	digest := uint64(0)
	for id, session := range s {
		digest += session.digest(id)
	}
	if st.SessionsDigest != digest {
		t.Error("the digest is not that of the sessions")
	}
}

// A key that was written after its deadline was noticed stays: what expires is
// that version, and no other.
func TestKVStore_ExpiryIsOfOneVersion(t *testing.T) {
	w := &writer{t: t, store: New()}
	w.apply(Command{Op: OpPut, Key: "k", Value: "old", Expires: 1000})
	due := w.store.Expired(1000, 10, 1<<20)
	if len(due) != 1 || due[0].Key != "k" {
		t.Fatalf("%+v are due", due)
	}
	w.apply(Command{Op: OpPut, Key: "k", Value: "renewed", Expires: 5000})
	if r := w.apply(due[0]); r.Status != StatusPrecondition {
		t.Errorf("%+v", r)
	}
	if it, _, ok := w.store.Get("k"); !ok || it.Value != "renewed" {
		t.Errorf("the renewed key is gone: %+v", it)
	}
	for _, c := range w.store.Expired(5000, 10, 1<<20) {
		w.apply(c)
	}
	if _, _, ok := w.store.Get("k"); ok {
		t.Error("it never expires")
	}
}

// BenchmarkKVStore_Apply applies entries of so many writes, of several kinds.
func BenchmarkKVStore_Apply(b *testing.B) {
	for _, n := range []int{1, 64} {
		for _, kind := range []string{"put", "retry", "txn"} {
			b.Run(fmt.Sprintf("%s/commands=%d", kind, n), func(b *testing.B) {
				s := New()
				s.State.SetLevel(LevelNewest)
				value := strings.Repeat("v", 100)
				index := uint64(0)
				var data []byte
				var out []Result
				for b.Loop() {
					index++
					data = data[:0]
					for i := range n {
						c := Command{Op: OpPut, Key: "key/" + strconv.Itoa((int(index)*7919+i)%10_000), Value: value}
						switch kind {
						case "retry":
							c.Retry.Key = strconv.Itoa(int(index)*n + i)
						case "txn":
							t := Txn{Compare: []Comparison{{Kind: ByExists, Key: c.Key}}, Then: []Command{c, {Op: OpGet, Key: c.Key}}, Otherwise: []Command{c}}
							c = Command{Op: OpTxn, Value: t.Encode()}
						}
						data = c.AppendTo(data)
					}
					if _, err := s.Apply(index, 1, BatchHeader{Session: 1 + index%3, Seq: index, Time: int64(index)}, data, &out); err != nil {
						b.Fatal(err)
					}
					out = out[:0]
				}
			})
		}
	}
}
