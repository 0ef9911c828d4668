//go:build unix && !linux

package proc

import "syscall"

// sysProcAttr gives a node a process group of its own, so that Ctrl-C reaches only us and we stop the nodes
// in our order.
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}

// frozen cannot tell whether a SIGSTOP has arrived; it takes the kernel's word that it will.
func frozen(int) (bool, error) { return true, nil }
