package main

import "fmt"

// This file makes the first state of a new cluster out of what another one left.

// Where the log of a new cluster starts.
const (
	firstIndex = 1
	firstTerm  = 1
)

// versionJump is how far the resource versions of a new cluster are above those
// that it was made from. The old cluster went on after the backup was taken, or
// its lost members had more than the survivor, and clients have seen versions
// that are not known here. None of these must be given out again: an ETag or a
// resourceVersion must not mean two things. It is far more than a cluster can
// have written meanwhile: at 10,000 writes a second a day and more. And one can restore
// nine million times before versions leave what a double holds exactly, which
// is what JSON's numbers are to many programs. What was made from the same before
// is above that as well; see leap, with which most of it comes from level 3 on.
const versionJump = 1_000_000_000

// begin makes the state the first one of a new cluster with these members.
//
// The feature level stays: what the backup holds may need it. Sessions go: no proposal of the old cluster can arrive. The window of events
// is empty, so a watch that wants to resume from a version of the old cluster is
// told that it expired, and lists again. Outcomes of requests with an
// Idempotency-Key stay: what they stand for is in the state.
func (s *state) begin(members []member, removed []uint64) {
	s.index, s.term = firstIndex, firstTerm
	s.rv += versionJump - s.rules().leapMin
	s.sessions, s.sessionsDigest = sessions{}, 0
	s.events = newEventLog()
	s.setLevel(s.level)
	s.membersStale = true
	s.events.dropped = s.rv
	s.members, s.removed = map[uint64]member{}, map[uint64]bool{}
	for _, m := range members {
		s.members[m.ID] = m
	}
	for _, id := range removed {
		s.removed[id] = true
	}
}

// leapEpoch is where the time begins that the versions of restored clusters follow.
const leapEpoch = 1_577_836_800_000 // 2020-01-01, in unix milliseconds

// leap makes the first batch of a restored cluster go above all versions of every
// cluster that was made before from the same file or directory, about which nothing
// is known here. That one was above what the time was then, too, and has written
// less than a hundred times a millisecond since. What is read before the first
// batch is in the file, and the same in all of these clusters.
//
// At level 2 versionJump comes before, so that time had no say for three hours after
// a restore: two clusters from a backup of that time have the same versions.
func (s *state) leap(now int64) {
	if len(s.sessions) > 0 || s.rv == 0 { // it was written to, or nothing was restored
		return
	}
	to := uint64(max(0, now-leapEpoch)) * s.rules().versionsPerMilli
	if s.rv >= to { // the clock is wrong, or a person knew better
		to = s.rv + s.rules().leapMin
	}
	s.rv, s.events.dropped = to, max(s.events.dropped, to)
}

// versionsAboveMax is as far as a person may send the versions: it leaves room
// below what a double holds exactly.
const versionsAboveMax = 1 << 52

// goAbove makes the versions of a state that has just begun go on above another one.
func (s *state) goAbove(rv uint64) error {
	if rv > versionsAboveMax {
		return fmt.Errorf("--versions-above %d: at most %d", rv, uint64(versionsAboveMax))
	}
	s.rv = max(s.rv, rv)
	s.events.dropped = s.rv
	return nil
}
