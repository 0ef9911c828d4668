package main

import (
	"errors"
	"strings"
	"testing"
)

func TestBatch_Header(t *testing.T) {
	h := batchHeader{session: 1<<64 - 1, seq: 1 << 63, time: 1<<63 - 1}
	b := newBatch(nil)
	c := command{op: opPut, key: "k", value: "v"}
	b.add(&c)
	h.put(b.data)
	got, commands, err := decodeBatch(b.data)
	if err != nil || got != h || string(commands) != string(c.appendTo(nil)) {
		t.Errorf("%+v, %q, %v", got, commands, err)
	}
	for n := range batchHeaderSize {
		if _, _, err := decodeBatch(b.data[:n]); !errors.Is(err, errMalformed) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	b.data[0]++
	if _, _, err := decodeBatch(b.data); err == nil || !strings.Contains(err.Error(), "upgrade") {
		t.Error(err)
	}
}
