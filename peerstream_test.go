package main

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

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

// TestReplay_Unreadable: recover keeps what is in the log before an entry that cannot be applied, and says so.
func TestReplay_Unreadable(t *testing.T) {
	put := (&store.Command{Op: store.OpPut, Key: "k", Value: "v"}).AppendTo(nil)
	for _, bad := range []*raftpb.Entry{
		entryOf(2, 1, []byte("\x01\x00garbage")),
		entryOf(2, 1, []byte("\x4d\x00\x00\x00")),
		{Index: new(uint64(2)), Term: new(uint64(1)), Data: []byte("x")},
		{Type: raftpb.EntryConfChange.Enum(), Index: new(uint64(2)), Term: new(uint64(1)), Data: []byte("\xff")},
	} {
		log := raft.NewMemoryStorage()
		testkit.Must(t, log.Append([]*raftpb.Entry{entryOf(1, 1, put), bad, entryOf(3, 1, put)}))
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
