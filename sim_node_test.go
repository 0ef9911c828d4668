package main

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"runtime/debug"
	"syscall"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"raftrv/internal/store"
	"raftrv/internal/watch"
)

// simNode is a machine: it has an address, a clock and a directory, which last,
// and a process, which does not.
type simNode struct {
	sim   *sim
	id    uint64
	url   string
	joins bool // its first state comes from a leader
	dir   string

	// Its clock reads epoch + offset when the simulation begins, and goes rate
	// seconds in a second.
	offset time.Duration
	rate   float64

	lives       int
	process     *process  // nil while down
	seeking     *simPlace // the process, while it looks for its place; else nil
	flags       simFlags
	identity    identity // of its directory, once it has a place
	known       bool     // the others know which directory it has
	pausedUntil time.Duration
	held        []func() // what waits for the end of the pause
	retired     bool     // was removed from the cluster
	stays       bool     // is a learner for ever
	full        bool     // its disk has room only for what the log has taken already

	saving   []*raftpb.Entry // that the last process was writing when it ended
	durable  logShadow       // what its disk has kept of the log for good
	names    map[string]bool // of the files in its snapshot directory that outlive a power cut
	resynced bool            // the process that starts has synced what it read
	volatile *image          // of a log whose end was written and not synced, by a process that was killed
}

var simEpoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// clock reads the node's clock. It goes on while a turn of the loop waits.
func (n *simNode) clock() time.Time { return n.clockWith(n.offset) }

func (n *simNode) clockWith(offset time.Duration) time.Time {
	return simEpoch.Add(offset + time.Duration(n.rate*float64(n.sim.now)))
}

// setClock draws what the clock is off by in the next process.
func (n *simNode) setClock() {
	const year = 365 * 24 * time.Hour
	s := n.sim
	n.offset = time.Duration((2*s.rand.Float64() - 1) * float64(s.clockOffset))
	if !s.clocksWrong || s.chance(0.5) {
		return
	}
	switch s.rand.IntN(3) {
	case 0:
		n.offset = s.between(-72*time.Hour, 72*time.Hour)
	case 1:
		n.offset = s.between(-59*year, 90*year)
	case 2:
		n.offset = time.Unix(0, 0).Sub(simEpoch) // that of a machine without a battery
	}
}

// process is one lifetime of a replica and its loop. It is their driver, and
// stands between them and the network and disk, so that it can die at any
// moment: from then on nothing leaves it any more.
//
// The loop is a coroutine. A turn takes time: wherever the product would wait,
// for its disk above all, the turn gives control back to the simulator until
// the time has passed. Meanwhile messages and requests arrive, clocks go on,
// and the process may be paused or die.
type process struct {
	sim     *sim
	node    *simNode
	loop    *loop
	replica *replica
	store   *store.Store
	hub     *watch.Hub
	disk    *simDisk

	identity  identity
	number    uint64 // of this life
	informed  bool   // it knows what happened while it was away
	announced *batch // which directory it has

	dead      bool
	ticked    bool // a tick waits for the next turn
	scheduled bool // a turn is among the events, or in progress

	resume  func() (struct{}, bool) // gives control to the loop, until it waits
	unwind  func()                  // lets a loop that waits end
	yield   func(struct{}) bool     // gives control back; false = the process is dead
	inside  bool                    // the loop has control
	turning bool                    // a turn is in progress
	lost    time.Duration           // of this turn, to the disk and to other processes

	trap    trap
	waiting []*simCall
	waits   map[*batch]map[int]time.Time // until when the requests of a batch are waited for, by its clock
	offered map[uint64][]time.Duration   // when snapshots were sent lately, by member
	asked   map[uint64]bool              // attempts to read that somebody else has answered
	seen    seen                         // what the checker has seen of it
	ticks   [2]time.Time                 // by its clock, the one before the last and the last
}

// trap makes something go wrong at a named point.
type trap struct {
	point string
	fault error // errCrashed, or errDisk from a method of the disk
	tail  tail
}

// Points that the simulator adds to those of the replica's hook. The first ones
// are in the middle of a write, which is then cut short.
const (
	inSave              = "in-save"
	inSync              = "in-sync"
	inMark              = "in-mark"
	inSnapshotBody      = "in-snapshot-body"
	inSnapshotMeta      = "in-snapshot-meta"
	inSnapshotRecord    = "in-snapshot-record"
	inDirSync           = "in-dir-sync"
	beforeSnapshotMeta  = "before-snapshot-meta"
	afterSnapshotMeta   = "after-snapshot-meta"
	inPurge             = "in-purge"
	afterSend           = "after-send"
	afterAnswer         = "after-answer"
	afterSnapshotArrive = "after-snapshot-arrive"
)

// crashPoints are all named points at which a process may die.
var crashPoints = []string{
	"before-save", "after-save", "after-advance", "after-snapshot-file", "after-snapshot-record",
	inSave, inSync, inMark, inSnapshotBody, inSnapshotRecord, beforeSnapshotMeta, afterSnapshotMeta, inPurge,
	afterSend, afterAnswer, afterSnapshotArrive,
}

// diskPoints are those at which the disk can fail.
var diskPoints = []string{inSave, inSync, inMark, inSnapshotBody, inSnapshotMeta, inSnapshotRecord, beforeSnapshotMeta, inDirSync}

var (
	errCrashed = errors.New("simulated crash")
	errDisk    = errors.New("simulated input/output error")
)

// start starts a process, which reads what the last one has left on disk and looks
// for its place in a cluster.
func (n *simNode) start() {
	s := n.sim
	if n.process != nil || n.seeking != nil || n.retired {
		return
	}
	n.lives++
	n.setClock()
	s.record(n.id, uint64(n.lives))
	n.seek()
}

// enter makes a process of what seek has found.
func (n *simNode) enter(files *storage, rec *recovered, number uint64) {
	s := n.sim
	p := &process{sim: s, node: n, identity: rec.identity, number: number, asked: map[uint64]bool{}, waits: map[*batch]map[int]time.Time{}, offered: map[uint64][]time.Duration{}}
	defer func() {
		if v := recover(); v != nil {
			s.check.violate("panic", "node %d at start: %v\n%s", n.id, v, debug.Stack())
		}
	}()
	if err := p.boot(files, rec); err != nil {
		n.refused(errors.Join(err, files.close()))
		return
	}
	n.process = p
	p.resume, p.unwind = iter.Pull(p.run)
	s.check.started(p)
	p.after(s.between(0, s.tick), p.tick)
	p.after(s.around(dialEvery), p.dial)
	p.after(compareEvery, p.compare)
	p.announce()
}

// boot does what serve does, with other parts at the edges.
func (p *process) boot(files *storage, rec *recovered) (err error) {
	n, s := p.node, p.sim
	logger := s.logger.Named(fmt.Sprintf("node%d", n.id))
	p.disk = &simDisk{storage: files, process: p}
	if s.plant != nil && s.plant.recovered != nil {
		s.plant.recovered(&rec.state)
	}
	if p.disk.log, err = shadowOf(rec); err != nil {
		return err
	}
	s.check.found(n, &p.disk.log)
	if n.resynced {
		n.durable = p.disk.log
	}
	p.store = &store.Store{State: rec.state}
	if !s.raising && s.chance(s.oldVersions) {
		p.store.LevelMax = store.LevelFirst
	}
	p.store.SetWindow(s.eventsMax, store.EventBytesMaxDefault)
	p.hub = watch.NewHub(p.store)
	p.hub.ReadEvents = s.readEvents
	p.loop = newLoop(s.tick, p.applied, logger)
	p.loop.clock = n.clock
	cfg := replicaConfig{
		id:              n.id,
		session:         s.rand.Uint64(),
		electionTicks:   s.electionTicks,
		heartbeatTicks:  s.heartbeatTicks,
		snapshotEntries: s.snapshotEntries,
		snapshotBytes:   math.MaxUint64,
		catchUpEntries:  s.catchUpEntries,
		appendBytes:     s.appendBytes,
		applyBytes:      s.applyBytes,
		log:             rec.log,
		store:           p.store,
		confState:       rec.confState,
		disk:            p.disk,
		transport:       p,
		driver:          p,
		logger:          logger,
		hook:            p.at,
		refused: func(from uint64, err error) {
			s.check.violate("guard", "node %d refuses a message that node %d sent: %v", n.id, from, err)
		},
	}
	if s.plant != nil && s.plant.disk != nil {
		cfg.disk = s.plant.disk(p, p.disk)
	}
	r, err := newReplica(cfg)
	if err != nil {
		return err
	}
	r.now = n.clock()
	p.replica, p.loop.replica = r, r
	p.ticks = [2]time.Time{r.now, r.now}
	s.check.clocks[cfg.session] = simClock{node: n, offset: n.offset, life: n.lives}
	return nil
}

// after runs f later, unless the process has died; while it is paused f waits.
func (p *process) after(d time.Duration, f func()) {
	p.sim.after(d, func() { p.unlessPaused(f) })
}

func (p *process) unlessPaused(f func()) {
	switch {
	case p.dead:
	case p.node.paused():
		p.node.held = append(p.node.held, func() { p.unlessPaused(f) })
	default:
		f()
	}
}

func (p *process) tick() {
	p.ticked = true
	p.wake()
	p.after(time.Duration(float64(p.sim.tick)/p.node.rate), p.tick)
}

// dialEvery is about how often a node tries to connect to the others.
const dialEvery = 200 * time.Millisecond

// dial finds out whether the node was removed: rafthttp keeps connections to all
// members, and one that knows refuses them, which ends the node.
func (p *process) dial() {
	other := pick(p.sim, p.sim.nodes)
	if p.sim.network.connected(p.node.id, other.id) && other.process.store.TellsRemoved(other.id, p.node.id) {
		p.exit(errPeerRemoved)
		return
	}
	p.after(p.sim.around(dialEvery), p.dial)
}

// everybody says whether all know the newest level.
func everybody(know map[uint64]health) bool {
	for _, h := range know {
		if h.Level < store.LevelNewest {
			return false
		}
	}
	return true
}

// compareEvery is how often a node compares its state with those of others.
const compareEvery = time.Second

// compare does what admission.exchange does: the product's own look for members
// whose states differ.
func (p *process) compare() {
	s, others := p.sim, map[uint64]store.Sums{}
	for _, n := range s.nodes {
		if n != p.node && s.network.connected(p.node.id, n.id) {
			others[n.id] = n.process.store.Sums()
		}
	}
	v, differ := store.Judge(p.store.OwnSums(), p.node.id, others, p.store.Voters())
	s.check.judged(p, v, differ)
	if members := p.store.Members(); p.replica.role == raft.StateLeader && len(others) == len(members)-1 && p.store.Level() < store.LevelNewest {
		know := map[uint64]health{}
		for id := range others {
			know[id] = health{Level: s.node(id).process.store.Knows()}
		}
		if !everybody(know) || p.store.Knows() < store.LevelNewest {
			p.after(compareEvery, p.compare)
			return
		}
		s.raising = true
		raise := commonLevel(members, know, p.node.id, store.LevelNewest)
		_, _, _ = p.loop.enqueue(&store.Command{Op: store.OpLevel, Value: raise.Encode()}, p.node.clock().Add(time.Second)) // it tries again
		p.wake()
	}
	p.after(compareEvery, p.compare)
}

// wake makes the loop look into its inbox as soon as it has time.
func (p *process) wake() {
	if p.scheduled || p.dead {
		return
	}
	p.scheduled = true
	p.after(0, p.enter)
}

// enter gives control to the loop.
func (p *process) enter() {
	p.inside = true
	defer func() { p.inside = false }()
	p.resume()
}

// wait lets time pass inside a turn. The process may be dead afterwards.
func (p *process) wait(d time.Duration) {
	if !p.inside {
		return // work beside the loop: its time is that of background
	}
	p.sim.check.observe(p)
	p.after(d, p.enter)
	p.inside = false
	p.yield(struct{}{})
}

// waitOutside waits for what a turn may wait for: the disk, a processor.
func (p *process) waitOutside(d time.Duration) {
	began := p.sim.now
	p.wait(d)
	p.lost += p.sim.now - began
}

// run is the life of the loop.
func (p *process) run(yield func(struct{}) bool) {
	p.yield = yield
	for {
		p.turn()
		if p.dead || !yield(struct{}{}) {
			return
		}
	}
}

// turn is one turn of the loop.
func (p *process) turn() {
	select {
	case <-p.loop.wake:
	default:
	}
	ticked := p.ticked
	if ticked {
		p.ticks = [2]time.Time{p.ticks[1], p.node.clock()}
	}
	p.ticked, p.turning, p.lost = false, true, 0
	began := p.sim.now
	err := p.runTurn(ticked)
	p.sim.check.stalled(p, p.sim.now-began-p.lost)
	p.scheduled, p.turning = false, false
	if p.dead {
		return
	}
	if err != nil {
		p.exit(err)
		return
	}
	if plant := p.sim.plant; plant != nil && plant.turned != nil {
		plant.turned(p)
	}
	p.sim.check.observe(p)
	p.answerVersions()
	if len(p.loop.wake) > 0 || p.ticked {
		p.wake()
	}
}

// runTurn turns a panic into a violation: raft panics when its log contradicts
// itself.
func (p *process) runTurn(ticked bool) (err error) {
	defer func() {
		if v := recover(); v != nil {
			if p.dead { // it could not know
				err = errCrashed
				return
			}
			p.sim.check.violate("panic", "node %d: %v\n%s", p.node.id, v, debug.Stack())
			err = errCrashed
		}
	}()
	return p.loop.iterate(ticked)
}

// exit ends the process as run does: what waits is answered.
func (p *process) exit(err error) {
	switch {
	case errors.Is(err, errDisk), errors.Is(err, errCrashed):
	case errors.Is(err, syscall.EFBIG):
		// Etcd's log prepares its next segment on a goroutine of its own, which can meet
		// the limit that was meant for a write before. The log says so later.
		p.disk.broken = true
	case errors.Is(err, errPeerRemoved):
		p.node.retired = true
	default:
		p.sim.check.violate("stopped", "node %d: %v", p.node.id, err)
	}
	p.loop.close(err)
	p.settle()
	t := tailClean // its files are closed
	if p.disk.broken && p.sim.chance(0.5) {
		t = p.sim.someTail() // and then the machine fails, too
	}
	p.die(t)
}

// die ends the process where it is. Clients see their connections break.
func (p *process) die(t tail) {
	if p.dead {
		return
	}
	s := p.sim
	p.dead, p.node.process = true, nil
	s.record(p.node.id, uint64(t))
	p.disk.crash(t)
	for _, c := range p.waiting {
		c.lost()
	}
	p.waiting = nil
	for _, w := range s.watchers {
		if w.process == p {
			w.disconnect()
		}
	}
	if s.died != nil {
		s.died(p.node)
	}
	if s.plant != nil && s.plant.afterCrash != nil {
		s.plant.afterCrash(p.node)
	}
	if !p.inside && p.unwind != nil {
		p.unwind()
	}
}

// crash kills the process, if there is one.
func (n *simNode) crash(t tail) {
	if n.seeking != nil {
		n.seeking.die()
	}
	if n.process != nil {
		n.process.die(t)
	}
}

// stop ends the process as SIGTERM does.
func (n *simNode) stop() {
	p := n.process
	if p == nil {
		n.crash(tailClean)
		return
	}
	giveUp := n.sim.now + transferTimeout
	var poll func()
	poll = func() {
		if p.replica.leader == n.id && n.sim.now < giveUp {
			p.transfer()
			p.after(n.sim.tick, poll)
			return
		}
		if p.turning { // it looks at its context between two turns
			p.after(time.Millisecond, poll)
			return
		}
		p.loop.close(nil)
		p.settle()
		p.die(tailClean)
	}
	poll()
}

// transfer asks the process to hand over leadership.
func (p *process) transfer() {
	p.loop.call(func() error {
		p.replica.transfer()
		return nil
	})
	p.wake()
}

// pause stops the process for a while, as SIGSTOP or a busy machine does.
func (n *simNode) pause(d time.Duration) {
	n.pausedUntil = max(n.pausedUntil, n.sim.now+d)
	n.sim.at(n.pausedUntil, n.resume)
}

func (n *simNode) paused() bool { return n.sim.now < n.pausedUntil }

// resume lets everything happen that had to wait.
func (n *simNode) resume() {
	if n.paused() {
		return
	}
	held := n.held
	n.held = nil
	for _, f := range held {
		f()
	}
}

// failpoint implements hook. At times another process has the processor here.
func (p *process) at(point string) error {
	if p.dead || p.crashHere(point) {
		return errCrashed
	}
	if p.sim.chance(p.sim.hiccups) {
		p.waitOutside(p.sim.around(hiccupMean))
	}
	if p.dead {
		return errCrashed
	}
	return nil
}

// hiccupMean is how long a process waits for a processor, at times.
const hiccupMean = 3 * time.Millisecond

// crashHere says whether the process dies at this point.
func (p *process) crashHere(point string) bool {
	if p.trap.point != point || p.trap.fault != errCrashed {
		return false
	}
	p.sim.check.reached[point]++
	p.die(p.trap.tail)
	return true
}

// send implements transport.
func (p *process) send(msgs []*raftpb.Message) {
	if p.dead || len(msgs) == 0 {
		return
	}
	for _, m := range msgs {
		if plant := p.sim.plant; plant != nil && plant.blocks != nil {
			p.wait(plant.blocks(p, m))
		}
		if p.dead {
			return
		}
		p.sim.network.send(p, m)
	}
	p.crashHere(afterSend)
}

// setMembers implements transport. Everybody can reach everybody.
func (p *process) setMembers(members []store.Member) {
	if plant := p.sim.plant; plant != nil && plant.connects != nil && !p.dead {
		p.wait(plant.connects(p, members))
	}
}

// proposed implements driver.
func (p *process) proposed(b *batch) {
	if p.dead {
		return
	}
	p.sim.check.observe(p)
	p.sim.check.handedBack(p, b)
	p.loop.proposed(b)
	p.answer(func(c *simCall) bool { return c.batch == b })
	p.crashHere(afterAnswer)
}

// readable implements driver.
func (p *process) readable(q *readRound) {
	if p.dead {
		return
	}
	p.sim.check.observe(p)
	p.sim.check.readable(p, q)
	p.informed = true
	p.loop.readable(q)
	p.answer(func(c *simCall) bool { return c.round == q })
	p.crashHere(afterAnswer)
}

// background implements driver. Work takes a while to begin and a while to be
// noticed; a crash in between loses the news but not the work.
func (p *process) background(work func() error, done func(error) error) {
	p.after(p.sim.around(p.sim.disk.background), func() {
		err := work()
		if p.dead {
			return
		}
		p.after(p.sim.around(p.sim.disk.background), func() {
			p.loop.call(func() error { return done(err) })
			p.wake()
		})
	})
}

// deliver takes a message from the network, as peerNetwork.Process does.
func (p *process) deliver(m *raftpb.Message, body []byte) error {
	if p.store.TellsRemoved(p.node.id, m.GetFrom()) {
		return errPeerRemoved
	}
	view := peerView{self: p.node.id, sender: m.GetFrom(), term: p.loop.status.Load().term, member: func(uint64) bool { return true }}
	if err := checkMessage(m, view); err != nil {
		p.sim.check.violate("guard", "node %d refuses a message that node %d sent: %v\n%v", p.node.id, m.GetFrom(), err, m)
		return err
	}
	if t := m.GetType(); p.node.full && (t == raftpb.MsgApp || t == raftpb.MsgProp) && messageSize(m) > 0 {
		return nil // see admission.receive
	}
	defer p.wake()
	meta := m.GetSnapshot().GetMetadata()
	if m.GetType() != raftpb.MsgSnap || meta.GetIndex() <= p.store.Applied() {
		return p.loop.deliver(message{Message: m})
	}
	if p.node.full {
		return errNoSpace // before anything is written
	}
	if err := p.disk.receiveBody(meta.GetIndex(), body); err != nil {
		return err
	}
	if p.crashHere(afterSnapshotArrive) {
		return errCrashed
	}
	st, err := p.disk.readBody(meta.GetIndex(), meta.GetTerm())
	if err != nil {
		p.sim.check.violate("snapshot", "node %d cannot read the body from node %d: %v", p.node.id, m.GetFrom(), err)
		return err
	}
	return p.loop.deliver(message{Message: m, body: &st})
}

// reportSnapshot tells a leader what became of a snapshot that it sent.
func (p *process) reportSnapshot(to uint64, status raft.SnapshotStatus) {
	p.loop.call(func() error {
		p.replica.raw.ReportSnapshot(to, status)
		return nil
	})
	p.wake()
}

// simLogger prints what the product logs, with simulated times.
func simLogger(s *sim) *zap.Logger {
	cfg := zap.NewDevelopmentConfig()
	cfg.DisableCaller, cfg.DisableStacktrace = true, true
	cfg.EncoderConfig.EncodeTime = func(_ time.Time, enc zapcore.PrimitiveArrayEncoder) {
		enc.AppendString(fmt.Sprintf("%9.4f", s.now.Seconds()))
	}
	l, err := cfg.Build()
	if err != nil {
		return zap.NewNop()
	}
	return l
}
