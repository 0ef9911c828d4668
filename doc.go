// Command raftrv is a replicated key-value store: three nodes, one log, plain
// HTTP, and one resource version for every write.
//
// To learn how it works read the files in this order. A write's life is one
// page in each of the first five.
//
//	main.go       the command line
//	config.go     flags, their ranges and defaults
//	server.go     builds a node from the parts below, starts and stops it
//	member.go     how a node finds its place in the cluster
//	founding.go   how a cluster comes to be, once
//	httpapi.go    requests become commands and reads, results become responses
//	loop.go       one goroutine drives the replica; everybody else waits here
//	raft.go       the replica, a step machine over raft: persist, send, apply
//	command.go    what is replicated, as bytes
//	kvstore.go    the state machine: what an applied command does
//	divergence.go how members notice that they do not hold the same state
//	retries.go    the outcome of requests that may come again
//	scan.go       many items as they were at one version, while writes go on
//	events.go     what changed recently, so that a watch can start in the past
//	watch.go      the hub: who waits for which event
//	guard.go      what a node does not take: disk full, quota
//	consistency.go  what it does not serve: its state is not that of the others, or was not compared yet
//	routes.go     the table of all calls
//	params.go     the query, conditions, TTL and Idempotency-Key of a request
//	keysapi.go    keys as JSON: one, lists, streams
//	txnapi.go     transactions as JSON
//	item.go       the JSON form of an item
//	watchapi.go   a watch as lines of JSON or server-sent events
//	membersapi.go who is in the cluster, and who leads
//	nodeapi.go    status, readiness, metrics, log level, profiles
//	openapi.go    the description of the HTTP interface, openapi.json
//	backup.go     a backup: its file, and the call that streams it
//	restore.go    a new cluster from a backup, or from what a lost one left
//	backupcli.go  the commands backup and recover
//	journal.go    every write as a line in a file
//	lease_*.go    makes others wait who open a file
//	snapshot.go   a state as a stream of bytes
//	logqueue.go   the log, which nobody waits for
//	stall.go      whether the loop hangs
//	storage.go    the data directory: log and snapshots
//	private.go    files that other users could have changed
//	watermark.go  how a log that lost something is noticed
//	transport.go  messages between members
//	link.go       the connection to one of them
//	acquaint.go   who is at the addresses of the members
//	peercheck.go  what is refused of that which another member sends
//	peerstream.go the streams on which it sends
//	transfer.go   a snapshot on its way to one of them
//	peerinfo.go   what else members tell each other
//	health.go     the checks of readiness
//	metrics.go    what a node tells Prometheus: the loop, and what is there anyway;
//	              httpmetrics.go has the requests, diskmetrics.go the disk
//	memory.go     how much garbage may lie beside a large state
//	listener.go   tracked, capped TCP; shares.go divides among addresses
//	errors.go     what can go wrong, in every front's words
package main
