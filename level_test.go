package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// TestLevel_Common: who does not answer, or is older than levels, counts.
func TestLevel_Common(t *testing.T) {
	members := []store.Member{{ID: 1}, {ID: 2}, {ID: 3, Learner: true}}
	for name, tt := range map[string]struct {
		others map[uint64]health
		want   int
	}{
		"all know it":   {map[uint64]health{2: {Level: 3}, 3: {Level: 2}}, 2},
		"one is older":  {map[uint64]health{2: {Level: 2}, 3: {}}, 0},
		"one is silent": {map[uint64]health{2: {Level: 2}}, 0},
	} {
		if got := commonLevel(members, tt.others, 1, 2); got.Level != tt.want || !slices.Equal(got.Members, []uint64{1, 2, 3}) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestLevel_OldMembers: who is refused for the cluster's level is told which member is old, or away.
func TestLevel_OldMembers(t *testing.T) {
	n, _ := idleNode(t)
	n.config.id = 1
	for id := range uint64(3) {
		n.store.State.Members[id+1] = store.Member{ID: id + 1}
	}
	const upgrade = ": upgrade what is old, bring back or remove what is down"
	for _, tt := range []struct {
		own    int
		others map[uint64]health
		want   string
	}{
		{2, map[uint64]health{2: {Level: 2}, 3: {}}, "node 3 knows up to 1" + upgrade}, // of before levels
		{2, map[uint64]health{2: {Level: 2}, 3: {Level: 1}}, "node 3 knows up to 1" + upgrade},
		{2, map[uint64]health{3: {Level: 2}}, "node 2 does not answer" + upgrade},
		{1, map[uint64]health{2: {}, 3: {Level: 2}}, "node 1 (this one) knows up to 1, node 2 knows up to 1" + upgrade},
		{2, map[uint64]health{2: {Level: 2}, 3: {Level: 3}}, "all members know it, so it will be raised in a moment"},
	} {
		n.store.LevelMax = tt.own
		n.admission.others.Store(&tt.others)
		if got := n.oldMembers(2); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt, got, tt.want)
		}
		_, err := n.applyNew(t.Context(), time.Second, []store.Command{{Op: store.OpPut, Key: "k", Condition: store.Condition{Kind: 9}}})
		if e, ok := errors.AsType[*fault.Error](err); !ok || !errors.Is(err, fault.ErrLevel) || e.Outcome != fault.NotApplied || !strings.HasSuffix(e.Detail, "; "+tt.want) {
			t.Errorf("%+v: refused with %v", tt, err)
		}
	}
}

// TestLevel_RaisedInThisTurn: from the moment that the store is at a level, what needs it is taken.
func TestLevel_RaisedInThisTurn(t *testing.T) {
	l := newLoneLoop(t, nil, nil)
	c := store.Command{Op: store.OpPut, Key: "k", ContentType: "text/plain"}
	if _, _, err := l.enqueue(&c, time.Now().Add(time.Second)); !errors.Is(err, fault.ErrLevel) {
		t.Errorf("before: %v", err)
	}
	l.replica.store.State.SetLevel(3) // which the loop has not published yet
	if _, _, err := l.enqueue(&c, time.Now().Add(time.Second)); err != nil {
		t.Errorf("after: %v", err)
	}
}
