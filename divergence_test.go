package main

import (
	"bytes"
	"strings"
	"testing"

	"raftrv/internal/testkit"
)

// at returns sums of a member at an index, with checkpoints before it.
func sumsAt(index uint64, branch uint64) sums {
	s := sums{Now: checkpoint{Index: index, Sum: index + branch}}
	for i := index / checkpointEvery; i > 0 && len(s.Earlier) < checkpointsKept; i-- {
		s.Earlier = append(s.Earlier, checkpoint{Index: i * checkpointEvery, Sum: i*checkpointEvery + branch})
	}
	return s
}

func TestJudge(t *testing.T) {
	const other = 1 << 40 // another history
	tests := []struct {
		name   string
		own    sums
		others map[uint64]sums
		voters []uint64
		want   verdict
		differ int
	}{
		{"alone", sumsAt(10, 0), nil, voters(1), sound, 0},
		{"nobody answers", sumsAt(10, 0), nil, voters(3), unchecked, 0},
		{"all the same", sumsAt(900, 0), map[uint64]sums{2: sumsAt(900, 0), 3: sumsAt(900, 0)}, voters(3), sound, 0},
		{"one is the same", sumsAt(900, 0), map[uint64]sums{2: sumsAt(900, 0)}, voters(3), sound, 0},
		{"one of four others is the same", sumsAt(900, 0), map[uint64]sums{2: sumsAt(900, 0)}, voters(5), unchecked, 0},
		{"at other entries", sumsAt(900, 0), map[uint64]sums{2: sumsAt(901, 0), 3: sumsAt(30_000, 0)}, voters(3), sound, 0},
		{"too far behind to say", sumsAt(900, 0), map[uint64]sums{2: sumsAt(900_000, other)}, voters(3), unchecked, 0},
		{"before the first checkpoint", sumsAt(10, 0), map[uint64]sums{2: sumsAt(11, other), 3: sumsAt(12, other)}, voters(3), unchecked, 0},
		{"before anything", sumsAt(0, 0), map[uint64]sums{2: sumsAt(0, 0), 3: sumsAt(0, 0)}, voters(3), unchecked, 0},
		{"against a majority", sumsAt(900, other), map[uint64]sums{2: sumsAt(901, 0), 3: sumsAt(1200, 0)}, voters(3), diverged, 2},
		{"with a majority", sumsAt(900, 0), map[uint64]sums{2: sumsAt(901, 0), 3: sumsAt(1200, other)}, voters(3), sound, 1},
		{"one of two", sumsAt(900, 0), map[uint64]sums{2: sumsAt(901, other)}, voters(2), doubtful, 1},
		{"one of three is down", sumsAt(900, 0), map[uint64]sums{2: sumsAt(901, other)}, voters(3), doubtful, 1},
		{"three states", sumsAt(900, 0), map[uint64]sums{2: sumsAt(901, other), 3: sumsAt(901, 2*other)}, voters(3), doubtful, 2},
		{"two of five, two are down", sumsAt(900, 0), map[uint64]sums{2: sumsAt(901, 0), 3: sumsAt(901, other)}, voters(5), doubtful, 1},
		{"two against three of five", sumsAt(900, 0),
			map[uint64]sums{2: sumsAt(901, 0), 3: sumsAt(901, other), 4: sumsAt(901, other), 5: sumsAt(901, other)}, voters(5), diverged, 3},
		{"learners do not make a majority", sumsAt(900, 0), map[uint64]sums{2: sumsAt(901, other), 4: sumsAt(901, other), 5: sumsAt(901, other)}, voters(3), doubtful, 1},
		{"nor one for this member", sumsAt(900, 0), map[uint64]sums{4: sumsAt(900, 0), 5: sumsAt(900, 0)}, voters(3), unchecked, 0},
		{"nor a doubt", sumsAt(900, 0), map[uint64]sums{2: sumsAt(900, 0), 4: sumsAt(900, other)}, voters(3), sound, 0},
		{"a learner with one of two voters", sumsAt(900, 0), map[uint64]sums{2: sumsAt(900, 0)}, []uint64{2, 3}, unchecked, 0},
		{"a learner with both", sumsAt(900, 0), map[uint64]sums{2: sumsAt(900, 0), 3: sumsAt(900, 0)}, []uint64{2, 3}, sound, 0},
		{"a learner against both", sumsAt(900, other), map[uint64]sums{2: sumsAt(900, 0), 3: sumsAt(900, 0)}, []uint64{2, 3}, diverged, 2},
		{"no voters are known", sumsAt(0, 0), map[uint64]sums{2: sumsAt(900, 0)}, nil, unchecked, 0},
	}
	newer := sumsAt(900, other) // of another algorithm
	newer.Now.Algorithm = sumAlgorithm2
	for i := range newer.Earlier {
		newer.Earlier[i].Algorithm = sumAlgorithm2
	}
	tests = append(tests, tests[1])
	last := &tests[len(tests)-1]
	last.name, last.others = "of another algorithm", map[uint64]sums{2: newer, 3: newer}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v, differ := judge(tt.own, 1, tt.others, tt.voters)
			if v != tt.want || len(differ) != tt.differ {
				t.Errorf("%v, %v; want %v and %d that differ", v, differ, tt.want, tt.differ)
			}
		})
	}
}

// voters returns the first n members.
func voters(n uint64) (ids []uint64) {
	for id := range n {
		ids = append(ids, id+1)
	}
	return ids
}

// TestSums_Kept: of what it applied a member knows the sum of each of the last entries, and tells those that members
// far apart have in common.
func TestSums_Kept(t *testing.T) {
	s, other := newKVStore(), newKVStore()
	const behind = 100
	for i := range uint64(2*checkpointEvery*checkpointsKept + 300) {
		testkit.Must(t, s.skip(i+1, 1))
		testkit.Must(t, other.skip(i+1, 1))
	}
	lagging := other.sums()
	for range behind {
		testkit.Must(t, s.skip(s.applied()+1, 1))
	}
	own := s.ownSums()
	if known, same := own.compare(&lagging); !known || !same {
		t.Errorf("with one that lags %d entries: %v, %v", behind, known, same)
	}
	if got, ok := own.at(lagging.Now.Index, sumAlgorithm1); !ok || got != lagging.Now.Sum {
		t.Errorf("at index %d of the other: %v, %v", lagging.Now.Index, got, ok)
	}
	told := s.sums()
	if len(told.Earlier) != checkpointsKept {
		t.Errorf("it tells %d sums, want %d", len(told.Earlier), checkpointsKept)
	}
	for _, c := range told.Earlier {
		if c.Index%checkpointEvery != 0 || c.Index+checkpointEvery*checkpointsKept < s.applied() {
			t.Errorf("it tells the sum at %d, when it is at %d", c.Index, s.applied())
		}
	}
}

// applyAll applies commands, each as an entry of its own.
func applyAll(t *testing.T, s *kvstore, commands ...command) {
	t.Helper()
	for i := range commands {
		n := s.applied() + 1
		_, err := s.apply(n, 1, batchHeader{session: 1, seq: n, time: 1}, commands[i].appendTo(nil), nil)
		testkit.Must(t, err)
	}
}

// TestSum: what an entry is and what it does change the sum, and nothing else does.
func TestSum(t *testing.T) {
	put := command{op: opPut, key: "k", value: "v"}
	base := func(change func(s *kvstore), commands ...command) uint64 {
		s := newKVStore()
		applyAll(t, s, put)
		if change != nil {
			change(s)
		}
		applyAll(t, s, commands...)
		return s.sums().Now.Sum
	}
	again := command{op: opPut, key: "k", value: "w"}
	want := base(nil, again)
	if got := base(func(s *kvstore) { // through a snapshot
		var b strings.Builder
		st := s.snapshot()
		testkit.Must(t, st.writeTo(&b))
		st, err := readState(strings.NewReader(b.String()))
		testkit.Must(t, err)
		s.restore(st)
	}, again); got != want {
		t.Error("a snapshot changes the sum")
	}
	different := map[string]uint64{
		"another value":  base(nil, command{op: opPut, key: "k", value: "x"}),
		"another key":    base(nil, command{op: opPut, key: "l", value: "w"}),
		"an empty entry": base(func(s *kvstore) { testkit.Must(t, s.skip(2, 1)) }, again),
		"an item that is damaged in memory": base(func(s *kvstore) {
			s.state.items.Set("k", item{value: "V", rv: 1, created: 1})
		}, again),
		"an item that is gone":   base(func(s *kvstore) { s.state.items.Delete("k") }, again),
		"another version number": base(func(s *kvstore) { s.state.rv++ }, again),
	}
	seen := map[uint64]string{want: "the same"}
	for name, sum := range different {
		if other := seen[sum]; other != "" {
			t.Errorf("%s has the sum of %s", name, other)
		}
		seen[sum] = name
	}
}

// TestCheckpoints: the last ones are kept, so that members far apart have some in
// common.
func TestCheckpoints(t *testing.T) {
	s := newKVStore()
	const entries = checkpointEvery*(checkpointsKept+3) + 5
	for i := uint64(1); i <= entries; i++ {
		testkit.Must(t, s.skip(i, 1))
	}
	kept := map[uint64]bool{}
	for _, c := range s.sums().Earlier {
		kept[c.Index] = true
	}
	for i := uint64(4); i <= checkpointsKept+3; i++ {
		if !kept[i*checkpointEvery] {
			t.Errorf("the sum at entry %d is not kept", i*checkpointEvery)
		}
	}
	if len(kept) != checkpointsKept {
		t.Errorf("%d sums are kept, not %d", len(kept), checkpointsKept)
	}
}

// TestSum_SeesAllOfTheState: from level 2 on a member whose sessions, outcomes,
// deadlines or members are not those of the others has another sum.
func TestSum_SeesAllOfTheState(t *testing.T) {
	sum := func(level int, change func(s *state)) uint64 {
		s := newKVStore()
		s.state.members[1] = member{ID: 1, PeerURL: "http://a:1"}
		s.state.setLevel(level)
		applyAll(t, s, command{op: opPut, key: "k", value: "v", expires: 99, retry: retryID{key: "r"}})
		change(&s.state)
		st, err := readState(bytes.NewReader(stateBytes(t, s.snapshot()))) // digests are made anew
		testkit.Must(t, err)
		s.restore(st)
		applyAll(t, s, command{op: opDelete, key: "none"})
		return s.sums().Now.Sum
	}
	same := func(*state) {}
	for name, change := range map[string]func(s *state){
		"a session":             func(s *state) { s.sessions = sessions{} },
		"a batch of a session":  func(s *state) { s.sessions[1].set(1, false) },
		"the outcomes":          func(s *state) { s.retries = newRetryTable() },
		"a number of outcomes":  func(s *state) { s.retries.next++ },
		"a deadline":            func(s *state) { s.items.Set("k", item{value: "v", rv: 1, created: 1, expires: 98}) },
		"a member's URL":        func(s *state) { s.members[1] = member{ID: 1, PeerURL: "http://b:1"} },
		"a member's new fields": func(s *state) { s.members[1] = member{ID: 1, PeerURL: "http://a:1", extra: `{"zone":"z"}`} },
		"a removed member":      func(s *state) { s.removed[9] = true },
		"the age of outcomes":   func(s *state) { s.elapsed++ },
		"an event":              func(s *state) { s.events = newEventLog() },
	} {
		if sum(2, change) == sum(2, same) {
			t.Errorf("another sum is wanted: %s", name)
		}
	}
	if sum(1, func(s *state) { s.sessions = sessions{} }) != sum(1, same) {
		t.Error("the sum of level 1 is not that of older members")
	}
}
