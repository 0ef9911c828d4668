package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"raftrv/internal/httpapi"
	"raftrv/internal/shares"
	"raftrv/internal/testkit"
)

// newTestListener listens on a loopback port.
func newTestListener(t *testing.T, config listenerConfig) *listener {
	t.Helper()
	l, err := listen(t.Context(), "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.closeAll)
	return l
}

func mustDialTCP(t *testing.T, l *listener) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // may be closed already
	return c
}

func mustAccept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestListener_CountsAndFrees(t *testing.T) {
	l := newTestListener(t, listenerConfig{connectionsMax: 2})
	var open []net.Conn
	for range 2 {
		mustDialTCP(t, l)
		open = append(open, mustAccept(t, l))
	}
	if got, want := l.stats(), (connStats{open: 2, accepted: 2}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	_ = open[0].Close()
	_ = open[0].Close() // a second time must not free a second place
	if got, want := l.stats(), (connStats{open: 1, accepted: 2}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	mustDialTCP(t, l)
	mustAccept(t, l)
	if got, want := l.stats(), (connStats{open: 2, accepted: 3}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestListener_RefusesBeyondTheCap(t *testing.T) {
	l := newTestListener(t, listenerConfig{connectionsMax: 1, refusal: httpapi.Refusal()})
	mustDialTCP(t, l)
	first := mustAccept(t, l)

	acceptedC := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept() // sees to the refusals until there is room
		if err != nil {
			t.Error(err)
		}
		acceptedC <- c
	}()
	for range 3 {
		c := mustDialTCP(t, l)
		// The request is under way when the refusal is: it must not be lost in a reset.
		if _, err := io.WriteString(c, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 40000\r\n\r\n"+strings.Repeat("v", 40000)); err != nil {
			t.Fatal(err)
		}
		a := testkit.ReadAnswer(t, bufio.NewReader(c), "PUT")
		a.Want(t, 503)
		a.WantHeader(t, "Retry-After", "1")
		if !a.Last {
			t.Error("the client may think that the connection stays open")
		}
		var p httpapi.Problem
		testkit.Must(t, json.Unmarshal([]byte(a.Body), &p))
		if p.Status != 503 || p.Code != "too-many-connections" || p.Outcome != "" || !p.Retryable {
			t.Errorf("%+v", p)
		}
		_ = c.Close() // has its answer
	}
	if got, want := l.stats(), (connStats{open: 1, accepted: 1, refused: 3}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	_ = first.Close() // makes room
	mustDialTCP(t, l)
	if c := <-acceptedC; c == nil {
		t.Error("no room after a connection was closed")
	}
}

func TestListener_RefusalIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipes := testkit.NewPipeListener()
		l := newListener(pipes, listenerConfig{connectionsMax: 0, refusal: []byte("-ERR full\r\n")})
		accepted := make(chan struct{})
		go func() {
			defer close(accepted)
			if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		}()
		start := time.Now()
		var clients []net.Conn
		for range refusalsMax + 1 { // none of them reads
			c, err := pipes.Dial()
			if err != nil {
				t.Fatal(err)
			}
			clients = append(clients, c)
		}
		// The last one finds no refusal free: it is closed at once.
		if _, err := io.ReadAll(clients[refusalsMax]); err != nil || time.Since(start) > 0 {
			t.Errorf("closed after %v: %v", time.Since(start), err)
		}
		time.Sleep(refusalTimeout)
		synctest.Wait()
		for _, c := range clients {
			if got, err := io.ReadAll(c); len(got) > 0 || err != nil {
				t.Errorf("%q, %v after the refusal timed out", got, err)
			}
		}
		// There is room for refusals again, and this client reads.
		c, err := pipes.Dial()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); string(got) != "-ERR full\r\n" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		l.closeAll()
		<-accepted
	})
}

func TestListener_CloseAll(t *testing.T) {
	l := newTestListener(t, listenerConfig{connectionsMax: 1, refusal: []byte("full")})
	served, refused := mustDialTCP(t, l), net.Conn(nil)
	mustAccept(t, l)
	acceptErr := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		acceptErr <- err
	}()
	refused = mustDialTCP(t, l)
	if _, err := io.ReadFull(refused, make([]byte, len("full"))); err != nil {
		t.Fatal(err)
	}

	l.closeAll()
	l.closeAll() // once more does nothing
	if err := <-acceptErr; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
	for _, c := range []net.Conn{served, refused} {
		if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("still open: %d, %v", n, err)
		}
	}
	if got := l.stats().open; got != 0 {
		t.Errorf("%d open", got)
	}
}

// TestListener_CloseAllWaits: nothing of the listener's is left when closeAll returns.
func TestListener_CloseAllWaits(t *testing.T) {
	for range 20 { // without the wait it is a matter of luck
		l := newListener(testkit.NewPipeListener(), listenerConfig{connectionsMax: 0, refusal: []byte("full")})
		for range refusalsMax {
			_, server := net.Pipe() // nobody reads what it says
			l.admit(server)
		}
		l.closeAll()
		l.mu.Lock()
		left := len(l.refusing)
		l.mu.Unlock()
		if left > 0 {
			t.Fatalf("%d refusals are left", left)
		}
	}
}

// A connection that was accepted while closeAll ran must not stay.
func TestListener_NoConnectionAfterCloseAll(t *testing.T) {
	l := newListener(testkit.NewPipeListener(), listenerConfig{connectionsMax: 1})
	l.closeAll()
	client, server := net.Pipe()
	if c := l.admit(server); c != nil {
		t.Error("admitted")
	}
	if _, err := client.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("%v, want EOF", err)
	}
}

func TestListener_AddressInUse(t *testing.T) {
	l := newTestListener(t, listenerConfig{connectionsMax: 1})
	address := l.Addr().String()
	_, err := listen(t.Context(), address, listenerConfig{})
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), address) {
		t.Errorf("%v", err)
	}
}

// fullListener fails the way the kernel does when the process has no file
// descriptor left, and then works.
type fullListener struct {
	net.Listener
	failures int
}

func (l *fullListener) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

// The pause and the next try are http.Server's: this holds it to them.
func TestListener_ServerSurvivesFileLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipes := testkit.NewPipeListener()
		core, logs := observer.New(zap.WarnLevel)
		server := httpapi.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), zap.New(core))
		defer server.Close()
		go func() { _ = server.Serve(newListener(&fullListener{pipes, 20}, listenerConfig{connectionsMax: 1})) }() // ends with Close
		c, err := pipes.Dial()
		testkit.Must(t, err)
		_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		testkit.Must(t, err)
		testkit.ReadAnswer(t, bufio.NewReader(c), "GET").Want(t, 200)
		if n := logs.FilterMessage("http server").Len(); n != 20 {
			t.Errorf("%d warnings, want 20", n)
		}
	})
}

// Shutdown of a server must find its connections through the wrapper.
func TestListener_GracefulShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipes := testkit.NewPipeListener()
		l := newListener(pipes, listenerConfig{connectionsMax: 10})
		answer := make(chan struct{})
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			<-answer
			w.WriteHeader(http.StatusNoContent)
		})}
		go func() { _ = server.Serve(l) }() // ends with Shutdown
		c, err := pipes.Dial()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the handler has the request
		go func() {
			time.Sleep(time.Second)
			close(answer)
		}()
		shutdown := make(chan error, 1)
		go func() { shutdown <- server.Shutdown(context.Background()) }()
		testkit.ReadAnswer(t, bufio.NewReader(c), "GET").Want(t, 204)
		if err := <-shutdown; err != nil {
			t.Error(err)
		}
		l.closeAll()
		if got := l.stats().open; got != 0 {
			t.Errorf("%d open", got)
		}
	})
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
	if got := shares.AddressOf(mustAccept(t, l).RemoteAddr().String()).String(); got != "127.0.0.2" {
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

// TestHTTP_KeptPlacesAreShort: who has nothing to say, or says it slowly, has a kept place for a moment only.
func TestListener_KeptPlacesAreShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipes := testkit.NewPipeListener()
		slow := 2 * keptTimeout
		server := httpapi.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if place, ok := r.Context().Value(httpapi.KeptPlace{}).(httpapi.Placeholder); ok && r.URL.Path == "/slow" {
				testkit.Must(t, place.Deserve())
				time.Sleep(slow)
			}
			w.Header().Set("Connection", "close")
		}), zap.NewNop())
		defer server.Close()
		l := newListener(pipes, listenerConfig{keptMax: 4, refusal: httpapi.Refusal()})
		go func() { _ = server.Serve(l) }() // ends with Close
		dial := func() net.Conn {
			c, err := pipes.Dial()
			testkit.Must(t, err)
			return c
		}
		start := time.Now()
		for _, begin := range []string{"", "GET / HTTP/1.1\r\nHost: x\r\n"} {
			c := dial()
			_, err := io.WriteString(c, begin)
			testkit.Must(t, err)
			_, _ = io.ReadAll(c) // whatever it is told
			if took := time.Since(start); took > keptTimeout+time.Second {
				t.Errorf("%q: closed after %v", begin, took)
			}
			start = time.Now()
		}
		for range 3 { // of four places
			dial()
		}
		if got, err := io.ReadAll(dial()); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 503") {
			t.Errorf("one address gets all places: %s, %v", got, err)
		}
		time.Sleep(keptTimeout)
		// A request for which the place is there may take longer.
		for _, target := range []string{"/", "/slow"} {
			c := dial()
			_, err := io.WriteString(c, "GET "+target+" HTTP/1.1\r\nHost: x\r\n\r\n")
			testkit.Must(t, err)
			testkit.ReadAnswer(t, bufio.NewReader(c), "GET").Want(t, 200)
		}
	})
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
