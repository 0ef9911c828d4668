// Package fault says what can go wrong with a request, in the words that every
// front shares.
//
// It promises two things. An [Error] has a code that never changes, so clients
// may switch on it; and it says what became of the write: it did not happen
// ([NotApplied]), it may have happened or may still happen ([Unknown]), or it
// happened and only the answer is lost ([Applied]). errors.Is compares codes, so
// an error with its own detail is still the sentinel that it was made from.
//
// It knows nothing of nodes, raft and the store. It imports none of our packages,
// and may be imported by all of them but the store, whose results are data.
//
// There is one file, errors.go. The sentinels in it are grouped by when they
// happen: before anything was proposed, at the deadline, when applied, after the
// proposal, in a watch.
package fault
