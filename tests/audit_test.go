package tests

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

// The durability audit does not ask the program what it has synced: it watches the system calls of all nodes,
// and checks that no success leaves a node before a majority has the write in a log that is synced.

func TestAudit(t *testing.T) {
	for _, nodes := range []int{1, 3} {
		t.Run(fmt.Sprintf("nodes=%d", nodes), func(t *testing.T) {
			if testing.Short() {
				t.Skip("starts processes")
			}
			binary, traces := traced(t, buildLiveBinary(t))
			c := newLiveCluster(t, proc.Options{Nodes: nodes, Binary: binary})
			const clients, writes = 6, 30
			var wg sync.WaitGroup
			for i := range clients {
				wg.Go(func() {
					l := c.client(c.Nodes[i%nodes])
					defer l.close()
					for range writes {
						if o := l.put("audit/"+strconv.Itoa(i), "audit-"+c.newValue(10)); o.outcome != liveDone {
							t.Errorf("not written: %v", o)
						}
					}
				})
			}
			wg.Wait()
			testkit.Must(t, c.Stop()) // the traces are complete when the nodes are gone

			a := newAudit()
			files, err := filepath.Glob(filepath.Join(traces, "*"))
			testkit.Must(t, err)
			if len(files) != nodes {
				t.Fatalf("%d traces of %d nodes", len(files), nodes)
			}
			for node, file := range files {
				f, err := os.Open(file)
				testkit.Must(t, err)
				defer f.Close()
				testkit.Must(t, a.read(node, f))
			}
			acked := map[uint64]string{}
			for _, o := range c.history.snapshot() {
				acked[o.rv] = o.value
			}
			answered, err := a.check(acked, nodes/2+1)
			if err != nil {
				t.Error(err)
			}
			if answered != clients*writes {
				t.Errorf("saw %d answers leave, want %d", answered, clients*writes)
			}
			t.Logf("%d answers, each after the sync that covers it on %d of %d nodes", answered, nodes/2+1, nodes)
		})
	}
}

// traced returns a program that runs binary under strace, and the directory where the traces go. The test is
// skipped where that is not possible.
func traced(t *testing.T, binary string) (program, traces string) {
	t.Helper()
	if err := exec.Command("strace", "-o", os.DevNull, "true").Run(); err != nil {
		t.Skipf("no strace: %v", err)
	}
	dir := t.TempDir()
	traces = filepath.Join(dir, "traces")
	testkit.Must(t, os.Mkdir(traces, 0o700))
	// -D leaves the node the child of the test, so that signals reach it and not strace.
	script := fmt.Sprintf("#!/bin/sh\nexec strace -D -f -ttt -T -y -s 1000000 -e trace=write,writev,pwrite64,fsync,fdatasync -e signal=none -o %s/$$ %s \"$@\"\n",
		traces, binary)
	program = filepath.Join(dir, "raftrv")
	testkit.Must(t, os.WriteFile(program, []byte(script), 0o700))
	return program, traces
}

// syscallEvent is one finished system call of a node.
type syscallEvent struct {
	node       int
	start, end float64 // seconds since 1970, on the clock that all nodes share
	name       string
	file       string // what the descriptor is
	data       string // that was written, with escapes
}

// audit collects the system calls that matter.
type audit struct {
	writes  []syscallEvent // to logs
	syncs   []syscallEvent // of logs
	answers []syscallEvent // to sockets
}

func newAudit() *audit { return &audit{} }

var (
	// PID TIME the rest
	traceLine = regexp.MustCompile(`^(\d+) +(\d+\.\d+) (.*)$`)
	// name(FD<FILE>, "DATA", ... ) = RESULT <SECONDS>
	traceCall = regexp.MustCompile(`(?s)^(\w+)\(\d+<(.*?)>(?:, "(.*)"[^"]*)?[^"]*\) += (-?\d+).*<(\d+\.\d+)>$`)
	// A call that another thread interrupted is on two lines.
	traceResumed = regexp.MustCompile(`^<\.\.\. \w+ resumed>(.*)$`)
)

const traceUnfinished = " <unfinished ...>"

// read takes the trace of one node.
func (a *audit) read(node int, r io.Reader) error {
	type half struct {
		start float64
		text  string
	}
	halves := map[string]half{} // by thread
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		m := traceLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			return fmt.Errorf("trace of node %d: %.200q", node, line)
		}
		thread, text := m[1], m[3]
		start, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return err
		}
		if first, ok := strings.CutSuffix(text, traceUnfinished); ok {
			halves[thread] = half{start, first}
			continue
		}
		if rest := traceResumed.FindStringSubmatch(text); rest != nil {
			start, text = halves[thread].start, halves[thread].text+rest[1]
		}
		a.add(node, start, text)
	}
}

// add takes one call, if it matters and has succeeded.
func (a *audit) add(node int, start float64, text string) {
	m := traceCall.FindStringSubmatch(text)
	if m == nil || strings.HasPrefix(m[4], "-") {
		return
	}
	took, err := strconv.ParseFloat(m[5], 64)
	if err != nil {
		return
	}
	e := syscallEvent{node: node, start: start, end: start + took, name: m[1], file: m[2], data: m[3]}
	isLog, isSync := strings.HasSuffix(e.file, ".wal"), strings.HasSuffix(e.name, "sync")
	switch {
	case isLog && isSync:
		a.syncs = append(a.syncs, e)
	case isLog:
		a.writes = append(a.writes, e)
	case strings.HasPrefix(e.data, "HTTP/1.1 2"):
		a.answers = append(a.answers, e)
	}
}

var traceVersion = regexp.MustCompile(`Resource-Version: (\d+)`)

// check looks at every answer that acknowledges a write, given each write's value by its resource version, and
// returns how many there were.
func (a *audit) check(acked map[uint64]string, quorum int) (answered int, err error) {
	var verdict liveVerdict
	for _, answer := range a.answers {
		m := traceVersion.FindStringSubmatch(answer.data)
		if m == nil {
			continue
		}
		value := acked[parseRV(m[1])]
		if value == "" {
			continue
		}
		answered++
		durable := map[int]bool{}
		for _, w := range a.writes {
			if !durable[w.node] && strings.Contains(w.data, value) && a.synced(w, answer.start) {
				durable[w.node] = true
			}
		}
		if len(durable) < quorum {
			verdict.addf("node %d acknowledged %s at %.6f, when it was durable on %d nodes", answer.node, value, answer.start, len(durable))
		}
	}
	return answered, verdict.err()
}

// synced says whether a sync that began after a write had ended before some time.
func (a *audit) synced(w syscallEvent, before float64) bool {
	for _, s := range a.syncs {
		if s.node == w.node && s.file == w.file && s.start >= w.end && s.end <= before {
			return true
		}
	}
	return false
}

// TestAudit_FindsEarlyAnswers: an auditor that never objects proves nothing.
func TestAudit_FindsEarlyAnswers(t *testing.T) {
	const (
		walFD  = `9</data/wal/0-0.wal>`
		write  = ` write(` + walFD + `, "\0\1audit-7.\377", 12) = 12 <0.001>`
		answer = ` write(8<socket:[1]>, "HTTP/1.1 201 Created\r\nResource-Version: 7\r\n\r\n", 40) = 40 <0.001>`
		synced = ` fdatasync(` + walFD + `) = 0 <0.010>`
	)
	tests := []struct {
		name   string
		nodes  []string // trace of each
		quorum int
		want   string
	}{
		{"good", []string{"1 1.00" + write + "\n1 1.10" + synced + "\n2 1.20" + answer}, 1, ""},
		{"good, interrupted", []string{
			"1 1.00" + write + "\n1 1.10 fdatasync(" + walFD + " <unfinished ...>\n2 1.11 +++ exited with 0 +++\n" +
				"1 1.15 <... fdatasync resumed>) = 0 <0.050>\n2 1.20" + answer}, 1, ""},
		{"answer while it syncs", []string{"1 1.00" + write + "\n2 1.105" + answer + "\n1 1.10" + synced}, 1, "durable on 0 nodes"},
		{"never synced", []string{"1 1.00" + write + "\n2 1.20" + answer}, 1, "durable on 0 nodes"},
		{"sync failed", []string{"1 1.00" + write + "\n1 1.10 fdatasync(" + walFD + ") = -1 EIO (Input/output error) <0.010>\n2 1.20" + answer}, 1, "durable on 0 nodes"},
		{"synced before it was written", []string{"1 1.00" + synced + "\n1 1.10" + write + "\n2 1.20" + answer}, 1, "durable on 0 nodes"},
		{"another file synced", []string{"1 1.00" + write + "\n1 1.10 fsync(3</data/snap/db>) = 0 <0.010>\n2 1.20" + answer}, 1, "durable on 0 nodes"},
		{"one of two nodes", []string{"1 1.00" + write + "\n1 1.10" + synced + "\n2 1.20" + answer, "5 1.01" + write}, 2, "durable on 1 nodes"},
		{"both nodes", []string{"1 1.00" + write + "\n1 1.10" + synced + "\n2 1.20" + answer, "5 1.01" + write + "\n5 1.12" + synced}, 2, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := newAudit()
			for node, trace := range tt.nodes {
				testkit.Must(t, a.read(node, strings.NewReader(trace+"\n")))
			}
			answered, err := a.check(map[uint64]string{7: "audit-7."}, tt.quorum)
			if got := fmt.Sprint(err); answered != 1 || (err == nil) != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("%d answers, %v, want 1 and %q", answered, err, tt.want)
			}
		})
	}
}
