package store

import (
	"encoding/binary"

	"github.com/tidwall/btree"
)

// This file remembers the outcome of requests that carried an Idempotency-Key,
// so that a client that did not hear the answer may simply ask again, at any
// node. It is part of the replicated state, and bounded.

// Its bounds are rules of the feature level, see level.go. Age is measured by the
// state's own clock, which follows the times in the entries, so that every member
// forgets the same requests. These times are some leader's; what a wrong one can
// do is bounded, see state.pass.
//
// Whoever fills the table must not make it forget the requests of others, which
// would then be carried out twice. So each record says who its client is, and when
// there is no room the client that has most of it loses its oldest. As long as a
// client has less than any of those who have most, it loses nothing within the
// hour: with one that floods the table its share is half of it, with two a
// third. Nobody has to be refused, and who is alone has the whole table.
//
// Without authentication a client is the address from which the proposing node
// was asked: its hash is in the command, so all members know the same. Below
// level 3 all are the same client, 0.

// RetryRecord is the outcome of one request.
type RetryRecord struct {
	ID    RetryID
	Time  int64 // by state.clock
	First Result
}

func (r *RetryRecord) size(rules *Rules) uint64 {
	n := uint64(256 + len(r.ID.Key) + len(r.First.Key))
	for _, op := range r.First.Ops {
		n += uint64(64 + len(op.Item.Value))
	}
	return max(n, rules.retrySizeMin)
}

// retryTable holds records in the order in which they came.
type retryTable struct {
	Records *btree.Map[uint64, RetryRecord] // by number
	Numbers *btree.Map[string, uint64]      // by Idempotency-Key
	next    uint64                          // number of the next record
	Bytes   uint64
	Digest  uint64 // of the records
	rules   *Rules

	// Made from the records:
	shares    *btree.Map[uint64, uint64] // bytes by client
	heaviest  *btree.Set[string]         // sortKey of the bytes of each client, and the client
	ofClients *btree.Set[string]         // sortKey of the client of each record, and its number
}

func NewRetryTable() retryTable {
	return retryTable{
		rules: &rulesOf[LevelFirst], Records: new(btree.Map[uint64, RetryRecord]), Numbers: new(btree.Map[string, uint64]),
		shares: new(btree.Map[uint64, uint64]), heaviest: new(btree.Set[string]), ofClients: new(btree.Set[string]),
	}
}

func (t *retryTable) copy() retryTable {
	c := *t
	c.Records, c.Numbers = t.Records.Copy(), t.Numbers.Copy()
	c.shares, c.heaviest, c.ofClients = t.shares.Copy(), t.heaviest.Copy(), t.ofClients.Copy()
	return c
}

// Lookup returns the answer for a request whose key was used before. A record
// that is too old counts as gone, whether or not another made it leave.
func (t *retryTable) Lookup(id RetryID, now int64) (Result, bool) {
	n, ok := t.Numbers.Get(id.Key)
	if !ok {
		return Result{}, false
	}
	r, _ := t.Records.Get(n)
	if now-r.Time > t.rules.retryAgeMillis {
		return Result{}, false
	}
	if r.ID.Digest != id.Digest {
		return Result{Status: StatusRetryOther}, true
	}
	first := r.First
	first.Replayed = true
	return first, true
}

// add records the outcome of a request, and makes room.
func (t *retryTable) add(id RetryID, first Result, now int64) {
	t.insert(t.next, RetryRecord{ID: id, Time: now, First: first})
	t.next++
	for {
		n, oldest, ok := t.Records.Min()
		if !ok || now-oldest.Time <= t.rules.retryAgeMillis {
			break
		}
		t.remove(n)
	}
	for t.Records.Len() > t.rules.retriesMax || t.Bytes > t.rules.retryBytesMax {
		t.remove(t.oldestOfHeaviest())
	}
}

// oldestOfHeaviest returns the number of the record that goes first. The table is
// not empty.
func (t *retryTable) oldestOfHeaviest() (n uint64) {
	most, _ := t.heaviest.Max()
	client := secondOf(most)
	t.ofClients.Ascend(sortKey(client, 0), func(k string) bool {
		n = secondOf(k)
		return false
	})
	return n
}

// insert puts a record, in the place of one that is too old to count.
func (t *retryTable) insert(n uint64, r RetryRecord) {
	t.remove(n) // nothing, unless it comes from a snapshot that is not ours
	if old, ok := t.Numbers.Get(r.ID.Key); ok {
		t.remove(old)
	}
	t.Records.Set(n, r)
	t.Numbers.Set(r.ID.Key, n)
	t.ofClients.Insert(sortKey(r.ID.Client, n))
	t.weigh(r.ID.Client, r.size(t.rules))
	t.Digest += r.digest(n)
}

func (t *retryTable) remove(n uint64) {
	if r, ok := t.Records.Delete(n); ok {
		t.Numbers.Delete(r.ID.Key)
		t.ofClients.Delete(sortKey(r.ID.Client, n))
		t.weigh(r.ID.Client, -r.size(t.rules))
		t.Digest -= r.digest(n)
	}
}

// weigh adds to the bytes of a client, or takes some off.
func (t *retryTable) weigh(client, bytes uint64) {
	t.Bytes += bytes
	share, _ := t.shares.Get(client)
	t.heaviest.Delete(sortKey(share, client))
	if share += bytes; share == 0 {
		t.shares.Delete(client)
		return
	}
	t.shares.Set(client, share)
	t.heaviest.Insert(sortKey(share, client))
}

// withoutReads returns the table as it goes on at level 3, with other sizes, and
// without the values that transactions have read.
func (t *retryTable) withoutReads() retryTable {
	c := NewRetryTable()
	c.next, c.rules = t.next, t.rules
	t.Records.Scan(func(n uint64, r RetryRecord) bool {
		for _, op := range r.First.Ops {
			if op.Status == StatusFound {
				r.First.Ops = nil
				break
			}
		}
		c.insert(n, r)
		return true
	})
	return c
}

// sortKey is two numbers as a string that sorts like them.
func sortKey(a, b uint64) string {
	return string(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, a), b))
}

// secondOf returns the second of them.
func secondOf(k string) uint64 { return binary.BigEndian.Uint64([]byte(k[8:])) }
