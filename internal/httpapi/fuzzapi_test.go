package httpapi

import (
	"bytes"
	"maps"
	"mime"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
	"raftrv/internal/watch"
)

// fuzzFront is a front without a server.
func fuzzFront(f *testing.F) (*httpAPI, *fakeBackend) {
	kv := store.New()
	kv.State.Members[1] = store.Member{ID: 1, PeerURL: "http://127.0.0.1:1", ClientURL: "http://node1:2"}
	kv.State.SetLevel(store.LevelNewest)
	hub := watch.NewHub(kv)
	backend := &fakeBackend{store: kv, hub: hub}
	return New(Config{
		ID: 1, Store: backend, Logger: zap.NewNop(), Timeout: time.Second, Bookmark: time.Second, ValueSizeMax: testValueSizeMax,
		Version: "v0", NewID: NewUUID, Hosts: []string{"own.example"}, Registry: prometheus.NewRegistry(), Level: zap.NewAtomicLevel(),
	}).(*httpAPI), backend
}

// FuzzHTTPBody: whatever the body of a call is, it is carried out or refused as wrong.
func FuzzHTTPBody(f *testing.F) {
	calls := [][2]string{
		{"POST", "/-/v1/txn"}, {"POST", "/-/v1/members/7"}, {"PUT", "/-/v1/members/7"}, {"POST", "/7"}, {"PUT", "/-/v1/log-level"}, {"PATCH", "/"}, {"POST", "/"}, {"PUT", "/k"},
	}
	for i := range calls {
		for _, s := range []string{"", "{}", `{"peerUrl":"http://a:1"}`, `{"then":[{"op":"put","key":"k","value":"v","contentType":"a/b"}]}`, "http://a:1", `{"level":"debug"}`, "debug"} {
			f.Add(uint8(i), []byte(s))
		}
	}
	h, _ := fuzzFront(f)
	f.Fuzz(func(t *testing.T, i uint8, body []byte) {
		call := calls[int(i)%len(calls)]
		r := httptest.NewRequest(call[0], "http://127.0.0.1"+call[1], bytes.NewReader(body))
		r.RequestURI = call[1]
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code >= 500 || w.Code < 200 {
			t.Errorf("%s %s %q: %d %s", call[0], call[1], body, w.Code, w.Body)
		}
	})
}

// FuzzHost: a node answers to addresses and to its own names, and a page writes to its own origin only.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"", "localhost", "127.0.0.1:1", "[::1]:1", "[::1", "evil.example", "NODE1:2", "own.example.", "0x7f.1", "[fe80::1%25x]", ":", "a:b:c"} {
		f.Add(s, "https://evil.example", "cross-site")
		f.Add(s, "http://"+s, "same-origin")
	}
	h, backend := fuzzFront(f)
	f.Fuzz(func(t *testing.T, host, origin, site string) {
		r := httptest.NewRequest("PUT", "/k", strings.NewReader("v"))
		r.Host, r.RequestURI = host, "/k"
		for name, value := range map[string]string{"Origin": origin, "Sec-Fetch-Site": site} {
			if value != "" {
				r.Header.Set(name, value)
			}
		}
		before := backend.store.Version()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		wrote := backend.store.Version() != before
		name := strings.ToLower(host)
		if i := strings.LastIndexByte(name, ':'); i >= 0 && !strings.HasSuffix(name, "]") {
			name = name[:i]
		}
		_, err := netip.ParseAddr(strings.Trim(name, "[]"))
		if own := err == nil || slices.Contains([]string{"", "localhost", "node1", "own.example"}, name); wrote && !own {
			t.Errorf("a page of %q has written", host)
		}
		if wrote && site != "" && site != "same-origin" && site != "none" {
			t.Errorf("a page that is %s has written", site)
		}
		if len(w.Header()["Access-Control-Allow-Origin"]) > 0 {
			t.Errorf("%q may read", origin)
		}
	})
}

// FuzzContentType: what a value is served as is on the list, whatever its writer has made of it.
func FuzzContentType(f *testing.F) {
	for _, s := range slices.Concat(slices.Collect(maps.Keys(servedTypes)), []string{"text/html", "text/plain;text/html", "text/plain; charset=utf-7", "TEXT/PLAIN ; a=\"b;c\"", "text/plain, text/html", "text/plain\ttext/html", "a/b/c", ";", "/"}) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		kept, err := parseContentType(http.Header{"Content-Type": {s}})
		if err != nil || kept == "" {
			return
		}
		c := store.Command{Op: store.OpPut, Key: "k", ContentType: kept}
		if err := store.CheckCommands(c.AppendTo(nil), store.LevelNewest); err != nil {
			t.Errorf("%q is taken, and cannot be proposed: %v", kept, err)
		}
		kind, _, err := mime.ParseMediaType(servedType(kept)[0])
		if err != nil || servedTypes[kind] == nil && kind != typeBytes[0] {
			t.Errorf("%q is served as %q, %v", s, kind, err)
		}
		var header strings.Builder
		testkit.Must(t, (http.Header{"Content-Type": servedType(kept)}).Write(&header))
		if strings.Count(header.String(), "\n") != 1 {
			t.Errorf("%q is %q", s, header.String())
		}
	})
}
