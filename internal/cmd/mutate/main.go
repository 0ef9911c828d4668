// Mutate plants small bugs in Go files, one at a time, and says which of them no quick test notices.
//
//	go run ./internal/cmd/mutate [-sample 50] [-seed 1] [-out FILE] FILE...
//
// All mutants of the files are compiled into one test binary, with go test -overlay, so nothing in the tree
// changes; an environment variable switches one of them on. Each test runs once without any, which tells the
// mutants that it comes by; a mutant is then tried on just those tests, quickest first. Tests are those that
// -short leaves and that end within -slowest.
//
// Mutants that survive, or that no test comes by, are printed with their line. Some change nothing that anybody could
// see; the others are tests that are missing.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

type config struct {
	files   []string
	sample  int
	seed    uint64
	slowest time.Duration
	jobs    int
	out     string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	var c config
	flags := flag.NewFlagSet("mutate", flag.ContinueOnError)
	flags.IntVar(&c.sample, "sample", 0, "try so many mutants, chosen by chance; 0: all")
	flags.Uint64Var(&c.seed, "seed", 1, "of that chance")
	flags.DurationVar(&c.slowest, "slowest", 10*time.Second, "do without tests that take longer")
	flags.IntVar(&c.jobs, "jobs", runtime.GOMAXPROCS(0), "try so many mutants at once")
	flags.StringVar(&c.out, "out", "", "append each result to this file, and do not try again what was killed according to it")
	if err := flags.Parse(args); err != nil {
		return err
	}
	c.files = flags.Args()
	if len(c.files) == 0 {
		return errors.New("no file given; usage: mutate [-sample 50] [-seed 1] [-out FILE] FILE")
	}
	dir := filepath.Dir(c.files[0])
	for _, file := range c.files {
		if filepath.Dir(file) != dir {
			return fmt.Errorf("%s and %s are not in one package", c.files[0], file)
		}
	}

	scratch, err := os.MkdirTemp("", "mutate-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(scratch) }() // of the system's temporary directory
	p, err := build(ctx, scratch, dir, c.files)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%d mutants, %d more do not compile\n", len(p.mutants), p.broken)
	if err := p.measure(ctx, c.slowest, c.jobs); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%d tests take %v one by one; left out: %s\n",
		len(p.tests), p.total().Round(time.Second), strings.Join(p.omitted, ", "))

	mutants := p.mutants
	if c.sample > 0 && c.sample < len(mutants) {
		r := rand.New(rand.NewPCG(c.seed, 0))
		r.Shuffle(len(mutants), func(i, j int) { mutants[i], mutants[j] = mutants[j], mutants[i] })
		mutants = mutants[:c.sample]
		slices.SortFunc(mutants, func(a, b *mutant) int { return a.id - b.id })
	}
	return tryAll(ctx, p, mutants, c, stdout)
}

// tryAll tries the mutants and prints those that no test notices, and how many there were of each kind.
func tryAll(ctx context.Context, p *program, mutants []*mutant, c config, stdout io.Writer) error {
	known, out, err := openResults(c.out)
	if err != nil {
		return err
	}
	defer out.Close()

	var (
		mu     sync.Mutex
		failed error
		count  = map[result]int{}
		queue  = make(chan *mutant)
		wg     sync.WaitGroup
	)
	for range c.jobs {
		wg.Go(func() {
			for m := range queue {
				r, again := killed, known[p.key(m)]
				var err error
				if !again {
					r, err = p.try(ctx, m)
				}
				mu.Lock()
				switch {
				case err != nil:
					failed = errors.Join(failed, err)
				case !again:
					_, err := fmt.Fprintf(out, "%s\t%s\n", r, p.key(m))
					failed = errors.Join(failed, err)
				}
				if err == nil {
					count[r]++
					if r != killed {
						fmt.Fprintf(stdout, "%-9s %s\n", r, m)
					}
				}
				mu.Unlock()
			}
		})
	}
	for _, m := range mutants {
		if ctx.Err() != nil {
			break
		}
		queue <- m
	}
	close(queue)
	wg.Wait()
	fmt.Fprintf(stdout, "%d tried: %d killed, %d survived, %d not reached by any test\n",
		count[killed]+count[survived]+count[unreached], count[killed], count[survived], count[unreached])
	return errors.Join(ctx.Err(), failed)
}

// openResults reads which mutants were killed in earlier runs, and opens the file for more results. Without a name
// there are none.
func openResults(name string) (killedBefore map[string]bool, out io.WriteCloser, err error) {
	killedBefore = map[string]bool{}
	if name == "" {
		return killedBefore, discard{io.Discard}, nil
	}
	file, err := os.OpenFile(name, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return nil, nil, err
	}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if key, ok := strings.CutPrefix(lines.Text(), string(killed)+"\t"); ok {
			killedBefore[key] = true
		}
	}
	return killedBefore, file, lines.Err()
}

type discard struct{ io.Writer }

func (discard) Close() error { return nil }
