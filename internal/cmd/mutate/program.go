package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

//go:embed switch.go.txt
var switchSource string

// memoryLimit in KiB is what a mutant that never stops taking memory gets.
const memoryLimit = 8 << 20

type result string

const (
	killed    result = "killed"
	survived  result = "survived"
	unreached result = "unreached"
)

// program is a test binary with all mutants in it.
type program struct {
	scratch string
	dir     string
	binary  string
	mutants []*mutant
	broken  int               // mutants that do not compile
	sums    map[string]uint32 // of the files
	tests   []*test           // that pass without a mutant, quickest first
	omitted []string          // that do not, or take too long
}

type test struct {
	name    string
	took    time.Duration
	reached map[int]bool
}

// build makes the program of a package's files.
func build(ctx context.Context, scratch, dir string, files []string) (*program, error) {
	p := &program{scratch: scratch, dir: dir, binary: filepath.Join(scratch, "mutants.test"), sums: map[string]uint32{}}
	sources := map[string][]byte{}
	var parsed *ast.File
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		f, found, err := sites(file, source, len(p.mutants)+1)
		if err != nil {
			return nil, err
		}
		parsed, sources[file], p.sums[file] = f, source, crc32.ChecksumIEEE(source)
		p.mutants = append(p.mutants, found...)
	}
	p.broken = len(p.mutants)

	overlay := map[string]string{}
	put := func(file string, text []byte) error {
		path, err := filepath.Abs(file)
		if err != nil {
			return err
		}
		overlay[path] = filepath.Join(scratch, filepath.Base(file))
		return os.WriteFile(overlay[path], text, 0o600)
	}
	if err := put(filepath.Join(dir, "zz_mutants.go"), []byte(strings.ReplaceAll(switchSource, "PACKAGE", parsed.Name.Name))); err != nil {
		return nil, err
	}
	for {
		for file, source := range sources {
			mine := slices.DeleteFunc(slices.Clone(p.mutants), func(m *mutant) bool { return m.file != file })
			if err := put(file, mutate(source, mine)); err != nil {
				return nil, err
			}
		}
		text, err := json.Marshal(map[string]any{"Replace": overlay})
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(scratch, "overlay.json"), text, 0o600); err != nil {
			return nil, err
		}
		cmd := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-gcflags=-e", "-ldflags=-s -w",
			"-overlay", filepath.Join(scratch, "overlay.json"), "-o", p.binary, ".")
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err == nil {
			p.broken -= len(p.mutants)
			return p, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if before := len(p.mutants); p.giveUp(string(out)) == before {
			return nil, fmt.Errorf("go test -c: %w\n%s", err, out)
		}
	}
}

var compileError = regexp.MustCompile(`(?m)([^/\s:]+\.go):(\d+):(\d+): `)

// giveUp drops the mutants that the compiler complains of, and says how many are left.
func (p *program) giveUp(out string) int {
	done := map[string]bool{}
	for _, e := range compileError.FindAllStringSubmatch(out, -1) {
		line, err := strconv.Atoi(e[2])
		if err != nil || done[e[1]+":"+e[2]] {
			continue
		}
		done[e[1]+":"+e[2]] = true
		on := func(kinds ...kind) func(*mutant) bool {
			return func(m *mutant) bool {
				return filepath.Base(m.file) == e[1] && m.first <= line && line <= m.last &&
					(len(kinds) == 0 || slices.Contains(kinds, m.kind))
			}
		}
		// The kinds that may not fit, one after the other; then whatever is there.
		before := len(p.mutants)
		for _, k := range dubious {
			if p.mutants = slices.DeleteFunc(p.mutants, on(k)); len(p.mutants) < before {
				break
			}
		}
		if len(p.mutants) == before {
			p.mutants = slices.DeleteFunc(p.mutants, on())
		}
	}
	return len(p.mutants)
}

// start prepares a run of the binary as go test would run it.
func (p *program) start(ctx context.Context, env string, args ...string) *exec.Cmd {
	args = append([]string{"-c", fmt.Sprintf(`ulimit -v %d; exec "$0" "$@"`, memoryLimit), p.binary, "-test.short", "-test.failfast"}, args...)
	cmd := exec.CommandContext(ctx, "sh", args...)
	cmd.Dir = p.dir
	cmd.Env = append(os.Environ(), env)
	cmd.WaitDelay = time.Second // for what its children hold open
	return cmd
}

// measure runs every test by itself.
func (p *program) measure(ctx context.Context, slowest time.Duration, jobs int) error {
	if _, err := os.Stat(p.binary); err != nil {
		return fmt.Errorf("there are no tests in %s", p.dir)
	}
	list, err := p.start(ctx, "MUTANT=0", "-test.list", "^Test").Output()
	if err != nil {
		return fmt.Errorf("list tests: %w", err)
	}
	var (
		mu sync.Mutex
		wg sync.WaitGroup
	)
	names := make(chan string)
	for i := range jobs {
		wg.Go(func() {
			for name := range names {
				t, ok := p.measureOne(ctx, name, slowest, filepath.Join(p.scratch, fmt.Sprint("reached-", i)))
				mu.Lock()
				if ok {
					p.tests = append(p.tests, t)
				} else {
					p.omitted = append(p.omitted, name)
				}
				mu.Unlock()
			}
		})
	}
	for name := range strings.Lines(string(list)) {
		names <- strings.TrimSpace(name)
	}
	close(names)
	wg.Wait()
	slices.SortFunc(p.tests, func(a, b *test) int { return cmp.Compare(a.took, b.took) })
	slices.Sort(p.omitted)
	if len(p.tests) == 0 && ctx.Err() == nil {
		return errors.New("there is no quick test that passes")
	}
	return ctx.Err()
}

func (p *program) measureOne(ctx context.Context, name string, slowest time.Duration, reached string) (*test, bool) {
	ctx, cancel := context.WithTimeout(ctx, slowest)
	defer cancel()
	start := time.Now()
	err := p.start(ctx, "MUTANTS_REACHED="+reached, "-test.run", "^"+name+"$").Run()
	t := &test{name: name, took: time.Since(start), reached: map[int]bool{}}
	text, readErr := os.ReadFile(reached)
	_ = os.Remove(reached) // it is not there if no mutant was
	if err != nil || readErr != nil {
		return nil, false
	}
	for line := range bytes.Lines(text) {
		if id, err := strconv.Atoi(string(bytes.TrimSpace(line))); err == nil {
			t.reached[id] = true
		}
	}
	return t, true
}

func (p *program) total() (sum time.Duration) {
	for _, t := range p.tests {
		sum += t.took
	}
	return sum
}

// together is how long a test may take to be run in one process with others.
const together = 300 * time.Millisecond

// try runs the tests that come by a mutant, with the mutant switched on. Taking far too long is noticing it.
func (p *program) try(ctx context.Context, m *mutant) (result, error) {
	var runs [][]*test
	for _, t := range p.tests { // quickest first
		if !t.reached[m.id] {
			continue
		}
		if len(runs) == 0 || t.took > together {
			runs = append(runs, nil)
		}
		runs[len(runs)-1] = append(runs[len(runs)-1], t)
	}
	for _, tests := range runs {
		var names []string
		var took time.Duration
		for _, t := range tests {
			names = append(names, t.name)
			took += t.took
		}
		limited, cancel := context.WithTimeout(ctx, 5*time.Second+5*took)
		passed := p.start(limited, fmt.Sprint("MUTANT=", m.id), "-test.run", "^("+strings.Join(names, "|")+")$").Run() == nil
		cancel()
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		if !passed {
			return killed, nil
		}
	}
	if len(runs) == 0 {
		return unreached, nil
	}
	return survived, nil
}

// key names a mutant for as long as its file does not change.
func (p *program) key(m *mutant) string {
	return fmt.Sprintf("%s\t%08x\t%d\t%s", m.file, p.sums[m.file], m.edits[0].pos, m.kind)
}
