package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLevel_NewerProposalIsRefused: whoever proposes what this program does not
// know, by whatever way, is told that it did not happen. Nobody ends.
func TestLevel_NewerProposalIsRefused(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	s.wait(t, s.begin(leader, putOp("k", "old"), time.Second))
	for _, n := range s.nodes {
		p := n.process
		_, _, err := p.loop.enqueue(&command{op: opPut, key: "k", condition: condition{kind: 9}}, n.clock().Add(time.Second))
		if e, ok := errors.AsType[*apiError](err); !ok || !errors.Is(err, errLevel) || e.outcome != notApplied {
			t.Errorf("node %d takes it: %v", n.id, err)
		}
		if len(p.loop.inbox.queue) > 0 || p.loop.inbox.queueSize != 0 {
			t.Errorf("node %d keeps an empty batch", n.id)
		}
		// As a newer program would propose it, together with what all know.
		b := newBatch(nil)
		b.add(&command{op: opPut, key: "known", value: "v"})
		b.add(&command{op: opPut, key: "k", condition: condition{kind: 9}})
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
		if !s.runUntil(5*time.Second, ended) || !errors.Is(b.err, errLevel) || !strings.Contains(b.err.Error(), "condition 9") {
			t.Fatalf("the batch of node %d: %v", n.id, b.err)
		}
	}
	s.run(time.Second)
	if !slices.Equal(s.up(), s.nodes) {
		t.Error("not all nodes are up")
	}
	for _, n := range s.up() {
		if it, rv, _ := n.process.store.get("k"); it.value != "old" || rv != 1 {
			t.Errorf("node %d holds %q at version %d", n.id, it.value, rv)
		}
	}
	s.judge(t)
}
