package store

import (
	"bytes"
	"strings"
	"testing"

	"raftrv/internal/testkit"
)

// at returns sums of a member at an index, with checkpoints before it.
func sumsAt(index uint64, branch uint64) Sums {
	s := Sums{Now: Checkpoint{Index: index, Sum: index + branch}}
	for i := index / checkpointEvery; i > 0 && len(s.Earlier) < checkpointsKept; i-- {
		s.Earlier = append(s.Earlier, Checkpoint{Index: i * checkpointEvery, Sum: i*checkpointEvery + branch})
	}
	return s
}

func TestJudge(t *testing.T) {
	const other = 1 << 40 // another history
	tests := []struct {
		name   string
		own    Sums
		others map[uint64]Sums
		voters []uint64
		want   Verdict
		differ int
	}{
		{"alone", sumsAt(10, 0), nil, voters(1), Sound, 0},
		{"nobody answers", sumsAt(10, 0), nil, voters(3), Unchecked, 0},
		{"all the same", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(900, 0), 3: sumsAt(900, 0)}, voters(3), Sound, 0},
		{"one is the same", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(900, 0)}, voters(3), Sound, 0},
		{"one of four others is the same", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(900, 0)}, voters(5), Unchecked, 0},
		{"at other entries", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(901, 0), 3: sumsAt(30_000, 0)}, voters(3), Sound, 0},
		{"too far behind to say", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(900_000, other)}, voters(3), Unchecked, 0},
		{"before the first checkpoint", sumsAt(10, 0), map[uint64]Sums{2: sumsAt(11, other), 3: sumsAt(12, other)}, voters(3), Unchecked, 0},
		{"before anything", sumsAt(0, 0), map[uint64]Sums{2: sumsAt(0, 0), 3: sumsAt(0, 0)}, voters(3), Unchecked, 0},
		{"against a majority", sumsAt(900, other), map[uint64]Sums{2: sumsAt(901, 0), 3: sumsAt(1200, 0)}, voters(3), Diverged, 2},
		{"with a majority", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(901, 0), 3: sumsAt(1200, other)}, voters(3), Sound, 1},
		{"one of two", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(901, other)}, voters(2), Doubtful, 1},
		{"one of three is down", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(901, other)}, voters(3), Doubtful, 1},
		{"three states", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(901, other), 3: sumsAt(901, 2*other)}, voters(3), Doubtful, 2},
		{"two of five, two are down", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(901, 0), 3: sumsAt(901, other)}, voters(5), Doubtful, 1},
		{"two against three of five", sumsAt(900, 0),
			map[uint64]Sums{2: sumsAt(901, 0), 3: sumsAt(901, other), 4: sumsAt(901, other), 5: sumsAt(901, other)}, voters(5), Diverged, 3},
		{"learners do not make a majority", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(901, other), 4: sumsAt(901, other), 5: sumsAt(901, other)}, voters(3), Doubtful, 1},
		{"nor one for this member", sumsAt(900, 0), map[uint64]Sums{4: sumsAt(900, 0), 5: sumsAt(900, 0)}, voters(3), Unchecked, 0},
		{"nor a doubt", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(900, 0), 4: sumsAt(900, other)}, voters(3), Sound, 0},
		{"a learner with one of two voters", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(900, 0)}, []uint64{2, 3}, Unchecked, 0},
		{"a learner with both", sumsAt(900, 0), map[uint64]Sums{2: sumsAt(900, 0), 3: sumsAt(900, 0)}, []uint64{2, 3}, Sound, 0},
		{"a learner against both", sumsAt(900, other), map[uint64]Sums{2: sumsAt(900, 0), 3: sumsAt(900, 0)}, []uint64{2, 3}, Diverged, 2},
		{"no voters are known", sumsAt(0, 0), map[uint64]Sums{2: sumsAt(900, 0)}, nil, Unchecked, 0},
	}
	newer := sumsAt(900, other) // of another algorithm
	newer.Now.Algorithm = sumAlgorithm2
	for i := range newer.Earlier {
		newer.Earlier[i].Algorithm = sumAlgorithm2
	}
	tests = append(tests, tests[1])
	last := &tests[len(tests)-1]
	last.name, last.others = "of another algorithm", map[uint64]Sums{2: newer, 3: newer}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v, differ := Judge(tt.own, 1, tt.others, tt.voters)
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
	s, other := New(), New()
	const behind = 100
	for i := range uint64(2*checkpointEvery*checkpointsKept + 300) {
		testkit.Must(t, s.Skip(i+1, 1))
		testkit.Must(t, other.Skip(i+1, 1))
	}
	lagging := other.Sums()
	for range behind {
		testkit.Must(t, s.Skip(s.Applied()+1, 1))
	}
	own := s.OwnSums()
	if known, same := own.compare(&lagging); !known || !same {
		t.Errorf("with one that lags %d entries: %v, %v", behind, known, same)
	}
	if got, ok := own.at(lagging.Now.Index, sumAlgorithm1); !ok || got != lagging.Now.Sum {
		t.Errorf("at index %d of the other: %v, %v", lagging.Now.Index, got, ok)
	}
	told := s.Sums()
	if len(told.Earlier) != checkpointsKept {
		t.Errorf("it tells %d sums, want %d", len(told.Earlier), checkpointsKept)
	}
	for _, c := range told.Earlier {
		if c.Index%checkpointEvery != 0 || c.Index+checkpointEvery*checkpointsKept < s.Applied() {
			t.Errorf("it tells the sum at %d, when it is at %d", c.Index, s.Applied())
		}
	}
}

// applyAll applies commands, each as an entry of its own.
func applyAll(t *testing.T, s *Store, commands ...Command) {
	t.Helper()
	for i := range commands {
		n := s.Applied() + 1
		_, err := s.Apply(n, 1, BatchHeader{Session: 1, Seq: n, Time: 1}, commands[i].AppendTo(nil), nil)
		testkit.Must(t, err)
	}
}

// TestSum: what an entry is and what it does change the sum, and nothing else does.
func TestSum(t *testing.T) {
	put := Command{Op: OpPut, Key: "k", Value: "v"}
	base := func(change func(s *Store), commands ...Command) uint64 {
		s := New()
		applyAll(t, s, put)
		if change != nil {
			change(s)
		}
		applyAll(t, s, commands...)
		return s.Sums().Now.Sum
	}
	again := Command{Op: OpPut, Key: "k", Value: "w"}
	want := base(nil, again)
	if got := base(func(s *Store) { // through a snapshot
		var b strings.Builder
		st := s.Snapshot()
		testkit.Must(t, st.Encode(&b))
		st, err := ReadState(strings.NewReader(b.String()))
		testkit.Must(t, err)
		s.Restore(st)
	}, again); got != want {
		t.Error("a snapshot changes the sum")
	}
	different := map[string]uint64{
		"another value":  base(nil, Command{Op: OpPut, Key: "k", Value: "x"}),
		"another key":    base(nil, Command{Op: OpPut, Key: "l", Value: "w"}),
		"an empty entry": base(func(s *Store) { testkit.Must(t, s.Skip(2, 1)) }, again),
		"an item that is damaged in memory": base(func(s *Store) {
			s.State.Items.Set("k", Item{Value: "V", RV: 1, Created: 1})
		}, again),
		"an item that is gone":   base(func(s *Store) { s.State.Items.Delete("k") }, again),
		"another version number": base(func(s *Store) { s.State.RV++ }, again),
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
	s := New()
	const entries = checkpointEvery*(checkpointsKept+3) + 5
	for i := uint64(1); i <= entries; i++ {
		testkit.Must(t, s.Skip(i, 1))
	}
	kept := map[uint64]bool{}
	for _, c := range s.Sums().Earlier {
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
	sum := func(level int, change func(s *State)) uint64 {
		s := New()
		s.State.Members[1] = Member{ID: 1, PeerURL: "http://a:1"}
		s.State.SetLevel(level)
		applyAll(t, s, Command{Op: OpPut, Key: "k", Value: "v", Expires: 99, Retry: RetryID{Key: "r"}})
		change(&s.State)
		st, err := ReadState(bytes.NewReader(stateBytes(t, s.Snapshot()))) // digests are made anew
		testkit.Must(t, err)
		s.Restore(st)
		applyAll(t, s, Command{Op: OpDelete, Key: "none"})
		return s.Sums().Now.Sum
	}
	same := func(*State) {}
	for name, change := range map[string]func(s *State){
		"a session":             func(s *State) { s.Sessions = Sessions{} },
		"a batch of a session":  func(s *State) { s.Sessions[1].set(1, false) },
		"the outcomes":          func(s *State) { s.Retries = NewRetryTable() },
		"a number of outcomes":  func(s *State) { s.Retries.next++ },
		"a deadline":            func(s *State) { s.Items.Set("k", Item{Value: "v", RV: 1, Created: 1, Expires: 98}) },
		"a member's URL":        func(s *State) { s.Members[1] = Member{ID: 1, PeerURL: "http://b:1"} },
		"a member's new fields": func(s *State) { s.Members[1] = Member{ID: 1, PeerURL: "http://a:1", extra: `{"zone":"z"}`} },
		"a removed member":      func(s *State) { s.Removed[9] = true },
		"the age of outcomes":   func(s *State) { s.elapsed++ },
		"an event":              func(s *State) { s.Events = newEventLog() },
	} {
		if sum(2, change) == sum(2, same) {
			t.Errorf("another sum is wanted: %s", name)
		}
	}
	if sum(1, func(s *State) { s.Sessions = Sessions{} }) != sum(1, same) {
		t.Error("the sum of level 1 is not that of older members")
	}
}
