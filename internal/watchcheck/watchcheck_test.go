package watchcheck

import (
	"slices"
	"strings"
	"testing"
)

// TestWatchValidator: it finds what it is for. Each case plants one fault in the
// same stream, which is fine without.
func TestWatchValidator(t *testing.T) {
	events := []Message{
		{Kind: "ADDED", RV: 1, Key: "a", Value: "1"},
		{Kind: "ADDED", RV: 2, Key: "b", Value: "1", More: true},
		{Kind: "MODIFIED", RV: 2, Prev: 1, Key: "a", Value: "2"},
		{Kind: "DELETED", RV: 3, Prev: 2, Key: "a", Value: "2"},
		{Kind: "ADDED", RV: 4, Key: "a", Value: "3"},
		{Kind: "MODIFIED", RV: 5, Prev: 2, Key: "b", Value: "9"},
	}
	history := &History{Messages: events}
	mark := func(rv uint64) Message { return Message{Kind: "BOOKMARK", RV: rv} }
	without := func(i int) []Message { return slices.Delete(slices.Clone(events), i, i+1) }
	with := func(i int, m Message) []Message { return slices.Insert(slices.Clone(events), i, m) }
	changed := func(i int, change func(*Message)) []Message {
		c := slices.Clone(events)
		change(&c[i])
		return c
	}
	tests := []struct {
		name string
		told []Message
		want string // part of the violation
	}{
		{"fine", events, ""},
		{"fine with a bookmark", with(3, mark(2)), ""},
		{"fine with a late bookmark", append(slices.Clone(events), mark(5)), ""},
		{"missing event", without(4), "gap"},
		{"missing at the end, not claimed", without(5), ""},
		{"missing at the end, claimed", append(without(5), mark(5)), "gap"},
		{"repeated event", with(4, events[3]), "not ordered"},
		{"swapped versions", changed(0, func(m *Message) { m.RV = 9 }), "not ordered"},
		{"half a version", without(2), "not atomic"},
		{"bookmark within a version", with(2, mark(2)), "not atomic"},
		{"bookmark ahead", with(3, mark(3)), "not ordered"},
		{"bookmark of the past", with(5, mark(1)), "bookmark"},
		{"bookmark of the future", append(slices.Clone(events), mark(7)), "bookmark"},
		{"other value", changed(4, func(m *Message) { m.Value = "x" }), "gap"},
		{"other kind", changed(4, func(m *Message) { m.Kind = "MODIFIED" }), "previous state"},
		{"other previous version", changed(5, func(m *Message) { m.Prev = 1 }), "previous state"},
		{"other key", changed(4, func(m *Message) { m.Key = "x" }), "gap"},
		{"invented event", append(slices.Clone(events), Message{Kind: "ADDED", RV: 6, Key: "z"}), "did not happen"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := New("w", "", true, false, 0)
			for _, m := range tt.told {
				v.Observe(m)
			}
			v.Check(history)
			if got := strings.Join(v.violations, "\n"); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("found %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("filter", func(t *testing.T) {
		v := New("w", "a", false, false, 0)
		v.Observe(events[0])
		v.Observe(events[5])
		if len(v.violations) == 0 {
			t.Error("nothing found")
		}
	})
	t.Run("list", func(t *testing.T) {
		for _, value := range []string{"2", "other"} {
			v := New("w", "", true, true, 0)
			v.Observe(Message{Kind: "ADDED", RV: 2, Key: "a", Value: value, More: true})
			v.Observe(Message{Kind: "ADDED", RV: 2, Key: "b", Value: "1", More: true})
			v.Observe(mark(2))
			for _, m := range events[3:] {
				v.Observe(m)
			}
			v.Check(history)
			if fine := len(v.violations) == 0; fine != (value == "2") {
				t.Errorf("%s: found %q", value, v.violations)
			}
		}
	})
}
