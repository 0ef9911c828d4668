package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/hostile"
	"raftrv/internal/httpapi"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// TestNetwork_Hostile: what no member sends does not get to raft, or raft takes it without a change.
func TestNetwork_Hostile(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	n.lead()
	version := n.leader.store.Version()
	var refused []error
	n.leader.refused = func(_ uint64, err error) { refused = append(refused, err) }
	term := n.leader.raw.BasicStatus().GetTerm()
	n.loop.publish()
	last, err := n.leader.log.LastIndex()
	testkit.Must(t, err)
	for _, h := range hostile.Requests(t, 2, 1, term, last) {
		refused = nil
		status := h.Post(t, n.url, fmt.Sprintf("%x", testCluster), 2, 1)
		// A snapshot is refused before its body is read, so the answer may be lost with the connection.
		fits := status == 0 && h.Path == rafthttp.RaftSnapshotPrefix
		for _, want := range h.Statuses {
			fits = fits || status == want
		}
		if !fits {
			t.Errorf("%s: %d, want one of %v", h.Name, status, h.Statuses)
		}
		for _, m := range n.arrivedMessages() {
			n.leader.step(m.Message)
			if len(refused) != 1 {
				t.Errorf("%s: got to raft: %v", h.Name, m)
			}
		}
		testkit.Must(t, n.leader.process())
		if status := h.Post(t, n.url, fmt.Sprintf("%x", testCluster), 99, 1); status != http.StatusNotFound && status != 0 {
			t.Errorf("%s, from a stranger: %d", h.Name, status)
		}
	}
	if now := n.leader.raw.BasicStatus(); now.GetTerm() != term || now.Lead != 1 || n.leader.store.Version() != version {
		t.Errorf("it had an effect: %v, version %d", now, n.leader.store.Version())
	}
	for _, name := range []string{"format", "header", "sender", "type", "term", "index", "entries", "context", "size", "snapshot", "stranger"} {
		n.refusals.each(func(reason string, count uint64) {
			if reason == name && count == 0 {
				t.Errorf("nothing was counted as %s", reason)
			}
		})
	}
}

// TestNetwork_LargeMessages: who announces much gets no memory for it.
func TestNetwork_LargeMessages(t *testing.T) {
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	endless := struct{ io.Reader }{bytes.NewReader(make([]byte, 1<<10))}
	if status, text := n.request("POST", rafthttp.RaftPrefix, 2, endless); status != http.StatusLengthRequired {
		t.Errorf("without a length: %d %s", status, text)
	}
	if status, _ := n.request("POST", rafthttp.RaftPrefix, 2, bytes.NewReader(make([]byte, peerMessageMax+1))); status != http.StatusRequestEntityTooLarge && status != 0 {
		t.Errorf("too large: %d", status)
	}
	n.bodies.Store(peerMessageMax)
	if status, _ := n.request("POST", rafthttp.RaftPrefix, 2, bytes.NewReader(make([]byte, httpapi.BodyAllocMin+1))); status != http.StatusServiceUnavailable {
		t.Errorf("too many: %d", status)
	}
	if n.bodies.Load() != peerMessageMax {
		t.Errorf("%d bytes are counted still", n.bodies.Load()-peerMessageMax)
	}
	n.arriving.Store(true)
	if status, _ := n.request("POST", rafthttp.RaftSnapshotPrefix, 2, snapshotRequest(t, 30, nil)); status != http.StatusServiceUnavailable {
		t.Errorf("two snapshots: %d", status)
	}
}

// TestNetwork_StrangersLeaveNothing: rafthttp counts what it is given by who sent it, and from where, and forgets nobody.
func TestNetwork_StrangersLeaveNothing(t *testing.T) {
	series := func() (n int) {
		families, err := prometheus.DefaultGatherer.Gather()
		testkit.Must(t, err)
		for _, f := range families {
			n += len(f.GetMetric())
		}
		return n
	}
	n := newTestNetwork(t, "http://127.0.0.1:1", false)
	ok, err := proto.Marshal(&raftpb.Message{Type: raftpb.MsgHeartbeatResp.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(1))})
	testkit.Must(t, err)
	n.request("POST", rafthttp.RaftPrefix, 2, bytes.NewReader(ok))
	before := series()
	for i := range uint64(50) {
		n.request("POST", rafthttp.RaftPrefix, 1000+i, bytes.NewReader(ok))
		n.request("GET", fmt.Sprintf("/raft/stream/message/%x", 1000+i), 1000+i, nil)
		n.request("POST", rafthttp.RaftSnapshotPrefix, 1000+i, snapshotRequest(t, 30, nil))
	}
	if after := series(); after != before {
		t.Errorf("%d series of metrics, were %d", after, before)
	}
}

// TestCheckMessage_FarAhead: a node that was away for long finds back, on connections that it has opened.
func TestCheckMessage_FarAhead(t *testing.T) {
	m := &raftpb.Message{Type: raftpb.MsgHeartbeat.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(1 << 40))}
	v := peerView{self: 1, sender: 2, member: func(uint64) bool { return false }}
	if err := checkMessage(m, v); reasonForRefusal(err) != refusedTerm {
		t.Errorf("anybody may say so: %v", err)
	}
	v.dialed = true
	if err := checkMessage(m, v); err != nil {
		t.Error(err)
	}
	m.Term = new(uint64(raftNumberMax))
	if err := checkMessage(m, v); reasonForRefusal(err) != refusedTerm {
		t.Errorf("a term that no cluster comes to: %v", err)
	}
}

// FuzzCheckMessage: no bytes panic what looks at them.
func FuzzCheckMessage(f *testing.F) {
	for _, all := range []map[string]*raftpb.Message{hostile.Messages(2, 1, 5, 10), hostile.Snapshots(2, 1, 5, 10)} {
		for _, m := range all {
			data, err := proto.Marshal(m)
			testkit.Must(f, err)
			f.Add(data)
		}
	}
	v := peerView{self: 1, sender: 2, term: 5, dialed: true, member: func(id uint64) bool { return id < 4 }}
	f.Fuzz(func(t *testing.T, data []byte) {
		m := new(raftpb.Message)
		if proto.Unmarshal(data, m) != nil {
			return
		}
		err := checkMessage(m, v)
		if _, ok := errors.AsType[*peerRefusal](err); err != nil && !ok {
			t.Errorf("no reason: %v", err)
		}
		if err != nil || m.GetType() != raftpb.MsgApp {
			return
		}
		for _, e := range m.GetEntries() { // that were taken: nothing but the level stands in the way of applying them
			s := store.New()
			s.State.Level, s.State.Index = store.LevelNewest, e.GetIndex()-1
			if err := applyEntry(s, e); err != nil {
				t.Errorf("taken, and cannot be applied: %v", err)
			}
		}
	})
}

// BenchmarkCheckMessage is what a follower pays for looking at an append message before it takes it.
func BenchmarkCheckMessage(b *testing.B) {
	for _, n := range []int{1, 64} {
		var commands []byte
		for i := range n {
			commands = (&store.Command{Op: store.OpPut, Key: fmt.Sprintf("key%06d", i), Value: strings.Repeat("v", 100)}).AppendTo(commands)
		}
		m := &raftpb.Message{Type: raftpb.MsgApp.Enum(), From: new(uint64(2)), To: new(uint64(1)), Term: new(uint64(5)), LogTerm: new(uint64(5)),
			Index: new(uint64(9)), Entries: []*raftpb.Entry{hostile.Entry(10, 5, commands)}}
		v := peerView{self: 1, sender: 2, term: 5, member: func(uint64) bool { return true }}
		b.Run(fmt.Sprintf("commands=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := checkMessage(m, v); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
