package httpapi

import (
	"net/http"
	"slices"
	"strings"

	"raftrv/internal/fault"
)

// This file is the table of all calls: which paths there are, what each of them
// takes and who serves it. Allow headers, the refusal of unknown parameters and
// headers, and the tests of openapi.json are made from it.

// route is one kind of path.
type route struct {
	// path is spelt as in openapi.json. It may have one variable: {key} stands
	// for the rest of the path, slashes included, any other for one segment.
	path  string
	calls []call

	// Filled by newRoutes.
	prefix, suffix string // of the path, around its variable
	whole          bool   // the variable may hold slashes
	allow          []string
}

// call is one method of a route.
type call struct {
	method  string // GET serves HEAD, too
	serve   func(h *httpAPI, w http.ResponseWriter, r request) error
	params  paramSet
	headers headerSet
	kept    bool // there are places for connections on which this is asked for
	endless bool // what it answers has neither a length nor an end of its own, so HTTP/1.0 cannot tell all of it from less

	// Filled by newRoute and by numbered.
	path   string // of the route
	cache  []string
	number int // from 1; no two calls have the same
}

// request is an HTTP request of which the path and the parameters were read.
type request struct {
	*http.Request
	route  *route
	name   string // what stands for the variable of the path, unescaped
	params params
}

// What many calls take.
const (
	readParams  = paramTimeout | paramResourceVersion
	writeParams = paramTimeout | paramTTL
)

// keyRoute is every path that is not reserved, rootRoute the one without a key.
var (
	keyRoute = newRoute(route{path: "/{key}", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).getKey, params: readParams, headers: headerIfMatch | headerIfNoneMatch},
		{method: http.MethodPut, serve: (*httpAPI).putKey, params: writeParams, headers: headerIfMatch | headerIfNoneMatch | headerIdempotencyKey},
		{method: http.MethodDelete, serve: (*httpAPI).deleteKey, params: paramTimeout, headers: headerIfMatch | headerIfNoneMatch | headerIdempotencyKey},
		{method: http.MethodPost, serve: (*httpAPI).addMember, params: paramTimeout, kept: true},
	}})
	rootRoute = newRoute(route{path: "/", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).getVersion, params: readParams},
		{method: http.MethodPost, serve: (*httpAPI).postValue, params: writeParams, headers: headerIdempotencyKey},
		{method: http.MethodPatch, serve: (*httpAPI).patchObject, params: writeParams, headers: headerIdempotencyKey},
	}})
)

// reservedRoutes are the paths under /-/. The first one that matches counts.
var reservedRoutes = newRoutes(
	route{path: "/-/v1/keys", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).listKeys, params: readParams | paramExact | paramPrefix | paramAfter | paramLimit | paramKeysOnly},
		{method: http.MethodDelete, serve: (*httpAPI).deletePrefix, params: paramTimeout | paramPrefix, headers: headerIdempotencyKey},
	}},
	route{path: "/-/v1/keys/{key}", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).getItem, params: readParams, headers: headerIfMatch | headerIfNoneMatch},
	}},
	route{path: "/-/v1/txn", calls: []call{
		{method: http.MethodPost, serve: (*httpAPI).postTxn, params: paramTimeout, headers: headerIdempotencyKey},
	}},
	route{path: "/-/v1/watch", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).watch, params: paramResume | paramPrefix | paramKey | paramInitial | paramDuration, headers: headerLastEventID},
	}},
	route{path: "/-/v1/backup", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).getBackup, params: readParams},
	}},
	route{path: "/-/v1/members", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).listMembers, params: readParams, kept: true},
	}},
	route{path: "/-/v1/members/{id}", calls: []call{
		{method: http.MethodPost, serve: (*httpAPI).postMember, params: paramTimeout, kept: true},
		{method: http.MethodPut, serve: (*httpAPI).putMember, params: paramTimeout, kept: true},
		{method: http.MethodDelete, serve: (*httpAPI).deleteMember, params: paramTimeout, kept: true},
	}},
	route{path: "/-/v1/members/{id}/promote", calls: []call{
		{method: http.MethodPost, serve: (*httpAPI).promoteMember, params: paramTimeout, kept: true},
	}},
	route{path: "/-/v1/leader/{id}", calls: []call{
		{method: http.MethodPost, serve: (*httpAPI).postLeader, params: paramTimeout},
	}},
	route{path: "/-/v1/status", calls: []call{{method: http.MethodGet, serve: (*httpAPI).getStatus, params: paramAll, kept: true}}},
	route{path: "/-/v1/log-level", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).getLogLevel},
		{method: http.MethodPut, serve: (*httpAPI).putLogLevel},
	}},
	route{path: "/-/metrics", calls: []call{{method: http.MethodGet, serve: (*httpAPI).getMetrics, kept: true}}},
	route{path: "/-/debug/pprof/", calls: []call{{method: http.MethodGet, serve: (*httpAPI).getProfiles, endless: true}}},
	route{path: "/-/debug/pprof/{profile}", calls: []call{
		{method: http.MethodGet, serve: (*httpAPI).getProfile, params: paramSeconds | paramDebug, endless: true},
	}},
	route{path: "/-/livez", calls: []call{{method: http.MethodGet, serve: (*httpAPI).getLive, kept: true}}},
	route{path: "/-/readyz", calls: []call{{method: http.MethodGet, serve: (*httpAPI).getReady, params: paramVerbose, kept: true}}},
	route{path: "/-/version", calls: []call{{method: http.MethodGet, serve: (*httpAPI).getProgram}}},
	route{path: "/-/openapi.json", calls: []call{{method: http.MethodGet, serve: (*httpAPI).getOpenAPI}}},
)

// allCalls has every call at its number; the first place stands for no call.
var allCalls = numbered(append([]*route{keyRoute, rootRoute}, reservedRoutes...))

// numbered gives each call of the routes its number.
func numbered(routes []*route) []*call {
	calls := []*call{nil}
	for _, rt := range routes {
		for i := range rt.calls {
			rt.calls[i].number = len(calls)
			calls = append(calls, &rt.calls[i])
		}
	}
	return calls
}

// statuses says for each code of an error which status its answer has.
var statuses = map[string]int{
	fault.ErrInvalid.Code:         http.StatusBadRequest,
	fault.ErrNotFound.Code:        http.StatusNotFound,
	fault.ErrMethod.Code:          http.StatusMethodNotAllowed,
	fault.ErrHost.Code:            http.StatusMisdirectedRequest,
	fault.ErrOrigin.Code:          http.StatusForbidden,
	fault.ErrTooLarge.Code:        http.StatusRequestEntityTooLarge,
	fault.ErrVersion.Code:         http.StatusHTTPVersionNotSupported,
	fault.ErrEncoding.Code:        http.StatusUnsupportedMediaType,
	fault.ErrBodyTimeout.Code:     http.StatusRequestTimeout,
	fault.ErrConnections.Code:     http.StatusServiceUnavailable,
	fault.ErrNotReady.Code:        http.StatusServiceUnavailable,
	fault.ErrMember.Code:          http.StatusConflict,
	fault.ErrOverloaded.Code:      http.StatusServiceUnavailable,
	fault.ErrShuttingDown.Code:    http.StatusServiceUnavailable,
	fault.ErrDiskFull.Code:        http.StatusInsufficientStorage,
	fault.ErrQuota.Code:           http.StatusInsufficientStorage,
	fault.ErrLevel.Code:           http.StatusServiceUnavailable,
	fault.ErrDiverged.Code:        http.StatusServiceUnavailable,
	fault.ErrUnchecked.Code:       http.StatusServiceUnavailable,
	fault.ErrNoLeader.Code:        http.StatusServiceUnavailable,
	fault.ErrReadTimeout.Code:     http.StatusGatewayTimeout,
	fault.ErrPrecondition.Code:    http.StatusPreconditionFailed,
	fault.ErrRetryOther.Code:      http.StatusUnprocessableEntity,
	fault.ErrTooManyKeys.Code:     http.StatusRequestEntityTooLarge,
	fault.ErrResultTooLarge.Code:  http.StatusRequestEntityTooLarge,
	fault.ErrResultNotKept.Code:   http.StatusConflict,
	fault.ErrTooManyRequests.Code: http.StatusTooManyRequests,
	fault.ErrTransfer.Code:        http.StatusGatewayTimeout,
	fault.ErrExpired.Code:         http.StatusGone,
	fault.ErrSlow.Code:            http.StatusServiceUnavailable,
	fault.ErrInternal.Code:        http.StatusInternalServerError,
}

// statusOf returns the status of the answer that an error is.
func statusOf(e *fault.Error) int {
	if status, ok := statuses[e.Code]; ok {
		return status
	}
	return http.StatusInternalServerError
}

func newRoutes(routes ...route) []*route {
	var table []*route
	for _, rt := range routes {
		table = append(table, newRoute(rt))
	}
	return table
}

func newRoute(rt route) *route {
	if before, rest, ok := strings.Cut(rt.path, "{"); ok {
		name, after, _ := strings.Cut(rest, "}")
		rt.prefix, rt.suffix, rt.whole = before, after, name == "key"
	}
	methods := []string{http.MethodOptions}
	for i := range rt.calls {
		c := &rt.calls[i]
		c.path = rt.path
		if c.cache = noStore; c.params&readParams == readParams {
			c.cache = noCache // of keys: ask each time, and a 304 will do
		}
		methods = append(methods, c.method)
		if c.method == http.MethodGet {
			methods = append(methods, http.MethodHead)
		}
	}
	slices.Sort(methods)
	rt.allow = []string{strings.Join(methods, ", ")}
	return &rt
}

// match says whether the route is for an escaped path, and what stands for the
// variable there.
func (rt *route) match(path string) (variable string, ok bool) {
	if rt.prefix == "" {
		return "", path == rt.path
	}
	rest, ok := strings.CutPrefix(path, rt.prefix)
	if !ok {
		return "", false
	}
	rest, ok = strings.CutSuffix(rest, rt.suffix)
	return rest, ok && rest != "" && (rt.whole || !strings.Contains(rest, "/"))
}

// Call returns the call of a method, or nil.
func (rt *route) Call(method string) *call {
	if method == http.MethodHead {
		method = http.MethodGet
	}
	for i := range rt.calls {
		if rt.calls[i].method == method {
			return &rt.calls[i]
		}
	}
	return nil
}

// route finds the call that a request is for and serves it.
func (h *httpAPI) route(w *recorder, r *http.Request) error {
	path, query, err := splitTarget(r.RequestURI)
	if err != nil {
		return err
	}
	rt, variable := keyRoute, path[1:]
	switch {
	case path == "*":
		return serverOptions(w, r)
	case path == "/":
		rt = rootRoute
	case isReserved(path):
		if rt, variable = FindReserved(path); rt == nil {
			return noCall(path)
		}
	}
	name, err := rt.parse(variable)
	if err != nil {
		return err
	}
	c := rt.Call(r.Method)
	if c == nil {
		return otherMethod(w, r, rt.allow)
	}
	h.called(w, c)
	if err := admitKept(w, r, c); err != nil {
		return err
	}
	if c.method == http.MethodGet {
		w.Header()["Cache-Control"] = c.cache
	}
	if c.endless && !r.ProtoAtLeast(1, 1) {
		return fault.ErrVersion
	}
	if err := refuseUpgrade(r.Header); err != nil {
		return err
	}
	p, err := h.params(query, c.params)
	if err != nil {
		return err
	}
	if c.method != http.MethodGet {
		if err := refuseHeaders(r.Header, c.headers); err != nil {
			return err
		}
	}
	return c.serve(h, w, request{Request: r, route: rt, name: name, params: p})
}

func FindReserved(path string) (rt *route, variable string) {
	for _, rt := range reservedRoutes {
		if variable, ok := rt.match(path); ok {
			return rt, variable
		}
	}
	return nil, ""
}

// parse unescapes what stands for the variable of the path.
func (rt *route) parse(variable string) (string, error) {
	if rt.prefix == "" {
		return "", nil
	}
	return parseKey(variable)
}

// otherMethod answers OPTIONS, and refuses every method that was not handled.
func otherMethod(w http.ResponseWriter, r *http.Request, allow []string) error {
	w.Header()["Allow"] = allow
	if r.Method != http.MethodOptions {
		return fault.ErrMethod.WithDetail("%s is not allowed here; allowed: %s", r.Method, allow[0])
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// serverOptions answers OPTIONS *, the one use of that target.
func serverOptions(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodOptions {
		return errTarget
	}
	return otherMethod(w, r, allowAny)
}

// allowAny is what some path allows.
var allowAny = []string{"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"}
