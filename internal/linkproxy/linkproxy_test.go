package linkproxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newTestNetwork returns a network in front of nodes that echo, behind a header like that of a first request.
func newTestNetwork(t *testing.T, ids ...int) *Network {
	t.Helper()
	targets := map[int]string{}
	for _, id := range ids {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		t.Cleanup(func() { l.Close() })
		targets[id] = l.Addr().String()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					_, _ = io.Copy(c, c)
				}()
			}
		}()
	}
	n, err := New(targets)
	must(t, err)
	t.Cleanup(func() { must(t, n.Close()) })
	return n
}

// peer is one side of a connection, with the echo of its header already read.
type peer struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

func head(from int) string {
	return fmt.Sprintf("GET /raft HTTP/1.1\r\nHost: x\r\nX-Server-From: %x\r\n\r\n", from)
}

// dial opens a connection. Nothing is expected of it yet.
func dial(t *testing.T, n *Network, from, to int) *peer {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(n.URL(to), "http://"))
	must(t, err)
	t.Cleanup(func() { c.Close() })
	p := &peer{c, t, bufio.NewReader(c)}
	p.send(head(from))
	return p
}

func (p *peer) send(s string) {
	p.t.Helper()
	_, err := io.WriteString(p, s)
	must(p.t, err)
}

func (p *peer) want(s string) {
	p.t.Helper()
	must(p.t, p.SetReadDeadline(time.Now().Add(10*time.Second)))
	buf := make([]byte, len(s))
	if _, err := io.ReadFull(p.r, buf); err != nil || string(buf) != s {
		p.t.Fatalf("got %q, %v, want %q", buf, err, s)
	}
}

// wantSilence checks that nothing arrives for a while.
func (p *peer) wantSilence() {
	p.t.Helper()
	must(p.t, p.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	if b, err := p.r.ReadByte(); !errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Fatalf("got %q, %v, want nothing", b, err)
	}
}

func TestNetwork_Cut(t *testing.T) {
	n := newTestNetwork(t, 1, 2, 3)
	// The nodes echo, so what is cut from 2 to 1 holds up the answers to 1.
	for _, cut := range []pair{{1, 2}, {2, 1}} {
		p, other := dial(t, n, 1, 2), dial(t, n, 3, 2)
		p.want(head(1))
		other.want(head(3))
		n.Cut(cut.from, cut.to)
		p.send("a")
		p.wantSilence()
		fresh := dial(t, n, 1, 2)
		fresh.wantSilence()
		other.send("b") // another link
		other.want("b")
		n.Heal()
		p.want("a") // late, not lost
		fresh.want(head(1))
	}
}

// TestNetwork_CutHidesTheEnd: a node behind a cut link does not learn that its peer is gone.
func TestNetwork_CutHidesTheEnd(t *testing.T) {
	ended := make(chan error, 1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = io.Copy(io.Discard, c)
			c.Close()
		}
		ended <- err
	}()
	n, err := New(map[int]string{2: l.Addr().String()})
	must(t, err)
	defer n.Close()

	p := dial(t, n, 1, 2)
	time.Sleep(20 * time.Millisecond) // the connection stands
	n.Cut(1, 2)
	must(t, p.Close())
	select {
	case err := <-ended:
		t.Fatalf("noticed: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	n.Heal()
	must(t, <-ended)
}

func TestNetwork_Reset(t *testing.T) {
	n := newTestNetwork(t, 1, 2, 3)
	p, q, other := dial(t, n, 1, 2), dial(t, n, 2, 1), dial(t, n, 3, 2)
	p.want(head(1))
	q.want(head(2))
	other.want(head(3))
	n.Reset(2, 1)
	for _, p := range []*peer{p, q} {
		if _, err := p.r.ReadByte(); err == nil {
			t.Error("still connected")
		}
	}
	other.send("b")
	other.want("b")
}

func TestNetwork_NodeDown(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, l.Close())
	n, err := New(map[int]string{1: l.Addr().String()})
	must(t, err)
	defer n.Close()
	if _, err := dial(t, n, 2, 1).r.ReadByte(); err == nil {
		t.Error("connected to nobody")
	}
}

// TestNetwork_UnknownSender: a request without a name must not lend its connection to one that has.
func TestNetwork_UnknownSender(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.RemoteAddr) })}
	go func() { _ = server.Serve(l) }() // http.ErrServerClosed
	defer server.Close()
	n, err := New(map[int]string{1: l.Addr().String()})
	must(t, err)
	defer n.Close()

	client := http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	get := func(from string) string {
		req, err := http.NewRequest(http.MethodGet, n.URL(1), nil)
		must(t, err)
		req.Header.Set(senderHeader, from)
		res, err := client.Do(req)
		must(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		must(t, err)
		return string(b)
	}
	if a, b := get(""), get("2"); a == b {
		t.Error("one connection for both")
	}
	if a, b := get("2"), get("2"); a != b {
		t.Error("connection not kept")
	}
}

// Timing is tested in virtual time, on pipes.

// newTestLink connects two pipes by a link and returns their far ends.
func newTestLink(l *link) (src, dst net.Conn, wait func()) {
	near, src := net.Pipe()
	dst, far := net.Pipe()
	c := &conn{client: near, server: far, done: make(chan struct{})}
	ended := make(chan struct{})
	go func() {
		l.carry(far, near, c)
		close(ended)
	}()
	return src, dst, func() { <-ended }
}

func TestLink_Delay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &link{changed: make(chan struct{}), delay: time.Second}
		src, dst, wait := newTestLink(l)
		start := time.Now()
		for i := range 3 { // sent 100 ms apart, they arrive 100 ms apart
			go func() {
				time.Sleep(time.Duration(i) * 100 * time.Millisecond)
				_, _ = src.Write([]byte{byte(i)})
			}()
		}
		for i := range 3 {
			var b [1]byte
			_, err := dst.Read(b[:])
			must(t, err)
			if got, want := time.Since(start), time.Second+time.Duration(i)*100*time.Millisecond; got != want || int(b[0]) != i {
				t.Errorf("byte %d after %v, want %d after %v", b[0], got, i, want)
			}
		}
		must(t, src.Close())
		if _, err := dst.Read(make([]byte, 1)); err == nil || time.Since(start) < 2*time.Second {
			t.Errorf("end after %v: %v; it must be delayed, too", time.Since(start), err)
		}
		wait()
	})
}

func TestLink_Rate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 100_000
		l := &link{changed: make(chan struct{}), rate: 10_000}
		src, dst, wait := newTestLink(l)
		start := time.Now()
		go func() {
			_, _ = src.Write(make([]byte, size))
			_ = src.Close()
		}()
		n, _ := io.Copy(io.Discard, dst)
		if took := time.Since(start); n != size || took != 10*time.Second {
			t.Errorf("%d bytes in %v, want %d in 10s", n, took, size)
		}
		wait()
	})
}

// TestLink_HealWhileWaiting: a change reaches what already waits.
func TestLink_HealWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &link{changed: make(chan struct{}), delay: time.Hour}
		src, dst, wait := newTestLink(l)
		start := time.Now()
		go func() { _, _ = src.Write([]byte("a")) }()
		go func() {
			time.Sleep(time.Second)
			l.set(func(l *link) { l.cut = true })
			time.Sleep(2 * time.Hour)
			l.set(func(l *link) { l.cut, l.delay = false, 0 })
		}()
		_, err := dst.Read(make([]byte, 1))
		must(t, err)
		if got, want := time.Since(start), 2*time.Hour+time.Second; got != want {
			t.Errorf("arrived after %v, want %v", got, want)
		}
		must(t, src.Close())
		wait()
	})
}
