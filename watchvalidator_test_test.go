package main

import (
	"slices"
	"strings"
	"testing"
)

// TestWatchValidator: it finds what it is for. Each case plants one fault in the
// same stream, which is fine without.
func TestWatchValidator(t *testing.T) {
	events := []watchMessage{
		{kind: "ADDED", rv: 1, key: "a", value: "1"},
		{kind: "ADDED", rv: 2, key: "b", value: "1", more: true},
		{kind: "MODIFIED", rv: 2, prev: 1, key: "a", value: "2"},
		{kind: "DELETED", rv: 3, prev: 2, key: "a", value: "2"},
		{kind: "ADDED", rv: 4, key: "a", value: "3"},
		{kind: "MODIFIED", rv: 5, prev: 2, key: "b", value: "9"},
	}
	history := &watchHistory{messages: events}
	mark := func(rv uint64) watchMessage { return watchMessage{kind: "BOOKMARK", rv: rv} }
	without := func(i int) []watchMessage { return slices.Delete(slices.Clone(events), i, i+1) }
	with := func(i int, m watchMessage) []watchMessage { return slices.Insert(slices.Clone(events), i, m) }
	changed := func(i int, change func(*watchMessage)) []watchMessage {
		c := slices.Clone(events)
		change(&c[i])
		return c
	}
	tests := []struct {
		name string
		told []watchMessage
		want string // part of the violation
	}{
		{"fine", events, ""},
		{"fine with a bookmark", with(3, mark(2)), ""},
		{"fine with a late bookmark", append(slices.Clone(events), mark(5)), ""},
		{"missing event", without(4), "gap"},
		{"missing at the end, not claimed", without(5), ""},
		{"missing at the end, claimed", append(without(5), mark(5)), "gap"},
		{"repeated event", with(4, events[3]), "not ordered"},
		{"swapped versions", changed(0, func(m *watchMessage) { m.rv = 9 }), "not ordered"},
		{"half a version", without(2), "not atomic"},
		{"bookmark within a version", with(2, mark(2)), "not atomic"},
		{"bookmark ahead", with(3, mark(3)), "not ordered"},
		{"bookmark of the past", with(5, mark(1)), "bookmark"},
		{"bookmark of the future", append(slices.Clone(events), mark(7)), "bookmark"},
		{"other value", changed(4, func(m *watchMessage) { m.value = "x" }), "gap"},
		{"other kind", changed(4, func(m *watchMessage) { m.kind = "MODIFIED" }), "previous state"},
		{"other previous version", changed(5, func(m *watchMessage) { m.prev = 1 }), "previous state"},
		{"other key", changed(4, func(m *watchMessage) { m.key = "x" }), "gap"},
		{"invented event", append(slices.Clone(events), watchMessage{kind: "ADDED", rv: 6, key: "z"}), "did not happen"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := newWatchValidator("w", "", true, false, 0)
			for _, m := range tt.told {
				v.observe(m)
			}
			v.check(history)
			if got := strings.Join(v.violations, "\n"); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("found %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("filter", func(t *testing.T) {
		v := newWatchValidator("w", "a", false, false, 0)
		v.observe(events[0])
		v.observe(events[5])
		if len(v.violations) == 0 {
			t.Error("nothing found")
		}
	})
	t.Run("list", func(t *testing.T) {
		for _, value := range []string{"2", "other"} {
			v := newWatchValidator("w", "", true, true, 0)
			v.observe(watchMessage{kind: "ADDED", rv: 2, key: "a", value: value, more: true})
			v.observe(watchMessage{kind: "ADDED", rv: 2, key: "b", value: "1", more: true})
			v.observe(mark(2))
			for _, m := range events[3:] {
				v.observe(m)
			}
			v.check(history)
			if fine := len(v.violations) == 0; fine != (value == "2") {
				t.Errorf("%s: found %q", value, v.violations)
			}
		}
	})
}
