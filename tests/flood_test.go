package tests

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"raftrv/internal/httpapi"
	"raftrv/internal/proc"
	"raftrv/internal/shares"
	"raftrv/internal/testkit"
)

// floodFrom is the address that asks for everything; those that it must not harm have another.
const (
	floodFrom  = "127.0.0.2"
	victimFrom = "127.0.0.3"
)

// flood is many connections that keep what they can get.
type flood struct {
	t     *testing.T
	node  *proc.Node
	mu    sync.Mutex
	conns []net.Conn
}

// open opens n connections, and says the same on each. What it gets is not read.
func (f *flood) open(port, n int, say string) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(floodFrom)}, Timeout: liveTimeout,
		Control: func(_, _ string, c syscall.RawConn) error { // it takes little before it stands still
			return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
		}}
	var wg sync.WaitGroup
	for worker := range 16 {
		wg.Go(func() {
			for i := worker; i < n; i += 16 {
				c, err := d.DialContext(f.t.Context(), "tcp", fmt.Sprint("127.0.0.1:", port))
				if err != nil {
					f.t.Error(err)
					return
				}
				_, _ = io.WriteString(c, say) // it may be refused
				f.mu.Lock()
				f.conns = append(f.conns, c)
				f.mu.Unlock()
			}
		})
	}
	wg.Wait()
}

func (f *flood) close() {
	for _, c := range f.conns {
		_ = c.Close() // no matter how it ended
	}
}

// floodVictim is a client whom a flood must not harm.
type floodVictim struct {
	t    *testing.T
	node *proc.Node
	http *http.Client
}

func newFloodVictim(t *testing.T, n *proc.Node) *floodVictim {
	transport := &http.Transport{DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(victimFrom)}}).DialContext}
	t.Cleanup(transport.CloseIdleConnections)
	return &floodVictim{t: t, node: n, http: &http.Client{Transport: transport, Timeout: liveTimeout}}
}

// do sends a request that must succeed, or get the status that is wanted.
func (v *floodVictim) do(method, path, body string, want int) (answer []byte, took time.Duration) {
	v.t.Helper()
	start := time.Now()
	req, err := http.NewRequestWithContext(v.t.Context(), method, v.node.URL()+path, strings.NewReader(body))
	testkit.Must(v.t, err)
	resp, err := v.http.Do(req)
	if err != nil {
		v.t.Errorf("%s %s: %v", method, path, err)
		return nil, time.Since(start)
	}
	defer resp.Body.Close()
	if answer, err = io.ReadAll(resp.Body); err != nil || resp.StatusCode/100 != 2 && resp.StatusCode != want {
		v.t.Errorf("%s %s: %s, %v: %.300s", method, path, resp.Status, err, answer)
	}
	return answer, time.Since(start)
}

// floodFigures are what a node has.
type floodFigures struct {
	rss, heap, goroutines, files int
}

func (v *floodVictim) figures() floodFigures {
	v.t.Helper()
	f := floodFigures{rss: rss(v.t, v.node), files: resourcesOf(v.t, v.node).files}
	text, _ := v.do(http.MethodGet, "/-/metrics", "", 0)
	lines := bufio.NewScanner(strings.NewReader(string(text)))
	for lines.Scan() {
		var value float64
		for name, to := range map[string]*int{"go_memstats_heap_inuse_bytes ": &f.heap, "go_goroutines ": &f.goroutines} {
			if rest, ok := strings.CutPrefix(lines.Text(), name); ok {
				_, err := fmt.Sscan(rest, &value)
				testkit.Must(v.t, err)
				*to = int(value)
			}
		}
	}
	return f
}

// work does what a client does, again and again, and returns the most that the node had and the longest that it took
// for livez, a write and a read that must end in 50 ms.
func (v *floodVictim) work() (most floodFigures, livez, put, wait time.Duration) {
	v.t.Helper()
	value := strings.Repeat("v", 20<<10)
	for range testkit.Sized(5, 100) {
		_, took := v.do(http.MethodGet, "/-/livez", "", 0)
		livez = max(livez, took)
		_, took = v.do(http.MethodPut, "/k", value, 0)
		put = max(put, took)
		_, took = v.do(http.MethodGet, "/k?resourceVersion=1000000&timeout=50ms", "", http.StatusGatewayTimeout)
		wait = max(wait, took)
		now := v.figures()
		most = floodFigures{max(most.rss, now.rss), max(most.heap, now.heap), max(most.goroutines, now.goroutines), max(most.files, now.files)}
	}
	return most, livez, put, wait
}

// TestProcess_Floods: whatever one address asks for, the others get what they need, in little time, and the node
// takes little memory for it and gives it back.
func TestProcess_Floods(t *testing.T) {
	const (
		items, itemSize = 10_000, 500 // in a JSON list more than sockets take
		rssMore         = 64 << 20    // beside the bodies that one address may have on their way
		heapMore        = 128 << 20
		livezMax        = time.Second // on a machine that does other things as well; else it is a twentieth
	)
	c := newLiveCluster(t, proc.Options{})
	n := c.leader()
	if conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(victimFrom)}}).DialContext(t.Context(), "tcp", fmt.Sprint("127.0.0.1:", n.HTTPPort)); err == nil {
		_ = conn.Close() // there is such an address
	} else {
		t.Skip(err)
	}
	v := newFloodVictim(t, n)
	for i := 0; i < items; i += 100 {
		var ops []string
		for j := range 100 {
			ops = append(ops, fmt.Sprintf(`{"op":"put","key":"item/%05d","value":"%s"}`, i+j, strings.Repeat("v", itemSize)))
		}
		v.do(http.MethodPost, "/-/v1/txn", `{"then":[`+strings.Join(ops, ",")+`]}`, 0)
	}
	v.do(http.MethodGet, "/-/v1/backup", "", 0)
	v.do(http.MethodPut, "/k", strings.Repeat("v", 20<<10), 0)
	get := func(path string) string { return "GET " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" }
	for _, tt := range []struct {
		name string
		port int
		n    int
		say  string
	}{
		{"bodies that are announced", n.HTTPPort, 128, "PUT /flood HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1048576\r\n\r\n"},
		{"bodies that stop", n.HTTPPort, 128, "PUT /flood HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1048576\r\n\r\n" + strings.Repeat("v", 200<<10)},
		{"transactions that stop", n.HTTPPort, testkit.Sized(8, 120), "POST /-/v1/txn HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4194304\r\n\r\n" + strings.Repeat(" ", 4<<20-1)},
		{"slow headers", n.HTTPPort, 2000, "GET / HTTP/1.1\r\nHost: 127"},
		{"lists", n.HTTPPort, 1000, get("/-/v1/keys?limit=10000")},
		{"streams", n.HTTPPort, 1000, "GET /-/v1/keys HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/x-ndjson\r\n\r\n"},
		{"small lists", n.HTTPPort, 1000, strings.Repeat(get("/-/v1/keys?prefix=item/0000"), 100)},
		{"watches", n.HTTPPort, 2000, get("/-/v1/watch?prefix=k")},
		{"connections", n.HTTPPort, testkit.Sized(4200, 17_000), ""},
		{"connections of peers", n.RaftPort, 400, "POST /raft HTTP/1.1\r\nHost: x\r\nContent-Length: 41943040\r\n\r\nx"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newFloodVictim(t, n)
			before, _, _, _ := v.work() // takes memory, too
			idle := v.figures()
			start := time.Now()
			f := &flood{t: t, node: n}
			defer f.close()
			f.open(tt.port, tt.n, tt.say)
			opened := time.Since(start)
			most, livez, put, wait := v.work()
			_, backup := v.do(http.MethodGet, "/-/v1/backup", "", 0)
			v.do(http.MethodGet, "/-/v1/keys?limit=1000", "", 0)
			t.Logf("%d in %v: livez at most %v, put %v, a wait of 50 ms %v, backup %v; RSS %d + %d MiB, heap %d + %d MiB, %d goroutines, %d files", tt.n, round(opened),
				round(livez), round(put), round(wait), round(backup), before.rss>>20, (most.rss-before.rss)>>20, before.heap>>20, (most.heap-before.heap)>>20, most.goroutines, most.files)
			bodies := int(min(int64(tt.n*(len(tt.say)>>20)<<20), shares.MostOf(httpapi.BodiesSizeMax)))
			if most.rss-before.rss > rssMore+bodies || most.heap-before.heap > heapMore+bodies {
				t.Error("that is too much memory")
			}
			if livez > livezMax || wait > livezMax {
				t.Errorf("that is too late")
			}
			f.close()
			c.eventually(func() error {
				if now := v.figures(); now.goroutines > idle.goroutines+20 || now.files > idle.files+20 {
					return fmt.Errorf("left over: %+v, before %+v", now, idle)
				}
				return nil
			})
		})
	}
	c.nothingLost()
}

// TestProcess_FewFiles: a node that may open few files takes fewer connections, says so, and always finds a
// descriptor for its log.
func TestProcess_FewFiles(t *testing.T) {
	script := filepath.Join(t.TempDir(), "raftrv")
	testkit.Must(t, os.WriteFile(script, []byte("#!/bin/sh\nulimit -n 256 && exec "+buildLiveBinary(t)+" \"$@\"\n"), 0o700))
	c := newLiveCluster(t, proc.Options{Binary: script, Args: smallDiskArgs})
	n := c.leader()
	if !c.logHas(n, "the limit of open files bounds the connections") {
		t.Error("the log does not say so")
	}
	f := &flood{t: t, node: n}
	defer f.close()
	for _, say := range []string{"", "GET / HTTP/1.1\r\n", "GET /-/v1/watch HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"} {
		f.open(n.HTTPPort, 400, say)
		f.open(n.RaftPort, 400, say)
	}
	v := newFloodVictim(t, n)
	for i := range 200 { // files of the log and snapshots come and go
		v.do(http.MethodPut, fmt.Sprint("/k", i%10), strings.Repeat("v", 20<<10), 0)
	}
	v.do(http.MethodGet, "/-/livez", "", 0)
	if files := resourcesOf(t, n).files; files > 256 || !n.Running() {
		t.Errorf("%d files", files)
	}
	f.close()
	c.eventually(func() error {
		if files := resourcesOf(t, n).files; files > 60 {
			return fmt.Errorf("%d files are left", files)
		}
		return nil
	})
	c.nothingLost()
}

// logHas says whether a node has logged something.
func (c *liveCluster) logHas(n *proc.Node, text string) bool {
	c.t.Helper()
	log, err := os.ReadFile(n.LogFile)
	testkit.Must(c.t, err)
	return strings.Contains(string(log), text)
}
