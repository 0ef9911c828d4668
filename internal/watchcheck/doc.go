// Package watchcheck judges watches in tests.
//
// Whatever a watcher was told, by whichever node and over however many
// connections, goes through a [Validator]. It checks filter, order, uniqueness,
// whole versions, bookmarks and previous versions while the watch goes on; what was
// left out without a trace it finds at the end, against a [History]. The simulator
// and the tests of real processes use the same one. [ReadJournals] reads the
// journals of a node as one.
//
// It knows the events of store and nothing of how a watch is served; [Parse] reads
// the NDJSON that clients see. Only tests import it.
package watchcheck
