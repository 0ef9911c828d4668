// Package shares divides what a node has among the addresses of its clients.
//
// It promises that however much one address asks for, something is left for the
// others: [Shares] gives out a fixed total, and to one address no more than its
// share. Whoever takes gives back. [Shares.Await] waits for that until its context
// ends, [Shares.Take] does not wait. An IPv6 address counts as its network, see
// [AddressOf].
//
// It knows nothing of what it counts: places and bytes look alike. The HTTP front
// divides the bodies it reads and the lists, backups and metrics that it writes;
// the listener divides connections. It imports none of our packages. There is one
// file, shares.go.
package shares
