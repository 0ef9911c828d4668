package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"
)

// This file is the journal: a file to which a node appends a line of JSON for
// every write that it applies, in the order of resource versions:
//
//	{"rv":7,"key":"a","timestamp":1767323045678000000,"obj":{"any":"JSON"}}
//	{"rv":8,"key":"a","timestamp":1767323045679000000,"deleted":true,"reason":"expired"}
//
// obj is the value itself if it is JSON, else a string; what is no UTF-8 is in
// objBase64. timestamp is the time of the entry in nanoseconds: its proposer's, or
// the leader's where the two were far apart. It may go back, as clocks do.
// All lines of a version but the last have "more":true. Events that this node
// never saw, or did not serve, because it was down for long and caught up with a
// snapshot, are confessed to:
//
//	{"rv":99,"gap":{"from":50,"to":99}}
//
// The journal reads the window of events like any watcher, so a slow disk holds
// up nobody. The window waits for it, up to a bound; if the disk is slower than the
// writes for so long, the node ends rather than missing one. The file itself says where to resume: after its last complete
// version. What follows, a torn line or half a version, is cut off and written
// again.

const (
	journalBufferMax  = 256 << 10 // that is kept for the next lines
	journalLineMax    = 256 << 20 // more than the largest value can take
	journalRetry      = 100 * time.Millisecond
	journalLinearize  = 5 * time.Second
	journalResumeSize = 64 << 10 // that are read at a time
)

var errJournalSlow = errors.New("the disk takes it so slowly that events have left the window before they could be written")

var errJournalDamage = errors.New("not a line of a journal; move the file away to begin another one")

type journal struct {
	path   string
	file   *os.File
	logger *zap.Logger
	rv     uint64 // the last version that is complete in the file

	hold     hold // by which the window of events waits
	caughtUp bool // everything was written once, since the hold began

	buf   []byte
	dirty time.Time // when the oldest write that is not synced happened; zero = none
}

// openJournal opens or creates a journal and cuts off what is not complete.
// Nobody else can open it until it is closed.
func openJournal(path string, logger *zap.Logger) (j *journal, err error) {
	file, err := openPrivate(path, os.O_APPEND)
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open journal %s: %w", path, err), file.Close())
		}
	}()
	if info, err := file.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file, so it cannot be resumed")
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("another process uses it: %w", err)
	}
	j = &journal{path: path, file: file, logger: logger}
	if err := j.resume(); err != nil {
		return nil, err
	}
	return j, syncDir(filepath.Dir(path))
}

// resume finds the last complete version and cuts off what follows.
func (j *journal) resume() error {
	info, err := j.file.Stat()
	if err != nil {
		return err
	}
	rv, end, err := findJournalEnd(j.file, info.Size())
	if err != nil {
		return err
	}
	j.rv = rv
	if end == info.Size() {
		return nil
	}
	j.logger.Warn("cut off an incomplete version", zap.String("journal", j.path), zap.Uint64("resourceVersion", rv), zap.Int64("bytes", info.Size()-end))
	if err := j.file.Truncate(end); err != nil {
		return err
	}
	return j.file.Sync()
}

// journalLine is what a line says about its place.
type journalLine struct {
	RV        uint64          `json:"rv"`
	Key       *string         `json:"key"`
	KeyBase64 *string         `json:"keyBase64"`
	Gap       json.RawMessage `json:"gap"`
	More      bool            `json:"more"`
}

// findJournalEnd returns the last complete version in a journal, and where it
// ends.
func findJournalEnd(r io.ReaderAt, size int64) (rv uint64, end int64, err error) {
	s := backwardScanner{r: r, start: size}
	part := uint64(0) // version of which the end is missing
	for {
		text, start, err := s.prev()
		if err != nil || len(text) == 0 {
			return 0, 0, err
		}
		if text[len(text)-1] != '\n' { // the last one
			if !isTornLine(text) {
				return 0, 0, fmt.Errorf("at offset %d: %w", start, errJournalDamage)
			}
			continue
		}
		var line journalLine
		if err := json.Unmarshal(text, &line); err != nil || line.RV == 0 || line.Key == nil && line.KeyBase64 == nil && line.Gap == nil {
			return 0, 0, fmt.Errorf("at offset %d: %w", start, errJournalDamage)
		}
		if !line.More {
			return line.RV, start + int64(len(text)), nil
		}
		if part != 0 && part != line.RV {
			return 0, 0, fmt.Errorf("at offset %d: version %d has no end: %w", start, line.RV, errJournalDamage)
		}
		part = line.RV
	}
}

// isTornLine says whether text can be the start of a line that was cut off by a
// crash. Of a power cut zeros may be left.
func isTornLine(text []byte) bool {
	const start = `{"rv":`
	n := min(len(text), len(start))
	return string(text[:n]) == start[:n] || len(bytes.Trim(text, "\x00")) == 0
}

// backwardScanner reads the lines of a file, the last one first.
type backwardScanner struct {
	r     io.ReaderAt
	start int64  // of buf in the file
	buf   []byte // what was read and not returned
}

// prev returns the line before the previous one, with its newline if it has one,
// and where it starts. At the start of the file it returns nothing.
func (s *backwardScanner) prev() (line []byte, start int64, err error) {
	for {
		n := max(0, len(s.buf)-1) // whose newline is its own
		if i := bytes.LastIndexByte(s.buf[:n], '\n'); i >= 0 || s.start == 0 {
			line, s.buf = s.buf[i+1:], s.buf[:i+1]
			return line, s.start + int64(i+1), nil
		}
		if len(s.buf) > journalLineMax {
			return nil, 0, fmt.Errorf("at offset %d: %w", s.start, errJournalDamage)
		}
		more := min(s.start, max(journalResumeSize, int64(len(s.buf))))
		buf := make([]byte, more, more+int64(len(s.buf)))
		if _, err := s.r.ReadAt(buf, s.start-more); err != nil {
			return nil, 0, err
		}
		s.start -= more
		s.buf = append(buf, s.buf...)
	}
}

// journalSource is where a journal's events come from.
type journalSource struct {
	store     *kvstore
	hub       *hub
	linearize func(ctx context.Context, timeout time.Duration) error
	stopped   <-chan struct{} // closed when nothing is applied any more
}

// run appends what is applied until the hub ends, and then the rest. An error
// means that the journal would miss something from now on.
func (j *journal) run(ctx context.Context, src journalSource, syncEvery time.Duration) error {
	if err := j.catchUp(ctx, src); err != nil {
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	j.logger.Info("journal", zap.String("path", j.path), zap.Uint64("resourceVersion", j.rv))
	j.beginHold(src.store)
	defer src.store.holdWindow(nil)
	for {
		w, err := src.hub.watch("", true, j.rv)
		if err == nil {
			err = j.follow(w, src, syncEvery)
			w.close()
		}
		switch {
		case errors.Is(err, errExpired) && j.caughtUp && j.hold.overtaken.Load():
			err = errJournalSlow
		case errors.Is(err, errExpired):
			err = j.skip(src.store.eventsDropped())
		case err == nil:
			return nil
		case errors.Is(err, errDiverged), errors.Is(err, errUnchecked):
			src.store.holdWindow(nil)
			err = j.pause(src)
			j.beginHold(src.store)
		}
		if errors.Is(err, errShuttingDown) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("journal %s: %w", j.path, err)
		}
	}
}

// beginHold makes the window wait for what is not in the file.
func (j *journal) beginHold(store *kvstore) {
	j.caughtUp = false
	j.hold.rv.Store(j.rv)
	j.hold.overtaken.Store(false)
	store.holdWindow(&j.hold)
}

// catchUp waits until the store has what the journal has. After a restart that
// takes a moment.
func (j *journal) catchUp(ctx context.Context, src journalSource) error {
	for src.store.version() < j.rv {
		if err := src.linearize(ctx, journalLinearize); err == nil {
			break
		}
		select {
		case <-time.After(journalRetry):
		case <-src.stopped:
			return nil
		}
	}
	if now := src.store.version(); now < j.rv {
		return fmt.Errorf("it is at resource version %d, but the store is at %d: does it belong to another cluster?", j.rv, now)
	}
	return nil
}

// pause waits until the node serves again: what it applies while its state is in
// doubt is for nobody. Then the journal goes on where it was.
func (j *journal) pause(src journalSource) error {
	if err := errors.Join(j.sync(), j.resume()); err != nil { // half a version may be there
		return err
	}
	j.logger.Info("the journal waits until the node serves", zap.String("journal", j.path), zap.Uint64("resourceVersion", j.rv))
	retry := time.NewTicker(journalRetry)
	defer retry.Stop()
	for {
		if err := src.hub.closed.Load(); err == nil {
			return nil
		} else if errors.Is(err, errShuttingDown) {
			return err
		}
		select {
		case <-retry.C:
		case <-src.stopped:
			return errShuttingDown
		}
	}
}

// skip writes that the events up to version to are missing.
func (j *journal) skip(to uint64) error {
	if err := j.resume(); err != nil { // half a version may be there
		return err
	}
	if to <= j.rv {
		return nil
	}
	j.logger.Warn("events are missing in the journal: they have left the window before they could be written",
		zap.String("journal", j.path), zap.Uint64("from", j.rv+1), zap.Uint64("to", to))
	j.buf = appendGap(j.buf[:0], j.rv+1, to)
	j.rv = to
	return j.write()
}

// follow appends events until there are none any more: then it returns nil.
func (j *journal) follow(w *watcher, src journalSource, syncEvery time.Duration) error {
	w.patient = true
	timer := time.NewTimer(syncEvery)
	defer timer.Stop()
	for {
		n, _, err := w.read(j.appendEvent)
		if errors.Is(err, errShuttingDown) {
			<-src.stopped
			return errors.Join(j.drain(w), j.sync())
		}
		if err != nil {
			return err
		}
		if err := j.write(); err != nil {
			return err
		}
		if wait := time.Until(j.dirty.Add(syncEvery)); j.dirty.IsZero() {
			timer.Stop()
		} else if wait > 0 {
			timer.Reset(wait)
		} else if err := j.sync(); err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		j.caughtUp = true
		select {
		case <-w.wake:
		case <-timer.C:
		}
	}
}

// drain appends the last events, of which no hub tells.
func (j *journal) drain(w *watcher) error {
	for {
		n, err := w.scan(j.appendEvent)
		if errors.Is(err, errExpired) {
			return nil // the next run says so
		}
		if n == 0 || err != nil {
			return err
		}
		if err := j.write(); err != nil {
			return err
		}
	}
}

// appendEvent adds the line of an event to what is to be written.
func (j *journal) appendEvent(e *event, last bool) {
	if e.rv > j.rv+1 { // the versions of a restored cluster leap once
		j.buf = appendGap(j.buf, j.rv+1, e.rv-1)
		j.rv = e.rv - 1
	}
	j.buf = appendJournalLine(j.buf, e, last)
	if last {
		j.rv = e.rv
	}
}

func (j *journal) write() error {
	if len(j.buf) == 0 {
		return nil
	}
	if _, err := j.file.Write(j.buf); err != nil {
		return err
	}
	if j.buf = j.buf[:0]; cap(j.buf) > journalBufferMax {
		j.buf = nil // an extraordinary value has grown it
	}
	if j.dirty.IsZero() {
		j.dirty = time.Now()
	}
	j.hold.rv.Store(j.rv)
	return nil
}

func (j *journal) sync() error {
	if j.dirty.IsZero() {
		return nil
	}
	j.dirty = time.Time{}
	return j.file.Sync()
}

func (j *journal) close() error { return j.file.Close() }

// appendGap appends the line that says which versions are missing.
func appendGap(buf []byte, from, to uint64) []byte {
	return fmt.Appendf(buf, `{"rv":%d,"gap":{"from":%d,"to":%d}}`+"\n", to, from, to)
}

// appendJournalLine appends the line of an event.
func appendJournalLine(buf []byte, e *event, last bool) []byte {
	buf = append(buf, `{"rv":`...)
	buf = strconv.AppendUint(buf, e.rv, 10)
	buf = append(buf, ',')
	buf = appendBytesField(buf, "key", e.key)
	buf = append(buf, `,"timestamp":`...)
	buf = strconv.AppendInt(buf, e.time*int64(time.Millisecond), 10)
	switch e.kind {
	case eventDeleted:
		buf = append(buf, `,"deleted":true`...)
	case eventExpired:
		buf = append(buf, `,"deleted":true,"reason":"expired"`...)
	default:
		buf = appendJournalValue(buf, e.item.value)
	}
	if !last {
		buf = append(buf, `,"more":true`...)
	}
	return append(buf, "}\n"...)
}

func appendJournalValue(buf []byte, value string) []byte {
	if !utf8.ValidString(value) {
		buf = append(buf, `,"objBase64":"`...)
		buf = base64.StdEncoding.AppendEncode(buf, []byte(value))
		return append(buf, '"')
	}
	buf = append(buf, `,"obj":`...)
	if !json.Valid([]byte(value)) {
		return appendJSONString(buf, value)
	}
	if !strings.ContainsAny(value, " \t\r\n") {
		return append(buf, value...)
	}
	compact := bytes.NewBuffer(buf) // without line breaks
	_ = json.Compact(compact, []byte(value))
	return compact.Bytes()
}
