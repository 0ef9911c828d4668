package main

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file is the clients, and the history of what they asked and were told.

// simOutcome is what a client knows about an operation in the end.
type simOutcome int

const (
	opOpen    simOutcome = iota // no answer, or one that does not say
	opDone                      // answered
	opRefused                   // did not happen and never will
)

func (o simOutcome) String() string { return [...]string{"unknown", "done", "refused"}[o] }

// readKind is how fresh an answer a read asks for.
type readKind int

const (
	notARead     readKind = iota
	readLatest            // linearizable
	readAtLeast           // not older than a resource version
	readWhatever          // whatever this node has
)

func (k readKind) String() string { return [...]string{"", "latest", "at least", "whatever"}[k] }

// simOp is one operation of one client. If its outcome is not known the client
// may try again, under the same Idempotency-Key; that is the same operation.
type simOp struct {
	client  int
	read    readKind
	list    bool          // read all items whose keys begin with the key
	cmd     store.Command // of a read only the key
	atLeast uint64

	attempts []attempt
	invoked  time.Duration
	begun    time.Duration // the last attempt: between two the client takes its time
	returned time.Duration
	outcome  simOutcome
	err      error

	result store.Result // of a write
	item   store.Item   // of a read
	found  bool
	items  []store.KeyItem // of a list
	rv     uint64          // of the store, when it was read
}

// attempt is where an operation went.
type attempt struct {
	node    uint64
	session uint64
	batch   *batch // of a write
	place   int
	timeout time.Duration
}

func (o *simOp) isRead() bool { return o.read != notARead }

func (o *simOp) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "client %d", o.client)
	for _, a := range o.attempts {
		fmt.Fprintf(&b, ", node %d", a.node)
	}
	fmt.Fprintf(&b, ", %v to %v: ", o.invoked, o.returned)
	switch {
	case o.list:
		fmt.Fprintf(&b, "list %q (%v): %d items at version %d", o.cmd.Key, o.read, len(o.items), o.rv)
	case o.isRead():
		fmt.Fprintf(&b, "get %q (%v): %v %+v at version %d", o.cmd.Key, o.read, o.found, o.item, o.rv)
	case o.cmd.Op == store.OpTxn:
		t, _ := store.DecodeTxn(o.cmd.Value)
		fmt.Fprintf(&b, "transaction %+v: %+v", t, o.result)
	default:
		cmd := o.cmd
		cmd.Value = cmd.Value[:min(len(cmd.Value), 100)]
		fmt.Fprintf(&b, "write %+v: %+v", cmd, o.result)
	}
	return b.String() + fmt.Sprintf(", %v, %v", o.outcome, o.err)
}

// history is all operations, in the order in which they were begun.
type history struct {
	ops   []*simOp
	acked int
}

// simCall is an attempt that waits for a process.
type simCall struct {
	process *process
	op      *simOp
	done    func(outcome simOutcome, err error) // called once
	batch   *batch
	place   int
	round   *readRound

	floor    uint64 // version that was known when it began
	answered bool   // the answer is on its way to the client
}

// do sends an operation to a process.
func (p *process) do(op *simOp, timeout time.Duration, done func(simOutcome, error)) {
	c := &simCall{process: p, op: op, done: done, floor: p.sim.check.acked}
	p.waiting, op.begun = append(p.waiting, c), p.sim.now
	if op.isRead() {
		c.read(timeout)
	} else {
		c.write(timeout)
	}
	// The loop hands back what is too old, and answers for a little longer.
	wait := time.Duration(float64(timeout+waitGrace) / p.node.rate)
	p.after(wait, func() {
		if c.answered {
			return
		}
		switch plant := p.sim.plant; {
		case c.batch == nil:
			c.fail(fault.ErrNoLeader)
		case plant != nil && plant.deadlines != nil && c.batch.taken:
			c.fail(fault.ErrUnknown)
		default:
			c.fail(p.loop.giveUp(c.batch, c.place))
		}
	})
}

func (c *simCall) write(timeout time.Duration) {
	p := c.process
	cmd := c.op.cmd
	if plant := p.sim.plant; plant != nil && plant.request != nil {
		plant.request(p, &cmd)
	}
	if c.known() {
		c.leave(opDone, nil)
		return
	}
	deadline := p.node.clock().Add(timeout)
	b, place, err := p.loop.enqueue(&cmd, deadline)
	if err != nil {
		c.fail(err)
		return
	}
	c.batch, c.place = b, place
	if p.waits[b] == nil {
		p.waits[b] = map[int]time.Time{}
	}
	p.waits[b][place] = deadline
	if plant := p.sim.plant; plant != nil && plant.deadlines != nil {
		plant.deadlines(b, place)
	}
	c.op.attempts = append(c.op.attempts, attempt{node: p.node.id, session: p.replica.session, batch: b, place: place, timeout: timeout})
	if plant := p.sim.plant; plant != nil && plant.answerWrite {
		c.op.result = store.Result{Status: store.StatusReplaced}
		c.leave(opDone, nil)
	}
	p.wake()
}

func (c *simCall) read(timeout time.Duration) {
	p := c.process
	c.op.attempts = append(c.op.attempts, attempt{node: p.node.id, session: p.replica.session, timeout: timeout})
	plant := p.sim.plant
	switch {
	case c.op.read == readWhatever, plant != nil && plant.answerRead != nil && plant.answerRead(p):
		c.capture()
	case c.op.read == readAtLeast:
		p.answerVersions()
	default:
		q, err := p.loop.joinRound()
		if err != nil {
			c.fail(err)
			return
		}
		c.round = q
		p.wake()
	}
}

// capture takes the answer: what the store or the batch holds now.
func (c *simCall) capture() {
	switch {
	case c.op.isRead() && c.round != nil && c.round.err != nil:
		c.fail(c.round.err)
	case c.op.isRead():
		c.look()
		c.leave(opDone, nil)
	case c.batch.err != nil:
		c.fail(c.batch.err)
	case c.batch.results[c.place].Status == store.StatusNone:
		c.fail(fault.ErrUnknown)
	default:
		c.op.result = c.batch.results[c.place]
		c.leave(opDone, nil)
	}
}

// look reads the store.
func (c *simCall) look() {
	op, kv := c.op, c.process.store
	if op.list {
		op.items, op.rv = kv.List(op.cmd.Key, "", math.MaxInt)
	} else {
		op.item, op.rv, op.found = kv.Get(op.cmd.Key)
	}
}

// known looks whether this node remembers the answer to a request that was made
// before, as node.propose does.
func (c *simCall) known() bool {
	id := c.op.cmd.Retry
	if c.op.isRead() || id.Key == "" {
		return false
	}
	first, known := c.process.store.Outcome(id)
	if known {
		c.op.result = first
	}
	return known
}

// fail answers with an error.
func (c *simCall) fail(err error) {
	if c.known() {
		c.batch = nil
		c.leave(opDone, nil)
		return
	}
	err = c.asRetry(err)
	outcome := opRefused
	plant := c.process.sim.plant
	if outcomeOf(err) == fault.Unknown && !c.op.isRead() && (plant == nil || !plant.refuseUnknown) {
		outcome = opOpen
	}
	if outcome == opRefused && c.batch != nil && c.batch.change == nil {
		c.process.sim.check.refuse(c.process.replica.session, c.batch, c.place)
	}
	c.leave(outcome, err)
}

// asRetry is what an error is as the answer to a request that may have been made
// before.
func (c *simCall) asRetry(err error) error {
	plant := c.process.sim.plant
	if e, ok := errors.AsType[*fault.Error](err); ok && c.op.cmd.Retry.Key != "" && (plant == nil || !plant.refuseRetries) {
		return e.OfRetry()
	}
	return err
}

// leave sends the answer to the client. It is lost if the process dies at once.
func (c *simCall) leave(outcome simOutcome, err error) {
	p := c.process
	c.answered = true
	if p.disk.broken && outcome == opDone && !c.op.isRead() {
		p.sim.check.violate("disk error", "node %d answers a write after its disk has failed", p.node.id)
	}
	if plant := p.sim.plant; plant != nil && plant.forgetFirsts && c.op.result.Replayed {
		c.op.result.RV = p.store.Version()
	}
	if outcome == opDone {
		p.sim.check.answered(c)
	}
	p.sim.check.toldOfKey(c.op, outcome)
	p.after(0, func() {
		p.forget(c)
		if outcome == opDone && (c.op.read == notARead || c.op.read == readLatest) {
			p.sim.check.acked = max(p.sim.check.acked, c.op.version())
		}
		c.done(outcome, err)
	})
}

// lost ends a call whose process has died.
func (c *simCall) lost() {
	outcome := opOpen
	if c.op.isRead() || c.batch == nil && c.op.cmd.Retry.Key == "" {
		outcome = opRefused
	}
	c.answered = true
	c.done(outcome, errCrashed)
}

func (p *process) forget(c *simCall) {
	for i := range p.waiting {
		if p.waiting[i] == c {
			last := len(p.waiting) - 1
			copy(p.waiting[i:], p.waiting[i+1:])
			p.waiting[last] = nil
			p.waiting = p.waiting[:last]
			return
		}
	}
}

// answer answers the calls that match.
func (p *process) answer(match func(*simCall) bool) {
	for _, c := range p.waiting {
		if !c.answered && match(c) {
			c.capture()
		}
	}
}

// answerVersions answers the reads that waited for a resource version.
func (p *process) answerVersions() {
	rv := p.store.Version()
	p.answer(func(c *simCall) bool { return c.op.read == readAtLeast && c.op.atLeast <= rv })
}

// settle answers what the loop has finished on its way out, at once.
func (p *process) settle() {
	var left []*simCall
	for _, c := range p.waiting {
		switch {
		case c.answered, c.batch == nil && c.round == nil:
			left = append(left, c)
		case c.batch != nil && isClosed(c.batch.done), c.round != nil && isClosed(c.round.done):
			c.settle()
		default:
			left = append(left, c)
		}
	}
	p.waiting = left
}

func (c *simCall) settle() {
	err := error(nil)
	if c.batch != nil {
		err = c.batch.err
	} else {
		err = c.round.err
	}
	err = c.asRetry(err)
	outcome := opRefused
	if outcomeOf(err) == fault.Unknown {
		outcome = opOpen
	}
	c.answered = true
	c.process.sim.check.toldOfKey(c.op, outcome)
	c.done(outcome, err)
}

func isClosed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// outcomeOf says what an error means for a write.
func outcomeOf(err error) fault.Outcome {
	var e *fault.Error
	if errors.As(err, &e) {
		return e.Outcome
	}
	return fault.Unknown
}

// simClient does one operation after the other.
type simClient struct {
	sim   *sim
	id    int
	node  uint64 // that it talked to last
	saw   uint64 // the highest resource version that it was told
	count int
	load  *load
}

// load is what the clients do.
type load struct {
	think    time.Duration // mean pause between two operations
	keys     int
	stopped  bool
	timeouts []time.Duration
	makers   []opMaker // each as likely
}

// opMaker makes one kind of operation.
type opMaker func(c *simClient) *simOp

// addClients starts n clients.
func (s *sim) addClients(n int, l *load) {
	for i := range n {
		c := &simClient{sim: s, id: i + 1, load: l}
		s.after(s.around(l.think), c.next)
	}
}

func (c *simClient) next() {
	if c.load.stopped {
		return
	}
	c.count++
	op := pick(c.sim, c.load.makers)(c)
	op.client, op.invoked = c.id, c.sim.now
	c.sim.history.ops = append(c.sim.history.ops, op)
	c.try(op)
}

// try sends an operation to a node that is a member.
func (c *simClient) try(op *simOp) {
	s := c.sim
	if c.node == 0 || s.chance(0.2) || s.node(c.node).process == nil {
		c.node = pick(s, s.nodes).id
	}
	n := s.node(c.node)
	if _, member := s.check.model.members[n.id]; n.process == nil || !member {
		c.node = 0
		op.err = fault.ErrNotReady
		c.finish(op, opRefused)
		return
	}
	n.process.do(op, pick(s, c.load.timeouts), func(outcome simOutcome, err error) {
		op.err = err
		if outcome == opOpen && op.cmd.Retry.Key != "" && !c.load.stopped && len(op.attempts) < 5 {
			s.after(s.around(c.load.think), func() { c.retry(op) })
			return
		}
		c.finish(op, outcome)
	})
}

// retry tries an operation again that may have happened.
func (c *simClient) retry(op *simOp) {
	s := c.sim
	n := pick(s, s.nodes)
	if _, member := s.check.model.members[n.id]; n.process == nil || !member || c.load.stopped {
		c.finish(op, opOpen)
		return
	}
	n.process.do(op, pick(s, c.load.timeouts), func(outcome simOutcome, err error) {
		op.err = err
		c.finish(op, outcome)
	})
}

func (c *simClient) finish(op *simOp, outcome simOutcome) {
	s := c.sim
	op.outcome, op.returned = outcome, s.now
	if outcome == opDone {
		s.history.acked++
		c.saw = max(c.saw, op.rv, op.result.RV)
	}
	s.record(uint64(c.id), uint64(outcome), op.rv, op.result.RV)
	s.after(s.around(c.load.think), c.next)
}

// The operations. Values are never used twice, so that a read names its write.
// Keys with the same text before a slash are judged together.

const (
	txnGroup      = "txn"    // keys of transactions
	prefixGroup   = "prefix" // keys that are deleted together
	expiringGroup = "ttl"    // keys with a time to live
)

func (c *simClient) value() string { return fmt.Sprintf("c%d-%d", c.id, c.count) }

// key draws a key; the first ones are used more often.
func (c *simClient) key() string {
	r := c.sim.rand.Float64()
	return fmt.Sprintf("k%d", int(r*r*float64(c.load.keys)))
}

func (c *simClient) keyOf(group string) string {
	return fmt.Sprintf("%s/%d", group, c.sim.rand.IntN(4))
}

// anyKey draws a key of any kind.
func (c *simClient) anyKey() string {
	if c.sim.chance(0.7) {
		return c.key()
	}
	return c.keyOf(pick(c.sim, []string{txnGroup, prefixGroup, expiringGroup}))
}

func makePut(c *simClient) *simOp {
	op := &simOp{cmd: store.Command{Op: store.OpPut, Key: c.key(), Value: c.value()}}
	if c.sim.check.model.level >= 3 && c.sim.chance(0.3) {
		op.cmd.ContentType = pick(c.sim, []string{"text/plain", "application/json"})
	}
	return op
}

func makeDelete(c *simClient) *simOp {
	return &simOp{cmd: store.Command{Op: store.OpDelete, Key: c.key()}}
}

// makeConditional makes a write that is carried out only if its key is as the
// client believes.
func makeConditional(c *simClient) *simOp {
	op := makePut(c)
	if c.sim.chance(0.3) {
		op = makeDelete(c)
	}
	kind := pick(c.sim, []store.ConditionKind{store.IfMatch, store.IfMatch, store.IfExists, store.IfAbsent})
	op.cmd.Condition = store.Condition{Kind: kind}
	if kind == store.IfMatch {
		it, _ := c.sim.check.model.get(op.cmd.Key, c.saw)
		op.cmd.Condition.RV = it.RV
	}
	return op
}

// makeRetried makes a write that the client repeats until it has an answer.
func makeRetried(c *simClient) *simOp {
	op := pick(c.sim, []opMaker{makePut, makeDelete, makeConditional, makeTxn})(c)
	if c.sim.clocksWrong && c.sim.check.model.level < 2 {
		return op // one clock makes all that was remembered too old
	}
	op.cmd.Retry = store.RetryID{Key: "retry-" + c.value()}
	op.cmd.Retry.Digest[0] = byte(c.count)
	if c.sim.check.model.level >= 3 {
		op.cmd.Retry.Client = uint64(1 + c.sim.rand.IntN(2))
	}
	return op
}

func makeTxn(c *simClient) *simOp {
	t := store.Txn{}
	for range c.sim.rand.IntN(3) {
		key := c.keyOf(txnGroup)
		it, _ := c.sim.check.model.get(key, c.saw)
		t.Compare = append(t.Compare, store.Comparison{
			Kind: store.ComparisonKind(1 + c.sim.rand.IntN(5)), Key: key, RV: it.RV, Value: it.Value,
		})
	}
	for _, ops := range []*[]store.Command{&t.Then, &t.Otherwise} {
		for i := range 1 + c.sim.rand.IntN(3) {
			op := store.Command{Op: pick(c.sim, []store.Op{store.OpPut, store.OpPut, store.OpDelete, store.OpGet}), Key: c.keyOf(txnGroup)}
			if op.Op == store.OpPut {
				op.Value = fmt.Sprintf("%s-%d-%d", c.value(), len(t.Then), i)
				if c.sim.check.model.level >= 3 && c.sim.chance(0.3) {
					op.ContentType = "text/plain"
				}
			}
			*ops = append(*ops, op)
		}
	}
	return &simOp{cmd: store.Command{Op: store.OpTxn, Key: txnGroup, Value: t.Encode()}}
}

func makePutExpiring(c *simClient) *simOp {
	op := &simOp{cmd: store.Command{Op: store.OpPut, Key: c.keyOf(expiringGroup), Value: c.value()}}
	ttl := c.sim.around(2 * time.Second)
	if op.cmd.Expires = simEpoch.Add(c.sim.now + ttl).UnixMilli(); c.sim.check.model.level >= 2 && c.sim.chance(0.5) {
		op.cmd.Expires, op.cmd.TTL = 0, max(1, ttl.Milliseconds())
	}
	return op
}

// makePutLarge makes a value of up to 1 MiB. All are of one key, which the next
// write makes small again most of the time.
func makePutLarge(c *simClient) *simOp {
	op := &simOp{cmd: store.Command{Op: store.OpPut, Key: "large", Value: c.value()}}
	if c.sim.chance(0.2) {
		op.cmd.Value += strings.Repeat("x", c.sim.rand.IntN(store.ValueSizeMaxDefault-len(op.cmd.Value)))
	}
	return op
}

func makePutPrefixed(c *simClient) *simOp {
	return &simOp{cmd: store.Command{Op: store.OpPut, Key: c.keyOf(prefixGroup), Value: c.value()}}
}

func makeDeletePrefix(c *simClient) *simOp {
	return &simOp{cmd: store.Command{Op: store.OpDeletePrefix, Key: prefixGroup + "/"}}
}

func makeGet(c *simClient) *simOp {
	return &simOp{read: readLatest, cmd: store.Command{Key: c.anyKey()}}
}

func makeGetAtLeast(c *simClient) *simOp {
	return &simOp{read: readAtLeast, cmd: store.Command{Key: c.anyKey()}, atLeast: c.saw}
}

func makeGetWhatever(c *simClient) *simOp {
	return &simOp{read: readWhatever, cmd: store.Command{Key: c.anyKey()}}
}

func makeList(c *simClient) *simOp {
	op := pick(c.sim, []opMaker{makeGet, makeGetAtLeast, makeGetWhatever})(c)
	op.list, op.cmd.Key = true, pick(c.sim, []string{"", txnGroup, prefixGroup, expiringGroup})
	return op
}

// opMakers are all operations; those that are here twice are twice as frequent.
var opMakers = []opMaker{
	makePut, makePut, makePut, makePut, makeDelete, makeConditional, makeConditional, makeRetried, makeTxn, makeTxn,
	makePutExpiring, makePutPrefixed, makePutPrefixed, makeDeletePrefix,
	makeGet, makeGet, makeGet, makeGet, makeGet, makeGetAtLeast, makeGetAtLeast, makeGetWhatever, makeList,
}
