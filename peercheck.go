package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"

	"github.com/coreos/go-semver/semver"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/store"
)

// This file looks at what other members send before raft does. Raft trusts its
// callers: a message that no member would send may panic it, at every start
// again, and an entry that nobody can read ends every node that applies it. So
// whatever is refused here would cost the cluster.
//
// What needs no look at the log is checked as a message arrives, by
// checkMessage. The rest the replica checks, before it steps it, see refuse.

// Bounds of what members send. None of them is near what a cluster comes to.
const (
	// The log of a cluster that writes 10,000 entries a second is as long after
	// fourteen million years.
	raftNumberMax = 1 << 62 // of indexes and terms; both are counted up from there

	// termStepMax is how far a term may be ahead of that of this node, on a
	// connection that the sender has opened: more than elections come to in a week.
	// Only what comes from a member's own address may be further ahead. There a
	// node finds out that has no log yet, or was away for long.
	termStepMax = 1_000_000

	peerMessageMax = 40 << 20 // bytes
	entrySizeMax   = 32 << 20 // bytes: the largest value twice, of which no batch has more than one

	// An entry takes at least four bytes, for its index and its term.
	messageEntriesMax = appendSizeMax / 4
)

// refusal is why something that a peer sent is not taken.
type peerRefusal struct {
	reason refusalReason
	err    error
}

func (r *peerRefusal) Error() string { return r.err.Error() }
func (r *peerRefusal) Unwrap() error { return r.err }

func refuse(reason refusalReason, format string, args ...any) error {
	return &peerRefusal{reason, fmt.Errorf(format, args...)}
}

// refusalReason is a label of a metric: there are few, and none comes from a peer.
type refusalReason int

const (
	refusedOther     refusalReason = iota
	refusedCluster                 // the request is for another cluster
	refusedStranger                // the sender is no member, or was removed
	refusedHeader                  // a header of the request cannot be read
	refusedSender                  // the message says that another member sent it, or that it is for another
	refusedType                    // members send no such message
	refusedTerm                    // impossible, or too far ahead
	refusedIndex                   // beyond the log, or with gaps
	refusedEntries                 // of an entry something cannot be read
	refusedContext                 // what belongs to a type of message is not as it must be
	refusedSize                    // too large
	refusedSnapshot                // a snapshot cannot be this node's next state, or there is no room for it
	refusedFormat                  // the bytes are no message
	refusalReasonEnd               // how many there are
)

var refusalNames = [refusalReasonEnd]string{
	"other", "cluster", "stranger", "header", "sender", "type", "term", "index", "entries", "context", "size", "snapshot", "format",
}

func reasonForRefusal(err error) refusalReason {
	if r, ok := errors.AsType[*peerRefusal](err); ok {
		return r.reason
	}
	return refusedOther
}

// refusals counts what peers sent in vain, and logs it. Its logger is one that
// drops what it logged within the last second.
type refusals struct {
	counts [refusalReasonEnd]atomic.Uint64
	logger *zap.Logger
}

func (r *refusals) add(from uint64, err error) {
	reason := reasonForRefusal(err)
	r.counts[reason].Add(1)
	r.logger.Warn("refused what a peer sent", zap.Uint64("from", from), zap.String("reason", refusalNames[reason]), zap.Error(err))
}

// each calls f with the count of each reason.
func (r *refusals) each(f func(reason string, n uint64)) {
	for i, name := range refusalNames {
		f(name, r.counts[i].Load())
	}
}

// peerView is what a node knows of itself and of a sender when it looks at a message.
type peerView struct {
	self   uint64
	sender uint64 // at the other end of the link
	term   uint64 // own
	dialed bool   // this node opened the connection, at the address of that member
	member func(id uint64) bool
}

// checkMessage refuses messages that no member sends. It needs no look at the
// log, copies nothing and does not block.
func checkMessage(m *raftpb.Message, v peerView) error {
	switch {
	case m.GetTo() != v.self:
		return refuse(refusedSender, "it is for member %d", m.GetTo())
	case m.GetFrom() == raft.None:
		return refuse(refusedSender, "it has no sender")
	case m.GetFrom() == v.sender:
	case !isForwarded(m):
		return refuse(refusedSender, "member %d says that it is from %d", v.sender, m.GetFrom())
	case m.GetFrom() != v.self && !v.member(m.GetFrom()):
		return refuse(refusedSender, "it is from %d, which is no member as far as this one knows", m.GetFrom())
	}
	if err := checkTerm(m, v); err != nil {
		return err
	}
	if max(m.GetIndex(), m.GetCommit(), m.GetRejectHint(), m.GetLogTerm()) >= raftNumberMax {
		return refuse(refusedIndex, "it is about entries that no log has")
	}
	if m.GetType() != raftpb.MsgSnap && m.GetSnapshot() != nil {
		return refuse(refusedContext, "it has a snapshot")
	}
	switch m.GetType() {
	case raftpb.MsgProp:
		return checkProposal(m.GetEntries())
	case raftpb.MsgApp:
		return checkAppend(m)
	case raftpb.MsgHeartbeat, raftpb.MsgHeartbeatResp:
		if n := len(m.GetContext()); n != 0 && n != 8 {
			return refuse(refusedContext, "its context has %d bytes", n)
		}
	case raftpb.MsgReadIndex, raftpb.MsgReadIndexResp:
		if n := len(m.GetEntries()); n != 1 {
			return refuse(refusedContext, "it has %d contexts", n)
		}
		return nil
	case raftpb.MsgSnap:
		return checkSnapshot(m, v.self)
	case raftpb.MsgAppResp, raftpb.MsgVote, raftpb.MsgVoteResp, raftpb.MsgPreVote, raftpb.MsgPreVoteResp,
		raftpb.MsgTransferLeader, raftpb.MsgTimeoutNow:
	default:
		return refuse(refusedType, "members send no messages of type %d", m.GetType())
	}
	if len(m.GetEntries()) > 0 {
		return refuse(refusedContext, "it has entries")
	}
	return nil
}

// isForwarded says whether followers pass such a message on to the leader under
// the name of its first sender, to whom it may come back when that one leads by
// then.
func isForwarded(m *raftpb.Message) bool {
	switch m.GetType() {
	case raftpb.MsgProp, raftpb.MsgReadIndex, raftpb.MsgTransferLeader:
		return true
	default:
		return false
	}
}

func checkTerm(m *raftpb.Message, v peerView) error {
	term := m.GetTerm()
	switch m.GetType() {
	case raftpb.MsgProp, raftpb.MsgReadIndex:
		if term != 0 { // raft would panic when it passes them on
			return refuse(refusedTerm, "it has term %d and must have none", term)
		}
		return nil
	}
	switch {
	case term == 0:
		return refuse(refusedTerm, "it has no term")
	case term >= raftNumberMax:
		return refuse(refusedTerm, "no cluster comes to term %d", term)
	case !v.dialed && term > v.term+termStepMax:
		return refuse(refusedTerm, "term %d is too far ahead of %d to be believed over a connection that the sender opened", term, v.term)
	}
	return nil
}

func checkAppend(m *raftpb.Message) error {
	term := m.GetLogTerm()
	if term > m.GetTerm() {
		return refuse(refusedTerm, "it follows an entry of term %d and is of term %d", term, m.GetTerm())
	}
	for i, e := range m.GetEntries() {
		if e.GetIndex() != m.GetIndex()+1+uint64(i) {
			return refuse(refusedIndex, "its entries have a gap")
		}
		if e.GetTerm() < term || e.GetTerm() == 0 || e.GetTerm() > m.GetTerm() {
			return refuse(refusedTerm, "entry %d of term %d cannot follow one of term %d in a message of term %d", e.GetIndex(), e.GetTerm(), term, m.GetTerm())
		}
		term = e.GetTerm()
		if e.GetType() == raftpb.EntryNormal && len(e.GetData()) == 0 {
			continue // of a new leader, or raft put it in the place of a change
		}
		if err := checkEntry(e); err != nil {
			return refuse(refusedEntries, "entry %d: %w", e.GetIndex(), err)
		}
	}
	return nil
}

func checkProposal(ents []*raftpb.Entry) error {
	if len(ents) == 0 {
		return refuse(refusedEntries, "it proposes nothing")
	}
	for _, e := range ents {
		// What is newer than this program gets an answer from the leader, see stepProposal.
		if err := checkEntry(e); err != nil && !errors.Is(err, store.ErrNewer) {
			return refuse(refusedEntries, "its entry: %w", err)
		}
	}
	return nil
}

// checkEntry says whether this program can apply an entry. Which level the
// cluster is at when it does, nobody knows before.
func checkEntry(e *raftpb.Entry) error {
	if n := len(e.GetData()); n > entrySizeMax {
		return fmt.Errorf("%w: entry of %d bytes", store.ErrMalformed, n)
	}
	switch e.GetType() {
	case raftpb.EntryNormal:
		_, commands, err := store.DecodeBatch(e.GetData())
		if err != nil {
			return err
		}
		return store.CheckCommands(commands, store.LevelNewest)
	case raftpb.EntryConfChange:
		_, _, change, err := decodeMemberChange(e)
		if err != nil {
			return err
		}
		return change.Member.Check()
	default:
		return fmt.Errorf("entries of type %d are not used", e.GetType())
	}
}

// checkSnapshot looks at the message before anything of the state is read.
func checkSnapshot(m *raftpb.Message, self uint64) error {
	meta := m.GetSnapshot().GetMetadata()
	conf := meta.GetConfState()
	members := slices.Concat(conf.GetVoters(), conf.GetLearners())
	slices.Sort(members)
	switch {
	case meta.GetIndex() == 0 || meta.GetIndex() >= raftNumberMax || meta.GetTerm() == 0 || meta.GetTerm() > m.GetTerm():
		return refuse(refusedSnapshot, "a snapshot at index %d of term %d, in term %d", meta.GetIndex(), meta.GetTerm(), m.GetTerm())
	case len(m.GetEntries()) > 0 || len(m.GetSnapshot().GetData()) > 0:
		return refuse(refusedSnapshot, "a snapshot comes with its state and nothing else")
	case len(conf.GetVoters()) == 0 || members[0] == raft.None || len(slices.Compact(slices.Clone(members))) != len(members) ||
		len(conf.GetVotersOutgoing()) > 0 || len(conf.GetLearnersNext()) > 0 || conf.GetAutoLeave():
		return refuse(refusedSnapshot, "the members in it cannot be: %v", conf)
	case !slices.Contains(members, self):
		return refuse(refusedSnapshot, "a snapshot of a cluster without this node")
	}
	return nil
}

// checkVersions refuses headers by which rafthttp would panic, in requests as in answers.
func checkVersions(h http.Header) error {
	for _, name := range []string{"X-Server-Version", "X-Min-Cluster-Version"} {
		if _, err := semver.NewVersion(cmp.Or(h.Get(name), "2.0.0")); err != nil {
			return refuse(refusedHeader, "%s: %w", name, err)
		}
	}
	return nil
}
