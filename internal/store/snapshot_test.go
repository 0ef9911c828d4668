package store

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
func smallState(t tester) State { return smallStateAt(t, LevelFirst) }

func smallStateAt(t tester, level int) State {
	w := &writer{t: t, store: New(), now: 1_700_000_000_000}
	w.store.State.SetLevel(level)
	w.store.State.Members[1] = Member{ID: 1, PeerURL: "http://a:1"}
	w.store.State.Members[2] = Member{ID: 2, PeerURL: "http://b:1", Learner: true}
	w.store.State.Removed[3] = true
	w.put("a", "1")
	w.apply(Command{Op: OpPut, Key: "b", Value: "\xff", Expires: w.now + 1000, Retry: RetryID{Key: "r"}})
	w.apply(Command{Op: OpTxn, Value: codecTxns[1].Encode(), Retry: RetryID{Key: "s", Digest: [16]byte{1}}})
	w.apply(Command{Op: OpDelete, Key: "a", Condition: Condition{IfMatch, 9}, Retry: RetryID{Key: "t"}})
	w.apply(Command{Op: OpDelete, Key: "a"})
	if level >= 3 {
		w.apply(Command{Op: OpPut, Key: "typed", Value: "v", ContentType: "text/plain", Retry: RetryID{Key: "u", Client: 7}})
	}
	return w.store.Snapshot()
}

func TestSnapshot_RoundTrip(t *testing.T) {
	for _, st := range []State{NewState(), smallState(t), smallStateAt(t, LevelNewest)} {
		b := stateBytes(t, st)
		for name, r := range map[string]io.Reader{
			"whole": bytes.NewReader(b), "byte by byte": iotest.OneByteReader(bytes.NewReader(b)), "with its end": iotest.DataErrReader(bytes.NewReader(b)),
		} {
			got, err := ReadState(r)
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
			if _, err := ReadState(bytes.NewReader(damaged)); err == nil {
				t.Fatalf("bit %d of byte %d of %d", bit, i, len(b))
			}
		}
		if _, err := ReadState(bytes.NewReader(b[:i])); !errors.Is(err, ErrSnapshotDamage) {
			t.Fatalf("%d of %d bytes: %v", i, len(b), err)
		}
	}
	for _, more := range []string{"\x00", "\x01\x00\x00\x00\x00\x00\x00\x00\x00", string(b)} {
		if _, err := ReadState(strings.NewReader(string(b) + more)); !errors.Is(err, ErrSnapshotDamage) {
			t.Errorf("%q behind the end: %v", more[:1], err)
		}
	}
}

func TestSnapshot_ReportsReadAndWriteErrors(t *testing.T) {
	st := smallState(t)
	b := stateBytes(t, st)
	broken := errors.New("broken")
	for _, n := range []int{0, 5, len(b) - 1} {
		if _, err := ReadState(io.MultiReader(bytes.NewReader(b[:n]), iotest.ErrReader(broken))); !errors.Is(err, broken) && !errors.Is(err, ErrSnapshotDamage) {
			t.Errorf("after %d bytes: %v", n, err)
		}
		if err := st.Encode(&limitedWriter{left: n, err: broken}); !errors.Is(err, broken) {
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
	states := []State{NewState()}
	for level := LevelFirst; level <= LevelNewest; level++ {
		states = append(states, smallStateAt(f, level))
	}
	for _, st := range states {
		payload, err := io.ReadAll(&FrameReader{R: bytes.NewReader(stateBytes(f, st))})
		testkit.Must(f, err)
		f.Add(payload)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		var framed bytes.Buffer
		if _, err := (&FrameWriter{W: &framed}).Write(payload); err != nil {
			t.Fatal(err)
		}
		st, err := ReadState(&framed)
		if err != nil {
			return
		}
		s := New()
		s.Restore(st)
		again, err := ReadState(bytes.NewReader(stateBytes(t, s.Snapshot())))
		if err != nil {
			t.Fatal(err)
		}
		// Whatever outcomes it has, another one finds room.
		rules := *again.Retries.rules
		rules.retriesMax = 1
		again.Retries.rules = &rules
		again.Retries.add(RetryID{Key: "another", Client: 9}, Result{}, 0)
		if again.RV != st.RV || again.Items.Len() != st.Items.Len() {
			t.Fatalf("version %d, %d items; then %d, %d", st.RV, st.Items.Len(), again.RV, again.Items.Len())
		}
	})
}

// FuzzSnapshotFrames gives the reader any bytes.
func FuzzSnapshotFrames(f *testing.F) {
	f.Add(stateBytes(f, smallState(f)))
	f.Add([]byte("\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = ReadState(bytes.NewReader(data)) // must only return
	})
}

// Large states are damaged at random places.
func TestSnapshot_NoticesDamageInLargeStates(t *testing.T) {
	w := &writer{t: t, store: New()}
	for range 40 {
		w.put(strings.Repeat("k", rand.IntN(20)+1), strings.Repeat("v", rand.IntN(100_000)))
	}
	b := stateBytes(t, w.store.Snapshot())
	for range 300 {
		i := rand.IntN(len(b))
		b[i] ^= 0x10
		if _, err := ReadState(bytes.NewReader(b)); err == nil {
			t.Errorf("byte %d of %d", i, len(b))
		}
		b[i] ^= 0x10
	}
}
