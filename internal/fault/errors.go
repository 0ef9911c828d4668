package fault

import (
	"errors"
	"fmt"
	"strings"
)

// Outcome says what became of a write that was not answered with success.
type Outcome string

const (
	// NotApplied: the write did not happen and never will. Safe to retry.
	NotApplied Outcome = "not_applied"
	// Applied: the write happened, though the answer to it cannot be given.
	Applied Outcome = "applied"
	// Unknown: the write may have happened, or may still happen.
	Unknown Outcome = "unknown"
)

// Error is a request that failed, in the words that every front shares. Each front has
// one table from the codes to what its protocol calls them.
type Error struct {
	Code    string // stable, kebab-case: clients switch on it
	Outcome Outcome
	Title   string
	Detail  string // what to do next, for a person
	Retry   bool   // the same request may succeed later
	Current uint64 // of errPrecondition: the version that the key has; 0 if it does not exist
}

func (e *Error) Error() string {
	if e.Detail == "" {
		return e.Title
	}
	return e.Title + ": " + e.Detail
}

// Is makes errors.Is match on the code, so that an error with its own detail
// still is the sentinel that it was made from.
func (e *Error) Is(target error) bool {
	var t *Error
	return errors.As(target, &t) && t.Code == e.Code
}

// WithDetail returns the error with another detail.
func (e *Error) WithDetail(format string, args ...any) *Error {
	d := *e
	d.Detail = fmt.Sprintf(format, args...)
	return &d
}

// OfRetry returns the error as the answer to a request with an Idempotency-Key. If
// it was refused for what the node is like at present, nobody knows whether that
// was the first attempt.
func (e *Error) OfRetry() *Error {
	if !e.Retry || e.Outcome != NotApplied {
		return e
	}
	d := e.WithDetail("%s; this attempt was not applied, but an earlier one with the same Idempotency-Key may have been: send it again with that", e.Detail)
	d.Outcome = Unknown
	return d
}

// Refused before anything was proposed.
var (
	ErrInvalid = &Error{Code: "invalid-request", Outcome: NotApplied,
		Title: "Invalid request"}
	ErrNotFound = &Error{Code: "not-found", Outcome: NotApplied,
		Title: "Not found"}
	ErrMethod = &Error{Code: "method-not-allowed", Outcome: NotApplied,
		Title: "Method not allowed"}
	ErrHost = &Error{Code: "unknown-host", Outcome: NotApplied,
		Title: "Unknown host"}
	ErrOrigin = &Error{Code: "cross-origin", Outcome: NotApplied,
		Title: "Cross-origin request"}
	ErrTooLarge = &Error{Code: "value-too-large", Outcome: NotApplied,
		Title: "Value too large"}
	ErrVersion = &Error{Code: "http-version", Outcome: NotApplied,
		Title: "HTTP version not supported", Detail: "over HTTP/1.0 an answer of this call that was cut off could not be told from a whole one; use HTTP/1.1"}
	ErrEncoding = &Error{Code: "unsupported-encoding", Outcome: NotApplied,
		Title: "Unsupported encoding", Detail: "a body is taken as it is, without Content-Encoding; send what is to be stored"}
	ErrBodyTimeout = &Error{Code: "request-timeout", Outcome: NotApplied, Retry: true,
		Title: "Request body timed out", Detail: "the body did not arrive in time; send it again"}
	ErrConnections = &Error{Code: "too-many-connections", Outcome: NotApplied, Retry: true,
		Title: "Too many connections", Detail: "this node has as many connections as it may have, and has not read the request, so this attempt was not applied; retry later or at another node"}
	ErrNotReady = &Error{Code: "not-ready", Outcome: NotApplied, Retry: true,
		Title: "Not ready", Detail: "a linearizable read did not succeed in time; is a majority of the members up?"}
	ErrMember = &Error{Code: "member-conflict", Outcome: NotApplied,
		Title: "Member conflict"}
	ErrOverloaded = &Error{Code: "overloaded", Outcome: NotApplied, Retry: true,
		Title: "Overloaded", Detail: "too many writes are waiting on this node; retry after a pause"}
	ErrShuttingDown = &Error{Code: "shutting-down", Outcome: NotApplied, Retry: true,
		Title: "Shutting down", Detail: "this node is stopping; retry at another node"}
	ErrDiskFull = &Error{Code: "disk-full", Outcome: NotApplied, Retry: true,
		Title: "Disk full", Detail: "a disk has no room for more; reads and deletes go on, and writes do as soon as there is space again"}
	ErrQuota = &Error{Code: "quota-exceeded", Outcome: NotApplied, Retry: true,
		Title: "Quota exceeded", Detail: "the store has reached --quota-bytes; delete keys, wait for some to expire, or start the nodes with a larger quota"}
	ErrLevel = &Error{Code: "feature-level", Outcome: NotApplied, Retry: true,
		Title: "Not all members know this", Detail: "the request needs a newer version than some member runs; upgrade all of them, then send it again"}
	ErrDiverged = &Error{Code: "diverged", Outcome: NotApplied, Retry: true,
		Title: "Diverged", Detail: "the state of this node is not that of the others, so it serves nothing; use another node, and replace this one"}
	ErrUnchecked = &Error{Code: "unchecked", Outcome: NotApplied, Retry: true,
		Title: "Not compared yet", Detail: "this node has not found a majority that has its state since it started, which takes a moment; retry later or at another node"}
	ErrNoLeader = &Error{Code: "no-leader", Outcome: NotApplied, Retry: true,
		Title: "No leader", Detail: "no leader was reachable before the deadline; is a majority of the members up?"}
)

// The deadline passed although there was a leader.
var (
	ErrReadTimeout = &Error{Code: "timeout", Outcome: NotApplied, Retry: true,
		Title: "Timed out", Detail: "this node did not reach the asked resource version before the deadline; retry here or at another node"}
	ErrUnconfirmed = ErrReadTimeout.WithDetail("no majority confirmed before the deadline what there is to read; retry, here or at another node, or give it longer")
	ErrNotProposed = ErrReadTimeout.WithDetail("the write waited until its deadline and was not proposed: it was not applied; retry, here or at another node, or give it longer")
)

// Applied with a negative answer: nothing changed.
var (
	ErrPrecondition = &Error{Code: "precondition-failed", Outcome: NotApplied,
		Title: "Precondition failed"}
	ErrRetryOther = &Error{Code: "idempotency-mismatch", Outcome: NotApplied,
		Title:  "Idempotency-Key used before",
		Detail: "another request had this Idempotency-Key; a new request needs a new one"}
	ErrTooManyKeys = &Error{Code: "too-many-keys", Outcome: NotApplied,
		Title: "Too many keys"}
	ErrResultTooLarge = &Error{Code: "result-too-large", Outcome: NotApplied,
		Title: "Result too large"}
)

// Applied before, as a request with the same Idempotency-Key.
var ErrResultNotKept = &Error{Code: "result-not-kept", Outcome: Applied,
	Title: "Applied, result not kept"}

// What a leader says to a change of the membership that it may take later. It
// reaches who asked as text.
const (
	RefusedForNow     = "another change of the membership is in progress; retry when it is done"
	RefusedUntilThen  = "has not caught up with the log yet"
	RefusedUntilKnown = "has not announced its data directory yet, which a node does when it first serves; retry when it has"
	refusedNobody     = "there is no member "
)

// MemberRefused is the answer to a change of the membership that was refused.
func MemberRefused(why string) *Error {
	if strings.HasPrefix(why, refusedNobody) {
		return ErrNotFound.WithDetail("%s", why)
	}
	e := ErrMember.WithDetail("%s", why)
	e.Retry = why == RefusedForNow || strings.HasSuffix(why, RefusedUntilThen) || strings.HasSuffix(why, RefusedUntilKnown)
	return e
}

// Refused because this node does enough of it already.
var ErrTooManyRequests = &Error{Code: "too-many-requests", Outcome: NotApplied, Retry: true,
	Title: "Too many requests"}

// Proposed, and not answered in time.
var (
	ErrUnknown = &Error{Code: "timeout", Outcome: Unknown, Retry: false,
		Title:  "Timed out",
		Detail: "the write was proposed but not confirmed before the deadline, and may still be applied: write again with If-Match and the version that you then read, or next time with an Idempotency-Key; that a read does not show it settles nothing"}
	ErrUnknownRetry = &Error{Code: "timeout", Outcome: Unknown, Retry: true,
		Title:  "Timed out",
		Detail: "the write was proposed but not confirmed before the deadline; it may still be applied: send it again with the same Idempotency-Key"}
	ErrTransfer = &Error{Code: "transfer-failed", Outcome: Unknown, Retry: true,
		Title: "Transfer failed"}
)

// Of watches: before one starts, or as its last event.
var (
	ErrExpired = &Error{Code: "expired", Outcome: NotApplied,
		Title: "Expired", Detail: "events after the resource version have left the window of this node: list again, or watch with initial=true"}
	ErrSlow = &Error{Code: "watch-too-slow", Outcome: NotApplied, Retry: true,
		Title: "Watch too slow", Detail: "the watcher fell so far behind that it would soon have missed events; resume from the resource version, and read faster"}
)

// A fault of ours. A write that met it may have been proposed before.
var ErrInternal = &Error{Code: "internal", Outcome: Unknown,
	Title: "Internal error", Detail: "the log of this node says more; a write may have been applied, or may still be"}
