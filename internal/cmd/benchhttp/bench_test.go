package main

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestParseWrk(t *testing.T) {
	const good = `Running 10s test @ http://127.0.0.1:12380
  2 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     2.53ms    1.02ms  31.90ms   81.61%
    Req/Sec    12.99k     1.08k   15.21k    68.00%
  Latency Distribution
     50%    2.31ms
     75%    2.95ms
     90%    3.73ms
     99%    5.12ms
  258714 requests in 10.01s, 33.30MB read
Requests/sec:  25845.23
Transfer/sec:      3.33MB
`
	ms := func(v float64) time.Duration { return time.Duration(v * float64(time.Millisecond)) }
	tests := []struct {
		name    string
		out     string
		want    sample
		wantErr string
	}{
		{"milliseconds", good, sample{25845.23, ms(2.31), ms(5.12)}, ""},
		{
			"other units", strings.NewReplacer("2.31ms", "850.00us", "5.12ms", "1.02s").Replace(good),
			sample{25845.23, ms(0.85), ms(1020)}, "",
		},
		{
			"failed requests", strings.Replace(good, "Requests/sec", "  Non-2xx or 3xx responses: 7\nRequests/sec", 1),
			sample{}, "Non-2xx or 3xx responses: 7",
		},
		{
			"broken connections", strings.Replace(good, "Requests/sec", "  Socket errors: connect 0, read 1, write 0, timeout 0\nRequests/sec", 1),
			sample{}, "Socket errors: connect 0, read 1",
		},
		{"nothing came back", strings.Replace(good, "25845.23", "0.00", 1), sample{}, "no result"},
		{"no latencies", "Requests/sec:  25845.23\n", sample{}, "no result"},
		{"not a number", strings.Replace(good, "25845.23", "-nan", 1), sample{}, "-nan"},
		{"other program", "usage: wrk <options> <url>\n", sample{}, "no result"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseWrk(tt.out)
			checkError(t, err, tt.wantErr)
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestParseK6(t *testing.T) {
	tests := []struct {
		name    string
		text    string
		want    sample
		wantErr string
	}{
		{
			"summary",
			`{"metrics": {
				"http_req_duration": {"avg": 2.6, "med": 2.25, "p(95)": 4.9, "p(99)": 6.5, "thresholds": {"x": false}},
				"iterations": {"count": 50000, "rate": 3627.5}}}`,
			sample{3627.5, 2250 * time.Microsecond, 6500 * time.Microsecond}, "",
		},
		{"nothing ran", `{"metrics": {"iterations": {"count": 0, "rate": 0}}}`, sample{}, "no result"},
		{"cut off", `{"metrics": {`, sample{}, "k6 summary"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseK6([]byte(tt.text))
			checkError(t, err, tt.wantErr)
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func checkError(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Fatalf("got error %v, want %q", err, want)
	}
}

func TestMedian(t *testing.T) {
	tests := []struct {
		values []float64
		want   float64
	}{
		{[]float64{7}, 7},
		{[]float64{9, 1}, 5},
		{[]float64{9, 1, 2}, 2},
		{[]float64{4, 9, 1, 2}, 3},
	}
	for _, tt := range tests {
		if got := median(tt.values); got != tt.want {
			t.Errorf("median of %v: got %v, want %v", tt.values, got, tt.want)
		}
	}
}

func TestSelectCells_BringsTheBaselines(t *testing.T) {
	tests := []struct {
		match string
		want  []string
	}{
		{"put-.*-c64$", []string{"put-empty-c64", "put-leader-c64", "put-follower-c64"}},
		{"local", []string{"get-empty-c64", "local-leader-c64", "get-empty-c256", "local-leader-c256"}},
		{"k6-contacts", []string{"k6-empty", "k6-contacts"}},
		{"get-empty-c1$", []string{"get-empty-c1"}},
		{"nothing", nil},
	}
	for _, tt := range tests {
		var got []string
		for _, c := range selectCells((&bench{}).cells(), regexp.MustCompile(tt.match)) {
			got = append(got, c.name)
		}
		if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.match, got, tt.want)
		}
	}
}

func TestCells_HaveTheirBaseline(t *testing.T) {
	names := make(map[string]bool)
	for _, c := range (&bench{}).cells() {
		if names[c.name] {
			t.Errorf("two cells named %s", c.name)
		}
		names[c.name] = true
		if c.baseline != "" && !names[c.baseline] {
			t.Errorf("%s: its baseline %s is not run before it", c.name, c.baseline)
		}
	}
}

func TestReport(t *testing.T) {
	at := func(perSecond float64) sample {
		return sample{perSecond, 1500 * time.Microsecond, 3 * time.Millisecond}
	}
	r := &report{
		Time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Go: "go1.26", Cores: 2,
		Fsync: 120 * time.Microsecond, Duration: 10 * time.Second, Reps: 3,
		Cells: []result{
			{Name: "put-empty-c64", Samples: []sample{at(50000), at(80000), at(80000)}},
			// The first repetition was slow for everybody, which its share does not show.
			{Name: "put-leader-c64", Baseline: "put-empty-c64", Bar: 0.28, Samples: []sample{at(15000), at(24000), at(26000)}},
			{Name: "put-follower-c64", Baseline: "put-empty-c64", Bar: 0.26, Samples: []sample{at(10000), at(16000), at(24000)}},
		},
	}
	r.summarize()
	var out strings.Builder
	r.print(&out)
	got := regexp.MustCompile(` +\n`).ReplaceAllString(out.String(), "\n")
	const want = `2026-01-02, go1.26, 2 cores with the load generator on them, fsync 120µs, median of 3 x 10s

              cell  req/s  spread  p50 ms  p99 ms  of empty   bar
     put-empty-c64  80000    38 %    1.50    3.00
    put-leader-c64  24000    46 %    1.50    3.00     0.300  0.28  pass
  put-follower-c64  16000    88 %    1.50    3.00     0.200  0.26  MISS

1 below the bar
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestEmptyHandler_ServesUntilStdinEnds(t *testing.T) {
	stdin, hangUp := io.Pipe()
	stdout, print := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- emptyMain(stdin, print) }()

	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.Get(strings.TrimSpace(line) + "/bench-0000")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusNoContent {
		t.Errorf("got %s", res.Status)
	}
	if err := errors.Join(hangUp.Close(), <-ended); err != nil {
		t.Error(err)
	}
}

func TestRun_NamesThePackageOfWrk(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	err := run(t.Context(), nil, io.Discard, os.Stderr)
	checkError(t, err, "install the package wrk")
}
