package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/hostile"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// TestNetwork_HostileStreams: whoever answers at a member's address with what is no stream costs this node a
// connection, and nothing else.
func TestNetwork_HostileStreams(t *testing.T) {
	const full = "\xff\xff\xff\xff\xff\xff\xff\xff"
	tests := []struct {
		name, version, stream, body string
		reason                      refusalReason
	}{
		{"a version that is none", "x", "", "", refusedHeader},
		{"too many entries", "3.7.0", "msgapp", "\x01\x40" + strings.Repeat("\x00", 7), refusedSize},
		{"a large entry", "3.7.0", "msgapp", "\x01\x00\x00\x00\x00\x00\x00\x00\x01" + full, refusedSize},
		{"an entry of junk", "3.7.0", "msgapp", "\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff", refusedFormat},
		{"a large message in it", "3.7.0", "msgapp", "\x02" + full, refusedSize},
		{"a message of junk in it", "3.7.0", "msgapp", "\x02\x00\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff", refusedFormat},
		{"another kind of frame", "3.7.0", "msgapp", "\x09", refusedFormat},
		{"a large message", "3.7.0", "message", full, refusedSize},
		{"a message of junk", "3.7.0", "message", "\x00\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff", refusedFormat},
		{"a message from nobody", "3.7.0", "message", "\x00\x00\x00\x00\x00\x00\x00\x04\x08\x08\x10\x01", refusedSender},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			peer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("X-Server-Version", tt.version)
				if tt.stream != "" && strings.Contains(r.URL.Path, "/"+tt.stream+"/") {
					_, _ = w.Write([]byte(tt.body)) // fails if the node has left
				}
			}))
			defer peer.Close()
			n := newTestNetwork(t, peer.URL, false)
			testkit.WaitUntil(t, func() error {
				if n.refusals.counts[tt.reason].Load() < 2 { // it tries again
					return fmt.Errorf("not refused as %s", refusalNames[tt.reason])
				}
				return nil
			})
			if m := n.arrivedMessages(); len(m) != 0 {
				t.Errorf("delivered: %v", m)
			}
		})
	}
}

// TestStreamDecoder_Memory: no few bytes of a stream take much memory.
func TestStreamDecoder_Memory(t *testing.T) {
	number := func(v int) []byte { return binary.BigEndian.AppendUint64(nil, uint64(v)) }
	framed := func(message []byte) []byte { return append(number(len(message)), message...) }
	many := bytes.Repeat([]byte("\x3a\x00"), messageEntriesMax+1) // entries without anything in them
	for name, tt := range map[string]struct {
		isAppend bool
		data     []byte
		reason   refusalReason // refusedOther: it breaks off
	}{
		"a message that is announced":    {false, append(number(peerMessageMax), 1), refusedOther},
		"the same on the other stream":   {true, slices.Concat([]byte{frameMessage}, number(peerMessageMax), []byte{1}), refusedOther},
		"an entry that is announced":     {true, slices.Concat([]byte{frameEntries}, number(1), number(peerMessageMax), []byte{1}), refusedOther},
		"entries that are announced":     {true, slices.Concat([]byte{frameEntries}, number(messageEntriesMax+1)), refusedSize},
		"a message of many entries":      {false, framed(many), refusedSize},
		"the same, on the other stream":  {true, append([]byte{frameMessage}, framed(many)...), refusedSize},
		"messages in a message":          {false, framed(bytes.Repeat([]byte("\x72\x00"), 1<<20)), refusedContext},
		"a snapshot of very many voters": {false, framed(slices.Concat([]byte("\x4a\x80\x80\x80\x01"), make([]byte, 2<<20))), refusedSize},
	} {
		d := &streamDecoder{reader: bufio.NewReader(bytes.NewReader(tt.data)), from: 2, to: 1}
		decode := d.message
		if tt.isAppend {
			decode = d.append
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := decode()
		runtime.ReadMemStats(&after)
		if err == nil || reasonForRefusal(err) != tt.reason {
			t.Errorf("%s: %v", name, err)
		}
		// A buffer grows by the factor of 4, and what was in the smaller ones is garbage.
		if took, most := after.TotalAlloc-before.TotalAlloc, uint64(6*len(tt.data)+256<<10); took > most {
			t.Errorf("%s: it takes %d bytes of memory, want at most %d", name, took, most)
		}
	}
}

// TestReplay_Unreadable: recover keeps what is in the log before an entry that cannot be applied, and says so.
func TestReplay_Unreadable(t *testing.T) {
	put := (&store.Command{Op: store.OpPut, Key: "k", Value: "v"}).AppendTo(nil)
	for _, bad := range []*raftpb.Entry{
		hostile.Entry(2, 1, []byte("\x01\x00garbage")),
		hostile.Entry(2, 1, []byte("\x4d\x00\x00\x00")),
		{Index: new(uint64(2)), Term: new(uint64(1)), Data: []byte("x")},
		{Type: raftpb.EntryConfChange.Enum(), Index: new(uint64(2)), Term: new(uint64(1)), Data: []byte("\xff")},
	} {
		log := raft.NewMemoryStorage()
		testkit.Must(t, log.Append([]*raftpb.Entry{hostile.Entry(1, 1, put), bad, hostile.Entry(3, 1, put)}))
		rec := &recovered{log: log, state: store.NewState()}
		testkit.Must(t, rec.replay())
		if rec.unreadable == nil || !strings.Contains(rec.unreadable.Error(), "entry 2 of term 1") || rec.left != 2 || rec.state.Index != 1 || rec.state.RV != 1 {
			t.Errorf("%q: %v, %d left, at %d", bad.GetData(), rec.unreadable, rec.left, rec.state.Index)
		}
		var out bytes.Buffer
		testkit.Must(t, (&recovery{unreadable: rec.unreadable, left: rec.left}).print(&out, "from", "to"))
		if !strings.Contains(out.String(), "The last 2 entries of its log are left behind") {
			t.Errorf("it does not say so: %s", out.String())
		}
	}
}
