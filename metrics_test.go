package main

import (
	"context"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/httpapi"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
	"raftrv/internal/watch"
)

// idleNode is a node of which nothing runs.
func idleNode(t *testing.T) (*node, *listener) {
	kv := store.New()
	hub := watch.NewHub(kv)
	disk, _ := newDisk(t, t.TempDir())
	t.Cleanup(func() { testkit.Must(t, disk.close()) })
	n := &node{kvstore: &kvstore{loop: newLoop(10*time.Millisecond, hub.Notify, zap.NewNop()), store: kv, hub: hub}, disk: newMeasuredDisk(disk), logger: zap.NewNop()}
	n.config.dataDir = disk.dir
	n.admission = newAdmission(&n.config, kv, n.loop.waiting, zap.NewNop())
	return n, newListener(testkit.NewPipeListener(), listenerConfig{connectionsMax: 1})
}

// describedNames are the names of all metrics that a node can have.
func describedNames(t *testing.T) map[string]bool {
	t.Helper()
	n, clients := idleNode(t)
	registry := newRegistry(n, clients, httpapi.ClusterChecks(n))
	registry.MustRegister(httpapi.NewHTTPMetrics())
	names, descs := map[string]bool{}, make(chan *prometheus.Desc, 1000)
	registry.Describe(descs)
	close(descs)
	for d := range descs {
		name := regexp.MustCompile(`fqName: "([^"]*)"`).FindStringSubmatch(d.String())[1]
		if strings.HasPrefix(name, "raftrv_") {
			names[name] = true
		}
	}
	return names
}

// A loop that does not answer costs its own metrics only.
func TestMetrics_StuckLoop(t *testing.T) {
	n, clients := idleNode(t)
	start := time.Now()
	got := testkit.Gather(t, newRegistry(n, clients, []httpapi.Check{{Name: "fine", Run: func(context.Context) error { return nil }}}))
	if took := time.Since(start); took < metricsTimeout || took > metricsTimeout+5*time.Second {
		t.Errorf("it took %v", took)
	}
	for series, want := range map[string]float64{
		"raftrv_has_leader": 0, "raftrv_term": 0, "raftrv_keys": 0, `raftrv_ready_check{check="fine"}`: 1, `raftrv_directory_bytes{directory="snap"}`: -1,
	} {
		v, ok := got[series]
		if !ok || want >= 0 && v != want || want < 0 && v <= 0 {
			t.Errorf("%s is %v, %v", series, v, ok)
		}
	}
	if got.Sum("raftrv_peer_lag_entries") != 0 || got.Names()["raftrv_peer_active"] {
		t.Error("it knows of peers")
	}
}

func TestMetrics_Disk(t *testing.T) {
	smallSegments(t)
	s, _ := newDisk(t, t.TempDir())
	defer func() { testkit.Must(t, s.close()) }()
	d := newMeasuredDisk(s)
	registry := prometheus.NewRegistry()
	registry.MustRegister(d.collectors()...)
	wantSyncs := func(what string, want float64) {
		t.Helper()
		if got := testkit.Gather(t, registry)["raftrv_fsync_duration_seconds_count"]; got != want {
			t.Errorf("%v syncs after %s, want %v", got, what, want)
		}
	}
	hs := func(term, vote, commit uint64) *raftpb.HardState {
		return &raftpb.HardState{Term: &term, Vote: &vote, Commit: &commit}
	}
	testkit.Must(t, d.save(hs(1, 1, 1), nil))
	wantSyncs("a vote", 1)
	testkit.Must(t, d.save(&raftpb.HardState{}, nil))
	wantSyncs("nothing", 1)
	testkit.Must(t, d.save(hs(1, 1, 1), []*raftpb.Entry{putEntry(2, 1, "k", "v")}))
	wantSyncs("an entry", 2)
	testkit.Must(t, d.save(hs(1, 1, 2), nil))
	wantSyncs("a commit", 2)
	testkit.Must(t, d.save(hs(2, 1, 2), nil))
	wantSyncs("a term", 3)

	st := store.NewState()
	st.Index, st.Term = 2, 1
	testkit.Must(t, d.writeSnapshot(&raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(2)), Term: new(uint64(1))}}, &st))
	got := testkit.Gather(t, registry)
	if got["raftrv_snapshot_duration_seconds_count"] != 1 || got["raftrv_snapshot_index"] != 2 || got["raftrv_snapshot_bytes"] < 10 {
		t.Errorf("%v", got)
	}
}
