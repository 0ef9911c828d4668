package main

import (
	"raftrv/internal/proc"
	"testing"

	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// TestProcess_HostilePeers: none of it ends a node, now or at the next start, or changes anything.
func TestProcess_HostilePeers(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	client := c.client(c.Nodes[0])
	written := client.putNew()
	info, err := fetchPeerInfo(c.context(), c.Nodes[0].RaftURL())
	must(t, err)
	before, err := c.leader().Status(c.context())
	must(t, err)
	for i, n := range c.Nodes {
		to, from := uint64(n.ID), uint64(c.Nodes[(i+1)%3].ID)
		for _, h := range hostileRequests(t, from, to, before.Term, before.AppliedIndex) {
			h.post(t, n.RaftURL(), info.Cluster, from, to)
			h.post(t, n.RaftURL(), info.Cluster, 99, to)
		}
		// What may be from a newer member gets an answer from the leader, as an entry that does nothing.
		newer := &raftpb.Message{Type: raftpb.MsgProp.Enum(), From: new(from), To: new(to), Entries: []*raftpb.Entry{{Data: entryOf(0, 0, []byte("\x4d\x00xx")).Data}}}
		data, err := proto.Marshal(newer)
		must(t, err)
		hostile{"", "POST", rafthttp.RaftPrefix, data, nil, nil}.post(t, n.RaftURL(), info.Cluster, from, to)
		if !n.Running() {
			t.Fatalf("node %d is down: %s", n.ID, n.LogTail())
		}
	}
	if o := client.putNew(); o.outcome != liveDone {
		t.Errorf("no write afterwards: %v", o)
	}
	for _, n := range c.Nodes {
		c.kill(n)
	}
	c.start()
	for _, n := range c.Nodes {
		if r := c.client(n).get(written.key); r.value != written.value || r.itemRV != written.rv {
			t.Errorf("node %d: %v, want what was written as %v", n.ID, r, written)
		}
		st, err := n.Status(c.context())
		must(t, err)
		if st.ResourceVersion != before.ResourceVersion+1 {
			t.Errorf("node %d has version %d, want %d", n.ID, st.ResourceVersion, before.ResourceVersion+1)
		}
	}
	c.verdict()
}
