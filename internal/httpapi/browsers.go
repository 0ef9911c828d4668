package httpapi

import (
	"bytes"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file is about browsers, which carry out what any web page says, with the
// network access of the person in front of them. A page of another origin may
// write nothing here and read nothing, unless --allowed-origin names it. Three
// things see to that, and none of them does without the others:
//
//   - What a page writes says that it comes from another origin
//     (http.CrossOriginProtection).
//   - What a page reads it is not given without CORS headers. And a stored value
//     is never a page itself.
//   - A page whose own host name leads to this node, by DNS rebinding, is of the
//     same origin in the eyes of a browser. But its requests have that name in
//     Host, and a node answers only to names that are known to be its own.

// Set for every answer, also for those that net/http makes by itself. A value or
// an error that is opened in a browser runs nothing, shows in no frame, and is
// nothing that another origin could include.
const (
	contentSecurityPolicy = "default-src 'none'; frame-ancestors 'none'; sandbox"
	browserHeader         = "Content-Security-Policy: " + contentSecurityPolicy + "\r\n" +
		"Cross-Origin-Resource-Policy: same-origin\r\n" +
		"X-Content-Type-Options: nosniff\r\n"
)

var (
	valueCSP     = []string{contentSecurityPolicy}
	valueCORP    = []string{"same-origin"}
	valueNoSniff = []string{"nosniff"}
)

func setBrowserHeader(header http.Header) {
	header["Content-Security-Policy"] = valueCSP
	header["Cross-Origin-Resource-Policy"] = valueCORP
	header["X-Content-Type-Options"] = valueNoSniff
}

// withBrowserHeader adds to the first part of an answer what setBrowserHeader
// sets, if it has a whole header without it: then it is one that net/http made
// without us, to a request that it did not understand.
func withBrowserHeader(part []byte) []byte {
	head, _, whole := bytes.Cut(part, []byte("\r\n\r\n"))
	line, _, _ := bytes.Cut(head, []byte("\r\n"))
	if !whole || bytes.HasPrefix(part, []byte("HTTP/1.1 100 ")) || bytes.Contains(head, []byte("\r\nContent-Security-Policy: ")) {
		return part
	}
	end := len(line) + len("\r\n")
	return append(append(append(make([]byte, 0, len(part)+len(browserHeader)), part[:end]...), browserHeader...), part[end:]...)
}

// browsers decides who may ask.
type browsers struct {
	members func() []store.Member
	names   []string // host names of this node, lower case
	origins []string // that may read and write
	check   http.CrossOriginProtection
	// known is names and those of the members' client URLs, as of the last time
	// that somebody used a name which was not in it.
	known atomic.Pointer[map[string]bool]

	vary, varyAccept []string // what answers depend on; nil = nothing
}

// newBrowsers needs origins that checkOrigin accepts.
func newBrowsers(members func() []store.Member, names, origins []string) *browsers {
	b := &browsers{members: members, names: names, origins: origins, varyAccept: varyAccept}
	for _, origin := range origins {
		if err := b.check.AddTrustedOrigin(origin); err != nil {
			panic(err) // the caller has checked it
		}
	}
	if len(origins) > 0 {
		b.vary, b.varyAccept = []string{"Origin"}, []string{"Accept, Origin"}
	}
	b.known.Store(&map[string]bool{})
	return b
}

// CheckOrigin says whether a browser could send this as its Origin.
func CheckOrigin(origin string) error {
	if err := new(http.CrossOriginProtection).AddTrustedOrigin(origin); err != nil {
		return err
	}
	u, err := url.Parse(origin)
	if err != nil || u.User != nil || u.Scheme != "http" && u.Scheme != "https" || origin != strings.ToLower(origin) {
		return fmt.Errorf("%q is not an origin as browsers write it, such as https://app.example", origin)
	}
	return nil
}

// CheckHostName says whether this may be the name of a host, without a port.
func CheckHostName(name string) error {
	if name == "" || strings.ContainsAny(name, "/:@*?# ") {
		return fmt.Errorf("%q is not a host name, which has no scheme, no port and no wildcard", name)
	}
	return nil
}

// admit refuses what a page of another origin asks for. done says that the
// request was answered.
func (b *browsers) admit(w http.ResponseWriter, r *http.Request) (done bool, err error) {
	if !b.isOwnHost(r.Host) {
		name, _ := splitHost(r.Host)
		return false, fault.ErrHost.WithDetail("this node does not go by the name %.100q; use its IP address or its client URL, or start the nodes with --allowed-host and that name", name)
	}
	if b.vary != nil {
		w.Header()["Vary"] = b.vary
	}
	if origin := r.Header["Origin"]; len(origin) > 0 && b.allow(w.Header(), origin[0]) && isPreflight(r) {
		answerPreflight(w.Header(), r)
		w.WriteHeader(http.StatusNoContent)
		return true, nil
	}
	if err := b.check.Check(r); err != nil {
		return false, fault.ErrOrigin.WithDetail("a web page may write only to the origin that it came from; to let it, start the nodes with --allowed-origin and the page's origin")
	}
	return false, nil
}

// isOwnHost says whether a Host header names this node: by an IP address, which
// nobody can make a browser take for another, or by a name that is its own. A
// client that says nothing is no browser.
func (b *browsers) isOwnHost(host string) bool {
	name, isAddress := splitHost(host)
	if isAddress || name == "" {
		return true
	}
	if name = strings.ToLower(name); name == "localhost" || (*b.known.Load())[name] {
		return true
	}
	known := map[string]bool{}
	for _, name := range b.names {
		known[name] = true
	}
	for _, m := range b.members() {
		if u, err := url.Parse(m.ClientURL); err == nil {
			known[strings.ToLower(u.Hostname())] = true
		}
	}
	b.known.Store(&known)
	return known[name]
}

// splitHost takes the port off a Host header.
func splitHost(host string) (name string, isAddress bool) {
	name = host
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		name = host[:i]
	}
	switch {
	case name == "":
		return "", false
	case name[0] == '[' && name[len(name)-1] == ']':
		ip, err := netip.ParseAddr(name[1 : len(name)-1])
		return name, err == nil && ip.Is6()
	case name[0] < '0' || name[0] > '9': // a failed attempt to parse costs more than one look
		return name, false
	}
	ip, err := netip.ParseAddr(name)
	return name, err == nil && ip.Is4()
}

// exposed are the headers of answers that a page can read beside those that every
// page can.
var exposed = []string{"Allow, Cluster-Id, ETag, Idempotency-Replayed, Location, Raft-Index, Raft-Term, Resource-Version, Retry-After"}

// allow lets a page read the answer if its origin may.
func (b *browsers) allow(header http.Header, origin string) bool {
	for i := range b.origins {
		if b.origins[i] == origin {
			header["Access-Control-Allow-Origin"] = b.origins[i : i+1 : i+1]
			header["Access-Control-Expose-Headers"] = exposed
			return true
		}
	}
	return false
}

// isPreflight says whether a browser only asks what it may do.
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && len(r.Header["Access-Control-Request-Method"]) > 0
}

// answerPreflight says that all is allowed. Which calls there are is said when
// they are made.
func answerPreflight(header http.Header, r *http.Request) {
	header["Access-Control-Allow-Methods"] = allowAny
	if names, ok := r.Header["Access-Control-Request-Headers"]; ok {
		header["Access-Control-Allow-Headers"] = names
	}
	header["Access-Control-Max-Age"] = preflightAge
	header["Vary"] = preflightVary
}

var (
	preflightAge  = []string{"600"} // seconds
	preflightVary = []string{"Origin, Access-Control-Request-Headers"}
)
