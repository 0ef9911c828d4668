package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"raftrv/internal/httpapi"
	"raftrv/internal/store"
	"raftrv/internal/watch"
)

// This file builds a node from its parts, starts them, waits, and closes them.
// Every goroutine of the process is started here or by something that is
// closed here.

// Steps of a graceful stop; together with workGrace they stay below the 5 seconds
// after which a supervisor loses patience. stopTimeout is for what no step
// bounds: a disk that hangs.
const (
	// noticeTime is how long a node that stops goes on serving, with answers
	// that tell clients to close their connection. Without it a request that is
	// on its way to a connection as that is closed would get no answer.
	noticeTime      = 250 * time.Millisecond
	transferTimeout = time.Second
	drainTimeout    = 2500 * time.Millisecond
	// answerTimeout is for those who still wait then: the end of the loop is their
	// answer.
	answerTimeout = 500 * time.Millisecond
	stopTimeout   = 4800 * time.Millisecond
)

// node is a running member: its store, and what keeps that alive.
type node struct {
	*kvstore
	journal  *watch.Journal // nil = none
	refusals *refusals      // of what peers sent
	disk     *measuredDisk
	logger   *zap.Logger
	level    zap.AtomicLevel

	directory uint64         // number of the data directory
	secret    secret         // of the data directory
	founders  []store.Member // see identity
	fresh     bool           // see checkFresh
	// informed is set when this node may tell others who the members are: what it
	// has on disk may not be applied yet, or out of date.
	informed *atomic.Bool
}

// serve runs a node until ctx ends, then stops it gracefully. It returns nil
// after a graceful stop, and otherwise what went wrong.
func serve(ctx context.Context, cfg config, logger *zap.Logger, level zap.AtomicLevel) (err error) {
	if err := cfg.checkSelf(); err != nil {
		return err
	}
	disk, err := openStorage(cfg.dataDir, logger.Named("storage"))
	if err != nil {
		return err
	}
	closeDisk := cfg.boundEnd(ctx, logger, disk.close)
	defer func() { err = errors.Join(err, closeDisk()) }()
	defer context.AfterFunc(ctx, disk.interrupt)()
	rec, err := disk.load()
	if errors.Is(err, errInterrupted) {
		return nil // stopped while it read a snapshot
	}
	if err != nil {
		return err
	}
	known, err := disk.loadSecret() // before anybody waits for an answer
	if err != nil {
		return err
	}
	p, err := openPorts(ctx, &cfg, rec, logger)
	if err != nil {
		return err
	}
	defer p.close()
	rec, err = (&place{cfg: cfg, disk: disk, process: p.process, around: p, logger: logger}).find(ctx, rec)
	if err != nil || rec == nil {
		if errors.Is(err, errInterrupted) {
			err = nil
		}
		return err
	}
	if rec.state.Removed[cfg.id] {
		return errRemoved
	}
	if err := rec.checkReadable(); err != nil {
		return err
	}

	n, err := newNode(cfg, rec, disk, p.process, logger)
	if err != nil {
		return err
	}
	n.secret, n.level = known, level
	if cfg.journal != "" {
		if n.journal, err = watch.OpenJournal(cfg.journal, cfg.dataDir, n.cluster, logger.Named("journal")); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.journal.Close()) }()
	}
	if err := errors.Join(n.admission.lookAtDisk(), n.admission.begin()); err != nil {
		return err
	}
	network := newPeerNetwork(cfg.id, n.cluster, disk, n.store, n.loop, n.admission, logger.Named("peers"))
	defer network.close()
	n.refusals = network.refusals
	r, err := n.newReplica(rec, network)
	if err != nil {
		return err
	}

	n.network = network
	p.peers.set(servePeers(n.peerInfo, n.secret, network.handler()))
	return n.run(ctx, r, network, p)
}

// newNode puts a node together on what its directory has. process is a number of
// this life of it.
func newNode(cfg config, rec *recovered, disk *storage, process uint64, logger *zap.Logger) (*node, error) {
	kv := &store.Store{State: rec.state, LevelMax: cfg.levelMax}
	if err := kv.CheckLevel(rec.state.Level); err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.dataDir, err)
	}
	kv.SetWindow(cfg.watchEvents, cfg.watchBytes)
	hub := watch.NewHub(kv)
	n := &node{
		kvstore: &kvstore{
			loop:    newLoop(cfg.tick, hub.Notify, logger),
			config:  cfg,
			cluster: rec.identity.Cluster,
			store:   kv,
			hub:     hub,
			process: process,
		},
		disk:   newMeasuredDisk(disk),
		logger: logger,

		directory: rec.identity.Directory,
		founders:  rec.identity.Founders,
		fresh:     !rec.identity.Joined && len(rec.identity.Founders) == 0 && rec.untouched(),
		informed:  new(atomic.Bool),
	}
	n.loop.interrupt = disk.interrupt
	n.loop.watch.most = cfg.electionTimeout()
	n.admission = newAdmission(&n.config, n.store, n.loop.waiting, logger.Named("checks"))
	n.admission.gate = hub.Gate
	return n, nil
}

// newReplica makes the replica, which n's loop will drive.
func (n *node) newReplica(rec *recovered, network *peerNetwork) (*replica, error) {
	return newReplica(replicaConfig{
		id:              n.config.id,
		session:         randomID(),
		electionTicks:   n.config.electionTicks,
		heartbeatTicks:  n.config.heartbeatTicks,
		snapshotEntries: n.config.snapshotEntries,
		snapshotBytes:   n.config.snapshotBytes,
		catchUpEntries:  catchUpEntriesDefault,
		log:             rec.log,
		store:           n.store,
		confState:       rec.confState,
		disk:            n.disk,
		transport:       network,
		refused:         network.refusals.add,
		driver:          n.loop,
		hook:            n.loop.failpoint,
		logger:          n.logger,
	})
}

// run starts everything and waits for the end.
func (n *node) run(ctx context.Context, r *replica, network *peerNetwork, p *ports) error {
	front := p.front
	checks := append(httpapi.ClusterChecks(n), httpapi.Check{Name: "not-stopping", Run: front.check})
	p.clients.set(n.front(p, checks))

	// The parts stop in order, not all at once when ctx ends: the replica must
	// outlive the requests that wait for it.
	loopCtx, stopLoop := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoop()
	group, ctx := errgroup.WithContext(ctx)
	defer n.config.boundStop(ctx, n.logger)()
	group.Go(func() error { return n.loop.run(loopCtx, r, n.admit) })
	group.Go(func() error { return n.loop.watch.run(ctx, n.logger) })
	group.Go(func() error { return n.announce(ctx) })
	group.Go(func() error { return n.watchDisk(ctx) })
	group.Go(func() error { return n.exchange(ctx) })
	group.Go(func() error { return n.keepLevel(ctx) })
	group.Go(func() error { return n.hub.Run(ctx) }) // ends watches first: the client server waits for them
	if n.journal != nil {
		src := watch.JournalSource{Store: n.store, Hub: n.hub, Linearize: n.linearize, Stopped: n.loop.done, Reopen: n.config.hangUps}
		group.Go(func() error { return n.journal.Run(ctx, src, n.config.journalSync) })
	}
	group.Go(func() error { return n.keepPlace(ctx) })
	group.Go(func() error { return network.run(ctx, n.config.peerSilenceMax()) })
	group.Go(func() error { return network.acquaint(ctx) })
	group.Go(func() error { return network.meet(ctx, n.config.members) })
	group.Go(func() error {
		select {
		case err := <-p.failed:
			return err
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error {
		err := n.awaitRemoval(ctx, network.removed)
		if err != nil {
			stopLoop() // who waits would wait in vain
		}
		return err
	})
	group.Go(func() error {
		<-ctx.Done() // a signal, or a part failed
		n.logger.Info("stopping")
		n.disk.interrupt()
		front.closing.Store(true)
		notice := time.After(noticeTime)
		n.transferLeadership()
		<-notice
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		err := p.clientServer.Shutdown(drain)
		stopLoop()
		if errors.Is(err, context.DeadlineExceeded) {
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTimeout)
			defer cancel()
			err = p.clientServer.Shutdown(last)
		}
		p.clientListener.closeAll()
		return errors.Join(ignoreDeadline(err), p.peerServer.Close())
	})
	n.logger.Info("serving", zap.Uint64("id", n.config.id), zap.String("clients", n.config.listen),
		zap.String("peers", n.config.listenPeer), zap.String("data", n.config.dataDir),
		zap.Uint64("index", n.store.Applied()), zap.Uint64("resourceVersion", n.store.Version()), zap.String("version", version))
	err := group.Wait()
	if err == nil {
		n.logger.Info("stopped")
	}
	return err
}

// boundStop ends the process if a stop that begins when ctx ends takes too long.
// What is on the disk is then what a crash leaves, which the next start knows.
// The caller calls the returned function at the end of the stop.
func (cfg *config) boundStop(ctx context.Context, logger *zap.Logger) (ended func()) {
	if cfg.abandon == nil {
		return func() {}
	}
	end := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		timeout := time.NewTimer(stopTimeout)
		defer timeout.Stop()
		select {
		case <-timeout.C:
			logger.Error("the node does not stop in time: does the disk hang? it ends as if it was killed")
			cfg.abandon()
		case <-end:
		}
	})
	return func() {
		cancel()
		close(end)
	}
}

// boundEnd is boundStop up to the end of last, which is what is closed last. Closing
// it begins a stop, too, if the node ends for another reason than ctx.
func (cfg *config) boundEnd(ctx context.Context, logger *zap.Logger, last func() error) func() error {
	ctx, begin := context.WithCancel(ctx)
	ended := cfg.boundStop(ctx, logger)
	return func() error {
		defer ended()
		begin()
		return last()
	}
}

// transferLeadership hands over, so that the others need no election timeout.
func (n *node) transferLeadership() {
	deadline := time.NewTimer(transferTimeout)
	defer deadline.Stop()
	poll := time.NewTicker(n.config.tick)
	defer poll.Stop()
	for n.loop.status.Load().leader == n.config.id && len(n.store.Voters()) > 1 {
		// More than once: at times a leader does not know which members are there.
		n.loop.handOver()
		select {
		case <-poll.C:
		case <-deadline.C:
			return
		case <-n.loop.done:
			return
		}
	}
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
