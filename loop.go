package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file drives the replica in production: one goroutine, the loop, owns it.
// Everybody else leaves work in the inbox and waits on a channel.

// Bounds of what may wait for the loop.
const (
	batchSizeMax  = 1 << 20 // bytes of commands in one batch; a single larger command makes its own
	queueSizeMax  = 64 << 20
	inboxMax      = 4096 // messages of other members; more are dropped, raft repeats them
	inboxBytesMax = 128 << 20

	// roundsMax bounds the rounds of an iteration, each of which may write to the
	// disk. Then ticks, stop and other members have their turn.
	roundsMax = 8

	// waitGrace is how long after its deadline a request waits for the loop to
	// say what became of it, before it says itself that it does not know.
	waitGrace = 50 * time.Millisecond
)

// loop runs a replica, and implements driver for it. It is the only way to it.
type loop struct {
	logger  *zap.Logger
	tick    time.Duration
	clock   func() time.Time
	applied func()        // called when a round has applied something; must not block
	wake    chan struct{} // holds one token: there is something in the inbox
	done    chan struct{} // closed when run returns

	// Owned by the goroutine that runs run.
	replica *replica
	version uint64 // of the store at the last call of applied

	// interrupt makes work in the background end soon, without a result. nil = it
	// cannot be told to.
	interrupt func()

	metrics    *loopMetrics
	savedAt    time.Time // when the log was last saved ...
	savedIndex uint64    // ... and what was applied then

	work  sync.WaitGroup
	watch stallWatch

	// Invariant: what waits in the inbox is answered: by the replica, by giveUp, or by
	// close, after which nothing comes in any more.
	mu    sync.Mutex
	inbox inbox // guarded by mu
	taken int   // bytes of batches that the replica has; guarded by mu

	status atomic.Pointer[replicaStatus]
}

// inbox is what waits for the loop.
type inbox struct {
	closed    error // set once nothing is taken any more
	messages  []message
	bytes     int // of messages
	calls     []func() error
	abandoned []abandonedCommand // each belongs to a request, so they are bounded like these
	queue     []*batch           // oldest first; the last one is open
	queueSize int                // bytes in queue
	spare     []byte             // buffer for the next batch
	reads     *readRound
}

// message is a raft message, with the body it came with if it is a snapshot.
type message struct {
	*raftpb.Message
	body *store.State
}

// replicaStatus is what other goroutines may know of the replica.
type replicaStatus struct {
	term, leader, committed uint64
	role                    string
	level                   int // of the cluster
}

func newLoop(tick time.Duration, applied func(), logger *zap.Logger) *loop {
	l := &loop{
		logger:  logger,
		applied: applied,
		clock:   time.Now,
		tick:    tick,
		wake:    make(chan struct{}, 1),
		done:    make(chan struct{}),
		metrics: newLoopMetrics(),
	}
	l.status.Store(&replicaStatus{})
	return l
}

// run drives the replica until ctx ends, or until an error that the member must
// not survive. Requests that wait get an answer first. The replica does nothing
// before admit has returned nil.
func (l *loop) run(ctx context.Context, r *replica, admit func(context.Context) error) (err error) {
	l.mu.Lock()
	l.replica = r // requests that came first look whether it is there, see enqueue
	l.mu.Unlock()
	defer close(l.done)
	defer func() {
		if p := recover(); p != nil { // raft panics when its log contradicts itself
			err = fmt.Errorf("replica panicked: %v\n%s", p, debug.Stack())
		}
		l.close(err)
		l.endWork()
	}()
	// If the admission was cut short the node was not admitted: what other members
	// have sent meanwhile must not be looked at, since the answer may be a vote.
	if err := admit(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	ticker := time.NewTicker(l.tick)
	defer ticker.Stop()
	r.now = l.clock()
	for {
		ticked := false
		select {
		case <-l.wake:
		case <-ticker.C:
			ticked = true
		case <-ctx.Done():
			return nil
		}
		l.watch.begin()
		err := l.iterate(ticked)
		if took := l.watch.end(); took > 0 {
			l.metrics.stall.Observe(took.Seconds())
		}
		if err != nil {
			return err
		}
	}
}

// iterate gives the replica all that waits for it.
func (l *loop) iterate(ticked bool) error {
	r := l.replica
	r.now = l.clock() // the last tick may be long ago, if the process was paused
	l.mu.Lock()
	messages, calls, abandoned := l.inbox.messages, l.inbox.calls, l.inbox.abandoned
	l.inbox.messages, l.inbox.bytes, l.inbox.calls, l.inbox.abandoned = nil, 0, nil, nil
	l.mu.Unlock()
	for _, c := range abandoned {
		r.abandon(c.batch, c.place)
	}
	if ticked {
		r.tick(r.now) // which may propose again what is still wanted
	}
	for _, call := range calls {
		if err := call(); err != nil {
			return err
		}
	}
	for _, m := range messages {
		if m.body == nil {
			r.step(m.Message)
		} else if err := r.stepSnapshot(m.Message, m.body); err != nil {
			return err
		}
	}
	// Processing answers reads and writes, which makes room for the next ones:
	// go on until neither is taken. Without the second look, requests that came
	// meanwhile would wait for the next message or tick.
	done := false
	for i := 0; i < roundsMax && !done; i++ {
		more, err := r.processOnce()
		if err != nil {
			return err
		}
		r.now = l.clock() // the disk may have taken seconds, which must not count for what is proposed now
		if rv := r.store.Version(); rv != l.version {
			l.version = rv
			l.applied()
		}
		done = !more && !l.feed()
	}
	l.publish()
	if !done {
		l.signal() // the rest, in the next iteration
	}
	return nil
}

// feed hands the replica the waiting batches and reads that it has room for,
// and says whether there were any.
func (l *loop) feed() bool {
	r := l.replica
	fed := false
	for r.leader != 0 && r.inFlight() < maxInFlight {
		b := l.nextBatch()
		if b == nil {
			break
		}
		b.takenAt = l.clock()
		l.metrics.batchCommands.Observe(float64(len(b.offsets) - b.withdrawn))
		l.metrics.batchBytes.Observe(float64(len(b.data)))
		r.propose(b)
		fed = true
	}
	if r.canRead() {
		if q := l.nextRound(); q != nil {
			q.takenAt = l.clock()
			r.read(q)
			fed = true
		}
	}
	return fed
}

func (l *loop) nextBatch() *batch {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.inbox.queue) == 0 {
		return nil
	}
	b := l.inbox.queue[0]
	l.inbox.queue = slices.Delete(l.inbox.queue, 0, 1)
	l.inbox.queueSize -= len(b.data)
	b.taken = true
	l.taken += len(b.data)
	// The log keeps the bytes for long: give it no more than there are, and fill
	// the grown buffer again.
	l.inbox.spare, b.data = b.data, slices.Clone(b.data)
	return b
}

func (l *loop) nextRound() *readRound {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.inbox.reads
	l.inbox.reads = nil
	return q
}

func (l *loop) publish() {
	r := l.replica
	s := replicaStatus{term: r.term, leader: r.leader, committed: r.committed, role: r.roleName(), level: r.store.Level()}
	if old := *l.status.Load(); old != s {
		if s.leader != old.leader && s.leader != 0 {
			l.metrics.leaderChanges.Inc()
		}
		l.status.Store(&s)
	}
}

// signal wakes the loop. Many signals make one turn.
func (l *loop) signal() { wake(l.wake) }

// wake puts the one token into c that it holds, unless it is there.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// close refuses new work and answers what waits.
func (l *loop) close(cause error) {
	refusal := error(fault.ErrShuttingDown)
	if cause != nil {
		refusal = errStopped
	}
	l.mu.Lock()
	queue, reads := l.inbox.queue, l.inbox.reads
	l.inbox = inbox{closed: refusal}
	for _, b := range queue {
		b.err = refusal // under the lock: giveUp looks at it
	}
	l.mu.Unlock()
	for _, b := range queue {
		close(b.done)
	}
	for _, b := range l.replica.pending {
		b.err = fault.ErrUnknown
		close(b.done)
	}
	for _, q := range append(l.replica.confirmed, l.replica.reading, reads) {
		if q != nil {
			q.err = refusal
			close(q.done)
		}
	}
}

// proposed implements driver.
func (l *loop) proposed(b *batch) {
	l.mu.Lock()
	l.taken -= len(b.data)
	l.mu.Unlock()
	l.metrics.proposal.Observe(l.clock().Sub(b.takenAt).Seconds())
	close(b.done)
}

// waiting returns how many bytes of commands and entries are not written yet.
func (l *loop) waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.inbox.queueSize + l.inbox.bytes + l.taken
}

// readable implements driver.
func (l *loop) readable(q *readRound) {
	l.metrics.readIndex.Observe(l.clock().Sub(q.takenAt).Seconds())
	close(q.done)
}

// background implements driver.
func (l *loop) background(work func() error, done func(error) error) {
	l.work.Go(func() {
		err := work()
		if errors.Is(err, errInterrupted) {
			return // only a node that ends interrupts
		}
		l.call(func() error { return done(err) })
	})
}

// workGrace is how long a loop that ends waits for what it runs in the
// background, after it has told it to end.
const workGrace = 500 * time.Millisecond

// endWork ends what runs in the background. Work that does not heed the call is
// left behind: nobody hears of its result, what it writes has no name or no
// record in the log yet, and the process ends soon, or else the disk is hung.
func (l *loop) endWork() {
	if l.interrupt != nil {
		l.interrupt()
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.work.Wait()
	}()
	select {
	case <-ended:
	case <-time.After(workGrace):
		l.logger.Warn("the node ends although work in the background goes on; what it has written does not count, and is deleted at the next start")
	}
}

// call runs f on the loop's goroutine; an error of f ends the loop. It does
// nothing after the loop has ended.
func (l *loop) call(f func() error) {
	l.mu.Lock()
	if l.inbox.closed == nil {
		l.inbox.calls = append(l.inbox.calls, f)
	}
	l.mu.Unlock()
	l.signal()
}

// handOver has this node hand leadership over, to whoever fits best, if it leads.
func (l *loop) handOver() {
	l.call(func() error {
		l.replica.transfer()
		return nil
	})
}

// wantSnapshot has the replica make a snapshot soon, which releases the log before it.
func (l *loop) wantSnapshot() {
	l.call(func() error {
		l.replica.wantSnapshot()
		return nil
	})
}

// reportUnreachable tells raft that a message to a member was lost. It calls taken,
// on the loop's goroutine, when raft is about to know it.
func (l *loop) reportUnreachable(id uint64, taken func()) {
	l.call(func() error {
		taken()
		l.replica.raw.ReportUnreachable(id)
		return nil
	})
}

// reportSnapshot tells raft how sending a snapshot ended.
func (l *loop) reportSnapshot(to uint64, status raft.SnapshotStatus) {
	l.call(func() error {
		l.replica.raw.ReportSnapshot(to, status)
		return nil
	})
}

// leaderView asks the loop.
func (l *loop) leaderView(ctx context.Context) (leaderView, error) {
	answer := make(chan leaderView, 1)
	l.call(func() error {
		answer <- leaderView{l.replica.committed, l.replica.progress()}
		return nil
	})
	select {
	case v := <-answer:
		return v, nil
	case <-l.done:
		return leaderView{}, errStopped
	case <-ctx.Done():
		return leaderView{}, ctx.Err()
	}
}

// failpoint implements hook: the replica has no clock, so the loop measures from
// outside how long applying takes.
func (l *loop) failpoint(point string) error {
	switch point {
	case "after-save":
		l.savedAt, l.savedIndex = l.clock(), l.replica.store.Applied()
	case "after-advance":
		if l.replica.store.Applied() != l.savedIndex {
			l.metrics.apply.Observe(l.clock().Sub(l.savedAt).Seconds())
		}
	}
	return nil
}

// deliver takes a message of another member. It never blocks.
func (l *loop) deliver(m message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.inbox.closed != nil {
		return l.inbox.closed
	}
	size := messageSize(m.Message)
	if len(l.inbox.messages) >= inboxMax || l.inbox.bytes+size > inboxBytesMax {
		return errInboxFull
	}
	l.inbox.messages = append(l.inbox.messages, m)
	l.inbox.bytes += size
	if len(l.inbox.messages) == 1 {
		l.signal()
	}
	return nil
}

var (
	errInboxFull = errors.New("too many messages wait for the raft loop")
	errStopped   = fault.ErrShuttingDown.WithDetail("this node has stopped after an error; see its log")
)

// messageSize is about how many bytes a message keeps alive.
func messageSize(m *raftpb.Message) int {
	n := 0
	for _, e := range m.GetEntries() {
		n += len(e.GetData())
	}
	return n
}

// propose replicates commands and returns what applying each came to. They stand
// next to each other in the log, as far as a batch holds them. If some were applied
// and others may not have been, the outcome of all is unknown.
func (l *loop) propose(ctx context.Context, timeout time.Duration, commands ...store.Command) ([]store.Result, error) {
	deadline := l.clock().Add(timeout)
	var few [4]queued
	places, err := l.enqueueAll(few[:0], commands, deadline)
	if err != nil {
		return nil, err
	}
	var results []store.Result
	for n, p := range places {
		if n > 0 {
			timeout = max(0, deadline.Sub(l.clock()))
		}
		err := l.await(ctx, p.batch.done, timeout)
		switch {
		case err != nil:
			err = l.giveUp(p.batch, p.index)
		case p.batch.err != nil:
			err = p.batch.err
		case p.batch.results[p.index].Status == store.StatusNone: // it came too late for the proposal that counted
			err = fault.ErrUnknown
		case len(places) == 1:
			return p.batch.results[p.index : p.index+1 : p.index+1], nil
		default:
			results = append(results, p.batch.results[p.index])
			continue
		}
		for _, other := range places[n+1:] {
			if e := l.giveUpUnlessDone(other); e != nil {
				err = e
			}
		}
		if n > 0 {
			err = fault.ErrUnknown
		}
		return nil, err
	}
	return results, nil
}

// giveUpUnlessDone gives up a command that waits with others of which one has
// failed. It returns fault.ErrUnknown if this one may be applied, or was.
func (l *loop) giveUpUnlessDone(p queued) error {
	select {
	case <-p.batch.done:
		if p.batch.err == nil {
			return fault.ErrUnknown
		}
		if errors.Is(p.batch.err, fault.ErrUnknown) {
			return p.batch.err
		}
	default:
		if err := l.giveUp(p.batch, p.index); errors.Is(err, fault.ErrUnknown) {
			return err
		}
	}
	return nil
}

// queued is where a command waits.
type queued struct {
	batch *batch
	index int
}

// enqueueAll adds commands to the open batches, all of them or none.
func (l *loop) enqueueAll(places []queued, commands []store.Command, deadline time.Time) ([]queued, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range commands {
		b, index, err := l.enqueueLocked(&commands[i], deadline)
		if err != nil {
			for _, p := range places { // none was taken: the lock was not released
				p.batch.withdraw(p.index)
				l.dropEmpty(p.batch)
			}
			return nil, err
		}
		places = append(places, queued{b, index})
	}
	return places, nil
}

// enqueue adds a command to the open batch and returns its place there.
func (l *loop) enqueue(c *store.Command, deadline time.Time) (b *batch, i int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.enqueueLocked(c, deadline)
}

func (l *loop) enqueueLocked(c *store.Command, deadline time.Time) (b *batch, i int, err error) {
	size := c.EncodedSizeMax()
	if err := l.refusal(size); err != nil {
		return nil, 0, err
	}
	b = l.openBatch(size, c.EventsMax())
	before := len(b.data)
	b.add(c)
	// One command that some member does not know would be the end of its batch.
	err = store.CheckCommands(b.data[before:], max(store.LevelFirst, l.status.Load().level))
	if err != nil && l.replica != nil {
		// The level may have been raised in the turn that goes on, and the front, which
		// asks the store, made the command with the new one.
		err = store.CheckCommands(b.data[before:], l.replica.store.Level())
	}
	if err != nil {
		b.data, b.offsets, b.events = b.data[:before], b.offsets[:len(b.offsets)-1], b.events-c.EventsMax()
		l.dropEmpty(b)
		return nil, 0, fault.ErrLevel.WithDetail("%v", err)
	}
	l.inbox.queueSize += len(b.data) - before
	b.deadlines = append(b.deadlines, deadline)
	if deadline.After(b.deadline) {
		b.deadline = deadline
	}
	return b, len(b.offsets) - 1, nil
}

// refusal says why size more bytes cannot wait.
func (l *loop) refusal(size int) error {
	if l.inbox.closed != nil {
		return l.inbox.closed
	}
	if l.inbox.queueSize+size > queueSizeMax {
		return fault.ErrOverloaded
	}
	return nil
}

// openBatch returns a batch that has room for size more bytes and so many events.
func (l *loop) openBatch(size, events int) *batch {
	if n := len(l.inbox.queue); n > 0 {
		if b := l.inbox.queue[n-1]; b.change == nil && len(b.data)+size <= batchSizeMax && b.events+events <= store.BatchEventsMax {
			return b
		}
	}
	b := newBatch(l.inbox.spare)
	l.inbox.spare = nil
	l.push(b)
	return b
}

func (l *loop) push(b *batch) {
	l.inbox.queue = append(l.inbox.queue, b)
	l.inbox.queueSize += len(b.data)
	l.signal()
}

// giveUp says what became of a command that nobody waits for any more. As long
// as its batch was not taken it can be withdrawn, and then it never happened.
// Later it is at least not proposed again.
func (l *loop) giveUp(b *batch, i int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b.taken {
		if l.inbox.closed == nil {
			l.inbox.abandoned = append(l.inbox.abandoned, abandonedCommand{b, i})
			l.signal()
		}
		return fault.ErrUnknown
	}
	if b.err != nil {
		return fault.ErrUnknown
	}
	b.withdraw(i)
	l.dropEmpty(b)
	return l.timeout(fault.ErrNotProposed)
}

// timeout is the answer when a deadline has passed: err, or that there is no leader.
func (l *loop) timeout(err *fault.Error) error {
	if l.status.Load().leader == 0 {
		return fault.ErrNoLeader
	}
	return err
}

// dropEmpty takes a batch from the queue that holds nothing, so that it is not
// kept for a leader that may be long in coming.
func (l *loop) dropEmpty(b *batch) {
	if b.withdrawn == len(b.offsets) {
		l.inbox.queue = slices.DeleteFunc(l.inbox.queue, func(q *batch) bool { return q == b })
		l.inbox.queueSize -= len(b.data)
	}
}

// abandonedCommand is one that nobody waits for any more, of a batch that the
// replica has.
type abandonedCommand struct {
	batch *batch
	place int
}

// AddMember adds a learner.
func (l *loop) AddMember(ctx context.Context, timeout time.Duration, m store.Member) error {
	return l.changeMember(ctx, timeout, store.MemberChange{Kind: store.AddLearner, Member: m})
}

// RemoveMember removes a member.
func (l *loop) RemoveMember(ctx context.Context, timeout time.Duration, id uint64) error {
	return l.changeMember(ctx, timeout, store.MemberChange{Kind: store.RemoveMember, Member: store.Member{ID: id}})
}

// PromoteMember makes a learner a voter.
func (l *loop) PromoteMember(ctx context.Context, timeout time.Duration, id uint64) error {
	return l.changeMember(ctx, timeout, store.MemberChange{Kind: store.PromoteLearner, Member: store.Member{ID: id}})
}

// UpdateMember changes what is known of a member.
func (l *loop) UpdateMember(ctx context.Context, timeout time.Duration, m store.Member) error {
	m.Learner, m.Promote = false, false // these change by other calls
	value, err := json.Marshal(m)
	if err != nil {
		return err
	}
	results, err := l.propose(ctx, timeout, store.Command{Op: store.OpMember, Value: string(value)})
	if err != nil {
		return err
	}
	switch results[0].Status {
	case store.StatusNotFound:
		return fault.ErrNotFound.WithDetail("there is no member %d", m.ID)
	case store.StatusPrecondition:
		return fault.ErrMember.WithDetail("another member already has the peer URL %s", m.PeerURL)
	}
	return nil
}

// TransferLeader hands leadership over. Any member may be asked.
func (l *loop) TransferLeader(ctx context.Context, timeout time.Duration, id uint64) error {
	refused := make(chan error, 1)
	poll := time.NewTicker(l.tick)
	defer poll.Stop()
	end := time.After(timeout)
	asked := false
	for {
		switch leader := l.status.Load().leader; {
		case leader == id:
			return nil
		case leader != 0 && !asked: // nobody else could hand over
			asked = true
			l.call(func() error {
				if m, ok := l.replica.store.Member(id); !ok || m.Learner {
					refused <- fault.ErrMember.WithDetail("member %d is not a voter", id)
				} else {
					l.replica.raw.TransferLeader(id)
				}
				return nil
			})
		}
		select {
		case <-poll.C:
		case err := <-refused:
			return err
		case <-end:
			if !asked {
				return fault.ErrNoLeader
			}
			return fault.ErrTransfer.WithDetail("member %d was asked to lead and did not before the deadline, but still may; is it up and has it the whole log?", id)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// changeMember changes the membership and returns when the change is applied.
func (l *loop) changeMember(ctx context.Context, timeout time.Duration, c store.MemberChange) error {
	b, err := newMemberChange(c, l.clock().Add(timeout))
	if err != nil {
		return err
	}
	l.mu.Lock()
	if err := l.refusal(len(b.data)); err != nil {
		l.mu.Unlock()
		return err
	}
	l.push(b)
	l.mu.Unlock()
	if err := l.await(ctx, b.done, timeout); err != nil {
		return l.giveUp(b, 0)
	}
	return b.changeError()
}

// linearize returns once the store holds every write that was acknowledged
// anywhere before the call.
func (l *loop) linearize(ctx context.Context, timeout time.Duration) error {
	q, err := l.joinRound()
	if err != nil {
		return err
	}
	if err := l.await(ctx, q.done, timeout); err != nil {
		return l.timeout(fault.ErrUnconfirmed)
	}
	return q.err
}

// joinRound adds a read to the round that waits for the replica.
func (l *loop) joinRound() (*readRound, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.inbox.closed != nil {
		return nil, l.inbox.closed
	}
	if l.inbox.reads == nil {
		l.inbox.reads = &readRound{done: make(chan struct{})}
		l.signal()
	}
	return l.inbox.reads, nil
}

// await waits for done, at most timeout and a little.
func (l *loop) await(ctx context.Context, done <-chan struct{}, timeout time.Duration) error {
	timer := time.NewTimer(timeout + waitGrace)
	defer timer.Stop()
	select {
	case <-done:
		return nil
	case <-timer.C:
		return context.DeadlineExceeded
	case <-ctx.Done():
		return ctx.Err()
	}
}
