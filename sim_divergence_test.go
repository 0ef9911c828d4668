package main

import (
	"testing"
	"time"

	"raftrv/internal/store"
)

// TestSim_DivergedMemberFindsOut: a member that computes something else finds
// that out by itself, whether it leads or not, and the others know that it is
// not them. So does one that comes back from its disk like that.
func TestSim_DivergedMemberFindsOut(t *testing.T) {
	for _, who := range []string{"leader", "follower"} {
		t.Run(who, func(t *testing.T) {
			s, leader := newScenario(t, defaultSimConfig(1, 3))
			n := leader
			if who == "follower" {
				n = s.node(leader.id%3 + 1)
			}
			s.wait(t, s.begin(leader, putOp("k", "old"), time.Second))
			s.run(3 * time.Second)
			if len(s.check.verdicts) > 0 {
				t.Fatalf("before the fault: %v", s.check.verdicts)
			}
			// A put that does something else here than there. The checker would see it at
			// once; it is the product that must.
			s.check.blind = true
			p := n.process
			p.store.Mu.Lock()
			p.store.State.Put(&store.Command{Key: "another", Value: "new"})
			p.store.State.Changed = nil
			p.store.Mu.Unlock()
			s.begin(leader, putOp("k", "new"), time.Second)
			start := s.now
			if !s.runUntil(10*time.Second, func() bool { return s.check.verdicts[n.id] == store.Diverged }) {
				t.Fatalf("node %d does not notice: %v", n.id, s.check.verdicts)
			}
			t.Logf("noticed after %v", s.now-start)
			if len(s.check.verdicts) > 1 {
				t.Errorf("others think that they are wrong: %v", s.check.verdicts)
			}
			n.crash(tailKept)
			clear(s.check.verdicts)
			n.start()
			if n.process != nil && s.runUntil(3*time.Second, func() bool { return len(s.check.verdicts) > 0 }) {
				t.Errorf("what the log says was computed right this time, but: %v", s.check.verdicts)
			}
		})
	}
}
