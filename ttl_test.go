package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"raftrv/internal/testkit"
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
				testkit.Must(t, err)
				return out[0]
			}
			apply(1000, raiseLevel(level))
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
		testkit.Must(t, checkCommands(c.appendTo(nil), 2))
	}
	s.state.setLevel(2)
	_, err := s.apply(1, 1, batchHeader{session: 1, seq: 1, time: 1000}, commands[1].appendTo(commands[0].appendTo(nil)), nil)
	testkit.Must(t, err)
	for key, want := range map[string]int64{"a": 1500, "b": 1700} {
		if it, _, _ := s.get(key); it.expires != want {
			t.Errorf("%s expires at %d, want %d", key, it.expires, want)
		}
	}
}

func TestCommand_SetTTL(t *testing.T) {
	for level := range 2 {
		var c command
		if c.setTTL(time.Second, level+1); (c.expires != 0) != (level == 0) || (c.ttl != 0) != (level == 1) {
			t.Errorf("level %d: %+v", level+1, c)
		}
	}
}
