// Package hostile attacks nodes in tests: messages that no member sends, requests
// to the peer port, and a [Decoy] that answers where a member is expected.
//
// It promises nothing about how a node takes that; the tests of the transport and
// those of real processes in tests/ say what must hold. It knows raft's messages
// and the store's entries, since it has to forge them, and nothing of a node. Only
// tests import it.
package hostile
