package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// k6 runs the contacts scenario of k6.js; env is added to its environment.
func (b *bench) k6(ctx context.Context, urls []string, env ...string) (sample, error) {
	summary := filepath.Join(b.dir, "k6.json")
	cmd := exec.CommandContext(ctx, "go", "tool", "-modfile=tools/k6/go.mod", "k6",
		"run", "--quiet", "--no-usage-report", "--summary-export", summary, "k6.js")
	cmd.Env = append(os.Environ(),
		"RAFTRV_URLS="+strings.Join(urls, ","),
		"RAFTRV_SCENARIOS=contacts",
		fmt.Sprintf("RAFTRV_ITERATIONS=%d", b.config.iterations),
		"RAFTRV_MAX_DURATION=300")
	cmd.Env = append(cmd.Env, env...)
	if out, err := cmd.CombinedOutput(); err != nil { // a check that failed is an exit status, too
		return sample{}, fmt.Errorf("k6: %w\n%s", err, out)
	}
	text, err := os.ReadFile(summary)
	if err != nil {
		return sample{}, fmt.Errorf("k6: %w", err)
	}
	return parseK6(text)
}

// parseK6 reads the file that k6 run --summary-export writes.
func parseK6(text []byte) (sample, error) {
	var summary struct {
		Metrics struct {
			Iterations struct {
				Rate float64 `json:"rate"`
			} `json:"iterations"`
			Duration struct {
				P50 float64 `json:"med"` // milliseconds
				P99 float64 `json:"p(99)"`
			} `json:"http_req_duration"`
		} `json:"metrics"`
	}
	if err := json.Unmarshal(text, &summary); err != nil {
		return sample{}, fmt.Errorf("k6 summary: %w", err)
	}
	m := summary.Metrics
	if m.Iterations.Rate == 0 || m.Duration.P50 == 0 || m.Duration.P99 == 0 {
		return sample{}, errors.New("k6 summary: no result")
	}
	ms := func(v float64) time.Duration {
		return time.Duration(v * float64(time.Millisecond)).Round(time.Microsecond)
	}
	return sample{PerSecond: m.Iterations.Rate, P50: ms(m.Duration.P50), P99: ms(m.Duration.P99)}, nil
}
