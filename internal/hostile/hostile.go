package hostile

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// Request is a request that no member sends.
type Request struct {
	Name, Method, Path string
	Body               []byte
	Header             []string
	Statuses           []int // one of them is the answer to somebody who is taken for a member
}

// Entry returns an entry of a log with these commands.
func Entry(index, term uint64, commands []byte) *raftpb.Entry {
	data := make([]byte, store.BatchHeaderSize, store.BatchHeaderSize+len(commands))
	store.BatchHeader{Session: 1 << 60, Seq: 1, Time: 1}.Put(data)
	return &raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Index: new(index), Term: new(term), Data: append(data, commands...)}
}

// Messages are messages from one member to another, which is in a term and has a log up to last.
func Messages(from, to, term, last uint64) map[string]*raftpb.Message {
	encode := func(c store.Command) []byte { return c.AppendTo(nil) }
	change := func(m string) *raftpb.Entry {
		e := Entry(0, 0, encode(store.Command{Op: store.OpMember, Value: m}))
		data, _ := proto.Marshal(&raftpb.ConfChange{Type: raftpb.ConfChangeAddLearnerNode.Enum(), NodeId: new(uint64(77)), Context: e.Data}) // cannot fail
		return &raftpb.Entry{Type: raftpb.EntryConfChange.Enum(), Data: data}
	}
	prop := func(e *raftpb.Entry) *raftpb.Message {
		e.Index, e.Term = nil, nil
		return &raftpb.Message{Type: raftpb.MsgProp.Enum(), Entries: []*raftpb.Entry{e}}
	}
	app := func(ents ...*raftpb.Entry) *raftpb.Message {
		return &raftpb.Message{Type: raftpb.MsgApp.Enum(), Term: new(term), LogTerm: new(term), Index: new(last), Commit: new(last + 1), Entries: ents}
	}
	good := encode(store.Command{Op: store.OpPut, Key: "hostile", Value: "v"})
	of := func(t raftpb.MessageType, fill func(*raftpb.Message)) *raftpb.Message {
		m := &raftpb.Message{Type: t.Enum(), Term: new(term)}
		if fill != nil {
			fill(m)
		}
		return m
	}
	const huge = 1<<64 - 1
	all := map[string]*raftpb.Message{
		"propose garbage":                  prop(Entry(0, 0, []byte("\x01\x00garbage"))),
		"propose a broken txn":             prop(Entry(0, 0, encode(store.Command{Op: store.OpTxn, Value: "\xff\xff"}))),
		"propose a level that is none":     prop(Entry(0, 0, encode(store.Command{Op: store.OpLevel, Value: "\xff"}))),
		"propose an address that is none":  prop(change(`{"id":77,"peerURL":"::bad"}`)),
		"propose a long key":               prop(Entry(0, 0, encode(store.Command{Op: store.OpPut, Key: strings.Repeat("k", 100_000)}))),
		"propose a long key in a txn":      prop(Entry(0, 0, encode(store.Command{Op: store.OpTxn, Value: (&store.Txn{Then: []store.Command{{Op: store.OpPut, Key: strings.Repeat("k", 5000)}}}).Encode()}))),
		"propose a member of another ID":   prop(change(`{"id":78,"peerURL":"http://127.0.0.1:1"}`)),
		"propose nothing":                  {Type: raftpb.MsgProp.Enum()},
		"propose no batch":                 prop(&raftpb.Entry{Data: []byte("x")}),
		"propose a change of another kind": prop(&raftpb.Entry{Type: raftpb.EntryConfChangeV2.Enum()}),
		"heartbeat of the last term":       of(raftpb.MsgHeartbeat, func(m *raftpb.Message) { m.Term = new(uint64(huge)) }),
		"heartbeat far ahead":              of(raftpb.MsgHeartbeat, func(m *raftpb.Message) { m.Term = new(term + 1_000_001) }),
		"heartbeat beyond the log":         of(raftpb.MsgHeartbeat, func(m *raftpb.Message) { m.Commit = new(uint64(1 << 40)) }),
		"heartbeat without a term":         of(raftpb.MsgHeartbeat, func(m *raftpb.Message) { m.Term, m.Commit = nil, new(uint64(1<<40)) }),
		"heartbeat with a context":         of(raftpb.MsgHeartbeat, func(m *raftpb.Message) { m.Context = []byte("abc") }),
		"answer beyond the log":            of(raftpb.MsgAppResp, func(m *raftpb.Message) { m.Index = new(uint64(1 << 50)) }),
		"answer far beyond the log":        of(raftpb.MsgAppResp, func(m *raftpb.Message) { m.Index = new(uint64(huge)) }),
		"append junk":                      app(Entry(last+1, term, []byte("\x4djunk"))),
		"append a gap":                     app(Entry(last+2, term, good)),
		"append a higher term":             app(Entry(last+1, term+1, good)),
		"append a falling term":            app(Entry(last+1, term, good), Entry(last+2, max(term, 2)-1, good)),
		"append no term":                   app(Entry(last+1, 0, good)),
		"append a commit that is none":     of(raftpb.MsgApp, func(m *raftpb.Message) { m.Commit = new(uint64(huge)) }),
		"append a change of another kind":  app(&raftpb.Entry{Type: raftpb.EntryConfChangeV2.Enum(), Index: new(last + 1), Term: new(term)}),
		"a type that is none":              of(99, nil),
		"forget the leader":                of(raftpb.MsgForgetLeader, nil),
		"campaign":                         of(raftpb.MsgHup, nil),
		"a proposal with a term":           {Type: raftpb.MsgProp.Enum(), Term: new(term), Entries: []*raftpb.Entry{{Data: Entry(0, 0, good).Data}}},
		"a read with a term":               {Type: raftpb.MsgReadIndex.Enum(), Term: new(term), Entries: []*raftpb.Entry{{Data: []byte("0123456789abcdef")}}},
		"a read of nothing":                {Type: raftpb.MsgReadIndex.Enum()},
		"a vote with entries":              of(raftpb.MsgVote, func(m *raftpb.Message) { m.Entries = []*raftpb.Entry{{}} }),
		"a snapshot without state":         of(raftpb.MsgSnap, nil),
		"a heartbeat with a snapshot":      of(raftpb.MsgHeartbeat, func(m *raftpb.Message) { m.Snapshot = &raftpb.Snapshot{} }),
	}
	for _, m := range all {
		m.From, m.To = new(from), new(to)
	}
	all["for somebody else"] = of(raftpb.MsgHeartbeat, func(m *raftpb.Message) { m.From, m.To = new(from), new(uint64(555)) })
	all["from nobody"] = of(raftpb.MsgHeartbeat, func(m *raftpb.Message) { m.To = new(to) })
	all["in another's name"] = of(raftpb.MsgAppResp, func(m *raftpb.Message) { m.From, m.To, m.Index = new(from+to+50), new(to), new(last) })
	all["a proposal of a stranger"] = prop(Entry(0, 0, good))
	all["a proposal of a stranger"].From, all["a proposal of a stranger"].To = new(uint64(99)), new(to)
	return all
}

// Snapshots are like messages, of snapshots.
func Snapshots(from, to, term, last uint64) map[string]*raftpb.Message {
	snapshot := func(change func(*raftpb.Message, *raftpb.SnapshotMetadata)) *raftpb.Message {
		meta := &raftpb.SnapshotMetadata{Index: new(last + 100), Term: new(term), ConfState: &raftpb.ConfState{Voters: []uint64{from, to}}}
		m := &raftpb.Message{Type: raftpb.MsgSnap.Enum(), From: new(from), To: new(to), Term: new(term), Snapshot: &raftpb.Snapshot{Metadata: meta}}
		change(m, meta)
		return m
	}
	return map[string]*raftpb.Message{
		"for somebody else":   snapshot(func(m *raftpb.Message, _ *raftpb.SnapshotMetadata) { m.To = new(uint64(555)) }),
		"in another's name":   snapshot(func(m *raftpb.Message, _ *raftpb.SnapshotMetadata) { m.From = new(uint64(99)) }),
		"without a snapshot":  snapshot(func(m *raftpb.Message, _ *raftpb.SnapshotMetadata) { m.Snapshot = nil }),
		"of the last term":    snapshot(func(m *raftpb.Message, _ *raftpb.SnapshotMetadata) { m.Term = new(uint64(1<<64 - 1)) }),
		"of a later term":     snapshot(func(_ *raftpb.Message, s *raftpb.SnapshotMetadata) { s.Term = new(term + 1) }),
		"at the last index":   snapshot(func(_ *raftpb.Message, s *raftpb.SnapshotMetadata) { s.Index = new(uint64(1 << 62)) }),
		"without members":     snapshot(func(_ *raftpb.Message, s *raftpb.SnapshotMetadata) { s.ConfState = nil }),
		"with a member twice": snapshot(func(_ *raftpb.Message, s *raftpb.SnapshotMetadata) { s.ConfState.Learners = []uint64{from} }),
		"without this node":   snapshot(func(_ *raftpb.Message, s *raftpb.SnapshotMetadata) { s.ConfState.Voters = []uint64{from} }),
		"with data":           snapshot(func(m *raftpb.Message, _ *raftpb.SnapshotMetadata) { m.Snapshot.Data = []byte("x") }),
		"with junk behind it": snapshot(func(*raftpb.Message, *raftpb.SnapshotMetadata) {}),
		"no snapshot at all":  {Type: raftpb.MsgHeartbeat.Enum(), From: new(from), To: new(to), Term: new(term)},
	}
}

// Requests are all of them, and what is wrong before there is a message.
func Requests(t *testing.T, from, to, term, last uint64) []Request {
	t.Helper()
	marshal := func(m *raftpb.Message) []byte {
		data, err := proto.Marshal(m)
		testkit.Must(t, err)
		return data
	}
	var all []Request
	for name, m := range Messages(from, to, term, last) {
		// What needs a look at the log, the loop refuses, which nobody waits for.
		all = append(all, Request{name, "POST", rafthttp.RaftPrefix, marshal(m), nil, []int{http.StatusBadRequest, http.StatusNoContent}})
	}
	for name, m := range Snapshots(from, to, term, last) {
		data := marshal(m)
		body := append(binary.BigEndian.AppendUint64(nil, uint64(len(data))), data...)
		all = append(all, Request{"snapshot " + name, "POST", rafthttp.RaftSnapshotPrefix, append(body, make([]byte, 1<<20)...), nil,
			[]int{http.StatusBadRequest, http.StatusUnprocessableEntity, http.StatusUnsupportedMediaType}})
	}
	ok := marshal(&raftpb.Message{Type: raftpb.MsgHeartbeatResp.Enum(), From: new(from), To: new(to), Term: new(term)})
	bad := []int{http.StatusBadRequest}
	return append(all,
		Request{"a version that is none", "POST", "/raft", ok, []string{"X-Server-Version", "x"}, bad},
		Request{"a least version that is none", "POST", "/raft", ok, []string{"X-Min-Cluster-Version", "9.9"}, bad},
		Request{"a stream with a version that is none", "GET", "/raft/stream/message/" + strconv.FormatUint(from, 16), nil, []string{"X-Server-Version", "-"}, bad},
		Request{"a snapshot with a version that is none", "POST", "/raft/snapshot", ok, []string{"X-Server-Version", "1.2.x"}, bad},
		Request{"junk", "POST", "/raft", []byte("\xff\xff\xff"), nil, bad},
		Request{"nothing", "POST", "/raft", nil, nil, bad},
		Request{"get", "GET", "/raft", nil, nil, []int{http.StatusMethodNotAllowed}},
		Request{"an envelope that is too large", "POST", "/raft/snapshot", []byte("\x00\x00\x00\x00\x04\x00\x00\x00"), nil, []int{http.StatusRequestEntityTooLarge}},
		Request{"half an envelope", "POST", "/raft/snapshot", []byte("\x00\x00\x00"), nil, bad},
	)
}

// Post sends a request to a peer port in the name of a member.
func (h Request) Post(t *testing.T, url, cluster string, from, to uint64) int {
	t.Helper()
	req, err := http.NewRequest(h.Method, url+h.Path, bytes.NewReader(h.Body))
	testkit.Must(t, err)
	for name, value := range map[string]string{
		"X-Server-From": fmt.Sprintf("%x", from), "X-Raft-To": fmt.Sprintf("%x", to), "X-Etcd-Cluster-ID": cluster,
		"X-Server-Version": "3.7.0", "X-Min-Cluster-Version": "3.0.0",
	} {
		req.Header.Set(name, value)
	}
	for i := 0; i < len(h.Header); i += 2 {
		req.Header.Set(h.Header[i], h.Header[i+1])
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return 0 // closed before all was sent
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<10)) // only the status matters
	return resp.StatusCode
}

// Decoy is a server at an address that somebody gives to a cluster.
type Decoy struct {
	*httptest.Server
	Asked  atomic.Int64 // who is there
	Others atomic.Int64 // other requests: those that only a member should get

	mu   sync.Mutex
	info any              // what it says, to be encoded as JSON; nil: it says 404
	Who  http.HandlerFunc // takes the place of info
	raft http.HandlerFunc // what else it answers
}

func NewDecoy(t *testing.T) *Decoy {
	tr := new(Decoy)
	tr.Server = httptest.NewServer(tr)
	t.Cleanup(func() { tr.CloseClientConnections(); tr.Close() })
	return tr
}

func (tr *Decoy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	tr.mu.Lock()
	info, who, raft := tr.info, tr.Who, tr.raft
	tr.mu.Unlock()
	if r.URL.Path != "/-/peer" {
		tr.Others.Add(1)
		if raft != nil {
			raft(w, r)
		}
		return
	}
	tr.Asked.Add(1)
	if who != nil {
		who(w, r)
		return
	}
	if info == nil {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	answer, err := json.Marshal(info)
	if err != nil {
		panic(err)
	}
	if !bytes.Contains(answer, []byte(`"cluster":"`)) || bytes.Contains(answer, []byte(`"cluster":""`)) {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = w.Write(answer) // fails if who asked has left
}

// Says changes what it answers.
func (tr *Decoy) Says(info any, raft http.HandlerFunc) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.raft, tr.info = raft, info
}

// Stream answers those who ask for a stream with what is there, and keeps the connection.
func Stream(t *testing.T, header http.Header, parts ...[]byte) http.HandlerFunc {
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
