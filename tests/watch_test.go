package tests

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/testkit"
	"raftrv/internal/watchcheck"
)

// These tests watch real nodes: many watchers, bad ones, and nodes that come and go.

// watchCrowd is many watches of one node that only count what they are told.
type watchCrowd struct {
	conns  []net.Conn
	told   atomic.Int64 // events
	lost   atomic.Int64 // connections
	want   atomic.Int64
	all    chan time.Time // when told reached want
	reader sync.WaitGroup
}

// newWatchCrowd connects n watchers and waits until each of them was told where it starts.
func newWatchCrowd(tb testing.TB, n *proc.Node, size int, query string) *watchCrowd {
	tb.Helper()
	raiseFileLimit(tb, size+200)
	c := &watchCrowd{conns: make([]net.Conn, size), all: make(chan time.Time, 1)}
	c.want.Store(-1)
	tb.Cleanup(c.close)
	var next, ready atomic.Int64
	var dialers sync.WaitGroup
	for range 32 {
		dialers.Go(func() {
			for i := next.Add(1) - 1; i < int64(size); i = next.Add(1) - 1 {
				conn, err := dialWatch(n, query)
				if err != nil {
					tb.Error(err)
					return
				}
				c.conns[i] = conn
				c.reader.Go(func() { c.read(conn, &ready) })
			}
		})
	}
	dialers.Wait()
	for deadline := time.Now().Add(liveTimeout); ready.Load() < int64(size); time.Sleep(10 * time.Millisecond) {
		if tb.Failed() || time.Now().After(deadline) {
			tb.Fatalf("%d of %d watchers are connected, %d were cut off", ready.Load(), size, c.lost.Load())
		}
	}
	return c
}

// dialWatch asks for a watch and reads nothing.
func dialWatch(n *proc.Node, query string) (net.Conn, error) {
	conn, err := net.Dial("tcp", strings.TrimPrefix(n.URL(), "http://"))
	if err != nil {
		return nil, err
	}
	_, err = io.WriteString(conn, "GET /-/v1/watch?"+query+" HTTP/1.1\r\nHost: localhost\r\n\r\n")
	return conn, err
}

// read counts messages: of all lines only they begin like that.
func (c *watchCrowd) read(conn net.Conn, ready *atomic.Int64) {
	defer c.lost.Add(1)
	r := bufio.NewReaderSize(conn, 512)
	for {
		line, err := r.ReadSlice('\n')
		switch {
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return
		case bytes.HasPrefix(line, []byte(`{"type":"BOOKMARK"`)):
			ready.Add(1)
		case bytes.HasPrefix(line, []byte(`{"type":"`)):
			if c.told.Add(1) == c.want.Load() {
				c.all <- time.Now()
			}
		}
	}
}

func (c *watchCrowd) close() {
	for _, conn := range c.conns {
		if conn != nil {
			_ = conn.Close() // has been read
		}
	}
	c.reader.Wait()
}

// round returns how long it takes from the request that writes until all have heard of it.
func (c *watchCrowd) round(tb testing.TB, n *proc.Node, key, value string) time.Duration {
	tb.Helper()
	c.want.Store(c.told.Load() + int64(len(c.conns)))
	start := time.Now()
	req, err := http.NewRequest(http.MethodPut, keyURL(n, key), strings.NewReader(value))
	testkit.Must(tb, err)
	res, err := http.DefaultClient.Do(req)
	testkit.Must(tb, err)
	res.Body.Close()
	if res.StatusCode >= 300 {
		tb.Fatalf("PUT: %s", res.Status)
	}
	select {
	case end := <-c.all:
		return end.Sub(start)
	case <-time.After(liveTimeout):
		tb.Fatalf("%d of %d events came, %d connections are lost", c.told.Load(), c.want.Load(), c.lost.Load())
		return 0
	}
}

// raiseFileLimit lets this process, and those that it starts, have so many connections.
func raiseFileLimit(tb testing.TB, n int) {
	tb.Helper()
	var limit syscall.Rlimit
	testkit.Must(tb, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	if limit.Cur >= uint64(n) {
		return
	}
	limit.Cur = min(limit.Max, uint64(n))
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < uint64(n) {
		tb.Skipf("SKIPPED: %d connections are needed, %d files may be open (%v)", n, limit.Max, err)
	}
}

// quietMemory returns how much memory a node has that does nothing: the least of some looks.
func quietMemory(n *proc.Node) int {
	least := residentMemory(n)
	for range 10 {
		time.Sleep(50 * time.Millisecond)
		least = min(least, residentMemory(n))
	}
	return least
}

// fanout measures a crowd on the first node. cost is what each of the watchers costs that node while nothing
// happens, before and after the rounds, whichever is more.
func fanout(tb testing.TB, c *proc.Cluster, size int, rounds func(crowd *watchCrowd, n *proc.Node)) (cost int) {
	tb.Helper()
	n := c.Nodes[0]
	http.DefaultClient.CloseIdleConnections()
	empty := quietMemory(n)
	crowd := newWatchCrowd(tb, n, size, "prefix=fan/")
	before := quietMemory(n)
	rounds(crowd, n)
	after := quietMemory(n)
	if lost := crowd.lost.Load(); lost > 0 {
		tb.Errorf("%d connections were lost", lost)
	}
	return (max(before, after) - empty) / size
}

// oneAddressArgs let all clients come from one machine, however many they are.
var oneAddressArgs = []string{"--max-connections-per-address", "16384"}

// TestProcess_WatchFanout: one write reaches all watchers of its prefix in time, and those that wait cost little.
func TestProcess_WatchFanout(t *testing.T) {
	size := testkit.Sized(1000, 10_000)
	c := newLiveCluster(t, proc.Options{Nodes: 1, Args: oneAddressArgs})
	var took []time.Duration
	cost := fanout(t, c.Cluster, size, func(crowd *watchCrowd, n *proc.Node) {
		for i := range 10 {
			took = append(took, crowd.round(t, n, fmt.Sprint("fan/", i), "value"))
		}
	})
	slices.Sort(took)
	worst := took[len(took)-1]
	t.Logf("%d watchers: one write reaches all of them in %v (median of %d, worst %v); idle they cost %.1f KiB each",
		size, took[len(took)/2].Round(time.Millisecond), len(took), worst.Round(time.Millisecond), float64(cost)/1024)
	if !*testkit.Heavy {
		return // too small to judge
	}
	if worst > time.Second {
		t.Errorf("it took %v", worst)
	}
	if cost > 32<<10 {
		t.Errorf("a watcher costs %d bytes", cost)
	}
}

// BenchmarkWatchFanout: one operation is one write that all watchers hear of, over TCP, of a node that is a
// process of its own.
func BenchmarkWatchFanout(b *testing.B) {
	for _, size := range []int{100, 1000, 10_000} {
		b.Run(fmt.Sprintf("watchers=%d", size), func(b *testing.B) {
			c, err := proc.NewCluster(proc.Options{Binary: buildLiveBinary(b), Nodes: 1, Dir: b.TempDir(), Args: oneAddressArgs})
			testkit.Must(b, err)
			b.Cleanup(func() { testkit.Must(b, c.Stop()) })
			ctx, cancel := context.WithTimeout(b.Context(), liveTimeout)
			defer cancel()
			testkit.Must(b, c.Start(ctx))
			cost := fanout(b, c, size, func(crowd *watchCrowd, n *proc.Node) {
				i, worst := 0, time.Duration(0)
				for b.Loop() {
					worst = max(worst, crowd.round(b, n, fmt.Sprint("fan/", i%100), "value"))
					i++
				}
				b.ReportMetric(float64(worst.Microseconds())/1000, "ms-worst")
			})
			b.ReportMetric(float64(cost)/1024, "KiB/watcher")
		})
	}
}

// TestProcess_WatchNeverRead: watchers that never read cost no memory but for what one read takes, and hold up
// nobody.
func TestProcess_WatchNeverRead(t *testing.T) {
	const valueSize = 4 << 10
	window := testkit.Sized(2<<20, 64<<20)
	c := newLiveCluster(t, proc.Options{Nodes: 1, Args: []string{"--watch-bytes", strconv.Itoa(window)}})
	n := c.Nodes[0]
	p := &pacedWrites{c: c, n: n, events: window / valueSize, valueSize: valueSize}
	// The window fills, and the heap grows until it knows the load.
	p.run(t)
	p.run(t)
	alone, before := p.run(t)
	for _, size := range []int{1, testkit.Sized(10, 1000)} {
		var never []net.Conn
		for range size {
			conn, err := dialWatch(n, "prefix=key/")
			testkit.Must(t, err)
			never = append(never, conn)
		}
		delay, most := p.run(t)
		for _, conn := range never {
			testkit.Must(t, conn.Close())
		}
		growth, bound := most-before, 16<<20+size*(4*httpapi.WatchPartSize)
		t.Logf("%d watchers never read beside %d MiB of events: memory grows by %d KiB from %d MiB (bound %d KiB), 10 others are told %v after the answer (p99; %v without them)",
			size, window>>20, growth>>10, before>>20, bound>>10, delay.Round(time.Microsecond), alone.Round(time.Microsecond))
		if *testkit.Heavy && growth > bound {
			t.Errorf("memory grows by %d bytes", growth)
		}
		// A thousand at once take gigabytes of events into the kernel's buffers before they stand still, and a
		// machine with two processors needs seconds for that.
		most99 := 100 * time.Millisecond
		if size > 1 {
			most99 = 500 * time.Millisecond
		}
		if *testkit.Heavy && delay > most99 {
			t.Errorf("p99 is %v, want at most %v", delay, most99)
		}
	}
}

// pacedWrites writes events at a rate that the machine can bear, while ten watchers look at the clock.
type pacedWrites struct {
	c                 *liveCluster
	n                 *proc.Node
	events, valueSize int
	first             int // number of the first event
}

// run returns the 99th percentile of the time from the answer to a write until a watcher hears of it, and the
// most memory that the node took.
func (p *pacedWrites) run(t *testing.T) (delay time.Duration, most int) {
	const perSecond = 1000
	told := make([][]time.Time, 10)
	var watchers sync.WaitGroup
	for i := range told {
		told[i] = make([]time.Time, p.events)
		conn, err := dialWatch(p.n, "prefix=key/")
		testkit.Must(t, err)
		r := bufio.NewReaderSize(conn, 2*p.valueSize)
		for { // to the first message, which says where it starts
			line, err := r.ReadSlice('\n')
			testkit.Must(t, err)
			if bytes.HasPrefix(line, []byte("{")) {
				break
			}
		}
		watchers.Go(func() {
			defer conn.Close()
			for seen := 0; seen < p.events; {
				line, err := r.ReadSlice('\n')
				if err != nil {
					t.Error(err)
					return
				}
				if _, value, ok := bytes.Cut(line, []byte(`"value":"`)); ok {
					id, err := strconv.Atoi(string(value[:10]))
					if err != nil || id < p.first || id >= p.first+p.events {
						t.Errorf("%.100q: %v", line, err)
						return
					}
					told[i][id-p.first] = time.Now()
					seen++
				}
			}
		})
	}
	answered := make([]time.Time, p.events)
	start := time.Now()
	var next atomic.Int64
	var writers sync.WaitGroup
	for range 8 {
		writers.Go(func() {
			l := p.c.client(p.n)
			defer l.close()
			for i := next.Add(1) - 1; i < int64(p.events); i = next.Add(1) - 1 {
				time.Sleep(time.Until(start.Add(time.Duration(i) * time.Second / perSecond)))
				value := fmt.Sprintf("%010d%s", p.first+int(i), strings.Repeat("x", p.valueSize-10))
				if r := l.raw(http.MethodPut, fmt.Sprintf("key/%04d", i%1000), "", value); r.err != nil || r.status >= 300 {
					t.Errorf("PUT: %d %s %v", r.status, r.body, r.err)
				}
				answered[i] = time.Now()
			}
		})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		writers.Wait()
		watchers.Wait()
	}()
	for finished := false; !finished; {
		select {
		case <-done:
			finished = true
		case <-time.After(5 * time.Millisecond):
			most = max(most, residentMemory(p.n))
		}
	}
	p.first += p.events
	var delays []time.Duration
	for _, list := range told {
		for i, at := range list {
			delays = append(delays, max(0, at.Sub(answered[i])))
		}
	}
	slices.Sort(delays)
	return delays[len(delays)*99/100], most
}

// liveWatch is one stream of messages of a node.
type liveWatch struct {
	c      *liveCluster
	node   *proc.Node
	query  url.Values
	events bool   // server-sent
	lastID string // of server-sent events

	cancel context.CancelFunc
	res    *http.Response
	body   *bufio.Reader
}

// errWatchRefused is an answer that is no stream.
type errWatchRefused struct {
	status  int
	problem httpapi.Problem
}

func (e *errWatchRefused) Error() string {
	return fmt.Sprintf("%d %s: %s", e.status, e.problem.Code, e.problem.Detail)
}

// open asks for the stream.
func (w *liveWatch) open() error {
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.node.URL()+"/-/v1/watch?"+w.query.Encode(), nil)
	if err != nil {
		return err
	}
	if w.events {
		req.Header.Set("Accept", "text/event-stream")
	}
	if w.lastID != "" {
		req.Header.Set("Last-Event-ID", w.lastID)
	}
	if w.res, err = watchClient.Do(req); err != nil { //nolint:bodyclose // close does
		return err
	}
	w.body = bufio.NewReaderSize(w.res.Body, 64<<10)
	if w.res.StatusCode == http.StatusOK {
		return nil
	}
	refused := &errWatchRefused{status: w.res.StatusCode}
	if err := json.NewDecoder(w.body).Decode(&refused.problem); err != nil {
		return err
	}
	return refused
}

// watchClient has a connection for each stream, and none that is used again: it could belong to a node that
// was killed since.
var watchClient = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}

// next returns the next message, of an ERROR what it says.
func (w *liveWatch) next() (watchcheck.Message, error) {
	if !w.events {
		line, err := w.body.ReadBytes('\n')
		if err != nil {
			return watchcheck.Message{}, err
		}
		return watchcheck.Parse(line)
	}
	var kind, id, data string
	for {
		line, err := w.body.ReadString('\n')
		if err != nil {
			return watchcheck.Message{}, err
		}
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch name {
		case "event":
			kind = value
		case "id":
			id = value
		case "data":
			data = value
		case "retry":
		case "":
			if data == "" {
				continue // after retry
			}
			m, err := watchcheck.Parse([]byte(data))
			cluster, _, _ := strings.Cut(id, "-")
			wantID := cluster + "-" + strconv.FormatUint(m.RV, 10)
			if m.More || m.Kind == "ERROR" && id == "" { // within the list at the start
				wantID = ""
			}
			if err == nil && (m.Kind != kind || id != wantID) {
				err = fmt.Errorf("event %s with id %q has the data %s", kind, id, data)
			}
			if id != "" {
				w.lastID = id
			}
			return m, err
		default:
			return watchcheck.Message{}, fmt.Errorf("no field of an event: %q", line)
		}
	}
}

func (w *liveWatch) close() {
	w.cancel()
	if w.res != nil {
		w.res.Body.Close()
	}
}

// TestProcess_WatchCurl: curl -N, whose user repeats the last id that came, after the node was killed and
// started again.
func TestProcess_WatchCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("SKIPPED: there is no curl")
	}
	c := newLiveCluster(t, proc.Options{})
	n, l := c.Nodes[0], c.client(c.Nodes[1])
	v := watchcheck.New("curl", "", true, false, 0)
	lastID := "0"
	for round := range testkit.Sized(3, 10) {
		for i := range 10 {
			l.mustPut(fmt.Sprint("k", i%3), c.newValue(8))
		}
		cmd := exec.Command(curl, "-sN", "-H", "Accept: text/event-stream", "-H", "Last-Event-ID: "+lastID, n.URL()+"/-/v1/watch")
		out, err := cmd.StdoutPipe()
		testkit.Must(t, err)
		testkit.Must(t, cmd.Start())
		w := &liveWatch{events: true, body: bufio.NewReader(out)}
		final := l.mustPut("last", c.newValue(8)).rv
		for v.Done < final {
			m, err := w.next()
			testkit.Must(t, err)
			v.Observe(m)
		}
		lastID = w.lastID
		if round%2 == 0 {
			c.kill(n)
		} else {
			c.stop(n)
		}
		for { // what the node said last
			m, err := w.next()
			if err != nil {
				break
			}
			if m.Kind != "ERROR" || m.Code != "shutting-down" || m.RV != v.Done {
				t.Errorf("%v after %d", m, v.Done)
			}
		}
		_ = cmd.Wait() // fails if the node was killed
		v.Resume()
		c.start()
	}
	// Versions are dense, and each has one event: none is missing, none came twice.
	if v.Events != int(v.Done) {
		t.Errorf("%d events up to version %d", v.Events, v.Done)
	}
	v.Report(t)
}

// TestProcess_Watch: whatever happens to the nodes, every watch is told of every event once, in order, and never
// of half a version. The journals of the nodes say the same.
func TestProcess_Watch(t *testing.T) {
	watchers, faults, wantTold := testkit.Sized(30, 100), testkit.Sized(4, 30), int64(testkit.Sized(20_000, 1_000_000))
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	c := newIdleLiveCluster(t, proc.Options{
		Args: []string{"--snapshot-entries", "2000", "--watch-events", "8192", "--watch-bookmark", "500ms", "--journal-sync", "100ms", "--log-level", "warn"},
		NodeArgs: func(n *proc.Node) []string {
			return []string{"--journal", journalOf(n)}
		},
	})
	c.start()
	s := &watchScenario{t: t, c: c, seed: seed}
	for i := range watchers {
		s.watchers.Go(func() { s.watch(i) })
	}
	for i := range 6 {
		s.writers.Go(func() { s.write(i) })
	}

	random := rand.New(rand.NewPCG(seed, 1))
	var leaders, restarts int
	for i := 0; i < faults || s.told.Load() < wantTold; i++ {
		if t.Failed() {
			break
		}
		n := c.leader()
		if random.IntN(2) == 0 {
			n = c.others(n)[random.IntN(2)]
		} else {
			leaders++
		}
		if random.IntN(3) == 0 {
			c.stop(n)
		} else {
			c.kill(n)
		}
		restarts++
		time.Sleep(time.Duration(random.IntN(testkit.Sized(200, 1000))) * time.Millisecond)
		c.start()
		time.Sleep(time.Duration(200+random.IntN(testkit.Sized(300, 1500))) * time.Millisecond)
	}
	s.stopWriting.Store(true)
	s.writers.Wait()
	final := c.client(c.Nodes[0]).mustPut("the end", "!").rv
	s.final.Store(final)
	s.watchers.Wait()
	items, listed := s.list(final) // keys may expire yet
	for _, n := range c.Nodes {
		c.stop(n)
	}

	history := s.readJournals(listed)
	if err := history.Dense(); err != nil {
		t.Fatal(err)
	}
	s.checkAcks(history)
	checkItems(t, history, items)
	bookmarks, resumes := 0, 0
	for _, v := range s.validators {
		v.Check(history)
		v.Report(t)
		bookmarks, resumes = bookmarks+v.Bookmarks, resumes+v.Resumes
	}
	t.Logf("%d events in %d versions, %d watchers were told of %d and got %d bookmarks; %d restarts, %d of them of the leader; %d resumes, %d watches began anew",
		len(history.Messages), history.Last(), watchers, s.told.Load(), bookmarks, restarts, leaders, resumes, len(s.validators)-watchers)
	t.Logf("streams ended with %v", s.ends)
}

func journalOf(n *proc.Node) string { return n.DataDir + ".journal" }

// watchScenario is what the clients of TestProcess_Watch do.
type watchScenario struct {
	t    *testing.T
	c    *liveCluster
	seed uint64

	watchers, writers sync.WaitGroup
	stopWriting       atomic.Bool
	final             atomic.Uint64 // the version at which watchers end; 0 = go on
	told              atomic.Int64
	values            atomic.Int64

	mu         sync.Mutex
	validators []*watchcheck.Validator
	acks       []watchcheck.Message // writes with one answer: version, key, value, kind if deleted
	ends       map[string]int       // how streams ended
}

func (s *watchScenario) ended(how string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ends == nil {
		s.ends = map[string]int{}
	}
	s.ends[how]++
}

const watchScenarioKeys = 300

func scenarioKey(i int) string { return fmt.Sprintf("p%d/k%02d", i%10, i/10) }

// watch follows one filter over all nodes until the end.
func (s *watchScenario) watch(i int) {
	random := rand.New(rand.NewPCG(s.seed, uint64(1000+i)))
	filter := scenarioKey(random.IntN(watchScenarioKeys))
	isPrefix := i%5 != 0
	if isPrefix {
		filter = filter[:[]int{0, 1, 3, 3, 4, 5}[random.IntN(6)]]
	}
	v := s.newValidator(i, filter, isPrefix, i%3 == 0)
	for s.final.Load() == 0 || v.Done < s.final.Load() {
		w := &liveWatch{c: s.c, node: s.c.Nodes[random.IntN(len(s.c.Nodes))], query: url.Values{}, events: random.IntN(3) == 0}
		if isPrefix {
			w.query.Set("prefix", filter)
		} else {
			w.query.Set("key", filter)
		}
		switch {
		case v.Listing:
			w.query.Set("initial", "true")
		case w.events && random.IntN(2) == 0:
			w.query.Set("resourceVersion", "1") // as in the URL of a page that goes on
			w.lastID = strconv.FormatUint(v.Done, 10)
		default:
			w.query.Set("resourceVersion", strconv.FormatUint(v.Done, 10))
		}
		if random.IntN(10) == 0 {
			w.query.Set("timeout", "300ms")
		}
		err := s.follow(w, v, random)
		w.close()
		v.Resume()
		if refused, ok := errors.AsType[*errWatchRefused](err); ok && refused.status == http.StatusGone {
			v = s.newValidator(i, filter, isPrefix, true)
		} else if ok && refused.status < 500 && refused.status != http.StatusTooManyRequests {
			s.t.Errorf("%s after %d: %v", v.Name, v.Done, err)
			return
		} else if err != nil {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func (s *watchScenario) newValidator(i int, filter string, isPrefix, initial bool) *watchcheck.Validator {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := watchcheck.New(fmt.Sprintf("watch %d of %q", i, filter), filter, isPrefix, initial, 0)
	s.validators = append(s.validators, v)
	return v
}

// follow reads one stream, some of it or all.
func (s *watchScenario) follow(w *liveWatch, v *watchcheck.Validator, random *rand.Rand) error {
	if err := w.open(); err != nil {
		if refused, ok := errors.AsType[*errWatchRefused](err); ok {
			s.ended(fmt.Sprint("refused ", refused.status, " ", refused.problem.Code))
		} else {
			s.ended("not connected")
		}
		return err
	}
	messages := 1 + random.IntN(20_000)
	if cluster := w.res.Header.Get(httpapi.HeaderCluster); cluster != "" && strings.Contains(w.lastID, "-") && !strings.HasPrefix(w.lastID, cluster) {
		v.Violation("resumed after %s in cluster %s", w.lastID, cluster)
	}
	for range messages {
		m, err := w.next()
		switch {
		case errors.Is(err, io.EOF):
			s.ended("end")
			return nil
		case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
			s.ended("connection lost")
			return err
		case err != nil:
			s.ended("error")
			v.Violation("%v", err)
			return err
		case m.Kind == "ERROR":
			s.ended("ERROR " + m.Code)
			v.Part = v.Part[:0]
			if !v.Listing {
				v.Observe(watchcheck.Message{Kind: "BOOKMARK", RV: m.RV}) // it claims the same
			}
			if m.Code == "expired" {
				return &errWatchRefused{status: http.StatusGone}
			}
			return nil
		}
		v.Observe(m)
		if m.Kind != "BOOKMARK" {
			s.told.Add(1)
		}
		if final := s.final.Load(); final != 0 && v.Done >= final {
			return nil
		}
		if random.IntN(20_000) == 0 {
			time.Sleep(time.Duration(random.IntN(testkit.Sized(1500, 8000))) * time.Millisecond)
		}
	}
	s.ended("left")
	return nil
}

// write writes all that can be written.
func (s *watchScenario) write(i int) {
	random := rand.New(rand.NewPCG(s.seed, uint64(2000+i)))
	l := s.c.client(s.c.Nodes[i%len(s.c.Nodes)])
	defer l.close()
	value := func() string { return fmt.Sprintf("v%d.%s", s.values.Add(1), strings.Repeat("x", random.IntN(200))) }
	key := func() string { return scenarioKey(random.IntN(watchScenarioKeys)) }
	for !s.stopWriting.Load() {
		var r *liveReply
		ack := watchcheck.Message{Key: key()}
		switch random.IntN(40) {
		case 0:
			r = l.do(http.MethodDelete, l.node.URL()+"/-/v1/keys?prefix="+url.QueryEscape(ack.Key[:5]), "")
			ack.Key = ""
		case 1, 2:
			ack.Kind, ack.Value = "PUT", value()
			r = l.raw(http.MethodPut, ack.Key, "?ttl=1s", ack.Value)
		case 3, 4, 5, 6:
			ack.Kind = "DELETED"
			r = l.raw(http.MethodDelete, ack.Key, "", "")
		case 7, 8, 9, 10, 11, 12:
			var body struct {
				Then []map[string]string `json:"then"`
			}
			ops := map[string]bool{}
			for range 2 + random.IntN(20) {
				ops[key()] = random.IntN(4) == 0
			}
			for _, key := range slices.Sorted(maps.Keys(ops)) {
				if ops[key] {
					body.Then = append(body.Then, map[string]string{"op": "delete", "key": key})
				} else {
					body.Then = append(body.Then, map[string]string{"op": "put", "key": key, "value": value()})
				}
			}
			b, err := json.Marshal(body)
			if err != nil {
				s.t.Error(err)
				return
			}
			r = l.do(http.MethodPost, l.node.URL()+"/-/v1/txn", string(b))
			ack.Key = ""
		default:
			ack.Kind, ack.Value = "PUT", value()
			r = l.raw(http.MethodPut, ack.Key, "", ack.Value)
		}
		if r.err != nil || r.status >= 500 {
			time.Sleep(10 * time.Millisecond)
		} else if ack.RV = r.rv(); r.status < 300 && ack.Key != "" {
			s.mu.Lock()
			s.acks = append(s.acks, ack)
			s.mu.Unlock()
		}
	}
}

// list returns all items as of a version, which is not older than rv.
func (s *watchScenario) list(rv uint64) (items map[string]watchcheck.Message, version uint64) {
	s.t.Helper()
	l := s.c.client(s.c.Nodes[1])
	r := l.do(http.MethodGet, fmt.Sprintf("%s/-/v1/keys?limit=10000&resourceVersion=%d", l.node.URL(), rv), "")
	var body struct {
		ResourceVersion uint64
		Items           []struct {
			Key, Value      string
			ResourceVersion uint64
		}
	}
	if r.err != nil || r.status != http.StatusOK {
		s.t.Fatalf("list: %d %s %v", r.status, r.body, r.err)
	}
	testkit.Must(s.t, json.Unmarshal(r.body, &body))
	items = map[string]watchcheck.Message{}
	for _, it := range body.Items {
		items[it.Key] = watchcheck.Message{Key: it.Key, Value: it.Value, RV: it.ResourceVersion}
	}
	return items, body.ResourceVersion
}

// readJournals makes the history of what the nodes have written down, which must agree.
func (s *watchScenario) readJournals(final uint64) *watchcheck.History {
	s.t.Helper()
	versions := make([][]string, final+1)
	for _, n := range s.c.Nodes {
		f, err := os.Open(journalOf(n))
		testkit.Must(s.t, err)
		defer f.Close()
		gaps, last, part := 0, uint64(0), []string(nil)
		for scanner := bufio.NewScanner(f); ; {
			if !scanner.Scan() {
				testkit.Must(s.t, scanner.Err())
				break
			}
			var line struct {
				Journal int
				RV      uint64
				More    bool
				Gap     *struct{ From, To uint64 }
			}
			testkit.Must(s.t, json.Unmarshal(scanner.Bytes(), &line))
			if line.Journal != 0 && last == 0 {
				continue // the first line
			}
			if g := line.Gap; g != nil {
				if g.From != last+1 || g.To != line.RV {
					s.t.Fatalf("journal of node %d: after %d: %s", n.ID, last, scanner.Text())
				}
				gaps, last = gaps+1, g.To
				continue
			}
			if line.RV != last+1 {
				s.t.Fatalf("journal of node %d: after %d: %s", n.ID, last, scanner.Text())
			}
			if part = append(part, scanner.Text()); line.More {
				continue
			}
			if last = line.RV; last <= final {
				if known := versions[last]; known != nil && !slices.Equal(known, part) {
					s.t.Errorf("journal of node %d: version %d is %q, another node has %q", n.ID, last, part, known)
				}
				versions[last] = part
			}
			part = nil
		}
		if last < final || len(part) > 0 {
			s.t.Errorf("journal of node %d ends at %d of %d, with %q", n.ID, last, final, part)
		}
		s.t.Logf("journal of node %d: %d gaps", n.ID, gaps)
	}
	h := &watchcheck.History{}
	state := map[string]watchcheck.Message{}
	for rv, lines := range versions[1:] {
		if lines == nil {
			s.t.Fatalf("no journal has version %d", rv+1)
		}
		for _, text := range lines {
			var line struct {
				Key     string
				ObjText string
				Deleted bool
				Reason  string
				More    bool
			}
			testkit.Must(s.t, json.Unmarshal([]byte(text), &line))
			m := watchcheck.Message{Kind: "ADDED", RV: uint64(rv + 1), Key: line.Key, Value: line.ObjText, More: line.More, Expired: line.Reason == "expired"}
			old, exists := state[m.Key]
			if exists {
				m.Kind, m.Prev = "MODIFIED", old.RV
			}
			state[m.Key] = m
			if line.Deleted {
				m.Kind, m.Value = "DELETED", old.Value
				delete(state, m.Key)
			}
			h.Messages = append(h.Messages, m)
		}
	}
	return h
}

// checkAcks: every write that was acknowledged is in the history, at its version.
func (s *watchScenario) checkAcks(h *watchcheck.History) {
	for _, ack := range s.acks {
		i, ok := slices.BinarySearchFunc(h.Messages, ack.RV, func(m watchcheck.Message, rv uint64) int { return int(m.RV) - int(rv) })
		if !ok || h.Messages[i].Key != ack.Key || ack.Kind == "PUT" && h.Messages[i].Value != ack.Value || ack.Kind == "DELETED" && h.Messages[i].Kind != ack.Kind {
			s.t.Errorf("acknowledged: %v; in the history: %v", ack, h.Messages[min(i, len(h.Messages)-1)])
		}
	}
	s.t.Logf("%d acknowledged writes", len(s.acks))
}

// checkItems compares what is left with the history.
func checkItems(t *testing.T, h *watchcheck.History, items map[string]watchcheck.Message) {
	t.Helper()
	want := map[string]watchcheck.Message{}
	for _, m := range h.Messages {
		if m.Kind == "DELETED" {
			delete(want, m.Key)
		} else {
			want[m.Key] = watchcheck.Message{Key: m.Key, Value: m.Value, RV: m.RV}
		}
	}
	if !maps.Equal(want, items) {
		t.Errorf("%d items are listed, %d are left in the history, or they differ", len(items), len(want))
	}
}
