package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"
)

// This file is the HTTP front: it turns requests into commands and reads, and
// results and errors into responses. It knows the node only as a backend.
//
// Keys live at the root, so every path is a key except those whose first
// segment is exactly "-". There is no mux, which would clean paths and
// redirect, and no middleware: ServeHTTP is on the hot path of every write.

// Limits of the HTTP front.
const (
	headerTimeout  = 5 * time.Second  // to send a request's header
	bodyTimeout    = 30 * time.Second // to send a whole request
	idleTimeout    = 60 * time.Second // between two requests of a connection
	timeoutMax     = 60 * time.Second // what ?timeout= may ask for
	readyTimeout   = time.Second      // for the read that /-/readyz makes
	headerSizeMax  = 32 << 10         // bytes; room for a key with every byte escaped
	peerURLSizeMax = 2 << 10          // bytes

	// writeTimeout cuts off a client that does not read its response. It starts
	// with the request, so it covers the slowest body, the longest wait and as
	// much again. A call that streams must lift it for its response.
	writeTimeout = 2 * (bodyTimeout + timeoutMax)
)

// Memory for request bodies grows as they arrive: an announced length is only
// a promise of the client.
const (
	bodyChunkSize = 16 << 10
	bodyAllocMax  = 64 << 10 // the most that is allocated on the word of Content-Length
)

// backend is what the HTTP front needs of a node. Errors are *apiError or wrap
// one; of any other error the client learns only that it happened.
type backend interface {
	// propose waits until the command is durable on a quorum and applied here,
	// at most timeout. ctx ends the wait early when the client is gone.
	propose(ctx context.Context, timeout time.Duration, c command) (result, error)
	// linearize returns once this node has applied every write that was
	// acknowledged before the call.
	linearize(ctx context.Context, timeout time.Duration) error
	// status must not wait: it is asked for while the node is in trouble.
	status() nodeStatus
	// addMember waits until the configuration change is applied.
	addMember(ctx context.Context, timeout time.Duration, m member) error
}

// nodeStatus is one node's view of itself and the cluster.
type nodeStatus struct {
	ID              uint64   `json:"id"`
	ClusterID       string   `json:"clusterId"` // hexadecimal
	LeaderID        uint64   `json:"leaderId"`  // 0 if not known
	Role            string   `json:"role"`      // leader, follower, candidate, pre-candidate or learner
	Term            uint64   `json:"term"`
	CommittedIndex  uint64   `json:"committedIndex"`
	AppliedIndex    uint64   `json:"appliedIndex"`
	ResourceVersion uint64   `json:"resourceVersion"`
	Version         string   `json:"version"`
	Members         []member `json:"members"`
}

// httpConfig is what the HTTP front is built from. All of it is needed.
type httpConfig struct {
	id           uint64 // of this node; the first part of a key that it makes up
	store        *kvstore
	backend      backend
	logger       *zap.Logger
	timeout      time.Duration // of a request that does not say
	valueSizeMax int           // bytes
	version      string        // of the program
	newID        func() string // the second part of a key that this node makes up
}

// newUUID returns a version 7 UUID: keys made from it sort by time.
func newUUID() string {
	return uuid.Must(uuid.NewV7()).String() // fails only without a random source
}

// Errors of this front with their own advice.
var (
	errTarget  = errInvalid.withDetail("the request target must be a path; a key is written /key")
	errNoKey   = errNotFound.withDetail("the key has no value")
	errNoCall  = errNotFound.withDetail("paths under /-/ are reserved and there is no such call; the key is written with %%2D for the first -")
	errPeerURL = errInvalid.withDetail("the body must be the peer URL of the new member, such as http://10.0.0.4:12379, with a port and no path")
)

type httpAPI struct {
	httpConfig
}

func newHTTPAPI(cfg httpConfig) http.Handler {
	return &httpAPI{cfg}
}

// newHTTPServer returns a server with the limits of this file. The caller
// serves and closes it.
func newHTTPServer(handler http.Handler, logger *zap.Logger) *http.Server {
	return &http.Server{
		Handler:                      handler,
		ReadHeaderTimeout:            headerTimeout,
		ReadTimeout:                  bodyTimeout,
		WriteTimeout:                 writeTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               headerSizeMax,
		ErrorLog:                     log.New(serverLog{logger}, "", 0),
		DisableGeneralOptionsHandler: true, // OPTIONS * is ours, too
	}
}

// serverLog takes what net/http logs: accept errors and panics are news,
// clients that fail a TLS handshake are not.
type serverLog struct {
	logger *zap.Logger
}

func (l serverLog) Write(p []byte) (int, error) {
	message := zap.ByteString("message", bytes.TrimSpace(p))
	if bytes.HasPrefix(p, []byte("http: TLS handshake error")) {
		l.logger.Debug("http server", message)
	} else {
		l.logger.Warn("http server", message)
	}
	return len(p), nil
}

func (h *httpAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.TransferEncoding != nil {
		// If the request had a Content-Length as well, a proxy may have believed
		// that one, and what follows the body could be a request that it never
		// saw. net/http hides the second header, so end here after every one.
		w.Header()["Connection"] = closeAfter
	}
	if err := h.route(w, r); err != nil {
		h.writeError(w, r, err)
	}
}

// What each kind of path allows.
const (
	allowAny  = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
	allowRoot = "GET, HEAD, OPTIONS, PATCH, POST"
	allowKey  = "DELETE, GET, HEAD, OPTIONS, POST, PUT"
	allowRead = "GET, HEAD, OPTIONS"
)

func (h *httpAPI) route(w http.ResponseWriter, r *http.Request) error {
	path, query, err := splitTarget(r.RequestURI)
	switch {
	case err != nil:
		return err
	case path == "*":
		return serverOptions(w, r)
	case path == "/":
		return h.serveRoot(w, r, query)
	case isReserved(path):
		return h.serveReserved(w, r, path, query)
	}
	key, err := parseKey(path)
	if err != nil {
		return err
	}
	return h.serveKey(w, r, key, query)
}

func (h *httpAPI) serveKey(w http.ResponseWriter, r *http.Request, key, query string) error {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		return h.getKey(w, r, key, query)
	case http.MethodPut:
		return h.putKey(w, r, key, query)
	case http.MethodDelete:
		return h.deleteKey(w, r, key, query)
	case http.MethodPost:
		return h.addMember(w, r, key, query)
	}
	return otherMethod(w, r, allowKey)
}

func (h *httpAPI) serveRoot(w http.ResponseWriter, r *http.Request, query string) error {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		return h.getVersion(w, r, query)
	case http.MethodPost:
		return h.postValue(w, r, query)
	case http.MethodPatch:
		return h.patchObject(w, r, query)
	}
	return otherMethod(w, r, allowRoot)
}

func (h *httpAPI) serveReserved(w http.ResponseWriter, r *http.Request, path, query string) error {
	var get func(http.ResponseWriter, *http.Request) error
	switch path {
	case "/-/v1/status":
		get = h.getStatus
	case "/-/livez":
		get = h.getLive
	case "/-/readyz":
		get = h.getReady
	case "/-/version":
		get = h.getProgram
	default:
		return errNoCall
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return otherMethod(w, r, allowRead)
	}
	if _, err := h.params(query, 0); err != nil {
		return err
	}
	return get(w, r)
}

// otherMethod answers OPTIONS, and refuses every method that was not handled.
func otherMethod(w http.ResponseWriter, r *http.Request, allow string) error {
	w.Header()["Allow"] = []string{allow}
	if r.Method != http.MethodOptions {
		return errMethod.withDetail("%s is not allowed here; allowed: %s", r.Method, allow)
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

// Keys.

func (h *httpAPI) getKey(w http.ResponseWriter, r *http.Request, key, query string) error {
	p, err := h.params(query, paramTimeout|paramResourceVersion)
	if err != nil {
		return err
	}
	if err := h.catchUp(r.Context(), p); err != nil {
		return err
	}
	it, rv, ok := h.store.get(key)
	if !ok {
		setResourceVersion(w.Header(), rv)
		return errNoKey
	}
	setItemHeaders(w.Header(), it, rv)
	if r.Method != http.MethodHead {
		_, _ = io.WriteString(w, it.value) // fails if the client is gone
	}
	return nil
}

func (h *httpAPI) putKey(w http.ResponseWriter, r *http.Request, key, query string) error {
	p, err := h.writeParams(r, query)
	if err != nil {
		return err
	}
	value, err := readBody(r, h.valueSizeMax)
	if err != nil {
		return err
	}
	res, err := h.backend.propose(r.Context(), p.timeout, command{op: opPut, key: key, value: value})
	if err != nil {
		return err
	}
	code := http.StatusNoContent
	if res.status == statusCreated {
		code = http.StatusCreated
	}
	setWriteHeaders(w.Header(), res.rv)
	w.WriteHeader(code)
	return nil
}

func (h *httpAPI) deleteKey(w http.ResponseWriter, r *http.Request, key, query string) error {
	p, err := h.writeParams(r, query)
	if err != nil {
		return err
	}
	res, err := h.backend.propose(r.Context(), p.timeout, command{op: opDelete, key: key})
	if err != nil {
		return err
	}
	setResourceVersion(w.Header(), res.rv)
	if res.status == statusNotFound {
		return errNoKey
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// The root.

// getVersion answers the resource version of the store.
func (h *httpAPI) getVersion(w http.ResponseWriter, r *http.Request, query string) error {
	p, err := h.params(query, paramTimeout|paramResourceVersion)
	if err != nil {
		return err
	}
	if err := h.catchUp(r.Context(), p); err != nil {
		return err
	}
	rv := h.store.version()
	setResourceVersion(w.Header(), rv)
	writeText(w, r, strconv.FormatUint(rv, 10)+"\n")
	return nil
}

// postValue stores the body under a new key.
func (h *httpAPI) postValue(w http.ResponseWriter, r *http.Request, query string) error {
	p, err := h.writeParams(r, query)
	if err != nil {
		return err
	}
	value, err := readBody(r, h.valueSizeMax)
	if err != nil {
		return err
	}
	return h.create(w, r, p, value, http.StatusCreated)
}

// patchObject allots a resource version to a JSON object. It is the call that
// raftrv had; the object is stored like any value.
func (h *httpAPI) patchObject(w http.ResponseWriter, r *http.Request, query string) error {
	p, err := h.writeParams(r, query)
	if err != nil {
		return err
	}
	value, err := readBody(r, h.valueSizeMax)
	if err != nil {
		return err
	}
	if !json.Valid([]byte(value)) {
		return errInvalid.withDetail("the body is not JSON; PUT and POST take any bytes")
	}
	return h.create(w, r, p, value, http.StatusNoContent)
}

// create puts the value under a key that nobody else can have chosen.
func (h *httpAPI) create(w http.ResponseWriter, r *http.Request, p params, value string, code int) error {
	key := strconv.FormatUint(h.id, 10) + "-" + h.newID()
	res, err := h.backend.propose(r.Context(), p.timeout, command{op: opPut, key: key, value: value})
	if err != nil {
		return err
	}
	w.Header()["Location"] = []string{keyPath(key)}
	setWriteHeaders(w.Header(), res.rv)
	w.WriteHeader(code)
	return nil
}

// Members.

// addMember is the call that raftexample had: POST /{id} with the peer URL as
// the body.
func (h *httpAPI) addMember(w http.ResponseWriter, r *http.Request, key, query string) error {
	id, err := parseMemberID(key)
	if err != nil {
		return err
	}
	p, err := h.writeParams(r, query)
	if err != nil {
		return err
	}
	body, err := readBody(r, peerURLSizeMax)
	if err != nil {
		return err
	}
	peerURL, err := parsePeerURL(body)
	if err != nil {
		return err
	}
	if err := h.backend.addMember(r.Context(), p.timeout, member{ID: id, PeerURL: peerURL}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// parseMemberID accepts one spelling of each id.
func parseMemberID(s string) (uint64, error) {
	id, err := strconv.ParseUint(s, 10, 64)
	if err != nil || s[0] == '0' {
		return 0, errInvalid.withDetail("POST /{id} adds a member, so the id must be a positive decimal number; POST / stores a value under a new key")
	}
	return id, nil
}

// parsePeerURL accepts scheme://host:port and nothing else, because this node
// and all others will connect to it.
func parsePeerURL(s string) (string, error) {
	s = strings.TrimSpace(s)
	u, err := url.Parse(s)
	if err != nil {
		return "", errPeerURL
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || s != u.Scheme+"://"+u.Host {
		return "", errPeerURL
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); err != nil || port == 0 {
		return "", errPeerURL
	}
	return s, nil
}

// The node.

func (h *httpAPI) getStatus(w http.ResponseWriter, r *http.Request) error {
	return writeJSON(w, r, h.backend.status())
}

// getLive says that this process answers, whatever the cluster does.
func (h *httpAPI) getLive(w http.ResponseWriter, r *http.Request) error {
	writeText(w, r, "ok\n")
	return nil
}

// getReady says that this node can serve, by serving a read.
func (h *httpAPI) getReady(w http.ResponseWriter, r *http.Request) error {
	if err := h.backend.linearize(r.Context(), readyTimeout); err != nil {
		return errNotReady
	}
	writeText(w, r, "ok\n")
	return nil
}

func (h *httpAPI) getProgram(w http.ResponseWriter, r *http.Request) error {
	return writeJSON(w, r, struct {
		Version   string `json:"version"`
		GoVersion string `json:"goVersion"`
	}{h.version, runtime.Version()})
}

// Requests: the target.

// splitTarget splits a request target (RFC 9112, section 3.2) into its path and
// query, both still escaped. It works on the raw target because net/http's URL
// forgets the spelling of some paths, and the spelling decides what is
// reserved: its EscapedPath of `/%2D/a"b` is `/-/a%22b`.
func splitTarget(target string) (path, query string, err error) {
	path, query, _ = strings.Cut(target, "?")
	if strings.HasPrefix(path, "/") || path == "*" {
		return path, query, nil
	}
	// The absolute form, which clients send to proxies.
	scheme, rest, ok := strings.Cut(path, "://")
	if !ok || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
		return "", "", errTarget
	}
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		return rest[i:], query, nil
	}
	return "/", query, nil
}

// isReserved says whether a path is one of ours. It looks at the spelling, so
// every key is reachable: the key "-/x" is written /%2D/x.
func isReserved(path string) bool {
	return path == "/-" || strings.HasPrefix(path, "/-/")
}

// parseKey returns the key that an escaped path names. Nothing is cleaned: any
// byte and any number of slashes and dots may be part of it.
func parseKey(path string) (string, error) {
	key, err := url.PathUnescape(path[1:])
	if err != nil {
		return "", errInvalid.withDetail("the path has a malformed escape; write %% as %%25")
	}
	if len(key) == 0 || len(key) > keySizeMax {
		return "", errInvalid.withDetail("the key has %d bytes; it must have 1 to %d", len(key), keySizeMax)
	}
	return key, nil
}

// keyPath returns a path that names the key.
func keyPath(key string) string {
	if key == "-" {
		return "/%2D"
	}
	return "/" + url.PathEscape(key) // escapes slashes, too: nothing else can become reserved
}

// Requests: parameters.

// params are the query parameters of a call.
type params struct {
	timeout         time.Duration
	resourceVersion uint64
	seen            paramSet
}

// paramSet is a set of parameters.
type paramSet uint

const (
	paramTimeout paramSet = 1 << iota
	paramResourceVersion
)

// paramNames has the name of bit i at i.
var paramNames = [...]string{"timeout", "resourceVersion"}

// paramNamed returns the parameter of a name, or the empty set.
func paramNamed(name string) paramSet {
	for i, n := range paramNames {
		if n == name {
			return 1 << i
		}
	}
	return 0
}

func (s paramSet) String() string {
	var names []string
	for i, n := range paramNames {
		if s&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// params parses a query. An unknown parameter is an error, so that a misspelt
// condition or deadline does not pass for none.
func (h *httpAPI) params(query string, allowed paramSet) (params, error) {
	p := params{timeout: h.timeout}
	for query != "" {
		var field string
		if field, query, _ = strings.Cut(query, "&"); field == "" {
			continue
		}
		if err := p.add(field, allowed); err != nil {
			return params{}, err
		}
	}
	return p, nil
}

// add parses one name=value of a query.
func (p *params) add(field string, allowed paramSet) error {
	name, value, _ := strings.Cut(field, "=")
	name, err := url.QueryUnescape(name)
	if err == nil {
		value, err = url.QueryUnescape(value)
	}
	if err != nil {
		return errInvalid.withDetail("the query has a malformed escape; write %% as %%25")
	}
	param := paramNamed(name)
	switch {
	case param&allowed == 0:
		return errInvalid.withDetail("unknown parameter %q; allowed here: %v", name, allowed)
	case param&p.seen != 0:
		return errInvalid.withDetail("parameter %q is given twice", name)
	}
	p.seen |= param
	return p.set(param, value)
}

func (p *params) set(param paramSet, value string) (err error) {
	switch param {
	case paramTimeout:
		p.timeout, err = time.ParseDuration(value)
		if err != nil || p.timeout <= 0 || p.timeout > timeoutMax {
			return errInvalid.withDetail("timeout must be a duration such as 500ms or 5s, more than 0 and at most %v", timeoutMax)
		}
	case paramResourceVersion:
		p.resourceVersion, err = strconv.ParseUint(value, 10, 64)
		if err != nil {
			return errInvalid.withDetail("resourceVersion must be a decimal number; 0 reads whatever this node has")
		}
	}
	return nil
}

// writeParams parses the query of a write and refuses the headers that would
// change what it means.
func (h *httpAPI) writeParams(r *http.Request, query string) (params, error) {
	for _, name := range conditionHeaders {
		if _, ok := r.Header[name]; ok {
			return params{}, errNotImplemented.withDetail("%s is not supported, and a write that ignored it could do harm", name)
		}
	}
	return h.params(query, paramTimeout)
}

// conditionHeaders ask for a write under conditions, in canonical spelling.
var conditionHeaders = [...]string{"If-Match", "If-None-Match", "Idempotency-Key", "Content-Range"}

// catchUp waits until a read from this node's store is as fresh as asked.
func (h *httpAPI) catchUp(ctx context.Context, p params) error {
	atLeast := p.seen&paramResourceVersion != 0
	if atLeast && h.store.version() >= p.resourceVersion {
		return nil
	}
	if err := h.backend.linearize(ctx, p.timeout); err != nil {
		return err
	}
	if atLeast && h.store.version() < p.resourceVersion {
		return errReadTimeout
	}
	return nil
}

// Requests: bodies.

var bodyChunks = sync.Pool{New: func() any { return new([bodyChunkSize]byte) }}

// readBody returns the whole body. A small one, the usual case, costs one
// allocation of its exact size.
func readBody(r *http.Request, sizeMax int) (string, error) {
	if r.ContentLength > int64(sizeMax) {
		return "", tooLarge(sizeMax)
	}
	if r.ContentLength == 0 {
		return "", nil
	}
	chunk := bodyChunks.Get().(*[bodyChunkSize]byte)
	defer bodyChunks.Put(chunk)
	var body strings.Builder
	for {
		n, err := r.Body.Read(chunk[:])
		if body.Len()+n > sizeMax {
			return "", tooLarge(sizeMax)
		}
		if body.Cap()-body.Len() < n {
			announced := int(r.ContentLength) - body.Len()
			body.Grow(max(n, min(announced, bodyAllocMax))) // and doubles what there is
		}
		body.Write(chunk[:n])
		if err == io.EOF {
			return body.String(), nil
		}
		if err != nil {
			return "", bodyError(err)
		}
	}
}

func tooLarge(sizeMax int) error {
	return errTooLarge.withDetail("at most %d bytes are taken", sizeMax)
}

func bodyError(err error) error {
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		return errBodyTimeout
	}
	return errInvalid.withDetail("the body broke off: %v", err)
}

// Responses. Headers are set by assignment, with canonical names: Set would
// canonicalize again and allocate a slice for each. Values that belong together
// share one string and one array.

// Shared header values. Nobody may change them.
var (
	typeBytes   = []string{"application/octet-stream"}
	typeJSON    = []string{"application/json"}
	typeProblem = []string{"application/problem+json"}
	typeText    = []string{"text/plain; charset=utf-8"}
	noSniff     = []string{"nosniff"}
	retryAfter  = []string{"1"} // second
	closeAfter  = []string{"close"}
)

// setItemHeaders sets the header of a read: an item, and the store's resource
// version when it was read.
func setItemHeaders(header http.Header, it item, rv uint64) {
	var buf [64]byte
	b := appendETag(buf[:0], it.rv)
	etagEnd := len(b)
	b = strconv.AppendUint(b, rv, 10)
	rvEnd := len(b)
	b = strconv.AppendInt(b, int64(len(it.value)), 10)
	s := string(b)
	values := [...]string{s[:etagEnd], s[etagEnd:rvEnd], s[rvEnd:]}
	header["Etag"] = values[0:1:1]
	header["Resource-Version"] = values[1:2:2]
	header["Content-Length"] = values[2:3:3]
	header["Content-Type"] = typeBytes
	header["X-Content-Type-Options"] = noSniff // a value may be HTML: browsers must not run it
}

// setWriteHeaders sets the header of a write that got the resource version rv.
func setWriteHeaders(header http.Header, rv uint64) {
	var buf [32]byte
	etag := string(appendETag(buf[:0], rv))
	values := [...]string{etag, etag[1 : len(etag)-1]}
	header["Etag"] = values[0:1:1]
	header["Resource-Version"] = values[1:2:2]
}

func setResourceVersion(header http.Header, rv uint64) {
	header["Resource-Version"] = []string{strconv.FormatUint(rv, 10)}
}

func appendETag(b []byte, rv uint64) []byte {
	b = append(b, '"')
	b = strconv.AppendUint(b, rv, 10)
	return append(b, '"')
}

func writeText(w http.ResponseWriter, r *http.Request, text string) {
	writeBody(w, r, http.StatusOK, typeText, []byte(text))
}

func writeJSON(w http.ResponseWriter, r *http.Request, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode response: %w", err)
	}
	writeBody(w, r, http.StatusOK, typeJSON, append(body, '\n'))
	return nil
}

func writeBody(w http.ResponseWriter, r *http.Request, code int, contentType []string, body []byte) {
	header := w.Header()
	header["Content-Type"] = contentType
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	header["X-Content-Type-Options"] = noSniff
	w.WriteHeader(code)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // fails if the client is gone
	}
}

// problem is the body of an error response (RFC 9457).
type problem struct {
	Type      string  `json:"type"`
	Title     string  `json:"title"`
	Status    int     `json:"status"`
	Detail    string  `json:"detail,omitempty"`
	Code      string  `json:"code"`
	Message   string  `json:"message"` // title and detail in one line
	Outcome   outcome `json:"outcome,omitempty"`
	Retryable bool    `json:"retryable"`
	LeaderID  uint64  `json:"leaderId,omitempty"`
}

func newProblem(e *apiError) problem {
	return problem{
		Type:      "urn:raftrv:error:" + e.code,
		Title:     e.title,
		Status:    e.status,
		Detail:    e.detail,
		Code:      e.code,
		Message:   e.Error(),
		Outcome:   e.outcome,
		Retryable: e.retry,
	}
}

func (p problem) encode() []byte {
	body, err := json.Marshal(p)
	if err != nil {
		panic(err) // strings and numbers
	}
	return append(body, '\n')
}

func (h *httpAPI) writeError(w http.ResponseWriter, r *http.Request, err error) {
	e, ok := errors.AsType[*apiError](err)
	if !ok {
		e = errInternal
		if r.Context().Err() == nil { // otherwise the client is gone, which is no news
			h.logger.Error("request failed", zap.String("method", r.Method), zap.Error(err))
		}
	}
	p := newProblem(e)
	if !isWrite(r.Method) {
		p.Outcome = ""
	}
	if e.status >= http.StatusInternalServerError || e.status == http.StatusConflict {
		p.LeaderID = h.backend.status().LeaderID // whom to ask instead
	}
	setErrorHeaders(w.Header(), e)
	writeBody(w, r, e.status, typeProblem, p.encode())
}

func setErrorHeaders(header http.Header, e *apiError) {
	switch e.status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		header["Retry-After"] = retryAfter
	case http.StatusRequestTimeout, http.StatusRequestEntityTooLarge:
		header["Connection"] = closeAfter // the rest of the body is not waited for
	}
}

func isWrite(method string) bool {
	return method != http.MethodGet && method != http.MethodHead && method != http.MethodOptions
}

// httpRefusal is the response to a connection that the listener has no room
// for. No request was read, so it must suit every one.
func httpRefusal() []byte {
	body := newProblem(errConnections).encode()
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nRetry-After: %s\r\nConnection: close\r\n\r\n%s",
		errConnections.status, http.StatusText(errConnections.status), typeProblem[0], len(body), retryAfter[0], body)
}
