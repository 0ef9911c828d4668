package main

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/store"
)

// This file is what a node tells at /-/metrics. What takes time is measured at
// the edges: HTTP requests in internal/httpapi, the disk in diskmetrics.go, the
// rounds of the replica in the loop. Everything else is read when somebody
// asks, from what is there anyway.

// metricsTimeout bounds how long an answer at /-/metrics waits for a loop that
// is busy, and for the checks of readiness. What did not come is left out.
const metricsTimeout = time.Second

func metricName(name string) string { return "raftrv_" + name }

func newDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(metricName(name), help, labels, nil)
}

func newHistogram(name, help string, buckets []float64) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricName(name), Help: help, Buckets: buckets})
}

func newCounter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: metricName(name), Help: help})
}

// newRoundTrips is what the exchange between the members measures, see askOthers.
func newRoundTrips() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    metricName("peer_round_trip_seconds"),
		Help:    "Round trips to another member, which is asked how it is every half a second.",
		Buckets: prometheus.ExponentialBuckets(0.0002, 2, 14),
	}, []string{"peer"})
}

// loopMetrics is what the loop measures.
type loopMetrics struct {
	batchCommands prometheus.Histogram
	batchBytes    prometheus.Histogram
	proposal      prometheus.Histogram
	readIndex     prometheus.Histogram
	apply         prometheus.Histogram
	leaderChanges prometheus.Counter
	stall         prometheus.Histogram
}

func newLoopMetrics() *loopMetrics {
	return &loopMetrics{
		batchCommands: newHistogram("batch_commands", "Commands in a batch that this node proposed.", prometheus.ExponentialBuckets(1, 2, 13)),
		batchBytes:    newHistogram("batch_bytes", "Bytes of a batch that this node proposed.", prometheus.ExponentialBuckets(64, 4, 10)),
		proposal: newHistogram("proposal_duration_seconds", "From a batch's proposal on this node until it is applied there.",
			prometheus.ExponentialBuckets(0.0002, 2, 15)),
		readIndex: newHistogram("read_index_duration_seconds", "From asking the leader for its commit index until this node may answer the reads that wait.",
			prometheus.ExponentialBuckets(0.0001, 2, 16)),
		apply:         newHistogram("apply_duration_seconds", "Time to apply the entries of one turn of the loop.", prometheus.ExponentialBuckets(0.00001, 4, 10)),
		leaderChanges: newCounter("leader_changes_total", "Leaders that this node has seen come."),
		stall: newHistogram("loop_stall_seconds", "Iterations of the raft loop that took longer than an election timeout; its log says where they were.",
			prometheus.ExponentialBuckets(0.2, 2, 9)),
	}
}

func (m *loopMetrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.batchCommands, m.batchBytes, m.proposal, m.readIndex, m.apply, m.leaderChanges, m.stall}
}

// queueStats is what waits for the loop.
type queueStats struct {
	batches, bytes, messages int
}

func (l *loop) queueStats() queueStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return queueStats{batches: len(l.inbox.queue), bytes: l.inbox.queueSize, messages: len(l.inbox.messages)}
}

// peerProgress is how far a leader knows another member to be.
type peerProgress struct {
	id, match uint64
	active    bool // heard of lately
}

// leaderView is what a leader knows of the other members; nothing elsewhere.
type leaderView struct {
	committed uint64
	peers     []peerProgress
}

// nodeMetrics collects the gauges of a node. It implements prometheus.Collector.
type nodeMetrics struct {
	node    *node
	clients *listener
	checks  []httpapi.Check
}

var (
	descBuildInfo    = newDesc("build_info", "Always 1; the labels are of interest.", "version", "goversion")
	descMember       = newDesc("member_id", "ID of this node.")
	descIsLeader     = newDesc("is_leader", "1 if this node leads.")
	descHasLeader    = newDesc("has_leader", "1 if this node knows a leader.")
	descTerm         = newDesc("term", "Raft's term.")
	descCommitted    = newDesc("committed_index", "Index of the last entry that is committed.")
	descApplied      = newDesc("applied_index", "Index of the last entry that is applied.")
	descVersion      = newDesc("resource_version", "Resource version of the store.")
	descKeys         = newDesc("keys", "Keys in the store.")
	descStoreBytes   = newDesc("store_bytes", "Bytes that keys and values take, about.")
	descMembers      = newDesc("members", "Members of the cluster.", "kind")
	descPeerLag      = newDesc("peer_lag_entries", "Committed entries that another member has not confirmed. Only a leader knows.", "peer")
	descPeerActive   = newDesc("peer_active", "1 if the leader has heard of the member lately. Only a leader knows.", "peer")
	descQueueBatches = newDesc("proposal_queue_batches", "Batches that wait to be proposed.")
	descQueueBytes   = newDesc("proposal_queue_bytes", "Bytes of writes that wait to be proposed.")
	descInbox        = newDesc("inbox_messages", "Raft messages that wait to be taken.")
	descWatchers     = newDesc("watchers", "Open watches; a journal is one, too.")
	descWatchEvents  = newDesc("watch_events_total", "Events that were passed to watches.")
	descWatchDrops   = newDesc("watch_drops_total", "Watches that ended because they did not keep up.", "reason")
	descWindow       = newDesc("watch_window_events", "Recent events that are kept, so that watches can resume.")
	descConnections  = newDesc("connections", "Open connections of clients.")
	descAccepted     = newDesc("connections_accepted_total", "Connections of clients that were accepted.")
	descRefused      = newDesc("connections_refused_total", "Connections of clients that there was no room for.")
	descDirectory    = newDesc("directory_bytes", "Bytes on disk of the log (wal) and the snapshots (snap).", "directory")
	descDiskFree     = newDesc("disk_free_bytes", "Bytes that the file system of the data directory has left.")
	descDiskReserve  = newDesc("disk_reserve_bytes", "With less than this left on its disk the node takes no writes but deletes.")
	descQuota        = newDesc("quota_bytes", "What store_bytes may be; 0 if there is no limit.")
	descReadOnly     = newDesc("read_only", "1 if writes are refused for this reason.", "reason")
	descDiverged     = newDesc("divergence_detected", "1 if this node has another state than others, and serves nothing.")
	descDiskSize     = newDesc("disk_size_bytes", "Bytes of the file system of the data directory.")
	descPeerRefused  = newDesc("peer_refused_total", "What was refused of that which came from other members, or from who poses as one.", "reason")
	descReady        = newDesc("ready_check", "1 if the check of readiness succeeds.", "check")
)

// Describe implements prometheus.Collector.
func (*nodeMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descBuildInfo, descMember, descIsLeader, descHasLeader, descTerm, descCommitted, descApplied, descVersion, descKeys, descStoreBytes,
		descMembers, descPeerLag, descPeerActive, descQueueBatches, descQueueBytes, descInbox, descWatchers, descWatchEvents, descWatchDrops,
		descWindow, descConnections, descAccepted, descRefused, descDirectory, descDiskFree, descDiskSize, descDiskReserve,
		descQuota, descReadOnly, descDiverged, descPeerRefused, descReady,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *nodeMetrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	// First what may have to wait.
	ctx, cancel := context.WithTimeout(context.Background(), metricsTimeout)
	defer cancel()
	var wait sync.WaitGroup
	defer wait.Wait()
	wait.Go(func() {
		for name, err := range httpapi.RunChecks(ctx, m.checks) {
			gauge(descReady, number(err == nil), name)
		}
	})
	wait.Go(func() {
		view, err := m.node.loop.leaderView(ctx)
		if err != nil {
			return // the loop is stuck or has ended
		}
		for _, p := range view.peers {
			gauge(descPeerLag, float64(view.committed-min(p.match, view.committed)), strconv.FormatUint(p.id, 10))
			gauge(descPeerActive, number(p.active), strconv.FormatUint(p.id, 10))
		}
	})

	s := m.node.Status()
	gauge(descBuildInfo, 1, version, runtime.Version())
	gauge(descMember, float64(s.ID))
	gauge(descIsLeader, number(s.LeaderID == s.ID))
	gauge(descHasLeader, number(s.LeaderID != 0))
	gauge(descTerm, float64(s.Term))
	gauge(descCommitted, float64(s.CommittedIndex))
	gauge(descApplied, float64(s.AppliedIndex))
	gauge(descVersion, float64(s.ResourceVersion))
	learners := 0
	for _, member := range s.Members {
		if member.Learner {
			learners++
		}
	}
	gauge(descMembers, float64(len(s.Members)-learners), "voter")
	gauge(descMembers, float64(learners), "learner")
	kv := m.node.store.Stats()
	gauge(descKeys, float64(kv.Keys))
	gauge(descStoreBytes, float64(kv.Bytes))
	gauge(descWindow, float64(kv.Events))

	q := m.node.loop.queueStats()
	gauge(descQueueBatches, float64(q.batches))
	gauge(descQueueBytes, float64(q.bytes))
	gauge(descInbox, float64(q.messages))

	w := &m.node.hub.Stats
	gauge(descWatchers, float64(w.Open.Load()))
	counter(descWatchEvents, w.Events.Load())
	counter(descWatchDrops, w.Slow.Load(), "slow")
	counter(descWatchDrops, w.Expired.Load(), "expired")

	c := m.clients.stats()
	gauge(descConnections, float64(c.open))
	counter(descAccepted, c.accepted)
	counter(descRefused, c.refused)

	if r := m.node.refusals; r != nil {
		r.each(func(reason string, n uint64) { counter(descPeerRefused, n, reason) })
	}

	m.collectDisk(gauge)
	gauge(descDiskReserve, float64(s.DiskReserveBytes))
	gauge(descQuota, float64(s.QuotaBytes))
	for _, e := range []*fault.Error{fault.ErrDiskFull, fault.ErrQuota, fault.ErrDiverged, fault.ErrUnchecked} {
		gauge(descReadOnly, number(s.ReadOnly == e.Code), e.Code)
	}
	gauge(descDiverged, number(s.Divergence == store.Doubtful.String() || s.Divergence == store.Diverged.String()))
}

func (m *nodeMetrics) collectDisk(gauge func(d *prometheus.Desc, v float64, labels ...string)) {
	dir := m.node.config.dataDir
	for _, name := range []string{walDir, snapDir} {
		gauge(descDirectory, float64(directorySize(filepath.Join(dir, name))), name)
	}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err == nil {
		gauge(descDiskFree, float64(fs.Bavail)*float64(fs.Bsize))
		gauge(descDiskSize, float64(fs.Blocks)*float64(fs.Bsize))
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// directorySize returns how many bytes the files of a directory have. Files
// that go away meanwhile do not count.
func directorySize(path string) (size int64) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			size += info.Size()
		}
	}
	return size
}

// newRegistry returns the metrics of a node, all but those of its HTTP front.
func newRegistry(n *node, clients *listener, checks []httpapi.Check) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		&nodeMetrics{node: n, clients: clients, checks: checks},
		n.admission.roundTrips,
	)
	r.MustRegister(n.loop.metrics.collectors()...)
	r.MustRegister(n.disk.collectors()...)
	return r
}
