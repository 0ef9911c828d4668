package store

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
	lock := Command{Op: OpPut, Key: "lock", Value: "a", Expires: deadline}
	compare := func(cs ...Comparison) Command {
		x := Txn{Compare: cs, Then: []Command{{Op: OpGet, Key: "lock"}}, Otherwise: []Command{{Op: OpDelete, Key: "lock"}}}
		return Command{Op: OpTxn, Value: x.Encode()}
	}
	for _, tt := range []struct {
		name      string
		c         Command
		old, want Status // at level 1 and 2
		events    string // at level 2
	}{
		{"take", Command{Op: OpPut, Key: "lock", Value: "b", Condition: Condition{Kind: IfAbsent}}, StatusPrecondition, StatusCreated, "expired 2, added 3"},
		{"renew", Command{Op: OpPut, Key: "lock", Value: "b", Condition: Condition{Kind: IfMatch, RV: 1}}, StatusReplaced, StatusPrecondition, "expired 2"},
		{"renew any", Command{Op: OpPut, Key: "lock", Value: "b", Condition: Condition{Kind: IfExists}}, StatusReplaced, StatusPrecondition, "expired 2"},
		{"put", Command{Op: OpPut, Key: "lock", Value: "b"}, StatusReplaced, StatusCreated, "expired 2, added 3"},
		{"delete", Command{Op: OpDelete, Key: "lock"}, StatusDeleted, StatusNotFound, "expired 2"},
		{"is it there", compare(Comparison{Kind: ByExists, Key: "lock"}), StatusSucceeded, StatusFailed, "expired 2"},
		{"is it away", compare(Comparison{Kind: ByAbsent, Key: "lock"}), StatusFailed, StatusSucceeded, "expired 2"},
		{"another key", Command{Op: OpDelete, Key: "k"}, StatusNotFound, StatusNotFound, ""},
	} {
		for level, want := range map[int]Status{1: tt.old, 2: tt.want} {
			s := New()
			index := uint64(0)
			apply := func(now int64, c Command) Result {
				t.Helper()
				var out []Result
				index++
				_, err := s.Apply(index, 1, BatchHeader{Session: 1, Seq: index, Time: now}, c.AppendTo(nil), &out)
				testkit.Must(t, err)
				return out[0]
			}
			apply(1000, RaiseLevel(level))
			apply(1000, lock)
			n := s.State.Events.End()
			if tt.name == "take" && apply(deadline-1, tt.c).Status != StatusPrecondition {
				t.Errorf("%s, level %d: before the deadline", tt.name, level)
			}
			if r := apply(deadline, tt.c); r.Status != want {
				t.Errorf("%s, level %d: status %d, want %d", tt.name, level, r.Status, want)
			}
			var got []string
			events, _, _ := s.EventsFrom(n)
			for _, e := range events {
				got = append(got, fmt.Sprintf("%s %d", map[EventKind]string{EventAdded: "added", EventModified: "modified", EventDeleted: "deleted", EventExpired: "expired"}[e.Kind], e.RV))
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
	x := Txn{Then: []Command{{Op: OpPut, Key: "b", TTL: 700}}}
	commands := []Command{{Op: OpPut, Key: "a", TTL: 500}, {Op: OpTxn, Value: x.Encode()}}
	s := New()
	for _, c := range commands {
		if _, err := s.Apply(1, 1, BatchHeader{Session: 1, Seq: 1, Time: 1000}, c.AppendTo(nil), nil); err == nil || s.Applied() != 0 {
			t.Errorf("level 1 takes command %d: %v", c.Op, err)
		}
		if err := CheckCommands(c.AppendTo(nil), 1); err == nil {
			t.Errorf("command %d may be proposed at level 1", c.Op)
		}
		testkit.Must(t, CheckCommands(c.AppendTo(nil), 2))
	}
	s.State.SetLevel(2)
	_, err := s.Apply(1, 1, BatchHeader{Session: 1, Seq: 1, Time: 1000}, commands[1].AppendTo(commands[0].AppendTo(nil)), nil)
	testkit.Must(t, err)
	for key, want := range map[string]int64{"a": 1500, "b": 1700} {
		if it, _, _ := s.Get(key); it.Expires != want {
			t.Errorf("%s expires at %d, want %d", key, it.Expires, want)
		}
	}
}

func TestCommand_SetTTL(t *testing.T) {
	for level := range 2 {
		var c Command
		if c.SetTTL(time.Second, level+1); (c.Expires != 0) != (level == 0) || (c.TTL != 0) != (level == 1) {
			t.Errorf("level %d: %+v", level+1, c)
		}
	}
}
