package tests

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"raftrv/internal/hostile"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// peerWords is what a node says to another one that asks who it is.
type peerWords struct {
	Cluster string          `json:"cluster"`
	Node    uint64          `json:"node,omitempty"`
	Process uint64          `json:"process,string,omitempty"`
	Members json.RawMessage `json:"members"`
	Removed []uint64        `json:"removed,omitempty"`
	Health  json.RawMessage `json:"health,omitempty"`
}

// TestProcess_Decoys: members at addresses of somebody who lies. No node ends, now or at its next start, none takes
// itself for removed or wrong, and they serve.
func TestProcess_Decoys(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	var info peerWords
	testkit.Must(t, json.Unmarshal([]byte(bodyOf(t, c.Nodes[0].RaftURL()+"/-/peer", 200)), &info))
	written := c.client(c.Nodes[1]).putNew()
	elsewhere := hostile.NewDecoy(t) // where redirects lead
	us := func(id uint64) *peerWords {
		return &peerWords{Cluster: info.Cluster, Node: id, Process: 1, Members: info.Members}
	}
	post := func(at *proc.Node, id uint64, address string) *liveReply {
		return c.memberCall(at, http.MethodPost, fmt.Sprintf("/-/v1/members/%d", id), fmt.Sprintf(`{"peerUrl":%q}`, address))
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
	testkit.Must(t, err)
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
	wrong := map[string]func(*hostile.Decoy) string{
		"another cluster": func(tr *hostile.Decoy) string { tr.Says(&peerWords{Cluster: "1234", Node: 66}, nil); return tr.URL },
		"another ID":      func(tr *hostile.Decoy) string { tr.Says(us(67), nil); return tr.URL },
		"a web server":    func(tr *hostile.Decoy) string { return tr.URL },
		"no HTTP":         func(*hostile.Decoy) string { return "http://" + banner.Addr().String() },
		"a redirect": func(*hostile.Decoy) string {
			s := httptest.NewServer(http.RedirectHandler(elsewhere.URL+"/-/peer", http.StatusFound))
			t.Cleanup(s.Close)
			return s.URL
		},
		"a client port": func(*hostile.Decoy) string { return c.Nodes[1].URL() },
	}
	for name, address := range wrong {
		for _, body := range []string{"/-/v1/members/66", "/66"} {
			u := address(hostile.NewDecoy(t))
			text := u
			if strings.HasPrefix(body, "/-/") {
				text = fmt.Sprintf(`{"peerUrl":%q}`, u)
			}
			if r := c.memberCall(c.Nodes[0], http.MethodPost, body, text); r.status != http.StatusConflict || !strings.Contains(string(r.body), "is not the peer URL of node 66") {
				t.Errorf("%s: POST %s: %d %s %v", name, body, r.status, r.body, r.err)
			}
		}
		u := address(hostile.NewDecoy(t))
		if r := c.memberCall(c.Nodes[0], http.MethodPut, "/-/v1/members/3", fmt.Sprintf(`{"peerUrl":%q}`, u)); r.status != http.StatusConflict {
			t.Errorf("%s: move node 3 there: %d %s %v", name, r.status, r.body, r.err)
		}
	}
	if elsewhere.Asked.Load()+elsewhere.Others.Load() != 0 {
		t.Error("somebody followed a redirect")
	}
	// Nor does who says that it is a member that runs.
	liar := hostile.NewDecoy(t)
	liar.Says(us(3), nil)
	if r := c.memberCall(c.Nodes[0], http.MethodPut, "/-/v1/members/3", fmt.Sprintf(`{"peerUrl":%q}`, liar.URL)); r.status != http.StatusConflict || !strings.Contains(string(r.body), "still runs at another address") {
		t.Errorf("move a node that runs: %d %s", r.status, r.body)
	}
	c.wantMembers(c.Nodes...)

	// Who keeps others waiting, or talks without end, is asked now and then, and that is all.
	id := uint64(66)
	piece := []byte(strings.Repeat(`{"id":1},`, 1<<10))
	for name, d := range map[string]*hostile.Decoy{
		"silence": {Who: func(http.ResponseWriter, *http.Request) { <-t.Context().Done() }},
		"a drip": {Who: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			for t.Context().Err() == nil && r.Context().Err() == nil {
				_, _ = w.Write([]byte(" ")) // fails when the other one has left
				w.(http.Flusher).Flush()
				time.Sleep(50 * time.Millisecond)
			}
		}},
		"no end": {Who: func(w http.ResponseWriter, r *http.Request) {
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
			testkit.WaitFor(t, func() bool { return d.Asked.Load() > 4 })
			testkit.Must(t, changed(c.memberCall(c.Nodes[0], http.MethodDelete, fmt.Sprintf("/-/v1/members/%d", id), "")))
		}
		if d.Others.Load() != 0 {
			t.Errorf("%s: %d requests beside the question", name, d.Others.Load())
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
		"a version that is none": hostile.Stream(t, http.Header{"X-Server-Version": {"x"}}),
		"2^62 entries":           hostile.Stream(t, nil, big),
		"a message of junk":      hostile.Stream(t, nil, junk),
		"entries of junk":        hostile.Stream(t, nil, append([]byte{2}, junk...)),
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
		tr := hostile.NewDecoy(t)
		tr.Says(&peerWords{Node: id}, raft) // as one that waits to join
		if r := post(c.Nodes[id%3], id, tr.URL); r.status != http.StatusNoContent {
			t.Fatalf("%s: %d %s %v", name, r.status, r.body, r.err)
		}
		testkit.WaitFor(t, func() bool { return tr.Asked.Load() > 6 })
		if tr.Others.Load() != 0 {
			t.Errorf("%s: %d requests before it said who it is", name, tr.Others.Load())
		}
		lie := us(id)
		lie.Removed = []uint64{1, 2, 3}
		lie.Health = json.RawMessage(fmt.Sprintf(`{"member":%d,"sums":{"now":{"index":3,"sum":"1","algorithm":2}},"diskFull":true,"diskClosed":true}`, id))
		tr.Says(lie, raft)
		testkit.WaitFor(t, func() bool { return tr.Others.Load() > 6 })
		healthy(name)
		if name == "410" || name == "2^62 entries" { // also at the next start
			c.kill(c.Nodes...)
			seen := tr.Others.Load()
			c.start()
			testkit.WaitFor(t, func() bool { return tr.Others.Load() > seen+6 })
			healthy(name + " at the next start")
		}
		if name == "410" { // and then becomes another one
			tr.Says(&peerWords{Cluster: "1234", Node: id}, raft)
			c.eventually(func() error {
				seen := tr.Others.Load()
				time.Sleep(400 * time.Millisecond) // in which a node would try several times
				if now := tr.Others.Load(); now != seen {
					return fmt.Errorf("%d requests to who says that it is somebody else", now-seen)
				}
				return nil
			})
		}
		testkit.Must(t, changed(c.memberCall(c.Nodes[0], http.MethodDelete, fmt.Sprintf("/-/v1/members/%d", id), "")))
	}
	if elsewhere.Asked.Load()+elsewhere.Others.Load() != 0 {
		t.Error("somebody followed a redirect")
	}

	// An address that was silent when a member that runs was moved there, and then lies.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	testkit.Must(t, err)
	address := silent.Addr().String()
	testkit.Must(t, silent.Close())
	testkit.Must(t, changed(c.memberCall(c.Nodes[0], http.MethodPut, "/-/v1/members/1", fmt.Sprintf(`{"peerUrl":"http://%s"}`, address))))
	again, err := net.Listen("tcp", address)
	testkit.Must(t, err)
	liar = &hostile.Decoy{Server: &httptest.Server{Listener: again}}
	lie := us(1)
	lie.Removed = []uint64{1, 2, 3}
	liar.Says(lie, gone(http.StatusGone))
	liar.Config = &http.Server{Handler: liar}
	liar.Start()
	t.Cleanup(func() { liar.CloseClientConnections(); liar.Close() })
	testkit.WaitFor(t, func() bool { return liar.Asked.Load() > 6 })
	healthy("a member that was moved to a liar")
	if liar.Others.Load() != 0 {
		t.Errorf("%d requests to who is not the member", liar.Others.Load())
	}
	testkit.Must(t, changed(c.memberCall(c.Nodes[1], http.MethodPut, "/-/v1/members/1", fmt.Sprintf(`{"peerUrl":%q}`, c.Nodes[0].RaftURL()))))
	healthy("moved back")
	if r := c.client(c.Nodes[2]).get(written.key); r.value != written.value {
		t.Errorf("what was written is %v", r)
	}
	c.verdict()
}
