package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// What the state machine makes of changes of the membership.
func TestChangeMember(t *testing.T) {
	two := []store.Member{{ID: 1, PeerURL: "http://a:1"}, {ID: 2, PeerURL: "http://b:1"}}
	withLearner := append(slices.Clone(two), store.Member{ID: 3, PeerURL: "http://c:1", Learner: true, Promote: true})
	for _, tt := range []struct {
		name    string
		members []store.Member
		removed uint64
		change  store.MemberChange
		want    []store.Member // if it is not refused
		refused string         // part of it
	}{
		{"add", two, 0, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: 3, PeerURL: "http://c:1", Promote: true}}, withLearner, ""},
		{"add again", two, 0, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: 2, PeerURL: "http://c:1"}}, nil, "exists already, at http://b:1"},
		{"add at the URL of another", two, 0, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: 3, PeerURL: "http://b:1"}}, nil, "member 2 already has the peer URL http://b:1"},
		{"add a removed ID", two, 3, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: 3, PeerURL: "http://c:1"}}, nil, "an ID is never used again"},
		{"promote", withLearner, 0, store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: 3}}, append(slices.Clone(two), store.Member{ID: 3, PeerURL: "http://c:1"}), ""},
		{"promote a voter", withLearner, 0, store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: 2}}, nil, "a voter already"},
		{"promote nobody", two, 0, store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: 3}}, nil, "there is no member 3"},
		{"promote a removed ID", two, 3, store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: 3}}, nil, "was removed"},
		{"remove a voter", two, 0, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: 1}}, two[1:], ""},
		{"remove a learner", withLearner, 0, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: 3}}, two, ""},
		{"remove nobody", two, 0, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: 3}}, nil, "there is no member 3"},
		{"remove twice", two, 3, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: 3}}, nil, "was removed"},
		{"remove the last voter", withLearner[1:], 0, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: 2}}, nil, "member 2 is the last voter"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := stateWithMembers(tt.members)
			if tt.removed != 0 {
				st.Removed[tt.removed] = true
			}
			before := maps.Clone(st.Removed)
			err := st.ChangeMember(tt.change)
			if tt.refused != "" {
				if err == nil || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("%v, want %q", err, tt.refused)
				}
				wantMembers(t, &st, tt.members)
				if !maps.Equal(st.Removed, before) {
					t.Errorf("refused, but the removed IDs are %v", st.Removed)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			wantMembers(t, &st, tt.want)
			if removed := tt.change.Kind == store.RemoveMember; st.Removed[tt.change.Member.ID] != removed {
				t.Errorf("removed IDs: %v", st.Removed)
			}
		})
	}
}

func TestUpdateMember(t *testing.T) {
	first := store.Member{ID: 1, Name: "one", PeerURL: "http://a:1", ClientURL: "http://a:2", Directory: 7}
	other := store.Member{ID: 2, PeerURL: "http://b:1", Learner: true, Promote: true}
	for _, tt := range []struct {
		name   string
		update store.Member
		want   store.Member
		status store.Status
	}{
		{"nothing", store.Member{ID: 1}, first, store.StatusReplaced},
		{"one field", store.Member{ID: 1, Name: "uno"}, store.Member{ID: 1, Name: "uno", PeerURL: "http://a:1", ClientURL: "http://a:2", Directory: 7}, store.StatusReplaced},
		{"all fields", store.Member{ID: 1, Name: "n", PeerURL: "http://c:1", ClientURL: "http://c:2", Directory: 8},
			store.Member{ID: 1, Name: "n", PeerURL: "http://c:1", ClientURL: "http://c:2", Directory: 8}, store.StatusReplaced},
		{"the same URL", store.Member{ID: 1, PeerURL: "http://a:1"}, first, store.StatusReplaced},
		{"the URL of another", store.Member{ID: 1, PeerURL: "http://b:1"}, first, store.StatusPrecondition},
		{"no vote is lost", store.Member{ID: 1, Learner: true, Promote: true}, first, store.StatusReplaced},
		{"nobody", store.Member{ID: 3, PeerURL: "http://c:1"}, first, store.StatusNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := stateWithMembers([]store.Member{first, other})
			value, err := json.Marshal(tt.update)
			if err != nil {
				t.Fatal(err)
			}
			update, err := store.DecodeMember(value)
			if r := st.UpdateMember(update); err != nil || r.Status != tt.status {
				t.Errorf("%+v, %v", r, err)
			}
			wantMembers(t, &st, []store.Member{tt.want, other})
			if counted := st.Updates == 1; counted != (tt.status == store.StatusReplaced) {
				t.Errorf("%d updates", st.Updates)
			}
		})
	}
	if _, err := store.DecodeMember("{"); err == nil {
		t.Error("malformed update accepted")
	}
}

func stateWithMembers(members []store.Member) store.State {
	st := store.NewState()
	for _, m := range members {
		st.Members[m.ID] = m
	}
	return st
}

func wantMembers(t *testing.T, st *store.State, want []store.Member) {
	t.Helper()
	if got := st.SortedMembers(); !slices.Equal(got, want) {
		t.Errorf("members %+v\nwant %+v", got, want)
	}
}

// A node that comes back without what it has promised is refused.
func TestCheckDirectory(t *testing.T) {
	members := []store.Member{{ID: 1, Directory: 11}, {ID: 2}}
	for _, tt := range []struct {
		name      string
		id        uint64
		directory uint64
		removed   []uint64
		want      string // part of the error; "" = none
	}{
		{"the same directory", 1, 11, nil, ""},
		{"another directory", 1, 12, nil, "with another data directory than d1, and must not come back"},
		{"the first start", 2, 12, nil, ""},
		{"not a member yet", 3, 12, nil, ""},
		{"removed", 3, 12, []uint64{3}, "node 3 was removed from the cluster"},
		{"removed, with its directory", 1, 11, []uint64{1}, "node 1 was removed from the cluster"},
		{"another was removed", 1, 11, []uint64{3}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config{id: tt.id, dataDir: fmt.Sprintf("d%d", tt.id)}
			err := checkDirectory(cfg, &peerInfo{Members: members, Removed: tt.removed}, tt.directory)
			if got := fmt.Sprint(err); (err != nil) != (tt.want != "") || tt.want != "" && !strings.Contains(got, tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// The rest are scenarios in the simulator, at the product's own calls.

const memberTimeout = 5 * time.Second

// changed waits for a change, and returns what its proposer is told.
func (s *sim) changed(t *testing.T, b *batch) error {
	t.Helper()
	if !s.runUntil(10*time.Second, func() bool { return isClosed(b.done) }) {
		t.Fatalf("no answer to a change; %v", s.check.violations)
	}
	return b.changeError()
}

// mustChange makes a change, which must succeed.
func (s *sim) mustChange(t *testing.T, n *simNode, c store.MemberChange) {
	t.Helper()
	if err := s.changed(t, n.proposeChange(c, memberTimeout)); err != nil {
		t.Fatal(err)
	}
}

// wantRefused wants a change to be refused for a reason that contains a text.
func (s *sim) wantRefused(t *testing.T, b *batch, reason string) {
	t.Helper()
	if err := s.changed(t, b); !errors.Is(err, fault.ErrMember) || !strings.Contains(err.Error(), reason) {
		t.Errorf("%v, want %q", err, reason)
	}
}

func (s *sim) wantVoter(t *testing.T, n *simNode, id uint64) {
	t.Helper()
	if !s.runUntil(5*time.Second, func() bool {
		m, ok := n.process.store.Member(id)
		return ok && !m.Learner
	}) {
		t.Fatalf("member %d is no voter: %+v; %v", id, n.process.store.Members(), s.check.violations)
	}
}

func TestMembers_LearnerIsPromoted(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	s.wait(t, s.begin(leader, putOp("k", "v"), time.Second))
	joining := s.addNode("http://n4", true)
	s.mustChange(t, leader, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: 4, PeerURL: joining.url, Promote: true}})
	s.run(time.Second)
	if m, _ := leader.process.store.Member(4); !m.Learner {
		t.Fatalf("promoted before it was started: %+v", m)
	}
	s.wantRefused(t, leader.proposeChange(store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: 4}}, memberTimeout), "has not caught up")
	joining.start()
	s.wantVoter(t, leader, 4)
	s.wait(t, s.begin(joining, putOp("k", "of the new one"), time.Second))
	s.judge(t)
}

// A learner that was wiped comes back with another directory. Were it a voter by then, and its directory unknown, it
// would have forgotten what it had promised, and nobody could tell.
func TestMembers_LearnerIsPromotedOnceItIsKnown(t *testing.T) {
	cfg := defaultSimConfig(1, 3)
	cfg.silent = true
	s, leader := newScenario(t, cfg)
	joining := s.addNode("http://n4", true)
	s.mustChange(t, leader, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: 4, PeerURL: joining.url, Promote: true}})
	joining.start()
	s.run(3 * time.Second)
	if m, _ := leader.process.store.Member(4); !m.Learner || !leader.process.replica.caughtUp(4) {
		t.Fatalf("a member of an unknown directory: %+v", m)
	}
	promote := store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: 4}}
	s.wantRefused(t, joining.proposeChange(promote, memberTimeout), "has not announced its data directory yet")
	s.silent = false
	joining.process.announce()
	s.wantVoter(t, leader, 4)
	if m, _ := leader.process.store.Member(4); m.Directory != joining.identity.Directory {
		t.Errorf("%+v, its directory is %d", m, joining.identity.Directory)
	}
	s.judge(t)
}

func TestMembers_LearnerStaysOne(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	joining := s.addNode("http://n4", true)
	s.mustChange(t, leader, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: 4, PeerURL: joining.url}})
	joining.start()
	s.run(3 * time.Second)
	if m, _ := joining.process.store.Member(4); !m.Learner || joining.process.replica.roleName() != "learner" {
		t.Fatalf("%+v, %s", m, joining.process.replica.roleName())
	}
	s.mustChange(t, joining, store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: 4}})
	s.wantVoter(t, leader, 4)
	s.judge(t)
}

// Of three members one is down: no other may go, and it is told why wherever it
// is asked. The one that is down may.
func TestMembers_RemovalNeedsMajority(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	follower, down := s.node(leader.id%3+1), s.node((leader.id+1)%3+1)
	down.crash(tailKept)
	s.run(time.Second) // until the leader has noticed
	for _, at := range []*simNode{leader, follower} {
		for _, id := range []uint64{leader.id, follower.id} {
			s.wantRefused(t, at.proposeChange(store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: id}}, memberTimeout),
				"of 2 voters after the change only 1 would be reachable, which is no majority")
		}
	}
	s.mustChange(t, follower, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: down.id}})
	if members := leader.process.store.Members(); len(members) != 2 {
		t.Errorf("%+v", members)
	}
	s.wait(t, s.begin(follower, putOp("k", "v"), time.Second))
	s.judge(t)
}

// One change at a time, asked for at one node or at two.
func TestMembers_OneChangeAtATime(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	add := func(n *simNode) *batch {
		added := s.addNode(fmt.Sprintf("http://n%d", len(s.nodes)+1), true)
		return n.proposeChange(store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: added.id, PeerURL: added.url}}, memberTimeout)
	}
	for _, at := range []*simNode{leader, s.node(leader.id%3 + 1)} {
		// The first one is not committed when the second one comes.
		answers := s.hold(func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgAppResp && m.GetTo() == leader.id })
		first := add(leader)
		s.run(5 * time.Millisecond)
		second := add(at)
		s.run(5 * time.Millisecond)
		answers.release(t)
		if err := s.changed(t, first); err != nil {
			t.Error(err)
		}
		s.wantRefused(t, second, "another change of the membership is in progress")
		s.run(100 * time.Millisecond)
		s.mustChange(t, at, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: uint64(len(s.nodes)) - 1}})
	}
	s.judge(t)
}

// A change that was lost with its leader must not keep that one from making
// others when it leads again.
func TestMembers_ChangeIsLost(t *testing.T) {
	s, old := newScenario(t, defaultSimConfig(1, 3))
	s.network.isolate(old.id, true)
	lost := s.addNode("http://n4", true)
	b := old.proposeChange(store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: lost.id, PeerURL: lost.url}}, 500*time.Millisecond)
	if err := s.changed(t, b); err == nil {
		t.Fatal("changed by a leader that is cut off")
	}
	leader := s.node(old.id%3 + 1)
	if !s.runUntil(5*time.Second, func() bool { return leads(leader) || leads(s.node(leader.id%3+1)) }) {
		t.Fatalf("no leader; %v", s.check.violations)
	}
	if !leads(leader) {
		leader = s.node(leader.id%3 + 1)
	}
	s.network.isolate(old.id, false)
	s.wait(t, s.begin(leader, putOp("k", "v"), time.Second))
	s.run(time.Second)
	leader.process.loop.call(func() error {
		leader.process.replica.raw.TransferLeader(old.id)
		return nil
	})
	leader.process.wake()
	if !s.runUntil(5*time.Second, func() bool { return leads(old) }) {
		t.Fatalf("node %d does not lead again; %v", old.id, s.check.violations)
	}
	s.run(100 * time.Millisecond)
	s.mustChange(t, old, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: lost.id, PeerURL: lost.url}})
	lost.start()
	s.judge(t)
}

func TestMembers_LeaderIsRemoved(t *testing.T) {
	for _, name := range []string{"asked itself", "asked another"} {
		t.Run(name, func(t *testing.T) {
			s, leader := newScenario(t, defaultSimConfig(1, 3))
			follower := s.node(leader.id%3 + 1)
			at := leader
			if name == "asked another" {
				at = follower
			}
			s.mustChange(t, at, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: leader.id}})
			if !s.runUntil(5*time.Second, func() bool { return leader.retired && s.agreedLeader() != nil }) {
				t.Fatalf("stopped: %v, leader: %v; %v", leader.retired, s.agreedLeader(), s.check.violations)
			}
			if members := follower.process.store.Members(); len(members) != 2 || !follower.process.store.State.Removed[leader.id] {
				t.Errorf("%+v", members)
			}
			s.wait(t, s.begin(follower, putOp("k", "v"), time.Second))
			s.judge(t)
		})
	}
}

// Once a member was asked to lead nobody knows whether it will.
func TestVirtual_TransferThatTakesLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		time.Sleep(time.Second)
		n, other := c.leader(), c.followers()[0]
		r := n.do(http.MethodPost, fmt.Sprintf("/-/v1/leader/%d?timeout=1ms", other.config.id), "")
		if r.status != http.StatusGatewayTimeout || !strings.Contains(r.body, `"code":"transfer-failed"`) || !strings.Contains(r.body, `"outcome":"unknown"`) {
			t.Errorf("%v", r)
		}
		time.Sleep(5 * time.Second)
		if c.leader() != other {
			t.Error("the transfer did not go on, so the test shows nothing")
		}
		// Without a leader nobody is asked.
		c.isolate(other)
		time.Sleep(10 * time.Second)
		r = other.do(http.MethodPost, fmt.Sprintf("/-/v1/leader/%d?timeout=1s", n.config.id), "")
		if r.status != http.StatusServiceUnavailable || !strings.Contains(r.body, `"outcome":"not_applied"`) {
			t.Errorf("%v", r)
		}
	})
}

// A node that serves nothing changes no members, but lets go of leadership.
func TestVirtual_DivergedChangesNoMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		time.Sleep(time.Second)
		n, other := c.leader(), c.followers()[0]
		before := fmt.Sprint(n.store.Members())
		n.admission.verdict.Store(int32(store.Diverged))
		for _, r := range [][3]string{
			{"PUT", "/-/v1/members/1", `{"name":"x"}`}, {"DELETE", "/-/v1/members/3", ""}, {"POST", "/-/v1/members/4", `{"peerUrl":"http://virtual:4"}`},
			{"POST", "/5", "http://virtual:5"}, {"POST", "/-/v1/members/2/promote", ""}, {"PUT", "/k", "v"}, {"GET", "/k?resourceVersion=0", ""}, {"POST", "/-/v1/txn", "{}"},
		} {
			if got := n.do(r[0], r[1], r[2]); got.status != 503 || !strings.Contains(got.body, `"code":"diverged"`) {
				t.Errorf("%s %s: %v", r[0], r[1], got)
			}
		}
		if after := fmt.Sprint(n.store.Members()); after != before {
			t.Errorf("%s, was %s", after, before)
		}
		if r := n.do("POST", fmt.Sprintf("/-/v1/leader/%d", other.config.id), ""); r.status != 204 {
			t.Errorf("%v", r)
		}
	})
}

// Who is not there is not found, and what may be taken later says so.
func TestVirtual_RefusedMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		time.Sleep(time.Second)
		n := c.leader()
		for _, r := range [][2]string{{"DELETE", "/-/v1/members/9"}, {"POST", "/-/v1/members/9/promote"}, {"PUT", "/-/v1/members/9"}} {
			if got := n.do(r[0], r[1], "{}"); got.status != 404 || !strings.Contains(got.body, "there is no member 9") {
				t.Errorf("%s %s: %v", r[0], r[1], got)
			}
		}
		if got := n.do("POST", "/-/v1/members/3", `{"peerUrl":"http://virtual:9"}`); got.status != 409 || !strings.Contains(got.body, `"retryable":false`) {
			t.Errorf("%v", got)
		}
	})
	for why, retry := range map[string]bool{fault.RefusedForNow: true, "member 4 " + fault.RefusedUntilThen: true, "member 4 " + fault.RefusedUntilKnown: true, "member 1 is the last voter": false} {
		if e := fault.MemberRefused(why); e.Retry != retry || e.Code != fault.ErrMember.Code || e.Detail != why {
			t.Errorf("%s: %+v", why, e)
		}
	}
}

// A learner that answers, but is far behind, would hold up all writes as a voter.
func TestMembers_LearnerIsFarBehind(t *testing.T) {
	cfg := defaultSimConfig(1, 1)
	cfg.snapshotEntries = 1 << 40
	s, leader := newScenario(t, cfg)
	learner := s.addNode("http://n2", true)
	s.mustChange(t, leader, store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: learner.id, PeerURL: learner.url}})
	learner.start()
	s.run(time.Second)
	promote := store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: learner.id}}
	if err := leader.process.replica.refuseChange(promote); err != nil {
		t.Fatal(err)
	}
	s.hold(func(m *raftpb.Message) bool { return m.GetType() == raftpb.MsgApp })
	for i := range catchUpLag + 100 {
		s.wait(t, s.begin(leader, putOp("k", fmt.Sprint(i)), time.Second))
	}
	if err := leader.process.replica.refuseChange(promote); err == nil || !strings.Contains(err.Error(), "has not caught up") {
		t.Errorf("%v", err)
	}
}

// What others pass on, or say about a member, is no sign that it is up.
func TestMembers_SignOfLife(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	down := s.node(leader.id%3 + 1)
	down.crash(tailKept)
	r := leader.process.replica
	if !s.runUntil(5*time.Second, func() bool { return !r.hears(down.id) }) {
		t.Fatalf("node %d is down and heard; %v", down.id, s.check.violations)
	}
	for _, m := range []raftpb.MessageType{raftpb.MsgProp, raftpb.MsgReadIndex, raftpb.MsgTransferLeader} {
		r.step(&raftpb.Message{Type: m.Enum(), From: new(down.id), To: new(leader.id), Entries: []*raftpb.Entry{{Data: make([]byte, readContextSize)}}})
		if r.hears(down.id) {
			t.Errorf("%v under the name of node %d makes it one that is heard", m, down.id)
		}
	}
}

// A leader that hands over, by itself or to be removed, picks a member that is up.
func TestMembers_HeirIsUp(t *testing.T) {
	for _, tt := range []struct {
		name string
		down func(leader uint64) uint64 // of equally good ones the one that would be chosen
		ask  func(s *sim, leader *simNode)
	}{
		{"transfer", func(leader uint64) uint64 { return 5 - leader/5 }, func(_ *sim, leader *simNode) { leader.process.transfer() }},
		{"removal", func(leader uint64) uint64 { return 1 + 1/leader }, func(_ *sim, leader *simNode) {
			leader.proposeChange(store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: leader.id}}, memberTimeout)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, leader := newScenario(t, defaultSimConfig(1, 5))
			s.wait(t, s.begin(leader, putOp("k", "v"), time.Second))
			s.run(100 * time.Millisecond)
			down := s.node(tt.down(leader.id))
			down.crash(tailKept)
			s.run(time.Second)
			r := leader.process.replica
			tt.ask(s, leader)
			if !s.runUntil(3*time.Second, func() bool { return r.raw.BasicStatus().LeadTransferee != 0 || !leads(leader) }) {
				t.Fatalf("it does not hand over; %v", s.check.violations)
			}
			if to := r.raw.BasicStatus().LeadTransferee; to == down.id {
				t.Errorf("it hands over to node %d, which is down", to)
			}
		})
	}
}

// Of two members one was removed, was told so and has ended. The other one must
// not forget in a crash that the removal is committed.
func TestMembers_RemovalIsDurable(t *testing.T) {
	s, left := newScenario(t, defaultSimConfig(1, 2))
	gone := s.node(left.id%2 + 1)
	s.wait(t, s.begin(left, putOp("k", "v"), time.Second))
	s.mustChange(t, left, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: gone.id}})
	if !s.runUntil(5*time.Second, func() bool { return gone.retired }) {
		t.Fatalf("node %d was not told; %v", gone.id, s.check.violations)
	}
	left.crash(tailLost)
	left.start()
	if !s.runUntil(5*time.Second, func() bool { return leads(left) }) {
		t.Fatalf("node %d cannot lead alone; %v", left.id, s.check.violations)
	}
	s.judge(t)
}
