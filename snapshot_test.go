package main

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"raftrv/internal/testkit"
)

// smallState has something of everything.
func smallState(t tester) state { return smallStateAt(t, levelFirst) }

func smallStateAt(t tester, level int) state {
	w := &writer{t: t, store: newKVStore(), now: 1_700_000_000_000}
	w.store.state.setLevel(level)
	w.store.state.members[1] = member{ID: 1, PeerURL: "http://a:1"}
	w.store.state.members[2] = member{ID: 2, PeerURL: "http://b:1", Learner: true}
	w.store.state.removed[3] = true
	w.put("a", "1")
	w.apply(command{op: opPut, key: "b", value: "\xff", expires: w.now + 1000, retry: retryID{key: "r"}})
	w.apply(command{op: opTxn, value: codecTxns[1].encode(), retry: retryID{key: "s", digest: [16]byte{1}}})
	w.apply(command{op: opDelete, key: "a", condition: condition{ifMatch, 9}, retry: retryID{key: "t"}})
	w.apply(command{op: opDelete, key: "a"})
	if level >= 3 {
		w.apply(command{op: opPut, key: "typed", value: "v", contentType: "text/plain", retry: retryID{key: "u", client: 7}})
	}
	return w.store.snapshot()
}

func TestSnapshot_RoundTrip(t *testing.T) {
	for _, st := range []state{newState(), smallState(t), smallStateAt(t, levelNewest)} {
		b := stateBytes(t, st)
		for name, r := range map[string]io.Reader{
			"whole": bytes.NewReader(b), "byte by byte": iotest.OneByteReader(bytes.NewReader(b)), "with its end": iotest.DataErrReader(bytes.NewReader(b)),
		} {
			got, err := readState(r)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if again := stateBytes(t, got); !bytes.Equal(again, b) {
				t.Errorf("%s: %d other bytes than the %d", name, len(again), len(b))
			}
		}
	}
}

// Any flipped bit, and any place where a snapshot breaks off, is noticed.
func TestSnapshot_NoticesDamage(t *testing.T) {
	b := stateBytes(t, smallState(t))
	for i := range b {
		for bit := range 8 {
			damaged := bytes.Clone(b)
			damaged[i] ^= 1 << bit
			if _, err := readState(bytes.NewReader(damaged)); err == nil {
				t.Fatalf("bit %d of byte %d of %d", bit, i, len(b))
			}
		}
		if _, err := readState(bytes.NewReader(b[:i])); !errors.Is(err, errSnapshotDamage) {
			t.Fatalf("%d of %d bytes: %v", i, len(b), err)
		}
	}
	for _, more := range []string{"\x00", "\x01\x00\x00\x00\x00\x00\x00\x00\x00", string(b)} {
		if _, err := readState(strings.NewReader(string(b) + more)); !errors.Is(err, errSnapshotDamage) {
			t.Errorf("%q behind the end: %v", more[:1], err)
		}
	}
}

func TestSnapshot_ReportsReadAndWriteErrors(t *testing.T) {
	st := smallState(t)
	b := stateBytes(t, st)
	broken := errors.New("broken")
	for _, n := range []int{0, 5, len(b) - 1} {
		if _, err := readState(io.MultiReader(bytes.NewReader(b[:n]), iotest.ErrReader(broken))); !errors.Is(err, broken) && !errors.Is(err, errSnapshotDamage) {
			t.Errorf("after %d bytes: %v", n, err)
		}
		if err := st.writeTo(&limitedWriter{left: n, err: broken}); !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

// limitedWriter takes so many bytes and then fails.
type limitedWriter struct {
	left int
	err  error
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	n := min(len(p), w.left)
	w.left -= n
	if n < len(p) {
		return n, w.err
	}
	return n, nil
}

// FuzzSnapshotRead gives the reader payloads in sound frames, which is damage
// that no checksum notices: an error or a state, but no panic and no endless
// memory.
func FuzzSnapshotRead(f *testing.F) {
	states := []state{newState()}
	for level := levelFirst; level <= levelNewest; level++ {
		states = append(states, smallStateAt(f, level))
	}
	for _, st := range states {
		payload, err := io.ReadAll(&frameReader{r: bytes.NewReader(stateBytes(f, st))})
		testkit.Must(f, err)
		f.Add(payload)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		var framed bytes.Buffer
		if _, err := (&frameWriter{w: &framed}).Write(payload); err != nil {
			t.Fatal(err)
		}
		st, err := readState(&framed)
		if err != nil {
			return
		}
		s := newKVStore()
		s.restore(st)
		again, err := readState(bytes.NewReader(stateBytes(t, s.snapshot())))
		if err != nil {
			t.Fatal(err)
		}
		// Whatever outcomes it has, another one finds room.
		rules := *again.retries.rules
		rules.retriesMax = 1
		again.retries.rules = &rules
		again.retries.add(retryID{key: "another", client: 9}, result{}, 0)
		if again.rv != st.rv || again.items.Len() != st.items.Len() {
			t.Fatalf("version %d, %d items; then %d, %d", st.rv, st.items.Len(), again.rv, again.items.Len())
		}
	})
}

// FuzzSnapshotFrames gives the reader any bytes.
func FuzzSnapshotFrames(f *testing.F) {
	f.Add(stateBytes(f, smallState(f)))
	f.Add([]byte("\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = readState(bytes.NewReader(data)) // must only return
	})
}

// Large states are damaged at random places.
func TestSnapshot_NoticesDamageInLargeStates(t *testing.T) {
	w := &writer{t: t, store: newKVStore()}
	for range 40 {
		w.put(strings.Repeat("k", rand.IntN(20)+1), strings.Repeat("v", rand.IntN(100_000)))
	}
	b := stateBytes(t, w.store.snapshot())
	for range 300 {
		i := rand.IntN(len(b))
		b[i] ^= 0x10
		if _, err := readState(bytes.NewReader(b)); err == nil {
			t.Errorf("byte %d of %d", i, len(b))
		}
		b[i] ^= 0x10
	}
}
