package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
)

// How often a leader asks the members which level they know: soon after a start,
// later as often as it asks them how they are.
const (
	levelEveryMin = 20 * time.Millisecond
	levelEveryMax = exchangeEvery
)

// keepLevel raises the level of the cluster as soon as all members know it,
// until ctx ends.
func (n *node) keepLevel(ctx context.Context) error {
	every := levelEveryMin
	for {
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return nil
		}
		if n.store.level() >= n.store.knows() || n.loop.status.Load().leader != n.config.id {
			every = levelEveryMin
			if n.store.level() >= n.store.knows() {
				every = levelEveryMax
			}
			continue
		}
		every = min(2*every, levelEveryMax)
		r := commonLevel(n.store.members(), n.askOthers(ctx, nil), n.config.id, n.store.knows())
		if r.level <= n.store.level() {
			continue
		}
		res, err := n.propose(ctx, n.config.requestTimeout, raiseLevel(r.level, r.members...))
		if err == nil && res.status == statusReplaced {
			n.logger.Info("the feature level of the cluster was raised", zap.Int("level", r.level))
		}
	}
}

// commonLevel returns the highest level that all members know.
func commonLevel(members []member, others map[uint64]health, self uint64, own int) raising {
	r := raising{level: own}
	for _, m := range members {
		r.members = append(r.members, m.ID)
		if m.ID != self {
			r.level = min(r.level, others[m.ID].Level) // 0 without an answer
		}
	}
	return r
}

// oldMembers says which members keep the cluster below a level.
func (n *node) oldMembers(level int) string {
	var old []string
	others := *n.guard.others.Load()
	for _, m := range n.store.members() {
		h, answered := others[m.ID]
		switch {
		case m.ID == n.config.id:
			if n.store.knows() < level {
				old = append(old, fmt.Sprintf("node %d (this one) knows up to %d", m.ID, n.store.knows()))
			}
		case !answered:
			old = append(old, fmt.Sprintf("node %d does not answer", m.ID))
		case h.Level < level:
			old = append(old, fmt.Sprintf("node %d knows up to %d", m.ID, max(levelFirst, h.Level)))
		}
	}
	if len(old) == 0 {
		return "all members know it, so it will be raised in a moment"
	}
	return strings.Join(old, ", ") + ": upgrade what is old, bring back or remove what is down"
}
