// Benchhttp measures a raftrv cluster of three nodes over HTTP, with fsync on, beside an empty net/http
// handler on the same machine in the same run. What counts is the share of the empty handler that remains:
// requests per second say as much about the machine.
//
//	go run ./internal/cmd/benchhttp [-d 10s] [-reps 5] [-cells REGEXP] [-dir DIR] [-json FILE]
//
// A cell is one kind of request to one kind of node at one number of connections. A repetition runs every
// cell once; the table has the medians. wrk makes the load, and k6 that of the k6 row.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"raftrv/internal/proc"
)

const (
	startTimeout  = 30 * time.Second
	leaderTimeout = 10 * time.Second
	// leaderTries is how often a cell is measured anew because the leader moved under it.
	leaderTries = 3
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "benchhttp:", err)
		os.Exit(1)
	}
}

// config is what the flags say.
type config struct {
	binary     string
	dir        string
	duration   time.Duration
	reps       int
	cells      *regexp.Regexp
	iterations int
	jsonFile   string
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var c config
	flags := flag.NewFlagSet("benchhttp", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.binary, "binary", "./raftrv", "executable of the nodes")
	flags.StringVar(&c.dir, "dir", ".", "directory on a real disk, for a data directory that is removed afterwards")
	flags.DurationVar(&c.duration, "d", 10*time.Second, "how long wrk runs in each cell, in whole seconds")
	flags.IntVar(&c.reps, "reps", 5, "repetitions")
	cells := flags.String("cells", ".", "regular expression; run the cells whose names match, and what they are compared to")
	flags.IntVar(&c.iterations, "k6-iterations", 50000, "writes of the k6 row")
	flags.StringVar(&c.jsonFile, "json", "", "write all the results to this file, too")
	serveEmpty := flags.Bool("serve-empty", false, "be the empty handler (used by benchhttp itself)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *serveEmpty {
		return emptyMain(os.Stdin, stdout)
	}
	var err error
	if c.cells, err = regexp.Compile(*cells); err != nil {
		return fmt.Errorf("-cells: %w", err)
	}
	if c.reps < 1 || c.duration < time.Second {
		return errors.New("-reps must be 1 or more, -d a second or more")
	}
	if _, err := exec.LookPath("wrk"); err != nil {
		return errors.New("wrk is missing: install the package wrk (apt-get install wrk)")
	}

	report, err := measure(ctx, c, stderr)
	if err != nil {
		return err
	}
	report.print(stdout)
	if c.jsonFile != "" {
		return report.writeJSON(c.jsonFile)
	}
	return nil
}

// bench is what the cells are measured against.
type bench struct {
	config  config
	dir     string // scratch: wrk scripts, k6 summaries
	cluster *proc.Cluster
	empty   string // URL of the empty handler
}

// measure starts everything, runs the cells and stops everything.
func measure(ctx context.Context, c config, progress io.Writer) (r *report, err error) {
	// Not among the temporary files: they may live in memory, where fsync costs nothing.
	dir, err := os.MkdirTemp(c.dir, "bench-http-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	fsync, err := fsyncTime(dir)
	if err != nil {
		return nil, err
	}

	empty, err := startEmpty()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, empty.stop()) }()

	cluster, err := proc.NewCluster(proc.Options{Binary: c.binary, Dir: filepath.Join(dir, "cluster")})
	if err != nil {
		return nil, fmt.Errorf("%w (make raftrv builds it)", err)
	}
	defer func() { err = errors.Join(err, cluster.Stop()) }()
	startCtx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := cluster.Start(startCtx); err != nil {
		return nil, err
	}

	b := &bench{config: c, dir: dir, cluster: cluster, empty: empty.url}
	cells := selectCells(b.cells(), c.cells)
	if len(cells) == 0 {
		return nil, fmt.Errorf("no cell matches %q", c.cells)
	}
	if err := preload(ctx, cluster.URLs()[0]); err != nil {
		return nil, err
	}
	r = newReport(c, fsync, cells)
	for rep := range c.reps {
		for i, cell := range cells {
			s, err := cell.measure(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", cell.name, cmp.Or(context.Cause(ctx), err))
			}
			fmt.Fprintf(progress, "%d/%d  %-18s %9.0f/s  p50 %v  p99 %v\n", rep+1, c.reps, cell.name, s.PerSecond, s.P50, s.P99)
			r.Cells[i].Samples = append(r.Cells[i].Samples, s)
		}
	}
	r.summarize()
	return r, nil
}

// withLeader calls measure with the URLs of the leader and of a follower, and calls it again if the leader was
// another one afterwards: the result would stand in the wrong row.
func (b *bench) withLeader(ctx context.Context, measure func(leader, follower string) (sample, error)) (sample, error) {
	for range leaderTries {
		leader, err := b.leader(ctx)
		if err != nil {
			return sample{}, err
		}
		follower := b.cluster.Nodes[leader.ID%len(b.cluster.Nodes)] // ids start at 1, so this is the next one
		s, err := measure(leader.URL(), follower.URL())
		if err != nil {
			return sample{}, err
		}
		after, err := b.leader(ctx)
		if err != nil {
			return sample{}, err
		}
		if after == leader {
			return s, nil
		}
	}
	return sample{}, fmt.Errorf("the leader changed during each of %d tries", leaderTries)
}

func (b *bench) leader(ctx context.Context) (*proc.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, leaderTimeout)
	defer cancel()
	return b.cluster.Leader(ctx)
}
