package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
)

// This file is how a node finds its place in a cluster: whose data directory it
// has, and what the other members know about it.

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
		if n.loop.linearize(ctx, n.config.requestTimeout) == nil { // before the node serves anybody else
			n.informed.Store(true)
			m, ok := n.store.member(n.config.id)
			if ok && m.ClientURL == update.ClientURL && m.Directory == update.Directory {
				return nil
			}
			if _, err := n.loop.propose(ctx, n.config.requestTimeout, command{op: opMember, value: string(value)}); err != nil {
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
