package store

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
// Members tell each other their sums, and each judges for itself.

// Algorithms of sums. Only sums of the same one can be compared.
const (
	sumAlgorithm1 = 0 // of level 1; as members that know no other tell it
	sumAlgorithm2 = 2
)

func (s *State) sumAlgorithm() int {
	if s.Level < 2 {
		return sumAlgorithm1
	}
	return sumAlgorithm2
}

// fold makes the entry that was just applied part of the sum.
func (s *State) fold(content uint64) {
	if s.sumAlgorithm() == sumAlgorithm1 {
		s.foldOld(content)
		return
	}
	if s.membersStale {
		s.membersDigest, s.membersStale = s.digestMembers(), false
	}
	var b [22 * 8]byte
	for i, v := range [...]uint64{
		sumAlgorithm2, uint64(s.Level), s.Sum, s.Index, s.Term, content,
		s.RV, s.digest, uint64(s.Items.Len()), s.size, uint64(s.Expiry.Len()),
		uint64(s.Now), uint64(s.elapsed), uint64(s.seen),
		s.SessionsDigest, uint64(len(s.Sessions)),
		s.Retries.Digest, uint64(s.Retries.Records.Len()), s.Retries.Bytes, s.Retries.next,
		s.membersDigest, s.Events.End(),
	} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	s.Sum = xxhash.Sum64(b[:])
}

func (s *State) foldOld(content uint64) {
	var b [9 * 8]byte
	for i, v := range [...]uint64{
		s.Sum, s.Index, s.Term, content,
		s.RV, s.digest, uint64(s.Items.Len()), uint64(len(s.Members)), uint64(len(s.Removed)),
	} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	s.Sum = xxhash.Sum64(b[:])
}

// digest returns what a batch counts as in the sum: 0 if it is skipped.
func (h BatchHeader) digest(commands []byte, fresh bool) uint64 {
	if !fresh {
		return 0
	}
	var b [4 * 8]byte
	for i, v := range [...]uint64{h.Session, h.Seq, uint64(h.Time), xxhash.Sum64(commands)} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return xxhash.Sum64(b[:])
}

// digestMembers returns the digest of who is a member, and who was.
func (s *State) digestMembers() uint64 {
	var d xxhash.Digest
	d.Reset()
	for _, m := range s.SortedMembers() {
		b, err := json.Marshal(m)
		if err != nil {
			b = nil // never
		}
		_, _ = d.Write(append(b, '\n')) // never fails
	}
	for _, id := range slices.Sorted(maps.Keys(s.Removed)) {
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
func (r *RetryRecord) digest(n uint64) uint64 {
	ops := uint64(len(r.First.Ops))
	for i := range r.First.Ops {
		op := &r.First.Ops[i]
		ops = ops*31 + op.Item.digest("") + uint64(op.Status)
	}
	var b [11 * 8]byte
	for i, v := range [...]uint64{
		n, xxhash.Sum64String(r.ID.Key), binary.LittleEndian.Uint64(r.ID.Digest[:8]), binary.LittleEndian.Uint64(r.ID.Digest[8:]),
		uint64(r.Time), uint64(r.First.Status), r.First.RV, r.First.Current, r.First.Count, xxhash.Sum64String(r.First.Key), ops,
	} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return xxhash.Sum64(b[:]) ^ r.ID.Client // which is a hash itself, and 0 below level 3
}

// withWord makes a word part of a digest, which stays as it was without one.
func withWord(digest uint64, word string) uint64 {
	if word == "" {
		return digest
	}
	return xxhash.Sum64String(string(binary.LittleEndian.AppendUint64(nil, digest)) + word)
}

// digest returns what an item adds to the digest of all items. A write subtracts
// the item that it replaces as memory has it then. If that was damaged, it is not
// what was added, and the difference stays in the digest.
func (it *Item) digest(key string) uint64 {
	var b [5 * 8]byte
	for i, v := range [...]uint64{xxhash.Sum64String(key), xxhash.Sum64String(it.Value), it.RV, it.Created, uint64(it.Expires)} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return withWord(xxhash.Sum64(b[:]), it.ContentType)
}

// Checkpoint is the sum of a state.
type Checkpoint struct {
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
	earlier [checkpointsKept]Checkpoint
	recent  [recentKept]Checkpoint
}

func (s *State) checkpoint() Checkpoint {
	return Checkpoint{Index: s.Index, Sum: s.Sum, Algorithm: s.sumAlgorithm()}
}

func (c *checkpoints) note(s *State) {
	if s.Index%checkpointEvery == 0 {
		c.earlier[s.Index/checkpointEvery%checkpointsKept] = s.checkpoint()
	}
	c.recent[s.Index%recentKept] = s.checkpoint()
}

// Sums are what a member tells the others: the sum of its state, and earlier ones.
type Sums struct {
	Now     Checkpoint   `json:"now"`
	Earlier []Checkpoint `json:"earlier,omitempty"`

	recent *[recentKept]Checkpoint // of a member's own sums
}

// at returns the sum of an algorithm at an index.
func (s *Sums) at(index uint64, algorithm int) (sum uint64, ok bool) {
	is := func(c Checkpoint) bool { return c.Index == index && c.Algorithm == algorithm }
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

// Sums returns what there is to compare.
func (s *Store) Sums() Sums {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	r := Sums{Now: s.State.checkpoint()}
	for _, c := range s.checkpoints.earlier {
		if c.Index != 0 {
			r.Earlier = append(r.Earlier, c)
		}
	}
	return r
}

// OwnSums returns what a member compares with what others tell.
func (s *Store) OwnSums() Sums {
	r := s.Sums()
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	recent := s.checkpoints.recent
	r.recent = &recent
	return r
}

// Voters returns the members that have a vote.
func (s *Store) Voters() (ids []uint64) {
	for _, m := range s.Members() {
		if !m.Learner {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// compare says whether two members have the same sum at the highest index of
// which both know one of the same algorithm. Sums are chained: there is no need to
// look at the others.
func (s *Sums) compare(other *Sums) (known, same bool) {
	highest := uint64(0)
	for _, c := range append([]Checkpoint{other.Now}, other.Earlier...) {
		if c.Index == 0 || c.Index < highest {
			continue
		}
		if sum, ok := s.at(c.Index, c.Algorithm); ok {
			highest, known, same = c.Index, true, sum == c.Sum
		}
	}
	return known, same
}

// Verdict is what a member thinks of its own state.
type Verdict int32

const (
	Sound Verdict = iota
	// Doubtful: some member has another state and no majority says who is right.
	Doubtful
	// Diverged: a majority has the same state, and it is another one.
	Diverged
	// Unchecked: nothing is known yet.
	Unchecked
)

func (v Verdict) String() string { return [...]string{"sound", "doubtful", "diverged", "unchecked"}[v] }

// Judge compares a member's sums with those of the voters that answered, which
// may be none. It is sound only if a majority of the voters has its state, and
// unchecked if nobody has another one either. differ are the voters that have
// another one. A learner has no voice, but an opinion.
func Judge(own Sums, self uint64, others map[uint64]Sums, voters []uint64) (v Verdict, differ []uint64) {
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
		return Sound, differ
	case len(differ) == 0:
		return Unchecked, nil
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
			return Diverged, differ
		}
	}
	return Doubtful, differ
}
