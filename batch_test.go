package main

import (
	"errors"
	"strings"
	"testing"
)

func TestBatch_Header(t *testing.T) {
	h := BatchHeader{Session: 1<<64 - 1, Seq: 1 << 63, Time: 1<<63 - 1}
	b := newBatch(nil)
	c := Command{Op: OpPut, Key: "k", Value: "v"}
	b.add(&c)
	h.Put(b.data)
	got, commands, err := DecodeBatch(b.data)
	if err != nil || got != h || string(commands) != string(c.AppendTo(nil)) {
		t.Errorf("%+v, %q, %v", got, commands, err)
	}
	for n := range BatchHeaderSize {
		if _, _, err := DecodeBatch(b.data[:n]); !errors.Is(err, ErrMalformed) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	b.data[0]++
	if _, _, err := DecodeBatch(b.data); err == nil || !strings.Contains(err.Error(), "upgrade") {
		t.Error(err)
	}
}
