package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"raftrv/internal/store"
)

// This file is what members tell each other beside raft's messages.

// peerInfoPath is where a node tells others who it is, and which cluster it is in.
const peerInfoPath = "/-/peer"

// peerInfo is the answer there. Its status is 200 if the members are those of
// now, and 503 from a node that does not know that yet: it has just started, or
// has no cluster.
type peerInfo struct {
	Cluster string         `json:"cluster"` // hexadecimal; "" in a node that has none yet
	Members []store.Member `json:"members"`
	Removed []uint64       `json:"removed,omitempty"` // ids
	Health  health         `json:"health"`

	Node    uint64 `json:"node,omitempty"`           // who answers; 0 in versions that do not say
	Process uint64 `json:"process,string,omitempty"` // a number of this life of it
	Proof   string `json:"proof,omitempty"`          // see secret
	// Founders are who founded the cluster, with the directories of then, for one
	// of them that has not done so yet.
	Founders []store.Member `json:"founders,omitempty"`
	Founding *founding      `json:"founding,omitempty"` // of a node that waits to found a cluster

	informed bool // the status was 200
}

func (p *peerInfo) clusterID() (uint64, error) { return strconv.ParseUint(p.Cluster, 16, 64) }

// directoryOf returns the number of the directory that a member started with.
func (p *peerInfo) directoryOf(id uint64) uint64 {
	for _, m := range slices.Concat(p.Members, p.Founders) {
		if m.ID == id && m.Directory != 0 {
			return m.Directory
		}
	}
	return 0
}

// isOlder says whether the answer is from a version that founds clusters in
// another way, and its cluster has not begun to work.
func (p *peerInfo) isOlder() bool {
	return p.Cluster != "" && p.Node == 0 && !slices.ContainsFunc(p.Members, func(m store.Member) bool { return m.Directory != 0 })
}

// process returns the number of the process that has answered, 0 if it did not say.
func (p *peerInfo) process() uint64 {
	if p == nil {
		return 0
	}
	return p.Process
}

// switchHandler is a handler that can be replaced while it serves.
type switchHandler struct{ current atomic.Pointer[http.Handler] }

func (h *switchHandler) set(handler http.Handler) { h.current.Store(&handler) }

func (h *switchHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	(*h.current.Load()).ServeHTTP(w, r)
}

// servePeers serves the port for the other members: what describe says of this
// node, and raft's messages, if there is somebody who takes them.
func servePeers(describe func() peerInfo, s secret, raft http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+peerInfoPath, func(w http.ResponseWriter, r *http.Request) {
		info := describe()
		if challenge := r.Header.Get(headerChallenge); challenge != "" && len(s) > 0 {
			info.Proof = s.prove(challenge, info.Process)
		}
		w.Header().Set("Content-Type", "application/json")
		if !info.informed {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_ = json.NewEncoder(w).Encode(info) // fails if the other one has left
	})
	if raft != nil {
		mux.Handle("/", raft)
	}
	return mux
}

// peerInfo describes this node.
func (n *node) peerInfo() peerInfo {
	info := peerInfo{Cluster: fmt.Sprintf("%x", n.cluster), Node: n.config.id, Process: n.process, Founders: n.founders}
	// What is on disk may not be applied yet, or out of date.
	if info.informed = n.informed.Load(); info.informed {
		info.Members, info.Removed, info.Health = n.store.Members(), n.store.Removed(), n.admission.health()
	}
	return info
}

const (
	meetEvery   = 200 * time.Millisecond // at most
	reportedMax = 16
)

// meet finds out who nodes are that call and are no members here, until ctx
// ends. They may have joined while this node was away, and if one of them leads
// by now, it is the only one who will ever say so. Their addresses come from
// members, or from nodes of this cluster that --cluster names, but never from themselves.
func (n *peerNetwork) meet(ctx context.Context, hints []store.Member) error {
	for {
		select {
		case <-n.knocked:
		case <-ctx.Done():
			return nil
		}
		n.ask(ctx, hints)
		select {
		case <-time.After(meetEvery):
		case <-ctx.Done():
			return nil
		}
	}
}

// ask asks all members that this node knows, by whatever way, who the members are.
func (n *peerNetwork) ask(ctx context.Context, hints []store.Member) {
	ask := map[string]bool{}
	for _, m := range n.found(slices.Collect(maps.Values(n.wanted()))) {
		ask[m.PeerURL] = true
	}
	for _, m := range hints {
		if m.ID != n.id {
			ask[m.PeerURL] = true
		}
	}
	answers := make(chan *peerInfo, len(ask))
	for address := range ask {
		go func() { // ends after peerDialTimeout, and is waited for
			info, err := fetchPeerInfo(ctx, address)
			if err != nil || info.Cluster != fmt.Sprintf("%x", n.cluster) {
				info = new(peerInfo)
			}
			answers <- info
		}()
	}
	reported, removed := maps.Clone(*n.reported.Load()), n.store.Removed()
	for range len(ask) {
		info := <-answers
		for _, m := range info.Members {
			if m.Check() == nil {
				reported[m.ID] = m
			}
		}
		removed = append(removed, info.Removed...)
	}
	for _, id := range removed {
		delete(reported, id)
	}
	delete(reported, n.id)
	for _, m := range n.store.Members() {
		delete(reported, m.ID)
	}
	for id := range reported {
		if len(reported) > reportedMax {
			delete(reported, id)
		}
	}
	n.reported.Store(&reported)
	wake(n.renamed)
	wake(n.changed)
}

// fetchPeerInfo asks the member at peerURL which cluster it is in, and who else.
func fetchPeerInfo(ctx context.Context, peerURL string) (*peerInfo, error) {
	info, err := askPeer(ctx, peerURL)
	if err == nil && !info.informed {
		err = fmt.Errorf("%s does not know yet what happened while it was away", peerURL)
	}
	return info, err
}

// peerClient asks other members. Only they know the answers, so it follows no
// redirects and asks no proxy.
var peerClient = &http.Client{
	Transport: &http.Transport{
		DialContext:            (&net.Dialer{Timeout: peerDialTimeout}).DialContext,
		MaxIdleConnsPerHost:    2,
		MaxConnsPerHost:        peerConnsMax,
		IdleConnTimeout:        peerIdleTimeout,
		MaxResponseHeaderBytes: peerHeaderMax,
	},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

const (
	peerIdleTimeout = 30 * time.Second
	peerConnsMax    = 8        // to one member, however many clients want to know all that members say
	peerHeaderMax   = 64 << 10 // bytes
)

var errUnavailable = errors.New("the node is not there at present")

// askPeer asks the node at peerURL who it is.
func askPeer(ctx context.Context, peerURL string) (*peerInfo, error) {
	return askPeerTo(ctx, peerURL, "")
}

// headerChallenge asks for a proof, see secret.
const headerChallenge = "Raftrv-Challenge"

// askPeerTo is askPeer, with a challenge to prove what is in its directory.
func askPeerTo(ctx context.Context, peerURL, challenge string) (*peerInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, peerDialTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, peerURL+peerInfoPath, nil)
	if err != nil {
		return nil, err
	}
	if challenge != "" {
		req.Header.Set(headerChallenge, challenge)
	}
	resp, err := peerClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	info := &peerInfo{informed: resp.StatusCode == http.StatusOK}
	switch {
	case resp.Header.Get("Content-Type") == "application/json" && (info.informed || resp.StatusCode == http.StatusServiceUnavailable):
	case resp.StatusCode == http.StatusServiceUnavailable && saysNothingYet(resp.Body):
		return nil, errSaysNothing
	case resp.StatusCode >= http.StatusBadGateway && resp.StatusCode <= http.StatusGatewayTimeout: // of somebody in between
		return nil, fmt.Errorf("%w: %s answered %s", errUnavailable, peerURL, resp.Status)
	default:
		return nil, fmt.Errorf("%s answered %s", peerURL, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, peerInfoSizeMax)).Decode(info); err != nil {
		return nil, fmt.Errorf("%s: %w", peerURL, err)
	}
	if _, err := info.clusterID(); err != nil && (info.informed || info.Cluster != "") {
		return nil, fmt.Errorf("%s: cluster ID: %w", peerURL, err)
	}
	return info, nil
}

const peerInfoSizeMax = 1 << 20 // bytes

// errSaysNothing is what a program of feature level 1 has to say before it has heard
// from a leader. It is a member that needs to be talked to.
var errSaysNothing = errors.New("a node of an older version answers there, and does not know yet what happened while it was away")

func saysNothingYet(body io.Reader) bool {
	const text = "this node does not know yet what happened while it was away\n"
	b, err := io.ReadAll(io.LimitReader(body, int64(len(text))+1))
	return err == nil && string(b) == text
}

// askPeers asks members at the same time, and returns their answers by ID.
func askPeers(ctx context.Context, members []store.Member) map[uint64]peerAnswer {
	var mu sync.Mutex
	var wg sync.WaitGroup
	answers := map[uint64]peerAnswer{}
	for _, m := range members {
		wg.Go(func() {
			info, err := askPeer(ctx, m.PeerURL)
			mu.Lock()
			defer mu.Unlock()
			answers[m.ID] = peerAnswer{info: info, err: err}
		})
	}
	wg.Wait()
	return answers
}
