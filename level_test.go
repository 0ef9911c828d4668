package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"raftrv/internal/testkit"
)

// TestLevel_RulesAreFixed: another number would bring members of the same level to
// different states. What must change gets a new level.
func TestLevel_RulesAreFixed(t *testing.T) {
	for level, want := range map[int]rules{
		1: {32_768, math.MaxUint64, math.MaxUint64, math.MaxUint64, 4 << 20, 128, 65_536, 64 << 20, 3_600_000, 0, 0, 0, 0, 512, 1 << 20},
		2: {32_768, 16 << 20, 1 << 10, 8 << 20, 4 << 20, 128, 65_536, 64 << 20, 3_600_000, 0, 60_000, 100, 0, 512, 1 << 20},
		3: {32_768, 16 << 20, 1 << 10, 8 << 20, 4 << 20, 128, 65_536, 64 << 20, 3_600_000, 1024, 60_000, 100, 999_999_999, 512, 1 << 20},
	} {
		if rulesOf[level] != want {
			t.Errorf("the rules of level %d are %+v, were %+v", level, rulesOf[level], want)
		}
	}
	if sessionWindow != 1024 {
		t.Errorf("the window of a session is %d", sessionWindow)
	}
	if 2*clockSkewMax.Milliseconds() >= ageStepMillis {
		t.Error("times that a leader lets pass would count as a clock that goes back")
	}
}

func TestLevel_Raise(t *testing.T) {
	s := newKVStore()
	for id := range uint64(3) {
		s.state.members[id+1] = member{ID: id + 1, PeerURL: fmt.Sprint("http://", id)}
	}
	apply := func(c command) (result, error) {
		var out []result
		n := s.applied() + 1
		_, err := s.apply(n, 1, batchHeader{session: 1, seq: n, time: 1000}, c.appendTo(nil), &out)
		return append(out, result{})[0], err
	}
	if r, err := apply(raiseLevel(2, 1, 2)); err != nil || r.status != statusPrecondition || s.level() != 1 {
		t.Errorf("without member 3: %+v, %v, level %d", r, err, s.level())
	}
	if _, err := apply(raiseLevel(levelNewest+1, 1, 2, 3)); !errors.Is(err, errNewer) {
		t.Errorf("to a level that nobody knows: %v", err)
	}
	s.levelMax = 1
	if _, err := apply(raiseLevel(2, 1, 2, 3)); err == nil || !strings.Contains(err.Error(), "knows up to 1") || s.applied() != 1 {
		t.Errorf("a node that does not take part: %v, at entry %d", err, s.applied())
	}
	s.levelMax = 0
	if r, err := apply(raiseLevel(2, 1, 2, 3, 4)); err != nil || r.status != statusReplaced || s.level() != 2 {
		t.Errorf("%+v, %v, level %d", r, err, s.level())
	}
	if r, err := apply(raiseLevel(1, 1, 2, 3)); err != nil || s.level() != 2 {
		t.Errorf("back: %+v, %v, level %d", r, err, s.level())
	}
	st, err := readState(bytes.NewReader(stateBytes(t, s.snapshot())))
	if err != nil || st.level != 2 || st.events.rules != &rulesOf[2] || st.retries.rules != &rulesOf[2] {
		t.Errorf("from a snapshot: level %d, %v", st.level, err)
	}
}

// TestLevel_UnknownFieldsOfMembersSurvive an update and a snapshot from level 2
// on. Members of level 1 drop them, so there everybody does.
func TestLevel_UnknownFieldsOfMembersSurvive(t *testing.T) {
	for level, want := range map[int]string{1: `{"id":1,"peerURL":"http://a:1","clientURL":"c"}`, 2: `{"id":1,"peerURL":"http://a:1","clientURL":"c","rack":[1],"zone":"y"}`} {
		s := newKVStore()
		s.state.members[1] = member{ID: 1, PeerURL: "http://a:1"}
		s.state.setLevel(level)
		applyAll(t, s,
			command{op: opMember, value: `{"id":1, "zone":"x", "rack": [1]}`},
			command{op: opMember, value: `{"ID":1, "zone":"y"}`},
			command{op: opMember, value: `{"id":1,"clientURL":"c"}`})
		st, err := readState(bytes.NewReader(stateBytes(t, s.snapshot())))
		testkit.Must(t, err)
		got, err := json.Marshal(st.members[1])
		testkit.Must(t, err)
		if string(got) != want {
			t.Errorf("level %d: %s, want %s", level, got, want)
		}
	}
	var fields map[string]any
	b, err := json.Marshal(memberFields{ID: 1, Name: "n", PeerURL: "p", ClientURL: "c", Learner: true, Promote: true, Directory: 1})
	testkit.Must(t, err)
	testkit.Must(t, json.Unmarshal(b, &fields))
	if names := slices.Sorted(maps.Keys(fields)); !slices.Equal(names, slices.Sorted(slices.Values(memberFieldNames))) {
		t.Errorf("a member has the fields %q", names)
	}
}

// TestLevel_WrongClocks: an Idempotency-Key outlives another node's wrong clock,
// and the time of events follows one that is right again.
func TestLevel_WrongClocks(t *testing.T) {
	s := newKVStore()
	s.state.setLevel(2)
	right := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	apply := func(at time.Time, c command) result {
		var out []result
		n := s.applied() + 1
		_, err := s.apply(n, 1, batchHeader{session: 1, seq: n, time: at.UnixMilli()}, c.appendTo(nil), &out)
		testkit.Must(t, err)
		return out[0]
	}
	once := command{op: opPut, key: "k", value: "v", retry: retryID{key: "invoice"}}
	apply(right, once)
	for i, wrong := range []time.Time{right.Add(61 * time.Minute), right.AddDate(74, 0, 0), right.AddDate(-50, 0, 0), time.UnixMilli(math.MaxInt64), time.UnixMilli(math.MinInt64)} {
		apply(wrong, command{op: opPut, key: "x"})
		if r := apply(right.Add(time.Duration(i)*time.Second), once); !r.replayed {
			t.Errorf("after an entry from %v the request is carried out again", wrong)
		}
	}
	apply(right.Add(10*time.Second), command{op: opPut, key: "y"})
	n, _ := s.seekEvent(s.version() - 1)
	if events, _, _ := s.eventsFrom(n); len(events) != 1 || events[0].time != right.Add(10*time.Second).UnixMilli() {
		t.Errorf("the last event is %+v", events)
	}
	// Clocks that differ as much as leaders allow do not make it age faster, ...
	before := s.state.elapsed
	for i := range 1000 {
		at := right.Add(time.Minute).Add(time.Duration(i) * time.Millisecond)
		apply(at.Add(clockSkewMax), command{op: opPut, key: "x"})
		apply(at.Add(-clockSkewMax), command{op: opPut, key: "x"})
	}
	if took := time.Duration(s.state.elapsed-before) * time.Millisecond; took > 2*ageStepMillis*time.Millisecond {
		t.Errorf("in a second it ages by %v", took)
	}
	// ... and in an hour of writes it is forgotten.
	for i := range 65 {
		apply(right.Add(time.Duration(i)*time.Minute), command{op: opPut, key: "x"})
	}
	if r := apply(right.Add(65*time.Minute), once); r.replayed {
		t.Error("it is remembered for ever")
	}
}

// TestLevel_SnapshotFormats: a program reads what it writes at any level that it knows, and a level that gets no
// format of its own would be noticed here.
func TestLevel_SnapshotFormats(t *testing.T) {
	formatMax := uint64(0)
	for level := levelFirst; level <= levelNewest; level++ {
		if snapshotFormats[level] < max(formatMax, 2) {
			t.Errorf("level %d has format %d", level, snapshotFormats[level])
		}
		formatMax = snapshotFormats[level]
		st := newState()
		st.setLevel(level)
		again, err := readState(bytes.NewReader(stateBytes(t, st)))
		if err != nil || again.level != level {
			t.Errorf("level %d: %v, then level %d", level, err, again.level)
		}
	}
	for _, head := range [][]uint64{{1}, {formatMax + 1}, {formatMax, 0, 0, 0, 0, 0, 0, levelNewest + 1}, {formatMax, 0, 0, 0, 0, 0, 0, levelFirst}} {
		var b bytes.Buffer
		e := newSnapshotEncoder(&b)
		e.bytes([]byte(snapshotMagic))
		for _, v := range head {
			e.uint(v)
		}
		testkit.Must(t, e.w.Flush())
		if _, err := readState(&b); !errors.Is(err, errSnapshotFormat) || !strings.Contains(err.Error(), "use the version that wrote it") {
			t.Errorf("format and level %d: %v", head, err)
		}
	}
}
