package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/store"
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
		if n.store.Level() >= n.store.Knows() || n.loop.status.Load().leader != n.config.id {
			every = levelEveryMin
			if n.store.Level() >= n.store.Knows() {
				every = levelEveryMax
			}
			continue
		}
		every = min(2*every, levelEveryMax)
		r := commonLevel(n.store.Members(), n.askOthers(ctx, nil), n.config.id, n.store.Knows())
		if r.Level <= n.store.Level() {
			continue
		}
		results, err := n.Apply(ctx, n.config.requestTimeout, store.RaiseLevel(r.Level, r.Members...))
		if err == nil && results[0].Status == store.StatusReplaced {
			n.logger.Info("the feature level of the cluster was raised", zap.Int("level", r.Level))
		}
	}
}

// commonLevel returns the highest level that all members know.
func commonLevel(members []store.Member, others map[uint64]health, self uint64, own int) store.Raising {
	r := store.Raising{Level: own}
	for _, m := range members {
		r.Members = append(r.Members, m.ID)
		if m.ID != self {
			r.Level = min(r.Level, others[m.ID].Level) // 0 without an answer
		}
	}
	return r
}

// oldMembers says which members keep the cluster below a level.
func (s *kvstore) oldMembers(level int) string {
	var old []string
	others := *s.admission.others.Load()
	for _, m := range s.store.Members() {
		h, answered := others[m.ID]
		switch {
		case m.ID == s.config.id:
			if s.store.Knows() < level {
				old = append(old, fmt.Sprintf("node %d (this one) knows up to %d", m.ID, s.store.Knows()))
			}
		case !answered:
			old = append(old, fmt.Sprintf("node %d does not answer", m.ID))
		case h.Level < level:
			old = append(old, fmt.Sprintf("node %d knows up to %d", m.ID, max(store.LevelFirst, h.Level)))
		}
	}
	if len(old) == 0 {
		return "all members know it, so it will be raised in a moment"
	}
	return strings.Join(old, ", ") + ": upgrade what is old, bring back or remove what is down"
}
