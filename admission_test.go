package main

import (
	"errors"
	"math"
	"testing"

	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
)

// newTestAdmission returns that of member 1 of three, whose disk has room for so many bytes.
func newTestAdmission(t *testing.T, free *uint64) *admission {
	t.Helper()
	s := store.New()
	for id := range uint64(3) {
		s.State.Members[id+1] = store.Member{ID: id + 1}
	}
	g := newAdmission(&config{id: 1, diskReserve: 1000, quota: 10_000}, s, func() int { return 0 }, zap.NewNop())
	g.free = func() (uint64, error) { return *free, nil }
	testkit.Must(t, g.lookAtDisk())
	return g
}

var (
	somePut    = store.Command{Op: store.OpPut, Key: "k", Value: "v"}
	someDelete = store.Command{Op: store.OpDelete, Key: "k"}
)

// TestAdmission_Disk: between two looks no more is taken than there was room for, since all three members may take
// as much.
func TestAdmission_Disk(t *testing.T) {
	free := uint64(math.MaxUint64 / 4)
	g := newTestAdmission(t, &free)
	testkit.Must(t, g.admit(&somePut, 5000))

	free = 1000 + 299
	testkit.Must(t, g.lookAtDisk())
	testkit.Must(t, g.admit(&somePut, 30)) // costs 270
	if err := g.admit(&somePut, 30); !errors.Is(err, fault.ErrDiskFull) {
		t.Errorf("more than there is room for: %v", err)
	}
	testkit.Must(t, g.admit(&someDelete, 50)) // from the reserve
	if !g.receive(300) {
		t.Error("entries that there is room for are refused")
	}
	if g.receive(400) { // the reserve is 1000, of which deletes and entries get 500
		t.Error("entries are taken without room")
	}
	if !g.receive(0) {
		t.Error("a message without entries is refused")
	}

	for _, step := range []struct {
		free         uint64
		full, closed bool
	}{{999, true, false}, {1010, true, false}, {1200, false, false}, {1010, false, false}, {499, true, true}, {510, true, false}, {math.MaxUint64, false, false}} {
		free = step.free
		testkit.Must(t, g.lookAtDisk())
		if s := g.space.Load(); s.full != step.full || s.closed != step.closed {
			t.Errorf("%d bytes free: %+v, want %+v", free, *s, step)
		}
		if err := g.admit(&somePut, 1); errors.Is(err, fault.ErrDiskFull) != step.full {
			t.Errorf("%d bytes free: put: %v", free, err)
		}
		if err := g.admit(&someDelete, 1); errors.Is(err, fault.ErrDiskFull) != step.closed {
			t.Errorf("%d bytes free: delete: %v", free, err)
		}
	}
}

// TestAdmission_OthersFull: what the disks of others mean for the writes here.
func TestAdmission_OthersFull(t *testing.T) {
	full := health{DiskFull: true}
	for _, tt := range []struct {
		name   string
		others map[uint64]health
		leader uint64
		want   bool
	}{
		{"nobody", map[uint64]health{2: {}, 3: {}}, 2, false},
		{"a follower", map[uint64]health{2: {}, 3: full}, 2, false},
		{"the leader", map[uint64]health{2: {}, 3: full}, 3, true},
		{"both others, this one leads", map[uint64]health{2: full, 3: full}, 1, true},
		{"one of two that answer", map[uint64]health{2: full}, 1, false},
	} {
		free := uint64(math.MaxUint64 / 4)
		g := newTestAdmission(t, &free)
		g.hear(tt.others, tt.leader)
		if err := g.admit(&somePut, 1); errors.Is(err, fault.ErrDiskFull) != tt.want {
			t.Errorf("%s: %v", tt.name, err)
		}
		testkit.Must(t, g.admit(&someDelete, 1))
	}
}

// TestAdmission_Quota: what grows the store beyond it is refused, and nothing else.
func TestAdmission_Quota(t *testing.T) {
	free := uint64(math.MaxUint64 / 4)
	g := newTestAdmission(t, &free)
	big := store.Command{Op: store.OpPut, Key: "big", Value: string(make([]byte, 9_900))}
	testkit.Must(t, g.admit(&big, 9_900))
	storetest.Apply(t, g.store, big)
	txn := func(ops ...store.Command) *store.Command {
		t := store.Txn{Then: ops}
		return &store.Command{Op: store.OpTxn, Value: t.Encode()}
	}
	for name, c := range map[string]*store.Command{"put": &somePut, "transaction": txn(someDelete, somePut)} {
		if err := g.admit(c, 10); !errors.Is(err, fault.ErrQuota) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]*store.Command{"smaller": {Op: store.OpPut, Key: "big", Value: "v"}, "delete": &someDelete, "prefix": {Op: store.OpDeletePrefix, Key: "b"}, "transaction": txn(someDelete)} {
		if err := g.admit(c, 10); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := g.writable(); !errors.Is(err, fault.ErrQuota) {
		t.Error(err)
	}
	storetest.Apply(t, g.store, store.Command{Op: store.OpDelete, Key: "big"})
	testkit.Must(t, g.admit(&somePut, 10))
	testkit.Must(t, g.writable())

	// What waits to be written counts as written.
	waits := 10_000 - int(g.store.Size()) - store.ItemOverhead - 100
	g.waiting = func() int { return waits }
	testkit.Must(t, g.admit(&somePut, 100))
	if err := g.admit(&somePut, 101); !errors.Is(err, fault.ErrQuota) {
		t.Errorf("with %d bytes that wait: %v", waits, err)
	}
}
