package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// TestLevel_NewerProposalIsRefused: whoever proposes what this program does not
// know, by whatever way, is told that it did not happen. Nobody ends.
func TestLevel_NewerProposalIsRefused(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	s.wait(t, s.begin(leader, putOp("k", "old"), time.Second))
	for _, n := range s.nodes {
		p := n.process
		_, _, err := p.loop.enqueue(&store.Command{Op: store.OpPut, Key: "k", Condition: store.Condition{Kind: 9}}, n.clock().Add(time.Second))
		if e, ok := errors.AsType[*fault.Error](err); !ok || !errors.Is(err, fault.ErrLevel) || e.Outcome != fault.NotApplied {
			t.Errorf("node %d takes it: %v", n.id, err)
		}
		if len(p.loop.inbox.queue) > 0 || p.loop.inbox.queueSize != 0 {
			t.Errorf("node %d keeps an empty batch", n.id)
		}
		// As a newer program would propose it, together with what all know.
		b := newBatch(nil)
		b.add(&store.Command{Op: store.OpPut, Key: "known", Value: "v"})
		b.add(&store.Command{Op: store.OpPut, Key: "k", Condition: store.Condition{Kind: 9}})
		b.deadline = n.clock().Add(time.Second)
		p.loop.push(b)
		p.wake()
		ended := func() bool {
			select {
			case <-b.done:
				return true
			default:
				return false
			}
		}
		if !s.runUntil(5*time.Second, ended) || !errors.Is(b.err, fault.ErrLevel) || !strings.Contains(b.err.Error(), "condition 9") {
			t.Fatalf("the batch of node %d: %v; %v", n.id, b.err, s.check.violations)
		}
	}
	s.run(time.Second)
	if !slices.Equal(s.up(), s.nodes) {
		t.Error("not all nodes are up")
	}
	for _, n := range s.up() {
		if it, rv, _ := n.process.store.Get("k"); it.Value != "old" || rv != 1 {
			t.Errorf("node %d holds %q at version %d", n.id, it.Value, rv)
		}
	}
	s.judge(t)
}

// TestLevel_LeaderPutsItsOwnTime into what comes from a node whose clock is wrong,
// which can write all the same.
func TestLevel_LeaderPutsItsOwnTime(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	wrong := s.node(leader.id%3 + 1)
	for i, off := range []time.Duration{61 * time.Minute, 74 * 365 * 24 * time.Hour, -time.Hour, store.ClockSkewMax / 2} {
		wrong.offset = off
		if i == 0 {
			s.run(time.Second) // its next tick knows
		}
		s.run(100 * time.Millisecond)
		s.wait(t, s.begin(wrong, putOp("k", fmt.Sprint(i)), time.Second))
		now := leader.clock()
		n, _ := leader.process.store.SeekEvent(leader.process.store.Version() - 1)
		events, _, _ := leader.process.store.EventsFrom(n)
		if got := time.UnixMilli(events[0].Time).Sub(now); got.Abs() > store.ClockSkewMax {
			t.Errorf("a clock that is off by %v: the event is %v off", off, got)
		}
	}
	wrong.offset = 0
	s.judge(t)
}

// TestLevel_RefusalHasTheLeadersTime: what is refused moves the time as little as what is taken.
func TestLevel_RefusalHasTheLeadersTime(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	wrong, down := s.node(leader.id%3+1), s.node((leader.id+1)%3+1)
	wrong.offset = 74 * 365 * 24 * time.Hour
	down.crash(tailKept)
	s.run(time.Second) // until the leader has noticed
	s.wantRefused(t, wrong.proposeChange(store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: leader.id}}, memberTimeout), "no majority")
	b := newBatch(nil) // as a newer program would propose it
	b.add(&store.Command{Op: store.OpPut, Key: "k", Condition: store.Condition{Kind: 9}})
	b.deadline = wrong.clock().Add(time.Second)
	wrong.process.loop.push(b)
	wrong.process.wake()
	s.run(500 * time.Millisecond)
	if b.err == nil {
		t.Error("the batch is not refused")
	}
	if off := leader.clock().Sub(time.UnixMilli(leader.process.store.State.Now)); off.Abs() > store.ClockSkewMax {
		t.Errorf("the state's time is off by %v", off)
	}
	wrong.offset = 0
	down.start()
	s.run(time.Second)
	s.judge(t)
}
