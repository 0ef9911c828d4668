package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// This file is what the tests with real processes are made of: a cluster, its clients, and load. Everything
// that clients do goes into one history, which is judged at the end.

// liveBinary is the program, built once for all tests of this process.
var liveBinary struct {
	once sync.Once
	dir  string
	err  error
}

// TestMain runs the tests at the root of the module, which they build, and whose
// pages they read.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := os.Chdir(".."); err != nil {
		panic(err)
	}
	syscall.Umask(syscall.Umask(0) | 0o022) // t.TempDir leaves it to that whether the group may write
	code := m.Run()
	if liveBinary.dir != "" {
		_ = os.RemoveAll(liveBinary.dir) // among the temporary files, in the worst case
	}
	os.Exit(code)
}

func buildLiveBinary(t testing.TB) string {
	t.Helper()
	b := &liveBinary
	b.once.Do(func() {
		if b.dir, b.err = os.MkdirTemp("", "raftrv-binary-"); b.err != nil {
			return
		}
		out, err := exec.Command("go", "build", fmt.Sprintf("-race=%v", *testkit.LiveRace), "-o", filepath.Join(b.dir, "raftrv"), ".").CombinedOutput()
		if err != nil {
			b.err = fmt.Errorf("build: %w\n%s", err, out)
		}
	})
	testkit.Must(t, b.err)
	return filepath.Join(b.dir, "raftrv")
}

// liveTimeout bounds every single wait for a cluster that should be able to go on.
const liveTimeout = 30 * time.Second

// liveCluster is a cluster of real processes that ends with its test.
type liveCluster struct {
	*proc.Cluster
	t       *testing.T
	dir     string
	history *liveHistory
	clients atomic.Int64 // client ids given out
	values  atomic.Int64 // values given out: each is written once

	mu        sync.Mutex
	surprises liveVerdict // answers that no client should ever get
	disturbed map[int]int // node id -> see disturbances
}

// newLiveCluster starts a cluster and waits until it is ready.
func newLiveCluster(t *testing.T, opts proc.Options) *liveCluster {
	t.Helper()
	c := newIdleLiveCluster(t, opts)
	c.start()
	return c
}

// newIdleLiveCluster is newLiveCluster before the start.
func newIdleLiveCluster(t *testing.T, opts proc.Options) *liveCluster {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes")
	}
	if opts.Binary == "" {
		opts.Binary = buildLiveBinary(t)
	}
	dir, err := os.MkdirTemp("", "raftrv-live-")
	testkit.Must(t, err)
	opts.Dir = dir
	cluster, err := proc.NewCluster(opts)
	testkit.Must(t, err)
	c := &liveCluster{Cluster: cluster, t: t, dir: dir, history: newLiveHistory(), disturbed: map[int]int{}}
	done := make(chan struct{})
	go c.history.watchStalls(done)
	t.Cleanup(func() {
		close(done)
		if err := cluster.Stop(); err != nil {
			t.Error(err)
		}
		for _, n := range cluster.Nodes {
			if b, err := os.ReadFile(n.LogFile); err == nil && bytes.Contains(b, []byte("DATA RACE")) {
				t.Errorf("node %d has a data race; see %s", n.ID, n.LogFile)
			}
		}
		if t.Failed() {
			t.Logf("logs and data are in %s", dir)
			return
		}
		testkit.Must(t, os.RemoveAll(dir))
	})
	return c
}

// context bounds one wait.
func (c *liveCluster) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), liveTimeout)
	c.t.Cleanup(cancel)
	return ctx
}

// start starts every node that has no process and waits until all are ready.
func (c *liveCluster) start() {
	c.t.Helper()
	testkit.Must(c.t, c.Start(c.context()))
	c.undisturbed()
}

func (c *liveCluster) leader() *proc.Node {
	c.t.Helper()
	n, err := c.Leader(c.context())
	testkit.Must(c.t, err)
	return n
}

// others returns the nodes that are not among the given ones.
func (c *liveCluster) others(not ...*proc.Node) []*proc.Node {
	return slices.DeleteFunc(slices.Clone(c.Nodes), func(n *proc.Node) bool { return slices.Contains(not, n) })
}

// disturb begins something that the clients of a node may notice. Requests that overlap it have no deadline.
func (c *liveCluster) disturb(n *proc.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.disturbed[n.ID] += 1 + c.disturbed[n.ID]%2
}

// disturbances returns a number that is odd while something disturbs the node, and grows each time.
func (c *liveCluster) disturbances(n *proc.Node) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.disturbed[n.ID]
}

// undisturbed ends the disturbance of every node that suffers one.
func (c *liveCluster) undisturbed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, n := range c.disturbed {
		c.disturbed[id] = n + n%2
	}
}

// kill kills nodes at the same time, as far as that goes.
func (c *liveCluster) kill(nodes ...*proc.Node) {
	c.t.Helper()
	errC := make(chan error, len(nodes))
	for _, n := range nodes {
		go func() {
			c.disturb(n)
			errC <- n.Kill()
		}()
	}
	for range nodes {
		if err := <-errC; err != nil {
			c.t.Error(err)
		}
	}
}

// stop stops a node as an administrator does.
func (c *liveCluster) stop(n *proc.Node) {
	c.t.Helper()
	c.disturb(n)
	if err := n.Stop(c.context()); err != nil { // the exit status was not 0, or it took too long
		c.t.Error(err)
	}
}

// terms returns the raft term of each node: if none has changed, no leader has.
func (c *liveCluster) terms() []uint64 {
	c.t.Helper()
	var terms []uint64
	for _, n := range c.Nodes {
		s, err := n.Status(c.context())
		testkit.Must(c.t, err)
		terms = append(terms, s.Term)
	}
	return terms
}

// eventually waits until check returns nil.
func (c *liveCluster) eventually(check func() error) {
	c.t.Helper()
	deadline := time.Now().Add(liveTimeout)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// newValue returns a value that nobody has written, of at least size bytes.
func (c *liveCluster) newValue(size int) string {
	v := fmt.Sprintf("v%d.", c.values.Add(1))
	return v + strings.Repeat(".", max(0, size-len(v)))
}

// liveClient sends one request at a time to one node.
type liveClient struct {
	c       *liveCluster
	node    *proc.Node
	id      int
	timeout time.Duration // that it asks the node for
	// patience is how long it waits beyond that before it gives up by itself. Long enough to see how late an
	// answer is.
	patience time.Duration
	http     http.Client

	// For steps of a load that have something to remember.
	requests  int
	writesNew bool
}

func (c *liveCluster) client(n *proc.Node) *liveClient {
	return &liveClient{
		c: c, node: n, id: int(c.clients.Add(1)), timeout: 5 * time.Second, patience: 2 * time.Second,
		http: http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1, DisableCompression: true}},
	}
}

func (l *liveClient) close() { l.http.CloseIdleConnections() }

// keyURL returns the URL of a key, every byte of it escaped that could mean something.
func keyURL(n *proc.Node, key string) string { return n.URL() + httpapi.KeyPath(key) }

// liveReply is an answer, or why there is none.
type liveReply struct {
	err     error
	status  int
	header  http.Header
	body    []byte
	problem httpapi.Problem // of an error
	took    time.Duration   // from first byte to last
}

// rv returns the Resource-Version header.
func (r *liveReply) rv() uint64 { return parseRV(r.header.Get("Resource-Version")) }

// etag returns the resource version in the ETag header.
func (r *liveReply) etag() uint64 { return parseRV(strings.Trim(r.header.Get("ETag"), `"`)) }

func parseRV(s string) uint64 {
	n, _ := strconv.ParseUint(s, 10, 64) // 0 is no version
	return n
}

// do sends a request and reads the whole answer. Headers are pairs of name and value.
func (l *liveClient) do(method, url, body string, headers ...string) *liveReply {
	ctx, cancel := context.WithTimeout(context.Background(), l.timeout+l.patience)
	defer cancel()
	var r liveReply
	start := time.Now()
	r.err = func() error {
		req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
		if err != nil {
			return err
		}
		// With an Idempotency-Key Go would send it again by itself, and hide that the first attempt may have
		// happened. It cannot without this.
		req.GetBody = nil
		for i := 0; i < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		res, err := l.http.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		r.status, r.header = res.StatusCode, res.Header
		r.body, err = io.ReadAll(res.Body)
		return err
	}()
	r.took = time.Since(start)
	if r.err == nil && r.header.Get("Content-Type") == "application/problem+json" {
		r.err = json.Unmarshal(r.body, &r.problem)
	}
	return &r
}

// raw sends a request that is no part of the history.
func (l *liveClient) raw(method, key, query, body string) *liveReply {
	return l.do(method, keyURL(l.node, key)+query, body)
}

// request sends a request with the client's deadline and records what became of it.
func (l *liveClient) request(o *liveOp, value string, headers ...string) *liveOp {
	o.client, o.value = l.id, digest(value)
	o.start = l.c.history.now()
	l.try(o, value, headers...)
	l.c.history.add(o)
	return o
}

// try sends a request once.
func (l *liveClient) try(o *liveOp, value string, headers ...string) {
	method := [...]string{http.MethodPut, http.MethodGet, http.MethodDelete, http.MethodPut}[o.kind]
	o.node = l.node.ID
	before, start := l.c.disturbances(l.node), l.c.history.now()
	r := l.do(method, keyURL(l.node, o.key)+"?timeout="+url.QueryEscape(l.timeout.String()), value, headers...)
	o.end = l.c.history.now()
	if after := l.c.disturbances(l.node); after == before && after%2 == 0 {
		o.late = max(o.late, o.end-start-l.timeout)
	}
	l.judge(o, r)
	if o.outcome == liveUnknown {
		// The request may still be on its way, so whatever comes next comes from somebody else.
		l.id = int(l.c.clients.Add(1))
		l.http.CloseIdleConnections()
	}
}

// judge says what a reply means.
func (l *liveClient) judge(o *liveOp, r *liveReply) {
	o.outcome = liveDone
	switch {
	case neverSent(r.err):
		o.outcome = liveRefused
	case r.err != nil:
		o.outcome = liveUnknown
	case o.kind == liveGet && r.status == http.StatusOK:
		o.found, o.value, o.itemRV, o.rv = true, digest(string(r.body)), r.etag(), r.rv()
	case o.isPut() && (r.status == http.StatusCreated || r.status == http.StatusNoContent),
		o.kind == liveDelete && r.status == http.StatusNoContent:
		o.wrote, o.rv = true, r.rv()
	case !o.isPut() && r.status == http.StatusNotFound && r.problem.Code == "not-found":
		o.rv = r.rv()
	case o.kind == livePutIf && r.status == http.StatusPreconditionFailed:
		o.itemRV, o.rv = r.etag(), r.rv()
	case o.kind == liveGet && r.status >= 500:
		o.outcome = liveUnknown
	case r.problem.Outcome == fault.NotApplied && (r.status == http.StatusServiceUnavailable || r.status == http.StatusInsufficientStorage || r.status == http.StatusGatewayTimeout):
		o.outcome = liveRefused
	case r.problem.Outcome == fault.Unknown && (r.status == http.StatusGatewayTimeout || o.keyed && r.status > http.StatusInternalServerError && r.problem.Retryable):
		o.outcome = liveUnknown
	default:
		o.outcome = liveUnknown
		l.c.surprise("%v\n\tgot %d %s", o, r.status, bytes.TrimSpace(r.body))
	}
	if o.wrote && (o.rv == 0 || o.isPut() && r.etag() != o.rv) {
		l.c.surprise("%v\n\thas Resource-Version %d but ETag %d", o, o.rv, r.etag())
	}
}

// digest returns what a history keeps of a value: all of it, unless it is large.
func digest(value string) string {
	if len(value) <= 64 {
		return value
	}
	return fmt.Sprintf("%.20s %d bytes, CRC %08x", value, len(value), crc32.ChecksumIEEE([]byte(value)))
}

// neverSent says whether an error means that nobody has seen the request.
func neverSent(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial" && errors.Is(err, syscall.ECONNREFUSED)
}

func (c *liveCluster) surprise(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.surprises.addf(format, args...)
}

func (l *liveClient) put(key, value string) *liveOp {
	return l.request(&liveOp{kind: livePut, key: key}, value)
}

func (l *liveClient) get(key string) *liveOp {
	return l.request(&liveOp{kind: liveGet, key: key}, "")
}

func (l *liveClient) delete(key string) *liveOp {
	return l.request(&liveOp{kind: liveDelete, key: key}, "")
}

// replace writes a key if it is still as it was read.
func (l *liveClient) replace(read *liveOp, value string) *liveOp {
	o := &liveOp{kind: livePutIf, key: read.key, ifRV: read.itemRV, ifValue: read.value}
	if !read.found {
		return l.request(o, value, "If-None-Match", "*")
	}
	return l.request(o, value, "If-Match", fmt.Sprintf("%q", strconv.FormatUint(read.itemRV, 10)))
}

// putOnce writes a new key and, as long as it gets no answer, sends the same request again, to whatever node.
// For the history this is one request: the cluster must take it for one, too.
func (l *liveClient) putOnce() *liveOp {
	value := l.c.newValue(64)
	id := strings.TrimRight(value, ".")
	o := &liveOp{kind: livePut, keyed: true, key: "once/" + id, client: l.id, value: value, start: l.c.history.now()}
	maybe := false // an earlier attempt may have happened
	for range 5 {
		l.try(o, value, "Idempotency-Key", id)
		if o.outcome == liveDone {
			break
		}
		maybe = maybe || o.outcome == liveUnknown
		l.node = l.c.Nodes[rand.IntN(len(l.c.Nodes))]
		l.http.CloseIdleConnections()
	}
	if maybe && o.outcome == liveRefused {
		o.outcome = liveUnknown
	}
	l.c.history.add(o)
	return o
}

// putNew writes a new key.
func (l *liveClient) putNew() *liveOp {
	v := l.c.newValue(64)
	return l.put("new/"+strings.TrimRight(v, "."), v)
}

// mustPut writes and expects success.
func (l *liveClient) mustPut(key, value string) *liveOp {
	l.c.t.Helper()
	o := l.put(key, value)
	if o.outcome != liveDone {
		l.c.t.Fatalf("not written: %v", o)
	}
	return o
}

// version returns the store's resource version, linearizable.
func (l *liveClient) version() uint64 {
	l.c.t.Helper()
	r := l.do(http.MethodGet, l.node.URL()+"/", "")
	testkit.Must(l.c.t, r.err)
	if r.status != http.StatusOK {
		l.c.t.Fatalf("GET /: %d %s", r.status, r.body)
	}
	return r.rv()
}

// liveLoad is clients that go on until they are stopped.
type liveLoad struct {
	stopping atomic.Bool
	clients  sync.WaitGroup
}

// load starts clients, spread over nodes, that repeat step.
func (c *liveCluster) load(clients int, nodes []*proc.Node, step func(l *liveClient)) *liveLoad {
	load := &liveLoad{}
	for i := range clients {
		load.clients.Go(func() {
			l := c.client(nodes[i%len(nodes)])
			defer l.close()
			for !load.stopping.Load() {
				step(l)
			}
		})
	}
	c.t.Cleanup(load.stop)
	return load
}

// putNewOrWait is the step of clients whose node may be down: they do not spin.
func putNewOrWait(l *liveClient) {
	if o := l.putNew(); o.outcome != liveDone {
		time.Sleep(10 * time.Millisecond)
	}
}

// stop waits for the requests that are on their way.
func (load *liveLoad) stop() {
	load.stopping.Store(true)
	load.clients.Wait()
}

// waitForAcks waits until so many writes more were acknowledged.
func (c *liveCluster) waitForAcks(n int) {
	c.t.Helper()
	want := c.history.acked.Load() + int64(n)
	c.eventually(func() error {
		if got := c.history.acked.Load(); got < want {
			return fmt.Errorf("%d writes acknowledged, want %d", got, want)
		}
		return nil
	})
}

// readers is how many clients read everything back.
const readers = 16

// readBack reads every key that clients ever wrote, from all nodes in turn, as part of the history.
func (c *liveCluster) readBack() {
	c.t.Helper()
	keys := c.history.keys()
	var next atomic.Int64
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			l := c.client(c.Nodes[i%len(c.Nodes)])
			defer l.close()
			for k := next.Add(1) - 1; k < int64(len(keys)); k = next.Add(1) - 1 {
				if o := l.get(keys[k]); o.outcome != liveDone {
					c.surprise("healthy cluster: %v", o)
				}
			}
		})
	}
	wg.Wait()
}

// verdict reads everything back and judges the history. All nodes must be up and no client at work.
func (c *liveCluster) verdict() {
	c.t.Helper()
	c.readBack()
	last := c.client(c.Nodes[0]).version()
	c.sameEverywhere(last)
	if err := c.history.checkVersions(0, last); err != nil {
		c.t.Error(err)
	}
	if err := c.history.checkLinearizable(c.dir); err != nil {
		c.t.Error(err)
	}
	if err := c.history.checkDeadlines(); err != nil {
		c.t.Error(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.surprises.err(); err != nil {
		c.t.Errorf("answers that clients should not get:\n%v", err)
	}
}

// sameEverywhere checks that every node has the state of version rv, on its own and not by asking the leader.
func (c *liveCluster) sameEverywhere(rv uint64) {
	c.t.Helper()
	want := c.history.final()
	for _, n := range c.Nodes {
		l := c.client(n)
		r := l.do(http.MethodGet, fmt.Sprintf("%s/?resourceVersion=%d", n.URL(), rv), "")
		if r.err != nil || r.status != http.StatusOK {
			c.t.Errorf("node %d does not reach version %d: %d %s %v", n.ID, rv, r.status, r.body, r.err)
			continue
		}
		checked := 0
		for key, o := range want {
			if checked++; checked > 1000 { // in map order, so others each time
				break
			}
			r := l.raw(http.MethodGet, key, "?resourceVersion=0", "")
			if o.found != (r.status == http.StatusOK) || o.found && digest(string(r.body)) != o.value {
				c.t.Errorf("node %d by itself: GET %q: %d %.60q %v, want %v", n.ID, key, r.status, r.body, r.err, o)
			}
		}
		l.close()
	}
}
