package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"raftrv/internal/fault"
	"raftrv/internal/httpapi"
	"raftrv/internal/testkit"
)

// TestVirtual_RetryIsToldTheTruth: who asks again with an Idempotency-Key gets the
// first answer, also from a node that takes no writes now, or has no leader. And
// who is refused is not told that the request was never applied: this node cannot
// know.
func TestVirtual_RetryIsToldTheTruth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		alone := c.followers()[0]
		const pay, other = "Idempotency-Key: pay-1", "Idempotency-Key: pay-2"
		first := c.leader().do(http.MethodPost, "/", "42", pay)
		if first.status != http.StatusCreated {
			t.Fatal(first)
		}
		alone.do(http.MethodGet, "/", "") // so that it has applied it

		want := func(when string, n *virtualNode, status int) {
			t.Helper()
			again := n.do(http.MethodPost, "/?timeout=300ms", "42", pay)
			if again.status != first.status || again.header.Get("Idempotency-Replayed") != "true" ||
				again.header.Get("Location") != first.header.Get("Location") || again.header.Get("Etag") != first.header.Get("Etag") {
				t.Errorf("%s: again %v", when, again)
			}
			if r := n.do(http.MethodPost, "/?timeout=300ms", "43", pay); r.status != http.StatusUnprocessableEntity {
				t.Errorf("%s: another request with the key: %v", when, r)
			}
			r := n.do(http.MethodPost, "/?timeout=300ms", "42", other)
			if r.status != status || !strings.Contains(r.body, `"outcome":"unknown"`) || !strings.Contains(r.body, "this attempt was not applied") {
				t.Errorf("%s: a request that is not known: %v", when, r)
			}
			if r := n.do(http.MethodPost, "/?timeout=300ms", "42"); r.status != status || !strings.Contains(r.body, `"outcome":"not_applied"`) {
				t.Errorf("%s: a request without a key: %v", when, r)
			}
		}
		alone.admission.quota = 1
		want("over quota", alone, http.StatusInsufficientStorage)
		alone.admission.quota = 0
		alone.admission.space.Store(&space{full: true})
		want("full disk", alone, http.StatusInsufficientStorage)
		alone.admission.space.Store(&space{})
		c.isolate(alone)
		for alone.loop.status.Load().leader != 0 {
			synctest.Wait()
			alone.do(http.MethodPost, "/?timeout=100ms", "42")
		}
		want("no leader", alone, http.StatusServiceUnavailable)
	})
}

// TestServeWaiting_Outcome: a node that is not in its cluster yet does not know what became of an earlier attempt.
func TestServeWaiting_Outcome(t *testing.T) {
	p := &ports{}
	p.waiting([]string{"nobody"})
	for _, tt := range []struct {
		method, key string
		want        fault.Outcome
	}{{"PUT", "", fault.NotApplied}, {"PUT", "k", fault.Unknown}, {"GET", "", ""}, {"GET", "k", ""}} {
		w, r := httptest.NewRecorder(), httptest.NewRequest(tt.method, "/a", nil)
		if tt.key != "" {
			r.Header.Set("Idempotency-Key", tt.key)
		}
		p.serveWaiting(w, r)
		var got httpapi.Problem
		testkit.Must(t, json.Unmarshal(w.Body.Bytes(), &got))
		if got.Code != "no-leader" || got.Outcome != tt.want || (tt.want == fault.Unknown) != strings.Contains(got.Detail, "this attempt was not applied") {
			t.Errorf("%v: %+v", tt, got)
		}
	}
}
