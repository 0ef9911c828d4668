package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"go.uber.org/zap"
)

// This file is what members tell each other beside raft's messages.

// peerInfoPath is where a member tells one that wants to join which cluster
// this is and who is in it.
const peerInfoPath = "/-/peer"

// peerInfo is the answer there.
type peerInfo struct {
	Cluster string   `json:"cluster"` // hexadecimal
	Members []member `json:"members"`
	Removed []uint64 `json:"removed,omitempty"` // ids
	Health  health   `json:"health"`
}

func (p *peerInfo) clusterID() (uint64, error) { return strconv.ParseUint(p.Cluster, 16, 64) }

// directoryOf returns the number of the directory that a member started with.
func (p *peerInfo) directoryOf(id uint64) uint64 {
	for _, m := range p.Members {
		if m.ID == id {
			return m.Directory
		}
	}
	return 0
}

func (n *peerNetwork) serveInfo(w http.ResponseWriter, _ *http.Request) {
	if !n.informed.Load() {
		http.Error(w, "this node does not know yet what happened while it was away", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	info := peerInfo{Cluster: n.http.ClusterID.String(), Members: n.store.members(), Removed: n.store.removed(), Health: n.guard.health()}
	if err := json.NewEncoder(w).Encode(info); err != nil {
		n.logger.Debug("answer peer", zap.Error(err))
	}
}

// fetchPeerInfo asks the member at peerURL which cluster it is in.
func fetchPeerInfo(ctx context.Context, peerURL string) (*peerInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, peerDialTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, peerURL+peerInfoPath, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %s", peerURL, resp.Status)
	}
	info := new(peerInfo)
	if err := json.NewDecoder(io.LimitReader(resp.Body, peerInfoSizeMax)).Decode(info); err != nil {
		return nil, fmt.Errorf("%s: %w", peerURL, err)
	}
	if _, err := info.clusterID(); err != nil {
		return nil, fmt.Errorf("%s: cluster ID: %w", peerURL, err)
	}
	return info, nil
}

const peerInfoSizeMax = 1 << 20 // bytes
