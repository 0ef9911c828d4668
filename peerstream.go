package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"reflect"
	"strings"
	"time"

	"github.com/xiang90/probing"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/httpapi"
)

// This file reads the streams on which other members send. rafthttp's own
// reader panics on goroutines of its own, where nobody can recover: on a malformed
// version header, on a number of entries that does not fit into memory, on
// bytes that are no entry. One bad peer would end the process, at every start
// again. Here it costs its connection.
//
// rafthttp still connects, and tries again when a stream has ended. It reads from
// the body of an answer only to find out that it has ended: what is in it is
// decoded before, and delivered.

// readStreams makes a transport that is started leave the reading to this link.
// rafthttp has no option for that, so this sets fields of it that are not
// exported; the alternatives are a copy of the package, or a proxy in between.
func (l *link) readStreams() error {
	for _, name := range []string{"streamRt", "pipelineRt"} {
		field := reflect.ValueOf(l.http).Elem().FieldByName(name)
		if !field.IsValid() || field.Type() != reflect.TypeFor[http.RoundTripper]() {
			return fmt.Errorf("this version of rafthttp has no %s", name)
		}
		rt := (*http.RoundTripper)(field.Addr().UnsafePointer())
		t, ok := (*rt).(*http.Transport)
		if !ok {
			return fmt.Errorf("in this version of rafthttp %s is another one", name)
		}
		t.Proxy, t.MaxResponseHeaderBytes = nil, peerHeaderMax
		*rt = &peerTransport{link: l, next: t}
	}
	for _, name := range []string{"streamProber", "pipelineProber"} {
		field := reflect.ValueOf(l.http).Elem().FieldByName(name)
		if !field.IsValid() || field.Type() != reflect.TypeFor[probing.Prober]() {
			return fmt.Errorf("this version of rafthttp has no %s", name)
		}
		*(*probing.Prober)(field.Addr().UnsafePointer()) = noProber{}
	}
	return nil
}

// noProber takes the place of rafthttp's, which asks the member now and then how late
// it is: it reads answers of any length, and waits for them for ever.
type noProber struct{}

func (noProber) AddHTTP(string, time.Duration, []string) error { return nil }
func (noProber) Remove(string) error                           { return nil }
func (noProber) RemoveAll()                                    {}
func (noProber) Reset(string) error                            { return nil }
func (noProber) Status(string) (probing.Status, error)         { return noProbe{}, nil }

// noProbe is what it finds out.
type noProbe struct{}

func (noProbe) Total() int64             { return 0 }
func (noProbe) Loss() int64              { return 0 }
func (noProbe) Health() bool             { return true }
func (noProbe) Err() error               { return nil }
func (noProbe) SRTT() time.Duration      { return 0 }
func (noProbe) ClockDiff() time.Duration { return 0 }
func (noProbe) StopNotify() <-chan struct{} {
	ended := make(chan struct{})
	close(ended)
	return ended
}

// peerTransport is where rafthttp sends requests to the member. It implements
// http.RoundTripper.
type peerTransport struct {
	link *link
	next http.RoundTripper
}

func (t *peerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if err := checkVersions(resp.Header); err != nil {
		t.link.network.refusals.add(t.link.member.ID, err)
		return nil, errors.Join(err, resp.Body.Close())
	}
	stream, found := strings.CutPrefix(r.URL.Path, rafthttp.RaftStreamPrefix+"/")
	if !found || resp.StatusCode != http.StatusOK {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, refusalMax), resp.Body}
		return resp, nil
	}
	d := &streamDecoder{reader: bufio.NewReaderSize(resp.Body, streamReadBuffer), from: t.link.member.ID, to: t.link.network.id}
	decode := d.message
	if strings.HasPrefix(stream, "msgapp/") {
		decode = d.append
	}
	resp.Body = &streamBody{link: t.link, body: resp.Body, decode: decode}
	return resp, nil
}

// streamBody is what rafthttp gets to read of a stream: nothing until it ends.
type streamBody struct {
	link   *link
	body   io.ReadCloser
	decode func() (*raftpb.Message, error)
}

// Read implements io.Reader. It delivers all messages, and returns why there are
// no more.
func (b *streamBody) Read([]byte) (int, error) {
	for {
		m, err := b.decode()
		if err != nil {
			if _, ok := errors.AsType[*peerRefusal](err); ok {
				b.link.network.refusals.add(b.link.member.ID, err)
			}
			return 0, err
		}
		if m != nil {
			_ = b.link.receive(m, true) // a message that is refused is counted, and the next one may be better
		}
	}
}

// Close implements io.Closer. It ends Read.
func (b *streamBody) Close() error { return b.body.Close() }

const (
	streamReadBuffer = 16 << 10
	// Up to this size an entry is read into a buffer that is used again.
	streamEntryBuffer = 64 << 10
)

// streamDecoder decodes the two kinds of streams, as rafthttp writes them.
type streamDecoder struct {
	reader   *bufio.Reader
	from, to uint64

	term, index uint64 // of the last append message
	buf         []byte
}

// message reads from a stream of messages. It returns nil for what only keeps
// the connection alive.
func (d *streamDecoder) message() (*raftpb.Message, error) {
	size, err := d.uint(peerMessageMax)
	if err != nil {
		return nil, err
	}
	m := new(raftpb.Message)
	if err := d.decode(m, int(size)); err != nil {
		return nil, err
	}
	if m.GetType() == raftpb.MsgHeartbeat && m.GetFrom() == 0 && m.GetTo() == 0 {
		return nil, nil
	}
	return m, nil
}

// The kinds of frames on a stream of append messages.
const (
	frameAlive   = 0
	frameEntries = 1 // an append message that goes on where the last one ended
	frameMessage = 2
)

// append reads from a stream of append messages.
func (d *streamDecoder) append() (*raftpb.Message, error) {
	kind, err := d.reader.ReadByte()
	if err != nil {
		return nil, err
	}
	switch kind {
	case frameAlive:
		return nil, nil
	case frameEntries:
		return d.entries()
	case frameMessage:
	default:
		return nil, refuse(refusedFormat, "a stream with a frame of kind %d", kind)
	}
	m, err := d.message()
	if m == nil {
		return nil, err
	}
	d.term, d.index = m.GetTerm(), m.GetIndex()
	if n := len(m.GetEntries()); n > 0 {
		d.index = m.GetEntries()[n-1].GetIndex()
	}
	return m, nil
}

func (d *streamDecoder) entries() (*raftpb.Message, error) {
	m := &raftpb.Message{
		Type: raftpb.MsgApp.Enum(), From: new(d.from), To: new(d.to), Term: new(d.term), LogTerm: new(d.term), Index: new(d.index),
	}
	n, err := d.uint(messageEntriesMax)
	if err != nil {
		return nil, err
	}
	left := uint64(peerMessageMax)
	for range n {
		size, err := d.uint(left)
		if err != nil {
			return nil, err
		}
		left -= size
		e := new(raftpb.Entry)
		if err := d.decode(e, int(size)); err != nil {
			return nil, err
		}
		m.Entries = append(m.Entries, e)
	}
	d.index += n
	commit, err := d.uint(math.MaxUint64)
	m.Commit = new(commit)
	return m, err
}

// uint reads a number that may be at most most.
func (d *streamDecoder) uint(most uint64) (uint64, error) {
	b, err := d.reader.Peek(8)
	if err != nil {
		return 0, err
	}
	v := binary.BigEndian.Uint64(b)
	if v > most {
		return 0, refuse(refusedSize, "a stream announces %d where %d are the most", v, most)
	}
	_, err = d.reader.Discard(8)
	return v, err
}

func (d *streamDecoder) decode(m proto.Message, size int) error {
	if size > streamEntryBuffer {
		data, err := httpapi.ReadGrowing(d.reader, int64(size), peerMessageMax, func(int) error { return nil })
		if err != nil {
			return err
		}
		return unmarshalPeer(data, m)
	}
	if d.buf == nil {
		d.buf = make([]byte, streamEntryBuffer)
	}
	data := d.buf[:size]
	if _, err := io.ReadFull(d.reader, data); err != nil {
		return err
	}
	return unmarshalPeer(data, m)
}

// unmarshalPeer decodes what another member sent. In memory a field of two bytes
// takes more than a hundred, so fields that repeat are counted first.
func unmarshalPeer(data []byte, m proto.Message) error {
	if _, ok := m.(*raftpb.Message); ok {
		if err := countRepeated(data); err != nil {
			return err
		}
	}
	if err := proto.Unmarshal(data, m); err != nil {
		return refuse(refusedFormat, "%w", err)
	}
	return nil
}

// Numbers of fields of raftpb.Message.
const (
	fieldEntries   = 7
	fieldSnapshot  = 9
	fieldResponses = 14
)

// countRepeated refuses the bytes of a message that would take much more memory
// than they do. Only entries are many, in what members send.
func countRepeated(data []byte) error {
	entries := 0
	for len(data) > 0 {
		field, _, n := protowire.ConsumeField(data)
		if n < 0 {
			return refuse(refusedFormat, "%w", protowire.ParseError(n))
		}
		switch field {
		case fieldEntries:
			entries++
		case fieldSnapshot:
			if n > snapshotEnvelopeMax {
				return refuse(refusedSize, "it has a snapshot of %d bytes", n)
			}
		case fieldResponses:
			return refuse(refusedContext, "it has messages in it")
		}
		data = data[n:]
	}
	if entries > messageEntriesMax {
		return refuse(refusedSize, "it has %d entries", entries)
	}
	return nil
}
