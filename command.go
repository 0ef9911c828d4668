package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// This file says what is replicated: the bytes of one raft log entry.
//
// An entry holds one batch: a fixed header followed by commands.
//
//	format   1 byte    batchFormat
//	session  8 bytes   little endian, random, one per process lifetime
//	seq      8 bytes   little endian, 1, 2, 3 ... within the session
//	time     8 bytes   little endian, unix milliseconds at the proposer
//	command  op and flags (1 byte each), key and value (uvarint length +
//	         bytes), then the fields that its flags announce, in their order
//
// A batch may be proposed more than once, since a proposal that is forwarded
// to a dying leader is lost without a word. The pair (session, seq) is how the
// state machine applies it once.

const (
	batchFormat     = 1
	batchHeaderSize = 1 + 8 + 8 + 8
)

// Limits of what one request may carry. A larger value costs every member's
// memory and stalls the batches behind it.
const (
	keySizeMax            = 4096     // bytes
	valueSizeMaxDefault   = 1 << 20  // bytes
	valueSizeLimit        = 16 << 20 // bytes: what may be configured
	idempotencyKeySizeMax = 255      // bytes
	contentTypeSizeMax    = 255      // bytes
	txnOpsMax             = 128      // conditions, and operations of each branch
)

// batchEventsMax bounds the events of one batch, so that they stay within half of
// the default window: watchers can read one batch before the next makes them leave.
const batchEventsMax = eventsMaxDefault / 2

// op is the kind of a command. The numbers are on disk: never reuse one.
type op byte

const (
	opNop    op = 0 // a command that was withdrawn before it was proposed
	opPut    op = 1
	opDelete op = 2
	// opMember says who a member is, beside a configuration change, or alone to
	// update what is known of one. Its value is a JSON encoded member.
	opMember op = 3
	// opExpire deletes a key whose time has come, unless it was written since;
	// condition holds the version that expires. Leaders propose it.
	opExpire       op = 4
	opDeletePrefix op = 5 // key is the prefix
	opTxn          op = 6 // value is an encoded txn
	opGet          op = 7 // only inside a transaction
	// opRefuse is what a leader puts in the place of a configuration change that
	// it must not make, so that its proposer learns why: value says it.
	opRefuse op = 8
	opLevel  op = 9 // raises the feature level; value is an encoded raising
)

// command is one write. Everything that apply needs rides in it, so that apply
// is a pure function: no clock, no randomness.
type command struct {
	op        op
	key       string
	value     string
	expires   int64 // unix milliseconds; 0 = never
	ttl       int64 // milliseconds from the time of the entry on, in the place of expires; from level 2 on
	condition condition
	retry     retryID

	contentType string // of the value; empty = not said; from level 3 on
}

// deadline returns when what a command puts expires, in unix milliseconds; 0 = never.
func (c *command) deadline(now int64) int64 {
	if c.ttl != 0 {
		return now + c.ttl
	}
	return c.expires
}

// condition is what must hold of the key, or the command does nothing.
type condition struct {
	kind conditionKind
	rv   uint64 // for ifMatch
}

type conditionKind byte

const (
	always   conditionKind = 0
	ifMatch  conditionKind = 1 // the key exists at version rv
	ifExists conditionKind = 2
	ifAbsent conditionKind = 3

	conditionsKnown = ifAbsent // the last one
)

func (c condition) holds(it item, exists bool) bool {
	switch c.kind {
	case ifMatch:
		return exists && it.rv == c.rv
	case ifExists:
		return exists
	case ifAbsent:
		return !exists
	default:
		return true
	}
}

// retryID names a request that a client may send again: the Idempotency-Key and
// a digest of the request, so that the same key with another request is noticed.
type retryID struct {
	key    string // empty = none
	digest [16]byte
	client uint64 // who sent it, see retries.go; 0 = not known; from level 3 on
}

// Flags of an encoded command: which optional fields follow.
const (
	flagExpires   = 1 << 0
	flagCondition = 1 << 1
	flagRetry     = 1 << 2
	flagTTL       = 1 << 3
	flagType      = 1 << 4
	flagClient    = 1 << 5 // with flagRetry
	flagsKnown    = flagExpires | flagCondition | flagRetry | flagTTL | flagType | flagClient

	flagsLevel2 = flagTTL // that members know from level 2 on
	flagsLevel3 = flagType | flagClient
)

// grammar is what an op may come with. Anything else was written by a newer
// program, to which it means something: it is refused in whole. To carry out the
// rest, as if the unknown part were not there, would be another write than the
// other members make.
type grammar struct {
	level      int // from which on members know the op; 0 = it stands for no command
	flags      byte
	inTxn      bool
	flagsInTxn byte
}

var grammars = [...]grammar{
	opNop:          {level: 1, flags: flagsKnown}, // of whatever command it was before
	opPut:          {level: 1, flags: flagsKnown, inTxn: true, flagsInTxn: flagExpires | flagTTL | flagType},
	opDelete:       {level: 1, flags: flagCondition | flagRetry | flagClient, inTxn: true},
	opMember:       {level: 1},
	opExpire:       {level: 1, flags: flagCondition},
	opDeletePrefix: {level: 1, flags: flagRetry | flagClient},
	opTxn:          {level: 1, flags: flagRetry | flagClient},
	opGet:          {inTxn: true},
	opRefuse:       {level: 1},
	opLevel:        {level: 1}, // proposed when nobody is left who does not know it
}

// grammarOf returns the zero grammar for an op that is not known.
func grammarOf(o op) (g grammar) {
	if int(o) < len(grammars) {
		g = grammars[o]
	}
	return g
}

var (
	errMalformed = errors.New("malformed command")
	errNewer     = errors.New("newer than this program: upgrade this node to the version that the others run")
)

// newer is the error for a part of an entry that this program does not know.
func newer(part string, n uint64) error { return fmt.Errorf("%s %d is %w", part, n, errNewer) }

// appendTo appends the encoded command to buf.
func (c *command) appendTo(buf []byte) []byte {
	flags := byte(0)
	if c.expires != 0 {
		flags |= flagExpires
	}
	if c.condition.kind != always {
		flags |= flagCondition
	}
	if c.retry.key != "" {
		flags |= flagRetry
	}
	if c.ttl != 0 {
		flags |= flagTTL
	}
	if c.contentType != "" {
		flags |= flagType
	}
	if c.retry.client != 0 {
		flags |= flagClient
	}
	buf = append(buf, byte(c.op), flags)
	buf = appendString(buf, c.key)
	buf = appendString(buf, c.value)
	if flags&flagExpires != 0 {
		buf = binary.AppendUvarint(buf, uint64(c.expires))
	}
	if flags&flagCondition != 0 {
		buf = append(buf, byte(c.condition.kind))
		buf = binary.AppendUvarint(buf, c.condition.rv)
	}
	if flags&flagRetry != 0 {
		buf = appendString(buf, c.retry.key)
		buf = append(buf, c.retry.digest[:]...)
	}
	if flags&flagTTL != 0 {
		buf = binary.AppendUvarint(buf, uint64(c.ttl))
	}
	if flags&flagType != 0 {
		buf = appendString(buf, c.contentType)
	}
	if flags&flagClient != 0 {
		buf = binary.AppendUvarint(buf, c.retry.client)
	}
	return buf
}

// encodedSizeMax bounds the bytes that appendTo adds.
func (c *command) encodedSizeMax() int {
	const fixed = 2 + 1 + len(c.retry.digest) + 8*binary.MaxVarintLen64
	return fixed + len(c.key) + len(c.value) + len(c.retry.key) + len(c.contentType)
}

// eventsMax bounds the events that a command makes.
func (c *command) eventsMax() int {
	switch c.op {
	case opPut, opDelete, opExpire:
		return 2 // it may find a key that has to expire first
	case opTxn:
		const operation = 5 // bytes that a condition or an operation takes at least
		return 2 * min(len(c.value)/operation, 3*txnOpsMax)
	case opDeletePrefix:
		return batchEventsMax // so it has a batch for itself
	default:
		return 0
	}
}

// decodeCommand reads one command from the front of data and returns the rest.
// The command owns its memory: it does not keep data alive. What it returns
// without an error is known in all its parts.
func decodeCommand(data []byte) (command, []byte, error) {
	d := fields{data: data}
	v := d.command(false)
	return v.command(), d.data, d.err
}

// checkCommands says whether all commands of a batch can be read, and may be
// proposed: they are not above a feature level, and within the limits of what a
// request may carry. It copies nothing.
func checkCommands(data []byte, level int) error {
	d := fields{data: data, strict: true}
	for n := 1; len(d.data) > 0; n++ {
		v := d.command(false)
		if d.err != nil {
			return fmt.Errorf("command %d: %w", n, d.err)
		}
		if need := v.level; need > level {
			return fmt.Errorf("command %d: the cluster is at feature level %d, and this needs %d", n, level, need)
		}
	}
	return nil
}

// commandView is a command that was read and lies in the bytes it was read from.
type commandView struct {
	op               op
	level            int // from which on all of it is known
	key, value       []byte
	expires, ttl     int64
	condition        condition
	retryKey, digest []byte
	client           uint64
	contentType      []byte
}

// command returns a copy.
func (v *commandView) command() command {
	c := command{op: v.op, key: string(v.key), value: string(v.value), expires: v.expires, ttl: v.ttl, condition: v.condition}
	c.retry.key, c.retry.client, c.contentType = string(v.retryKey), v.client, string(v.contentType)
	copy(c.retry.digest[:], v.digest)
	return c
}

// command reads a command and checks all of it, also what is encoded in its value.
func (d *fields) command(inTxn bool) commandView {
	v := d.outerCommand(inTxn)
	if d.err == nil {
		d.fail(v.checkValue(d.strict))
	}
	if d.err != nil {
		return commandView{}
	}
	return v
}

// outerCommand is command for who looks into the value by itself.
func (d *fields) outerCommand(inTxn bool) commandView {
	v := commandView{op: op(d.byte())}
	flags := d.byte()
	g := grammarOf(v.op)
	allowed, known := g.flags, g.level > 0
	if inTxn {
		allowed, known = g.flagsInTxn, g.inTxn
	}
	switch {
	case d.err != nil:
	case !known:
		d.fail(newer("command", uint64(v.op)))
	case flags&^allowed != 0:
		d.fail(newer(fmt.Sprintf("command %d with flags", v.op), uint64(flags)))
	}
	if v.level = g.level; flags&flagsLevel2 != 0 {
		v.level = max(v.level, 2)
	}
	if flags&flagsLevel3 != 0 {
		v.level = max(v.level, 3)
	}
	v.key, v.value = d.view(), d.view()
	if flags&flagExpires != 0 {
		v.expires = int64(d.uint())
	}
	if flags&flagCondition != 0 {
		v.condition = condition{kind: conditionKind(d.byte()), rv: d.uint()}
		if v.condition.kind > conditionsKnown {
			d.fail(newer("condition", uint64(v.condition.kind)))
		}
	}
	if flags&flagRetry != 0 {
		v.retryKey, v.digest = d.view(), d.bytes(len(command{}.retry.digest))
	}
	if flags&flagTTL != 0 {
		v.ttl = int64(d.uint())
	}
	if flags&flagType != 0 {
		v.contentType = d.view()
	}
	if flags&flagClient != 0 {
		v.client = d.uint()
	}
	return v
}

// checkValue checks a value that has an encoding of its own, and of which level
// it is, and the limits if it is strict.
func (v *commandView) checkValue(strict bool) error {
	if strict && (len(v.key) > keySizeMax || len(v.retryKey) > idempotencyKeySizeMax || v.op == opPut && len(v.value) > valueSizeLimit) {
		return fmt.Errorf("%w: a key of %d bytes and a value of %d", errMalformed, len(v.key), len(v.value))
	}
	if strict && len(v.contentType) > 0 && !isContentType(string(v.contentType)) {
		return fmt.Errorf("%w: content type %.50q", errMalformed, v.contentType)
	}
	switch v.op {
	case opTxn:
		d := fields{data: v.value, strict: strict}
		d.txn(func(*comparisonView) {}, func(_ int, o *commandView) { v.level = max(v.level, o.level) })
		return d.err
	case opMember:
		m, err := decodeMember(v.value)
		if err == nil && strict {
			err = m.check()
		}
		return err
	case opLevel:
		_, err := decodeRaising(v.value)
		return err
	default:
		return nil
	}
}

// isContentType says whether this may be kept as the content type of a value: a
// kind and its subtype, perhaps with parameters, that can be the value of a header
// as it is. Each member asks that of each put, so it looks no closer.
func isContentType(s string) bool {
	slash := strings.IndexByte(s, '/')
	return slash > 0 && slash < len(s)-1 && len(s) <= contentTypeSizeMax && !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' }) && strings.TrimSpace(s) == s
}

func appendString(buf []byte, s string) []byte {
	buf = binary.AppendUvarint(buf, uint64(len(s)))
	return append(buf, s...)
}

// fields reads what the append functions wrote. After an error all fields are
// zero.
type fields struct {
	data []byte
	err  error
	// strict refuses what was too large to propose, too. What is in the log is
	// applied nevertheless.
	strict bool
}

func (d *fields) bytes(n int) []byte {
	if n < 0 || n > len(d.data) {
		d.fail(errMalformed)
	}
	if d.err != nil {
		return nil
	}
	b := d.data[:n]
	d.data = d.data[n:]
	return b
}

func (d *fields) byte() byte {
	if b := d.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *fields) uint() uint64 {
	v, n := binary.Uvarint(d.data)
	if n <= 0 {
		n = len(d.data) + 1 // an error
	}
	if d.bytes(n) == nil {
		return 0
	}
	return v
}

// view reads what appendString wrote, without a copy.
func (d *fields) view() []byte {
	n := d.uint()
	return d.bytes(int(min(n, uint64(len(d.data))+1)))
}

// fail notes the first error.
func (d *fields) fail(err error) {
	if d.err == nil && err != nil {
		d.data, d.err = nil, err
	}
}

// txn is a transaction: if all comparisons hold the operations of then are
// carried out, otherwise those of otherwise. All of them get one version.
type txn struct {
	compare   []comparison
	then      []command // opPut, opDelete, opGet
	otherwise []command
}

// branch returns the operations that were carried out.
func (t *txn) branch(came status) []command {
	if came == statusFailed {
		return t.otherwise
	}
	return t.then
}

// comparison is one condition of a transaction.
type comparison struct {
	kind  comparisonKind
	key   string
	rv    uint64 // of byVersion and byCreated; 0 = the key does not exist
	value string // of byValue
}

type comparisonKind byte

const (
	byVersion comparisonKind = 1
	byCreated comparisonKind = 2
	byExists  comparisonKind = 3
	byAbsent  comparisonKind = 4
	byValue   comparisonKind = 5

	comparisonsKnown = byValue // the last one
)

func (c *comparison) holds(it item, exists bool) bool {
	switch c.kind {
	case byVersion:
		return it.rv == c.rv // a missing item has version 0
	case byCreated:
		return it.created == c.rv
	case byExists:
		return exists
	case byAbsent:
		return !exists
	case byValue:
		return exists && it.value == c.value
	default:
		return false
	}
}

// encode returns the transaction as the value of an opTxn command.
func (t *txn) encode() string {
	buf := binary.AppendUvarint(nil, uint64(len(t.compare)))
	for _, c := range t.compare {
		buf = append(buf, byte(c.kind))
		buf = appendString(buf, c.key)
		buf = binary.AppendUvarint(buf, c.rv)
		buf = appendString(buf, c.value)
	}
	for _, ops := range [][]command{t.then, t.otherwise} {
		buf = binary.AppendUvarint(buf, uint64(len(ops)))
		for i := range ops {
			buf = ops[i].appendTo(buf)
		}
	}
	return string(buf)
}

func decodeTxn[T string | []byte](value T) (txn, error) {
	t, _, err := decodeTxnLevel([]byte(value))
	return t, err
}

// decodeTxnLevel also says from which level on all of it is known.
func decodeTxnLevel(value []byte) (t txn, level int, err error) {
	d := fields{data: value}
	d.txn(func(c *comparisonView) {
		t.compare = append(t.compare, comparison{kind: c.kind, key: string(c.key), rv: c.rv, value: string(c.value)})
	}, func(branch int, v *commandView) {
		ops := []*[]command{&t.then, &t.otherwise}[branch]
		*ops = append(*ops, v.command())
		level = max(level, v.level)
	})
	if d.err != nil {
		return txn{}, 0, d.err
	}
	return t, level, nil
}

// comparisonView is a comparison that lies in the bytes it was read from.
type comparisonView struct {
	kind       comparisonKind
	key, value []byte
	rv         uint64
}

// txn reads a transaction and checks all of it. Branch 0 is then, 1 otherwise.
func (d *fields) txn(compare func(*comparisonView), do func(branch int, v *commandView)) {
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		c := comparisonView{kind: comparisonKind(d.byte()), key: d.view(), rv: d.uint(), value: d.view()}
		if d.err == nil && d.strict && len(c.key) > keySizeMax {
			d.fail(fmt.Errorf("%w: a key of %d bytes", errMalformed, len(c.key)))
		}
		if d.err == nil && (c.kind == 0 || c.kind > comparisonsKnown) {
			d.fail(newer("comparison", uint64(c.kind)))
		}
		if d.err == nil {
			compare(&c)
		}
	}
	for branch := range 2 {
		for n := d.uint(); n > 0 && d.err == nil; n-- {
			if v := d.command(true); d.err == nil {
				do(branch, &v)
			}
		}
	}
	if d.err == nil && len(d.data) > 0 {
		d.fail(newer("a transaction with more bytes:", uint64(len(d.data))))
	}
}

// batchHeader identifies a batch and says when it was proposed.
type batchHeader struct {
	session uint64
	seq     uint64
	time    int64 // unix milliseconds at the proposer
}

// put writes the header over the first batchHeaderSize bytes of data.
func (h batchHeader) put(data []byte) {
	data[0] = batchFormat
	binary.LittleEndian.PutUint64(data[1:], h.session)
	binary.LittleEndian.PutUint64(data[9:], h.seq)
	binary.LittleEndian.PutUint64(data[17:], uint64(h.time))
}

// decodeBatch splits an entry into its header and its encoded commands.
func decodeBatch(data []byte) (batchHeader, []byte, error) {
	if len(data) < batchHeaderSize {
		return batchHeader{}, nil, fmt.Errorf("%w: entry of %d bytes", errMalformed, len(data))
	}
	if data[0] != batchFormat {
		return batchHeader{}, nil, fmt.Errorf("entry format %d is newer than this program (knows %d): upgrade it", data[0], batchFormat)
	}
	return batchHeader{
		session: binary.LittleEndian.Uint64(data[1:]),
		seq:     binary.LittleEndian.Uint64(data[9:]),
		time:    int64(binary.LittleEndian.Uint64(data[17:])),
	}, data[batchHeaderSize:], nil
}

// status is what applying a command came to. The numbers are in snapshots.
type status byte

const (
	statusNone     status = 0 // withdrawn, or not applied yet
	statusCreated  status = 1 // the key did not exist
	statusReplaced status = 2 // the key existed
	statusDeleted  status = 3
	// Nothing changed and no resource version was taken:
	statusNotFound     status = 4
	statusPrecondition status = 5 // the condition did not hold
	statusRetryOther   status = 6 // the Idempotency-Key was used for another request
	statusTooMany      status = 7 // more keys under a prefix than one command deletes
	// Of transactions:
	statusSucceeded status = 8 // then was carried out
	statusFailed    status = 9 // otherwise was carried out
	statusFound     status = 10

	statusRefused status = 11 // a configuration change; key says why
)

// result is the answer to one command.
type result struct {
	status   status
	rv       uint64 // the write's resource version, or the store's if nothing changed
	current  uint64 // of statusPrecondition: the key's version, 0 if it does not exist
	count    uint64 // of a deleted prefix: keys
	key      string // the key that was written, which a retry may not know
	replayed bool   // the command was a retry and this is the first answer
	ops      []opResult
}

// opResult is the answer to one operation of a transaction.
type opResult struct {
	status status
	item   item // of opGet
}
