package tests

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// Here every node is a host of its own: a network namespace with an address, joined to the others by a switch.
// Packets really get lost, so TCP's own timeouts take part, which they do not behind a proxy. It takes the
// rights of an administrator; without them these tests are skipped.

// TestChaosHosts is TestChaos with packets that get lost.
func TestChaosHosts(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	const nodes = 3
	hosts := newHosts(t, nodes)
	c := newChaosOn(t, nodes, hosts, proc.Options{Host: hosts.address, Wrap: hosts.enter})
	c.run(max(*chaosTime/10, chaosSlice))
}

// TestChaosHosts_LongCut: after a cut that was long enough for TCP to lose hope, everybody is back as soon as
// after a short one. Nodes must not wait for connections that are dead: TCP would take as long again as the cut.
func TestChaosHosts_LongCut(t *testing.T) {
	if !*testkit.Heavy && *chaosTime == 0 {
		t.Skip("needs -heavy or -chaos")
	}
	const nodes = 3
	hosts := newHosts(t, nodes)
	c := newChaosOn(t, nodes, hosts, proc.Options{Host: hosts.address, Wrap: hosts.enter})
	tests := []struct {
		name  string
		alone []*proc.Node
	}{
		{"a follower", c.others(c.leader())[:1]},
		{"the leader", []*proc.Node{c.leader()}},
		{"everybody", c.Nodes},
	}
	for _, tt := range tests {
		for _, n := range tt.alone {
			c.cutBoth([]*proc.Node{n}, c.others(n))
		}
		var load *liveLoad
		if rest := c.others(tt.alone...); len(rest) > 0 {
			// Enough that what waits for the lost node does not fit into the buffers of its connections.
			load = c.load(4, rest, func(l *liveClient) {
				if o := l.put("long/"+c.newValue(0), c.newValue(64<<10)); o.outcome != liveDone {
					t.Errorf("at the majority: %v", o)
				}
				time.Sleep(10 * time.Millisecond)
			})
		}
		time.Sleep(15 * time.Second)
		if load != nil {
			load.stop()
		}
		healed := time.Now()
		c.network.Heal()
		c.start()
		took, _ := c.pulse("after a long cut", c.Nodes, healed)
		t.Logf("%s alone: all nodes serve again %v after the end of the cut", tt.name, round(took))
		if most := 3 * time.Second; took > most {
			t.Errorf("want at most %v", most)
		}
	}
	c.verdict()
}

// hosts are network namespaces on a switch, which is in one, too. This process is the host 254.
type hosts struct {
	t     *testing.T
	name  string // of everything, as a prefix
	nodes int
}

// newHosts builds them, to last as long as the test.
func newHosts(t *testing.T, nodes int) *hosts {
	t.Helper()
	h := &hosts{t: t, name: fmt.Sprintf("rv%d", os.Getpid()%100_000), nodes: nodes}
	if out, err := ip("netns", "add", h.space(0)); err != nil {
		t.Skipf("no namespaces here: %v %s", err, out)
	}
	t.Cleanup(func() {
		for i := range nodes + 1 {
			_, _ = ip("netns", "delete", h.space(i)) // the links go with them; what does not exist needs no deleting
		}
	})
	h.must("netns", "exec", h.space(0), "ip", "link", "add", "switch", "type", "bridge")
	h.must("-n", h.space(0), "link", "set", "switch", "up")
	h.plug(254, nil)
	for i := range nodes {
		h.must("netns", "add", h.space(i+1))
		h.must("-n", h.space(i+1), "link", "set", "lo", "up")
		h.plug(i+1, []string{"-n", h.space(i + 1)})
	}
	return h
}

// plug connects a host to the switch: a device with an address here, a port there.
func (h *hosts) plug(id int, in []string) {
	h.t.Helper()
	device, port := fmt.Sprint(h.name, "h", id), fmt.Sprint(h.name, "p", id)
	h.must("link", "add", device, "type", "veth", "peer", "name", port, "netns", h.space(0))
	if in != nil {
		h.must("link", "set", device, "netns", in[1])
	} else {
		h.t.Cleanup(func() { _, _ = ip("link", "delete", device) }) // gone with its other end, if that was first
	}
	h.must(append(in, "address", "add", h.address(id)+"/24", "dev", device)...)
	h.must(append(in, "link", "set", device, "up")...)
	h.must("-n", h.space(0), "link", "set", port, "master", "switch", "up")
}

// space returns the name of a namespace: that of a node, or 0 for that of the switch.
func (h *hosts) space(id int) string { return fmt.Sprint(h.name, "n", id) }

// address returns a host's address, in a network that is set aside for tests (RFC 2544).
func (h *hosts) address(id int) string { return fmt.Sprintf("198.18.%d.%d", os.Getpid()%256, id) }

// enter makes a command one that runs on a host. "ip" becomes the command, so signals reach the node.
func (h *hosts) enter(n *proc.Node) []string { return []string{"ip", "netns", "exec", h.space(n.ID)} }

// Cut makes all that from sends to to get lost on the wire: from takes a machine that does not exist for to.
func (h *hosts) Cut(from, to int) {
	h.must("-n", h.space(from), "neighbor", "replace", h.address(to), "lladdr", "02:00:00:00:00:ff",
		"dev", fmt.Sprint(h.name, "h", from), "nud", "permanent")
}

// Heal ends all cuts.
func (h *hosts) Heal() {
	for from := range h.nodes {
		for to := range h.nodes {
			if from != to {
				_, _ = ip("-n", h.space(from+1), "neighbor", "delete", h.address(to+1), "dev", fmt.Sprint(h.name, "h", from+1)) // fails without a cut
			}
		}
	}
}

// Slow and Reset are for proxies: this kind of network only loses packets.
func (h *hosts) Slow(int, int, time.Duration, int) {}
func (h *hosts) Reset(int, int)                    {}

func (h *hosts) must(args ...string) {
	h.t.Helper()
	if out, err := ip(args...); err != nil {
		h.t.Fatalf("ip %s: %v %s", strings.Join(args, " "), err, out)
	}
}

func ip(args ...string) (string, error) {
	out, err := exec.Command("ip", args...).CombinedOutput()
	return string(out), err
}
