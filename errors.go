package main

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// outcome says what became of a write that was not answered with success.
type outcome string

const (
	// notApplied: the write did not happen and never will. Safe to retry.
	notApplied outcome = "not_applied"
	// applied: the write happened, though the answer to it cannot be given.
	applied outcome = "applied"
	// unknown: the write may have happened, or may still happen.
	unknown outcome = "unknown"
)

// apiError is a request that failed, in the words that every front end shares.
// The HTTP front renders it as application/problem+json (RFC 9457).
type apiError struct {
	code    string // stable, kebab-case: clients switch on it
	status  int    // HTTP status
	outcome outcome
	title   string
	detail  string // what to do next, for a person
	retry   bool   // the same request may succeed later
	current uint64 // of errPrecondition: the version that the key has; 0 if it does not exist
}

func (e *apiError) Error() string {
	if e.detail == "" {
		return e.title
	}
	return e.title + ": " + e.detail
}

// Is makes errors.Is match on the code, so that an error with its own detail
// still is the sentinel that it was made from.
func (e *apiError) Is(target error) bool {
	var t *apiError
	return errors.As(target, &t) && t.code == e.code
}

// withDetail returns the error with another detail.
func (e *apiError) withDetail(format string, args ...any) *apiError {
	d := *e
	d.detail = fmt.Sprintf(format, args...)
	return &d
}

// ofRetry returns the error as the answer to a request with an Idempotency-Key. If
// it was refused for what the node is like at present, nobody knows whether that
// was the first attempt.
func (e *apiError) ofRetry() *apiError {
	transient := e.status >= http.StatusInternalServerError || e.status == http.StatusRequestTimeout || e.status == http.StatusTooManyRequests
	if !transient || e.outcome != notApplied {
		return e
	}
	d := e.withDetail("%s; this attempt was not applied, but an earlier one with the same Idempotency-Key may have been: send it again with that", e.detail)
	d.outcome = unknown
	return d
}

// Refused before anything was proposed.
var (
	errInvalid = &apiError{code: "invalid-request", status: http.StatusBadRequest, outcome: notApplied,
		title: "Invalid request"}
	errNotFound = &apiError{code: "not-found", status: http.StatusNotFound, outcome: notApplied,
		title: "Not found"}
	errMethod = &apiError{code: "method-not-allowed", status: http.StatusMethodNotAllowed, outcome: notApplied,
		title: "Method not allowed"}
	errHost = &apiError{code: "unknown-host", status: http.StatusMisdirectedRequest, outcome: notApplied,
		title: "Unknown host"}
	errOrigin = &apiError{code: "cross-origin", status: http.StatusForbidden, outcome: notApplied,
		title: "Cross-origin request"}
	errTooLarge = &apiError{code: "value-too-large", status: http.StatusRequestEntityTooLarge, outcome: notApplied,
		title: "Value too large"}
	errVersion = &apiError{code: "http-version", status: http.StatusHTTPVersionNotSupported, outcome: notApplied,
		title: "HTTP version not supported", detail: "over HTTP/1.0 an answer of this call that was cut off could not be told from a whole one; use HTTP/1.1"}
	errEncoding = &apiError{code: "unsupported-encoding", status: http.StatusUnsupportedMediaType, outcome: notApplied,
		title: "Unsupported encoding", detail: "a body is taken as it is, without Content-Encoding; send what is to be stored"}
	errBodyTimeout = &apiError{code: "request-timeout", status: http.StatusRequestTimeout, outcome: notApplied, retry: true,
		title: "Request body timed out", detail: "the body did not arrive in time; send it again"}
	errConnections = &apiError{code: "too-many-connections", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "Too many connections", detail: "this node has as many connections as it may have, and has not read the request, so this attempt was not applied; retry later or at another node"}
	errNotReady = &apiError{code: "not-ready", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "Not ready", detail: "a linearizable read did not succeed in time; is a majority of the members up?"}
	errMember = &apiError{code: "member-conflict", status: http.StatusConflict, outcome: notApplied,
		title: "Member conflict"}
	errOverloaded = &apiError{code: "overloaded", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "Overloaded", detail: "too many writes are waiting on this node; retry after a pause"}
	errShuttingDown = &apiError{code: "shutting-down", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "Shutting down", detail: "this node is stopping; retry at another node"}
	errDiskFull = &apiError{code: "disk-full", status: http.StatusInsufficientStorage, outcome: notApplied, retry: true,
		title: "Disk full", detail: "a disk has no room for more; reads and deletes go on, and writes do as soon as there is space again"}
	errQuota = &apiError{code: "quota-exceeded", status: http.StatusInsufficientStorage, outcome: notApplied, retry: true,
		title: "Quota exceeded", detail: "the store has reached --quota-bytes; delete keys, wait for some to expire, or start the nodes with a larger quota"}
	errLevel = &apiError{code: "feature-level", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "Not all members know this", detail: "the request needs a newer version than some member runs; upgrade all of them, then send it again"}
	errDiverged = &apiError{code: "diverged", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "Diverged", detail: "the state of this node is not that of the others, so it serves nothing; use another node, and replace this one"}
	errUnchecked = &apiError{code: "unchecked", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "Not compared yet", detail: "this node has not found a majority that has its state since it started, which takes a moment; retry later or at another node"}
	errNoLeader = &apiError{code: "no-leader", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "No leader", detail: "no leader was reachable before the deadline; is a majority of the members up?"}
)

// The deadline passed although there was a leader.
var (
	errReadTimeout = &apiError{code: "timeout", status: http.StatusGatewayTimeout, outcome: notApplied, retry: true,
		title: "Timed out", detail: "this node did not reach the asked resource version before the deadline; retry here or at another node"}
	errUnconfirmed = errReadTimeout.withDetail("no majority confirmed before the deadline what there is to read; retry, here or at another node, or give it longer")
	errNotProposed = errReadTimeout.withDetail("the write waited until its deadline and was not proposed: it was not applied; retry, here or at another node, or give it longer")
)

// Applied with a negative answer: nothing changed.
var (
	errPrecondition = &apiError{code: "precondition-failed", status: http.StatusPreconditionFailed, outcome: notApplied,
		title: "Precondition failed"}
	errRetryOther = &apiError{code: "idempotency-mismatch", status: http.StatusUnprocessableEntity, outcome: notApplied,
		title:  "Idempotency-Key used before",
		detail: "another request had this Idempotency-Key; a new request needs a new one"}
	errTooManyKeys = &apiError{code: "too-many-keys", status: http.StatusRequestEntityTooLarge, outcome: notApplied,
		title: "Too many keys"}
	errResultTooLarge = &apiError{code: "result-too-large", status: http.StatusRequestEntityTooLarge, outcome: notApplied,
		title: "Result too large"}
)

// Applied before, as a request with the same Idempotency-Key.
var errResultNotKept = &apiError{code: "result-not-kept", status: http.StatusConflict, outcome: applied,
	title: "Applied, result not kept"}

// What a leader says to a change of the membership that it may take later. It
// reaches who asked as text.
const (
	refusedForNow    = "another change of the membership is in progress; retry when it is done"
	refusedUntilThen = "has not caught up with the log yet"
	refusedNobody    = "there is no member "
)

// memberRefused is the answer to a change of the membership that was refused.
func memberRefused(why string) *apiError {
	if strings.HasPrefix(why, refusedNobody) {
		return errNotFound.withDetail("%s", why)
	}
	e := errMember.withDetail("%s", why)
	e.retry = why == refusedForNow || strings.HasSuffix(why, refusedUntilThen)
	return e
}

// Refused because this node does enough of it already.
var errTooManyRequests = &apiError{code: "too-many-requests", status: http.StatusTooManyRequests, outcome: notApplied, retry: true,
	title: "Too many requests"}

// Proposed, and not answered in time.
var (
	errUnknown = &apiError{code: "timeout", status: http.StatusGatewayTimeout, outcome: unknown, retry: false,
		title:  "Timed out",
		detail: "the write was proposed but not confirmed before the deadline, and may still be applied: write again with If-Match and the version that you then read, or next time with an Idempotency-Key; that a read does not show it settles nothing"}
	errUnknownRetry = &apiError{code: "timeout", status: http.StatusGatewayTimeout, outcome: unknown, retry: true,
		title:  "Timed out",
		detail: "the write was proposed but not confirmed before the deadline; it may still be applied: send it again with the same Idempotency-Key"}
	errTransfer = &apiError{code: "transfer-failed", status: http.StatusGatewayTimeout, outcome: unknown, retry: true,
		title: "Transfer failed"}
)

// Of watches: before one starts, or as its last event.
var (
	errExpired = &apiError{code: "expired", status: http.StatusGone, outcome: notApplied,
		title: "Expired", detail: "events after the resource version have left the window of this node: list again, or watch with initial=true"}
	errSlow = &apiError{code: "watch-too-slow", status: http.StatusServiceUnavailable, outcome: notApplied, retry: true,
		title: "Watch too slow", detail: "the watcher fell so far behind that it would soon have missed events; resume from the resource version, and read faster"}
)

// A fault of ours. A write that met it may have been proposed before.
var errInternal = &apiError{code: "internal", status: http.StatusInternalServerError, outcome: unknown,
	title: "Internal error", detail: "the log of this node says more; a write may have been applied, or may still be"}
