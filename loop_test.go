package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"raftrv/internal/fault"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// noTransport is for a cluster of one.
type noTransport struct{}

func (noTransport) send([]*raftpb.Message)    {}
func (noTransport) setMembers([]store.Member) {}

// newLoneLoop returns the loop of a single voter, which leads.
func newLoneLoop(t *testing.T, applied func(), at hook) *loop {
	t.Helper()
	disk, rec := newDisk(t, t.TempDir())
	t.Cleanup(func() { testkit.Must(t, disk.close()) })
	l := newLoop(10*time.Millisecond, applied, zap.NewNop())
	r, err := newReplica(replicaConfig{
		id: 1, session: 1, electionTicks: 10, heartbeatTicks: 1, snapshotEntries: 1 << 20, snapshotBytes: 1 << 30, log: rec.log,
		store: &store.Store{State: rec.state}, confState: rec.confState, disk: disk, transport: noTransport{}, driver: l, logger: zap.NewNop(), hook: at,
	})
	testkit.Must(t, err)
	l.replica = r
	testkit.Must(t, r.raw.Campaign())
	testkit.Must(t, r.process())
	if r.leader != 1 {
		t.Fatal("a single voter does not lead")
	}
	return l
}

// TestLoop_IterationsEnd: with one voter there is something to do after each round under full load, and yet
// ticks, stop and watchers have their turn.
func TestLoop_IterationsEnd(t *testing.T) {
	rounds, notified, stop := 0, 0, false
	var l *loop
	l = newLoneLoop(t, func() { notified++ }, func(point string) error {
		if l == nil || point != "after-advance" {
			return nil
		}
		if rounds++; rounds < 100 { // an end for a loop that has none
			_, _, err := l.enqueue(&store.Command{Op: store.OpPut, Key: fmt.Sprint(rounds), Value: "v"}, time.Now().Add(time.Hour))
			return err
		}
		stop = true
		return nil
	})
	_, _, err := l.enqueue(&store.Command{Op: store.OpPut, Key: "first", Value: "v"}, time.Now().Add(time.Hour))
	testkit.Must(t, err)
	for iterations := 1; !stop; iterations++ {
		before, version, told := rounds, l.replica.store.Version(), notified
		testkit.Must(t, l.iterate(false))
		if n := rounds - before; n > roundsMax {
			t.Fatalf("an iteration had %d rounds, want at most %d", n, roundsMax)
		}
		if !stop && len(l.wake) == 0 {
			t.Fatalf("there is more to do after iteration %d, and nobody says so", iterations)
		}
		if applied := l.replica.store.Version() - version; applied > 1 && notified-told < 2 {
			t.Errorf("iteration %d applied %d writes and told of it %d times", iterations, applied, notified-told)
		}
	}
}

// TestLoop_Stall: an iteration that hangs is logged with the place where, while it hangs, and counted.
func TestLoop_Stall(t *testing.T) {
	l := newLoneLoop(t, func() {}, nil)
	l.watch.most = 20 * time.Millisecond
	core, logs := observer.New(zapcore.ErrorLevel)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go func() { _ = l.watch.run(ctx, zap.New(core)) }() // ends with ctx
	go func() { _ = l.run(ctx, l.replica, func(context.Context) error { return nil }) }()
	l.call(hangUntil(t, func() bool { return logs.Len() > 0 }))
	if !comesTrue(func() bool { return logs.Len() > 0 }) {
		t.Fatal("nobody noticed")
	}
	if text := fmt.Sprint(logs.All()[0].ContextMap()["goroutines"]); !strings.Contains(text, "hangUntil") {
		t.Errorf("the log does not say where: %s", text)
	}
	counted := func() bool {
		var m dto.Metric
		testkit.Must(t, l.metrics.stall.Write(&m))
		return m.GetHistogram().GetSampleCount() >= 1 && m.GetHistogram().GetSampleSum() >= 0.02
	}
	if !comesTrue(counted) {
		t.Error("it was not counted")
	}
	stop()
	<-l.done
}

// hangUntil is a call that keeps the loop busy until ok.
func hangUntil(t *testing.T, ok func() bool) func() error {
	return func() error {
		if !comesTrue(ok) {
			t.Error("the stall was not noticed while it lasted")
		}
		return nil
	}
}

func comesTrue(ok func() bool) bool {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return true
		}
	}
	return false
}

// TestLoop_TransferBeforeStart: a node that is asked to hand over before its replica runs answers, and does not panic.
func TestLoop_TransferBeforeStart(t *testing.T) {
	l := newLoop(time.Millisecond, func() {}, zap.NewNop())
	if err := l.TransferLeader(t.Context(), 20*time.Millisecond, 2); err == nil {
		t.Error("it has handed over")
	}
	l = newLoneLoop(t, func() {}, nil)
	ctx, stop := context.WithCancel(t.Context())
	go func() { _ = l.run(ctx, l.replica, func(context.Context) error { return nil }) }()
	if err := l.TransferLeader(t.Context(), time.Minute, 2); err == nil || !strings.Contains(err.Error(), "not a voter") {
		t.Errorf("to nobody: %v", err)
	}
	stop()
	<-l.done
}

// TestLoop_TimeOfBatch: what is put while the disk takes long, or after a pause of the process, lives as long as it
// should. With the time of the last tick it would be dead before its client is told that it is there.
func TestLoop_TimeOfBatch(t *testing.T) {
	const stall, ttl = 8 * time.Second, 5 * time.Second
	now := time.Now()
	var l *loop
	var second *batch
	put := func(key string) *batch {
		b, _, err := l.enqueue(&store.Command{Op: store.OpPut, Key: key, Value: "v", TTL: ttl.Milliseconds()}, now.Add(time.Hour))
		testkit.Must(t, err)
		return b
	}
	l = newLoneLoop(t, func() {}, func(point string) error {
		if l == nil || point != "after-save" || second != nil {
			return nil
		}
		now = now.Add(stall)
		second = put("second")
		return nil
	})
	l.replica.store.State.SetLevel(2)
	l.publish()
	l.clock = func() time.Time { return now }
	lives := func(key string, b *batch, put time.Time) {
		t.Helper()
		select {
		case <-b.done:
		default:
			t.Fatalf("%s was not written", key)
		}
		if it, _, _ := l.replica.store.Get(key); it.Expires != put.Add(ttl).UnixMilli() {
			t.Errorf("%s expires %v after it was put, want %v", key, time.UnixMilli(it.Expires).Sub(put.Truncate(time.Millisecond)), ttl)
		}
	}
	testkit.Must(t, l.iterate(true))
	first := put("first")
	start := now
	testkit.Must(t, l.iterate(false))
	lives("first", first, start)
	lives("second", second, now)

	now = now.Add(stall) // a pause
	third := put("third")
	testkit.Must(t, l.iterate(false)) // for the request, before the next tick
	lives("third", third, now)
}

// TestLoop_DeadlineSaysWhy: what waits until its deadline is told that there is no leader only if there is none, and
// nothing of a load that it has not seen.
func TestLoop_DeadlineSaysWhy(t *testing.T) {
	for _, tt := range []struct {
		leader uint64
		code   string
	}{{0, "no-leader"}, {2, "timeout"}} {
		l := newLoop(10*time.Millisecond, func() {}, zap.NewNop()) // which does not run
		l.status.Store(&replicaStatus{leader: tt.leader})
		calls := map[string]func() error{
			"read": func() error { return l.linearize(t.Context(), time.Millisecond) },
			"write": func() error {
				_, err := l.propose(t.Context(), time.Millisecond, somePut)
				return err
			},
			"member": func() error { return l.RemoveMember(t.Context(), time.Millisecond, 3) },
		}
		for name, call := range calls {
			e, ok := errors.AsType[*fault.Error](call())
			if !ok || e.Code != tt.code || e.Outcome != fault.NotApplied || !e.Retry {
				t.Errorf("%s with leader %d: %+v", name, tt.leader, e)
			}
			if retry := e.OfRetry(); name == "write" && (retry.Outcome != fault.Unknown || !strings.Contains(retry.Detail, "this attempt was not applied")) {
				t.Errorf("with an Idempotency-Key: %+v", retry)
			}
		}
	}
}

// TestLoop_ManyCommands: commands that are proposed together are answered in order, all or with one error that is true of
// all of them.
func TestLoop_ManyCommands(t *testing.T) {
	put := func(key string, size int) store.Command {
		return store.Command{Op: store.OpPut, Key: key, Value: strings.Repeat("v", size)}
	}
	large := []store.Command{put("a", 600<<10), put("b", 600<<10), put("c", 600<<10)} // no two of them fit into a batch
	idle := func(l *loop) {
		t.Helper()
		if len(l.inbox.queue) != 0 || l.inbox.queueSize != 0 {
			t.Errorf("%d batches wait, of %d bytes", len(l.inbox.queue), l.inbox.queueSize)
		}
	}

	l := newLoneLoop(t, func() {}, nil)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.run(ctx, l.replica, func(context.Context) error { return nil }) }()
	before := l.replica.store.Applied()
	results, err := l.propose(ctx, time.Minute, put("k", 1), store.Command{Op: store.OpDelete, Key: "k"}, store.Command{Op: store.OpDelete, Key: "k"})
	testkit.Must(t, err)
	if len(results) != 3 || results[0].RV+1 != results[1].RV || results[2].Status != store.StatusNotFound || l.replica.store.Applied() != before+1 {
		t.Errorf("%+v, in %d entries", results, l.replica.store.Applied()-before)
	}
	results, err = l.propose(ctx, time.Minute, large...)
	testkit.Must(t, err)
	if len(results) != 3 || results[0].RV+2 != results[2].RV {
		t.Errorf("%+v", results)
	}
	version := l.replica.store.Version()
	unknown := store.Command{Op: store.OpPut, Key: "k", Condition: store.Condition{Kind: 9}}
	if _, err = l.propose(ctx, time.Minute, put("x", 1), unknown); !errors.Is(err, fault.ErrLevel) || l.replica.store.Version() != version {
		t.Errorf("with one that nobody knows: %v", err)
	}
	stop()
	testkit.Must(t, <-ended)

	// Nobody takes them: none is applied.
	l = newLoneLoop(t, func() {}, nil)
	if _, err = l.propose(t.Context(), time.Millisecond, large...); err == nil || errors.Is(err, fault.ErrUnknown) {
		t.Errorf("of which none was taken: %v", err)
	}
	idle(l)
	// One of three is taken: it may be applied.
	go func() {
		ended <- func() error { _, err := l.propose(t.Context(), 100*time.Millisecond, large...); return err }()
	}()
	if !comesTrue(func() bool { return l.nextBatch() != nil }) {
		t.Fatal("nothing to take")
	}
	if err := <-ended; !errors.Is(err, fault.ErrUnknown) {
		t.Errorf("of which one was taken: %v", err)
	}
	idle(l)
}
