package tests

import (
	"sync"
	"time"

	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// fault is a bad thing that can happen to a cluster.
type disturbance struct {
	name      string
	nodesMin  int  // of the cluster
	proxyOnly bool // not on every kind of network
	// inject makes it happen. It returns the nodes that must be able to serve in spite of it; healing is the
	// same for all faults.
	inject func(c *chaos, leader *proc.Node) (serving []*proc.Node)
}

// leaderKilled is the fault whose duration clients are promised something about.
const leaderKilled = "leader killed"

// faults are all of them. The ones that say nothing of the leader take whom chance takes.
var faults = []disturbance{
	{leaderKilled, 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		c.kill(leader)
		return c.others(leader)
	}},
	{"leader paused", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		c.pause(leader)
		return c.others(leader)
	}},
	{"leader asked to stop", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		c.stopping.Go(func() { c.stop(leader) })
		return c.others(leader)
	}},
	{"leader alone", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		c.cutBoth([]*proc.Node{leader}, c.others(leader))
		return c.others(leader)
	}},
	{"leader deaf", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		c.cut(c.others(leader), []*proc.Node{leader})
		return c.others(leader)
	}},
	{"leader mute", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		c.cut([]*proc.Node{leader}, c.others(leader))
		return c.others(leader)
	}},
	{"follower killed", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		n := c.pick(c.others(leader), 1)
		c.kill(n...)
		return c.others(n...)
	}},
	{"follower paused", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		n := c.pick(c.others(leader), 1)
		c.pause(n...)
		return c.others(n...)
	}},
	{"follower deaf", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		n := c.pick(c.others(leader), 1)
		c.cut(c.others(n...), n)
		return c.others(n...)
	}},
	{"follower mute", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		n := c.pick(c.others(leader), 1)
		c.cut(n, c.others(n...))
		return c.others(n...)
	}},
	{"follower falls far behind", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		n := c.pick(c.others(leader), 1)
		c.kill(n...)
		c.writeMuch(leader)
		return c.others(n...)
	}},
	{"all killed", 3, false, func(c *chaos, _ *proc.Node) []*proc.Node {
		c.kill(c.Nodes...)
		return nil
	}},
	{"all paused in turn", 3, false, func(c *chaos, _ *proc.Node) []*proc.Node {
		for _, n := range c.pick(c.Nodes, len(c.Nodes)) {
			c.pause(n)
			time.Sleep(20 * time.Millisecond)
		}
		return nil
	}},
	{"rolling restart", 3, false, func(c *chaos, _ *proc.Node) []*proc.Node {
		for _, n := range c.pick(c.Nodes, len(c.Nodes)) {
			c.stop(n)
			c.start()
		}
		return nil
	}},
	{"as many killed as can be", 5, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		n := c.pick(c.Nodes, (len(c.Nodes)-1)/2)
		c.kill(n...)
		return c.others(n...)
	}},
	{"split, leader with the few", 5, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		few := append(c.pick(c.others(leader), (len(c.Nodes)-1)/2-1), leader)
		c.cutBoth(few, c.others(few...))
		return c.others(few...)
	}},
	{"split, leader with the many", 5, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		few := c.pick(c.others(leader), (len(c.Nodes)-1)/2)
		c.cutBoth(few, c.others(few...))
		return c.others(few...)
	}},
	// Two halves that only meet in the middle: the middle is in every quorum, so it can always serve.
	{"bridge", 3, false, func(c *chaos, _ *proc.Node) []*proc.Node {
		nodes := c.pick(c.Nodes, len(c.Nodes))
		half := len(nodes) / 2
		c.cutBoth(nodes[:half], nodes[half+1:])
		return nodes[half : half+1]
	}},
	{"slow links", 3, true, func(c *chaos, _ *proc.Node) []*proc.Node {
		for _, a := range c.Nodes {
			for _, b := range c.others(a) {
				c.network.Slow(a.ID, b.ID, time.Duration(c.rng.IntN(30))*time.Millisecond, 0)
			}
		}
		return c.Nodes
	}},
	{"narrow links", 3, true, func(c *chaos, leader *proc.Node) []*proc.Node {
		for _, n := range c.others(leader) {
			c.network.Slow(leader.ID, n.ID, 0, 256<<10)
		}
		return c.Nodes
	}},
	{"very slow node", 3, true, func(c *chaos, _ *proc.Node) []*proc.Node {
		n := c.pick(c.Nodes, 1)
		for _, other := range c.others(n...) {
			c.network.Slow(n[0].ID, other.ID, 300*time.Millisecond, 16<<10)
			c.network.Slow(other.ID, n[0].ID, 300*time.Millisecond, 16<<10)
		}
		return c.others(n...)
	}},
	{"connections reset", 3, true, func(c *chaos, _ *proc.Node) []*proc.Node {
		for range 5 {
			for _, a := range c.Nodes {
				for _, b := range c.Nodes[a.ID:] {
					c.network.Reset(a.ID, b.ID)
				}
			}
			time.Sleep(30 * time.Millisecond)
		}
		return c.Nodes
	}},
	{"two at once", 3, false, func(c *chaos, leader *proc.Node) []*proc.Node {
		for range 2 {
			f := c.faults[c.rng.IntN(len(c.faults))]
			if f.name != "two at once" && f.name != "rolling restart" && f.name != "follower falls far behind" {
				f.inject(c, leader)
			}
		}
		return nil // who can serve depends
	}},
}

// pick returns n of the nodes.
func (c *chaos) pick(nodes []*proc.Node, n int) []*proc.Node {
	var picked []*proc.Node
	for _, i := range c.rng.Perm(len(nodes))[:n] {
		picked = append(picked, nodes[i])
	}
	return picked
}

// pause freezes nodes that run.
func (c *chaos) pause(nodes ...*proc.Node) {
	c.t.Helper()
	for _, n := range nodes {
		if n.Running() {
			c.disturb(n)
			testkit.Must(c.t, n.Pause())
		}
	}
}

// cut stops what one group sends to another.
func (c *chaos) cut(from, to []*proc.Node) {
	for _, a := range from {
		for _, b := range to {
			c.network.Cut(a.ID, b.ID)
		}
	}
}

func (c *chaos) cutBoth(a, b []*proc.Node) {
	c.cut(a, b)
	c.cut(b, a)
}

// writeMuch writes more log than nodes keep in memory, so that whoever misses it needs a snapshot.
func (c *chaos) writeMuch(n *proc.Node) {
	c.t.Helper()
	const writes, size, clients = 24, 1 << 20, 4 // a little more than catchUpBytes
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			l := c.client(n)
			defer l.close()
			for range writes / clients {
				v := c.newValue(size)
				if o := l.put("much/"+v[:2], v); o.outcome != liveDone {
					c.t.Errorf("with one node down: %v", o)
				}
			}
		})
	}
	wg.Wait()
}
