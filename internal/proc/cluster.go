// Package proc runs a raftrv cluster as real child processes, for the tests and tools that need what only
// processes have: a SIGKILL in the middle of a write, a paused leader, a disk that outlives its node.
//
// A [Cluster] reserves ports and directories and hands out [Node] values; a Node can be started, stopped,
// killed, paused and started again, and keeps its ports and its data directory across all of that. Nothing
// here sleeps for a fixed time: whoever waits, waits for a condition and a context.
package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// stopTimeout is how long [Cluster.Stop] waits for a node to leave by itself. A node promises 5 s.
const stopTimeout = 10 * time.Second

// Options say what cluster to run. Only Binary is needed.
type Options struct {
	// Binary is the path of the raftrv executable.
	Binary string
	// Nodes is how many nodes the cluster has; 0 means 3.
	Nodes int
	// Dir holds the data directories and the logs, and stays when the cluster stops. Empty means a
	// directory of its own among the temporary files, which Stop removes.
	Dir string
	// Token is the --cluster-token of all nodes; empty means that they have none, as most clusters.
	Token string
	// Args are flags for every node, after the ones that the cluster needs itself.
	Args []string
	// NodeArgs, if set, returns further flags for one node. It is asked at every start, so it may
	// change its mind between two starts.
	NodeArgs func(n *Node) []string
	// PeerURLs, if set, returns the --cluster list of one node, given the list of where every node's
	// raft port really is. A proxy for each link replaces the entries of the others; a node's own entry
	// says where it listens.
	PeerURLs func(n *Node, urls []string) []string
	// Host, if set, returns the address that a node listens at, 127.0.0.1 otherwise. It is asked once.
	Host func(id int) string
	// Wrap, if set, returns a command that starts a node's command, which follows it: a node may live
	// in a network namespace. Signals go to the process that results, so it must become the node.
	Wrap func(n *Node) []string
	// Env is added to the environment of this process.
	Env []string
}

// Cluster is a set of raftrv processes with consecutive ids from 1. Its methods may be called from any
// goroutine.
type Cluster struct {
	// Nodes are in the order of their ids: Nodes[0] has id 1, until Forget.
	Nodes []*Node

	opts    Options
	dir     string
	ownsDir bool
	ports   []*portBlock
	urls    []string // raft URL by id - 1, of nodes that were forgotten too
	gone    []*Node
}

// NewCluster reserves ports and makes directories. It starts no process; Stop gives everything back.
func NewCluster(opts Options) (*Cluster, error) {
	if opts.Nodes == 0 {
		opts.Nodes = 3
	}
	// A node's command line must not depend on the directory that the caller is in.
	binary, err := filepath.Abs(opts.Binary)
	if err != nil {
		return nil, fmt.Errorf("find binary: %w", err)
	}
	opts.Binary = binary
	if _, err := os.Stat(binary); err != nil {
		return nil, fmt.Errorf("find binary: %w", err)
	}

	c := &Cluster{opts: opts}
	if err := c.makeDir(); err != nil {
		return nil, err
	}
	if err := c.addNodes(opts.Nodes); err != nil {
		return nil, errors.Join(err, c.removeDir())
	}
	for _, n := range c.Nodes {
		n.urls = c.urls // all of them are there from the start
	}
	return c, nil
}

// addNodes adds nodes that have ports and no process.
func (c *Cluster) addNodes(n int) error {
	ports, err := reservePorts(portsPerNode * n)
	if err != nil {
		return err
	}
	c.ports = append(c.ports, ports)
	for i := range n {
		id, host := len(c.urls)+1, "127.0.0.1"
		if c.opts.Host != nil {
			host = c.opts.Host(id)
		}
		added := &Node{
			ID:        id,
			Host:      host,
			RaftPort:  ports.port(portsPerNode * i),
			HTTPPort:  ports.port(portsPerNode*i + 1),
			RedisPort: ports.port(portsPerNode*i + 2),
			DataDir:   filepath.Join(c.dir, fmt.Sprintf("raftrv-%d", id)),
			LogFile:   filepath.Join(c.dir, fmt.Sprintf("raftrv-%d.log", id)),
			cluster:   c,
		}
		c.urls = append(c.urls, added.RaftURL())
		c.Nodes = append(c.Nodes, added)
	}
	return nil
}

// Add returns another node, which is to join the cluster once it was made a member. It has no process yet.
func (c *Cluster) Add() (*Node, error) {
	if err := c.addNodes(1); err != nil {
		return nil, err
	}
	n := c.Nodes[len(c.Nodes)-1]
	n.joins, n.urls = true, slices.Clone(c.urls)
	return n, nil
}

// Forget takes a node out of Nodes: it is no member any more. Stop still stops it.
func (c *Cluster) Forget(n *Node) {
	c.Nodes = slices.DeleteFunc(slices.Clone(c.Nodes), func(other *Node) bool { return other == n })
	c.gone = append(c.gone, n)
}

func (c *Cluster) makeDir() error {
	if c.opts.Dir != "" {
		dir, err := filepath.Abs(c.opts.Dir)
		if err != nil {
			return fmt.Errorf("make cluster directory: %w", err)
		}
		c.dir = dir
		return os.MkdirAll(dir, 0o700)
	}
	dir, err := os.MkdirTemp("", "raftrv-cluster-")
	if err != nil {
		return fmt.Errorf("make cluster directory: %w", err)
	}
	c.dir, c.ownsDir = dir, true
	return nil
}

func (c *Cluster) removeDir() error {
	if !c.ownsDir {
		return nil
	}
	return os.RemoveAll(c.dir)
}

// Start starts every node that has no process and waits until all of them are ready.
func (c *Cluster) Start(ctx context.Context) error {
	for _, n := range c.Nodes {
		if n.process() != nil {
			continue
		}
		if err := n.Start(); err != nil {
			return err
		}
	}
	return c.WaitReady(ctx)
}

// Stop stops every node, paused ones too, and gives back the ports and the directory. A node that had crashed,
// or that had to be killed, is named in the error. A second Stop does nothing.
func (c *Cluster) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()

	// All at once: the last one would otherwise wait for a quorum that has already left.
	nodes := slices.Concat(c.Nodes, c.gone)
	errC := make(chan error, len(nodes))
	for _, n := range nodes {
		go func() { errC <- n.Stop(ctx) }()
	}
	var errs []error
	for range nodes {
		errs = append(errs, <-errC)
	}
	for _, p := range c.ports {
		p.release()
	}
	return errors.Join(append(errs, c.removeDir())...)
}

// WaitReady waits until every node that was started, and not stopped since, says that it is ready. It fails
// at once when one of them has crashed.
func (c *Cluster) WaitReady(ctx context.Context) error {
	// The first to fail ends the wait of the others: without it they may never be ready.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, n := range c.Nodes {
		if n.process() == nil {
			continue
		}
		wg.Go(func() {
			if err := n.WaitReady(ctx); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// Leader waits until a quorum of the cluster names the same leader in the same term, and returns it. A
// leader that was cut off may go on believing in itself; the quorum does not.
func (c *Cluster) Leader(ctx context.Context) (*Node, error) {
	var leader *Node
	err := poll(ctx, nil, func() (err error) {
		leader, err = c.findLeader(ctx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find leader: %w", err)
	}
	return leader, nil
}

func (c *Cluster) findLeader(ctx context.Context) (*Node, error) {
	// Nodes are asked at the same time, because one that hangs would hold up the others' answers.
	statusC := make(chan Status, len(c.Nodes))
	for _, n := range c.Nodes {
		go func() {
			s, err := n.Status(ctx)
			if err != nil {
				s = Status{} // says what a node without a leader says
			}
			statusC <- s
		}()
	}
	type claim struct{ leader, term uint64 }
	votes := make(map[claim]int)
	var leader *Node
	for range c.Nodes {
		s := <-statusC
		i := slices.IndexFunc(c.Nodes, func(n *Node) bool { return uint64(n.ID) == s.LeaderID })
		if i < 0 {
			continue
		}
		v := claim{s.LeaderID, s.Term}
		votes[v]++
		if votes[v] == len(c.Nodes)/2+1 {
			leader = c.Nodes[i]
		}
	}
	if leader == nil {
		return nil, errors.New("no quorum agrees on a leader")
	}
	return leader, nil
}

// URLs returns the HTTP base URL of every node.
func (c *Cluster) URLs() []string {
	urls := make([]string, len(c.Nodes))
	for i, n := range c.Nodes {
		urls[i] = n.URL()
	}
	return urls
}
