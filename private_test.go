package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/zap"

	"raftrv/internal/fsx"
	"raftrv/internal/testkit"
	"raftrv/internal/watch"
)

// TestCheckPrivateDir: what others could have changed is refused by name, and the text says what to do.
func TestCheckPrivateDir(t *testing.T) {
	smallSegments(t)
	elsewhere := t.TempDir()
	link := func(name string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, name)
			moved := filepath.Join(t.TempDir(), "moved")
			if err := os.Rename(path, moved); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			testkit.Must(t, os.Symlink(moved, path))
		}
	}
	mode := func(name string, mode fs.FileMode) func(*testing.T, string) {
		return func(t *testing.T, dir string) { testkit.Must(t, os.Chmod(filepath.Join(dir, name), mode)) }
	}
	for name, c := range map[string]struct {
		change func(t *testing.T, dir string)
		names  string // what the error is about; "" = no error
		do     string
	}{
		"as it was made":            {func(*testing.T, string) {}, "", ""},
		"others may look":           {mode(".", 0o755), "", ""},
		"everybody may write":       {mode(".", 0o777), "data", "chmod go-w"},
		"the group may write":       {mode(".", 0o770), "data", "chmod go-w"},
		"snap is a link":            {link("snap"), "snap", "in its place"},
		"wal is a link":             {link("wal"), "wal", "in its place"},
		"LOCK is a link":            {link("LOCK"), "LOCK", "in its place"},
		"watermark is a link":       {link("watermark"), "watermark", "in its place"},
		"founding leads to nothing": {link("founding"), "founding", "in its place"},
		"snap is everybody's":       {mode("snap", 0o777), "snap", "chmod go-w"},
		"wal is the group's":        {mode("wal", 0o770), "wal", "chmod go-w"},
		"LOCK is a pipe": {func(t *testing.T, dir string) {
			testkit.Must(t, os.Remove(filepath.Join(dir, lockName)))
			testkit.Must(t, syscall.Mkfifo(filepath.Join(dir, lockName), 0o600))
		}, "LOCK", "neither a file nor a directory"},
		"a snapshot is a link": {func(t *testing.T, dir string) {
			paths, err := filepath.Glob(filepath.Join(dir, snapDir, "*"+bodySuffix))
			testkit.Must(t, err)
			link(filepath.Join(snapDir, filepath.Base(paths[0])))(t, dir)
		}, bodySuffix, "in its place"},
		"somebody else's things": {func(t *testing.T, dir string) {
			testkit.Must(t, os.Symlink(elsewhere, filepath.Join(dir, "their-link")))
			testkit.Must(t, os.Mkdir(filepath.Join(dir, "lost+found"), 0o777))
		}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			s, _ := newDisk(t, dir)
			testkit.Must(t, s.close())
			c.change(t, dir)
			s, err := openStorage(dir, zap.NewNop())
			if err == nil {
				testkit.Must(t, s.close())
			}
			if c.names == "" {
				testkit.Must(t, err)
				return
			}
			if !fsx.IsNotPrivate(err) || !strings.Contains(err.Error(), c.names) || !strings.Contains(err.Error(), c.do) {
				t.Errorf("opened with %v, want an error about %s with %q", err, c.names, c.do)
			}
			// What is passed over of a directory that is damaged is not this.
			if _, err := recoverDirectory(dir, filepath.Join(t.TempDir(), "made"), 0, 0, true, zap.NewNop()); !fsx.IsNotPrivate(err) {
				t.Errorf("recover says %v", err)
			}
		})
	}
	t.Run("behind a link", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "link")
		testkit.Must(t, os.Symlink(elsewhere, dir))
		s, err := openStorage(dir, zap.NewNop())
		testkit.Must(t, err)
		testkit.Must(t, s.close())
	})
	t.Run("of another user", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("only root can give a directory away")
		}
		dir := t.TempDir()
		testkit.Must(t, os.Chown(dir, 12345, 12345))
		if _, err := openStorage(dir, zap.NewNop()); !fsx.IsNotPrivate(err) || !strings.Contains(err.Error(), "chown -R 0 "+dir) {
			t.Errorf("opened with %v", err)
		}
	})
}

// TestOpenPrivate: a journal holds all values.
func TestOpenPrivate(t *testing.T) {
	before := syscall.Umask(0)
	defer syscall.Umask(before)
	dir := t.TempDir()
	path := filepath.Join(dir, "journal")
	for range 2 { // made, then there
		f, err := fsx.OpenPrivate(path, os.O_APPEND)
		testkit.Must(t, err)
		info, err := f.Stat()
		testkit.Must(t, errors.Join(err, f.Close()))
		if info.Mode().Perm() != fsx.FileMode {
			t.Errorf("it has mode %v", info.Mode())
		}
	}
	for _, mode := range []fs.FileMode{0o640, 0o602, 0o666} {
		testkit.Must(t, os.Chmod(path, mode))
		if _, err := watch.OpenJournal(path, t.TempDir(), 1, zap.NewNop()); !fsx.IsNotPrivate(err) || !strings.Contains(err.Error(), "chmod go= "+path) {
			t.Errorf("mode %v: %v", mode, err)
		}
	}
	testkit.Must(t, os.Chmod(path, fsx.FileMode))
	for name, to := range map[string]string{"link": path, "dangling": filepath.Join(dir, "nowhere")} {
		link := filepath.Join(dir, name)
		testkit.Must(t, os.Symlink(to, link))
		if _, err := watch.OpenJournal(link, t.TempDir(), 1, zap.NewNop()); !fsx.IsNotPrivate(err) || !strings.Contains(err.Error(), link+" is a symbolic link") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "nowhere")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was made through a link: %v", err)
	}
	if os.Geteuid() == 0 {
		testkit.Must(t, os.Chown(path, 12345, 12345))
		if _, err := watch.OpenJournal(path, t.TempDir(), 1, zap.NewNop()); !fsx.IsNotPrivate(err) {
			t.Errorf("another user's: %v", err)
		}
	}
}

// TestCheckReplaceable: a backup takes the place of a file, and of nothing else.
func TestCheckReplaceable(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	testkit.Must(t, os.WriteFile(file, nil, 0o600))
	testkit.Must(t, os.Symlink(file, link))
	for _, path := range []string{file, filepath.Join(dir, "new")} {
		testkit.Must(t, fsx.CheckReplaceable(path))
	}
	for path, words := range map[string]string{link: "is a symbolic link", dir: "is no file", os.DevNull: "is no file"} {
		if _, err := saveBackup(t.Context(), "http://127.0.0.1:1", path); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", path, err, words)
		}
	}
}
