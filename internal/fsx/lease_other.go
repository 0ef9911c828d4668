//go:build !linux

package fsx

import (
	"errors"
	"os"
)

// Elsewhere there are no leases.

func TakeLease(*os.File) error  { return errors.ErrUnsupported }
func LeaseWanted(*os.File) bool { return true }
func DropLease(*os.File)        {}
