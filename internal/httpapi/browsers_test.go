package httpapi

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"raftrv/internal/fault"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// sendAs sends a request with a Host of its own.
func (f *front) sendAs(host, method, target, body string, headers ...string) testkit.Answer {
	f.t.Helper()
	c := f.mustDial()
	defer func() { _ = c.Close() }() // has been read
	lines := append([]string{method + " " + target + " HTTP/1.1", "Host: " + host, fmt.Sprintf("Content-Length: %d", len(body))}, headers...)
	if _, err := io.WriteString(c, strings.Join(lines, "\r\n")+"\r\n\r\n"+body); err != nil {
		f.t.Fatal(err)
	}
	return testkit.ReadAnswer(f.t, bufio.NewReader(c), method)
}

// A page that has made its own name lead here, by DNS rebinding, has that name in
// Host. So only names that are the node's own are served.
func TestBrowsers_Host(t *testing.T) {
	f := newFront(t, func(c *Config) { c.Hosts = []string{"own.example"} })
	f.store.State.Members[2] = store.Member{ID: 2, PeerURL: "http://b:1", ClientURL: "http://Second.example:2"}
	f.put("secret", "s")
	tests := []struct {
		host string
		ok   bool
	}{
		{"127.0.0.1", true}, {"127.0.0.1:12380", true}, {"10.1.2.3:80", true}, {"[::1]", true}, {"[::1]:12380", true}, {"[2001:db8::1]:1", true},
		{"localhost", true}, {"LOCALHOST:12380", true}, {"own.example", true}, {"OWN.example:1", true}, {"second.example:2", true}, {"", true},
		{"evil.example", false}, {"evil.example:12380", false}, {"127.0.0.1.nip.io", false}, {"127.0.0.1.nip.io:12380", false}, {"localhost.evil.example", false},
		{"notlocalhost", false}, {"own.example.", false}, {"sub.own.example", false}, {"2130706433", false}, {"0x7f.1", false}, {"127.1", false}, {"1e100.net", false},
		{"::1", false}, {"[::1", false}, {"[127.0.0.1]", false}, {"[evil.example]:1", false}, {"own.example:1:2", false}, {strings.Repeat("a", 300), false},
		{"b", false}, {"third.example:3", false},
	}
	for _, tt := range tests {
		for _, method := range []string{"GET", "PUT", "POST", "DELETE", "OPTIONS"} {
			for _, target := range []string{"/secret", "/-/v1/backup", "/-/metrics", "/-/livez"} {
				a := f.sendAs(tt.host, method, target, "")
				switch {
				case tt.ok && a.Code == http.StatusMisdirectedRequest:
					t.Errorf("%q, %s %s: %s", tt.host, method, target, a.Body)
				case !tt.ok && a.Code != http.StatusMisdirectedRequest && a.Code != http.StatusBadRequest:
					t.Errorf("%q, %s %s: %d %q", tt.host, method, target, a.Code, a.Body)
				case a.Code == http.StatusMisdirectedRequest:
					if p := mustProblem(t, a); p.Code != "unknown-host" || !strings.Contains(p.Detail, "--allowed-host") {
						t.Errorf("%+v", p)
					}
				}
				f.put("secret", "s")
			}
		}
	}
	// The members are looked at again.
	f.store.Mu.Lock()
	f.store.State.Members[3] = store.Member{ID: 3, PeerURL: "http://c:1", ClientURL: "http://third.example:3"}
	f.store.Mu.Unlock()
	f.sendAs("third.example", "GET", "/secret", "").Want(t, 200)
	// The absolute form of a target counts, as it does for net/http.
	f.sendAs("127.0.0.1", "GET", "http://evil.example/secret", "").Want(t, 421)
	// A client without a Host is no browser.
	if got := f.exchange("GET /secret HTTP/1.0\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.0 200") {
		t.Errorf("%q", got)
	}
}

// What a browser sends for a page of another origin: nothing is written.
func TestBrowsers_CrossOriginWrites(t *testing.T) {
	f := newFront(t)
	evil := "Origin: https://evil.example"
	pages := [][]string{
		{evil, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Content-Type: text/plain"},
		{evil, "Sec-Fetch-Site: same-site"},
		{evil}, // a browser sends no Sec-Fetch-Site to a plain address in the LAN
		{"Origin: null"},
		{"Origin: null", "Sec-Fetch-Site: cross-site"},
		{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"}, // a form
		{"Origin: http://127.0.0.1:8080", "Sec-Fetch-Site: same-site"},
		{"Origin: http://127.0.0.1:8080"},
	}
	writes := [][3]string{
		{"POST", "/", "v"}, {"POST", "/66", "http://10.0.0.66:1"}, {"PUT", "/k", "v"}, {"DELETE", "/k", ""}, {"PATCH", "/", "1"},
		{"POST", "/-/v1/members/66", `{"peerUrl":"http://10.0.0.66:1"}`}, {"DELETE", "/-/v1/members/1", ""}, {"POST", "/-/v1/leader/1", ""},
		{"POST", "/-/v1/txn", `{"then":[{"op":"put","key":"k","value":"v"}]}`}, {"DELETE", "/-/v1/keys?prefix=k", ""}, {"PUT", "/-/v1/log-level", `{"level":"debug"}`},
	}
	for _, page := range pages {
		for _, w := range writes {
			a := f.sendAs("127.0.0.1:12380", w[0], w[1], w[2], page...)
			a.Want(t, 403)
			if p := mustProblem(t, a); p.Code != "cross-origin" || p.Outcome != fault.NotApplied || !strings.Contains(p.Detail, "--allowed-origin") {
				t.Errorf("%+v", p)
			}
		}
	}
	if rv, calls := f.store.Version(), f.backend.takeMemberCalls(); rv != 0 || len(calls) != 0 {
		t.Errorf("version %d, calls %v", rv, calls)
	}
	// The own page, a person at the address bar and a program may.
	for _, headers := range [][]string{
		{"Origin: http://127.0.0.1:12380", "Sec-Fetch-Site: same-origin"},
		{"Origin: http://127.0.0.1:12380"},
		{"Sec-Fetch-Site: none"},
		nil,
	} {
		f.sendAs("127.0.0.1:12380", "PUT", "/k", "v", headers...)
	}
	if rv := f.store.Version(); rv != 4 {
		t.Errorf("version %d", rv)
	}
}

// isCORS says whether an answer lets any page do anything.
func isCORS(a testkit.Answer) bool {
	for name := range a.Header {
		if strings.HasPrefix(name, "Access-Control-") {
			return true
		}
	}
	return false
}

func TestBrowsers_AllowedOrigin(t *testing.T) {
	const app = "https://app.example"
	f := newFront(t, func(c *Config) { c.Origins = []string{"http://other.example:81", app} })
	f.put("k", "v")
	crossSite := []string{"Origin: " + app, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors"}
	for _, r := range [][3]string{
		{"GET", "/k", ""}, {"GET", "/none", ""}, {"PUT", "/k", "w"}, {"POST", "/", "v"}, {"GET", "/-/v1/keys", ""}, {"GET", "/-/v1/watch?timeout=1ms", ""},
		{"POST", "/-/v1/txn", "{}"}, {"PUT", "/k?bad=1", ""}, {"DELETE", "/k", ""}, {"GET", "/-/metrics", ""},
	} {
		a := f.sendAs("127.0.0.1", r[0], r[1], r[2], crossSite...)
		a.WantHeader(t, "Access-Control-Allow-Origin", app)
		a.WantHeader(t, "Access-Control-Allow-Credentials", "")
		if a.Code == 403 || !strings.Contains(a.Header.Get("Access-Control-Expose-Headers"), "Resource-Version") || !strings.Contains(strings.Join(a.Header.Values("Vary"), ","), "Origin") {
			t.Errorf("%s %s: %d %v", r[0], r[1], a.Code, a.Header)
		}
	}
	for _, target := range []string{"/k", "/-/v1/txn", "/-/v1/watch"} {
		a := f.sendAs("127.0.0.1", "OPTIONS", target, "", "Origin: "+app, "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: if-match, idempotency-key")
		a.Want(t, 204)
		a.WantHeader(t, "Access-Control-Allow-Origin", app)
		a.WantHeader(t, "Access-Control-Allow-Headers", "if-match, idempotency-key")
		if !strings.Contains(a.Header.Get("Access-Control-Allow-Methods"), "PUT") {
			t.Errorf("%v", a.Header)
		}
	}
	// Nobody else, by no spelling, and no page of a foreign name for this node.
	before := f.store.Version()
	for _, origin := range []string{"https://evil.example", "http://app.example", "https://app.example:8443", "https://app.example.evil.example", "https://APP.example", "null", "*", ""} {
		for _, r := range [][3]string{{"GET", "/k", ""}, {"PUT", "/k", "w"}, {"OPTIONS", "/k", ""}} {
			a := f.sendAs("127.0.0.1", r[0], r[1], r[2], "Origin: "+origin, "Sec-Fetch-Site: cross-site", "Access-Control-Request-Method: PUT")
			if isCORS(a) || r[0] == "PUT" && a.Code != 403 {
				t.Errorf("%q %s: %d %v", origin, r[0], a.Code, a.Header)
			}
		}
	}
	a := f.sendAs("evil.example", "GET", "/k", "", crossSite...)
	if a.Want(t, 421); isCORS(a) {
		t.Errorf("%v", a.Header)
	}
	if rv := f.store.Version(); rv != before {
		t.Errorf("version %d", rv)
	}
	// Where no origin is allowed there is not a word of CORS.
	if a := newFront(t).sendAs("127.0.0.1", "GET", "/", "", crossSite...); isCORS(a) || a.Header.Get("Vary") != "" {
		t.Errorf("%v", a.Header)
	}
}

// rawAnswers are requests of which net/http answers some by itself.
var rawAnswers = []string{
	"GET / HTTP/1.1\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: <script>\r\nConnection: close\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
	"nonsense\r\n\r\n",
	"GET / HTTP/3.0\r\nHost: x\r\n\r\n",
	"PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
	"PUT /k HTTP/1.1\r\nHost: x\r\nExpect: the moon\r\n\r\n",
	"GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 2*HeaderSizeMax) + "\r\n\r\n",
	"GET / HTTP/1.0\r\n\r\n",
	"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
	"PUT /k HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\nConnection: close\r\n\r\nv",
	"GET /k HTTP/1.1\r\nHost: x\r\nIf-None-Match: *\r\nConnection: close\r\n\r\n",
	// Two at once, of which the second is net/http's.
	"GET /k HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n\r\n",
}

// Every answer there is says that it is no page, also those to what is no request.
func TestBrowsers_EveryAnswer(t *testing.T) {
	f := newFront(t)
	// A value that is an answer itself stays as it is, wherever it is cut.
	fake := "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<script>"
	f.put("k", strings.Repeat(fake, 5000))
	codes := map[string]bool{}
	for _, raw := range rawAnswers {
		got := f.exchange(raw)
		for got != "" {
			head, rest, ok := strings.Cut(got, "\r\n\r\n")
			if !ok || len(head) < len("HTTP/1.1 200") {
				t.Fatalf("%q: %.200q", raw, got)
			}
			code := head[len("HTTP/1.1 "):][:3]
			codes[code] = true
			if code == "100" {
				got = rest
				continue
			}
			for line := range strings.SplitSeq(strings.TrimSuffix(browserHeader, "\r\n"), "\r\n") {
				if strings.Count(head, "\r\n"+line) != 1 {
					t.Errorf("%.100q: %s is not once in\n%s", raw, line, head)
				}
			}
			if got = ""; strings.Contains(head, "Resource-Version: ") && strings.HasPrefix(rest, fake) {
				value := strings.Repeat(fake, 5000)
				if got, ok = strings.CutPrefix(rest, value); !ok {
					t.Errorf("the value has changed: %.300q", rest)
				}
			}
		}
	}
	for _, code := range []string{"100", "200", "204", "304", "400", "417", "421", "431", "501", "505"} {
		if !codes[code] {
			t.Errorf("no answer was a %s, only %v", code, codes)
		}
	}
	for _, r := range openAPIRequests() {
		if r.fail != nil || r.code == http.StatusGone { // which takes a node that has forgotten, or it is a watch without end
			continue
		}
		for _, method := range []string{r.method, "HEAD", "OPTIONS"} {
			a := f.do(method, r.target, r.body, r.headers...)
			for name, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin", "Content-Security-Policy": contentSecurityPolicy} {
				a.WantHeader(t, name, want)
			}
			if slices.Contains([]string{"text/html", "image/svg+xml"}, a.Header.Get("Content-Type")) && !strings.HasPrefix(r.target, "/-/debug/") {
				t.Errorf("%s %s is a page", method, r.target)
			}
		}
	}
	if got := string(Refusal()); !strings.Contains(got, "\r\n"+browserHeader) {
		t.Errorf("%s", got)
	}
}

// Whether a request may be made costs nothing where it is by an address.
func TestBrowsers_AdmitAllocatesNothing(t *testing.T) {
	b := newBrowsers(store.New().Members, []string{"node.example"}, nil)
	for _, host := range []string{"127.0.0.1:12380", "[::1]:12380", "10.0.0.1", "localhost:1", "node.example:1"} {
		b.isOwnHost(host) // the first look at a name gathers all
		r := &http.Request{Method: "PUT", Host: host, Header: http.Header{}}
		w := &nullWriter{header: http.Header{}}
		if n := testing.AllocsPerRun(100, func() {
			if _, err := b.admit(w, r); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", host, n)
		}
	}
}
