package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
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
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"raftrv/internal/proc"

	"go.uber.org/zap"
)

// decoy is a server at an address that somebody gives to a cluster.
type decoy struct {
	*httptest.Server
	asked  atomic.Int64 // who is there
	others atomic.Int64 // other requests: those that only a member should get

	mu   sync.Mutex
	info *peerInfo        // nil: it says 404
	who  http.HandlerFunc // takes the place of info
	raft http.HandlerFunc // what else it answers
}

func newDecoy(t *testing.T) *decoy {
	tr := new(decoy)
	tr.Server = httptest.NewServer(tr)
	t.Cleanup(func() { tr.CloseClientConnections(); tr.Close() })
	return tr
}

func (tr *decoy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	tr.mu.Lock()
	info, who, raft := tr.info, tr.who, tr.raft
	tr.mu.Unlock()
	if r.URL.Path != peerInfoPath {
		tr.others.Add(1)
		if raft != nil {
			raft(w, r)
		}
		return
	}
	tr.asked.Add(1)
	if who != nil {
		who(w, r)
		return
	}
	if info == nil {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if info.Cluster == "" {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(info) // fails if who asked has left
}

// says changes what it answers.
func (tr *decoy) says(info *peerInfo, raft http.HandlerFunc) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.raft, tr.info = raft, info
}

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

// acquainted starts asking who member 2 is.
func acquainted(t *testing.T, n *testNetwork) {
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	n.proven.Store(&map[uint64]string{})
	n.relink(nil)
	go func() { ended <- n.acquaint(ctx) }()
	t.Cleanup(func() { stop(); must(t, <-ended) })
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
	first, second := newDecoy(t), newDecoy(t)
	n := newTestNetwork(t, first.URL, false)
	first.says(&peerInfo{Cluster: "99", Node: 2, Process: 1}, nil)
	acquainted(t, n)
	waitFor(t, func() bool { return first.asked.Load() >= 3 })
	n.wantProven("")
	if first.others.Load() != 0 {
		t.Errorf("%d requests went to somebody else", first.others.Load())
	}
	first.says(&peerInfo{Cluster: cluster, Node: 2, Process: 1}, nil)
	n.wantProven(first.URL)

	// It moves, but still is where it was: another one at the new address is not believed.
	second.says(&peerInfo{Cluster: cluster, Node: 2, Process: 2}, nil)
	n.setMembers([]member{{ID: 1}, {ID: 2, PeerURL: second.URL}})
	waitFor(t, func() bool { return second.asked.Load() >= 3 })
	n.wantProven(first.URL)
	if second.others.Load() != 0 {
		t.Errorf("%d requests went to who is not believed", second.others.Load())
	}
	// The same process at both is.
	second.says(&peerInfo{Cluster: cluster, Node: 2, Process: 1}, nil)
	n.wantProven(second.URL)
	// Or the old one is gone.
	n.setMembers([]member{{ID: 1}, {ID: 2, PeerURL: first.URL}})
	n.wantProven(first.URL)
	second.says(&peerInfo{Cluster: cluster, Node: 2, Process: 7}, nil)
	first.CloseClientConnections()
	first.Close()
	n.setMembers([]member{{ID: 1}, {ID: 2, PeerURL: second.URL}})
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

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain")
		}
	}
}

// TestIsRemoved: what it takes to believe that.
func TestIsRemoved(t *testing.T) {
	voter := func(id uint64, tr *decoy) member { return member{ID: id, PeerURL: tr.URL} }
	two, three, four := newDecoy(t), newDecoy(t), newDecoy(t)
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
		st := stateWithMembers([]member{{ID: 1}, voter(2, two), voter(3, three), {ID: 4, PeerURL: four.URL, Learner: true}})
		if tt.known {
			delete(st.members, 1)
			st.removed[1] = true
		}
		network := &peerNetwork{}
		network.proven.Store(&map[uint64]string{2: two.URL, 3: three.URL, 4: four.URL})
		n := &node{config: config{id: 1}, cluster: 7, store: &kvstore{state: st}, network: network, logger: zap.NewNop()}
		for id, tr := range map[uint64]*decoy{2: two, 3: three, 4: four} {
			info := &peerInfo{Cluster: "7", Node: id}
			if slices.Contains(tt.lists, id) {
				info.Removed = []uint64{1}
			}
			tr.says(info, nil)
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
		kind             memberChangeKind
		id               uint64
		refused          string
	}{
		{7, 3, addLearner, 100, ""},
		{7, 4, addLearner, 100, "at most 4 learners"},
		{3, 9, addLearner, 100, "at most 4 learners"},
		{7, 4, promoteLearner, 60, "at most 7 voters"},
		{9, 4, promoteLearner, 60, "at most 7 voters"},
		{9, 9, removeMember, 2, ""},
		{9, 9, removeMember, 60, ""},
	} {
		r := &replica{replicaConfig: replicaConfig{store: newKVStore()}}
		for i := range uint64(tt.voters) {
			r.store.state.members[i+1] = member{ID: i + 1}
		}
		for i := range uint64(tt.learners) {
			r.store.state.members[60+i] = member{ID: 60 + i, Learner: true}
		}
		err := r.refuseSize(memberChange{tt.kind, member{ID: tt.id}})
		if tt.refused == "" && err != nil || tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused)) {
			t.Errorf("%d voters, %d learners: %v, want %q", tt.voters, tt.learners, err, tt.refused)
		}
	}
}

// streamOf answers those who ask for a stream with what is there, and keeps the connection.
func streamOf(t *testing.T, header http.Header, parts ...[]byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Server-Version", "3.7.0")
		for name := range header {
			w.Header().Set(name, header.Get(name))
		}
		w.WriteHeader(http.StatusOK)
		for _, p := range parts {
			_, _ = w.Write(p) // fails if the other one has left
		}
		w.(http.Flusher).Flush()
		<-t.Context().Done()
	}
}

// TestProcess_Decoys: members at addresses of somebody who lies. No node ends, now or at its next start, none takes
// itself for removed or wrong, and they serve.
func TestProcess_Decoys(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	info, err := fetchPeerInfo(c.context(), c.Nodes[0].RaftURL())
	must(t, err)
	written := c.client(c.Nodes[1]).putNew()
	elsewhere := newDecoy(t) // where redirects lead
	us := func(id uint64) *peerInfo {
		return &peerInfo{Cluster: info.Cluster, Node: id, Process: 1, Members: info.Members}
	}
	post := func(at *proc.Node, id uint64, address string) *liveReply {
		return c.memberCall(at, http.MethodPost, fmt.Sprintf("/-/v1/members/%d", id), fmt.Sprintf(`{"peerURL":%q}`, address))
	}
	healthy := func(what string) {
		t.Helper()
		for _, n := range c.Nodes {
			if !n.Running() {
				t.Fatalf("%s: node %d has ended: %s", what, n.ID, n.LogTail())
			}
			if o := c.client(n).putNew(); o.outcome != liveDone {
				t.Errorf("%s: a write at node %d: %v", what, n.ID, o)
			}
		}
	}

	// What says that it is somebody else does not become a member.
	banner, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer banner.Close()
	go func() {
		for {
			conn, err := banner.Accept()
			if err != nil {
				return // the end of the test
			}
			_, _ = io.WriteString(conn, "SSH-2.0-OpenSSH_9.6\r\n") // so that it is no HTTP
			_ = conn.Close()
		}
	}()
	wrong := map[string]func(*decoy) string{
		"another cluster": func(tr *decoy) string { tr.says(&peerInfo{Cluster: "1234", Node: 66}, nil); return tr.URL },
		"another ID":      func(tr *decoy) string { tr.says(us(67), nil); return tr.URL },
		"a web server":    func(tr *decoy) string { return tr.URL },
		"no HTTP":         func(*decoy) string { return "http://" + banner.Addr().String() },
		"a redirect": func(*decoy) string {
			s := httptest.NewServer(http.RedirectHandler(elsewhere.URL+peerInfoPath, http.StatusFound))
			t.Cleanup(s.Close)
			return s.URL
		},
		"a client port": func(*decoy) string { return c.Nodes[1].URL() },
	}
	for name, address := range wrong {
		for _, body := range []string{"/-/v1/members/66", "/66"} {
			u := address(newDecoy(t))
			text := u
			if strings.HasPrefix(body, "/-/") {
				text = fmt.Sprintf(`{"peerURL":%q}`, u)
			}
			if r := c.memberCall(c.Nodes[0], http.MethodPost, body, text); r.status != http.StatusConflict || !strings.Contains(string(r.body), "is not the peer URL of node 66") {
				t.Errorf("%s: POST %s: %d %s %v", name, body, r.status, r.body, r.err)
			}
		}
		u := address(newDecoy(t))
		if r := c.memberCall(c.Nodes[0], http.MethodPut, "/-/v1/members/3", fmt.Sprintf(`{"peerURL":%q}`, u)); r.status != http.StatusConflict {
			t.Errorf("%s: move node 3 there: %d %s %v", name, r.status, r.body, r.err)
		}
	}
	if elsewhere.asked.Load()+elsewhere.others.Load() != 0 {
		t.Error("somebody followed a redirect")
	}
	// Nor does who says that it is a member that runs.
	liar := newDecoy(t)
	liar.says(us(3), nil)
	if r := c.memberCall(c.Nodes[0], http.MethodPut, "/-/v1/members/3", fmt.Sprintf(`{"peerURL":%q}`, liar.URL)); r.status != http.StatusConflict || !strings.Contains(string(r.body), "still runs at another address") {
		t.Errorf("move a node that runs: %d %s", r.status, r.body)
	}
	c.wantMembers(c.Nodes...)

	// Who keeps others waiting, or talks without end, is asked now and then, and that is all.
	id := uint64(66)
	piece := []byte(strings.Repeat(`{"id":1},`, 1<<10))
	for name, d := range map[string]*decoy{
		"silence": {who: func(http.ResponseWriter, *http.Request) { <-t.Context().Done() }},
		"a drip": {who: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			for t.Context().Err() == nil && r.Context().Err() == nil {
				_, _ = w.Write([]byte(" ")) // fails when the other one has left
				w.(http.Flusher).Flush()
				time.Sleep(50 * time.Millisecond)
			}
		}},
		"no end": {who: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, err := io.WriteString(w, `{"cluster":"1","members":[`)
			for err == nil && t.Context().Err() == nil {
				_, err = w.Write(piece)
			}
		}},
	} {
		d.Server = httptest.NewServer(d)
		t.Cleanup(func() { d.CloseClientConnections(); d.Close() })
		start := time.Now()
		id--
		r := post(c.Nodes[0], id, d.URL)
		if took := time.Since(start); r.status != http.StatusConflict && r.status != http.StatusNoContent || took > 3*time.Second {
			t.Errorf("%s: %d %s %v after %v", name, r.status, r.body, r.err, took)
		}
		if r.status == http.StatusNoContent {
			waitFor(t, func() bool { return d.asked.Load() > 4 })
			must(t, changed(c.memberCall(c.Nodes[0], http.MethodDelete, fmt.Sprintf("/-/v1/members/%d", id), "")))
		}
		if d.others.Load() != 0 {
			t.Errorf("%s: %d requests beside the question", name, d.others.Load())
		}
		healthy(name)
	}

	// Who is silent and then says the right thing is a member, and can be as hostile as it likes.
	big := binary.BigEndian.AppendUint64([]byte{1}, 1<<62)
	junk := append(binary.BigEndian.AppendUint64(nil, 3), 0xff, 0xff, 0xff)
	gone := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Server-Version", "3.7.0")
			http.Error(w, "the member has been permanently removed from the cluster", status)
		}
	}
	id = 70
	for name, raft := range map[string]http.HandlerFunc{
		"a version that is none": streamOf(t, http.Header{"X-Server-Version": {"x"}}),
		"2^62 entries":           streamOf(t, nil, big),
		"a message of junk":      streamOf(t, nil, junk),
		"entries of junk":        streamOf(t, nil, append([]byte{2}, junk...)),
		"410":                    gone(http.StatusGone),
		"403":                    gone(http.StatusForbidden),
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		},
		"silence on each request": func(http.ResponseWriter, *http.Request) { <-t.Context().Done() },
		"headers without end": func(w http.ResponseWriter, _ *http.Request) {
			for i := range 10_000 {
				w.Header().Set(fmt.Sprint("X-", i), strings.Repeat("x", 100))
			}
		},
	} {
		id++
		tr := newDecoy(t)
		tr.says(&peerInfo{Node: id}, raft) // as one that waits to join
		if r := post(c.Nodes[id%3], id, tr.URL); r.status != http.StatusNoContent {
			t.Fatalf("%s: %d %s %v", name, r.status, r.body, r.err)
		}
		waitFor(t, func() bool { return tr.asked.Load() > 6 })
		if tr.others.Load() != 0 {
			t.Errorf("%s: %d requests before it said who it is", name, tr.others.Load())
		}
		lie := us(id)
		lie.Removed = []uint64{1, 2, 3}
		lie.Health = health{Member: id, Sums: sums{Now: checkpoint{Index: 3, Sum: 1, Algorithm: sumAlgorithm2}}, DiskFull: true, DiskClosed: true}
		tr.says(lie, raft)
		waitFor(t, func() bool { return tr.others.Load() > 6 })
		healthy(name)
		if name == "410" || name == "2^62 entries" { // also at the next start
			c.kill(c.Nodes...)
			seen := tr.others.Load()
			c.start()
			waitFor(t, func() bool { return tr.others.Load() > seen+6 })
			healthy(name + " at the next start")
		}
		if name == "410" { // and then becomes another one
			tr.says(&peerInfo{Cluster: "1234", Node: id}, raft)
			c.eventually(func() error {
				seen := tr.others.Load()
				time.Sleep(2 * knockEvery) // in which a node would try several times
				if now := tr.others.Load(); now != seen {
					return fmt.Errorf("%d requests to who says that it is somebody else", now-seen)
				}
				return nil
			})
		}
		must(t, changed(c.memberCall(c.Nodes[0], http.MethodDelete, fmt.Sprintf("/-/v1/members/%d", id), "")))
	}
	if elsewhere.asked.Load()+elsewhere.others.Load() != 0 {
		t.Error("somebody followed a redirect")
	}

	// An address that was silent when a member that runs was moved there, and then lies.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := silent.Addr().String()
	must(t, silent.Close())
	must(t, changed(c.memberCall(c.Nodes[0], http.MethodPut, "/-/v1/members/1", fmt.Sprintf(`{"peerURL":"http://%s"}`, address))))
	again, err := net.Listen("tcp", address)
	must(t, err)
	liar = &decoy{Server: &httptest.Server{Listener: again}}
	lie := us(1)
	lie.Removed = []uint64{1, 2, 3}
	liar.says(lie, gone(http.StatusGone))
	liar.Config = &http.Server{Handler: liar}
	liar.Start()
	t.Cleanup(func() { liar.CloseClientConnections(); liar.Close() })
	waitFor(t, func() bool { return liar.asked.Load() > 6 })
	healthy("a member that was moved to a liar")
	if liar.others.Load() != 0 {
		t.Errorf("%d requests to who is not the member", liar.others.Load())
	}
	must(t, changed(c.memberCall(c.Nodes[1], http.MethodPut, "/-/v1/members/1", fmt.Sprintf(`{"peerURL":%q}`, c.Nodes[0].RaftURL()))))
	healthy("moved back")
	if r := c.client(c.Nodes[2]).get(written.key); r.value != written.value {
		t.Errorf("what was written is %v", r)
	}
	c.verdict()
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
