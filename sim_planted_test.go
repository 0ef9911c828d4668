package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/tidwall/btree"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"raftrv/internal/fsx"
	"raftrv/internal/httpapi"
	"raftrv/internal/store"
)

// This file plants bugs: the faults that programs like this one have had. Each
// must be found by the simulator within a few seeds. A harness that does not
// find them would not find the next one either.
//
// The product has no switches for them. A planted bug sits at the edges: a disk
// that lies, a network that meddles with messages, a driver that answers too
// early, a machine that damages its directory.

// plant is a planted bug.
type plant struct {
	name string

	disk       func(p *process, d disk) disk
	outgoing   func(p *process, m *raftpb.Message) *raftpb.Message // nil = it gets lost
	incoming   func(p *process, m *raftpb.Message)
	afterCrash func(n *simNode)
	answers    func(p *simPlace, answers map[uint64]peerAnswer) // that others gave to a node that looks for its place
	request    func(p *process, c *store.Command)               // what is done of a write before it is queued
	recovered  func(st *store.State)
	turned     func(p *process) // after each turn of the loop

	deadlines func(b *batch, place int) // of what was queued; that it was given up nobody is told

	watched func(p *process, w *httpapi.WatchStream) // after each turn of a watch
	deaf    bool                                     // the hub is not told that something was applied

	answerRead    func(p *process) bool // whether reads are answered at once, from what the node has
	answerWrite   bool                  // writes are answered as soon as they are queued
	refuseUnknown bool                  // what may still happen is said not to
	refuseRetries bool                  // that an attempt was refused is taken for the answer to all
	forgetFirsts  bool                  // the answer to a retry is that of a new request
	noDirSync     bool                  // directories are not synced
	noStartSync   bool                  // what is read at start is not synced
	impatient     bool                  // a snapshot that was not taken is sent again at once

	blocks   func(p *process, m *raftpb.Message) time.Duration      // how long sending takes
	connects func(p *process, members []store.Member) time.Duration // and to be told of the members

	// prepare makes the bug more likely to show.
	prepare func(w *weather, l *load)
}

// plants returns all planted bugs. Some have a memory, so each run gets its own.
func plants() []*plant {
	return []*plant{
		{name: "local read", answerRead: func(*process) bool { return true }},
		{name: "ack before commit", answerWrite: true},
		{name: "ack before fsync", disk: lateDisk(100 * time.Millisecond), prepare: onlyFaults(faultPowerCut, faultCrash)},
		{name: "send before save", disk: lateDisk(2 * time.Millisecond), prepare: often(faultPowerCut, faultCrash)},
		{name: "disk errors ignored", disk: func(_ *process, d disk) disk { return deafDisk{d} }, prepare: onlyFaults(faultDisk, faultCrash)},
		{name: "hard state not saved", disk: func(_ *process, d disk) disk { return &forgetfulDisk{disk: d} }, prepare: often(faultPowerCut, faultCrash, faultCrash, faultTransfer, faultTransfer, faultIsolateLeader)},
		{name: "truncated tail accepted", afterCrash: truncateLog, prepare: onlyFaults(faultCrash, faultPowerCut, faultIsolateLeader)},
		{name: "damaged log served", afterCrash: damageLog, prepare: onlyFaults(faultCrash, faultPowerCut, faultIsolateLeader)},
		{name: "wiped directory rejoins", afterCrash: wipe, prepare: onlyFaults(faultCrash, faultPowerCut, faultIsolateLeader)},
		{name: "dedupe table not in the snapshot", disk: snapshotsWith(func(st *store.State) { st.Sessions = store.Sessions{} })},
		{name: "snapshot ahead of apply", disk: func(_ *process, d disk) disk { return &hastyDisk{disk: d} }},
		{name: "map order in a snapshot", disk: func(p *process, d disk) disk { return disorderlyDisk{d, p} }},
		{name: "snapshot installed without its ConfState", incoming: firstConfState, prepare: onlyFaults(faultMembers, faultMembers, faultCrash)},
		{name: "pending batch not proposed again", outgoing: onceProposed(func(*raftpb.Message) *raftpb.Message { return nil }), prepare: onlyFaults(faultIsolateLeader, faultPauseLeader)},
		{name: "retry applied as a new write", outgoing: onceProposed(asNewBatch)},
		{name: "stale ReadIndex context", incoming: anyAttempt, prepare: slowLinks},
		{name: "read does not wait for apply", incoming: readAtOnce},
		{name: "retry record not in the snapshot", disk: snapshotsWith(func(st *store.State) { st.Retries = store.NewRetryTable() })},
		{name: "expiry by the local clock", turned: expireByOwnClock},
		{name: "event skipped on restart", recovered: dropNewestEvent, prepare: often(faultCrash, faultPowerCut)},
		{name: "transaction in two versions", request: splitTxn},
		{name: "condition checked before apply", request: checkEarly},
		{name: "peer URL not in the snapshot", disk: snapshotsWith(firstPeerURLs), prepare: often(faultMembers)},
		{name: "removed id not in the snapshot", disk: snapshotsWith(func(st *store.State) { st.Removed = map[uint64]bool{} }), prepare: often(faultMembers)},
		{name: "no room for a snapshot ignored", disk: func(_ *process, d disk) disk { return fullDisk{d} }, prepare: often(faultFull, faultCrash)},
		{name: "a write with another value on one node", turned: otherValue()},
		{name: "snapshot with a later configuration", disk: laterConfig, prepare: often(faultMembers, faultMembers, faultCrash)},
		{name: "a leader reads without asking", answerRead: leadsIt, prepare: onlyFaults(faultIsolateLeader, faultPauseLeader)},
		{name: "read index at once", incoming: indexAtOnce, prepare: often(faultTransfer, faultPauseLeader, faultCrash)},
		{name: "vote before it is on disk", disk: lateVotes, prepare: often(faultCrash, faultIsolateLeader)},
		{name: "votes asked for before the own is on disk", disk: lateCandidate, prepare: often(faultCrash, faultIsolateLeader)},
		{name: "vote not saved", disk: savesWith(func(hs *raftpb.HardState, e []*raftpb.Entry) (*raftpb.HardState, []*raftpb.Entry) {
			return &raftpb.HardState{Term: hs.Term, Commit: hs.Commit}, e
		})},
		{name: "last entry of several not saved", disk: savesWith(func(hs *raftpb.HardState, e []*raftpb.Entry) (*raftpb.HardState, []*raftpb.Entry) {
			return hs, e[:max(min(len(e), 1), len(e)-1)]
		})},
		{name: "directory of snapshots not synced", noDirSync: true, prepare: often(faultPowerCut, faultCrash)},
		{name: "log not synced at start", noStartSync: true, prepare: often(faultCrash)},
		{name: "watermark ahead of a failed write", disk: hastyMark, prepare: often(faultDisk)},
		{name: "needed snapshots purged", disk: func(p *process, d disk) disk { return purgingDisk{d, p} }, prepare: often(faultCrash)},
		{name: "change of members without a sync", disk: func(_ *process, d disk) disk { return unsyncedDisk{d} }, prepare: often(faultMembers)},
		{name: "expiry whatever the version", turned: expireNow(0, store.Condition{})},
		{name: "expiry before its time", turned: expireNow(time.Second, store.Condition{Kind: store.IfMatch})},
		{name: "deadlines forgotten at start", recovered: func(st *store.State) { st.Expiry = new(btree.Set[string]) }, prepare: often(faultPowerCut)},
		{name: "sessions forgotten at start", recovered: func(st *store.State) { st.Sessions = store.Sessions{} }, prepare: often(faultCrash)},
		{name: "retry records forgotten at start", recovered: func(st *store.State) { st.Retries = store.NewRetryTable() }, prepare: often(faultCrash)},
		{name: "removed ids forgotten at start", recovered: func(st *store.State) { st.Removed = map[uint64]bool{} }, prepare: often(faultMembers, faultCrash)},
		{name: "version goes back at start", recovered: func(st *store.State) { st.RV -= min(st.RV, 1) }, prepare: often(faultCrash)},
		{name: "unknown outcome called refused", refuseUnknown: true, prepare: onlyFaults(faultPause, faultSlow, faultPartition)},
		{name: "refused retry called not applied", refuseRetries: true, prepare: retriesOnly(faultPartition, faultIsolateLeader, faultCrash)},
		{name: "retry answered like a new request", forgetFirsts: true, prepare: retriesOnly(faultPartition, faultIsolateLeader, faultCrash)},

		{name: "given up, and proposed again", deadlines: waitForEver, prepare: shortDeadlines(faultIsolateLeader, faultPartition, faultPause)},
		{name: "given up when all of its batch are", deadlines: waitForLast, prepare: shortDeadlines(faultIsolateLeader, faultPartition, faultPause)},
		{name: "bookmark within a version", watched: bookmarkNow},
		{name: "bookmark ahead of the events", watched: bookmarkAhead},
		{name: "watcher not woken", deaf: true},
		{name: "applied before it is committed", incoming: commitAll},
		{name: "sending waits for a lost host", blocks: waitForLost, prepare: onlyFaults(faultIsolate)},
		{name: "a new member is connected at once", connects: waitForNew, prepare: onlyFaults(faultMembers, faultIsolate)},
		{name: "founded without all of the list", answers: presumeAll},
		{name: "another list taken for the same", answers: presumeSameList},
		{name: "snapshot sent again at once", impatient: true, prepare: often(faultFull, faultIsolate, faultCrash)},
	}
}

func onlyFaults(faults ...simFault) func(*weather, *load) {
	return func(w *weather, _ *load) { w.faults = faults }
}

// often lets faults follow each other quickly.
func often(faults ...simFault) func(*weather, *load) {
	return func(w *weather, _ *load) {
		w.faults, w.mean, w.outage = faults, 150*time.Millisecond, 100*time.Millisecond
	}
}

// slowLinks lets answers be late, while there is always something to read that
// was just written.
func slowLinks(w *weather, l *load) {
	w.faults, w.mean = []simFault{faultSlow}, 300*time.Millisecond
	l.makers, l.keys = []opMaker{makePut, makeGet, makeGet}, 2
}

// retriesOnly lets clients make nothing but writes that they repeat.
func retriesOnly(faults ...simFault) func(*weather, *load) {
	return func(w *weather, l *load) {
		w.faults, w.mean = faults, 300*time.Millisecond
		l.makers = []opMaker{makeRetried}
	}
}

// shortDeadlines makes some clients much more patient than others.
func shortDeadlines(faults ...simFault) func(*weather, *load) {
	return func(w *weather, l *load) {
		w.faults, w.mean = faults, 300*time.Millisecond
		l.makers, l.timeouts = []opMaker{makePut}, []time.Duration{30 * time.Millisecond, 300 * time.Millisecond, 20 * time.Second}
	}
}

// bookmarkNow writes a bookmark whether or not more of a version follows.
func bookmarkNow(_ *process, w *httpapi.WatchStream) {
	if w.Part {
		_ = w.WriteBookmark() // the writer takes everything
	}
}

// bookmarkAhead writes one with what the store has, not what was passed on.
func bookmarkAhead(p *process, w *httpapi.WatchStream) {
	if rv := p.store.Version(); rv > w.RV && !w.Part {
		w.RV = rv
		_ = w.WriteBookmark() // as above
	}
}

func waitForEver(b *batch, place int) {
	b.deadlines[place] = b.deadlines[place].Add(time.Hour)
	b.deadline = b.deadlines[place]
}

func waitForLast(b *batch, _ int) {
	for i := range b.deadlines {
		b.deadlines[i] = b.deadline
	}
}

// lateDisk saves some time after it has said so.
func lateDisk(delay time.Duration) func(*process, disk) disk {
	return func(p *process, d disk) disk { return &late{disk: d, process: p, delay: delay} }
}

type late struct {
	disk
	process *process
	delay   time.Duration
	held    []func() error
}

func (d *late) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if len(d.held) == 0 {
		d.process.after(d.delay, func() { _ = d.flush() }) // nobody looks
	}
	d.held = append(d.held, func() error { return d.disk.save(hs, ents) })
	return nil
}

func (d *late) flush() error {
	held := d.held
	d.held = nil
	for _, save := range held {
		if err := save(); err != nil {
			return err
		}
	}
	return nil
}

func (d *late) sync() error { return nil }

func (d *late) commitSnapshot(snap *raftpb.Snapshot) error {
	if err := d.flush(); err != nil { // the log must stay in order
		return err
	}
	return d.disk.commitSnapshot(snap)
}

// deafDisk ignores errors.
type deafDisk struct{ disk }

func (d deafDisk) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if err := d.disk.save(hs, ents); err != errDisk {
		return err
	}
	return nil
}

// fullDisk takes a snapshot that had no room for one that is there.
type fullDisk struct{ disk }

func (d fullDisk) writeSnapshot(snap *raftpb.Snapshot, st *store.State) error {
	if err := d.disk.writeSnapshot(snap, st); !errors.Is(err, errNoSpace) {
		return err
	}
	return nil
}

// forgetfulDisk saves terms and votes only when there are entries to save.
type forgetfulDisk struct {
	disk
	saved *raftpb.HardState
}

func (d *forgetfulDisk) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if len(ents) > 0 && !raft.IsEmptyHardState(hs) {
		d.saved = hs
	} else if hs != nil && d.saved != nil {
		hs = &raftpb.HardState{Term: d.saved.Term, Vote: d.saved.Vote, Commit: hs.Commit}
	}
	return d.disk.save(hs, ents)
}

// changingDisk writes other snapshots than it is told to.
type changingDisk struct {
	disk
	change func(st *store.State)
}

func snapshotsWith(change func(st *store.State)) func(*process, disk) disk {
	return func(_ *process, d disk) disk { return changingDisk{d, change} }
}

func (d changingDisk) writeSnapshot(snap *raftpb.Snapshot, st *store.State) error {
	changed := *st
	d.change(&changed)
	return d.disk.writeSnapshot(snap, &changed)
}

// hastyDisk writes the state that the last snapshot should have had, under the
// index of this one.
type hastyDisk struct {
	disk
	last *store.State
}

func (d *hastyDisk) writeSnapshot(snap *raftpb.Snapshot, st *store.State) error {
	older := *st
	if d.last != nil {
		older = *d.last
		older.Index, older.Term = st.Index, st.Term
	}
	d.last = st
	return d.disk.writeSnapshot(snap, &older)
}

// disorderlyDisk writes the sessions of a snapshot in the order of a Go map.
type disorderlyDisk struct {
	disk
	process *process
}

func (d disorderlyDisk) writeSnapshot(snap *raftpb.Snapshot, st *store.State) error {
	if err := d.disk.writeSnapshot(snap, st); err != nil {
		return err
	}
	path := d.process.disk.bodyPath(st.Index)
	body, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if body, err = swapSessions(body); err != nil || body == nil {
		return err
	}
	d.process.sim.check.body(d.process, st.Index, body)
	return os.WriteFile(path, body, fsx.FileMode)
}

// swapSessions exchanges the first two session records of a snapshot, if it has
// two.
func swapSessions(body []byte) ([]byte, error) {
	payload, err := io.ReadAll(&store.FrameReader{R: bytes.NewReader(body)})
	if err != nil {
		return nil, err
	}
	rest := bytes.NewReader(payload)
	d := store.SnapshotDecoder{R: bufio.NewReader(rest)}
	offset := func() int { return len(payload) - rest.Len() - d.R.Buffered() }
	if _, err := d.R.Discard(len(store.SnapshotMagic)); err != nil {
		return nil, err
	}
	const headerFields = 7 // format, index, term, rv, now, number of the next retry, sum
	for range headerFields {
		d.Uint()
	}
	starts, scratch := []int{offset()}, store.NewState()
	for range 2 {
		if d.Uint() != store.RecordSession {
			return nil, d.Err
		}
		if err := d.Record(store.RecordSession, &scratch); err != nil {
			return nil, err
		}
		starts = append(starts, offset())
	}
	swapped := slices.Concat(payload[:starts[0]], payload[starts[1]:starts[2]], payload[starts[0]:starts[1]], payload[starts[2]:])
	var out bytes.Buffer
	_, err = (&store.FrameWriter{W: &out}).Write(swapped)
	return out.Bytes(), err
}

// truncateLog cuts synced records off the log, and the watermark that would
// tell.
func truncateLog(n *simNode) {
	s := n.sim
	paths, err := filepath.Glob(filepath.Join(n.dir, walDir, "*.wal"))
	if err != nil || len(paths) == 0 || s.chance(0.5) {
		return
	}
	path := paths[len(paths)-1]
	content, err := os.ReadFile(path)
	if err != nil {
		s.check.violate("simulator", "%v", err)
		return
	}
	used := len(bytes.TrimRight(content, "\x00"))
	keep := max(1024, used-s.rand.IntN(4096)) / sectorSize * sectorSize
	if keep >= used {
		return
	}
	clear(content[keep:])
	err = os.WriteFile(path, content, fsx.FileMode)
	if err == nil {
		err = forgetWatermark(n.dir)
	}
	if err != nil {
		s.check.violate("simulator", "%v", err)
	}
}

// damageLog zeroes a sector in the middle of what the log has on disk, which
// etcd's log takes for a write that was cut short, and takes the watermark that
// would tell. What is refused even so it repairs: this is about what is served.
func damageLog(n *simNode) {
	s := n.sim
	paths, err := filepath.Glob(filepath.Join(n.dir, walDir, "*.wal"))
	if err != nil || len(paths) == 0 || s.chance(0.5) {
		return
	}
	path, mark := paths[len(paths)-1], filepath.Join(n.dir, watermarkName)
	content, err := os.ReadFile(path)
	if err != nil {
		s.check.violate("simulator", "%v", err)
		return
	}
	markContent, err := os.ReadFile(mark)
	if err != nil {
		s.check.violate("simulator", "%v", err)
		return
	}
	used := len(bytes.TrimRight(content, "\x00")) / sectorSize
	if used < 4 {
		return
	}
	at := (used - 1 - s.rand.IntN(min(8, used-3))) * sectorSize
	damaged := bytes.Clone(content)
	clear(damaged[at : at+sectorSize])
	if err := errors.Join(os.WriteFile(path, damaged, fsx.FileMode), forgetWatermark(n.dir)); err != nil {
		s.check.violate("simulator", "%v", err)
	}
	if isRefused(n.dir) {
		if err := errors.Join(os.WriteFile(path, content, fsx.FileMode), os.WriteFile(mark, markContent, fsx.FileMode)); err != nil {
			s.check.violate("simulator", "%v", err)
		}
	}
}

func isRefused(dir string) bool {
	disk, err := openStorage(dir, zap.NewNop())
	if err != nil {
		return true
	}
	_, err = disk.load()
	return errors.Join(err, disk.close()) != nil
}

func forgetWatermark(dir string) error {
	if err := os.Remove(filepath.Join(dir, watermarkName)); err != nil {
		return err
	}
	w, err := openWatermark(dir, true)
	if err != nil {
		return err
	}
	defer w.file.Close()
	return w.write(watermark{})
}

// wipe deletes everything that a node had, and gives it a directory that says that
// it is the same.
func wipe(n *simNode) {
	if n.identity.Member == 0 || n.joins || n.sim.chance(0.7) {
		return
	}
	own := &founding{Member: n.id, Directory: n.identity.Directory}
	err := os.RemoveAll(n.dir)
	var files *storage
	if err == nil {
		files, err = openStorage(n.dir, zap.NewNop())
	}
	if err == nil {
		_, err = files.found(own, n.identity.Cluster, n.identity.Founders)
		err = errors.Join(err, files.close())
	}
	if err != nil {
		n.sim.check.violate("simulator", "%v", err)
	}
}

// firstConfState takes the configuration out of a received snapshot, and puts
// in the one that the cluster began with.
func firstConfState(p *process, m *raftpb.Message) {
	if m.GetType() != raftpb.MsgSnap {
		return
	}
	cs := &raftpb.ConfState{}
	for _, n := range p.sim.nodes {
		if !n.joins {
			cs.Voters = append(cs.Voters, n.id)
		}
	}
	m.Snapshot.Metadata.ConfState = cs
}

// presumeAll makes a node believe that who is silent agrees with it.
func presumeAll(p *simPlace, answers map[uint64]peerAnswer) {
	own := p.info.Founding
	for id, a := range answers {
		if a.info == nil && own != nil {
			presumed := *own
			presumed.Member, presumed.Directory = id, id
			answers[id] = peerAnswer{info: &peerInfo{Node: id, Founding: &presumed}}
		}
	}
}

// presumeSameList makes a node believe that others have its own list.
func presumeSameList(p *simPlace, answers map[uint64]peerAnswer) {
	own := p.info.Founding
	for id, a := range answers {
		if own != nil && a.info != nil && a.info.Founding != nil {
			info, f := *a.info, *a.info.Founding
			f.Members, info.Founding = own.Members, &f
			answers[id] = peerAnswer{info: &info}
		}
	}
}

// onceProposed lets every batch of a process through once, and does something
// else with the next attempts.
func onceProposed(again func(*raftpb.Message) *raftpb.Message) func(*process, *raftpb.Message) *raftpb.Message {
	proposed := map[batchID]bool{}
	return func(_ *process, m *raftpb.Message) *raftpb.Message {
		if m.GetType() != raftpb.MsgProp || m.GetEntries()[0].GetType() != raftpb.EntryNormal {
			return m
		}
		h, _, err := store.DecodeBatch(m.GetEntries()[0].GetData())
		if err != nil {
			return m
		}
		id := batchID{h.Session, h.Seq}
		if proposed[id] {
			return again(m)
		}
		proposed[id] = true
		return m
	}
}

// asNewBatch gives a batch another identity.
func asNewBatch(m *raftpb.Message) *raftpb.Message {
	m = proto.CloneOf(m)
	data := m.Entries[0].Data
	h, _, err := store.DecodeBatch(data)
	if err == nil {
		h.Session++
		h.Put(data)
	}
	return m
}

// anyAttempt makes a read take the answer of any attempt for its own, as if
// contexts were used again.
func anyAttempt(p *process, m *raftpb.Message) {
	if q := p.replica.reading; m.GetType() == raftpb.MsgReadIndexResp && q != nil {
		m.Entries[0].Data = binary.LittleEndian.AppendUint64(m.Entries[0].Data[:8:8], q.attempt)
	}
}

// readAtOnce makes a follower read before it has applied what it should.
func readAtOnce(_ *process, m *raftpb.Message) {
	if m.GetType() == raftpb.MsgReadIndexResp {
		m.Index = proto.Uint64(0)
	}
}

// expireByOwnClock deletes keys when the clock of each node says so.
func expireByOwnClock(p *process) {
	st, now := &p.store.State, p.node.clock().UnixMilli()
	var due []string
	st.Items.Scan(func(key string, it store.Item) bool {
		if it.Expires != 0 && it.Expires <= now {
			due = append(due, key)
		}
		return true
	})
	for _, key := range due {
		st.Items.Delete(key)
	}
}

// otherValue makes one node write something else than the others, once.
func otherValue() func(*process) {
	changed := false
	return func(p *process) {
		key, it, ok := p.store.State.Items.Max()
		if changed || !ok || p.node.id != 2 {
			return
		}
		changed = true
		p.store.State.Forget(key, it)
		it.Value += "?"
		p.store.State.Items.Set(key, it)
		p.store.State.Remember(key, it)
	}
}

// dropNewestEvent forgets the last event of the window.
func dropNewestEvent(st *store.State) {
	l := st.Events.Copy()
	if l.Count == 0 {
		return
	}
	last := &l.Chunks[len(l.Chunks)-1]
	last.Events = last.Events[:len(last.Events)-1]
	if len(last.Events) == 0 {
		l.Chunks = l.Chunks[:len(l.Chunks)-1]
	}
	l.Count--
	st.Events = l
}

// splitTxn writes the first operation of a transaction before the others.
func splitTxn(p *process, c *store.Command) {
	if c.Op != store.OpTxn {
		return
	}
	t, err := store.DecodeTxn(c.Value)
	if err != nil || len(t.Then) < 2 || len(t.Compare) > 0 {
		return
	}
	first, rest := store.Txn{Then: t.Then[:1]}, store.Txn{Then: t.Then[1:]}
	if _, _, err := p.loop.enqueue(&store.Command{Op: store.OpTxn, Value: first.Encode()}, p.node.clock().Add(time.Second)); err == nil {
		c.Value = rest.Encode()
	}
}

// checkEarly looks whether a condition holds now, and not when it counts.
func checkEarly(p *process, c *store.Command) {
	it, _, exists := p.store.Get(c.Key)
	if c.Op == store.OpPut && c.Condition.Holds(it, exists) {
		c.Condition = store.Condition{}
	}
}

// firstPeerURLs replaces addresses by those of the first day.
func firstPeerURLs(st *store.State) {
	st.Members = maps.Clone(st.Members)
	for id, m := range st.Members {
		m.PeerURL = fmt.Sprintf("http://first%d", id)
		st.Members[id] = m
	}
}

// laterConfig is a disk that takes its time for a snapshot, and then saves it
// with the configuration of that moment.
func laterConfig(p *process, d disk) disk {
	p.sim.disk.background = time.Second
	return lateConfigDisk{d, p}
}

type lateConfigDisk struct {
	disk
	process *process
}

func (d lateConfigDisk) commitSnapshot(snap *raftpb.Snapshot) error {
	snap = proto.CloneOf(snap)
	snap.Metadata.ConfState = d.process.replica.confState
	return d.disk.commitSnapshot(snap)
}

func leadsIt(p *process) bool { return p.replica.role == raft.StateLeader }

// indexAtOnce makes a leader tell at once what it has committed.
func indexAtOnce(p *process, m *raftpb.Message) {
	if m.GetType() == raftpb.MsgReadIndex && leadsIt(p) {
		p.sim.network.send(p, &raftpb.Message{
			Type: raftpb.MsgReadIndexResp.Enum(), From: new(p.node.id), To: new(m.GetFrom()), Term: new(p.replica.term),
			Index: new(p.replica.committed), Entries: m.GetEntries(),
		})
	}
}

// commitAll tells a follower that all it has is committed.
func commitAll(p *process, m *raftpb.Message) {
	if n := len(m.GetEntries()); m.GetType() == raftpb.MsgApp && n > 0 {
		m.Commit = new(m.Entries[n-1].GetIndex())
	}
}

// waitForLost waits for who does not take what it is sent.
func waitForLost(p *process, m *raftpb.Message) time.Duration {
	if p.sim.network.cut[p.node.id][m.GetTo()] {
		return 5 * time.Second
	}
	return 0
}

// waitForNew connects to a member before it goes on: one that is not there yet
// does not answer.
func waitForNew(p *process, members []store.Member) time.Duration {
	for _, m := range members {
		if m.ID <= uint64(len(p.sim.nodes)) && p.sim.node(m.ID).process == nil && m.ID != p.node.id {
			return peerDialTimeout
		}
	}
	return 0
}

// votesLate is a disk that takes its time for a hard state alone.
type votesLate struct{ *late }

func lateVotes(p *process, d disk) disk {
	return votesLate{&late{disk: d, process: p, delay: 2 * time.Millisecond}}
}

func (d votesLate) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if len(ents) == 0 {
		return d.late.save(hs, ents)
	}
	return errors.Join(d.late.flush(), d.late.disk.save(hs, ents))
}

// candidacyLate is a disk that takes its time for a term in which its node votes
// for itself.
type candidacyLate struct{ votesLate }

func lateCandidate(p *process, d disk) disk { return candidacyLate{lateVotes(p, d).(votesLate)} }

func (d candidacyLate) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if !raft.IsEmptyHardState(hs) && hs.GetVote() == d.process.node.id {
		return d.votesLate.save(hs, ents)
	}
	return errors.Join(d.late.flush(), d.late.disk.save(hs, ents))
}

func (d candidacyLate) sync() error { return errors.Join(d.late.flush(), d.late.disk.sync()) }

// changedDisk saves something else.
type changedDisk struct {
	disk
	change func(*raftpb.HardState, []*raftpb.Entry) (*raftpb.HardState, []*raftpb.Entry)
}

func savesWith(change func(*raftpb.HardState, []*raftpb.Entry) (*raftpb.HardState, []*raftpb.Entry)) func(*process, disk) disk {
	return func(_ *process, d disk) disk { return changedDisk{d, change} }
}

func (d changedDisk) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	if raft.IsEmptyHardState(hs) {
		hs = &raftpb.HardState{}
	}
	hs, ents = d.change(hs, ents)
	return d.disk.save(hs, ents)
}

// hastyMark notes that the log has what it has not taken.
func hastyMark(p *process, d disk) disk { return hastyMarkDisk{d, p} }

type hastyMarkDisk struct {
	disk
	process *process
}

func (d hastyMarkDisk) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	err := d.disk.save(hs, ents)
	if n := len(ents); err != nil && n > 0 {
		d.process.disk.reached.index, d.process.disk.reached.term = ents[n-1].GetIndex(), ents[n-1].GetTerm()
	}
	return err
}

// purgingDisk deletes all bodies of snapshots.
type purgingDisk struct {
	disk
	process *process
}

func (d purgingDisk) purge() error {
	if err := d.disk.purge(); err != nil {
		return err
	}
	paths, err := filepath.Glob(filepath.Join(d.process.node.dir, snapDir, "*"+bodySuffix))
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// unsyncedDisk does not sync what save leaves out.
type unsyncedDisk struct{ disk }

func (d unsyncedDisk) sync() error { return nil }

// expireNow lets a leader expire keys so much before their time, on a condition.
func expireNow(early time.Duration, c store.Condition) func(*process) {
	return func(p *process) {
		if !leadsIt(p) || !p.sim.chance(0.01) {
			return
		}
		for _, cmd := range p.store.Expired(p.node.clock().Add(early).UnixMilli(), 1, 1) {
			cmd.Condition.Kind = c.Kind
			_, _, _ = p.loop.enqueue(&cmd, p.node.clock().Add(time.Second))
		}
	}
}

var (
	plantedReport = flag.Bool("planted.report", false, "print the table of planted bugs")
	plantedSeeds  = flag.Int("planted.seeds", 40, "largest `number` of seeds for each planted bug")
)

// TestPlanted looks for each planted bug, seed by seed, until a check notices.
func TestPlanted(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("takes a while, and finds no races")
	}
	if *plantedReport {
		fmt.Printf("%-42s %-16s %5s %8s\n", "planted bug", "found by", "seeds", "wall")
	}
	for i, bug := range plants() {
		t.Run(bug.name, func(t *testing.T) {
			start := time.Now()
			for seed := uint64(1); seed <= uint64(*plantedSeeds); seed++ {
				r := runOnce(t, seed, 30*time.Second, plants()[i])
				if len(r.Violations) == 0 {
					continue
				}
				if *plantedReport {
					fmt.Printf("%-42s %-16s %5d %7.2fs\n", bug.name, r.Violations[0].Check, seed, time.Since(start).Seconds())
				}
				t.Logf("seed %d at %v: %s: %.300s", seed, r.Violations[0].At, r.Violations[0].Check, r.Violations[0].Text)
				return
			}
			t.Errorf("not found in %d seeds, %v", *plantedSeeds, time.Since(start))
		})
	}
}
