package storetest

import (
	"bytes"
	"testing"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// Apply applies each command as an entry of its own.
func Apply(t testing.TB, s *store.Store, commands ...store.Command) {
	t.Helper()
	for i := range commands {
		n := s.Applied() + 1
		_, err := s.Apply(n, 1, store.BatchHeader{Session: 1, Seq: n, Time: 1}, commands[i].AppendTo(nil), nil)
		testkit.Must(t, err)
	}
}

// SomeState is a state with some of everything.
func SomeState(t testing.TB) store.State {
	t.Helper()
	s := store.New()
	s.State.Members[1] = store.Member{ID: 1, PeerURL: "http://a:1"}
	s.State.Members[2] = store.Member{ID: 2, PeerURL: "http://b:1", Learner: true}
	s.State.Removed[3] = true
	Apply(t, s,
		store.Command{Op: store.OpPut, Key: "a", Value: "1"},
		store.Command{Op: store.OpPut, Key: "b", Value: "\xff", Expires: 1_700_000_001_000, Retry: store.RetryID{Key: "r"}},
		store.Command{Op: store.OpDelete, Key: "a", Condition: store.Condition{Kind: store.IfMatch, RV: 9}, Retry: store.RetryID{Key: "t"}},
		store.Command{Op: store.OpDelete, Key: "a"})
	return s.Snapshot()
}

// SameItems compares keys, values and versions.
func SameItems(t testing.TB, got, want *store.State) {
	t.Helper()
	if got.RV != want.RV || got.Items.Len() != want.Items.Len() {
		t.Errorf("version %d and %d items, want %d and %d", got.RV, got.Items.Len(), want.RV, want.Items.Len())
	}
	want.Items.Scan(func(key string, it store.Item) bool {
		if other, ok := got.Items.Get(key); !ok || other != it {
			t.Errorf("%q is %+v, want %+v", key, other, it)
		}
		return true
	})
}

// Backup returns a backup of the state.
func Backup(t testing.TB, st store.State) []byte {
	t.Helper()
	b, err := (&store.Store{State: st}).Backup()
	testkit.Must(t, err)
	defer b.Close()
	var out bytes.Buffer
	testkit.Must(t, b.Encode(&out, store.BackupHead{Format: store.BackupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {}))
	return out.Bytes()
}

// ShrinkWindow sets the bounds of the window of events, and drops what is too much.
func ShrinkWindow(s *store.Store, countMax, bytesMax uint64) {
	s.SetWindow(countMax, bytesMax)
	s.TrimWindow()
}
