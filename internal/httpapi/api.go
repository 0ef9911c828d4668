package httpapi

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
	"net/netip"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/shares"
	"raftrv/internal/store"
	"raftrv/internal/watch"
)

// This file is the HTTP front: it turns requests into commands and reads, and
// results and errors into responses. It knows the node only as a Store.
//
// Keys live at the root, so every path is a key except those whose first
// segment is exactly "-". There is no mux, which would clean paths and
// redirect, and no middleware: ServeHTTP is on the hot path of every write.

// Limits of the HTTP front.
const (
	HeaderTimeout  = 5 * time.Second  // to send a request's header
	BodyTimeout    = 30 * time.Second // to send a whole request
	IdleTimeout    = 60 * time.Second // between two requests of a connection
	readyTimeout   = time.Second      // for the read that /-/readyz makes
	HeaderSizeMax  = 32 << 10         // bytes; room for a key with every byte escaped
	peerURLSizeMax = 2 << 10          // bytes

	// writeTimeout cuts off a client that does not read its response. It starts
	// with the request, so it covers the slowest body, the longest wait and as
	// much again. A call that streams must lift it for its response.
	writeTimeout = 2 * (BodyTimeout + TimeoutMax)
	// keptWriteTimeout is what takes its place on a kept place, see conn.kept.
	keptWriteTimeout = TimeoutMax + 10*time.Second
)

// Memory for request bodies grows as they arrive: an announced length is only
// a promise of the client.
const (
	BodyAllocMin = 4 << 10 // is allocated on the word of Content-Length; then four times what has come

	// BodiesSizeMax bounds the memory for all bodies that are being read, or wait for
	// their write. Those of at most bodyFree do not count: the number of connections
	// bounds them.
	BodiesSizeMax = 128 << 20
	bodyFree      = 16 << 10
)

// Store is the replicated store of a node, and all that the front asks of it.
// Errors are *fault.Error or wrap one; of any other error the client learns only
// that it happened.
type Store interface {
	// Fresh returns once what this node has is as new as r asks for. The reads below
	// do so first.
	Fresh(ctx context.Context, r Read) error
	// Get returns an item, if the key has one, and the store's resource version.
	Get(ctx context.Context, r Read, key string) (it store.Item, rv uint64, ok bool, err error)
	// List returns the first items with a prefix whose keys come after a key, all
	// from version rv.
	List(ctx context.Context, r Read, prefix, after string, limit int) (items []store.KeyItem, rv uint64, err error)
	// Scan returns any number of them. The caller closes it.
	Scan(ctx context.Context, r Read, prefix, after string) (*store.Scan, error)
	// Backup returns all there is, at one version. The caller closes it.
	Backup(ctx context.Context, r Read) (*store.Backup, error)
	// Watch begins after version *from, or if that is nil, after every write that was
	// acknowledged; rv is where it begins. fault.ErrExpired means that the events
	// after *from are not known here any more. The caller closes the watcher.
	Watch(ctx context.Context, timeout time.Duration, key string, isPrefix bool, from *uint64) (w *watch.Watcher, rv uint64, err error)
	// Apply waits until the commands are durable on a quorum and applied here, at most
	// timeout, and returns what each came to. An error is about all of them: with
	// fault.NotApplied none was applied. ctx ends the wait early when the client is gone.
	Apply(ctx context.Context, timeout time.Duration, commands ...store.Command) ([]store.Result, error)

	// What follows does not wait: some of it is asked for while the node is in trouble.

	Version() uint64
	// Unchanged says whether the items with a prefix after a key are known to be the
	// same at two versions.
	Unchanged(prefix, after string, from, to uint64) bool
	Level() int // feature level of the cluster
	Rules() *store.Rules
	Members() []store.Member
	// Writable says why the node takes no writes but deletes.
	Writable() error
	Status() NodeStatus

	// AddMember adds a learner, which becomes a voter by itself when it has
	// caught up if Promote is set.
	AddMember(ctx context.Context, timeout time.Duration, m store.Member) error
	RemoveMember(ctx context.Context, timeout time.Duration, id uint64) error
	PromoteMember(ctx context.Context, timeout time.Duration, id uint64) error
	// UpdateMember changes the fields that are set.
	UpdateMember(ctx context.Context, timeout time.Duration, m store.Member) error
	// TransferLeader hands leadership to a member, wherever it is.
	TransferLeader(ctx context.Context, timeout time.Duration, id uint64) error
}

// Read says how new what is read must be.
type Read struct {
	Timeout time.Duration // of waiting for it
	// Local reads what this node has, which is at least of Version. Otherwise the read
	// is linearizable: it sees every write that was acknowledged before.
	Local   bool
	Version uint64
}

// NodeStatus is one node's view of itself and the cluster.
type NodeStatus struct {
	ID              uint64   `json:"id"`
	ClusterID       string   `json:"clusterId"` // hexadecimal
	LeaderID        uint64   `json:"leaderId"`  // 0 if not known
	Role            string   `json:"role"`      // leader, follower, candidate, pre-candidate or learner
	Term            uint64   `json:"term"`
	CommittedIndex  uint64   `json:"committedIndex"`
	AppliedIndex    uint64   `json:"appliedIndex"`
	ResourceVersion uint64   `json:"resourceVersion"`
	Version         string   `json:"version"`
	FeatureLevel    int      `json:"featureLevel"` // of the cluster
	Members         []Member `json:"members"`

	StateBytes       uint64 `json:"stateBytes"` // that the keys and values take, about
	StateSum         string `json:"stateSum"`   // of all entries up to appliedIndex; hexadecimal
	QuotaBytes       uint64 `json:"quotaBytes"` // 0 if there is none
	DiskFreeBytes    uint64 `json:"diskFreeBytes"`
	DiskReserveBytes uint64 `json:"diskReserveBytes"`
	// ReadOnly is the code of the error that a write gets at present.
	ReadOnly string `json:"readOnly,omitempty"` // disk-full, quota-exceeded, diverged or unchecked
	// Divergence is unchecked, sound, doubtful or diverged; but for sound the node serves nothing.
	Divergence string `json:"divergence"`
}

// Config is what the HTTP front is built from. All of it is needed.
type Config struct {
	ID           uint64 // of this node; the first part of a key that it makes up
	Cluster      string // as in the status
	Store        Store
	Logger       *zap.Logger
	Timeout      time.Duration // of a request that does not say
	Bookmark     time.Duration // at most between two bookmarks of a watch
	ValueSizeMax int           // bytes
	Version      string        // of the program
	NewID        func() string // the second part of a key that this node makes up
	Hosts        []string      // names that this node answers to, beside those of the members' client URLs
	Client       *http.Client  // to ask other members
	Origins      []string      // of web pages that may read and write; see checkOrigin
	OneAddress   bool          // all clients may come from one address, as behind a proxy: it may take everything

	Registry  *prometheus.Registry // of the node's metrics; the front adds its own
	Checks    []Check              // of readiness
	Level     zap.AtomicLevel      // of the log
	AccessLog bool                 // log every request
	Profiles  bool                 // serve /-/debug/pprof/
}

// NewUUID returns a version 7 UUID: keys made from it sort by time.
func NewUUID() string {
	return uuid.Must(uuid.NewV7()).String() // fails only without a random source
}

// Errors of this front with their own advice.
var (
	errTarget  = fault.ErrInvalid.WithDetail("the request target must be a path; a key is written /key")
	errNoKey   = fault.ErrNotFound.WithDetail("the key has no value")
	errNoCall  = fault.ErrNotFound.WithDetail("paths under /-/ are reserved and there is no such call; the key is written with %%2D for the first -")
	errPeerURL = fault.ErrInvalid.WithDetail("the body must be the peer URL of the new member, such as http://10.0.0.4:12379, with a port and no path, and a host that others can reach")
)

type httpAPI struct {
	Config
	browsers   *browsers
	metrics    *httpMetrics
	exposition http.Handler  // of all metrics
	scrapes    shares.Shares // of the metrics, under way
	bodies     shares.Shares // bytes of large ones
	lists      shares.Shares // that are read, and streams
	backups    shares.Shares
}

func New(cfg Config) http.Handler {
	h := &httpAPI{Config: cfg, browsers: newBrowsers(cfg.Store.Members, cfg.Hosts, cfg.Origins), metrics: NewHTTPMetrics(), exposition: newExposition(cfg)}
	h.scrapes = cfg.share(metricsInFlight)
	h.bodies, h.lists, h.backups = cfg.share(BodiesSizeMax), cfg.share(listsMax), cfg.share(backupsMax)
	cfg.Registry.MustRegister(h.metrics)
	return h
}

// share divides what there is for all clients.
func (cfg *Config) share(all int64) shares.Shares {
	if cfg.OneAddress {
		return shares.New(all, all)
	}
	return shares.New(all, shares.MostOf(all))
}

// NewServer returns a server with the limits of this file. The caller
// serves and closes it.
func NewServer(handler http.Handler, logger *zap.Logger) *http.Server {
	return &http.Server{
		Handler:                      handler,
		ReadHeaderTimeout:            HeaderTimeout,
		ReadTimeout:                  BodyTimeout,
		WriteTimeout:                 writeTimeout,
		IdleTimeout:                  IdleTimeout,
		MaxHeaderBytes:               HeaderSizeMax,
		ErrorLog:                     log.New(serverLog{logger}, "", 0),
		DisableGeneralOptionsHandler: true, // OPTIONS * is ours, too
		ConnState:                    watchAnswers,
		ConnContext:                  withKeptPlace,
	}
}

// rewriter is a connection that lets somebody see what is written next, once, and
// say what to write instead.
type rewriter interface {
	RewriteNext(func([]byte) []byte)
}

// Placeholder is a connection that may have one of the places that are kept for
// calls that look after the node; see admitKept.
type Placeholder interface {
	net.Conn
	IsKept() bool
	// deserve says that the connection has had such a request, so it may stay until
	// that is answered.
	Deserve() error
}

// KeptPlace is where the context of a request has its connection, if that has a
// place that is kept.
type KeptPlace struct{}

func withKeptPlace(ctx context.Context, c net.Conn) context.Context {
	if c, ok := c.(Placeholder); ok && c.IsKept() {
		return context.WithValue(ctx, KeptPlace{}, c)
	}
	return ctx
}

// admitKept looks at a request that came on a kept place. That is only for calls
// that look after the node, and for one of them.
func admitKept(w http.ResponseWriter, r *http.Request, c *call) error {
	place, ok := r.Context().Value(KeptPlace{}).(Placeholder)
	if !ok {
		return nil
	}
	w.Header()["Connection"] = closeAfter
	if !c.kept {
		return fault.ErrConnections
	}
	return errors.Join(place.Deserve(), place.SetWriteDeadline(time.Now().Add(keptWriteTimeout)))
}

// watchAnswers looks at the beginning of each answer: net/http makes some by
// itself.
func watchAnswers(c net.Conn, state http.ConnState) {
	if c, ok := c.(rewriter); ok && (state == http.StateActive || state == http.StateIdle) {
		c.RewriteNext(withBrowserHeader)
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
	setBrowserHeader(w.Header())
	rec := newRecorder(w)
	defer h.answered(rec, r)
	done, err := h.browsers.admit(rec, r)
	if !done && err == nil {
		err = h.route(rec, r)
	}
	if err != nil {
		h.writeError(rec, r, err)
		if r.Context().Err() != nil {
			rec.status = statusClientGone
		}
	}
}

// Keys.

func (h *httpAPI) getKey(w http.ResponseWriter, r request) error {
	it, rv, err := h.read(w, r)
	if err != nil {
		return err
	}
	if isUnchanged(r, it) {
		writeNotModified(w, it, rv)
		return nil
	}
	setItemHeaders(w.Header(), it, rv)
	if r.Method != http.MethodHead {
		_, _ = io.WriteString(w, it.Value) // fails if the client is gone
	}
	return nil
}

// read returns the item that a request names, and the store's resource version.
func (h *httpAPI) read(w http.ResponseWriter, r request) (store.Item, uint64, error) {
	it, rv, ok, err := h.Store.Get(r.Context(), r.freshness(), r.name)
	if err != nil {
		return store.Item{}, 0, err
	}
	if !ok {
		setResourceVersion(w.Header(), rv)
		return store.Item{}, 0, noKey(r.name)
	}
	if match, ok := r.Header["If-Match"]; ok && !anyTagMatches(match, it.RV, false) {
		setResourceVersion(w.Header(), rv)
		return store.Item{}, 0, preconditionFailed(it.RV)
	}
	return it, rv, nil
}

// noKey is the answer where a key has no value. Many a key that is asked for was
// meant as a call, as other programs spell it.
func noKey(key string) error {
	first, _, _ := strings.Cut(key, "/")
	call := ""
	switch {
	case key == "v1/snapshot":
		call = "/-/v1/backup"
	case first == "v1":
		call = "/-/" + key
	case strings.HasPrefix(key, "v2/keys"):
		call = "/-/v1/keys" + strings.TrimPrefix(key, "v2/keys")
	case strings.HasPrefix(first, "health") || first == "livez":
		call = "/-/livez or /-/readyz"
	case key == "metrics" || key == "readyz" || key == "version" || key == "openapi.json" || strings.HasPrefix(key, "debug/pprof"):
		call = "/-/" + key
	default:
		return errNoKey
	}
	return fault.ErrNotFound.WithDetail("the key has no value; the call is %s", call)
}

// noCall is the answer where a reserved path is no call. This one was a call once.
func noCall(path string) error {
	if path == "/-/v1/snapshot" {
		return fault.ErrNotFound.WithDetail("there is no such call; a backup is at /-/v1/backup")
	}
	return errNoCall
}

// isUnchanged says whether the client has this version already.
func isUnchanged(r request, it store.Item) bool {
	tags, ok := r.Header["If-None-Match"]
	return ok && anyTagMatches(tags, it.RV, true)
}

func (h *httpAPI) putKey(w http.ResponseWriter, r request) error {
	value, err := h.readBody(w, r.Request, h.ValueSizeMax)
	if err != nil {
		return err
	}
	c := store.Command{Op: store.OpPut, Key: r.name, Value: value}
	if err := h.describe(&c, r); err != nil {
		return err
	}
	if c.Condition, err = parseCondition(r.Header); err != nil {
		return err
	}
	res, err := h.propose(w, r, c, value)
	if err != nil {
		return err
	}
	code := http.StatusNoContent
	if res.Status == store.StatusCreated {
		code = http.StatusCreated
	}
	setWriteHeaders(w.Header(), res.RV)
	w.WriteHeader(code)
	return nil
}

// describe makes a put say what a request says of its value.
func (h *httpAPI) describe(c *store.Command, r request) error {
	contentType, err := parseContentType(r.Header)
	if err != nil {
		return err
	}
	level := h.Store.Level()
	c.SetTTL(r.params.ttl, level)
	setContentType(c, contentType, level)
	return nil
}

func (h *httpAPI) deleteKey(w http.ResponseWriter, r request) error {
	c := store.Command{Op: store.OpDelete, Key: r.name}
	var err error
	if c.Condition, err = parseCondition(r.Header); err != nil {
		return err
	}
	res, err := h.propose(w, r, c, "")
	if err != nil {
		return err
	}
	setResourceVersion(w.Header(), res.RV)
	if res.Status == store.StatusNotFound {
		return noKey(r.name)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// propose carries out the command of a request with this body, once if the
// request has an Idempotency-Key. What the state machine refused is an error.
func (h *httpAPI) propose(w http.ResponseWriter, r request, c store.Command, body string) (res store.Result, err error) {
	if c.Retry, err = r.retryID(&c, body); err != nil {
		return store.Result{}, err
	}
	if c.Retry.Key != "" && h.Store.Level() >= 3 {
		c.Retry.Client = clientOf(r.Request)
	}
	results, err := h.Store.Apply(r.Context(), r.params.timeout, c)
	if err != nil {
		if e, ok := errors.AsType[*fault.Error](err); ok && c.Retry.Key != "" && e.Code == fault.ErrUnknown.Code && e.Outcome == fault.Unknown {
			err = fault.ErrUnknownRetry
		}
		return store.Result{}, err
	}
	res = results[0]
	if res.Replayed {
		w.Header()["Idempotency-Replayed"] = replayed
	}
	switch {
	case res.Status == store.StatusPrecondition && res.Current == 0 && c.Op == store.OpDelete && c.Condition.Kind != store.IfAbsent:
		res.Status = store.StatusNotFound // as without the condition, which then does not count (RFC 9110, section 13.2.1)
	case res.Status == store.StatusPrecondition:
		setResourceVersion(w.Header(), res.RV)
		if res.Replayed {
			return store.Result{}, preconditionFailedThen(res.Current)
		}
		return store.Result{}, preconditionFailed(res.Current)
	case res.Status == store.StatusRetryOther:
		return store.Result{}, fault.ErrRetryOther
	}
	return res, nil
}

// preconditionFailed is the answer to a condition that does not hold of a key at
// this version; 0 = it does not exist.
func preconditionFailed(current uint64) error {
	e := fault.ErrPrecondition.WithDetail("the key does not exist")
	if current != 0 {
		e = fault.ErrPrecondition.WithDetail("the key exists at resource version %d", current)
	}
	e.Current = current
	return e
}

// preconditionFailedThen is what a retry of a request that got preconditionFailed
// is told. What the key is like by now is not said.
func preconditionFailedThen(current uint64) error {
	if current == 0 {
		return fault.ErrPrecondition.WithDetail("the key did not exist when this request was carried out; a new attempt needs a new Idempotency-Key")
	}
	return fault.ErrPrecondition.WithDetail("the key existed at resource version %d when this request was carried out; a new attempt needs a new Idempotency-Key", current)
}

// The root.

// getVersion answers the resource version of the store.
func (h *httpAPI) getVersion(w http.ResponseWriter, r request) error {
	if err := h.Store.Fresh(r.Context(), r.freshness()); err != nil {
		return err
	}
	rv := h.Store.Version()
	setResourceVersion(w.Header(), rv)
	writeText(w, r, strconv.FormatUint(rv, 10)+"\n")
	return nil
}

// postValue stores the body under a new key.
func (h *httpAPI) postValue(w http.ResponseWriter, r request) error {
	value, err := h.readBody(w, r.Request, h.ValueSizeMax)
	if err != nil {
		return err
	}
	return h.create(w, r, value, http.StatusCreated)
}

// patchObject allots a resource version to a JSON object. It is the call that
// raftrv had; the object is stored like any value.
func (h *httpAPI) patchObject(w http.ResponseWriter, r request) error {
	value, err := h.readBody(w, r.Request, h.ValueSizeMax)
	if err != nil {
		return err
	}
	if !json.Valid([]byte(value)) {
		return fault.ErrInvalid.WithDetail("the body is not JSON; PUT and POST take any bytes")
	}
	return h.create(w, r, value, http.StatusNoContent)
}

// create puts the value under a key that nobody else can have chosen.
func (h *httpAPI) create(w http.ResponseWriter, r request, value string, code int) error {
	key := strconv.FormatUint(h.ID, 10) + "-" + h.NewID()
	c := store.Command{Op: store.OpPut, Key: key, Value: value}
	if err := h.describe(&c, r); err != nil {
		return err
	}
	res, err := h.propose(w, r, c, value)
	if err != nil {
		return err
	}
	w.Header()["Location"] = []string{KeyPath(res.Key)} // a retry gets the key of the first
	setWriteHeaders(w.Header(), res.RV)
	w.WriteHeader(code)
	return nil
}

// Members.

// ParseMemberID accepts one spelling of each id.
func ParseMemberID(s string) (uint64, error) {
	id, err := strconv.ParseUint(s, 10, 64)
	if err != nil || s[0] == '0' {
		return 0, fault.ErrInvalid.WithDetail("the ID of a member must be a positive decimal number; to store a value under a new key POST it to /")
	}
	return id, nil
}

// ParsePeerURL reads the URL of a new member.
func ParsePeerURL(s string) (string, error) {
	s, err := ParseNodeURL(s)
	if err != nil {
		return "", errPeerURL
	}
	return s, nil
}

var errNodeURL = errors.New("it must be like http://10.0.0.4:12379, with a port and no path, and a host that others can reach")

// ParseNodeURL accepts scheme://host:port and nothing else, because this node
// and all others will connect to it. An unspecified address is none of those:
// everybody would connect to himself.
func ParseNodeURL(s string) (string, error) {
	s = strings.TrimSpace(s)
	u, err := url.Parse(s)
	if err != nil {
		return "", errNodeURL
	}
	if u.Scheme != "http" && u.Scheme != "https" || IsUnspecified(u.Hostname()) || s != u.Scheme+"://"+u.Host {
		return "", errNodeURL
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); err != nil || port == 0 {
		return "", errNodeURL
	}
	return s, nil
}

// IsUnspecified says whether a host to listen on stands for every interface.
func IsUnspecified(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.Unmap().IsUnspecified()
}

// The node.

func (h *httpAPI) getProgram(w http.ResponseWriter, r request) error {
	return writeJSON(w, r, struct {
		Version   string `json:"version"`
		GoVersion string `json:"goVersion"`
	}{h.Version, runtime.Version()})
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

// parseKey returns the key of which this is the escaped form. Nothing is cleaned:
// any byte and any number of slashes and dots may be part of it.
func parseKey(escaped string) (string, error) {
	key, err := url.PathUnescape(escaped)
	if err != nil {
		return "", fault.ErrInvalid.WithDetail("the path has a malformed escape; write %% as %%25")
	}
	if len(key) == 0 || len(key) > store.KeySizeMax {
		return "", fault.ErrInvalid.WithDetail("the key has %d bytes; it must have 1 to %d", len(key), store.KeySizeMax)
	}
	return key, nil
}

// KeyPath returns a path that names the key.
func KeyPath(key string) string {
	if key == "-" {
		return "/%2D"
	}
	return "/" + url.PathEscape(key) // escapes slashes, too: nothing else can become reserved
}

// freshness is what a request says of how new a read must be.
func (r *request) freshness() Read {
	return Read{Timeout: r.params.timeout, Local: r.params.has(paramResourceVersion), Version: r.params.resourceVersion}
}

// here reads what this node has, once that was found to be new enough.
func (r *request) here() Read { return Read{Timeout: r.params.timeout, Local: true} }

// Requests: bodies.

// readBody returns the whole body, if there is memory for it until the request
// ends. A small one, the usual case, costs one allocation of its exact size.
func (h *httpAPI) readBody(w http.ResponseWriter, r *http.Request, sizeMax int) (string, error) {
	if r.ContentLength > int64(sizeMax) {
		return "", tooLarge(sizeMax)
	}
	if r.ContentLength == 0 {
		return "", nil
	}
	rec := w.(*recorder)
	body, err := ReadGrowing(r.Body, r.ContentLength, sizeMax, func(size int) error {
		if size <= bodyFree {
			return nil
		}
		if more := int64(size) - rec.held; h.bodies.Take(shares.AddressOf(r.RemoteAddr), more) {
			rec.held += more
			return nil
		}
		w.Header()["Connection"] = closeAfter // the rest is not read
		return fault.ErrOverloaded
	})
	switch {
	case err == nil:
		return unsafe.String(unsafe.SliceData(body), len(body)), nil // nobody changes it any more
	case errors.Is(err, fault.ErrOverloaded):
		return "", err
	case errors.Is(err, errTooLong):
		return "", tooLarge(sizeMax)
	default:
		return "", bodyError(err)
	}
}

var errTooLong = errors.New("there is more than is read")

// ReadGrowing reads all of r, at most sizeMax bytes. announced is how much that
// should be, or negative. Memory grows with what arrives; take is told before how
// much it will be, from what is more than little.
func ReadGrowing(r io.Reader, announced int64, sizeMax int, take func(size int) error) ([]byte, error) {
	most := sizeMax + 1 // one more tells that it is too much
	if announced >= 0 {
		most = int(announced)
	}
	buf := make([]byte, 0, min(most, BodyAllocMin))
	for len(buf) < most {
		if len(buf) == cap(buf) {
			size := min(4*cap(buf), most)
			if err := take(size); err != nil {
				return nil, err
			}
			buf = append(make([]byte, 0, size), buf...)
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err == io.EOF && (announced < 0 || len(buf) == most) {
			break
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
	}
	if len(buf) > sizeMax {
		return nil, errTooLong
	}
	return buf, nil
}

func tooLarge(sizeMax int) error {
	return fault.ErrTooLarge.WithDetail("at most %d bytes are taken", sizeMax)
}

func bodyError(err error) error {
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		return fault.ErrBodyTimeout
	}
	return fault.ErrInvalid.WithDetail("the body broke off: %v", err)
}

// Responses. Headers are set by assignment, with canonical names: Set would
// canonicalize again and allocate a slice for each. Values that belong together
// share one string and one array.

// Shared header values. Nobody may change them.
var (
	typeBytes   = []string{"application/octet-stream"}
	typeJSON    = []string{"application/json"}
	TypeProblem = []string{"application/problem+json"}
	TypeText    = []string{"text/plain; charset=utf-8"}
	retryAfter  = []string{"1"} // second
	closeAfter  = []string{"close"}
	noCache     = []string{"no-cache"}
	replayed    = []string{"true"}
	unencoded   = []string{"identity"}
)

// setItemHeaders sets the header of a read: an item, and the store's resource
// version when it was read.
func setItemHeaders(header http.Header, it store.Item, rv uint64) {
	var buf [64]byte
	b := appendETag(buf[:0], it.RV)
	etagEnd := len(b)
	b = strconv.AppendUint(b, rv, 10)
	rvEnd := len(b)
	b = strconv.AppendInt(b, int64(len(it.Value)), 10)
	s := string(b)
	values := [...]string{s[:etagEnd], s[etagEnd:rvEnd], s[rvEnd:]}
	header["Etag"] = values[0:1:1]
	header["Resource-Version"] = values[1:2:2]
	header["Content-Length"] = values[2:3:3]
	header["Content-Type"] = servedType(it.ContentType)
	setExpires(header, it)
}

// setExpires says when an item expires.
func setExpires(header http.Header, it store.Item) {
	if it.Expires == 0 {
		return
	}
	header["Expires"] = []string{time.UnixMilli(it.Expires).UTC().Format(http.TimeFormat)}
}

// writeNotModified answers a read of a version that the client has.
func writeNotModified(w http.ResponseWriter, it store.Item, rv uint64) {
	setETag(w.Header(), it.RV)
	setResourceVersion(w.Header(), rv)
	setExpires(w.Header(), it)
	w.WriteHeader(http.StatusNotModified)
}

// setWriteHeaders sets the header of a write that got the resource version rv.
func setWriteHeaders(header http.Header, rv uint64) {
	var buf [32]byte
	etag := string(appendETag(buf[:0], rv))
	values := [...]string{etag, etag[1 : len(etag)-1]}
	header["Etag"] = values[0:1:1]
	header["Resource-Version"] = values[1:2:2]
}

func setETag(header http.Header, rv uint64) {
	header["Etag"] = []string{string(appendETag(nil, rv))}
}

func setResourceVersion(header http.Header, rv uint64) {
	header["Resource-Version"] = []string{strconv.FormatUint(rv, 10)}
}

func appendETag(b []byte, rv uint64) []byte {
	b = append(b, '"')
	b = strconv.AppendUint(b, rv, 10)
	return append(b, '"')
}

func writeText(w http.ResponseWriter, r request, text string) {
	WriteBody(w, r.Request, http.StatusOK, TypeText, []byte(text))
}

func writeJSON(w http.ResponseWriter, r request, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode response: %w", err)
	}
	WriteBody(w, r.Request, http.StatusOK, typeJSON, append(body, '\n'))
	return nil
}

func WriteBody(w http.ResponseWriter, r *http.Request, code int, contentType []string, body []byte) {
	header := w.Header()
	header["Content-Type"] = contentType
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(code)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // fails if the client is gone
	}
}

// Problem is the body of an error response (RFC 9457).
type Problem struct {
	Type      string        `json:"type"`
	Title     string        `json:"title"`
	Status    int           `json:"status"`
	Detail    string        `json:"detail,omitempty"`
	Code      string        `json:"code"`
	Message   string        `json:"message"` // title and detail in one line
	Outcome   fault.Outcome `json:"outcome,omitempty"`
	Retryable bool          `json:"retryable"`
	LeaderID  uint64        `json:"leaderId,omitempty"`
	Current   uint64        `json:"currentResourceVersion,omitempty"`
}

func newProblem(e *fault.Error) Problem {
	return Problem{
		Type:      "urn:raftrv:error:" + e.Code,
		Title:     e.Title,
		Status:    statusOf(e),
		Detail:    e.Detail,
		Code:      e.Code,
		Message:   e.Error(),
		Outcome:   e.Outcome,
		Retryable: e.Retry,
		Current:   e.Current,
	}
}

func (p Problem) Encode() []byte {
	body, err := json.Marshal(p)
	if err != nil {
		panic(err) // strings and numbers
	}
	return append(body, '\n')
}

// ProblemOf is an error as the answer to a request.
func ProblemOf(r *http.Request, e *fault.Error) Problem {
	if !isWrite(r.Method) {
		p := newProblem(e)
		p.Outcome = ""
		return p
	}
	if _, ok := r.Header["Idempotency-Key"]; ok {
		e = e.OfRetry()
	}
	return newProblem(e)
}

func (h *httpAPI) writeError(w http.ResponseWriter, r *http.Request, err error) {
	e, ok := errors.AsType[*fault.Error](err)
	if !ok {
		e = fault.ErrInternal
		if r.Context().Err() == nil { // otherwise the client is gone, which is no news
			h.Logger.Error("request failed", zap.String("method", r.Method), zap.Error(err))
		}
	}
	p := ProblemOf(r, e)
	if !isWrite(r.Method) {
		if _, ok := w.Header()["Cache-Control"]; !ok { // no call was found
			w.Header()["Cache-Control"] = noStore
		}
	}
	if p.Status >= http.StatusInternalServerError || p.Status == http.StatusConflict {
		p.LeaderID = h.Store.Status().LeaderID // whom to ask instead
	}
	SetErrorHeaders(w.Header(), e)
	WriteBody(w, r, p.Status, TypeProblem, p.Encode())
}

func SetErrorHeaders(header http.Header, e *fault.Error) {
	if e.Current != 0 {
		setETag(header, e.Current)
	}
	switch statusOf(e) {
	case http.StatusHTTPVersionNotSupported:
		header["Connection"] = closeAfter
	case http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusInsufficientStorage:
		if e.Retry {
			header["Retry-After"] = retryAfter
		}
	case http.StatusUnsupportedMediaType:
		header["Accept-Encoding"] = unencoded
	case http.StatusRequestTimeout, http.StatusRequestEntityTooLarge:
		header["Connection"] = closeAfter // the rest of the body is not waited for
	}
}

func isWrite(method string) bool {
	return method != http.MethodGet && method != http.MethodHead && method != http.MethodOptions
}

// Refusal is the response to a connection that the listener has no room
// for. No request was read, so it must suit every one.
func Refusal() []byte {
	p := newProblem(fault.ErrConnections)
	p.Outcome = "" // nobody has read whether it is a write, or a retry
	body := p.Encode()
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nRetry-After: %s\r\n%sConnection: close\r\n\r\n%s",
		p.Status, http.StatusText(p.Status), TypeProblem[0], len(body), retryAfter[0], browserHeader, body)
}
