package main

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// Bounds of what waits to be written to the log.
const (
	logLinesMax  = 4096
	logFlushTime = time.Second // for what waits when the process ends
)

// logQueue passes on what is logged from a goroutine of its own. Whoever logs
// must not wait for the other end of a pipe that nobody reads, least of all the
// raft loop: lines that there is no room for are dropped and counted.
type logQueue struct {
	lines   chan []byte
	dropped atomic.Int64
	flushes chan chan struct{}
	stop    chan struct{}
	done    chan struct{}
}

func newLogQueue(w io.Writer) *logQueue {
	l := &logQueue{lines: make(chan []byte, logLinesMax), flushes: make(chan chan struct{}), stop: make(chan struct{}), done: make(chan struct{})}
	go l.run(w)
	return l
}

// Write takes a line. It never waits.
func (l *logQueue) Write(line []byte) (int, error) {
	select {
	case l.lines <- bytes.Clone(line):
	default:
		l.dropped.Add(1)
	}
	return len(line), nil
}

// Sync waits until what was logged before is written, but not for long. zap
// calls it before a panic, and wants an error that there never is.
func (l *logQueue) Sync() error { //nolint:unparam // zapcore.WriteSyncer has it
	enough := time.After(logFlushTime)
	flushed := make(chan struct{})
	select {
	case l.flushes <- flushed:
	case <-l.done:
		return nil
	case <-enough:
		return nil
	}
	select {
	case <-flushed:
	case <-enough:
	}
	return nil
}

// close writes what is left. What is logged later is lost.
func (l *logQueue) close() {
	_ = l.Sync() // never fails
	close(l.stop)
}

func (l *logQueue) run(w io.Writer) {
	defer close(l.done)
	for {
		select {
		case line := <-l.lines:
			l.write(w, line)
		case flushed := <-l.flushes:
			for len(l.lines) > 0 {
				l.write(w, <-l.lines)
			}
			close(flushed)
		case <-l.stop:
			return
		}
	}
}

func (l *logQueue) write(w io.Writer, line []byte) {
	_, _ = w.Write(line) // where would one complain?
	if n := l.dropped.Swap(0); n > 0 {
		_, _ = fmt.Fprintf(w, `{"level":"warn","msg":"lines of the log were lost: nobody read them in time","lines":%d}`+"\n", n)
	}
}
