package httpapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"raftrv/internal/fault"
	"raftrv/internal/shares"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
	"raftrv/internal/watch"
)

const testValueSizeMax = 100 << 10 // more than bodyFree

// fakeBackend is a cluster of one that never fails unless it is told to. Writes
// go through the real encoding into a real store.
type fakeBackend struct {
	store *store.Store
	hub   *watch.Hub // nil = there are no watches

	mu           sync.Mutex
	index        uint64
	err          error // of the next calls
	linearizeErr error
	linearized   int           // calls
	waited       []uint64      // versions
	timeout      time.Duration // of the last call
	memberCalls  []memberCall

	// propose waits for this long, and notes why its context ended if it did.
	delay    time.Duration
	canceled error
}

func (b *fakeBackend) Apply(ctx context.Context, timeout time.Duration, commands ...store.Command) ([]store.Result, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.timeout = timeout
	if b.err != nil {
		return nil, b.err
	}
	if b.delay > 0 {
		select {
		case <-time.After(b.delay):
		case <-ctx.Done():
			b.canceled = context.Cause(ctx)
			return nil, ctx.Err()
		}
	}
	var data []byte
	for i := range commands {
		data = commands[i].AppendTo(data)
	}
	b.index++
	var out []store.Result
	if _, err := b.store.Apply(b.index, 1, store.BatchHeader{Session: 1, Seq: b.index}, data, &out); err != nil {
		return nil, err
	}
	if b.hub != nil {
		b.hub.Notify()
	}
	return out, nil
}

// Fresh waits for nothing: what the store lacks does not come.
func (b *fakeBackend) Fresh(_ context.Context, r Read) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case !r.Local:
		b.linearized++
		b.timeout = r.Timeout
		return b.linearizeErr
	case b.store.Version() < r.Version:
		b.waited = append(b.waited, r.Version)
		b.timeout = r.Timeout
		if b.linearizeErr != nil {
			return b.linearizeErr
		}
		return fault.ErrReadTimeout
	case errors.Is(b.err, fault.ErrDiverged):
		return b.err
	}
	return nil
}

func (b *fakeBackend) Get(ctx context.Context, r Read, key string) (it store.Item, rv uint64, ok bool, err error) {
	if err := b.Fresh(ctx, r); err != nil {
		return store.Item{}, 0, false, err
	}
	it, rv, ok = b.store.Get(key)
	return it, rv, ok, nil
}

func (b *fakeBackend) List(ctx context.Context, r Read, prefix, after string, limit int) ([]store.KeyItem, uint64, error) {
	if err := b.Fresh(ctx, r); err != nil {
		return nil, 0, err
	}
	items, rv := b.store.List(prefix, after, limit)
	return items, rv, nil
}

func (b *fakeBackend) Scan(ctx context.Context, r Read, prefix, after string) (*store.Scan, error) {
	if err := b.Fresh(ctx, r); err != nil {
		return nil, err
	}
	return b.store.Scan(prefix, after)
}

func (b *fakeBackend) Backup(ctx context.Context, r Read) (*store.Backup, error) {
	if err := b.Fresh(ctx, r); err != nil {
		return nil, err
	}
	return b.store.Backup()
}

func (b *fakeBackend) Watch(ctx context.Context, timeout time.Duration, key string, isPrefix bool, from *uint64) (*watch.Watcher, uint64, error) {
	if err := b.Fresh(ctx, Read{Timeout: timeout, Local: from != nil && *from <= b.store.Version()}); err != nil {
		return nil, 0, err
	}
	rv := b.store.Version()
	if from != nil {
		if *from > rv {
			return nil, 0, fault.ErrInvalid.WithDetail("resource version %d is in the future: the store is at %d", *from, rv)
		}
		rv = *from
	}
	w, err := b.hub.Watch(key, isPrefix, rv)
	if err != nil {
		return nil, 0, fault.ErrExpired.WithDetail("the window is at %d: list again, or watch with initial=true", b.store.Version())
	}
	return w, rv, nil
}

func (b *fakeBackend) Version() uint64         { return b.store.Version() }
func (b *fakeBackend) Level() int              { return b.store.Level() }
func (b *fakeBackend) Rules() *store.Rules     { return b.store.Rules() }
func (b *fakeBackend) Members() []store.Member { return b.store.Members() }
func (b *fakeBackend) Unchanged(prefix, after string, from, to uint64) bool {
	return b.store.Unchanged(prefix, after, from, to)
}

func (b *fakeBackend) Writable() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if errors.Is(b.err, fault.ErrDiskFull) {
		return b.err
	}
	return nil
}

func (b *fakeBackend) Status() NodeStatus {
	return NodeStatus{
		ID: 1, ClusterID: "c0ffee", LeaderID: 2, Role: "follower", Term: 3, CommittedIndex: 4, AppliedIndex: 4,
		ResourceVersion: b.store.Version(), Version: "v0", FeatureLevel: 1, Divergence: "sound", Members: []Member{{ID: 1, PeerURL: "http://127.0.0.1:1"}},
	}
}

// memberCall is a call of memberBackend.
type memberCall struct {
	name   string
	member store.Member
}

func (b *fakeBackend) noteMember(timeout time.Duration, name string, m store.Member) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.timeout = timeout
	if b.err != nil {
		return b.err
	}
	b.memberCalls = append(b.memberCalls, memberCall{name, m})
	return nil
}

func (b *fakeBackend) AddMember(_ context.Context, timeout time.Duration, m store.Member) error {
	return b.noteMember(timeout, "add", m)
}

func (b *fakeBackend) RemoveMember(_ context.Context, timeout time.Duration, id uint64) error {
	return b.noteMember(timeout, "remove", store.Member{ID: id})
}

func (b *fakeBackend) PromoteMember(_ context.Context, timeout time.Duration, id uint64) error {
	return b.noteMember(timeout, "promote", store.Member{ID: id})
}

func (b *fakeBackend) UpdateMember(_ context.Context, timeout time.Duration, m store.Member) error {
	return b.noteMember(timeout, "update", m)
}

func (b *fakeBackend) TransferLeader(_ context.Context, timeout time.Duration, id uint64) error {
	return b.noteMember(timeout, "transfer", store.Member{ID: id})
}

// takeMemberCalls returns what was called since the last time.
func (b *fakeBackend) takeMemberCalls() []memberCall {
	b.mu.Lock()
	defer b.mu.Unlock()
	calls := b.memberCalls
	b.memberCalls = nil
	return calls
}

func (b *fakeBackend) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err, b.linearizeErr = err, err
}

func (b *fakeBackend) linearizations() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.linearized
}

// front is an HTTP front on a real server, driven by raw bytes.
type front struct {
	t       *testing.T
	dial    func() (net.Conn, error)
	backend *fakeBackend
	store   *store.Store
	hub     *watch.Hub
	logs    *observer.ObservedLogs
	config  Config
	api     *httpAPI
}

// newFront serves on a loopback port.
func newFront(t *testing.T, options ...func(*Config)) *front {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveFront(t, l, func() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) }, options...)
}

// newPipeFront serves on pipes, for virtual time.
func newPipeFront(t *testing.T) *front {
	pipes := testkit.NewPipeListener()
	return serveFront(t, pipes, pipes.Dial)
}

// rewritingListener does for its connections what the node's listener does.
type rewritingListener struct{ net.Listener }

func (l rewritingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if _, ok := c.(rewriter); ok || err != nil {
		return c, err
	}
	return &rewritingConn{Conn: c}, nil
}

type rewritingConn struct {
	net.Conn
	first func([]byte) []byte
}

func (c *rewritingConn) RewriteNext(f func([]byte) []byte) { c.first = f }

func (c *rewritingConn) Write(p []byte) (int, error) {
	if c.first == nil {
		return c.Conn.Write(p)
	}
	out := c.first(p)
	c.first = nil
	n, err := c.Conn.Write(out)
	return min(n, len(p)), err
}

// CloseWrite lets net/http say that its answer was all, before a client that still writes gets a reset.
func (c *rewritingConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// keptListener gives every connection a place that is kept.
type keptListener struct{ net.Listener }

func (l keptListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &keptConn{&rewritingConn{Conn: c}}, nil
}

type keptConn struct{ *rewritingConn }

func (c *keptConn) IsKept() bool   { return true }
func (c *keptConn) Deserve() error { return nil }

// testClient follows no redirects, like that of a node.
var testClient = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

func serveFront(t *testing.T, l net.Listener, dial func() (net.Conn, error), options ...func(*Config)) *front {
	core, logs := observer.New(zap.DebugLevel)
	logger := zap.New(core)
	kv := store.New()
	kv.State.Members[1] = store.Member{ID: 1, PeerURL: "http://127.0.0.1:1"}
	hub := watch.NewHub(kv)
	backend := &fakeBackend{store: kv, hub: hub}
	cfg := Config{
		ID:           1,
		Cluster:      "abc",
		Store:        backend,
		Logger:       logger,
		Timeout:      5 * time.Second,
		Bookmark:     10 * time.Second,
		ValueSizeMax: testValueSizeMax,
		Version:      "v0",
		NewID:        NewUUID,
		Client:       testClient,
		Hosts:        []string{"x", "other"}, // the Host of these tests
		Registry:     prometheus.NewRegistry(),
		Checks:       ClusterChecks(backend),
		Level:        zap.NewAtomicLevel(),
		Profiles:     true,
	}
	for _, option := range options {
		option(&cfg)
	}
	handler := New(cfg)
	hubCtx, stopHub := context.WithCancel(context.Background())
	var hubDone sync.WaitGroup
	hubDone.Go(func() { _ = hub.Run(hubCtx) })
	server := NewServer(handler, logger)
	served := make(chan error, 1)
	go func() { served <- server.Serve(rewritingListener{l}) }()
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		stopHub()
		hubDone.Wait()
	})
	return &front{t: t, dial: dial, backend: backend, store: kv, hub: hub, logs: logs, config: cfg, api: handler.(*httpAPI)}
}

// mustDial returns a connection that is closed with the test.
func (f *front) mustDial() net.Conn {
	f.t.Helper()
	c, err := f.dial()
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = c.Close() }) // may be closed already
	return c
}

// exchange sends raw bytes and returns all that comes back until the server
// closes the connection.
func (f *front) exchange(raw string) string {
	f.t.Helper()
	c := f.mustDial()
	if _, err := io.WriteString(c, raw); err != nil {
		f.t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil {
		f.t.Fatal(err)
	}
	return string(got)
}

// do sends one request, its target as it is, and reads the response.
func (f *front) do(method, target, body string, headers ...string) testkit.Answer {
	f.t.Helper()
	headers = append(headers, "Content-Length: "+strconv.Itoa(len(body)))
	return f.send(method, target, headers, body)
}

func (f *front) send(method, target string, headers []string, body string) testkit.Answer {
	f.t.Helper()
	c := f.mustDial()
	defer func() { _ = c.Close() }() // has been read
	raw := method + " " + target + " HTTP/1.1\r\nHost: x\r\n" + strings.Join(headers, "\r\n") + "\r\n\r\n" + body
	go func() { _, _ = io.WriteString(c, raw) }() // fails when the server does not want all of it
	a := testkit.ReadAnswer(f.t, bufio.NewReader(c), method)
	checkDocumented(f.t, method, target, a)
	return a
}

func (f *front) put(key, value string) {
	f.t.Helper()
	if _, err := f.backend.Apply(f.t.Context(), 0, store.Command{Op: store.OpPut, Key: key, Value: value}); err != nil {
		f.t.Fatal(err)
	}
}

// mustProblem returns the problem of an answer after checking what all share.
func mustProblem(t *testing.T, a testkit.Answer) Problem {
	t.Helper()
	var p Problem
	d := json.NewDecoder(strings.NewReader(a.Body))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		t.Fatalf("%d %q: %v", a.Code, a.Body, err)
	}
	if got := a.Header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("Content-Type %q", got)
	}
	if p.Status != a.Code || p.Title == "" || p.Code == "" || p.Type != "urn:raftrv:error:"+p.Code {
		t.Errorf("%d: %+v", a.Code, p)
	}
	if p.Message != p.Title+": "+p.Detail && p.Message != p.Title || strings.Contains(p.Message, "\n") {
		t.Errorf("message %q", p.Message)
	}
	return p
}

func TestHTTP_KeysAreTheirBytes(t *testing.T) {
	tests := []struct{ path, key string }{
		{"/a", "a"},
		{"/1", "1"},
		{"/a/b//c", "a/b//c"},
		{"/a/", "a/"},
		{"//", "/"},
		{"//x", "/x"},
		{"//x/y", "/x/y"},
		{"///", "//"},
		{"/.", "."},
		{"/..", ".."},
		{"/../x", "../x"},
		{"/x/../y", "x/../y"},
		{"/../-/v1/status", "../-/v1/status"},
		{"/%2e%2e/x", "../x"},
		{"/..%2fx", "../x"},
		{"/a%2Fb", "a/b"},
		{"/a%00b", "a\x00b"},
		{"/%0d%0aX-A:%20b", "\r\nX-A: b"},
		{"/%3Fx", "?x"},
		{"/a?", "a"},
		{"/;", ";"},
		{"/a;b=c", "a;b=c"},
		{"/#", "#"},
		{"/a#b", "a#b"},
		{"/a+b", "a+b"},
		{"/a%2Bb", "a+b"},
		{"/a%20b", "a b"},
		{"/%25", "%"},
		{"/%2525", "%25"},
		{"/a:b@c", "a:b@c"},
		{"/http://x/y", "http://x/y"},
		{"/*", "*"},
		{"/%ff%fe", "\xff\xfe"},
		{"/\xff\xfe", "\xff\xfe"},
		{"/\xc3\xa9", "é"},
		{"/%C3%A9", "é"},
		{`/"<>\^` + "`{|}", `"<>\^` + "`{|}"},
		{"/-x", "-x"},
		{"/--", "--"},
		{"/a/-", "a/-"},
		{"//-/x", "/-/x"},
		{"/%2D", "-"},
		{"/%2D/x", "-/x"},
		{"/%2d/v1/status", "-/v1/status"},
		{`/%2D/x"y`, `-/x"y`}, // a spelling that net/url does not keep
		{"/-%2Fx", "-/x"},
		{"http://other/a/b", "a/b"},
		{"HTTPS://other:1//a", "/a"},
		{"http://other/%2D/x", "-/x"},
		{"/" + strings.Repeat("k", store.KeySizeMax), strings.Repeat("k", store.KeySizeMax)},
		{"/" + strings.Repeat("%25", store.KeySizeMax), strings.Repeat("%", store.KeySizeMax)},
	}
	f := newFront(t)
	for i, tt := range tests {
		value := strconv.Itoa(i)
		if a := f.do("PUT", tt.path, value); a.Code != http.StatusCreated && a.Code != http.StatusNoContent {
			t.Errorf("PUT %q: %d %s", tt.path, a.Code, a.Body)
		}
		if it, _, _ := f.store.Get(tt.key); it.Value != value {
			t.Errorf("PUT %q did not write the key %q", tt.path, tt.key)
		}
		for _, path := range []string{tt.path, KeyPath(tt.key)} {
			if a := f.do("GET", path, ""); a.Code != http.StatusOK || a.Body != value {
				t.Errorf("GET %q: %d %q, want %q", path, a.Code, a.Body, value)
			}
		}
	}
}

func TestHTTP_RefusesTargets(t *testing.T) {
	tests := []struct {
		method, target string
		code           int
	}{
		{"PUT", "/" + strings.Repeat("k", store.KeySizeMax+1), 400},
		{"GET", "/" + strings.Repeat("%25", store.KeySizeMax+1), 400},
		{"PUT", "/", 405}, // no key
		{"DELETE", "/", 405},
		{"PUT", "http://x", 405},
		{"PUT", "http://x?timeout=1s", 405},
		{"GET", "/%zz", 400},
		{"GET", "/a%", 400},
		{"GET", "*", 400},
		{"GET", "foo:bar", 400},
		{"GET", "ftp://x/a", 400},
		{"GET", "http:/a", 400},
		{"GET", "a", 400},
		{"CONNECT", "x:1", 400},
		{"CONNECT", "/a", 405},
		{"GET", "/-", 404},
		{"GET", "/-/", 404},
		{"PUT", "/-/anything", 404},
		{"PUT", "/-/v1", 404},
		{"GET", "/-/v1/status/", 404},
		{"GET", "/-/v1%2Fstatus", 404},
		{"GET", "/-//livez", 404},
		{"GET", "/-/../a", 404},
		{"OPTIONS", "/-/anything", 404},
		{"GET", "http://x/-/anything", 404},
		{"GET", "/" + strings.Repeat("k", HeaderSizeMax+8<<10), 431},
	}
	f := newFront(t)
	for _, tt := range tests {
		if a := f.do(tt.method, tt.target, ""); a.Code != tt.code {
			t.Errorf("%s %.80q: %d %q, want %d", tt.method, tt.target, a.Code, a.Body, tt.code)
		}
	}
	if rv := f.store.Version(); rv != 0 {
		t.Errorf("%d writes got through", rv)
	}
	f.do("GET", "/a", "", "X: "+strings.Repeat("v", HeaderSizeMax+8<<10)).Want(t, 431)
}

func TestHTTP_Values(t *testing.T) {
	f := newFront(t)
	for _, size := range []int{0, 1, 4096, BodyAllocMin + 1, bodyFree, bodyFree + 1, testValueSizeMax} {
		value := strings.Repeat("\x00\xff\r\n", size/4+1)[:size]
		for _, put := range []func() testkit.Answer{
			func() testkit.Answer { return f.do("PUT", "/k", value) },
			func() testkit.Answer {
				return f.send("PUT", "/k", []string{"Transfer-Encoding: chunked"}, chunked(value))
			},
		} {
			if a := put(); a.Code != 201 && a.Code != 204 {
				t.Errorf("PUT of %d bytes: %d %s", size, a.Code, a.Body)
			}
			a := f.do("GET", "/k", "")
			a.Want(t, 200)
			a.WantHeader(t, "Content-Length", strconv.Itoa(size))
			if a.Body != value {
				t.Errorf("GET: %d bytes that differ from the %d of PUT", len(a.Body), size)
			}
			f.do("DELETE", "/k", "").Want(t, 204)
		}
	}
}

func TestHTTP_RefusesLargeValues(t *testing.T) {
	f := newFront(t)
	value := strings.Repeat("v", testValueSizeMax+1)
	for name, a := range map[string]testkit.Answer{
		"announced": f.do("PUT", "/k", value),
		"chunked":   f.send("PUT", "/k", []string{"Transfer-Encoding: chunked"}, chunked(value)),
		// Nothing of the body is sent: the length alone must do.
		"not sent":  f.send("PUT", "/k", []string{"Content-Length: 9223372036854775807"}, ""),
		"continue":  f.send("PUT", "/k", []string{"Content-Length: " + strconv.Itoa(len(value)), "Expect: 100-continue"}, ""),
		"new key":   f.do("POST", "/", value),
		"patch":     f.do("PATCH", "/", value),
		"a peerURL": f.do("POST", "/4", value[:peerURLSizeMax+1]),
	} {
		t.Run(name, func(t *testing.T) {
			a.Want(t, 413)
			if !a.Last {
				t.Error("the connection stays open")
			}
			if p := mustProblem(t, a); p.Code != "value-too-large" || p.Outcome != fault.NotApplied {
				t.Errorf("%+v", p)
			}
		})
	}
	if rv := f.store.Version(); rv != 0 {
		t.Errorf("%d writes got through", rv)
	}
}

// chunked encodes a body in chunks of uneven size.
// TestHTTP_BodiesAreGivenBack: the memory for bodies is bounded, and what was refused holds none of it.
func TestHTTP_BodiesAreGivenBack(t *testing.T) {
	f := newFront(t)
	large := strings.Repeat("v", testValueSizeMax)
	other := netip.MustParseAddr("192.0.2.1")
	held := shares.MostOf(BodiesSizeMax)
	f.api.bodies.All = held + testValueSizeMax - 1
	if !f.api.bodies.Take(other, held) {
		t.Fatal("not taken")
	}
	for range 3 {
		a := f.do("PUT", "/k", large)
		if a.Want(t, 503); mustProblem(t, a).Code != fault.ErrOverloaded.Code {
			t.Errorf("%s", a.Body)
		}
	}
	f.do("PUT", "/k", "small").Want(t, 201)
	if got := f.api.bodies.Taken; got != held {
		t.Errorf("%d bytes are held, want %d", got, held)
	}
	f.api.bodies.Give(other, 1) // it just fits
	f.do("PUT", "/k", large).Want(t, 204)
	if got := f.api.bodies.Taken; got != held-1 {
		t.Errorf("%d bytes are held, want %d", got, held-1)
	}
}

func chunked(body string) string {
	var b strings.Builder
	for size := 1; body != ""; size = 3*size + 1 {
		n := min(size, len(body))
		fmt.Fprintf(&b, "%x\r\n%s\r\n", n, body[:n])
		body = body[n:]
	}
	return b.String() + "0\r\n\r\n"
}

func TestHTTP_Answers(t *testing.T) {
	f := newFront(t)

	a := f.do("PUT", "/a", "1")
	a.Want(t, 201)
	a.WantHeader(t, "ETag", `"1"`)
	a.WantHeader(t, "Resource-Version", "1")
	a.WantHeader(t, "Content-Type", "")

	a = f.do("PUT", "/a", "22")
	a.Want(t, 204)
	a.WantHeader(t, "ETag", `"2"`)
	a.WantHeader(t, "Resource-Version", "2")
	f.do("PUT", "/b", "").Want(t, 201)

	for _, method := range []string{"GET", "HEAD"} {
		a = f.do(method, "/a", "")
		a.Want(t, 200)
		a.WantHeader(t, "ETag", `"2"`)
		a.WantHeader(t, "Resource-Version", "3")
		a.WantHeader(t, "Content-Type", "application/octet-stream")
		a.WantHeader(t, "Content-Length", "2")
		a.WantHeader(t, "X-Content-Type-Options", "nosniff")
		if want := map[string]string{"GET": "22"}[method]; a.Body != want {
			t.Errorf("%s: %q, want %q", method, a.Body, want)
		}
	}

	a = f.do("DELETE", "/a", "")
	a.Want(t, 204)
	a.WantHeader(t, "ETag", "")
	a.WantHeader(t, "Resource-Version", "4")
	a = f.do("DELETE", "/a", "")
	a.Want(t, 404)
	a.WantHeader(t, "Resource-Version", "4")
	if p := mustProblem(t, a); p.Code != "not-found" || p.Outcome != fault.NotApplied {
		t.Errorf("%+v", p)
	}
	a = f.do("GET", "/a", "")
	a.Want(t, 404)
	a.WantHeader(t, "Resource-Version", "4")
	if p := mustProblem(t, a); p.Code != "not-found" || p.Outcome != "" || p.LeaderID != 0 {
		t.Errorf("%+v", p)
	}
	a = f.do("HEAD", "/a", "")
	a.Want(t, 404)
	if length, _ := strconv.Atoi(a.Header.Get("Content-Length")); length == 0 || a.Body != "" {
		t.Errorf("HEAD of nothing: Content-Length %d, body %q", length, a.Body)
	}
}

func TestHTTP_Root(t *testing.T) {
	f := newFront(t)
	a := f.do("GET", "/", "")
	a.Want(t, 200)
	a.WantHeader(t, "Content-Type", "text/plain; charset=utf-8")
	a.WantHeader(t, "Resource-Version", "0")
	if a.Body != "0\n" {
		t.Errorf("%q", a.Body)
	}

	a = f.do("POST", "/", "v\x00")
	a.Want(t, 201)
	a.WantHeader(t, "ETag", `"1"`)
	a.WantHeader(t, "Resource-Version", "1")
	f.wantCreated(a, "v\x00", 1)

	a = f.do("PATCH", "/", ` {"node":1} `)
	a.Want(t, 204)
	a.WantHeader(t, "ETag", `"2"`)
	a.WantHeader(t, "Resource-Version", "2")
	f.wantCreated(a, ` {"node":1} `, 2)

	for _, body := range []string{"", "{", "{}{}", "\xff", strings.Repeat("[", 20000)} {
		a = f.do("PATCH", "/", body)
		a.Want(t, 400)
		if p := mustProblem(t, a); p.Outcome != fault.NotApplied {
			t.Errorf("%+v", p)
		}
	}
	if a = f.do("GET", "/", ""); a.Body != "2\n" {
		t.Errorf("%q", a.Body)
	}
	a = f.do("HEAD", "/", "")
	a.Want(t, 200)
	a.WantHeader(t, "Content-Length", "2")
	if a.Body != "" {
		t.Errorf("%q", a.Body)
	}
}

// wantCreated checks that Location leads to the value.
func (f *front) wantCreated(a testkit.Answer, value string, rv uint64) {
	f.t.Helper()
	location := a.Header.Get("Location")
	if len(location) != len("/1-019ab0c1-0000-7000-8000-000000000000") || location[:3] != "/1-" || location[17] != '7' {
		f.t.Errorf("Location %q", location)
	}
	it, _, _ := f.store.Get(strings.TrimPrefix(location, "/"))
	if it.Value != value || it.RV != rv {
		f.t.Errorf("%q holds %+v, want %q", location, it, value)
	}
	if got := f.do("GET", location, ""); got.Body != value {
		f.t.Errorf("GET %s: %q, want %q", location, got.Body, value)
	}
}

func TestHTTP_AddMember(t *testing.T) {
	tests := []struct {
		id, body string
		code     int
	}{
		{"4", "http://127.0.0.1:42379", 204},
		{"18446744073709551615", "https://[::1]:1\n", 204},
		{"5", "http://node-5.example:65535", 204},
		{"0", "http://a:1", 400},
		{"04", "http://a:1", 400},
		{"+4", "http://a:1", 400},
		{"-4", "http://a:1", 400},
		{"4_0", "http://a:1", 400},
		{"4/", "http://a:1", 400},
		{"x", "http://a:1", 400},
		{"18446744073709551616", "http://a:1", 400},
		{"4", "", 400},
		{"4", "a:1", 400},
		{"4", "//a:1", 400},
		{"4", "http:a:1", 400},
		{"4", "ftp://a:1", 400},
		{"4", "file:///etc/passwd", 400},
		{"4", "http://a", 400},
		{"4", "http://a:", 400},
		{"4", "http://a:0", 400},
		{"4", "http://a:65536", 400},
		{"4", "http://:1", 400},
		{"4", "http://[]:1", 400},
		{"4", "http://a:1/", 400},
		{"4", "http://a:1/x", 400},
		{"4", "http://a:1?", 400},
		{"4", "http://a:1?x", 400},
		{"4", "http://a:1#", 400},
		{"4", "http://u@a:1", 400},
		{"4", "http://u:p@a:1", 400},
		{"4", "http://a:1,http://b:1", 400},
		{"4", "http://a:1 http://b:1", 400},
		{"4", "http://a\r\n:1", 400},
		{"4", "http://%61:1", 400},
	}
	f := newFront(t)
	for _, tt := range tests {
		if a := f.do("POST", "/"+tt.id, tt.body); a.Code != tt.code {
			t.Errorf("POST /%s %q: %d %s, want %d", tt.id, tt.body, a.Code, a.Body, tt.code)
		}
	}
	want := []memberCall{
		{"add", store.Member{ID: 4, PeerURL: "http://127.0.0.1:42379", Promote: true}},
		{"add", store.Member{ID: 1<<64 - 1, PeerURL: "https://[::1]:1", Promote: true}},
		{"add", store.Member{ID: 5, PeerURL: "http://node-5.example:65535", Promote: true}},
	}
	if got := f.backend.takeMemberCalls(); !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}

	f.backend.fail(fmt.Errorf("add: %w", fault.ErrMember.WithDetail("member 4 exists already")))
	a := f.do("POST", "/4", "http://a:1")
	a.Want(t, 409)
	if p := mustProblem(t, a); p.Code != "member-conflict" || p.Detail != "member 4 exists already" || p.LeaderID != 2 {
		t.Errorf("%+v", p)
	}
}

func TestHTTP_Methods(t *testing.T) {
	f := newFront(t)
	targets := map[string]string{
		"*":        "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT",
		"/":        "GET, HEAD, OPTIONS, PATCH, POST",
		"/k":       "DELETE, GET, HEAD, OPTIONS, POST, PUT",
		"/1":       "DELETE, GET, HEAD, OPTIONS, POST, PUT",
		"/-/livez": "GET, HEAD, OPTIONS",
	}
	for _, rt := range reservedRoutes {
		targets[strings.NewReplacer("{key}", "a/b", "{id}", "4").Replace(rt.path)] = rt.allow[0]
	}
	for target, allow := range targets {
		a := f.do("OPTIONS", target, "")
		a.Want(t, 204)
		a.WantHeader(t, "Allow", allow)
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "get"} {
			if target == "*" {
				continue
			}
			a := f.do(method, strings.Replace(target, "/watch", "/watch?timeout=1ms", 1), "")
			allowed := slices.Contains(strings.Split(allow, ", "), method)
			if refused := a.Code == 405; refused == allowed {
				t.Errorf("%s %s: %d", method, target, a.Code)
			}
			if a.Code == 405 {
				a.WantHeader(t, "Allow", allow)
			}
		}
	}
}

func TestHTTP_Parameters(t *testing.T) {
	f := newFront(t)
	f.put("k", "v")
	tests := []struct {
		method, target string
		code           int
		detail         string // part of it
	}{
		{"GET", "/k?", 200, ""},
		{"GET", "/k?&&", 200, ""},
		{"GET", "/k?timeout=1s", 200, ""},
		{"GET", "/k?time%6fut=60s&resourceVersion=%31", 200, ""},
		{"GET", "/k?resourceVersion=0", 200, ""},
		{"GET", "/?resourceVersion=1&timeout=1ms", 200, ""},
		{"PUT", "/k?timeout=1m", 204, ""},
		{"GET", "/k?ttl=3s", 400, `unknown parameter "ttl"; allowed here: timeout, resourceVersion`},
		{"PUT", "/k?ttl=3s&timeout=3s", 204, ""},
		{"POST", "/?ttl=1s", 201, ""},
		{"PUT", "/k?ttl=87600h", 204, ""},
		{"DELETE", "/k?ttl=3s", 400, `unknown parameter "ttl"; allowed here: timeout`},
		{"PUT", "/k?resourceVersion=1", 400, `unknown parameter "resourceVersion"; allowed here: timeout, ttl`},
		{"PUT", "/k?ttl=999ms", 400, "ttl must be a duration such as 30s or 12h, from 1s to 87600h0m0s"},
		{"PUT", "/k?ttl=87601h", 400, "ttl must be"},
		{"PUT", "/k?ttl=-3s", 400, "ttl must be"},
		{"PUT", "/k?ttl=30", 400, "ttl must be"},
		{"PUT", "/k?ttl=", 400, "ttl must be"},
		{"POST", "/?ttl=0s", 400, "ttl must be"},
		{"PATCH", "/?ttl=1ns", 400, "ttl must be"},
		{"POST", "/4?ttl=3s", 400, "unknown parameter"},
		{"GET", "/-/v1/keys?limit=0", 400, "limit must be a positive number"},
		{"GET", "/-/v1/keys?limit=-1", 400, "limit must be a positive number"},
		{"GET", "/-/v1/keys?limit=9223372036854775808", 400, "limit must be at most 10000; with Accept: application/x-ndjson"},
		{"GET", "/-/v1/keys?limit=18446744073709551616", 400, "limit must be a positive number"},
		{"GET", "/-/v1/keys?limit=10001", 400, "limit must be at most 10000"},
		{"GET", "/-/v1/keys?limit=10000&prefix=%00&after=%ff&keysOnly=true&resourceVersion=0", 200, ""},
		{"GET", "/-/v1/keys?keysOnly", 400, "keysOnly must be true or false"},
		{"GET", "/-/v1/keys?keysOnly=1", 400, "keysOnly must be true or false"},
		{"GET", "/-/v1/keys?key=a", 400, "unknown parameter"},
		{"GET", "/-/v1/keys/a?prefix=a", 400, "unknown parameter"},
		{"DELETE", "/-/v1/keys", 400, "a prefix is needed"},
		{"DELETE", "/-/v1/keys?prefix=", 400, "a prefix is needed"},
		{"DELETE", "/-/v1/keys?prefix=" + strings.Repeat("a", store.KeySizeMax+1), 400, "the prefix has 4097 bytes"},
		{"DELETE", "/-/v1/keys?prefix=" + strings.Repeat("a", store.KeySizeMax), 200, ""},
		{"DELETE", "/-/v1/keys?prefix=a&limit=1", 400, "unknown parameter"},
		{"POST", "/-/v1/txn?ttl=3s", 400, "unknown parameter"},
		{"GET", "/-/livez?timeout=1s", 400, `unknown parameter "timeout"; allowed here: none`},
		{"GET", "/k?Timeout=1s", 400, "unknown parameter"},
		{"GET", "/k?=1s", 400, "unknown parameter"},
		{"GET", "/k??", 400, "unknown parameter"},
		{"GET", "/k?x%0Ay", 400, `unknown parameter "x\ny"`},
		{"GET", "/k?timeout=1s&timeout=1s", 400, `parameter "timeout" is given twice`},
		{"GET", "/k?resourceVersion=1&timeout=1s&resourceVersion=0", 400, "twice"},
		{"GET", "/k?timeout=%zz", 400, "malformed escape"},
		{"GET", "/k?%", 400, "malformed escape"},
		{"GET", "/k?timeout", 400, "timeout must be"},
		{"GET", "/k?timeout=5", 400, "timeout must be"},
		{"GET", "/k?timeout=0s", 400, "timeout must be"},
		{"GET", "/k?timeout=-1s", 400, "timeout must be"},
		{"GET", "/k?timeout=60.1s", 400, "timeout must be"},
		{"GET", "/k?timeout=1s;x=y", 400, "timeout must be"},
		{"GET", "/k?resourceVersion=", 400, "resourceVersion must be"},
		{"GET", "/k?resourceVersion=-1", 400, "resourceVersion must be"},
		{"GET", "/k?resourceVersion=1.0", 400, "resourceVersion must be"},
		{"GET", "/k?resourceVersion=0x1", 400, "resourceVersion must be"},
		{"GET", "/k?resourceVersion=18446744073709551616", 400, "resourceVersion must be"},
		{"POST", "/?x=1", 400, "unknown parameter"},
		{"PATCH", "/?x=1", 400, "unknown parameter"},
		{"DELETE", "/k?x=1", 400, "unknown parameter"},
		{"POST", "/4?x=1", 400, "unknown parameter"},
	}
	for _, tt := range tests {
		a := f.do(tt.method, tt.target, "")
		if a.Code != tt.code {
			t.Errorf("%s %s: %d %s, want %d", tt.method, tt.target, a.Code, a.Body, tt.code)
			continue
		}
		if tt.detail == "" {
			continue
		}
		if p := mustProblem(t, a); p.Code != "invalid-request" || !strings.Contains(p.Detail, tt.detail) {
			t.Errorf("%s %s: %+v, want %q", tt.method, tt.target, p, tt.detail)
		}
	}
}

func TestHTTP_TimeoutReachesBackend(t *testing.T) {
	f := newFront(t)
	for _, tt := range []struct {
		method, target, body string
		want                 time.Duration
	}{
		{"GET", "/k", "", 5 * time.Second},
		{"GET", "/k?timeout=7s", "", 7 * time.Second},
		{"GET", "/?timeout=8s", "", 8 * time.Second},
		{"PUT", "/k", "", 5 * time.Second},
		{"PUT", "/k?timeout=9s", "", 9 * time.Second},
		{"DELETE", "/k?timeout=10s", "", 10 * time.Second},
		{"POST", "/?timeout=11s", "", 11 * time.Second},
		{"PATCH", "/?timeout=12s", "1", 12 * time.Second},
		{"POST", "/4?timeout=13s", "http://a:1", 13 * time.Second},
		{"POST", "/-/v1/members/4?timeout=14s", `{"peerUrl":"http://a:1"}`, 14 * time.Second},
		{"PUT", "/-/v1/members/4?timeout=15s", `{}`, 15 * time.Second},
		{"DELETE", "/-/v1/members/4?timeout=16s", "", 16 * time.Second},
		{"POST", "/-/v1/members/4/promote?timeout=17s", "", 17 * time.Second},
		{"POST", "/-/v1/leader/4?timeout=18s", "", 18 * time.Second},
		{"GET", "/-/v1/members?timeout=19s", "", 19 * time.Second},
		{"GET", "/-/readyz", "", readyTimeout},
	} {
		f.do(tt.method, tt.target, tt.body)
		if f.backend.timeout != tt.want {
			t.Errorf("%s %s: %v, want %v", tt.method, tt.target, f.backend.timeout, tt.want)
		}
	}
}

func TestHTTP_ReadFreshness(t *testing.T) {
	f := newFront(t)
	f.put("k", "v")
	for _, tt := range []struct {
		query  string
		code   int
		rounds int
		waits  int
	}{
		{"", 200, 1, 0},
		{"?resourceVersion=0", 200, 0, 0},
		{"?resourceVersion=1", 200, 0, 0}, // has it already
		{"?resourceVersion=2", 504, 0, 1},
	} {
		for _, path := range []string{"/k", "/", "/-/v1/keys", "/-/v1/keys/k"} {
			rounds, waits := f.backend.linearizations(), len(f.backend.waited)
			a := f.do("GET", path+tt.query, "")
			a.Want(t, tt.code)
			if got := f.backend.linearizations() - rounds; got != tt.rounds {
				t.Errorf("GET %s%s: %d rounds, want %d", path, tt.query, got, tt.rounds)
			}
			if got := len(f.backend.waited) - waits; got != tt.waits {
				t.Errorf("GET %s%s: %d waits, want %d", path, tt.query, got, tt.waits)
			}
			if a.Code == 200 {
				continue
			}
			a.WantHeader(t, "Retry-After", "1")
			if p := mustProblem(t, a); p.Code != "timeout" || !p.Retryable || p.Outcome != "" {
				t.Errorf("%+v", p)
			}
		}
	}
	f.backend.fail(fault.ErrNoLeader)
	f.do("GET", "/k", "").Want(t, 503)
	f.do("GET", "/k?resourceVersion=2", "").Want(t, 503)
	f.do("GET", "/k?resourceVersion=1", "").Want(t, 200)
}

func TestHTTP_BackendErrors(t *testing.T) {
	for _, tt := range []struct {
		err        error
		code       int
		name       string
		outcome    fault.Outcome
		retryAfter string
	}{
		{fault.ErrNoLeader, 503, "no-leader", fault.NotApplied, "1"},
		{fault.ErrOverloaded, 503, "overloaded", fault.NotApplied, "1"},
		{fault.ErrShuttingDown, 503, "shutting-down", fault.NotApplied, "1"},
		{fault.ErrDiskFull, 507, "disk-full", fault.NotApplied, "1"},
		{fault.ErrQuota, 507, "quota-exceeded", fault.NotApplied, "1"},
		{fault.ErrDiverged, 503, "diverged", fault.NotApplied, "1"},
		{fault.ErrLevel, 503, "feature-level", fault.NotApplied, "1"},
		{fault.ErrUnknown, 504, "timeout", fault.Unknown, ""},
		{fmt.Errorf("propose: %w", fault.ErrUnknown), 504, "timeout", fault.Unknown, ""},
		{errors.New("secret"), 500, "internal", fault.Unknown, ""},
	} {
		f := newFront(t)
		f.backend.fail(tt.err)
		methods := []string{"PUT", "DELETE", "GET"}
		if tt.code == 507 { // of writes only
			methods = methods[:2]
		}
		for _, method := range methods {
			a := f.do(method, "/k", "")
			a.Want(t, tt.code)
			a.WantHeader(t, "Retry-After", tt.retryAfter)
			p := mustProblem(t, a)
			want := tt.outcome
			if method == "GET" {
				want = ""
			}
			if p.Code != tt.name || p.Outcome != want {
				t.Errorf("%s, %v: %+v", method, tt.err, p)
			}
			if hasLeader := p.LeaderID == 2; hasLeader != (tt.code >= 500) {
				t.Errorf("%s, %v: leader %d", method, tt.err, p.LeaderID)
			}
			if strings.Contains(a.Body, "secret") {
				t.Errorf("%s, %v: %s", method, tt.err, a.Body)
			}
		}
		if logged := f.logs.FilterMessage("request failed").Len(); (logged > 0) != (tt.name == "internal") {
			t.Errorf("%v: logged %d times", tt.err, logged)
		}
	}
}

func TestHTTP_ProblemShape(t *testing.T) {
	f := newFront(t)
	f.backend.fail(fault.ErrNoLeader)
	a := f.do("PUT", "/k", "")
	want := `{"type":"urn:raftrv:error:no-leader","title":"No leader","status":503,` +
		`"detail":"no leader was reachable before the deadline; is a majority of the members up?","code":"no-leader",` +
		`"message":"No leader: no leader was reachable before the deadline; is a majority of the members up?",` +
		`"outcome":"not_applied","retryable":true,"leaderId":2}` + "\n"
	if a.Body != want {
		t.Errorf("%s\nwant\n%s", a.Body, want)
	}
	a.WantHeader(t, "Content-Length", strconv.Itoa(len(want)))
}

// A write with a header that would change what it does, if the call knew it, is
// refused.
func TestHTTP_NoConditionIsIgnored(t *testing.T) {
	f := newFront(t)
	targets := map[string]*route{"/": rootRoute, "/k": keyRoute, "/4": keyRoute}
	for _, rt := range reservedRoutes {
		targets[rt.path] = rt
	}
	refused := 0
	for target, rt := range targets {
		for _, c := range rt.calls {
			for i, name := range headerNames {
				if c.headers&(1<<i) != 0 {
					continue
				}
				if c.method == "GET" || name == "Last-Event-Id" {
					continue // at worst it gets more than it needs
				}
				for _, value := range []string{`"1"`, "*", ""} {
					a := f.do(c.method, target, "1", name+": "+value)
					refused++
					a.Want(t, 400)
					if p := mustProblem(t, a); p.Code != "invalid-request" || p.Outcome != fault.NotApplied || !strings.HasPrefix(p.Detail, name+" is not supported here") {
						t.Errorf("%s %s, %s: %+v", c.method, target, name, p)
					}
				}
			}
		}
	}
	if rv := f.store.Version(); rv != 0 || refused < 30 {
		t.Errorf("%d writes got through, %d were refused", rv, refused)
	}
}

func TestHTTP_Node(t *testing.T) {
	f := newFront(t)
	for target, want := range map[string]string{
		"/-/livez":  "ok\n",
		"/-/readyz": "ok\n",
		"/-/v1/status": `{"id":1,"clusterId":"c0ffee","leaderId":2,"role":"follower","term":3,"committedIndex":4,"appliedIndex":4,` +
			`"resourceVersion":0,"version":"v0","featureLevel":1,"members":[{"id":1,"peerUrl":"http://127.0.0.1:1"}],` +
			`"stateBytes":0,"stateSum":"","quotaBytes":0,"diskFreeBytes":0,"diskReserveBytes":0,"divergence":"sound"}` + "\n",
		"/-/version": `{"version":"v0","goVersion":"` + runtime.Version() + `"}` + "\n",
	} {
		a := f.do("GET", target, "")
		a.Want(t, 200)
		if a.Body != want {
			t.Errorf("GET %s: %s, want %s", target, a.Body, want)
		}
		a = f.do("HEAD", target, "")
		a.Want(t, 200)
		a.WantHeader(t, "Content-Length", strconv.Itoa(len(want)))
	}
	// A node that takes no writes is ready: it serves reads. One that diverged is not.
	f.backend.fail(fault.ErrDiskFull)
	f.backend.linearizeErr = nil
	if a := f.do("GET", "/-/readyz", ""); a.Code != 200 || a.Body != "ok\nread-only: "+fault.ErrDiskFull.Error()+"\n" {
		t.Errorf("readyz of a node whose disk is full: %d %s", a.Code, a.Body)
	}
	f.backend.fail(fault.ErrDiverged)
	if a := f.do("GET", "/-/readyz", ""); a.Code != 503 || !strings.Contains(mustProblem(t, a).Detail, fault.ErrDiverged.Error()) {
		t.Errorf("readyz of a node that has diverged: %d %s", a.Code, a.Body)
	}
	for _, target := range []string{"/k", "/k?resourceVersion=0", "/", "/-/v1/keys?resourceVersion=0", "/-/v1/keys/k?resourceVersion=0", "/-/v1/watch", "/-/v1/watch?resourceVersion=0"} {
		a := f.do("GET", target, "")
		a.Want(t, 503)
		if p := mustProblem(t, a); p.Code != "diverged" {
			t.Errorf("GET %s of a node that has diverged: %+v", target, p)
		}
	}
	f.do("GET", "/-/v1/status", "").Want(t, 200)
	f.backend.fail(fault.ErrReadTimeout)
	f.do("GET", "/-/livez", "").Want(t, 200)
	f.do("GET", "/-/v1/status", "").Want(t, 200)
	a := f.do("GET", "/-/readyz", "")
	a.Want(t, 503)
	a.WantHeader(t, "Retry-After", "1")
	if p := mustProblem(t, a); p.Code != "not-ready" || p.Outcome != "" || p.LeaderID != 2 {
		t.Errorf("%+v", p)
	}
}

func TestHTTP_KeepsConnections(t *testing.T) {
	f := newFront(t)
	c := f.mustDial()
	r := bufio.NewReader(c)
	// Pipelined, with a failed request in between.
	_, err := io.WriteString(c, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nv"+
		"PUT /k?bad HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbad"+
		"GET /k HTTP/1.1\r\nHost: x\r\n\r\n"+
		"HEAD /k HTTP/1.1\r\nHost: x\r\n\r\n"+
		"DELETE /k HTTP/1.1\r\nHost: x\r\n\r\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct {
		method string
		code   int
	}{{"PUT", 201}, {"PUT", 400}, {"GET", 200}, {"HEAD", 200}, {"DELETE", 204}} {
		testkit.ReadAnswer(t, r, want.method).Want(t, want.code)
	}
}

// One request in must be one request out, whatever a proxy in front makes of
// it: the key "smuggled" must never be written.
func TestHTTP_Smuggling(t *testing.T) {
	const smuggled = "PUT /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
	tests := []struct {
		name, request string
		code          int
	}{
		{"two lengths", "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 53\r\n\r\n", 400},
		{"list of lengths", "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 0, 53\r\n\r\n", 400},
		{"signed length", "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n", 400},
		{"hexadecimal length", "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 0x0\r\n\r\n", 400},
		// RFC 9112 lets a server take the chunks, if it closes the connection.
		{"length and chunks", "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 58\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 201},
		{"two encodings", "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 501},
		{"odd encoding", "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501},
		{"space before colon", "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length : 53\r\n\r\n", 400},
		{"chunk size", "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n", 400},
		{"bare CR", "PUT /k HTTP/1.1\r\nHost: x\r\nX: a\rContent-Length: 53\r\n\r\n", 400},
		{"no host", "PUT /k HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400},
		{"two hosts", "PUT /k HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: 0\r\n\r\n", 400},
		{"HTTP/0.9", "GET /k\r\n\r\n", 400},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400},
		{"HTTP/3", "PUT /k HTTP/3.0\r\nHost: x\r\n\r\n", 505},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFront(t)
			got := f.exchange(tt.request + smuggled)
			if want := fmt.Sprintf("HTTP/1.1 %d ", tt.code); !strings.HasPrefix(got, want) {
				t.Errorf("%q, want %s", got, want)
			}
			if n := strings.Count(got, "HTTP/1.1 "); n != 1 {
				t.Errorf("%d responses: %q", n, got)
			}
			if _, _, ok := f.store.Get("smuggled"); ok {
				t.Error("the second request was served")
			}
		})
	}
}

// A header in a value, a key or a parameter stays where it is.
func TestHTTP_NoHeaderInjection(t *testing.T) {
	f := newFront(t)
	for _, target := range []string{"/k?%0d%0aX-Evil:1", "/%0d%0aX-Evil:1", "/k?timeout=%0d%0aX-Evil:1"} {
		if a := f.do("GET", target, ""); a.Header.Get("X-Evil") != "" {
			t.Errorf("GET %s: %v", target, a.Header)
		}
	}
}

func TestHTTP_SlowHeaderIsCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		c := f.mustDial()
		start := time.Now()
		var writer sync.WaitGroup
		writer.Go(func() {
			for _, b := range []byte("PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n") {
				if _, err := c.Write([]byte{b}); err != nil {
					return // cut, as it should be
				}
				time.Sleep(time.Second)
			}
		})
		_, _ = io.Copy(io.Discard, c) // what matters is when it ends
		if took := time.Since(start); took != HeaderTimeout {
			t.Errorf("cut after %v", took)
		}
		writer.Wait()
	})
}

func TestHTTP_SlowBodyIsCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		c := f.mustDial()
		start := time.Now()
		var writer sync.WaitGroup
		writer.Go(func() {
			_, _ = io.WriteString(c, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n") // the answer tells
			for {
				time.Sleep(time.Second)
				if _, err := c.Write([]byte("x")); err != nil {
					return // cut, as it should be
				}
			}
		})
		a := testkit.ReadAnswer(t, bufio.NewReader(c), "PUT")
		a.Want(t, 408)
		if !a.Last {
			t.Error("the connection stays open")
		}
		if p := mustProblem(t, a); p.Code != "request-timeout" || p.Outcome != fault.NotApplied || !p.Retryable {
			t.Errorf("%+v", p)
		}
		if took := time.Since(start); took != BodyTimeout {
			t.Errorf("cut after %v", took)
		}
		_, _ = io.Copy(io.Discard, c) // until the server closes
		writer.Wait()
		if _, _, ok := f.store.Get("k"); ok {
			t.Error("half a body was stored")
		}
	})
}

func TestHTTP_BrokenBody(t *testing.T) {
	f := newFront(t)
	for _, raw := range []string{
		"PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf",
		"PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf",
	} {
		c := f.mustDial()
		if _, err := io.WriteString(c, raw); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		a := testkit.ReadAnswer(t, bufio.NewReader(c), "PUT")
		a.Want(t, 400)
		if p := mustProblem(t, a); p.Code != "invalid-request" || p.Outcome != fault.NotApplied {
			t.Errorf("%+v", p)
		}
	}
	if _, _, ok := f.store.Get("k"); ok {
		t.Error("half a body was stored")
	}
}

func TestHTTP_IdleConnectionIsCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		c := f.mustDial()
		r := bufio.NewReader(c)
		if _, err := io.WriteString(c, "GET /-/livez HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		testkit.ReadAnswer(t, r, "GET").Want(t, 200)
		start := time.Now()
		if _, err := r.ReadByte(); err != io.EOF {
			t.Errorf("%v, want EOF", err)
		}
		if took := time.Since(start); took != IdleTimeout {
			t.Errorf("cut after %v", took)
		}
	})
}

func TestHTTP_ClientThatDoesNotReadIsCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		f.put("k", strings.Repeat("v", testValueSizeMax))
		c := f.mustDial()
		if _, err := io.WriteString(c, "GET /k HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(writeTimeout + time.Second)
		got, _ := io.ReadAll(c) // what matters is that it ends
		if len(got) >= testValueSizeMax {
			t.Error("the server waited")
		}
	})
}

// The deadline for a request's body must not end the wait for its result, nor
// the connection.
func TestHTTP_WaitOutlivesBodyTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		f.backend.delay = TimeoutMax - time.Second
		c := f.mustDial()
		r := bufio.NewReader(c)
		for _, request := range []string{
			"PUT /k?timeout=60s HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nv",
			"DELETE /k?timeout=60s HTTP/1.1\r\nHost: x\r\n\r\n",
			"POST /?timeout=60s HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nv",
		} {
			if _, err := io.WriteString(c, request); err != nil {
				t.Fatal(err)
			}
			if a := testkit.ReadAnswer(t, r, "PUT"); a.Code/100 != 2 {
				t.Errorf("%d %s", a.Code, a.Body)
			}
		}
	})
}

func TestHTTP_ClientThatLeavesEndsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		f.backend.delay = time.Hour
		c := f.mustDial()
		if _, err := io.WriteString(c, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nv"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the request waits for its result
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if !errors.Is(f.backend.canceled, context.Canceled) {
			t.Errorf("%v, want %v", f.backend.canceled, context.Canceled)
		}
		if n := f.logs.Len(); n > 0 {
			t.Errorf("%d log lines: %v", n, f.logs.All())
		}
	})
}

func TestHTTP_ServerLog(t *testing.T) {
	core, logs := observer.New(zap.DebugLevel)
	server := NewServer(nil, zap.New(core))
	server.ErrorLog.Print("http: TLS handshake error from x: EOF")
	server.ErrorLog.Print("http: Accept error: too many open files")
	got := logs.All()
	if len(got) != 2 || got[0].Level != zap.DebugLevel || got[1].Level != zap.WarnLevel {
		t.Fatalf("%+v", got)
	}
	if message := got[1].ContextMap()["message"]; message != "http: Accept error: too many open files" {
		t.Errorf("%q", message)
	}
}

// What this front makes of a target agrees with net/url wherever that has an
// opinion, and every key has a path.
func FuzzHTTPKey(f *testing.F) {
	for _, s := range []string{"/a", "/a/b//c", "/..", "/%2e%2e/x", "/a%00b", "/%3Fx", "/%2D/x", "/-/x", "//x", "*", "http://h/x?y", "/%zz", "/\xff", "-", "-/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		checkTarget(t, s)
		checkKeyPath(t, s)
	})
}

func checkTarget(t *testing.T, target string) {
	path, query, err := splitTarget(target)
	if err != nil || path == "*" {
		return
	}
	if !strings.HasPrefix(path, "/") || strings.Contains(path, "?") {
		t.Fatalf("%q has the path %q", target, path)
	}
	key, keyErr := url.PathUnescape(path[1:])
	if len(key) >= 1 && len(key) <= store.KeySizeMax {
		if got, err := parseKey(path[1:]); got != key || err != nil && keyErr == nil {
			t.Fatalf("%q names %q, %v", path, got, err)
		}
	}
	u, err := url.ParseRequestURI(target)
	if err != nil {
		return // net/http refuses it before us
	}
	if keyErr != nil {
		t.Fatalf("net/http takes %q, we do not: %v", target, keyErr)
	}
	if u.RawQuery != query || u.Path != "/"+key && (u.Path != "" || path != "/") {
		t.Fatalf("%q: path %q query %q, net/url has %q and %q", target, key, query, u.Path, u.RawQuery)
	}
}

func checkKeyPath(t *testing.T, key string) {
	if len(key) < 1 || len(key) > store.KeySizeMax {
		return
	}
	path, query, err := splitTarget(KeyPath(key))
	if err != nil || query != "" || isReserved(path) {
		t.Fatalf("%q has the path %q, query %q, %v", key, path, query, err)
	}
	if got, err := parseKey(path[1:]); got != key || err != nil {
		t.Fatalf("%q comes back as %q, %v", key, got, err)
	}
}

// A query that is taken means what net/url says that it means.
func FuzzHTTPQuery(f *testing.F) {
	for _, s := range []string{
		"", "timeout=1s", "timeout=1s&resourceVersion=2", "a=b", "timeout=1s&timeout=2s", "%74imeout=%31s", "resourceVersion=", "&&=", "timeout=1s;x=y",
		"ttl=30s", "prefix=a%2F&after=a+b&limit=10&keysOnly=true", "key=%ff&initial=false",
	} {
		f.Add(s)
	}
	h := httpAPI{Config: Config{Timeout: 5 * time.Second}}
	f.Fuzz(func(t *testing.T, query string) {
		for _, allowed := range []paramSet{readParams, writeParams, readParams | paramPrefix | paramAfter | paramLimit | paramKeysOnly, paramKey | paramInitial} {
			checkQuery(t, &h, query, allowed)
		}
	})
}

func checkQuery(t *testing.T, h *httpAPI, query string, allowed paramSet) {
	p, err := h.params(query, allowed)
	if err != nil {
		if !errors.Is(err, fault.ErrInvalid) {
			t.Fatal(err)
		}
		return
	}
	if p.timeout <= 0 || p.timeout > TimeoutMax || p.limit < 0 || p.ttl < 0 || p.ttl > ttlMax || p.has(paramTTL) && p.ttl < ttlMin {
		t.Fatalf("%+v", p)
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	want := params{timeout: h.Timeout}
	for name, v := range values {
		param := allowed.named(name)
		if len(v) != 1 || param == 0 {
			t.Fatalf("%q was taken", query)
		}
		want.seen |= param
		if err := want.set(param, v[0]); err != nil {
			t.Fatal(err)
		}
	}
	if p != want {
		t.Fatalf("%+v, want %+v", p, want)
	}
}

// A peer URL that is taken is all origin: connecting to it goes nowhere else.
func FuzzHTTPPeerURL(f *testing.F) {
	for _, s := range []string{"http://a:1", "https://[::1]:65535", "http://u@a:1", "http://a:1/x", "http://a", " http://a:1\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParsePeerURL(s)
		if err != nil {
			return
		}
		u, err := url.Parse(got)
		if err != nil {
			t.Fatal(err)
		}
		if *u != (url.URL{Scheme: u.Scheme, Host: u.Host}) || u.Hostname() == "" || u.Port() == "" {
			t.Fatalf("%q: %+v", s, u)
		}
	})
}

// instantBackend answers at once, so that a benchmark measures the front alone.
type instantBackend struct{ fakeBackend }

var instantResult = []store.Result{{Status: store.StatusReplaced, RV: 123456}}

func (*instantBackend) Apply(context.Context, time.Duration, ...store.Command) ([]store.Result, error) {
	return instantResult, nil
}

func (*instantBackend) Fresh(context.Context, Read) error { return nil }

func (b *instantBackend) Get(_ context.Context, _ Read, key string) (it store.Item, rv uint64, ok bool, err error) {
	it, rv, ok = b.store.Get(key)
	return it, rv, ok, nil
}

// nullWriter is a ResponseWriter that costs nothing.
type nullWriter struct{ header http.Header }

func (w *nullWriter) Header() http.Header               { return w.header }
func (w *nullWriter) Write(p []byte) (int, error)       { return len(p), nil }
func (w *nullWriter) WriteString(s string) (int, error) { return len(s), nil }
func (w *nullWriter) WriteHeader(int)                   {}

type benchBody struct{ bytes.Reader }

func (*benchBody) Close() error { return nil }

func benchFront(b *testing.B) http.Handler {
	kv := store.New()
	fake := fakeBackend{store: kv}
	value := strings.Repeat("v", 64)
	for i := range 4096 {
		if _, err := fake.Apply(b.Context(), 0, store.Command{Op: store.OpPut, Key: "key-" + strconv.Itoa(i), Value: value}); err != nil {
			b.Fatal(err)
		}
	}
	return New(Config{Store: &instantBackend{fakeBackend{store: kv}}, Logger: zap.NewNop(), Timeout: time.Second, ValueSizeMax: store.ValueSizeMaxDefault, Registry: prometheus.NewRegistry()})
}

func BenchmarkHTTP_Put(b *testing.B) {
	for _, size := range []int{64, 1 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			h, w := benchFront(b), &nullWriter{header: http.Header{}}
			value, body := make([]byte, size), &benchBody{}
			r := &http.Request{Method: "PUT", RequestURI: "/key-123", Header: http.Header{}, Body: body, ContentLength: int64(size)}
			b.ReportAllocs()
			for b.Loop() {
				clear(w.header)
				body.Reset(value)
				h.ServeHTTP(w, r)
			}
		})
	}
}

func BenchmarkHTTP_Get(b *testing.B) {
	for _, target := range []string{"/key-123", "/key-123?resourceVersion=0", "/none"} {
		b.Run(fmt.Sprintf("target=%s", target), func(b *testing.B) {
			h, w := benchFront(b), &nullWriter{header: http.Header{}}
			r := &http.Request{Method: "GET", RequestURI: target, Header: http.Header{}, Body: http.NoBody}
			b.ReportAllocs()
			for b.Loop() {
				clear(w.header)
				h.ServeHTTP(w, r)
			}
		})
	}
}

// TestHTTP_KeptPlaces: a node without room for connections still answers those who look after it.
func TestHTTP_KeptPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipes := testkit.NewPipeListener()
		f := serveFront(t, keptListener{pipes}, pipes.Dial)
		for target, want := range map[string]int{
			"/-/livez": 200, "/-/readyz": 200, "/-/metrics": 200, "/-/v1/members": 200, "/-/v1/status": 200,
			"/k": 503, "/": 503, "/-/v1/keys": 503, "/-/v1/watch": 503, "/-/v1/backup": 503, "/-/none": 404,
		} {
			a := f.do("GET", target, "")
			a.Want(t, want)
			if want != 404 && !a.Last {
				t.Errorf("%s: the connection stays open", target)
			}
			if want == 503 && mustProblem(t, a).Code != fault.ErrConnections.Code {
				t.Errorf("%s: %s", target, a.Body)
			}
		}
		f.do("POST", "/-/v1/members/4", `{"peerUrl":"http://127.0.0.4:4"}`).Want(t, 204)
		if rv := f.store.Version(); rv != 0 {
			t.Error("something was written")
		}
	})
}

// TestHTTP_AnnouncedBodies: what clients only announce takes nothing from others.
func TestHTTP_AnnouncedBodies(t *testing.T) {
	f := newFront(t, func(cfg *Config) { cfg.ValueSizeMax = 1 << 20 })
	for i := range 90 {
		c := f.mustDial()
		header, part := "Content-Length: 1048576", "v"
		if i%2 == 1 {
			header, part = "Transfer-Encoding: chunked", "1\r\nv\r\n"
		}
		if _, err := fmt.Fprintf(c, "PUT /slow HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n%s", header, part); err != nil {
			t.Fatal(err)
		}
	}
	f.do("PUT", "/k", strings.Repeat("v", 20<<10)).Want(t, 201)
	if got := f.api.bodies.Taken; got != 0 {
		t.Errorf("%d bytes are held for bodies that did not come", got)
	}
}

// TestHTTP_BodiesCount: a body counts with what it takes, whatever call it is for and however large values may be.
func TestHTTP_BodiesCount(t *testing.T) {
	for _, chunks := range []bool{false, true} {
		f := newFront(t, func(cfg *Config) { cfg.ValueSizeMax = 1 << 10 })
		c := f.mustDial()
		body := `{"then":[{"op":"put","key":"k","value":"` + strings.Repeat("v", txnBodySizeMax-100)
		header := fmt.Sprint("Content-Length: ", txnBodySizeMax)
		if chunks {
			header, body = "Transfer-Encoding: chunked", fmt.Sprintf("%x\r\n%s\r\n", len(body), body)
		}
		if _, err := fmt.Fprintf(c, "POST /-/v1/txn HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n%s", header, body); err != nil {
			t.Fatal(err)
		}
		for held := int64(0); held < txnBodySizeMax-100; {
			f.api.bodies.Mu.Lock()
			held = f.api.bodies.Taken
			f.api.bodies.Mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		_ = c.(*net.TCPConn).CloseWrite()
		testkit.ReadAnswer(t, bufio.NewReader(c), "POST").Want(t, 400)
		f.do("PUT", "/k", "v").Want(t, 201)
		if f.api.bodies.Taken != 0 {
			t.Errorf("%d bytes are held", f.api.bodies.Taken)
		}
	}
}
