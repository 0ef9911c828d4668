package main

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"slices"

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
// From feature level 2 on it is made by another algorithm, which also sees what
// is not in the items: sessions, outcomes of requests, what expires, time,
// members, and the number of events. Digests of these are kept up to date as they
// change, and made anew when a state is read, so no entry walks over a state.
// The window of events itself is not part of it: each node has its own bounds.
//
// Members tell each other their sums, see guard.go, and each judges for itself.

// Algorithms of sums. Only sums of the same one can be compared.
const (
	sumAlgorithm1 = 0 // of level 1; as members that know no other tell it
	sumAlgorithm2 = 2
)

func (s *state) sumAlgorithm() int {
	if s.level < 2 {
		return sumAlgorithm1
	}
	return sumAlgorithm2
}

// fold makes the entry that was just applied part of the sum.
func (s *state) fold(content uint64) {
	if s.sumAlgorithm() == sumAlgorithm1 {
		s.foldOld(content)
		return
	}
	if s.membersStale {
		s.membersDigest, s.membersStale = s.digestMembers(), false
	}
	var b [22 * 8]byte
	for i, v := range [...]uint64{
		sumAlgorithm2, uint64(s.level), s.sum, s.index, s.term, content,
		s.rv, s.digest, uint64(s.items.Len()), s.size, uint64(s.expiry.Len()),
		uint64(s.now), uint64(s.elapsed), uint64(s.seen),
		s.sessionsDigest, uint64(len(s.sessions)),
		s.retries.digest, uint64(s.retries.records.Len()), s.retries.bytes, s.retries.next,
		s.membersDigest, s.events.end(),
	} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	s.sum = xxhash.Sum64(b[:])
}

func (s *state) foldOld(content uint64) {
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

// digestMembers returns the digest of who is a member, and who was.
func (s *state) digestMembers() uint64 {
	var d xxhash.Digest
	d.Reset()
	for _, m := range s.sortedMembers() {
		b, err := json.Marshal(m)
		if err != nil {
			b = nil // never
		}
		_, _ = d.Write(append(b, '\n')) // never fails
	}
	for _, id := range slices.Sorted(maps.Keys(s.removed)) {
		_, _ = d.Write(binary.LittleEndian.AppendUint64(nil, id))
	}
	return d.Sum64()
}

// digest returns what a session adds to the digest of all sessions.
func (s *session) digest(id uint64) uint64 {
	if s == nil {
		return 0
	}
	var b [(3 + len(s.seen)) * 8]byte
	binary.LittleEndian.PutUint64(b[0:], id)
	binary.LittleEndian.PutUint64(b[8:], s.used)
	binary.LittleEndian.PutUint64(b[16:], s.max)
	for i, word := range s.seen {
		binary.LittleEndian.PutUint64(b[24+8*i:], word)
	}
	return xxhash.Sum64(b[:])
}

// digest returns what the outcome of a request adds to the digest of all.
func (r *retryRecord) digest(n uint64) uint64 {
	ops := uint64(len(r.first.ops))
	for i := range r.first.ops {
		op := &r.first.ops[i]
		ops = ops*31 + op.item.digest("") + uint64(op.status)
	}
	var b [11 * 8]byte
	for i, v := range [...]uint64{
		n, xxhash.Sum64String(r.id.key), binary.LittleEndian.Uint64(r.id.digest[:8]), binary.LittleEndian.Uint64(r.id.digest[8:]),
		uint64(r.time), uint64(r.first.status), r.first.rv, r.first.current, r.first.count, xxhash.Sum64String(r.first.key), ops,
	} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return xxhash.Sum64(b[:]) ^ r.id.client // which is a hash itself, and 0 below level 3
}

// withWord makes a word part of a digest, which stays as it was without one.
func withWord(digest uint64, word string) uint64 {
	if word == "" {
		return digest
	}
	return xxhash.Sum64String(string(binary.LittleEndian.AppendUint64(nil, digest)) + word)
}

// digest returns what an item adds to the digest of all items. What a write
// replaces is subtracted as it is by then, so damage in between stays in the
// digest.
func (it *item) digest(key string) uint64 {
	var b [5 * 8]byte
	for i, v := range [...]uint64{xxhash.Sum64String(key), xxhash.Sum64String(it.value), it.rv, it.created, uint64(it.expires)} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return withWord(xxhash.Sum64(b[:]), it.contentType)
}

// checkpoint is the sum of a state.
type checkpoint struct {
	Index uint64 `json:"index"`
	Sum   uint64 `json:"sum,string"`

	Algorithm int `json:"algorithm,omitempty"`
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

func (s *state) checkpoint() checkpoint {
	return checkpoint{Index: s.index, Sum: s.sum, Algorithm: s.sumAlgorithm()}
}

func (c *checkpoints) note(s *state) {
	if s.index%checkpointEvery == 0 {
		c.earlier[s.index/checkpointEvery%checkpointsKept] = s.checkpoint()
	}
	c.recent[s.index%recentKept] = s.checkpoint()
}

// sums are what a member tells the others: the sum of its state, and earlier ones.
type sums struct {
	Now     checkpoint   `json:"now"`
	Earlier []checkpoint `json:"earlier,omitempty"`

	recent *[recentKept]checkpoint // of a member's own sums
}

// at returns the sum of an algorithm at an index.
func (s *sums) at(index uint64, algorithm int) (sum uint64, ok bool) {
	is := func(c checkpoint) bool { return c.Index == index && c.Algorithm == algorithm }
	if is(s.Now) {
		return s.Now.Sum, true
	}
	if s.recent != nil {
		if c := s.recent[index%recentKept]; is(c) {
			return c.Sum, true
		}
	}
	for _, c := range s.Earlier {
		if is(c) {
			return c.Sum, true
		}
	}
	return 0, false
}

// sums returns what there is to compare.
func (s *kvstore) sums() sums {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r := sums{Now: s.state.checkpoint()}
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

// compare says whether two members have the same sum at the highest index of
// which both know one of the same algorithm. Sums are chained: there is no need to
// look at the others.
func (s *sums) compare(other *sums) (known, same bool) {
	highest := uint64(0)
	for _, c := range append([]checkpoint{other.Now}, other.Earlier...) {
		if c.Index == 0 || c.Index < highest {
			continue
		}
		if sum, ok := s.at(c.Index, c.Algorithm); ok {
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
