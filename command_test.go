package main

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
)

var codecCommands = []command{
	{},
	{op: opPut, key: "k", value: "v"},
	{op: opPut, key: "\x00\xff", value: "\x80", expires: 1 << 40, condition: condition{ifMatch, 1<<64 - 1}},
	{op: opDelete, key: strings.Repeat("k", keySizeMax), condition: condition{kind: ifAbsent}},
	{op: opExpire, key: "k", condition: condition{ifMatch, 7}},
	{op: opPut, key: "k", condition: condition{ifMatch, 7}, retry: retryID{key: strings.Repeat("r", idempotencyKeySizeMax), digest: [16]byte{1, 15: 2}}},
	{op: opTxn, value: codecTxns[1].encode()},
	{op: opPut, key: "k", value: "v", ttl: 30_000, retry: retryID{key: "r"}},
}

var codecTxns = []txn{
	{},
	{
		compare:   []comparison{{kind: byVersion, key: "k", rv: 1<<64 - 1}, {kind: byValue, key: "\xff", value: "v"}, {kind: byAbsent, key: "k"}},
		then:      []command{{op: opPut, key: "a", value: "b", expires: 5}, {op: opGet, key: "a"}},
		otherwise: []command{{op: opDelete, key: "c"}},
	},
	{then: []command{{op: opPut, key: "t", ttl: 5}}},
}

func TestCommand_RoundTrip(t *testing.T) {
	for _, c := range codecCommands {
		b := c.appendTo(nil)
		if len(b) > c.encodedSizeMax() {
			t.Errorf("%+v: %d bytes, more than %d", c, len(b), c.encodedSizeMax())
		}
		got, rest, err := decodeCommand(append(b, "rest"...))
		if err != nil || got != c || string(rest) != "rest" {
			t.Errorf("%+v comes back as %+v, %q, %v", c, got, rest, err)
		}
		for n := range b {
			if _, _, err := decodeCommand(b[:n]); !errors.Is(err, errMalformed) {
				t.Errorf("%d of %d bytes of %+v: %v", n, len(b), c, err)
			}
		}
	}
	for _, tx := range codecTxns {
		s := tx.encode()
		if got, err := decodeTxn(s); err != nil || !reflect.DeepEqual(got, tx) {
			t.Errorf("%+v comes back as %+v, %v", tx, got, err)
		}
		for n := range s {
			if _, err := decodeTxn(s[:n]); !errors.Is(err, errMalformed) {
				t.Errorf("%d of %d bytes of %+v: %v", n, len(s), tx, err)
			}
		}
	}
}

// unknownParts are commands of a newer program: known ones with something in
// them that this program does not know.
func unknownParts() map[string][]byte {
	inTxn := func(t txn) []byte { return (&command{op: opTxn, value: t.encode()}).appendTo(nil) }
	flags := func(c command, flags byte, more ...byte) []byte {
		b := c.appendTo(nil)
		b[1] = flags
		return append(b, more...)
	}
	return map[string][]byte{
		"command":                    (&command{op: 200, key: "k"}).appendTo(nil),
		"command of transactions":    (&command{op: opGet, key: "k"}).appendTo(nil),
		"condition":                  (&command{op: opPut, key: "k", condition: condition{kind: 9, rv: 77}}).appendTo(nil),
		"flag":                       flags(command{op: opPut, key: "k"}, 1<<6, 0),
		"deadline of a delete":       flags(command{op: opDelete, key: "k"}, flagExpires, 5),
		"condition of a transaction": (&command{op: opTxn, value: (&txn{}).encode(), condition: condition{kind: ifExists}}).appendTo(nil),
		"operation":                  inTxn(txn{then: []command{{op: 42, key: "k", value: "3"}}}),
		"operation not chosen":       inTxn(txn{otherwise: []command{{op: opDeletePrefix, key: "k"}}}),
		"condition of an operation":  inTxn(txn{then: []command{{op: opPut, key: "k", condition: condition{kind: ifAbsent}}}}),
		"comparison":                 inTxn(txn{compare: []comparison{{kind: 42, key: "k"}}, otherwise: []command{{op: opDelete, key: "k"}}}),
		"comparison of kind 0":       inTxn(txn{compare: []comparison{{key: "k"}}}),
		"bytes behind a transaction": (&command{op: opTxn, value: (&txn{}).encode() + "x"}).appendTo(nil),
		"command after a known one":  append((&command{op: opPut, key: "other", value: "v"}).appendTo(nil), 200, 0, 0, 0),
	}
}

// A command with a part that is not known is not known, whoever is asked: to
// carry out the rest would be another write than what the newer program meant.
func TestCommand_UnknownPartsAreRefused(t *testing.T) {
	for name, data := range unknownParts() {
		if err := checkCommands(data, levelFirst); !errors.Is(err, errNewer) {
			t.Errorf("%s: the leader takes it: %v", name, err)
		}
		s := newKVStore()
		applyAll(t, s, command{op: opPut, key: "k", value: "old"})
		before, sums := stateBytes(t, s.snapshot()), s.sums()
		_, err := s.apply(2, 1, batchHeader{session: 1, seq: 2, time: 5000}, data, new([]result))
		if !errors.Is(err, errNewer) {
			t.Errorf("%s is applied: %v", name, err)
		}
		if !bytes.Equal(stateBytes(t, s.snapshot()), before) || !reflect.DeepEqual(s.sums(), sums) {
			t.Errorf("%s: it is refused, and the state has changed", name)
		}
	}
	for _, c := range codecCommands {
		if err := checkCommands(c.appendTo(nil), levelNewest); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	above := (&command{op: opPut, key: "k"}).appendTo(nil)
	if err := checkCommands(above, 0); err == nil || !strings.Contains(err.Error(), "feature level 0") {
		t.Errorf("above the level: %v", err)
	}
}

// A command owns its memory: what it was read from may be reused.
func TestCommand_OwnsItsMemory(t *testing.T) {
	b := codecCommands[5].appendTo(nil)
	got, _, err := decodeCommand(b)
	clear(b)
	if err != nil || got != codecCommands[5] {
		t.Errorf("%+v, %v", got, err)
	}
}

// What is read as a command is written as the same command, and reading takes no
// more memory than the input is worth.
func FuzzCommandDecode(f *testing.F) {
	for _, c := range codecCommands {
		f.Add(c.appendTo(nil))
	}
	f.Add([]byte{byte(opPut), 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01})
	f.Fuzz(func(t *testing.T, data []byte) {
		c, rest, err := decodeCommand(data)
		if err != nil {
			if !errors.Is(err, errMalformed) && !errors.Is(err, errNewer) || c != (command{}) && len(rest) > 0 {
				t.Fatal(c, rest, err)
			}
			return
		}
		if len(c.key)+len(c.value)+len(c.retry.key)+len(rest) > len(data) {
			t.Fatalf("%+v of %d bytes", c, len(data))
		}
		again, rest, err := decodeCommand(c.appendTo(nil))
		if err != nil || len(rest) > 0 || normal(again) != normal(c) {
			t.Fatalf("%+v comes back as %+v, %v", c, again, err)
		}
	})
}

// normal is a command without what an encoder does not write.
func normal(c command) command {
	if c.condition.kind == always {
		c.condition.rv = 0
	}
	if c.retry.key == "" {
		c.retry = retryID{}
	}
	return c
}

func FuzzTxnDecode(f *testing.F) {
	for _, t := range codecTxns {
		f.Add(t.encode())
	}
	f.Add("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
	f.Fuzz(func(t *testing.T, s string) {
		tx, err := decodeTxn(s)
		if err != nil {
			if !errors.Is(err, errMalformed) && !errors.Is(err, errNewer) {
				t.Fatal(err)
			}
			return
		}
		if n := len(tx.compare) + len(tx.then) + len(tx.otherwise); n > len(s) {
			t.Fatalf("%d parts of %d bytes", n, len(s))
		}
		for _, ops := range [][]command{tx.then, tx.otherwise} {
			for i := range ops {
				ops[i] = normal(ops[i])
			}
		}
		again, err := decodeTxn(tx.encode())
		if err != nil || !reflect.DeepEqual(again, tx) {
			t.Fatalf("%+v comes back as %+v, %v", tx, again, err)
		}
		// Whatever is in a log, applying it ends.
		w := &writer{t: t, store: newKVStore()}
		w.store.state.setLevel(levelNewest)
		w.put("k", "v")
		w.apply(command{op: opTxn, value: s})
	})
}

// Applying what a damaged entry might hold is an error, no panic.
func FuzzApply(f *testing.F) {
	for _, c := range codecCommands[1:] {
		f.Add(c.appendTo(nil))
	}
	f.Fuzz(func(t *testing.T, commands []byte) {
		s := newKVStore()
		var out []result
		if _, err := s.apply(1, 1, batchHeader{session: 1, seq: 1}, commands, &out); err != nil {
			return
		}
		st, err := readState(strings.NewReader(string(stateBytes(t, s.snapshot()))))
		if err != nil {
			t.Fatal(err)
		}
		if st.rv != s.version() || st.items.Len() != s.state.items.Len() {
			t.Fatalf("version %d, %d items; restored %d, %d", s.version(), s.state.items.Len(), st.rv, st.items.Len())
		}
	})
}
