package main

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.etcd.io/raft/v3/tracker"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file is the replica: one member's raft log, its pending proposals, its
// reads and its membership, as a step machine. It starts no goroutine, reads no
// clock, owns no channel and draws no random number, so that a simulator can
// drive it as well as the loop does. Inputs are the methods tick, step,
// propose, read and those that report results; after each input or burst of
// inputs the owner calls process, which produces the outputs.

// disk is the durable side of a replica. Every error of it is fatal: a log
// whose last write failed may hold anything, so nothing is acknowledged after.
type disk interface {
	// save appends the hard state and entries to the log. They are durable when
	// it returns, except for a hard state in which only the commit index moved
	// and that does not follow a snapshot which was received.
	save(hs *raftpb.HardState, ents []*raftpb.Entry) error
	// sync makes durable what save left out.
	sync() error
	// writeSnapshot writes the body of a snapshot. It is slow and may run beside
	// the other methods. errNoSpace is the one error of a disk that is not fatal:
	// the log holds what the snapshot would.
	writeSnapshot(snap *raftpb.Snapshot, st *store.State) error
	// commitSnapshot makes a snapshot whose body is in place the one to restart
	// from. Durable when it returns.
	commitSnapshot(snap *raftpb.Snapshot) error
	// purge deletes files that no restart needs. It may run beside the others.
	purge() error
	// writeMark writes down how far the log is on disk, so that a later start
	// notices if some of it is gone. It may run beside the others.
	writeMark() error
}

// errNoSpace says that there is no room for a snapshot.
var errNoSpace = errors.New("no space on the disk")

// transport carries messages to the other members. It never blocks and may
// drop, delay or reorder.
type transport interface {
	send(msgs []*raftpb.Message)
	// setMembers tells whom messages may go to and come from.
	setMembers(members []store.Member)
}

// driver is who owns the replica: the loop in production.
type driver interface {
	// proposed hands back a batch: its results or its err are final.
	proposed(b *batch)
	// readable hands back a round of reads: what the store holds now may answer
	// every read that waited when the round was handed to the replica.
	readable(r *readRound)
	// background runs work off the replica's goroutine and then, on it, done with
	// what work returned; an error of done is fatal.
	background(work func() error, done func(error) error)
}

// batch is a group of commands that are proposed as one entry.
type batch struct {
	// Invariant: data[offsets[i]] is where command i begins, until the batch is
	// answered: a command that was withdrawn became a no-op of the same length.
	data     []byte             // room for the header, then the encoded commands
	offsets  []int              // where in data each command starts
	change   *raftpb.ConfChange // set if the one command changes the membership
	deadline time.Time          // of the command that waits longest
	// deadlines are those of the commands, if clients wait for them.
	deadlines []time.Time
	events    int // that applying it makes at most

	// The driver reads these once the batch was handed back.
	// Invariant: if err is nil then, results has one for each of offsets.
	results []store.Result
	err     error

	// These belong to the driver.
	taken     bool // from its queue, by the replica
	withdrawn int  // commands that nobody waits for any more
	takenAt   time.Time
	done      chan struct{}

	// These belong to the replica.
	seq       uint64
	shared    bool // raft has these bytes
	offered   bool // raft took it, under the present leader
	offers    int
	offeredAt uint64 // tick
}

func newBatch(buf []byte) *batch {
	return &batch{data: append(buf[:0], make([]byte, store.BatchHeaderSize)...), done: make(chan struct{})}
}

// add appends a command.
func (b *batch) add(c *store.Command) {
	b.offsets = append(b.offsets, len(b.data))
	b.data = c.AppendTo(b.data)
	b.events += c.EventsMax()
}

// withdraw makes a command one that does nothing, from the next proposal on.
func (b *batch) withdraw(i int) {
	at := b.offsets[i]
	if store.Op(b.data[at]) == store.OpNop {
		return
	}
	if b.shared { // the log may be sending them
		b.data, b.shared = slices.Clone(b.data), false
	}
	b.data[at] = byte(store.OpNop)
	b.withdrawn++
}

// withdrawLate withdraws the commands that nobody waits for any more, and says
// whether others are left. The driver withdraws them, too, but may come late when
// the process was paused.
func (b *batch) withdrawLate(now time.Time) (left bool) {
	for i, deadline := range b.deadlines {
		if now.Sub(deadline) >= waitGrace {
			b.withdraw(i)
		}
	}
	return b.withdrawn < len(b.offsets)
}

// changeError says what became of a change of the membership that was handed
// back.
func (b *batch) changeError() error {
	if b.err == nil && b.results[0].Status == store.StatusRefused {
		return fault.MemberRefused(b.results[0].Key)
	}
	return b.err
}

// readRound is a group of reads that share one ReadIndex.
type readRound struct {
	// These belong to the driver.
	err     error
	takenAt time.Time
	done    chan struct{}

	// These belong to the replica.
	attempt uint64 // context of the ReadIndex that is on its way; 0 = none
	askedAt uint64 // tick
	index   uint64 // once confirmed: readable when applied
}

// replicaConfig holds what a replica is made of.
type replicaConfig struct {
	id      uint64
	session uint64 // random: no other process lifetime has it

	electionTicks  int
	heartbeatTicks int

	// A snapshot is taken when this many entries or this many bytes were applied
	// since the last one.
	snapshotEntries uint64
	snapshotBytes   uint64

	// Bytes of entries in one append message, and applied in one turn; 0 = the
	// defaults.
	appendBytes uint64
	applyBytes  uint64

	// After a snapshot this many entries stay in memory, so that a member that
	// is a little behind needs no snapshot.
	catchUpEntries int

	log       *raft.MemoryStorage // as recovered from disk
	store     *store.Store        // as recovered from disk
	confState *raftpb.ConfState   // always as of the store's applied index
	disk      disk
	transport transport
	driver    driver
	logger    *zap.Logger

	// refused is told of a message that raft must not see; nil = nobody is.
	refused func(from uint64, err error)

	hook hook // nil = none
}

// hook is called at the named points of a turn, so that the loop can measure
// and tests can crash a replica there: what it returns is as fatal as a disk's
// error.
type hook func(point string) error

// Bounds of what a replica keeps on its way.
const (
	// maxInFlight bounds a node's own batches between propose and apply. Two
	// keep the pipe full while the third gathers; more only make batches smaller.
	maxInFlight = 2

	appendSizeMax      = 1 << 20  // bytes of entries in one append message
	applySizeMax       = 4 << 20  // bytes of entries applied in one turn
	inflightAppendsMax = 512      // append messages to one peer without an answer
	inflightBytesMax   = 32 << 20 // and their bytes
	uncommittedSizeMax = 64 << 20 // bytes in a leader's log that wait for a quorum

	// Bounds of what stays in memory of the log before a snapshot.
	catchUpEntriesDefault = 10_000
	catchUpBytesMax       = 16 << 20
)

// Retries of what may be lost on its way, in election timeouts.
const (
	proposalRetryElections = 3
	readRetryElections     = 1
)

type replica struct {
	replicaConfig
	raw       *raft.RawNode
	leader    uint64 // 0 = unknown
	term      uint64
	role      raft.StateType
	committed uint64

	ticks uint64
	now   time.Time

	seq     uint64   // of the last own batch
	pending []*batch // own batches not yet applied, in the order of seq

	readSeq   uint64
	reading   *readRound   // asked for, not confirmed
	confirmed []*readRound // confirmed, not yet applied far enough

	// Batches that the replica proposes on its own behalf; pending too.
	expiring  *batch // deletes keys whose time has come
	promoting *batch // makes a learner a voter

	heard        map[uint64]uint64 // tick of the last message of each member
	electedIndex uint64            // of the last entry in the log of a new leader, which may be a configuration change
	changeIndex  uint64            // of the last configuration change that it let pass
	updates      int               // of members, that the transport knows of

	marking  bool
	markedAt time.Time

	snapshotting   bool
	snapshotWanted bool         // a member needs a newer one than there is
	appliedCount   uint64       // entries applied since the last snapshot
	appliedBytes   uint64       // and their bytes
	arrived        *store.State // body of the snapshot that is being stepped
}

func newReplica(cfg replicaConfig) (*replica, error) {
	r := &replica{replicaConfig: cfg, heard: map[uint64]uint64{}}
	raw, err := raft.NewRawNode(&raft.Config{
		ID:                        cfg.id,
		ElectionTick:              cfg.electionTicks,
		HeartbeatTick:             cfg.heartbeatTicks,
		Storage:                   replicaLog{cfg.log, r},
		Applied:                   cfg.store.Applied(),
		MaxSizePerMsg:             cmp.Or(cfg.appendBytes, appendSizeMax),
		MaxCommittedSizePerReady:  cmp.Or(cfg.applyBytes, applySizeMax),
		MaxUncommittedEntriesSize: uncommittedSizeMax,
		MaxInflightMsgs:           inflightAppendsMax,
		MaxInflightBytes:          inflightBytesMax,
		CheckQuorum:               true,
		PreVote:                   true,
		// ReadOnlyLeaseBased would be faster but trusts clocks: a paused leader
		// would answer stale reads.
		ReadOnlyOption: raft.ReadOnlySafe,
		Logger:         raftLogger{cfg.logger.Named("raft").Sugar()},
	})
	if err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	r.raw = raw
	st := raw.BasicStatus()
	r.term, r.role, r.committed = st.GetTerm(), st.RaftState, st.GetCommit()
	r.transport.setMembers(r.store.Members())
	return r, nil
}

// replicaLog is what raft reads of the log.
type replicaLog struct {
	*raft.MemoryStorage
	replica *replica
}

// Snapshot returns the newest snapshot, unless there are members that it does
// not know: they could not start from it. Then raft asks again until a newer
// one is there.
func (l replicaLog) Snapshot() (*raftpb.Snapshot, error) {
	snap, err := l.MemoryStorage.Snapshot()
	if err != nil {
		return nil, err
	}
	known := snap.GetMetadata().GetConfState()
	for _, m := range l.replica.store.Members() {
		if !slices.Contains(known.GetVoters(), m.ID) && !slices.Contains(known.GetLearners(), m.ID) {
			l.replica.snapshotWanted = true
			return nil, raft.ErrSnapshotTemporarilyUnavailable
		}
	}
	return snap, nil
}

// tick advances the replica's clock: raft's by one tick, the wall clock to now.
func (r *replica) tick(now time.Time) {
	r.ticks++
	r.now = now
	r.raw.Tick()
	r.giveUp()
	for _, b := range r.pending {
		if !b.offered || r.ticks-b.offeredAt >= uint64(proposalRetryElections*r.electionTicks) {
			r.offer(b)
		}
	}
	if q := r.reading; q != nil && (q.attempt == 0 || r.ticks-q.askedAt >= uint64(readRetryElections*r.electionTicks)) {
		r.ask(q)
	}
	r.expireKeys()
	r.promoteLearners()
	r.maybeMark()
}

// markEvery bounds how much of the log can be damaged without being noticed
// after a crash. After a clean stop all of it is covered.
const markEvery = 500 * time.Millisecond

func (r *replica) maybeMark() {
	if r.marking || r.now.Sub(r.markedAt) < markEvery {
		return
	}
	r.marking, r.markedAt = true, r.now
	r.driver.background(r.disk.writeMark, func(err error) error {
		r.marking = false
		if err != nil {
			return fmt.Errorf("write watermark: %w", err)
		}
		return nil
	})
}

// step takes a message from another member.
func (r *replica) step(m *raftpb.Message) {
	if err := r.checkStep(m); err != nil {
		if r.refused != nil {
			r.refused(m.GetFrom(), err)
		}
		return
	}
	switch m.GetType() {
	case raftpb.MsgProp, raftpb.MsgReadIndex: // others pass them on, maybe late
	case raftpb.MsgTransferLeader: // it comes from whom it names, who may be down
	default:
		r.heard[m.GetFrom()] = r.ticks
	}
	// What raft refuses (a proposal without a leader, an answer from a member
	// that is gone) its sender repeats.
	switch t := m.GetType(); {
	case t == raftpb.MsgProp:
		_ = r.stepProposal(m)
	case t == raftpb.MsgReadIndex && !r.confirmsReads():
	case t == raftpb.MsgTransferLeader && r.raw.BasicStatus().RaftState != raft.StateLeader:
		// Raft would panic when it passes on what has a term. Who leads by now has
		// not been asked.
	default:
		_ = r.raw.Step(m)
	}
}

// checkStep refuses what raft would panic on, as the log is now: the rest of
// checkMessage. Of what it would ignore, since its term is over, nothing is refused.
func (r *replica) checkStep(m *raftpb.Message) error {
	var index uint64
	switch st := r.raw.BasicStatus(); {
	case m.GetTerm() < st.GetTerm():
		return nil
	case m.GetType() == raftpb.MsgHeartbeat:
		index = m.GetCommit()
	case m.GetType() == raftpb.MsgAppResp && m.GetTerm() == st.GetTerm() && st.RaftState == raft.StateLeader:
		index = m.GetIndex()
	default:
		return nil
	}
	last, err := r.log.LastIndex()
	if err != nil || index <= last {
		return err
	}
	return refuse(refusedIndex, "%s says that this member has entry %d, and its log ends at %d", m.GetType(), index, last)
}

// stepSnapshot takes a MsgSnap together with its body. It processes at once, so
// that the body cannot be taken for that of another snapshot.
func (r *replica) stepSnapshot(m *raftpb.Message, st *store.State) error {
	if err := r.store.CheckLevel(st.Level); err != nil {
		return err
	}
	r.arrived = st
	r.step(m)
	err := r.process()
	r.arrived = nil
	return err
}

// inFlight returns how many of the driver's batches wait to be applied.
func (r *replica) inFlight() int {
	n := len(r.pending)
	for _, b := range []*batch{r.expiring, r.promoting} {
		if b != nil {
			n--
		}
	}
	return n
}

// propose takes a batch and hands it back through driver.proposed.
func (r *replica) propose(b *batch) {
	r.seq++
	b.seq = r.seq
	store.BatchHeader{Session: r.session, Seq: b.seq, Time: r.now.UnixMilli()}.Put(b.data)
	r.pending = append(r.pending, b)
	r.offer(b)
}

// offer proposes a batch to raft, again if need be: the state machine applies
// it once.
func (r *replica) offer(b *batch) {
	if r.leader == raft.None || !b.withdrawLate(r.now) {
		b.offered = false
		return
	}
	if b.offers > 0 { // it is applied later than was thought, and a TTL begins then
		if b.shared {
			b.data, b.shared = slices.Clone(b.data), false
		}
		store.BatchHeader{Session: r.session, Seq: b.seq, Time: r.now.UnixMilli()}.Put(b.data)
	}
	entry := &raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Data: b.data}
	if b.change != nil {
		b.change.Context = b.data
		data, err := proto.Marshal(b.change)
		if err != nil {
			return // never: then the batch is given up at its deadline
		}
		entry = &raftpb.Entry{Type: raftpb.EntryConfChange.Enum(), Data: data}
	}
	err := r.stepProposal(&raftpb.Message{Type: raftpb.MsgProp.Enum(), From: new(r.id), Entries: []*raftpb.Entry{entry}})
	b.offered, b.shared = err == nil, true
	b.offeredAt = r.ticks
	b.offers++
}

// giveUp hands back batches that nobody waits for any more.
func (r *replica) giveUp() {
	r.pending = slices.DeleteFunc(r.pending, func(b *batch) bool {
		if r.now.Before(b.deadline) {
			return false
		}
		b.err = fault.ErrUnknown
		if b.offers == 0 {
			b.err = fault.ErrNotProposed
			if r.leader == 0 {
				b.err = fault.ErrNoLeader
			}
		}
		r.handBack(b)
		return true
	})
}

// abandon sees to it that a command is not proposed again, since nobody waits
// for it any more. One that was given up must not come back, while others of its
// batch go on waiting, over what its client has read and written since. Of a
// proposal that is on its way nobody can tell: the batch that commits first
// counts, with the command or without it.
func (r *replica) abandon(b *batch, place int) {
	i := slices.Index(r.pending, b)
	if i < 0 {
		return // it was handed back meanwhile
	}
	b.withdraw(place)
	if b.withdrawn == len(b.offsets) {
		r.pending = slices.Delete(r.pending, i, i+1)
		b.err = fault.ErrUnknown
		r.handBack(b)
	}
}

// handBack ends a batch that is not pending any more.
func (r *replica) handBack(b *batch) {
	switch b {
	case r.expiring:
		r.expiring = nil
	case r.promoting:
		r.promoting = nil
	default:
		r.driver.proposed(b)
	}
}

// expireMax bounds the keys that expire in one batch.
const expireMax = 4096

// ownDeadline is when the replica gives up a batch of its own and looks again.
const ownDeadline = 10 * time.Second

// expireKeys proposes the deletion of keys whose time has come, by the leader's
// clock. That is done with each tick, and again when a full batch of them was
// applied. Applying it checks that the key was not written since, so a leader that
// was deposed meanwhile does no harm.
func (r *replica) expireKeys() {
	if r.role != raft.StateLeader || r.expiring != nil {
		return
	}
	due := r.store.Expired(r.now.UnixMilli(), expireMax, batchSizeMax)
	if len(due) == 0 {
		return
	}
	r.expiring = newBatch(nil)
	for i := range due {
		r.expiring.add(&due[i])
	}
	r.expiring.deadline = r.now.Add(ownDeadline)
	r.propose(r.expiring)
}

// canRead says whether the replica would take another round of reads.
func (r *replica) canRead() bool { return r.reading == nil }

// read takes a round of reads and hands it back through driver.readable.
func (r *replica) read(q *readRound) {
	r.reading = q
	r.ask(q)
}

// ask sends a ReadIndex. Its context is never used twice, so that a late answer
// to an earlier attempt, maybe from a leader that was deposed, is no answer to
// this one.
func (r *replica) ask(q *readRound) {
	if r.leader == raft.None || !r.confirmsReads() {
		q.attempt = 0 // with the next tick
		return
	}
	r.readSeq++
	q.attempt = r.readSeq
	q.askedAt = r.ticks
	context := make([]byte, readContextSize)
	binary.LittleEndian.PutUint64(context, r.session)
	binary.LittleEndian.PutUint64(context[8:], q.attempt)
	r.raw.ReadIndex(context)
}

// readContextSize is the size of a ReadIndex context: session and attempt.
const readContextSize = 16

// confirmsReads says whether raft may be asked for a read index. A leader in
// whose configuration there is one voter answers at once, without a look at
// whether it is that voter, or has committed an entry of its term; until then its
// commit index may be from before a crash. One that was removed leads until the
// others have caught up, and does not hear of their next leader. With more voters
// raft waits for such an entry, and asks a majority each time.
func (r *replica) confirmsReads() bool {
	st := r.raw.BasicStatus()
	if st.RaftState != raft.StateLeader {
		return true // and passes it on
	}
	voters := r.confState.GetVoters()
	if !slices.Contains(voters, r.id) {
		return false
	}
	term, err := r.log.Term(st.GetCommit())
	return len(voters) > 1 || err == nil && term == st.GetTerm()
}

// process does what raft asks for until it asks for nothing.
func (r *replica) process() error {
	for {
		if more, err := r.processOnce(); err != nil || !more {
			return err
		}
	}
}

// processOnce does what raft asks for at once, and says whether that was
// anything. The order is that of the raft library's documentation, with one
// change: messages that promise nothing about this member's disk leave before the
// disk is written.
func (r *replica) processOnce() (more bool, err error) {
	if !r.raw.HasReady() {
		return false, nil
	}
	rd := r.raw.Ready()
	// Before read states: an answer that the old leader gave must not be
	// taken after its term.
	r.noteLeader(rd)
	promises, free := splitMessages(rd.Messages)
	r.transport.send(free)
	if err := r.at("before-save"); err != nil {
		return false, err
	}
	if err := r.persist(rd); err != nil {
		return false, err
	}
	if err := r.at("after-save"); err != nil {
		return false, err
	}
	r.transport.send(promises)
	if err := r.apply(rd.CommittedEntries); err != nil {
		return false, err
	}
	r.confirm(rd.ReadStates)
	r.release()
	r.raw.Advance(rd)
	if err := r.at("after-advance"); err != nil {
		return false, err
	}
	r.maybeSnapshot()
	return true, nil
}

func (r *replica) at(point string) error {
	if r.hook == nil {
		return nil
	}
	return r.hook(point)
}

// splitMessages separates the messages that promise something about what this
// member has on disk from those that do not. The line is raft's own, which with
// AsyncStorageWrites attaches these types to the storage write, but for MsgVote:
// the request says how far the candidate's log is. If a crash took its end and
// the term, the candidate could ask again in the same term, and votes that it was
// given for the longer log would count for the shorter one.
//
// A leader thereby sends entries while it writes them (Raft thesis, 10.2.1). That
// a follower answers a heartbeat promises nothing: which term it is in counts at
// the moment at which it says so, and what it voted was on disk before.
func splitMessages(msgs []*raftpb.Message) (promises, free []*raftpb.Message) {
	for _, m := range msgs {
		switch m.GetType() {
		case raftpb.MsgAppResp, raftpb.MsgVote, raftpb.MsgVoteResp, raftpb.MsgPreVoteResp:
			promises = append(promises, m)
		default:
			free = append(free, m)
		}
	}
	return promises, free
}

// noteLeader looks for a change of leader or term. Then whatever was on its way
// may be lost, and is sent again.
func (r *replica) noteLeader(rd raft.Ready) {
	leader, term := r.leader, r.term
	if rd.SoftState != nil {
		leader, r.role = rd.SoftState.Lead, rd.SoftState.RaftState
	}
	if hs := rd.HardState; !raft.IsEmptyHardState(hs) {
		term, r.committed = hs.GetTerm(), hs.GetCommit()
	}
	if leader == r.leader && term == r.term {
		return
	}
	if leader != r.leader {
		r.logger.Info("leader changed", zap.Uint64("leader", leader), zap.Uint64("term", term))
	}
	r.leader, r.term = leader, term
	if last, err := r.log.LastIndex(); err == nil {
		// What it let pass as an earlier leader is in there, or lost.
		r.electedIndex, r.changeIndex = last, 0
	}
	for _, b := range r.pending {
		r.offer(b)
	}
	if r.reading != nil {
		r.ask(r.reading)
	}
}

// persist makes durable what raft wants to be durable, and installs a snapshot
// that the leader sent.
func (r *replica) persist(rd raft.Ready) error {
	hasSnapshot := !raft.IsEmptySnap(rd.Snapshot)
	if hasSnapshot {
		// Before the hard state: a commit index beyond the log is no log.
		if err := r.disk.commitSnapshot(rd.Snapshot); err != nil {
			return fmt.Errorf("save snapshot: %w", err)
		}
		if err := r.at("after-snapshot-record"); err != nil {
			return err
		}
		// Only with it does the snapshot count.
		if err := r.disk.save(rd.HardState, nil); err != nil {
			return fmt.Errorf("save hard state: %w", err)
		}
		if err := r.install(rd.Snapshot); err != nil {
			return fmt.Errorf("install snapshot: %w", err)
		}
		rd.HardState = nil
	}
	if err := r.disk.save(rd.HardState, rd.Entries); err != nil {
		return fmt.Errorf("save log: %w", err)
	}
	return r.log.Append(rd.Entries)
}

func (r *replica) install(snap *raftpb.Snapshot) error {
	index, term := snap.GetMetadata().GetIndex(), snap.GetMetadata().GetTerm()
	if r.arrived == nil || r.arrived.Index != index || r.arrived.Term != term {
		return fmt.Errorf("no body for the snapshot at index %d", index)
	}
	if err := r.log.ApplySnapshot(snap); err != nil {
		return err
	}
	r.store.Restore(*r.arrived)
	r.arrived = nil
	r.confState = snap.GetMetadata().GetConfState()
	r.appliedCount, r.appliedBytes = 0, 0
	r.updates = r.store.MemberUpdates()
	r.transport.setMembers(r.store.Members())
	r.logger.Info("installed snapshot", zap.Uint64("index", index), zap.Uint64("term", term))
	r.driver.background(r.disk.purge, r.purged)
	return nil
}

// purged only logs: files that could not be deleted cost space, not safety.
func (r *replica) purged(err error) error {
	if err != nil {
		r.logger.Warn("could not delete old files", zap.Error(err))
	}
	return nil
}

func (r *replica) apply(ents []*raftpb.Entry) error {
	for _, e := range ents {
		r.appliedCount++
		r.appliedBytes += uint64(len(e.GetData()))
		var err error
		switch {
		case e.GetType() == raftpb.EntryConfChange:
			err = r.applyConfChange(e)
		case len(e.GetData()) == 0: // a new leader's first entry, or a change that it refused
			err = r.store.Skip(e.GetIndex(), e.GetTerm())
		default:
			err = r.applyBatch(e)
		}
		if err != nil {
			return errUnreadable(e, err)
		}
	}
	if n := r.store.MemberUpdates(); n != r.updates {
		r.updates = n
		r.transport.setMembers(r.store.Members())
	}
	return nil
}

// errUnreadable ends a member whose log has an entry that it cannot apply.
func errUnreadable(e *raftpb.Entry, err error) error {
	return fmt.Errorf("apply entry %d of term %d: %w; if the other nodes run a newer version, start this one with that; "+
		"if none can apply it, stop all nodes and run raftrv recover on the one that has most: it keeps what is in the log before this entry, and says so",
		e.GetIndex(), e.GetTerm(), err)
}

func (r *replica) applyBatch(e *raftpb.Entry) error {
	h, commands, err := store.DecodeBatch(e.GetData())
	if err != nil {
		return err
	}
	own := r.takePending(h)
	if own == nil {
		_, err := r.store.Apply(e.GetIndex(), e.GetTerm(), h, commands, nil)
		return err
	}
	own.results = make([]store.Result, 0, len(own.offsets))
	fresh, err := r.store.Apply(e.GetIndex(), e.GetTerm(), h, commands, &own.results)
	switch {
	case err != nil:
		own.err = fault.ErrUnknown
	case !fresh:
		// It was applied at an index that this member received as part of a
		// snapshot, so its results are not known here.
		own.err = fault.ErrUnknown.WithDetail("the write was applied, but its result was lost; read the key")
	case own.change == nil && len(own.results) > 0 && own.results[0].Status == store.StatusRefused: // in the place of the whole batch
		own.err = fault.ErrLevel.WithDetail("%s", own.results[0].Key)
	}
	if own == r.expiring && (len(own.offsets) == expireMax || len(own.data) >= batchSizeMax) {
		// Maybe there are more. Not at once: others wait, too.
		r.driver.background(func() error { return nil }, func(error) error {
			r.expireKeys()
			return nil
		})
	}
	r.handBack(own)
	return err
}

// takePending removes the own batch with this header from those that wait.
func (r *replica) takePending(h store.BatchHeader) *batch {
	if h.Session != r.session {
		return nil
	}
	for i, b := range r.pending {
		if b.seq == h.Seq {
			r.pending = slices.Delete(r.pending, i, i+1)
			return b
		}
	}
	return nil
}

// The kinds of changes, as raft calls them.
var changeTypes = map[store.MemberChangeKind]raftpb.ConfChangeType{
	store.AddLearner:     raftpb.ConfChangeAddLearnerNode,
	store.PromoteLearner: raftpb.ConfChangeAddNode,
	store.RemoveMember:   raftpb.ConfChangeRemoveNode,
}

// newMemberChange builds the batch of a configuration change.
func newMemberChange(c store.MemberChange, deadline time.Time) (*batch, error) {
	value, err := json.Marshal(c.Member)
	if err != nil {
		return nil, err
	}
	b := newBatch(nil)
	b.add(&store.Command{Op: store.OpMember, Value: string(value)})
	b.change = &raftpb.ConfChange{Type: changeTypes[c.Kind].Enum(), NodeId: new(c.Member.ID)}
	b.deadline = deadline
	return b, nil
}

func decodeMemberChange(e *raftpb.Entry) (cc *raftpb.ConfChange, h store.BatchHeader, c store.MemberChange, err error) {
	cc = &raftpb.ConfChange{}
	if err := proto.Unmarshal(e.GetData(), cc); err != nil {
		return cc, h, c, err
	}
	h, commands, err := store.DecodeBatch(cc.GetContext())
	if err != nil {
		return cc, h, c, err
	}
	m, rest, err := store.DecodeCommand(commands)
	if err == nil && (m.Op != store.OpMember || len(rest) > 0) {
		err = store.Newer("a configuration change with command", uint64(m.Op))
	}
	if err != nil {
		return cc, h, c, err
	}
	if c.Member, err = store.DecodeMember(m.Value); err != nil {
		return cc, h, c, err
	}
	for kind, t := range changeTypes {
		if t == cc.GetType() {
			c.Kind = kind
		}
	}
	if c.Member.ID != cc.GetNodeId() || changeTypes[c.Kind] != cc.GetType() {
		return cc, h, c, fmt.Errorf("%w: configuration change %v", store.ErrMalformed, cc)
	}
	return cc, h, c, nil
}

// stepProposal gives raft a proposal. As a leader it first puts a refusal in the
// place of what must not be in the log, so that its proposer knows: of a
// configuration change that must not be made, which raft would replace by
// nothing, and of a batch that some member cannot read, which would end it.
func (r *replica) stepProposal(m *raftpb.Message) error {
	// Raft may lead since its last Ready, of which noteLeader does not know yet.
	leads := r.raw.BasicStatus().RaftState == raft.StateLeader
	changes := false
	for i, e := range m.GetEntries() {
		if !leads {
			break
		}
		if e.GetType() != raftpb.EntryConfChange {
			ready, err := r.readyBatch(e)
			if err != nil {
				return err
			}
			m.Entries[i] = ready
			continue
		}
		if r.role != raft.StateLeader || r.electedIndex > r.store.Applied() {
			return raft.ErrProposalDropped // raft would refuse any change now
		}
		_, h, change, refused := decodeMemberChange(e)
		if refused != nil && !errors.Is(refused, store.ErrNewer) {
			return refused
		}
		if refused == nil {
			refused = change.Member.Check()
		}
		if refused == nil {
			refused = r.refuseChange(change)
		}
		if refused == nil {
			if r.standsAside(change) {
				return raft.ErrProposalDropped
			}
			changes = true
			continue
		}
		m.Entries[i] = r.refusal(h, refused)
	}
	if err := r.raw.Step(m); err != nil {
		return err
	}
	if changes {
		r.changeIndex = unknownIndex
	}
	return nil
}

// refusal is an entry that tells the proposer of a batch why it is not in the log.
// It has the leader's time, like any other: the proposer's clock may be wrong.
func (r *replica) refusal(h store.BatchHeader, why error) *raftpb.Entry {
	h.Time = r.now.UnixMilli()
	b := newBatch(nil)
	b.add(&store.Command{Op: store.OpRefuse, Value: why.Error()})
	h.Put(b.data)
	return &raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Data: b.data}
}

// readyBatch returns what a leader puts into its log for a batch.
func (r *replica) readyBatch(e *raftpb.Entry) (*raftpb.Entry, error) {
	h, commands, err := store.DecodeBatch(e.GetData())
	if err != nil {
		return nil, err
	}
	if err := store.CheckCommands(commands, r.store.Level()); err != nil {
		r.logger.Warn("refused a batch", zap.Error(err))
		return r.refusal(h, fmt.Errorf("the leader, node %d, refuses it: %w", r.id, err)), nil
	}
	if off := r.now.Sub(time.UnixMilli(h.Time)); off.Abs() <= store.ClockSkewMax {
		return e, nil
	}
	h.Time = r.now.UnixMilli()
	data := slices.Clone(e.GetData()) // the proposer keeps its own, and offers it again
	h.Put(data)
	return &raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Data: data}, nil
}

// unknownIndex is that of a configuration change in the log of a leader that has
// not applied it yet.
const unknownIndex = ^uint64(0)

// A cluster grows no larger by what its leader proposes. One that is larger goes on.
const (
	votersMax   = 7 // more do not make it safer, and writes slower
	learnersMax = 4
)

// refuseChange says why a leader must not make a change now: one at a time, not
// more members than a cluster may have, and never one after which the members that
// it hears from would be no majority.
func (r *replica) refuseChange(c store.MemberChange) error {
	if r.changeIndex > r.store.Applied() {
		return errors.New(fault.RefusedForNow)
	}
	self, ok := r.store.Member(c.Member.ID)
	if !ok && c.Kind == store.PromoteLearner {
		return nil // applying it says that there is none
	}
	if err := r.refuseSize(c); err != nil {
		return err
	}
	voters, active := 0, 0 // after the change
	for _, m := range r.store.Members() {
		votes := !m.Learner
		if m.ID == c.Member.ID {
			votes = c.Kind == store.PromoteLearner
		}
		if !votes {
			continue
		}
		voters++
		if r.hears(m.ID) {
			active++
		}
	}
	switch {
	case c.Kind == store.AddLearner:
		return nil // it has no vote
	case c.Kind == store.PromoteLearner && !r.caughtUp(c.Member.ID):
		return fmt.Errorf("member %d %s", c.Member.ID, fault.RefusedUntilThen)
	case c.Kind == store.PromoteLearner && self.Directory == 0:
		return fmt.Errorf("member %d %s", c.Member.ID, fault.RefusedUntilKnown) // once wiped it would vote again, and nobody would notice
	case voters > 0 && active <= voters/2:
		return fmt.Errorf("of %d voters after the change only %d would be reachable, which is no majority: first bring the others back, or remove one that is down", voters, active)
	}
	return nil
}

// refuseSize says whether a change would make the cluster too large.
func (r *replica) refuseSize(c store.MemberChange) error {
	voters, learners := 0, 0
	for _, m := range r.store.Members() {
		if m.Learner {
			learners++
		} else {
			voters++
		}
	}
	_, exists := r.store.Member(c.Member.ID)
	switch {
	case c.Kind == store.AddLearner && !exists && learners >= learnersMax:
		return fmt.Errorf("a cluster has at most %d learners, and this one has %d: remove one first", learnersMax, learners)
	case c.Kind == store.PromoteLearner && voters >= votersMax:
		return fmt.Errorf("a cluster has at most %d voters, and this one has %d: remove one first", votersMax, voters)
	}
	return nil
}

// standsAside hands leadership to the voter that has most of the log, before
// this leader is removed. A leader that applied its own removal would be gone
// before the others know that the change is committed, and of two members the
// other one could not find out without its vote. The proposer tries again when
// it sees the next leader.
func (r *replica) standsAside(c store.MemberChange) bool {
	if c.Kind != store.RemoveMember || c.Member.ID != r.id {
		return false
	}
	var heir, most uint64
	alone := true
	r.raw.WithProgress(func(id uint64, kind raft.ProgressType, pr tracker.Progress) {
		if id == r.id || kind != raft.ProgressTypePeer {
			return
		}
		alone = false
		if pr.Match > most && r.hears(id) { // a new leader has yet to find out
			heir, most = id, pr.Match
		}
	})
	if heir != raft.None {
		r.raw.TransferLeader(heir)
	}
	return !alone // the last voter is refused when it is applied
}

// hears says whether this member has heard from another one lately.
func (r *replica) hears(id uint64) bool {
	at, ok := r.heard[id]
	return id == r.id || ok && r.ticks-at <= uint64(2*r.electionTicks)
}

// catchUpLag is how many entries a learner may be behind to become a voter.
const catchUpLag = 1000

// caughtUp says whether a leader's peer has almost all of the log.
func (r *replica) caughtUp(id uint64) bool {
	if !r.hears(id) {
		return false
	}
	ok := false
	r.raw.WithProgress(func(peer uint64, _ raft.ProgressType, pr tracker.Progress) {
		if peer == id {
			ok = pr.State == tracker.StateReplicate && pr.Match+catchUpLag >= r.committed
		}
	})
	return ok
}

// progress returns how far the other members are, as a leader knows it.
func (r *replica) progress() []peerProgress {
	if r.role != raft.StateLeader {
		return nil
	}
	var peers []peerProgress
	r.raw.WithProgress(func(id uint64, _ raft.ProgressType, pr tracker.Progress) {
		if id != r.id {
			peers = append(peers, peerProgress{id: id, match: pr.Match, active: r.hears(id)})
		}
	})
	return peers
}

// promoteEvery is how often a leader looks for learners to promote, in ticks.
const promoteEvery = 20

// promoteLearners proposes to promote a learner that waits for it and has
// caught up. What a member of the wrong term proposes is refused like any other
// change that does not fit.
func (r *replica) promoteLearners() {
	if r.role != raft.StateLeader || r.ticks%promoteEvery != 0 || r.promoting != nil {
		return
	}
	for _, m := range r.store.Members() {
		c := store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: m.ID}}
		if !m.Promote || r.refuseChange(c) != nil {
			continue
		}
		b, err := newMemberChange(c, r.now.Add(ownDeadline))
		if err != nil {
			return
		}
		r.promoting = b
		r.propose(b)
		return
	}
}

func (r *replica) applyConfChange(e *raftpb.Entry) error {
	cc, h, change, err := decodeMemberChange(e)
	if err != nil {
		return err
	}
	// The commit index is not always synced. A member that forgot in a crash that
	// this change is committed would go on to count votes in the configuration
	// before it, maybe the vote of a member that is gone for good.
	if err := r.disk.sync(); err != nil {
		return err
	}
	fresh, refused, err := r.store.ApplyMember(e.GetIndex(), e.GetTerm(), h, change)
	if err != nil {
		return err
	}
	if r.changeIndex == unknownIndex {
		r.changeIndex = e.GetIndex()
	}
	if fresh && refused == nil {
		r.confState = r.raw.ApplyConfChange(cc)
		r.transport.setMembers(r.store.Members())
		r.logger.Info("membership changed", zap.Stringer("change", cc.GetType()), zap.Uint64("member", change.Member.ID))
	}
	if own := r.takePending(h); own != nil {
		switch {
		case !fresh:
			own.err = fault.ErrUnknown
		case refused != nil:
			own.err = fault.MemberRefused(refused.Error())
		default:
			own.results = []store.Result{{RV: r.store.Version()}}
		}
		r.handBack(own)
	}
	if change.Kind == store.RemoveMember && change.Member.ID == r.id && fresh && refused == nil {
		// It does not end here, and a leader does not step down (StepDownOnRemoval):
		// those that do not know yet that the change is committed may need its vote,
		// or its log, to find out. A voter that knows will tell it.
		r.logger.Warn("this member was removed from the cluster")
	}
	return nil
}

// confirm matches ReadIndex answers with the round that waits for one.
func (r *replica) confirm(states []raft.ReadState) {
	for _, s := range states {
		q := r.reading
		if q == nil || q.attempt == 0 || len(s.RequestCtx) != readContextSize ||
			binary.LittleEndian.Uint64(s.RequestCtx) != r.session ||
			binary.LittleEndian.Uint64(s.RequestCtx[8:]) != q.attempt {
			continue // an answer to an attempt that was given up
		}
		q.index = s.Index
		r.reading = nil
		r.confirmed = append(r.confirmed, q)
	}
}

// release hands back the rounds whose index is applied.
func (r *replica) release() {
	if len(r.confirmed) == 0 {
		return
	}
	applied := r.store.Applied()
	r.confirmed = slices.DeleteFunc(r.confirmed, func(q *readRound) bool {
		if q.index > applied {
			return false
		}
		r.driver.readable(q)
		return true
	})
}

// maybeSnapshot starts a snapshot when enough was applied since the last one.
// Of a large state it waits for more bytes, so that snapshots write at most
// about twice what the log does.
func (r *replica) maybeSnapshot() {
	enough := r.snapshotWanted || r.appliedCount >= r.snapshotEntries ||
		r.appliedBytes >= r.snapshotBytes && r.appliedBytes >= r.store.Size()/2
	if r.snapshotting || !enough {
		return
	}
	st := r.store.Snapshot()
	snap := &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{
		ConfState: proto.Clone(r.confState).(*raftpb.ConfState),
		Index:     new(st.Index),
		Term:      new(st.Term),
	}}
	r.snapshotting, r.snapshotWanted = true, false
	r.appliedCount, r.appliedBytes = 0, 0
	r.driver.background(
		func() error { return r.disk.writeSnapshot(snap, &st) },
		func(err error) error { return r.snapshotWritten(snap, err) },
	)
}

// wantSnapshot starts a snapshot if there is anything new to put in, so that the
// log before it can be deleted.
func (r *replica) wantSnapshot() {
	if r.appliedCount > 0 {
		r.snapshotWanted = true
		r.maybeSnapshot()
	}
}

// snapshotWritten makes a finished snapshot the one that the log starts from.
func (r *replica) snapshotWritten(snap *raftpb.Snapshot, err error) error {
	r.snapshotting = false
	if errors.Is(err, errNoSpace) {
		r.logger.Warn("took no snapshot; it is tried again later", zap.Error(err))
		return nil
	}
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	if err := r.at("after-snapshot-file"); err != nil {
		return err
	}
	index := snap.GetMetadata().GetIndex()
	if newest, err := r.log.Snapshot(); err != nil || newest.GetMetadata().GetIndex() >= index {
		return err // the leader sent a newer one meanwhile
	}
	if err := r.disk.commitSnapshot(snap); err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	if err := r.at("after-snapshot-record"); err != nil {
		return err
	}
	if _, err := r.log.CreateSnapshot(index, snap.GetMetadata().GetConfState(), nil); err != nil {
		return fmt.Errorf("create snapshot: %w", err)
	}
	if err := r.compact(index); err != nil {
		return fmt.Errorf("compact log: %w", err)
	}
	r.logger.Debug("took snapshot", zap.Uint64("index", index))
	r.driver.background(r.disk.purge, r.purged)
	return nil
}

// compact drops the log before a snapshot from memory, all but what members
// that are a little behind may still need.
func (r *replica) compact(index uint64) error {
	first, err := r.log.FirstIndex()
	if err != nil || index < first {
		return err
	}
	ents, err := r.log.Entries(first, index+1, noLimit)
	if err != nil {
		return err
	}
	keep, size := len(ents), 0 // ents[keep:] stay
	for keep > 0 && len(ents)-keep < r.catchUpEntries {
		if size += len(ents[keep-1].GetData()); size > catchUpBytesMax {
			break
		}
		keep--
	}
	if keep == 0 {
		return nil
	}
	return r.log.Compact(ents[keep-1].GetIndex())
}

const noLimit = ^uint64(0)

// transfer asks a leader to hand over to the member that is furthest, of those
// that it has heard of lately. It does nothing on a follower, while a transfer
// is on its way, and while the leader has heard of nobody: after its election,
// and for a moment each time that it checks its quorum.
func (r *replica) transfer() {
	if r.role != raft.StateLeader || r.raw.BasicStatus().LeadTransferee != raft.None {
		return
	}
	var best, match uint64
	r.raw.WithProgress(func(id uint64, kind raft.ProgressType, pr tracker.Progress) {
		if id != r.id && kind == raft.ProgressTypePeer && pr.RecentActive && pr.Match >= match {
			best, match = id, pr.Match
		}
	})
	if best != raft.None {
		r.raw.TransferLeader(best)
	}
}

// roleName says what the member is at present, in raft's words.
func (r *replica) roleName() string {
	switch r.role {
	case raft.StateLeader:
		return "leader"
	case raft.StateCandidate:
		return "candidate"
	case raft.StatePreCandidate:
		return "pre-candidate"
	}
	if slices.Contains(r.confState.GetLearners(), r.id) {
		return "learner"
	}
	return "follower"
}

// raftLogger gives raft's log lines to zap. What raft calls information is for
// debugging here: the replica logs what a person should know.
type raftLogger struct{ *zap.SugaredLogger }

func (l raftLogger) Info(v ...any)                    { l.Debug(v...) }
func (l raftLogger) Infof(format string, v ...any)    { l.Debugf(format, v...) }
func (l raftLogger) Warning(v ...any)                 { l.Warn(v...) }
func (l raftLogger) Warningf(format string, v ...any) { l.Warnf(format, v...) }
