package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// waitUntil waits until check returns nil.
func waitUntil(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var (
	heavy    = flag.Bool("heavy", false, "run the process tests at full size: a minute of load, a gigabyte of log, a million keys")
	liveRace = flag.Bool("live-race", false, "run nodes that are built with the race detector")
)

// sized returns how much of something a test does.
func sized[T any](short, full T) T {
	if *heavy {
		return full
	}
	return short
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// samples are metrics in Prometheus' text format: the value of each line by all
// that stands before it.
type samples map[string]float64

func parseSamples(t *testing.T, text string) samples {
	t.Helper()
	s := samples{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[i+1:], 64)
		must(t, err)
		s[line[:i]] = v
	}
	return s
}

var seriesName = regexp.MustCompile(`^[a-z_]+`)

// names are the metrics that there are, histograms without their suffixes.
func (s samples) names() map[string]bool {
	names := map[string]bool{}
	for series := range s {
		names[baseName(seriesName.FindString(series))] = true
	}
	return names
}

// baseName is the name of a histogram of which name is a part, or name.
func baseName(name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return name
}

// sum adds up all series that begin so.
func (s samples) sum(prefix string) (total float64) {
	for series, v := range s {
		if strings.HasPrefix(series, prefix) {
			total += v
		}
	}
	return total
}

// pipeListener is a network without a network, for virtual time.
type pipeListener struct {
	acceptC chan net.Conn // dial sends; never closed
	done    chan struct{} // closed by Close
	close   func()
}

func newPipeListener() *pipeListener {
	l := &pipeListener{acceptC: make(chan net.Conn), done: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.done) })
	return l
}

func (l *pipeListener) dial() (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.acceptC <- server:
		return client, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.acceptC:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error { l.close(); return nil }

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Net: "pipe"} }

type answer struct {
	code   int
	header http.Header
	body   string
	last   bool // the server says that it closes the connection
}

func readAnswer(t *testing.T, r *bufio.Reader, method string) answer {
	t.Helper()
	res, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{res.StatusCode, res.Header, string(body), res.Close}
}

func (a answer) want(t *testing.T, code int) {
	t.Helper()
	if a.code != code {
		t.Errorf("%d %q, want %d", a.code, a.body, code)
	}
}

func (a answer) wantHeader(t *testing.T, name, want string) {
	t.Helper()
	if got := strings.Join(a.header.Values(name), "|"); got != want {
		t.Errorf("%s: %q, want %q", name, got, want)
	}
}

// jsonItem is an item as clients read it.
type jsonItem struct {
	Key                    *string    `json:"key"`
	KeyBase64              []byte     `json:"keyBase64"`
	Value                  *string    `json:"value"`
	ValueBase64            []byte     `json:"valueBase64"`
	ResourceVersion        uint64     `json:"resourceVersion"`
	CreatedResourceVersion uint64     `json:"createdResourceVersion"`
	ExpiresAt              *time.Time `json:"expiresAt"`
}

func (i *jsonItem) key() string { return textOrBytes(i.Key, i.KeyBase64) }

func (i *jsonItem) value() string { return textOrBytes(i.Value, i.ValueBase64) }

func textOrBytes(text *string, b []byte) string {
	if text != nil {
		return *text
	}
	return string(b)
}

type jsonList struct {
	ResourceVersion uint64     `json:"resourceVersion"`
	Items           []jsonItem `json:"items"`
	After           *string    `json:"after"`
	AfterBase64     []byte     `json:"afterBase64"`
}

// mustDecode decodes a JSON answer of which every field is known.
func mustDecode[T any](t *testing.T, a answer) (v T) {
	t.Helper()
	a.want(t, 200)
	d := json.NewDecoder(strings.NewReader(a.body))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%q: %v", a.body, err)
	}
	return v
}

// gather returns what a registry would answer at /-/metrics.
func gather(t *testing.T, r *prometheus.Registry) samples {
	t.Helper()
	w := httptest.NewRecorder()
	promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusOK {
		t.Fatal(w.Body)
	}
	return parseSamples(t, w.Body.String())
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain")
		}
	}
}
