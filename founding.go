package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"

	"raftrv/internal/fsx"
	"raftrv/internal/store"
)

// This file is how a cluster comes to be. It is founded once: every member of the
// list answers that it is empty, with the same list and the same token. The
// cluster's number is made then, from the list and the number of each member's
// data directory, and is kept in the directories. No flag can change it later.
//
// All members are needed, not a majority. A majority of empty nodes may be what
// is left after their disks were lost, and to found a cluster around the others
// would throw away what those hold.
//
// Nodes do not vote about it. Before a node answers anybody it writes down the
// number of its directory, its founding record; whoever has seen all of them
// founds the cluster by itself, and all come to the same one. A node that did not
// see all of them, because another was faster, finds itself among the founders
// that this other one names, with its present directory, and does the same.
// So whatever dies in between:
//
//   - A node that restarts has its record, and answers as before.
//   - A node that lost its directory comes with another number. Either nobody had
//     founded with the old one, and it takes part anew, or somebody had, and it is
//     told that it was a member with another directory.
//   - Two nodes may have seen different directories of a third one that was wiped
//     meanwhile, and found two clusters. Each directory belongs to one of them for
//     good, so at most one of the two ever has a majority; a node that is left out
//     notices and says so (leftOut).

// founding is the record of a node that has no cluster yet, and what it tells
// the others.
type founding struct {
	Format    int            `json:"format"`
	Member    uint64         `json:"member"`
	Directory uint64         `json:"directory,string"` // number of the data directory
	Members   []store.Member `json:"members"`          // the list: IDs and peer URLs
	Token     string         `json:"token,omitempty"`  // digest of --cluster-token
	// Backup is the digest of the backup that the cluster is restored from. The
	// list and the token are then those that restore was given.
	Backup string `json:"backup,omitempty"`

	dir string // path of the data directory, for people
}

const foundingFormat = 1

// newFounding returns what a node would found with these flags.
func newFounding(cfg *config) *founding {
	f := &founding{Format: foundingFormat, Member: cfg.id, Directory: randomID(), dir: cfg.dataDir}
	for _, m := range cfg.members {
		f.Members = append(f.Members, store.Member{ID: m.ID, PeerURL: m.PeerURL})
	}
	if cfg.token != "" {
		sum := sha256.Sum256([]byte(cfg.token))
		f.Token = fmt.Sprintf("%x", sum[:8])
	}
	return f
}

// agrees says whether two nodes would found the same cluster.
func (f *founding) agrees(o *founding) bool {
	return f.Token == o.Token && f.Backup == o.Backup && slices.Equal(f.Members, o.Members)
}

// clusterID returns the number of the cluster that these members found: those of
// the list, with their directories.
func (f *founding) clusterID(founders []store.Member) uint64 {
	h := sha256.New()
	for _, m := range founders {
		fmt.Fprintf(h, "%d=%s/%x,", m.ID, m.PeerURL, m.Directory)
	}
	fmt.Fprintf(h, "%s,%s", f.Token, f.Backup)
	return binary.BigEndian.Uint64(h.Sum(nil)) | 1 // never zero
}

// peerAnswer is what came from the URL of a member.
type peerAnswer struct {
	info *peerInfo
	err  error // instead
}

// foundingStep is what a round of questions came to. Nothing of it set means to
// ask again.
type foundingStep struct {
	cluster  uint64         // founded with this number ...
	founders []store.Member // ... by these; those that do not agree yet are without a directory
	waiting  []string       // for whom, and what they answered
	refusal  error          // the way out, at once
	// conflicts are the way out if they last, by member: somebody may be about to
	// start a node with other flags.
	conflicts map[uint64]error
}

// decide says what a node is to do that has this record and got these answers,
// by member. At its own URL there may be none, as not every network leads a node
// to itself; process is its number, so that it knows itself.
func (f *founding) decide(process uint64, answers map[uint64]peerAnswer) foundingStep {
	var step foundingStep
	for _, m := range f.Members {
		if info := answers[m.ID].info; info != nil && f.isFounder(info) {
			step.cluster, step.founders, step.refusal = f.follow(m, info)
			return step
		}
	}
	step.founders, step.conflicts = slices.Clone(f.Members), map[uint64]error{}
	for i, m := range f.Members {
		directory, refusal, conflict := f.judge(process, m, answers[m.ID])
		step.founders[i].Directory = directory
		if err := errors.Join(refusal, conflict); err != nil {
			step.waiting = append(step.waiting, err.Error())
		} else if directory == 0 {
			step.waiting = append(step.waiting, fmt.Sprintf("node %d (%s): %s", m.ID, m.PeerURL, answers[m.ID].describe()))
		}
		if step.refusal == nil {
			step.refusal = refusal
		}
		if conflict != nil {
			step.conflicts[m.ID] = conflict
		}
	}
	if len(step.waiting) == 0 {
		step.cluster = f.clusterID(step.founders)
	}
	return step
}

// isFounder says whether a node that has a cluster names this one as a founder
// of it, with this directory.
func (f *founding) isFounder(info *peerInfo) bool {
	return info.Cluster != "" && slices.ContainsFunc(info.Founders, func(m store.Member) bool {
		return m.ID == f.Member && m.Directory == f.Directory
	})
}

// follow founds what another node has founded with this one.
func (f *founding) follow(m store.Member, info *peerInfo) (uint64, []store.Member, error) {
	if slices.Contains(info.Removed, f.Member) {
		return 0, nil, errRemovedID(f.Member)
	}
	if cluster := f.clusterID(info.Founders); fmt.Sprintf("%x", cluster) == info.Cluster {
		return cluster, info.Founders, nil
	}
	return 0, nil, fmt.Errorf("node %d (%s) has founded cluster %s with this node, but from another list or token than it has now: "+
		"start this one with the --cluster and --cluster-token of that one", m.ID, m.PeerURL, info.Cluster)
}

// judge returns the directory of a member that agrees, or why it does not, if
// that is more than that it is not there yet.
func (f *founding) judge(process uint64, m store.Member, a peerAnswer) (directory uint64, refusal, conflict error) {
	name := fmt.Sprintf("node %d (%s)", m.ID, m.PeerURL)
	info := a.info
	switch {
	case m.ID == f.Member && (info == nil || info.Process == process):
		return f.Directory, nil, nil
	case m.ID == f.Member:
		return 0, nil, fmt.Errorf("another process answers at the address that --cluster has for this node, %s: "+
			"is it node %d, or is a node started twice?", m.PeerURL, max(info.Node, 1))
	case info == nil:
		return 0, nil, nil
	case info.isOlder():
		return 0, nil, fmt.Errorf("%s runs an older version, which founds clusters in another way: start all nodes with the same one", name)
	case info.Cluster != "":
		return 0, f.refuse(name, info), nil
	case info.Founding == nil:
		return 0, nil, nil // it joins
	}
	other := info.Founding
	switch {
	case !slices.Equal(f.Members, other.Members):
		return 0, nil, fmt.Errorf("%s has another list, %s, and this node has %s: start all nodes with the same --cluster",
			name, formatList(other.Members), formatList(f.Members))
	case info.Node != m.ID:
		return 0, nil, fmt.Errorf("%s: node %d answers there: every node needs an address of its own in --cluster", name, info.Node)
	case f.Token != other.Token:
		return 0, nil, fmt.Errorf("%s has another token: start all nodes with the same --cluster-token", name)
	case f.Backup != other.Backup:
		return 0, nil, fmt.Errorf("%s %s, and this node %s: restore all nodes from the same file, or none", name, restored(other), restored(f))
	}
	return other.Directory, nil, nil
}

func restored(f *founding) string {
	if f.Backup == "" {
		return "is empty"
	}
	digest, how, _ := strings.Cut(f.Backup, " ")
	return strings.TrimRight(fmt.Sprintf("was restored from the backup %.12s %s", digest, how), " ")
}

// refuse says why a node without data keeps away from a cluster that is there.
func (f *founding) refuse(name string, info *peerInfo) error {
	if slices.Contains(info.Removed, f.Member) {
		return errRemovedID(f.Member)
	}
	if known := info.directoryOf(f.Member); known != 0 && known != f.Directory {
		err := errForgotten(f.Member, f.dir)
		if f.Backup != "" {
			err = fmt.Errorf("%w; or, if the backup is to replace that cluster, %s, stop all nodes and restore all of them", err, info.Cluster)
		}
		return err
	}
	return fmt.Errorf("%s has data, of cluster %s, and this node %s: to add this node to that cluster make it a member "+
		"(curl -X POST -d PEER-URL http://NODE/ID), under a new ID if it was one before, and start it with --join; to found a new cluster "+
		"instead give all nodes of --cluster an empty --data-dir, or the same backup", name, info.Cluster, restored(f))
}

func formatList(members []store.Member) string {
	var urls []string
	for _, m := range members {
		urls = append(urls, fmt.Sprintf("%d=%s", m.ID, m.PeerURL))
	}
	return strings.Join(urls, ",")
}

// describe says what a node answered from which nothing follows.
func (a peerAnswer) describe() string {
	var call *url.Error
	switch {
	case errors.As(a.err, &call):
		return fmt.Sprintf("nothing (%v)", call.Err)
	case a.err != nil:
		return a.err.Error()
	case a.info == nil:
		return "nothing"
	case a.info.Cluster != "":
		return "has data, of cluster " + a.info.Cluster
	case a.info.Founding == nil:
		return "was started with --join, and looks for a cluster, too"
	default:
		return "waits to found a cluster of " + formatList(a.info.Founding.Members)
	}
}

// The record is a file until the first state is in the log.
const foundingName = "founding"

// loadFounding returns the record, or nil if there is none.
func (s *storage) loadFounding() (*founding, error) {
	b, err := os.ReadFile(s.path(foundingName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := &founding{dir: s.dir}
	err = json.Unmarshal(b, f)
	if err == nil && f.Format != foundingFormat {
		err = fmt.Errorf("format %d, this program knows %d", f.Format, foundingFormat)
	}
	if err != nil {
		return nil, fmt.Errorf("%s is damaged, or of another version (%w): this directory holds no data of a cluster yet, delete it",
			s.path(foundingName), err)
	}
	return f, nil
}

// saveFounding makes the record durable.
func (s *storage) saveFounding(f *founding) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	temp := s.path(foundingName + ".tmp")
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, fsx.FileMode)
	if err != nil {
		return err
	}
	_, err = file.Write(b)
	if err == nil {
		err = file.Sync()
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp, s.path(foundingName)); err != nil {
		return err
	}
	return fsx.SyncDir(s.dir)
}

// removeFounding deletes the record, before the replica promises anything: with
// it a directory that lost its log would look as if it had never had one.
func (s *storage) removeFounding() error {
	err := os.Remove(s.path(foundingName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return errors.Join(err, fsx.SyncDir(s.dir))
}

// found makes the directory that of a founding member.
func (s *storage) found(f *founding, cluster uint64, founders []store.Member) (*recovered, error) {
	rec, err := s.create(identity{Member: f.Member, Cluster: cluster, Directory: f.Directory, Backup: f.Backup, Founders: founders})
	if err != nil {
		return nil, adviseRoom(err)
	}
	return rec, s.writeFirstState(rec, founders)
}

// adviseRoom adds to an error what to do if the disk has no room for a cluster. The
// directory looks as if it could be thrown away, and the others count on it.
func adviseRoom(err error) error {
	if errors.Is(err, errNoSpace) || errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w: make room, or choose a smaller --wal-segment-bytes, and start again; keep the data directory, as the others may have founded the cluster with it", err)
	}
	return err
}

// writeFirstState ends what found began, also after a crash. Every founder
// writes the same state.
func (s *storage) writeFirstState(rec *recovered, founders []store.Member) error {
	st := store.NewState()
	st.Index, st.Term = store.FirstIndex, store.FirstTerm
	if rec.identity.Backup != "" {
		var err error
		if st, err = s.readBody(store.FirstIndex, store.FirstTerm); err != nil {
			return err
		}
	}
	for _, m := range founders {
		st.Members[m.ID] = m
	}
	if err := s.bootstrap(rec, st); err != nil {
		return adviseRoom(err)
	}
	return s.removeFounding()
}
