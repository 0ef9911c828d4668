package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zapcore"
)

func testContextThatEnds(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithCancel(t.Context())
}

func TestNode_ReadinessListsItsChecks(t *testing.T) {
	var broken error
	f := newFront(t, func(c *Config) {
		c.Checks = append(c.Checks, Check{"disk", func(context.Context) error { return broken }})
	})
	a := f.do("GET", "/-/readyz?verbose", "")
	a.Want(t, 200)
	if a.Body != "[+]leader ok\n[+]caught-up ok\n[+]state ok\n[+]disk ok\nready\n" {
		t.Errorf("%q", a.Body)
	}
	f.do("GET", "/-/readyz?verbose=false", "").Want(t, 200)
	f.do("GET", "/-/readyz?verbose=2", "").Want(t, 400)

	broken = errors.New("9 bytes are left")
	a = f.do("GET", "/-/readyz?verbose=true", "")
	a.Want(t, 503)
	a.WantHeader(t, "Content-Type", "text/plain; charset=utf-8")
	if a.Body != "[+]leader ok\n[+]caught-up ok\n[+]state ok\n[-]disk failed: 9 bytes are left\nnot ready\n" {
		t.Errorf("%q", a.Body)
	}
	a = f.do("GET", "/-/readyz", "")
	a.Want(t, 503)
	a.WantHeader(t, "Content-Type", "application/problem+json")
	if !strings.Contains(a.Body, `"detail":"disk: 9 bytes are left"`) || !strings.Contains(a.Body, `"code":"not-ready"`) {
		t.Errorf("%s", a.Body)
	}
}

// One check that hangs holds up neither the others nor, beyond its time, the answer.
func TestNode_ReadinessChecksRunTogether(t *testing.T) {
	wait := func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	lines, failed := readiness(ctx, []Check{{"a", wait}, {"b", func(context.Context) error { return nil }}, {"c", wait}})
	if time.Since(start) > 5*time.Second || len(failed) != 2 || !strings.Contains(lines, "[+]b ok\n[-]c failed") {
		t.Errorf("%v: %s", time.Since(start), lines)
	}
}

func TestNode_LogLevel(t *testing.T) {
	f := newFront(t)
	a := f.do("GET", "/-/v1/log-level", "")
	a.Want(t, 200)
	if a.Body != `{"level":"info"}`+"\n" {
		t.Errorf("%s", a.Body)
	}
	for _, level := range []string{"debug", "error", "warn", "info"} {
		f.do("PUT", "/-/v1/log-level", fmt.Sprintf(`{"level":%q}`, level)).Want(t, 204)
		if got := f.config.Level.String(); got != level {
			t.Errorf("the level is %s, want %s", got, level)
		}
	}
	for _, body := range []string{"", "debug", `"debug"`, `{}`, `{"level":""}`, `{"level":"DEBUG"}`, `{"level":"fatal"}`, `{"level":"debug","x":1}`, `{"level":"debug"} x`} {
		if a := f.do("PUT", "/-/v1/log-level", body); a.Code != 400 || f.config.Level.Level() != zapcore.InfoLevel {
			t.Errorf("%s: %d, level %v", body, a.Code, f.config.Level)
		}
	}
}

func TestNode_AccessLog(t *testing.T) {
	f := newFront(t)
	f.do("PUT", "/k", "v").Want(t, 201)
	if n := f.logs.FilterMessage("request").Len(); n != 0 {
		t.Errorf("%d lines without --access-log", n)
	}
	f = newFront(t, func(c *Config) { c.AccessLog = true })
	f.do("PUT", "/a%0Ab?timeout=1s", "v").Want(t, 201)
	f.do("GET", "/a%0Ab", "").Want(t, 200)
	f.do("GET", "/-/none", "").Want(t, 404)
	var got []string
	for deadline := time.Now().Add(5 * time.Second); len(got) < 3 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		got = nil
		for _, line := range f.logs.FilterMessage("request").All() { // the last may come after its answer
			m := line.ContextMap()
			got = append(got, fmt.Sprint(m["method"], " ", m["target"], " ", m["route"], " ", m["status"], " ", m["bytes"]))
			if d, ok := m["duration"].(time.Duration); !ok || d < 0 || d > 5*time.Second {
				t.Errorf("%v took %v", m["target"], m["duration"])
			}
		}
	}
	want := []string{"PUT /a%0Ab?timeout=1s /{key} 201 0", "GET /a%0Ab /{key} 200 1"}
	if len(got) != 3 || !slices.Equal(got[:2], want) || !strings.HasPrefix(got[2], "GET /-/none other 404 ") {
		t.Errorf("%q", got)
	}
}

func TestNode_StatusOfAll(t *testing.T) {
	own := NodeStatus{ID: 1, ClusterID: "c", Role: "leader", Members: []Member{{ID: 1, ClientURL: "http://own"}}}
	release := make(chan struct{})
	serve := func(id uint64, handler http.HandlerFunc) {
		server := httptest.NewServer(handler)
		t.Cleanup(server.Close)
		own.Members = append(own.Members, Member{ID: id, ClientURL: server.URL})
	}
	answer := func(st NodeStatus) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.String() != "/-/v1/status" {
				t.Errorf("asked for %s", r.URL)
			}
			_ = json.NewEncoder(w).Encode(st)
		}
	}
	serve(2, answer(NodeStatus{ID: 2, ClusterID: "c", Term: 7}))
	serve(3, answer(NodeStatus{ID: 4, ClusterID: "c"}))
	serve(4, answer(NodeStatus{ID: 4, ClusterID: "other"}))
	serve(5, func(http.ResponseWriter, *http.Request) { <-release })
	serve(6, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, own.Members[1].ClientURL, http.StatusFound)
	})
	serve(7, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{")) })
	t.Cleanup(func() { close(release) }) // before the servers close
	own.Members = append(own.Members, Member{ID: 8}, Member{ID: 9, ClientURL: "http://127.0.0.1:1"})
	start := time.Now()
	all := gatherStatus(t.Context(), testClient, own)
	if took := time.Since(start); took < StatusTimeout || took > StatusTimeout+5*time.Second {
		t.Errorf("it took %v; they are to be asked at the same time, and only for so long", took)
	}
	if !slices.Equal(all.Silent, []uint64{3, 4, 5, 6, 7, 8, 9}) || len(all.Members) != 9 {
		t.Errorf("%+v", all)
	}
	for i, want := range []string{"", "", "node 4 of cluster c", "cluster other", "deadline", "302", "tells no status", "not told", "refused"} {
		m := all.Members[i]
		if m.ID != uint64(i+1) || (want == "") != (m.Status != nil) || !strings.Contains(m.Error, want) || (want == "") != (m.Error == "") {
			t.Errorf("%+v, want %q", m, want)
		}
	}
	if all.Members[0].Status.Role != "leader" || all.Members[1].Status.Term != 7 {
		t.Errorf("%+v", all)
	}
}
