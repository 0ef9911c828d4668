package tests

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// liveText returns the body of an answer with this status.
func liveText(t *testing.T, n *proc.Node, target string, status int) string {
	t.Helper()
	return bodyOf(t, n.URL()+target, status)
}

// bodyOf returns what is answered to a GET with this status.
func bodyOf(t *testing.T, url string, status int) string {
	t.Helper()
	res, err := http.Get(url)
	testkit.Must(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	testkit.Must(t, err)
	if res.StatusCode != status {
		t.Fatalf("GET %s: %s %s, want %d", url, res.Status, body, status)
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
	testkit.Must(t, err)
	defer watched.Body.Close()
	for i := range writes {
		req, err := http.NewRequest(http.MethodPut, fmt.Sprintf("%s/k%d", follower.URL(), i%10), strings.NewReader("v"))
		testkit.Must(t, err)
		res, err := http.DefaultClient.Do(req)
		testkit.Must(t, err)
		testkit.Must(t, res.Body.Close())
		liveText(t, reader, fmt.Sprintf("/k%d", i%10), 200)
	}
	scrape := func(n *proc.Node) testkit.Samples { return testkit.ParseSamples(t, liveText(t, n, "/-/metrics", 200)) }
	c.eventually(func() error { // snapshots are written, and the first round trips measured, in the background
		for _, n := range c.Nodes {
			s := scrape(n)
			if s["raftrv_snapshot_bytes"] == 0 || s["raftrv_resource_version"] != writes || s.Sum("raftrv_peer_round_trip_seconds_count") == 0 {
				return fmt.Errorf("node %d: %v snapshot bytes, resource version %v, %v round trips", n.ID,
					s["raftrv_snapshot_bytes"], s["raftrv_resource_version"], s.Sum("raftrv_peer_round_trip_seconds_count"))
			}
		}
		return nil
	})
	names := map[string]bool{}
	leader := c.leader() // on a busy machine another one than at first, maybe
	for _, n := range c.Nodes {
		s := scrape(n)
		for name := range s.Names() {
			names[name] = true
		}
		leads := oneIf(n == leader)
		for series, want := range map[string]float64{
			"raftrv_is_leader": leads, "raftrv_has_leader": 1, "raftrv_member_id": float64(n.ID), "raftrv_keys": 10,
			`raftrv_members{kind="voter"}`: 3, `raftrv_members{kind="learner"}`: 0,
			`raftrv_ready_check{check="leader"}`: 1, `raftrv_ready_check{check="caught-up"}`: 1, `raftrv_ready_check{check="not-stopping"}`: 1,
			"raftrv_watchers": oneIf(n == follower), "raftrv_proposal_queue_bytes": 0,
			`raftrv_watch_drops_total{reason="slow"}`:                            0,
			`raftrv_http_requests_total{code="200",method="GET",route="/{key}"}`: oneIf(n == reader) * writes,
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
			`raftrv_http_request_duration_seconds_count{method="PUT",route="/{key}"}`: writes * oneIf(n == follower),
			"raftrv_proposal_duration_seconds_count":                                  writes * oneIf(n == follower),
			"raftrv_batch_commands_sum":                                               writes * oneIf(n == follower),
			"raftrv_watch_events_total":                                               writes * oneIf(n == follower),
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
	for _, name := range regexp.MustCompile(`\braftrv_[a-z_]+[a-z]\b`).FindAllString(testkit.ReadFile(t, "docs/operations.md"), -1) {
		if !names[testkit.BaseName(name)] {
			t.Errorf("no node has %s", name)
		}
	}
	if log := testkit.ReadFile(t, follower.LogFile); !strings.Contains(log, `"target": "/k3", "route": "/{key}", "status": 201`) {
		t.Error("the writes are not in the access log")
	}
	if !strings.Contains(liveText(t, follower, "/-/debug/pprof/", 200), "goroutine") || len(liveText(t, follower, "/-/debug/pprof/heap", 200)) == 0 {
		t.Error("there are no profiles")
	}

	// A follower that is down is behind, and does not tell its status.
	testkit.Must(t, watched.Body.Close())
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

// checkClusterStatus asks for the status of all members, one of which is down.
func (c *liveCluster) checkClusterStatus(n, down *proc.Node) {
	c.t.Helper()
	var all httpapi.ClusterStatus
	start := time.Now()
	testkit.Must(c.t, json.Unmarshal([]byte(liveText(c.t, n, "/-/v1/status?all=true", 200)), &all))
	if took := time.Since(start); took > httpapi.StatusTimeout+5*time.Second {
		c.t.Errorf("the status of all took %v", took)
	}
	if len(all.Members) != len(c.Nodes) || !slices.Equal(all.Silent, []uint64{uint64(down.ID)}) {
		c.t.Errorf("%+v", all)
	}
	for i, m := range all.Members {
		if m.ID == uint64(down.ID) {
			if m.Status != nil || !strings.Contains(m.Error, "refused") {
				c.t.Errorf("%+v", m)
			}
		} else if m.Status == nil || m.Status.ID != m.ID || m.ClientURL != c.Nodes[i].URL() {
			c.t.Errorf("%+v", m)
		}
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
