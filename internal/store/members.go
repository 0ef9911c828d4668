package store

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
)

const memberURLMax = 1 << 10 // bytes

// Check says whether all that is known of a member can be used as what it is.
// Some of it may be missing.
func (m *Member) Check() error {
	if m.ID == 0 {
		return fmt.Errorf("%w: a member without ID", ErrMalformed)
	}
	for _, s := range []string{m.PeerURL, m.ClientURL} {
		if s == "" {
			continue
		}
		if len(s) > memberURLMax {
			return fmt.Errorf("%w: a URL of %d bytes", ErrMalformed, len(s))
		}
		if u, err := url.Parse(s); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return fmt.Errorf("%w: URL %q", ErrMalformed, s)
		}
	}
	return nil
}

// Member is one node of the cluster, as the replicated state knows it.
type Member struct {
	ID        uint64 `json:"id"`
	Name      string `json:"name,omitempty"`
	PeerURL   string `json:"peerURL"`
	ClientURL string `json:"clientURL,omitempty"`
	Learner   bool   `json:"learner,omitempty"` // gets the log but has no vote
	// Promote makes a learner a voter as soon as it has caught up.
	Promote bool `json:"promote,omitempty"`
	// Directory is the number of the data directory that the member started
	// with, 0 until then. A member that comes with another one has forgotten what
	// it promised.
	Directory uint64 `json:"directory,string,omitempty"`
	// extra is a JSON object of the fields that only newer programs know, or "".
	// They stay as they are.
	extra string
}

// memberFields is a member without extra, and without methods.
type memberFields Member

// MarshalJSON adds the fields that only newer programs know.
func (m Member) MarshalJSON() ([]byte, error) {
	b, err := json.Marshal(memberFields(m))
	if err != nil || m.extra == "" {
		return b, err
	}
	return append(append(b[:len(b)-1], ','), m.extra[1:]...), nil
}

// UnmarshalJSON keeps the fields that it does not know.
func (m *Member) UnmarshalJSON(b []byte) error {
	if err := json.Unmarshal(b, (*memberFields)(m)); err != nil {
		return err
	}
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	for name := range all {
		if slices.ContainsFunc(memberFieldNames, func(known string) bool { return strings.EqualFold(known, name) }) {
			delete(all, name)
		}
	}
	m.extra = encodeFields(all)
	return nil
}

// Members returns the members in the order of their ids.
func (s *Store) Members() []Member {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.SortedMembers()
}

func (s *State) SortedMembers() []Member {
	return slices.SortedFunc(maps.Values(s.Members), func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
}

// Member returns one member.
func (s *Store) Member(id uint64) (Member, bool) {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	m, ok := s.State.Members[id]
	return m, ok
}

// MemberUpdates counts the updates of members that were applied here.
func (s *Store) MemberUpdates() int {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return s.State.Updates
}

// MemberCount returns how many members there are. Every write asks.
func (s *Store) MemberCount() int {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	return len(s.State.Members)
}

// MemberChange is what a configuration change does to the members.
type MemberChange struct {
	Kind   MemberChangeKind
	Member Member // of promote and remove only the ID counts
}

type MemberChangeKind int

// ApplyMember applies a configuration change at index. refused says why it must
// not happen; every member comes to the same conclusion. A batch that was
// applied before is not fresh and changes nothing.
func (s *Store) ApplyMember(index, term uint64, h BatchHeader, c MemberChange) (fresh bool, refused, err error) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	if err := s.State.Follows(index); err != nil {
		return false, nil, err
	}
	s.State.Index, s.State.Term = index, term
	if !s.State.first(h) {
		s.seal(h.digest(nil, false))
		return false, nil, nil
	}
	refused = s.State.ChangeMember(c)
	s.seal(h.digest(binary.AppendUvarint([]byte{byte(c.Kind)}, c.Member.ID), true))
	return true, refused, nil
}

func (s *State) ChangeMember(c MemberChange) error {
	id := c.Member.ID
	old, exists := s.Members[id]
	s.membersStale = true
	switch {
	case s.Removed[id]:
		return fmt.Errorf("member %d was removed, and an ID is never used again: take another one", id)
	case c.Kind == AddLearner && exists:
		return fmt.Errorf("member %d exists already, at %s", id, old.PeerURL)
	case c.Kind != AddLearner && !exists:
		return fmt.Errorf("there is no member %d", id)
	case c.Kind == PromoteLearner && !old.Learner:
		return fmt.Errorf("member %d is a voter already", id)
	case c.Kind == RemoveMember && !old.Learner && s.voters() == 1:
		return fmt.Errorf("member %d is the last voter", id)
	}
	switch c.Kind {
	case RemoveMember:
		delete(s.Members, id)
		s.Removed[id] = true
		return nil
	case PromoteLearner:
		old.Learner, old.Promote = false, false
		s.Members[id] = old
		return nil
	default:
		if owner := s.peerURLOwner(c.Member); owner != 0 {
			return fmt.Errorf("member %d already has the peer URL %s", owner, c.Member.PeerURL)
		}
		c.Member.Learner = true
		if s.Level < 2 {
			c.Member.extra = ""
		}
		s.Members[id] = c.Member
		return nil
	}
}

// peerURLOwner returns the ID of another member that has m's peer URL, or 0.
func (s *State) peerURLOwner(m Member) uint64 {
	for _, other := range s.Members {
		if other.ID != m.ID && other.PeerURL == m.PeerURL {
			return other.ID
		}
	}
	return 0
}

// DecodeMember reads who a member is.
func DecodeMember[T string | []byte](value T) (m Member, err error) {
	if err := json.Unmarshal([]byte(value), &m); err != nil {
		return m, fmt.Errorf("%w: member: %w", ErrMalformed, err)
	}
	return m, nil
}

// UpdateMember changes what is known of a member: the fields that are set.
func (s *State) UpdateMember(update Member) Result {
	m, ok := s.Members[update.ID]
	if !ok {
		return Result{Status: StatusNotFound}
	}
	m.Name = cmp.Or(update.Name, m.Name)
	m.PeerURL = cmp.Or(update.PeerURL, m.PeerURL)
	m.ClientURL = cmp.Or(update.ClientURL, m.ClientURL)
	m.Directory = cmp.Or(update.Directory, m.Directory)
	if s.Level >= 2 {
		m.extra = mergeFields(m.extra, update.extra)
	}
	if s.peerURLOwner(m) != 0 {
		return Result{Status: StatusPrecondition}
	}
	s.Members[m.ID] = m
	s.membersStale = true
	s.Updates++
	return Result{Status: StatusReplaced}
}

// memberFieldNames are the fields of a member that are known.
var memberFieldNames = []string{"id", "name", "peerURL", "clientURL", "learner", "promote", "directory"}

const (
	AddLearner MemberChangeKind = iota
	PromoteLearner
	RemoveMember
)
