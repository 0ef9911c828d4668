package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"raftrv/internal/httpapi"
	"raftrv/internal/shares"
)

// This file is the TCP side of every front end and of the peer port: a listener
// that knows its connections, takes no more than it has room for, and from one
// address no more than its share, and can close them all.

const (
	connectionsMaxDefault = 16384

	// A peer that vanished without a word is noticed after keepAliveIdle and
	// keepAliveCount unanswered probes: 35 s.
	keepAliveIdle     = 15 * time.Second
	keepAliveInterval = 5 * time.Second
	keepAliveCount    = 4

	// A connection that is one too many gets an answer, at most refusalsMax of
	// them at a time and each within refusalTimeout. The rest is just closed.
	refusalTimeout  = time.Second
	refusalsMax     = 32
	refusalDrainMax = 64 << 10 // bytes that are read from a refused client

	// When there is no room left for a client there are still some places for those
	// who look after the node. Each has keptTimeout to say that this is what it is for.
	keptMax     = 16
	keptTimeout = 2 * time.Second
)

// listenerConfig says what a listener allows.
type listenerConfig struct {
	connectionsMax int           // open at a time
	addressMax     int           // of them from one address; 0 = all
	keptMax        int           // places beyond that, see conn.kept
	refusal        []byte        // sent to a connection beyond that, a whole response of the protocol
	writeTimeout   time.Duration // of each write; 0 = whoever writes sees to that
}

// connStats counts the connections of a listener.
type connStats struct {
	open     int
	accepted uint64 // since the start, without the refused
	refused  uint64
}

// listener is a net.Listener whose connections are tracked and capped.
type listener struct {
	net.Listener
	config   listenerConfig
	refusals sync.WaitGroup
	places   shares.Shares // of connections
	kept     shares.Shares // of those beyond

	mu       sync.Mutex
	closed   bool // by closeAll: no connection may be added
	conns    map[*conn]struct{}
	refusing map[net.Conn]struct{} // beside conns: they do not count as open
	accepted uint64
	refused  uint64
}

// listen binds a TCP address.
func listen(ctx context.Context, address string, config listenerConfig) (*listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable:   true,
		Idle:     keepAliveIdle,
		Interval: keepAliveInterval,
		Count:    keepAliveCount,
	}}
	inner, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err) // net's error has the address
	}
	return newListener(inner, config), nil
}

func newListener(inner net.Listener, config listenerConfig) *listener {
	return &listener{
		Listener: inner,
		config:   config,
		places:   shares.New(int64(config.connectionsMax), int64(cmp.Or(config.addressMax, config.connectionsMax))),
		kept:     shares.New(int64(config.keptMax), shares.MostOf(int64(config.keptMax))),
		conns:    map[*conn]struct{}{},
		refusing: map[net.Conn]struct{}{},
	}
}

// Accept waits for a connection that there is room for. It returns errors such
// as too many open files as they come; http.Server pauses and calls again, and
// so must every other caller.
func (l *listener) Accept() (net.Conn, error) {
	for {
		inner, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.admit(inner); c != nil {
			return c, nil
		}
	}
}

// admit tracks a new connection. If it may not stay it sees to its end and
// returns nil.
func (l *listener) admit(inner net.Conn) *conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &conn{Conn: inner, listener: l, address: shares.AddressOf(inner.RemoteAddr().String())}
	switch {
	case l.closed:
		_ = inner.Close() // unused
	case l.places.Take(c.address, 1):
		c.place = &l.places
		return l.add(c)
	case l.kept.Take(c.address, 1):
		c.place, c.kept, c.until = &l.kept, true, time.Now().Add(keptTimeout)
		return l.add(c)
	case len(l.refusing) < refusalsMax && l.config.refusal != nil:
		l.refused++
		l.refusing[inner] = struct{}{}
		l.refusals.Go(func() { l.refuse(inner) })
	default:
		l.refused++
		_ = inner.Close() // unused
	}
	return nil
}

func (l *listener) add(c *conn) *conn {
	l.conns[c] = struct{}{}
	l.accepted++
	return c
}

// refuse tells a client that there is no room and closes its connection.
func (l *listener) refuse(c net.Conn) {
	defer l.forgetRefusal(c)
	_ = c.SetDeadline(time.Now().Add(refusalTimeout)) // fails if closed, and so does the next line
	if _, err := c.Write(l.config.refusal); err != nil {
		return
	}
	// Closing with unread input would send a reset, which may overtake the
	// answer. So say that this was all, and wait for the client to close.
	_ = closeWrite(c)
	_, _ = io.CopyN(io.Discard, c, refusalDrainMax)
}

func (l *listener) forgetRefusal(c net.Conn) {
	_ = c.Close() // answered or given up
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.refusing, c)
}

// closeAll closes the listener and every connection, whatever it is doing, and
// waits for its own goroutines.
func (l *listener) closeAll() {
	_ = l.Close() // may be closed already
	l.mu.Lock()
	l.closed = true
	var open []net.Conn
	for c := range l.conns {
		open = append(open, c)
	}
	for c := range l.refusing {
		open = append(open, c)
	}
	l.mu.Unlock()
	for _, c := range open {
		_ = c.Close() // the peer learns no more than that
	}
	l.refusals.Wait()
}

func (l *listener) stats() connStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return connStats{open: len(l.conns), accepted: l.accepted, refused: l.refused}
}

// conn is a tracked connection. Closing it makes room for another.
type conn struct {
	net.Conn
	listener *listener
	address  netip.Addr
	place    *shares.Shares // where it has its place

	// kept says that it has a place that is kept for those who look after the node,
	// for whom it must turn out to be before until. Only whoever serves it may use
	// these two.
	kept  bool
	until time.Time

	first func([]byte) []byte // see rewriteNext
}

// RewriteNext lets f see what is written next, once, and say what to write instead.
// Only whoever writes may call it.
func (c *conn) RewriteNext(f func([]byte) []byte) { c.first = f }

func (c *conn) Write(p []byte) (int, error) {
	if timeout := c.listener.config.writeTimeout; timeout > 0 {
		if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
			return 0, err
		}
	}
	if c.first == nil {
		return c.Conn.Write(p)
	}
	out := c.first(p)
	c.first = nil
	n, err := c.Conn.Write(out)
	return min(n, len(p)), err
}

// SetReadDeadline gives a connection that has a kept place no more time than that has.
func (c *conn) SetReadDeadline(t time.Time) error {
	if !c.until.IsZero() && (t.IsZero() || t.After(c.until)) {
		t = c.until
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *conn) IsKept() bool { return c.kept }

// Deserve says that what came on a kept place is what that is kept for.
func (c *conn) Deserve() error {
	c.until = time.Time{}
	return c.SetReadDeadline(time.Now().Add(httpapi.BodyTimeout))
}

// Close may be called more than once, by its user and by closeAll.
func (c *conn) Close() error {
	l := c.listener
	l.mu.Lock()
	if _, open := l.conns[c]; open {
		delete(l.conns, c)
		c.place.Give(c.address, 1)
	}
	l.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite lets http.Server end a connection so that its last answer arrives.
func (c *conn) CloseWrite() error {
	return closeWrite(c.Conn)
}

// closeWrite ends the sending side, if the connection has sides.
func closeWrite(c net.Conn) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// descriptors is how many open files a process may have, and for what. The log and
// the snapshots must always find one: a node that cannot write them ends.
type descriptors struct {
	limit          uint64
	clients, peers int // connections that may be open
}

const (
	// filesReserved are for the log, the snapshots, the journal, and the connections
	// that a node opens itself.
	filesReserved   = 96
	peersMaxDefault = 256 // connections of other members; each has about eight
	peersShare      = 5   // they get a part of what there is, if that is less
	clientsMin      = 16
)

// divideDescriptors says how many connections there may be so that the files find a
// descriptor. clients is how many clients are wanted.
func divideDescriptors(limit uint64, clients int) (descriptors, error) {
	d := descriptors{limit: limit}
	free := int(min(limit, math.MaxInt32)) - filesReserved
	d.peers = min(free/peersShare, peersMaxDefault)
	d.clients = min(clients, free-d.peers-keptMax-refusalsMax)
	if d.clients < min(clients, clientsMin) {
		return d, fmt.Errorf("a process may have %d open files here, which is not enough; raise the limit (ulimit -n, LimitNOFILE=) to 1024 or more", limit)
	}
	return d, nil
}

// openFilesMax returns how many files this process may have open. Go has raised that
// to the hard limit.
func openFilesMax() (uint64, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("limit of open files: %w", err)
	}
	return limit.Cur, nil
}
