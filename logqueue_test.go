package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"testing"

	"raftrv/internal/testkit"
)

// TestLogQueue: whoever logs does not wait for who should read it, and what was lost is told.
func TestLogQueue(t *testing.T) {
	r, w := io.Pipe()
	l := newLogQueue(w)
	const lines = 3 * logLinesMax
	for i := range lines { // would hang here
		_, err := fmt.Fprintf(l, "line %d\n", i)
		testkit.Must(t, err)
	}
	read := make(chan []string)
	go func() {
		var all []string
		for in := bufio.NewScanner(r); in.Scan(); {
			all = append(all, in.Text())
		}
		read <- all
	}()
	testkit.Must(t, l.Sync())
	_, err := fmt.Fprintln(l, "the last")
	testkit.Must(t, err)
	l.close()
	<-l.done
	testkit.Must(t, w.Close())
	got := <-read
	var lost int
	for i, line := range got {
		if strings.HasPrefix(line, "{") {
			_, err := fmt.Sscanf(line[strings.LastIndex(line, ":")+1:], "%d}", &lost)
			testkit.Must(t, err)
			got = append(got[:i:i], got[i+1:]...)
			break
		}
	}
	if got[0] != "line 0" || got[len(got)-1] != "the last" || len(got)-1+lost != lines {
		t.Errorf("%d lines and %d that were lost, from %q to %q; want %d", len(got), lost, got[0], got[len(got)-1], lines+1)
	}
}
