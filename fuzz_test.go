package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	"raftrv/internal/hostile"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// These targets are the decoders that a stranger reaches and that stand in no test
// of their own: what another node sends, and what a client says beside a key.

// FuzzStream: no bytes on a stream of another node panic what reads them, or make it hold more than there is.
func FuzzStream(f *testing.F) {
	for _, m := range hostile.Messages(2, 1, 5, 10) {
		data, err := proto.Marshal(m)
		testkit.Must(f, err)
		framed := append(binary.BigEndian.AppendUint64(nil, uint64(len(data))), data...)
		f.Add(false, framed)
		f.Add(true, append([]byte{frameMessage}, framed...))
		f.Add(true, append(binary.BigEndian.AppendUint64([]byte{frameEntries}, 1), framed...))
	}
	f.Add(true, []byte{frameAlive, frameEntries, 0xff, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, isAppend bool, data []byte) {
		d := &streamDecoder{reader: bufio.NewReader(bytes.NewReader(data)), from: 2, to: 1}
		decode := d.message
		if isAppend {
			decode = d.append
		}
		for size := 0; ; {
			m, err := decode()
			if err != nil {
				return
			}
			if m == nil {
				continue
			}
			if size += len(m.GetEntries()); size > len(data) {
				t.Fatalf("%d entries in %d bytes", size, len(data))
			}
			_ = checkMessage(m, peerView{self: 1, sender: 2, term: 5, member: func(uint64) bool { return true }}) // must not panic
		}
	})
}

// FuzzEnvelope: what is in front of a snapshot is one, or refused.
func FuzzEnvelope(f *testing.F) {
	for _, m := range hostile.Snapshots(2, 1, 5, 10) {
		data, err := proto.Marshal(m)
		testkit.Must(f, err)
		f.Add(append(binary.BigEndian.AppendUint64(nil, uint64(len(data))), data...))
	}
	f.Add([]byte("\x00\x00\x00\x00\x04\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := readEnvelope(bytes.NewReader(data))
		if err != nil {
			return
		}
		if m.GetSnapshot() == nil {
			t.Fatal("no snapshot")
		}
		err = checkMessage(m, peerView{self: 1, sender: 2, term: 5, member: func(uint64) bool { return true }})
		if _, ok := errors.AsType[*peerRefusal](err); err != nil && !ok {
			t.Errorf("no reason: %v", err)
		}
	})
}

// FuzzPeerInfo: what a node says of itself is used as far as it can be.
func FuzzPeerInfo(f *testing.F) {
	for _, s := range []string{
		`{}`, `null`, `{"cluster":"zz"}`, `{"cluster":"5d0c","members":[{"id":1,"peerURL":"http://a:1","directory":"7"},{"id":1}],"removed":[2,2]}`, `{"node":1,"process":"18446744073709551615"}`,
		`{"health":{"now":{"index":1,"sum":"1"},"level":99}}`, `{"founders":[{"id":0}],"founding":{}}`, `{"members":[{"id":2,"zone":[1]}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var p peerInfo
		if json.Unmarshal(data, &p) != nil {
			return
		}
		_, _ = p.clusterID()
		_, _ = p.isOlder(), p.directoryOf(1)
		_ = commonLevel(p.Members, map[uint64]health{1: p.Health}, 1, store.LevelNewest)
		for _, m := range p.Members {
			_ = m.Check()
		}
		if _, err := json.Marshal(p); err != nil {
			t.Errorf("it cannot be told again: %v", err)
		}
	})
}
