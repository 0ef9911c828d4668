// Package watch tells watchers what has changed, and keeps the journal.
//
// It promises every event after the version at which a watch starts, exactly once
// and in the order of versions, or an error that says why not: the version has left
// the window, the watcher is too slow, the node does not serve. Applying never
// waits for a watcher. A watcher that does not read costs no memory beyond the
// window, which is there anyway. The journal is a watcher that writes to a file: what
// it could not write it admits there, as a gap.
//
// It knows nothing of raft, HTTP and the form in which a watch is sent. Whether the
// node's state may be told at all is decided by others, through [Hub.Gate]. It
// imports store, fault and fsx.
//
// watch.go first: the hub, its one goroutine, and how a watcher reads the window.
// Then journal.go: the format, where a file resumes, and how files are rotated.
package watch
