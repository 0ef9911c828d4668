package fsx

import (
	"os"
	"syscall"
)

// A lease on a file makes whoever opens it wait until it is dropped, or for /proc/sys/fs/lease-break-time,
// 45 s. The kernel tells with SIGIO, which does nothing here: who has a lease asks.

// TakeLease fails with EAGAIN if somebody else has the file open.
func TakeLease(f *os.File) error { return fcntl(f, syscall.F_SETLEASE, syscall.F_WRLCK) }

// LeaseWanted says whether somebody waits for the lease to be dropped.
func LeaseWanted(f *os.File) bool {
	kind, _, errno := syscall.Syscall(syscall.SYS_FCNTL, f.Fd(), syscall.F_GETLEASE, 0)
	return errno != 0 || kind != syscall.F_WRLCK
}

func DropLease(f *os.File) { _ = fcntl(f, syscall.F_SETLEASE, syscall.F_UNLCK) } // fails if there is none

func fcntl(f *os.File, command, arg uintptr) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, f.Fd(), command, arg); errno != 0 {
		return errno
	}
	return nil
}
