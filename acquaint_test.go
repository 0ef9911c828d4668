package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/hostile"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// TestRecognize: who is taken for a member, for somebody else, and for nobody yet.
func TestRecognize(t *testing.T) {
	const us = 0xabc
	is := func(info peerInfo) *peerInfo { return &info }
	dial := &url.Error{Op: "Get", Err: &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}}
	for _, tt := range []struct {
		name string
		info *peerInfo
		err  error
		want string // "" = the member
	}{
		{"the member", is(peerInfo{Cluster: "abc", Node: 4}), nil, ""},
		{"it, of a version that does not say its ID", is(peerInfo{Cluster: "abc"}), nil, ""},
		{"such a version, when it has heard of no leader", nil, errSaysNothing, ""},
		{"such a version, of another member", is(peerInfo{Cluster: "abc", Health: health{Member: 5}}), nil, "node 5 answers there"},
		{"another member", is(peerInfo{Cluster: "abc", Node: 5}), nil, "node 5 answers there"},
		{"another cluster", is(peerInfo{Cluster: "abd", Node: 4}), nil, "another cluster, abd"},
		{"it, before it has joined", is(peerInfo{Node: 4}), nil, errSilent.Error()},
		{"another, before it has joined", is(peerInfo{Node: 5}), nil, "node 5 answers there"},
		{"it, and it waits to found a cluster", is(peerInfo{Node: 4, Founding: &founding{}}), nil, "start it with --join"},
		{"nobody", nil, dial, errSilent.Error()},
		{"nobody in time", nil, &url.Error{Op: "Get", Err: context.DeadlineExceeded}, errSilent.Error()},
		{"a name that nobody has", nil, &url.Error{Op: "Get", Err: &net.DNSError{Err: "no such host"}}, errSilent.Error()},
		{"somebody who hangs up", nil, &url.Error{Op: "Get", Err: io.EOF}, errSilent.Error()},
		{"somebody in between", nil, fmt.Errorf("%w: 502", errUnavailable), errSilent.Error()},
		{"somebody else", nil, errors.New("404"), "no peer port"},
		{"no HTTP", nil, &url.Error{Op: "Get", Err: errors.New("malformed HTTP response")}, "no peer port"},
	} {
		err := recognize(4, us, tt.info, tt.err)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// TestAcquaint_SaysNothingYet: what a program of feature level 1 says before it has heard from a leader is taken for
// what it is, as it will not hear from one that does not talk to it.
func TestAcquaint_SaysNothingYet(t *testing.T) {
	text := ""
	peer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, text, http.StatusServiceUnavailable)
	}))
	defer peer.Close()
	var want error
	for text, want = range map[string]error{
		"this node does not know yet what happened while it was away": errSaysNothing, "no backend is up": errUnavailable, "": errUnavailable,
	} {
		if _, err := askPeer(t.Context(), peer.URL); !errors.Is(err, want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// acquainted starts asking who member 2 is.
func acquainted(t *testing.T, n *testNetwork) {
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	n.proven.Store(&map[uint64]string{})
	n.relink(nil)
	go func() { ended <- n.acquaint(ctx) }()
	t.Cleanup(func() { stop(); testkit.Must(t, <-ended) })
}

// wantProven waits until member 2 is known to be at an address, or nowhere.
func (n *testNetwork) wantProven(address string) {
	n.t.Helper()
	end := time.After(5 * time.Second)
	for (*n.proven.Load())[2] != address {
		select {
		case <-n.changed:
		case <-time.After(time.Millisecond):
		case <-end:
			n.t.Fatalf("member 2 is taken to be at %q, want %q", (*n.proven.Load())[2], address)
		}
	}
	n.relink(nil)
	if l := (*n.links.Load())[2]; (l != nil) != (address != "") || l != nil && l.member.PeerURL != address {
		n.t.Errorf("its link: %+v", l)
	}
}

// TestAcquaint: a link is there from when a member says who it is until somebody else does at its address. A member
// that runs is not replaced by who says that it is the same.
func TestAcquaint(t *testing.T) {
	cluster := fmt.Sprintf("%x", testCluster)
	first, second := hostile.NewDecoy(t), hostile.NewDecoy(t)
	n := newTestNetwork(t, "http://127.0.0.1:1", false) // it begins with a link to there
	first.Says(&peerInfo{Cluster: "99", Node: 2, Process: 1}, nil)
	acquainted(t, n)
	n.setMembers([]store.Member{{ID: 1}, {ID: 2, PeerURL: first.URL}})
	testkit.WaitFor(t, func() bool { return first.Asked.Load() >= 3 })
	n.wantProven("")
	if first.Others.Load() != 0 {
		t.Errorf("%d requests went to somebody else", first.Others.Load())
	}
	first.Says(&peerInfo{Cluster: cluster, Node: 2, Process: 1}, nil)
	n.wantProven(first.URL)

	// It moves, but still is where it was: another one at the new address is not believed.
	second.Says(&peerInfo{Cluster: cluster, Node: 2, Process: 2}, nil)
	n.setMembers([]store.Member{{ID: 1}, {ID: 2, PeerURL: second.URL}})
	testkit.WaitFor(t, func() bool { return second.Asked.Load() >= 3 })
	n.wantProven(first.URL)
	if second.Others.Load() != 0 {
		t.Errorf("%d requests went to who is not believed", second.Others.Load())
	}
	// The same process at both is.
	second.Says(&peerInfo{Cluster: cluster, Node: 2, Process: 1}, nil)
	n.wantProven(second.URL)
	// Or the old one is gone.
	n.setMembers([]store.Member{{ID: 1}, {ID: 2, PeerURL: first.URL}})
	n.wantProven(first.URL)
	second.Says(&peerInfo{Cluster: cluster, Node: 2, Process: 7}, nil)
	first.CloseClientConnections()
	first.Close()
	n.setMembers([]store.Member{{ID: 1}, {ID: 2, PeerURL: second.URL}})
	n.wantProven(second.URL)
	if got := n.logs.FilterMessageSnippet("nothing is sent to the address of a member").Len(); got != 2 {
		t.Errorf("%d lines about it, want one for each reason", got)
	}
}

// TestAcquaint_Changes: who said the right thing first, and then another, is not talked to any more.
func TestAcquaint_Changes(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	a := &acquaintance{url: "u"}
	for _, step := range []struct {
		in    introduction
		want  string
		pause time.Duration // at most, until it is asked again
	}{
		{introduction{url: "u", is: errSilent}, "", askPauseMin},
		{introduction{url: "u", is: errSilent}, "", 2 * askPauseMin},
		{introduction{url: "u"}, "u", askAgainEvery},
		{introduction{url: "u", is: errSilent}, "u", askAgainEvery}, // it is down
		{introduction{url: "before", is: errors.New("another")}, "u", askAgainEvery},
		{introduction{url: "u", is: errors.New("another")}, "", 2 * askPauseMin},
		{introduction{url: "u"}, "u", askAgainEvery},
		{introduction{url: "u", is: errSilent, moved: true}, "u", askAgainEvery},
	} {
		n.hear(a, step.in)
		if a.proven != step.want || time.Until(a.next) > step.pause {
			t.Errorf("%+v: at %q, asked again after %v", step.in, a.proven, time.Until(a.next))
		}
	}
	a = &acquaintance{url: "new", proven: "old"}
	if n.hear(a, introduction{url: "new", is: errSilent, moved: true}); a.proven != "" {
		t.Error("somebody else is at the old address, and is taken for the member")
	}
	for range 20 {
		n.hear(a, introduction{url: "new", is: errSilent})
	}
	if pause := time.Until(a.next); pause > askPauseMax || pause < askPauseMax/2 {
		t.Errorf("who was never heard is asked again after %v", pause)
	}
}

// TestIsRemoved: what it takes to believe that.
func TestIsRemoved(t *testing.T) {
	voter := func(id uint64, tr *hostile.Decoy) store.Member { return store.Member{ID: id, PeerURL: tr.URL} }
	two, three, four := hostile.NewDecoy(t), hostile.NewDecoy(t), hostile.NewDecoy(t)
	for _, tt := range []struct {
		name  string
		lists []uint64 // who says so
		known bool     // to this node, too
		want  bool
	}{
		{"nobody", nil, false, false},
		{"one", []uint64{2}, false, false},
		{"a learner", []uint64{4}, false, false},
		{"one and a learner", []uint64{3, 4}, false, false},
		{"both others", []uint64{2, 3}, false, true},
		{"one, and this node has applied it", []uint64{3}, true, true},
		{"a learner, and this node has applied it", []uint64{4}, true, false},
		{"only this node has applied it", nil, true, false},
	} {
		st := stateWithMembers([]store.Member{{ID: 1}, voter(2, two), voter(3, three), {ID: 4, PeerURL: four.URL, Learner: true}})
		if tt.known {
			delete(st.Members, 1)
			st.Removed[1] = true
		}
		network := &peerNetwork{}
		network.proven.Store(&map[uint64]string{2: two.URL, 3: three.URL, 4: four.URL})
		n := &node{kvstore: &kvstore{config: config{id: 1}, cluster: 7, store: &store.Store{State: st}, network: network}, logger: zap.NewNop()}
		for id, tr := range map[uint64]*hostile.Decoy{2: two, 3: three, 4: four} {
			info := &peerInfo{Cluster: "7", Node: id}
			if slices.Contains(tt.lists, id) {
				info.Removed = []uint64{1}
			}
			tr.Says(info, nil)
		}
		if got, by, _ := n.isRemoved(t.Context()); got != tt.want {
			t.Errorf("%s: %v, as %v say so", tt.name, got, by)
		}
	}
}

// TestRefuseChange_Size: a cluster does not grow beyond what it may have, and goes on if it is larger.
func TestRefuseChange_Size(t *testing.T) {
	for _, tt := range []struct {
		voters, learners int
		kind             store.MemberChangeKind
		id               uint64
		refused          string
	}{
		{7, 3, store.AddLearner, 100, ""},
		{7, 4, store.AddLearner, 100, "at most 4 learners"},
		{3, 9, store.AddLearner, 100, "at most 4 learners"},
		{7, 4, store.PromoteLearner, 60, "at most 7 voters"},
		{9, 4, store.PromoteLearner, 60, "at most 7 voters"},
		{9, 9, store.RemoveMember, 2, ""},
		{9, 9, store.RemoveMember, 60, ""},
	} {
		r := &replica{replicaConfig: replicaConfig{store: store.New()}}
		for i := range uint64(tt.voters) {
			r.store.State.Members[i+1] = store.Member{ID: i + 1}
		}
		for i := range uint64(tt.learners) {
			r.store.State.Members[60+i] = store.Member{ID: 60 + i, Learner: true}
		}
		err := r.refuseSize(store.MemberChange{Kind: tt.kind, Member: store.Member{ID: tt.id}})
		if tt.refused == "" && err != nil || tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused)) {
			t.Errorf("%d voters, %d learners: %v, want %q", tt.voters, tt.learners, err, tt.refused)
		}
	}
}

// TestPeerClients: what goes to a member asks nobody on the way, and reads no more headers than a member sends.
func TestPeerClients(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	transports := map[string]*http.Transport{"questions": peerClient.Transport.(*http.Transport), "snapshots": snapshotClient}
	for _, name := range []string{"streamRt", "pipelineRt"} {
		rt := *(*http.RoundTripper)(reflect.ValueOf((*n.links.Load())[2].http).Elem().FieldByName(name).Addr().UnsafePointer())
		transports[name] = rt.(*peerTransport).next.(*http.Transport)
	}
	for name, tr := range transports {
		if tr.Proxy != nil {
			t.Errorf("%s may go to a proxy", name)
		}
		if tr.MaxResponseHeaderBytes != peerHeaderMax {
			t.Errorf("%s: headers of %d bytes", name, tr.MaxResponseHeaderBytes)
		}
	}
}
