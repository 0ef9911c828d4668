package httpapi

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// This file says whether a node is ready to serve, as a list of named checks.

// Check is one condition of readiness. Its name is a label of a metric, too, so
// it never changes.
type Check struct {
	Name string
	// run returns why the node is not ready. It must return soon after ctx ends.
	Run func(ctx context.Context) error
}

// ClusterChecks are the conditions of every node.
func ClusterChecks(s Store) []Check {
	return []Check{
		{"leader", func(context.Context) error {
			if s.Status().LeaderID == 0 {
				return errors.New("no leader is known")
			}
			return nil
		}},
		// The read proves both that the leader leads and that this node has caught
		// up with it.
		{"caught-up", func(ctx context.Context) error { return s.Fresh(ctx, Read{Timeout: readyTimeout}) }},
		{"state", func(ctx context.Context) error { return s.Fresh(ctx, Read{Timeout: readyTimeout, Local: true}) }},
	}
}

// RunChecks runs all checks at the same time and yields their results in order.
func RunChecks(ctx context.Context, checks []Check) func(yield func(name string, err error) bool) {
	results := make([]error, len(checks))
	var running sync.WaitGroup
	for i, c := range checks {
		running.Go(func() { results[i] = c.Run(ctx) })
	}
	running.Wait()
	return func(yield func(string, error) bool) {
		for i, c := range checks {
			if !yield(c.Name, results[i]) {
				return
			}
		}
	}
}

// readiness describes the results of checks, one a line.
func readiness(ctx context.Context, checks []Check) (lines string, failed []string) {
	var b strings.Builder
	for name, err := range RunChecks(ctx, checks) {
		if err == nil {
			fmt.Fprintf(&b, "[+]%s ok\n", name)
			continue
		}
		failed = append(failed, fmt.Sprintf("%s: %v", name, err))
		fmt.Fprintf(&b, "[-]%s failed: %v\n", name, err)
	}
	if failed == nil {
		b.WriteString("ready\n")
	} else {
		b.WriteString("not ready\n")
	}
	return b.String(), failed
}
