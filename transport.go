package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	stats "go.etcd.io/etcd/server/v3/etcdserver/api/v2stats"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// This file is the transport between members: etcd's rafthttp, with a guard in
// front of what peers send. Whoever can open a connection to the peer port can
// still forge messages; see the README on who may reach it.

const (
	peerDialTimeout = time.Second
	peerDialRetry   = 50 * time.Millisecond // a quarter of the default election timeout

	// A member that should talk and does not for this long gets new connections:
	// a few election timeouts, but no less than it takes to connect.
	peerSilenceMin       = time.Second
	peerSilenceElections = 5
)

// peerNetwork implements transport. It also receives: what the other members
// send goes to the loop.
type peerNetwork struct {
	id      uint64
	logger  *zap.Logger
	storage *storage
	loop    *loop
	store   *kvstore
	http    *rafthttp.Transport
	peers   map[uint64]member // whom http knows; owned by the loop's goroutine
	guard   *guard

	// heard has for each of them when its last message came, in unix nanoseconds.
	// The map is replaced, never changed.
	heard atomic.Pointer[map[uint64]*atomic.Int64]
}

func newPeerNetwork(id, cluster uint64, s *storage, st *kvstore, l *loop, g *guard, logger *zap.Logger) (*peerNetwork, error) {
	n := &peerNetwork{id: id, logger: logger, storage: s, loop: l, store: st, guard: g, peers: map[uint64]member{}}
	n.heard.Store(&map[uint64]*atomic.Int64{})
	idText := types.ID(id).String()
	if !logger.Core().Enabled(zap.DebugLevel) {
		logger = logger.WithOptions(zap.IncreaseLevel(zap.WarnLevel)) // it reports every step of every connection
	}
	n.http = &rafthttp.Transport{
		Logger:             logger,
		DialTimeout:        peerDialTimeout,
		DialRetryFrequency: rate.Every(peerDialRetry),
		ID:                 types.ID(id),
		ClusterID:          types.ID(cluster),
		Raft:               n,
		Snapshotter:        s.snap,
		ServerStats:        stats.NewServerStats(idText, idText),
		LeaderStats:        stats.NewLeaderStats(logger, idText),
		ErrorC:             make(chan error, 1),
	}
	if err := n.http.Start(); err != nil {
		return nil, fmt.Errorf("start transport: %w", err)
	}
	return n, nil
}

// listenPeers listens for the other members. A connection ends when nothing can
// be read or written for rafthttp.ConnReadTimeout or ConnWriteTimeout.
func listenPeers(address string) (net.Listener, error) {
	return rafthttp.NewListener(url.URL{Scheme: "http", Host: address}, nil)
}

// close ends all connections.
func (n *peerNetwork) close() { n.http.Stop() }

// handler serves the peer port.
func (n *peerNetwork) handler() http.Handler {
	raftHandler := n.http.Handler()
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		// rafthttp would connect to whatever addresses a stranger names here.
		r.Header.Del("X-PeerURLs")
		if r.URL.Path == rafthttp.RaftSnapshotPrefix {
			if n.guard.space.Load().full {
				http.Error(w, errDiskFull.Error(), errDiskFull.status)
				return
			}
			r.Body = n.storage.receive(r.Body)
		}
		raftHandler.ServeHTTP(w, r)
	})
	return mux
}

// send implements transport.
func (n *peerNetwork) send(msgs []*raftpb.Message) {
	rest := msgs[:0:0]
	for _, m := range msgs {
		switch {
		case m.GetType() == raftpb.MsgSnap:
			n.sendSnapshot(m)
		case len(m.GetEntries()) > 0 && m.GetType() == raftpb.MsgApp && n.guard.isClosed(m.GetTo()):
			// It would not take them.
		default:
			rest = append(rest, m)
		}
	}
	n.http.Send(rest)
}

// sendSnapshot streams the body behind the message, so that neither side holds
// it in memory as bytes.
func (n *peerNetwork) sendSnapshot(m *raftpb.Message) {
	if n.guard.isClosed(m.GetTo()) || n.guard.current().suspect() { // its state is for nobody
		n.ReportSnapshot(m.GetTo(), raft.SnapshotFailure)
		return
	}
	index := m.GetSnapshot().GetMetadata().GetIndex()
	f, err := os.Open(n.storage.bodyPath(index))
	if err != nil {
		n.logger.Error("cannot send snapshot", zap.Uint64("member", m.GetTo()), zap.Error(err))
		n.ReportSnapshot(m.GetTo(), raft.SnapshotFailure)
		return
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close() // it was only read
		n.ReportSnapshot(m.GetTo(), raft.SnapshotFailure)
		return
	}
	n.logger.Info("sending snapshot", zap.Uint64("member", m.GetTo()), zap.Uint64("index", index), zap.Int64("bytes", info.Size()))
	n.http.SendSnapshot(snap.NewMessage(m, f, info.Size()))
}

// setMembers implements transport.
func (n *peerNetwork) setMembers(members []member) {
	gone := n.peers
	n.peers = map[uint64]member{}
	for _, m := range members {
		if m.ID == n.id {
			continue
		}
		old, known := gone[m.ID]
		delete(gone, m.ID)
		n.peers[m.ID] = m
		switch urls := []string{m.PeerURL}; {
		case !known:
			n.http.AddPeer(types.ID(m.ID), urls)
		case old.PeerURL != m.PeerURL:
			n.http.UpdatePeer(types.ID(m.ID), urls)
		}
	}
	for id := range gone {
		n.http.RemovePeer(types.ID(id))
	}
	heard := map[uint64]*atomic.Int64{}
	for id := range n.peers {
		if heard[id] = (*n.heard.Load())[id]; heard[id] == nil {
			heard[id] = new(atomic.Int64)
		}
	}
	n.heard.Store(&heard)
}

// watch gives members that are silent new connections, until ctx ends.
//
// A connection on which every packet gets lost looks alive for long, and comes
// back to life late: TCP tries again after pauses that grow to two minutes.
// rafthttp means to time out its streams after 5 s without a heartbeat, but the
// timeout that it asks for never takes effect: NewTimeoutTransport of etcd's
// client/pkg/transport sets Dial, and net/http prefers the DialContext that is
// set as well.
func (n *peerNetwork) watch(ctx context.Context, silenceMax time.Duration) error {
	tick := time.NewTicker(silenceMax / 4)
	defer tick.Stop()
	leader, since := raft.None, time.Now()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if l := n.loop.status.Load().leader; l != leader {
			leader, since = l, time.Now()
		}
		// A follower hears from its leader only, and has none soon after that went
		// silent.
		if (leader == raft.None || leader == n.id) && time.Since(since) > silenceMax {
			n.loop.call(func() error {
				n.reconnect(silenceMax)
				return nil
			})
		}
	}
}

// reconnect ends the connections to all members that were silent for so long,
// which makes rafthttp open new ones.
func (n *peerNetwork) reconnect(silenceMax time.Duration) {
	now := time.Now()
	for id, heard := range *n.heard.Load() {
		if now.Sub(time.Unix(0, heard.Load())) > silenceMax {
			heard.Store(now.UnixNano()) // give the new ones as much time
			n.http.RemovePeer(types.ID(id))
			n.http.AddPeer(types.ID(id), []string{n.peers[id].PeerURL})
		}
	}
}

// Process implements rafthttp.Raft: a message came in. It must not block, since
// it holds up all that the same peer sends.
func (n *peerNetwork) Process(_ context.Context, m *raftpb.Message) error {
	if n.store.tellsRemoved(n.id, m.GetFrom()) {
		return errPeerRemoved
	}
	if err := checkMessage(m, n.id); err != nil {
		n.logger.Warn("refused message", zap.Uint64("from", m.GetFrom()), zap.Stringer("type", m.GetType()), zap.Error(err))
		return nil // rafthttp would panic the connection's goroutine on an error, and the peer sends again
	}
	if heard := (*n.heard.Load())[m.GetFrom()]; heard != nil {
		heard.Store(time.Now().UnixNano())
	}
	if t := m.GetType(); (t == raftpb.MsgApp || t == raftpb.MsgProp) && !n.guard.receive(messageSize(m)) {
		return nil // it is sent again
	}
	if m.GetType() != raftpb.MsgSnap {
		_ = n.loop.deliver(message{Message: m}) // if the inbox is full or closed it is lost, as on the way
		return nil
	}
	return n.processSnapshot(m)
}

// processSnapshot reads the body that rafthttp has put on disk, here and not in
// the loop, where it would hold up heartbeats.
func (n *peerNetwork) processSnapshot(m *raftpb.Message) error {
	meta := m.GetSnapshot().GetMetadata()
	if meta.GetIndex() <= n.store.applied() {
		return n.loop.deliver(message{Message: m}) // raft ignores it and says how far this member is
	}
	st, err := n.storage.readBody(meta.GetIndex(), meta.GetTerm())
	if err != nil {
		if errors.Is(err, errSnapshotDamage) {
			// As long as the file is there rafthttp would not take another one.
			err = errors.Join(err, os.Remove(n.storage.bodyPath(meta.GetIndex())))
		}
		return fmt.Errorf("received snapshot: %w", err)
	}
	return n.loop.deliver(message{Message: m, body: &st})
}

// errPeerRemoved tells a member that was removed to stop, in the way that
// rafthttp on its side understands.
var errPeerRemoved = removedError{errors.New("the sender was removed from the cluster")}

type removedError struct{ error }

// WriteTo makes rafthttp answer with this status.
func (e removedError) WriteTo(w http.ResponseWriter) {
	http.Error(w, e.Error(), http.StatusGone)
}

// IsIDRemoved implements rafthttp.Raft.
func (n *peerNetwork) IsIDRemoved(id uint64) bool { return n.store.tellsRemoved(n.id, id) }

// ReportUnreachable implements rafthttp.Raft.
func (n *peerNetwork) ReportUnreachable(id uint64) {
	n.loop.call(func() error {
		n.loop.replica.raw.ReportUnreachable(id)
		return nil
	})
}

// ReportSnapshot implements rafthttp.Raft.
func (n *peerNetwork) ReportSnapshot(id uint64, status raft.SnapshotStatus) {
	n.loop.call(func() error {
		n.loop.replica.raw.ReportSnapshot(id, status)
		return nil
	})
}

// checkMessage refuses messages that no member sends. Several of them would
// panic raft, which trusts its callers.
func checkMessage(m *raftpb.Message, self uint64) error {
	if m.GetTo() != self {
		return fmt.Errorf("it is for member %d", m.GetTo())
	}
	if m.GetFrom() == raft.None || m.GetFrom() == self && !isForwarded(m) {
		return errors.New("it has no sender")
	}
	if raft.IsLocalMsg(m.GetType()) {
		return errors.New("its type never leaves a member")
	}
	switch m.GetType() {
	case raftpb.MsgProp:
		return checkProposal(m.GetEntries())
	case raftpb.MsgApp:
		for i, e := range m.GetEntries() {
			if e.GetIndex() != m.GetIndex()+1+uint64(i) {
				return errors.New("its entries have a gap")
			}
		}
	case raftpb.MsgHeartbeat, raftpb.MsgHeartbeatResp:
		if n := len(m.GetContext()); n != 0 && n != 8 {
			return fmt.Errorf("its context has %d bytes", n)
		}
	case raftpb.MsgReadIndex, raftpb.MsgReadIndexResp:
		if n := len(m.GetEntries()); n != 1 {
			return fmt.Errorf("it has %d contexts", n)
		}
	}
	return nil
}

// isForwarded says whether followers pass such a message on to the leader under
// the name of its first sender, to whom it may come back when that one leads by
// then.
func isForwarded(m *raftpb.Message) bool {
	switch m.GetType() {
	case raftpb.MsgProp, raftpb.MsgReadIndex, raftpb.MsgTransferLeader:
		return true
	default:
		return false
	}
}

func checkProposal(ents []*raftpb.Entry) error {
	if len(ents) == 0 {
		return errors.New("it proposes nothing")
	}
	for _, e := range ents {
		var err error
		switch e.GetType() {
		case raftpb.EntryNormal:
			_, _, err = decodeBatch(e.GetData())
		case raftpb.EntryConfChange:
			if _, _, _, err = decodeMemberChange(e); errors.Is(err, errNewer) {
				err = nil // its proposer gets an answer
			}
		default:
			err = fmt.Errorf("entries of type %s are not used", e.GetType())
		}
		if err != nil {
			return err
		}
	}
	return nil
}
