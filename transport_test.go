package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// testNetwork is the network of member 1 with its loop and replica. The test takes the place of the others.
type testNetwork struct {
	*peerNetwork
	t      *testing.T
	url    string // of its peer port
	logs   *observer.ObservedLogs
	leader *replica
	free   atomic.Uint64 // bytes that its disk seems to have
}

const testCluster = 7

// newTestNetwork starts one whose other member, 2, is at peerURL. Its log begins behind a snapshot, so that
// member 2 needs that. run says whether its loop runs by itself.
func newTestNetwork(t *testing.T, peerURL string, run bool) *testNetwork {
	t.Helper()
	disk, rec := newDisk(t, t.TempDir())
	t.Cleanup(func() { testkit.Must(t, disk.close()) })
	rec.state.Members[2] = store.Member{ID: 2, PeerURL: peerURL}
	kv := &store.Store{State: rec.state}
	conf := &raftpb.ConfState{Voters: []uint64{1, 2}}
	snap := snapshotAt(t, disk, kv, 20)
	snap.Metadata.ConfState = conf
	log := raft.NewMemoryStorage()
	testkit.Must(t, log.ApplySnapshot(snap))
	testkit.Must(t, log.SetHardState(&raftpb.HardState{Term: new(uint64(1)), Commit: new(uint64(20))}))

	core, logs := observer.New(zapcore.InfoLevel)
	n := &testNetwork{t: t, logs: logs}
	n.free.Store(math.MaxInt64)
	l := newLoop(10*time.Millisecond, func() {}, zap.NewNop())
	g := newAdmission(&config{id: 1, diskReserve: 1 << 20}, kv, l.waiting, zap.NewNop())
	g.free = func() (uint64, error) { return n.free.Load(), nil }
	n.peerNetwork = newPeerNetwork(1, testCluster, disk, kv, l, g, zap.New(core))
	var err error
	n.leader, err = newReplica(replicaConfig{
		id: 1, session: 1, electionTicks: 1000, heartbeatTicks: 1, snapshotEntries: 1000, snapshotBytes: 1 << 30, log: log, store: kv,
		confState: conf, disk: disk, transport: n.peerNetwork, driver: l, logger: zap.NewNop(),
	})
	testkit.Must(t, err)
	l.replica = n.leader
	n.relinkAll()
	server := httptest.NewUnstartedServer(nil)
	server.Config = newPeerServer(n.handler(), zap.NewNop())
	server.Start()
	n.url = server.URL
	t.Cleanup(func() {
		server.CloseClientConnections() // no writer may be stuck after a test that failed
		n.close()
		server.Close()
	})
	if run {
		ctx, stop := context.WithCancel(context.Background())
		t.Cleanup(func() { stop(); <-l.done })
		go func() { _ = l.run(ctx, n.leader, func(context.Context) error { return nil }) }() // ends with ctx
	}
	return n
}

// relinkAll links members as if each had said who it is.
func (n *peerNetwork) relinkAll() {
	proven := map[uint64]string{}
	for id, m := range n.wanted() {
		proven[id] = m.PeerURL
	}
	n.proven.Store(&proven)
	n.relink(nil)
}

// lead makes the replica the leader, with member 2 far behind.
func (n *testNetwork) lead() {
	n.t.Helper()
	testkit.Must(n.t, n.leader.raw.Campaign())
	for _, answer := range []raftpb.MessageType{raftpb.MsgPreVoteResp, raftpb.MsgVoteResp} {
		testkit.Must(n.t, n.leader.process())
		n.leader.step(&raftpb.Message{Type: answer.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(2))})
	}
	testkit.Must(n.t, n.leader.process())
	n.leader.step(&raftpb.Message{
		Type: raftpb.MsgAppResp.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(2)),
		Index: new(uint64(20)), Reject: new(true), RejectHint: new(uint64(0)),
	})
	if s := n.stateOf2(); s != tracker.StateSnapshot {
		n.t.Fatalf("member 2 is in %v", s)
	}
	testkit.Must(n.t, n.leader.process())
}

func (n *testNetwork) stateOf2() tracker.StateType { return n.leader.raw.Status().Progress[2].State }

// wantReported waits until raft has been told that a snapshot was not taken.
func (n *testNetwork) wantReported() {
	n.t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		testkit.Must(n.t, n.loop.iterate(false))
		if n.stateOf2() == tracker.StateProbe {
			return
		}
	}
	n.t.Error("raft was not told that the snapshot was not sent, and waits for ever")
}

// request sends a request to the peer port as member from would.
func (n *testNetwork) request(method, path string, from uint64, body io.Reader, header ...string) (status int, text string) {
	n.t.Helper()
	req, err := http.NewRequest(method, n.url+path, body)
	testkit.Must(n.t, err)
	for name, value := range map[string]string{
		"X-Server-From": fmt.Sprintf("%x", from), "X-Raft-To": "1", "X-Etcd-Cluster-ID": fmt.Sprintf("%x", testCluster),
		"X-Server-Version": "3.7.0", "X-Min-Cluster-Version": "3.0.0",
	} {
		req.Header.Set(name, value)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	testkit.Must(n.t, err)
	return resp.StatusCode, string(b)
}

// snapshotRequest is a snapshot as member 2 sends it.
func snapshotRequest(t *testing.T, index uint64, state []byte) io.Reader {
	t.Helper()
	m, err := proto.Marshal(&raftpb.Message{
		Type: raftpb.MsgSnap.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(9)),
		Snapshot: &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(index), Term: new(uint64(9)), ConfState: &raftpb.ConfState{Voters: []uint64{1, 2}}}},
	})
	testkit.Must(t, err)
	return strings.NewReader(string(binary.BigEndian.AppendUint64(nil, uint64(len(m)))) + string(m) + string(state))
}

// arrivedMessages takes what waits for the loop.
func (n *testNetwork) arrivedMessages() []message {
	n.loop.mu.Lock()
	defer n.loop.mu.Unlock()
	m := n.loop.inbox.messages
	n.loop.inbox.messages, n.loop.inbox.bytes = nil, 0
	return m
}

// TestNetwork_SnapshotThatCannotBeOpened: raft hears of it, or it would never send that member anything again.
func TestNetwork_SnapshotThatCannotBeOpened(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	testkit.Must(t, os.Remove(n.storage.bodyPath(20)))
	n.lead()
	n.wantReported()
}

// TestNetwork_SnapshotWithoutLink: a member that is not connected yet has not got the snapshot.
func TestNetwork_SnapshotWithoutLink(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	n.setMembers(nil)
	n.relinkAll()
	n.lead()
	n.wantReported()
}

// TestNetwork_DivergedSendsNoSnapshot: a state that is wrong is for nobody.
func TestNetwork_DivergedSendsNoSnapshot(t *testing.T) {
	var asked atomic.Int64
	peer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == rafthttp.RaftSnapshotPrefix {
			asked.Add(1)
		}
	}))
	defer peer.Close()
	n := newTestNetwork(t, peer.URL, false)
	n.admission.verdict.Store(int32(store.Diverged))
	n.lead()
	n.wantReported()
	if asked.Load() != 0 {
		t.Error("a member with a wrong state has sent it")
	}
}

// TestNetwork_SnapshotBackOff: a member that cannot take a snapshot is not offered it with each heartbeat, and
// its reason is logged once.
func TestNetwork_SnapshotBackOff(t *testing.T) {
	var offered, bytes atomic.Int64
	peer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == rafthttp.RaftSnapshotPrefix {
			offered.Add(1)
			if r.Header.Get("Expect") != "100-continue" {
				bytes.Add(r.ContentLength)
			}
			http.Error(w, "no room here", http.StatusInsufficientStorage)
		}
	}))
	defer peer.Close()
	n := newTestNetwork(t, peer.URL, false)
	n.lead()
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		n.leader.step(&raftpb.Message{Type: raftpb.MsgHeartbeatResp.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(2))})
		testkit.Must(t, n.loop.iterate(false))
	}
	if got := offered.Load(); got < 2 || got > 5 { // at 0, 100, 300 and 700 ms
		t.Errorf("the snapshot was offered %d times within a second", got)
	}
	if bytes.Load() != 0 {
		t.Error("the state was sent to who had not asked for it")
	}
	logged := n.logs.FilterMessageSnippet("does not take the snapshot").All()
	if len(logged) != 1 || !strings.Contains(fmt.Sprint(logged[0].ContextMap()), "no room here") {
		t.Errorf("logged: %v", logged)
	}

	// A minute later it is logged again: a member that is too old for the state would be offered it in silence.
	n.work.Wait()
	snap, err := n.leader.log.Snapshot()
	testkit.Must(t, err)
	l := (*n.links.Load())[2]
	l.outbox.warned, l.outbox.pause = l.outbox.warned.Add(-snapshotWarnEvery), 0
	for range 2 {
		l.sendSnapshot(&raftpb.Message{Type: raftpb.MsgSnap.Enum(), To: new(uint64(2)), Snapshot: snap})
	}
	if got := n.logs.FilterMessageSnippet("does not take the snapshot").Len(); got != 2 {
		t.Errorf("logged %d times after a minute", got)
	}
}

// TestNetwork_ReceivesSnapshot: what cannot be taken is refused with a status that says why, and does not stand
// in the way of the next attempt.
func TestNetwork_ReceivesSnapshot(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	st := n.store.Snapshot()
	st.Index, st.Term = 30, 9
	good := encodeState(t, &st)
	damaged := []byte(strings.Replace(string(good), "vvvv", "vwvv", 1))
	newer := append([]byte{}, good...)
	copy(newer, "another")

	n.free.Store(1 << 19) // less than its reserve
	testkit.Must(t, n.admission.lookAtDisk())
	if status, text := n.request("POST", rafthttp.RaftSnapshotPrefix, 2, snapshotRequest(t, 30, good)); status != http.StatusInsufficientStorage {
		t.Errorf("without room: %d %s", status, text)
	}
	n.free.Store(math.MaxInt64)
	testkit.Must(t, n.admission.lookAtDisk())
	if status, text := n.request("POST", rafthttp.RaftSnapshotPrefix, 2, snapshotRequest(t, 30, damaged)); status != http.StatusUnprocessableEntity {
		t.Errorf("damaged: %d %s", status, text)
	}
	if status, text := n.request("POST", rafthttp.RaftSnapshotPrefix, 2, strings.NewReader("\x00\x00\x00\x00\xff\xff\xff\xff")); status != http.StatusRequestEntityTooLarge {
		t.Errorf("an envelope of 4 GiB: %d %s", status, text)
	}
	if _, err := os.Stat(n.storage.bodyPath(30)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a refused snapshot has left a file: %v", err)
	}
	if m := n.arrivedMessages(); len(m) != 0 {
		t.Errorf("refused, and yet delivered: %v", m)
	}

	if status, text := n.request("POST", rafthttp.RaftSnapshotPrefix, 2, snapshotRequest(t, 30, good)); status != http.StatusNoContent {
		t.Errorf("whole: %d %s", status, text)
	}
	if m := n.arrivedMessages(); len(m) != 1 || m[0].body == nil || m[0].body.Index != 30 {
		t.Errorf("delivered: %v", m)
	}
	if status, text := n.request("POST", rafthttp.RaftSnapshotPrefix, 2, snapshotRequest(t, 5, nil)); status != http.StatusNoContent {
		t.Errorf("older than what this member has: %d %s", status, text)
	}
}

// TestNetwork_Senders: only members get through to rafthttp, and addresses come from the configuration only.
func TestNetwork_Senders(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	n.store.State.Removed = map[uint64]bool{5: true}
	tests := []struct {
		name, method, path string
		from               uint64
		header             []string
		status             int
	}{
		{"a stranger", "GET", "/raft/stream/message/4", 4, nil, http.StatusNotFound},
		{"a stranger with a junk version", "POST", "/raft", 4, []string{"X-Server-Version", "x"}, http.StatusNotFound},
		{"nobody", "POST", "/raft", 0, []string{"X-Server-From", ""}, http.StatusBadRequest},
		{"who was removed", "GET", "/raft/stream/message/5", 5, nil, http.StatusGone},
		{"another cluster's", "GET", "/raft/stream/message/5", 5, []string{"X-Etcd-Cluster-ID", "8"}, http.StatusPreconditionFailed},
		{"another member's stream", "GET", "/raft/stream/message/3", 2, nil, http.StatusNotFound},
		{"an address that is none", "GET", "/raft/stream/message/3", 2, []string{"X-PeerURLs", "::none"}, http.StatusNotFound},
		{"a probe", "GET", rafthttp.ProbingPrefix, 0, []string{"X-Etcd-Cluster-ID", ""}, http.StatusOK},
	}
	for _, tt := range tests {
		if status, text := n.request(tt.method, tt.path, tt.from, nil, tt.header...); status != tt.status {
			t.Errorf("%s: %d %s, want %d", tt.name, status, text, tt.status)
		}
	}
}

// TestNetwork_SnapshotWithoutState is not for raft, which would miss the state.
func TestNetwork_SnapshotWithoutState(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	m := &raftpb.Message{
		Type: raftpb.MsgSnap.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(9)),
		Snapshot: &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(50)), Term: new(uint64(9))}},
	}
	for _, dialed := range []bool{false, true} {
		if err := (*n.links.Load())[2].receive(m, dialed); err == nil {
			t.Error("taken")
		}
	}
	if got := n.arrivedMessages(); len(got) != 0 {
		t.Errorf("delivered: %v", got)
	}
}

// TestNetwork_Members: links follow the members, and a URL that is none harms nobody.
func TestNetwork_Members(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	first := (*n.links.Load())[2]
	n.setMembers([]store.Member{{ID: 1}, {ID: 2, PeerURL: "http://127.0.0.1:1"}, {ID: 3, PeerURL: "::none"}, {ID: 4, PeerURL: "http://127.0.0.1:1"}})
	n.relinkAll()
	links := *n.links.Load()
	if len(links) != 2 || links[2] != first || links[4] == nil {
		t.Errorf("links: %v", links)
	}
	n.setMembers([]store.Member{{ID: 1}, {ID: 2, PeerURL: "http://127.0.0.1:2"}})
	n.relinkAll()
	links = *n.links.Load()
	if len(links) != 1 || links[2] == first || links[2].outbox != first.outbox {
		t.Errorf("links: %v", links)
	}
}

// TestNetwork_UnknownMember: a node that joined while this one was away is asked for at the members, and
// talked to as long as it is not removed. What it says itself is not asked.
func TestNetwork_UnknownMember(t *testing.T) {
	answer := peerInfo{Cluster: fmt.Sprintf("%x", testCluster)}
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == peerInfoPath {
			w.Header().Set("Content-Type", "application/json")
			testkit.Must(t, json.NewEncoder(w).Encode(answer))
		}
	}))
	defer other.Close()
	n := newTestNetwork(t, other.URL, false)
	steps := []struct {
		name    string
		members []store.Member
		removed []uint64
		cluster uint64
		linked  bool
	}{
		{"another cluster lists it", []store.Member{{ID: 8, PeerURL: "http://127.0.0.1:1"}}, nil, testCluster + 1, false},
		{"nobody lists it", []store.Member{{ID: 1}, {ID: 2, PeerURL: other.URL}}, nil, testCluster, false},
		{"a member lists it", []store.Member{{ID: 8, PeerURL: "http://127.0.0.1:1"}}, nil, testCluster, true},
		{"it was removed", []store.Member{{ID: 8, PeerURL: "http://127.0.0.1:1"}}, []uint64{8}, testCluster, false},
	}
	for _, step := range steps {
		answer.Members, answer.Removed, answer.Cluster = step.members, step.removed, fmt.Sprintf("%x", step.cluster)
		if (*n.links.Load())[8] == nil {
			n.request("GET", "/raft/stream/message/8", 8, nil, "X-PeerURLs", "http://127.0.0.1:1")
			select {
			case <-n.knocked:
			default:
				t.Errorf("%s: nobody heard it knock", step.name)
			}
		}
		n.ask(t.Context(), nil)
		n.relinkAll()
		if links := *n.links.Load(); (links[8] != nil) != step.linked || links[2] == nil || links[1] != nil {
			t.Errorf("%s: links %v", step.name, links)
		}
	}
}

// readNothing asks for a stream of member 1 as member 2 does, and never reads it.
func (n *testNetwork) readNothing(stream string) {
	n.t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(n.url, "http://"))
	testkit.Must(n.t, err)
	n.t.Cleanup(func() { _ = c.Close() })
	testkit.Must(n.t, c.(*net.TCPConn).SetReadBuffer(4096))
	_, err = fmt.Fprintf(c, "GET /raft/stream/%s/2 HTTP/1.1\r\nHost: x\r\nX-Server-From: 2\r\nX-Raft-To: 1\r\nX-Etcd-Cluster-ID: %x\r\n"+
		"X-Server-Version: 3.7.0\r\nX-Min-Cluster-Version: 3.0.0\r\n\r\n", stream, testCluster)
	testkit.Must(n.t, err)
}

// fill sends to member 2 until a writer is stuck: nothing that is sent leaves any more.
func (n *testNetwork) fill() {
	n.t.Helper()
	m := &raftpb.Message{
		Type: raftpb.MsgApp.Enum(), From: new(uint64(1)), To: new(uint64(2)), Term: new(uint64(2)),
		Entries: []*raftpb.Entry{{Index: new(uint64(21)), Term: new(uint64(2)), Data: make([]byte, 1<<20)}},
	}
	for range 64 {
		n.send([]*raftpb.Message{m})
		time.Sleep(2 * time.Millisecond)
	}
}

// TestNetwork_StuckMember: a member that takes no bytes, as one whose host is gone, holds up neither who sends
// nor who gives it a new link.
func TestNetwork_StuckMember(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	n.readNothing("msgapp")
	n.stream("msgapp", nil)
	l := (*n.links.Load())[2]
	n.fill()

	start := time.Now()
	n.relink(func(*link) bool { return true })
	closed := make(chan struct{})
	go func() {
		n.work.Wait()
		close(closed)
	}()
	const most = time.Second // rafthttp gives up after 5 s
	for ended := false; !ended; {
		before := time.Now()
		l.send(&raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(1)), To: new(uint64(2))})
		if took := time.Since(before); took > most {
			t.Fatalf("sending took %v", took)
		}
		if time.Since(start) > most {
			t.Fatal("the old link does not close")
		}
		select {
		case <-closed:
			ended = true
		case <-time.After(time.Millisecond):
		}
	}
}

// TestNetwork_NewStream: a member that asks for a stream again has given up the old one, on which a writer may
// be stuck.
func TestNetwork_NewStream(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	n.readNothing("msgapp")
	old := n.stream("msgapp", nil)
	n.fill()
	n.readNothing("msgapp")
	n.stream("msgapp", old)
	if err := old.SetWriteDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the old connection is still open: %v", err)
	}
}

// stream waits until member 2 reads a stream on another connection than old.
func (n *testNetwork) stream(name string, old net.Conn) net.Conn {
	n.t.Helper()
	l := (*n.links.Load())[2]
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		l.streamsMu.Lock()
		c := l.streams["/raft/stream/"+name+"/2"]
		l.streamsMu.Unlock()
		if c != nil && c != old {
			return c
		}
	}
	n.t.Fatal("nobody reads the stream")
	return nil
}

// TestPeerNetwork_Logger: of what rafthttp says only warnings are logged, none about the links that the node closes
// as it ends, and there is no complaint if the log takes errors only.
func TestPeerNetwork_Logger(t *testing.T) {
	for _, tt := range []struct {
		level      zapcore.Level
		want, last int // lines before and after close
	}{{zap.DebugLevel, 4, 4}, {zap.InfoLevel, 2, 1}, {zap.ErrorLevel, 1, 1}} {
		var complaints bytes.Buffer
		core, logs := observer.New(tt.level)
		n := newPeerNetwork(1, testCluster, nil, nil, nil, nil, zap.New(core, zap.ErrorOutput(zapcore.AddSync(&complaints))))
		say := func(when string) int {
			before := logs.Len()
			for _, l := range []zapcore.Level{zap.DebugLevel, zap.InfoLevel, zap.WarnLevel, zap.ErrorLevel} {
				n.rafthttpLogger.With(zap.Int("x", 1)).Log(l, when)
			}
			return logs.Len() - before
		}
		before := say("before")
		n.close()
		if last := say("after"); before != tt.want || last != tt.last || complaints.Len() > 0 {
			t.Errorf("%v: %d lines, and %d after close, want %d and %d; %s", tt.level, before, last, tt.want, tt.last, &complaints)
		}
	}
}
