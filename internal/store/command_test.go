package store

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
)

var codecCommands = []Command{
	{},
	{Op: OpPut, Key: "k", Value: "v"},
	{Op: OpPut, Key: "\x00\xff", Value: "\x80", Expires: 1 << 40, Condition: Condition{IfMatch, 1<<64 - 1}},
	{Op: OpDelete, Key: strings.Repeat("k", KeySizeMax), Condition: Condition{Kind: IfAbsent}},
	{Op: OpExpire, Key: "k", Condition: Condition{IfMatch, 7}},
	{Op: OpPut, Key: "k", Condition: Condition{IfMatch, 7}, Retry: RetryID{Key: strings.Repeat("r", IdempotencyKeySizeMax), Digest: [16]byte{1, 15: 2}}},
	{Op: OpTxn, Value: codecTxns[1].Encode()},
	{Op: OpPut, Key: "k", Value: "v", TTL: 30_000, Retry: RetryID{Key: "r"}},
}

var codecTxns = []Txn{
	{},
	{
		Compare:   []Comparison{{Kind: ByVersion, Key: "k", RV: 1<<64 - 1}, {Kind: ByValue, Key: "\xff", Value: "v"}, {Kind: ByAbsent, Key: "k"}},
		Then:      []Command{{Op: OpPut, Key: "a", Value: "b", Expires: 5}, {Op: OpGet, Key: "a"}},
		Otherwise: []Command{{Op: OpDelete, Key: "c"}},
	},
	{Then: []Command{{Op: OpPut, Key: "t", TTL: 5}}},
}

func TestCommand_RoundTrip(t *testing.T) {
	for _, c := range codecCommands {
		b := c.AppendTo(nil)
		if len(b) > c.EncodedSizeMax() {
			t.Errorf("%+v: %d bytes, more than %d", c, len(b), c.EncodedSizeMax())
		}
		got, rest, err := DecodeCommand(append(b, "rest"...))
		if err != nil || got != c || string(rest) != "rest" {
			t.Errorf("%+v comes back as %+v, %q, %v", c, got, rest, err)
		}
		for n := range b {
			if _, _, err := DecodeCommand(b[:n]); !errors.Is(err, ErrMalformed) {
				t.Errorf("%d of %d bytes of %+v: %v", n, len(b), c, err)
			}
		}
	}
	for _, tx := range codecTxns {
		s := tx.Encode()
		if got, err := DecodeTxn(s); err != nil || !reflect.DeepEqual(got, tx) {
			t.Errorf("%+v comes back as %+v, %v", tx, got, err)
		}
		for n := range s {
			if _, err := DecodeTxn(s[:n]); !errors.Is(err, ErrMalformed) {
				t.Errorf("%d of %d bytes of %+v: %v", n, len(s), tx, err)
			}
		}
	}
}

// unknownParts are commands of a newer program: known ones with something in
// them that this program does not know.
func unknownParts() map[string][]byte {
	inTxn := func(t Txn) []byte { return (&Command{Op: OpTxn, Value: t.Encode()}).AppendTo(nil) }
	flags := func(c Command, flags byte, more ...byte) []byte {
		b := c.AppendTo(nil)
		b[1] = flags
		return append(b, more...)
	}
	return map[string][]byte{
		"command":                    (&Command{Op: 200, Key: "k"}).AppendTo(nil),
		"command of transactions":    (&Command{Op: OpGet, Key: "k"}).AppendTo(nil),
		"condition":                  (&Command{Op: OpPut, Key: "k", Condition: Condition{Kind: 9, RV: 77}}).AppendTo(nil),
		"flag":                       flags(Command{Op: OpPut, Key: "k"}, 1<<6, 0),
		"deadline of a delete":       flags(Command{Op: OpDelete, Key: "k"}, flagExpires, 5),
		"condition of a transaction": (&Command{Op: OpTxn, Value: (&Txn{}).Encode(), Condition: Condition{Kind: IfExists}}).AppendTo(nil),
		"operation":                  inTxn(Txn{Then: []Command{{Op: 42, Key: "k", Value: "3"}}}),
		"operation not chosen":       inTxn(Txn{Otherwise: []Command{{Op: OpDeletePrefix, Key: "k"}}}),
		"condition of an operation":  inTxn(Txn{Then: []Command{{Op: OpPut, Key: "k", Condition: Condition{Kind: IfAbsent}}}}),
		"comparison":                 inTxn(Txn{Compare: []Comparison{{Kind: 42, Key: "k"}}, Otherwise: []Command{{Op: OpDelete, Key: "k"}}}),
		"comparison of kind 0":       inTxn(Txn{Compare: []Comparison{{Key: "k"}}}),
		"bytes behind a transaction": (&Command{Op: OpTxn, Value: (&Txn{}).Encode() + "x"}).AppendTo(nil),
		"command after a known one":  append((&Command{Op: OpPut, Key: "other", Value: "v"}).AppendTo(nil), 200, 0, 0, 0),
	}
}

// A command with a part that is not known is not known, whoever is asked: to
// carry out the rest would be another write than what the newer program meant.
func TestCommand_UnknownPartsAreRefused(t *testing.T) {
	for name, data := range unknownParts() {
		if err := CheckCommands(data, LevelFirst); !errors.Is(err, ErrNewer) {
			t.Errorf("%s: the leader takes it: %v", name, err)
		}
		s := New()
		applyAll(t, s, Command{Op: OpPut, Key: "k", Value: "old"})
		before, sums := stateBytes(t, s.Snapshot()), s.Sums()
		_, err := s.Apply(2, 1, BatchHeader{Session: 1, Seq: 2, Time: 5000}, data, new([]Result))
		if !errors.Is(err, ErrNewer) {
			t.Errorf("%s is applied: %v", name, err)
		}
		if !bytes.Equal(stateBytes(t, s.Snapshot()), before) || !reflect.DeepEqual(s.Sums(), sums) {
			t.Errorf("%s: it is refused, and the state has changed", name)
		}
	}
	for _, c := range codecCommands {
		if err := CheckCommands(c.AppendTo(nil), LevelNewest); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	above := (&Command{Op: OpPut, Key: "k"}).AppendTo(nil)
	if err := CheckCommands(above, 0); err == nil || !strings.Contains(err.Error(), "feature level 0") {
		t.Errorf("above the level: %v", err)
	}
}

// A command owns its memory: what it was read from may be reused.
func TestCommand_OwnsItsMemory(t *testing.T) {
	b := codecCommands[5].AppendTo(nil)
	got, _, err := DecodeCommand(b)
	clear(b)
	if err != nil || got != codecCommands[5] {
		t.Errorf("%+v, %v", got, err)
	}
}

// What is read as a command is written as the same command, and reading takes no
// more memory than the input is worth.
func FuzzCommandDecode(f *testing.F) {
	for _, c := range codecCommands {
		f.Add(c.AppendTo(nil))
	}
	f.Add([]byte{byte(OpPut), 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01})
	f.Fuzz(func(t *testing.T, data []byte) {
		c, rest, err := DecodeCommand(data)
		if err != nil {
			if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrNewer) || c != (Command{}) && len(rest) > 0 {
				t.Fatal(c, rest, err)
			}
			return
		}
		if len(c.Key)+len(c.Value)+len(c.Retry.Key)+len(rest) > len(data) {
			t.Fatalf("%+v of %d bytes", c, len(data))
		}
		again, rest, err := DecodeCommand(c.AppendTo(nil))
		if err != nil || len(rest) > 0 || normal(again) != normal(c) {
			t.Fatalf("%+v comes back as %+v, %v", c, again, err)
		}
	})
}

// normal is a command without what an encoder does not write.
func normal(c Command) Command {
	if c.Condition.Kind == Always {
		c.Condition.RV = 0
	}
	if c.Retry.Key == "" {
		c.Retry = RetryID{}
	}
	return c
}

func FuzzTxnDecode(f *testing.F) {
	for _, t := range codecTxns {
		f.Add(t.Encode())
	}
	f.Add("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
	f.Fuzz(func(t *testing.T, s string) {
		tx, err := DecodeTxn(s)
		if err != nil {
			if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrNewer) {
				t.Fatal(err)
			}
			return
		}
		if n := len(tx.Compare) + len(tx.Then) + len(tx.Otherwise); n > len(s) {
			t.Fatalf("%d parts of %d bytes", n, len(s))
		}
		for _, ops := range [][]Command{tx.Then, tx.Otherwise} {
			for i := range ops {
				ops[i] = normal(ops[i])
			}
		}
		again, err := DecodeTxn(tx.Encode())
		if err != nil || !reflect.DeepEqual(again, tx) {
			t.Fatalf("%+v comes back as %+v, %v", tx, again, err)
		}
		// Whatever is in a log, applying it ends.
		w := &writer{t: t, store: New()}
		w.store.State.SetLevel(LevelNewest)
		w.put("k", "v")
		w.apply(Command{Op: OpTxn, Value: s})
	})
}

// Applying what a damaged entry might hold is an error, no panic.
func FuzzApply(f *testing.F) {
	for _, c := range codecCommands[1:] {
		f.Add(c.AppendTo(nil))
	}
	f.Fuzz(func(t *testing.T, commands []byte) {
		s := New()
		var out []Result
		if _, err := s.Apply(1, 1, BatchHeader{Session: 1, Seq: 1}, commands, &out); err != nil {
			return
		}
		st, err := ReadState(strings.NewReader(string(stateBytes(t, s.Snapshot()))))
		if err != nil {
			t.Fatal(err)
		}
		if st.RV != s.Version() || st.Items.Len() != s.State.Items.Len() {
			t.Fatalf("version %d, %d items; restored %d, %d", s.Version(), s.State.Items.Len(), st.RV, st.Items.Len())
		}
	})
}
