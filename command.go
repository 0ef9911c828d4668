package main

import (
	"encoding/binary"
	"errors"
	"fmt"
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
//	         bytes), then the fields that its flags announce
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
	keySizeMax            = 4096    // bytes
	valueSizeMaxDefault   = 1 << 20 // bytes
	idempotencyKeySizeMax = 255     // bytes
	txnOpsMax             = 128     // conditions, and operations of each branch
)

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
)

// command is one write. Everything that apply needs rides in it, so that apply
// is a pure function: no clock, no randomness.
type command struct {
	op        op
	key       string
	value     string
	expires   int64 // unix milliseconds; 0 = never
	condition condition
	retry     retryID
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
}

// Flags of an encoded command: which optional fields follow.
const (
	flagExpires   = 1 << 0
	flagCondition = 1 << 1
	flagRetry     = 1 << 2
	flagsKnown    = flagExpires | flagCondition | flagRetry
)

var errMalformed = errors.New("malformed command")

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
	return buf
}

// encodedSizeMax bounds the bytes that appendTo adds.
func (c *command) encodedSizeMax() int {
	const fixed = 2 + 1 + len(c.retry.digest) + 5*binary.MaxVarintLen64
	return fixed + len(c.key) + len(c.value) + len(c.retry.key)
}

// decodeCommand reads one command from the front of data and returns the rest.
// The command owns its memory: it does not keep data alive.
func decodeCommand(data []byte) (command, []byte, error) {
	d := fields{data: data}
	c := command{op: op(d.byte())}
	flags := d.byte()
	if flags&^flagsKnown != 0 {
		return command{}, nil, fmt.Errorf("%w: unknown flags %#x", errMalformed, flags)
	}
	c.key = d.string()
	c.value = d.string()
	if flags&flagExpires != 0 {
		c.expires = int64(d.uint())
	}
	if flags&flagCondition != 0 {
		c.condition = condition{kind: conditionKind(d.byte()), rv: d.uint()}
	}
	if flags&flagRetry != 0 {
		c.retry.key = d.string()
		copy(c.retry.digest[:], d.bytes(len(c.retry.digest)))
	}
	return c, d.data, d.err
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
}

func (d *fields) bytes(n int) []byte {
	if d.err != nil || n < 0 || n > len(d.data) {
		d.data, d.err = nil, errMalformed
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

func (d *fields) string() string {
	n := d.uint()
	return string(d.bytes(int(min(n, uint64(len(d.data))+1))))
}

// txn is a transaction: if all comparisons hold the operations of then are
// carried out, otherwise those of otherwise. All of them get one version.
type txn struct {
	compare   []comparison
	then      []command // opPut, opDelete, opGet
	otherwise []command
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

func decodeTxn(value string) (txn, error) {
	var t txn
	d := fields{data: []byte(value)}
	for n := d.uint(); n > 0 && d.err == nil; n-- {
		t.compare = append(t.compare, comparison{kind: comparisonKind(d.byte()), key: d.string(), rv: d.uint(), value: d.string()})
	}
	for _, ops := range []*[]command{&t.then, &t.otherwise} {
		for n := d.uint(); n > 0 && d.err == nil; n-- {
			var c command
			c, d.data, d.err = decodeCommand(d.data)
			*ops = append(*ops, c)
		}
	}
	return t, d.err
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
