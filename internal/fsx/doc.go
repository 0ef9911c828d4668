// Package fsx is what raftrv needs of a file system beyond package os: whose a
// file is, whether its name survives a power cut, and who else has it open.
//
// It promises that [OpenPrivate] and [CheckPrivate] accept nothing that another
// user of the machine could have put there or could change, and that a name is
// durable once [SyncDir] has returned. It follows no symbolic link.
//
// It knows nothing of what the files hold, and imports none of our packages.
//
// private.go has owners, modes and names. lease_linux.go has leases, with which a
// journal makes whoever opens its file wait; lease_other.go is for systems that
// have none.
package fsx
