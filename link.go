package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	stats "go.etcd.io/etcd/server/v3/etcdserver/api/v2stats"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"golang.org/x/time/rate"

	"raftrv/internal/httpapi"
	"raftrv/internal/store"
)

// link connects this node with one member, in both directions. It is a
// rafthttp.Transport of its own, so that a member that is stuck harms nobody
// else, and what comes over it comes from that member. It implements
// rafthttp.Raft for it.
//
// A link is never changed: a member that moves, or is silent, gets a new one.
type link struct {
	network *peerNetwork
	member  store.Member
	http    *rafthttp.Transport
	handler http.Handler // of what the member sends
	outbox  *snapshotOutbox

	heard atomic.Int64 // when its last message came, in unix nanoseconds
	// reporting says that the loop is about to be told that messages got lost.
	reporting atomic.Bool

	ctx    context.Context // ends with the link
	cancel context.CancelFunc

	// mu is held for reading while http sends. Nobody waits for anything while
	// holding it.
	mu     sync.RWMutex
	closed bool

	streamsMu sync.Mutex
	streams   map[string]net.Conn // on which this node writes to the member, by path; nil once closed
}

// openLink connects to a member, which may be away. outbox is that of the link before.
func (n *peerNetwork) openLink(m store.Member, outbox *snapshotOutbox) (*link, error) {
	urls := []string{m.PeerURL}
	if _, err := types.NewURLs(urls); err != nil { // rafthttp would panic
		return nil, fmt.Errorf("member %d: %w", m.ID, err)
	}
	l := &link{network: n, member: m, outbox: outbox, streams: map[string]net.Conn{}}
	l.heard.Store(time.Now().UnixNano()) // as long as it has to speak up
	id := types.ID(n.id).String()
	l.http = &rafthttp.Transport{
		Logger:             n.rafthttpLogger,
		DialTimeout:        peerDialTimeout,
		DialRetryFrequency: rate.Every(peerDialRetry),
		ID:                 types.ID(n.id),
		ClusterID:          types.ID(n.cluster),
		Raft:               l,
		ServerStats:        stats.NewServerStats(id, id),
		LeaderStats:        stats.NewLeaderStats(n.rafthttpLogger, id),
		ErrorC:             n.removed,
	}
	if err := l.http.Start(); err != nil {
		return nil, fmt.Errorf("start transport: %w", err)
	}
	if err := l.readStreams(); err != nil {
		return nil, err
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.handler = l.http.Handler()
	l.http.AddPeer(types.ID(m.ID), urls)
	return l, nil
}

// close ends the link. It waits for the goroutines behind it.
func (l *link) close() {
	l.cancel()
	l.mu.Lock()
	l.closed = true // from here on nobody enters http, whose lock Stop keeps while it waits
	l.mu.Unlock()
	// Stop waits for writers, and one that writes to a host that is gone would
	// sit there for rafthttp.ConnWriteTimeout.
	l.streamsMu.Lock()
	streams := l.streams
	l.streams = nil
	l.streamsMu.Unlock()
	for _, c := range streams {
		_ = c.Close() // that it ends is all that matters
	}
	l.http.Stop()
}

// send passes a message on, or drops it.
func (l *link) send(m *raftpb.Message) {
	if !l.mu.TryRLock() {
		return
	}
	defer l.mu.RUnlock()
	if !l.closed {
		l.http.Send([]*raftpb.Message{m})
	}
}

// serve answers a request of the member.
func (l *link) serve(w http.ResponseWriter, r *http.Request) {
	if conn, ok := r.Context().Value(peerConnKey{}).(net.Conn); ok && strings.HasPrefix(r.URL.Path, rafthttp.RaftStreamPrefix) {
		if !l.attach(r.URL.Path, conn) {
			refusePeer(w, "the link to the sender is being replaced", http.StatusServiceUnavailable)
			return
		}
		defer l.detach(r.URL.Path, conn)
		if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil { // nothing comes on it, for as long as it lasts
			refusePeer(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	l.handler.ServeHTTP(w, r)
}

// attach notes that the member reads a stream on conn. If it read that on another connection before,
// that one ends: the member has given it up, and a writer that is stuck there
// would keep this one waiting.
func (l *link) attach(stream string, conn net.Conn) bool {
	l.streamsMu.Lock()
	defer l.streamsMu.Unlock()
	if l.streams == nil {
		return false
	}
	if old := l.streams[stream]; old != nil {
		_ = old.Close() // given up
	}
	l.streams[stream] = conn
	return true
}

func (l *link) detach(stream string, conn net.Conn) {
	l.streamsMu.Lock()
	defer l.streamsMu.Unlock()
	if l.streams[stream] == conn {
		delete(l.streams, stream)
	}
}

// Process implements rafthttp.Raft, of which this node uses neither the half
// that reads requests nor the one that reads streams.
func (l *link) Process(context.Context, *raftpb.Message) error { return nil }

// receive takes a message that came alone. It does not block, since that would
// hold up all that the same member sends.
func (l *link) receive(m *raftpb.Message, dialed bool) error {
	if m.GetType() == raftpb.MsgSnap { // snapshots come with their state, see transfer.go
		err := refuse(refusedType, "a snapshot without its state")
		l.network.refusals.add(l.member.ID, err)
		return err
	}
	return l.network.receive(l, m, nil, dialed)
}

// receiveMessage answers a member that sends a message in a request of its own,
// as it does when there is no stream. Who sends says how large it is.
func (l *link) receiveMessage(w http.ResponseWriter, r *http.Request) {
	n := l.network
	refused := func(status int, err error) {
		n.refusals.add(l.member.ID, err)
		refusePeer(w, err.Error(), status)
	}
	size := r.ContentLength
	switch {
	case r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		refused(http.StatusMethodNotAllowed, refuse(refusedHeader, "the method must be POST"))
		return
	case size < 0:
		refused(http.StatusLengthRequired, refuse(refusedSize, "the request does not say how large it is"))
		return
	case size > peerMessageMax:
		refused(http.StatusRequestEntityTooLarge, refuse(refusedSize, "a message of %d bytes", size))
		return
	}
	held := int64(0)
	defer func() { n.bodies.Add(-held) }()
	body := &pacedReader{Reader: r.Body, control: http.NewResponseController(w)}
	data, err := httpapi.ReadGrowing(body, size, peerMessageMax, func(most int) error {
		more := int64(most) - held
		held += more
		if n.bodies.Add(more) > peerMessageMax {
			return refuse(refusedSize, "too many messages arrive at the same time")
		}
		return nil
	})
	switch {
	case reasonForRefusal(err) == refusedSize:
		refused(http.StatusServiceUnavailable, err)
		return
	case err != nil:
		refused(http.StatusBadRequest, refuse(refusedFormat, "read a message: %w", err))
		return
	}
	m := new(raftpb.Message)
	if err := unmarshalPeer(data, m); err != nil {
		refused(http.StatusBadRequest, err)
		return
	}
	if err := l.receive(m, false); err != nil {
		refusePeer(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// IsIDRemoved implements rafthttp.Raft. Who was removed has no link.
func (l *link) IsIDRemoved(uint64) bool { return false }

// ReportUnreachable implements rafthttp.Raft. Many reports make one.
func (l *link) ReportUnreachable(id uint64) {
	if !l.reporting.CompareAndSwap(false, true) {
		return
	}
	l.network.loop.reportUnreachable(id, func() { l.reporting.Store(false) })
}

// ReportSnapshot implements rafthttp.Raft, which sends none: see snapshotOutbox.
func (l *link) ReportSnapshot(uint64, raft.SnapshotStatus) {}
