package httpapi

import (
	"context"
	"net/http"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file is the HTTP front of the membership: who is in the cluster, and how
// that changes. Every change waits until it is applied on this node.

const MemberBodySizeMax = 4 << 10 // bytes

// Member is a member as clients see it. store.Member has other names in its JSON,
// which is replicated and so stays as it is.
type Member struct {
	ID         uint64 `json:"id"`
	Name       string `json:"name,omitempty"`
	PeerURL    string `json:"peerUrl"`
	ClientURL  string `json:"clientUrl,omitempty"`
	Learner    bool   `json:"learner,omitempty"`
	Promote    bool   `json:"promote,omitempty"`
	InstanceID uint64 `json:"instanceId,string,omitempty"` // of the data directory
}

// Members returns members as clients see them.
func Members(all []store.Member) []Member {
	members := make([]Member, len(all))
	for i, m := range all {
		members[i] = Member{m.ID, m.Name, m.PeerURL, m.ClientURL, m.Learner, m.Promote, m.Directory}
	}
	return members
}

// memberBody is a member as a client describes it.
type memberBody struct {
	Name      string
	PeerURL   string
	ClientURL string
	Learner   bool // stay one
}

func (h *httpAPI) listMembers(w http.ResponseWriter, r request) error {
	if err := h.Store.Fresh(r.Context(), r.freshness()); err != nil {
		return err
	}
	return writeJSON(w, r, struct {
		LeaderID uint64   `json:"leaderId"`
		Members  []Member `json:"members"`
	}{h.Store.Status().LeaderID, Members(h.Store.Members())})
}

// addMember is the call that raftexample had: POST /{id} with the peer URL as
// the body.
func (h *httpAPI) addMember(w http.ResponseWriter, r request) error {
	id, err := ParseMemberID(r.name)
	if err != nil {
		return err
	}
	body, err := h.readBody(w, r.Request, peerURLSizeMax)
	if err != nil {
		return err
	}
	peerURL, err := ParsePeerURL(body)
	if err != nil {
		return err
	}
	return done(w, h.Store.AddMember(r.Context(), r.params.timeout, store.Member{ID: id, PeerURL: peerURL, Promote: true}))
}

func (h *httpAPI) postMember(w http.ResponseWriter, r request) error {
	m, err := h.readMember(w, r)
	if err != nil {
		return err
	}
	if m.PeerURL == "" {
		return fault.ErrInvalid.WithDetail("peerUrl is missing")
	}
	return done(w, h.Store.AddMember(r.Context(), r.params.timeout, m))
}

func (h *httpAPI) putMember(w http.ResponseWriter, r request) error {
	m, err := h.readMember(w, r)
	if err != nil {
		return err
	}
	if m.Learner {
		return fault.ErrInvalid.WithDetail("learner is of new members only: a voter does not become a learner again")
	}
	m.Promote = false
	return done(w, h.Store.UpdateMember(r.Context(), r.params.timeout, m))
}

func (h *httpAPI) deleteMember(w http.ResponseWriter, r request) error {
	return h.withMember(w, r, h.Store.RemoveMember)
}

func (h *httpAPI) promoteMember(w http.ResponseWriter, r request) error {
	return h.withMember(w, r, h.Store.PromoteMember)
}

func (h *httpAPI) postLeader(w http.ResponseWriter, r request) error {
	return h.withMember(w, r, h.Store.TransferLeader)
}

func (h *httpAPI) withMember(w http.ResponseWriter, r request, call func(context.Context, time.Duration, uint64) error) error {
	id, err := ParseMemberID(r.name)
	if err != nil {
		return err
	}
	return done(w, call(r.Context(), r.params.timeout, id))
}

// done answers a call that has nothing to tell but that it succeeded.
func done(w http.ResponseWriter, err error) error {
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
	}
	return err
}

// readMember reads the member that a request is about.
func (h *httpAPI) readMember(w http.ResponseWriter, r request) (m store.Member, err error) {
	if m.ID, err = ParseMemberID(r.name); err != nil {
		return m, err
	}
	text, err := h.readBody(w, r.Request, MemberBodySizeMax)
	if err != nil {
		return m, err
	}
	var body memberBody
	err = decodeBody(text, jsonField{"name", &body.Name}, jsonField{"peerUrl", &body.PeerURL}, jsonField{"clientUrl", &body.ClientURL}, jsonField{"learner", &body.Learner})
	if err != nil {
		return m, err
	}
	for _, u := range []*string{&body.PeerURL, &body.ClientURL} {
		if *u == "" {
			continue
		}
		if *u, err = ParseNodeURL(*u); err != nil {
			return m, fault.ErrInvalid.WithDetail("peerUrl and clientUrl: %v", err)
		}
	}
	m.Name, m.PeerURL, m.ClientURL = body.Name, body.PeerURL, body.ClientURL
	m.Learner, m.Promote = body.Learner, !body.Learner
	return m, nil
}
