package fsx

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// This file refuses files that other users of the machine could have put there,
// or could change. Checksums would not notice: whoever can write a file can write
// its checksum, too.

// notPrivateError says what is wrong with a file, and what to do.
type notPrivateError string

func (e notPrivateError) Error() string { return string(e) }

func notPrivate(format string, args ...any) error {
	return notPrivateError(fmt.Sprintf(format, args...))
}

func IsNotPrivate(err error) bool {
	_, ok := errors.AsType[notPrivateError](err)
	return ok
}

// Modes of what a node makes.
const (
	DirMode  = 0o700
	FileMode = 0o600
)

const (
	OthersWrite fs.FileMode = 0o022
	othersAny   fs.FileMode = 0o077
)

// CheckOwner says whether a file belongs to this user, and nobody else has any of
// the permissions in mode.
func CheckOwner(path string, info fs.FileInfo, mode fs.FileMode) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch own := os.Geteuid(); {
	case !ok:
		return notPrivate("%s: this system does not say whose it is", path)
	case int(st.Uid) != own:
		return notPrivate("%s belongs to user %d, and this process runs as user %d: run it as that user, or, if you trust what is there, chown -R %d %s",
			path, st.Uid, own, own, path)
	case info.Mode().Perm()&mode == 0:
		return nil
	case mode == OthersWrite:
		return notPrivate("%s has mode %v, so other users can write to it: if you trust what is there, chmod go-w %s", path, info.Mode(), path)
	default:
		return notPrivate("%s has mode %v, and must be for this user only: chmod go= %s", path, info.Mode(), path)
	}
}

func errSymlink(path string) error {
	return notPrivate("%s is a symbolic link, and other users may have a hand in where it leads: put a file or directory in its place", path)
}

func CheckPrivate(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // it was temporary
	case err != nil:
		return err
	case info.Mode()&fs.ModeSymlink != 0:
		return errSymlink(path)
	case !info.IsDir() && !info.Mode().IsRegular():
		return notPrivate("%s is neither a file nor a directory", path)
	}
	return CheckOwner(path, info, OthersWrite)
}

// OpenPrivate opens a file that nobody else may read, for reading and writing, and
// makes it if there is none. flags are added.
func OpenPrivate(path string, flags int) (*os.File, error) {
	flags |= os.O_RDWR | syscall.O_NOFOLLOW
	f, err := os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, FileMode)
	if err == nil {
		if err := f.Chmod(FileMode); err != nil { // whatever the umask
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	f, err = os.OpenFile(path, flags, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, errSymlink(path)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() { // what else it is is for the caller to say
		err = CheckOwner(path, info, othersAny)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// CheckReplaceable refuses to replace what is no plain file: a link may be how
// others want a file to be where they can read it, and a device is needed.
func CheckReplaceable(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode()&fs.ModeSymlink != 0:
		return errSymlink(path)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is no file, and is not replaced by one", path)
	}
	return nil
}

// SyncDir makes the names in a directory durable.
var SyncDir = func(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
