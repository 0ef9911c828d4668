package main

import (
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/proc"
)

// samples are metrics in Prometheus' text format: the value of each line by all
// that stands before it.
type samples map[string]float64

func parseSamples(t *testing.T, text string) samples {
	t.Helper()
	s := samples{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[i+1:], 64)
		must(t, err)
		s[line[:i]] = v
	}
	return s
}

var seriesName = regexp.MustCompile(`^[a-z_]+`)

// names are the metrics that there are, histograms without their suffixes.
func (s samples) names() map[string]bool {
	names := map[string]bool{}
	for series := range s {
		names[baseName(seriesName.FindString(series))] = true
	}
	return names
}

// baseName is the name of a histogram of which name is a part, or name.
func baseName(name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return name
}

// sum adds up all series that begin so.
func (s samples) sum(prefix string) (total float64) {
	for series, v := range s {
		if strings.HasPrefix(series, prefix) {
			total += v
		}
	}
	return total
}

// gather returns what a registry would answer at /-/metrics.
func gather(t *testing.T, r *prometheus.Registry) samples {
	t.Helper()
	w := httptest.NewRecorder()
	newExposition(httpConfig{registry: r, logger: zap.NewNop()}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusOK {
		t.Fatal(w.Body)
	}
	return parseSamples(t, w.Body.String())
}

// idleNode is a node of which nothing runs.
func idleNode(t *testing.T) (*node, *listener) {
	store := newKVStore()
	hub := newHub(store)
	disk, _ := newDisk(t, t.TempDir())
	t.Cleanup(func() { must(t, disk.close()) })
	n := &node{loop: newLoop(10*time.Millisecond, hub.notify, zap.NewNop()), store: store, hub: hub, disk: newMeasuredDisk(disk), logger: zap.NewNop()}
	n.config.dataDir = disk.dir
	n.guard = newGuard(&n.config, store, n.loop.waiting, zap.NewNop())
	return n, newListener(newPipeListener(), listenerConfig{connectionsMax: 1})
}

// describedNames are the names of all metrics that a node can have.
func describedNames(t *testing.T) map[string]bool {
	t.Helper()
	n, clients := idleNode(t)
	registry := newRegistry(n, clients, clusterChecks(n))
	registry.MustRegister(newHTTPMetrics())
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

func TestMetrics_CountRequestsByRouteAndCode(t *testing.T) {
	f := newFront(t)
	f.do("PUT", "/secret/key", "v").want(t, 201)
	f.do("PUT", "/secret/key", "v").want(t, 204)
	f.do("PUT", "/secret/key", "v").want(t, 204)
	f.do("GET", "/secret/key", "").want(t, 200)
	f.do("HEAD", "/secret/key", "").want(t, 200)
	f.do("GET", "/secret/key?no=1", "").want(t, 400)
	f.do("GET", "/none", "").want(t, 404)
	f.do("GET", "/-/v1/keys/secret%2Fkey", "").want(t, 200)
	f.do("GET", "/-/none", "").want(t, 404)
	f.do("PATCH", "/secret/key", "").want(t, 405)
	f.do("OPTIONS", "/secret/key", "").want(t, 204)
	a := f.do("GET", "/-/metrics", "")
	a.want(t, 200)
	got := parseSamples(t, a.body)
	for series, want := range map[string]float64{
		`raftrv_http_requests_total{code="201",method="PUT",route="/{key}"}`:                            1,
		`raftrv_http_requests_total{code="204",method="PUT",route="/{key}"}`:                            2,
		`raftrv_http_requests_total{code="200",method="GET",route="/{key}"}`:                            2,
		`raftrv_http_requests_total{code="400",method="GET",route="/{key}"}`:                            1,
		`raftrv_http_requests_total{code="404",method="GET",route="/{key}"}`:                            1,
		`raftrv_http_requests_total{code="200",method="GET",route="/-/v1/keys/{key}"}`:                  1,
		`raftrv_http_requests_total{code="404",method="other",route="other"}`:                           1,
		`raftrv_http_requests_total{code="405",method="other",route="other"}`:                           1,
		`raftrv_http_requests_total{code="204",method="other",route="other"}`:                           1,
		`raftrv_http_request_duration_seconds_count{method="PUT",route="/{key}"}`:                       3,
		`raftrv_http_request_duration_seconds_bucket{method="PUT",route="/{key}",le="+Inf"}`:            3,
		`raftrv_http_request_duration_seconds_bucket{method="PUT",route="/{key}",le="10"}`:              3,
		`raftrv_http_request_duration_seconds_count{method="GET",route="/{key}"}`:                       4,
		`raftrv_http_request_duration_seconds_count{method="GET",route="/-/v1/keys/{key}"}`:             1,
		`raftrv_http_request_duration_seconds_bucket{method="GET",route="/-/v1/keys/{key}",le="+Inf"}`:  1,
		`raftrv_http_request_duration_seconds_bucket{method="GET",route="/-/v1/keys/{key}",le="0.1"}`:   1,
		`raftrv_http_request_duration_seconds_bucket{method="GET",route="/-/v1/keys/{key}",le="1e-05"}`: 0,
	} {
		if got[series] != want {
			t.Errorf("%s is %v, want %v", series, got[series], want)
		}
	}
	if s := got[`raftrv_http_request_duration_seconds_sum{method="PUT",route="/{key}"}`]; s <= 0 || s > 10 {
		t.Errorf("3 requests took %v s", s)
	}
	if strings.Contains(a.body, "secret") {
		t.Error("a key is in a label")
	}
}

// A client that has left is no failure of ours.
func TestMetrics_CountClientsThatLeft(t *testing.T) {
	h := newHTTPAPI(httpConfig{store: newKVStore(), backend: &fakeBackend{store: newKVStore(), linearizeErr: io.ErrUnexpectedEOF},
		logger: zap.NewNop(), timeout: time.Second, registry: prometheus.NewRegistry()}).(*httpAPI)
	ctx, leave := testContextThatEnds(t)
	leave()
	r := httptest.NewRequest("GET", "/k", nil).WithContext(ctx)
	r.RequestURI, r.Host = "/k", "localhost"
	h.ServeHTTP(httptest.NewRecorder(), r)
	if got := gather(t, h.registry)[`raftrv_http_requests_total{code="499",method="GET",route="/{key}"}`]; got != 1 {
		t.Errorf("%v requests", got)
	}
}

// Of a call that is asked for often one request of a few is timed, and the
// histogram still has about all; one that is asked for seldom is always timed.
func TestMetrics_BusyCalls(t *testing.T) {
	h := newHTTPAPI(httpConfig{store: newKVStore(), backend: &instantBackend{}, logger: zap.NewNop(), registry: prometheus.NewRegistry()}).(*httpAPI)
	c := rootRoute.call(http.MethodGet)
	m := &h.metrics.calls[c.number]
	total := 0
	request := func() (isTimed bool) {
		total++
		rec := newRecorder(httptest.NewRecorder())
		h.called(rec, c)
		isTimed = rec.weight > 0
		h.answered(rec, &http.Request{})
		return isTimed
	}
	for end := time.Now().Add(30 * time.Second); m.every.Load() != busyEvery; request() {
		if time.Now().After(end) {
			t.Fatal("it is not busy")
		}
	}
	timed, untimed := 0, 0
	for m.every.Load() == busyEvery && timed+untimed < 10_000 {
		if request() {
			timed++
		} else {
			untimed++
		}
	}
	if timed+untimed == 10_000 && timed > untimed/2 { // fewer: this process was held up
		t.Errorf("%d requests were timed, %d not", timed, untimed)
	}
	got := gather(t, h.registry)
	if n := got[`raftrv_http_requests_total{code="200",method="GET",route="/"}`]; n != float64(total) {
		t.Errorf("%v requests counted, want %d", n, total)
	}
	if n := got[`raftrv_http_request_duration_seconds_count{method="GET",route="/"}`]; math.Abs(n-float64(total)) > float64(total)/10 {
		t.Errorf("the histogram has %v requests of %d", n, total)
	}
	time.Sleep(3 * busyWindow)
	for range 100 * busyEvery {
		if request() {
			break
		}
	}
	for range 2 {
		if !request() {
			t.Error("a call that is not busy any more is not always timed")
		}
	}
}

// A loop that does not answer costs its own metrics only.
func TestMetrics_StuckLoop(t *testing.T) {
	n, clients := idleNode(t)
	start := time.Now()
	got := gather(t, newRegistry(n, clients, []check{{"fine", clusterChecks(&instantBackend{fakeBackend{store: n.store}})[1].run}}))
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
	if got.sum("raftrv_peer_lag_entries") != 0 || got.names()["raftrv_peer_active"] {
		t.Error("it knows of peers")
	}
}

func TestMetrics_Watches(t *testing.T) {
	r := newWatchRig(t)
	r.run()
	s := &r.hub.stats
	a, b := r.watch("k/", true, 0), r.watch("k/", true, 0)
	r.put("k/1", "v")
	if _, _, err := readAll(a); err != nil {
		t.Fatal(err)
	}
	b.close()
	b.close()
	if s.open.Load() != 1 || s.events.Load() != 1 {
		t.Errorf("%d open, %d events", s.open.Load(), s.events.Load())
	}
	r.record = false
	r.store.shrinkWindow(1, 1)
	r.fill(20_000) // a has read to the first and waits
	for {
		n, _, err := a.read(func(*event, bool) {})
		if err != nil {
			break
		}
		if n == 0 {
			t.Fatal("it kept up")
		}
	}
	if s.slow.Load()+s.expired.Load() != 1 {
		t.Errorf("%d slow, %d expired", s.slow.Load(), s.expired.Load())
	}
}

func TestMetrics_Disk(t *testing.T) {
	smallSegments(t)
	s, _ := newDisk(t, t.TempDir())
	defer func() { must(t, s.close()) }()
	d := newMeasuredDisk(s)
	registry := prometheus.NewRegistry()
	registry.MustRegister(d.collectors()...)
	wantSyncs := func(what string, want float64) {
		t.Helper()
		if got := gather(t, registry)["raftrv_fsync_duration_seconds_count"]; got != want {
			t.Errorf("%v syncs after %s, want %v", got, what, want)
		}
	}
	hs := func(term, vote, commit uint64) *raftpb.HardState {
		return &raftpb.HardState{Term: &term, Vote: &vote, Commit: &commit}
	}
	must(t, d.save(hs(1, 1, 1), nil))
	wantSyncs("a vote", 1)
	must(t, d.save(&raftpb.HardState{}, nil))
	wantSyncs("nothing", 1)
	must(t, d.save(hs(1, 1, 1), []*raftpb.Entry{putEntry(2, 1, "k", "v")}))
	wantSyncs("an entry", 2)
	must(t, d.save(hs(1, 1, 2), nil))
	wantSyncs("a commit", 2)
	must(t, d.save(hs(2, 1, 2), nil))
	wantSyncs("a term", 3)

	st := newState()
	st.index, st.term = 2, 1
	must(t, d.writeSnapshot(&raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(2)), Term: new(uint64(1))}}, &st))
	got := gather(t, registry)
	if got["raftrv_snapshot_duration_seconds_count"] != 1 || got["raftrv_snapshot_index"] != 2 || got["raftrv_snapshot_bytes"] < 10 {
		t.Errorf("%v", got)
	}
}

func TestMetrics_RoundTrips(t *testing.T) {
	from, registry := prometheus.NewRegistry(), prometheus.NewRegistry()
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: roundTripsOfEtcd, Buckets: []float64{0.1, 1}}, []string{"To"})
	from.MustRegister(h)
	registry.MustRegister(peerRoundTrips{from})
	h.WithLabelValues("1f").Observe(0.5)
	h.WithLabelValues("no id").Observe(0.5)
	got := gather(t, registry)
	for series, want := range map[string]float64{
		`raftrv_peer_round_trip_seconds_count{peer="31"}`:           1,
		`raftrv_peer_round_trip_seconds_sum{peer="31"}`:             0.5,
		`raftrv_peer_round_trip_seconds_bucket{peer="31",le="0.1"}`: 0,
		`raftrv_peer_round_trip_seconds_bucket{peer="31",le="1"}`:   1,
	} {
		if got[series] != want {
			t.Errorf("%s is %v, want %v", series, got[series], want)
		}
	}
	if got.sum("raftrv_peer_round_trip_seconds_count") != 1 {
		t.Errorf("%v", got)
	}
}

// liveText returns the body of an answer with this status.
func liveText(t *testing.T, n *proc.Node, target string, status int) string {
	t.Helper()
	res, err := http.Get(n.URL() + target)
	must(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	must(t, err)
	if res.StatusCode != status {
		t.Fatalf("GET %s: %s %s, want %d", target, res.Status, body, status)
	}
	return string(body)
}

// The metrics of a cluster that works tell what was done to it, and every one
// that a node can have is there.
func TestMetrics_LiveCluster(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Args: []string{"--snapshot-entries=50", "--access-log", "--pprof"}})
	reader := c.leader()
	follower := c.others(reader)[0]
	const writes = 120
	watched, err := http.Get(follower.URL() + "/-/v1/watch?timeout=30s")
	must(t, err)
	defer watched.Body.Close()
	for i := range writes {
		req, err := http.NewRequest(http.MethodPut, fmt.Sprintf("%s/k%d", follower.URL(), i%10), strings.NewReader("v"))
		must(t, err)
		res, err := http.DefaultClient.Do(req)
		must(t, err)
		must(t, res.Body.Close())
		liveText(t, reader, fmt.Sprintf("/k%d", i%10), 200)
	}
	scrape := func(n *proc.Node) samples { return parseSamples(t, liveText(t, n, "/-/metrics", 200)) }
	c.eventually(func() error { // snapshots are written, and the first round trips measured, in the background
		for _, n := range c.Nodes {
			s := scrape(n)
			if s["raftrv_snapshot_bytes"] == 0 || s["raftrv_resource_version"] != writes || s.sum("raftrv_peer_round_trip_seconds_count") == 0 {
				return fmt.Errorf("node %d: %v snapshot bytes, resource version %v, %v round trips", n.ID,
					s["raftrv_snapshot_bytes"], s["raftrv_resource_version"], s.sum("raftrv_peer_round_trip_seconds_count"))
			}
		}
		return nil
	})
	names := map[string]bool{}
	leader := c.leader() // on a busy machine another one than at first, maybe
	for _, n := range c.Nodes {
		s := scrape(n)
		for name := range s.names() {
			names[name] = true
		}
		leads := number(n == leader)
		for series, want := range map[string]float64{
			"raftrv_is_leader": leads, "raftrv_has_leader": 1, "raftrv_member_id": float64(n.ID), "raftrv_keys": 10,
			`raftrv_members{kind="voter"}`: 3, `raftrv_members{kind="learner"}`: 0,
			`raftrv_ready_check{check="leader"}`: 1, `raftrv_ready_check{check="caught-up"}`: 1, `raftrv_ready_check{check="not-stopping"}`: 1,
			"raftrv_watchers": number(n == follower), "raftrv_proposal_queue_bytes": 0,
			`raftrv_watch_drops_total{reason="slow"}`:                            0,
			`raftrv_http_requests_total{code="200",method="GET",route="/{key}"}`: number(n == reader) * writes,
		} {
			if got, ok := s[series]; !ok && want != 0 || got != want {
				t.Errorf("node %d: %s is %v, want %v", n.ID, series, got, want)
			}
		}
		for series, least := range map[string]float64{
			"raftrv_fsync_duration_seconds_count": writes / 4, "raftrv_apply_duration_seconds_count": writes / 4, "raftrv_applied_index": writes,
			"raftrv_committed_index": writes, "raftrv_term": 1, "raftrv_leader_changes_total": 1, "raftrv_snapshot_duration_seconds_count": 1,
			`raftrv_directory_bytes{directory="wal"}`: 1000, `raftrv_directory_bytes{directory="snap"}`: 100,
			"raftrv_disk_free_bytes": 1, "raftrv_disk_size_bytes": s["raftrv_disk_free_bytes"], "raftrv_store_bytes": 30,
			"raftrv_connections_accepted_total": 1, "raftrv_read_index_duration_seconds_count": 1, "go_goroutines": 5, "process_open_fds": 3,
			`raftrv_http_request_duration_seconds_count{method="PUT",route="/{key}"}`: writes * number(n == follower),
			"raftrv_proposal_duration_seconds_count":                                  writes * number(n == follower),
			"raftrv_batch_commands_sum":                                               writes * number(n == follower),
			"raftrv_watch_events_total":                                               writes * number(n == follower),
		} {
			if s[series] < least {
				t.Errorf("node %d: %s is %v, want %v at least", n.ID, series, s[series], least)
			}
		}
		for _, peer := range c.others(n) {
			lag, known := s[fmt.Sprintf(`raftrv_peer_lag_entries{peer="%d"}`, peer.ID)]
			if known != (n == leader) || lag > 10 || s[fmt.Sprintf(`raftrv_peer_active{peer="%d"}`, peer.ID)] != leads {
				t.Errorf("node %d says that %d lags %v entries behind, %v", n.ID, peer.ID, lag, known)
			}
		}
	}
	for name := range describedNames(t) {
		if !names[name] {
			t.Errorf("no node has %s", name)
		}
	}
	if log := readFile(t, follower.LogFile); !strings.Contains(log, `"target": "/k3", "route": "/{key}", "status": 201`) {
		t.Error("the writes are not in the access log")
	}
	if !strings.Contains(liveText(t, follower, "/-/debug/pprof/", 200), "goroutine") || len(liveText(t, follower, "/-/debug/pprof/heap", 200)) == 0 {
		t.Error("there are no profiles")
	}

	// A follower that is down is behind, and does not tell its status.
	must(t, watched.Body.Close())
	down := c.others(leader)[0]
	c.kill(down)
	c.eventually(func() error {
		if s := scrape(leader); s[fmt.Sprintf(`raftrv_peer_active{peer="%d"}`, down.ID)] != 0 {
			return fmt.Errorf("the leader hears of %d", down.ID)
		}
		return nil
	})
	c.checkClusterStatus(leader, down)
	// Nor can the last one serve.
	last := c.others(leader, down)[0]
	c.kill(leader)
	c.eventually(func() error {
		if s := scrape(last); s["raftrv_has_leader"] != 0 || s[`raftrv_ready_check{check="leader"}`] != 0 || s[`raftrv_ready_check{check="caught-up"}`] != 0 {
			return fmt.Errorf("node %d is content", last.ID)
		}
		return nil
	})
	if got := liveText(t, last, "/-/readyz?verbose", 503); !strings.HasPrefix(got, "[-]leader failed: no leader is known\n[-]caught-up failed: ") ||
		!strings.HasSuffix(got, "[+]not-stopping ok\nnot ready\n") {
		t.Errorf("%s", got)
	}
}
