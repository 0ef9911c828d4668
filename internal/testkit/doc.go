// Package testkit is what tests of several rooms share: waiting for a condition
// instead of sleeping, connections without sockets, answers of a node, samples of
// its metrics, and the flags -heavy and -live-race.
//
// It knows nothing of raftrv but the JSON that clients see, and imports none of our
// packages, so tests of every room can use it. Only tests import it.
package testkit
