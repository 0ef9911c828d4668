package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// victim is the package that is mutated in the tests. TestClamp sees all of clamp that can be seen, and nothing else.
var victim = map[string]string{
	"go.mod": "module victim\n\ngo 1.26\n",
	"victim.go": `package victim

import "errors"

var log logger

type logger struct{}

func (logger) Info(string, ...int) {}

const limit = 9

func clamp(n uint64) uint64 {
	if n < 3 && n != 1 ||
		n == 2 {
		log.Info("low", 1)
		return 3
	}
	switch {
	case n > limit:
		n = limit
		n += 0
	}
	return n
}

func never(n int) error {
	err := errors.New("never")
	return err
}
`,
	"victim_test.go": `package victim

import "testing"

func TestClamp(t *testing.T) {
	for n, want := range map[uint64]uint64{0: 3, 1: 1, 2: 3, 8: 8, 9: 9, 10: 9, 20: 9} {
		if got := clamp(n); got != want {
			t.Errorf("%d: got %d", n, got)
		}
	}
}
`,
}

func writeVictim(t *testing.T) string {
	dir := t.TempDir()
	for name, text := range victim {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestRun(t *testing.T) {
	dir := writeVictim(t)
	results := filepath.Join(dir, "results")
	args := []string{"-out", results, filepath.Join(dir, "victim.go")}
	var out strings.Builder
	if err := run(t.Context(), args, &out); err != nil {
		t.Fatal(err)
	}
	// 3 becomes 3 and 9 becomes 9 either way, and adding 0 is adding nothing.
	want := `
survived  victim.go:14: bound is off by one: if n < 3 && n != 1 ||
survived  victim.go:20: bound is off by one: case n > limit:
survived  victim.go:22: statement is skipped: n += 0
unreached victim.go:29: error is dropped: return err
`
	got := strings.ReplaceAll(out.String(), dir+string(filepath.Separator), "")
	for _, line := range strings.Split(strings.TrimSpace(want), "\n") {
		if !strings.Contains(got, line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	if t.Failed() || !regexp.MustCompile(`(\d+) tried: \d+ killed, \d survived, 1 not reached`).MatchString(got) {
		t.Fatalf("got:\n%s", got)
	}
	if strings.Contains(got, "log.Info") || strings.Contains(got, "const") {
		t.Errorf("mutated what cannot matter:\n%s", got)
	}

	// A second run tries only what survived, and says the same.
	before := readLines(t, results)
	var again strings.Builder
	if err := run(t.Context(), args, &again); err != nil {
		t.Fatal(err)
	}
	retried := readLines(t, results)[len(before):]
	if len(retried) != 4 || slices.ContainsFunc(retried, func(l string) bool { return strings.HasPrefix(l, "killed") }) {
		t.Errorf("tried again: %q", retried)
	}
	if last := lastLine(got); lastLine(again.String()) != last {
		t.Errorf("got %q, then %q", last, lastLine(again.String()))
	}
}

func readLines(t *testing.T, file string) []string {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

func TestRun_Fails(t *testing.T) {
	dir := writeVictim(t)
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"no file", nil, "no file given"},
		{"no such file", []string{"no-such.go"}, "no-such.go"},
		{"two packages", []string{"a.go", "b/b.go"}, "not in one package"},
		{"no tests", []string{filepath.Join(dir, "victim.go")}, "no tests"},
	}
	if err := os.Remove(filepath.Join(dir, "victim_test.go")); err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			if err := run(t.Context(), tt.args, &out); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q\n%s", err, tt.want, out.String())
			}
		})
	}
}
