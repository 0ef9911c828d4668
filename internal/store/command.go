package store

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
	BatchHeaderSize = 1 + 8 + 8 + 8
)

// Limits of what one request may carry. A larger value costs every member's
// memory and stalls the batches behind it.
const (
	KeySizeMax            = 4096     // bytes
	ValueSizeMaxDefault   = 1 << 20  // bytes
	ValueSizeLimit        = 16 << 20 // bytes: what may be configured
	IdempotencyKeySizeMax = 255      // bytes
	ContentTypeSizeMax    = 255      // bytes
	TxnOpsMax             = 128      // conditions, and operations of each branch
)

// BatchEventsMax bounds the events of one batch, so that they stay within half of
// the default window: watchers can read one batch before the next makes them leave.
const BatchEventsMax = EventsMaxDefault / 2

// Op is the kind of a command. The numbers are on disk: never reuse one.
type Op byte

const (
	OpNop    Op = 0 // a command that was withdrawn before it was proposed
	OpPut    Op = 1
	OpDelete Op = 2
	// OpMember says who a member is, beside a configuration change, or alone to
	// update what is known of one. Its value is a JSON encoded member.
	OpMember Op = 3
	// OpExpire deletes a key whose time has come, unless it was written since;
	// condition holds the version that expires. Leaders propose it.
	OpExpire       Op = 4
	OpDeletePrefix Op = 5 // key is the prefix
	OpTxn          Op = 6 // value is an encoded txn
	OpGet          Op = 7 // only inside a transaction
	// OpRefuse is what a leader puts in the place of a configuration change that
	// it must not make, so that its proposer learns why: value says it.
	OpRefuse Op = 8
	OpLevel  Op = 9 // raises the feature level; value is an encoded raising
)

// Command is one write. Everything that apply needs rides in it, so that apply
// is a pure function: no clock, no randomness.
type Command struct {
	Op        Op
	Key       string
	Value     string
	Expires   int64 // unix milliseconds; 0 = never
	TTL       int64 // milliseconds from the time of the entry on, in the place of expires; from level 2 on
	Condition Condition
	Retry     RetryID

	ContentType string // of the value; empty = not said; from level 3 on
}

// Deadline returns when what a command puts expires, in unix milliseconds; 0 = never.
func (c *Command) Deadline(now int64) int64 {
	if c.TTL != 0 {
		return now + c.TTL
	}
	return c.Expires
}

// Condition is what must hold of the key, or the command does nothing.
type Condition struct {
	Kind ConditionKind
	RV   uint64 // for ifMatch
}

type ConditionKind byte

const (
	Always   ConditionKind = 0
	IfMatch  ConditionKind = 1 // the key exists at version rv
	IfExists ConditionKind = 2
	IfAbsent ConditionKind = 3

	conditionsKnown = IfAbsent // the last one
)

func (c Condition) Holds(it Item, exists bool) bool {
	switch c.Kind {
	case IfMatch:
		return exists && it.RV == c.RV
	case IfExists:
		return exists
	case IfAbsent:
		return !exists
	default:
		return true
	}
}

// RetryID names a request that a client may send again: the Idempotency-Key and
// a digest of the request, so that the same key with another request is noticed.
type RetryID struct {
	Key    string // empty = none
	Digest [16]byte
	Client uint64 // who sent it, see idempotency.go; 0 = not known; from level 3 on
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
// program, to which it means something, so the whole command is refused. To carry
// out the rest of it would be another write than the one that other members make.
type grammar struct {
	level      int // from which on members know the op; 0 = it stands for no command
	flags      byte
	inTxn      bool
	flagsInTxn byte
}

var grammars = [...]grammar{
	OpNop:          {level: 1, flags: flagsKnown}, // of whatever command it was before
	OpPut:          {level: 1, flags: flagsKnown, inTxn: true, flagsInTxn: flagExpires | flagTTL | flagType},
	OpDelete:       {level: 1, flags: flagCondition | flagRetry | flagClient, inTxn: true},
	OpMember:       {level: 1},
	OpExpire:       {level: 1, flags: flagCondition},
	OpDeletePrefix: {level: 1, flags: flagRetry | flagClient},
	OpTxn:          {level: 1, flags: flagRetry | flagClient},
	OpGet:          {inTxn: true},
	OpRefuse:       {level: 1},
	OpLevel:        {level: 1}, // proposed when nobody is left who does not know it
}

// grammarOf returns the zero grammar for an op that is not known.
func grammarOf(o Op) (g grammar) {
	if int(o) < len(grammars) {
		g = grammars[o]
	}
	return g
}

var (
	ErrMalformed = errors.New("malformed command")
	ErrNewer     = errors.New("newer than this program: upgrade this node to the version that the others run")
)

// Newer is the error for a part of an entry that this program does not know.
func Newer(part string, n uint64) error { return fmt.Errorf("%s %d is %w", part, n, ErrNewer) }

// AppendTo appends the encoded command to buf.
func (c *Command) AppendTo(buf []byte) []byte {
	flags := byte(0)
	if c.Expires != 0 {
		flags |= flagExpires
	}
	if c.Condition.Kind != Always {
		flags |= flagCondition
	}
	if c.Retry.Key != "" {
		flags |= flagRetry
	}
	if c.TTL != 0 {
		flags |= flagTTL
	}
	if c.ContentType != "" {
		flags |= flagType
	}
	if c.Retry.Client != 0 {
		flags |= flagClient
	}
	buf = append(buf, byte(c.Op), flags)
	buf = appendString(buf, c.Key)
	buf = appendString(buf, c.Value)
	if flags&flagExpires != 0 {
		buf = binary.AppendUvarint(buf, uint64(c.Expires))
	}
	if flags&flagCondition != 0 {
		buf = append(buf, byte(c.Condition.Kind))
		buf = binary.AppendUvarint(buf, c.Condition.RV)
	}
	if flags&flagRetry != 0 {
		buf = appendString(buf, c.Retry.Key)
		buf = append(buf, c.Retry.Digest[:]...)
	}
	if flags&flagTTL != 0 {
		buf = binary.AppendUvarint(buf, uint64(c.TTL))
	}
	if flags&flagType != 0 {
		buf = appendString(buf, c.ContentType)
	}
	if flags&flagClient != 0 {
		buf = binary.AppendUvarint(buf, c.Retry.Client)
	}
	return buf
}

// EncodedSizeMax bounds the bytes that appendTo adds.
func (c *Command) EncodedSizeMax() int {
	const fixed = 2 + 1 + len(c.Retry.Digest) + 8*binary.MaxVarintLen64
	return fixed + len(c.Key) + len(c.Value) + len(c.Retry.Key) + len(c.ContentType)
}

// EventsMax bounds the events that a command makes.
func (c *Command) EventsMax() int {
	switch c.Op {
	case OpPut, OpDelete, OpExpire:
		return 2 // it may find a key that has to expire first
	case OpTxn:
		const operation = 5 // bytes that a condition or an operation takes at least
		return 2 * min(len(c.Value)/operation, 3*TxnOpsMax)
	case OpDeletePrefix:
		return BatchEventsMax // so it has a batch for itself
	default:
		return 0
	}
}

// DecodeCommand reads one command from the front of data and returns the rest.
// The command owns its memory: it does not keep data alive. What it returns
// without an error is known in all its parts.
func DecodeCommand(data []byte) (Command, []byte, error) {
	d := Fields{Data: data}
	v := d.Command(false)
	return v.command(), d.Data, d.Err
}

// CheckCommands says whether all commands of a batch can be read, and may be
// proposed: they are not above a feature level, and within the limits of what a
// request may carry. It copies nothing.
func CheckCommands(data []byte, level int) error {
	d := Fields{Data: data, strict: true}
	for n := 1; len(d.Data) > 0; n++ {
		v := d.Command(false)
		if d.Err != nil {
			return fmt.Errorf("command %d: %w", n, d.Err)
		}
		if need := v.level; need > level {
			return fmt.Errorf("command %d: the cluster is at feature level %d, and this needs %d", n, level, need)
		}
	}
	return nil
}

// commandView is a command that was read and lies in the bytes it was read from.
type commandView struct {
	op               Op
	level            int // from which on all of it is known
	key, value       []byte
	expires, ttl     int64
	condition        Condition
	retryKey, digest []byte
	client           uint64
	contentType      []byte
}

// command returns a copy.
func (v *commandView) command() Command {
	c := Command{Op: v.op, Key: string(v.key), Value: string(v.value), Expires: v.expires, TTL: v.ttl, Condition: v.condition}
	c.Retry.Key, c.Retry.Client, c.ContentType = string(v.retryKey), v.client, string(v.contentType)
	copy(c.Retry.Digest[:], v.digest)
	return c
}

// Command reads a command and checks all of it, also what is encoded in its value.
func (d *Fields) Command(inTxn bool) commandView {
	v := d.outerCommand(inTxn)
	if d.Err == nil {
		d.fail(v.checkValue(d.strict))
	}
	if d.Err != nil {
		return commandView{}
	}
	return v
}

// outerCommand is command for who looks into the value by itself.
func (d *Fields) outerCommand(inTxn bool) commandView {
	v := commandView{op: Op(d.byte())}
	flags := d.byte()
	g := grammarOf(v.op)
	allowed, known := g.flags, g.level > 0
	if inTxn {
		allowed, known = g.flagsInTxn, g.inTxn
	}
	switch {
	case d.Err != nil:
	case !known:
		d.fail(Newer("command", uint64(v.op)))
	case flags&^allowed != 0:
		d.fail(Newer(fmt.Sprintf("command %d with flags", v.op), uint64(flags)))
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
		v.condition = Condition{Kind: ConditionKind(d.byte()), RV: d.uint()}
		if v.condition.Kind > conditionsKnown {
			d.fail(Newer("condition", uint64(v.condition.Kind)))
		}
	}
	if flags&flagRetry != 0 {
		v.retryKey, v.digest = d.view(), d.bytes(len(Command{}.Retry.Digest))
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
	if strict && (len(v.key) > KeySizeMax || len(v.retryKey) > IdempotencyKeySizeMax || v.op == OpPut && len(v.value) > ValueSizeLimit) {
		return fmt.Errorf("%w: a key of %d bytes and a value of %d", ErrMalformed, len(v.key), len(v.value))
	}
	if strict && len(v.contentType) > 0 && !IsContentType(string(v.contentType)) {
		return fmt.Errorf("%w: content type %.50q", ErrMalformed, v.contentType)
	}
	switch v.op {
	case OpTxn:
		d := Fields{Data: v.value, strict: strict}
		d.txn(func(*comparisonView) {}, func(_ int, o *commandView) { v.level = max(v.level, o.level) })
		return d.Err
	case OpMember:
		m, err := DecodeMember(v.value)
		if err == nil && strict {
			err = m.Check()
		}
		return err
	case OpLevel:
		_, err := DecodeRaising(v.value)
		return err
	default:
		return nil
	}
}

// IsContentType says whether this may be kept as the content type of a value: a
// kind and its subtype, perhaps with parameters, that can be the value of a header
// as it is. Each member asks that of each put, so it looks no closer.
func IsContentType(s string) bool {
	slash := strings.IndexByte(s, '/')
	return slash > 0 && slash < len(s)-1 && len(s) <= ContentTypeSizeMax && !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' }) && strings.TrimSpace(s) == s
}

func appendString(buf []byte, s string) []byte {
	buf = binary.AppendUvarint(buf, uint64(len(s)))
	return append(buf, s...)
}

// Fields reads what the append functions wrote. After an error all fields are
// zero.
type Fields struct {
	Data []byte
	Err  error
	// strict refuses what was too large to propose, too. What is in the log is
	// applied nevertheless.
	strict bool
}

func (d *Fields) bytes(n int) []byte {
	if n < 0 || n > len(d.Data) {
		d.fail(ErrMalformed)
	}
	if d.Err != nil {
		return nil
	}
	b := d.Data[:n]
	d.Data = d.Data[n:]
	return b
}

func (d *Fields) byte() byte {
	if b := d.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *Fields) uint() uint64 {
	v, n := binary.Uvarint(d.Data)
	if n <= 0 {
		n = len(d.Data) + 1 // an error
	}
	if d.bytes(n) == nil {
		return 0
	}
	return v
}

// view reads what appendString wrote, without a copy.
func (d *Fields) view() []byte {
	n := d.uint()
	return d.bytes(int(min(n, uint64(len(d.Data))+1)))
}

// fail notes the first error.
func (d *Fields) fail(err error) {
	if d.Err == nil && err != nil {
		d.Data, d.Err = nil, err
	}
}

// Txn is a transaction: if all comparisons hold the operations of then are
// carried out, otherwise those of otherwise. All of them get one version.
type Txn struct {
	Compare   []Comparison
	Then      []Command // opPut, opDelete, opGet
	Otherwise []Command
}

// Branch returns the operations that were carried out.
func (t *Txn) Branch(came Status) []Command {
	if came == StatusFailed {
		return t.Otherwise
	}
	return t.Then
}

// Comparison is one condition of a transaction.
type Comparison struct {
	Kind  ComparisonKind
	Key   string
	RV    uint64 // of byVersion and byCreated; 0 = the key does not exist
	Value string // of byValue
}

type ComparisonKind byte

const (
	ByVersion ComparisonKind = 1
	ByCreated ComparisonKind = 2
	ByExists  ComparisonKind = 3
	ByAbsent  ComparisonKind = 4
	ByValue   ComparisonKind = 5

	comparisonsKnown = ByValue // the last one
)

func (c *Comparison) Holds(it Item, exists bool) bool {
	switch c.Kind {
	case ByVersion:
		return it.RV == c.RV // a missing item has version 0
	case ByCreated:
		return it.Created == c.RV
	case ByExists:
		return exists
	case ByAbsent:
		return !exists
	case ByValue:
		return exists && it.Value == c.Value
	default:
		return false
	}
}

// Encode returns the transaction as the value of an opTxn command.
func (t *Txn) Encode() string {
	buf := binary.AppendUvarint(nil, uint64(len(t.Compare)))
	for _, c := range t.Compare {
		buf = append(buf, byte(c.Kind))
		buf = appendString(buf, c.Key)
		buf = binary.AppendUvarint(buf, c.RV)
		buf = appendString(buf, c.Value)
	}
	for _, ops := range [][]Command{t.Then, t.Otherwise} {
		buf = binary.AppendUvarint(buf, uint64(len(ops)))
		for i := range ops {
			buf = ops[i].AppendTo(buf)
		}
	}
	return string(buf)
}

func DecodeTxn[T string | []byte](value T) (Txn, error) {
	t, _, err := decodeTxnLevel([]byte(value))
	return t, err
}

// decodeTxnLevel also says from which level on all of it is known.
func decodeTxnLevel(value []byte) (t Txn, level int, err error) {
	d := Fields{Data: value}
	d.txn(func(c *comparisonView) {
		t.Compare = append(t.Compare, Comparison{Kind: c.kind, Key: string(c.key), RV: c.rv, Value: string(c.value)})
	}, func(branch int, v *commandView) {
		ops := []*[]Command{&t.Then, &t.Otherwise}[branch]
		*ops = append(*ops, v.command())
		level = max(level, v.level)
	})
	if d.Err != nil {
		return Txn{}, 0, d.Err
	}
	return t, level, nil
}

// comparisonView is a comparison that lies in the bytes it was read from.
type comparisonView struct {
	kind       ComparisonKind
	key, value []byte
	rv         uint64
}

// txn reads a transaction and checks all of it. Branch 0 is then, 1 otherwise.
func (d *Fields) txn(compare func(*comparisonView), do func(branch int, v *commandView)) {
	for n := d.uint(); n > 0 && d.Err == nil; n-- {
		c := comparisonView{kind: ComparisonKind(d.byte()), key: d.view(), rv: d.uint(), value: d.view()}
		if d.Err == nil && d.strict && len(c.key) > KeySizeMax {
			d.fail(fmt.Errorf("%w: a key of %d bytes", ErrMalformed, len(c.key)))
		}
		if d.Err == nil && (c.kind == 0 || c.kind > comparisonsKnown) {
			d.fail(Newer("comparison", uint64(c.kind)))
		}
		if d.Err == nil {
			compare(&c)
		}
	}
	for branch := range 2 {
		for n := d.uint(); n > 0 && d.Err == nil; n-- {
			if v := d.Command(true); d.Err == nil {
				do(branch, &v)
			}
		}
	}
	if d.Err == nil && len(d.Data) > 0 {
		d.fail(Newer("a transaction with more bytes:", uint64(len(d.Data))))
	}
}

// BatchHeader identifies a batch and says when it was proposed.
type BatchHeader struct {
	Session uint64
	Seq     uint64
	Time    int64 // unix milliseconds at the proposer
}

// Put writes the header over the first batchHeaderSize bytes of data.
func (h BatchHeader) Put(data []byte) {
	data[0] = batchFormat
	binary.LittleEndian.PutUint64(data[1:], h.Session)
	binary.LittleEndian.PutUint64(data[9:], h.Seq)
	binary.LittleEndian.PutUint64(data[17:], uint64(h.Time))
}

// DecodeBatch splits an entry into its header and its encoded commands.
func DecodeBatch(data []byte) (BatchHeader, []byte, error) {
	if len(data) < BatchHeaderSize {
		return BatchHeader{}, nil, fmt.Errorf("%w: entry of %d bytes", ErrMalformed, len(data))
	}
	if data[0] != batchFormat {
		return BatchHeader{}, nil, fmt.Errorf("entry format %d is newer than this program (knows %d): upgrade it", data[0], batchFormat)
	}
	return BatchHeader{
		Session: binary.LittleEndian.Uint64(data[1:]),
		Seq:     binary.LittleEndian.Uint64(data[9:]),
		Time:    int64(binary.LittleEndian.Uint64(data[17:])),
	}, data[BatchHeaderSize:], nil
}

// Status is what applying a command came to. The numbers are in snapshots.
type Status byte

const (
	StatusNone     Status = 0 // withdrawn, or not applied yet
	StatusCreated  Status = 1 // the key did not exist
	StatusReplaced Status = 2 // the key existed
	StatusDeleted  Status = 3
	// Nothing changed and no resource version was taken:
	StatusNotFound     Status = 4
	StatusPrecondition Status = 5 // the condition did not hold
	StatusRetryOther   Status = 6 // the Idempotency-Key was used for another request
	StatusTooMany      Status = 7 // more keys under a prefix than one command deletes
	// Of transactions:
	StatusSucceeded Status = 8 // then was carried out
	StatusFailed    Status = 9 // otherwise was carried out
	StatusFound     Status = 10

	StatusRefused Status = 11 // a configuration change; key says why
)

// Result is the answer to one command.
type Result struct {
	Status   Status
	RV       uint64 // the write's resource version, or the store's if nothing changed
	Current  uint64 // of statusPrecondition: the key's version, 0 if it does not exist
	Count    uint64 // of a deleted prefix: keys
	Key      string // the key that was written, which a retry may not know
	Replayed bool   // the command was a retry and this is the first answer
	Ops      []OpResult
}

// OpResult is the answer to one operation of a transaction.
type OpResult struct {
	Status Status
	Item   Item // of opGet
}
