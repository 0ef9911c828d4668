//go:build !linux

package main

import (
	"errors"
	"os"
)

// Elsewhere there are no leases.

func takeLease(*os.File) error  { return errors.ErrUnsupported }
func leaseWanted(*os.File) bool { return true }
func dropLease(*os.File)        {}
