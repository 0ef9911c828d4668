package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	etcdversion "go.etcd.io/etcd/api/v3/version"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file brings a snapshot from one member to another: one request, in which
// the state follows the message, so that neither side holds it in memory as
// bytes. On the wire it is what rafthttp does. Its own halves know neither a reason
// nor an end of failing: raft would offer the snapshot again with each heartbeat.

const (
	// A member that did not take a snapshot is offered one again after a pause,
	// which doubles each time.
	snapshotRetryMin = 100 * time.Millisecond
	snapshotRetryMax = 5 * time.Second
	// As long as the reason is the same it is logged so often.
	snapshotWarnEvery = time.Minute

	snapshotAskTimeout    = time.Second     // for "100 Continue": after that the state is sent without
	snapshotAnswerTimeout = 2 * time.Minute // once all is sent: the other side reads it back
	snapshotEnvelopeMax   = 1 << 20         // bytes of the message in front of the state
	refusalMax            = 1 << 10         // bytes of the answer that says why not
)

// snapshotClient sends snapshots. It follows no redirect and asks no proxy.
var snapshotClient = &http.Transport{
	DialContext:            (&net.Dialer{Timeout: peerDialTimeout}).DialContext,
	DisableKeepAlives:      true,
	ExpectContinueTimeout:  snapshotAskTimeout,
	ResponseHeaderTimeout:  snapshotAnswerTimeout,
	MaxResponseHeaderBytes: peerHeaderMax,
}

// snapshotOutbox is what a link knows of the snapshots that it sent. The next
// link to the same member goes on with it.
type snapshotOutbox struct {
	sending atomic.Bool // one at a time; whoever has set it owns the rest
	pause   time.Duration
	failure string
	warned  time.Time // of the failure
}

// sendSnapshot sends the newest snapshot, for which raft has made m. Raft sends
// the member nothing else until it is told how that ended.
func (n *peerNetwork) sendSnapshot(l *link, m *raftpb.Message) {
	if l == nil {
		n.loop.reportSnapshot(m.GetTo(), raft.SnapshotFailure)
		return
	}
	if l.outbox.sending.CompareAndSwap(false, true) { // else raft is told how that one ended
		n.work.Go(func() { l.sendSnapshot(m) })
	}
}

func (l *link) sendSnapshot(m *raftpb.Message) {
	n, o := l.network, l.outbox
	logger := n.logger.With(zap.Uint64("member", l.member.ID), zap.Uint64("index", m.GetSnapshot().GetMetadata().GetIndex()))
	start := time.Now()
	size, err := l.postSnapshot(m)
	status := raft.SnapshotFinish
	if err == nil {
		logger.Info("sent snapshot", zap.Int64("bytes", size), zap.Duration("took", time.Since(start)))
		o.pause, o.failure = 0, ""
	} else {
		status = raft.SnapshotFailure
		if why := reasonOf(err); (why != o.failure || start.Sub(o.warned) >= snapshotWarnEvery) && l.ctx.Err() == nil {
			logger.Warn("a member does not take the snapshot that it needs; it is tried again", zap.String("reason", why))
			o.failure, o.warned = why, start
		}
		o.pause = min(max(2*o.pause, snapshotRetryMin), snapshotRetryMax)
		select {
		case <-time.After(o.pause):
		case <-l.ctx.Done(): // the next link tries at once
		}
	}
	o.sending.Store(false)
	n.loop.reportSnapshot(m.GetTo(), status)
}

// reasonOf returns what an error says without what differs each time, as ports do.
func reasonOf(err error) string {
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e.Op + ": " + e.Err.Error()
	}
	return err.Error()
}

// postSnapshot sends m and the state behind it, and returns how large that is.
func (l *link) postSnapshot(m *raftpb.Message) (size int64, err error) {
	n := l.network
	if suspect(n.admission.current()) {
		return 0, fault.ErrDiverged // its state is for nobody
	}
	if n.admission.isClosed(l.member.ID) {
		return 0, fault.ErrDiskFull
	}
	f, err := os.Open(n.storage.bodyPath(m.GetSnapshot().GetMetadata().GetIndex()))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	message, err := proto.Marshal(m)
	if err != nil {
		return 0, err
	}
	envelope := append(binary.BigEndian.AppendUint64(nil, uint64(len(message))), message...)
	req, err := http.NewRequestWithContext(l.ctx, http.MethodPost, l.member.PeerURL+rafthttp.RaftSnapshotPrefix,
		io.MultiReader(bytes.NewReader(envelope), f))
	if err != nil {
		return 0, err
	}
	req.ContentLength = int64(len(envelope)) + info.Size()
	for name, value := range map[string]string{
		"Content-Type":          "application/octet-stream",
		"Expect":                "100-continue", // who cannot take it says so before it is sent
		"X-Server-From":         types.ID(n.id).String(),
		"X-Server-Version":      etcdversion.Version,
		"X-Min-Cluster-Version": etcdversion.MinClusterVersion,
		"X-Etcd-Cluster-ID":     types.ID(n.cluster).String(),
	} {
		req.Header.Set(name, value)
	}
	resp, err := snapshotClient.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		why, err := io.ReadAll(io.LimitReader(resp.Body, refusalMax))
		return 0, errors.Join(fmt.Errorf("it answers %s: %s", resp.Status, strings.TrimSpace(string(why))), err)
	}
	return info.Size(), nil
}

// receiveSnapshot answers a member that sends a snapshot. The status tells what
// an operator could do about a failure.
func (l *link) receiveSnapshot(w http.ResponseWriter, r *http.Request) {
	err := l.takeSnapshot(r, http.NewResponseController(w))
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	l.network.refusals.add(l.member.ID, &peerRefusal{cmp.Or(reasonForRefusal(err), refusedSnapshot), err})
	status := http.StatusInternalServerError
	switch {
	case reasonForRefusal(err) == refusedSize:
		status = http.StatusRequestEntityTooLarge
	case errors.Is(err, errArriving):
		status = http.StatusServiceUnavailable
	case reasonForRefusal(err) != refusedOther:
		status = http.StatusBadRequest
	case errors.Is(err, errNoSpace), errors.Is(err, syscall.ENOSPC), errors.Is(err, fault.ErrDiskFull):
		status = http.StatusInsufficientStorage
	case errors.Is(err, store.ErrSnapshotFormat):
		status = http.StatusUnsupportedMediaType
	case errors.Is(err, store.ErrSnapshotDamage):
		status = http.StatusUnprocessableEntity
	}
	refusePeer(w, err.Error(), status)
}

// takeSnapshot reads a snapshot here and not in the loop, where it would hold up
// heartbeats.
func (l *link) takeSnapshot(r *http.Request, control *http.ResponseController) error {
	n := l.network
	if n.admission.space.Load().full {
		return fault.ErrDiskFull
	}
	if !n.arriving.CompareAndSwap(false, true) {
		return errArriving
	}
	defer n.arriving.Store(false)
	m, err := readEnvelope(&pacedReader{Reader: r.Body, control: control})
	if err != nil {
		return &peerRefusal{cmp.Or(reasonForRefusal(err), refusedFormat), fmt.Errorf("read the message of a snapshot: %w", err)}
	}
	// All that can be known before, since what follows may fill the disk.
	if err := n.check(l, m, false); err != nil {
		return err
	}
	if own := n.loop.status.Load().term; m.GetTerm() < own {
		return refuse(refusedTerm, "a snapshot of term %d in term %d", m.GetTerm(), own) // raft would ignore it, and its file stay
	}
	meta := m.GetSnapshot().GetMetadata()
	if meta.GetIndex() <= n.store.Applied() {
		return n.receive(l, m, nil, false) // raft ignores it and says how far this member is
	}
	most := snapshotBodyMax(n.admission.quota)
	if r.ContentLength > most {
		return refuse(refusedSize, "a snapshot of %d bytes", r.ContentLength)
	}
	if err := n.storage.hasRoom(uint64(max(r.ContentLength, 0))); err != nil {
		return err
	}
	st, err := n.storage.receive(&pacedReader{Reader: r.Body, control: control, most: most}, meta.GetIndex(), meta.GetTerm())
	if err != nil {
		return fmt.Errorf("received snapshot: %w", err)
	}
	return n.receive(l, m, &st, false)
}

var errArriving = errors.New("another snapshot is arriving")

// snapshotBodyMax bounds the state that is received by what it may hold: beside
// the store, whose quota is not exact, there is the window of events.
func snapshotBodyMax(quota uint64) int64 {
	if quota == 0 || quota > math.MaxInt64/4 {
		return math.MaxInt64
	}
	return int64(quota + quota/2 + snapshotSlack)
}

const (
	snapshotSlack = 256 << 20 // bytes

	// Who sends a snapshot more slowly than this makes room for another one.
	paceMin   = 64 << 10 // bytes a second
	paceGrace = 10 * time.Second
)

// pacedReader reads what a member sends, as long as it is not too much or too slow.
// Only the time counts in which there was nothing to read.
type pacedReader struct {
	io.Reader
	control *http.ResponseController // of the connection; nil = a read ends by itself
	most    int64                    // bytes; 0 = any number
	read    int64
	waited  time.Duration
}

func (p *pacedReader) Read(b []byte) (int, error) {
	start := time.Now()
	if err := p.setDeadline(start.Add(p.left())); err != nil {
		return 0, err
	}
	n, err := p.Reader.Read(b)
	p.waited += time.Since(start)
	p.read += int64(n)
	if err == io.EOF {
		_ = p.setDeadline(time.Time{}) // the answer may take longer; it fails like this one
	}
	switch {
	case p.most > 0 && p.read > p.most:
		return n, refuse(refusedSize, "a snapshot of more than %d bytes", p.most)
	case p.left() <= 0:
		return n, refuse(refusedSnapshot, "%d bytes in %v are too few", p.read, p.waited)
	}
	return n, err
}

// left is how much longer the sender may keep this node waiting.
func (p *pacedReader) left() time.Duration {
	return paceGrace + time.Duration(p.read)*time.Second/paceMin - p.waited
}

func (p *pacedReader) setDeadline(t time.Time) error {
	if p.control == nil {
		return nil
	}
	return p.control.SetReadDeadline(t)
}

// readEnvelope reads the message in front of a state.
func readEnvelope(r io.Reader) (*raftpb.Message, error) {
	var size uint64
	if err := binary.Read(r, binary.BigEndian, &size); err != nil {
		return nil, err
	}
	if size > snapshotEnvelopeMax {
		return nil, refuse(refusedSize, "%d bytes are too many", size)
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, err
	}
	m := new(raftpb.Message)
	if err := unmarshalPeer(data, m); err != nil {
		return nil, err
	}
	if m.GetType() != raftpb.MsgSnap || m.GetSnapshot() == nil {
		return nil, fmt.Errorf("it is a %s", m.GetType())
	}
	return m, nil
}
