package store

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
	for level, want := range map[int]Rules{
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
	if 2*ClockSkewMax.Milliseconds() >= AgeStepMillis {
		t.Error("times that a leader lets pass would count as a clock that goes back")
	}
}

func TestLevel_Raise(t *testing.T) {
	s := New()
	for id := range uint64(3) {
		s.State.Members[id+1] = Member{ID: id + 1, PeerURL: fmt.Sprint("http://", id)}
	}
	apply := func(c Command) (Result, error) {
		var out []Result
		n := s.Applied() + 1
		_, err := s.Apply(n, 1, BatchHeader{Session: 1, Seq: n, Time: 1000}, c.AppendTo(nil), &out)
		return append(out, Result{})[0], err
	}
	if r, err := apply(RaiseLevel(2, 1, 2)); err != nil || r.Status != StatusPrecondition || s.Level() != 1 {
		t.Errorf("without member 3: %+v, %v, level %d", r, err, s.Level())
	}
	if _, err := apply(RaiseLevel(LevelNewest+1, 1, 2, 3)); !errors.Is(err, ErrNewer) {
		t.Errorf("to a level that nobody knows: %v", err)
	}
	s.LevelMax = 1
	if _, err := apply(RaiseLevel(2, 1, 2, 3)); err == nil || !strings.Contains(err.Error(), "knows up to 1") || s.Applied() != 1 {
		t.Errorf("a node that does not take part: %v, at entry %d", err, s.Applied())
	}
	s.LevelMax = 0
	if r, err := apply(RaiseLevel(2, 1, 2, 3, 4)); err != nil || r.Status != StatusReplaced || s.Level() != 2 {
		t.Errorf("%+v, %v, level %d", r, err, s.Level())
	}
	if r, err := apply(RaiseLevel(1, 1, 2, 3)); err != nil || s.Level() != 2 {
		t.Errorf("back: %+v, %v, level %d", r, err, s.Level())
	}
	st, err := ReadState(bytes.NewReader(stateBytes(t, s.Snapshot())))
	if err != nil || st.Level != 2 || st.Events.rules != &rulesOf[2] || st.Retries.rules != &rulesOf[2] {
		t.Errorf("from a snapshot: level %d, %v", st.Level, err)
	}
}

// TestLevel_UnknownFieldsOfMembersSurvive an update and a snapshot from level 2
// on. Members of level 1 drop them, so there everybody does.
func TestLevel_UnknownFieldsOfMembersSurvive(t *testing.T) {
	for level, want := range map[int]string{1: `{"id":1,"peerURL":"http://a:1","clientURL":"c"}`, 2: `{"id":1,"peerURL":"http://a:1","clientURL":"c","rack":[1],"zone":"y"}`} {
		s := New()
		s.State.Members[1] = Member{ID: 1, PeerURL: "http://a:1"}
		s.State.SetLevel(level)
		applyAll(t, s,
			Command{Op: OpMember, Value: `{"id":1, "zone":"x", "rack": [1]}`},
			Command{Op: OpMember, Value: `{"ID":1, "zone":"y"}`},
			Command{Op: OpMember, Value: `{"id":1,"clientURL":"c"}`})
		st, err := ReadState(bytes.NewReader(stateBytes(t, s.Snapshot())))
		testkit.Must(t, err)
		got, err := json.Marshal(st.Members[1])
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
	s := New()
	s.State.SetLevel(2)
	right := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	apply := func(at time.Time, c Command) Result {
		var out []Result
		n := s.Applied() + 1
		_, err := s.Apply(n, 1, BatchHeader{Session: 1, Seq: n, Time: at.UnixMilli()}, c.AppendTo(nil), &out)
		testkit.Must(t, err)
		return out[0]
	}
	once := Command{Op: OpPut, Key: "k", Value: "v", Retry: RetryID{Key: "invoice"}}
	apply(right, once)
	for i, wrong := range []time.Time{right.Add(61 * time.Minute), right.AddDate(74, 0, 0), right.AddDate(-50, 0, 0), time.UnixMilli(math.MaxInt64), time.UnixMilli(math.MinInt64)} {
		apply(wrong, Command{Op: OpPut, Key: "x"})
		if r := apply(right.Add(time.Duration(i)*time.Second), once); !r.Replayed {
			t.Errorf("after an entry from %v the request is carried out again", wrong)
		}
	}
	apply(right.Add(10*time.Second), Command{Op: OpPut, Key: "y"})
	n, _ := s.SeekEvent(s.Version() - 1)
	if events, _, _ := s.EventsFrom(n); len(events) != 1 || events[0].Time != right.Add(10*time.Second).UnixMilli() {
		t.Errorf("the last event is %+v", events)
	}
	// Clocks that differ as much as leaders allow do not make it age faster, ...
	before := s.State.elapsed
	for i := range 1000 {
		at := right.Add(time.Minute).Add(time.Duration(i) * time.Millisecond)
		apply(at.Add(ClockSkewMax), Command{Op: OpPut, Key: "x"})
		apply(at.Add(-ClockSkewMax), Command{Op: OpPut, Key: "x"})
	}
	if took := time.Duration(s.State.elapsed-before) * time.Millisecond; took > 2*AgeStepMillis*time.Millisecond {
		t.Errorf("in a second it ages by %v", took)
	}
	// ... and in an hour of writes it is forgotten.
	for i := range 65 {
		apply(right.Add(time.Duration(i)*time.Minute), Command{Op: OpPut, Key: "x"})
	}
	if r := apply(right.Add(65*time.Minute), once); r.Replayed {
		t.Error("it is remembered for ever")
	}
}

// TestLevel_SnapshotFormats: a program reads what it writes at any level that it knows, and a level that gets no
// format of its own would be noticed here.
func TestLevel_SnapshotFormats(t *testing.T) {
	formatMax := uint64(0)
	for level := LevelFirst; level <= LevelNewest; level++ {
		if snapshotFormats[level] < max(formatMax, 2) {
			t.Errorf("level %d has format %d", level, snapshotFormats[level])
		}
		formatMax = snapshotFormats[level]
		st := NewState()
		st.SetLevel(level)
		again, err := ReadState(bytes.NewReader(stateBytes(t, st)))
		if err != nil || again.Level != level {
			t.Errorf("level %d: %v, then level %d", level, err, again.Level)
		}
	}
	for _, head := range [][]uint64{{1}, {formatMax + 1}, {formatMax, 0, 0, 0, 0, 0, 0, LevelNewest + 1}, {formatMax, 0, 0, 0, 0, 0, 0, LevelFirst}} {
		var b bytes.Buffer
		e := NewSnapshotEncoder(&b)
		e.Bytes([]byte(SnapshotMagic))
		for _, v := range head {
			e.Uint(v)
		}
		testkit.Must(t, e.W.Flush())
		if _, err := ReadState(&b); !errors.Is(err, ErrSnapshotFormat) || !strings.Contains(err.Error(), "use the version that wrote it") {
			t.Errorf("format and level %d: %v", head, err)
		}
	}
}
