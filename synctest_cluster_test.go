package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/httpapi"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
	"raftrv/internal/watch"
)

// These tests run whole nodes, goroutines and all, in virtual time: the loop, the log on a real disk, the HTTP
// front on pipes. Only the network between the nodes is made of memory. Time stands still while anything can
// run, so deadlines can be checked to the microsecond and waiting costs nothing; a goroutine that is left over
// fails the test with its stack. What is not reproducible here is which of several goroutines goes first: for
// that there is the simulator.

// virtualLatency is how long a message is on its way.
const virtualLatency = time.Millisecond

// virtualCluster is a cluster in a bubble of virtual time.
type virtualCluster struct {
	t     *testing.T
	nodes []*virtualNode

	mu   sync.Mutex
	cut  map[uint64]bool // nodes that nobody reaches
	loss float64         // share of messages that get lost
}

// virtualNode is one node of it.
type virtualNode struct {
	*node
	cluster *virtualCluster
	disk    *storage
	server  *http.Server
	client  http.Client
	endLoop context.CancelFunc
	ended   chan error // what run returned
}

// nobodyThere takes the place of the network, for questions to other members.
type nobodyThere struct{}

func (nobodyThere) RoundTrip(*http.Request) (*http.Response, error) { return nil, errUnavailable }

// newVirtualCluster starts three nodes and waits until they have a leader. It must be called inside a bubble.
func newVirtualCluster(t *testing.T) *virtualCluster {
	t.Helper()
	smallSegments(t)
	// Who looks up the first name of a process in a bubble takes the resolver into it, and whoever needs it outside panics.
	before := peerClient.Transport
	peerClient.Transport = nobodyThere{}
	t.Cleanup(func() { peerClient.Transport = before })
	const size = 3
	c := &virtualCluster{t: t, cut: map[uint64]bool{}}
	var urls []string
	for i := range size {
		urls = append(urls, fmt.Sprintf("http://virtual:%d", i+1))
	}
	dir := t.TempDir()
	for i := range size {
		c.nodes = append(c.nodes, c.newNode(configOf(t, "--id", strconv.Itoa(i+1), "--cluster", strings.Join(urls, ","),
			"--data-dir", filepath.Join(dir, strconv.Itoa(i+1)))))
	}
	for _, n := range c.nodes {
		n.start()
	}
	for c.leader() == nil {
		time.Sleep(10 * time.Millisecond)
	}
	return c
}

// configOf returns what a command line means.
func configOf(t *testing.T, args ...string) config {
	t.Helper()
	var cfg config
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	cfg.flags(flags)
	testkit.Must(t, flags.Parse(args))
	testkit.Must(t, cfg.validate())
	return cfg
}

func (c *virtualCluster) newNode(cfg config) *virtualNode {
	t := c.t
	t.Helper()
	logger := zap.NewNop()
	disk, err := openStorage(cfg.dataDir, logger)
	testkit.Must(t, err)
	rec, err := disk.load()
	testkit.Must(t, err)
	if rec == nil {
		own := newFounding(&cfg)
		own.Directory = cfg.id // the nodes cannot ask each other
		founders := slices.Clone(own.Members)
		for i, m := range founders {
			founders[i].Directory = m.ID
		}
		rec, err = disk.found(own, own.clusterID(founders), founders)
		testkit.Must(t, err)
	}
	kv := &store.Store{State: rec.state}
	hub := watch.NewHub(kv)
	n := &virtualNode{
		node:    &node{kvstore: &kvstore{loop: newLoop(cfg.tick, hub.Notify, logger), config: cfg, store: kv, hub: hub}, logger: logger},
		cluster: c,
		disk:    disk,
		ended:   make(chan error, 1),
	}
	n.admission = newAdmission(&n.config, kv, n.loop.waiting, logger)
	r, err := newReplica(replicaConfig{
		id: cfg.id, session: randomID(), electionTicks: cfg.electionTicks, heartbeatTicks: cfg.heartbeatTicks,
		snapshotEntries: cfg.snapshotEntries, snapshotBytes: cfg.snapshotBytes,
		catchUpEntries: catchUpEntriesDefault, log: rec.log, store: n.store,
		confState: rec.confState, disk: disk, transport: n, driver: n.loop, logger: logger,
	})
	testkit.Must(t, err)
	n.loop.replica = r
	return n
}

// start starts what server.go starts, except for the peers' side.
func (n *virtualNode) start() {
	ctx, cancel := context.WithCancel(context.Background())
	n.endLoop = cancel
	go func() { n.ended <- n.loop.run(ctx, n.loop.replica, func(context.Context) error { return nil }) }()
	hubEnded := make(chan struct{})
	go func() {
		defer close(hubEnded)
		_ = n.hub.Run(ctx) // ends with ctx only
	}()
	pipes := testkit.NewPipeListener()
	n.server = httpapi.NewServer(httpapi.New(httpapi.Config{
		Client: peerClient,
		ID:     n.config.id, Store: n.kvstore, Logger: n.logger, Timeout: n.config.requestTimeout,
		ValueSizeMax: n.config.valueSizeMax, Version: "test", NewID: httpapi.NewUUID, Hosts: []string{"virtual"},
		Registry: prometheus.NewRegistry(), Checks: httpapi.ClusterChecks(n.node),
	}), n.logger)
	serverEnded := make(chan struct{})
	go func() {
		defer close(serverEnded)
		_ = n.server.Serve(pipes) // http.ErrServerClosed
	}()
	n.client.Transport = &http.Transport{
		DialContext:         func(context.Context, string, string) (net.Conn, error) { return pipes.Dial() },
		MaxIdleConnsPerHost: 1000,
	}
	n.cluster.t.Cleanup(func() {
		n.client.CloseIdleConnections()
		_ = n.server.Close() // its connections are pipes
		<-serverEnded
		n.endLoop()
		<-n.loop.done
		<-hubEnded
		testkit.Must(n.cluster.t, n.disk.close())
	})
}

// send implements transport.
func (n *virtualNode) send(msgs []*raftpb.Message) {
	for _, m := range msgs {
		m := proto.Clone(m).(*raftpb.Message) // raft goes on using what it sent
		time.AfterFunc(virtualLatency, func() { n.cluster.deliver(m) })
	}
}

// setMembers implements transport.
func (n *virtualNode) setMembers([]store.Member) {}

// deliver takes a message to its receiver, unless something is in the way.
func (c *virtualCluster) deliver(m *raftpb.Message) {
	c.mu.Lock()
	lost := c.cut[m.GetFrom()] || c.cut[m.GetTo()] || rand.Float64() < c.loss
	c.mu.Unlock()
	from, to := c.nodes[m.GetFrom()-1], c.nodes[m.GetTo()-1]
	if m.GetType() != raftpb.MsgSnap {
		if !lost {
			_ = to.loop.deliver(message{Message: m}) // full or ended: lost, too
		}
		return
	}
	status := raft.SnapshotFailure
	meta := m.GetSnapshot().GetMetadata()
	if body, err := from.disk.readBody(meta.GetIndex(), meta.GetTerm()); err == nil && !lost {
		if err := to.loop.deliver(message{Message: m, body: &body}); err == nil {
			status = raft.SnapshotFinish
		}
	}
	from.loop.reportSnapshot(m.GetTo(), status)
}

// isolate cuts nodes off from all others, and connects the rest.
func (c *virtualCluster) isolate(nodes ...*virtualNode) {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.cut)
	for _, n := range nodes {
		c.cut[n.config.id] = true
	}
}

// lose makes a share of all messages get lost.
func (c *virtualCluster) lose(share float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.loss = share
}

// leader returns the node that the majority takes for the leader, or nil.
func (c *virtualCluster) leader() *virtualNode {
	votes := map[uint64]int{}
	for _, n := range c.nodes {
		s := n.Status()
		if votes[s.LeaderID]++; s.LeaderID != 0 && votes[s.LeaderID] > len(c.nodes)/2 {
			return c.nodes[s.LeaderID-1]
		}
	}
	return nil
}

// followers returns all other nodes.
func (c *virtualCluster) followers() []*virtualNode {
	var followers []*virtualNode
	for leader, i := c.leader(), 0; i < len(c.nodes); i++ {
		if c.nodes[i] != leader {
			followers = append(followers, c.nodes[i])
		}
	}
	return followers
}

// virtualReply is an answer, and how long it took.
type virtualReply struct {
	status int
	header http.Header
	body   string
	took   time.Duration
}

// do sends a request to the node.
func (n *virtualNode) do(method, target, body string, headers ...string) virtualReply {
	n.cluster.t.Helper()
	req, err := http.NewRequest(method, "http://virtual"+target, strings.NewReader(body))
	testkit.Must(n.cluster.t, err)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	start := time.Now()
	res, err := n.client.Do(req)
	if err != nil {
		return virtualReply{body: err.Error(), took: time.Since(start)}
	}
	defer res.Body.Close()
	var b bytes.Buffer
	if _, err := io.Copy(&b, res.Body); err != nil {
		return virtualReply{body: err.Error(), took: time.Since(start)}
	}
	return virtualReply{res.StatusCode, res.Header, b.String(), time.Since(start)}
}

func (r virtualReply) String() string {
	return fmt.Sprintf("%d %.200s after %v", r.status, strings.TrimSpace(r.body), r.took)
}

// TestVirtual_MessageDelays: a healthy cluster waits for messages and for nothing else, no tick and no timer.
func TestVirtual_MessageDelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		leader, follower := c.leader(), c.followers()[0]
		time.Sleep(time.Second) // the first entry of the term is committed
		tests := []struct {
			name   string
			node   *virtualNode
			method string
			delays int
		}{
			{"write at the leader: append, answer", leader, http.MethodPut, 2},
			{"write at a follower: the same, and there and back", follower, http.MethodPut, 4},
			{"read at the leader: heartbeat, answer", leader, http.MethodGet, 2},
			{"read at a follower: the same, and there and back", follower, http.MethodGet, 4},
		}
		for _, tt := range tests {
			r := tt.node.do(tt.method, "/k", "v")
			if want := time.Duration(tt.delays) * virtualLatency; r.status/100 != 2 || r.took != want {
				t.Errorf("%s: %v, want %v", tt.name, r, want)
			}
			time.Sleep(time.Second)
		}
	})
}

// TestVirtual_LeaderCutOff: clients of the others wait for the election and get no error; clients of the old
// leader get an answer by their deadline.
func TestVirtual_LeaderCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		leader, followers := c.leader(), c.followers()
		const timeout = 2 * time.Second
		var wg sync.WaitGroup
		ask := func(n *virtualNode, check func(virtualReply)) {
			for i := range 20 {
				wg.Go(func() {
					time.Sleep(time.Duration(i) * time.Millisecond / 2) // some before the cut, some after it
					check(n.do(http.MethodPut, fmt.Sprintf("/%d-%d?timeout=%v", n.config.id, i, timeout), "v"))
				})
			}
		}
		for _, n := range followers {
			ask(n, func(r virtualReply) {
				// Two election timeouts at most, or rarely four: when both candidates ask at the same time.
				if r.status != http.StatusCreated || r.took > 4*20*10*time.Millisecond {
					t.Errorf("at a survivor: %v", r)
				}
			})
		}
		ask(leader, func(r virtualReply) {
			if r.status != http.StatusCreated && r.status != 503 && r.status != 504 || r.took > timeout+waitGrace {
				t.Errorf("at the old leader: %v", r)
			}
		})
		time.Sleep(5 * time.Millisecond)
		c.isolate(leader)
		wg.Wait()
		if r := leader.do(http.MethodGet, "/2-1?timeout=1s", ""); r.status != 503 {
			t.Errorf("linearizable read at the old leader: %v", r)
		}
		c.isolate()
		time.Sleep(time.Second)
		for _, n := range c.nodes {
			for _, f := range followers {
				if r := n.do(http.MethodGet, fmt.Sprintf("/%d-19", f.config.id), ""); r.body != "v" {
					t.Errorf("node %d: %v", n.config.id, r)
				}
			}
		}
	})
}

// TestVirtual_NoMajority: every request gets its answer at its deadline, not before and not later.
func TestVirtual_NoMajority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		n := c.leader()
		if r := n.do(http.MethodPut, "/kept", "v"); r.status != http.StatusCreated {
			t.Fatal(r)
		}
		c.isolate(c.followers()...)
		var wg sync.WaitGroup
		for i := range 500 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				timeout := time.Duration(1+i%7) * 100 * time.Millisecond
				// In the first moments the node does not know yet that it leads nobody.
				r := n.do(http.MethodPut, fmt.Sprintf("/%d?timeout=%v", i, timeout), "v")
				unknown := r.status == 504 && strings.Contains(r.body, `"unknown"`)
				refused := (r.status == 503 || r.status == 504) && strings.Contains(r.body, `"not_applied"`)
				if !unknown && !refused || r.took < timeout || r.took > timeout+waitGrace {
					t.Errorf("PUT with timeout=%v at %d ms: %v", timeout, i, r)
				}
				r = n.do(http.MethodGet, fmt.Sprintf("/kept?timeout=%v", timeout), "")
				// Nor do the others that they have lost it.
				if r.status != 503 && (r.status != 504 || i > 300) || r.took < timeout || r.took > timeout+waitGrace {
					t.Errorf("GET with timeout=%v at %d ms: %v", timeout, i, r)
				}
			})
		}
		wg.Wait()
		if r := n.do(http.MethodGet, "/kept?resourceVersion=0", ""); r.body != "v" || r.took != 0 {
			t.Errorf("GET of what the node has: %v", r)
		}
	})
}

// TestVirtual_DeadWritesLeaveNothing: writes that timed out for want of a leader are gone, not kept for the
// next leader to replicate.
func TestVirtual_DeadWritesLeaveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		n := c.leader()
		c.isolate(c.followers()...)
		time.Sleep(time.Second) // it has noticed
		value := strings.Repeat("v", 100<<10)
		for range 10 {
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() {
					if r := n.do(http.MethodPut, "/k?timeout=1s", value); r.status != 503 || !strings.Contains(r.body, "no-leader") {
						t.Errorf("PUT: %v", r)
					}
				})
			}
			wg.Wait()
		}
		n.loop.mu.Lock()
		size := n.loop.inbox.queueSize
		n.loop.mu.Unlock()
		if size > batchSizeMax+len(value) {
			t.Errorf("%d bytes wait for a leader, though nobody waits for them", size)
		}
		c.isolate()
		time.Sleep(time.Second)
		if r := n.do(http.MethodPut, "/k", "w"); r.status != http.StatusCreated || r.header.Get("Resource-Version") != "1" {
			t.Errorf("PUT after it: %v %v", r, r.header)
		}
	})
}

// TestVirtual_LoopEnds: whoever waits when the loop ends is told at once what became of it, and so is who comes later.
func TestVirtual_LoopEnds(t *testing.T) {
	for _, cause := range []error{nil, errors.New("the disk failed")} {
		synctest.Test(t, func(t *testing.T) {
			c := newVirtualCluster(t)
			n := c.leader()
			c.isolate(c.followers()...)
			says := "retry at another node"
			if cause != nil {
				says = "stopped after an error"
			}
			refused := func(method string, r virtualReply) bool {
				isWrite := method == http.MethodPut
				return r.status == 503 && strings.Contains(r.body, `"shutting-down"`) && strings.Contains(r.body, says) &&
					strings.Contains(r.body, `"not_applied"`) == isWrite
			}
			var open atomic.Int64 // writes whose outcome nobody knows
			var wg sync.WaitGroup
			for i := range 30 {
				wg.Go(func() {
					method := [...]string{http.MethodPut, http.MethodGet}[i%2]
					r := n.do(method, "/k", "v")
					if method == http.MethodPut && r.status == 504 && strings.Contains(r.body, `"unknown"`) {
						open.Add(1)
					} else if !refused(method, r) {
						t.Errorf("%s: %v", method, r)
					}
					if r.took != 100*time.Millisecond {
						t.Errorf("%s: %v", method, r)
					}
				})
			}
			time.Sleep(100 * time.Millisecond)
			if cause == nil {
				n.endLoop()
			} else {
				n.loop.call(func() error { return cause })
			}
			wg.Wait()
			if open.Load() == 0 {
				t.Error("what was proposed is refused, although it may still happen")
			}
			if err := <-n.ended; !errors.Is(err, cause) {
				t.Error(err)
			}
			if r := n.do(http.MethodPut, "/k", "v"); !refused(http.MethodPut, r) || r.took != 0 {
				t.Errorf("PUT after the end: %v", r)
			}
		})
	}
}

// TestVirtual_DiskFails: an error of the disk ends the loop, and nobody who waits is told that it went well.
func TestVirtual_DiskFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		n := c.leader()
		broken := errors.New("disk on fire")
		failing := make(chan struct{})
		n.loop.call(func() error {
			n.loop.replica.hook = func(point string) error {
				if point != "before-save" {
					return nil
				}
				close(failing)
				return broken
			}
			return nil
		})
		r := n.do(http.MethodPut, "/k", "v")
		<-failing
		if r.status != 504 && r.status != 503 || r.took > time.Second {
			t.Errorf("PUT: %v", r)
		}
		if err := <-n.ended; !errors.Is(err, broken) {
			t.Errorf("the loop ended with %v", err)
		}
		if r := n.do(http.MethodGet, "/-/livez", ""); r.status != http.StatusOK {
			t.Errorf("livez: %v", r)
		}
	})
}

// TestVirtual_HandOver: a leader that stops hands over first, and clients of the others hardly notice.
func TestVirtual_HandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		leader, follower := c.leader(), c.followers()[0]
		time.Sleep(time.Second)
		stopped := make(chan struct{})
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				var slowest time.Duration
				for j := 0; ; j++ {
					select {
					case <-stopped:
						if slowest > 100*time.Millisecond { // an election takes at least 200
							t.Errorf("a write took %v", slowest)
						}
						return
					default:
					}
					r := follower.do(http.MethodPut, fmt.Sprintf("/%d/%d", i, j), "v")
					if r.status != http.StatusCreated {
						t.Errorf("PUT: %v", r)
					}
					slowest = max(slowest, r.took)
				}
			})
		}
		inFlight := make(chan virtualReply)
		go func() { inFlight <- leader.do(http.MethodPut, "/last", "v") }()
		start := time.Now()
		leader.transferLeadership()
		if took := time.Since(start); took > 50*time.Millisecond {
			t.Errorf("handing over took %v", took)
		}
		if r := <-inFlight; r.status != http.StatusCreated {
			t.Errorf("in flight: %v", r)
		}
		leader.client.CloseIdleConnections()
		testkit.Must(t, leader.server.Shutdown(t.Context()))
		leader.endLoop()
		time.Sleep(time.Second)
		close(stopped)
		wg.Wait()
	})
}

// TestVirtual_Churn: many goroutines, a bad network and a leader that changes all the time. It is here for the
// race detector; the simulator finds more, but runs on one goroutine.
func TestVirtual_Churn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		c.lose(0.02)
		const clients = 12
		end := time.Now().Add(5 * time.Second)
		acked := make([]int, clients) // number of the last acknowledged write
		var wg sync.WaitGroup
		for i := range clients {
			n := c.nodes[i%len(c.nodes)]
			wg.Go(func() {
				for j := 1; time.Now().Before(end); j++ {
					time.Sleep(10 * time.Millisecond) // spares the disk, which is real
					r := n.do(http.MethodPut, fmt.Sprintf("/%d?timeout=500ms", i), strconv.Itoa(j))
					switch {
					case r.took > 500*time.Millisecond+waitGrace || r.status/100 != 2 && r.status != 503 && r.status != 504:
						t.Errorf("PUT: %v", r)
					case r.status/100 == 2:
						acked[i] = j
					}
					r = n.do(http.MethodGet, fmt.Sprintf("/%d?timeout=500ms", i), "")
					if got, _ := strconv.Atoi(r.body); r.status == http.StatusOK && got < acked[i] {
						t.Errorf("read %d after %d was acknowledged", got, acked[i])
					}
				}
			})
		}
		for time.Now().Before(end) {
			time.Sleep(time.Duration(rand.IntN(800)) * time.Millisecond)
			c.isolate(c.nodes[rand.IntN(len(c.nodes))])
			time.Sleep(time.Duration(rand.IntN(800)) * time.Millisecond)
			c.isolate()
		}
		wg.Wait()
		c.lose(0)
		time.Sleep(3 * time.Second)
		total := 0
		for i, want := range acked {
			total += want
			for _, n := range c.nodes {
				r := n.do(http.MethodGet, fmt.Sprintf("/%d", i), "")
				if got, _ := strconv.Atoi(r.body); got < want {
					t.Errorf("node %d has write %d of client %d, but %d was acknowledged: %v", n.config.id, got, i, want, r)
				}
			}
		}
		if total == 0 {
			t.Error("nothing was written")
		}
	})
}

// A write whose client was told that nobody knows what became of it ends soon: it is not proposed any longer because
// others wait for their turn beside it. Else it would come back over what its client has read and written since.
func TestVirtual_GivenUpEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		time.Sleep(time.Second)
		cutOff := c.followers()[0]
		healthy := c.nodes[0]
		if healthy == cutOff {
			healthy = c.nodes[1]
		}
		c.isolate(cutOff)
		const pairs = 40
		key := func(i int) string { return fmt.Sprintf("/k%d", i) }
		var impatient, patient sync.WaitGroup
		for i := range pairs {
			impatient.Go(func() {
				if r := cutOff.do(http.MethodPut, key(i)+"?timeout=100ms", "old"); r.status < 500 {
					t.Errorf("%s at the node that is cut off: %v", key(i), r)
				}
			})
			patient.Go(func() {
				if r := cutOff.do(http.MethodPut, fmt.Sprintf("/o%d?timeout=60s", i), "x"); r.status != http.StatusCreated {
					t.Errorf("a request that waited for the network: %v", r)
				}
			})
		}
		impatient.Wait()
		for i := range pairs {
			if r := healthy.do(http.MethodGet, key(i), ""); r.status != http.StatusNotFound {
				t.Fatal(r)
			}
			if r := healthy.do(http.MethodPut, key(i), "new"); r.status != http.StatusCreated {
				t.Fatal(r)
			}
		}
		time.Sleep(30 * time.Second)
		c.isolate()
		patient.Wait()
		for i := range pairs {
			if r := healthy.do(http.MethodGet, key(i), ""); r.body != "new" {
				t.Errorf("%s, which was given up 30 s before the network was back: %v", key(i), r)
			}
		}
	})
}

// A batch of which nobody waits for anything is forgotten at once, and makes room for the next.
func TestReplica_AbandonedBatch(t *testing.T) {
	s, leader := newScenario(t, defaultSimConfig(1, 3))
	follower := s.node(leader.id%3 + 1)
	s.network.isolate(follower.id, true)
	ops := []*simOp{s.begin(follower, putOp("a", "1"), 100*time.Millisecond), s.begin(follower, putOp("b", "1"), 100*time.Millisecond)}
	if !s.runUntil(time.Second, func() bool { return ops[0].ended() && ops[1].ended() }) {
		t.Fatal("no answer")
	}
	s.run(20 * time.Millisecond)
	if r := follower.process.replica; len(r.pending) != 0 {
		t.Errorf("%d batches are still proposed", len(r.pending))
	}
	s.network.heal()
	s.judge(t)
}

// A node that was paused proposes nothing that nobody waits for any more, even if those who gave up have not got to say
// so yet, and somebody waits for the rest of the batch.
func TestReplica_LateCommands(t *testing.T) {
	for _, offered := range []bool{false, true} {
		s, leader := newScenario(t, defaultSimConfig(1, 3))
		follower := s.node(leader.id%3 + 1)
		s.network.isolate(follower.id, true)
		if !offered {
			s.run(time.Second) // it has no leader then
		}
		p := follower.process
		enqueue := func(value string, timeout time.Duration) (*batch, int) {
			b, i, err := p.loop.enqueue(&store.Command{Op: store.OpPut, Key: "k", Value: value}, follower.clock().Add(timeout))
			testkit.Must(t, err)
			return b, i
		}
		b, early := enqueue("early", 10*time.Second)
		_, late := enqueue("late", 100*time.Millisecond)
		p.wake()
		s.run(3 * time.Second)
		s.network.heal()
		if !s.runUntil(3*time.Second, func() bool { return isClosed(b.done) }) || b.err != nil {
			t.Fatalf("no answer: %v", b.err)
		}
		if b.results[early].Status != store.StatusCreated || b.results[late].Status != store.StatusNone {
			t.Errorf("offered before: %v; came to %+v", offered, b.results)
		}
		s.judge(t)
	}
}
