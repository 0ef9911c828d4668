package httpapi

import (
	"crypto/sha256"
	"encoding/binary"
	"math"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file reads what a request says beside its path and body: the query and
// the headers that change what a call does. Both are strict, so that a misspelt
// condition or deadline does not pass for none.

// Limits of what parameters may ask for.
const (
	TimeoutMax       = 60 * time.Second
	ttlMin           = time.Second
	ttlMax           = 10 * 365 * 24 * time.Hour
	listLimitDefault = 1000   // items of a JSON list
	listLimitMax     = 10_000 // beyond it there is the stream

	profileSecondsMax = 60
)

// params are the query parameters of a call.
type params struct {
	timeout         time.Duration
	resourceVersion uint64
	cluster         string        // of which it is a version; empty = not said
	exact           bool          // nothing newer either
	ttl             time.Duration // 0 = none
	prefix          string
	after           string
	limit           int
	keysOnly        bool
	key             string
	initial         bool
	duration        time.Duration // of a watch; 0 = no end
	all             bool
	verbose         bool
	seen            paramSet
}

// paramSet is a set of parameters.
type paramSet uint

const (
	paramTimeout paramSet = 1 << iota
	paramResourceVersion
	paramResume // the same of a watch, which may say of which cluster
	paramExact
	paramTTL
	paramPrefix
	paramAfter
	paramLimit
	paramKeysOnly
	paramKey
	paramInitial
	paramDuration // of a watch, the timeout of which is no deadline for an answer
	paramAll
	paramVerbose
	paramSeconds // these two are only checked here: net/http/pprof reads them
	paramDebug
)

// paramNames has the name of bit i at i.
var paramNames = [...]string{"timeout", "resourceVersion", "resourceVersion", "resourceVersionMatch", "ttl", "prefix", "after", "limit", "keysOnly", "key", "initial", "timeout", "all", "verbose", "seconds", "debug"}

// named returns the parameter of a name in the set, or the empty set.
func (s paramSet) named(name string) paramSet {
	for i, n := range paramNames {
		if n == name && s&(1<<i) != 0 {
			return 1 << i
		}
	}
	return 0
}

func (s paramSet) String() string {
	var names []string
	for i, n := range paramNames {
		if s&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// has says whether the query had the parameter.
func (p *params) has(param paramSet) bool { return p.seen&param != 0 }

// params parses a query.
func (h *httpAPI) params(query string, allowed paramSet) (params, error) {
	p := params{timeout: h.Timeout}
	for query != "" {
		var field string
		if field, query, _ = strings.Cut(query, "&"); field == "" {
			continue
		}
		if err := p.add(field, allowed); err != nil {
			return params{}, err
		}
	}
	return p, nil
}

// add parses one name=value of a query.
func (p *params) add(field string, allowed paramSet) error {
	name, value, _ := strings.Cut(field, "=")
	name, err := url.QueryUnescape(name)
	if err == nil {
		value, err = url.QueryUnescape(value)
	}
	if err != nil {
		return fault.ErrInvalid.WithDetail("the query has a malformed escape; write %% as %%25")
	}
	param := allowed.named(name)
	switch {
	case param == 0:
		return fault.ErrInvalid.WithDetail("unknown parameter %q; allowed here: %v", name, allowed)
	case param&p.seen != 0:
		return fault.ErrInvalid.WithDetail("parameter %q is given twice", name)
	}
	p.seen |= param
	return p.set(param, value)
}

func (p *params) set(param paramSet, value string) (err error) {
	switch param {
	case paramTimeout:
		p.timeout, err = time.ParseDuration(value)
		if err != nil || p.timeout <= 0 || p.timeout > TimeoutMax {
			return fault.ErrInvalid.WithDetail("timeout must be a duration such as 500ms or 5s, more than 0 and at most %v", TimeoutMax)
		}
	case paramResourceVersion:
		p.resourceVersion, err = strconv.ParseUint(value, 10, 64)
		if err != nil {
			return fault.ErrInvalid.WithDetail("resourceVersion must be a decimal number; 0 reads whatever this node has")
		}
	case paramResume:
		p.seen |= paramResourceVersion
		if p.cluster, p.resourceVersion, err = ParseResume(value); err != nil {
			return fault.ErrInvalid.WithDetail("resourceVersion must be a decimal number, or the id of a server-sent event")
		}
	case paramExact:
		if p.exact = value == "exact"; !p.exact {
			return fault.ErrInvalid.WithDetail("resourceVersionMatch must be exact")
		}
	case paramTTL:
		p.ttl, err = parseTTL(value)
		return err
	case paramLimit:
		limit, err := strconv.ParseUint(value, 10, 64)
		if err != nil || limit == 0 {
			return fault.ErrInvalid.WithDetail("limit must be a positive number")
		}
		p.limit = int(min(limit, math.MaxInt))
	case paramPrefix:
		p.prefix = value
	case paramAfter:
		p.after = value
	case paramKey:
		p.key = value
	case paramKeysOnly:
		p.keysOnly, err = parseBool("keysOnly", value)
	case paramInitial:
		p.initial, err = parseBool("initial", value)
	case paramAll:
		p.all, err = parseBool("all", value)
	case paramVerbose:
		if p.verbose = true; value != "" { // as Kubernetes has it
			p.verbose, err = parseBool("verbose", value)
		}
	case paramSeconds:
		if n, err := strconv.ParseUint(value, 10, 64); err != nil || n == 0 || n > profileSecondsMax {
			return fault.ErrInvalid.WithDetail("seconds must be a number from 1 to %d", profileSecondsMax)
		}
	case paramDebug:
		if value != "0" && value != "1" && value != "2" {
			return fault.ErrInvalid.WithDetail("debug must be 0, 1 or 2")
		}
	case paramDuration:
		p.duration, err = time.ParseDuration(value)
		if err != nil || p.duration <= 0 || p.duration > watchTimeoutMax {
			return fault.ErrInvalid.WithDetail("timeout must be a duration such as 30s or 1h, more than 0 and at most %v", watchTimeoutMax)
		}
	}
	return err
}

func parseBool(name, value string) (bool, error) {
	if value != "true" && value != "false" {
		return false, fault.ErrInvalid.WithDetail("%s must be true or false", name)
	}
	return value == "true", nil
}

// ParseResume reads where a watch goes on: a version, and the cluster of which it
// is one, unless a person has typed it.
func ParseResume(s string) (cluster string, rv uint64, err error) {
	number := s
	if before, after, ok := strings.Cut(s, "-"); ok {
		cluster, number = before, after
		if _, err := strconv.ParseUint(cluster, 16, 64); err != nil {
			return "", 0, err
		}
	}
	rv, err = strconv.ParseUint(number, 10, 64)
	return cluster, rv, err
}

// parseTTL reads how long a key is to live.
func parseTTL(s string) (time.Duration, error) {
	ttl, err := time.ParseDuration(s)
	if err != nil || ttl < ttlMin || ttl > ttlMax {
		return 0, fault.ErrInvalid.WithDetail("ttl must be a duration such as 30s or 12h, from %v to %v", ttlMin, ttlMax)
	}
	return ttl, nil
}

// headerSet is a set of request headers that change what a call does.
type headerSet uint

const (
	headerIfMatch headerSet = 1 << iota
	headerIfNoneMatch
	headerIdempotencyKey
	headerContentRange // no call takes it, RFC 9110 wants it refused
	headerLastEventID
	headerIfUnmodifiedSince // no call takes it, since a version says more than a second does
)

// headerNames has the canonical name of bit i at i.
var headerNames = [...]string{"If-Match", "If-None-Match", "Idempotency-Key", "Content-Range", "Last-Event-Id", "If-Unmodified-Since"}

// refuseHeaders refuses a write that asks for more than its call does.
func refuseHeaders(header http.Header, allowed headerSet) error {
	const ofWrites = headerIfMatch | headerIfNoneMatch | headerIdempotencyKey | headerContentRange | headerIfUnmodifiedSince
	for i, name := range headerNames {
		if bit := headerSet(1 << i); bit&ofWrites&^allowed == 0 {
			continue
		}
		if _, ok := header[name]; ok {
			return fault.ErrInvalid.WithDetail("%s is not supported here, and a write that ignored it could do harm", name)
		}
	}
	for _, coding := range header["Content-Encoding"] {
		if !strings.EqualFold(strings.TrimSpace(coding), "identity") {
			return fault.ErrEncoding // kept without it, the value would be another
		}
	}
	return nil
}

// refuseUpgrade refuses a request to go on in another protocol. That is allowed to
// be ignored (RFC 9110, section 7.8), and is for HTTP/2, which some clients
// offer each time; who wants a WebSocket is told what there is instead.
func refuseUpgrade(header http.Header) error {
	for _, protocol := range header["Upgrade"] {
		if !strings.EqualFold(strings.TrimSpace(protocol), "h2c") {
			return fault.ErrInvalid.WithDetail("there is no upgrade to %.50q, only HTTP/1.1; to follow changes see /-/v1/watch", protocol)
		}
	}
	return nil
}

// Content types (RFC 9110, section 8.3).

// formType is what curl and others say of any body if nobody told them more.
const formType = "application/x-www-form-urlencoded"

// setContentType makes a put keep the type of its value, as soon as all members
// know how to.
func setContentType(c *store.Command, contentType string, level int) {
	if level >= 3 {
		c.ContentType = contentType
	}
}

// parseContentType reads of which type a body is, empty if nobody knows.
func parseContentType(header http.Header) (string, error) {
	values := header["Content-Type"]
	if len(values) == 0 || len(values) == 1 && values[0] == "" {
		return "", nil
	}
	contentType := strings.TrimSpace(values[0])
	switch {
	case len(values) > 1 || servedTypes[contentType] == nil && !isMediaType(contentType):
		return "", fault.ErrInvalid.WithDetail("Content-Type must be given once and be a media type such as text/plain; charset=utf-8, of at most %d bytes", store.ContentTypeSizeMax)
	case strings.EqualFold(contentType, formType):
		return "", nil
	}
	return contentType, nil
}

// isMediaType says whether a value may have this content type.
func isMediaType(s string) bool {
	if !store.IsContentType(s) {
		return false
	}
	_, _, err := mime.ParseMediaType(s)
	return err == nil
}

// servedTypes are what values are served as, if they have that type. A list of
// what browsers only show: whatever is not known to be harmless is
// application/octet-stream, so a new kind of script is, too.
var servedTypes = func() map[string][]string {
	all := map[string][]string{} // with what the header is then
	for _, t := range []string{
		"application/cbor", "application/json", "application/msgpack", "application/protobuf", "application/toml", "application/x-ndjson", "application/yaml",
		"image/avif", "image/gif", "image/jpeg", "image/png", "image/webp",
		"text/csv", "text/markdown", "text/plain",
	} {
		all[t] = []string{t}
	}
	return all
}()

// servedType is the Content-Type of the answer to who reads a value.
func servedType(contentType string) []string {
	if contentType == "" {
		return typeBytes
	}
	if header := servedTypes[contentType]; header != nil {
		return header
	}
	kind, _, _ := strings.Cut(contentType, ";")
	if servedTypes[strings.ToLower(strings.TrimSpace(kind))] == nil {
		return typeBytes
	}
	return []string{contentType}
}

// Conditions (RFC 9110, section 13).

// parseCondition reads under which condition a write is to happen.
func parseCondition(header http.Header) (store.Condition, error) {
	match, hasMatch := header["If-Match"]
	none, hasNone := header["If-None-Match"]
	switch {
	case hasMatch && hasNone:
		return store.Condition{}, fault.ErrInvalid.WithDetail("If-Match and If-None-Match exclude each other")
	case hasNone:
		if len(none) != 1 || strings.TrimSpace(none[0]) != "*" {
			return store.Condition{}, fault.ErrInvalid.WithDetail("a write takes no If-None-Match but *, which means that the key must not exist")
		}
		return store.Condition{Kind: store.IfAbsent}, nil
	case !hasMatch:
		return store.Condition{}, nil
	}
	if len(match) == 1 {
		tag := strings.TrimSpace(match[0])
		if tag == "*" {
			return store.Condition{Kind: store.IfExists}, nil
		}
		if opaque, ok := parseStrongTag(tag); ok {
			return store.Condition{Kind: store.IfMatch, RV: tagVersion(opaque)}, nil
		}
	}
	return store.Condition{}, fault.ErrInvalid.WithDetail(`a write takes one If-Match, either * or one strong ETag in its quotes such as "42"; no list and no weak W/"42"`)
}

// parseStrongTag returns what is between the quotes of a strong ETag.
func parseStrongTag(s string) (opaque string, ok bool) {
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' {
		return "", false
	}
	opaque = s[1 : len(s)-1]
	return opaque, !strings.ContainsAny(opaque, "\" \t\x7f")
}

// tagVersion returns the version that an ETag of ours stands for. For any other
// it is 0, which no key has.
func tagVersion(opaque string) uint64 {
	rv, err := strconv.ParseUint(opaque, 10, 64)
	if err != nil || opaque[0] == '0' || opaque[0] == '+' {
		return 0
	}
	return rv
}

// anyTagMatches says whether the version is in the list of ETags of an If-Match
// or, compared weakly, If-None-Match. What cannot be read matches nothing.
func anyTagMatches(values []string, rv uint64, weakly bool) bool {
	for _, list := range values {
		if strings.TrimSpace(list) == "*" {
			return true
		}
		for {
			list = strings.TrimLeft(list, ", \t")
			tag, isWeak := strings.CutPrefix(list, "W/")
			if !strings.HasPrefix(tag, `"`) {
				break
			}
			opaque, rest, ok := strings.Cut(tag[1:], `"`)
			if !ok {
				break
			}
			if (weakly || !isWeak) && opaque != "" && tagVersion(opaque) == rv {
				return true
			}
			list = rest
		}
	}
	return false
}

// Retries (draft-ietf-httpapi-idempotency-key-header).

// retryID identifies a write that its client may send again. What makes two
// requests the same is all that decides what the write does: not the timeout,
// nor the time.
func (r *request) retryID(c *store.Command, body string) (store.RetryID, error) {
	values, ok := r.Header["Idempotency-Key"]
	if !ok {
		return store.RetryID{}, nil
	}
	key := ""
	if len(values) == 1 {
		key = parseRetryKey(strings.TrimSpace(values[0]))
	}
	if key == "" {
		return store.RetryID{}, fault.ErrInvalid.WithDetail("Idempotency-Key must be given once and have 1 to %d printable ASCII characters", store.IdempotencyKeySizeMax)
	}
	digest := sha256.New()
	var n [8]byte
	parts := []string{r.Method, r.route.path, r.name, r.params.prefix, r.params.ttl.String(), string(rune('0' + c.Condition.Kind)), strconv.FormatUint(c.Condition.RV, 10), body}
	if c.ContentType != "" { // others have the digest that they always had
		parts = append(parts, c.ContentType)
	}
	for _, field := range parts {
		binary.LittleEndian.PutUint64(n[:], uint64(len(field)))
		digest.Write(n[:])
		digest.Write([]byte(field))
	}
	id := store.RetryID{Key: key}
	copy(id.Digest[:], digest.Sum(nil))
	return id, nil
}

// clientOf returns a number for who sent a request: for its address, or for the
// network of 2^64 of them that everybody with IPv6 has.
func clientOf(r *http.Request) uint64 {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return 0 // a unix socket
	}
	bits := 32
	if from.Addr().Unmap().Is6() {
		bits = 64
	}
	network, err := from.Addr().Unmap().WithZone("").Prefix(bits)
	if err != nil {
		return 0 // never
	}
	return xxhash.Sum64(network.Masked().Addr().AsSlice())
}

// parseRetryKey returns the key that a header value spells, or nothing if it is
// malformed. The draft wants a structured string (RFC 9651, section 3.3.3), in
// quotes; most clients send it bare.
func parseRetryKey(s string) string {
	if strings.HasPrefix(s, `"`) {
		s = unquote(s)
	}
	if len(s) > store.IdempotencyKeySizeMax || strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' }) {
		return ""
	}
	return s
}

// unquote takes a structured string out of its quotes.
func unquote(s string) string {
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"' && i == len(s)-1:
			return b.String()
		case c == '"':
			return "" // something follows
		case c == '\\':
			if i++; i == len(s) || s[i] != '"' && s[i] != '\\' {
				return ""
			}
		}
		b.WriteByte(s[i])
	}
	return "" // no closing quote
}

// prefers says whether the client names the media type, and does not like what it
// gets otherwise better. Which is all the negotiation there is: nobody gets a
// stream who did not ask for it.
func prefers(header http.Header, mediaType, otherwise string) bool {
	q := quality(header, mediaType)
	return q > 0 && q >= quality(header, otherwise)
}

// quality is how much a client likes a media type that it names, 0 to 1 (RFC 9110,
// section 12.5.1).
func quality(header http.Header, mediaType string) float64 {
	best := 0.0
	for _, value := range header["Accept"] {
		for part := range strings.SplitSeq(value, ",") {
			name, params, _ := strings.Cut(part, ";")
			if !strings.EqualFold(strings.TrimSpace(name), mediaType) {
				continue
			}
			q := 1.0
			for param := range strings.SplitSeq(params, ";") {
				if name, number, _ := strings.Cut(strings.TrimSpace(param), "="); strings.EqualFold(name, "q") {
					if q, _ = strconv.ParseFloat(number, 64); !(q >= 0 && q <= 1) { // malformed, or NaN
						q = 0
					}
				}
			}
			best = max(best, q)
		}
	}
	return best
}
