package store

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"
)

// This file is the feature level: which commands, formats and rules a cluster
// uses. Members apply the same entries in the same way only if all of them know
// what the entries mean, so a cluster uses what its oldest member knows.
//
// Level 1 is what there was before levels. A cluster begins there, and nothing
// that its members of level 1 do not know is proposed, written or sent. Each
// member tells the others which level it knows. When all have said so, the leader
// proposes an entry that raises the level of the cluster, and applying it is the
// moment from which everybody uses what is new. There is no way back.
//
// The answers of the members are asked for again before each attempt: what they
// announced once would say nothing of a member that was set back since. Nor would
// a note in the replicated state, which members of level 1 drop.

const (
	LevelFirst  = 1
	LevelNewest = 3 // that this program knows
)

// What is written from level 2 on: snapshots of format 3, sums of algorithm 2,
// the fields of members that this program does not know, the time by the rule
// of state.pass, events of deletions without large values, keys that are gone
// from their deadline on for whoever writes, deadlines that count from when the
// write is applied, and versions after a restore that follow the time.
//
// What is written from level 3 on: snapshots of format 4, which types values have,
// and outcomes of requests without what was read, of which each client has a share.

// Rules are the constants that are part of what an entry means: with another
// number a member would come to another state. So none is ever changed. A new
// level may have others.
type Rules struct {
	// deletePrefixMax bounds how many keys one command deletes. It keeps the time
	// that applying takes well below an election timeout, and the events within
	// half of the default window, so that watchers can resume before them.
	DeletePrefixMax      int
	deletePrefixBytesMax uint64 // of the keys and events, without values
	// The events of one entry must stay within half of the default window. So they
	// keep only small values of what was deleted, and only so many bytes of them.
	deletedValueMax uint64
	deletedBytesMax uint64
	TxnResultMax    int // bytes of the values that one transaction returns

	// Bounds of the table that makes a batch apply once. A session is one process
	// lifetime of a proposing node and has at most maxInFlight batches on the way, so
	// this and sessionWindow leave a wide margin.
	sessionsMax int // most recently used sessions that are remembered

	// Bounds of the outcomes of requests with an Idempotency-Key.
	retriesMax     int
	retryBytesMax  uint64
	retryAgeMillis int64
	// retrySizeMin is what a record counts at least. With it retryBytesMax bounds the
	// number, too, so that one measure says who has how much.
	retrySizeMin uint64
	// ageStepMillis is how much age one entry adds at most, however far its time is
	// ahead of the times before it, and how far the time may go back before it is
	// followed. More than leaders let times differ, see clockSkewMax.
	ageStepMillis int64

	// versionsPerMilli is how fast the versions of restored clusters begin to grow with
	// time, see state.leap.
	versionsPerMilli uint64
	// leapMin is the part of versionJump that comes with the first batch only, and only
	// if time alone does not take the versions further.
	leapMin uint64

	// Events are kept and dropped in chunks. A chunk is full at this many events or
	// bytes, whichever comes first.
	chunkEventsMax int
	chunkBytesMax  uint64
}

const (
	DeletePrefixMax      = 32_768
	deletePrefixBytesMax = 16 << 20
	DeletedValueMax      = 1 << 10
	deletedBytesMax      = 8 << 20
	unlimited            = math.MaxUint64
	TxnResultMax         = 4 << 20
	sessionsMax          = 128
	sessionWindow        = 1024 // newest sequence numbers of a session that are remembered, at all levels
	retriesMax           = 65_536
	retryBytesMax        = 64 << 20
	RetryAgeMillis       = 60 * 60 * 1000
	retrySizeMin         = 1 << 10
	AgeStepMillis        = 60 * 1000
	versionsPerMilli     = 100
	ChunkEventsMax       = 512
	chunkBytesMax        = 1 << 20
)

// rulesOf has the rules of each level.
var rulesOf = [LevelNewest + 1]Rules{
	1: {DeletePrefixMax, unlimited, unlimited, unlimited, TxnResultMax, sessionsMax, retriesMax, retryBytesMax, RetryAgeMillis, 0, 0, 0, 0, ChunkEventsMax, chunkBytesMax},
	2: {DeletePrefixMax, deletePrefixBytesMax, DeletedValueMax, deletedBytesMax, TxnResultMax, sessionsMax, retriesMax, retryBytesMax, RetryAgeMillis, 0, AgeStepMillis, versionsPerMilli, 0, ChunkEventsMax, chunkBytesMax},
	3: {DeletePrefixMax, deletePrefixBytesMax, DeletedValueMax, deletedBytesMax, TxnResultMax, sessionsMax, retriesMax, retryBytesMax, RetryAgeMillis, retrySizeMin, AgeStepMillis, versionsPerMilli, VersionJump - 1, ChunkEventsMax, chunkBytesMax},
}

// rules are those of the state's level.
func (s *State) rules() *Rules { return &rulesOf[s.Level] }

// Rules are those of the cluster's level.
func (s *Store) Rules() *Rules { return &rulesOf[s.Level()] }

// Level returns the feature level of the cluster, as far as this member has
// applied its log.
func (s *Store) Level() int {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.Level
}

// Knows returns the highest level that this node takes part in.
func (s *Store) Knows() int { return cmp.Or(s.LevelMax, LevelNewest) }

// CheckLevel says why this node cannot go on with a state of a level.
func (s *Store) CheckLevel(level int) error {
	if level <= s.Knows() {
		return nil
	}
	return fmt.Errorf("the cluster is at feature level %d, and this node knows up to %d: start it with the version that the other nodes run, "+
		"without --feature-level-max; there is no way back to a lower level", level, s.Knows())
}

// SetLevel makes the rules of a level those of the state.
func (s *State) SetLevel(level int) {
	s.Level = level
	s.Events.rules, s.Retries.rules = s.rules(), s.rules()
}

// Raising is what an opLevel command asks for. It lists the members that know
// the level: if there is another one by then, nothing happens.
type Raising struct {
	Level   int
	Members []uint64
}

func (r Raising) Encode() string {
	buf := binary.AppendUvarint(nil, uint64(r.Level))
	buf = binary.AppendUvarint(buf, uint64(len(r.Members)))
	for _, id := range r.Members {
		buf = binary.AppendUvarint(buf, id)
	}
	return string(buf)
}

func DecodeRaising(value []byte) (r Raising, err error) {
	d := Fields{Data: value}
	level := d.uint()
	for n := d.uint(); n > 0 && d.Err == nil; n-- {
		r.Members = append(r.Members, d.uint())
	}
	switch {
	case d.Err != nil:
		return Raising{}, d.Err
	case level > LevelNewest || len(d.Data) > 0:
		return Raising{}, Newer("feature level", level)
	}
	r.Level = int(level)
	return r, nil
}

// raise carries out an opLevel command.
func (s *State) raise(r Raising) Result {
	for id := range s.Members {
		if !slices.Contains(r.Members, id) {
			return Result{Status: StatusPrecondition}
		}
	}
	for s.Level < r.Level {
		s.SetLevel(s.Level + 1)
		switch s.Level {
		case 2:
			s.elapsed, s.seen = s.Now, s.Now
		case 3:
			s.Retries = s.Retries.withoutReads()
		}
	}
	return Result{Status: StatusReplaced}
}

// ClockSkewMax is how far the time of a batch may be from the leader's clock.
// A leader puts its own time into one that is further off: so no clock but that of
// a leader counts, and a node whose clock is wrong can write.
const ClockSkewMax = 10 * time.Second

// pass lets the time of an entry pass.
//
// At level 1 the state's time is the highest of any entry, so one wrong clock
// counts for ever. From level 2 on it is that of the last entry. What ages does so
// by another clock, elapsed, which no entry can move by more than a step: a clock
// that is wrong by decades costs a minute, once for each time that it becomes the
// leader's. It stands still rather than going too fast.
func (s *State) pass(now int64) {
	if s.Level < 2 {
		s.Now = max(s.Now, now)
		return
	}
	s.Now = now
	step := uint64(s.rules().ageStepMillis)
	switch {
	case now > s.seen:
		s.elapsed += int64(min(uint64(now)-uint64(s.seen), step))
		s.seen = now
	case uint64(s.seen)-uint64(now) > step:
		s.seen = now
	}
}

// Clock is the time by which the outcomes of requests age.
func (s *State) Clock() int64 {
	if s.Level < 2 {
		return s.Now
	}
	return s.elapsed
}

// RaiseLevel is a command that raises the level, if only these are members.
func RaiseLevel(level int, members ...uint64) Command {
	return Command{Op: OpLevel, Value: Raising{Level: level, Members: members}.Encode()}
}

// SetTTL makes a put expire so long after it is applied. As long as not all members
// know how to, that is so long after now.
func (c *Command) SetTTL(ttl time.Duration, level int) {
	switch {
	case ttl == 0:
	case level < 2:
		c.Expires = time.Now().Add(ttl).UnixMilli()
	default:
		c.TTL = ttl.Milliseconds()
	}
}
