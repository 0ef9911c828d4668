package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
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
}

func newPeerNetwork(id, cluster uint64, s *storage, st *kvstore, l *loop, logger *zap.Logger) (*peerNetwork, error) {
	n := &peerNetwork{id: id, logger: logger, storage: s, loop: l, store: st, peers: map[uint64]member{}}
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

// close ends all connections.
func (n *peerNetwork) close() { n.http.Stop() }

// handler serves the peer port.
func (n *peerNetwork) handler() http.Handler {
	raftHandler := n.http.Handler()
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+peerInfoPath, n.serveInfo)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		// rafthttp would connect to whatever addresses a stranger names here.
		r.Header.Del("X-PeerURLs")
		raftHandler.ServeHTTP(w, r)
	})
	return mux
}

// send implements transport.
func (n *peerNetwork) send(msgs []*raftpb.Message) {
	rest := msgs[:0:0]
	for _, m := range msgs {
		if m.GetType() == raftpb.MsgSnap {
			n.sendSnapshot(m)
		} else {
			rest = append(rest, m)
		}
	}
	n.http.Send(rest)
}

// sendSnapshot streams the body behind the message, so that neither side holds
// it in memory as bytes.
func (n *peerNetwork) sendSnapshot(m *raftpb.Message) {
	index := m.GetSnapshot().GetMetadata().GetIndex()
	f, err := os.Open(n.storage.bodyPath(index))
	if err != nil {
		n.logger.Error("cannot send snapshot", zap.Uint64("member", m.GetTo()), zap.Error(err))
		n.ReportSnapshot(m.GetTo(), raft.SnapshotFailure)
		return
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
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
}

// Process implements rafthttp.Raft: a message came in. It must not block, since
// it holds up all that the same peer sends.
func (n *peerNetwork) Process(_ context.Context, m *raftpb.Message) error {
	if n.store.isRemoved(m.GetFrom()) {
		return errPeerRemoved
	}
	if err := checkMessage(m, n.id); err != nil {
		n.logger.Warn("refused message", zap.Uint64("from", m.GetFrom()), zap.Stringer("type", m.GetType()), zap.Error(err))
		return nil // rafthttp would panic the connection's goroutine on an error, and the peer sends again
	}
	if m.GetType() != raftpb.MsgSnap {
		if err := n.loop.deliver(message{Message: m}); err != nil && !errors.Is(err, errInboxFull) {
			return err
		}
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

var errPeerRemoved = errors.New("the sender was removed from the cluster")

// IsIDRemoved implements rafthttp.Raft.
func (n *peerNetwork) IsIDRemoved(id uint64) bool { return n.store.isRemoved(id) }

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
	if m.GetFrom() == raft.None || m.GetFrom() == self {
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
			_, _, _, err = decodeMemberChange(e)
		default:
			err = fmt.Errorf("entries of type %s are not used", e.GetType())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// peerInfoPath is where a member tells one that wants to join which cluster
// this is and who is in it.
const peerInfoPath = "/-/peer"

// peerInfo is the answer there.
type peerInfo struct {
	Cluster string   `json:"cluster"` // hexadecimal
	Members []member `json:"members"`
}

func (n *peerNetwork) serveInfo(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	info := peerInfo{Cluster: n.http.ClusterID.String(), Members: n.store.members()}
	if err := json.NewEncoder(w).Encode(info); err != nil {
		n.logger.Debug("answer peer", zap.Error(err))
	}
}

// fetchPeerInfo asks the member at url which cluster it is in.
func fetchPeerInfo(ctx context.Context, url string) (cluster uint64, members []member, err error) {
	ctx, cancel := context.WithTimeout(ctx, peerDialTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+peerInfoPath, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, nil, fmt.Errorf("%s answered %s", url, resp.Status)
	}
	var info peerInfo
	if err := json.NewDecoder(io.LimitReader(resp.Body, peerInfoSizeMax)).Decode(&info); err != nil {
		return 0, nil, fmt.Errorf("%s: %w", url, err)
	}
	cluster, err = strconv.ParseUint(info.Cluster, 16, 64)
	return cluster, info.Members, err
}

const peerInfoSizeMax = 1 << 20 // bytes
