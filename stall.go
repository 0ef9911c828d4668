package main

import (
	"context"
	"runtime"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// This file looks whether the loop hangs. An iteration that takes longer than an
// election timeout stops heartbeats and answers, so somebody should hear of it
// from the node that hangs, and not only from those that elect another leader.

const (
	stallLogEvery = 10 * time.Second // a slow disk must not be kept busy with goroutines
	stallDumpSize = 1 << 20          // bytes of goroutines in the log
)

// stallWatch measures the iterations of a loop.
type stallWatch struct {
	most  time.Duration // for an iteration; 0 = not watched
	began atomic.Pointer[time.Time]
}

func (w *stallWatch) begin() {
	if w.most != 0 {
		w.began.Store(new(time.Now()))
	}
}

// end returns how long the iteration took, or 0 if that is as it should be.
func (w *stallWatch) end() time.Duration {
	began := w.began.Swap(nil)
	if began == nil {
		return 0
	}
	if took := time.Since(*began); took > w.most {
		return took
	}
	return 0
}

// run logs where all goroutines are, once for each iteration that takes too
// long, while that hangs.
func (w *stallWatch) run(ctx context.Context, logger *zap.Logger) error {
	tick := time.NewTicker(w.most / 4)
	defer tick.Stop()
	var seen *time.Time
	var logged time.Time
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		began := w.began.Load()
		if began == nil || began == seen || time.Since(*began) <= w.most || time.Since(logged) < stallLogEvery {
			continue
		}
		seen, logged = began, time.Now()
		buf := make([]byte, stallDumpSize)
		logger.Error("the raft loop hangs: this node sends no heartbeats and no answers", zap.Duration("for", time.Since(*began)),
			zap.ByteString("goroutines", buf[:runtime.Stack(buf, true)]))
	}
}
