package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	keyCount  = 4096
	valueSize = 64
)

// load is a kind of request.
type load struct {
	name     string
	baseline string // the load that the empty handler gets in its place
	method   string
	query    string
}

var (
	putLoad   = load{name: "put", baseline: "put", method: "PUT"}
	getLoad   = load{name: "get", baseline: "get", method: "GET"}
	localLoad = load{name: "local", baseline: "get", method: "GET", query: "?resourceVersion=0"}
)

// sample is the result of one run of a cell.
type sample struct {
	PerSecond float64       `json:"perSecond"`
	P50       time.Duration `json:"p50ns"`
	P99       time.Duration `json:"p99ns"`
}

// wrkScript walks through the keys, each thread from a place of its own. The requests are made before the
// start, so that the load generator spends no time on them.
const wrkScript = `local method, query, keys, value_size = %q, %q, %d, %d
local threads, requests, at = 0, {}, 0

function setup(thread)
  thread:set("first", threads * keys / 2)
  threads = threads + 1
end

function init()
  local body = method == "PUT" and string.rep("v", value_size) or nil
  for i = 0, keys - 1 do
    requests[i] = wrk.format(method, string.format("%s", i) .. query, nil, body)
  end
  at = first
end

function request()
  at = (at + 1) %% keys
  return requests[at]
end
`

// keyFormat makes the path of a key, here and in the script.
const keyFormat = "/bench-%04d"

// wrk runs wrk against one node.
func (b *bench) wrk(ctx context.Context, l load, url string, conns int) (sample, error) {
	script := filepath.Join(b.dir, l.name+".lua")
	text := fmt.Sprintf(wrkScript, l.method, l.query, keyCount, valueSize, keyFormat)
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		return sample{}, err
	}
	threads := min(conns, 2)
	cmd := exec.CommandContext(ctx, "wrk",
		fmt.Sprintf("-t%d", threads), fmt.Sprintf("-c%d", conns), fmt.Sprintf("-d%ds", int(b.config.duration.Seconds())),
		"--latency", "-s", script, url)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return sample{}, fmt.Errorf("wrk: %w\n%s", err, out)
	}
	s, err := parseWrk(string(out))
	if err != nil {
		return sample{}, fmt.Errorf("wrk: %w\n%s", err, out)
	}
	return s, nil
}

// parseWrk reads what wrk --latency prints. A run in which any request failed has no result: an error is
// answered faster than a write.
func parseWrk(out string) (sample, error) {
	var s sample
	lines := bufio.NewScanner(strings.NewReader(out))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(line, "Non-2xx") || strings.HasPrefix(line, "Socket errors") {
			return sample{}, errors.New(line)
		}
		f := strings.Fields(line)
		if len(f) != 2 {
			continue
		}
		var err error
		switch f[0] {
		case "50%":
			s.P50, err = time.ParseDuration(f[1])
		case "99%":
			s.P99, err = time.ParseDuration(f[1])
		case "Requests/sec:":
			s.PerSecond, err = strconv.ParseFloat(f[1], 64)
		}
		if err != nil {
			return sample{}, fmt.Errorf("line %q: %w", line, err)
		}
	}
	if s.PerSecond == 0 || s.P50 == 0 || s.P99 == 0 {
		return sample{}, errors.New("no result in the output")
	}
	return s, nil
}

// preload writes every key once, so that no GET meets a 404.
func preload(ctx context.Context, url string) error {
	value := strings.Repeat("v", valueSize)
	for i := range keyCount {
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, url+fmt.Sprintf(keyFormat, i), strings.NewReader(value))
		if err != nil {
			return fmt.Errorf("preload: %w", err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return fmt.Errorf("preload: %w", err)
		}
		res.Body.Close()
		if res.StatusCode/100 != 2 {
			return fmt.Errorf("preload: PUT %s: %s", req.URL, res.Status)
		}
	}
	return nil
}
