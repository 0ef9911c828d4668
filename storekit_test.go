package main

import (
	"bytes"
	"testing"

	"raftrv/internal/testkit"
)

// applyTo applies each command as an entry of its own.
func applyTo(t testing.TB, s *Store, commands ...Command) {
	t.Helper()
	for i := range commands {
		n := s.Applied() + 1
		_, err := s.Apply(n, 1, BatchHeader{Session: 1, Seq: n, Time: 1}, commands[i].AppendTo(nil), nil)
		testkit.Must(t, err)
	}
}

// exampleState is a state with some of everything.
func exampleState(t testing.TB) State {
	t.Helper()
	s := New()
	s.State.Members[1] = Member{ID: 1, PeerURL: "http://a:1"}
	s.State.Members[2] = Member{ID: 2, PeerURL: "http://b:1", Learner: true}
	s.State.Removed[3] = true
	applyTo(t, s,
		Command{Op: OpPut, Key: "a", Value: "1"},
		Command{Op: OpPut, Key: "b", Value: "\xff", Expires: 1_700_000_001_000, Retry: RetryID{Key: "r"}},
		Command{Op: OpDelete, Key: "a", Condition: Condition{Kind: IfMatch, RV: 9}, Retry: RetryID{Key: "t"}},
		Command{Op: OpDelete, Key: "a"})
	return s.Snapshot()
}

// wantSameItems compares keys, values and versions.
func wantSameItems(t testing.TB, got, want *State) {
	t.Helper()
	if got.RV != want.RV || got.Items.Len() != want.Items.Len() {
		t.Errorf("version %d and %d items, want %d and %d", got.RV, got.Items.Len(), want.RV, want.Items.Len())
	}
	want.Items.Scan(func(key string, it Item) bool {
		if other, ok := got.Items.Get(key); !ok || other != it {
			t.Errorf("%q is %+v, want %+v", key, other, it)
		}
		return true
	})
}

// encodeBackup returns a backup of the state.
func encodeBackup(t testing.TB, st State) []byte {
	t.Helper()
	b, err := (&Store{State: st}).Backup()
	testkit.Must(t, err)
	defer b.Close()
	var out bytes.Buffer
	testkit.Must(t, b.Encode(&out, BackupHead{Format: BackupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {}))
	return out.Bytes()
}
