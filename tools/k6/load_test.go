// Package k6 tests the load test: what it must pass, and what it must not.
package k6

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// thresholdsFailed is k6's exit status when a threshold was crossed.
const thresholdsFailed = 99

// fakeStore answers as a node does, as far as k6.js looks.
type fakeStore struct {
	mu     sync.Mutex
	rv     int
	values map[string][]byte
	rvs    map[string]int
}

func newFakeStore() *fakeStore {
	return &fakeStore{values: map[string][]byte{}, rvs: map[string]int{}}
}

func (s *fakeStore) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // k6 has gone
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Method == http.MethodGet {
		w.Header().Set("ETag", fmt.Sprintf("%q", strconv.Itoa(s.rvs[r.URL.Path])))
		_, _ = w.Write(s.values[r.URL.Path])
		return
	}
	s.rv++
	key := r.URL.Path
	if r.Method == http.MethodPatch {
		key = fmt.Sprintf("/1-%d", s.rv)
		w.Header().Set("Location", key)
	}
	s.values[key], s.rvs[key] = body, s.rv
	w.Header().Set("Resource-Version", strconv.Itoa(s.rv))
	w.WriteHeader(http.StatusNoContent)
}

// each puts a handler in front of another: it is told how many requests with that method came before, and
// answers instead if it returns true.
func each(method string, answer func(n int, w http.ResponseWriter) bool) func(http.Handler) http.Handler {
	return func(store http.Handler) http.Handler {
		var mu sync.Mutex
		n := -1
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == method {
				mu.Lock()
				n++
				count := n
				mu.Unlock()
				if answer(count, w) {
					return
				}
			}
			store.ServeHTTP(w, r)
		})
	}
}

// without is a node whose answers lack a header.
func without(header string) func(http.Handler) http.Handler {
	return func(store http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rec := httptest.NewRecorder()
			store.ServeHTTP(rec, r)
			rec.Header().Del(header)
			for name, values := range rec.Header() {
				w.Header()[name] = values
			}
			w.WriteHeader(rec.Code)
			_, _ = w.Write(rec.Body.Bytes())
		})
	}
}

func sleeps(d time.Duration) func(int, http.ResponseWriter) bool {
	return func(int, http.ResponseWriter) bool {
		time.Sleep(d)
		return false
	}
}

func TestLoad(t *testing.T) {
	const iterations = 2000
	tests := []struct {
		name     string
		server   func(http.Handler) http.Handler
		want     int // exit status
		atLeast  int // iterations that ended
		atMost   int
		scenario string
	}{
		{"right and quick", each("", nil), 0, iterations, iterations, "objects,contacts"},
		// 10 clients, so about 500 in 5 s; the last of them are answered after the limit.
		{"right and too slow to end", each(http.MethodPut, sleeps(100*time.Millisecond)), 0, iterations / 100, iterations / 2, "contacts"},
		{"next to nothing done", each(http.MethodPut, sleeps(6*time.Second)), thresholdsFailed, 0, 10, "contacts"},
		{"never answers", each(http.MethodPut, sleeps(15*time.Second)), thresholdsFailed, 0, 10, "contacts"},
		{"one 500 of many", each(http.MethodPut, func(n int, w http.ResponseWriter) bool {
			if n != 700 {
				return false
			}
			w.WriteHeader(http.StatusInternalServerError)
			return true
		}), thresholdsFailed, 0, iterations, "contacts"},
		{"200 for a write", each(http.MethodPut, func(_ int, w http.ResponseWriter) bool {
			w.Header().Set("Resource-Version", "1")
			return true
		}), thresholdsFailed, 0, iterations, "contacts"},
		{"no resource version", without("Resource-Version"), thresholdsFailed, 0, iterations, "contacts"},
		{"no location", without("Location"), thresholdsFailed, 0, iterations, "objects"},
		{"no ETag", without("ETag"), thresholdsFailed, 0, iterations, "objects"},
		{"reads something else", each(http.MethodGet, func(n int, w http.ResponseWriter) bool {
			return n == 3
		}), thresholdsFailed, 0, iterations, "objects"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			server := httptest.NewServer(tt.server(newFakeStore()))
			defer server.Close()
			summary := filepath.Join(t.TempDir(), "summary.json")
			cmd := exec.Command("go", "tool", "k6", "run", "--quiet", "--no-usage-report",
				"--summary-export", summary, filepath.Join("..", "..", "k6.js"))
			cmd.Env = append(os.Environ(),
				"RAFTRV_URLS="+server.URL+","+server.URL,
				"RAFTRV_SCENARIOS="+tt.scenario,
				"RAFTRV_MAX_DURATION=5",
				fmt.Sprintf("RAFTRV_ITERATIONS=%d", iterations))
			out, err := cmd.CombinedOutput()

			status := 0
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
				status = exit.ExitCode()
			} else if err != nil {
				t.Fatal(err)
			}
			if status != tt.want {
				t.Fatalf("exit status %d, want %d:\n%s", status, tt.want, out)
			}
			scenarios := 1 + strings.Count(tt.scenario, ",")
			if done := iterationsOf(t, summary); done < tt.atLeast*scenarios || done > tt.atMost*scenarios {
				t.Errorf("%d iterations, want %d to %d:\n%s", done, tt.atLeast*scenarios, tt.atMost*scenarios, out)
			}
		})
	}
}

func iterationsOf(t *testing.T, file string) int {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var summary struct {
		Metrics struct {
			Iterations struct {
				Count int `json:"count"`
			} `json:"iterations"`
		} `json:"metrics"`
	}
	if err := json.Unmarshal(text, &summary); err != nil {
		t.Fatal(err)
	}
	return summary.Metrics.Iterations.Count
}
