package main

import (
	"bytes"
	"cmp"
	"fmt"
	"hash/maphash"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/store"
)

// checker watches every process from outside, turn by turn, and judges the
// history at the end.
type checker struct {
	sim        *sim
	model      *model
	violations []violation
	blind      bool // look at nothing: only the product's own checks count

	cluster uint64            // its number, once a node is in it
	leaders map[uint64]uint64 // by term
	states  map[uint64]uint64 // hash of the state's bytes, by index
	configs map[uint64]string // raft's configuration, by the index of its last change

	verdicts map[uint64]store.Verdict // of nodes that have found their own state wanting

	refusals    map[uint64][]denial // by session
	clocks      map[uint64]simClock // by session
	refusedKeys map[string]bool     // Idempotency-Keys of requests that were said not to have happened
	acked       uint64              // highest version that a client was told of

	reached    map[string]int // how often something went wrong at a point
	diskErrors int
}

// violation is a promise that was broken.
type violation struct {
	Check string        `json:"check"`
	Text  string        `json:"text"`
	At    time.Duration `json:"at"`
}

// seen is how far the checker has followed a process.
type seen struct {
	applied uint64
	config  uint64 // index of the last change that was compared, plus 1
}

// violationsMax: the first ones tell the story.
const violationsMax = 5

func newChecker(s *sim) *checker {
	c := &checker{
		sim:         s,
		model:       newModel(),
		leaders:     map[uint64]uint64{},
		states:      map[uint64]uint64{},
		configs:     map[uint64]string{},
		reached:     map[string]int{},
		verdicts:    map[uint64]store.Verdict{},
		refusals:    map[uint64][]denial{},
		clocks:      map[uint64]simClock{},
		refusedKeys: map[string]bool{},
	}
	c.model.latest = c.latest
	return c
}

func (c *checker) violate(check, format string, args ...any) {
	if len(c.violations) < violationsMax && !c.blind {
		c.violations = append(c.violations, violation{Check: check, Text: fmt.Sprintf(format, args...), At: c.sim.now})
	}
}

func (c *checker) failed() bool { return len(c.violations) > 0 }

// lead records that a node leads a term. No other may.
func (c *checker) lead(id, term uint64) {
	other, known := c.leaders[term]
	if !known {
		c.leaders[term] = id
	} else if other != id {
		c.violate("one leader", "nodes %d and %d both lead term %d", other, id, term)
	}
}

// sent looks at what a process tells the others.
func (c *checker) sent(p *process, m *raftpb.Message) {
	switch m.GetType() {
	case raftpb.MsgApp, raftpb.MsgHeartbeat, raftpb.MsgSnap:
		c.lead(m.GetFrom(), m.GetTerm())
	case raftpb.MsgReadIndexResp:
		if m.GetTerm() == p.replica.term { // or it is from before the messages that came with it
			c.answersReads(p, "tells another one up to where to read")
		}
	case raftpb.MsgAppResp, raftpb.MsgVoteResp:
		if p.disk.broken {
			c.violate("disk error", "node %d sends %v after its disk has failed", p.node.id, m.GetType())
		}
	}
	switch m.GetType() {
	case raftpb.MsgSnap:
		c.offered(p, m)
	case raftpb.MsgProp:
		for _, e := range m.GetEntries() {
			if e.GetType() == raftpb.EntryNormal {
				c.wanted(p, e.GetData())
			}
		}
	}
	c.promised(p, m)
}

// started looks at what a process has found on its disk.
func (c *checker) started(p *process) {
	if id := p.identity.Cluster; c.cluster == 0 {
		c.cluster = id
	} else if id != c.cluster {
		c.violate("one cluster", "node %d starts in cluster %x, and others are in cluster %x", p.node.id, id, c.cluster)
	}
	if len(c.model.members) == 0 {
		maps.Copy(c.model.members, p.store.State.Members)
		c.model.countVoters()
	}
	p.seen.applied = p.store.State.Index
	if p.seen.applied > 0 {
		c.whole(p)
	}
}

// judged hears what a node thinks of its own state, and whose states are not
// like its own.
func (c *checker) judged(p *process, v store.Verdict, differ []uint64) {
	if v != store.Sound {
		c.verdicts[p.node.id] = v
	}
	if len(differ) > 0 {
		c.violate("divergence", "node %d at entry %d finds itself %v: it differs from %v", p.node.id, p.store.Applied(), v, differ)
	}
}

// observe looks at a process after each turn.
func (c *checker) observe(p *process) {
	if p.replica.role == raft.StateLeader {
		c.lead(p.node.id, p.replica.term)
	}
	before, now := p.seen.applied, p.store.State.Index
	if now < before {
		c.violate("applied", "node %d went back from entry %d to %d", p.node.id, before, now)
	}
	if now > before {
		p.seen.applied = now
		c.advanced(p, before, now)
	}
}

// advanced looks at a process that has applied the entries after before up to
// now, or a snapshot that takes the place of some of them.
func (c *checker) advanced(p *process, before, now uint64) {
	first, err := p.replica.log.FirstIndex()
	if err != nil {
		c.violate("simulator", "node %d: %v", p.node.id, err)
		return
	}
	installed := before+1 < first
	if installed {
		before = first - 1
		if c.model.index() < before {
			c.violate("snapshot", "node %d has a snapshot at %d, but nobody has applied more than %d", p.node.id, before, c.model.index())
			return
		}
	}
	if now > before && !c.entries(p, before+1, now) {
		return
	}
	if installed {
		c.whole(p)
		return
	}
	c.since(p, before)
	if now/hashEvery != before/hashEvery {
		c.state(p)
	}
}

// entries compares applied entries with what others have applied there.
func (c *checker) entries(p *process, first, last uint64) bool {
	ents, err := p.replica.log.Entries(first, last+1, noLimit)
	if err != nil {
		c.violate("simulator", "node %d: entries %d to %d: %v", p.node.id, first, last, err)
		return false
	}
	for _, e := range ents {
		if !c.entry(p, e) {
			return false
		}
	}
	return true
}

// hashEvery is how many entries lie between two looks at the whole state.
const hashEvery = 64

// entry compares one of them. Who applies an entry first shows it to the model.
func (c *checker) entry(p *process, e *raftpb.Entry) bool {
	m := c.model
	if e.GetIndex() == m.index()+1 {
		c.committed(p, e)
		if err := m.append(e); err != nil {
			c.violate("model", "entry %d, applied by node %d: %v", e.GetIndex(), p.node.id, err)
			return false
		}
		if b := m.last; b != nil && b.index == e.GetIndex() {
			b.at = c.sim.now
			c.notRefused(m.lastID.session, m.lastID.seq, b)
			for _, key := range m.keys {
				if c.refusedKeys[key] {
					c.violate("retry", "a request with the key %s is applied at entry %d, and its client was told that it was not", key, e.GetIndex())
				}
			}
		}
		return true
	}
	known := m.entry(e.GetIndex())
	if known.term != e.GetTerm() || known.hash != hashBytes(e.GetData()) {
		c.violate("logs match", "node %d applies another entry %d (term %d) than a node before it (term %d)",
			p.node.id, e.GetIndex(), e.GetTerm(), known.term)
		return false
	}
	return true
}

// since compares what the entries after before have changed with the model.
func (c *checker) since(p *process, before uint64) {
	if !c.totals(p) {
		return
	}
	st := &p.store.State
	for i := before + 1; i <= st.Index; i++ {
		if c.model.entry(i).config == i {
			c.remembers(p, i)
		}
		for _, key := range c.model.entry(i).touched {
			it, ok := st.Items.Get(key)
			if !c.item(p, key, it, ok) {
				return
			}
		}
	}
}

// whole compares the whole state of a process with the model.
func (c *checker) whole(p *process) {
	st := &p.store.State
	if st.Index > c.model.index() {
		c.violate("applied", "node %d starts at entry %d, but nobody has applied more than %d", p.node.id, st.Index, c.model.index())
		return
	}
	if !c.totals(p) {
		return
	}
	deadlines := 0
	st.Items.Scan(func(key string, it store.Item) bool {
		deadlines += boolInt(it.Expires != 0)
		return c.item(p, key, it, true)
	})
	if st.Expiry.Len() != deadlines {
		c.violate("state", "node %d at entry %d knows %d deadlines of %d", p.node.id, st.Index, st.Expiry.Len(), deadlines)
	}
	c.state(p)
}

func (c *checker) totals(p *process) bool {
	st, want := &p.store.State, c.model.entry(p.store.State.Index)
	if st.RV != want.rv || st.Items.Len() != want.items || st.Term != want.term {
		c.violate("state", "node %d at entry %d has term %d, version %d, %d items; it should have %d, %d, %d",
			p.node.id, st.Index, st.Term, st.RV, st.Items.Len(), want.term, want.rv, want.items)
		return false
	}
	if want.config+1 != p.seen.config {
		p.seen.config = want.config + 1
		c.config(p, want.config)
	}
	return true
}

func (c *checker) item(p *process, key string, it store.Item, ok bool) bool {
	if want, exists := c.model.get(key, p.store.State.RV); ok != exists || it != want {
		c.violate("state", "node %d at entry %d has %q = %v %+v, it should have %v %+v", p.node.id, p.store.State.Index, key, ok, it, exists, want)
		return false
	}
	return true
}

// config compares members and raft's configuration after a change at index.
func (c *checker) config(p *process, index uint64) {
	st, m := &p.store.State, c.model
	if m.entry(m.index()).config == index && (!maps.EqualFunc(st.Members, m.members, sameMember) || !maps.Equal(st.Removed, m.removed)) {
		c.violate("members", "node %d at entry %d has members %v, it should have %v", p.node.id, st.Index, st.Members, m.members)
	}
	cs := p.replica.confState
	text := fmt.Sprint(cs.GetVoters(), cs.GetLearners(), cs.GetVotersOutgoing(), cs.GetLearnersNext())
	if other, known := c.configs[index]; !known {
		c.configs[index] = text
	} else if other != text {
		c.violate("configuration", "node %d at entry %d has configuration %s, another node had %s", p.node.id, st.Index, text, other)
	}
}

// sameMember leaves out the directory, which a member tells at any time.
func sameMember(a, b store.Member) bool {
	a.Directory, b.Directory = 0, 0
	return a == b
}

// state compares the bytes of a state with those of others at the same entry.
func (c *checker) state(p *process) {
	var b bytes.Buffer
	if err := p.store.State.Encode(&b); err != nil {
		c.violate("simulator", "%v", err)
		return
	}
	c.body(p, p.store.State.Index, b.Bytes())
}

var stateSeed = maphash.MakeSeed()

// body compares a snapshot's body with others at the same entry.
func (c *checker) body(p *process, index uint64, body []byte) {
	hash := maphash.Bytes(stateSeed, body)
	if other, known := c.states[index]; !known {
		c.states[index] = hash
	} else if other != hash {
		c.violate("state bytes", "node %d at entry %d has another state than another node had", p.node.id, index)
	}
}

// The end.

// validator judges a run when it is over.
type validator struct {
	name  string
	check func(*sim) error
}

// validators are all of them. A new capability adds its own here.
var validators = []validator{
	{"converged", validateConverged},
	{"events", validateEvents},
	{"watch", validateWatchers},
	{"outcomes", validateOutcomes},
	{"versions", validateVersions},
	{"linearizable", validateLinearizable},
	{"progress", validateProgress},
}

// finish judges the run.
func (c *checker) finish() {
	for _, v := range validators {
		if c.failed() {
			return
		}
		if err := v.check(c.sim); err != nil {
			c.violate(v.name, "%v", err)
		}
	}
}

// validateConverged: every member has applied everything and holds the same.
func validateConverged(s *sim) error {
	for _, n := range s.nodes {
		if _, member := s.check.model.members[n.id]; !member || n.retired {
			continue
		}
		if n.process == nil {
			return fmt.Errorf("node %d is down", n.id)
		}
		if got, want := n.process.store.Applied(), s.check.model.index(); got != want {
			return fmt.Errorf("node %d has applied %d of %d entries", n.id, got, want)
		}
		s.check.whole(n.process)
	}
	return nil
}

// validateEvents: the window of events is the end of all events.
func validateEvents(s *sim) error {
	all := s.check.model.events
	for i, e := range all {
		if i > 0 && (e.RV < all[i-1].RV || e.RV > all[i-1].RV+1 || (e.RV == all[i-1].RV) == all[i-1].Last) {
			return fmt.Errorf("event %d has version %d after %d", i, e.RV, all[i-1].RV)
		}
	}
	for _, n := range s.nodes {
		if _, member := s.check.model.members[n.id]; !member || n.process == nil {
			continue
		}
		log := &n.process.store.State.Events
		if log.End() != uint64(len(all)) {
			return fmt.Errorf("node %d has had %d events of %d", n.id, log.End(), len(all))
		}
		for at := log.First; at < log.End(); {
			events, _, ok := log.From(at)
			if !ok || len(events) == 0 {
				return fmt.Errorf("node %d does not find event %d, which is in its window", n.id, at)
			}
			for i := range events {
				if events[i] != all[at] {
					return fmt.Errorf("node %d: event %d is %+v, it should be %+v", n.id, at, events[i], all[at])
				}
				at++
			}
		}
	}
	return nil
}

// applied returns what became of an operation in the committed log, and when a
// node first applied it.
func (s *sim) applied(op *simOp) (r store.Result, at time.Duration, applied bool) {
	for _, a := range op.attempts {
		if a.batch == nil || a.batch.seq == 0 {
			continue
		}
		b := s.check.model.batches[batchID{a.session, a.batch.seq}]
		if b == nil || a.place >= len(b.results) {
			continue
		}
		if r := b.results[a.place]; r.Status != store.StatusNone {
			return r, b.at, true
		}
	}
	return store.Result{}, 0, false
}

// validateOutcomes: what a client was told about a write is what happened.
func validateOutcomes(s *sim) error {
	for _, op := range s.history.ops {
		if op.isRead() {
			continue
		}
		r, _, applied := s.applied(op)
		switch {
		case op.outcome == opRefused && applied:
			return fmt.Errorf("%v; but it was applied: %+v", op, r)
		case op.outcome == opDone && !applied:
			return fmt.Errorf("%v; but it was not applied", op)
		case op.outcome == opDone && !sameResult(op.result, r):
			return fmt.Errorf("%v; but it came to %+v", op, r)
		}
	}
	return nil
}

// sameResult compares all but whether it is the answer to a retry, which is not
// told again what was read.
func sameResult(a, b store.Result) bool {
	if a.Replayed && a.Ops == nil || b.Replayed && b.Ops == nil {
		a.Ops, b.Ops = nil, nil
	}
	a.Replayed, b.Replayed = false, false
	return reflect.DeepEqual(a, b)
}

// validateVersions takes the resource versions at their word: each operation
// took place at its version, so versions must follow the clock, and what was
// read must be what was there. This finds any breach of linearizability, across
// keys too, in n log n.
func validateVersions(s *sim) error {
	type moment struct {
		at  time.Duration
		end bool
		op  *simOp
	}
	var moments []moment
	for _, op := range s.history.ops {
		if op.outcome == opDone {
			moments = append(moments, moment{op.invoked, false, op}, moment{op.returned, true, op})
		}
	}
	slices.SortStableFunc(moments, func(a, b moment) int {
		if a.at == b.at { // operations that touch are concurrent: begin first
			return cmp.Compare(boolInt(a.end), boolInt(b.end))
		}
		return cmp.Compare(a.at, b.at)
	})
	highest := uint64(0) // version of any operation that has ended
	floors := map[*simOp]uint64{}
	for _, m := range moments {
		if !m.end {
			floors[m.op] = highest
			continue
		}
		if err := s.checkVersion(m.op, floors[m.op]); err != nil {
			return err
		}
		if m.op.read != readWhatever && m.op.read != readAtLeast {
			highest = max(highest, m.op.version())
		}
	}
	return nil
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// version is the store's version at which an operation took place.
func (o *simOp) version() uint64 {
	if o.isRead() {
		return o.rv
	}
	return o.result.RV
}

func (s *sim) checkVersion(op *simOp, floor uint64) error {
	if op.read == readAtLeast {
		floor = op.atLeast
	}
	rv := op.version()
	if op.read != readWhatever && rv < floor {
		return fmt.Errorf("%v took place at version %d, but %d had been seen before it began", op, rv, floor)
	}
	switch {
	case op.list:
		if want := s.check.model.list(op.cmd.Key, rv); !slices.Equal(op.items, want) {
			return fmt.Errorf("%v: %+v; but at version %d there were %+v", op, op.items, rv, want)
		}
	case op.isRead():
		if it, ok := s.check.model.get(op.cmd.Key, rv); ok != op.found || it != op.item {
			return fmt.Errorf("%v; but at version %d it was %v, %+v", op, rv, ok, it)
		}
	}
	return nil
}

// validateLinearizable asks porcupine, which knows nothing of versions, whether
// there is any order in which a register could have given these answers.
func validateLinearizable(s *sim) error {
	groups := map[string][]porcupine.Operation{}
	for i, op := range s.history.ops {
		if op.outcome == opRefused || op.list || op.isRead() && (op.read != readLatest || op.outcome != opDone) {
			continue
		}
		o := porcupine.Operation{ClientId: i, Input: op, Call: int64(op.invoked), Output: op, Return: int64(op.returned)}
		if op.outcome == opOpen {
			r, at, applied := s.applied(op)
			if !applied {
				continue // and the run is over, so it never will be
			}
			resolved := *op
			resolved.result = r
			o.Input, o.Output, o.Return = &resolved, &resolved, int64(at) // from then on all reads must see it
		}
		if group, ok := judgedTogether(op.cmd.Key); ok {
			groups[group] = append(groups[group], o)
		}
	}
	for _, group := range slices.Sorted(maps.Keys(groups)) {
		switch porcupine.CheckOperationsTimeout(registers, groups[group], porcupineTimeout) {
		case porcupine.Illegal:
			return fmt.Errorf("the history of %q is not linearizable (%d operations)", group, len(groups[group]))
		case porcupine.Unknown:
			return fmt.Errorf("the history of %q took too long to judge (%d operations)", group, len(groups[group]))
		}
	}
	return nil
}

const porcupineTimeout = 20 * time.Second

// judgedTogether returns the name of the keys that one register machine holds.
// Keys that expire change without a client, so they are left to the versions.
func judgedTogether(key string) (group string, ok bool) {
	group, _, _ = strings.Cut(key, "/")
	return group, group != expiringGroup
}

// registers is a few keys and their values.
var registers = porcupine.Model{
	Init: func() any { return map[string]string{} },
	Step: func(state, input, output any) (bool, any) {
		op := output.(*simOp)
		values := state.(map[string]string)
		if op.isRead() {
			value, found := values[op.cmd.Key]
			return found == op.found && value == op.item.Value, state
		}
		next := maps.Clone(values)
		return stepRegisters(next, &op.cmd, &op.result), next
	},
	Equal: func(a, b any) bool { return maps.Equal(a.(map[string]string), b.(map[string]string)) },
	DescribeOperation: func(input, _ any) string {
		return input.(*simOp).String()
	},
}

// stepRegisters carries out a command and says whether its result fits.
func stepRegisters(values map[string]string, c *store.Command, r *store.Result) bool {
	_, exists := values[c.Key]
	switch {
	case r.Status == store.StatusPrecondition:
		// Which version a key has is not known here.
		return c.Condition.Kind == store.IfMatch || !c.Condition.Holds(store.Item{}, exists)
	case c.Condition.Kind != store.Always && c.Condition.Kind != store.IfMatch && !c.Condition.Holds(store.Item{}, exists):
		return false
	}
	switch c.Op {
	case store.OpPut:
		values[c.Key] = c.Value
		return (r.Status == store.StatusReplaced) == exists
	case store.OpDelete:
		delete(values, c.Key)
		return (r.Status == store.StatusDeleted) == exists
	case store.OpDeletePrefix:
		n := uint64(0)
		maps.DeleteFunc(values, func(key, _ string) bool {
			found := strings.HasPrefix(key, c.Key)
			n += uint64(boolInt(found))
			return found
		})
		return r.Count == n
	case store.OpTxn:
		return stepTxn(values, c.Value, r)
	}
	return false
}

func stepTxn(values map[string]string, encoded string, r *store.Result) bool {
	t, err := store.DecodeTxn(encoded)
	if err != nil {
		return false
	}
	ops, judged, holds := t.Otherwise, true, true
	for _, cmp := range t.Compare {
		value, exists := values[cmp.Key]
		if cmp.Kind == store.ByVersion || cmp.Kind == store.ByCreated {
			judged = false
		} else if !cmp.Holds(store.Item{Value: value}, exists) {
			holds = false
		}
	}
	if r.Status == store.StatusSucceeded {
		ops = t.Then
	}
	told := len(r.Ops) > 0 || !r.Replayed // a retry may not be told what was read
	if judged && holds != (r.Status == store.StatusSucceeded) || told && len(r.Ops) != len(ops) {
		return false
	}
	for i, op := range ops {
		switch {
		case !told && op.Op == store.OpPut:
			values[op.Key] = op.Value
			continue
		case !told:
			if op.Op == store.OpDelete {
				delete(values, op.Key)
			}
			continue
		}
		if op.Op == store.OpGet {
			value, found := values[op.Key]
			if found != (r.Ops[i].Status == store.StatusFound) || value != r.Ops[i].Item.Value {
				return false
			}
		} else if !stepRegisters(values, &op, &store.Result{Status: r.Ops[i].Status}) {
			return false
		}
	}
	return true
}

// healthSpan is the time in which nothing goes wrong.
type healthSpan struct {
	on    bool
	since time.Duration
	spans []span // before
}

type span struct{ from, to time.Duration }

func (h *healthSpan) begin(now time.Duration) { h.on, h.since = true, now }

func (h *healthSpan) end(now time.Duration) {
	if h.on {
		h.spans = append(h.spans, span{h.since, now})
	}
	h.on = false
}

// Bounds of what clients notice once all that was wrong is repaired.
const (
	recoveryMax = 3 * time.Second // until everything works again
	answerMax   = time.Second     // and from then on, for any operation
)

// validateProgress: once all is repaired, operations succeed, everywhere, and
// soon.
func validateProgress(s *sim) error {
	for _, op := range s.history.ops {
		n := len(op.attempts)
		if n == 0 {
			continue // the client found its node down
		}
		hasty := op.attempts[n-1].timeout < answerMax // it may not have got its turn
		for _, h := range s.healthy.spans {
			well := h.from + recoveryMax
			failed := op.outcome != opDone && op.returned >= well && !hasty
			late := op.returned > max(op.begun, well)+answerMax
			if !failed && !late || op.invoked >= h.to || op.returned > h.to {
				continue
			}
			if _, _, applied := s.applied(op); applied && op.outcome == opOpen {
				continue // its entry came to this node in a snapshot, which does not tell results
			}
			if slices.ContainsFunc(op.attempts, func(a attempt) bool { return s.check.model.removed[a.node] }) {
				continue // a storm may end while a member is being removed
			}
			return fmt.Errorf("%v; but all was well from %v to %v", op, h.from, h.to)
		}
	}
	return nil
}
