package main

import (
	"os"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	syscall.Umask(syscall.Umask(0) | 0o022) // t.TempDir leaves it to that whether the group may write
	os.Exit(m.Run())
}
