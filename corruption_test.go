package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
)

// This file damages data directories in every way that it can think of, and
// looks what a start makes of them. There are two good ends: everything that was
// acknowledged is served, or the directory is refused with a text that says
// which file, where in it, and what to do.

// directory is a data directory in memory, and what it holds.
type directory struct {
	files   map[string][]byte // by path in the directory
	states  map[uint64][]byte // by index
	last    uint64
	marked  uint64 // index of the watermark
	hard    *raftpb.HardState
	pending int64 // of a crash image: where in the last segment the log has passed the watermark
}

// logWriter writes a log and remembers what it holds.
type logWriter struct {
	t     *testing.T
	disk  *storage
	store *store.Store
	term  uint64
	made  *directory
	value func(n int) string
}

func newLogWriter(t *testing.T, value func(n int) string) *logWriter {
	disk, rec := newDisk(t, filepath.Join(memoryDir(t), "data"))
	return &logWriter{t: t, disk: disk, store: &store.Store{State: rec.state}, term: 1, value: value, made: &directory{states: map[uint64][]byte{}}}
}

// save appends entries and says that they are committed.
func (r *logWriter) save(ents ...*raftpb.Entry) {
	r.t.Helper()
	for _, e := range ents {
		testkit.Must(r.t, applyEntry(r.store, e))
		r.made.last = e.GetIndex()
		r.made.states[r.made.last] = encodeState(r.t, &r.store.State)
	}
	r.made.hard = &raftpb.HardState{Term: new(r.term), Vote: new(uint64(1)), Commit: new(r.made.last)}
	testkit.Must(r.t, r.disk.save(r.made.hard, ents))
}

// put appends n entries, each of its own size.
func (r *logWriter) put(n int) {
	r.t.Helper()
	for range n {
		index := r.store.Applied() + 1
		r.save(putEntry(index, r.term, fmt.Sprintf("key-%d", index%50), r.value(int(index*index*7%2500))))
	}
}

// addLearner appends a configuration change.
func (r *logWriter) addLearner(id uint64) {
	r.t.Helper()
	b, err := newMemberChange(store.MemberChange{Kind: store.AddLearner, Member: store.Member{ID: id, PeerURL: fmt.Sprint("http://l:", id)}}, time.Time{})
	testkit.Must(r.t, err)
	store.BatchHeader{Session: 9, Seq: 500 + id}.Put(b.data)
	b.change.Context = b.data
	data, err := proto.Marshal(b.change)
	testkit.Must(r.t, err)
	r.save(&raftpb.Entry{Type: raftpb.EntryConfChange.Enum(), Term: new(r.term), Index: new(r.store.Applied() + 1), Data: data})
}

func (r *logWriter) snapshot() {
	r.t.Helper()
	view := r.store.Snapshot()
	snap := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(view.Index), Term: new(view.Term), ConfState: &raftpb.ConfState{Voters: []uint64{1}}}}
	testkit.Must(r.t, r.disk.writeSnapshot(snap, &view))
	testkit.Must(r.t, r.disk.commitSnapshot(snap))
	testkit.Must(r.t, r.disk.purge())
}

// stopped returns the directory after a clean stop.
func (r *logWriter) stopped() *directory {
	r.t.Helper()
	r.made.marked = r.made.last
	testkit.Must(r.t, r.disk.close())
	r.made.files = readTree(r.t, r.disk.dir)
	return r.made
}

func readTree(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	testkit.Must(t, filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		files[name], err = os.ReadFile(path)
		return err
	}))
	return files
}

// writeTree makes dir hold these files and no others.
func writeTree(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	testkit.Must(t, os.RemoveAll(dir))
	for _, sub := range []string{walDir, snapDir} {
		testkit.Must(t, os.MkdirAll(filepath.Join(dir, sub), fsx.DirMode))
	}
	for name, b := range files {
		testkit.Must(t, os.WriteFile(filepath.Join(dir, name), b, fsx.FileMode))
	}
}

// values are what a log is filled with. A record with a chunk of zeros looks to
// etcd's log like one that a crash has cut short.
var values = map[string]func(n int) string{
	"zeros": func(n int) string { return strings.Repeat("\x00", n) },
	"random": func(n int) string {
		b := make([]byte, n)
		r := rand.New(rand.NewPCG(uint64(n), 1))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return string(b)
	},
}

// exampleDirectory has several segments, two snapshots, a change of the
// members, terms and votes. A vote is the last that it promised.
func exampleDirectory(t *testing.T, value func(n int) string) *directory {
	r := newLogWriter(t, value)
	r.put(20)
	r.snapshot()
	r.put(40)
	r.addLearner(2)
	r.snapshot()
	r.term = 2
	r.put(40)
	r.snapshot() // the first one goes
	r.term = 3
	r.put(60)
	r.save()
	r.term = 5
	r.save()
	return r.stopped()
}

// outcome of a start.
type startOutcome int

const (
	servedAll   startOutcome = iota
	servedOlder              // all of it, from the older snapshot
	servedPart               // down to the watermark
	refused
	lostSilently
	unexplained // refused without saying what and where, and what to do
)

var outcomeNames = []string{"all", "all, older", "cut", "refused", "LOST", "UNEXPLAINED"}

// start starts from a directory as serve does, as far as the disk goes.
func (d *directory) start(t *testing.T, dir string) (outcome startOutcome, why error) {
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	defer func() {
		if s.wal == nil {
			_ = s.close() // there is only the lock
		}
	}()
	rec, err := s.load()
	if err == nil && rec == nil {
		return lostSilently, errors.New("taken for a new directory")
	}
	if err != nil {
		return judgeRefusal(dir, err), err
	}
	from := rec.state.Index
	testkit.Must(t, rec.replay())
	outcome, why = d.judge(rec, from)
	if outcome != lostSilently {
		why = goesOn(t, s, rec.state.Index, from)
		if why != nil {
			outcome = lostSilently
		}
		return outcome, why
	}
	return outcome, errors.Join(why, s.close())
}

// judgeRefusal says whether an error is of use to whoever reads it.
func judgeRefusal(dir string, err error) startOutcome {
	text := err.Error()
	namesFile := strings.Contains(text, dir+"/")
	saysWhere := strings.Contains(text, "byte ") || strings.Contains(text, "entry ") || strings.Contains(text, "missing") || strings.Contains(text, "no such file")
	if !namesFile || !saysWhere || !strings.Contains(text, "--join") || !strings.Contains(text, "curl -X POST") {
		return unexplained
	}
	return refused
}

func (d *directory) judge(rec *recovered, from uint64) (startOutcome, error) {
	hs, _, err := rec.log.InitialState()
	if err != nil {
		return lostSilently, err
	}
	index := rec.state.Index
	var got bytes.Buffer
	if err := rec.state.Encode(&got); err != nil {
		return lostSilently, err
	}
	switch {
	case !bytes.Equal(got.Bytes(), d.states[index]):
		return lostSilently, fmt.Errorf("the state at %d is another one", index)
	case index < d.marked:
		return lostSilently, fmt.Errorf("it ends at %d, was at %d", index, d.marked)
	case index == d.last && (hs.GetTerm() != d.hard.GetTerm() || hs.GetVote() != d.hard.GetVote()):
		return lostSilently, fmt.Errorf("hard state %v, was %v", hs, d.hard)
	case rec.identity.Member != 1 || rec.identity.Cluster != 7:
		return lostSilently, fmt.Errorf("identity %+v", rec.identity)
	case index < d.last:
		return servedPart, nil
	case from < d.newestSnapshot():
		return servedOlder, nil
	}
	return servedAll, nil
}

func (d *directory) newestSnapshot() (newest uint64) {
	for name := range d.files {
		if index, ok := snapshotIndex(filepath.Base(name)); ok {
			newest = max(newest, index)
		}
	}
	return newest
}

// goesOn checks that the log can be appended to, and that what is appended is
// there after the next start.
func goesOn(t *testing.T, s *storage, index, from uint64) error {
	e := putEntry(index+1, 9, "new", "value")
	testkit.Must(t, s.save(&raftpb.HardState{Term: new(uint64(9)), Commit: new(index + 1)}, []*raftpb.Entry{e}))
	testkit.Must(t, s.close())
	again, err := openStorage(s.dir, zap.NewNop())
	testkit.Must(t, err)
	rec, err := again.load()
	if err != nil {
		return fmt.Errorf("after another write: %w", err)
	}
	last, err := rec.log.LastIndex()
	testkit.Must(t, err)
	if last != index+1 || rec.state.Index != from {
		return fmt.Errorf("after another write: the log ends at %d, want %d", last, index+1)
	}
	return again.close()
}

// damages counts outcomes by what was done to which file.
type damages struct {
	rows   []string
	counts map[string]*[6]int
}

func (d *damages) add(row string, o startOutcome) {
	if d.counts == nil {
		d.counts = map[string]*[6]int{}
	}
	if d.counts[row] == nil {
		d.counts[row] = new([6]int)
		d.rows = append(d.rows, row)
	}
	d.counts[row][o]++
}

func (d *damages) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%-64s %7s", "damage", "starts")
	for _, name := range outcomeNames {
		fmt.Fprintf(&b, " %11s", name)
	}
	slices.Sort(d.rows)
	for _, row := range d.rows {
		n := 0
		for _, count := range d.counts[row] {
			n += count
		}
		fmt.Fprintf(&b, "\n%-64s %7d", row, n)
		for _, count := range d.counts[row] {
			fmt.Fprintf(&b, " %11d", count)
		}
	}
	return b.String()
}

// kindOf says what a file of the directory is for; empty if it is for nothing.
func kindOf(name string) string {
	switch {
	case strings.HasSuffix(name, bodySuffix):
		return "snapshot body"
	case strings.HasSuffix(name, metaSuffix):
		return "snapshot meta"
	case strings.HasSuffix(name, ".wal"):
		return "log"
	case name == watermarkName:
		return "watermark"
	}
	return ""
}

// usedBytes is how much of a file was written. A segment of the log is made
// longer than it is.
func usedBytes(name string, b []byte) int {
	if kindOf(name) == "log" {
		return min(len(b), len(bytes.TrimRight(b, "\x00"))+8)
	}
	return len(b)
}

// matrix damages one file of a directory at a time.
type matrix struct {
	*directory
	t       *testing.T
	dir     string
	values  string
	damages *damages
}

// try starts with content in the place of a file; nil = the file is gone.
func (m *matrix) try(what, name string, content []byte) {
	files := map[string][]byte{}
	for n, b := range m.files {
		files[n] = b
	}
	files[name] = content
	if content == nil {
		delete(files, name)
	}
	m.tryAll(fmt.Sprintf("%s: %s, values %s", kindOf(name), what, m.values), name, files)
}

func (m *matrix) tryAll(row, name string, files map[string][]byte) {
	writeTree(m.t, m.dir, files)
	o, why := m.start(m.t, m.dir)
	m.damages.add(row, o)
	if o == lostSilently || o == unexplained {
		m.t.Errorf("%s (%s): %s: %v", row, name, outcomeNames[o], why)
	}
}

// names returns the files of a kind, or of all.
func (m *matrix) names(kind string) []string {
	var names []string
	for name := range m.files {
		if k := kindOf(name); k != "" && (kind == "" || k == kind) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// flip flips n single bits of the files of a kind, spread evenly.
func (m *matrix) flip(kind string, n int) {
	total := 0
	for _, name := range m.names(kind) {
		total += usedBytes(name, m.files[name])
	}
	step := max(1, total*8/n) | 1 // odd: all bits of a byte get their turn
	at := 0
	for _, name := range m.names(kind) {
		size := usedBytes(name, m.files[name]) * 8
		for ; at < size; at += step {
			b := bytes.Clone(m.files[name])
			b[at/8] ^= 1 << (at % 8)
			m.try("a flipped bit", name, b)
		}
		at -= size
	}
}

// flipHeads flips every bit of the heads of some records: their length, type and
// checksum, of which the log's checksums cover nothing.
func (m *matrix) flipHeads(everyRecord int) {
	for _, name := range m.names("log") {
		for i, offset := range recordOffsets(m.t, m.files[name]) {
			if i%everyRecord != 0 {
				continue
			}
			for bit := range 20 * 8 {
				b := bytes.Clone(m.files[name])
				if offset+bit/8 >= len(b) {
					break
				}
				b[offset+bit/8] ^= 1 << (bit % 8)
				m.try("a flipped bit in a head", name, b)
			}
		}
	}
}

// recordOffsets returns where the records of a segment start.
func recordOffsets(t *testing.T, segment []byte) []int {
	t.Helper()
	var offsets []int
	for at := 0; at+8 < len(segment); {
		var head uint64
		for i := range 8 {
			head |= uint64(segment[at+i]) << (8 * i)
		}
		if head == 0 {
			break
		}
		offsets = append(offsets, at)
		at += 8 + int(head&(1<<56-1)) + int(head>>56&7)
	}
	return offsets
}

// zero clears sectors.
func (m *matrix) zero(every int) {
	i := 0
	for _, name := range m.names("") {
		for at := 0; at < usedBytes(name, m.files[name]); at += sectorSize {
			if i++; i%every != 0 {
				continue
			}
			b := bytes.Clone(m.files[name])
			clear(b[at:min(at+sectorSize, len(b))])
			m.try("a zeroed sector", name, b)
		}
	}
}

// truncate cuts files short, and takes them away.
func (m *matrix) truncate(places int) {
	for _, name := range m.names("") {
		b := m.files[name]
		m.try("missing", name, nil)
		for i := range places {
			m.try("truncated", name, b[:usedBytes(name, b)*i/places])
		}
	}
}

// takeAway takes away several files at once.
func (m *matrix) takeAway() {
	for _, kinds := range []string{"log", "snapshot body", "snapshot meta", "snapshot body, snapshot meta", "log, watermark", "log, snapshot body, snapshot meta"} {
		files := map[string][]byte{}
		for name, b := range m.files {
			if kind := kindOf(name); kind == "" || !slices.Contains(strings.Split(kinds, ", "), kind) {
				files[name] = b
			}
		}
		m.tryAll("all missing: "+kinds+", values "+m.values, kinds, files)
	}
}

// TestCorruption damages one directory of each kind of values.
func TestCorruption(t *testing.T) {
	smallSegments(t)
	var table damages
	for name, value := range values {
		m := &matrix{directory: exampleDirectory(t, value), t: t, values: name, damages: &table, dir: filepath.Join(memoryDir(t), "data")}
		m.tryAll("none, values "+name, "", m.files)
		m.flip("log", testkit.Sized(150, 4000))
		m.flip("snapshot body", testkit.Sized(60, 2000))
		m.flip("snapshot meta", testkit.Sized(20, 1000))
		m.flip("watermark", testkit.Sized(40, 4000))
		m.flipHeads(testkit.Sized(80, 1))
		m.zero(testkit.Sized(5, 1))
		m.truncate(testkit.Sized(4, 64))
		m.takeAway()
	}
	t.Log(table.String())
}

// crashDirectory is what a crash leaves: the watermark is behind the end.
func crashDirectory(t *testing.T, value func(n int) string) (before, after *directory) {
	r := newLogWriter(t, value)
	r.put(30)
	r.snapshot()
	r.put(20)
	testkit.Must(t, r.disk.writeMark())
	r.made.marked = r.made.last
	image := func() *directory {
		d := *r.made
		d.files = readTree(t, r.disk.dir)
		end, err := scanLog(filepath.Join(r.disk.dir, walDir), watermark{})
		testkit.Must(t, err)
		d.pending = end.offset
		return &d
	}
	before = image()
	index := r.made.last
	var ents []*raftpb.Entry
	for _, size := range []int{900, 30, 1400, 700} { // one write of some sectors, as of a batch of appends
		index++
		ents = append(ents, putEntry(index, 1, "torn", value(size)))
	}
	r.save(ents...)
	after = image()
	testkit.Must(t, r.disk.close())
	return before, after
}

func lastSegment(d *directory) string {
	last := ""
	for name := range d.files {
		if kindOf(name) == "log" {
			last = max(last, name)
		}
	}
	return last
}

// TestCorruption_TornTail: whatever a power cut leaves of the last write, the
// directory starts. Nothing before the write is missing.
func TestCorruption_TornTail(t *testing.T) {
	smallSegments(t)
	var table damages
	for name, value := range values {
		before, after := crashDirectory(t, value)
		segment := lastSegment(after)
		if segment != lastSegment(before) {
			t.Fatal("the write began a segment")
		}
		var dirty []int
		for at := 0; at < len(after.files[segment]); at += sectorSize {
			if !bytes.Equal(before.files[segment][at:at+sectorSize], after.files[segment][at:at+sectorSize]) {
				dirty = append(dirty, at)
			}
		}
		m := &matrix{directory: after, t: t, values: name, damages: &table, dir: filepath.Join(memoryDir(t), "data")}
		row := fmt.Sprintf("log: torn write of %d sectors, values %s", len(dirty), name)
		for kept := range 1 << len(dirty) {
			if !*testkit.Heavy && bits.OnesCount(uint(kept))%3 != 1 {
				continue
			}
			b := bytes.Clone(before.files[segment])
			for i, at := range dirty {
				if kept&(1<<i) != 0 {
					copy(b[at:at+sectorSize], after.files[segment][at:])
				}
			}
			files := map[string][]byte{}
			for n, content := range after.files {
				files[n] = content
			}
			files[segment] = b
			m.tryAll(row, segment, files)
		}
		if n := table.counts[row][refused]; n > 0 {
			t.Errorf("%d of the torn directories were refused", n)
		}
	}
	t.Log(table.String())
}

// TestCorruption_PastTheWatermark: damage that nobody can tell from a torn write
// costs at most what the watermark does not cover, half a second.
func TestCorruption_PastTheWatermark(t *testing.T) {
	smallSegments(t)
	var table damages
	for name, value := range values {
		before, after := crashDirectory(t, value)
		segment := lastSegment(after)
		m := &matrix{directory: after, t: t, values: name, damages: &table, dir: filepath.Join(memoryDir(t), "data")}
		for at := int(before.pending); at < int(after.pending); at += testkit.Sized(97, 3) {
			b := bytes.Clone(after.files[segment])
			b[at] ^= 1 << (at % 8)
			m.try("a flipped bit past the watermark", segment, b)
		}
		for at := int(before.pending); at < int(after.pending); at += sectorSize {
			b := bytes.Clone(after.files[segment])
			clear(b[at/sectorSize*sectorSize : at/sectorSize*sectorSize+sectorSize])
			m.try("a zeroed sector past the watermark", segment, b)
		}
	}
	t.Log(table.String())
}

// TestCommand_RecoverDamaged: what can be read of a damaged directory is not lost
// with the rest.
func TestCommand_RecoverDamaged(t *testing.T) {
	smallSegments(t)
	made := exampleDirectory(t, values["random"])
	parent := memoryDir(t)
	from := filepath.Join(parent, "data")
	for what, damage := range map[string]func(files map[string][]byte, segments []string){
		"sector":  func(files map[string][]byte, s []string) { clear(files[s[1]][40*sectorSize : 41*sectorSize]) },
		"head":    func(files map[string][]byte, s []string) { clear(files[s[len(s)-1]][:sectorSize]) },
		"missing": func(files map[string][]byte, s []string) { delete(files, s[len(s)-1]) },
		"mark":    func(files map[string][]byte, _ []string) { delete(files, watermarkName) },
	} {
		files := map[string][]byte{}
		for name, b := range made.files {
			files[name] = bytes.Clone(b)
		}
		damage(files, (&matrix{directory: made}).names("log"))
		writeTree(t, from, files)
		to := filepath.Join(parent, "data-recovered-"+what)
		args := []string{"recover", "--data-dir", from, "--to", to}
		if _, err := runCommand(t, args...); err == nil || !strings.Contains(err.Error(), "recover --damaged") {
			t.Errorf("%s: recovered as if it were whole: %v", what, err)
		}
		out, err := runCommand(t, append(args, "--damaged")...)
		if err != nil || !strings.Contains(out, "the directory is damaged") {
			t.Errorf("%s: %v\n%s", what, err, out)
			continue
		}
		after := readTree(t, from)
		for name, b := range files {
			if kindOf(name) != "" && !bytes.Equal(after[name], b) {
				t.Errorf("%s: %s has changed", what, name)
			}
		}
		var index uint64
		_, err = fmt.Sscanf(out[strings.Index(out, "entries up to"):], "entries up to %d", &index)
		testkit.Must(t, err)
		want, err := store.ReadState(bytes.NewReader(made.states[index]))
		testkit.Must(t, err)
		s, rec := openRestored(t, to)
		rec.state.RV -= store.VersionJump
		storetest.SameItems(t, &rec.state, &want)
		testkit.Must(t, s.close())
		t.Logf("%s: up to entry %d of %d", what, index, made.last)
	}
	if left, _ := filepath.Glob(filepath.Join(parent, "raftrv-reading-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestStorage_RefusesAnUnfinishedDirectory: what restore has not completed is not
// the empty member of a new cluster.
func TestStorage_RefusesAnUnfinishedDirectory(t *testing.T) {
	dir := t.TempDir()
	testkit.Must(t, os.WriteFile(filepath.Join(dir, unfinishedName), nil, fsx.FileMode))
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	defer s.close()
	if _, err := s.load(); err == nil || !strings.Contains(err.Error(), "restore") {
		t.Errorf("load: %v", err)
	}
}

// TestStorage_IdentityIsStable: what old versions have written is read.
func TestStorage_IdentityIsStable(t *testing.T) {
	var id identity
	testkit.Must(t, json.Unmarshal([]byte(`{"format":1,"member":3,"cluster":7,"directory":9,"joined":true}`), &id))
	if !reflect.DeepEqual(id, identity{Format: 1, Member: 3, Cluster: 7, Directory: 9, Joined: true}) {
		t.Errorf("%+v", id)
	}
}
