package main

import (
	"encoding/binary"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// Directed scenarios about linearizable reads where raft by itself would answer
// them too early: with one voter it asks nobody, and does not look at whether the
// leader is that voter, or what it has committed.

// wantFresh wants a read not to be answered, or with this value.
func (s *sim) wantFresh(t *testing.T, read *simOp, want string) {
	t.Helper()
	s.runUntil(500*time.Millisecond, read.ended)
	if read.ended() && read.outcome == opDone && read.item.Value != want {
		t.Errorf("%v, although %q was acknowledged before it began", read, want)
	}
}

// bigTxn writes value to key, and so much else that two of them are applied in
// two turns.
func bigTxn(key, value string) *simOp {
	tx := store.Txn{Then: []store.Command{{Op: store.OpPut, Key: key, Value: value}}}
	for _, pad := range []string{"/1", "/2", "/3"} {
		tx.Then = append(tx.Then, store.Command{Op: store.OpPut, Key: key + pad, Value: key + pad + strings.Repeat("x", 900<<10)})
	}
	return &simOp{cmd: store.Command{Op: store.OpTxn, Key: key, Value: tx.Encode()}}
}

// A single voter forgot in a crash how much is committed. It leads again at once,
// and applies its log in parts: a read must wait for all of it.
func TestRead_OneVoterAfterCrash(t *testing.T) {
	s, n := newScenario(t, defaultSimConfig(1, 1))
	s.wait(t, s.begin(n, putOp("k", "old"), time.Second))
	first := s.begin(n, bigTxn("j/0", "other"), time.Second)
	second := s.begin(n, bigTxn("k", "new"), time.Second)
	if !s.runUntil(10*time.Second, func() bool { return first.ended() && second.ended() }) || second.outcome != opDone {
		t.Fatalf("outcome %v; %.300v", second.outcome, s.check.violations)
	}
	n.crash(tailLost)
	n.start()
	read := s.begin(n, getOp("k"), 5*time.Second)
	s.wait(t, read)
	s.wantFresh(t, read, "new")
	s.judge(t)
}

// The moment between the election of a single voter and its first commit, at the
// replica: neither its own reads nor those of a learner are answered.
func TestRead_OneVoterJustElected(t *testing.T) {
	s, n := newScenario(t, defaultSimConfig(1, 1))
	learner := s.addNode("http://n2", true)
	s.change(t, n, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: learner.id, PeerURL: learner.url}})
	n.crash(tailKept)
	n.start()
	r := n.process.replica
	testkit.Must(t, r.process()) // what is committed
	testkit.Must(t, r.raw.Campaign())
	for range 2 { // its votes for itself
		rd := r.raw.Ready()
		testkit.Must(t, r.persist(rd))
		testkit.Must(t, r.apply(rd.CommittedEntries))
		r.raw.Advance(rd)
	}
	st := r.raw.BasicStatus()
	if committed, err := r.log.Term(st.GetCommit()); st.RaftState != raft.StateLeader || err != nil || committed == st.GetTerm() {
		t.Fatalf("%v, committed entry of term %d: %v", st, committed, err)
	}
	r.leader = n.id
	r.read(&readRound{done: make(chan struct{})})
	r.step(&raftpb.Message{Type: raftpb.MsgReadIndex.Enum(), From: new(learner.id), To: new(n.id), Entries: []*raftpb.Entry{{Data: make([]byte, readContextSize)}}})
	rd := r.raw.Ready()
	if len(rd.ReadStates) > 0 {
		t.Errorf("a leader that has committed nothing in its term answers its own reads: %v", rd.ReadStates)
	}
	for _, m := range rd.Messages {
		if m.GetType() == raftpb.MsgReadIndexResp {
			t.Errorf("a leader that has committed nothing in its term answers a learner: %v", m)
		}
	}
}

// removedLeader makes a cluster of two voters, whose leader, gone, has applied
// its own removal, and a learner, which has yet to be told: late holds that back.
func removedLeader(t *testing.T) (s *sim, left, gone, learner *simNode, late *heldMessages) {
	t.Helper()
	s, left = newScenario(t, defaultSimConfig(1, 2))
	gone = s.node(left.id%2 + 1)
	learner = s.addNode("http://n3", true)
	s.change(t, left, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: learner.id, PeerURL: learner.url}})
	learner.start()
	s.wait(t, s.begin(left, putOp("k", "old"), time.Second))
	s.run(time.Second)
	before := s.check.model.index()
	late = s.hold(func(m *raftpb.Message) bool {
		return m.GetFrom() == gone.id && m.GetTo() == learner.id && m.GetCommit() > before
	})
	acks := s.hold(func(m *raftpb.Message) bool { return m.GetFrom() == gone.id && m.GetType() == raftpb.MsgAppResp })
	left.proposeChange(store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: gone.id}}, changeTimeout)
	s.run(20 * time.Millisecond)
	left.crash(tailLost)
	acks.stop()
	// It ends when it is told that it was removed: not here.
	told := s.hold(func(m *raftpb.Message) bool {
		return m.GetFrom() == gone.id && left.process != nil && left.process.store.State.Removed[gone.id]
	})
	left.start()
	gone.process.loop.call(gone.process.replica.raw.Campaign)
	gone.process.wake()
	if !s.runUntil(2*time.Second, func() bool {
		return gone.process != nil && leads(gone) && gone.process.store.State.Removed[gone.id] && left.process.store.State.Removed[gone.id] &&
			learner.process.replica.leader == gone.id
	}) {
		t.Fatalf("node %d does not lead, or its removal was not applied; %v", gone.id, s.check.violations)
	}
	told.stop()
	return s, left, gone, learner, late
}

// Of two voters the leader was removed. The other one goes on without it, and it
// does not notice: cut off, or paused.
func TestRead_RemovedLeader(t *testing.T) {
	for _, tt := range []struct {
		name           string
		pause, learner bool
	}{
		{"cut off", false, false},
		{"paused", true, false},
		{"cut off, asked by a learner", false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, left, gone, learner, late := removedLeader(t)
			s.network.partition(func(id uint64) bool { return id == left.id })
			if tt.pause {
				gone.pause(time.Hour)
			}
			if !s.runUntil(5*time.Second, func() bool { return leads(left) }) {
				t.Fatalf("node %d does not lead; %v", left.id, s.check.violations)
			}
			s.wait(t, s.begin(left, putOp("k", "new"), time.Second))
			if gone.process == nil || !leads(gone) {
				t.Fatalf("node %d leads no more: the scenario did not happen", gone.id)
			}
			gone.pausedUntil = s.now
			reader := gone
			if tt.learner {
				reader = learner
			}
			read := s.begin(reader, getOp("k"), 5*time.Second)
			gone.resume()
			s.run(50 * time.Millisecond)
			late.release(t)
			s.wantFresh(t, read, "new")
			s.network.heal()
			if !s.runUntil(5*time.Second, func() bool { return gone.retired }) {
				t.Errorf("node %d was not told that it is removed", gone.id)
			}
			s.judge(t)
		})
	}
}

// An answer to a read of the process that was here before is no answer to one of
// this process, although both count their attempts from 1.
func TestRead_AnswerToEarlierLife(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	follower := s.node(leader.id%3 + 1)
	s.wait(t, s.begin(follower, putOp("k", "old"), time.Second))
	attempt := uint64(0)
	late := s.hold(func(m *raftpb.Message) bool {
		if m.GetType() != raftpb.MsgReadIndexResp || m.GetTo() != follower.id {
			return false
		}
		attempt = binary.LittleEndian.Uint64(m.GetEntries()[0].GetData()[8:])
		return true
	})
	s.begin(follower, getOp("k"), time.Second)
	if !s.runUntil(time.Second, func() bool { return len(late.held) == 1 }) {
		t.Fatal("no answer was held")
	}
	late.stop()
	follower.crash(tailKept)
	follower.start()
	if !s.runUntil(time.Second, func() bool {
		return s.agreedLeader() == leader && follower.process.store.Applied() == leader.process.store.Applied()
	}) {
		t.Fatalf("node %d does not follow; %v", follower.id, s.check.violations)
	}
	s.hold(func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgApp && m.GetTo() == follower.id })
	s.wait(t, s.begin(leader, putOp("k", "new"), time.Second))
	s.hold(func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgReadIndex })
	read := s.begin(follower, getOp("k"), time.Second)
	if !s.runUntil(time.Second, func() bool { return follower.process.replica.readSeq == attempt }) {
		t.Fatalf("the answer is to attempt %d, this one is %d", attempt, follower.process.replica.readSeq)
	}
	late.release(t)
	s.run(50 * time.Millisecond)
	s.wantFresh(t, read, "new")
	s.network.filter = nil
	s.run(2 * time.Second)
	s.judge(t)
}
