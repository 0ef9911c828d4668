package main

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestTTL_Overdue: from level 2 on who writes a key finds it gone from its deadline
// on, whether or not its expiry was applied. Watchers see it expire.
func TestTTL_Overdue(t *testing.T) {
	const deadline = 2000
	lock := command{op: opPut, key: "lock", value: "a", expires: deadline}
	compare := func(cs ...comparison) command {
		x := txn{compare: cs, then: []command{{op: opGet, key: "lock"}}, otherwise: []command{{op: opDelete, key: "lock"}}}
		return command{op: opTxn, value: x.encode()}
	}
	for _, tt := range []struct {
		name      string
		c         command
		old, want status // at level 1 and 2
		events    string // at level 2
	}{
		{"take", command{op: opPut, key: "lock", value: "b", condition: condition{kind: ifAbsent}}, statusPrecondition, statusCreated, "expired 2, added 3"},
		{"renew", command{op: opPut, key: "lock", value: "b", condition: condition{kind: ifMatch, rv: 1}}, statusReplaced, statusPrecondition, "expired 2"},
		{"renew any", command{op: opPut, key: "lock", value: "b", condition: condition{kind: ifExists}}, statusReplaced, statusPrecondition, "expired 2"},
		{"put", command{op: opPut, key: "lock", value: "b"}, statusReplaced, statusCreated, "expired 2, added 3"},
		{"delete", command{op: opDelete, key: "lock"}, statusDeleted, statusNotFound, "expired 2"},
		{"is it there", compare(comparison{kind: byExists, key: "lock"}), statusSucceeded, statusFailed, "expired 2"},
		{"is it away", compare(comparison{kind: byAbsent, key: "lock"}), statusFailed, statusSucceeded, "expired 2"},
		{"another key", command{op: opDelete, key: "k"}, statusNotFound, statusNotFound, ""},
	} {
		for level, want := range map[int]status{1: tt.old, 2: tt.want} {
			s := newKVStore()
			index := uint64(0)
			apply := func(now int64, c command) result {
				t.Helper()
				var out []result
				index++
				_, err := s.apply(index, 1, batchHeader{session: 1, seq: index, time: now}, c.appendTo(nil), &out)
				must(t, err)
				return out[0]
			}
			apply(1000, raiseCommand(level))
			apply(1000, lock)
			n := s.state.events.end()
			if tt.name == "take" && apply(deadline-1, tt.c).status != statusPrecondition {
				t.Errorf("%s, level %d: before the deadline", tt.name, level)
			}
			if r := apply(deadline, tt.c); r.status != want {
				t.Errorf("%s, level %d: status %d, want %d", tt.name, level, r.status, want)
			}
			var got []string
			events, _, _ := s.eventsFrom(n)
			for _, e := range events {
				got = append(got, fmt.Sprintf("%s %d", map[eventKind]string{eventAdded: "added", eventModified: "modified", eventDeleted: "deleted", eventExpired: "expired"}[e.kind], e.rv))
			}
			if all := strings.Join(got, ", "); level == 2 && all != tt.events {
				t.Errorf("%s: %s, want %s", tt.name, all, tt.events)
			}
		}
	}
}

// TestTTL_Span: a span counts from the time of the entry on, and members of level
// 1 are not told of it.
func TestTTL_Span(t *testing.T) {
	x := txn{then: []command{{op: opPut, key: "b", ttl: 700}}}
	commands := []command{{op: opPut, key: "a", ttl: 500}, {op: opTxn, value: x.encode()}}
	s := newKVStore()
	for _, c := range commands {
		if _, err := s.apply(1, 1, batchHeader{session: 1, seq: 1, time: 1000}, c.appendTo(nil), nil); err == nil || s.applied() != 0 {
			t.Errorf("level 1 takes command %d: %v", c.op, err)
		}
		if err := checkCommands(c.appendTo(nil), 1); err == nil {
			t.Errorf("command %d may be proposed at level 1", c.op)
		}
		must(t, checkCommands(c.appendTo(nil), 2))
	}
	s.state.setLevel(2)
	_, err := s.apply(1, 1, batchHeader{session: 1, seq: 1, time: 1000}, commands[1].appendTo(commands[0].appendTo(nil)), nil)
	must(t, err)
	for key, want := range map[string]int64{"a": 1500, "b": 1700} {
		if it, _, _ := s.get(key); it.expires != want {
			t.Errorf("%s expires at %d, want %d", key, it.expires, want)
		}
	}
	for level := range 2 {
		var c command
		if c.setTTL(time.Second, level+1); (c.expires != 0) != (level == 0) || (c.ttl != 0) != (level == 1) {
			t.Errorf("level %d: %+v", level+1, c)
		}
	}
}

// TestVirtual_TTLStartsWhenApplied: a write that waits for a majority for longer
// than its TTL is there when it is answered, and for its TTL.
func TestVirtual_TTLStartsWhenApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		n := c.leader()
		c.waitLevel(levelNewest)
		c.isolate(c.followers()...)
		time.Sleep(time.Second)
		time.AfterFunc(10*time.Second, func() { c.isolate() })
		if r := n.do(http.MethodPut, "/lock?ttl=2s&timeout=30s", "me"); r.status != http.StatusCreated || r.took < 9*time.Second {
			t.Fatal(r)
		}
		acked := time.Now()
		for n.do(http.MethodGet, "/lock", "").status == http.StatusOK && time.Since(acked) < 5*time.Second {
			time.Sleep(5 * time.Millisecond)
		}
		if lived := time.Since(acked); lived < 1900*time.Millisecond || lived > 2100*time.Millisecond {
			t.Errorf("ttl=2s: gone %v after the answer", lived)
		}
	})
}

// waitLevel waits until the cluster is at a feature level, which the test raises:
// its nodes cannot ask each other.
func (c *virtualCluster) waitLevel(level int) {
	c.t.Helper()
	raise := raiseCommand(level, 1, 2, 3)
	for slices.ContainsFunc(c.nodes, func(n *virtualNode) bool { return n.loop.status.Load().level < level }) {
		if n := c.leader(); n != nil {
			_, err := n.loop.propose(c.t.Context(), time.Second, raise)
			must(c.t, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestVirtual_ExpiryIsPunctual: a key goes at most 20 ms after its deadline, and
// many that are due at once follow each other.
func TestVirtual_ExpiryIsPunctual(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		c.waitLevel(levelNewest)
		n := c.leader()
		for i := range 20 {
			time.Sleep(time.Duration(i) * 7 * time.Millisecond)
			if r := n.do(http.MethodPut, "/k?ttl=1s", "v"); r.status != http.StatusCreated {
				t.Fatal(r)
			}
			it, _, _ := n.store.get("k")
			for {
				if _, _, ok := n.store.get("k"); !ok {
					break
				}
				time.Sleep(time.Millisecond)
			}
			if late := time.Since(time.UnixMilli(it.expires)); late < 0 || late > 20*time.Millisecond {
				t.Errorf("the key went %v after its deadline", late)
			}
		}

		const batches = 8
		at := time.Now().Add(2 * time.Second)
		for i := range batches {
			var x []command
			for j := range expireMax {
				x = append(x, command{op: opPut, key: fmt.Sprintf("s/%d/%d", i, j), expires: at.UnixMilli()})
			}
			b := newBatch(nil)
			for i := range x {
				b.add(&x[i])
			}
			b.deadline = at
			n.loop.mu.Lock()
			n.loop.push(b)
			n.loop.mu.Unlock()
			<-b.done
			must(t, b.err)
		}
		time.Sleep(time.Until(at))
		for len(n.store.expiring()) > 0 {
			time.Sleep(time.Millisecond)
		}
		if late := time.Since(at); late > 20*time.Millisecond+batches*5*time.Millisecond {
			t.Errorf("%d keys that are due at once are gone after %v", batches*expireMax, late)
		}
	})
}

// expiring returns one of the keys that have a deadline, if there are any.
func (s *kvstore) expiring() []command { return s.expired(1<<60, 1, 1) }
