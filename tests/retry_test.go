package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// These tests send the same write again and again, to whatever node is up, while leaders die. An
// Idempotency-Key must make it happen once.

// stubborn sends a request until an answer says what became of it.
type stubborn struct {
	c    *liveCluster
	http *http.Client

	sent     int // requests
	replayed int // answers to an earlier one
}

func (c *liveCluster) stubborn() *stubborn {
	return &stubborn{c: c, http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1, DisableCompression: true}}}
}

// once sends a request to one node. It returns an error if nobody knows what became of it, or if it should be sent
// again.
func (s *stubborn) once(timeout time.Duration, method, path, body string, headers map[string]string) (*liveReply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	n := s.c.Nodes[rand.IntN(len(s.c.Nodes))]
	req, err := http.NewRequestWithContext(ctx, method, n.URL()+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	for name, value := range headers {
		req.Header.Set(name, value)
	}
	s.sent++
	res, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	if res.StatusCode >= 500 {
		return nil, fmt.Errorf("%d %s", res.StatusCode, b)
	}
	if res.Header.Get("Idempotency-Replayed") != "" {
		s.replayed++
	}
	return &liveReply{status: res.StatusCode, header: res.Header, body: b}, nil
}

// do sends a request until it is answered.
func (s *stubborn) do(method, path, body string, headers map[string]string) *liveReply {
	for deadline := time.Now().Add(liveTimeout); ; time.Sleep(time.Millisecond) {
		r, err := s.once(2*time.Second, method, path, body, headers)
		if err == nil {
			return r
		}
		if time.Now().After(deadline) {
			s.c.t.Errorf("%s %s: %v", method, path, err)
			return nil
		}
	}
}

// killLeaders kills the leader and starts it again until stop is closed, and returns how often.
func (c *liveCluster) killLeaders(stop <-chan struct{}, pause time.Duration) (kills int) {
	for {
		select {
		case <-stop:
			return kills
		case <-time.After(pause):
		}
		leader := c.leader()
		c.kill(leader)
		kills++
		time.Sleep(200 * time.Millisecond)
		if err := leader.Start(); err != nil {
			c.t.Error(err)
			return kills
		}
		if err := leader.WaitReady(c.context()); err != nil {
			c.t.Error(err)
			return kills
		}
	}
}

// TestProcess_Counters: clients increment counters with If-Match, each write under a key of its own, while
// leaders die. No increment is lost and none counts twice.
func TestProcess_Counters(t *testing.T) {
	counters, clients, increments := testkit.Sized(100, 1000), 32, testkit.Sized(4000, 60_000)
	c := newLiveCluster(t, proc.Options{})
	var left, acked, conflicts, ids atomic.Int64
	left.Store(int64(increments))
	stop := make(chan struct{})
	var killer, group sync.WaitGroup
	kills := 0
	killer.Go(func() { kills = c.killLeaders(stop, testkit.Sized(500*time.Millisecond, 2*time.Second)) })
	var sent, replayed atomic.Int64
	start := time.Now()
	for range clients {
		group.Go(func() {
			s := c.stubborn()
			defer s.http.CloseIdleConnections()
			for left.Add(-1) >= 0 {
				s.increment(fmt.Sprintf("/counter/%d", rand.IntN(counters)), &ids, &conflicts)
				acked.Add(1)
			}
			sent.Add(int64(s.sent))
			replayed.Add(int64(s.replayed))
		})
	}
	group.Wait()
	close(stop)
	killer.Wait()
	took := time.Since(start)

	sum := 0
	s := c.stubborn()
	for i := range counters {
		r := s.do(http.MethodGet, fmt.Sprintf("/counter/%d", i), "", nil)
		if r != nil && r.status == http.StatusOK {
			n, err := strconv.Atoi(string(r.body))
			if err != nil {
				t.Error(err)
			}
			sum += n
		}
	}
	if sum != int(acked.Load()) || sum != increments {
		t.Errorf("the counters have %d, acknowledged were %d of %d increments", sum, acked.Load(), increments)
	}
	if kills == 0 {
		t.Error("no leader was killed")
	}
	t.Logf("%d increments of %d counters by %d clients in %v: %d requests, %d conflicts, %d answers replayed, %d leaders killed",
		sum, counters, clients, took.Round(time.Millisecond), sent.Load(), conflicts.Load(), replayed.Load(), kills)
}

// increment adds one to a counter.
func (s *stubborn) increment(path string, ids, conflicts *atomic.Int64) {
	for {
		r := s.do(http.MethodGet, path, "", nil)
		if r == nil {
			return
		}
		n, headers := 0, map[string]string{"If-None-Match": "*"}
		if r.status == http.StatusOK {
			var err error
			if n, err = strconv.Atoi(string(r.body)); err != nil {
				s.c.t.Error(err)
				return
			}
			headers = map[string]string{"If-Match": r.header.Get("ETag")}
		}
		headers["Idempotency-Key"] = fmt.Sprint("increment-", ids.Add(1))
		switch r = s.do(http.MethodPut, path, strconv.Itoa(n+1), headers); {
		case r == nil:
			return
		case r.status == http.StatusCreated || r.status == http.StatusNoContent:
			return
		case r.status == http.StatusPreconditionFailed:
			conflicts.Add(1)
		default:
			s.c.t.Errorf("PUT %s: %d %s", path, r.status, r.body)
			return
		}
	}
}

// TestProcess_ForcedRetries: every write is sent at least twice, often before the first was answered, to any
// node, while leaders die. Each happens once, and all answers agree.
func TestProcess_ForcedRetries(t *testing.T) {
	writes, clients := testkit.Sized(1000, 10_000), 32
	c := newLiveCluster(t, proc.Options{})
	var next atomic.Int64
	stop := make(chan struct{})
	var killer, group sync.WaitGroup
	kills := 0
	killer.Go(func() { kills = c.killLeaders(stop, testkit.Sized(300*time.Millisecond, 2*time.Second)) })
	var sent, replayed atomic.Int64
	start := time.Now()
	for range clients {
		group.Go(func() {
			s := c.stubborn()
			defer s.http.CloseIdleConnections()
			for i := next.Add(1); i <= int64(writes); i = next.Add(1) {
				s.createTwice(i)
			}
			sent.Add(int64(s.sent))
			replayed.Add(int64(s.replayed))
		})
	}
	group.Wait()
	close(stop)
	killer.Wait()
	took := time.Since(start)

	values := map[string]int{}
	s := c.stubborn()
	for after := ""; ; {
		r := s.do(http.MethodGet, "/-/v1/keys?limit=10000&after="+after, "", nil)
		if r == nil {
			t.FailNow()
		}
		list := testkit.MustDecode[testkit.JSONList](t, testkit.Answer{Code: r.status, Body: string(r.body)})
		for _, it := range list.Items {
			values[it.RawValue()]++
			if it.ResourceVersion != it.CreatedResourceVersion {
				t.Errorf("%s was written again", it.RawKey())
			}
		}
		if list.After == nil {
			break
		}
		after = *list.After
	}
	if len(values) != writes {
		t.Errorf("%d values, want %d", len(values), writes)
	}
	for v, n := range values {
		if n != 1 {
			t.Errorf("%s was stored %d times", v, n)
		}
	}
	if rv := s.do(http.MethodGet, "/", "", nil); rv == nil || strings.TrimSpace(string(rv.body)) != strconv.Itoa(writes) {
		t.Errorf("the store is at %s, want %d", rv.body, writes)
	}
	t.Logf("%d writes by %d clients in %v: %d requests, %d answers replayed, %d leaders killed",
		writes, clients, took.Round(time.Millisecond), sent.Load(), replayed.Load(), kills)
}

// createTwice stores a value under a new key, with one request that it does not wait for to the end and two that
// it does.
func (s *stubborn) createTwice(i int64) {
	value, headers := fmt.Sprint("value-", i), map[string]string{"Idempotency-Key": fmt.Sprint("create-", i)}
	_, _ = s.once(time.Duration(rand.IntN(3000))*time.Microsecond, http.MethodPost, "/", value, headers) // is sent again below
	first := s.do(http.MethodPost, "/", value, headers)
	second := s.do(http.MethodPost, "/", value, headers)
	if first == nil || second == nil {
		return
	}
	if first.status != http.StatusCreated || second.status != http.StatusCreated ||
		first.header.Get("Location") != second.header.Get("Location") || first.etag() != second.etag() || first.etag() == 0 ||
		second.header.Get("Idempotency-Replayed") != "true" {
		s.c.t.Errorf("write %d: first %d %v\nthen %d %v", i, first.status, first.header, second.status, second.header)
	}
}

// TestProcess_RetriesOfOthers: who sends much with an Idempotency-Key, or reads much, makes the nodes forget
// nobody else's requests, and is not told what others have read.
func TestProcess_RetriesOfOthers(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	c.eventually(func() error {
		for _, n := range c.Nodes {
			if text := liveText(t, n, "/-/v1/status", http.StatusOK); !strings.Contains(text, fmt.Sprintf(`"featureLevel":%d,`, store.LevelNewest)) {
				return fmt.Errorf("node %d is at another level: %s", n.ID, text)
			}
		}
		return nil
	})
	from := func(addr string) *stubborn {
		s := c.stubborn()
		s.http.Transport.(*http.Transport).DialContext = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}).DialContext
		t.Cleanup(s.http.CloseIdleConnections)
		return s
	}
	victim, greedy := from("127.0.0.1"), from("127.0.0.2")
	pay := func() *liveReply {
		return victim.do(http.MethodPut, "/paid", "once", map[string]string{"Idempotency-Key": "pay"})
	}
	first := pay()
	for i := range 3 {
		greedy.do(http.MethodPut, fmt.Sprint("/large/", i), strings.Repeat("secret", 170_000), nil)
	}
	const read = `{"then":[{"op":"get","key":"large/0"},{"op":"get","key":"large/1"},{"op":"get","key":"large/2"}]}`
	for i := range 25 { // 75 MiB
		if r := greedy.do(http.MethodPost, "/-/v1/txn", read, map[string]string{"Idempotency-Key": fmt.Sprint("read-", i)}); r.status != http.StatusOK || len(r.body) < 3_000_000 {
			t.Fatalf("%d, %d bytes", r.status, len(r.body))
		}
	}
	if again := pay(); again.status != first.status || again.etag() != first.etag() || again.header.Get("Idempotency-Replayed") != "true" {
		t.Errorf("first %d %v\nthen %d %v", first.status, first.header, again.status, again.header)
	}
	r := victim.do(http.MethodPost, "/-/v1/txn", read, map[string]string{"Idempotency-Key": "read-0"})
	var p httpapi.Problem
	testkit.Must(t, json.Unmarshal(r.body, &p))
	if r.status != http.StatusConflict || p.Code != "result-not-kept" || p.Outcome != fault.Applied {
		t.Errorf("%d %.300s", r.status, r.body)
	}
}
