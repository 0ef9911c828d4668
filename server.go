package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
)

// This file builds a node from its parts, starts them, waits, and closes them.
// Every goroutine of the process is started here or by something that is
// closed here.

// Steps of a graceful stop; together they stay below the 5 seconds after which
// a supervisor loses patience.
const (
	// noticeTime is how long a node that stops goes on serving, with answers
	// that tell clients to close their connection. Without it a request that is
	// on its way to a connection as that is closed would get no answer.
	noticeTime      = 250 * time.Millisecond
	transferTimeout = time.Second
	drainTimeout    = 3 * time.Second
)

// node is a running member. It implements backend.
type node struct {
	*loop
	config  config
	cluster uint64
	store   *kvstore
	hub     *hub
	journal *journal // nil = none
	guard   *guard
	disk    *measuredDisk
	logger  *zap.Logger
	level   zap.AtomicLevel

	directory uint64 // number of the data directory
	fresh     bool   // it was empty, and this member did not join
	// informed is set when this node may tell others who the members are: what it
	// has on disk may not be applied yet, or out of date.
	informed *atomic.Bool
}

func (n *node) status() nodeStatus {
	s := n.loop.status.Load()
	st := nodeStatus{
		ID:              n.config.id,
		ClusterID:       fmt.Sprintf("%x", n.cluster),
		LeaderID:        s.leader,
		Role:            s.role,
		Term:            s.term,
		CommittedIndex:  s.committed,
		AppliedIndex:    n.store.applied(),
		ResourceVersion: n.store.version(),
		Version:         version,
		Members:         n.store.members(),
		StateBytes:      n.store.size(),
	}
	n.guard.describe(&st)
	return st
}

// waitVersion returns once the store holds version rv.
func (n *node) waitVersion(ctx context.Context, timeout time.Duration, rv uint64) error {
	if err := n.serving(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := n.hub.waitVersion(ctx, rv); err != nil {
		if ctx.Err() != nil {
			return errReadTimeout
		}
		return err
	}
	return nil
}

// serve runs a node until ctx ends, then stops it gracefully. It returns nil
// after a graceful stop, and otherwise what went wrong.
func serve(ctx context.Context, cfg config, logger *zap.Logger, level zap.AtomicLevel) (err error) {
	disk, err := openStorage(cfg.dataDir, logger.Named("storage"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.close()) }()
	rec, fresh, err := recoverState(ctx, cfg, disk, logger)
	if err != nil {
		return err
	}
	if rec.state.removed[cfg.id] {
		return errRemoved
	}

	store := &kvstore{state: rec.state}
	store.setWindow(cfg.watchEvents, cfg.watchBytes)
	hub := newHub(store)
	n := &node{
		loop:    newLoop(cfg.tick, hub.notify, logger),
		config:  cfg,
		cluster: rec.identity.Cluster,
		store:   store,
		hub:     hub,
		disk:    newMeasuredDisk(disk),
		logger:  logger,
		level:   level,

		directory: rec.identity.Directory,
		fresh:     fresh,
		informed:  new(atomic.Bool),
	}
	if cfg.journal != "" {
		if n.journal, err = openJournal(cfg.journal, logger.Named("journal")); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.journal.close()) }()
	}
	n.guard = newGuard(&n.config, n.store, n.loop.waiting, logger.Named("guard"))
	if err := n.guard.lookAtDisk(); err != nil {
		return err
	}
	network, err := newPeerNetwork(cfg.id, n.cluster, disk, n.store, n.loop, n.informed, n.guard, logger.Named("peers"))
	if err != nil {
		return err
	}
	defer network.close()
	r, err := newReplica(replicaConfig{
		id:              cfg.id,
		session:         randomID(),
		electionTicks:   cfg.electionTicks,
		heartbeatTicks:  cfg.heartbeatTicks,
		snapshotEntries: cfg.snapshotEntries,
		snapshotBytes:   cfg.snapshotBytes,
		catchUpEntries:  catchUpEntriesDefault,
		log:             rec.log,
		store:           n.store,
		confState:       rec.confState,
		disk:            n.disk,
		transport:       network,
		driver:          n.loop,
		hook:            n.loop.at,
		logger:          logger,
	})
	if err != nil {
		return err
	}

	peerListener, err := listenPeers(cfg.listenPeer)
	if err != nil {
		return fmt.Errorf("listen for peers: %w", err)
	}
	clientListener, err := listen(ctx, cfg.listen, listenerConfig{connectionsMax: cfg.connectionsMax, refusal: httpRefusal()})
	if err != nil {
		return errors.Join(fmt.Errorf("listen for clients: %w", err), peerListener.Close())
	}
	return n.run(ctx, r, network, peerListener, clientListener)
}

// recoverState reads the data directory, or fills an empty one. fresh says that
// this member has promised nothing yet: it starts from what --cluster or a
// backup says.
func recoverState(ctx context.Context, cfg config, disk *storage, logger *zap.Logger) (rec *recovered, fresh bool, err error) {
	if rec, err = disk.load(); err != nil {
		return nil, false, err
	}
	id := identity{Member: cfg.id, Cluster: cfg.clusterID(), Joined: cfg.join, Directory: randomID()}
	if rec != nil {
		id = rec.identity
		if err := checkIdentity(cfg, id); err != nil {
			return nil, false, err
		}
	}
	members := cfg.members
	if id.Joined && (rec == nil || rec.empty()) {
		info, err := findCluster(ctx, cfg, logger)
		if err != nil {
			return nil, false, err
		}
		if err := checkDirectory(cfg, info, id.Directory); err != nil {
			return nil, false, err
		}
		members = info.Members
		if id.Cluster, err = info.clusterID(); err != nil {
			return nil, false, err
		}
	}
	if rec == nil {
		if rec, err = disk.create(id); err != nil {
			return nil, false, err
		}
	}
	if !rec.empty() {
		return rec, !id.Joined && rec.untouched(), nil
	}
	for _, m := range members {
		rec.state.members[m.ID] = m
	}
	if id.Joined {
		return rec, false, nil // a leader will send the state
	}
	rec.state.index, rec.state.term = firstIndex, firstTerm
	return rec, true, disk.bootstrap(rec, rec.state)
}

// checkDirectory refuses a member that was part of the cluster with another
// data directory. It has forgotten which entries it acknowledged and for whom it
// voted, so if it took part again, acknowledged writes could be lost.
func checkDirectory(cfg config, info *peerInfo, directory uint64) error {
	if slices.Contains(info.Removed, cfg.id) {
		return fmt.Errorf("node %d was removed from the cluster; add it again under a new ID", cfg.id)
	}
	if known := info.directoryOf(cfg.id); known != 0 && known != directory {
		return fmt.Errorf("node %d was part of this cluster with another data directory than %s, and must not come back without what that held: "+
			"remove it (curl -X DELETE http://NODE/-/v1/members/%d), then add it under a new ID", cfg.id, cfg.dataDir, cfg.id)
	}
	return nil
}

// checkFresh asks the other members whether this one, which has an empty
// directory, is really new. Before a majority has answered it must not vote.
func (n *node) checkFresh(ctx context.Context) error {
	if !n.fresh {
		return nil
	}
	n.informed.Store(true)         // all that a new cluster knows
	strangers := map[uint64]bool{} // that were reported
	retry := time.NewTicker(freshRetry)
	defer retry.Stop()
	for {
		answers := 1 // this member
		for _, m := range n.store.members() {
			if m.ID == n.config.id {
				continue
			}
			info, err := fetchPeerInfo(ctx, m.PeerURL)
			if err != nil {
				continue
			}
			if cluster, err := info.clusterID(); err != nil || cluster != n.cluster {
				if !strangers[m.ID] {
					strangers[m.ID] = true
					n.logger.Warn("a node of another cluster answers at the address of a member, and is ignored: stop it, or start this one "+
						"with the same --cluster and --cluster-token, or with --join if it joins that cluster",
						zap.String("peerURL", m.PeerURL), zap.String("cluster", info.Cluster), zap.String("own", fmt.Sprintf("%x", n.cluster)))
				}
				continue
			}
			if err := checkDirectory(n.config, info, n.directory); err != nil {
				return err
			}
			answers++
		}
		if answers > len(n.store.members())/2 {
			return nil
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return nil
		}
	}
}

const freshRetry = 50 * time.Millisecond

// announce makes known to the cluster where this node serves clients and which
// data directory it has.
func (n *node) announce(ctx context.Context) error {
	update := member{ID: n.config.id, ClientURL: n.config.clientURL, Directory: n.directory}
	value, err := json.Marshal(update)
	if err != nil {
		return err
	}
	retry := time.NewTicker(announceRetry)
	defer retry.Stop()
	for {
		if n.linearize(ctx, n.config.requestTimeout) == nil {
			n.informed.Store(true)
			m, ok := n.store.member(n.config.id)
			if ok && m.ClientURL == update.ClientURL && m.Directory == update.Directory {
				return nil
			}
			if _, err := n.propose(ctx, n.config.requestTimeout, command{op: opMember, value: string(value)}); err != nil {
				n.logger.Debug("announce this node", zap.Error(err))
			}
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return nil
		}
	}
}

const announceRetry = 20 * time.Millisecond

// errRemoved ends a node that was removed from its cluster.
var errRemoved = errors.New("this node was removed from the cluster; to come back it needs a new ID and an empty --data-dir")

func checkIdentity(cfg config, id identity) error {
	if id.Member != cfg.id {
		return fmt.Errorf("data directory %s belongs to node %d, not to --id %d", cfg.dataDir, id.Member, cfg.id)
	}
	if !id.Joined && !id.Recovered && id.Cluster != cfg.restoredClusterID(id.Backup) {
		return fmt.Errorf("data directory %s belongs to another cluster (%x): start it with the --cluster or --cluster-token that it was made with",
			cfg.dataDir, id.Cluster)
	}
	return nil
}

// findCluster asks the other nodes in --cluster until one tells which cluster
// it is in.
func findCluster(ctx context.Context, cfg config, logger *zap.Logger) (*peerInfo, error) {
	retry := time.NewTicker(time.Second)
	defer retry.Stop()
	for {
		var failed error
		for _, m := range cfg.members {
			if m.ID == cfg.id {
				continue
			}
			info, err := fetchPeerInfo(ctx, m.PeerURL)
			if err == nil {
				return info, nil
			}
			failed = err
		}
		logger.Info("waiting for a node of the cluster to answer", zap.Error(failed))
		select {
		case <-retry.C:
		case <-ctx.Done():
			return nil, errors.New("stopped before a node of the cluster to join answered")
		}
	}
}

// run starts everything and waits for the end.
func (n *node) run(ctx context.Context, r *replica, network *peerNetwork, peerListener net.Listener, clientListener *listener) error {
	peerServer := &http.Server{
		Handler:           network.handler(),
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          zap.NewStdLog(n.logger.Named("peers")),
	}
	front := &closingHandler{}
	checks := append(clusterChecks(n), check{"not-stopping", front.check})
	front.Handler = newHTTPAPI(httpConfig{
		id:           n.config.id,
		store:        n.store,
		hub:          n.hub,
		backend:      n,
		logger:       n.logger.Named("http"),
		timeout:      n.config.requestTimeout,
		bookmark:     n.config.watchBookmark,
		valueSizeMax: n.config.valueSizeMax,
		version:      version,
		newID:        newUUID,
		registry:     newRegistry(n, clientListener, checks),
		checks:       checks,
		level:        n.level,
		accessLog:    n.config.accessLog,
		profiles:     n.config.pprof,
	})
	clientServer := newHTTPServer(front, n.logger.Named("http"))

	// The parts stop in order, not all at once when ctx ends: the replica must
	// outlive the requests that wait for it.
	loopCtx, stopLoop := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoop()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return n.loop.run(loopCtx, r, n.checkFresh) })
	group.Go(func() error { return n.announce(ctx) })
	group.Go(func() error { return n.watchDisk(ctx) })
	group.Go(func() error { return n.exchange(ctx) })
	group.Go(func() error { return n.hub.run(ctx) }) // ends watches first: the client server waits for them
	if n.journal != nil {
		src := journalSource{store: n.store, hub: n.hub, linearize: n.linearize, stopped: n.loop.done}
		group.Go(func() error { return n.journal.run(ctx, src, n.config.journalSync) })
	}
	group.Go(func() error { return ignoreClosed(peerServer.Serve(peerListener)) })
	group.Go(func() error { return network.watch(ctx, n.config.peerSilenceMax()) })
	group.Go(func() error { return ignoreClosed(clientServer.Serve(clientListener)) })
	group.Go(func() error {
		select {
		case <-network.http.ErrorC: //nolint:errcheck // another member said that this one was removed
			stopLoop() // who waits would wait in vain
			return errRemoved
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error {
		<-ctx.Done() // a signal, or a part failed
		n.logger.Info("stopping")
		front.closing.Store(true)
		notice := time.After(noticeTime)
		n.transferLeadership()
		<-notice
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		err := clientServer.Shutdown(drain)
		clientListener.closeAll()
		stopLoop()
		return errors.Join(ignoreDeadline(err), peerServer.Close())
	})
	n.logger.Info("serving", zap.Uint64("id", n.config.id), zap.String("clients", n.config.listen),
		zap.String("peers", n.config.listenPeer), zap.String("data", n.config.dataDir),
		zap.Uint64("index", n.store.applied()), zap.Uint64("resourceVersion", n.store.version()), zap.String("version", version))
	err := group.Wait()
	if err == nil {
		n.logger.Info("stopped")
	}
	return err
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
		return errShuttingDown
	}
	return nil
}

// transferLeadership hands over, so that the others need no election timeout.
func (n *node) transferLeadership() {
	deadline := time.NewTimer(transferTimeout)
	defer deadline.Stop()
	poll := time.NewTicker(n.config.tick)
	defer poll.Stop()
	for n.loop.status.Load().leader == n.config.id {
		// More than once: at times a leader does not know which members are there.
		n.loop.call(func() error {
			n.loop.replica.transfer()
			return nil
		})
		select {
		case <-poll.C:
		case <-deadline.C:
			return
		case <-n.loop.done:
			return
		}
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// ignoreDeadline: connections that are still busy at the end are cut.
func ignoreDeadline(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

// randomID returns a number that nobody else has.
func randomID() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint64(b[:])
}
