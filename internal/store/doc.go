// Package store is the state machine: what is replicated, what applying it does,
// and how the result is read.
//
// It promises that applying is a pure function of the state and the entry. Time,
// identities and conditions are in the entry, so every member comes to the same
// state and to the same bytes in a snapshot. A [Store] is applied to by one
// goroutine and read by any number; a reader sees a whole entry or none of it. An
// entry that this program does not know is an error, and then nothing has changed.
// What is on disk or on the wire never changes its meaning: numbers of commands
// and records are not used again, and a new rule gets a new feature level.
//
// It knows neither raft nor HTTP, nor who waits for a result. Applying reads no clock,
// draws no random number, starts no goroutine and does no I/O;
// snapshots and backups go to and come from a stream that the caller gives.
// It imports none of our packages.
//
// Read its files in this order:
//
//	command.go     the bytes of an entry: a batch of commands, and what a result is
//	state.go       the state, and Apply
//	items.go       the tree of items
//	members.go     who is in the cluster, and how that changes
//	sessions.go    which batches were applied, so that none is twice
//	level.go       the feature level: which rules count for which entries
//	idempotency.go outcomes of requests with an Idempotency-Key
//	events.go      the window of recent events, where watches start
//	checksum.go    checksums, by which members notice that their states differ
//	scan.go        many items as they were at one version, while writes go on
//	snapshot.go    a state as a stream of bytes
//	backup.go      a backup: the same with a head and a digest
//	newcluster.go  the first state of a cluster that is made from another one
//	item.go        the JSON form of an item, the same in all calls
package store
