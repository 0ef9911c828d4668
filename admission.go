package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/store"
)

// This file decides what a node does not take at present: writes when a disk has
// no room, or what would let the store grow beyond its quota. It decides before a
// write is proposed, so what is refused was certainly not applied. The bounds are
// not exact: each node decides by itself, from what it sees. What a node does not
// serve is in consistency.go.
//
// Free space has two marks. Below the reserve a node is full: it takes
// deletes, and whatever the others write. With less than the next two files of
// its log need it is closed: it takes nothing, not even entries of a leader, and
// falls behind until there is room. So its log finds room for its next file,
// unless somebody else fills the disk between two looks; that ends the node.

const (
	spaceEvery = 100 * time.Millisecond // between two looks at the disk
	// releaseEvery is how often a node whose disk is full takes a snapshot, if
	// something has changed, so that it can delete some of its log.
	releaseEvery = 2 * time.Second
)

// admission is what decides that at one node. Its methods may be called from any goroutine.
type admission struct {
	id      uint64
	reserve uint64 // as configured; 0 = by default
	quota   uint64 // 0 = none
	store   *store.Store
	free    func() (uint64, error) // bytes that the disk has
	waiting func() int             // bytes that wait to be written
	logger  *zap.Logger

	// left is how many bytes may go to the disk before the next look without closing
	// the node. kept is how many of them are for deletes.
	left, kept   atomic.Int64
	space        atomic.Pointer[space]
	othersFull   atomic.Bool // the leader, or so many that no majority has room
	others       atomic.Pointer[map[uint64]health]
	lastReleased time.Time // owned by the goroutine that watches the disk

	*consistency // of its own state, see consistency.go

	roundTrips *prometheus.HistogramVec // to the other members, by ID
}

// space is what a node saw of its disk.
type space struct {
	free, reserve uint64 // bytes
	full, closed  bool
}

// health is what a member tells the others about itself.
type health struct {
	Member     uint64     `json:"member"`
	Sums       store.Sums `json:"sums"`
	Level      int        `json:"level,omitempty"` // that it knows; 0 = it is older than levels
	DiskFull   bool       `json:"diskFull,omitempty"`
	DiskClosed bool       `json:"diskClosed,omitempty"`
}

func newAdmission(cfg *config, kv *store.Store, waiting func() int, logger *zap.Logger) *admission {
	g := &admission{
		id:          cfg.id,
		reserve:     cfg.diskReserve,
		quota:       cfg.quota,
		store:       kv,
		free:        func() (uint64, error) { return freeBytes(cfg.dataDir) },
		waiting:     waiting,
		logger:      logger,
		consistency: newConsistency(cfg.dataDir),

		roundTrips: newRoundTrips(),
	}
	g.left.Store(math.MaxInt64 / 2) // until the first look
	g.space.Store(&space{})
	g.others.Store(&map[uint64]health{})
	return g
}

// floorSegments is how many files of the log must fit on the disk even if the
// node takes nothing any more: one for entries that are on their way, and one
// for a snapshot that is written at the same time and is larger than it seemed.
const floorSegments = 2

// diskReserve is how much of the disk must stay free for a node to take writes:
// the floor, as much for deletes, and a snapshot that makes log superfluous.
func (g *admission) diskReserve() uint64 {
	if g.reserve != 0 {
		return g.reserve
	}
	return 2*floorSegments*segmentBytes() + g.store.SnapshotSize()
}

// copiesOfPut is how often a disk must have room for what is put: in the log, and
// in the next snapshot as an item and as an event.
const copiesOfPut = 3

// diskFloor is how much of a reserve is not for deletes either.
func diskFloor(reserve uint64) uint64 { return min(floorSegments*segmentBytes(), reserve/2) }

// lookAtDisk finds out how much room there is.
func (g *admission) lookAtDisk() error {
	free, err := g.free()
	if err != nil {
		return err
	}
	before, now := g.space.Load(), space{free: free, reserve: g.diskReserve()}
	margin := uint64(0) // a little more must be free to leave a state than to stay out of it
	if before.full {
		margin = now.reserve / 8
	}
	now.full = free < now.reserve+margin
	floor := diskFloor(now.reserve)
	now.closed = free < floor
	g.kept.Store(int64(now.reserve - floor))
	g.left.Store(int64(min(free, math.MaxInt64/2)) - int64(floor) - int64(g.waiting()*g.members()))
	g.space.Store(&now)
	if now.full != before.full {
		fields := []zap.Field{zap.Uint64("freeBytes", free), zap.Uint64("reserveBytes", now.reserve)}
		if now.full {
			g.logger.Warn("the disk is full: no writes but deletes are taken until there is space again", fields...)
		} else {
			g.logger.Info("the disk has space again: writes are taken", fields...)
		}
	}
	return nil
}

func (g *admission) members() int { return max(1, g.store.MemberCount()) }

// admit says whether a command of so many bytes may be proposed.
func (g *admission) admit(c *store.Command, size int) error {
	// The others may take as many bytes at the same time, and this node has to
	// write them too.
	cost := int64(size) * int64(g.members())
	if !grows(c) {
		if g.left.Add(-cost) < 0 {
			return fault.ErrDiskFull
		}
		return nil
	}
	if err := g.diskFull(); err != nil {
		return err
	}
	cost *= copiesOfPut
	if g.left.Load()-cost < g.kept.Load() {
		return fault.ErrDiskFull
	}
	if err := g.overQuota(c, size); err != nil {
		return err
	}
	g.left.Add(-cost)
	return nil
}

// receive says whether so many bytes of entries, or of commands for a leader,
// that another member sent may be written.
func (g *admission) receive(size int) bool {
	return size == 0 || !g.space.Load().closed && g.left.Add(-int64(size)) >= 0
}

// grows says whether a command may make the store larger.
func grows(c *store.Command) bool {
	switch c.Op {
	case store.OpPut:
		return true
	case store.OpTxn:
		t, err := store.DecodeTxn(c.Value)
		if err != nil {
			return true
		}
		for _, ops := range [][]store.Command{t.Then, t.Otherwise} {
			for i := range ops {
				if ops[i].Op == store.OpPut {
					return true
				}
			}
		}
	}
	return false
}

// diskFull says whose disk has no room for a write.
func (g *admission) diskFull() error {
	if s := g.space.Load(); s.full {
		return fault.ErrDiskFull.WithDetail("the disk of this node has %d bytes left, and %d are kept in reserve; "+
			"reads and deletes go on, and writes do as soon as there is space", s.free, s.reserve)
	}
	if g.othersFull.Load() {
		return fault.ErrDiskFull.WithDetail("the disk of the leader is full, or those of so many members that the others are no majority; " +
			"reads and deletes go on, and writes do as soon as there is space")
	}
	return nil
}

func (g *admission) overQuota(c *store.Command, size int) error {
	if g.quota == 0 {
		return nil
	}
	now := g.store.Size()
	after := now + uint64(size) + store.ItemOverhead
	if after+queueSizeMax <= g.quota || after+uint64(g.waiting()) <= g.quota {
		return nil
	}
	if c.Op == store.OpPut {
		if old, _, ok := g.store.Get(c.Key); ok && len(c.Value) <= len(old.Value) {
			return nil
		}
	}
	return fault.ErrQuota.WithDetail("the store has %d bytes and may have %d; delete keys, or start the nodes with a larger --quota-bytes", now, g.quota)
}

// writable says why the node takes no writes but deletes at present.
func (g *admission) writable() error {
	if err := g.diskFull(); err != nil {
		return err
	}
	return g.overQuota(&store.Command{Op: store.OpTxn}, 0)
}

// describe adds to a status what admission knows.
func (g *admission) describe(st *httpapi.NodeStatus) {
	sum, space := g.store.Sums().Now, g.space.Load()
	st.StateSum = fmt.Sprintf("%016x", sum.Sum)
	st.AppliedIndex = sum.Index // that it is the sum of
	st.QuotaBytes = g.quota
	st.DiskFreeBytes, st.DiskReserveBytes = space.free, space.reserve
	st.Divergence = g.current().String()
	if e, ok := errors.AsType[*fault.Error](errors.Join(g.serving(), g.writable())); ok {
		st.ReadOnly = e.Code
	}
}

// health is what the others are told.
func (g *admission) health() health {
	s := g.space.Load()
	return health{Member: g.id, Sums: g.store.Sums(), Level: g.store.Knows(), DiskFull: s.full, DiskClosed: s.closed}
}

// isClosed says whether a member has said that it takes no entries.
func (g *admission) isClosed(id uint64) bool { return (*g.others.Load())[id].DiskClosed }

// watchDisk looks at the disk until ctx ends.
func (n *node) watchDisk(ctx context.Context) error {
	tick := time.NewTicker(spaceEvery)
	defer tick.Stop()
	for {
		if err := n.admission.lookAtDisk(); err != nil {
			return err
		}
		if g := n.admission; g.space.Load().full && time.Since(g.lastReleased) >= releaseEvery {
			g.lastReleased = time.Now()
			n.loop.wantSnapshot()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
