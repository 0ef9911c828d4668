// Command raftrv is a replicated key-value store: three nodes, one log, plain
// HTTP, and one resource version for every write. It is what etcd's raftexample
// would be if it had grown up; ARCHITECTURE.md has a table from its names to these.
//
// # The life of a PUT
//
// Five files, one page of each:
//
//	internal/httpapi/api.go    ServeHTTP finds the call (routes.go); putKey makes a command of
//	                           path, body and conditions, and hands it to the replicated store
//	kvstore.go                 Apply: may this node serve, and has it room (admission.go)? From
//	                           here on the command may happen
//	loop.go                    propose adds the command to the open batch and waits. The loop's
//	                           goroutine, in iterate and feed, hands batches to the replica
//	raft.go                    propose makes the batch one entry of the log. processOnce sends it,
//	                           saves it and, when a majority has it, applies it
//	internal/store/state.go    Apply carries out the commands of an entry, each with its version
//	                           and its event, and returns what each came to
//
// The way back is short: replica.applyBatch hands the batch to loop.proposed, which
// closes its channel; loop.propose and Apply return the result, and putKey answers
// 201 or 204.
//
// # In which order to read
//
// Each concept comes before those who use it.
//
// What is replicated, and what can go wrong:
//
//	internal/fault    errors: what happened to the write, and what to do next
//	internal/store    the state machine; its doc.go lists its files in order
//
// How it is replicated:
//
//	raft.go           the replica, a step machine over etcd's raft: batches, reads, members.
//	                  Its interfaces disk, transport and driver are all that it sees of the rest
//	loop.go           one goroutine drives the replica; everybody else waits here
//	stall.go          whether that goroutine hangs
//	storage.go        the data directory: log and snapshots
//	watermark.go      how a log that lost something is noticed
//	diskmetrics.go    the same disk with a clock beside it
//	internal/fsx      whose a file is, and whether its name is durable
//
// How members reach each other:
//
//	transport.go      messages between members, and who may send some
//	link.go           the connection to one of them
//	peercheck.go      what is refused of that which another member sends
//	peerstream.go     the streams on which it sends
//	transfer.go       a snapshot on its way to one of them
//	peerinfo.go       what else members tell each other
//	acquaint.go       who is at the addresses of the members
//
// How a node comes into a cluster, and what it refuses:
//
//	founding.go       how a cluster comes to be, once
//	member.go         how a node finds its place in it
//	level.go          when the cluster uses what is new
//	admission.go      what a node does not take: disk full, quota
//	consistency.go    what it does not serve: its state is not that of the others, or was not
//	                  compared yet
//
// What clients see:
//
//	internal/watch    who waits for which event; the journal
//	kvstore.go        the replicated store, which every front talks to: Get, List, Scan, Watch,
//	                  Apply, the calls on members
//	internal/shares   what one address may take of what there is for all
//	internal/httpapi  requests become commands and reads, results become responses
//	listener.go       sockets: tracked, bounded, shared
//
// How it is put together:
//
//	httpapi.go        the ports of a node, and the HTTP front behind them
//	server.go         builds a node from these parts, starts and stops it
//	config.go         flags, their ranges and defaults
//	main.go           the command line
//	backupcli.go      the commands backup and recover
//	restore.go        a new cluster from a backup, or from what a lost one left
//	metrics.go        what a node tells Prometheus, but for requests and the disk
//	logqueue.go       the log, for which nobody waits
//	gc.go             how much garbage may lie beside a large state
//
// The tests beside these files look at one part. The simulator (sim_*_test.go) runs whole
// clusters of them in one goroutine, and tests/ runs real processes; see docs/testing.md.
package main
