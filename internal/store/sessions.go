package store

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

type Sessions map[uint64]*session

// first does that in the table, which has room. A number below the window counts
// as seen: its proposer gave it up long ago.
func (t Sessions) first(h BatchHeader, index uint64) bool {
	s := t[h.Session]
	if s == nil {
		s = &session{}
		t[h.Session] = s
	}
	s.used = index
	if h.Seq > s.max {
		if h.Seq-s.max >= sessionWindow {
			clear(s.seen[:])
		} else {
			for q := s.max + 1; q < h.Seq; q++ {
				s.set(q, false)
			}
		}
		s.max = h.Seq
		s.set(h.Seq, true)
		return true
	}
	if s.max-h.Seq >= sessionWindow || s.has(h.Seq) {
		return false
	}
	s.set(h.Seq, true)
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
func (t Sessions) oldest() (oldest uint64) {
	for id, s := range t {
		if t[oldest] == nil || s.used < t[oldest].used {
			oldest = id
		}
	}
	return oldest
}

func (t Sessions) copy() Sessions {
	c := make(Sessions, len(t))
	for id, s := range t {
		d := *s
		c[id] = &d
	}
	return c
}
