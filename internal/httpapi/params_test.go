package httpapi

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

func TestHTTP_ConditionalWrites(t *testing.T) {
	const absent, present = 0, 5 // the version that the key has
	tests := []struct {
		header        string
		put, putNew   int // what PUT answers to an existing key, and to a new one
		del, delNew   int
		isInvalid     bool
		onlyIfCurrent string
	}{
		{header: `If-Match: "5"`, put: 204, putNew: 412, del: 204, delNew: 404},
		{header: `If-Match:   "5"  `, put: 204, putNew: 412, del: 204, delNew: 404},
		{header: `If-Match: "4"`, put: 412, putNew: 412, del: 412, delNew: 404},
		{header: `If-Match: *`, put: 204, putNew: 412, del: 204, delNew: 404},
		{header: `If-None-Match: *`, put: 412, putNew: 201, del: 412, delNew: 404},
		// ETags that are none of ours.
		{header: `If-Match: "0"`, put: 412, putNew: 412, del: 412, delNew: 404},
		{header: `If-Match: "05"`, put: 412, putNew: 412, del: 412, delNew: 404},
		{header: `If-Match: "+5"`, put: 412, putNew: 412, del: 412, delNew: 404},
		{header: `If-Match: ""`, put: 412, putNew: 412, del: 412, delNew: 404},
		{header: `If-Match: "5a"`, put: 412, putNew: 412, del: 412, delNew: 404},
		{header: `If-Match: "18446744073709551621"`, put: 412, putNew: 412, del: 412, delNew: 404}, // 2^64 + 5
		{header: `If-Match: "é"`, put: 412, putNew: 412, del: 412, delNew: 404},
		// What must not be guessed at.
		{header: `If-Match: 5`, isInvalid: true},
		{header: `If-Match:`, isInvalid: true},
		{header: `If-Match: "5`, isInvalid: true},
		{header: `If-Match: 5"`, isInvalid: true},
		{header: `If-Match: W/"5"`, isInvalid: true},
		{header: `If-Match: "5", "6"`, isInvalid: true},
		{header: `If-Match: "5",`, isInvalid: true},
		{header: "If-Match: \"5\"\r\nIf-Match: \"6\"", isInvalid: true},
		{header: `If-Match: *, "5"`, isInvalid: true},
		{header: `If-None-Match: "5"`, isInvalid: true},
		{header: `If-None-Match:`, isInvalid: true},
		{header: `If-None-Match: *, *`, isInvalid: true},
		{header: "If-None-Match: *\r\nIf-None-Match: *", isInvalid: true},
		{header: "If-Match: \"5\"\r\nIf-None-Match: *", isInvalid: true},
		{header: "If-Match: *\r\nIf-None-Match: *", isInvalid: true},
	}
	for _, tt := range tests {
		for _, call := range []struct {
			method  string
			current uint64
			code    int
		}{{"PUT", present, tt.put}, {"PUT", absent, tt.putNew}, {"DELETE", present, tt.del}, {"DELETE", absent, tt.delNew}} {
			f := newFront(t)
			for range present - 1 {
				f.put("other", "v")
			}
			if call.current == absent {
				f.put("other", "v")
			} else {
				f.put("k", "old")
			}
			a := f.do(call.method, "/k", "new", tt.header)
			if tt.isInvalid {
				call.code = 400
			}
			if a.Code != call.code {
				t.Errorf("%s at %d, %s: %d %s, want %d", call.method, call.current, tt.header, a.Code, a.Body, call.code)
				continue
			}
			if a.Code < 300 {
				continue
			}
			p := mustProblem(t, a)
			if p.Outcome != fault.NotApplied || p.Retryable || f.store.Version() != present {
				t.Errorf("%s at %d, %s: %+v", call.method, call.current, tt.header, p)
			}
			if a.Code != 412 {
				continue
			}
			etag := ""
			if call.current != absent {
				etag = fmt.Sprintf(`"%d"`, call.current)
			}
			a.WantHeader(t, "ETag", etag)
			a.WantHeader(t, "Resource-Version", "5")
			if p.Code != "precondition-failed" || p.Current != call.current {
				t.Errorf("%s at %d, %s: %+v", call.method, call.current, tt.header, p)
			}
		}
	}
}

// A client that increments with If-Match loses nothing.
func TestHTTP_CompareAndSwapLoop(t *testing.T) {
	f := newFront(t)
	f.put("n", "")
	const clients, increments = 8, 25
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for done := 0; done < increments; {
				a := f.do("GET", "/n", "")
				switch b := f.do("PUT", "/n", a.Body+"x", "If-Match: "+a.Header.Get("ETag")); b.Code {
				case 204:
					done++
				case 412:
				default:
					t.Errorf("%d %s", b.Code, b.Body)
					return
				}
			}
		})
	}
	wg.Wait()
	if a := f.do("GET", "/n", ""); len(a.Body) != clients*increments {
		t.Errorf("%d increments, want %d", len(a.Body), clients*increments)
	}
}

func TestHTTP_ConditionalReads(t *testing.T) {
	f := newFront(t)
	f.put("k", "v")
	f.put("other", "v")
	for _, tt := range []struct {
		header string
		code   int
	}{
		{`If-None-Match: "1"`, 304},
		{`If-None-Match: W/"1"`, 304},
		{`If-None-Match: *`, 304},
		{`If-None-Match: "7", W/"8" ,	"1"`, 304},
		{`If-None-Match: ,,"1"`, 304},
		{`If-None-Match: "a,b", "1"`, 304},
		{"If-None-Match: \"2\"\r\nIf-None-Match: \"1\"", 304},
		{`If-None-Match: "2"`, 200},
		{`If-None-Match: "01"`, 200},
		{`If-None-Match: 1`, 200},
		{`If-None-Match: "`, 200},
		{`If-None-Match: W/1`, 200},
		{`If-None-Match: "2" x "1"`, 200},
		{`If-None-Match:`, 200},
		{`If-Match: "1"`, 200},
		{`If-Match: "2", "1"`, 200},
		{`If-Match: *`, 200},
		{`If-Match: W/"1"`, 412},
		{`If-Match: "2"`, 412},
		{`If-Match: `, 412},
		{"If-Match: \"2\"\r\nIf-None-Match: \"1\"", 412},
	} {
		for _, target := range []string{"/k", "/-/v1/keys/k"} {
			for _, method := range []string{"GET", "HEAD"} {
				a := f.do(method, target, "", tt.header)
				if a.Code != tt.code {
					t.Errorf("%s %s, %s: %d, want %d", method, target, tt.header, a.Code, tt.code)
				}
				a.WantHeader(t, "ETag", `"1"`)
				a.WantHeader(t, "Resource-Version", "2")
				if a.Code == 304 && (a.Body != "" || a.Header.Get("Content-Length") != "") {
					t.Errorf("%+v", a)
				}
			}
		}
		f.do("GET", "/none", "", tt.header).Want(t, 404)
	}
}

func TestHTTP_TTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // time starts at 2000-01-01
		f := newPipeFront(t)
		expires := func(key string) string {
			it, _, _ := f.store.Get(key)
			if it.Expires == 0 {
				return ""
			}
			return time.UnixMilli(it.Expires).UTC().Format(time.RFC3339Nano)
		}
		time.Sleep(678 * time.Millisecond)
		f.do("PUT", "/k?ttl=90s", "v").Want(t, 201)
		if got := expires("k"); got != "2000-01-01T00:01:30.678Z" {
			t.Error(got)
		}
		for _, target := range []string{"/k", "/-/v1/keys/k"} {
			a := f.do("GET", target, "")
			a.WantHeader(t, "Expires", "Sat, 01 Jan 2000 00:01:30 GMT")
			a.WantHeader(t, "Cache-Control", "no-cache")
			a = f.do("GET", target, "", `If-None-Match: "1"`)
			a.Want(t, 304)
			a.WantHeader(t, "Expires", "Sat, 01 Jan 2000 00:01:30 GMT")
		}
		it := testkit.MustDecode[testkit.JSONItem](t, f.do("GET", "/-/v1/keys/k", ""))
		if got := it.ExpiresAt.Format(time.RFC3339Nano); got != "2000-01-01T00:01:30.678Z" {
			t.Error(got)
		}
		if list := testkit.MustDecode[testkit.JSONList](t, f.do("GET", "/-/v1/keys", "")); !list.Items[0].ExpiresAt.Equal(*it.ExpiresAt) {
			t.Error(list)
		}
		time.Sleep(time.Minute)
		f.do("PUT", "/k?ttl=1s", "v").Want(t, 204) // counts from now
		if got := expires("k"); got != "2000-01-01T00:01:01.678Z" {
			t.Error(got)
		}
		f.do("PUT", "/k", "v").Want(t, 204) // removes it
		if got := expires("k"); got != "" {
			t.Error(got)
		}
		a := f.do("GET", "/k", "")
		a.WantHeader(t, "Expires", "")
		for _, method := range []string{"POST", "PATCH"} {
			a := f.do(method, "/?ttl=87600h", "1")
			if got := expires(a.Header.Get("Location")[1:]); got != "2009-12-29T00:01:00.678Z" {
				t.Errorf("%s: %s", method, got)
			}
		}
		body := `{"then":[{"op":"put","key":"t","value":"v","ttl":"1h"},{"op":"get","key":"t"}]}`
		a = f.do("POST", "/-/v1/txn", body)
		a.Want(t, 200)
		if got := expires("t"); got != "2000-01-01T01:01:00.678Z" || !strings.Contains(a.Body, `"expiresAt":"2000-01-01T01:01:00.678Z"`) {
			t.Error(got, a.Body)
		}
	})
}

// The parameters of profiles, which net/http/pprof reads: what it would take too long over is refused.
func TestParams_Profiles(t *testing.T) {
	for _, tt := range []struct {
		param paramSet
		value string
		ok    bool
	}{
		{paramSeconds, "1", true}, {paramSeconds, "60", true}, {paramSeconds, "0", false}, {paramSeconds, "61", false},
		{paramSeconds, "", false}, {paramSeconds, "-1", false}, {paramSeconds, "1.5", false},
		{paramDebug, "0", true}, {paramDebug, "1", true}, {paramDebug, "2", true}, {paramDebug, "3", false}, {paramDebug, "", false},
	} {
		if err := new(params).set(tt.param, tt.value); (err == nil) != tt.ok {
			t.Errorf("%v=%q: %v", tt.param, tt.value, err)
		}
	}
}

func TestHTTP_IdempotencyKeys(t *testing.T) {
	f := newFront(t)
	long := strings.Repeat("k", store.IdempotencyKeySizeMax)
	for value, want := range map[string]string{
		`a`:   "a",
		`"b"`: "b",
		` "8e03978e-40d5-43dd-bc93-6894a57f9324" `: "8e03978e-40d5-43dd-bc93-6894a57f9324",
		`"q\"\\"`:                 `q"\`,
		`c d`:                     "c d",
		`a"b`:                     `a"b`,
		`k\e`:                     `k\e`,
		`~!#$%&'()*+,-./:`:        `~!#$%&'()*+,-./:`,
		long:                      long,
		`"` + long + `"`:          long,
		``:                        "",
		`""`:                      "",
		`"`:                       "",
		`"a`:                      "",
		`"a"b"`:                   "",
		`"a"; p=1`:                "",
		`"a\`:                     "",
		`"a\"`:                    "",
		`"a\n"`:                   "",
		"a\tb":                    "",
		"\xc3\xa9":                "",
		long + "k":                "",
		"a\r\nIdempotency-Key: a": "",
	} {
		f.store.Restore(store.NewState())
		f.backend.index = 0
		a := f.do("PUT", "/k", "v", "Idempotency-Key: "+value)
		if want == "" {
			a.Want(t, 400)
			if p := mustProblem(t, a); p.Outcome != fault.NotApplied || !strings.HasPrefix(p.Detail, "Idempotency-Key must be given once") {
				t.Errorf("%+v", p)
			}
			continue
		}
		a.Want(t, 201)
		if _, ok := f.store.State.Retries.Numbers.Get(want); !ok {
			t.Errorf("%q is not remembered as %q", value, want)
		}
	}
}

// retryTests are writes, and for each of them others that are not the same.
var retryTests = []struct {
	method, target, body string
	headers              []string
	setup                func(f *front)
	code                 int
	others               []string // method, target, body and headers
}{
	{method: "PUT", target: "/k", body: "v", code: 201, others: []string{
		"PUT|/k2|v", "PUT|/k|v2", "PUT|/k|", "DELETE|/k|", "PUT|/k?ttl=30s|v", `PUT|/k|v|If-Match: "1"`, "PUT|/k|v|If-None-Match: *", "POST|/|v", "PATCH|/|1", "POST|/-/v1/txn|{}", "DELETE|/-/v1/keys?prefix=k|",
	}},
	// As a whole the two say the same, but not field by field.
	{method: "PUT", target: "/k", body: "0s00v", code: 201, others: []string{"PUT|/k0s00|v"}},
	{method: "PUT", target: "/k?ttl=30s", body: "v", code: 201, others: []string{"PUT|/k?ttl=31s|v", "PUT|/k|v"}},
	{method: "PUT", target: "/k", body: "v", headers: []string{"If-None-Match: *"}, code: 201, others: []string{"PUT|/k|v"}},
	{method: "PUT", target: "/k", body: "v", headers: []string{`If-Match: "7"`}, code: 412, others: []string{`PUT|/k|v|If-Match: "8"`, "PUT|/k|v"}},
	{method: "POST", target: "/", body: "v", code: 201, others: []string{"POST|/|v2", "POST|/?ttl=1s|v", "PUT|/k|v"}},
	{method: "PATCH", target: "/", body: "1", code: 204, others: []string{"PATCH|/|2", "POST|/|1"}},
	{method: "DELETE", target: "/k", setup: func(f *front) { f.put("k", "v") }, code: 204, others: []string{"DELETE|/k2|", "DELETE|/k||If-Match: *"}},
	{method: "DELETE", target: "/k", code: 404, others: []string{"DELETE|/k2|"}},
	{method: "DELETE", target: "/-/v1/keys?prefix=k", setup: func(f *front) { f.put("k", "v") }, code: 200, others: []string{"DELETE|/-/v1/keys?prefix=kk|", "DELETE|/k|"}},
	{method: "POST", target: "/-/v1/txn", body: `{"then":[{"op":"put","key":"k","value":"v"},{"op":"get","key":"k"}]}`, code: 200, others: []string{
		`POST|/-/v1/txn|{"then":[{"op":"put","key":"k","value":"v"}]}`, "POST|/|v",
	}},
	{method: "POST", target: "/-/v1/txn", body: `{"if":[{"key":"k","exists":true}],"else":[{"op":"delete","key":"k"}]}`, code: 200, others: []string{"POST|/|v"}},
}

// The same request under the same key is answered as the first time, whatever
// happened since; another one is refused.
func TestHTTP_Retries(t *testing.T) {
	for _, tt := range retryTests {
		f := newFront(t)
		if tt.setup != nil {
			tt.setup(f)
		}
		headers := append(slices.Clone(tt.headers), "Idempotency-Key: x")
		first := f.do(tt.method, tt.target, tt.body, headers...)
		first.Want(t, tt.code)
		first.WantHeader(t, "Idempotency-Replayed", "")

		f.put("k", "changed since")
		f.put("k2", "changed since")
		if f.store.Version() > 3 {
			f.do("DELETE", "/k", "").Want(t, 204)
		}
		rv := f.store.Version()
		again := f.do(tt.method, tt.target, tt.body, append(headers, "X: y")...)
		again.WantHeader(t, "Idempotency-Replayed", "true")
		again.Header.Del("Idempotency-Replayed")
		first.Header.Del("Date")
		again.Header.Del("Date")
		if first.Code == 412 && again.Code == 412 { // it does not speak of now: see TestHTTP_ReplayedPrecondition
			continue
		}
		if again.Code != first.Code || again.Body != first.Body || fmt.Sprint(again.Header) != fmt.Sprint(first.Header) {
			t.Errorf("%s %s: first %+v\nthen %+v", tt.method, tt.target, first, again)
		}
		// Nor does how long it may take make it another request.
		separator := "?"
		if strings.Contains(tt.target, "?") {
			separator = "&"
		}
		f.do(tt.method, tt.target+separator+"timeout=7s", tt.body, headers...).Want(t, tt.code)
		for _, other := range tt.others {
			part := strings.Split(other, "|")
			a := f.do(part[0], part[1], part[2], append(part[3:], `Idempotency-Key: "x"`)...)
			a.Want(t, 422)
			a.WantHeader(t, "Idempotency-Replayed", "")
			if p := mustProblem(t, a); p.Code != "idempotency-mismatch" || p.Outcome != fault.NotApplied || p.Retryable {
				t.Errorf("%s: %+v", other, p)
			}
		}
		if got := f.store.Version(); got != rv {
			t.Errorf("%s %s: version %d, want %d", tt.method, tt.target, got, rv)
		}
		f.do("PUT", "/k", "v", "Idempotency-Key: y").Want(t, map[bool]int{true: 204, false: 201}[rv <= 3])
	}
}

// A retry of a POST leads to the key that the first one made.
func TestHTTP_RetriedPostHasOneKey(t *testing.T) {
	f := newFront(t)
	first := f.do("POST", "/", "v", "Idempotency-Key: x")
	again := f.do("POST", "/", "v", "Idempotency-Key: x")
	again.Want(t, 201)
	again.WantHeader(t, "Location", first.Header.Get("Location"))
	f.wantCreated(again, "v", 1)
	if list, _ := f.store.List("", "", 2); len(list) != 1 {
		t.Errorf("%+v", list)
	}
}

// When nobody knows whether a write with a key was applied, it can be sent again.
func TestHTTP_UnknownOutcomeWithKey(t *testing.T) {
	f := newFront(t)
	f.backend.fail(fault.ErrUnknown)
	for _, tt := range retryTests {
		a := f.do(tt.method, tt.target, tt.body, append(tt.headers, "Idempotency-Key: x")...)
		a.Want(t, 504)
		a.WantHeader(t, "Retry-After", "1")
		if p := mustProblem(t, a); p.Code != "timeout" || p.Outcome != fault.Unknown || !p.Retryable || !strings.Contains(p.Detail, "same Idempotency-Key") {
			t.Errorf("%+v", p)
		}
		a = f.do(tt.method, tt.target, tt.body, tt.headers...)
		a.Want(t, 504)
		a.WantHeader(t, "Retry-After", "")
		if p := mustProblem(t, a); p.Retryable {
			t.Errorf("%+v", p)
		}
	}
}

// FuzzHTTPHeaders: no header makes a write happen that it did not ask for.
func FuzzHTTPHeaders(f *testing.F) {
	for _, s := range []string{`"5"`, `*`, `W/"5"`, `"4", "5"`, `"a\"b"`, `""`, `"`, ` "5" `, `5`, `"05"`, "a b", `*,"5"`, `"5",,`, `W/`} {
		f.Add(s, s, s)
	}
	f.Fuzz(func(t *testing.T, match, none, key string) {
		header := http.Header{}
		for name, value := range map[string]string{"If-Match": match, "If-None-Match": none, "Idempotency-Key": key} {
			if value != "" {
				header[name] = []string{value}
			}
		}
		c, err := parseCondition(header)
		switch {
		case err != nil:
			if !errors.Is(err, fault.ErrInvalid) || match == "" && none == "" {
				t.Fatal(err)
			}
		case match != "" && none != "" || none != "" && c.Kind != store.IfAbsent || match != "" && c.Kind != store.IfMatch && c.Kind != store.IfExists || match == "" && none == "" && c != store.Condition{}:
			t.Fatalf("%q, %q: %+v", match, none, c)
		case c.Kind == store.IfMatch && c.RV != 0 && strings.TrimSpace(match) != fmt.Sprintf(`"%d"`, c.RV):
			t.Fatalf("%q: %+v", match, c)
		}
		for _, rv := range []uint64{1, 5} {
			weak, strong := anyTagMatches(header["If-None-Match"], rv, true), anyTagMatches(header["If-None-Match"], rv, false)
			if strong && !weak || weak && !strings.Contains(none, "*") && !strings.Contains(none, fmt.Sprintf(`"%d"`, rv)) {
				t.Fatalf("%q matches %d: %v, %v", none, rv, weak, strong)
			}
		}
		r := request{Request: &http.Request{Method: "PUT", Header: header}, route: keyRoute}
		id, err := r.retryID(&store.Command{}, "")
		if err != nil {
			if !errors.Is(err, fault.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if (id.Key != "") != (key != "") || len(id.Key) > store.IdempotencyKeySizeMax || strings.Trim(id.Key, "\"\\") != "" && !strings.Contains(strings.ReplaceAll(key, `\`, ""), strings.Trim(strings.ReplaceAll(id.Key, `\`, ""), `"`)) {
			t.Fatalf("%q is taken as %q", key, id.Key)
		}
	})
}

// What a write would have to do otherwise, or would forget, is refused.
func TestHTTP_RefusedHeaders(t *testing.T) {
	f := newFront(t)
	f.put("k", "v")
	for _, tt := range []struct {
		method, target, header string
		code                   int
		detail                 string
	}{
		{"PUT", "/k", "Content-Encoding: gzip", 415, "Content-Encoding"},
		{"PUT", "/k", "Content-Encoding: identity, gzip", 415, "Content-Encoding"},
		{"POST", "/", "Content-Encoding: br", 415, "Content-Encoding"},
		{"POST", "/-/v1/txn", "Content-Encoding: gzip", 415, "Content-Encoding"},
		{"PUT", "/k", "Content-Encoding: identity", 204, ""},
		{"PUT", "/k", "If-Unmodified-Since: Fri, 20 Nov 2026 12:00:00 GMT", 400, "If-Unmodified-Since"},
		{"DELETE", "/k", "If-Unmodified-Since: Fri, 20 Nov 2026 12:00:00 GMT", 400, "If-Unmodified-Since"},
		{"GET", "/k", "If-Unmodified-Since: Fri, 20 Nov 2026 12:00:00 GMT", 200, ""},
		{"GET", "/-/v1/watch?timeout=1ms", "Upgrade: websocket", 400, "/-/v1/watch"},
		{"PUT", "/k", "Upgrade: TLS/1.0", 400, "HTTP/1.1"},
		{"GET", "/k", "Upgrade: h2c", 200, ""},
		{"PUT", "/k", "Upgrade: h2c", 204, ""},
		// A list of ETags has no star with something after it.
		{"GET", "/k", "If-Match: *junk", 412, ""},
		{"GET", "/k", "If-None-Match: *junk", 200, ""},
		{"GET", "/k", `If-None-Match: "1", *`, 200, ""},
		{"GET", "/none", "If-Match: *", 404, ""},
		{"DELETE", "/none", "If-Match: *", 404, ""},
		{"DELETE", "/none", `If-Match: "1"`, 404, ""},
	} {
		a := f.do(tt.method, tt.target, "", tt.header, "Connection: Upgrade")
		if a.Want(t, tt.code); !strings.Contains(a.Body, tt.detail) {
			t.Errorf("%s %s %s: %s", tt.method, tt.target, tt.header, a.Body)
		}
		if a.Code == 415 {
			a.WantHeader(t, "Accept-Encoding", "identity")
		}
	}
}

// Who asks for a call as other programs spell it is told how it is spelt here.
func TestHTTP_MeantAsACall(t *testing.T) {
	f := newFront(t)
	for path, call := range map[string]string{
		"/metrics": "/-/metrics", "/health": "/-/livez or /-/readyz", "/healthz": "/-/livez or /-/readyz", "/health/live": "/-/livez or /-/readyz", "/healthcheck": "/-/livez or /-/readyz", "/livez": "/-/livez or /-/readyz",
		"/readyz": "/-/readyz", "/v1/keys": "/-/v1/keys", "/v1/status": "/-/v1/status", "/v2/keys": "/-/v1/keys", "/v2/keys/foo": "/-/v1/keys/foo", "/version": "/-/version",
		"/v1": "/-/v1", "/v1/snapshot": "/-/v1/backup", "/v10": "", "/metric": "", "/a": "",
	} {
		for _, method := range []string{"GET", "DELETE"} {
			a := f.do(method, path, "")
			a.Want(t, 404)
			want := "the key has no value"
			if call != "" {
				want += "; the call is " + call
			}
			if p := mustProblem(t, a); p.Detail != want {
				t.Errorf("%s: %q, want %q", path, p.Detail, want)
			}
		}
	}
	a := f.do("GET", "/-/v1/snapshot", "")
	a.Want(t, 404)
	if p := mustProblem(t, a); p.Detail != "there is no such call; a backup is at /-/v1/backup" {
		t.Errorf("/-/v1/snapshot: %q", p.Detail)
	}
	f.put("metrics", "v")
	f.do("GET", "/metrics", "").Want(t, 200)
}

// Nothing may be used again unasked, whatever lies between.
func TestHTTP_CacheControl(t *testing.T) {
	f := newFront(t)
	f.put("k", "v")
	for target, want := range map[string]string{
		"/k": "no-cache", "/none": "no-cache", "/": "no-cache", "/-/v1/keys": "no-cache", "/-/v1/keys/k": "no-cache", "/-/v1/keys/none": "no-cache", "/-/v1/members": "no-cache",
		"/-/v1/status": "no-store", "/-/readyz": "no-store", "/-/livez": "no-store", "/-/metrics": "no-store", "/-/v1/watch?timeout=1ms": "no-store", "/-/v1/log-level": "no-store",
		"/-/none": "no-store", "/-/v1/txn": "no-store", "/k?bad": "no-cache",
	} {
		for _, method := range []string{"GET", "HEAD"} {
			f.do(method, target, "").WantHeader(t, "Cache-Control", want)
		}
	}
	a := f.do("GET", "/k", "", `If-None-Match: "1"`)
	a.Want(t, 304)
	a.WantHeader(t, "Cache-Control", "no-cache")
	f.do("PUT", "/k", "v").WantHeader(t, "Cache-Control", "")
}

func TestHTTP_AcceptPrefers(t *testing.T) {
	f := newFront(t)
	for accept, want := range map[string]string{
		"application/x-ndjson;q=0, application/json":         "application/json",
		"application/x-ndjson; q=0.000":                      "application/json",
		"application/x-ndjson;q=0.1, application/json":       "application/json",
		"application/x-ndjson;q=x":                           "application/json",
		"application/x-ndjson;q=0.9, application/json;q=0.5": "application/x-ndjson",
		"application/x-ndjson, application/json":             "application/x-ndjson",
		"*/*":                                                "application/json",
	} {
		f.do("GET", "/-/v1/keys", "", "Accept: "+accept).WantHeader(t, "Content-Type", want)
	}
}

// The answer to a retry of what failed speaks of then.
func TestHTTP_ReplayedPrecondition(t *testing.T) {
	f := newFront(t)
	f.put("k", "v")
	for i := range 2 {
		a := f.do("PUT", "/k", "w", "If-None-Match: *", "Idempotency-Key: a")
		a.Want(t, 412)
		p := mustProblem(t, a)
		if i == 0 && (p.Current != 1 || a.Header.Get("Etag") != `"1"`) || i == 1 && (p.Current != 0 || a.Header.Get("Etag") != "" || !strings.Contains(p.Detail, "existed at resource version 1 when")) {
			t.Errorf("%d: %+v %v", i, p, a.Header)
		}
		f.do("DELETE", "/k", "")
	}
}

// A read settles nothing: the write may come after it.
func TestHTTP_UnknownSaysWhatSettlesIt(t *testing.T) {
	f := newFront(t)
	f.backend.fail(fault.ErrUnknown)
	p := mustProblem(t, f.do("PUT", "/k", "v"))
	for _, word := range []string{"If-Match", "Idempotency-Key", "settles nothing"} {
		if !strings.Contains(p.Detail, word) {
			t.Errorf("%q lacks %s", p.Detail, word)
		}
	}
	if p.Outcome != fault.Unknown {
		t.Errorf("%+v", p)
	}
}

// TestHTTP_ReplayedRead: nobody is told what another has read, and large results
// do not push out what others need.
func TestHTTP_ReplayedRead(t *testing.T) {
	f := newFront(t)
	f.store.State.SetLevel(2)
	f.put("secret", strings.Repeat("s", 100_000))
	const body = `{"then":[{"op":"put","key":"k","value":"v"},{"op":"get","key":"secret"}],"else":[]}`
	f.do("POST", "/-/v1/txn", body, "Idempotency-Key: before").Want(t, 200)
	before := f.store.State.Retries.Bytes
	f.apply(store.RaiseLevel(3, 1, 2, 3, 4))
	if f.store.Level() != 3 || f.store.State.Retries.Bytes != 1024 || before < 100_000 {
		t.Errorf("level %d: the table takes %d bytes, before %d", f.store.Level(), f.store.State.Retries.Bytes, before)
	}
	f.do("POST", "/-/v1/txn", body, "Idempotency-Key: after").Want(t, 200)
	rv := f.store.Version()
	for _, key := range []string{"before", "after"} {
		a := f.do("POST", "/-/v1/txn", body, "Idempotency-Key: "+key)
		a.Want(t, 409)
		a.WantHeader(t, "Idempotency-Replayed", "true")
		if p := mustProblem(t, a); p.Code != "result-not-kept" || p.Outcome != fault.Applied || p.Retryable || strings.Contains(a.Body, "sss") || len(a.Body) > 1000 {
			t.Errorf("%s: %.1000s", key, a.Body)
		}
	}
	if f.store.Version() != rv {
		t.Error("a retry was carried out")
	}
	// One that reads nothing is answered as before, and so is one whose other branch would have read.
	for _, body := range []string{
		`{"then":[{"op":"put","key":"k","value":"v"},{"op":"delete","key":"none"}]}`,
		`{"if":[{"key":"k","exists":true}],"then":[{"op":"delete","key":"k"}],"else":[{"op":"get","key":"secret"}]}`,
	} {
		first := f.do("POST", "/-/v1/txn", body, "Idempotency-Key: "+fmt.Sprint(len(body)))
		again := f.do("POST", "/-/v1/txn", body, "Idempotency-Key: "+fmt.Sprint(len(body)))
		if first.Code != 200 || again.Code != 200 || first.Body != again.Body {
			t.Errorf("%s%s", first.Body, again.Body)
		}
	}
}

// TestHTTP_Clients: who is told apart by the requests that are remembered.
func TestHTTP_Clients(t *testing.T) {
	client := func(addr string) uint64 { return clientOf(&http.Request{RemoteAddr: addr}) }
	for _, same := range [][2]string{
		{"10.0.0.1:1", "10.0.0.1:2"}, {"10.0.0.1:1", "[::ffff:10.0.0.1]:1"}, {"[2001:db8::1]:1", "[2001:db8::ffff:1:2]:9"}, {"[fe80::1%eth0]:1", "[fe80::2]:1"}, {"@", ""},
	} {
		if client(same[0]) != client(same[1]) {
			t.Errorf("%q are two", same)
		}
	}
	seen := map[uint64]string{0: "nobody"}
	for _, addr := range []string{"10.0.0.1:1", "10.0.0.2:1", "[2001:db8::1]:1", "[2001:db8:0:1::1]:1", "[::1]:1"} {
		if other, twice := seen[client(addr)]; twice {
			t.Errorf("%s is %s", addr, other)
		}
		seen[client(addr)] = addr
	}
	f := newFront(t)
	f.do("PUT", "/k", "v", "Idempotency-Key: one").Want(t, 201) // at level 1
	f.store.State.SetLevel(3)
	f.do("PUT", "/k", "v", "Idempotency-Key: two").Want(t, 204)
	for n, named := range []bool{false, true} {
		if r, _ := f.store.State.Retries.Records.Get(uint64(n)); (r.ID.Client != 0) != named {
			t.Errorf("record %d is of client %x", n, r.ID.Client)
		}
	}
}
