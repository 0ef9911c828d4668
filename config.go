package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"raftrv/internal/httpapi"
	"raftrv/internal/store"
)

// config is what a node is started with. See flags for meanings and defaults.
type config struct {
	id      uint64
	cluster string // as given; members has it parsed
	token   string
	join    bool

	abandon func() // ends the process at once; nil = never

	port       int
	listen     string
	listenPeer string
	clientURL  string
	dataDir    string

	allowedHosts   []string
	allowedOrigins []string

	tick           time.Duration
	electionTicks  int
	heartbeatTicks int

	snapshotEntries uint64
	snapshotBytes   uint64

	segmentBytes uint64
	diskReserve  uint64 // 0 = by default
	quota        uint64 // 0 = none

	valueSizeMax   int
	requestTimeout time.Duration
	connectionsMax int
	addressMax     int // connections of one address; 0 = a quarter

	levelMax int // 0 = the newest

	watchEvents   uint64
	watchBytes    uint64
	watchBookmark time.Duration

	journal     string
	journalSync time.Duration
	hangUps     <-chan os.Signal // each makes the journal look for another file; nil = never

	logLevel  string
	logFormat string
	accessLog bool
	pprof     bool

	members []store.Member // filled by validate
}

// Ranges of the flags. Below them a cluster is not stable on ordinary
// machines, above them a failover takes longer than people wait.
const (
	tickMin          = 5 * time.Millisecond
	tickMax          = 100 * time.Millisecond
	heartbeatMax     = 20
	electionMax      = 200
	electionPerBeat  = 5 // a follower should miss this many heartbeats before it acts
	connectionsLimit = 1 << 20
	watchEventsMin   = 1024 // fewer would expire watches that are not even slow
	watchEventsLimit = 1 << 24
	watchBytesMin    = 1 << 20
	watchBytesLimit  = 1 << 36
	segmentBytesMin  = 64 << 10
	segmentBytesMax  = 1 << 30
	quotaDefault     = 2 << 30
)

func (c *config) flags(f *pflag.FlagSet) {
	f.SortFlags = false
	f.Uint64Var(&c.id, "id", 1, "this node's `number`: the place of its URL in --cluster, from 1, or the ID written there")
	f.StringVar(&c.cluster, "cluster", "http://127.0.0.1:9021",
		"comma-separated peer `URLs` of all nodes that found the cluster, or of whom to ask with --join; or ID=URL for each; later it is a hint")
	f.IntVar(&c.port, "port", 9121, "`port` for HTTP clients, on the loopback interface unless --listen says otherwise")
	f.BoolVar(&c.join, "join", false, "join a cluster that runs; a member must add this node: curl -X POST -d PEER-URL .../ID")
	f.StringVar(&c.token, "cluster-token", "", "`name` that all nodes must have in common to found a cluster; later it means nothing")
	f.StringVar(&c.dataDir, "data-dir", "", "`directory` for log and snapshots, made if missing (default raftrv-ID)")
	f.StringVar(&c.listen, "listen", "", "`host:port` for HTTP clients, instead of 127.0.0.1 and --port")
	f.StringVar(&c.listenPeer, "listen-peer", "", "`host:port` for the other nodes (default that of this node's URL in --cluster)")
	f.StringVar(&c.clientURL, "client-url", "", "`URL` at which clients reach this node, for others to know (default made from --listen)")
	f.StringArrayVar(&c.allowedHosts, "allowed-host", nil, "answer to this host `name`, too, and not only to IP addresses, localhost and the names in client URLs; may be repeated")
	f.StringArrayVar(&c.allowedOrigins, "allowed-origin", nil, "let web pages of this `origin`, such as https://app.example, read and write; may be repeated")
	f.DurationVar(&c.tick, "tick", 10*time.Millisecond, "raft's unit of time")
	f.IntVar(&c.heartbeatTicks, "heartbeat-ticks", 2, "`ticks` between two heartbeats of a leader")
	f.IntVar(&c.electionTicks, "election-ticks", 20, "`ticks` without a heartbeat before an election")
	f.Uint64Var(&c.snapshotEntries, "snapshot-entries", 100_000, "snapshot after this `number` of log entries ...")
	f.Uint64Var(&c.snapshotBytes, "snapshot-bytes", 64<<20, "... or this many `bytes`, whichever comes first")
	f.Uint64Var(&c.segmentBytes, "wal-segment-bytes", segmentBytesDefault, "size of one file of the log, in `bytes`, all of which are taken from the disk when it is begun; there are at least two")
	f.Uint64Var(&c.diskReserve, "disk-reserve-bytes", 0, "with fewer free `bytes` on the disk this node takes no writes but deletes (default four files of the log and the size of a snapshot)")
	f.Uint64Var(&c.quota, "quota-bytes", quotaDefault, "largest size of the store, in `bytes`; beyond it only deletes are taken, and what makes it smaller; 0 = any")
	f.IntVar(&c.valueSizeMax, "max-value-bytes", store.ValueSizeMaxDefault, "largest value, in `bytes`")
	f.DurationVar(&c.requestTimeout, "request-timeout", 5*time.Second, "deadline of a request that does not set ?timeout=")
	f.IntVar(&c.connectionsMax, "max-connections", connectionsMaxDefault, "largest `number` of client connections")
	f.IntVar(&c.addressMax, "max-connections-per-address", 0, "largest `number` of client connections from one address, or one /64 network of IPv6 (default a quarter of --max-connections); as many as that for all clients behind one proxy")
	f.Uint64Var(&c.watchEvents, "watch-events", store.EventsMaxDefault, "`number` of recent events that are kept, so that watches can resume ...")
	f.Uint64Var(&c.watchBytes, "watch-bytes", store.EventBytesMaxDefault, "... or this many `bytes` of them, whichever is less")
	f.DurationVar(&c.watchBookmark, "watch-bookmark", 10*time.Second, "longest `time` between two bookmarks of a watch")
	f.StringVar(&c.journal, "journal", "", "append every write to this `file`, one JSON object a line; a node that cannot write it stops, since a record of all writes must not miss any")
	f.DurationVar(&c.journalSync, "journal-sync", time.Second, "longest `time` before what is in the journal is safe from a power cut")
	f.IntVar(&c.levelMax, "feature-level-max", store.LevelNewest, "highest feature `level` that this node takes part in; with a lower one than the others know the cluster stays there, and an older version can come back")
	f.StringVar(&c.logLevel, "log-level", "info", "debug, info, warn or error; PUT /-/v1/log-level changes it later")
	f.StringVar(&c.logFormat, "log-format", "console", "console or json")
	f.BoolVar(&c.accessLog, "access-log", false, "log every HTTP request, with its path; at level info")
	f.BoolVar(&c.pprof, "pprof", false, "serve Go's profiles at /-/debug/pprof/; whoever may ask for them can slow the node down")
}

// validate checks the flags, and fills in what follows from them.
func (c *config) validate() error {
	var err error
	if c.members, err = parseCluster(c.cluster); err != nil {
		return fmt.Errorf("--cluster: %w", err)
	}
	c.dataDir = cmp.Or(c.dataDir, fmt.Sprintf("raftrv-%d", c.id))
	c.listen = cmp.Or(c.listen, net.JoinHostPort("127.0.0.1", strconv.Itoa(c.port)))
	if self := c.self(); self != nil { // otherwise openPorts finds out
		peer, err := url.Parse(self.PeerURL)
		if err != nil {
			return err
		}
		if c.clientURL, err = c.findClientURL(peer.Hostname()); err != nil {
			return err
		}
	}
	for i, name := range c.allowedHosts {
		if err := httpapi.CheckHostName(name); err != nil {
			return fmt.Errorf("--allowed-host: %w", err)
		}
		c.allowedHosts[i] = strings.ToLower(name)
	}
	for _, origin := range c.allowedOrigins {
		if err := httpapi.CheckOrigin(origin); err != nil {
			return fmt.Errorf("--allowed-origin: %w", err)
		}
	}
	return errors.Join(
		checkRange("--tick", c.tick, tickMin, tickMax),
		checkRange("--heartbeat-ticks", c.heartbeatTicks, 1, heartbeatMax),
		checkRange("--election-ticks", c.electionTicks, electionPerBeat*c.heartbeatTicks, electionMax),
		checkRange("--snapshot-entries", c.snapshotEntries, 1, 1<<40),
		checkRange("--snapshot-bytes", c.snapshotBytes, 1, 1<<50),
		checkRange("--wal-segment-bytes", c.segmentBytes, segmentBytesMin, segmentBytesMax),
		checkRange("--disk-reserve-bytes", c.diskReserve, 0, 1<<50),
		checkRange("--quota-bytes", c.quota, 0, 1<<50),
		checkRange("--max-value-bytes", c.valueSizeMax, 1, store.ValueSizeLimit),
		checkRange("--request-timeout", c.requestTimeout, time.Millisecond, httpapi.TimeoutMax),
		checkRange("--max-connections", c.connectionsMax, 1, connectionsLimit),
		checkRange("--max-connections-per-address", c.addressMax, 0, connectionsLimit),
		checkRange("--feature-level-max", c.levelMax, store.LevelFirst, store.LevelNewest),
		checkRange("--watch-events", c.watchEvents, watchEventsMin, watchEventsLimit),
		checkRange("--watch-bytes", c.watchBytes, watchBytesMin, watchBytesLimit),
		checkRange("--watch-bookmark", c.watchBookmark, 10*time.Millisecond, time.Minute),
		checkRange("--journal-sync", c.journalSync, time.Millisecond, time.Minute),
		checkOneOf("--log-level", c.logLevel, "debug", "info", "warn", "error"),
		checkOneOf("--log-format", c.logFormat, "console", "json"),
	)
}

// findClientURL returns where the others and their clients are told to find this
// node. A node that listens on every interface does so under the host at which
// the others reach it.
func (c *config) findClientURL(peerHost string) (string, error) {
	if c.clientURL != "" {
		u, err := httpapi.ParseNodeURL(c.clientURL)
		if err != nil {
			return "", fmt.Errorf("--client-url %q: %w", c.clientURL, err)
		}
		return u, nil
	}
	host, port, err := net.SplitHostPort(c.listen)
	if err != nil {
		return "", fmt.Errorf("--listen: %w", err)
	}
	if httpapi.IsUnspecified(host) {
		host = peerHost
	}
	u, err := httpapi.ParseNodeURL("http://" + net.JoinHostPort(host, port))
	if err != nil {
		return "", fmt.Errorf("--listen %s: no URL for clients can be made from that, so --client-url is needed: %w", c.listen, err)
	}
	return u, nil
}

// hostNames are the names that this node answers to.
func (c *config) hostNames() []string {
	names := c.allowedHosts
	if u, err := url.Parse(c.clientURL); err == nil {
		names = append(slices.Clone(names), strings.ToLower(u.Hostname()))
	}
	return names
}

func checkRange[T cmp.Ordered](flag string, v, low, high T) error {
	if v < low || v > high {
		return fmt.Errorf("%s is %v, must be from %v to %v", flag, v, low, high)
	}
	return nil
}

func checkOneOf(flag, v string, allowed ...string) error {
	if !slices.Contains(allowed, v) {
		return fmt.Errorf("%s is %q, must be one of %s", flag, v, strings.Join(allowed, ", "))
	}
	return nil
}

// self returns this node's own entry in --cluster, or nil.
func (c *config) self() *store.Member {
	i := slices.IndexFunc(c.members, func(m store.Member) bool { return m.ID == c.id })
	if i < 0 {
		return nil
	}
	return &c.members[i]
}

// electionTimeout is how long followers wait for a heartbeat, at least.
func (c *config) electionTimeout() time.Duration { return time.Duration(c.electionTicks) * c.tick }

// peerSilenceMax is how long a member that should talk may be silent before it
// gets new connections.
func (c *config) peerSilenceMax() time.Duration {
	return max(peerSilenceMin, peerSilenceElections*c.electionTimeout())
}

// clientPlaces returns how many of so many connections one address may have.
func (c *config) clientPlaces(connections int) int {
	return min(cmp.Or(c.addressMax, (connections+3)/4), connections)
}

// checkSelf refuses a list without this node, unless its directory knows who it is.
func (c *config) checkSelf() error {
	if _, err := os.Stat(filepath.Join(c.dataDir, walDir)); c.self() == nil && err != nil {
		return fmt.Errorf("--id %d is not in --cluster, which has %d node(s)", c.id, len(c.members))
	}
	return nil
}

// peerAddress returns where to listen for the other members: at the address that
// this node has in --cluster. A member finds its own in what its directory holds,
// if --cluster has none for it, or has that of another one there, since it is in
// another order.
func (c *config) peerAddress(rec *recovered) (string, error) {
	if c.listenPeer != "" {
		return c.listenPeer, nil
	}
	var peerURL string
	if self := c.self(); self != nil {
		peerURL = self.PeerURL
	}
	if rec != nil {
		known := rec.state.Members
		if self, ok := known[c.id]; ok && (peerURL == "" || hasOther(known, peerURL, c.id)) {
			peerURL = self.PeerURL
		}
	}
	u, err := url.Parse(peerURL)
	if err == nil && u.Host == "" {
		err = fmt.Errorf("the address of node %d is not known: it is neither in --cluster nor in %s", c.id, c.dataDir)
	}
	if err != nil {
		return "", err
	}
	return u.Host, nil
}

// hasOther says whether another member than id has a peer URL.
func hasOther(members map[uint64]store.Member, peerURL string, id uint64) bool {
	for _, m := range members {
		if m.PeerURL == peerURL && m.ID != id {
			return true
		}
	}
	return false
}

// parseCluster reads "URL,URL,..." or "ID=URL,ID=URL,...".
func parseCluster(s string) ([]store.Member, error) {
	var members []store.Member
	for i, part := range strings.Split(s, ",") {
		m := store.Member{ID: uint64(i + 1), PeerURL: strings.TrimSpace(part)}
		if id, rest, ok := strings.Cut(m.PeerURL, "="); ok {
			var err error
			if m.ID, err = httpapi.ParseMemberID(id); err != nil {
				return nil, fmt.Errorf("%q: the ID must be a positive number", part)
			}
			m.PeerURL = rest
		}
		peerURL, err := httpapi.ParsePeerURL(m.PeerURL)
		if err != nil {
			return nil, fmt.Errorf("%q is not a peer URL such as http://127.0.0.1:12379", part)
		}
		m.PeerURL = peerURL
		for _, other := range members {
			if other.ID == m.ID || other.PeerURL == m.PeerURL {
				return nil, fmt.Errorf("%q is there twice", part)
			}
		}
		members = append(members, m)
	}
	slices.SortFunc(members, func(a, b store.Member) int { return cmp.Compare(a.ID, b.ID) })
	return members, nil
}
