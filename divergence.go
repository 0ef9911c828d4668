package main

import (
	"encoding/binary"

	"github.com/cespare/xxhash/v2"
)

// This file notices that members which applied the same entries do not hold the
// same state: a fault in the program, in memory, or two versions of the program
// that do not agree what an entry means.
//
// Every state has a sum. Each entry makes the next sum from the last one, the
// entry's place and content, and what it came to: the resource version, the
// number of items and their digest. So two sums at one index are equal if all
// entries up to there were, and did the same. The sum is in snapshots.
//
// Members tell each other their sums, see guard.go, and each judges for itself.

// fold makes the entry that was just applied part of the sum.
func (s *state) fold(content uint64) {
	var b [9 * 8]byte
	for i, v := range [...]uint64{
		s.sum, s.index, s.term, content,
		s.rv, s.digest, uint64(s.items.Len()), uint64(len(s.members)), uint64(len(s.removed)),
	} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	s.sum = xxhash.Sum64(b[:])
}

// digest returns what a batch is to the sum. One that is skipped is something else.
func (h batchHeader) digest(commands []byte, fresh bool) uint64 {
	if !fresh {
		return 0
	}
	var b [4 * 8]byte
	for i, v := range [...]uint64{h.session, h.seq, uint64(h.time), xxhash.Sum64(commands)} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return xxhash.Sum64(b[:])
}

// digest returns what an item adds to the digest of all items. What a write
// replaces is subtracted as it is by then, so damage in between stays in the
// digest.
func (it *item) digest(key string) uint64 {
	var b [5 * 8]byte
	for i, v := range [...]uint64{xxhash.Sum64String(key), xxhash.Sum64String(it.value), it.rv, it.created, uint64(it.expires)} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return xxhash.Sum64(b[:])
}

// checkpoint is the sum of a state.
type checkpoint struct {
	Index uint64 `json:"index"`
	Sum   uint64 `json:"sum,string"`
}

// Which sums are kept: members that are a little behind each other still have
// some index in common.
const (
	checkpointEvery = 256 // entries
	checkpointsKept = 64
)

// checkpoints are the last ones of a member, by index.
type checkpoints [checkpointsKept]checkpoint

func (c *checkpoints) note(s *state) {
	if s.index%checkpointEvery == 0 {
		c[s.index/checkpointEvery%checkpointsKept] = checkpoint{s.index, s.sum}
	}
}

// sums are what a member tells the others: the sum of its state, and earlier ones.
type sums struct {
	Now     checkpoint   `json:"now"`
	Earlier []checkpoint `json:"earlier,omitempty"`
}

// sums returns what there is to compare.
func (s *kvstore) sums() sums {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := sums{Now: checkpoint{s.state.index, s.state.sum}}
	for _, c := range s.checkpoints {
		if c.Index != 0 {
			r.Earlier = append(r.Earlier, c)
		}
	}
	return r
}

// compare says whether two members have the same sum at the highest index that
// both know. Sums are chained: there is no need to look at the others.
func (s *sums) compare(other *sums) (known, same bool) {
	at := map[uint64]uint64{s.Now.Index: s.Now.Sum}
	for _, c := range s.Earlier {
		at[c.Index] = c.Sum
	}
	highest := uint64(0)
	for _, c := range append([]checkpoint{other.Now}, other.Earlier...) {
		if sum, ok := at[c.Index]; ok && c.Index >= highest && c.Index > 0 {
			highest, known, same = c.Index, true, sum == c.Sum
		}
	}
	return known, same
}

// verdict is what a member thinks of its own state.
type verdict int32

const (
	sound verdict = iota
	// doubtful: some member has another state and no majority says who is right.
	doubtful
	// diverged: a majority has the same state, and it is another one.
	diverged
)

func (v verdict) String() string { return [...]string{"sound", "doubtful", "diverged"}[v] }

// judge compares a member's sums with those of the others that answered.
// members is how many there are. With sound, differ are those who have another
// state than the majority, which this member is part of.
func judge(own sums, others map[uint64]sums, members int) (v verdict, differ []uint64) {
	agree := 1
	for id, o := range others {
		switch known, same := own.compare(&o); {
		case known && same:
			agree++
		case known:
			differ = append(differ, id)
		}
	}
	if len(differ) == 0 || agree > members/2 {
		return sound, differ
	}
	for _, id := range differ {
		o, size := others[id], 1
		for other, p := range others {
			if known, same := o.compare(&p); other != id && known && same {
				size++
			}
		}
		if size > members/2 {
			return diverged, differ
		}
	}
	return doubtful, differ
}
