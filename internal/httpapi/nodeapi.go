package httpapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/pprof"
	runtimepprof "runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"raftrv/internal/fault"
	"raftrv/internal/shares"
)

// This file is the HTTP front for those who look after a node: status,
// readiness, metrics, log level, profiles.

const (
	StatusTimeout   = time.Second // for another member to tell its status
	statusSizeMax   = 1 << 20     // bytes of that
	logLevelSizeMax = 1 << 10     // bytes of a body
	metricsInFlight = 4           // answers at /-/metrics at a time; more are refused, and one address does not get all
	scrapeTimeout   = 10 * time.Second
)

func (h *httpAPI) getStatus(w http.ResponseWriter, r request) error {
	if r.params.all {
		return writeJSON(w, r, gatherStatus(r.Context(), h.Client, h.Store.Status()))
	}
	return writeJSON(w, r, h.Store.Status())
}

// ClusterStatus is what each member says of itself.
type ClusterStatus struct {
	Members []memberStatus `json:"members"` // in the order of their IDs
	Silent  []uint64       `json:"silent"`  // IDs of those that did not answer
}

// memberStatus is what a member says, or why nothing is known.
type memberStatus struct {
	ID        uint64      `json:"id"`
	ClientURL string      `json:"clientUrl,omitempty"`
	Status    *NodeStatus `json:"status,omitempty"`
	Error     string      `json:"error,omitempty"`
}

// gatherStatus asks all members at the same time, with a client that follows no
// redirects. own is the view of this node.
func gatherStatus(ctx context.Context, client *http.Client, own NodeStatus) ClusterStatus {
	ctx, cancel := context.WithTimeout(ctx, StatusTimeout)
	defer cancel()
	all := ClusterStatus{Members: make([]memberStatus, len(own.Members)), Silent: []uint64{}}
	var asking sync.WaitGroup
	for i, m := range own.Members {
		all.Members[i] = memberStatus{ID: m.ID, ClientURL: m.ClientURL}
		if m.ID == own.ID {
			all.Members[i].Status = &own
			continue
		}
		asking.Go(func() {
			st, err := fetchStatus(ctx, client, m, own.ClusterID)
			if err != nil {
				all.Members[i].Error = err.Error()
				return
			}
			all.Members[i].Status = st
		})
	}
	asking.Wait()
	for _, m := range all.Members {
		if m.Status == nil {
			all.Silent = append(all.Silent, m.ID)
		}
	}
	return all
}

// fetchStatus asks a member for its status.
func fetchStatus(ctx context.Context, client *http.Client, m Member, cluster string) (*NodeStatus, error) {
	if m.ClientURL == "" {
		return nil, errors.New("it has not told its client URL yet; has it ever been up?")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.ClientURL+"/-/v1/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %s", m.ClientURL, resp.Status)
	}
	st := new(NodeStatus)
	if err := json.NewDecoder(io.LimitReader(resp.Body, statusSizeMax)).Decode(st); err != nil {
		return nil, fmt.Errorf("what answers at %s tells no status", m.ClientURL) // nor what else it said: it may be anybody
	}
	if st.ID != m.ID || st.ClusterID != cluster {
		return nil, fmt.Errorf("at %s there is node %d of cluster %s", m.ClientURL, st.ID, st.ClusterID)
	}
	return st, nil
}

// getLive says that this process answers, whatever the cluster does.
func (h *httpAPI) getLive(w http.ResponseWriter, r request) error {
	writeText(w, r, "ok\n")
	return nil
}

// getReady says whether this node can serve.
func (h *httpAPI) getReady(w http.ResponseWriter, r request) error {
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	lines, failed := readiness(ctx, h.Checks)
	ok := "ok\n"
	if err := h.Store.Writable(); err != nil { // it serves reads, so it may be ready
		readOnly := "read-only: " + err.Error() + "\n"
		lines, ok = lines+readOnly, ok+readOnly
	}
	switch {
	case r.params.verbose && failed != nil:
		WriteBody(w, r.Request, http.StatusServiceUnavailable, TypeText, []byte(lines))
	case r.params.verbose:
		writeText(w, r, lines)
	case failed != nil:
		return fault.ErrNotReady.WithDetail("%s", strings.Join(failed, "; "))
	default:
		writeText(w, r, ok)
	}
	return nil
}

// getMetrics answers in Prometheus' text format.
func (h *httpAPI) getMetrics(w http.ResponseWriter, r request) error {
	address := shares.AddressOf(r.RemoteAddr)
	if !h.scrapes.Take(address, 1) {
		return fault.ErrTooManyRequests.WithDetail("%d others are getting the metrics, at most that many can; retry later", metricsInFlight)
	}
	defer h.scrapes.Give(address, 1)
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(scrapeTimeout)) // not supported by a test's writer
	w.Header()["Vary"] = append(slices.Clone(h.browsers.varyAccept), "Accept-Encoding")
	whole := wholeAnswer{ResponseWriter: w, code: http.StatusOK}
	h.exposition.ServeHTTP(&whole, r.Request)
	w.Header()["Content-Length"] = []string{strconv.Itoa(whole.body.Len())}
	w.WriteHeader(whole.code)
	if r.Method != http.MethodHead {
		_, _ = w.Write(whole.body.Bytes()) // fails if the client is gone
	}
	return nil
}

// wholeAnswer keeps an answer until its length is known, since text that is cut
// off looks like less text.
type wholeAnswer struct {
	http.ResponseWriter
	code int
	body bytes.Buffer
}

func (w *wholeAnswer) WriteHeader(code int)        { w.code = code }
func (w *wholeAnswer) Write(p []byte) (int, error) { return w.body.Write(p) }

func newExposition(cfg Config) http.Handler {
	return promhttp.HandlerFor(cfg.Registry, promhttp.HandlerOpts{
		ErrorLog:      zap.NewStdLog(cfg.Logger),
		ErrorHandling: promhttp.ContinueOnError,
	})
}

// logLevel is the level of the log as JSON.
type logLevel struct {
	Level string `json:"level"`
}

func (h *httpAPI) getLogLevel(w http.ResponseWriter, r request) error {
	return writeJSON(w, r, logLevel{h.Level.String()})
}

// putLogLevel changes the level until the process ends.
func (h *httpAPI) putLogLevel(w http.ResponseWriter, r request) error {
	text, err := h.readBody(w, r.Request, logLevelSizeMax)
	if err != nil {
		return err
	}
	var body logLevel
	if err := decodeBody(text, jsonField{"level", &body.Level}); err != nil {
		return errLogLevel
	}
	level, err := zapcore.ParseLevel(body.Level)
	if err != nil || level < zapcore.DebugLevel || level > zapcore.ErrorLevel || body.Level != level.String() {
		return errLogLevel
	}
	if old := h.Level.Level(); old != level {
		h.Level.SetLevel(min(old, level)) // the line is in the log either way
		h.Logger.Info("log level changed", zap.Stringer("from", old), zap.Stringer("to", level))
	}
	h.Level.SetLevel(level)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

var (
	errLogLevel   = fault.ErrInvalid.WithDetail(`the body must be {"level":"debug"}, or info, warn or error instead`)
	errNoProfiles = fault.ErrNotFound.WithDetail("profiles are off; start the node with --pprof to have them")
)

// getProfiles lists the profiles.
func (h *httpAPI) getProfiles(w http.ResponseWriter, r request) error {
	if !h.Profiles {
		return errNoProfiles
	}
	pprof.Index(w, r.Request)
	return nil
}

// getProfile makes one profile, as go tool pprof wants it.
func (h *httpAPI) getProfile(w http.ResponseWriter, r request) error {
	if !h.Profiles {
		return errNoProfiles
	}
	switch r.name {
	case "profile":
		pprof.Profile(w, r.Request)
	case "trace":
		pprof.Trace(w, r.Request)
	default:
		if runtimepprof.Lookup(r.name) == nil {
			return fault.ErrNotFound.WithDetail("there is no profile %q; /-/debug/pprof/ lists them", r.name)
		}
		pprof.Handler(r.name).ServeHTTP(w, r.Request)
	}
	return nil
}
