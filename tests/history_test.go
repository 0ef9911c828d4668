package tests

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// This file records what the clients of real processes saw, and judges it: two judges that share nothing.
//
// The first one takes the resource versions at their word. Every answer carries one, so all requests line up
// in one order for the whole store, and the cluster has kept its promises if and only if that order has every
// version at most once, fits the times at which clients asked and were answered, and explains what each read
// returned. This takes time n log n and looks across keys.
//
// The second one ignores resource versions: porcupine searches, key by key, for any order at all in which a
// register could have given these answers.

// liveKind is what a client asked for.
type liveKind byte

const (
	livePut liveKind = iota
	liveGet
	liveDelete
	livePutIf // a put under the condition that the key has a version, or does not exist
)

// liveOutcome is what the client may conclude from the answer, or from having none.
type liveOutcome byte

const (
	// liveDone: answered. A delete that found nothing is done, too, and so is a write whose condition did not
	// hold.
	liveDone liveOutcome = iota
	// liveRefused: the answer says that it did not happen and never will.
	liveRefused
	// liveUnknown: no answer, or one that does not say. A write may take effect at any later time.
	liveUnknown
)

// liveOp is one request of one client, and what became of it.
type liveOp struct {
	kind       liveKind
	client     int
	node       int // id
	key        string
	value      string        // written (never twice in a history), or read
	start, end time.Duration // since the history began
	keyed      bool          // with an Idempotency-Key, so that a node which refuses it does not know of earlier attempts

	// Of a livePutIf: the version that the key must have, and the value that had it; 0 = it must not exist.
	ifRV    uint64
	ifValue string

	outcome liveOutcome
	wrote   bool   // of a write that was answered: it changed something
	found   bool   // of a read: there was a value
	rv      uint64 // of what wrote: its version. Otherwise the store's, when it was read
	itemRV  uint64 // of a read, or of a condition that did not hold: the version of the value; 0 = none

	late time.Duration // how long after its deadline it ended, though its node was left in peace
}

// isWrite says whether the request took a resource version, or may have.
func (o *liveOp) isWrite() bool {
	return o.kind != liveGet && (o.wrote || o.outcome != liveDone)
}

// isPut says whether the request writes a value.
func (o *liveOp) isPut() bool { return o.kind == livePut || o.kind == livePutIf }

func (o *liveOp) String() string {
	name := [...]string{"put", "get", "delete", fmt.Sprintf("put if version is %d:", o.ifRV)}[o.kind]
	outcome := [...]string{"done", "refused", "unknown"}[o.outcome]
	return fmt.Sprintf("%s %q by client %d at node %d from %v to %v: %s, value %.40q, version %d, value's version %d",
		name, o.key, o.client, o.node, o.start, o.end, outcome, o.value, o.rv, o.itemRV)
}

// liveHistory collects requests. Keys must be new to the cluster when it begins.
type liveHistory struct {
	began time.Time
	acked atomic.Int64 // writes so far

	mu     sync.Mutex
	ops    []*liveOp
	stalls []stall // in the order of their ends
}

// stall is a time when this process did not get to run although it was ready to.
type stall struct{ end, length time.Duration }

func newLiveHistory() *liveHistory { return &liveHistory{began: time.Now()} }

// now is the time in a history.
func (h *liveHistory) now() time.Duration { return time.Since(h.began) }

func (h *liveHistory) add(o *liveOp) {
	if o.outcome == liveDone && o.isWrite() {
		h.acked.Add(1)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, o)
}

// snapshot returns the requests so far. Each is complete.
func (h *liveHistory) snapshot() []*liveOp {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.ops)
}

// keys returns every key of the history.
func (h *liveHistory) keys() []string {
	seen := map[string]bool{}
	for _, o := range h.snapshot() {
		seen[o.key] = true
	}
	return slices.Collect(maps.Keys(seen))
}

// final returns the last read of each key.
func (h *liveHistory) final() map[string]*liveOp {
	last := map[string]*liveOp{}
	for _, o := range h.snapshot() {
		if o.kind == liveGet && o.outcome == liveDone && (last[o.key] == nil || last[o.key].start < o.start) {
			last[o.key] = o
		}
	}
	return last
}

// longestSince returns how long the slowest of the requests took that had not ended at some time.
func (h *liveHistory) longestSince(since time.Duration) time.Duration {
	var longest time.Duration
	for _, o := range h.snapshot() {
		if o.end > since {
			longest = max(longest, o.end-o.start)
		}
	}
	return longest
}

// liveCount sums up a history.
type liveCount struct{ acked, reads, refused, unknown int }

func (h *liveHistory) count() liveCount {
	var c liveCount
	for _, o := range h.snapshot() {
		switch {
		case o.outcome == liveRefused:
			c.refused++
		case o.outcome == liveUnknown:
			c.unknown++
		case o.isWrite():
			c.acked++
		default:
			c.reads++
		}
	}
	return c
}

func (c liveCount) String() string {
	return fmt.Sprintf("%d acknowledged writes, %d reads, %d refused, %d unknown", c.acked, c.reads, c.refused, c.unknown)
}

// problemsMax is how many problems of one kind are worth reading.
const problemsMax = 5

// liveVerdict collects problems.
type liveVerdict struct {
	problems []string
	more     int
}

func (v *liveVerdict) addf(format string, args ...any) {
	if len(v.problems) >= problemsMax {
		v.more++
		return
	}
	v.problems = append(v.problems, fmt.Sprintf(format, args...))
}

// err returns nil if there were no problems.
func (v *liveVerdict) err() error {
	if len(v.problems) == 0 {
		return nil
	}
	if v.more > 0 {
		v.problems = append(v.problems, fmt.Sprintf("and %d more", v.more))
	}
	return fmt.Errorf("%s", strings.Join(v.problems, "\n"))
}

// checkVersions is the first judge. If the history holds every write between the resource versions first
// (exclusive) and last, it counts them, too; last == 0 skips that.
func (h *liveHistory) checkVersions(first, last uint64) error {
	c := versionCheck{ops: h.snapshot(), byValue: map[string]*liveOp{}, byKey: map[string][]*liveOp{}, open: map[string][]*liveOp{}}
	c.learn()
	c.unique()
	if err := c.verdict.err(); err != nil {
		return err // the rest would only repeat it
	}
	c.order()
	c.reads()
	if last != 0 {
		c.dense(first, last)
	}
	return c.verdict.err()
}

// versionCheck is one run of the first judge.
type versionCheck struct {
	ops     []*liveOp
	verdict liveVerdict
	byValue map[string]*liveOp   // puts
	byKey   map[string][]*liveOp // writes whose version is known, in its order
	open    map[string][]*liveOp // writes that may have happened, at a version that nobody knows
	opens   int                  // and how many
}

// learn finds the versions of writes without an answer that a read has seen.
func (c *versionCheck) learn() {
	for _, o := range c.ops {
		if !o.isPut() {
			continue
		}
		if other := c.byValue[o.value]; other != nil {
			c.verdict.addf("bad test: the value is written twice:\n\t%v\n\t%v", other, o)
		}
		c.byValue[o.value] = o
	}
	for _, o := range c.ops {
		if o.kind != liveGet || o.outcome != liveDone || !o.found {
			continue
		}
		w := c.byValue[o.value]
		switch {
		case w == nil || w.key != o.key:
			c.verdict.addf("a value that nobody wrote there: %v", o)
		case w.outcome == liveRefused || w.outcome == liveDone && !w.wrote:
			c.verdict.addf("a write that was refused has happened:\n\t%v\n\t%v", w, o)
		case w.rv == 0:
			w.rv = o.itemRV
		case w.rv != o.itemRV:
			c.verdict.addf("one write has two versions, so it was applied twice:\n\t%v\n\t%v", w, o)
		}
	}
}

// unique sorts the writes, and checks that no two have the same version.
func (c *versionCheck) unique() {
	byRV := map[uint64]*liveOp{}
	for _, o := range c.ops {
		switch {
		case !o.isWrite() || o.outcome == liveRefused:
		case o.rv == 0:
			c.open[o.key] = append(c.open[o.key], o)
			c.opens++
		case byRV[o.rv] != nil:
			c.verdict.addf("two writes have the same version:\n\t%v\n\t%v", byRV[o.rv], o)
		default:
			byRV[o.rv] = o
			c.byKey[o.key] = append(c.byKey[o.key], o)
		}
	}
	for _, ops := range c.byKey {
		slices.SortFunc(ops, func(a, b *liveOp) int { return cmp.Compare(a.rv, b.rv) })
	}
}

// order checks that the versions fit the clock: nothing comes before what had ended when it began.
func (c *versionCheck) order() {
	// Its place in the order: a read comes after the write that made the version it saw.
	place := func(o *liveOp) uint64 {
		if o.isWrite() {
			return 2 * o.rv
		}
		return 2*o.rv + 1
	}
	var ops []*liveOp
	for _, o := range c.ops {
		if o.outcome == liveDone || o.isWrite() && o.outcome == liveUnknown && o.rv != 0 {
			ops = append(ops, o)
		}
	}
	slices.SortFunc(ops, func(a, b *liveOp) int { return cmp.Compare(place(b), place(a)) })
	// From the last place to the first: ended is the one that ended first, of those in later places.
	end := func(o *liveOp) time.Duration {
		if o.outcome == liveUnknown {
			return math.MaxInt64
		}
		return o.end
	}
	var ended *liveOp
	for rest := ops; len(rest) > 0; {
		n := 1
		for n < len(rest) && place(rest[n]) == place(rest[0]) {
			n++
		}
		for _, o := range rest[:n] {
			if ended != nil && end(ended) < o.start {
				c.verdict.addf("the version goes back, although the second began after the first had ended:\n\t%v\n\t%v", ended, o)
			}
		}
		for _, o := range rest[:n] {
			if ended == nil || end(o) < end(ended) {
				ended = o
			}
		}
		rest = rest[n:]
	}
}

// lastWrite returns the last write of a key at or before version rv, or nil.
func (c *versionCheck) lastWrite(key string, rv uint64) *liveOp {
	writes := c.byKey[key]
	i, exact := slices.BinarySearchFunc(writes, rv, func(w *liveOp, rv uint64) int { return cmp.Compare(w.rv, rv) })
	if exact {
		i++
	}
	if i == 0 {
		return nil
	}
	return writes[i-1]
}

// reads checks that each read returned what the last write before it had written, and that each condition was
// judged by that.
func (c *versionCheck) reads() {
	for _, o := range c.ops {
		var last *liveOp
		var seen uint64 // version of the key, by the answer
		switch {
		case o.outcome != liveDone || o.kind == livePut:
			continue // says nothing of what was before it
		case o.wrote:
			// A delete has found something, whatever it was. A condition has found what it wanted.
			if last = c.lastWrite(o.key, o.rv-1); o.kind == liveDelete {
				if (last == nil || !last.isPut()) && !c.maybe(o, true) {
					c.verdict.addf("deleted what was not there:\n\t%v\n\t%v", last, o)
				}
				continue
			}
			seen = o.ifRV
		default:
			last, seen = c.lastWrite(o.key, o.rv), o.itemRV
			if o.kind == livePutIf && seen == o.ifRV {
				c.verdict.addf("a condition that held was said not to: %v", o)
			}
		}
		var want uint64
		if last != nil && last.isPut() {
			want = last.rv
		}
		switch {
		case seen == want:
		case seen == 0 && c.maybe(o, false):
		case seen > want && o.kind == livePutIf && c.maybe(o, true): // a read would have told its value
		case o.wrote:
			c.verdict.addf("a condition did not hold, and the write happened:\n\t%v\n\t%v", last, o)
		case seen != 0:
			c.verdict.addf("a read is older than it says:\n\t%v\n\t%v", last, o)
		default:
			c.verdict.addf("an acknowledged write is lost:\n\t%v\n\t%v", last, o)
		}
	}
}

// maybe says whether a put, or a delete, that nobody knows the version of can be what a request has seen.
func (c *versionCheck) maybe(o *liveOp, put bool) bool {
	return slices.ContainsFunc(c.open[o.key], func(w *liveOp) bool { return w.isPut() == put && w.start < o.end })
}

// dense checks that every version belongs to a write of the history.
func (c *versionCheck) dense(first, last uint64) {
	known := uint64(0)
	for _, ops := range c.byKey {
		for _, o := range ops {
			if o.rv <= first || o.rv > last {
				c.verdict.addf("version outside of %d to %d: %v", first+1, last, o)
			}
			known++
		}
	}
	if missing := last - first - known; known > last-first || missing > uint64(c.opens) {
		c.verdict.addf("the store counts %d writes; clients know of %d, and of %d more that may have happened",
			last-first, known, c.opens)
	}
}

// lateMax is how long after its deadline a request may end: the node answers half of that later at most, the
// rest is for the way.
const lateMax = 100 * time.Millisecond

// checkDeadlines checks that no request hung. A machine that has not even let this process run is given as much
// time as that took.
func (h *liveHistory) checkDeadlines() error {
	var verdict liveVerdict
	for _, o := range h.snapshot() {
		if o.late > lateMax && o.late > lateMax+h.stalled(o.start, o.end) {
			verdict.addf("ended %v after its deadline: %v", o.late, o)
		}
	}
	return verdict.err()
}

// watchStalls notes when the machine is too busy for this process, until done is closed.
func (h *liveHistory) watchStalls(done <-chan struct{}) {
	const nap = 5 * time.Millisecond
	for {
		select {
		case <-done:
			return
		default:
		}
		start := time.Now()
		time.Sleep(nap)
		if over := time.Since(start) - nap; over > nap {
			h.mu.Lock()
			h.stalls = append(h.stalls, stall{h.now(), over})
			h.mu.Unlock()
		}
	}
}

// stalled returns how long all stalls between two times were together.
func (h *liveHistory) stalled(start, end time.Duration) (sum time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	first, _ := slices.BinarySearchFunc(h.stalls, start, func(s stall, t time.Duration) int { return cmp.Compare(s.end, t) })
	for _, s := range h.stalls[first:] {
		if s.end-s.length > end {
			break
		}
		sum += s.length
	}
	return sum
}

// registerState is what a key holds in the eyes of the second judge.
type registerState struct {
	exists bool
	value  string
}

// registerModel is a register that can be deleted.
var registerModel = porcupine.Model{
	Init: func() any { return registerState{} },
	Step: func(state, input, _ any) (bool, any) {
		s, o := state.(registerState), input.(*liveOp)
		switch o.kind {
		case livePut:
			return true, registerState{exists: true, value: o.value}
		case liveDelete:
			return o.outcome == liveUnknown || o.wrote == s.exists, registerState{}
		case livePutIf:
			holds := s == registerState{exists: o.ifRV != 0, value: o.ifValue}
			if !holds {
				return !o.wrote, s
			}
			return o.wrote || o.outcome == liveUnknown, registerState{exists: true, value: o.value}
		default:
			return s == registerState{exists: o.found, value: o.value}, s
		}
	},
	DescribeOperation: func(input, _ any) string { return input.(*liveOp).String() },
	DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
}

// checkLinearizable is the second judge. On failure it leaves a page in dir that shows the history of a key.
func (h *liveHistory) checkLinearizable(dir string) error {
	byKey := map[string][]porcupine.Operation{}
	for _, o := range h.snapshot() {
		end := o.end
		switch {
		case o.outcome == liveRefused, o.outcome == liveUnknown && o.kind == liveGet:
			continue // had no effect, and says nothing
		case o.outcome == liveUnknown:
			end = math.MaxInt64 // stays open for ever
		}
		byKey[o.key] = append(byKey[o.key], porcupine.Operation{
			ClientId: o.client, Input: o, Call: int64(o.start), Return: int64(end),
		})
	}
	const patience = time.Minute // milliseconds are usual
	var verdict liveVerdict
	for key, ops := range byKey {
		if porcupine.CheckOperationsTimeout(registerModel, ops, patience) == porcupine.Ok {
			continue
		}
		result, info := porcupine.CheckOperationsVerbose(registerModel, ops, patience)
		page := filepath.Join(dir, fmt.Sprintf("history-%x.html", key))
		f, err := os.Create(page)
		if err != nil {
			return err
		}
		if err := porcupine.Visualize(registerModel, info, f); err != nil {
			verdict.addf("draw %s: %v", page, err)
		}
		if err := f.Close(); err != nil {
			return err
		}
		verdict.addf("the history of key %q is not linearizable (%v); see %s", key, result, page)
	}
	return verdict.err()
}

// TestLiveHistory_Judges plants what a broken cluster would show, and asks both judges.
func TestLiveHistory_Judges(t *testing.T) {
	const ms = time.Millisecond
	put := func(start, end int, value string, rv uint64) *liveOp {
		return &liveOp{kind: livePut, key: "k", value: value, wrote: true, rv: rv, start: time.Duration(start) * ms, end: time.Duration(end) * ms}
	}
	get := func(start, end int, value string, itemRV, rv uint64) *liveOp {
		return &liveOp{kind: liveGet, key: "k", value: value, found: value != "", itemRV: itemRV, rv: rv,
			start: time.Duration(start) * ms, end: time.Duration(end) * ms}
	}
	del := func(start, end int, wrote bool, rv uint64) *liveOp {
		return &liveOp{kind: liveDelete, key: "k", wrote: wrote, rv: rv, start: time.Duration(start) * ms, end: time.Duration(end) * ms}
	}
	with := func(o *liveOp, outcome liveOutcome) *liveOp {
		o.outcome, o.wrote = outcome, false
		return o
	}
	putIf := func(start, end int, ifValue string, ifRV uint64, value string, rv uint64) *liveOp {
		o := put(start, end, value, rv)
		o.kind, o.ifValue, o.ifRV = livePutIf, ifValue, ifRV
		return o
	}
	failed := func(o *liveOp, itemRV uint64) *liveOp {
		o.wrote, o.itemRV = false, itemRV
		return o
	}
	tests := []struct {
		name     string
		ops      []*liveOp
		last     uint64
		versions string // what the first judge says; "" for nothing
		register bool   // the second judge finds it, too
	}{
		{"clean", []*liveOp{put(0, 2, "a", 1), get(1, 3, "a", 1, 1), put(4, 5, "b", 2), get(6, 7, "b", 2, 2),
			del(8, 9, true, 3), del(10, 11, false, 3), get(12, 13, "", 0, 3)}, 3, "", false},
		{"unknown, seen later", []*liveOp{put(0, 2, "a", 1), with(put(1, 3, "b", 0), liveUnknown),
			get(3, 4, "a", 1, 1), get(8, 9, "b", 2, 2)}, 2, "", false},
		{"unknown, overwritten unseen", []*liveOp{with(put(1, 3, "b", 0), liveUnknown), put(4, 5, "a", 2), get(6, 7, "a", 2, 2)}, 2, "", false},
		{"unknown delete", []*liveOp{put(0, 1, "a", 1), with(del(1, 3, false, 0), liveUnknown), get(4, 5, "", 0, 2)}, 2, "", false},
		{"conditions", []*liveOp{putIf(0, 1, "", 0, "a", 1), failed(putIf(2, 3, "", 0, "b", 1), 1), putIf(4, 5, "a", 1, "c", 2),
			failed(putIf(6, 7, "a", 1, "d", 2), 2), del(8, 9, true, 3), failed(putIf(10, 11, "c", 2, "e", 3), 0)}, 3, "", false},
		{"unknown condition, held", []*liveOp{put(0, 1, "a", 1), with(putIf(2, 3, "a", 1, "b", 0), liveUnknown), get(4, 5, "b", 2, 2)}, 2, "", false},
		{"unknown condition, did not hold", []*liveOp{put(0, 1, "a", 1), with(putIf(2, 3, "", 0, "b", 0), liveUnknown), get(4, 5, "a", 1, 1)}, 1, "", false},
		{"unknown, deleted unseen", []*liveOp{with(put(0, 1, "a", 0), liveUnknown), del(4, 5, true, 2), get(6, 7, "", 0, 2)}, 2, "", false},
		{"unknown, seen by a condition", []*liveOp{put(0, 1, "a", 1), with(put(1, 2, "b", 0), liveUnknown), failed(putIf(3, 4, "a", 1, "c", 2), 2)}, 2, "", false},
		{"two creators", []*liveOp{putIf(0, 3, "", 0, "a", 1), putIf(1, 4, "", 0, "b", 2)}, 2, "did not hold", true},
		{"condition on an old version", []*liveOp{put(0, 1, "a", 1), put(2, 3, "b", 2), putIf(4, 5, "a", 1, "c", 3)}, 3, "did not hold", true},
		{"condition refused that held", []*liveOp{put(0, 1, "a", 1), failed(putIf(2, 3, "a", 1, "b", 1), 1)}, 1, "that held", true},
		{"failed condition happens", []*liveOp{put(0, 1, "a", 1), failed(putIf(2, 3, "", 0, "b", 1), 1), get(4, 5, "b", 2, 2)}, 2, "was refused", true},
		{"deleted nothing", []*liveOp{put(0, 1, "a", 1), del(2, 3, true, 2), del(4, 5, true, 3)}, 3, "not there", true},
		{"lost write", []*liveOp{put(0, 1, "a", 1), get(2, 3, "", 0, 1)}, 1, "lost", true},
		{"stale read", []*liveOp{put(0, 1, "a", 1), put(2, 3, "b", 2), get(4, 5, "a", 1, 1)}, 2, "goes back", true},
		{"stale read with a new label", []*liveOp{put(0, 1, "a", 1), put(2, 3, "b", 2), get(4, 5, "a", 1, 2)}, 2, "older than it says", true},
		{"read goes back", []*liveOp{put(0, 9, "a", 1), get(1, 2, "a", 1, 1), get(3, 4, "", 0, 0)}, 1, "goes back", true},
		{"doubled write, seen", []*liveOp{put(0, 1, "a", 1), get(2, 3, "a", 2, 2)}, 2, "applied twice", false},
		{"doubled write, counted", []*liveOp{put(0, 1, "a", 1), put(2, 3, "b", 3)}, 3, "the store counts 3 writes", false},
		{"version used twice", []*liveOp{put(0, 1, "a", 1), put(2, 3, "b", 1)}, 1, "same version", false},
		{"version below an older one", []*liveOp{put(0, 1, "a", 2), put(2, 3, "b", 1)}, 2, "goes back", false},
		{"version beyond the store's", []*liveOp{put(0, 1, "a", 1), put(2, 3, "b", 2)}, 1, "outside", false},
		{"refused write happens", []*liveOp{with(put(0, 1, "a", 0), liveRefused), get(2, 3, "a", 1, 1)}, 1, "was refused", true},
		{"value from nowhere", []*liveOp{get(2, 3, "a", 1, 1)}, 1, "nobody wrote", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := newLiveHistory()
			h.ops = tt.ops
			if err := h.checkLinearizable(t.TempDir()); (err != nil) != tt.register {
				t.Errorf("second judge: %v", err)
			}
			err := h.checkVersions(0, tt.last)
			if got := fmt.Sprint(err); (err == nil) != (tt.versions == "") || !strings.Contains(got, tt.versions) {
				t.Errorf("first judge: %v, want %q", err, tt.versions)
			}
		})
	}
}
