package store

import "fmt"

// This file makes the first state of a new cluster out of what another one left.

// Where the log of a new cluster starts.
const (
	FirstIndex = 1
	FirstTerm  = 1
)

// VersionJump is how far the resource versions of a new cluster are above those
// that it was made from. The old cluster went on after the backup was taken, or
// its lost members had more than the survivor, and clients have seen versions
// that are not known here. None of these must be given out again: an ETag or a
// resourceVersion must not mean two things. It is more than a cluster writes in a
// day at 10,000 writes a second. And one can restore nine million times before a
// version no longer fits into a double, which is how many programs read the numbers
// of JSON. A cluster that was made from the same backup before has such versions,
// too; from level 3 on leap keeps the two apart.
const VersionJump = 1_000_000_000

// Begin makes the state the first one of a new cluster with these members.
//
// The feature level stays: what the backup holds may need it. Sessions go: no
// proposal of the old cluster can arrive. The window of events is empty, so a watch
// that wants to resume from a version of the old cluster is told that it expired, and
// lists again. Outcomes of requests with an Idempotency-Key stay: what they stand for
// is in the state.
func (s *State) Begin(members []Member, removed []uint64) {
	s.Index, s.Term = FirstIndex, FirstTerm
	s.RV += VersionJump - s.rules().leapMin
	s.Sessions, s.SessionsDigest = Sessions{}, 0
	s.Events = newEventLog()
	s.SetLevel(s.Level)
	s.membersStale = true
	s.Events.Dropped = s.RV
	s.Members, s.Removed = map[uint64]Member{}, map[uint64]bool{}
	for _, m := range members {
		s.Members[m.ID] = m
	}
	for _, id := range removed {
		s.Removed[id] = true
	}
}

// LeapEpoch is where the time begins that the versions of restored clusters follow.
const LeapEpoch = 1_577_836_800_000 // 2020-01-01, in unix milliseconds

// leap makes the first batch of a restored cluster go above all versions of every
// cluster that was made before from the same file or directory, about which nothing
// is known here. That one was above what the time was then, too, and has written
// less than a hundred times a millisecond since. What is read before the first
// batch is in the file, and the same in all of these clusters.
//
// At level 2 versionJump comes before, so that time had no say for three hours after
// a restore: two clusters from a backup of that time have the same versions.
func (s *State) leap(now int64) {
	if len(s.Sessions) > 0 || s.RV == 0 { // it was written to, or nothing was restored
		return
	}
	to := uint64(max(0, now-LeapEpoch)) * s.rules().versionsPerMilli
	if s.RV >= to { // the clock is wrong, or a person knew better
		to = s.RV + s.rules().leapMin
	}
	s.RV, s.Events.Dropped = to, max(s.Events.Dropped, to)
}

// VersionsAboveMax is as far as a person may send the versions: it leaves room
// below what a double holds exactly.
const VersionsAboveMax = 1 << 52

// GoAbove makes the versions of a state that has just begun go on above another one.
func (s *State) GoAbove(rv uint64) error {
	if rv > VersionsAboveMax {
		return fmt.Errorf("--versions-above %d: at most %d", rv, uint64(VersionsAboveMax))
	}
	s.RV = max(s.RV, rv)
	s.Events.Dropped = s.RV
	return nil
}
