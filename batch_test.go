package main

import (
	"errors"
	"strings"
	"testing"

	"raftrv/internal/store"
)

func TestBatch_Header(t *testing.T) {
	h := store.BatchHeader{Session: 1<<64 - 1, Seq: 1 << 63, Time: 1<<63 - 1}
	b := newBatch(nil)
	c := store.Command{Op: store.OpPut, Key: "k", Value: "v"}
	b.add(&c)
	h.Put(b.data)
	got, commands, err := store.DecodeBatch(b.data)
	if err != nil || got != h || string(commands) != string(c.AppendTo(nil)) {
		t.Errorf("%+v, %q, %v", got, commands, err)
	}
	for n := range store.BatchHeaderSize {
		if _, _, err := store.DecodeBatch(b.data[:n]); !errors.Is(err, store.ErrMalformed) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	b.data[0]++
	if _, _, err := store.DecodeBatch(b.data); err == nil || !strings.Contains(err.Error(), "upgrade") {
		t.Error(err)
	}
}
