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

// recentKept is of how many of its last entries a member keeps the sums for
// itself: what the others were at when they told is then among them.
const recentKept = 4096

// checkpoints are the last ones of a member, by index.
type checkpoints struct {
	earlier [checkpointsKept]checkpoint
	recent  [recentKept]checkpoint
}

func (c *checkpoints) note(s *state) {
	if s.index%checkpointEvery == 0 {
		c.earlier[s.index/checkpointEvery%checkpointsKept] = checkpoint{s.index, s.sum}
	}
	c.recent[s.index%recentKept] = checkpoint{s.index, s.sum}
}

// sums are what a member tells the others: the sum of its state, and earlier ones.
type sums struct {
	Now     checkpoint   `json:"now"`
	Earlier []checkpoint `json:"earlier,omitempty"`

	recent *[recentKept]checkpoint // of a member's own sums
}

// at returns the sum at an index.
func (s *sums) at(index uint64) (sum uint64, ok bool) {
	if index == s.Now.Index {
		return s.Now.Sum, true
	}
	if s.recent != nil {
		if c := s.recent[index%recentKept]; c.Index == index {
			return c.Sum, true
		}
	}
	for _, c := range s.Earlier {
		if c.Index == index {
			return c.Sum, true
		}
	}
	return 0, false
}

// sums returns what there is to compare.
func (s *kvstore) sums() sums {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := sums{Now: checkpoint{s.state.index, s.state.sum}}
	for _, c := range s.checkpoints.earlier {
		if c.Index != 0 {
			r.Earlier = append(r.Earlier, c)
		}
	}
	return r
}

// ownSums returns what a member compares with what others tell.
func (s *kvstore) ownSums() sums {
	r := s.sums()
	s.mu.RLock()
	defer s.mu.RUnlock()
	recent := s.checkpoints.recent
	r.recent = &recent
	return r
}

// voters returns the members that have a vote.
func (s *kvstore) voters() (ids []uint64) {
	for _, m := range s.members() {
		if !m.Learner {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// compare says whether two members have the same sum at the highest index that
// both know. Sums are chained: there is no need to look at the others.
func (s *sums) compare(other *sums) (known, same bool) {
	highest := uint64(0)
	for _, c := range append([]checkpoint{other.Now}, other.Earlier...) {
		if c.Index == 0 || c.Index < highest {
			continue
		}
		if sum, ok := s.at(c.Index); ok {
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
	// unchecked: nothing is known yet.
	unchecked
)

func (v verdict) String() string { return [...]string{"sound", "doubtful", "diverged", "unchecked"}[v] }

// judge compares a member's sums with those of the voters that answered, which
// may be none. It is sound only if a majority of the voters has its state, and
// unchecked if nobody has another one either. differ are the voters that have
// another one. A learner has no voice, but an opinion.
func judge(own sums, self uint64, others map[uint64]sums, voters []uint64) (v verdict, differ []uint64) {
	agree := 0
	for _, id := range voters {
		o, answered := others[id]
		known, same := id == self, id == self
		if id != self && answered {
			known, same = own.compare(&o)
		}
		switch {
		case known && same:
			agree++
		case known:
			differ = append(differ, id)
		}
	}
	switch {
	case agree > len(voters)/2:
		return sound, differ
	case len(differ) == 0:
		return unchecked, nil
	}
	for _, id := range differ {
		o, size := others[id], 1
		for _, other := range voters {
			p, answered := others[other]
			if other == id || other == self || !answered {
				continue
			}
			if known, same := o.compare(&p); known && same {
				size++
			}
		}
		if size > len(voters)/2 {
			return diverged, differ
		}
	}
	return doubtful, differ
}
