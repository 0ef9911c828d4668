// Package linkproxy stands between the nodes of a cluster, so that a test can cut, slow down and reset what
// connects them.
//
// A [Network] has one listener in front of every node, and its address is the one that all nodes, this one
// too, know the node by. (An address of its own for every pair would be simpler, but nodes pass addresses on:
// what a leader calls a member ends up in every member's snapshot.) Who dials is read from the header that
// the nodes' HTTP transport puts in front of each connection.
//
// Links have a direction. A cut link holds what is sent until it is healed or the connection ends, as TCP
// does when packets get lost: nobody gets an error, bytes may arrive very late, and no byte is ever missing
// from the middle of a connection.
package linkproxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"strconv"
	"sync"
	"time"
)

const (
	// senderHeader says which node has sent a request, in hexadecimal.
	senderHeader = "X-Server-From"
	// headSizeMax bounds the header of a connection's first request.
	headSizeMax = 16 << 10
	// chunkSize and chunksMax bound what is on its way in one direction of a connection.
	chunkSize = 32 << 10
	chunksMax = 64
	// dialTimeout is for a node on the same machine.
	dialTimeout = time.Second
)

// Network connects nodes. Its methods may be called from any goroutine.
type Network struct {
	nodes map[int]*front
	done  chan struct{} // closed by Close
	work  sync.WaitGroup

	mu     sync.Mutex
	closed bool
	links  map[pair]*link
	conns  map[*conn]struct{}
}

// pair names a link: from sends, to receives.
type pair struct{ from, to int }

// front is where a node seems to be, and where it is.
type front struct {
	id       int
	listener net.Listener
	target   string
}

// conn is a connection between two nodes: client is the side that dialed.
type conn struct {
	client net.Conn
	to     int
	done   chan struct{} // closed by close

	mu     sync.Mutex
	closed bool
	from   int      // 0 until it is known
	server net.Conn // nil until it is dialed
}

// close ends the connection, whatever it is doing. It may be called more than once.
func (c *conn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	close(c.done)
	_ = c.client.Close() // the nodes learn no more than that
	if c.server != nil {
		_ = c.server.Close()
	}
}

// identify notes who dialed.
func (c *conn) identify(from int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.from = from
}

// attach adds the other side. It returns false if the connection has ended meanwhile.
func (c *conn) attach(server net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		_ = server.Close() // unused
		return false
	}
	c.server = server
	return true
}

// between says whether the connection is one between two nodes, whoever dialed.
func (c *conn) between(a, b int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.from == a && c.to == b || c.from == b && c.to == a
}

// New listens in front of nodes, given where each of them listens: host:port by id.
func New(targets map[int]string) (*Network, error) {
	n := &Network{
		nodes: map[int]*front{},
		done:  make(chan struct{}),
		links: map[pair]*link{},
		conns: map[*conn]struct{}{},
	}
	for id, target := range targets {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, errors.Join(fmt.Errorf("listen for node %d: %w", id, err), n.Close())
		}
		f := &front{id: id, listener: l, target: target}
		n.nodes[id] = f
		n.work.Go(func() { n.accept(f) })
	}
	return n, nil
}

// URL returns the address that the nodes should know a node by.
func (n *Network) URL(id int) string { return "http://" + n.nodes[id].listener.Addr().String() }

// Close ends all connections and waits for everything that New has started.
func (n *Network) Close() error {
	n.mu.Lock()
	if !n.closed {
		n.closed = true
		close(n.done)
	}
	var conns []*conn
	for c := range n.conns {
		conns = append(conns, c)
	}
	n.mu.Unlock()
	var errs []error
	for _, f := range n.nodes {
		if err := f.listener.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, c := range conns {
		c.close()
	}
	n.work.Wait()
	return errors.Join(errs...)
}

// Cut holds all that from sends to to. Neither can open a connection to the other then.
func (n *Network) Cut(from, to int) {
	n.link(from, to).set(func(l *link) { l.cut = true })
}

// Slow delays all that from sends to to, and lets through only so many bytes a second; 0 is any number.
func (n *Network) Slow(from, to int, delay time.Duration, bytesPerSecond int) {
	n.link(from, to).set(func(l *link) { l.delay, l.rate = delay, bytesPerSecond })
}

// Heal makes all links whole and fast.
func (n *Network) Heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.links {
		l.set(func(l *link) { l.cut, l.delay, l.rate = false, 0, 0 })
	}
}

// Reset ends the connections between two nodes, with all that is on its way.
func (n *Network) Reset(a, b int) {
	n.mu.Lock()
	var conns []*conn
	for c := range n.conns {
		if c.between(a, b) {
			conns = append(conns, c)
		}
	}
	n.mu.Unlock()
	for _, c := range conns {
		c.close()
	}
}

func (n *Network) link(from, to int) *link {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.links[pair{from, to}]
	if l == nil {
		l = &link{changed: make(chan struct{})}
		n.links[pair{from, to}] = l
	}
	return l
}

func (n *Network) accept(f *front) {
	for {
		client, err := f.listener.Accept()
		if err != nil {
			return // closed
		}
		c := &conn{client: client, to: f.id, done: make(chan struct{})}
		if !n.track(c) {
			c.close()
			return
		}
		n.work.Go(func() {
			defer n.forget(c)
			n.serve(c, f.target)
		})
	}
}

// track makes a connection one that Close and Reset know of.
func (n *Network) track(c *conn) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.conns[c] = struct{}{}
	return true
}

func (n *Network) forget(c *conn) {
	c.close()
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.conns, c)
}

// serve connects client with the node behind it and returns when the connection has ended.
func (n *Network) serve(c *conn, target string) {
	head, from, err := readHead(c.client)
	if err != nil {
		return
	}
	c.identify(from)
	there, back := n.link(from, c.to), n.link(c.to, from)
	// To open a connection takes packets in both directions.
	if !there.wait(time.Now(), c.done) || !back.wait(time.Now(), c.done) {
		return
	}
	server, err := net.DialTimeout("tcp", target, dialTimeout)
	if err != nil {
		return // the node is down
	}
	if !c.attach(server) {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { there.carry(server, io.MultiReader(bytes.NewReader(head), c.client), c) })
	wg.Go(func() { back.carry(c.client, server, c) })
	wg.Wait()
}

// readHead reads the header of the first request, and maybe more, and says who sends it; 0 if it does not
// tell. Then the request is made the last one of its connection, because the next one may be from a part of
// the node's transport that does tell.
func readHead(r io.Reader) (head []byte, from int, err error) {
	end := []byte("\r\n\r\n")
	for !bytes.Contains(head, end) {
		if len(head) > headSizeMax {
			return nil, 0, errors.New("no HTTP header")
		}
		var buf [4 << 10]byte
		k, err := r.Read(buf[:])
		head = append(head, buf[:k]...)
		if err != nil {
			return nil, 0, err
		}
	}
	tp := textproto.NewReader(bufio.NewReader(bytes.NewReader(head)))
	if _, err := tp.ReadLine(); err != nil { // GET /raft HTTP/1.1
		return nil, 0, err
	}
	header, err := tp.ReadMIMEHeader()
	if err != nil {
		return nil, 0, err
	}
	id, err := strconv.ParseUint(header.Get(senderHeader), 16, 31)
	if err != nil {
		head = bytes.Replace(head, end, []byte("\r\nConnection: close\r\n\r\n"), 1)
	}
	return head, int(id), nil
}

// link is one direction between two nodes.
type link struct {
	mu      sync.Mutex
	cut     bool
	delay   time.Duration
	rate    int           // bytes a second; 0 is any number
	changed chan struct{} // closed when something of this changes, and replaced
}

func (l *link) set(f func(*link)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(l)
	close(l.changed)
	l.changed = make(chan struct{})
}

// wait returns when what was sent at some time may arrive. It returns false if done is closed before that.
func (l *link) wait(sent time.Time, done <-chan struct{}) bool {
	for {
		l.mu.Lock()
		cut, delay, changed := l.cut, l.delay, l.changed
		l.mu.Unlock()
		var arrival <-chan time.Time // never, on a cut link
		if !cut {
			rest := time.Until(sent.Add(delay))
			if rest <= 0 {
				return true
			}
			arrival = time.After(rest)
		}
		select {
		case <-arrival:
		case <-changed:
		case <-done:
			return false
		}
	}
}

// pace waits as long as n bytes need.
func (l *link) pace(n int, done <-chan struct{}) bool {
	l.mu.Lock()
	rate := l.rate
	l.mu.Unlock()
	if rate == 0 {
		return true
	}
	select {
	case <-time.After(time.Duration(n) * time.Second / time.Duration(rate)):
		return true
	case <-done:
		return false
	}
}

// chunk is some bytes, and when they were sent.
type chunk struct {
	data *[chunkSize]byte
	n    int
	sent time.Time
}

var chunkPool = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// carry moves bytes in one direction. When src ends, so does the connection, once everything before that has
// arrived: the end travels like data.
func (l *link) carry(dst io.Writer, src io.Reader, c *conn) {
	chunks := make(chan chunk, chunksMax)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer c.close() // ends the reader
	reader.Go(func() {
		defer close(chunks)
		for {
			data := chunkPool.Get().(*[chunkSize]byte)
			k, err := src.Read(data[:])
			if k > 0 {
				select {
				case chunks <- chunk{data, k, time.Now()}:
				case <-c.done:
					return
				}
			}
			if err != nil {
				return
			}
		}
	})
	for ch := range chunks {
		if !l.wait(ch.sent, c.done) || !l.pace(ch.n, c.done) {
			return
		}
		_, err := dst.Write(ch.data[:ch.n])
		chunkPool.Put(ch.data)
		if err != nil {
			return
		}
	}
	l.wait(time.Now(), c.done)
}
