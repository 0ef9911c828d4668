package main

import (
	"github.com/tidwall/btree"
)

// This file remembers the outcome of requests that carried an Idempotency-Key,
// so that a client that did not hear the answer may simply ask again, at any
// node. It is part of the replicated state, and bounded.

// Its bounds are rules of the feature level, see level.go. Age is measured by the
// state's own clock, which follows the times in the entries, so that every member
// forgets the same requests. These times are some leader's; what a wrong one can
// do is bounded, see state.pass.

// retryRecord is the outcome of one request.
type retryRecord struct {
	id    retryID
	time  int64 // by state.clock
	first result
}

func (r *retryRecord) size() uint64 {
	n := uint64(256 + len(r.id.key) + len(r.first.key))
	for _, op := range r.first.ops {
		n += uint64(64 + len(op.item.value))
	}
	return n
}

// retryTable holds records in the order in which they came.
type retryTable struct {
	records *btree.Map[uint64, retryRecord] // by number
	numbers *btree.Map[string, uint64]      // by Idempotency-Key
	next    uint64                          // number of the next record
	bytes   uint64
	digest  uint64 // of the records
	rules   *rules
}

func newRetryTable() retryTable {
	return retryTable{rules: &rulesOf[levelFirst], records: new(btree.Map[uint64, retryRecord]), numbers: new(btree.Map[string, uint64])}
}

func (t *retryTable) copy() retryTable {
	c := *t
	c.records, c.numbers = t.records.Copy(), t.numbers.Copy()
	return c
}

// lookup returns the answer for a request whose key was used before. A record
// that is too old counts as gone, whether or not another made it leave.
func (t *retryTable) lookup(id retryID, now int64) (result, bool) {
	n, ok := t.numbers.Get(id.key)
	if !ok {
		return result{}, false
	}
	r, _ := t.records.Get(n)
	if now-r.time > t.rules.retryAgeMillis {
		return result{}, false
	}
	if r.id.digest != id.digest {
		return result{status: statusRetryOther}, true
	}
	first := r.first
	first.replayed = true
	return first, true
}

// add records the outcome of a request, and makes room.
func (t *retryTable) add(id retryID, first result, now int64) {
	if old, ok := t.numbers.Get(id.key); ok { // too old to count
		t.remove(old)
	}
	t.insert(t.next, retryRecord{id: id, time: now, first: first})
	t.next++
	for {
		n, oldest, ok := t.records.Min()
		if !ok || t.records.Len() <= t.rules.retriesMax && t.bytes <= t.rules.retryBytesMax && now-oldest.time <= t.rules.retryAgeMillis {
			return
		}
		t.remove(n)
	}
}

func (t *retryTable) insert(n uint64, r retryRecord) {
	t.records.Set(n, r)
	t.numbers.Set(r.id.key, n)
	t.bytes += r.size()
	t.digest += r.digest(n)
}

func (t *retryTable) remove(n uint64) {
	if r, ok := t.records.Delete(n); ok {
		t.numbers.Delete(r.id.key)
		t.bytes -= r.size()
		t.digest -= r.digest(n)
	}
}
