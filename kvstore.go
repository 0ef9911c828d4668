package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/store"
	"raftrv/internal/watch"
)

// This file is the replicated store: what every front talks to. It knows how new
// a read is, what the node does not take or serve at present, and where each
// command goes. What is behind it is the state of this node (internal/store), which
// the raft loop applies entries to, and the watches of it (internal/watch).

// kvstore is the replicated store of a node. Its methods may be called from any
// goroutine. It implements httpapi.Store.
type kvstore struct {
	loop      *loop
	config    config
	cluster   uint64
	store     *store.Store // the state of this node
	hub       *watch.Hub
	admission *admission
	network   *peerNetwork
	process   uint64 // a number of this life of the node
}

// Fresh implements httpapi.Store.
func (s *kvstore) Fresh(ctx context.Context, r httpapi.Read) error {
	switch {
	case !r.Local:
		return s.linearize(ctx, r.Timeout)
	case s.store.Version() >= r.Version:
		return s.serving(ctx, r.Timeout)
	default:
		return s.waitVersion(ctx, r.Timeout, r.Version)
	}
}

// Get implements httpapi.Store.
func (s *kvstore) Get(ctx context.Context, r httpapi.Read, key string) (it store.Item, rv uint64, ok bool, err error) {
	if err := s.Fresh(ctx, r); err != nil {
		return store.Item{}, 0, false, err
	}
	it, rv, ok = s.store.Get(key)
	return it, rv, ok, nil
}

// List implements httpapi.Store.
func (s *kvstore) List(ctx context.Context, r httpapi.Read, prefix, after string, limit int) ([]store.KeyItem, uint64, error) {
	if err := s.Fresh(ctx, r); err != nil {
		return nil, 0, err
	}
	items, rv := s.store.List(prefix, after, limit)
	return items, rv, nil
}

// Scan implements httpapi.Store.
func (s *kvstore) Scan(ctx context.Context, r httpapi.Read, prefix, after string) (*store.Scan, error) {
	if err := s.Fresh(ctx, r); err != nil {
		return nil, err
	}
	return s.store.Scan(prefix, after)
}

// Backup implements httpapi.Store.
func (s *kvstore) Backup(ctx context.Context, r httpapi.Read) (*store.Backup, error) {
	if err := s.Fresh(ctx, r); err != nil {
		return nil, err
	}
	return s.store.Backup()
}

// Watch implements httpapi.Store.
func (s *kvstore) Watch(ctx context.Context, timeout time.Duration, key string, isPrefix bool, from *uint64) (*watch.Watcher, uint64, error) {
	// From now on means after every write that was acknowledged. And a version that
	// this node does not have may be one that it will hear of soon.
	if err := s.Fresh(ctx, httpapi.Read{Timeout: timeout, Local: from != nil && *from <= s.store.Version()}); err != nil {
		return nil, 0, err
	}
	now := s.store.Version()
	rv := now
	if from != nil {
		rv = *from
	}
	if rv > now {
		return nil, 0, fault.ErrInvalid.WithDetail("resource version %d is in the future: the store is at %d", rv, now)
	}
	w, err := s.hub.Watch(key, isPrefix, rv)
	if err != nil {
		return nil, 0, fault.ErrExpired.WithDetail("events after the resource version have left the window of this node, which is now at %d: list again, or watch with initial=true", s.store.Version())
	}
	return w, rv, nil
}

// Version implements httpapi.Store.
func (s *kvstore) Version() uint64 { return s.store.Version() }

// Unchanged implements httpapi.Store.
func (s *kvstore) Unchanged(prefix, after string, from, to uint64) bool {
	return s.store.Unchanged(prefix, after, from, to)
}

// Level implements httpapi.Store.
func (s *kvstore) Level() int { return s.store.Level() }

// Rules implements httpapi.Store.
func (s *kvstore) Rules() *store.Rules { return s.store.Rules() }

// Members implements httpapi.Store.
func (s *kvstore) Members() []store.Member { return s.store.Members() }

// awaitServing returns once the node may serve, or why it may not, and what is
// left of timeout.
func (s *kvstore) awaitServing(ctx context.Context, timeout time.Duration) (left time.Duration, err error) {
	if s.admission.current() != store.Unchecked {
		return timeout, s.admission.serving()
	}
	start := time.Now()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-s.admission.checked:
	case <-timer.C:
	case <-ctx.Done():
	}
	err = s.admission.serving()
	if errors.Is(err, fault.ErrUnchecked) && s.loop.status.Load().leader == 0 {
		err = fault.ErrNoLeader
	}
	return max(0, timeout-time.Since(start)), err
}

// serving returns once the node may serve what it has, or why it may not. Without
// a leader there is nobody to compare with, and whoever asks for no more than
// what this node has is answered: it may be the last one that is left.
func (s *kvstore) serving(ctx context.Context, timeout time.Duration) error {
	if s.admission.current() == store.Unchecked && s.loop.status.Load().leader == 0 {
		return nil
	}
	_, err := s.awaitServing(ctx, timeout)
	return err
}

// linearize is that of the loop, unless the node must not serve.
func (s *kvstore) linearize(ctx context.Context, timeout time.Duration) error {
	timeout, err := s.awaitServing(ctx, timeout)
	if err != nil {
		return err
	}
	return s.loop.linearize(ctx, timeout)
}

// Apply implements httpapi.Store. Many commands are proposed together and answered
// in their order; an Idempotency-Key is for one alone.
//
// What is remembered of a retry is answered whatever the node could do with it now:
// it is committed. That may also become known while the retry waits.
func (s *kvstore) Apply(ctx context.Context, timeout time.Duration, commands ...store.Command) ([]store.Result, error) {
	var retry store.RetryID
	if len(commands) == 1 {
		retry = commands[0].Retry
	}
	if first, known := s.outcome(retry); known {
		return []store.Result{first}, nil
	}
	results, err := s.applyNew(ctx, timeout, commands)
	if err != nil {
		if first, known := s.outcome(retry); known {
			return []store.Result{first}, nil
		}
	}
	return results, err
}

// outcome returns what became of an earlier request with an Idempotency-Key, if
// this node knows and may tell it.
func (s *kvstore) outcome(id store.RetryID) (first store.Result, known bool) {
	if id.Key == "" || s.admission.serving() != nil && (s.admission.current() != store.Unchecked || s.loop.status.Load().leader != 0) {
		return store.Result{}, false
	}
	return s.store.Outcome(id)
}

func (s *kvstore) applyNew(ctx context.Context, timeout time.Duration, commands []store.Command) ([]store.Result, error) {
	timeout, err := s.awaitServing(ctx, timeout)
	if err != nil {
		return nil, err
	}
	for i := range commands {
		if err := s.admission.admit(&commands[i], commands[i].EncodedSizeMax()); err != nil {
			return nil, err
		}
	}
	results, err := s.loop.propose(ctx, timeout, commands...)
	if e, ok := errors.AsType[*fault.Error](err); ok && e.Code == fault.ErrLevel.Code {
		err = e.WithDetail("%s; %s", e.Detail, s.oldMembers(s.store.Level()+1))
	}
	return results, err
}

// awaitMembership returns once the node may change members, or why it may not, and
// what is left of timeout. One whose state is known to be wrong may take the wrong
// ones for members. With a doubt, removing those who differ is how a person says
// who is right.
func (s *kvstore) awaitMembership(ctx context.Context, timeout time.Duration) (left time.Duration, err error) {
	left, err = s.awaitServing(ctx, timeout)
	if s.admission.current() == store.Doubtful {
		err = nil
	}
	return left, err
}

// AddMember implements httpapi.Store.
func (s *kvstore) AddMember(ctx context.Context, timeout time.Duration, m store.Member) error {
	timeout, err := s.awaitMembership(ctx, timeout)
	if err != nil {
		return err
	}
	if err := s.checkAddress(ctx, m); err != nil {
		return err
	}
	return s.loop.AddMember(ctx, timeout, m)
}

// RemoveMember implements httpapi.Store.
func (s *kvstore) RemoveMember(ctx context.Context, timeout time.Duration, id uint64) error {
	timeout, err := s.awaitMembership(ctx, timeout)
	if err != nil {
		return err
	}
	return s.loop.RemoveMember(ctx, timeout, id)
}

// PromoteMember implements httpapi.Store.
func (s *kvstore) PromoteMember(ctx context.Context, timeout time.Duration, id uint64) error {
	timeout, err := s.awaitMembership(ctx, timeout)
	if err != nil {
		return err
	}
	return s.loop.PromoteMember(ctx, timeout, id)
}

// UpdateMember implements httpapi.Store.
func (s *kvstore) UpdateMember(ctx context.Context, timeout time.Duration, m store.Member) error {
	timeout, err := s.awaitMembership(ctx, timeout)
	if err != nil {
		return err
	}
	if err := s.admission.admit(&store.Command{Op: store.OpMember}, memberSizeMax); err != nil {
		return err
	}
	if err := s.checkAddress(ctx, m); err != nil {
		return err
	}
	return s.loop.UpdateMember(ctx, timeout, m)
}

// memberSizeMax is about what a change of a member takes in the log, in bytes.
const memberSizeMax = httpapi.MemberBodySizeMax

// TransferLeader implements httpapi.Store.
func (s *kvstore) TransferLeader(ctx context.Context, timeout time.Duration, id uint64) error {
	return s.loop.TransferLeader(ctx, timeout, id)
}

// Writable implements httpapi.Store.
func (s *kvstore) Writable() error { return s.admission.writable() }

// Status implements httpapi.Store.
func (s *kvstore) Status() httpapi.NodeStatus {
	now := s.loop.status.Load()
	st := httpapi.NodeStatus{
		ID:              s.config.id,
		ClusterID:       fmt.Sprintf("%x", s.cluster),
		LeaderID:        now.leader,
		Role:            now.role,
		Term:            now.term,
		CommittedIndex:  now.committed,
		AppliedIndex:    s.store.Applied(),
		ResourceVersion: s.store.Version(),
		Version:         version,
		Members:         httpapi.Members(s.store.Members()),
		FeatureLevel:    s.store.Level(),
		StateBytes:      s.store.Size(),
	}
	s.admission.describe(&st)
	return st
}

// waitVersion returns once the store holds version rv.
func (s *kvstore) waitVersion(ctx context.Context, timeout time.Duration, rv uint64) error {
	timeout, err := s.awaitServing(ctx, timeout)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := s.hub.WaitVersion(ctx, rv); err != nil {
		if ctx.Err() != nil {
			return fault.ErrReadTimeout
		}
		return err
	}
	return nil
}
