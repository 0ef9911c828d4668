package httpapi

import (
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

func TestMetrics_CountRequestsByRouteAndCode(t *testing.T) {
	f := newFront(t)
	f.do("PUT", "/secret/key", "v").Want(t, 201)
	f.do("PUT", "/secret/key", "v").Want(t, 204)
	f.do("PUT", "/secret/key", "v").Want(t, 204)
	f.do("GET", "/secret/key", "").Want(t, 200)
	f.do("HEAD", "/secret/key", "").Want(t, 200)
	f.do("GET", "/secret/key?no=1", "").Want(t, 400)
	f.do("GET", "/none", "").Want(t, 404)
	f.do("GET", "/-/v1/keys/secret%2Fkey", "").Want(t, 200)
	f.do("GET", "/-/none", "").Want(t, 404)
	f.do("PATCH", "/secret/key", "").Want(t, 405)
	f.do("OPTIONS", "/secret/key", "").Want(t, 204)
	a := f.do("GET", "/-/metrics", "")
	a.Want(t, 200)
	got := testkit.ParseSamples(t, a.Body)
	for series, want := range map[string]float64{
		`raftrv_http_requests_total{code="201",method="PUT",route="/{key}"}`:                            1,
		`raftrv_http_requests_total{code="204",method="PUT",route="/{key}"}`:                            2,
		`raftrv_http_requests_total{code="200",method="GET",route="/{key}"}`:                            2,
		`raftrv_http_requests_total{code="400",method="GET",route="/{key}"}`:                            1,
		`raftrv_http_requests_total{code="404",method="GET",route="/{key}"}`:                            1,
		`raftrv_http_requests_total{code="200",method="GET",route="/-/v1/keys/{key}"}`:                  1,
		`raftrv_http_requests_total{code="404",method="other",route="other"}`:                           1,
		`raftrv_http_requests_total{code="405",method="other",route="other"}`:                           1,
		`raftrv_http_requests_total{code="204",method="other",route="other"}`:                           1,
		`raftrv_http_request_duration_seconds_count{method="PUT",route="/{key}"}`:                       3,
		`raftrv_http_request_duration_seconds_bucket{method="PUT",route="/{key}",le="+Inf"}`:            3,
		`raftrv_http_request_duration_seconds_bucket{method="PUT",route="/{key}",le="10"}`:              3,
		`raftrv_http_request_duration_seconds_count{method="GET",route="/{key}"}`:                       4,
		`raftrv_http_request_duration_seconds_count{method="GET",route="/-/v1/keys/{key}"}`:             1,
		`raftrv_http_request_duration_seconds_bucket{method="GET",route="/-/v1/keys/{key}",le="+Inf"}`:  1,
		`raftrv_http_request_duration_seconds_bucket{method="GET",route="/-/v1/keys/{key}",le="0.1"}`:   1,
		`raftrv_http_request_duration_seconds_bucket{method="GET",route="/-/v1/keys/{key}",le="1e-05"}`: 0,
	} {
		if got[series] != want {
			t.Errorf("%s is %v, want %v", series, got[series], want)
		}
	}
	if s := got[`raftrv_http_request_duration_seconds_sum{method="PUT",route="/{key}"}`]; s <= 0 || s > 10 {
		t.Errorf("3 requests took %v s", s)
	}
	if strings.Contains(a.Body, "secret") {
		t.Error("a key is in a label")
	}
}

// A client that has left is no failure of ours.
func TestMetrics_CountClientsThatLeft(t *testing.T) {
	h := New(Config{Store: &fakeBackend{store: store.New(), linearizeErr: io.ErrUnexpectedEOF},
		Logger: zap.NewNop(), Timeout: time.Second, Registry: prometheus.NewRegistry()}).(*httpAPI)
	ctx, leave := testContextThatEnds(t)
	leave()
	r := httptest.NewRequest("GET", "/k", nil).WithContext(ctx)
	r.RequestURI, r.Host = "/k", "localhost"
	h.ServeHTTP(httptest.NewRecorder(), r)
	if got := testkit.Gather(t, h.Registry)[`raftrv_http_requests_total{code="499",method="GET",route="/{key}"}`]; got != 1 {
		t.Errorf("%v requests", got)
	}
}

// Of a call that is asked for often one request of a few is timed, and the
// histogram still has about all; one that is asked for seldom is always timed.
func TestMetrics_BusyCalls(t *testing.T) {
	h := New(Config{Store: &instantBackend{fakeBackend{store: store.New()}}, Logger: zap.NewNop(), Registry: prometheus.NewRegistry()}).(*httpAPI)
	c := rootRoute.Call(http.MethodGet)
	m := &h.metrics.Calls[c.number]
	total := 0
	request := func() (isTimed bool) {
		total++
		rec := newRecorder(httptest.NewRecorder())
		h.called(rec, c)
		isTimed = rec.weight > 0
		h.answered(rec, &http.Request{})
		return isTimed
	}
	for end := time.Now().Add(30 * time.Second); m.every.Load() != busyEvery; request() {
		if time.Now().After(end) {
			t.Fatal("it is not busy")
		}
	}
	timed, untimed := 0, 0
	for m.every.Load() == busyEvery && timed+untimed < 10_000 {
		if request() {
			timed++
		} else {
			untimed++
		}
	}
	if timed+untimed == 10_000 && timed > untimed/2 { // fewer: this process was held up
		t.Errorf("%d requests were timed, %d not", timed, untimed)
	}
	got := testkit.Gather(t, h.Registry)
	if n := got[`raftrv_http_requests_total{code="200",method="GET",route="/"}`]; n != float64(total) {
		t.Errorf("%v requests counted, want %d", n, total)
	}
	if n := got[`raftrv_http_request_duration_seconds_count{method="GET",route="/"}`]; math.Abs(n-float64(total)) > float64(total)/10 {
		t.Errorf("the histogram has %v requests of %d", n, total)
	}
	time.Sleep(3 * busyWindow)
	for range 100 * busyEvery {
		if request() {
			break
		}
	}
	for range 2 {
		if !request() {
			t.Error("a call that is not busy any more is not always timed")
		}
	}
}
