package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/hostile"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// TestProcess_Hostile: no message to either port ends a node, now or at the next start, or changes anything, or
// leaves anything behind.
func TestProcess_Hostile(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	client := c.client(c.Nodes[0])
	written := client.putNew()
	var info struct{ Cluster string }
	err := json.Unmarshal([]byte(bodyOf(t, c.Nodes[0].RaftURL()+"/-/peer", 200)), &info)
	testkit.Must(t, err)
	st, err := c.Nodes[0].Status(c.context())
	testkit.Must(t, err)
	before := hostileCosts(c)
	members := liveText(t, c.Nodes[0], "/-/v1/members", 200)

	both, toClients, toPeers := hostileToBoth(), hostileToClients(), hostileToPeers(info.Cluster)
	sendHostile(t, c.Nodes[0].URL(), false, slices.Concat(both, toClients))
	sendHostile(t, c.Nodes[1].RaftURL(), true, slices.Concat(both, toPeers))
	count := 2*len(both) + len(toClients) + len(toPeers)
	for i, n := range c.Nodes {
		to, from := uint64(n.ID), uint64(c.Nodes[(i+1)%3].ID)
		requests := hostile.Requests(t, from, to, st.Term, st.AppliedIndex)
		if i == 0 {
			count += 2 * len(requests)
		}
		for _, h := range requests {
			h.Post(t, n.RaftURL(), info.Cluster, from, to)
			h.Post(t, n.RaftURL(), info.Cluster, 99, to)
		}
		// What may be from a newer member gets an answer from the leader, as an entry that does nothing.
		newer := &raftpb.Message{Type: raftpb.MsgProp.Enum(), From: new(from), To: new(to), Entries: []*raftpb.Entry{{Data: hostile.Entry(0, 0, []byte("\x4d\x00xx")).Data}}}
		data, err := proto.Marshal(newer)
		testkit.Must(t, err)
		hostile.Request{Name: "", Method: "POST", Path: rafthttp.RaftPrefix, Body: data, Header: nil, Statuses: nil}.Post(t, n.RaftURL(), info.Cluster, from, to)
	}
	t.Logf("%d messages", count)
	if count < 400 || len(both)+len(toClients) < 265 {
		t.Errorf("the table has %d messages, %d of them to clients", count, len(both)+len(toClients))
	}
	for _, n := range c.Nodes {
		if !n.Running() {
			t.Fatalf("node %d is down: %s", n.ID, n.LogTail())
		}
	}
	if o := client.putNew(); o.outcome != liveDone {
		t.Errorf("no write afterwards: %v", o)
	}
	if now := liveText(t, c.Nodes[0], "/-/v1/members", 200); now != members {
		t.Errorf("the members are %s, were %s", now, members)
	}
	c.eventually(func() error {
		for i, now := range hostileCosts(c) {
			switch was := before[i]; {
			case now["go_goroutines"] > was["go_goroutines"]+3 || now["process_open_fds"] > was["process_open_fds"]+3:
				return fmt.Errorf("node %d has %.0f goroutines and %.0f descriptors, had %.0f and %.0f", c.Nodes[i].ID, now["go_goroutines"], now["process_open_fds"], was["go_goroutines"], was["process_open_fds"])
			case now["process_resident_memory_bytes"] > was["process_resident_memory_bytes"]+64<<20:
				return fmt.Errorf("node %d takes %.0f MiB more", c.Nodes[i].ID, (now["process_resident_memory_bytes"]-was["process_resident_memory_bytes"])/(1<<20))
			}
		}
		return nil
	})
	for _, n := range c.Nodes {
		c.kill(n)
	}
	c.start()
	for _, n := range c.Nodes {
		if r := c.client(n).get(written.key); r.value != written.value || r.itemRV != written.rv {
			t.Errorf("node %d: %v, want what was written as %v", n.ID, r, written)
		}
		now, err := n.Status(c.context())
		testkit.Must(t, err)
		if now.ResourceVersion != st.ResourceVersion+1 {
			t.Errorf("node %d has version %d, want %d", n.ID, now.ResourceVersion, st.ResourceVersion+1)
		}
		log, err := os.ReadFile(n.LogFile)
		testkit.Must(t, err)
		for _, word := range []string{"panic", hostileCanary} {
			if bytes.Contains(log, []byte(word)) {
				t.Errorf("node %d has logged %q", n.ID, word)
			}
		}
	}
	c.verdict()
}

// hostileCosts is what each node has taken of the machine.
func hostileCosts(c *liveCluster) (all []testkit.Samples) {
	for _, n := range c.Nodes {
		all = append(all, testkit.ParseSamples(c.t, liveText(c.t, n, "/-/metrics", http.StatusOK)))
	}
	return all
}

// sendHostile sends each message on a connection of its own, and looks at what comes back.
func sendHostile(t *testing.T, url string, toPeers bool, all []rawHostile) {
	t.Helper()
	next := make(chan rawHostile)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for h := range next {
				answer, err := exchangeHostile(strings.TrimPrefix(url, "http://"), h.raw, !toPeers && !strings.Contains(h.want, "none"))
				if err == nil {
					err = h.check(answer, toPeers)
				}
				if err != nil {
					t.Errorf("%s: %.200q: %v", h.kind, h.raw, err)
				}
			}
		})
	}
	for _, h := range all {
		next <- h
	}
	close(next)
	wg.Wait()
}

// exchangeHostile sends raw and returns what comes back until the connection ends, or nothing more comes for a
// moment. It waits longer for the beginning if there must be an answer.
func exchangeHostile(addr, raw string, mustAnswer bool) (string, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	// The node may have seen enough before all was sent.
	_, _ = io.WriteString(conn, raw)
	var answer []byte
	buf := make([]byte, 64<<10)
	patience := 300 * time.Millisecond
	if mustAnswer {
		patience = 10 * time.Second
	}
	for ; ; patience = 30 * time.Millisecond {
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return "", err
		}
		n, err := conn.Read(buf)
		if answer = append(answer, buf[:n]...); err != nil {
			return string(answer), nil
		}
	}
}

// check says what is wrong with an answer.
func (h *rawHostile) check(answer string, fromPeers bool) error {
	line, rest, _ := strings.Cut(answer, "\r\n")
	for strings.HasPrefix(line, "HTTP/1.1 100 ") {
		line, rest, _ = strings.Cut(strings.TrimPrefix(rest, "\r\n"), "\r\n")
	}
	status := "none" // it may have been the beginning of something
	if fields := strings.Fields(line); len(fields) > 1 {
		status = fields[1]
	}
	if fromPeers {
		if status[0] == '2' {
			return fmt.Errorf("answered %s", status)
		}
		return nil
	}
	head, _, _ := strings.Cut(rest, "\r\n\r\n")
	fits := false
	for want := range strings.FieldsSeq(h.want) {
		fits = fits || strings.HasPrefix(status, want)
	}
	switch {
	case !fits:
		return fmt.Errorf("answered %s, want %s", status, h.want)
	case status != "none" && !strings.Contains(head, "X-Content-Type-Options: nosniff"):
		return fmt.Errorf("answered %s without the header for browsers", status)
	case strings.Contains(head, "Access-Control-"):
		return errors.New("has a CORS header")
	case h.kind == "smuggling" && strings.Count(answer, "HTTP/1.1 ")-strings.Count(rest, "HTTP/1.1 400 ") > 1:
		return errors.New("answered twice")
	}
	return nil
}
