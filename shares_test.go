package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestShares(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	s := newShares(10, 6)
	for i, step := range []struct {
		address netip.Addr
		n       int64
		want    bool
	}{
		{a, 7, false}, {a, 6, true}, {a, 1, false}, {b, 5, false}, {b, 4, true}, {b, 1, false}, {a, -6, true}, {b, 2, true}, {b, -6, true}, {a, 6, true}, {a, -6, true},
	} {
		ok := true
		if step.n < 0 {
			s.give(step.address, -step.n)
		} else {
			ok = s.take(step.address, step.n)
		}
		if ok != step.want {
			t.Fatalf("step %d: %v", i, ok)
		}
	}
	if s.taken != 0 || len(s.by) != 0 {
		t.Errorf("left over: %d, %v", s.taken, s.by)
	}
}

func TestShares_Await(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := netip.MustParseAddr("192.0.2.1")
		s := newShares(1, 1)
		took := make(chan bool)
		start := func(timeout time.Duration) {
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			go func() {
				defer cancel()
				took <- s.await(ctx, a, 1)
			}()
		}
		start(time.Second)
		if !<-took {
			t.Fatal("there is one")
		}
		start(time.Second)
		if <-took {
			t.Fatal("there is none")
		}
		start(time.Minute)
		synctest.Wait()
		s.give(a, 1)
		if !<-took {
			t.Error("it was given back")
		}
	})
}

func TestAddressOf(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1", "[::ffff:192.0.2.1]:80": "192.0.2.1", "[::1]:80": "::1", "[fe80::1%eth0]:80": "fe80::",
		"[2001:db8:1:2:3:4:5:6]:80": "2001:db8:1:2::", "pipe": "invalid IP", "": "invalid IP",
	} {
		if got := addressOf(in).String(); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

// dialFrom connects from a loopback address.
func dialFrom(t *testing.T, from string, l *listener) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Skipf("this machine has no address %s: %v", from, err)
	}
	t.Cleanup(func() { _ = c.Close() }) // may be closed already
	return c
}

// TestListener_Addresses: an address that has its share leaves room for the others.
func TestListener_Addresses(t *testing.T) {
	l := newTestListener(t, listenerConfig{connectionsMax: 3, addressMax: 2})
	for range 2 {
		dialFrom(t, "127.0.0.1", l)
		mustAccept(t, l)
	}
	greedy := dialFrom(t, "127.0.0.1", l)
	dialFrom(t, "127.0.0.2", l)
	if got := addressOf(mustAccept(t, l).RemoteAddr().String()).String(); got != "127.0.0.2" {
		t.Errorf("accepted %s", got)
	}
	if n, err := greedy.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Errorf("open: %d, %v", n, err)
	}
	if got, want := l.stats(), (connStats{open: 3, accepted: 3, refused: 1}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// newFullFront has no room for connections, but for those who look after the node.
func newFullFront(t *testing.T) *front {
	pipes := newPipeListener()
	return serveFront(t, newListener(pipes, listenerConfig{keptMax: 4, refusal: httpRefusal()}), pipes.dial)
}

// TestHTTP_KeptPlaces: a node without room for connections still answers those who look after it.
func TestHTTP_KeptPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFullFront(t)
		for target, want := range map[string]int{
			"/-/livez": 200, "/-/readyz": 200, "/-/metrics": 200, "/-/v1/members": 200, "/-/v1/status": 200,
			"/k": 503, "/": 503, "/-/v1/keys": 503, "/-/v1/watch": 503, "/-/v1/snapshot": 503, "/-/none": 404,
		} {
			a := f.do("GET", target, "")
			a.want(t, want)
			if want != 404 && !a.last {
				t.Errorf("%s: the connection stays open", target)
			}
			if want == 503 && mustProblem(t, a).Code != errConnections.code {
				t.Errorf("%s: %s", target, a.body)
			}
		}
		f.do("POST", "/-/v1/members/4", `{"peerURL":"http://127.0.0.4:4"}`).want(t, 204)
		if rv := f.store.version(); rv != 0 {
			t.Error("something was written")
		}
	})
}

// TestHTTP_KeptPlacesAreShort: who has nothing to say, or says it slowly, has a kept place for a moment only.
func TestHTTP_KeptPlacesAreShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFullFront(t)
		start := time.Now()
		for _, begin := range []string{"", "GET /-/livez HTTP/1.1\r\nHost: x\r\n"} {
			c := f.mustDial()
			if _, err := io.WriteString(c, begin); err != nil {
				t.Fatal(err)
			}
			_, _ = io.ReadAll(c) // whatever it is told
			if took := time.Since(start); took > keptTimeout+time.Second {
				t.Errorf("%q: closed after %v", begin, took)
			}
			start = time.Now()
		}
		for range 3 { // of four places
			f.mustDial()
		}
		if got, err := io.ReadAll(f.mustDial()); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 503") {
			t.Errorf("one address gets all places: %s, %v", got, err)
		}
		time.Sleep(keptTimeout)
		f.do("GET", "/-/livez", "").want(t, 200)
		// A call for which the place is there may take longer.
		f.backend.delay = 2 * keptTimeout
		f.do("GET", "/-/v1/members", "").want(t, 200)
	})
}

// TestHTTP_AnnouncedBodies: what clients only announce takes nothing from others.
func TestHTTP_AnnouncedBodies(t *testing.T) {
	f := newFront(t, func(cfg *httpConfig) { cfg.valueSizeMax = 1 << 20 })
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
	f.do("PUT", "/k", strings.Repeat("v", 20<<10)).want(t, 201)
	if got := f.api.bodies.taken; got != 0 {
		t.Errorf("%d bytes are held for bodies that did not come", got)
	}
}

// TestHTTP_BodiesCount: a body counts with what it takes, whatever call it is for and however large values may be.
func TestHTTP_BodiesCount(t *testing.T) {
	for _, chunks := range []bool{false, true} {
		f := newFront(t, func(cfg *httpConfig) { cfg.valueSizeMax = 1 << 10 })
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
			f.api.bodies.mu.Lock()
			held = f.api.bodies.taken
			f.api.bodies.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		_ = c.(*net.TCPConn).CloseWrite()
		readAnswer(t, bufio.NewReader(c), "POST").want(t, 400)
		f.do("PUT", "/k", "v").want(t, 201)
		if f.api.bodies.taken != 0 {
			t.Errorf("%d bytes are held", f.api.bodies.taken)
		}
	}
}

func TestDivideDescriptors(t *testing.T) {
	for _, tt := range []struct {
		limit          uint64
		want           int
		clients, peers int
		fails          bool
	}{
		{1 << 20, 16384, 16384, 256, false},
		{1 << 40, 16384, 16384, 256, false},
		{20_000, 16384, 16384, 256, false},
		{1024, 16384, 695, 185, false},
		{256, 16384, 80, 32, false},
		{256, 10, 10, 32, false},
		{160, 16384, 0, 0, true},
		{64, 16384, 0, 0, true},
	} {
		d, err := divideDescriptors(tt.limit, tt.want)
		if (err != nil) != tt.fails || err == nil && (d.clients != tt.clients || d.peers != tt.peers) {
			t.Errorf("%d files, %d clients: %+v, %v", tt.limit, tt.want, d, err)
		}
		if used := d.clients + d.peers + keptMax + refusalsMax + filesReserved; err == nil && uint64(used) > tt.limit {
			t.Errorf("%d files: %+v comes to %d", tt.limit, d, used)
		}
	}
}
