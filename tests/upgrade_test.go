package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// lastRevisions has the last revision of each level but the newest. What it wrote
// is on disks.
var lastRevisions = [store.LevelNewest]string{1: "d7db65b", 2: "8e684ed"}

// oldBinaries are the programs of lastRevisions.
var oldBinaries [store.LevelNewest]struct {
	once   sync.Once
	path   string
	reason string // why there is none
}

// buildOldBinary builds the last program that knew no level above this one.
func buildOldBinary(t testing.TB, level int) string {
	t.Helper()
	current := buildLiveBinary(t) // its directory is deleted at the end
	b := &oldBinaries[level]
	b.once.Do(func() {
		revision := lastRevisions[level]
		dir := filepath.Join(filepath.Dir(current), revision)
		testkit.Must(t, os.Mkdir(dir, 0o700))
		archive, err := exec.Command("git", "archive", revision).Output()
		if err != nil {
			b.reason = "the history does not have revision " + revision
			return
		}
		unpack := exec.Command("tar", "x", "-C", dir)
		unpack.Stdin = bytes.NewReader(archive)
		if out, err := unpack.CombinedOutput(); err != nil {
			b.reason = fmt.Sprintf("tar: %v: %s", err, out)
			return
		}
		b.path = filepath.Join(dir, "raftrv")
		// Without its path in it, the next run finds it in the build cache.
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", b.path, ".")
		build.Dir = dir
		if out, err := build.CombinedOutput(); err != nil {
			b.reason = fmt.Sprintf("build %s: %v: %s", revision, err, out)
		}
	})
	if b.reason != "" {
		t.Skip(b.reason)
	}
	return b.path
}

// mixedCluster is a cluster whose nodes run different programs.
type mixedCluster struct {
	*liveCluster
	level  int          // that the old program knows
	binary string       // the old program
	old    map[int]bool // ids of the nodes that run it
	capped map[int]bool // ids of nodes that are new and stay at its level
	probes int
}

func newMixedCluster(t *testing.T, level int) *mixedCluster {
	m := &mixedCluster{level: level, binary: buildOldBinary(t, level), old: map[int]bool{1: true, 2: true, 3: true}, capped: map[int]bool{}}
	m.liveCluster = newLiveCluster(t, proc.Options{
		Args: []string{"--snapshot-entries", "300", "--snapshot-bytes", "4194304"},
		Wrap: func(n *proc.Node) []string {
			if !m.old[n.ID] {
				return nil
			}
			return []string{"sh", "-c", `shift; exec "` + m.binary + `" "$@"`, "sh"}
		},
		NodeArgs: func(n *proc.Node) []string {
			if !m.capped[n.ID] {
				return nil
			}
			return []string{"--feature-level-max", fmt.Sprint(level)}
		},
	})
	return m
}

// become restarts a node with another program.
func (m *mixedCluster) become(n *proc.Node, old, capped bool) {
	m.t.Helper()
	m.stop(n)
	m.old[n.ID], m.capped[n.ID] = old, capped
	m.start()
}

// levelAt returns the feature level as a new node sees it.
func (m *mixedCluster) levelAt(n *proc.Node) int {
	m.t.Helper()
	l := m.client(n)
	defer l.close()
	r := l.do(http.MethodGet, n.URL()+"/-/v1/status", "")
	testkit.Must(m.t, r.err)
	var st httpapi.NodeStatus
	testkit.Must(m.t, json.Unmarshal(r.body, &st))
	if st.Divergence != store.Sound.String() {
		m.t.Errorf("node %d is %s", n.ID, st.Divergence)
	}
	return st.FeatureLevel
}

// probe sends every kind of command to every node, and looks at the results from
// the next one. Its keys are not part of the history.
func (m *mixedCluster) probe() {
	m.t.Helper()
	var wg sync.WaitGroup
	for i, n := range m.Nodes {
		m.probes++
		key := fmt.Sprintf("probe/%d", m.probes)
		wg.Go(func() {
			if err := m.probeNode(n, m.Nodes[(i+1)%len(m.Nodes)], key); err != nil {
				m.t.Error(err)
			}
		})
	}
	wg.Wait()
}

func (m *mixedCluster) probeNode(n, next *proc.Node, k string) (err error) {
	l, other := m.client(n), m.client(next)
	defer l.close()
	defer other.close()
	call := func(l *liveClient, want int, method, path, body string, headers ...string) *liveReply {
		r := l.do(method, l.node.URL()+path, body, headers...)
		if r.err != nil || r.status != want {
			err = errors.Join(err, fmt.Errorf("node %d: %s %s: %d %s %w, want %d", l.node.ID, method, path, r.status, r.body, r.err, want))
		}
		return r
	}
	begin := call(l, 201, "PUT", "/"+k+"/a", "1").rv()
	call(l, 201, "PUT", "/"+k+"/brief?ttl=1s", "1")
	call(l, 412, "PUT", "/"+k+"/a", "x", "If-None-Match", "*")
	call(other, 204, "PUT", "/"+k+"/a", "2", "If-Match", "*", "Content-Type", "text/plain") // which is kept once all know it
	once := call(l, 201, "PUT", "/"+k+"/once", "1", "Idempotency-Key", k)
	if again := call(other, 201, "PUT", "/"+k+"/once", "1", "Idempotency-Key", k); again.rv() != once.rv() {
		err = errors.Join(err, fmt.Errorf("a request was carried out twice: versions %d and %d", once.rv(), again.rv()))
	}
	txn := fmt.Sprintf(`{"if":[{"key":%q,"value":"2"}],"then":[{"op":"put","key":%q,"value":"t"},{"op":"get","key":%q}],"else":[{"op":"delete","key":%q}]}`, k+"/a", k+"/t", k+"/a", k+"/a")
	call(l, 200, "POST", "/-/v1/txn", txn)
	call(other, 200, "GET", "/-/v1/keys?prefix="+k, "")
	for deadline := time.Now().Add(liveTimeout); ; time.Sleep(5 * time.Millisecond) {
		r := other.do("GET", other.node.URL()+"/"+k+"/brief", "")
		if r.status == 404 {
			break
		}
		if time.Now().After(deadline) {
			return errors.Join(err, fmt.Errorf("a key with a time to live is still there: %d", r.status))
		}
	}
	events := call(other, 200, "GET", fmt.Sprintf("/-/v1/watch?prefix=%s&resourceVersion=%d&timeout=300ms", k, begin-1), "")
	for _, want := range []string{k + "/a", k + "/once", k + "/t", "DELETED"} {
		if !bytes.Contains(events.body, []byte(want)) {
			err = errors.Join(err, fmt.Errorf("a watch at node %d misses %s: %s", other.node.ID, want, events.body))
		}
	}
	call(l, 200, "DELETE", "/-/v1/keys?prefix="+k, "")
	call(other, 404, "GET", "/"+k+"/a", "")
	return err
}

// snapshotTo lets a node fall so far behind that the leader must send a snapshot.
func (m *mixedCluster) snapshotTo(behind, leader *proc.Node) {
	m.t.Helper()
	testkit.Must(m.t, os.Truncate(behind.LogFile, 0)) // it is looked at for what comes now
	m.stop(behind)
	l := m.client(leader)
	defer l.close()
	m.eventually(func() error {
		if m.leader() == leader {
			return nil
		}
		return fmt.Errorf("node %d does not lead: %d", leader.ID, l.do("POST", fmt.Sprintf("%s/-/v1/leader/%d", leader.URL(), leader.ID), "").status)
	})
	m.fillKeyed(2*logKeptMax, 64<<10, 64)
	// The leader still has all of that, until it takes a snapshot. That needs its
	// time: all events of the window are in it.
	written := m.metric(l, "snapshot_index", "applied_index")[1]
	m.eventually(func() error {
		m.fillKeyed(1<<20, 64<<10, 64)
		if got := m.metric(l, "snapshot_index")[0]; got < written {
			return fmt.Errorf("the last snapshot of node %d is at entry %.0f, want %.0f", leader.ID, got, written)
		}
		return nil
	})
	m.t.Logf("snapshot of %.0f MiB", m.metric(l, "snapshot_bytes")[0]/(1<<20))
	m.start()
	wantInstalled(m.t, behind)
}

// metric returns the values of some metrics.
func (m *mixedCluster) metric(l *liveClient, names ...string) (values []float64) {
	m.t.Helper()
	r := l.do(http.MethodGet, l.node.URL()+"/-/metrics", "")
	if r.err != nil || r.status != http.StatusOK {
		m.t.Fatalf("metrics: %d %v", r.status, r.err)
	}
	samples := testkit.ParseSamples(m.t, string(r.body))
	for _, name := range names {
		v, ok := samples["raftrv_"+name]
		if !ok {
			m.t.Fatalf("no metric %s", name)
		}
		values = append(values, v)
	}
	return values
}

// wantNotOffered lets a program that is too old join. It takes no part, and the leader says why.
func (m *mixedCluster) wantNotOffered() {
	m.t.Helper()
	n, err := m.Add()
	testkit.Must(m.t, err)
	m.old[n.ID] = true
	leader := m.leader()
	l := m.client(leader)
	defer l.close()
	path := fmt.Sprintf("%s/-/v1/members/%d", leader.URL(), n.ID)
	if r := l.do(http.MethodPost, path, fmt.Sprintf(`{"peerUrl":%q}`, n.RaftURL())); r.status != http.StatusNoContent {
		m.t.Fatalf("add: %d %s %v", r.status, r.body, r.err)
	}
	testkit.Must(m.t, n.Start())
	m.eventually(func() error {
		b, err := os.ReadFile(leader.LogFile)
		testkit.Must(m.t, err)
		if !bytes.Contains(b, []byte("this program knows")) || !bytes.Contains(b, []byte("use the version that wrote it")) {
			return fmt.Errorf("the leader does not say that node %d is too old:\n%s", n.ID, leader.LogTail())
		}
		return nil
	})
	m.disturb(n)
	testkit.Must(m.t, n.Kill())
	if r := l.do(http.MethodDelete, path, ""); r.status != http.StatusNoContent {
		m.t.Fatalf("remove: %d %s %v", r.status, r.body, r.err)
	}
	m.Forget(n)
}

// judge is verdict without a count of versions, since probes have taken some.
func (m *mixedCluster) judge() {
	m.t.Helper()
	m.readBack()
	l := m.client(m.Nodes[0])
	defer l.close()
	m.sameEverywhere(l.version())
	if err := errors.Join(m.history.checkVersions(0, 0), m.history.checkLinearizable(m.dir), m.history.checkDeadlines()); err != nil {
		m.t.Error(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.surprises.err(); err != nil {
		m.t.Errorf("answers that clients should not get:\n%v", err)
	}
}

// wantRefusedStart starts a node that is too old and wants it to say so, in one of some ways.
func (m *mixedCluster) wantRefusedStart(n *proc.Node, texts ...string) {
	m.t.Helper()
	testkit.Must(m.t, n.Start())
	ctx, cancel := context.WithTimeout(context.Background(), liveTimeout)
	defer cancel()
	err := n.Wait(ctx)
	log := testkit.ReadFile(m.t, n.LogFile)
	says := func(text string) bool { return strings.Contains(log, text) }
	if err == nil || ctx.Err() != nil || !slices.ContainsFunc(texts, says) {
		m.t.Errorf("node %d, which is too old, ends with %v and says %s", n.ID, err, n.LogTail())
	}
	testkit.Must(m.t, errors.Join(n.Kill(), os.Truncate(n.LogFile, 0)))
}

// TestProcess_Upgrade goes from the last program of each level to this one,
// node by node, under load and with kills, and part of the way back. Nothing is
// lost, stale or done twice, and nobody's state differs.
func TestProcess_Upgrade(t *testing.T) {
	for level := store.LevelFirst; level < store.LevelNewest; level++ {
		t.Run(fmt.Sprint("level=", level), func(t *testing.T) { upgradeFrom(t, level) })
	}
}

func upgradeFrom(t *testing.T, old int) {
	m := newMixedCluster(t, old)
	load := func(step string, probe bool, change func()) {
		t.Helper()
		start := time.Now()
		load := m.load(4, m.Nodes, func(l *liveClient) {
			if l.requests++; l.requests%3 == 0 {
				l.putOnce()
			} else {
				putNewOrWait(l)
			}
		})
		m.waitForAcks(50)
		change()
		m.waitForAcks(50)
		load.stop()
		if probe {
			m.probe()
		}
		t.Logf("%s: %v", step, time.Since(start).Round(10*time.Millisecond))
	}
	load("all old", *testkit.Heavy, func() {})
	for i, n := range m.Nodes {
		load(fmt.Sprintf("node %d becomes new", n.ID), i == 0 || *testkit.Heavy, func() {
			m.become(n, false, true)
			if i == 0 || *testkit.Heavy {
				m.kill(n)
				m.start()
			}
		})
		if i == 0 && *testkit.Heavy {
			old := m.Nodes[1]
			m.snapshotTo(old, n) // from new to old, and the other way
			m.snapshotTo(n, old)
			m.probe()
			load("and old, and new again", true, func() {
				m.become(n, true, false)
				m.become(n, false, true)
			})
		}
		if level := m.levelAt(n); level != old {
			t.Fatalf("the level is %d while some members are old, or say so", level)
		}
	}
	n := m.leader()
	load("all new, and one old again", *testkit.Heavy, func() { m.become(n, true, false) })
	load("and all killed", true, func() { // nobody remembers who the others are
		m.kill(m.Nodes...)
		m.start()
	})
	load("all new", *testkit.Heavy, func() {
		for _, n := range m.Nodes {
			m.become(n, false, false)
		}
		m.eventually(func() error {
			for _, n := range m.Nodes {
				if level := m.levelAt(n); level != store.LevelNewest {
					return fmt.Errorf("node %d is at level %d", n.ID, level)
				}
			}
			return nil
		})
	})
	load("killed at the new level", true, func() {
		m.kill(m.Nodes...)
		m.start()
	})
	start := time.Now()
	n = m.others(m.leader())[0]
	if *testkit.Heavy {
		m.snapshotTo(n, m.leader())
		m.wantNotOffered()
	}
	m.stop(n)
	m.capped[n.ID] = true
	m.wantRefusedStart(n, fmt.Sprintf("feature level %d, and this node knows up to %d", store.LevelNewest, old))
	m.capped[n.ID], m.old[n.ID] = false, true
	m.wantRefusedStart(n, "use the version that wrote it", "command 9 is newer than this program", "feature level 3 is newer than this program") // in its snapshot, or in its log
	m.old[n.ID] = false
	m.start()
	for _, n := range m.Nodes {
		_ = m.levelAt(n)
	}
	t.Logf("too old: %v", time.Since(start).Round(10*time.Millisecond))
	for _, n := range m.Nodes {
		l := m.client(n)
		key := fmt.Sprint("/typed/", n.ID)
		l.do("PUT", n.URL()+key, "v", "Content-Type", "text/plain")
		if r := l.do("GET", n.URL()+key, ""); r.err != nil || r.header.Get("Content-Type") != "text/plain" {
			t.Errorf("node %d: a value of a type comes back as %q, %v", n.ID, r.header.Get("Content-Type"), r.err)
		}
		l.close()
	}
	m.judge()
	t.Log(m.history.count())
}
