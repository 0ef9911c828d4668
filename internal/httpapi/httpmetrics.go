package httpapi

import (
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"raftrv/internal/shares"
)

// This file counts and logs what the HTTP front answers. It is on the hot path
// of every request, so a request finds its counters by two indices, call and
// status, without labels, locks or memory of its own.

// recorder is the ResponseWriter of a request: it notes what was answered.
type recorder struct {
	http.ResponseWriter
	call   int           // its number; 0 until it is known, and for requests that no call is for
	status int           // 0 until it is known; then net/http sends 200
	bytes  int64         // of the body
	held   int64         // bytes of the request's body that count
	start  time.Duration // since epoch
	weight uint64        // requests that this one's latency stands for; 0 = it is not timed
	turn   uint64        // counts the requests that used this recorder
}

// Each recorder counts from somewhere else, so that no pattern of requests hides
// from those that are timed.
var recorders = sync.Pool{New: func() any { return &recorder{turn: rand.Uint64()} }}

// epoch is what the times of recorders count from. The difference of two of
// them needs the monotonic clock only, which is half of time.Now.
var epoch = time.Now()

func newRecorder(w http.ResponseWriter) *recorder {
	rec := recorders.Get().(*recorder)
	rec.ResponseWriter = w
	rec.call, rec.status, rec.bytes, rec.held, rec.weight = 0, 0, 0, 0, 0
	return rec
}

func (rec *recorder) WriteHeader(status int) {
	if rec.status == 0 {
		rec.status = status
	}
	rec.ResponseWriter.WriteHeader(status)
}

func (rec *recorder) Write(p []byte) (int, error) {
	n, err := rec.ResponseWriter.Write(p)
	rec.bytes += int64(n)
	return n, err
}

// WriteString spares net/http's writer a copy.
func (rec *recorder) WriteString(s string) (int, error) {
	n, err := io.WriteString(rec.ResponseWriter, s)
	rec.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (rec *recorder) Unwrap() http.ResponseWriter { return rec.ResponseWriter }

// called notes which call a request is for.
func (h *httpAPI) called(rec *recorder, c *call) {
	rec.call = c.number
	rec.turn++
	m := &h.metrics.Calls[c.number]
	if every := m.every.Load(); every <= 1 || rec.turn&(every-1) == 0 {
		rec.start, rec.weight = time.Since(epoch), max(every, 1)
		m.maybeLook(rec.start)
	} else if h.AccessLog {
		rec.start = time.Since(epoch)
	}
}

// answered ends a request: it counts, and logs if that was asked for.
func (h *httpAPI) answered(rec *recorder, r *http.Request) {
	if rec.status == 0 {
		rec.status = http.StatusOK
	}
	if rec.held > 0 {
		h.bodies.Give(shares.AddressOf(r.RemoteAddr), rec.held)
	}
	m := &h.metrics.Calls[rec.call]
	m.Count(rec.status)
	if rec.weight > 0 {
		m.Observe(time.Since(epoch)-rec.start, rec.weight)
	}
	if h.AccessLog {
		h.logAnswer(rec, r)
	}
	recorders.Put(rec) // with its writer: pointers cost more to clear than to keep for a moment
}

func (h *httpAPI) logAnswer(rec *recorder, r *http.Request) {
	var took time.Duration
	if rec.call != 0 {
		took = time.Since(epoch) - rec.start
	}
	h.Logger.Info("request", zap.String("method", r.Method), zap.String("target", r.RequestURI), zap.String("route", routeName(allCalls[rec.call])),
		zap.Int("status", rec.status), zap.Int64("bytes", rec.bytes), zap.Duration("duration", took), zap.String("client", r.RemoteAddr))
}

// latencyBounds are the upper ends of the buckets of a latency histogram. The
// last bucket has none.
var latencyBounds = [...]time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

// Reading the clock twice costs more than all the rest of this file. So of a
// call that is asked for often one request of busyEvery is timed, and counts for
// as many.
const (
	busyEvery  = 8                      // a power of two
	busyRate   = 1000                   // requests a second
	busyWindow = 100 * time.Millisecond // after which the rate is looked at again
)

// HTTP statuses have three digits.
const (
	statusMin = 100
	statusMax = 600

	// statusClientGone counts the requests that failed after their client had
	// left. Nobody gets it as an answer; nginx has made it known.
	statusClientGone = 499
)

// callMetrics counts the answers of one call.
type callMetrics struct {
	statuses [statusMax - statusMin]atomic.Uint64
	buckets  [len(latencyBounds) + 1]atomic.Uint64
	nanos    atomic.Uint64 // sum

	every     atomic.Uint64 // of how many requests one is timed; 0 and 1 = each
	windowEnd atomic.Int64  // since epoch
	timed     atomic.Uint64 // in the buckets at its start
}

// maybeLook finds out now and then whether the call is asked for often.
func (m *callMetrics) maybeLook(now time.Duration) {
	end := m.windowEnd.Load()
	if int64(now) < end || !m.windowEnd.CompareAndSwap(end, int64(now+busyWindow)) {
		return
	}
	timed := uint64(0)
	for i := range m.buckets {
		timed += m.buckets[i].Load()
	}
	every, took := uint64(1), now-time.Duration(end)+busyWindow
	// After a pause longer than a window the call cannot have been busy.
	if n := timed - m.timed.Swap(timed); took <= 2*busyWindow && float64(n) > busyRate*took.Seconds() {
		every = busyEvery
	}
	m.every.Store(every)
}

func (m *callMetrics) Count(status int) {
	m.statuses[min(max(status, statusMin), statusMax-1)-statusMin].Add(1)
}

func (m *callMetrics) Observe(took time.Duration, weight uint64) {
	i := 0
	for i < len(latencyBounds) && took > latencyBounds[i] {
		i++
	}
	m.buckets[i].Add(weight)
	m.nanos.Add(uint64(max(took, 0)) * weight)
}

// httpMetrics counts the answers of a front. It implements prometheus.Collector.
type httpMetrics struct {
	Calls []callMetrics // by number; at 0 requests that no call is for
}

func NewHTTPMetrics() *httpMetrics {
	return &httpMetrics{Calls: make([]callMetrics, len(allCalls))}
}

var (
	descRequests = prometheus.NewDesc("raftrv_http_requests_total", "Requests that were answered.", []string{"method", "route", "code"}, nil)
	descLatency  = prometheus.NewDesc("raftrv_http_request_duration_seconds",
		"Time to answer a request; a watch counts when it ends. Of a call that is asked for more than 1,000 times a second one in 8 is timed and counts for 8.",
		[]string{"method", "route"}, nil)
)

// Describe implements prometheus.Collector.
func (m *httpMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- descRequests
	ch <- descLatency
}

// Collect implements prometheus.Collector.
func (m *httpMetrics) Collect(ch chan<- prometheus.Metric) {
	for number, c := range allCalls {
		m.collectCall(ch, &m.Calls[number], c)
	}
}

func (m *httpMetrics) collectCall(ch chan<- prometheus.Metric, of *callMetrics, c *call) {
	method := "other"
	if c != nil {
		method = c.method
	}
	for i := range of.statuses {
		if n := of.statuses[i].Load(); n > 0 {
			ch <- prometheus.MustNewConstMetric(descRequests, prometheus.CounterValue, float64(n), method, routeName(c), strconv.Itoa(i+statusMin))
		}
	}
	buckets, count := map[float64]uint64{}, uint64(0)
	for i := range of.buckets {
		count += of.buckets[i].Load()
		if i < len(latencyBounds) {
			buckets[latencyBounds[i].Seconds()] = count
		}
	}
	if count > 0 {
		ch <- prometheus.MustNewConstHistogram(descLatency, count, time.Duration(of.nanos.Load()).Seconds(), buckets, method, routeName(c))
	}
}

// routeName is the label of a call: its route as in the table, never a key.
func routeName(c *call) string {
	if c == nil {
		return "other"
	}
	return c.path
}
