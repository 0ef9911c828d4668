package tests

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// This test asks whether clients are told the truth: about each attempt of a write, and by each ETag. Journals say
// what has happened.

var truthTime = flag.Duration("truths", 0, "run TestProcess_Truths for this long, instead of a short slice")

// truthWrite is a write, sent once or, with an Idempotency-Key, several times.
type truthWrite struct {
	token    string // its value begins with it
	method   string
	path     string // but for the timeout
	body     string
	headers  []string
	attempts []truthAttempt
}

// truthAttempt is what became of one request.
type truthAttempt struct {
	node     int
	timeout  string
	status   int // 0 = no answer
	outcome  fault.Outcome
	code     string
	rv       uint64
	replayed bool
}

func (a truthAttempt) String() string {
	s := fmt.Sprintf("%d in %s: %d %s %s %d", a.node, a.timeout, a.status, a.code, a.outcome, a.rv)
	if a.replayed {
		s += " replayed"
	}
	return s
}

func (a *truthAttempt) ok() bool { return a.status/100 == 2 }

// mayHave says whether the attempt may have applied the write. One whose time was up is answered with what the node
// remembers if that is known just then, so what is replayed may be its own.
func (a *truthAttempt) mayHave() bool { return a.ok() || a.status == 0 || a.outcome == fault.Unknown }

// refused says whether the client was told that the write has not happened.
func (a *truthAttempt) refused() bool { return !a.ok() && a.outcome == fault.NotApplied }

// judge says what is false. versions are those at which the write is in the journals.
func (w *truthWrite) judge(versions []uint64) error {
	if len(versions) > 1 {
		return fmt.Errorf("applied at %d", versions)
	}
	applied := len(versions) == 1
	for i := range w.attempts {
		a := &w.attempts[i]
		after := slices.ContainsFunc(w.attempts[i+1:], func(b truthAttempt) bool { return b.mayHave() })
		okBefore := slices.ContainsFunc(w.attempts[:i], func(b truthAttempt) bool { return b.ok() })
		switch {
		case a.ok() && !applied:
			return errors.New("acknowledged and lost")
		case a.ok() && a.rv != versions[0]:
			return fmt.Errorf("applied at %d, and a client was told %d", versions[0], a.rv)
		case a.refused() && (okBefore || applied && !after):
			return errors.New("said to be not applied, and it is")
		case a.status/100 == 4 && a.outcome == "":
			return fmt.Errorf("no outcome in a %d", a.status)
		}
	}
	return nil
}

// truths is the run.
type truths struct {
	*liveCluster
	disks  *smallDisks // nil = not allowed here
	random *rand.Rand
	epoch  int // how often it was restored
	backup string

	tokens atomic.Int64
	mu     sync.Mutex
	writes []*truthWrite
	etags  map[uint64]string // what it stands for: a token
	faults map[string]int

	answers  map[string]int // by code and outcome
	sent     int
	requests int
	applied  int
	false    int // statements
}

func (c *truths) dirOf(n *proc.Node) string {
	if c.disks != nil {
		return filepath.Join(c.disks.dir(n.ID), fmt.Sprint("data-", c.epoch))
	}
	return fmt.Sprintf("%s-%d", n.DataDir, c.epoch)
}

func (c *truths) journalOf(n *proc.Node) string {
	return fmt.Sprintf("%s-%d.journal", n.DataDir, c.epoch)
}

// truthPrefixes are those of what clients write, and of keys that nodes make up.
var truthPrefixes = []string{"w0", "w1", "w2", "w3", "w4", "w5", "w6", "w7", "1-", "2-", "3-"}

const (
	truthDisk  = 256 << 20 // several times what a node keeps in reserve
	truthQuota = 4 << 20
)

// TestProcess_Truths: three nodes with small disks and little quota, which are killed, paused, stopped and restored,
// while clients with all kinds of deadlines write, and send again at random nodes. No answer to any attempt is
// false, the journals of all nodes are equal, and no ETag stands for two values, whichever cluster it came from.
func TestProcess_Truths(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	c := &truths{random: rand.New(rand.NewPCG(seed, 0)), etags: map[uint64]string{}, faults: map[string]int{}, answers: map[string]int{}}
	if os.Getuid() == 0 {
		c.disks = newSmallDisks(t, map[int]int{1: truthDisk, 2: truthDisk, 3: truthDisk})
	}
	args := append([]string{"--quota-bytes", strconv.Itoa(truthQuota), "--journal-sync", "100ms", "--log-level", "warn"}, smallDiskArgs...)
	c.liveCluster = newIdleLiveCluster(t, proc.Options{Args: args, NodeArgs: func(n *proc.Node) []string {
		return []string{"--data-dir", c.dirOf(n), "--journal", c.journalOf(n)}
	}})
	c.start()
	end := time.Now().Add(max(*truthTime, 5*time.Second))
	slice := 2 * time.Second
	if *truthTime > 0 {
		slice = 45 * time.Second
	}
	for {
		c.run(slice, seed)
		c.judge()
		if c.epoch > 0 && time.Now().After(end) || t.Failed() {
			break
		}
		c.restore()
	}
	t.Logf("%d writes in %d requests, %d of them applied, in %d clusters; %d ETags; %d false; faults %v", c.sent, c.requests, c.applied, c.epoch+1, len(c.etags), c.false, c.faults)
	for _, name := range slices.Sorted(maps.Keys(c.answers)) {
		t.Logf("%7d %s", c.answers[name], name)
	}
}

// run lets clients write while faults happen.
func (c *truths) run(span time.Duration, seed uint64) {
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() { c.client(i, rand.New(rand.NewPCG(seed, uint64(1+i+100*c.epoch))), stop) })
	}
	saved := make(chan string, 1)
	go func() {
		time.Sleep(span / 2)
		for try := 0; ; try++ { // of whichever node can
			path := filepath.Join(c.dir, fmt.Sprintf("backup-%d-%d", c.epoch, try))
			n := c.Nodes[try%3]
			if err := exec.Command(buildLiveBinary(c.t), "backup", "save", "--from", n.URL(), path).Run(); err == nil {
				saved <- path
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	for end := time.Now().Add(span); time.Now().Before(end); {
		time.Sleep(time.Duration(100+c.random.IntN(900)) * time.Millisecond)
		c.fault()
	}
	c.backup = <-saved
	close(stop)
	clients.Wait()
}

// fault makes something bad happen, and ends it.
func (c *truths) fault() {
	n := c.Nodes[c.random.IntN(3)]
	if leader, err := c.findLeader(); err == nil && c.random.IntN(2) == 0 {
		n = leader
	}
	pause := func(most int) { time.Sleep(time.Duration(c.random.IntN(most)) * time.Millisecond) }
	name := []string{"kill", "kill two", "kill all", "pause", "stop", "transfer", "full", "full"}[c.random.IntN(8)]
	if name == "full" && c.disks == nil {
		name = "kill"
	}
	c.faults[name]++
	switch name {
	case "kill":
		c.kill(n)
		pause(600)
	case "kill two":
		c.kill(c.others(n)...)
		pause(1500)
	case "kill all":
		c.kill(c.Nodes...)
	case "pause":
		testkit.Must(c.t, n.Pause())
		pause(900)
		testkit.Must(c.t, n.Resume())
	case "stop":
		c.stop(n)
		pause(300)
	case "transfer":
		l := c.liveCluster.client(n)
		l.do(http.MethodPost, fmt.Sprintf("%s/-/v1/leader/%d?timeout=1s", n.URL(), 1+c.random.IntN(3)), "")
		l.close()
	case "full":
		nodes := c.Nodes[:1+c.random.IntN(3)]
		for _, n := range nodes {
			c.fill(n)
		}
		pause(1500)
		for _, n := range nodes {
			c.disks.resize(n.ID, truthDisk)
		}
	}
	testkit.Must(c.t, c.Start(c.context()))
}

func (c *truths) findLeader() (*proc.Node, error) {
	s, err := c.Nodes[c.random.IntN(3)].Status(c.context())
	if err != nil || s.LeaderID == 0 {
		return nil, errors.Join(err, fault.ErrNoLeader)
	}
	return c.Nodes[s.LeaderID-1], nil
}

// fill leaves so much space on the disk of a node that it takes no more writes, but can go on.
func (c *truths) fill(n *proc.Node) {
	l := c.liveCluster.client(n)
	defer l.close()
	r := l.do(http.MethodGet, n.URL()+"/-/v1/status", "")
	var st httpapi.NodeStatus
	if r.err != nil || json.Unmarshal(r.body, &st) != nil {
		return
	}
	free, err := freeOnDisk(c.disks.dir(n.ID))
	testkit.Must(c.t, err)
	c.disks.resize(n.ID, int(truthDisk-free+st.DiskReserveBytes*7/8))
}

// client sends writes and reads.
func (c *truths) client(id int, random *rand.Rand, stop <-chan struct{}) {
	h := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 2, DisableCompression: true}}
	defer h.CloseIdleConnections()
	recent := []string{"none"}
	for k := 0; ; k++ {
		select {
		case <-stop:
			return
		default:
		}
		switch random.IntN(12) {
		case 0, 1, 2:
			c.read(h, c.Nodes[random.IntN(3)], recent[random.IntN(len(recent))], random.IntN(2) == 0)
			continue
		case 3:
			if k%8 == 0 { // to make room; what became of it is of no interest
				c.delete(h, c.Nodes[random.IntN(3)], truthPrefixes[random.IntN(len(truthPrefixes))])
			}
			continue
		}
		token := fmt.Sprintf("t%d", c.tokens.Add(1))
		key := fmt.Sprintf("w%d/%s", id, token)
		value := token + "." + strings.Repeat("x", random.IntN(100)*random.IntN(100))
		w := &truthWrite{token: token, method: http.MethodPut, path: "/" + key + "?", body: value}
		switch random.IntN(5) {
		case 0:
			w.method, w.path = http.MethodPost, "/?"
		case 1:
			w.method, w.path = http.MethodPost, "/-/v1/txn?"
			w.body = fmt.Sprintf(`{"if":[{"key":%q,"exists":false}],"then":[{"op":"put","key":%[1]q,"value":%q},{"op":"put","key":%[3]q,"value":%[2]q}]}`, key, value, key+"b")
		case 2:
			w.headers = []string{"If-None-Match", "*"}
		case 3:
			w.path = "/same/" + strconv.Itoa(random.IntN(20)) + "?"
			key = w.path[1 : len(w.path)-1]
		}
		tries := 1
		if random.IntN(2) == 0 {
			w.headers = append(w.headers, "Idempotency-Key", token)
			tries = 5
		}
		for range tries {
			a := c.try(h, w, c.Nodes[random.IntN(3)], []string{"3ms", "20ms", "60ms", "150ms", "400ms", "2s"}[random.IntN(6)])
			w.attempts = append(w.attempts, a)
			if a.status != 0 && a.status < 500 && random.IntN(2) == 0 {
				break
			}
		}
		if recent = append(recent, key); len(recent) > 50 {
			recent = recent[10:]
		}
		c.mu.Lock()
		c.writes = append(c.writes, w)
		c.mu.Unlock()
	}
}

// send sends a request once. Go would send some again by itself.
func (c *truths) send(h *http.Client, method, url, body string, headers ...string) (*http.Response, []byte, error) {
	req, err := http.NewRequest(method, url, struct{ io.Reader }{strings.NewReader(body)})
	if err != nil {
		return nil, nil, err
	}
	req.ContentLength = int64(len(body))
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := h.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res, b, err
}

func (c *truths) try(h *http.Client, w *truthWrite, n *proc.Node, timeout string) truthAttempt {
	a := truthAttempt{node: n.ID, timeout: timeout}
	res, body, err := c.send(h, w.method, n.URL()+w.path+"timeout="+timeout, w.body, w.headers...)
	if err != nil {
		return a
	}
	a.status = res.StatusCode
	a.rv = parseRV(res.Header.Get("Resource-Version"))
	a.replayed = res.Header.Get("Idempotency-Replayed") != ""
	if !a.ok() {
		var p httpapi.Problem
		if err := json.Unmarshal(body, &p); err != nil {
			c.t.Errorf("%v: %s", err, body)
		}
		a.code, a.outcome = p.Code, p.Outcome
	} else if w.path == "/-/v1/txn?" && !bytes.Contains(body, []byte(`"succeeded":true`)) {
		a.status, a.code, a.outcome = http.StatusPreconditionFailed, "not succeeded", fault.NotApplied
	} else {
		c.stands(a.rv, w.token)
	}
	return a
}

// stands notes what an ETag stands for.
func (c *truths) stands(etag uint64, token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if known, ok := c.etags[etag]; ok && known != token {
		c.t.Errorf("ETag %d stands for %s and for %s", etag, known, token)
	}
	c.etags[etag] = token
}

func (c *truths) read(h *http.Client, n *proc.Node, key string, stale bool) {
	query := "?timeout=500ms"
	if stale {
		query = "?resourceVersion=0"
	}
	res, body, err := c.send(h, http.MethodGet, n.URL()+"/"+key+query, "")
	if err != nil || res.StatusCode != http.StatusOK {
		return
	}
	token, _, _ := strings.Cut(string(body), ".")
	c.stands(parseRV(strings.Trim(res.Header.Get("ETag"), `"`)), token)
}

func (c *truths) delete(h *http.Client, n *proc.Node, prefix string) {
	_, _, _ = c.send(h, http.MethodDelete, n.URL()+"/-/v1/keys?timeout=1s&prefix="+prefix, "")
}

// judge stops the nodes and compares what clients were told with what the journals say.
func (c *truths) judge() {
	c.t.Helper()
	c.settle()
	for _, n := range c.Nodes {
		c.stop(n)
	}
	versions := c.readJournals()
	applied := map[string][]uint64{}
	for rv, lines := range versions {
		for _, text := range lines {
			if i := strings.Index(text, `"objText":"t`); i >= 0 {
				token, _, _ := strings.Cut(text[i+len(`"objText":"`):], ".")
				if !slices.Contains(applied[token], rv) {
					applied[token] = append(applied[token], rv)
				}
			}
		}
	}
	c.applied += len(applied)
	for _, w := range c.writes {
		for _, a := range w.attempts {
			c.requests++
			name := fmt.Sprintf("%d %s %s", a.status, a.code, a.outcome)
			if a.replayed {
				name += " replayed"
			}
			c.answers[name]++
		}
		if err := w.judge(applied[w.token]); err != nil {
			c.false++
			c.t.Errorf("cluster %d: %s %s %v: %v\n%v", c.epoch, w.method, w.path, w.headers, err, w.attempts)
		}
	}
	c.sent += len(c.writes)
	c.writes = c.writes[:0]
}

// settle makes room, and waits until all nodes have everything.
func (c *truths) settle() {
	c.t.Helper()
	l := c.liveCluster.client(c.leader())
	defer l.close()
	rv := uint64(0)
	c.eventually(func() error {
		for _, prefix := range truthPrefixes {
			l.do(http.MethodDelete, l.node.URL()+"/-/v1/keys?prefix="+prefix, "")
		}
		r := l.raw(http.MethodPut, "end", "", "")
		if rv = r.rv(); r.err != nil || r.status/100 != 2 {
			return fmt.Errorf("PUT: %d %s %v", r.status, r.body, r.err) //nolint:errorlint // there may be none
		}
		return nil
	})
	for _, n := range c.Nodes {
		c.eventually(func() error {
			if s, err := n.Status(c.context()); err != nil || s.ResourceVersion < rv {
				return fmt.Errorf("node %d is at %d of %d: %w", n.ID, s.ResourceVersion, rv, err)
			}
			return nil
		})
	}
}

// readJournals returns the lines of all versions. The journals of all nodes must agree, and no version be missing in
// all of them.
func (c *truths) readJournals() map[uint64][]string {
	c.t.Helper()
	versions := map[uint64][]string{}
	first, newest := ^uint64(0), uint64(0)
	for _, n := range c.Nodes {
		f, err := os.Open(c.journalOf(n))
		testkit.Must(c.t, err)
		defer f.Close()
		mine, last := map[uint64][]string{}, uint64(0)
		scanner := bufio.NewScanner(f)
		scanner.Buffer(nil, 1<<20)
		for scanner.Scan() {
			var line struct {
				Journal int
				RV      uint64
				Gap     *struct{ From, To uint64 }
			}
			testkit.Must(c.t, json.Unmarshal(scanner.Bytes(), &line))
			switch {
			case line.Journal != 0:
			case line.Gap != nil:
				if line.Gap.From != last+1 {
					c.t.Errorf("journal of node %d: after %d: %s", n.ID, last, scanner.Text())
				}
				last = line.RV
			default:
				if line.RV != last && line.RV != last+1 {
					c.t.Errorf("journal of node %d: after %d: %s", n.ID, last, scanner.Text())
				}
				last = line.RV
				mine[last] = append(mine[last], scanner.Text())
				first = min(first, last)
			}
		}
		testkit.Must(c.t, scanner.Err())
		newest = max(newest, last)
		for rv, lines := range mine {
			if known, ok := versions[rv]; ok && !slices.Equal(known, lines) {
				c.t.Errorf("version %d is %q in the journal of node %d, and %q in another", rv, lines, n.ID, known)
			}
			versions[rv] = lines
		}
	}
	if want := newest - first + 1; uint64(len(versions)) != want && len(versions) > 0 {
		c.t.Errorf("%d versions from %d to %d are in no journal", want-uint64(len(versions)), first, newest)
	}
	return versions
}

// restore makes another cluster from what was saved while clients wrote.
func (c *truths) restore() {
	c.t.Helper()
	var urls []string
	for _, n := range c.Nodes {
		urls = append(urls, n.RaftURL())
		testkit.Must(c.t, os.RemoveAll(c.dirOf(n)))
		testkit.Must(c.t, os.Remove(c.journalOf(n)))
	}
	c.epoch++
	for _, n := range c.Nodes {
		if c.disks != nil { // the command keeps more in reserve than these nodes
			c.disks.resize(n.ID, 4*truthDisk)
			defer c.disks.resize(n.ID, truthDisk)
		}
		c.command("backup", "restore", c.backup, "--id", fmt.Sprint(n.ID), "--cluster", strings.Join(urls, ","), "--data-dir", c.dirOf(n))
	}
	testkit.Must(c.t, os.Remove(c.backup))
	c.start()
}
