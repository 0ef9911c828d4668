package main

import (
	"errors"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file is what must hold at every moment, and not only in the end: what a
// node promises is on its disk, what is committed is on the disks of a majority,
// what is read is not older than what was known, what was refused does not
// happen. A broken promise seldom has consequences at once; a run that waits for
// them sees one of many.

// logShadow is what a log holds, as far as it matters for promises.
type logShadow struct {
	term, vote uint64
	commit     uint64
	base       uint64 // index of the last entry that only a snapshot holds
	baseTerm   uint64
	terms      []uint64 // of the entries after it
}

func (l *logShadow) last() uint64 { return l.base + uint64(len(l.terms)) }

// termOf returns the term of an entry.
func (l *logShadow) termOf(index uint64) (term uint64, ok bool) {
	switch {
	case index == l.base:
		return l.baseTerm, true
	case index < l.base || index > l.last():
		return 0, false
	}
	return l.terms[index-l.base-1], true
}

// save appends to the log. Nothing that was handed out is overwritten: what is
// durable shares the terms.
func (l *logShadow) save(hs *raftpb.HardState, ents []*raftpb.Entry) {
	if !raft.IsEmptyHardState(hs) {
		l.term, l.vote, l.commit = hs.GetTerm(), hs.GetVote(), hs.GetCommit()
	}
	for _, e := range ents {
		if e.GetIndex() <= l.base {
			continue
		}
		if keep := e.GetIndex() - l.base - 1; keep < uint64(len(l.terms)) {
			l.terms = slices.Clone(l.terms[:keep])
		}
		l.terms = append(l.terms, e.GetTerm())
	}
}

// fits says whether a snapshot is of a state that the log led to.
func (l *logShadow) fits(m *raftpb.SnapshotMetadata) bool {
	term, ok := l.termOf(m.GetIndex())
	return ok && term == m.GetTerm()
}

// snapshot makes the log start from a snapshot. One that does not fit takes the
// place of the whole log.
func (l *logShadow) snapshot(m *raftpb.SnapshotMetadata) {
	switch {
	case l.fits(m):
		l.terms = slices.Clone(l.terms[m.GetIndex()-l.base:])
	case m.GetIndex() < l.base:
		return
	default:
		l.terms = nil
	}
	l.base, l.baseTerm = m.GetIndex(), m.GetTerm()
}

// shadowOf returns what a process has found on its disk.
func shadowOf(rec *recovered) (l logShadow, err error) {
	hs, _, err := rec.log.InitialState()
	snap, err1 := rec.log.Snapshot()
	first, err2 := rec.log.FirstIndex()
	last, err3 := rec.log.LastIndex()
	if err := errors.Join(err, err1, err2, err3); err != nil {
		return l, err
	}
	l.snapshot(snap.GetMetadata())
	if last >= first {
		ents, err := rec.log.Entries(first, last+1, noLimit)
		if err != nil {
			return l, err
		}
		l.save(hs, ents)
	}
	l.save(hs, nil)
	return l, nil
}

// replaced cuts off the entries in whose place a write, that did not end, has put
// others: log has the first of them.
func (l *logShadow) replaced(log *logShadow, by []*raftpb.Entry) {
	if len(by) == 0 {
		return
	}
	index := by[0].GetIndex()
	old, had := l.termOf(index)
	if term, ok := log.termOf(index); had && ok && term == by[0].GetTerm() && term != old && index > l.base {
		l.terms = l.terms[:index-l.base-1]
	}
}

// found compares what a process has found on its disk with what the ones before
// it have written there for good.
func (c *checker) found(n *simNode, l *logShadow) {
	had := n.durable
	had.replaced(l, n.saving)
	n.saving = nil
	if l.term < had.term || l.term == had.term && had.vote != 0 && l.vote != had.vote {
		c.violate("durable", "node %d starts in term %d with a vote for %d, it had %d and %d on disk", n.id, l.term, l.vote, had.term, had.vote)
	}
	if l.last() < had.last() {
		c.violate("durable", "node %d starts with entries up to %d, it had %d on disk", n.id, l.last(), had.last())
		return
	}
	for i := max(l.base, had.base); i <= had.last(); i++ {
		was, _ := had.termOf(i)
		if is, ok := l.termOf(i); ok && is != was && had.base <= i {
			c.violate("durable", "node %d starts with entry %d of term %d, it had one of term %d on disk", n.id, i, is, was)
			return
		}
	}
	if !slices.IsSorted(l.terms) || len(l.terms) > 0 && l.terms[0] < l.baseTerm {
		c.violate("log", "node %d starts with a log whose terms go down behind entry %d of term %d: %v", n.id, l.base, l.baseTerm, l.terms)
	}
}

// promised compares a message with what its sender has on disk.
func (c *checker) promised(p *process, m *raftpb.Message) {
	disk := &p.node.durable
	switch m.GetType() {
	case raftpb.MsgAppResp, raftpb.MsgVote, raftpb.MsgVoteResp, raftpb.MsgApp, raftpb.MsgHeartbeat, raftpb.MsgSnap:
	default:
		return
	}
	if disk.term < m.GetTerm() {
		c.violate("promise", "node %d sends %v of term %d, and has term %d on disk", p.node.id, m.GetType(), m.GetTerm(), disk.term)
	}
	if disk.term != m.GetTerm() || m.GetReject() {
		return
	}
	switch m.GetType() {
	case raftpb.MsgVote:
		// Votes for the log that it tells of must not count for a shorter one.
		if disk.vote != m.GetFrom() {
			c.violate("promise", "node %d asks for votes in term %d, its own on disk is for %d", p.node.id, m.GetTerm(), disk.vote)
		}
		// It may have a later log by now: who has won came before the request left.
		last, _ := disk.termOf(disk.last())
		if last < m.GetLogTerm() || last == m.GetLogTerm() && disk.last() < m.GetIndex() {
			c.violate("promise", "node %d says that its log ends with entry %d of term %d; on disk it is %d of term %d",
				p.node.id, m.GetIndex(), m.GetLogTerm(), disk.last(), last)
		}
	case raftpb.MsgVoteResp:
		if disk.vote != m.GetTo() {
			c.violate("promise", "node %d votes for %d in term %d, on disk it is for %d", p.node.id, m.GetTo(), m.GetTerm(), disk.vote)
		}
	case raftpb.MsgAppResp:
		term, err := p.replica.log.Term(m.GetIndex())
		if was, ok := disk.termOf(m.GetIndex()); m.GetIndex() > disk.last() || ok && err == nil && was != term {
			c.violate("promise", "node %d says that it has entry %d of term %d; on disk it has %d entries, and there one of term %d",
				p.node.id, m.GetIndex(), term, disk.last(), was)
		}
	}
}

// committed wants an entry that somebody applies to be on the disks of a
// majority: of the voters before or after the last change, since a leader may
// not have applied that yet.
func (c *checker) committed(p *process, e *raftpb.Entry) {
	m := c.model
	if len(m.voters) == 0 || c.onMajority(m.voters, e) || c.onMajority(m.votersBefore, e) {
		return
	}
	c.violate("quorum", "node %d applies entry %d of term %d, which no majority of %v has on disk", p.node.id, e.GetIndex(), e.GetTerm(), m.voters)
}

func (c *checker) onMajority(voters []uint64, e *raftpb.Entry) bool {
	have := 0
	for _, id := range voters {
		disk := &c.sim.node(id).durable
		if term, ok := disk.termOf(e.GetIndex()); ok && term == e.GetTerm() || e.GetIndex() < disk.base {
			have++
		}
	}
	return have > len(voters)/2
}

// readable looks at a round of reads whose time has come. What a leader answers
// itself it must know: it has committed in its term. It may have been removed since
// it was asked, and the voters that are left have confirmed that it leads.
func (c *checker) readable(p *process, q *readRound) {
	switch {
	case p.asked[q.attempt]: // the leader has told it
	case p.replica.role == raft.StateLeader:
		c.answersReads(p, "answers a read")
	default:
		c.violate("read", "node %d answers a read that nobody has confirmed", p.node.id)
	}
}

// answersReads looks at a leader that says up to where reads must see.
func (c *checker) answersReads(p *process, does string) {
	r := p.replica
	if term, err := r.log.Term(r.committed); err == nil && term != r.term {
		c.violate("read", "node %d %s as the leader of term %d, in which nothing is committed yet (%d of term %d; %v)", p.node.id, does, r.term, r.committed, term, r.confState)
	}
}

// handedBack looks at a batch that a process has done with. What it refuses must
// never be applied.
func (c *checker) handedBack(p *process, b *batch) {
	delete(p.waits, b)
	if b.err != nil && outcomeOf(b.err) == fault.NotApplied && b.change == nil {
		c.refuse(p.replica.session, b, wholeBatch)
	}
}

// wholeBatch is the place of all commands of a batch.
const wholeBatch = -1

// denial is of a command whose client was told that it did not happen.
type denial struct {
	batch *batch
	place int
}

func (c *checker) refuse(session uint64, b *batch, place int) {
	c.refusals[session] = append(c.refusals[session], denial{b, place})
	if done := c.model.batches[batchID{session, b.seq}]; done != nil && b.seq != 0 {
		c.notRefused(session, b.seq, done)
	}
}

// notRefused wants none of the commands of an applied batch to have been refused.
func (c *checker) notRefused(session, seq uint64, b *modelBatch) {
	for _, r := range c.refusals[session] {
		if r.batch.seq != seq {
			continue
		}
		for place, result := range b.results {
			if (r.place == wholeBatch || r.place == place) && result.Status != store.StatusNone && result.Status != store.StatusRefused {
				c.violate("refused", "command %d of batch %d of session %x was applied at entry %d, and its client was told that it was not",
					place, seq, session, b.index)
				return
			}
		}
	}
}

// answered looks at an answer as it leaves: a write was applied, and nothing is
// older than what was known anywhere when the request came.
func (c *checker) answered(call *simCall) {
	op, p := call.op, call.process
	floor := call.floor
	switch {
	case op.read == readWhatever:
		return
	case op.read == readAtLeast:
		floor = op.atLeast
	case !op.isRead() && call.batch == nil: // it is the answer to a retry, of which toldOfKey knows
	case !op.isRead():
		b := c.model.batches[batchID{p.replica.session, call.batch.seq}]
		if b == nil || call.batch.seq == 0 || call.place >= len(b.results) {
			c.violate("answer", "node %d answers a write that nobody has applied: %v", p.node.id, op)
			return
		}
		if !sameResult(op.result, b.results[call.place]) {
			c.violate("answer", "%v; but it came to %+v", op, b.results[call.place])
		}
	}
	if op.version() < floor && (op.isRead() || !op.result.Replayed) {
		c.violate("stale", "node %d answers with version %d, and %d was known when it was asked: %v", p.node.id, op.version(), floor, op)
	}
}

// toldOfKey looks at what the client of a request with an Idempotency-Key is told:
// once any attempt was applied, all are told what came of that one.
func (c *checker) toldOfKey(op *simOp, outcome simOutcome) {
	id := op.cmd.Retry
	if op.isRead() || id.Key == "" || outcome == opOpen {
		return
	}
	first, applied := c.model.retries[id.Key]
	got := op.result
	if first.First.Ops == nil {
		got.Ops = nil // what was read is not remembered
	}
	switch {
	case outcome == opRefused && applied:
		c.violate("retry", "%v; its client is told that it was not applied", op)
	case outcome == opRefused:
		c.refusedKeys[id.Key] = true
	case !applied || !sameResult(first.First, got):
		c.violate("retry", "%v; but the first attempt came to %+v", op, first.First)
	}
}

// proposedLateMax is how long after its deadline a request may still be proposed.
const proposedLateMax = time.Second

// wanted looks at a batch that a process proposes, maybe not for the first time:
// nobody may be waiting any more for a request in it.
func (c *checker) wanted(p *process, data []byte) {
	h, _, err := store.DecodeBatch(data)
	if err != nil || h.Session != p.replica.session {
		return
	}
	for _, b := range p.replica.pending {
		if b.seq != h.Seq {
			continue
		}
		for place, deadline := range p.waits[b] {
			if late := p.replica.now.Sub(deadline); late > proposedLateMax && store.Op(data[b.offsets[place]]) != store.OpNop {
				c.violate("late", "node %d proposes command %d of batch %d, for which nobody waits since %v", p.node.id, place, b.seq, late)
			}
		}
	}
}

// snapshotsMax is how often a process may offer a snapshot to one member in a
// second. Who cannot take it now cannot in a millisecond either.
const snapshotsMax = 50

// offered counts the snapshots that a process sends.
func (c *checker) offered(p *process, m *raftpb.Message) {
	times := p.offered[m.GetTo()]
	for len(times) > 0 && times[0] < c.sim.now-time.Second {
		times = times[1:]
	}
	if p.offered[m.GetTo()] = append(times, c.sim.now); len(times) > snapshotsMax {
		c.violate("flood", "node %d has sent node %d more than %d snapshots in a second", p.node.id, m.GetTo(), snapshotsMax)
	}
}

// stalled looks at how long a turn took, but for the disk and the processor.
// Nothing else may hold up the loop: without it there are no heartbeats.
func (c *checker) stalled(p *process, took time.Duration) {
	if bound := time.Duration(c.sim.electionTicks) * c.sim.tick; took > bound {
		c.violate("stall", "a turn of node %d waited for %v", p.node.id, took)
	}
}

// simClock is the clock of one process.
type simClock struct {
	node   *simNode
	offset time.Duration
	life   int
}

// latest returns what the clock of a batch's proposer showed at most when it
// proposed. Where it led itself that is the time in the batch; another leader may
// have put its own there.
func (c *checker) latest(h store.BatchHeader, term uint64) int64 {
	clock, known := c.clocks[h.Session]
	if !known || c.leaders[term] == clock.node.id && clock.node.lives == clock.life {
		return h.Time
	}
	return clock.node.clockWith(clock.offset).UnixMilli()
}

// stamped wants what a leader writes into its log to have about the time of its
// clock, whatever those of others show.
func (c *checker) stamped(p *process, ents []*raftpb.Entry) {
	if p.replica == nil || p.replica.role != raft.StateLeader {
		return
	}
	for _, e := range ents {
		if e.GetTerm() != p.replica.term || e.GetType() != raftpb.EntryNormal || len(e.GetData()) == 0 {
			continue
		}
		c.wanted(p, e.GetData())
		h, _, err := store.DecodeBatch(e.GetData())
		at, now := time.UnixMilli(h.Time), p.node.clock()
		// It may have come in the turn before, which goes by the tick before that.
		if early := p.ticks[0].Add(-store.ClockSkewMax - time.Millisecond); err == nil && (at.Before(early) || at.After(now.Add(store.ClockSkewMax))) {
			c.violate("time", "node %d leads at %v, and takes a batch of %v", p.node.id, now, at)
		}
	}
}

// overdueMax is how late a key may expire while all is well.
const overdueMax = 2 * time.Second

// overdue wants keys to have expired whose time came long ago, by the clock of
// the leader. Where clocks differ, each new leader has another idea of that.
func (c *checker) overdue() {
	n := c.sim.agreedLeader()
	if n == nil || !leads(n) || c.sim.clockOffset > 0 {
		return
	}
	for key, it := range c.model.items {
		if it.Expires != 0 && it.Expires < n.clock().Add(-overdueMax).UnixMilli() {
			c.violate("overdue", "key %q is still there, %d ms after its time", key, n.clock().UnixMilli()-it.Expires)
			return
		}
	}
}

// remembers wants a change of the configuration to be known as committed, on
// disk, by who goes by it: it could not tell after a crash whose votes count.
func (c *checker) remembers(p *process, index uint64) {
	if disk := &p.node.durable; disk.commit < index && disk.base < index {
		c.violate("forgetful", "node %d goes by the change at entry %d, on disk only %d are committed", p.node.id, index, disk.commit)
	}
}
