package main

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	etcdversion "go.etcd.io/etcd/api/v3/version"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"raftrv/internal/httpapi"
	"raftrv/internal/store"
)

// This file is the transport between members: a link to each of them, with a
// check in front of what they send. Whoever can open a connection to the peer
// port can still forge messages; see the README on who may reach it.

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
//
// The loop never waits for it: send drops what a link does not take at once, and
// links are opened and closed by run, on a goroutine of its own.
type peerNetwork struct {
	id, cluster    uint64
	logger         *zap.Logger
	rafthttpLogger *zap.Logger
	rafthttpLevel  zap.AtomicLevel
	storage        *storage
	loop           *loop
	store          *store.Store
	admission      *admission
	// removed has room for one error: somebody says that this member was removed.
	removed  chan error
	refusals *refusals
	bodies   atomic.Int64 // bytes of the messages that are being read from requests
	arriving atomic.Bool  // a snapshot

	members atomic.Pointer[[]store.Member] // as the loop said last
	changed chan struct{}                  // holds one token: whom this node talks to is new
	renamed chan struct{}                  // holds one token: whom it would talk to is new
	knocked chan struct{}                  // holds one token: a node that has no link has called
	knocks  chan uint64                    // who said to be a member and has no link
	// proven are the addresses at which members have said who they are.
	proven atomic.Pointer[map[uint64]string]
	// reported are the members that others list and this node does not know.
	reported atomic.Pointer[map[uint64]store.Member]
	links    atomic.Pointer[map[uint64]*link]
	work     sync.WaitGroup // links that close, snapshots that are sent
}

func newPeerNetwork(id, cluster uint64, s *storage, st *store.Store, l *loop, g *admission, logger *zap.Logger) *peerNetwork {
	n := &peerNetwork{
		id: id, cluster: cluster, logger: logger, storage: s, loop: l, store: st, admission: g,
		removed: make(chan error, 1),
		changed: make(chan struct{}, 1),
		renamed: make(chan struct{}, 1),
		knocks:  make(chan uint64, knocksMax),
		knocked: make(chan struct{}, 1),
	}
	n.members.Store(&[]store.Member{})
	n.links.Store(&map[uint64]*link{})
	n.reported.Store(&map[uint64]store.Member{})
	n.proven.Store(&map[uint64]string{})
	// rafthttp reports every step of every connection, and every message that it drops, from the loop's goroutine.
	n.rafthttpLogger = logger.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Second, 1, 0)
	}))
	n.rafthttpLevel = zap.NewAtomicLevelAt(zap.DebugLevel)
	n.refusals = &refusals{logger: n.rafthttpLogger}
	if !logger.Core().Enabled(zap.DebugLevel) {
		n.rafthttpLevel.SetLevel(zap.WarnLevel)
	}
	n.rafthttpLogger = n.rafthttpLogger.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return quietCore{c, n.rafthttpLevel} }))
	return n
}

// quietCore passes on what has at least a level. Unlike zap.IncreaseLevel it does
// not complain if the core has a higher one.
type quietCore struct {
	zapcore.Core
	least zap.AtomicLevel
}

func (c quietCore) Enabled(l zapcore.Level) bool { return c.least.Enabled(l) && c.Core.Enabled(l) }

func (c quietCore) With(f []zapcore.Field) zapcore.Core { return quietCore{c.Core.With(f), c.least} }

func (c quietCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.least.Enabled(e.Level) {
		return ce
	}
	return c.Core.Check(e, ce)
}

// listenPeers listens for the other members. All of them may be on one machine, but
// then they are few. A connection ends when nothing can be written to it for
// rafthttp.ConnWriteTimeout.
func listenPeers(ctx context.Context, address string, connectionsMax int) (*listener, error) {
	return listen(ctx, address, listenerConfig{connectionsMax: connectionsMax, addressMax: (connectionsMax + 1) / 2, writeTimeout: rafthttp.ConnWriteTimeout})
}

// newPeerServer returns a server for the peer port.
func newPeerServer(handler http.Handler, logger *zap.Logger) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: httpapi.HeaderTimeout,
		ReadTimeout:       paceGrace, // of the whole request, unless whoever serves it gives it more
		IdleTimeout:       httpapi.IdleTimeout,
		MaxHeaderBytes:    httpapi.HeaderSizeMax,
		ErrorLog:          zap.NewStdLog(logger),
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, peerConnKey{}, c) },
	}
}

// peerConnKey is where the context of a request has its connection.
type peerConnKey struct{}

// close ends all links and waits for them.
func (n *peerNetwork) close() {
	if !n.rafthttpLogger.Core().Enabled(zap.DebugLevel) {
		n.rafthttpLevel.SetLevel(zap.ErrorLevel) // rafthttp warns of each connection that it closes itself
	}
	for _, l := range *n.links.Swap(&map[uint64]*link{}) {
		n.work.Go(l.close)
	}
	n.work.Wait()
}

// handler serves the peer port.
func (n *peerNetwork) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(rafthttp.ProbingPrefix, new(rafthttp.Transport).Handler())
	mux.HandleFunc("/", n.serveRaft)
	return mux
}

// serveRaft passes a request of a member on to its link.
func (n *peerNetwork) serveRaft(w http.ResponseWriter, r *http.Request) {
	// rafthttp would connect to whatever addresses a stranger names here.
	r.Header.Del("X-PeerURLs")
	cluster := types.ID(n.cluster).String()
	if r.Header.Get("X-Etcd-Cluster-ID") != cluster {
		n.refusals.add(raft.None, refuse(refusedCluster, "the request is for another cluster"))
		w.Header().Set("X-Etcd-Cluster-ID", cluster)
		refusePeer(w, rafthttp.ErrClusterIDMismatch.Error(), http.StatusPreconditionFailed)
		return
	}
	from, err := types.IDFromString(r.Header.Get("X-Server-From"))
	if err != nil {
		n.refusals.add(raft.None, refuse(refusedHeader, "X-Server-From: %w", err))
		refusePeer(w, "the request does not say who sends it", http.StatusBadRequest)
		return
	}
	if n.store.TellsRemoved(n.id, uint64(from)) {
		n.refusals.add(uint64(from), refuse(refusedStranger, "the sender was removed"))
		refusePeer(w, errPeerRemoved.Error(), http.StatusGone)
		return
	}
	l := (*n.links.Load())[uint64(from)]
	versions := checkVersions(r.Header)
	switch {
	case l == nil:
		n.refusals.add(uint64(from), refuse(refusedStranger, "the sender is no member, as far as this one knows, or not found at its address yet"))
		refusePeer(w, "the sender is no member, as far as this one knows, or not found at its address yet", http.StatusNotFound)
		n.knock(uint64(from))
		wake(n.knocked)
	case versions != nil:
		n.refusals.add(uint64(from), versions)
		refusePeer(w, versions.Error(), http.StatusBadRequest)
	case r.URL.Path == rafthttp.RaftSnapshotPrefix:
		l.receiveSnapshot(w, r)
	case r.URL.Path == rafthttp.RaftPrefix:
		l.receiveMessage(w, r)
	default:
		n.knock(uint64(from)) // it may have moved
		l.serve(w, r)
	}
}

// errPeerRemoved tells a member that was removed to stop, with a status that
// rafthttp on its side understands.
var errPeerRemoved = errors.New("the sender was removed from the cluster")

// refusePeer answers a request that is not passed to rafthttp.
func refusePeer(w http.ResponseWriter, why string, status int) {
	w.Header().Set("X-Server-Version", etcdversion.Version) // without it rafthttp does not look at the status
	http.Error(w, why, status)
}

// send implements transport.
func (n *peerNetwork) send(msgs []*raftpb.Message) {
	links := *n.links.Load()
	for _, m := range msgs {
		l := links[m.GetTo()]
		switch {
		case m.GetType() == raftpb.MsgSnap:
			n.sendSnapshot(l, m)
		case l == nil:
			// It is not connected yet, or no member any more.
		case len(m.GetEntries()) > 0 && m.GetType() == raftpb.MsgApp && n.admission.isClosed(m.GetTo()):
			// It would not take them.
		default:
			l.send(m)
		}
	}
}

// setMembers implements transport.
func (n *peerNetwork) setMembers(members []store.Member) {
	n.members.Store(&members)
	wake(n.renamed)
	wake(n.changed)
}

// run opens and closes links until ctx ends, and gives members that are silent
// new ones.
//
// A connection on which every packet gets lost looks alive for long, and comes
// back to life late: TCP tries again after pauses that grow to two minutes.
// rafthttp means to time out its streams after 5 s without a heartbeat, but the
// timeout that it asks for never takes effect: NewTimeoutTransport of etcd's
// client/pkg/transport sets Dial, and net/http prefers the DialContext that is
// set as well.
func (n *peerNetwork) run(ctx context.Context, silenceMax time.Duration) error {
	tick := time.NewTicker(silenceMax / 4)
	defer tick.Stop()
	leader, since := raft.None, time.Now()
	for {
		n.relink(nil)
		select {
		case <-n.changed:
			continue
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
			n.relink(func(l *link) bool { return time.Since(time.Unix(0, l.heard.Load())) > silenceMax })
		}
	}
}

// relink opens links to members that have none and were found at their address,
// and closes those that nobody needs. Those that are worn are replaced.
func (n *peerNetwork) relink(worn func(*link) bool) {
	old, wanted := *n.links.Load(), map[uint64]store.Member{}
	for _, m := range n.found(slices.Collect(maps.Values(n.wanted()))) {
		wanted[m.ID] = m
	}
	links := maps.Clone(old)
	for id, l := range old {
		if want, ok := wanted[id]; !ok || want.PeerURL != l.member.PeerURL || worn != nil && worn(l) {
			delete(links, id)
		}
	}
	for id, m := range wanted {
		if links[id] != nil {
			continue
		}
		outbox := new(snapshotOutbox)
		if l := old[id]; l != nil {
			outbox = l.outbox
		}
		l, err := n.openLink(m, outbox)
		if err != nil {
			n.rafthttpLogger.Error("cannot connect to a member", zap.Error(err))
			continue
		}
		links[id] = l
	}
	n.links.Store(&links)
	for id, l := range old {
		if links[id] != l {
			n.work.Go(l.close)
		}
	}
}

// wanted returns whom this node talks to: the members as far as it knows, and
// those that it must have missed.
func (n *peerNetwork) wanted() map[uint64]store.Member {
	wanted := maps.Clone(*n.reported.Load())
	for _, id := range n.store.Removed() {
		delete(wanted, id)
	}
	for _, m := range *n.members.Load() {
		if m.ID != n.id {
			wanted[m.ID] = m
		}
	}
	return wanted
}

// receive takes a message that came over a link, with the state that came with
// it if it is a snapshot. Every message of another node comes through here.
// dialed says that this node opened the connection on which it came.
func (n *peerNetwork) receive(l *link, m *raftpb.Message, body *store.State, dialed bool) error {
	if err := n.check(l, m, dialed); err != nil {
		n.refusals.add(l.member.ID, err)
		return err
	}
	l.heard.Store(time.Now().UnixNano())
	if t := m.GetType(); (t == raftpb.MsgApp || t == raftpb.MsgProp) && !n.admission.receive(messageSize(m)) {
		return nil // it is sent again
	}
	_ = n.loop.deliver(message{Message: m, body: body}) // if the inbox is full or closed it is lost, as on the way
	return nil
}

// check says why a message that came over a link is not taken.
func (n *peerNetwork) check(l *link, m *raftpb.Message, dialed bool) error {
	return checkMessage(m, peerView{
		self: n.id, sender: l.member.ID, term: n.loop.status.Load().term, dialed: dialed,
		member: func(id uint64) bool { return (*n.links.Load())[id] != nil },
	})
}
