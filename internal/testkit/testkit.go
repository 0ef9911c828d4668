package testkit

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

// WaitUntil waits until check returns nil.
func WaitUntil(t *testing.T, check func() error) {
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

func ReadFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var (
	Heavy    = flag.Bool("heavy", false, "run the process tests at full size: a minute of load, a gigabyte of log, a million keys")
	LiveRace = flag.Bool("live-race", false, "run nodes that are built with the race detector")
)

// Sized returns how much of something a test does.
func Sized[T any](short, full T) T {
	if *Heavy {
		return full
	}
	return short
}

func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Samples are metrics in Prometheus' text format: the value of each line by all
// that stands before it.
type Samples map[string]float64

func ParseSamples(t *testing.T, text string) Samples {
	t.Helper()
	s := Samples{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[i+1:], 64)
		Must(t, err)
		s[line[:i]] = v
	}
	return s
}

var seriesName = regexp.MustCompile(`^[a-z_]+`)

// Names are the metrics that there are, histograms without their suffixes.
func (s Samples) Names() map[string]bool {
	names := map[string]bool{}
	for series := range s {
		names[BaseName(seriesName.FindString(series))] = true
	}
	return names
}

// BaseName is the name of a histogram of which name is a part, or name.
func BaseName(name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return name
}

// Sum adds up all series that begin so.
func (s Samples) Sum(prefix string) (total float64) {
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

func NewPipeListener() *pipeListener {
	l := &pipeListener{acceptC: make(chan net.Conn), done: make(chan struct{})}
	l.close = sync.OnceFunc(func() { close(l.done) })
	return l
}

func (l *pipeListener) Dial() (net.Conn, error) {
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

type Answer struct {
	Code   int
	Header http.Header
	Body   string
	Last   bool // the server says that it closes the connection
}

func ReadAnswer(t *testing.T, r *bufio.Reader, method string) Answer {
	t.Helper()
	res, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return Answer{res.StatusCode, res.Header, string(body), res.Close}
}

func (a Answer) Want(t *testing.T, code int) {
	t.Helper()
	if a.Code != code {
		t.Errorf("%d %q, want %d", a.Code, a.Body, code)
	}
}

func (a Answer) WantHeader(t *testing.T, name, want string) {
	t.Helper()
	if got := strings.Join(a.Header.Values(name), "|"); got != want {
		t.Errorf("%s: %q, want %q", name, got, want)
	}
}

// JSONItem is an item as clients read it.
type JSONItem struct {
	Key                    *string    `json:"key"`
	KeyBase64              []byte     `json:"keyBase64"`
	Value                  *string    `json:"value"`
	ValueBase64            []byte     `json:"valueBase64"`
	ResourceVersion        uint64     `json:"resourceVersion"`
	CreatedResourceVersion uint64     `json:"createdResourceVersion"`
	ExpiresAt              *time.Time `json:"expiresAt"`
}

func (i *JSONItem) RawKey() string { return TextOrBytes(i.Key, i.KeyBase64) }

func (i *JSONItem) RawValue() string { return TextOrBytes(i.Value, i.ValueBase64) }

func TextOrBytes(text *string, b []byte) string {
	if text != nil {
		return *text
	}
	return string(b)
}

type JSONList struct {
	ResourceVersion uint64     `json:"resourceVersion"`
	Items           []JSONItem `json:"items"`
	After           *string    `json:"after"`
	AfterBase64     []byte     `json:"afterBase64"`
}

// MustDecode decodes a JSON answer of which every field is known.
func MustDecode[T any](t *testing.T, a Answer) (v T) {
	t.Helper()
	a.Want(t, 200)
	d := json.NewDecoder(strings.NewReader(a.Body))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%q: %v", a.Body, err)
	}
	return v
}

// Gather returns what a registry would answer at /-/metrics.
func Gather(t *testing.T, r *prometheus.Registry) Samples {
	t.Helper()
	w := httptest.NewRecorder()
	promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusOK {
		t.Fatal(w.Body)
	}
	return ParseSamples(t, w.Body.String())
}

func WaitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain")
		}
	}
}
