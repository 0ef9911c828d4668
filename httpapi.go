package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/store"
)

// This file opens the ports of a node, and serves on them: its HTTP front
// (internal/httpapi) for clients, and what other members ask. They are open from
// before the node knows its cluster, so that it can say whom it waits for.

// ports are where a node is reached, from before it knows its cluster.
type ports struct {
	process        uint64 // a number of this life of the node, to know itself by
	peers, clients switchHandler
	front          *closingHandler // before clients
	peerServer     *http.Server
	clientServer   *http.Server
	peerListener   *listener
	clientListener *listener
	failed         chan error // of a server that ended by itself; has room for both
	work           sync.WaitGroup
	waitsFor       atomic.Pointer[[]string]
}

func openPorts(ctx context.Context, cfg *config, rec *recovered, logger *zap.Logger) (*ports, error) {
	var err error
	if cfg.listenPeer, err = cfg.peerAddress(rec); err != nil {
		return nil, err
	}
	if cfg.clientURL == "" {
		host, _, err := net.SplitHostPort(cfg.listenPeer)
		if err != nil {
			return nil, err
		}
		if cfg.clientURL, err = cfg.findClientURL(host); err != nil {
			return nil, err
		}
	}
	limit, err := openFilesMax()
	if err != nil {
		return nil, err
	}
	d, err := divideDescriptors(limit, cfg.connectionsMax)
	if err != nil {
		return nil, err
	}
	if d.clients < cfg.connectionsMax || d.peers < peersMaxDefault {
		logger.Warn("the limit of open files bounds the connections", zap.Uint64("openFiles", d.limit), zap.Int("clients", d.clients),
			zap.Int("maxConnections", cfg.connectionsMax), zap.Int("peers", d.peers))
	}
	p := &ports{process: randomID(), failed: make(chan error, 2)}
	if p.peerListener, err = listenPeers(ctx, cfg.listenPeer, d.peers); err != nil {
		return nil, fmt.Errorf("listen for peers: %w", err)
	}
	p.clientListener, err = listen(ctx, cfg.listen, listenerConfig{
		connectionsMax: d.clients, addressMax: cfg.clientPlaces(d.clients), keptMax: keptMax, refusal: httpapi.Refusal(),
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for clients: %w", err), p.peerListener.Close())
	}
	p.tell(peerInfo{Node: cfg.id, Process: p.process})
	p.clients.set(http.HandlerFunc(p.serveWaiting))
	p.waiting(nil)
	p.front = &closingHandler{Handler: &p.clients}
	p.peerServer = newPeerServer(&p.peers, logger.Named("peers"))
	p.clientServer = httpapi.NewServer(p.front, logger.Named("http"))
	p.work.Go(func() { p.failed <- ignoreClosed(p.peerServer.Serve(p.peerListener)) })
	p.work.Go(func() { p.failed <- ignoreClosed(p.clientServer.Serve(p.clientListener)) })
	return p, nil
}

// close ends what is still open.
func (p *ports) close() {
	_ = p.clientServer.Close() // both have been shut down, or there is nothing to lose
	_ = p.peerServer.Close()
	p.peerListener.closeAll()
	p.clientListener.closeAll()
	p.work.Wait()
}

// tell is what other nodes are told before this one is in a cluster.
func (p *ports) tell(info peerInfo) {
	p.peers.set(servePeers(func() peerInfo { return info }, nil, nil))
}

// waiting is what clients are told then.
func (p *ports) waiting(whom []string) { p.waitsFor.Store(&whom) }

func (p *ports) ask(ctx context.Context, members []store.Member) map[uint64]peerAnswer {
	return askPeers(ctx, members)
}

func (p *ports) now() time.Time { return time.Now() }

func (p *ports) pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// serveWaiting answers clients before the node is in a cluster.
func (p *ports) serveWaiting(w http.ResponseWriter, r *http.Request) {
	e := fault.ErrNoLeader
	switch r.URL.Path {
	case "/-/livez":
		httpapi.WriteBody(w, r, http.StatusOK, httpapi.TypeText, []byte("ok\n"))
		return
	case "/-/readyz":
		e = fault.ErrNotReady
	}
	why := append([]string{"this node is not in a cluster yet, it waits for others"}, *p.waitsFor.Load()...)
	e = e.WithDetail("%s", strings.Join(why, "; "))
	problem := httpapi.ProblemOf(r, e)
	httpapi.SetErrorHeaders(w.Header(), e)
	httpapi.WriteBody(w, r, problem.Status, httpapi.TypeProblem, problem.Encode())
}

// closingHandler asks clients to close their connection once closing is set.
type closingHandler struct {
	http.Handler
	closing atomic.Bool
}

func (h *closingHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.closing.Load() {
		w.Header().Set("Connection", "close")
	}
	h.Handler.ServeHTTP(w, r)
}

// check says whether the node goes on taking requests.
func (h *closingHandler) check(context.Context) error {
	if h.closing.Load() {
		return fault.ErrShuttingDown
	}
	return nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// front is what clients talk to from when the node is in its cluster.
func (n *node) front(p *ports, checks []httpapi.Check) http.Handler {
	return httpapi.New(httpapi.Config{
		ID:           n.config.id,
		Cluster:      fmt.Sprintf("%x", n.cluster),
		Store:        n.kvstore,
		Logger:       n.logger.Named("http"),
		Timeout:      n.config.requestTimeout,
		Bookmark:     n.config.watchBookmark,
		ValueSizeMax: n.config.valueSizeMax,
		Version:      version,
		NewID:        httpapi.NewUUID,
		Client:       peerClient,
		Hosts:        n.config.hostNames(),
		Origins:      n.config.allowedOrigins,
		OneAddress:   p.clientListener.config.addressMax == p.clientListener.config.connectionsMax,
		Registry:     newRegistry(n, p.clientListener, checks),
		Checks:       checks,
		Level:        n.level,
		AccessLog:    n.config.accessLog,
		Profiles:     n.config.pprof,
	})
}
