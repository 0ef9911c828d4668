package httpapi

import (
	"slices"
	"strings"
	"testing"

	"raftrv/internal/store"
)

func TestHTTP_Members(t *testing.T) {
	const path = "/-/v1/members/4"
	full := `{"name":"four","peerUrl":"http://a:1","clientUrl":"https://b:2"}`
	tests := []struct {
		method, target, body string
		want                 memberCall // if there is no detail
		detail               string     // part of it: refused
	}{
		{"POST", path, `{"peerUrl":"http://a:1"}`, memberCall{"add", store.Member{ID: 4, PeerURL: "http://a:1", Promote: true}}, ""},
		{"POST", path, full, memberCall{"add", store.Member{ID: 4, Name: "four", PeerURL: "http://a:1", ClientURL: "https://b:2", Promote: true}}, ""},
		{"POST", path, " {\"peerUrl\":\" http://a:1\\n\"}\n", memberCall{"add", store.Member{ID: 4, PeerURL: "http://a:1", Promote: true}}, ""},
		{"POST", path, `{"peerUrl":"http://a:1","learner":true}`, memberCall{"add", store.Member{ID: 4, PeerURL: "http://a:1", Learner: true}}, ""},
		{"POST", path, `{"peerUrl":"http://a:1","learner":false}`, memberCall{"add", store.Member{ID: 4, PeerURL: "http://a:1", Promote: true}}, ""},
		{"PUT", path, full, memberCall{"update", store.Member{ID: 4, Name: "four", PeerURL: "http://a:1", ClientURL: "https://b:2"}}, ""},
		{"PUT", path, `{"clientUrl":"http://[::1]:65535"}`, memberCall{"update", store.Member{ID: 4, ClientURL: "http://[::1]:65535"}}, ""},
		{"PUT", path, `{}`, memberCall{"update", store.Member{ID: 4}}, ""},
		{"DELETE", path, "", memberCall{"remove", store.Member{ID: 4}}, ""},
		{"DELETE", "/-/v1/members/18446744073709551615", "", memberCall{"remove", store.Member{ID: 1<<64 - 1}}, ""},
		{"POST", path + "/promote", "", memberCall{"promote", store.Member{ID: 4}}, ""},
		{"POST", "/-/v1/leader/4", "", memberCall{"transfer", store.Member{ID: 4}}, ""},

		{"POST", path, `{}`, memberCall{}, "peerUrl is missing"},
		{"POST", path, `null`, memberCall{}, "must be a JSON object"},
		{"POST", path, `{"peerurl":"http://a:1"}`, memberCall{}, `unknown field "peerurl"`},
		{"POST", path, `{"peerURL":"http://a:1"}`, memberCall{}, `unknown field "peerURL"; there are name, peerUrl, clientUrl, learner`},
		{"POST", path, `{"peerUrl":"http://a:1","peerUrl":"http://b:1"}`, memberCall{}, `field "peerUrl" is given twice`},
		{"POST", path, `{"peerUrl":"http://0.0.0.0:1"}`, memberCall{}, "a host that others can reach"},
		{"POST", path, `{"peerUrl":"http://a:1","clientUrl":"http://[::]:1"}`, memberCall{}, "a host that others can reach"},
		{"POST", path, `{"clientUrl":"http://a:1"}`, memberCall{}, "peerUrl is missing"},
		{"PUT", path, `{"learner":true}`, memberCall{}, "learner is of new members only"},
		{"PUT", path, `{"id":5}`, memberCall{}, `unknown field "id"`},
		{"PUT", path, `{"instanceId":"5"}`, memberCall{}, `unknown field "instanceId"`},
	}
	for _, method := range []string{"POST", "PUT"} {
		for _, tt := range [][2]string{ // body, detail
			{"", "the body: unexpected EOF"},
			{"http://a:1", "the body: invalid character"},
			{`"http://a:1"`, "the body: must be a JSON object"},
			{`[]`, "the body: must be a JSON object"},
			{`{"peerUrl":"http://a:1"`, "the body: unexpected EOF"},
			{`{"peerUrl":1}`, "peerUrl: a JSON number is no string"},
			{`{"peerUrl":"http://a:1","learner":"yes"}`, "learner: a JSON string is no true or false"},
			{`{"peerUrl":"http://a:1","promote":true}`, `unknown field "promote"`},
			{full + full, "something follows"},
			{full + "}", "something follows"},
			{full + " x", "something follows"},
			{`{"peerUrl":"a:1"}`, "with a port and no path"},
			{`{"peerUrl":"http://a"}`, "with a port and no path"},
			{`{"peerUrl":"http://a:1/"}`, "with a port and no path"},
			{`{"peerUrl":"http://a:1","clientUrl":"http://a:0"}`, "with a port and no path"},
			{`{"peerUrl":"http://a:1","clientUrl":"ftp://a:1"}`, "with a port and no path"},
			{`{"peerUrl":"http://a:1","clientUrl":"http://u@a:1"}`, "with a port and no path"},
		} {
			tests = append(tests, struct {
				method, target, body string
				want                 memberCall
				detail               string
			}{method, path, tt[0], memberCall{}, tt[1]})
		}
	}
	f := newFront(t)
	for _, tt := range tests {
		a := f.do(tt.method, tt.target, tt.body)
		calls := f.backend.takeMemberCalls()
		if tt.detail == "" {
			if a.Code != 204 || !slices.Equal(calls, []memberCall{tt.want}) {
				t.Errorf("%s %s %q: %d %s, %+v, want %+v", tt.method, tt.target, tt.body, a.Code, a.Body, calls, tt.want)
			}
			continue
		}
		if a.Code != 400 || len(calls) > 0 {
			t.Errorf("%s %s %q: %d %s, %+v", tt.method, tt.target, tt.body, a.Code, a.Body, calls)
		} else if p := mustProblem(t, a); p.Code != "invalid-request" || !strings.Contains(p.Detail, tt.detail) {
			t.Errorf("%s %s %q: %+v, want %q", tt.method, tt.target, tt.body, p, tt.detail)
		}
	}
}

func TestHTTP_MemberIDs(t *testing.T) {
	f := newFront(t)
	for _, id := range []string{"0", "04", "+4", "-4", "4_0", "%204", "0x4", "x", "4.0", "18446744073709551616"} {
		for _, call := range [][2]string{
			{"POST", "/-/v1/members/" + id},
			{"PUT", "/-/v1/members/" + id},
			{"DELETE", "/-/v1/members/" + id},
			{"POST", "/-/v1/members/" + id + "/promote"},
			{"POST", "/-/v1/leader/" + id},
		} {
			a := f.do(call[0], call[1], `{"peerUrl":"http://a:1"}`)
			if calls := f.backend.takeMemberCalls(); a.Code != 400 || len(calls) > 0 {
				t.Errorf("%s %s: %d, %+v", call[0], call[1], a.Code, calls)
			} else if p := mustProblem(t, a); !strings.Contains(p.Detail, "a positive decimal number") {
				t.Errorf("%s %s: %+v", call[0], call[1], p)
			}
		}
	}
	for _, target := range []string{"/-/v1/members/", "/-/v1/members/4/", "/-/v1/members/4/x", "/-/v1/members//promote", "/-/v1/leader", "/-/v1/leader/"} {
		f.do("POST", target, `{"peerUrl":"http://a:1"}`).Want(t, 404)
	}
}

// The members come as the store has them, after a round of agreement unless the
// request does without.
func TestHTTP_ListMembers(t *testing.T) {
	f := newFront(t)
	f.store.State.Members[2] = store.Member{ID: 2, Name: "two", PeerURL: "http://b:1", ClientURL: "http://b:2", Directory: 1<<64 - 1}
	f.store.State.Members[1] = store.Member{ID: 1, PeerURL: "http://a:1", Learner: true, Promote: true}
	const want = `{"leaderId":2,"members":[{"id":1,"peerUrl":"http://a:1","learner":true,"promote":true},` +
		`{"id":2,"name":"two","peerUrl":"http://b:1","clientUrl":"http://b:2","instanceId":"18446744073709551615"}]}`
	for rounds, query := range []string{"?resourceVersion=0", ""} {
		a := f.do("GET", "/-/v1/members"+query, "")
		a.Want(t, 200)
		if strings.TrimSpace(a.Body) != want {
			t.Errorf("%s\nwant %s", a.Body, want)
		}
		if got := f.backend.linearizations(); got != rounds {
			t.Errorf("%q: %d rounds", query, got)
		}
	}
}
