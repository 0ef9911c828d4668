package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
)

// TestConsistency: a verdict by a majority lasts, a doubt goes only when a majority has this node's state, and silence
// changes nothing.
func TestConsistency(t *testing.T) {
	free := uint64(1 << 40)
	g := newTestAdmission(t, &free)
	testkit.Must(t, g.begin())
	storetest.Apply(t, g.store, somePut)
	own := health{Sums: g.store.Sums()}
	other := health{Sums: store.Sums{Now: store.Checkpoint{Index: own.Sums.Now.Index, Sum: own.Sums.Now.Sum + 1}}}
	elsewhere := health{Sums: store.Sums{Now: store.Checkpoint{Index: own.Sums.Now.Index + 1, Sum: 7}}}
	for i, step := range []struct {
		others map[uint64]health
		want   store.Verdict
	}{
		{nil, store.Unchecked},
		{map[uint64]health{2: elsewhere, 3: elsewhere}, store.Unchecked},
		{map[uint64]health{2: other}, store.Doubtful},
		{nil, store.Doubtful},
		{map[uint64]health{2: elsewhere, 3: elsewhere}, store.Doubtful},
		{map[uint64]health{2: other, 3: own}, store.Sound},
		{nil, store.Sound},
		{map[uint64]health{2: elsewhere}, store.Sound},
		{map[uint64]health{2: other, 3: other}, store.Diverged},
		{nil, store.Diverged},
		{map[uint64]health{2: own, 3: own}, store.Diverged},
	} {
		if _, v := g.hear(step.others, 2); v != step.want {
			t.Errorf("step %d: %v, want %v", i, v, step.want)
		}
		if err, want := g.serving(), errorOf(step.want); want == nil && err != nil || want != nil && !errors.Is(err, want) {
			t.Errorf("step %d, %v: %v", i, step.want, err)
		}
	}
}

// TestConsistency_Lasts: that a node's state is wrong is remembered over restarts, and nothing else is.
func TestConsistency_Lasts(t *testing.T) {
	dir := t.TempDir()
	start := func(want store.Verdict) *admission {
		t.Helper()
		s := store.New()
		for _, id := range []uint64{1, 2, 3} {
			s.State.Members[id] = store.Member{ID: id}
		}
		storetest.Apply(t, s, somePut)
		g := newAdmission(&config{id: 1, dataDir: dir}, s, func() int { return 0 }, zap.NewNop())
		testkit.Must(t, g.begin())
		if v := g.current(); v != want {
			t.Errorf("started %v, want %v", v, want)
		}
		return g
	}
	g := start(store.Unchecked)
	own := health{Sums: g.store.Sums()}
	other := health{Sums: store.Sums{Now: store.Checkpoint{Index: own.Sums.Now.Index, Sum: own.Sums.Now.Sum + 1}}}
	g.hear(map[uint64]health{2: own}, 2)
	g = start(store.Unchecked)
	g.hear(map[uint64]health{2: other}, 2)
	g = start(store.Unchecked)
	// A disk that cannot take the note gets it later.
	path := filepath.Join(dir, divergedName)
	testkit.Must(t, os.Mkdir(path+".tmp", 0o700))
	g.hear(map[uint64]health{2: other, 3: other}, 2)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) || g.current() != store.Diverged {
		t.Fatalf("%v: %v", g.current(), err)
	}
	testkit.Must(t, os.Remove(path+".tmp"))
	g.hear(nil, 2)
	var note divergedNote
	text, err := os.ReadFile(path)
	testkit.Must(t, err)
	if err := json.Unmarshal(text, &note); err != nil || note.Member != 1 || note.Index != own.Sums.Now.Index {
		t.Errorf("%s: %v", text, err)
	}
	g = start(store.Diverged)
	g.hear(map[uint64]health{2: own, 3: own}, 2)
	start(store.Diverged)
	testkit.Must(t, os.Remove(path)) // by a person
	start(store.Unchecked)
}

// peerAnswers is a member of which only the answer to others runs.
type peerAnswers struct {
	health atomic.Pointer[health]
	delay  atomic.Int64
}

// exchangeRig is a node of which only the exchange with two other members runs, in
// virtual time. It is the network that leads to them.
type exchangeRig struct {
	*node
	peers map[uint64]*peerAnswers
}

func newExchangeRig(t *testing.T) *exchangeRig {
	t.Helper()
	n, _ := idleNode(t)
	n.config.id, n.informed, n.cluster = 1, new(atomic.Bool), 7
	n.admission.id = 1
	n.store.State.Members[1] = store.Member{ID: 1, PeerURL: "http://127.0.0.1:1"}
	r := &exchangeRig{node: n, peers: map[uint64]*peerAnswers{}}
	for _, id := range []uint64{2, 3} {
		p := new(peerAnswers)
		r.peers[id] = p
		n.store.State.Members[id] = store.Member{ID: id, PeerURL: fmt.Sprintf("http://%d", id)}
	}
	before := peerClient.Transport
	peerClient.Transport = r
	t.Cleanup(func() { peerClient.Transport = before })
	storetest.Apply(t, n.store, somePut)
	n.admission.gate = n.hub.Gate
	testkit.Must(t, n.admission.begin())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.exchange(ctx) }()
	t.Cleanup(func() {
		cancel()
		testkit.Must(t, <-ended)
	})
	return r
}

// RoundTrip asks the member whose host is its ID.
func (r *exchangeRig) RoundTrip(req *http.Request) (*http.Response, error) {
	id, err := strconv.ParseUint(req.URL.Host, 10, 64)
	p := r.peers[id]
	if err != nil || p == nil {
		return nil, errors.New("nobody there")
	}
	select {
	case <-time.After(time.Duration(p.delay.Load())):
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
	answer := httptest.NewRecorder()
	answer.Header().Set("Content-Type", "application/json")
	if h := p.health.Load(); h == nil {
		answer.WriteHeader(http.StatusServiceUnavailable)
	} else if err := json.NewEncoder(answer).Encode(peerInfo{Cluster: "7", Health: *h}); err != nil {
		return nil, err
	}
	return answer.Result(), nil
}

// say makes a member answer with the state of the node, or with another one.
func (r *exchangeRig) say(id uint64, same bool) {
	h := health{Member: id, Sums: r.store.Sums()}
	if !same {
		h.Sums.Now.Sum++
	}
	r.peers[id].health.Store(&h)
}

// wait waits for a verdict, and for the watches to be what it says.
func (r *exchangeRig) wait(t *testing.T, want store.Verdict) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		err := r.hub.Closed.Load()
		if v := r.admission.current(); v == want && err == errorOf(want) {
			return
		} else if time.Now().After(end) {
			t.Fatalf("%v, and watches get %v; want %v", v, err, want)
		}
	}
}

// TestExchange: what the others answer decides what the node serves, watches included.
func TestExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newExchangeRig(t)
		r.wait(t, store.Unchecked)
		served := make(chan error, 1)
		go func() { served <- r.serving(t.Context(), time.Minute) }()

		// Agreement counts only when the node knows who has a vote.
		r.say(2, true)
		r.loop.status.Store(&replicaStatus{leader: 2})
		time.Sleep(5 * exchangeEvery)
		r.wait(t, store.Unchecked)
		// One member that needs long does not hold up the first comparison.
		r.peers[3].delay.Store(int64(time.Minute))
		start := time.Now()
		r.informed.Store(true)
		r.wait(t, store.Sound)
		if took := time.Since(start); took > peerDialTimeout/2 {
			t.Errorf("it took %v, waiting for a member that does not answer", took)
		}
		testkit.Must(t, <-served)
		r.peers[3].delay.Store(0)

		w, err := r.hub.Watch("", true, r.store.Version())
		testkit.Must(t, err)
		defer w.Close()
		r.say(2, false)
		r.wait(t, store.Doubtful)
		if _, _, err := w.Read(func(*store.Event, bool) {}); !errors.Is(err, fault.ErrDiverged) {
			t.Errorf("watch of a node in doubt: %v", err)
		}
		if err := r.serving(t.Context(), time.Minute); !errors.Is(err, fault.ErrDiverged) {
			t.Errorf("serving in doubt: %v", err)
		}
		// Another member at its address is nobody's voice.
		h := health{Member: 2, Sums: r.store.Sums()}
		r.peers[3].health.Store(&h)
		time.Sleep(5 * exchangeEvery)
		r.wait(t, store.Doubtful)

		r.say(3, true)
		r.wait(t, store.Sound)
		again, err := r.hub.Watch("", true, r.store.Version())
		testkit.Must(t, err)
		defer again.Close()
		storetest.Apply(t, r.store, somePut)
		r.hub.Distribute()
		if n, _, err := again.Read(func(*store.Event, bool) {}); n != 1 || err != nil {
			t.Errorf("watch after the doubt: %d events, %v", n, err)
		}
	})
}

// TestExchange_Waits: who asks a node that was not compared yet waits until his deadline or until the node stops.
func TestExchange_Waits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newExchangeRig(t)
		r.loop.status.Store(&replicaStatus{leader: 2})
		for name, call := range map[string]func(time.Duration) error{
			"serving":     func(d time.Duration) error { return r.serving(t.Context(), d) },
			"linearize":   func(d time.Duration) error { return r.linearize(t.Context(), d) },
			"waitVersion": func(d time.Duration) error { return r.waitVersion(t.Context(), d, 1) },
			"propose": func(d time.Duration) error {
				_, err := r.Apply(t.Context(), d, somePut)
				return err
			},
		} {
			start := time.Now()
			err := call(50 * time.Millisecond)
			if took := time.Since(start); !errors.Is(err, fault.ErrUnchecked) || took < 50*time.Millisecond || took > 5*time.Second {
				t.Errorf("%s: %v after %v", name, err, took)
			}
		}
		r.loop.status.Store(&replicaStatus{})
		if err := r.linearize(t.Context(), time.Millisecond); !errors.Is(err, fault.ErrNoLeader) {
			t.Errorf("without a leader: %v", err)
		}
		if err := r.serving(t.Context(), time.Millisecond); err != nil {
			t.Errorf("what the node has, without a leader: %v", err)
		}
		r.loop.status.Store(&replicaStatus{leader: 2})
		released := make(chan error, 1)
		go func() { released <- r.serving(t.Context(), time.Hour) }()
		r.admission.release() // as exchange does when it ends
		if err := <-released; err == nil {
			t.Error("a node that stops serves without a comparison")
		}
	})
}

// TestAskOthers_OnlyTheExchangeJudges: others ask too, at the same time, and must not change the verdict.
func TestAskOthers_OnlyTheExchangeJudges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newExchangeRig(t)
		r.informed.Store(true) // and there is no leader, so the exchange asks nobody
		r.say(2, true)
		r.say(3, true)
		if got := r.askOthers(t.Context(), nil); len(got) != 2 || r.admission.current() != store.Unchecked {
			t.Errorf("%d have answered, and the node is %v, want 2, unchecked", len(got), r.admission.current())
		}
	})
}
