package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// TestKeepPlace_Leaderless: a node that waits for a leader says for whom, now and then.
func TestKeepPlace_Leaderless(t *testing.T) {
	n, _ := idleNode(t)
	for id := range uint64(3) {
		n.store.State.Members[id+1] = store.Member{ID: id + 1, PeerURL: "http://127.0.0.1:1", Learner: id == 2} // nobody is there
	}
	n.config.id, n.cluster = 1, 7
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.WarnLevel)
		n.logger = zap.New(core)
		ctx, cancel := context.WithTimeout(t.Context(), leaderlessEvery+2*leftOutMax)
		defer cancel()
		testkit.Must(t, n.keepPlace(ctx))
		if logs.Len() != 2 {
			t.Fatalf("it was said %d times, want 2", logs.Len())
		}
		first := logs.All()[0]
		if text := fmt.Sprint(first.ContextMap()["without"]); !strings.Contains(first.Message, "no leader") ||
			!strings.Contains(text, "node 2 (http://127.0.0.1:1): nothing (dial tcp") || strings.Contains(text, "node 1") || strings.Contains(text, "node 3") {
			t.Errorf("%s %s", first.Message, text)
		}
	})
}

// TestTransferLeadership_Alone: the only voter has nobody to wait for.
func TestTransferLeadership_Alone(t *testing.T) {
	n, _ := idleNode(t)
	n.config.id, n.config.tick = 1, 10*time.Millisecond
	n.store.State.Members = map[uint64]store.Member{1: {ID: 1}, 2: {ID: 2, Learner: true}}
	n.loop.status.Store(&replicaStatus{leader: 1})
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		n.transferLeadership()
		if took := time.Since(start); took > 0 {
			t.Errorf("it took %v", took)
		}
	})
}
