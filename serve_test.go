package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// TestServe_LeavesNoGoroutines runs three nodes inside this process, where goroutines can be counted: requests
// that fail for want of a majority leave none behind, and neither does a node that has stopped.
func TestServe_LeavesNoGoroutines(t *testing.T) {
	ports, err := proc.NewCluster(proc.Options{Binary: os.Args[0], Dir: t.TempDir()}) // only its ports
	testkit.Must(t, err)
	t.Cleanup(func() { _ = ports.Stop() }) // nothing was started
	var urls []string
	for _, n := range ports.Nodes {
		urls = append(urls, n.RaftURL())
	}
	before := runtime.NumGoroutine()
	type served struct {
		stop func()
		done chan error
	}
	var nodes []served
	for _, n := range ports.Nodes {
		cfg := configOf(t, "--id", strconv.Itoa(n.ID), "--cluster", strings.Join(urls, ","),
			"--port", strconv.Itoa(n.HTTPPort), "--data-dir", n.DataDir)
		ctx, stop := context.WithCancel(t.Context())
		s := served{stop, make(chan error, 1)}
		go func() { s.done <- serve(ctx, cfg, zap.NewNop(), zap.NewAtomicLevel()) }()
		nodes = append(nodes, s)
	}
	stop := func(s served) {
		t.Helper()
		s.stop()
		if err := <-s.done; err != nil {
			t.Error(err)
		}
	}

	client := http.Client{Timeout: 30 * time.Second, // so much waits under the race detector, when others work as well
		Transport: &http.Transport{DisableKeepAlives: true}}
	put := func(timeout time.Duration) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut,
			fmt.Sprintf("%s/k?timeout=%s", ports.Nodes[2].URL(), timeout), strings.NewReader("v"))
		testkit.Must(t, err)
		res, err := client.Do(req)
		if err != nil {
			return 0
		}
		_ = res.Body.Close() // only the status matters
		return res.StatusCode
	}
	testkit.WaitUntil(t, func() error {
		if code := put(time.Second); code/100 != 2 {
			return fmt.Errorf("PUT: %d", code)
		}
		return nil
	})
	for _, n := range ports.Nodes { // each counts what it is asked itself
		res, err := client.Get(n.URL() + "/-/metrics")
		testkit.Must(t, err)
		body, err := io.ReadAll(res.Body)
		testkit.Must(t, errors.Join(err, res.Body.Close()))
		if got, want := strings.Contains(string(body), `method="PUT",route="/{key}"`), n == ports.Nodes[2]; got != want {
			t.Errorf("node %d counts the PUT: %v", n.ID, got)
		}
	}
	stop(nodes[0])
	stop(nodes[1])
	goroutines := func(most int) func() error {
		return func() error {
			client.CloseIdleConnections()
			if n := runtime.NumGoroutine(); n > most {
				buf := make([]byte, 1<<20)
				return fmt.Errorf("%d goroutines, want at most %d\n%s", n, most, buf[:runtime.Stack(buf, true)])
			}
			return nil
		}
	}
	put(500 * time.Millisecond) // by then the node has noticed
	idle := runtime.NumGoroutine()
	var wg sync.WaitGroup
	var codes [600]atomic.Int64
	for range 1000 {
		wg.Go(func() { codes[put(500*time.Millisecond)].Add(1) })
	}
	wg.Wait()
	if refused, open := codes[503].Load(), codes[504].Load(); refused+open != 1000 {
		t.Errorf("%d times 503 and %d times 504, want 1000 together", refused, open)
	}
	const slack = 10 // connections to nodes that are down come and go
	testkit.WaitUntil(t, goroutines(idle+slack))
	stop(nodes[2])
	testkit.WaitUntil(t, goroutines(before+slack/2))
}
