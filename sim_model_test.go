package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// model is the state machine written a second time, as plainly as possible and
// with nothing forgotten: it applies the committed log as the first member to
// apply each entry saw it, and remembers every version of every key. It shares
// the decoders with the product and nothing else.
type model struct {
	entries  []modelEntry // from index modelBase + 1 on
	level    int
	now      int64 // at level 1 the highest of any entry, then that of the last one
	elapsed  int64 // by which the outcomes of requests age
	seen     int64 // of level 2: the time up to which elapsed was counted
	rv       uint64
	items    map[string]item
	versions map[string][]modelVersion // of each key, oldest first
	events   []event
	batches  map[batchID]*modelBatch
	retries  map[string]retryRecord
	hasRead  bool              // the last transaction
	values   map[string]uint64 // version of each value that was put; values are never used twice
	members  map[uint64]member
	removed  map[uint64]bool

	voters, votersBefore []uint64 // now, and before the last change

	latest func(h batchHeader, term uint64) int64 // that the clock of a batch's proposer may have shown when it proposed

	keys   []string    // Idempotency-Keys that the present entry carried out
	kept   int         // bytes of deleted values, by the events of the present entry
	last   *modelBatch // that was applied
	lastID batchID
}

// modelBase is the index of the state that a cluster starts with.
const modelBase = 1

type modelEntry struct {
	term    uint64
	hash    uint64
	rv      uint64   // of the store once the entry is applied
	items   int      // in the store then
	config  uint64   // index of the last change of the configuration
	touched []string // keys
}

// modelVersion is what became of a key at a resource version.
type modelVersion struct {
	rv     uint64
	item   item
	exists bool
}

type batchID struct{ session, seq uint64 }

type modelBatch struct {
	index   uint64
	at      time.Duration // when a node applied it first
	results []result
}

func newModel() *model {
	return &model{
		level:    1,
		items:    map[string]item{},
		versions: map[string][]modelVersion{},
		batches:  map[batchID]*modelBatch{},
		retries:  map[string]retryRecord{},
		values:   map[string]uint64{},
		members:  map[uint64]member{},
		removed:  map[uint64]bool{},
	}
}

// index returns the index of the last entry.
func (m *model) index() uint64 { return modelBase + uint64(len(m.entries)) }

// entry returns what is known of an entry; the state that the cluster started
// with is entry modelBase.
func (m *model) entry(index uint64) *modelEntry {
	if index == modelBase {
		return &modelEntry{term: 1}
	}
	return &m.entries[index-modelBase-1]
}

// get returns the item of a key as of a resource version.
func (m *model) get(key string, rv uint64) (item, bool) {
	vs := m.versions[key]
	n, _ := slices.BinarySearchFunc(vs, rv+1, func(v modelVersion, rv uint64) int {
		if v.rv < rv {
			return -1
		}
		return 1
	})
	if n == 0 {
		return item{}, false
	}
	return vs[n-1].item, vs[n-1].exists
}

// list returns the items with a prefix as of a resource version.
func (m *model) list(prefix string, rv uint64) []keyItem {
	var items []keyItem
	for _, key := range slices.Sorted(maps.Keys(m.versions)) {
		if it, ok := m.get(key, rv); ok && strings.HasPrefix(key, prefix) {
			items = append(items, keyItem{key, it})
		}
	}
	return items
}

// append applies the next entry.
func (m *model) append(e *raftpb.Entry) error {
	next := modelEntry{term: e.GetTerm(), hash: hashBytes(e.GetData()), config: m.entry(m.index()).config}
	var err error
	switch {
	case e.GetType() == raftpb.EntryConfChange:
		err = m.changeMember(e, &next)
	case len(e.GetData()) > 0:
		err = m.applyBatch(e, &next)
	}
	next.rv, next.items = m.rv, len(m.items)
	m.entries = append(m.entries, next)
	return err
}

// first records a batch and says whether it is new.
func (m *model) first(h batchHeader, index uint64) (*modelBatch, bool) {
	id := batchID{h.session, h.seq}
	if b := m.batches[id]; b != nil {
		return b, false
	}
	b := &modelBatch{index: index}
	m.batches[id] = b
	m.last, m.lastID = b, id
	return b, true
}

func (m *model) applyBatch(e *raftpb.Entry, next *modelEntry) error {
	h, data, err := decodeBatch(e.GetData())
	if err != nil {
		return err
	}
	b, fresh := m.first(h, e.GetIndex())
	if !fresh {
		return nil
	}
	if m.level == 1 {
		m.now = max(m.now, h.time)
		m.elapsed, m.seen = m.now, m.now
	} else {
		m.now = h.time
		if h.time > m.seen {
			m.elapsed += min(h.time-m.seen, ageStepMillis)
		}
		if h.time > m.seen || m.seen-h.time > ageStepMillis {
			m.seen = h.time
		}
	}
	m.kept, m.keys = 0, nil
	for len(data) > 0 {
		var c command
		if c, data, err = decodeCommand(data); err != nil {
			return err
		}
		if err := m.checkExpiry(&c, h, e.GetTerm()); err != nil {
			return err
		}
		r, err := m.apply(&c, next)
		if err != nil {
			return err
		}
		b.results = append(b.results, r)
	}
	return nil
}

func (m *model) apply(c *command, next *modelEntry) (result, error) {
	if c.op == opNop {
		return result{}, nil // it was withdrawn: a retry is the first attempt
	}
	if c.retry.key != "" {
		if old, ok := m.retries[c.retry.key]; ok && m.elapsed-old.time <= retryAgeMillis {
			if old.id != c.retry {
				return result{status: statusRetryOther}, nil
			}
			r := old.first
			r.replayed = true
			return r, nil
		}
	}
	var changes []event
	if err := m.expireOverdue(c, &changes); err != nil {
		return result{}, err
	}
	if err := m.commit(changes, next); err != nil {
		return result{}, err
	}
	changes = nil
	m.hasRead = false
	r, err := m.execute(c, &changes)
	if err != nil {
		return result{}, err
	}
	if err := m.commit(changes, next); err != nil {
		return result{}, err
	}
	r.rv, r.key = m.rv, c.key
	if c.op == opRefuse {
		r.key = c.value
	}
	if c.retry.key != "" {
		m.keys = append(m.keys, c.retry.key)
		kept := r
		if m.level >= 3 && m.hasRead {
			kept.ops = nil
		}
		m.retries[c.retry.key] = retryRecord{id: c.retry, time: m.elapsed, first: kept}
	}
	return r, nil
}

// expireOverdue: from level 2 on who writes a key finds it gone once its time has
// come.
func (m *model) expireOverdue(c *command, changes *[]event) error {
	keys := []string{c.key}
	switch {
	case m.level < 2:
		return nil
	case c.op == opTxn:
		t, err := decodeTxn(c.value)
		if err != nil {
			return err
		}
		keys = nil
		for _, cmp := range t.compare {
			keys = append(keys, cmp.key)
		}
		for _, op := range slices.Concat(t.then, t.otherwise) {
			keys = append(keys, op.key)
		}
	case c.op != opPut && c.op != opDelete:
		return nil
	}
	for _, key := range keys {
		if it, ok := m.items[key]; ok && it.expires != 0 && it.expires <= m.now {
			m.change(&command{op: opExpire, key: key}, changes)
		}
	}
	return nil
}

// commit gives changes their version.
func (m *model) commit(changes []event, next *modelEntry) error {
	if len(changes) > 0 {
		m.rv++
		changes[len(changes)-1].last = true
	}
	for _, e := range changes {
		deleted := e.kind == eventDeleted || e.kind == eventExpired
		it := e.item
		if deleted {
			it = item{}
		} else if before, twice := m.values[it.value]; twice && before != m.rv {
			return fmt.Errorf("value %q was written at version %d and again at %d", it.value, before, m.rv)
		} else {
			m.values[it.value] = m.rv
		}
		m.versions[e.key] = append(m.versions[e.key], modelVersion{rv: m.rv, item: it, exists: !deleted})
		next.touched = append(next.touched, e.key)
	}
	m.events = append(m.events, changes...)
	return nil
}

// checkExpiry: what expires was due by the clock of who proposed it, and is what
// it saw.
func (m *model) checkExpiry(c *command, h batchHeader, term uint64) error {
	it, exists := m.items[c.key]
	switch {
	case c.op != opExpire:
		return nil
	case c.condition.kind != ifMatch:
		return fmt.Errorf("key %q expires, whatever its version is", c.key)
	case exists && c.condition.rv == it.rv && (it.expires == 0 || it.expires > m.latest(h, term)):
		return fmt.Errorf("key %q expires at %d, when it is %d for who proposed that", c.key, it.expires, m.latest(h, term))
	}
	return nil
}

func (m *model) execute(c *command, changes *[]event) (result, error) {
	switch c.op {
	case opRefuse:
		return result{status: statusRefused}, nil
	case opLevel:
		to, err := decodeRaising([]byte(c.value))
		for id := range m.members {
			if !slices.Contains(to.members, id) {
				return result{status: statusPrecondition}, err
			}
		}
		if m.level < 3 && to.level >= 3 {
			for key, old := range m.retries {
				if slices.ContainsFunc(old.first.ops, func(op opResult) bool { return op.status == statusFound }) {
					old.first.ops = nil
					m.retries[key] = old
				}
			}
		}
		m.level = max(m.level, to.level)
		return result{status: statusReplaced}, err
	case opMember:
		var update member
		if err := json.Unmarshal([]byte(c.value), &update); err != nil {
			return result{}, err
		}
		if _, ok := m.members[update.ID]; !ok {
			return result{status: statusNotFound}, nil
		}
		return result{status: statusReplaced}, nil // directories are not compared here, but with the bytes of states
	case opPut, opDelete, opExpire:
		if it, exists := m.items[c.key]; !c.condition.holds(it, exists) {
			return result{status: statusPrecondition, current: it.rv}, nil
		}
		return result{status: m.change(c, changes)}, nil
	case opDeletePrefix:
		r := result{status: statusDeleted}
		for _, key := range slices.Sorted(maps.Keys(m.items)) {
			if strings.HasPrefix(key, c.key) {
				m.change(&command{op: opDelete, key: key}, changes)
				r.count++
			}
		}
		return r, nil
	case opTxn:
		return m.executeTxn(c.value, changes)
	}
	return result{}, fmt.Errorf("the model does not know command %d", c.op)
}

func (m *model) executeTxn(value string, changes *[]event) (result, error) {
	t, err := decodeTxn(value)
	if err != nil {
		return result{}, err
	}
	r, ops := result{status: statusSucceeded}, t.then
	for _, cmp := range t.compare {
		if it, exists := m.items[cmp.key]; !cmp.holds(it, exists) {
			r.status, ops = statusFailed, t.otherwise
		}
	}
	r.ops, m.hasRead = []opResult{}, false
	for _, op := range ops {
		m.hasRead = m.hasRead || op.op == opGet
		res := opResult{status: statusNotFound}
		if op.op != opGet {
			res.status = m.change(&op, changes)
		} else if it, ok := m.items[op.key]; ok {
			res = opResult{status: statusFound, item: it}
		}
		r.ops = append(r.ops, res)
	}
	return r, nil
}

// change puts or deletes a key.
func (m *model) change(c *command, changes *[]event) status {
	rv := m.rv + 1
	old, exists := m.items[c.key]
	e := event{rv: rv, prev: old.rv, time: m.now, key: c.key, item: old}
	var st status
	switch {
	case c.op == opPut && exists:
		st, e.kind = statusReplaced, eventModified
		e.item = item{value: c.value, rv: rv, created: old.created, expires: c.deadline(m.now), contentType: c.contentType}
	case c.op == opPut:
		st, e.kind = statusCreated, eventAdded
		e.item = item{value: c.value, rv: rv, created: rv, expires: c.deadline(m.now), contentType: c.contentType}
	case !exists:
		return statusNotFound
	case c.op == opExpire:
		st, e.kind = statusDeleted, eventExpired
	default:
		st, e.kind = statusDeleted, eventDeleted
	}
	if c.op == opPut {
		m.items[c.key] = e.item
	} else {
		delete(m.items, c.key)
		switch n := len(old.value); {
		case m.level == 1:
		case n <= 1024 && m.kept+n <= 8<<20:
			m.kept += n
		default:
			e.item.value, e.cut = "", true
		}
	}
	*changes = append(*changes, e)
	return st
}

func (m *model) changeMember(e *raftpb.Entry, next *modelEntry) error {
	_, h, c, err := decodeMemberChange(e)
	if err != nil {
		return err
	}
	if _, fresh := m.first(h, e.GetIndex()); !fresh {
		return nil
	}
	id := c.member.ID
	old, exists := m.members[id]
	voters, taken := 0, false
	for _, other := range m.members {
		if !other.Learner {
			voters++
		}
		taken = taken || other.ID != id && other.PeerURL == c.member.PeerURL
	}
	switch {
	case c.kind == removeMember && exists && (old.Learner || voters > 1):
		delete(m.members, id)
		m.removed[id] = true
	case c.kind == promoteLearner && exists && old.Learner:
		old.Learner, old.Promote = false, false
		m.members[id] = old
	case c.kind == addLearner && !exists && !m.removed[id] && !taken:
		c.member.Learner = true
		m.members[id] = c.member
	default:
		return nil
	}
	next.config = e.GetIndex()
	m.countVoters()
	return nil
}

// countVoters notes who votes now.
func (m *model) countVoters() {
	m.votersBefore, m.voters = m.voters, nil
	for id, other := range m.members {
		if !other.Learner {
			m.voters = append(m.voters, id)
		}
	}
	slices.Sort(m.voters)
}
