package main

import (
	"bytes"
	"testing"

	"raftrv/internal/testkit"
)

// applyTo applies each command as an entry of its own.
func applyTo(t testing.TB, s *kvstore, commands ...command) {
	t.Helper()
	for i := range commands {
		n := s.applied() + 1
		_, err := s.apply(n, 1, batchHeader{session: 1, seq: n, time: 1}, commands[i].appendTo(nil), nil)
		testkit.Must(t, err)
	}
}

// exampleState is a state with some of everything.
func exampleState(t testing.TB) state {
	t.Helper()
	s := newKVStore()
	s.state.members[1] = member{ID: 1, PeerURL: "http://a:1"}
	s.state.members[2] = member{ID: 2, PeerURL: "http://b:1", Learner: true}
	s.state.removed[3] = true
	applyTo(t, s,
		command{op: opPut, key: "a", value: "1"},
		command{op: opPut, key: "b", value: "\xff", expires: 1_700_000_001_000, retry: retryID{key: "r"}},
		command{op: opDelete, key: "a", condition: condition{kind: ifMatch, rv: 9}, retry: retryID{key: "t"}},
		command{op: opDelete, key: "a"})
	return s.snapshot()
}

// wantSameItems compares keys, values and versions.
func wantSameItems(t testing.TB, got, want *state) {
	t.Helper()
	if got.rv != want.rv || got.items.Len() != want.items.Len() {
		t.Errorf("version %d and %d items, want %d and %d", got.rv, got.items.Len(), want.rv, want.items.Len())
	}
	want.items.Scan(func(key string, it item) bool {
		if other, ok := got.items.Get(key); !ok || other != it {
			t.Errorf("%q is %+v, want %+v", key, other, it)
		}
		return true
	})
}

// encodeBackup returns a backup of the state.
func encodeBackup(t testing.TB, st state) []byte {
	t.Helper()
	b, err := (&kvstore{state: st}).backup()
	testkit.Must(t, err)
	defer b.close()
	var out bytes.Buffer
	testkit.Must(t, b.writeTo(&out, backupHead{Format: backupFormat, Cluster: "7", Member: 1, Version: "v0"}, func() {}))
	return out.Bytes()
}
