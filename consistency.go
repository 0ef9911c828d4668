package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/fsx"
	"raftrv/internal/store"
)

// This file is the consistency check: members tell each other the sums of their
// states (internal/store/checksum.go), and a node serves only while it has reason to think
// that its state is that of the cluster.
//
// A node that starts serves nothing before a majority of the voters, itself
// included, was found to have its state; only while there is no leader it tells
// what it has to those who ask for no more. From then on silence changes nothing,
// good or bad. Another state at some voter, without a majority for any, is a
// doubt, which ends when a majority has the state of this node. A majority for
// another state is final: it is written down in the data directory, so that
// starting the node again does not make it trusted again.

const (
	exchangeEvery = 500 * time.Millisecond // between two looks at the other members
	// firstExchangeEvery is that before the first comparison, for which requests wait.
	firstExchangeEvery = 10 * time.Millisecond
)

// divergedName is the file that says that this directory's state was found
// wrong. Nothing deletes it but a person who knows better, since the directory
// is to be replaced.
const divergedName = "diverged"

// divergedNote is what is in it.
type divergedNote struct {
	Member      uint64    `json:"member"`
	Index       uint64    `json:"index"` // applied by then
	Sum         string    `json:"stateSum"`
	DiffersFrom []uint64  `json:"differsFrom"`
	Time        time.Time `json:"time"`
}

// consistency is what a node thinks of its own state. Only the goroutine of exchange
// changes it.
type consistency struct {
	verdict atomic.Int32
	path    string // of the file divergedName; "" = none
	noted   bool   // it is written

	// gate is told when the node begins to serve (nil) and when it ends to. nil =
	// nobody is.
	gate func(*fault.Error)

	checked     chan struct{} // closed at the end of the first wait
	checkedOnce sync.Once
}

func newConsistency(dir string) *consistency {
	o := &consistency{checked: make(chan struct{})}
	if dir != "" {
		o.path = filepath.Join(dir, divergedName)
	}
	return o
}

func (o *consistency) current() store.Verdict { return store.Verdict(o.verdict.Load()) }

// release lets those go on who wait for the first comparison.
func (o *consistency) release() { o.checkedOnce.Do(func() { close(o.checked) }) }

// begin makes the node serve nothing until it was compared with the others, or
// at all if it was found wrong before.
func (g *admission) begin() error {
	_, err := os.Stat(g.path)
	switch {
	case err == nil:
		g.noted = true
		g.set(store.Diverged)
		g.report(store.Unchecked, store.Diverged, nil)
	case errors.Is(err, os.ErrNotExist):
		g.set(store.Unchecked)
	default:
		return err
	}
	return nil
}

// set changes the verdict. The gate opens before anybody is told that the node
// serves, and closes after everybody is told that it does not.
func (g *admission) set(v store.Verdict) {
	if g.gate != nil && v == store.Sound {
		g.gate(nil)
	}
	g.verdict.Store(int32(v))
	if g.gate != nil && v != store.Sound {
		g.gate(errorOf(v))
	}
	if v != store.Unchecked {
		g.release()
	}
}

// errorOf is what requests are told.
func errorOf(v store.Verdict) *fault.Error {
	switch v {
	case store.Sound:
		return nil
	case store.Unchecked:
		return fault.ErrUnchecked
	default:
		return fault.ErrDiverged
	}
}

// serving says why the node serves nothing at present.
func (g *admission) serving() error {
	if err := errorOf(g.current()); err != nil {
		return err
	}
	return nil
}

// suspect says whether the node has reason to think that its state is wrong.
func suspect(v store.Verdict) bool { return v == store.Doubtful || v == store.Diverged }

// judge compares this node's state with those of others.
func (g *admission) judge(others map[uint64]health) (before, now store.Verdict) {
	before = g.current()
	now, differ := g.compare(others)
	if before == store.Diverged || now == store.Unchecked {
		now = before
	}
	if now != before {
		g.set(now)
		g.report(before, now, differ)
	}
	if now == store.Diverged && !g.noted && g.path != "" {
		if err := g.note(differ); err != nil {
			g.logger.Error("cannot write down that this node's state is wrong; it is tried again", zap.Error(err))
		} else {
			g.noted = true
		}
	}
	return before, now
}

// compare says what others have told means for this node's state.
func (g *admission) compare(others map[uint64]health) (v store.Verdict, differ []uint64) {
	told := map[uint64]store.Sums{}
	for id, h := range others {
		told[id] = h.Sums
	}
	return store.Judge(g.store.OwnSums(), g.id, told, g.store.Voters())
}

// note writes the verdict down, so that it lasts.
func (g *admission) note(differ []uint64) error {
	sum := g.store.Sums().Now
	text, err := json.Marshal(divergedNote{Member: g.id, Index: sum.Index, Sum: fmt.Sprintf("%016x", sum.Sum), DiffersFrom: differ, Time: time.Now()})
	if err != nil {
		return err
	}
	return replaceFile(g.path, append(text, '\n'))
}

// replaceFile writes a file whole or not at all.
func replaceFile(path string, content []byte) error {
	temporary := path + ".tmp"
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, fsx.FileMode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return err
	}
	return fsx.SyncDir(filepath.Dir(path))
}

// hear takes what the others have told. It returns what that means for this
// node's state.
func (g *admission) hear(others map[uint64]health, leader uint64) (before, now store.Verdict) {
	g.others.Store(&others)
	voters, full := g.store.Voters(), 0
	for _, id := range voters {
		if others[id].DiskFull || id == g.id && g.space.Load().full {
			full++
		}
	}
	g.othersFull.Store(others[leader].DiskFull || full > 0 && len(voters)-full <= len(voters)/2)
	return g.judge(others)
}

// report logs what an operator should know.
func (g *admission) report(before, now store.Verdict, differ []uint64) {
	switch {
	case now == store.Diverged:
		g.logger.Error("the state of this node is not that of the majority: it serves nothing any more, also after a restart", zap.Uint64("node", g.id),
			zap.Uint64s("differsFrom", differ), zap.String("file", g.path), zap.String("do", fmt.Sprintf("remove it (curl -X DELETE http://NODE/-/v1/members/%d), "+
				"then add it under a new ID, with an empty --data-dir and --join; keep the old directory to find the reason", g.id)))
	case now == store.Doubtful:
		g.logger.Error("this node and others have different states and there is no majority for any: it serves nothing until there is one for its own", zap.Uint64("node", g.id),
			zap.Uint64s("differsFrom", differ), zap.String("do", "bring back the members that are down; if there are none, keep the one that you trust and remove the others"))
	case before == store.Unchecked:
		g.logger.Info("a majority has the state of this node: it serves", zap.Uint64("node", g.id), zap.Uint64s("differ", differ))
	default:
		g.logger.Warn("a majority has the state of this node: it serves again", zap.Uint64("node", g.id), zap.Uint64s("differ", differ))
	}
}

// exchange asks the other members how they are, until ctx ends.
func (n *node) exchange(ctx context.Context) error {
	defer n.admission.release()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
		every, leader := exchangeEvery, n.loop.status.Load().leader
		if n.admission.current() == store.Unchecked {
			every = firstExchangeEvery
			if leader == 0 || !n.informed.Load() {
				timer.Reset(every) // nobody could be served, and who is a voter may be out of date
				continue
			}
			// This node may have come to where the others were.
			n.admission.judge(*n.admission.others.Load())
		}
		_, now := n.admission.hear(n.askOthers(ctx, n.judgeEarly), leader)
		// Somebody else may lead better.
		if leader == n.config.id && (suspect(now) || n.admission.space.Load().full && !n.admission.othersFull.Load()) {
			n.loop.handOver()
		}
		if now != store.Unchecked {
			every = exchangeEvery
		}
		timer.Reset(every)
	}
}

// judgeEarly looks at the first answers of a round while others may still come,
// since one member may need long to be known as silent.
func (n *node) judgeEarly(others map[uint64]health) {
	if n.admission.current() == store.Unchecked && n.informed.Load() {
		if v, _ := n.admission.compare(others); v == store.Sound {
			n.admission.judge(others)
		}
	}
}

// askOthers returns what those members say that answer. After each answer it calls
// heard, unless that is nil.
func (n *node) askOthers(ctx context.Context, heard func(map[uint64]health)) map[uint64]health {
	var asking sync.WaitGroup
	answers := make(chan health)
	for _, m := range n.network.found(n.store.Members()) {
		if m.ID == n.config.id {
			continue
		}
		asking.Go(func() {
			asked := time.Now()
			info, err := fetchPeerInfo(ctx, m.PeerURL)
			took := time.Since(asked)
			if err != nil || info.Cluster != fmt.Sprintf("%x", n.cluster) {
				return
			}
			if info.Health.Member == 0 {
				info.Health.Member = m.ID // of an older program
			}
			if info.Health.Member == m.ID { // another one may answer at its address
				n.admission.roundTrips.WithLabelValues(strconv.FormatUint(m.ID, 10)).Observe(took.Seconds())
				answers <- info.Health
			}
		})
	}
	go func() {
		asking.Wait()
		close(answers)
	}()
	others := map[uint64]health{}
	for h := range answers {
		others[h.Member] = h
		if heard != nil {
			heard(others)
		}
	}
	return others
}
