package main

import (
	"encoding/binary"
	"os"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// netConfig says what a network does to messages.
type netConfig struct {
	delayMin, delayMax time.Duration

	loss      float64
	duplicate float64
	late      float64 // probability that a message takes
	lateMax   time.Duration
}

// simNetwork carries messages between processes.
type simNetwork struct {
	sim *sim
	netConfig
	cut  [nodesMax + 1][nodesMax + 1]bool          // from, to
	slow [nodesMax + 1][nodesMax + 1]time.Duration // more delay
	// filter, if set, says of each message whether it may pass: scenarios hold
	// some back.
	filter func(m *raftpb.Message) bool

	messages  int
	requests  int // messages that are no answers
	bytes     int // counted if countBytes is set
	rejects   int // answers that say that logs do not match
	snapshots int

	countBytes bool
}

// nodesMax bounds the node ids of a simulation.
const nodesMax = 31

func newSimNetwork(s *sim, cfg netConfig) *simNetwork {
	return &simNetwork{sim: s, netConfig: cfg}
}

// heal repairs all that was cut or slow.
func (n *simNetwork) heal() {
	clear(n.cut[:])
	clear(n.slow[:])
}

// isolate cuts all links of a node, or repairs them.
func (n *simNetwork) isolate(id uint64, cut bool) {
	for other := range n.cut {
		n.cut[id][other], n.cut[other][id] = cut, cut
	}
}

// partition cuts the links between the nodes of a side and the others.
func (n *simNetwork) partition(side func(id uint64) bool) {
	for from := range n.cut {
		for to := range n.cut {
			if side(uint64(from)) != side(uint64(to)) {
				n.cut[from][to] = true
			}
		}
	}
}

// connected says whether both nodes are up and can talk.
func (n *simNetwork) connected(a, b uint64) bool {
	up := n.sim.node(a).process != nil && n.sim.node(b).process != nil
	return up && !n.cut[a][b] && !n.cut[b][a]
}

// send takes a message from a process.
func (n *simNetwork) send(from *process, m *raftpb.Message) {
	s := n.sim
	if s.plant != nil && s.plant.outgoing != nil {
		if m = s.plant.outgoing(from, m); m == nil {
			return
		}
	}
	n.messages++
	if !raft.IsResponseMsg(m.GetType()) {
		n.requests++
	} else if m.GetType() == raftpb.MsgAppResp && m.GetReject() {
		n.rejects++
	}
	if n.countBytes {
		n.bytes += proto.Size(m)
	}
	s.record(m.GetFrom(), m.GetTo(), uint64(m.GetType()), m.GetTerm(), m.GetIndex(), m.GetCommit(), uint64(len(m.GetEntries())))
	s.check.sent(from, m)
	var body []byte
	if m.GetType() == raftpb.MsgSnap {
		n.snapshots++
		var err error
		if body, err = os.ReadFile(from.disk.bodyPath(m.GetSnapshot().GetMetadata().GetIndex())); err != nil {
			s.check.violate("snapshot", "node %d has no body to send: %v", from.node.id, err)
			return
		}
	}
	copies := 1
	if s.chance(n.duplicate) {
		copies = 2
	}
	for range copies {
		// The receiver must not share memory with the sender's log.
		n.carry(from, proto.CloneOf(m), body)
	}
}

// carry decides what becomes of one copy.
func (n *simNetwork) carry(from *process, m *raftpb.Message, body []byte) {
	s := n.sim
	if n.filter != nil && !n.filter(m) || s.chance(n.loss) || m.GetTo() > uint64(len(s.nodes)) {
		n.failed(from, m)
		return
	}
	delay := s.between(n.delayMin, n.delayMax) + n.slow[m.GetFrom()][m.GetTo()]
	if s.chance(n.late) {
		delay += s.between(0, n.lateMax)
	}
	s.after(delay, func() { n.arrive(from, m, body) })
}

// arrive hands a message to whatever process lives at its address.
func (n *simNetwork) arrive(from *process, m *raftpb.Message, body []byte) {
	s := n.sim
	to := s.node(m.GetTo())
	if n.cut[m.GetFrom()][m.GetTo()] || to.process == nil || to.process.identity.Cluster != from.identity.Cluster {
		n.failed(from, m)
		return
	}
	s.record(m.GetFrom(), m.GetTo(), uint64(m.GetType()), m.GetTerm(), m.GetIndex())
	if m.GetType() == raftpb.MsgReadIndexResp {
		context := m.GetEntries()[0].GetData()
		if binary.LittleEndian.Uint64(context) == to.process.replica.session {
			to.process.asked[binary.LittleEndian.Uint64(context[8:])] = true
		}
	}
	if s.plant != nil && s.plant.incoming != nil {
		s.plant.incoming(to.process, m)
	}
	if err := to.process.deliver(m, body); err != nil {
		n.failed(from, m)
		return
	}
	if m.GetType() == raftpb.MsgSnap {
		from.after(s.between(n.delayMin, n.delayMax), func() { from.reportSnapshot(m.GetTo(), raft.SnapshotFinish) })
	}
}

// snapshotTimeout is how long a sender waits before it gives up a snapshot.
const snapshotTimeout = 500 * time.Millisecond

// failed tells the sender what rafthttp would: that a snapshot did not arrive.
// Other messages are lost without a word.
func (n *simNetwork) failed(from *process, m *raftpb.Message) {
	if m.GetType() == raftpb.MsgSnap {
		if plant := n.sim.plant; plant != nil && plant.impatient {
			from.reportSnapshot(m.GetTo(), raft.SnapshotFailure)
			return
		}
		from.after(snapshotTimeout, func() { from.reportSnapshot(m.GetTo(), raft.SnapshotFailure) })
	}
}
