package watch

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

	"raftrv/internal/fault"
	"raftrv/internal/fsx"
	"raftrv/internal/store"
)

// This file is the journal: a file to which a node appends a line of JSON for
// every write that it applies, in the order of resource versions:
//
//	{"journal":1,"cluster":"5d0c9b8a7f6e4d3b","from":7}
//	{"rv":7,"key":"a","timestamp":1767323045678000000,"obj":{"any":"JSON"}}
//	{"rv":8,"key":"a","timestamp":1767323045679000000,"objText":"any other text"}
//	{"rv":9,"key":"a","timestamp":1767323045680000000,"deleted":true,"reason":"expired"}
//
// The first line names the format, the cluster, and the version with which the file begins.
// obj is the value itself if it is JSON. objText is the value, letter by letter, if it is
// not, or if it is JSON that does not fit into a line as it is: then obj is its meaning. What is
// no UTF-8 is in objBase64. contentType is there if the value has one. timestamp is the
// time of the entry in nanoseconds: its proposer's, or the leader's where the two were
// far apart. It may go back, as clocks do. All lines of a version but the last have
// "more":true. Events that this node never saw, or did not serve, because it was down
// for a long time and caught up with a snapshot, are a gap:
//
//	{"rv":99,"gap":{"from":50,"to":99}}
//
// The journal reads the window of events like any watcher, so a slow disk holds
// up nobody. The window waits for it, up to a bound; if the disk is slower than the
// writes for so long, the node ends rather than missing one.
//
// The file itself says where to resume: after its last complete version. What follows,
// a torn line or half a version, is cut off and written again. A file that is empty is
// another one, since somebody has rotated the last: it goes on after the version
// that the data directory remembers. If the node was killed in the middle of a write,
// and the file was rotated before it came back, then the new one may begin with a
// version of which the old one has a part. So the rule for readers is that what an
// older file has from "from" on does not count.
//
// Files are rotated by renaming them, and SIGHUP, or a restart, makes the node begin
// the next one. Or they are copied and emptied. Then nothing may be written in
// between: where there are leases (fcntl(2), F_SETLEASE) the node holds one on its
// file, so whoever opens it waits until it ends with a whole version, and as long as
// it is open elsewhere the node waits, up to a bound.

const (
	journalFormat     = 1
	journalBufferMax  = 256 << 10 // that is kept for the next lines
	journalLineMax    = 256 << 20 // more than the largest value can take
	journalRetry      = 100 * time.Millisecond
	journalLinearize  = 5 * time.Second
	journalResumeSize = 64 << 10 // that are read at a time
	journalHeadMax    = 1 << 10  // of the first line

	// JournalPositionName is a file in the data directory: the last version that is complete in a journal.
	JournalPositionName = "journal-position"

	journalLeaseEvery = 50 * time.Millisecond // an idle journal looks whether somebody waits for it
	journalLeaseRetry = 5 * time.Millisecond

	// Who has the file open is waited for so long, and for each of so many bytes of it a second more. A copy
	// takes less; who follows the file as it grows has it open for ever.
	journalShareMin   = 2 * time.Second
	journalShareBytes = 50 << 20
)

var errJournalSlow = errors.New("the disk takes it so slowly that events have left the window before they could be written")

var errJournalDamage = errors.New("not a line of a journal; move the file away to begin another one")

// errJournalCut says that the file is not as long as the journal has made it.
var errJournalCut = errors.New("somebody else has changed its size")

type Journal struct {
	path    string
	cluster string
	file    *os.File
	mark    *os.File // journalPositionName
	logger  *zap.Logger
	rv      uint64 // the last version that is complete in the file and buf
	written uint64 // and in the file
	size    int64  // of the file

	hold     store.Hold // by which the window of events waits
	caughtUp bool       // everything was written once, since the hold began

	headed bool // the file has a first line that was checked
	part   bool // file and buf end within a version
	split  bool // and the file does
	reopen bool // as soon as the file does not

	lease  func(*os.File) error
	leased bool      // nobody else has opened the file
	shared time.Time // since when somebody has, as far as is known; zero = nobody

	buf   []byte
	dirty time.Time // when the oldest write that is not synced happened; zero = none
}

// OpenJournal opens or creates the journal of a member of a cluster and cuts off what is not complete.
// Nobody else can open it until it is closed.
func OpenJournal(path, dataDir string, cluster uint64, logger *zap.Logger) (_ *Journal, err error) {
	j := &Journal{path: path, cluster: fmt.Sprintf("%x", cluster), logger: logger, lease: fsx.TakeLease}
	if j.mark, err = fsx.OpenPrivate(filepath.Join(dataDir, JournalPositionName), 0); err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open journal %s: %w", path, err), j.Close())
		}
	}()
	if j.written, err = readJournalMark(j.mark); err != nil {
		return nil, err
	}
	if j.file, err = openJournalFile(path); err != nil {
		return nil, err
	}
	if err := j.resume(); err != nil {
		return nil, err
	}
	if j.size > 0 && !j.headed {
		logger.Info("a journal of an older version goes on: its first line does not say of which cluster it is", zap.String("journal", path))
	}
	return j, errors.Join(fsx.SyncDir(filepath.Dir(path)), fsx.SyncDir(dataDir))
}

// openJournalFile opens or creates a file of which nobody else makes a journal.
func openJournalFile(path string) (file *os.File, err error) {
	if file, err = fsx.OpenPrivate(path, os.O_APPEND); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, file.Close())
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
	return file, nil
}

// readJournalMark reads a position. A new one is 0.
func readJournalMark(f *os.File) (rv uint64, err error) {
	b := make([]byte, 20)
	switch n, err := f.ReadAt(b, 0); {
	case n == 0 && errors.Is(err, io.EOF):
		return 0, nil
	case err != nil && !errors.Is(err, io.EOF):
		return 0, err
	}
	if rv, err = strconv.ParseUint(string(b), 10, 64); err != nil {
		return 0, fmt.Errorf("%s: %w; delete it if the journal may repeat versions", f.Name(), err)
	}
	return rv, nil
}

// resume finds the last complete version and cuts off what follows. Without any, the file is another
// one than before.
func (j *Journal) resume() error {
	info, err := j.file.Stat()
	if err != nil {
		return err
	}
	if err := j.checkHead(); err != nil {
		return err
	}
	rv, end, err := findJournalEnd(j.file, info.Size())
	if err != nil {
		return err
	}
	if end > 0 {
		j.written = rv
	}
	j.rv, j.size, j.part, j.split = j.written, end, false, false
	j.buf = j.buf[:0]
	if end == info.Size() {
		return nil
	}
	j.logger.Warn("cut off an incomplete version", zap.String("journal", j.path), zap.Uint64("resourceVersion", j.rv), zap.Int64("bytes", info.Size()-end))
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

	// Of the first line.
	Journal int    `json:"journal"`
	Cluster string `json:"cluster"`
	From    uint64 `json:"from"`
}

func (l *journalLine) isHead() bool { return l.Journal > 0 && l.Cluster != "" && l.From > 0 }

func (l *journalLine) isEvent() bool {
	return l.RV > 0 && (l.Key != nil || l.KeyBase64 != nil || l.Gap != nil)
}

// checkHead says whether the file is not of this cluster.
func (j *Journal) checkHead() error {
	text := make([]byte, journalHeadMax)
	n, err := j.file.ReadAt(text, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	text, _, ok := bytes.Cut(text[:n], []byte("\n"))
	var line journalLine
	switch j.headed = ok && json.Unmarshal(text, &line) == nil && line.isHead(); {
	case !j.headed:
		return nil // of an older version, or no journal, which will turn out
	case line.Journal != journalFormat:
		return fmt.Errorf("it has format %d and this version knows %d: move it away, and the node begins another one", line.Journal, journalFormat)
	case line.Cluster != j.cluster:
		return fmt.Errorf("it is the journal of cluster %s, and this node is in cluster %s: move it away, and the node begins another one, or give it another --journal",
			line.Cluster, j.cluster)
	}
	return nil
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
		if err := json.Unmarshal(text, &line); err != nil || !line.isEvent() && !line.isHead() {
			return 0, 0, fmt.Errorf("at offset %d: %w", start, errJournalDamage)
		}
		switch {
		case line.isHead():
			return line.From - 1, start + int64(len(text)), nil
		case !line.More:
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
	for _, start := range []string{`{"rv":`, `{"journal":`} {
		if n := min(len(text), len(start)); string(text[:n]) == start[:n] {
			return true
		}
	}
	return len(bytes.Trim(text, "\x00")) == 0
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

// JournalSource is where a journal's events come from.
type JournalSource struct {
	Store     *store.Store
	Hub       *Hub
	Linearize func(ctx context.Context, timeout time.Duration) error
	Stopped   <-chan struct{} // closed when nothing is applied any more
	Reopen    <-chan os.Signal
}

// Run appends what is applied until the hub ends, and then the rest. An error
// means that the journal would miss something from now on.
func (j *Journal) Run(ctx context.Context, src JournalSource, syncEvery time.Duration) error {
	if err := j.catchUp(ctx, src); err != nil {
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	j.logger.Info("journal", zap.String("path", j.path), zap.Uint64("resourceVersion", j.rv))
	j.beginHold(src.Store)
	defer src.Store.HoldWindow(nil)
	for {
		err := j.begin()
		if err == nil {
			var w *Watcher
			if w, err = src.Hub.Watch("", true, j.rv); err == nil {
				err = j.follow(ctx, w, src, syncEvery)
				w.Close()
			}
		}
		switch {
		case errors.Is(err, errJournalCut):
			err = j.resumeCut()
		case errors.Is(err, fault.ErrExpired) && j.caughtUp && j.hold.Overtaken.Load():
			err = errJournalSlow
		case errors.Is(err, fault.ErrExpired):
			err = j.skip(ctx, src.Store)
		case err == nil:
			return nil
		case errors.Is(err, fault.ErrDiverged), errors.Is(err, fault.ErrUnchecked):
			src.Store.HoldWindow(nil)
			err = j.pause(src)
			j.beginHold(src.Store)
		}
		if errors.Is(err, fault.ErrShuttingDown) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("journal %s: %w", j.path, err)
		}
	}
}

// beginHold makes the window wait for what is not in the file.
func (j *Journal) beginHold(kv *store.Store) {
	j.caughtUp = false
	j.hold.RV.Store(j.rv)
	j.hold.Overtaken.Store(false)
	kv.HoldWindow(&j.hold)
}

// catchUp waits until the store has what the journal has. After a restart that
// takes a moment.
func (j *Journal) catchUp(ctx context.Context, src JournalSource) error {
	for src.Store.Version() < j.rv {
		if err := src.Linearize(ctx, journalLinearize); err == nil {
			break
		}
		select {
		case <-time.After(journalRetry):
		case <-src.Stopped:
			return nil
		}
	}
	if now := src.Store.Version(); now < j.rv {
		return fmt.Errorf("it is at resource version %d, but the store is at %d: does it belong to another cluster?", j.rv, now)
	}
	return nil
}

// pause waits until the node serves again: what it applies while its state is in
// doubt is for nobody. Then the journal goes on where it was.
func (j *Journal) pause(src JournalSource) error {
	if err := errors.Join(j.sync(), j.resume()); err != nil { // half a version may be there
		return err
	}
	j.logger.Info("the journal waits until the node serves", zap.String("journal", j.path), zap.Uint64("resourceVersion", j.rv))
	retry := time.NewTicker(journalRetry)
	defer retry.Stop()
	for {
		if err := src.Hub.Closed.Load(); err == nil {
			return nil
		} else if errors.Is(err, fault.ErrShuttingDown) {
			return err
		}
		select {
		case <-retry.C:
		case <-src.Stopped:
			return fault.ErrShuttingDown
		}
	}
}

// skip writes that the events that have left the window are missing.
func (j *Journal) skip(ctx context.Context, kv *store.Store) error {
	to := kv.EventsDropped()
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
	return j.append(ctx, kv)
}

// follow appends events until there are no more: then it returns nil.
func (j *Journal) follow(ctx context.Context, w *Watcher, src JournalSource, syncEvery time.Duration) error {
	w.patient = true
	timer := time.NewTimer(syncEvery)
	defer timer.Stop()
	look := time.NewTicker(journalLeaseEvery)
	defer look.Stop()
	for {
		n, _, err := w.Read(j.appendEvent)
		if errors.Is(err, fault.ErrShuttingDown) {
			<-src.Stopped
			return errors.Join(j.drain(ctx, w, src.Store), j.sync())
		}
		if err != nil {
			return err
		}
		if err := j.append(ctx, src.Store); err != nil {
			return err
		}
		if j.reopen && !j.split {
			j.reopen = false
			if err := j.next(ctx, src.Store); err != nil {
				return err
			}
		}
		if wait := time.Until(j.dirty.Add(syncEvery)); j.dirty.IsZero() {
			timer.Stop()
		} else if wait > 0 {
			timer.Reset(wait)
		} else if err := j.sync(); err != nil {
			return err
		}
		wake := w.Wake
		if n > 0 {
			wake = closedC // there may be more to read
		}
		j.caughtUp = j.caughtUp || n == 0
		select {
		case <-wake:
		case <-timer.C:
		case <-look.C:
			j.yield()
		case <-src.Reopen:
			j.reopen = true
		}
	}
}

var closedC = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// drain appends the last events, of which no hub tells.
func (j *Journal) drain(ctx context.Context, w *Watcher, kv *store.Store) error {
	for {
		n, err := w.scan(j.appendEvent)
		if errors.Is(err, fault.ErrExpired) {
			return nil // the next run says so
		}
		if n == 0 || err != nil {
			return err
		}
		if err := j.append(ctx, kv); err != nil {
			return err
		}
	}
}

// appendEvent adds the line of an event to what is to be written.
func (j *Journal) appendEvent(e *store.Event, last bool) {
	if e.RV > j.rv+1 { // the versions of a restored cluster leap once
		j.buf = appendGap(j.buf, j.rv+1, e.RV-1)
		j.rv = e.RV - 1
	}
	j.buf = appendJournalLine(j.buf, e, last)
	if j.part = !last; last {
		j.rv = e.RV
	}
}

// append writes when nobody else has the file open.
func (j *Journal) append(ctx context.Context, kv *store.Store) error {
	if len(j.buf) == 0 {
		return nil
	}
	if err := j.claim(ctx, kv); err != nil {
		return err
	}
	return j.write()
}

// claim returns as soon as nobody else has the file open, or has it for so long that he does
// not copy it. Whoever opens it afterwards waits for yield.
func (j *Journal) claim(ctx context.Context, kv *store.Store) error {
	if j.yield(); j.leased {
		return nil
	}
	for end := time.Duration(j.size/journalShareBytes)*time.Second + journalShareMin; ; {
		err := j.lease(j.file)
		if err == nil {
			j.leased, j.shared = true, time.Time{}
			break
		}
		if j.shared.IsZero() {
			j.shared = time.Now()
		}
		if !errors.Is(err, syscall.EAGAIN) || time.Since(j.shared) > end || kv.WindowStrained() {
			break
		}
		select {
		case <-time.After(journalLeaseRetry):
		case <-ctx.Done():
			return fault.ErrShuttingDown // the next run goes on here
		}
	}
	info, err := j.file.Stat()
	if err == nil && info.Size() != j.size {
		err = errJournalCut
	}
	return err
}

// yield lets those go on who wait to open the file, when it ends with a whole version.
func (j *Journal) yield() {
	if j.leased && !j.split && fsx.LeaseWanted(j.file) {
		fsx.DropLease(j.file)
		j.leased, j.shared = false, time.Now()
	}
}

// begin writes the first line of a new file.
func (j *Journal) begin() error {
	if j.size > 0 {
		return nil
	}
	head, err := json.Marshal(struct {
		Journal int    `json:"journal"`
		Cluster string `json:"cluster"`
		From    uint64 `json:"from"`
	}{journalFormat, j.cluster, j.written + 1})
	if err != nil {
		return err
	}
	n, err := j.file.Write(append(head, '\n'))
	j.size += int64(n)
	return errors.Join(err, j.file.Sync())
}

// resumeCut goes on in a file that somebody has cut, or emptied after he had copied it.
func (j *Journal) resumeCut() error {
	before := j.written
	if err := j.resume(); err != nil {
		return err
	}
	if j.written > before {
		return fmt.Errorf("somebody else writes to it, up to resource version %d", j.written)
	}
	j.logger.Info("the journal was cut by somebody else, and goes on", zap.String("journal", j.path), zap.Uint64("resourceVersion", j.rv))
	return nil
}

// next goes on in another file, if there is no longer this one at the path. If it
// cannot be used the journal stays where it is.
func (j *Journal) next(ctx context.Context, kv *store.Store) error {
	now, err := j.file.Stat()
	if err != nil {
		return err
	}
	if info, err := os.Stat(j.path); err == nil && os.SameFile(info, now) {
		return j.claim(ctx, kv) // it may have been cut
	}
	k, err := j.openNext()
	if err != nil {
		j.logger.Error("the journal stays in the old file, since there is no other one to go on in", zap.String("journal", j.path), zap.Error(err))
		return nil
	}
	if err := errors.Join(j.sync(), j.file.Close()); err != nil {
		return errors.Join(err, k.file.Close())
	}
	j.file, j.size, j.leased, j.shared = k.file, k.size, false, time.Time{}
	j.logger.Info("the journal goes on in another file", zap.String("journal", j.path), zap.Uint64("resourceVersion", j.rv))
	return nil
}

// openNext opens the file in which the journal is to go on.
func (j *Journal) openNext() (k *Journal, err error) {
	k = &Journal{path: j.path, cluster: j.cluster, logger: j.logger, written: j.written}
	if k.file, err = openJournalFile(j.path); err != nil {
		return nil, err
	}
	if err = k.resume(); err == nil {
		err = k.begin()
	}
	if err == nil && k.written != j.written {
		err = fmt.Errorf("it ends at resource version %d, and the journal is at %d", k.written, j.written)
	}
	if err == nil {
		err = fsx.SyncDir(filepath.Dir(j.path))
	}
	if err != nil {
		return nil, errors.Join(err, k.file.Close())
	}
	return k, nil
}

func (j *Journal) write() error {
	if len(j.buf) == 0 {
		return nil
	}
	n, err := j.file.Write(j.buf)
	j.size += int64(n)
	if err != nil {
		return err
	}
	if j.buf = j.buf[:0]; cap(j.buf) > journalBufferMax {
		j.buf = nil // an extraordinary value has grown it
	}
	j.written, j.split = j.rv, j.part
	if _, err := j.mark.WriteAt(fmt.Appendf(nil, "%020d\n", j.written), 0); err != nil {
		return err
	}
	if j.dirty.IsZero() {
		j.dirty = time.Now()
	}
	j.hold.RV.Store(j.written)
	return nil
}

func (j *Journal) sync() error {
	if j.dirty.IsZero() {
		return nil
	}
	j.dirty = time.Time{}
	return errors.Join(j.file.Sync(), j.mark.Sync())
}

func (j *Journal) Close() error {
	err := j.mark.Close()
	if j.file != nil {
		err = errors.Join(err, j.file.Close())
	}
	return err
}

// appendGap appends the line that says which versions are missing.
func appendGap(buf []byte, from, to uint64) []byte {
	return fmt.Appendf(buf, `{"rv":%d,"gap":{"from":%d,"to":%d}}`+"\n", to, from, to)
}

// appendJournalLine appends the line of an event.
func appendJournalLine(buf []byte, e *store.Event, last bool) []byte {
	buf = append(buf, `{"rv":`...)
	buf = strconv.AppendUint(buf, e.RV, 10)
	buf = append(buf, ',')
	buf = store.AppendBytesField(buf, "key", e.Key)
	buf = append(buf, `,"timestamp":`...)
	buf = strconv.AppendInt(buf, e.Time*int64(time.Millisecond), 10)
	switch e.Kind {
	case store.EventDeleted:
		buf = append(buf, `,"deleted":true`...)
	case store.EventExpired:
		buf = append(buf, `,"deleted":true,"reason":"expired"`...)
	default:
		buf = appendJournalValue(buf, e.Item.Value)
		if e.Item.ContentType != "" {
			buf = append(buf, ',')
			buf = store.AppendBytesField(buf, "contentType", e.Item.ContentType)
		}
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
	if json.Valid([]byte(value)) {
		buf = append(buf, `,"obj":`...)
		if !strings.ContainsAny(value, "\r\n") && strings.TrimSpace(value) == value {
			return append(buf, value...) // a reader gets it back as it is
		}
		compact := bytes.NewBuffer(buf) // without line breaks
		_ = json.Compact(compact, []byte(value))
		buf = compact.Bytes()
	}
	buf = append(buf, `,"objText":`...)
	return store.AppendJSONString(buf, value)
}
