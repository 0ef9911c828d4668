package store

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

// Item is the value of one key.
type Item struct {
	Value   string
	RV      uint64 // resource version of the last write
	Created uint64 // resource version of the write that created the key
	Expires int64  // unix milliseconds; 0 = never

	ContentType string // of the value; empty = not said
}

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

// State is everything that is replicated. A copy of it at one raft index is a
// snapshot.
type State struct {
	Level int    // feature level of the cluster, see level.go
	Index uint64 // raft index of the last applied entry
	Term  uint64 // and its term
	RV    uint64 // resource version of the last write, for the whole store
	size  uint64 // bytes that the items take, about
	Now   int64  // unix milliseconds, see pass
	Sum   uint64 // of all entries up to index and what they did, see checksum.go

	// From level 2 on, see pass: milliseconds by which what ages does so, and the
	// time up to which they were counted.
	elapsed, seen int64

	// Invariant: every item's RV is at most that of the state; Expiry has exactly the
	// items with a deadline; every event's RV is above Events.Dropped.
	Items    *itemMap
	Expiry   *btree.Set[string] // expiryKey of each item that has a deadline
	Events   eventLog
	Retries  retryTable
	Sessions Sessions
	Members  map[uint64]Member
	Removed  map[uint64]bool // ids that were members; never used again

	digest         uint64 // of the items
	SessionsDigest uint64
	membersDigest  uint64
	membersStale   bool // membersDigest is not that of members and removed

	Changed []Event // by the command that is being applied
	entry   entrySize
	Scans   []*Scan // that read these items now; not replicated
	Updates int     // of members, by commands; not replicated
}

// entrySize is how much the entry that is being applied has added to the window.
type entrySize struct {
	bytes   uint64 // of events
	deleted uint64 // of them of deleted values
}

func NewState() State {
	return State{
		Level:        LevelFirst,
		membersStale: true,
		Items:        newItemMap(),
		Expiry:       new(btree.Set[string]),
		Events:       newEventLog(),
		Retries:      NewRetryTable(),
		Sessions:     Sessions{},
		Members:      map[uint64]Member{},
		Removed:      map[uint64]bool{},
	}
}

// Copy returns a state that later writes to s do not change. The map is copied
// on write, so this takes microseconds at any size.
func (s *State) Copy() State {
	c := *s
	c.Items = s.Items.Copy()
	c.Expiry = s.Expiry.Copy()
	c.Events = s.Events.Copy()
	c.Retries = s.Retries.copy()
	c.Changed, c.Scans = nil, nil
	c.Sessions = s.Sessions.copy()
	c.Members = maps.Clone(s.Members)
	c.Removed = maps.Clone(s.Removed)
	return c
}

// Store guards a state: one goroutine applies, any number read.
type Store struct {
	LevelMax    int // that this node takes part in; 0 = what the program knows
	Mu          sync.RWMutex
	State       State
	checkpoints checkpoints // of what was applied here
	steps       []step      // of the entry that is being applied; kept for its memory
}

func New() *Store {
	return &Store{State: NewState()}
}

// Get returns the item of a key and the store's resource version, both from
// the same moment.
func (s *Store) Get(key string) (it Item, rv uint64, ok bool) {
	s.Mu.RLock()
	it, ok = s.State.Items.Get(key)
	rv = s.State.RV
	s.Mu.RUnlock()
	return it, rv, ok
}

// Version returns the store's resource version.
func (s *Store) Version() uint64 {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.RV
}

// Outcome returns what became of a request that was carried out before.
func (s *Store) Outcome(id RetryID) (first Result, known bool) {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.Retries.Lookup(id, s.State.Clock())
}

// Size returns about how many bytes the items take.
func (s *Store) Size() uint64 {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.size
}

// SnapshotSize returns about how many bytes a snapshot takes.
func (s *Store) SnapshotSize() uint64 {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.SnapshotSize()
}

func (s *State) SnapshotSize() uint64 { return s.size + s.Events.bytes + s.Retries.Bytes }

// storeStats is how much a store holds.
type storeStats struct {
	Keys   int
	Bytes  uint64 // of keys and values, about
	Events int    // in the window
}

func (s *Store) Stats() storeStats {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return storeStats{Keys: s.State.Items.Len(), Bytes: s.State.size, Events: int(s.State.Events.Count)}
}

// Applied returns the raft index of the last applied entry.
func (s *Store) Applied() uint64 {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.Index
}

// TellsRemoved says whether this member, self, tells the one with that id that it was
// removed, which ends it. A learner that knows does not: a voter may need the
// vote of the removed member to find out that its removal is committed.
func (s *Store) TellsRemoved(self, id uint64) bool {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	m, ok := s.State.Members[self]
	return s.State.Removed[id] && ok && !m.Learner
}

// Removed returns the ids that were members once, in order.
func (s *Store) Removed() []uint64 {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return slices.Sorted(maps.Keys(s.State.Removed))
}

// Snapshot returns a copy of the state as it is now.
func (s *Store) Snapshot() State {
	s.Mu.Lock() // not RLock: the copy marks the tree's nodes as shared
	defer s.Mu.Unlock()
	return s.State.Copy()
}

// Restore replaces the state, but for the bounds of the window of events, which
// are this node's and count from the next entry on. Readers see the old state or
// the new one whole.
func (s *Store) Restore(st State) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	st.Events.countMax, st.Events.bytesMax = s.State.Events.countMax, s.State.Events.bytesMax
	st.Events.hold = s.State.Events.hold
	s.State, s.checkpoints = st, checkpoints{}
}

// SetWindow sets the bounds of the window of events, which count from the next
// entry on: a member that has restarted keeps what the others keep, who know
// which events are of the newest entry.
func (s *Store) SetWindow(countMax, bytesMax uint64) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	s.State.Events.countMax, s.State.Events.bytesMax = countMax, bytesMax
	s.State.Events.newest = s.State.Events.End()
}

// TrimWindow drops what is beyond the bounds of the window, as the next entry would.
func (s *Store) TrimWindow() {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	s.State.Events.trim()
}

// HoldWindow makes the window of events wait for a reader; nil ends that.
func (s *Store) HoldWindow(h *Hold) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	s.State.Events.hold = h
}

// Apply applies the commands of the batch at index. When out is not nil it
// receives one result for each command. fresh is false if the batch was applied
// before, at a lower index; then nothing changes and out stays empty.
//
// An error means that this program cannot read what the cluster has agreed on,
// so it must stop. Nothing has changed then: neither a snapshot nor a checksum
// of this node may tell of an entry that it did not carry out.
func (s *Store) Apply(index, term uint64, h BatchHeader, commands []byte, out *[]Result) (fresh bool, err error) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	if err := s.State.Follows(index); err != nil {
		return false, err
	}
	if s.steps, err = decodeSteps(s.steps[:0], commands); err != nil {
		return false, err
	}
	defer clear(s.steps) // they keep values alive
	for i := range s.steps {
		c := &s.steps[i]
		if need := c.level; need > s.State.Level {
			return false, fmt.Errorf("command %d: the cluster is at feature level %d, and this needs %d", i+1, s.State.Level, need)
		}
		if c.Op == OpLevel {
			if err := s.CheckLevel(c.raise.Level); err != nil {
				return false, err
			}
		}
	}
	s.State.Index, s.State.Term = index, term
	if !s.State.first(h) {
		s.seal(h.digest(commands, false))
		return false, nil
	}
	s.State.pass(h.Time)
	first := s.State.Events.End()
	s.State.entry = entrySize{}
	for i := range s.steps {
		r := s.State.applyStep(&s.steps[i])
		if out != nil {
			*out = append(*out, r)
		}
	}
	s.State.Events.endEntry(first)
	s.seal(h.digest(commands, true))
	return true, nil
}

// step is a command that can be carried out: all of it is known.
type step struct {
	Command
	level  int     // from which on it is known
	txn    Txn     // of opTxn, instead of the value
	update Member  // of opMember
	raise  Raising // of opLevel
}

// decodeSteps reads a batch and appends its commands to steps.
func decodeSteps(steps []step, commands []byte) ([]step, error) {
	d := Fields{Data: commands}
	for n := 1; len(d.Data) > 0; n++ {
		v := d.outerCommand(false)
		st := step{level: v.level}
		if d.Err == nil {
			switch v.op {
			case OpTxn:
				var level int
				st.txn, level, d.Err = decodeTxnLevel(v.value)
				st.level = max(st.level, level)
				v.value = nil
			case OpMember:
				st.update, d.Err = DecodeMember(v.value)
			case OpLevel:
				st.raise, d.Err = DecodeRaising(v.value)
			}
		}
		if d.Err != nil {
			return steps, fmt.Errorf("command %d: %w", n, d.Err)
		}
		st.Command = v.command()
		steps = append(steps, st)
	}
	return steps, nil
}

// Skip applies an entry that holds nothing.
func (s *Store) Skip(index, term uint64) error {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	if err := s.State.Follows(index); err != nil {
		return err
	}
	s.State.Index, s.State.Term = index, term
	s.seal(0)
	return nil
}

// seal ends an entry: what it was and did becomes part of the sum.
func (s *Store) seal(content uint64) {
	s.State.fold(content)
	s.checkpoints.note(&s.State)
}

// Follows says whether index is that of the next entry.
func (s *State) Follows(index uint64) error {
	if index != s.Index+1 {
		return fmt.Errorf("entry %d does not follow the applied index %d", index, s.Index)
	}
	return nil
}

// applyStep carries out a command, or answers it like the request that it
// repeats.
func (s *State) applyStep(c *step) Result {
	if c.Op == OpNop {
		return Result{} // it never happened: a retry must not find it
	}
	if c.Retry.Key != "" {
		if first, known := s.Retries.Lookup(c.Retry, s.Clock()); known {
			return first
		}
	}
	s.expireOverdue(c)
	r := s.execute(c)
	r.Key = c.Key
	if c.Op == OpRefuse {
		r.Key = c.Value
	}
	s.commit(&r)
	if c.Retry.Key != "" {
		s.Retries.add(c.Retry, s.kept(c, r), s.Clock())
	}
	return r
}

// kept returns what of a result is remembered for a retry of its request. What
// a transaction has read is not, from level 3 on: it may be large, and be no
// business of who asks again. The other results of it would be half an answer.
func (s *State) kept(c *step, r Result) Result {
	isGet := func(o Command) bool { return o.Op == OpGet }
	if s.Level >= 3 && c.Op == OpTxn && slices.ContainsFunc(c.txn.Branch(r.Status), isGet) {
		r.Ops = nil
	}
	return r
}

// expireOverdue deletes keys that a command is about to look at and whose time has
// come, if they are still there because nobody has proposed that yet. So a lock is
// free, and cannot be renewed, from its deadline on. They get a version of their own.
func (s *State) expireOverdue(c *step) {
	if first, ok := s.Expiry.Min(); s.Level < 2 || !ok || expiryTime(first) > s.Now {
		return
	}
	expire := func(key string) {
		if it, ok := s.Items.Get(key); ok && it.Expires != 0 && it.Expires <= s.Now {
			s.delete(key, EventExpired)
		}
	}
	switch c.Op {
	case OpPut, OpDelete:
		expire(c.Key)
	case OpTxn:
		for i := range c.txn.Compare {
			expire(c.txn.Compare[i].Key)
		}
		for _, ops := range [][]Command{c.txn.Then, c.txn.Otherwise} {
			for i := range ops {
				expire(ops[i].Key)
			}
		}
	}
	s.commit(&Result{})
}

// execute makes the changes of a command and leaves their events in changed.
// What it does not know never gets here.
func (s *State) execute(c *step) Result {
	switch c.Op {
	case OpPut, OpDelete, OpExpire:
		it, exists := s.Items.Get(c.Key)
		if !c.Condition.Holds(it, exists) {
			return Result{Status: StatusPrecondition, Current: it.RV}
		}
		switch c.Op {
		case OpPut:
			return Result{Status: s.Put(&c.Command)}
		case OpExpire:
			return Result{Status: s.delete(c.Key, EventExpired)}
		default:
			return Result{Status: s.delete(c.Key, EventDeleted)}
		}
	case OpDeletePrefix:
		return s.deletePrefix(c.Key)
	case OpTxn:
		return s.executeTxn(&c.txn)
	case OpMember:
		return s.UpdateMember(c.update)
	case OpLevel:
		return s.raise(c.raise)
	default: // opRefuse
		return Result{Status: StatusRefused}
	}
}

// commit gives the changes of a command their resource version.
func (s *State) commit(r *Result) {
	if len(s.Changed) == 0 {
		r.RV = s.RV
		return
	}
	s.RV++
	r.RV = s.RV
	s.Changed[len(s.Changed)-1].Last = true
	for _, e := range s.Changed {
		s.Events.add(e)
		s.entry.bytes += e.Size()
	}
	clear(s.Changed)
	s.Changed = s.Changed[:0]
}

// nextRV is the version that the changes of the current command get.
func (s *State) nextRV() uint64 { return s.RV + 1 }

func (s *State) Put(c *Command) Status {
	key := c.Key
	it := Item{Value: c.Value, RV: s.nextRV(), Created: s.nextRV(), Expires: c.Deadline(s.Now), ContentType: intern(c.ContentType)}
	e := Event{RV: it.RV, Time: s.Now, Kind: EventAdded, Key: key}
	old, replaced := s.Items.Get(key)
	if replaced {
		it.Created = old.Created
		e.Kind, e.Prev = EventModified, old.RV
		s.Forget(key, old)
	}
	s.Items.Set(key, it)
	s.Remember(key, it)
	e.Item = it
	s.Changed = append(s.Changed, e)
	if replaced {
		return StatusReplaced
	}
	return StatusCreated
}

func (s *State) delete(key string, kind EventKind) Status {
	old, ok := s.Items.Delete(key)
	if !ok {
		return StatusNotFound
	}
	s.Forget(key, old)
	e := Event{RV: s.nextRV(), Prev: old.RV, Time: s.Now, Kind: kind, Key: key, Item: old}
	if n := uint64(len(old.Value)); n <= s.rules().deletedValueMax && s.entry.deleted+n <= s.rules().deletedBytesMax {
		s.entry.deleted += n
	} else {
		e.Item.Value, e.Cut = "", true
	}
	s.Changed = append(s.Changed, e)
	return StatusDeleted
}

// Remember and forget keep what is derived from the items.
func (s *State) Remember(key string, it Item) {
	s.size += ItemSize(key, it)
	s.digest += it.digest(key)
	if it.Expires != 0 {
		s.Expiry.Insert(expiryKey(it.Expires, key))
	}
}

func (s *State) Forget(key string, it Item) {
	s.keepForScans(key, it)
	s.size -= ItemSize(key, it)
	s.digest -= it.digest(key)
	if it.Expires != 0 {
		s.Expiry.Delete(expiryKey(it.Expires, key))
	}
}

func (s *State) deletePrefix(prefix string) Result {
	most := s.rules().DeletePrefixMax
	keys := s.keysWith(prefix, most+1)
	bytes := s.entry.bytes
	for _, key := range keys {
		bytes += uint64(len(key)) + eventOverhead
	}
	if len(keys) > most || bytes > s.rules().deletePrefixBytesMax {
		return Result{Status: StatusTooMany}
	}
	for _, key := range keys {
		s.delete(key, EventDeleted)
	}
	return Result{Status: StatusDeleted, Count: uint64(len(keys))}
}

// keysWith returns the first n keys with a prefix.
func (s *State) keysWith(prefix string, n int) []string {
	var keys []string
	s.Items.Ascend(prefix, func(key string, _ Item) bool {
		if !strings.HasPrefix(key, prefix) || len(keys) == n {
			return false
		}
		keys = append(keys, key)
		return true
	})
	return keys
}

func (s *State) executeTxn(t *Txn) Result {
	r, ops := Result{Status: StatusSucceeded}, t.Then
	for i := range t.Compare {
		if it, exists := s.Items.Get(t.Compare[i].Key); !t.Compare[i].Holds(it, exists) {
			r.Status, ops = StatusFailed, t.Otherwise
			break
		}
	}
	r.Ops = make([]OpResult, len(ops))
	if s.resultSize(ops) > s.rules().TxnResultMax {
		return Result{Status: StatusTooMany}
	}
	for i := range ops {
		r.Ops[i] = s.executeOp(&ops[i])
	}
	return r
}

// resultSize returns the bytes of the values that the operations will return.
func (s *State) resultSize(ops []Command) int {
	n := 0
	written := map[string]int{} // size of what an operation before has put
	for i := range ops {
		c := &ops[i]
		switch c.Op {
		case OpPut:
			written[c.Key] = len(c.Value)
		case OpDelete:
			written[c.Key] = 0
		case OpGet:
			size, ok := written[c.Key]
			if !ok {
				it, _ := s.Items.Get(c.Key)
				size = len(it.Value)
			}
			n += size
		}
	}
	return n
}

func (s *State) executeOp(c *Command) OpResult {
	switch c.Op {
	case OpPut:
		return OpResult{Status: s.Put(c)}
	case OpDelete:
		return OpResult{Status: s.delete(c.Key, EventDeleted)}
	default:
		it, ok := s.Items.Get(c.Key)
		if !ok {
			return OpResult{Status: StatusNotFound}
		}
		return OpResult{Status: StatusFound, Item: it}
	}
}

// expiryKey sorts by time, then key.
func expiryKey(at int64, key string) string {
	return string(binary.BigEndian.AppendUint64(nil, uint64(at))) + key
}

// expiryTime returns the time in an expiryKey.
func expiryTime(k string) int64 { return int64(binary.BigEndian.Uint64([]byte(k[:8]))) }

// Expired returns commands that expire up to n of the items whose time is not
// after now, with about so many bytes of keys.
func (s *Store) Expired(now int64, n, bytes int) []Command {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	var due []Command
	s.State.Expiry.Scan(func(k string) bool {
		at, key := expiryTime(k), k[8:]
		if at > now || len(due) == n || bytes <= 0 {
			return false
		}
		bytes -= len(key)
		it, _ := s.State.Items.Get(key)
		due = append(due, Command{Op: OpExpire, Key: key, Condition: Condition{Kind: IfMatch, RV: it.RV}})
		return true
	})
	return due
}

// Unchanged says whether no key with a prefix and above another key has changed after version from, up
// to version to. If the window no longer tells, it says no.
func (s *Store) Unchanged(prefix, after string, from, to uint64) bool {
	n, ok := s.SeekEvent(from)
	for ok {
		var events []Event
		if events, _, ok = s.EventsFrom(n); ok && len(events) == 0 {
			return true
		}
		for i := range events {
			switch e := &events[i]; {
			case e.RV > to:
				return true
			case e.Key > after && strings.HasPrefix(e.Key, prefix):
				return false
			}
		}
		n += uint64(len(events))
	}
	return false
}

// WindowStrained says whether the window has waited for its reader for so long that it soon
// goes on without him.
func (s *Store) WindowStrained() bool {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	l := &s.State.Events
	return l.Count > l.countMax+HoldEventsMax/2 || l.bytes > l.bytesMax+holdBytesMax/2
}

// SeekEvent returns where in the window the events above rv start.
func (s *Store) SeekEvent(rv uint64) (n uint64, ok bool) {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.Events.Seek(rv)
}

// EventsFrom returns some of the events from number n on; see eventLog.from.
func (s *Store) EventsFrom(n uint64) (events []Event, aging, ok bool) {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.Events.From(n)
}

// EventsDropped returns up to which version events have left the window.
func (s *Store) EventsDropped() uint64 {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.Events.Dropped
}

// ItemOverhead is what an item costs in memory beside its key and value: two
// string headers, two numbers and its share of the tree, in bytes.
const ItemOverhead = 80

// typeOverhead is what it costs in memory that an item has a content type. The
// type itself is shared by all that have it.
const typeOverhead = 48

func ItemSize(key string, it Item) uint64 {
	size := uint64(len(key)+len(it.Value)) + ItemOverhead
	if it.ContentType != "" {
		size += typeOverhead
	}
	return size
}

// voters returns how many members vote.
func (s *State) voters() int {
	n := 0
	for _, m := range s.Members {
		if !m.Learner {
			n++
		}
	}
	return n
}

// first records the batch of the present entry and says whether it had not been
// seen.
func (s *State) first(h BatchHeader) bool {
	s.leap(h.Time)
	if s.Sessions[h.Session] == nil && len(s.Sessions) >= s.rules().sessionsMax {
		oldest := s.Sessions.oldest()
		s.SessionsDigest -= s.Sessions[oldest].digest(oldest)
		delete(s.Sessions, oldest)
	}
	s.SessionsDigest -= s.Sessions[h.Session].digest(h.Session)
	fresh := s.Sessions.first(h, s.Index)
	s.SessionsDigest += s.Sessions[h.Session].digest(h.Session)
	return fresh
}
