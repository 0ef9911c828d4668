package main

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/tidwall/btree"
)

// This file is the state machine: what an applied entry does to the state, and
// how it is read. It knows neither raft nor HTTP, does no I/O and has no clock.

// item is the value of one key.
type item struct {
	value   string
	rv      uint64 // resource version of the last write
	created uint64 // resource version of the write that created the key
	expires int64  // unix milliseconds; 0 = never

	contentType string // of the value; empty = not said
}

// member is one node of the cluster, as the replicated state knows it.
type member struct {
	ID        uint64 `json:"id"`
	Name      string `json:"name,omitempty"`
	PeerURL   string `json:"peerURL"`
	ClientURL string `json:"clientURL,omitempty"`
	Learner   bool   `json:"learner,omitempty"` // gets the log but has no vote
	// Promote makes a learner a voter as soon as it has caught up.
	Promote bool `json:"promote,omitempty"`
	// Directory is the number of the data directory that the member started
	// with, 0 until then. A member that comes with another one has forgotten what
	// it promised.
	Directory uint64 `json:"directory,string,omitempty"`
	// extra is a JSON object of the fields that only newer programs know, or "".
	// They stay as they are.
	extra string
}

// memberFields is a member without extra, and without methods.
type memberFields member

// MarshalJSON adds the fields that only newer programs know.
func (m member) MarshalJSON() ([]byte, error) {
	b, err := json.Marshal(memberFields(m))
	if err != nil || m.extra == "" {
		return b, err
	}
	return append(append(b[:len(b)-1], ','), m.extra[1:]...), nil
}

// UnmarshalJSON keeps the fields that it does not know.
func (m *member) UnmarshalJSON(b []byte) error {
	if err := json.Unmarshal(b, (*memberFields)(m)); err != nil {
		return err
	}
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	for name := range all {
		if slices.ContainsFunc(memberFieldNames, func(known string) bool { return strings.EqualFold(known, name) }) {
			delete(all, name)
		}
	}
	m.extra = encodeFields(all)
	return nil
}

// memberFieldNames are the fields of a member that are known.
var memberFieldNames = []string{"id", "name", "peerURL", "clientURL", "learner", "promote", "directory"}

// encodeFields returns a JSON object whose bytes follow from its fields.
func encodeFields(fields map[string]json.RawMessage) string {
	if len(fields) == 0 {
		return ""
	}
	b, err := json.Marshal(fields) // sorted by name
	if err != nil {
		return "" // never: they were just read
	}
	return string(b)
}

// mergeFields returns the fields of two objects; those of update count.
func mergeFields(old, update string) string {
	if old == "" || update == "" {
		return cmp.Or(update, old)
	}
	fields := map[string]json.RawMessage{}
	for _, object := range []string{old, update} {
		if err := json.Unmarshal([]byte(object), &fields); err != nil {
			return old // never: both were encoded here
		}
	}
	return encodeFields(fields)
}

// state is everything that is replicated. A copy of it at one raft index is a
// snapshot.
type state struct {
	level int    // feature level of the cluster, see level.go
	index uint64 // raft index of the last applied entry
	term  uint64 // and its term
	rv    uint64 // resource version of the last write, for the whole store
	size  uint64 // bytes that the items take, about
	now   int64  // unix milliseconds, see pass
	sum   uint64 // of all entries up to index and what they did, see divergence.go

	// From level 2 on, see pass: milliseconds by which what ages does so, and the
	// time up to which they were counted.
	elapsed, seen int64

	// Invariant: every item's rv <= state.rv.
	items    *itemMap
	expiry   *btree.Set[string] // expiryKey of each item that has a deadline
	events   eventLog
	retries  retryTable
	sessions sessions
	members  map[uint64]member
	removed  map[uint64]bool // ids that were members; never used again

	digest         uint64 // of the items
	sessionsDigest uint64
	membersDigest  uint64
	membersStale   bool // membersDigest is not that of members and removed

	changed []event // by the command that is being applied
	entry   entrySize
	scans   []*scan // that read these items now; not replicated
	updates int     // of members, by commands; not replicated
}

// entrySize is how much the entry that is being applied has added to the window.
type entrySize struct {
	bytes   uint64 // of events
	deleted uint64 // of them of deleted values
}

func newState() state {
	return state{
		level:        levelFirst,
		membersStale: true,
		items:        newItemMap(),
		expiry:       new(btree.Set[string]),
		events:       newEventLog(),
		retries:      newRetryTable(),
		sessions:     sessions{},
		members:      map[uint64]member{},
		removed:      map[uint64]bool{},
	}
}

// copy returns a state that later writes to s do not change. The map is copied
// on write, so this takes microseconds at any size.
func (s *state) copy() state {
	c := *s
	c.items = s.items.Copy()
	c.expiry = s.expiry.Copy()
	c.events = s.events.copy()
	c.retries = s.retries.copy()
	c.changed, c.scans = nil, nil
	c.sessions = s.sessions.copy()
	c.members = maps.Clone(s.members)
	c.removed = maps.Clone(s.removed)
	return c
}

// kvstore guards a state: one goroutine applies, any number read.
type kvstore struct {
	levelMax    int // that this node takes part in; 0 = what the program knows
	mu          sync.RWMutex
	state       state
	checkpoints checkpoints // of what was applied here
	steps       []step      // of the entry that is being applied; kept for its memory
}

func newKVStore() *kvstore {
	return &kvstore{state: newState()}
}

// get returns the item of a key and the store's resource version, both from
// the same moment.
func (s *kvstore) get(key string) (it item, rv uint64, ok bool) {
	s.mu.RLock()
	it, ok = s.state.items.Get(key)
	rv = s.state.rv
	s.mu.RUnlock()
	return it, rv, ok
}

// version returns the store's resource version.
func (s *kvstore) version() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.rv
}

// outcome returns what became of a request that was carried out before.
func (s *kvstore) outcome(id retryID) (first result, known bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.retries.lookup(id, s.state.clock())
}

// size returns about how many bytes the items take.
func (s *kvstore) size() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.size
}

// snapshotSize returns about how many bytes a snapshot takes.
func (s *kvstore) snapshotSize() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.snapshotSize()
}

func (s *state) snapshotSize() uint64 { return s.size + s.events.bytes + s.retries.bytes }

// storeStats is how much a store holds.
type storeStats struct {
	keys   int
	bytes  uint64 // of keys and values, about
	events int    // in the window
}

func (s *kvstore) stats() storeStats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return storeStats{keys: s.state.items.Len(), bytes: s.state.size, events: int(s.state.events.count)}
}

// applied returns the raft index of the last applied entry.
func (s *kvstore) applied() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.index
}

// members returns the members in the order of their ids.
func (s *kvstore) members() []member {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.sortedMembers()
}

func (s *state) sortedMembers() []member {
	return slices.SortedFunc(maps.Values(s.members), func(a, b member) int { return cmp.Compare(a.ID, b.ID) })
}

// member returns one member.
func (s *kvstore) member(id uint64) (member, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	m, ok := s.state.members[id]
	return m, ok
}

// memberUpdates counts the updates of members that were applied here.
func (s *kvstore) memberUpdates() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.updates
}

// memberCount returns how many members there are. Every write asks.
func (s *kvstore) memberCount() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.state.members)
}

// tellsRemoved says whether this member, self, tells the one with that id that it was
// removed, which ends it. A learner that knows does not: a voter may need the
// vote of the removed member to find out that its removal is committed.
func (s *kvstore) tellsRemoved(self, id uint64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	m, ok := s.state.members[self]
	return s.state.removed[id] && ok && !m.Learner
}

// removed returns the ids that were members once, in order.
func (s *kvstore) removed() []uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Sorted(maps.Keys(s.state.removed))
}

// snapshot returns a copy of the state as it is now.
func (s *kvstore) snapshot() state {
	s.mu.Lock() // not RLock: the copy marks the tree's nodes as shared
	defer s.mu.Unlock()
	return s.state.copy()
}

// restore replaces the state, but for the bounds of the window of events, which
// are this node's and count from the next entry on. Readers see the old state or
// the new one whole.
func (s *kvstore) restore(st state) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.events.countMax, st.events.bytesMax = s.state.events.countMax, s.state.events.bytesMax
	st.events.hold = s.state.events.hold
	s.state, s.checkpoints = st, checkpoints{}
}

// setWindow sets the bounds of the window of events, which count from the next
// entry on: a member that has restarted keeps what the others keep, who know
// which events are of the newest entry.
func (s *kvstore) setWindow(countMax, bytesMax uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.events.countMax, s.state.events.bytesMax = countMax, bytesMax
	s.state.events.newest = s.state.events.end()
}

// trimWindow drops what is beyond the bounds of the window, as the next entry would.
func (s *kvstore) trimWindow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.events.trim()
}

// holdWindow makes the window of events wait for a reader; nil ends that.
func (s *kvstore) holdWindow(h *hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.events.hold = h
}

// apply applies the commands of the batch at index. When out is not nil it
// receives one result for each command. fresh is false if the batch was applied
// before, at a lower index; then nothing changes and out stays empty.
//
// An error means that this program cannot read what the cluster has agreed on,
// so it must stop. Nothing has changed then: neither a snapshot nor a checksum
// of this node may tell of an entry that it did not carry out.
func (s *kvstore) apply(index, term uint64, h batchHeader, commands []byte, out *[]result) (fresh bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.state.follows(index); err != nil {
		return false, err
	}
	if s.steps, err = decodeSteps(s.steps[:0], commands); err != nil {
		return false, err
	}
	defer clear(s.steps) // they keep values alive
	for i := range s.steps {
		c := &s.steps[i]
		if need := c.level; need > s.state.level {
			return false, fmt.Errorf("command %d: the cluster is at feature level %d, and this needs %d", i+1, s.state.level, need)
		}
		if c.op == opLevel {
			if err := s.checkLevel(c.raise.level); err != nil {
				return false, err
			}
		}
	}
	s.state.index, s.state.term = index, term
	if !s.state.first(h) {
		s.seal(h.digest(commands, false))
		return false, nil
	}
	s.state.pass(h.time)
	first := s.state.events.end()
	s.state.entry = entrySize{}
	for i := range s.steps {
		r := s.state.applyStep(&s.steps[i])
		if out != nil {
			*out = append(*out, r)
		}
	}
	s.state.events.endEntry(first)
	s.seal(h.digest(commands, true))
	return true, nil
}

// step is a command that can be carried out: all of it is known.
type step struct {
	command
	level  int     // from which on it is known
	txn    txn     // of opTxn, instead of the value
	update member  // of opMember
	raise  raising // of opLevel
}

// decodeSteps reads a batch and appends its commands to steps.
func decodeSteps(steps []step, commands []byte) ([]step, error) {
	d := fields{data: commands}
	for n := 1; len(d.data) > 0; n++ {
		v := d.outerCommand(false)
		st := step{level: v.level}
		if d.err == nil {
			switch v.op {
			case opTxn:
				var level int
				st.txn, level, d.err = decodeTxnLevel(v.value)
				st.level = max(st.level, level)
				v.value = nil
			case opMember:
				st.update, d.err = decodeMember(v.value)
			case opLevel:
				st.raise, d.err = decodeRaising(v.value)
			}
		}
		if d.err != nil {
			return steps, fmt.Errorf("command %d: %w", n, d.err)
		}
		st.command = v.command()
		steps = append(steps, st)
	}
	return steps, nil
}

// skip applies an entry that holds nothing.
func (s *kvstore) skip(index, term uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.state.follows(index); err != nil {
		return err
	}
	s.state.index, s.state.term = index, term
	s.seal(0)
	return nil
}

// seal ends an entry: what it was and did becomes part of the sum.
func (s *kvstore) seal(content uint64) {
	s.state.fold(content)
	s.checkpoints.note(&s.state)
}

// follows says whether index is that of the next entry.
func (s *state) follows(index uint64) error {
	if index != s.index+1 {
		return fmt.Errorf("entry %d does not follow the applied index %d", index, s.index)
	}
	return nil
}

// applyStep carries out a command, or answers it like the request that it
// repeats.
func (s *state) applyStep(c *step) result {
	if c.op == opNop {
		return result{} // it never happened: a retry must not find it
	}
	if c.retry.key != "" {
		if first, known := s.retries.lookup(c.retry, s.clock()); known {
			return first
		}
	}
	s.expireOverdue(c)
	r := s.execute(c)
	r.key = c.key
	if c.op == opRefuse {
		r.key = c.value
	}
	s.commit(&r)
	if c.retry.key != "" {
		s.retries.add(c.retry, s.kept(c, r), s.clock())
	}
	return r
}

// kept returns what of a result is remembered for a retry of its request. What
// a transaction has read is not, from level 3 on: it may be large, and be no
// business of who asks again. The other results of it would be half an answer.
func (s *state) kept(c *step, r result) result {
	isGet := func(o command) bool { return o.op == opGet }
	if s.level >= 3 && c.op == opTxn && slices.ContainsFunc(c.txn.branch(r.status), isGet) {
		r.ops = nil
	}
	return r
}

// expireOverdue deletes keys that a command is about to look at and whose time has
// come, if they are still there because nobody has proposed that yet. So a lock is
// free, and cannot be renewed, from its deadline on. They get a version of their own.
func (s *state) expireOverdue(c *step) {
	if first, ok := s.expiry.Min(); s.level < 2 || !ok || expiryTime(first) > s.now {
		return
	}
	expire := func(key string) {
		if it, ok := s.items.Get(key); ok && it.expires != 0 && it.expires <= s.now {
			s.delete(key, eventExpired)
		}
	}
	switch c.op {
	case opPut, opDelete:
		expire(c.key)
	case opTxn:
		for i := range c.txn.compare {
			expire(c.txn.compare[i].key)
		}
		for _, ops := range [][]command{c.txn.then, c.txn.otherwise} {
			for i := range ops {
				expire(ops[i].key)
			}
		}
	}
	s.commit(&result{})
}

// execute makes the changes of a command and leaves their events in changed.
// What it does not know never gets here.
func (s *state) execute(c *step) result {
	switch c.op {
	case opPut, opDelete, opExpire:
		it, exists := s.items.Get(c.key)
		if !c.condition.holds(it, exists) {
			return result{status: statusPrecondition, current: it.rv}
		}
		switch c.op {
		case opPut:
			return result{status: s.put(&c.command)}
		case opExpire:
			return result{status: s.delete(c.key, eventExpired)}
		default:
			return result{status: s.delete(c.key, eventDeleted)}
		}
	case opDeletePrefix:
		return s.deletePrefix(c.key)
	case opTxn:
		return s.executeTxn(&c.txn)
	case opMember:
		return s.updateMember(c.update)
	case opLevel:
		return s.raise(c.raise)
	default: // opRefuse
		return result{status: statusRefused}
	}
}

// commit gives the changes of a command their resource version.
func (s *state) commit(r *result) {
	if len(s.changed) == 0 {
		r.rv = s.rv
		return
	}
	s.rv++
	r.rv = s.rv
	s.changed[len(s.changed)-1].last = true
	for _, e := range s.changed {
		s.events.add(e)
		s.entry.bytes += e.size()
	}
	clear(s.changed)
	s.changed = s.changed[:0]
}

// nextRV is the version that the changes of the current command get.
func (s *state) nextRV() uint64 { return s.rv + 1 }

func (s *state) put(c *command) status {
	key := c.key
	it := item{value: c.value, rv: s.nextRV(), created: s.nextRV(), expires: c.deadline(s.now), contentType: intern(c.contentType)}
	e := event{rv: it.rv, time: s.now, kind: eventAdded, key: key}
	old, replaced := s.items.Get(key)
	if replaced {
		it.created = old.created
		e.kind, e.prev = eventModified, old.rv
		s.forget(key, old)
	}
	s.items.Set(key, it)
	s.remember(key, it)
	e.item = it
	s.changed = append(s.changed, e)
	if replaced {
		return statusReplaced
	}
	return statusCreated
}

func (s *state) delete(key string, kind eventKind) status {
	old, ok := s.items.Delete(key)
	if !ok {
		return statusNotFound
	}
	s.forget(key, old)
	e := event{rv: s.nextRV(), prev: old.rv, time: s.now, kind: kind, key: key, item: old}
	if n := uint64(len(old.value)); n <= s.rules().deletedValueMax && s.entry.deleted+n <= s.rules().deletedBytesMax {
		s.entry.deleted += n
	} else {
		e.item.value, e.cut = "", true
	}
	s.changed = append(s.changed, e)
	return statusDeleted
}

// remember and forget keep what is derived from the items.
func (s *state) remember(key string, it item) {
	s.size += itemSize(key, it)
	s.digest += it.digest(key)
	if it.expires != 0 {
		s.expiry.Insert(expiryKey(it.expires, key))
	}
}

func (s *state) forget(key string, it item) {
	s.keepForScans(key, it)
	s.size -= itemSize(key, it)
	s.digest -= it.digest(key)
	if it.expires != 0 {
		s.expiry.Delete(expiryKey(it.expires, key))
	}
}

func (s *state) deletePrefix(prefix string) result {
	most := s.rules().deletePrefixMax
	keys := s.keysWith(prefix, most+1)
	bytes := s.entry.bytes
	for _, key := range keys {
		bytes += uint64(len(key)) + eventOverhead
	}
	if len(keys) > most || bytes > s.rules().deletePrefixBytesMax {
		return result{status: statusTooMany}
	}
	for _, key := range keys {
		s.delete(key, eventDeleted)
	}
	return result{status: statusDeleted, count: uint64(len(keys))}
}

// keysWith returns the first n keys with a prefix.
func (s *state) keysWith(prefix string, n int) []string {
	var keys []string
	s.items.Ascend(prefix, func(key string, _ item) bool {
		if !strings.HasPrefix(key, prefix) || len(keys) == n {
			return false
		}
		keys = append(keys, key)
		return true
	})
	return keys
}

func (s *state) executeTxn(t *txn) result {
	r, ops := result{status: statusSucceeded}, t.then
	for i := range t.compare {
		if it, exists := s.items.Get(t.compare[i].key); !t.compare[i].holds(it, exists) {
			r.status, ops = statusFailed, t.otherwise
			break
		}
	}
	r.ops = make([]opResult, len(ops))
	if s.resultSize(ops) > s.rules().txnResultMax {
		return result{status: statusTooMany}
	}
	for i := range ops {
		r.ops[i] = s.executeOp(&ops[i])
	}
	return r
}

// resultSize returns the bytes of the values that the operations will return.
func (s *state) resultSize(ops []command) int {
	n := 0
	written := map[string]int{} // size of what an operation before has put
	for i := range ops {
		c := &ops[i]
		switch c.op {
		case opPut:
			written[c.key] = len(c.value)
		case opDelete:
			written[c.key] = 0
		case opGet:
			size, ok := written[c.key]
			if !ok {
				it, _ := s.items.Get(c.key)
				size = len(it.value)
			}
			n += size
		}
	}
	return n
}

func (s *state) executeOp(c *command) opResult {
	switch c.op {
	case opPut:
		return opResult{status: s.put(c)}
	case opDelete:
		return opResult{status: s.delete(c.key, eventDeleted)}
	default:
		it, ok := s.items.Get(c.key)
		if !ok {
			return opResult{status: statusNotFound}
		}
		return opResult{status: statusFound, item: it}
	}
}

// expiryKey sorts by time, then key.
func expiryKey(at int64, key string) string {
	return string(binary.BigEndian.AppendUint64(nil, uint64(at))) + key
}

// expiryTime returns the time in an expiryKey.
func expiryTime(k string) int64 { return int64(binary.BigEndian.Uint64([]byte(k[:8]))) }

// expired returns commands that expire up to n of the items whose time is not
// after now, with about so many bytes of keys.
func (s *kvstore) expired(now int64, n, bytes int) []command {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var due []command
	s.state.expiry.Scan(func(k string) bool {
		at, key := expiryTime(k), k[8:]
		if at > now || len(due) == n || bytes <= 0 {
			return false
		}
		bytes -= len(key)
		it, _ := s.state.items.Get(key)
		due = append(due, command{op: opExpire, key: key, condition: condition{kind: ifMatch, rv: it.rv}})
		return true
	})
	return due
}

// unchanged says whether no key with a prefix and above another key has changed after version from, up
// to version to. If the window no longer tells, it says no.
func (s *kvstore) unchanged(prefix, after string, from, to uint64) bool {
	n, ok := s.seekEvent(from)
	for ok {
		var events []event
		if events, _, ok = s.eventsFrom(n); ok && len(events) == 0 {
			return true
		}
		for i := range events {
			switch e := &events[i]; {
			case e.rv > to:
				return true
			case e.key > after && strings.HasPrefix(e.key, prefix):
				return false
			}
		}
		n += uint64(len(events))
	}
	return false
}

// windowStrained says whether the window has waited for its reader for so long that it soon
// goes on without him.
func (s *kvstore) windowStrained() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	l := &s.state.events
	return l.count > l.countMax+holdEventsMax/2 || l.bytes > l.bytesMax+holdBytesMax/2
}

// seekEvent returns where in the window the events above rv start.
func (s *kvstore) seekEvent(rv uint64) (n uint64, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.events.seek(rv)
}

// eventsFrom returns some of the events from number n on; see eventLog.from.
func (s *kvstore) eventsFrom(n uint64) (events []event, aging, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.events.from(n)
}

// eventsDropped returns up to which version events have left the window.
func (s *kvstore) eventsDropped() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.events.dropped
}

// itemOverhead is what an item costs in memory beside its key and value: two
// string headers, two numbers and its share of the tree, in bytes.
const itemOverhead = 80

// typeOverhead is what it costs in memory that an item has a content type. The
// type itself is shared by all that have it.
const typeOverhead = 48

func itemSize(key string, it item) uint64 {
	size := uint64(len(key)+len(it.value)) + itemOverhead
	if it.contentType != "" {
		size += typeOverhead
	}
	return size
}

// memberChange is what a configuration change does to the members.
type memberChange struct {
	kind   memberChangeKind
	member member // of promote and remove only the ID counts
}

type memberChangeKind int

const (
	addLearner memberChangeKind = iota
	promoteLearner
	removeMember
)

// applyMember applies a configuration change at index. refused says why it must
// not happen; every member comes to the same conclusion. A batch that was
// applied before is not fresh and changes nothing.
func (s *kvstore) applyMember(index, term uint64, h batchHeader, c memberChange) (fresh bool, refused, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.state.follows(index); err != nil {
		return false, nil, err
	}
	s.state.index, s.state.term = index, term
	if !s.state.first(h) {
		s.seal(h.digest(nil, false))
		return false, nil, nil
	}
	refused = s.state.changeMember(c)
	s.seal(h.digest(binary.AppendUvarint([]byte{byte(c.kind)}, c.member.ID), true))
	return true, refused, nil
}

func (s *state) changeMember(c memberChange) error {
	id := c.member.ID
	old, exists := s.members[id]
	s.membersStale = true
	switch {
	case s.removed[id]:
		return fmt.Errorf("member %d was removed, and an ID is never used again: take another one", id)
	case c.kind == addLearner && exists:
		return fmt.Errorf("member %d exists already, at %s", id, old.PeerURL)
	case c.kind != addLearner && !exists:
		return fmt.Errorf("there is no member %d", id)
	case c.kind == promoteLearner && !old.Learner:
		return fmt.Errorf("member %d is a voter already", id)
	case c.kind == removeMember && !old.Learner && s.voters() == 1:
		return fmt.Errorf("member %d is the last voter", id)
	}
	switch c.kind {
	case removeMember:
		delete(s.members, id)
		s.removed[id] = true
		return nil
	case promoteLearner:
		old.Learner, old.Promote = false, false
		s.members[id] = old
		return nil
	default:
		if owner := s.peerURLOwner(c.member); owner != 0 {
			return fmt.Errorf("member %d already has the peer URL %s", owner, c.member.PeerURL)
		}
		c.member.Learner = true
		if s.level < 2 {
			c.member.extra = ""
		}
		s.members[id] = c.member
		return nil
	}
}

// peerURLOwner returns the ID of another member that has m's peer URL, or 0.
func (s *state) peerURLOwner(m member) uint64 {
	for _, other := range s.members {
		if other.ID != m.ID && other.PeerURL == m.PeerURL {
			return other.ID
		}
	}
	return 0
}

// voters returns how many members vote.
func (s *state) voters() int {
	n := 0
	for _, m := range s.members {
		if !m.Learner {
			n++
		}
	}
	return n
}

// decodeMember reads who a member is.
func decodeMember[T string | []byte](value T) (m member, err error) {
	if err := json.Unmarshal([]byte(value), &m); err != nil {
		return m, fmt.Errorf("%w: member: %w", errMalformed, err)
	}
	return m, nil
}

// updateMember changes what is known of a member: the fields that are set.
func (s *state) updateMember(update member) result {
	m, ok := s.members[update.ID]
	if !ok {
		return result{status: statusNotFound}
	}
	m.Name = cmp.Or(update.Name, m.Name)
	m.PeerURL = cmp.Or(update.PeerURL, m.PeerURL)
	m.ClientURL = cmp.Or(update.ClientURL, m.ClientURL)
	m.Directory = cmp.Or(update.Directory, m.Directory)
	if s.level >= 2 {
		m.extra = mergeFields(m.extra, update.extra)
	}
	if s.peerURLOwner(m) != 0 {
		return result{status: statusPrecondition}
	}
	s.members[m.ID] = m
	s.membersStale = true
	s.updates++
	return result{status: statusReplaced}
}

// session remembers which batches of one process lifetime were applied. A
// plain maximum would be wrong: a batch that was lost on its way and proposed
// again is older than one that made it.
type session struct {
	used uint64 // raft index of the last batch
	max  uint64 // highest sequence number seen
	// seen has bit seq % sessionWindow set for each number in
	// (max-sessionWindow, max] that was applied.
	seen [sessionWindow / 64]uint64
}

type sessions map[uint64]*session

// first records the batch of the present entry and says whether it had not been
// seen.
func (s *state) first(h batchHeader) bool {
	s.leap(h.time)
	if s.sessions[h.session] == nil && len(s.sessions) >= s.rules().sessionsMax {
		oldest := s.sessions.oldest()
		s.sessionsDigest -= s.sessions[oldest].digest(oldest)
		delete(s.sessions, oldest)
	}
	s.sessionsDigest -= s.sessions[h.session].digest(h.session)
	fresh := s.sessions.first(h, s.index)
	s.sessionsDigest += s.sessions[h.session].digest(h.session)
	return fresh
}

// first does that in the table, which has room. A number below the window counts
// as seen: its proposer gave it up long ago.
func (t sessions) first(h batchHeader, index uint64) bool {
	s := t[h.session]
	if s == nil {
		s = &session{}
		t[h.session] = s
	}
	s.used = index
	if h.seq > s.max {
		if h.seq-s.max >= sessionWindow {
			clear(s.seen[:])
		} else {
			for q := s.max + 1; q < h.seq; q++ {
				s.set(q, false)
			}
		}
		s.max = h.seq
		s.set(h.seq, true)
		return true
	}
	if s.max-h.seq >= sessionWindow || s.has(h.seq) {
		return false
	}
	s.set(h.seq, true)
	return true
}

func (s *session) has(seq uint64) bool {
	bit := seq % sessionWindow
	return s.seen[bit/64]&(1<<(bit%64)) != 0
}

func (s *session) set(seq uint64, on bool) {
	bit := seq % sessionWindow
	if on {
		s.seen[bit/64] |= 1 << (bit % 64)
	} else {
		s.seen[bit/64] &^= 1 << (bit % 64)
	}
}

// oldest returns the session that was used longest ago. No two were last used by
// the same entry, so every member forgets the same one.
func (t sessions) oldest() (oldest uint64) {
	for id, s := range t {
		if t[oldest] == nil || s.used < t[oldest].used {
			oldest = id
		}
	}
	return oldest
}

func (t sessions) copy() sessions {
	c := make(sessions, len(t))
	for id, s := range t {
		d := *s
		c[id] = &d
	}
	return c
}
