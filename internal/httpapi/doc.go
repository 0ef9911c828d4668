// Package httpapi is the HTTP front: it turns requests into commands and reads,
// and results and errors into responses.
//
// It promises that keys are raw, so that no path is cleaned or redirected; that a
// parameter or condition which it does not know is refused and not ignored; that
// every wait ends at a deadline; that every error is application/problem+json and
// says of a write what became of it; and that no page of another origin reads or
// writes unless it was allowed to. What a client can make a node hold has a bound,
// and no address gets all of it.
//
// It knows a node only by the interface [Store], the replicated store: how new a read
// is, and what the node does not take or serve at present, is decided behind that. It
// never meets raft, the log, other members' messages or sockets: the root listens, and
// serves what [New] returns. It imports store, watch, shares and fault.
//
// Read its files in this order:
//
//	api.go         ServeHTTP, calls on one key, bodies, errors
//	routes.go      the table of all calls
//	params.go      the query, conditions, TTL, content type, Idempotency-Key
//	strictjson.go  JSON bodies, in which nothing is said twice or misspelt
//	keysapi.go     keys as JSON: one, lists, streams
//	txnapi.go      transactions
//	watchapi.go    a watch as lines of JSON or server-sent events
//	backupapi.go   a backup, streamed
//	membersapi.go  who is in the cluster, and who leads
//	nodeapi.go     status, readiness, metrics, log level, profiles
//	health.go      the checks of readiness
//	browsers.go    what web pages of others may not do
//	httpmetrics.go what was answered, counted and timed
//	openapi.go     the description of all this, openapi.json
package httpapi
