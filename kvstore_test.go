package main

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
	items   map[string]item
	rv      uint64
	now     int64
	events  []event
	retries map[string]plainRetry
	read    []string           // what the last command has read
	seen    map[[2]uint64]bool // session and seq of the batches that were applied
}

type plainRetry struct {
	digest [16]byte
	time   int64
	first  result
}

func newPlainModel() *plainModel {
	return &plainModel{items: map[string]item{}, retries: map[string]plainRetry{}, seen: map[[2]uint64]bool{}}
}

// batch applies commands, unless it has done so before.
func (m *plainModel) batch(h batchHeader, commands []command) (results []result) {
	id := [2]uint64{h.session, h.seq}
	if m.seen[id] {
		return nil
	}
	m.seen[id] = true
	if m.level == 1 {
		m.now = max(m.now, h.time)
		m.elapsed = m.now
	} else {
		m.now = h.time
		if h.time > m.counted {
			m.elapsed += min(h.time-m.counted, ageStepMillis)
		}
		if h.time > m.counted || m.counted-h.time > ageStepMillis {
			m.counted = h.time
		}
	}
	for _, c := range commands {
		results = append(results, m.apply(c))
	}
	return results
}

func (m *plainModel) apply(c command) result {
	if old, ok := m.retries[c.retry.key]; ok && c.op != opNop && m.elapsed-old.time <= retryAgeMillis {
		if old.digest != c.retry.digest {
			return result{status: statusRetryOther}
		}
		r := old.first
		r.replayed = true
		return r
	}
	if c.op == opNop {
		return result{}
	}
	m.version(func() { m.expireOverdue(c) })
	var r result
	m.version(func() { r = m.execute(c) })
	r.rv, r.key = m.rv, c.key
	if c.retry.key != "" {
		kept := r
		if m.level >= 3 && len(m.read) > 0 {
			kept.ops = nil
		}
		m.retries[c.retry.key] = plainRetry{c.retry.digest, m.elapsed, kept}
	}
	return r
}

// version gives the changes that f makes a version.
func (m *plainModel) version(f func()) {
	before := len(m.events)
	f()
	if len(m.events) > before {
		m.rv++
		m.events[len(m.events)-1].last = true
	}
}

// expireOverdue expires what a command names and is overdue, at level 2.
func (m *plainModel) expireOverdue(c command) {
	ops := []command{c}
	if c.op == opTxn {
		t, err := decodeTxn(c.value)
		if err != nil {
			panic(err)
		}
		ops = nil
		for _, cond := range t.compare {
			ops = append(ops, command{op: opGet, key: cond.key})
		}
		ops = append(append(ops, t.then...), t.otherwise...)
	}
	for _, o := range ops {
		it, ok := m.items[o.key]
		if m.level >= 2 && ok && it.expires != 0 && it.expires <= m.now && (o.op == opPut || o.op == opDelete || o.op == opGet) {
			m.change(command{op: opExpire, key: o.key})
		}
	}
}

func (m *plainModel) execute(c command) result {
	m.read = nil
	old, exists := m.items[c.key]
	ok := map[conditionKind]bool{always: true, ifMatch: exists && old.rv == c.condition.rv, ifExists: exists, ifAbsent: !exists}[c.condition.kind]
	switch c.op {
	case opPut, opDelete, opExpire:
		if !ok {
			return result{status: statusPrecondition, current: old.rv}
		}
		return result{status: m.change(c)}
	case opDeletePrefix:
		r := result{status: statusDeleted}
		for _, key := range slices.Sorted(maps.Keys(m.items)) {
			if strings.HasPrefix(key, c.key) {
				m.change(command{op: opDelete, key: key})
				r.count++
			}
		}
		return r
	default:
		t, err := decodeTxn(c.value)
		if err != nil {
			panic(err)
		}
		r, ops := result{status: statusSucceeded}, t.then
		for _, cond := range t.compare {
			it, exists := m.items[cond.key]
			if !map[comparisonKind]bool{
				byVersion: it.rv == cond.rv, byCreated: it.created == cond.rv,
				byExists: exists, byAbsent: !exists, byValue: exists && it.value == cond.value,
			}[cond.kind] {
				r.status, ops = statusFailed, t.otherwise
			}
		}
		for _, o := range ops {
			if o.op == opGet {
				m.read = append(m.read, o.key)
			}
			if o.op != opGet {
				r.ops = append(r.ops, opResult{status: m.change(o)})
			} else if it, ok := m.items[o.key]; ok {
				r.ops = append(r.ops, opResult{status: statusFound, item: it})
			} else {
				r.ops = append(r.ops, opResult{status: statusNotFound})
			}
		}
		return r
	}
}

// change puts or deletes one key.
func (m *plainModel) change(c command) status {
	old, exists := m.items[c.key]
	e := event{rv: m.rv + 1, prev: old.rv, time: m.now, key: c.key, item: old}
	r := statusDeleted
	switch {
	case c.op == opPut:
		e.item = item{value: c.value, rv: e.rv, created: e.rv, expires: c.deadline(m.now), contentType: c.contentType}
		e.kind, r = eventAdded, statusCreated
		if exists {
			e.item.created = old.created
			e.kind, r = eventModified, statusReplaced
		}
		m.items[c.key] = e.item
	case !exists:
		return statusNotFound
	default:
		e.kind = eventDeleted
		if c.op == opExpire {
			e.kind = eventExpired
		}
		delete(m.items, c.key)
	}
	m.events = append(m.events, e)
	return r
}

// drawCommand returns a command that may do something: few keys, few versions.
func drawCommand(t *rapid.T, m *plainModel) command {
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
	c := command{key: key.Draw(t, "key")}
	switch rapid.SampledFrom([]op{opNop, opPut, opPut, opPut, opDelete, opDelete, opDeletePrefix, opTxn, opTxn}).Draw(t, "op") {
	case opNop:
		c.op = opNop
	case opPut:
		c.op, c.value, c.expires, c.contentType = opPut, value.Draw(t, "value"), expires(t), contentType(t)
	case opDelete:
		c.op = opDelete
	case opDeletePrefix:
		c.op, c.key = opDeletePrefix, c.key[:1]
	case opTxn:
		var tx txn
		for range rapid.IntRange(0, 2).Draw(t, "compare") {
			k := key.Draw(t, "key")
			rv := m.items[k].rv // so that it often holds
			if rapid.IntRange(0, 3).Draw(t, "other") == 0 {
				rv = version.Draw(t, "version")
			}
			tx.compare = append(tx.compare, comparison{kind: rapid.SampledFrom([]comparisonKind{byVersion, byCreated, byExists, byAbsent, byValue}).Draw(t, "comparison"), key: k, rv: rv, value: value.Draw(t, "value")})
		}
		for _, ops := range []*[]command{&tx.then, &tx.otherwise} {
			for range rapid.IntRange(0, 4).Draw(t, "ops") {
				o := command{op: rapid.SampledFrom([]op{opPut, opDelete, opGet}).Draw(t, "op"), key: key.Draw(t, "key")}
				if o.op == opPut {
					o.value, o.expires, o.contentType = value.Draw(t, "value"), expires(t), contentType(t)
				}
				*ops = append(*ops, o)
			}
		}
		c = command{op: opTxn, value: tx.encode()}
	}
	if c.op == opPut || c.op == opDelete {
		c.condition.kind = rapid.SampledFrom([]conditionKind{always, always, ifMatch, ifMatch, ifExists, ifAbsent}).Draw(t, "condition")
		if c.condition.kind == ifMatch {
			c.condition.rv = m.items[c.key].rv
			if rapid.IntRange(0, 3).Draw(t, "other") == 0 {
				c.condition.rv = version.Draw(t, "version")
			}
		}
	}
	if rapid.IntRange(0, 2).Draw(t, "retry") == 0 {
		c.retry.key = rapid.SampledFrom([]string{"r", "s", "t"}).Draw(t, "retry key")
		c.retry.digest[0] = rapid.ByteRange(0, 1).Draw(t, "digest")
		if m.level >= 3 {
			c.retry.client = rapid.Uint64Range(0, 2).Draw(t, "client")
		}
	}
	return c
}

// The state machine does what the plain model does, whatever is restored, sent
// twice or late in between.
func TestKVStore_Model(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m, s := newPlainModel(), newKVStore()
		other := newKVStore() // of another member: applies the same, restores at other times
		m.level = rapid.IntRange(levelFirst, levelNewest).Draw(t, "level")
		for _, s := range []*kvstore{s, other} {
			s.state.setLevel(m.level)
		}
		now := int64(1_000_000)
		type sent struct {
			h        batchHeader
			commands []command
		}
		var batches []sent
		seqs := map[uint64]uint64{}
		apply := func(b sent) {
			var data []byte
			for i := range b.commands {
				data = b.commands[i].appendTo(data)
			}
			var out []result
			fresh, err := s.apply(s.applied()+1, 1, b.h, data, &out)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := other.apply(other.applied()+1, 1, b.h, data, nil); err != nil {
				t.Fatal(err)
			}
			for i := range out {
				if len(out[i].ops) == 0 {
					out[i].ops = nil // a snapshot does not tell it from an empty one
				}
			}
			wantFresh := !m.seen[[2]uint64{b.h.session, b.h.seq}]
			if want := m.batch(b.h, b.commands); fresh != wantFresh || !reflect.DeepEqual(out, want) {
				t.Fatalf("%+v\nfresh %v, %+v\nwant %v, %+v", b, fresh, out, wantFresh, want)
			}
		}
		propose := func(commands []command) {
			session := rapid.Uint64Range(1, 3).Draw(t, "session")
			// Some numbers are lost on their way, or arrive later.
			seqs[session] += rapid.SampledFrom([]uint64{1, 1, 1, 2, 7}).Draw(t, "step")
			now += rapid.SampledFrom([]int64{0, 1, 1000, -500, ageStepMillis, -2 * ageStepMillis, retryAgeMillis / 2}).Draw(t, "time")
			b := sent{batchHeader{session: session, seq: seqs[session], time: now}, commands}
			batches = append(batches, b)
			apply(b)
		}
		roundTrip := func(s *kvstore) {
			b := stateBytes(t, s.snapshot())
			st, err := readState(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if again := stateBytes(t, st); !bytes.Equal(b, again) {
				t.Fatalf("a restored state is written as %d other bytes, not %d", len(again), len(b))
			}
			s.restore(st)
		}
		t.Repeat(map[string]func(*rapid.T){
			"batch": func(t *rapid.T) {
				var commands []command
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
				due := s.expired(at, 3, 1<<20)
				want := 0
				for _, it := range m.items {
					if it.expires != 0 && it.expires <= at {
						want++
					}
				}
				if len(due) != min(want, 3) {
					t.Fatalf("%d are due, want %d", len(due), want)
				}
				for i, c := range due {
					it := m.items[c.key]
					if it.expires == 0 || it.expires > at || i > 0 && it.expires < m.items[due[i-1].key].expires {
						t.Fatalf("%+v is due at %d", c, at)
					}
				}
				if rapid.Bool().Draw(t, "too late") && len(due) > 0 {
					propose([]command{{op: opPut, key: due[0].key, value: "newer"}})
				}
				propose(due)
			},
			"snapshot":              func(*rapid.T) { roundTrip(s) },
			"snapshot of the other": func(*rapid.T) { roundTrip(other) },
			"": func(t *rapid.T) {
				checkStore(t, s, m)
				if !bytes.Equal(stateBytes(t, s.snapshot()), stateBytes(t, other.snapshot())) {
					t.Fatal("two members at the same index write different snapshots")
				}
			},
		})
	})
}

func stateBytes(t tester, st state) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := st.writeTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// checkStore compares all that can be read.
func checkStore(t tester, s *kvstore, m *plainModel) {
	t.Helper()
	items, rv := s.list("", "", len(m.items)+1)
	if rv != m.rv || s.version() != m.rv || !slices.Equal(items, modelList(m.items, "", "")) {
		t.Fatalf("version %d, %+v\nwant %d, %+v", rv, items, m.rv, m.items)
	}
	size, expiring := uint64(0), 0
	for key, it := range m.items {
		if got, _, ok := s.get(key); !ok || got != it {
			t.Fatalf("%q is %+v, want %+v", key, got, it)
		}
		size += itemSize(key, it)
		if it.expires != 0 {
			expiring++
		}
	}
	if s.size() != size || s.state.expiry.Len() != expiring {
		t.Fatalf("size %d, want %d; %d expire, want %d", s.size(), size, s.state.expiry.Len(), expiring)
	}
	var events []event
	n, ok := s.seekEvent(0)
	for part := []event{{}}; len(part) > 0; n += uint64(len(part)) {
		var inWindow bool
		if part, _, inWindow = s.eventsFrom(n); !ok || !inWindow {
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
	w := &writer{t: t, store: newKVStore()}
	c := command{op: opPut, key: "k", value: "v", retry: retryID{key: "r"}}
	data := c.appendTo(nil)
	data[0] = byte(opNop) // as batch.withdraw does
	if _, err := w.store.apply(1, 1, batchHeader{session: 2, seq: 1}, data, nil); err != nil {
		t.Fatal(err)
	}
	if r := w.apply(c); r.status != statusCreated || r.replayed || r.rv != 1 {
		t.Errorf("%+v", r)
	}
	if r := w.apply(c); r.status != statusCreated || !r.replayed || r.rv != 1 {
		t.Errorf("%+v", r)
	}
}

func TestKVStore_TxnResultIsBounded(t *testing.T) {
	w := &writer{t: t, store: newKVStore()}
	half := strings.Repeat("v", txnResultMax/2)
	w.put("old", half)
	get := func(key string, n int) []command {
		return slices.Repeat([]command{{op: opGet, key: key}}, n)
	}
	put := []command{{op: opPut, key: "new", value: half}}
	for i, tt := range []struct {
		then []command
		want status
	}{
		{get("old", 2), statusSucceeded},
		{get("old", 3), statusTooMany},
		{append(get("none", 3), get("old", 2)...), statusSucceeded},
		{append(slices.Clone(put), get("new", 3)...), statusTooMany},
		{append(slices.Clone(put), get("new", 2)...), statusSucceeded},
		{append([]command{{op: opDelete, key: "old"}}, get("old", 9)...), statusSucceeded},
	} {
		before := w.store.version()
		r := w.apply(command{op: opTxn, value: (&txn{then: tt.then}).encode()})
		if r.status != tt.want || r.status == statusTooMany && (r.ops != nil || w.store.version() != before) {
			t.Errorf("%d: status %d, %d results", i, r.status, len(r.ops))
		}
	}
}

func TestKVStore_RefusesGapsAndUnknownCommands(t *testing.T) {
	s := newKVStore()
	if _, err := s.apply(2, 1, batchHeader{session: 1, seq: 1}, nil, nil); err == nil {
		t.Error("index 2 was applied after 0")
	}
	if err := s.skip(2, 1); err == nil {
		t.Error("index 2 was skipped after 0")
	}
	unknown := command{op: 200, key: "k"}
	if _, err := s.apply(1, 1, batchHeader{session: 1, seq: 1}, unknown.appendTo(nil), nil); err == nil || !strings.Contains(err.Error(), "newer than this program") {
		t.Error(err)
	}
	if _, err := s.apply(1, 1, batchHeader{session: 1, seq: 2}, []byte{byte(opPut)}, nil); !errors.Is(err, errMalformed) {
		t.Error(err)
	}
}

// randomHistory applies entries that follow from a seed, through restarts at
// some places, and returns the digest of the last snapshot.
func randomHistory(t tester, seed uint64, restart bool) string {
	random := rand.New(rand.NewPCG(seed, 1))
	s := newKVStore()
	s.state.setLevel(levelFirst + int(seed%levelNewest))
	s.state.members[2] = member{ID: 2, PeerURL: "http://b:1", extra: `{"b":1,"c":2}`}
	s.state.members[1] = member{ID: 1, PeerURL: "http://a:1"}
	for id := range uint64(20) {
		s.state.removed[id+10] = true
	}
	key := func() string { return fmt.Sprintf("key-%d", random.IntN(500)) }
	now := int64(1_700_000_000_000)
	for i := range uint64(3000) {
		var data []byte
		for range random.IntN(4) {
			c := command{op: opPut, key: key(), value: strings.Repeat("v", random.IntN(300))}
			switch random.IntN(10) {
			case 0:
				c = command{op: opDelete, key: key()}
			case 1:
				c = command{op: opDeletePrefix, key: key()}
			case 2:
				c.expires = now + random.Int64N(100_000)
			case 3:
				c = command{op: opTxn, value: (&txn{then: []command{{op: opGet, key: key()}, c, {op: opDelete, key: "x"}}}).encode()}
			}
			if random.IntN(3) == 0 {
				c.retry = retryID{key: strconv.Itoa(random.IntN(400)), digest: [16]byte{byte(random.IntN(2))}}
			}
			data = c.appendTo(data)
		}
		now += random.Int64N(20_000)
		for _, c := range s.expired(now-random.Int64N(10_000), 10, 1<<20) {
			data = c.appendTo(data)
		}
		h := batchHeader{session: random.Uint64N(200), seq: i, time: now}
		if _, err := s.apply(i+1, 1, h, data, nil); err != nil {
			t.Fatal(err)
		}
		if restart && random.IntN(300) == 0 {
			st, err := readState(bytes.NewReader(stateBytes(t, s.snapshot())))
			if err != nil {
				t.Fatal(err)
			}
			s.restore(st)
		} else if !restart {
			random.IntN(300)
		}
	}
	return fmt.Sprintf("%x", sha256.Sum256(stateBytes(t, s.snapshot())))
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
	st := newState()
	s := st.sessions
	first := func(session, seq uint64) bool {
		st.index++
		return st.first(batchHeader{session: session, seq: seq})
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
	if st.sessionsDigest != digest {
		t.Error("the digest is not that of the sessions")
	}
}

// A key that was written after its deadline was noticed stays: what expires is
// that version, and no other.
func TestKVStore_ExpiryIsOfOneVersion(t *testing.T) {
	w := &writer{t: t, store: newKVStore()}
	w.apply(command{op: opPut, key: "k", value: "old", expires: 1000})
	due := w.store.expired(1000, 10, 1<<20)
	if len(due) != 1 || due[0].key != "k" {
		t.Fatalf("%+v are due", due)
	}
	w.apply(command{op: opPut, key: "k", value: "renewed", expires: 5000})
	if r := w.apply(due[0]); r.status != statusPrecondition {
		t.Errorf("%+v", r)
	}
	if it, _, ok := w.store.get("k"); !ok || it.value != "renewed" {
		t.Errorf("the renewed key is gone: %+v", it)
	}
	for _, c := range w.store.expired(5000, 10, 1<<20) {
		w.apply(c)
	}
	if _, _, ok := w.store.get("k"); ok {
		t.Error("it never expires")
	}
}

// BenchmarkKVStore_Apply applies entries of so many writes, of several kinds.
func BenchmarkKVStore_Apply(b *testing.B) {
	for _, n := range []int{1, 64} {
		for _, kind := range []string{"put", "retry", "txn"} {
			b.Run(fmt.Sprintf("%s/commands=%d", kind, n), func(b *testing.B) {
				s := newKVStore()
				s.state.setLevel(levelNewest)
				value := strings.Repeat("v", 100)
				index := uint64(0)
				var data []byte
				var out []result
				for b.Loop() {
					index++
					data = data[:0]
					for i := range n {
						c := command{op: opPut, key: "key/" + strconv.Itoa((int(index)*7919+i)%10_000), value: value}
						switch kind {
						case "retry":
							c.retry.key = strconv.Itoa(int(index)*n + i)
						case "txn":
							t := txn{compare: []comparison{{kind: byExists, key: c.key}}, then: []command{c, {op: opGet, key: c.key}}, otherwise: []command{c}}
							c = command{op: opTxn, value: t.encode()}
						}
						data = c.appendTo(data)
					}
					if _, err := s.apply(index, 1, batchHeader{session: 1 + index%3, seq: index, time: int64(index)}, data, &out); err != nil {
						b.Fatal(err)
					}
					out = out[:0]
				}
			})
		}
	}
}
