package tests

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"raftrv/internal/proc"
	"raftrv/internal/testkit"
	"raftrv/internal/watchcheck"
)

// rotateJournal does what logrotate does with "create" off, once: it renames the journal of a node and signals it,
// or copies and empties it. A name is taken once, so the files sort in the order of time.
func rotateJournal(n *proc.Node, i int, random *rand.Rand) (way string, err error) {
	path, next := journalOf(n), fmt.Sprintf("%s.%05d", journalOf(n), i)
	if info, err := os.Stat(path); err != nil || info.Size() == 0 {
		return "", nil //nolint:nilerr // not there yet, and what is empty is not rotated
	}
	signal := random.IntN(2) == 0
	if random.IntN(2) == 0 {
		err, way = os.Rename(path, next), "rename"
	} else {
		err, way = copyTruncate(path, next), "copytruncate"
	}
	if signal && err == nil && n.PID() != 0 {
		way += ", signal"
		if err = syscall.Kill(n.PID(), syscall.SIGHUP); errors.Is(err, syscall.ESRCH) {
			err = nil // it was killed meanwhile
		}
	}
	return way, err
}

// copyTruncate copies a file and empties it.
func copyTruncate(path, next string) error {
	from, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.Create(next)
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, 4096)); err != nil {
		return errors.Join(err, to.Close())
	}
	time.Sleep(time.Millisecond) // so that there is a moment in which it would be wrong to write
	return errors.Join(from.Truncate(0), to.Close())
}

// rotatedJournal returns what the journals of a node say together.
func rotatedJournal(t *testing.T, n *proc.Node) (lines []string, files, extra int) {
	t.Helper()
	dir, err := os.ReadDir(n.DataDir + "/..")
	testkit.Must(t, err)
	var contents []string
	names := []string{journalOf(n)}
	for _, e := range dir {
		if name := n.DataDir + "/../" + e.Name(); strings.HasPrefix(e.Name(), journalName(n)+".") {
			names = append(names, name)
		}
	}
	slices.Sort(names[1:])
	for _, name := range append(names[1:], names[0]) { // the one without a number is the newest
		b, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue // renamed, and the node was stopped
		}
		testkit.Must(t, err)
		contents = append(contents, string(b))
		extra += strings.Count(string(b), "\n") - strings.Count(string(b), `{"journal":1,`)
	}
	lines, err = watchcheck.ReadJournals(contents)
	if err != nil {
		t.Errorf("journals of node %d: %v", n.ID, err)
	}
	return lines, len(contents), extra - len(lines)
}

func journalName(n *proc.Node) string { return fmt.Sprintf("raftrv-%d.journal", n.ID) }

// checkJournalLines: versions are dense from 1, or from where the journal says that some are missing.
func checkJournalLines(t *testing.T, n *proc.Node, lines []string) (events int) {
	t.Helper()
	last, more := uint64(0), false
	for _, text := range lines {
		var line struct {
			RV   uint64
			More bool
			Gap  *struct{ From, To uint64 }
		}
		testkit.Must(t, json.Unmarshal([]byte(text), &line))
		switch {
		case line.Gap != nil && !more && line.Gap.From == last+1 && line.Gap.To == line.RV:
		case line.Gap == nil && (more && line.RV == last || !more && line.RV == last+1):
			events++
		default:
			t.Fatalf("journal of node %d: after %d: %s", n.ID, last, text)
		}
		last, more = line.RV, line.More
	}
	if more {
		t.Errorf("journal of node %d ends within version %d", n.ID, last)
	}
	return events
}

// TestProcess_JournalRotated: under load, and with kills in between, files are rotated in both ways of logrotate,
// with and without a signal. All files of a node together have everything once and in order, and those of all nodes
// say the same. SIGHUP ends no node, with or without a journal.
func TestProcess_JournalRotated(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	c := newLiveCluster(t, proc.Options{Args: []string{"--journal-sync", "50ms"}, NodeArgs: func(n *proc.Node) []string {
		if n.ID == 3 {
			return nil
		}
		return []string{"--journal", journalOf(n)}
	}})
	load := c.load(8, c.Nodes[1:], func(l *liveClient) {
		putNewOrWait(l)
		l.do("POST", l.node.URL()+"/-/v1/txn", `{"then":[{"op":"put","key":"t/1","value":"`+strings.Repeat("x", 300)+`"},{"op":"put","key":"t/2","value":"{\n}"},{"op":"delete","key":"t/3"}]}`)
	})
	stop := make(chan struct{})
	var group sync.WaitGroup
	ways := map[string]int{}
	var mu sync.Mutex
	for _, n := range c.Nodes[:2] {
		group.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(n.ID)))
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(random.IntN(300)) * time.Millisecond):
				}
				way, err := rotateJournal(n, i, random)
				if err != nil {
					t.Errorf("%s: %v", way, err)
				}
				mu.Lock()
				ways[way]++
				mu.Unlock()
			}
		})
	}
	random := rand.New(rand.NewPCG(seed, 0))
	for range testkit.Sized(5, 60) {
		time.Sleep(time.Duration(200+random.IntN(600)) * time.Millisecond)
		n := c.Nodes[random.IntN(2)]
		switch random.IntN(3) {
		case 0:
			c.stop(n)
		default:
			c.kill(n)
		}
		time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
		c.start()
		testkit.Must(t, syscall.Kill(c.Nodes[2].PID(), syscall.SIGHUP))
	}
	close(stop)
	group.Wait()
	load.stop()
	for _, n := range c.Nodes {
		c.stop(n) // fails if it has ended by itself
	}
	var known []string
	for _, n := range c.Nodes[:2] {
		lines, files, extra := rotatedJournal(t, n)
		events := checkJournalLines(t, n, lines)
		t.Logf("node %d: %d events in %d files, %d lines that do not count", n.ID, events, files, extra)
		if known != nil && !slices.Equal(lines, known) {
			t.Errorf("the journal of node %d has %d lines, another one %d, or they differ", n.ID, len(lines), len(known))
		}
		known = lines
	}
	t.Logf("rotated %v", ways)
}
