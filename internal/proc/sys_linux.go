package proc

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// sysProcAttr gives a node a process group of its own, so that Ctrl-C reaches only us and we stop the nodes
// in our order, and has the kernel kill it should we die without that (a test that runs into its timeout).
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// frozen reports whether a SIGSTOP has reached every thread: kill(2) returns before that, and a thread that
// still runs may answer one more request.
func frozen(pid int) (bool, error) {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return false, err
	}
	for _, file := range stats {
		b, err := os.ReadFile(file)
		if err != nil {
			return false, err
		}
		// "PID (NAME) STATE ...", where the name may hold anything.
		if i := bytes.LastIndexByte(b, ')'); !bytes.HasPrefix(b[i+1:], []byte(" T")) {
			return false, nil
		}
	}
	return true, nil
}
