package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// This file is the TCP side of every front end: a listener that knows its
// connections, takes no more than it has room for and can close them all.

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
	refusalsMax     = 64
	refusalDrainMax = 64 << 10 // bytes that are read from a refused client
)

// listenerConfig says what a listener allows.
type listenerConfig struct {
	connectionsMax int    // open at a time
	refusal        []byte // sent to a connection beyond that, a whole response of the protocol
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
	switch {
	case l.closed:
		_ = inner.Close() // unused
	case len(l.conns) < l.config.connectionsMax:
		c := &conn{Conn: inner, listener: l}
		l.conns[c] = struct{}{}
		l.accepted++
		return c
	case len(l.refusing) < refusalsMax:
		l.refused++
		l.refusing[inner] = struct{}{}
		l.refusals.Go(func() { l.refuse(inner) })
	default:
		l.refused++
		_ = inner.Close() // unused
	}
	return nil
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

	// first, if not nil, is given what is written next and returns what to write
	// instead. Only whoever writes may set it.
	first func([]byte) []byte
}

func (c *conn) Write(p []byte) (int, error) {
	if c.first == nil {
		return c.Conn.Write(p)
	}
	out := c.first(p)
	c.first = nil
	n, err := c.Conn.Write(out)
	return min(n, len(p)), err
}

// Close may be called more than once, by its user and by closeAll.
func (c *conn) Close() error {
	c.listener.mu.Lock()
	delete(c.listener.conns, c)
	c.listener.mu.Unlock()
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
