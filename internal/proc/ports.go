package proc

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
)

const (
	// portsPerNode: raft, HTTP, Redis.
	portsPerNode = 3

	// Ports come from below the range that the kernel takes outgoing connections from (32768 and up on
	// Linux): while a killed node is down, a client's connection would sooner or later sit on its port.
	// They also stay clear of the ports of the Procfile.
	portMin = 23000
	portMax = 32000

	// portBlockSize bounds a cluster to ten nodes.
	portBlockSize = 32
)

// portBlock is a run of ports that belongs to one cluster. Its first port is held open as long as the
// cluster lives, so that clusters of other test processes on the machine choose other blocks even while
// some of our nodes are down.
type portBlock struct {
	guard net.Listener
	first int
}

// reservePorts finds a block whose first n ports are free.
func reservePorts(n int) (*portBlock, error) {
	if n >= portBlockSize {
		return nil, fmt.Errorf("reserve %d ports: at most %d", n, portBlockSize-1)
	}
	// From a random place on, so that clusters which start at the same time rarely meet.
	blocks := (portMax - portMin) / portBlockSize
	start := rand.IntN(blocks)
	for i := range blocks {
		first := portMin + (start+i)%blocks*portBlockSize
		guard, err := listen(first)
		if err != nil {
			continue
		}
		b := &portBlock{guard: guard, first: first}
		if b.free(n) {
			return b, nil
		}
		b.release()
	}
	return nil, errors.New("reserve ports: every block is in use")
}

func listen(port int) (net.Listener, error) {
	return net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

// port returns the i-th port after the guard.
func (b *portBlock) port(i int) int { return b.first + 1 + i }

// free reports whether nobody listens on the first n ports.
func (b *portBlock) free(n int) bool {
	for i := range n {
		l, err := listen(b.port(i))
		if err != nil {
			return false
		}
		_ = l.Close() // nothing was accepted
	}
	return true
}

func (b *portBlock) release() {
	_ = b.guard.Close() // nothing was accepted; closing twice is harmless
}
