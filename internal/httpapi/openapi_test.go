package httpapi

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"

	"raftrv/internal/fault"
	"raftrv/internal/shares"
	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
)

// These tests hold openapi.json against the front: the table of routes says what
// there is, requests find out what is answered.

type jsonObject = map[string]any

// openAPIDocument is openapi.json, decoded.
var openAPIDocument = sync.OnceValue(func() jsonObject {
	var doc jsonObject
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		panic(err)
	}
	return doc
})

// at follows a path into a JSON document, through references.
func at(v any, path ...string) any {
	for {
		object, _ := v.(jsonObject)
		if ref, ok := object["$ref"].(string); ok {
			v = at(openAPIDocument(), strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
			continue
		}
		if len(path) == 0 {
			return v
		}
		v, path = object[path[0]], path[1:]
	}
}

func sortedKeys(v any) []string {
	object, _ := v.(jsonObject)
	return slices.Sorted(maps.Keys(object))
}

// allRoutes is every route there is.
func allRoutes() []*route {
	return append([]*route{rootRoute, keyRoute}, reservedRoutes...)
}

// documentedMethods are the keys of a path item that are methods.
func documentedMethods(item any) []string {
	methods := slices.DeleteFunc(sortedKeys(item), func(k string) bool { return k == "parameters" })
	for i := range methods {
		methods[i] = strings.ToUpper(methods[i])
	}
	return methods
}

// operation returns what is documented of a call, or nil.
func operation(rt *route, method string) any {
	return at(openAPIDocument(), "paths", rt.path, strings.ToLower(method))
}

func TestOpenAPI_Routes(t *testing.T) {
	var paths []string
	for _, rt := range allRoutes() {
		paths = append(paths, rt.path)
		var methods []string
		for _, c := range rt.calls {
			methods = append(methods, c.method)
			wantParameters(t, rt, &c)
		}
		slices.Sort(methods)
		if got := documentedMethods(at(openAPIDocument(), "paths", rt.path)); !slices.Equal(got, methods) {
			t.Errorf("%s: documented %v, served %v", rt.path, got, methods)
		}
	}
	slices.Sort(paths)
	if got := sortedKeys(at(openAPIDocument(), "paths")); !slices.Equal(got, paths) {
		t.Errorf("documented %q\nserved %q", got, paths)
	}
}

// wantParameters compares the parameters of a call, in the path, the query and
// the header.
func wantParameters(t *testing.T, rt *route, c *call) {
	t.Helper()
	var want []string
	if rt.prefix != "" {
		_, rest, _ := strings.Cut(rt.path, "{")
		name, _, _ := strings.Cut(rest, "}")
		want = append(want, "path "+name)
	}
	for i, name := range paramNames {
		if c.params&(1<<i) != 0 {
			want = append(want, "query "+name)
		}
	}
	for i, name := range headerNames {
		if c.headers&(1<<i) != 0 {
			want = append(want, "header "+name)
		}
	}
	var got []string
	for _, of := range []any{at(openAPIDocument(), "paths", rt.path), operation(rt, c.method)} {
		list, _ := at(of, "parameters").([]any)
		for _, p := range list {
			place, name := at(p, "in").(string), at(p, "name").(string)
			if place == "header" {
				name = http.CanonicalHeaderKey(name)
			}
			got = append(got, place+" "+name)
			if at(p, "description") == nil || at(p, "schema") == nil {
				t.Errorf("%s %s: %s is not described", c.method, rt.path, name)
			}
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s %s: documented %q\ntaken %q", c.method, rt.path, got, want)
	}
	if _, hasBody := at(operation(rt, c.method), "requestBody").(jsonObject); hasBody != takesBody(rt, c.method) {
		t.Errorf("%s %s: body documented: %v", c.method, rt.path, hasBody)
	}
}

func takesBody(rt *route, method string) bool {
	switch rt.path {
	case "/-/v1/members/{id}/promote", "/-/v1/leader/{id}": // the path says it all
		return false
	}
	return method != http.MethodGet && method != http.MethodDelete
}

// Every reference leads somewhere, and every component is referred to.
func TestOpenAPI_References(t *testing.T) {
	used := map[string]bool{}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				walk(e)
			}
		case jsonObject:
			if ref, ok := v["$ref"].(string); ok {
				used[ref] = true
				if at(v) == nil {
					t.Errorf("%s leads nowhere", ref)
				}
			}
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(openAPIDocument())
	for _, kind := range sortedKeys(at(openAPIDocument(), "components")) {
		for _, name := range sortedKeys(at(openAPIDocument(), "components", kind)) {
			if ref := "#/components/" + kind + "/" + name; !used[ref] {
				t.Errorf("nobody refers to %s", ref)
			}
		}
	}
}

// routeOf returns the route of a path, or nil.
func routeOf(path string) *route {
	if path == "/" {
		return rootRoute
	}
	if !isReserved(path) {
		return keyRoute
	}
	rt, _ := FindReserved(path)
	return rt
}

// checkDocumented checks an answer against what is documented of the call: its
// status, its headers and its body.
func checkDocumented(t *testing.T, method, target string, a testkit.Answer) {
	t.Helper()
	path, _, err := splitTarget(target)
	if err != nil || path == "*" || method == http.MethodOptions {
		return
	}
	if a.Code == http.StatusMethodNotAllowed || a.Code >= 400 && a.Header.Get("Content-Type") != "application/problem+json" {
		return // in general, and what net/http refuses
	}
	rt := routeOf(path)
	if rt == nil || rt.Call(method) == nil {
		return
	}
	c := rt.Call(method)
	where := fmt.Sprintf("%s %s, %d", c.method, rt.path, a.Code)
	response := at(operation(rt, c.method), "responses", strconv.Itoa(a.Code))
	if response == nil {
		t.Errorf("%s is not documented", where)
		return
	}
	for name := range a.Header {
		switch name {
		case "Date", "Content-Length", "Content-Type", "Connection", "X-Content-Type-Options", "Content-Security-Policy", "Cross-Origin-Resource-Policy", "Cache-Control": // of all
			continue
		}
		if !slices.ContainsFunc(sortedKeys(at(response, "headers")), func(s string) bool { return strings.EqualFold(s, name) }) {
			t.Errorf("%s: header %s is not documented", where, name)
		}
	}
	mediaType, _, _ := mime.ParseMediaType(a.Header.Get("Content-Type"))
	content := cmp.Or(at(response, "content", mediaType), at(response, "content", "*/*"))
	if mediaType != "" && content == nil {
		t.Errorf("%s: content %s is not documented", where, mediaType)
	}
	if method == http.MethodHead || content == nil {
		return
	}
	documents := []string{a.Body}
	if rt == keyRoute && a.Code == http.StatusOK {
		return // a value
	}
	switch mediaType {
	case "application/x-ndjson":
		documents = slices.Collect(strings.Lines(a.Body))
	case "text/plain":
		b, err := json.Marshal(a.Body)
		if err != nil {
			t.Fatal(err)
		}
		documents = []string{string(b)}
	case "application/octet-stream", "text/event-stream", "text/html":
		return
	}
	if len(documents) > 100 {
		documents = documents[:100]
	}
	for _, document := range documents {
		var v any
		if err := json.Unmarshal([]byte(document), &v); err != nil {
			t.Errorf("%s: %v", where, err)
		} else if err := matchSchema(v, at(content, "schema"), "$"); err != nil {
			t.Errorf("%s: %v\n%.500s", where, err, document)
		}
	}
}

// matchSchema is as much of JSON Schema as openapi.json uses.
func matchSchema(v, schema any, place string) error {
	s, _ := at(schema).(jsonObject)
	for keyword, arg := range s {
		if err := matchKeyword(v, keyword, arg, s, place); err != nil {
			return err
		}
	}
	return nil
}

func matchKeyword(v any, keyword string, arg any, s jsonObject, place string) error {
	object, isObject := v.(jsonObject)
	array, isArray := v.([]any)
	text, isString := v.(string)
	number, isNumber := v.(float64)
	fail := func(format string, args ...any) error {
		return fmt.Errorf("%s: %s: %s", place, keyword, fmt.Sprintf(format, args...))
	}
	switch keyword {
	case "description", "examples", "default", "format":
	case "type":
		is := map[string]bool{"object": isObject, "array": isArray, "string": isString, "integer": isNumber && number == float64(int64(number)), "null": v == nil}
		_, is["boolean"] = v.(bool)
		if !is[arg.(string)] {
			return fail("%v is no %v", v, arg)
		}
	case "const":
		if v != arg {
			return fail("%v is not %v", v, arg)
		}
	case "enum":
		if !slices.Contains(arg.([]any), v) {
			return fail("%v is not in %v", v, arg)
		}
	case "pattern":
		if isString && !regexp.MustCompile(arg.(string)).MatchString(text) {
			return fail("%q", text)
		}
	case "minimum":
		if number < arg.(float64) {
			return fail("%v", number)
		}
	case "maxItems":
		if len(array) > int(arg.(float64)) {
			return fail("%d", len(array))
		}
	case "minLength":
		if isString && len(text) < int(arg.(float64)) {
			return fail("%d", len(text))
		}
	case "contentEncoding":
		var b []byte
		if err := json.Unmarshal([]byte(strconv.Quote(text)), &b); err != nil {
			return fail("%v", err)
		}
	case "required":
		for _, name := range arg.([]any) {
			if _, ok := object[name.(string)]; !ok {
				return fail("%s is missing", name)
			}
		}
	case "properties":
		for name, value := range object {
			if property, ok := arg.(jsonObject)[name]; ok {
				if err := matchSchema(value, property, place+"."+name); err != nil {
					return err
				}
			}
		}
	case "additionalProperties":
		for name := range object {
			if at(s, "properties", name) == nil {
				return fail("%s is not documented", name)
			}
		}
	case "items":
		for i, value := range array {
			if err := matchSchema(value, arg, fmt.Sprintf("%s[%d]", place, i)); err != nil {
				return err
			}
		}
	case "anyOf", "oneOf":
		matched := 0
		for _, option := range arg.([]any) {
			if matchSchema(v, option, place) == nil {
				matched++
			}
		}
		if matched == 0 || keyword == "oneOf" && matched > 1 {
			return fail("%d match", matched)
		}
	default:
		return fail("is a keyword that the test does not know")
	}
	return nil
}

// openAPIRequest is a request that gets an answer with a certain status.
type openAPIRequest struct {
	code    int
	method  string
	target  string
	body    string
	headers []string
	fail    error // of the backend
}

func openAPIRequests() []openAPIRequest {
	tooLarge := strings.Repeat("v", testValueSizeMax+1)
	retry, conflict := []string{"Idempotency-Key: used"}, []string{`If-Match: "99"`}
	ndjson := []string{"Accept: application/x-ndjson"}
	list := []openAPIRequest{
		{200, "GET", "/", "", nil, nil},
		{201, "POST", "/", "v", nil, nil},
		{204, "PATCH", "/", "1", nil, nil},
		{200, "GET", "/k", "", nil, nil},
		{200, "GET", "/expires", "", nil, nil},
		{304, "GET", "/k", "", []string{"If-None-Match: *"}, nil},
		{304, "GET", "/expires", "", []string{"If-None-Match: *"}, nil},
		{404, "GET", "/none", "", nil, nil},
		{412, "GET", "/k", "", conflict, nil},
		{204, "PUT", "/k", "", nil, nil},
		{201, "PUT", "/new", "", []string{"Idempotency-Key: new"}, nil},
		{201, "PUT", "/new", "", []string{"Idempotency-Key: new"}, nil},
		{412, "PUT", "/k", "", conflict, nil},
		{412, "PUT", "/none", "", append(conflict, "Idempotency-Key: 412"), nil},
		{412, "PUT", "/none", "", append(conflict, "Idempotency-Key: 412"), nil},
		{204, "DELETE", "/new", "", nil, nil},
		{404, "DELETE", "/none", "", nil, nil},
		{412, "DELETE", "/k", "", conflict, nil},
		{204, "POST", "/4", "http://a:1", nil, nil},
		{409, "POST", "/4", "http://a:1", nil, fault.ErrMember},
		{200, "GET", "/-/v1/members", "", nil, nil},
		{204, "POST", "/-/v1/members/4", `{"peerUrl":"http://a:1"}`, nil, nil},
		{409, "POST", "/-/v1/members/4", `{"peerUrl":"http://a:1"}`, nil, fault.ErrMember},
		{204, "PUT", "/-/v1/members/4", `{"name":"n"}`, nil, nil},
		{404, "PUT", "/-/v1/members/4", `{"name":"n"}`, nil, fault.ErrNotFound},
		{409, "PUT", "/-/v1/members/4", `{"peerUrl":"http://a:1"}`, nil, fault.ErrMember},
		{204, "DELETE", "/-/v1/members/4", "", nil, nil},
		{404, "DELETE", "/-/v1/members/4", "", nil, fault.ErrNotFound},
		{404, "POST", "/-/v1/members/4/promote", "", nil, fault.ErrNotFound},
		{409, "DELETE", "/-/v1/members/4", "", nil, fault.ErrMember},
		{204, "POST", "/-/v1/members/4/promote", "", nil, nil},
		{409, "POST", "/-/v1/members/4/promote", "", nil, fault.ErrMember},
		{204, "POST", "/-/v1/leader/4", "", nil, nil},
		{409, "POST", "/-/v1/leader/4", "", nil, fault.ErrMember},
		{200, "GET", "/-/v1/keys", "", nil, nil},
		{200, "GET", "/-/v1/keys?limit=1", "", nil, nil},
		{200, "GET", "/-/v1/keys", "", ndjson, nil},
		{200, "DELETE", "/-/v1/keys?prefix=none", "", nil, nil},
		{413, "DELETE", "/-/v1/keys?prefix=many", "", nil, nil},
		{200, "GET", "/-/v1/keys/k", "", nil, nil},
		{200, "GET", "/-/v1/keys/expires", "", nil, nil},
		{304, "GET", "/-/v1/keys/k", "", []string{"If-None-Match: *"}, nil},
		{404, "GET", "/-/v1/keys/none", "", nil, nil},
		{412, "GET", "/-/v1/keys/k", "", conflict, nil},
		{200, "POST", "/-/v1/txn", `{"if":[{"key":"k","exists":true}],"then":[{"op":"put","key":"\u0000","valueBase64":"/w=="},{"op":"get","key":"\u0000"},{"op":"get","key":"none"},{"op":"delete","keyBase64":"/w=="}]}`, nil, nil},
		{200, "POST", "/-/v1/txn", `{"then":[{"op":"put","key":"typed","value":"","contentType":"text/html"},{"op":"get","key":"typed"}]}`, []string{"Idempotency-Key: read"}, nil},
		{409, "POST", "/-/v1/txn", `{"then":[{"op":"put","key":"typed","value":"","contentType":"text/html"},{"op":"get","key":"typed"}]}`, []string{"Idempotency-Key: read"}, nil},
		{200, "GET", "/-/v1/watch?timeout=1ms", "", nil, nil},
		{200, "GET", "/-/v1/watch?timeout=1ms&initial=true", "", []string{"Accept: text/event-stream"}, nil},
		{410, "GET", "/-/v1/watch?resourceVersion=1", "", nil, nil},
		{410, "GET", "/-/v1/keys?resourceVersion=1&resourceVersionMatch=exact", "", nil, nil},
		{504, "GET", "/-/v1/watch?initial=true&resourceVersion=9999999", "", nil, nil},
		{200, "GET", "/-/v1/backup", "", nil, nil},
		{200, "GET", "/-/v1/status", "", nil, nil},
		{200, "GET", "/-/v1/status?all=true", "", nil, nil},
		{200, "GET", "/-/v1/log-level", "", nil, nil},
		{204, "PUT", "/-/v1/log-level", `{"level":"debug"}`, nil, nil},
		{200, "GET", "/-/metrics", "", nil, nil},
		{200, "GET", "/-/debug/pprof/", "", nil, nil},
		{200, "GET", "/-/debug/pprof/heap", "", nil, nil},
		{200, "GET", "/-/debug/pprof/goroutine?debug=1", "", nil, nil},
		{404, "GET", "/-/debug/pprof/none", "", nil, nil},
		{200, "GET", "/-/livez", "", nil, nil},
		{200, "GET", "/-/readyz", "", nil, nil},
		{200, "GET", "/-/readyz?verbose", "", nil, nil},
		{503, "GET", "/-/readyz", "", nil, fault.ErrNoLeader},
		{503, "GET", "/-/readyz?verbose", "", nil, fault.ErrNoLeader},
		{200, "GET", "/-/version", "", nil, nil},
		{200, "GET", "/-/openapi.json", "", nil, nil},
	}
	// What follows from the kind of a call. Each is tried on a request that would
	// succeed.
	tried := map[string]bool{}
	for _, r := range slices.Clone(list) {
		path, _, _ := strings.Cut(r.target, "?")
		rt := routeOf(path)
		if call := r.method + rt.path; r.code >= 300 || tried[call] {
			continue
		} else {
			tried[call] = true
		}
		separator := "?"
		if strings.Contains(r.target, "?") {
			separator = "&"
		}
		with := func(code int, query, body string, headers []string, fail error) {
			list = append(list, openAPIRequest{code, r.method, r.target + query, body, append(slices.Clone(r.headers), headers...), fail})
		}
		with(400, separator+"no=1", r.body, nil, nil)
		if r.method != "GET" {
			with(415, "", r.body, []string{"Content-Encoding: gzip"}, nil)
		}
		if takesBody(rt, r.method) {
			with(413, "", tooLarge, nil, nil)
			with(408, "", "", nil, fault.ErrBodyTimeout) // see below
		}
		if isLocal(path) {
			continue
		}
		with(500, "", r.body, nil, errors.New("broken"))
		with(503, "", r.body, nil, fault.ErrNoLeader)
		switch {
		case r.method == "GET" && path != "/-/v1/watch":
			with(504, separator+"resourceVersion=9999999", "", nil, nil)
		case r.method != "GET":
			with(504, "", r.body, nil, fault.ErrUnknown)
		}
		if rt.Call(r.method).headers&headerIdempotencyKey != 0 {
			with(422, "", r.body, retry, nil)
			with(507, "", r.body, nil, fault.ErrDiskFull)
		}
	}
	return list
}

// isLocal says whether the call at a path is about this process only, so that
// it is answered whatever the cluster does.
func isLocal(path string) bool {
	switch path {
	case "/-/livez", "/-/readyz", "/-/version", "/-/openapi.json", "/-/v1/status", "/-/v1/log-level", "/-/metrics":
		return true
	}
	return strings.HasPrefix(path, "/-/debug/")
}

// Every status that is documented is answered to some request, and no other is.
func TestOpenAPI_Statuses(t *testing.T) {
	f := newFront(t)
	f.store.State.SetLevel(store.LevelNewest)
	storetest.ShrinkWindow(f.store, 1, 1<<20)
	f.do("PUT", "/k", "v", "Idempotency-Key: used", "Content-Type: text/plain")
	f.do("PUT", "/expires?ttl=1h", "\xff")
	for i := range store.DeletePrefixMax + 1 {
		f.put(fmt.Sprintf("many/%d", i), "")
	}
	answered := map[string]bool{}
	note := func(method, target string, code int) {
		path, _, _ := strings.Cut(target, "?")
		answered[fmt.Sprintf("%s %s %d", method, routeOf(path).path, code)] = true
	}
	for _, r := range openAPIRequests() {
		if errors.Is(r.fail, fault.ErrBodyTimeout) {
			synctest.Test(t, func(t *testing.T) {
				a := newPipeFront(t).send(r.method, r.target, []string{"Content-Length: 1"}, "")
				a.Want(t, r.code)
				note(r.method, r.target, a.Code)
			})
			continue
		}
		if r.method == "POST" && r.target == "/-/v1/txn" && r.code == 413 {
			r.body = strings.Repeat(" ", txnBodySizeMax+1)
		}
		f.backend.fail(r.fail)
		a := f.do(r.method, r.target, r.body, r.headers...)
		f.backend.fail(nil)
		if a.Code != r.code {
			t.Errorf("%s %s: %d %s, want %d", r.method, r.target, a.Code, a.Body, r.code)
		}
		note(r.method, r.target, a.Code)
	}
	// A node that does enough of it already.
	for range store.ScansMax {
		sc, err := f.store.Scan("", "")
		if err != nil {
			t.Fatal(err)
		}
		defer sc.Close()
	}
	for _, target := range []string{"/-/v1/keys", "/-/v1/watch?initial=true", "/-/v1/backup"} {
		a := f.do("GET", target, "", "Accept: application/x-ndjson")
		a.Want(t, 429)
		note("GET", target, a.Code)
	}
	// A client that cannot tell where an answer ends.
	for _, target := range []string{"/-/debug/pprof/", "/-/debug/pprof/heap"} {
		if got := f.exchange("GET " + target + " HTTP/1.0\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.0 505 ") || !strings.Contains(got, `"code":"http-version"`) {
			t.Errorf("%q", got)
		}
		note("GET", target, 505)
	}
	// A scrape more than one address may have at a time.
	scraped := newFront(t, func(c *Config) { c.Registry.MustRegister(slowCollector{}) })
	slowScrapes := make(chan int, shares.MostOf(metricsInFlight)+1)
	for range cap(slowScrapes) {
		go func() { slowScrapes <- scraped.do("GET", "/-/metrics", "").Code }()
	}
	if code := <-slowScrapes; code != 429 {
		t.Errorf("%d, want 429", code)
	}
	note("GET", "/-/metrics", 429)
	close(slowCollected)
	for range shares.MostOf(metricsInFlight) {
		if code := <-slowScrapes; code != 200 {
			t.Errorf("%d, want 200", code)
		}
	}
	// A node without --pprof.
	a := newFront(t, func(c *Config) { c.Profiles = false }).do("GET", "/-/debug/pprof/", "")
	a.Want(t, 404)
	note("GET", "/-/debug/pprof/", a.Code)

	documented := map[string]bool{}
	for _, rt := range allRoutes() {
		for _, c := range rt.calls {
			for _, code := range sortedKeys(at(operation(rt, c.method), "responses")) {
				documented[fmt.Sprintf("%s %s %s", c.method, rt.path, code)] = true
			}
		}
	}
	for _, s := range slices.Sorted(maps.Keys(documented)) {
		if !answered[s] {
			t.Errorf("%s is documented, but never answered", s)
		}
	}
	for _, s := range slices.Sorted(maps.Keys(answered)) {
		if !documented[s] {
			t.Errorf("%s is answered, but not documented", s)
		}
	}
}

// slowCollector has no metrics, but looks for them until slowCollected is closed.
type slowCollector struct{}

var slowCollected = make(chan struct{})

func (slowCollector) Describe(chan<- *prometheus.Desc) {}
func (slowCollector) Collect(chan<- prometheus.Metric) { <-slowCollected }

func TestOpenAPI_ServesItself(t *testing.T) {
	a := newFront(t).do("GET", "/-/openapi.json", "")
	a.Want(t, 200)
	a.WantHeader(t, "Content-Type", "application/json")
	var got jsonObject
	if err := json.Unmarshal([]byte(a.Body), &got); err != nil || !reflect.DeepEqual(got, openAPIDocument()) {
		t.Error(err)
	}
	if got["openapi"] != "3.1.1" {
		t.Errorf("%v", got["openapi"])
	}
}
