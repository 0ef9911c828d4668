package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/store"
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
	items    map[string]store.Item
	versions map[string][]modelVersion // of each key, oldest first
	events   []store.Event
	batches  map[batchID]*modelBatch
	retries  map[string]store.RetryRecord
	hasRead  bool              // the last transaction
	values   map[string]uint64 // version of each value that was put; values are never used twice
	members  map[uint64]store.Member
	removed  map[uint64]bool

	voters, votersBefore []uint64 // now, and before the last change

	latest func(h store.BatchHeader, term uint64) int64 // that the clock of a batch's proposer may have shown when it proposed

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
	item   store.Item
	exists bool
}

type batchID struct{ session, seq uint64 }

type modelBatch struct {
	index   uint64
	at      time.Duration // when a node applied it first
	results []store.Result
}

func newModel() *model {
	return &model{
		level:    1,
		items:    map[string]store.Item{},
		versions: map[string][]modelVersion{},
		batches:  map[batchID]*modelBatch{},
		retries:  map[string]store.RetryRecord{},
		values:   map[string]uint64{},
		members:  map[uint64]store.Member{},
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
func (m *model) get(key string, rv uint64) (store.Item, bool) {
	vs := m.versions[key]
	n, _ := slices.BinarySearchFunc(vs, rv+1, func(v modelVersion, rv uint64) int {
		if v.rv < rv {
			return -1
		}
		return 1
	})
	if n == 0 {
		return store.Item{}, false
	}
	return vs[n-1].item, vs[n-1].exists
}

// list returns the items with a prefix as of a resource version.
func (m *model) list(prefix string, rv uint64) []store.KeyItem {
	var items []store.KeyItem
	for _, key := range slices.Sorted(maps.Keys(m.versions)) {
		if it, ok := m.get(key, rv); ok && strings.HasPrefix(key, prefix) {
			items = append(items, store.KeyItem{Key: key, Item: it})
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
func (m *model) first(h store.BatchHeader, index uint64) (*modelBatch, bool) {
	id := batchID{h.Session, h.Seq}
	if b := m.batches[id]; b != nil {
		return b, false
	}
	b := &modelBatch{index: index}
	m.batches[id] = b
	m.last, m.lastID = b, id
	return b, true
}

func (m *model) applyBatch(e *raftpb.Entry, next *modelEntry) error {
	h, data, err := store.DecodeBatch(e.GetData())
	if err != nil {
		return err
	}
	b, fresh := m.first(h, e.GetIndex())
	if !fresh {
		return nil
	}
	if m.level == 1 {
		m.now = max(m.now, h.Time)
		m.elapsed, m.seen = m.now, m.now
	} else {
		m.now = h.Time
		if h.Time > m.seen {
			m.elapsed += min(h.Time-m.seen, store.AgeStepMillis)
		}
		if h.Time > m.seen || m.seen-h.Time > store.AgeStepMillis {
			m.seen = h.Time
		}
	}
	m.kept, m.keys = 0, nil
	for len(data) > 0 {
		var c store.Command
		if c, data, err = store.DecodeCommand(data); err != nil {
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

func (m *model) apply(c *store.Command, next *modelEntry) (store.Result, error) {
	if c.Op == store.OpNop {
		return store.Result{}, nil // it was withdrawn: a retry is the first attempt
	}
	if c.Retry.Key != "" {
		if old, ok := m.retries[c.Retry.Key]; ok && m.elapsed-old.Time <= store.RetryAgeMillis {
			if old.ID != c.Retry {
				return store.Result{Status: store.StatusRetryOther}, nil
			}
			r := old.First
			r.Replayed = true
			return r, nil
		}
	}
	var changes []store.Event
	if err := m.expireOverdue(c, &changes); err != nil {
		return store.Result{}, err
	}
	if err := m.commit(changes, next); err != nil {
		return store.Result{}, err
	}
	changes = nil
	m.hasRead = false
	r, err := m.execute(c, &changes)
	if err != nil {
		return store.Result{}, err
	}
	if err := m.commit(changes, next); err != nil {
		return store.Result{}, err
	}
	r.RV, r.Key = m.rv, c.Key
	if c.Op == store.OpRefuse {
		r.Key = c.Value
	}
	if c.Retry.Key != "" {
		m.keys = append(m.keys, c.Retry.Key)
		kept := r
		if m.level >= 3 && m.hasRead {
			kept.Ops = nil
		}
		m.retries[c.Retry.Key] = store.RetryRecord{ID: c.Retry, Time: m.elapsed, First: kept}
	}
	return r, nil
}

// expireOverdue: from level 2 on who writes a key finds it gone once its time has
// come.
func (m *model) expireOverdue(c *store.Command, changes *[]store.Event) error {
	keys := []string{c.Key}
	switch {
	case m.level < 2:
		return nil
	case c.Op == store.OpTxn:
		t, err := store.DecodeTxn(c.Value)
		if err != nil {
			return err
		}
		keys = nil
		for _, cmp := range t.Compare {
			keys = append(keys, cmp.Key)
		}
		for _, op := range slices.Concat(t.Then, t.Otherwise) {
			keys = append(keys, op.Key)
		}
	case c.Op != store.OpPut && c.Op != store.OpDelete:
		return nil
	}
	for _, key := range keys {
		if it, ok := m.items[key]; ok && it.Expires != 0 && it.Expires <= m.now {
			m.change(&store.Command{Op: store.OpExpire, Key: key}, changes)
		}
	}
	return nil
}

// commit gives changes their version.
func (m *model) commit(changes []store.Event, next *modelEntry) error {
	if len(changes) > 0 {
		m.rv++
		changes[len(changes)-1].Last = true
	}
	for _, e := range changes {
		deleted := e.Kind == store.EventDeleted || e.Kind == store.EventExpired
		it := e.Item
		if deleted {
			it = store.Item{}
		} else if before, twice := m.values[it.Value]; twice && before != m.rv {
			return fmt.Errorf("value %q was written at version %d and again at %d", it.Value, before, m.rv)
		} else {
			m.values[it.Value] = m.rv
		}
		m.versions[e.Key] = append(m.versions[e.Key], modelVersion{rv: m.rv, item: it, exists: !deleted})
		next.touched = append(next.touched, e.Key)
	}
	m.events = append(m.events, changes...)
	return nil
}

// checkExpiry: what expires was due by the clock of who proposed it, and is what
// it saw.
func (m *model) checkExpiry(c *store.Command, h store.BatchHeader, term uint64) error {
	it, exists := m.items[c.Key]
	switch {
	case c.Op != store.OpExpire:
		return nil
	case c.Condition.Kind != store.IfMatch:
		return fmt.Errorf("key %q expires, whatever its version is", c.Key)
	case exists && c.Condition.RV == it.RV && (it.Expires == 0 || it.Expires > m.latest(h, term)):
		return fmt.Errorf("key %q expires at %d, when it is %d for who proposed that", c.Key, it.Expires, m.latest(h, term))
	}
	return nil
}

func (m *model) execute(c *store.Command, changes *[]store.Event) (store.Result, error) {
	switch c.Op {
	case store.OpRefuse:
		return store.Result{Status: store.StatusRefused}, nil
	case store.OpLevel:
		to, err := store.DecodeRaising([]byte(c.Value))
		for id := range m.members {
			if !slices.Contains(to.Members, id) {
				return store.Result{Status: store.StatusPrecondition}, err
			}
		}
		if m.level < 3 && to.Level >= 3 {
			for key, old := range m.retries {
				if slices.ContainsFunc(old.First.Ops, func(op store.OpResult) bool { return op.Status == store.StatusFound }) {
					old.First.Ops = nil
					m.retries[key] = old
				}
			}
		}
		m.level = max(m.level, to.Level)
		return store.Result{Status: store.StatusReplaced}, err
	case store.OpMember:
		var update store.Member
		if err := json.Unmarshal([]byte(c.Value), &update); err != nil {
			return store.Result{}, err
		}
		if _, ok := m.members[update.ID]; !ok {
			return store.Result{Status: store.StatusNotFound}, nil
		}
		return store.Result{Status: store.StatusReplaced}, nil // directories are not compared here, but with the bytes of states
	case store.OpPut, store.OpDelete, store.OpExpire:
		if it, exists := m.items[c.Key]; !c.Condition.Holds(it, exists) {
			return store.Result{Status: store.StatusPrecondition, Current: it.RV}, nil
		}
		return store.Result{Status: m.change(c, changes)}, nil
	case store.OpDeletePrefix:
		r := store.Result{Status: store.StatusDeleted}
		for _, key := range slices.Sorted(maps.Keys(m.items)) {
			if strings.HasPrefix(key, c.Key) {
				m.change(&store.Command{Op: store.OpDelete, Key: key}, changes)
				r.Count++
			}
		}
		return r, nil
	case store.OpTxn:
		return m.executeTxn(c.Value, changes)
	}
	return store.Result{}, fmt.Errorf("the model does not know command %d", c.Op)
}

func (m *model) executeTxn(value string, changes *[]store.Event) (store.Result, error) {
	t, err := store.DecodeTxn(value)
	if err != nil {
		return store.Result{}, err
	}
	r, ops := store.Result{Status: store.StatusSucceeded}, t.Then
	for _, cmp := range t.Compare {
		if it, exists := m.items[cmp.Key]; !cmp.Holds(it, exists) {
			r.Status, ops = store.StatusFailed, t.Otherwise
		}
	}
	r.Ops, m.hasRead = []store.OpResult{}, false
	for _, op := range ops {
		m.hasRead = m.hasRead || op.Op == store.OpGet
		res := store.OpResult{Status: store.StatusNotFound}
		if op.Op != store.OpGet {
			res.Status = m.change(&op, changes)
		} else if it, ok := m.items[op.Key]; ok {
			res = store.OpResult{Status: store.StatusFound, Item: it}
		}
		r.Ops = append(r.Ops, res)
	}
	return r, nil
}

// change puts or deletes a key.
func (m *model) change(c *store.Command, changes *[]store.Event) store.Status {
	rv := m.rv + 1
	old, exists := m.items[c.Key]
	e := store.Event{RV: rv, Prev: old.RV, Time: m.now, Key: c.Key, Item: old}
	var st store.Status
	switch {
	case c.Op == store.OpPut && exists:
		st, e.Kind = store.StatusReplaced, store.EventModified
		e.Item = store.Item{Value: c.Value, RV: rv, Created: old.Created, Expires: c.Deadline(m.now), ContentType: c.ContentType}
	case c.Op == store.OpPut:
		st, e.Kind = store.StatusCreated, store.EventAdded
		e.Item = store.Item{Value: c.Value, RV: rv, Created: rv, Expires: c.Deadline(m.now), ContentType: c.ContentType}
	case !exists:
		return store.StatusNotFound
	case c.Op == store.OpExpire:
		st, e.Kind = store.StatusDeleted, store.EventExpired
	default:
		st, e.Kind = store.StatusDeleted, store.EventDeleted
	}
	if c.Op == store.OpPut {
		m.items[c.Key] = e.Item
	} else {
		delete(m.items, c.Key)
		switch n := len(old.Value); {
		case m.level == 1:
		case n <= 1024 && m.kept+n <= 8<<20:
			m.kept += n
		default:
			e.Item.Value, e.Cut = "", true
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
	id := c.Member.ID
	old, exists := m.members[id]
	voters, taken := 0, false
	for _, other := range m.members {
		if !other.Learner {
			voters++
		}
		taken = taken || other.ID != id && other.PeerURL == c.Member.PeerURL
	}
	switch {
	case c.Kind == store.RemoveMember && exists && (old.Learner || voters > 1):
		delete(m.members, id)
		m.removed[id] = true
	case c.Kind == store.PromoteLearner && exists && old.Learner:
		old.Learner, old.Promote = false, false
		m.members[id] = old
	case c.Kind == store.AddLearner && !exists && !m.removed[id] && !taken:
		c.Member.Learner = true
		m.members[id] = c.Member
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
