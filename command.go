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
//	command  op, flags (1 byte each), key (uvarint length + bytes),
//	         value (uvarint length + bytes), then the fields its flags announce
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
	keySizeMax          = 4096    // bytes
	valueSizeMaxDefault = 1 << 20 // bytes
)

// op is the kind of a command. The numbers are on disk: never reuse one.
type op byte

const (
	opNop    op = 0 // a command that was withdrawn before it was proposed
	opPut    op = 1
	opDelete op = 2
	// opMember carries a member's addresses beside a configuration change; its
	// value is a JSON encoded member. It never comes from a client.
	opMember op = 3
)

// command is one write. Everything that apply needs rides in it, so that apply
// is a pure function: no clock, no randomness.
type command struct {
	op    op
	key   string
	value string
}

var errMalformed = errors.New("malformed command")

// appendTo appends the encoded command to buf.
func (c *command) appendTo(buf []byte) []byte {
	buf = append(buf, byte(c.op), 0)
	buf = binary.AppendUvarint(buf, uint64(len(c.key)))
	buf = append(buf, c.key...)
	buf = binary.AppendUvarint(buf, uint64(len(c.value)))
	return append(buf, c.value...)
}

// encodedSizeMax bounds the bytes that appendTo adds.
func (c *command) encodedSizeMax() int {
	return 2 + 2*binary.MaxVarintLen32 + len(c.key) + len(c.value)
}

// decodeCommand reads one command from the front of data and returns the rest.
// The command owns its memory: it does not keep data alive.
func decodeCommand(data []byte) (command, []byte, error) {
	if len(data) < 2 {
		return command{}, nil, errMalformed
	}
	c := command{op: op(data[0])}
	if flags := data[1]; flags != 0 {
		return command{}, nil, fmt.Errorf("%w: unknown flags %#x", errMalformed, flags)
	}
	data = data[2:]
	var err error
	if c.key, data, err = decodeString(data); err != nil {
		return command{}, nil, err
	}
	if c.value, data, err = decodeString(data); err != nil {
		return command{}, nil, err
	}
	return c, data, nil
}

func decodeString(data []byte) (string, []byte, error) {
	n, w := binary.Uvarint(data)
	if w <= 0 || n > uint64(len(data)-w) {
		return "", nil, errMalformed
	}
	end := w + int(n)
	return string(data[w:end]), data[end:], nil
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

// status is what applying a command came to.
type status byte

const (
	statusNone     status = iota // withdrawn, or not applied yet
	statusCreated                // the key did not exist
	statusReplaced               // the key existed
	statusDeleted
	statusNotFound // nothing changed, no resource version was taken
)

// result is the answer to one command.
type result struct {
	status status
	rv     uint64 // the write's resource version, or the store's if nothing changed
}
