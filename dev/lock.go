package dev

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A LockedError says who holds a file or a block device. It is ErrLocked.
type LockedError struct {
	Path string
	PID  int    // of the holder, 0 if unknown
	By   string // what else is known: a mount point, a device built on it
}

func (e *LockedError) Error() string {
	switch {
	case e.PID != 0:
		return fmt.Sprintf("%s: locked by process %d%s", e.Path, e.PID, commandOf(e.PID))
	case e.By != "":
		return fmt.Sprintf("%s: in use: %s", e.Path, e.By)
	}
	return fmt.Sprintf("%s: locked by another opener", e.Path)
}

func (e *LockedError) Is(target error) bool { return target == ErrLocked }

func commandOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return " (" + strings.TrimSpace(string(b)) + ")"
}

// lockFd takes the exclusive flock on fd without waiting.
func lockFd(fd int, path string) error {
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case err == unix.EINTR:
		case errors.Is(err, unix.EWOULDBLOCK):
			return &LockedError{Path: path, PID: LockHolder(fd)}
		default:
			return fmt.Errorf("flock: %w", err)
		}
	}
}

// replaced finds that another file has taken the place of the one that was opened, while its lock
// was still somebody else's: repaired metadata, say. Who waits for the lock opens again.
func replaced(path string, opened *unix.Stat_t) error {
	var now unix.Stat_t
	if err := unix.Stat(path, &now); err == nil && now.Dev == opened.Dev && now.Ino == opened.Ino {
		return nil
	}
	return &LockedError{Path: path, By: "another file is taking its place"}
}

// LockHolder finds the process that holds a flock on fd's file in /proc/locks; 0 if it is not
// listed there (another pid namespace, or gone).
func LockHolder(fd int) int {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return 0
	}
	defer f.Close()
	want := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	sameInode := 0
	for s := bufio.NewScanner(f); s.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 4711 00:1a:12345 0 EOF
		w := strings.Fields(s.Text())
		if len(w) < 6 || w[1] != "FLOCK" {
			continue
		}
		pid, err := strconv.Atoi(w[4])
		if err != nil || pid <= 0 {
			continue
		}
		if w[5] == want {
			return pid
		}
		// Some file systems show another device number in stat than in the lock table.
		if strings.HasSuffix(w[5], fmt.Sprintf(":%d", st.Ino)) {
			sameInode = pid
		}
	}
	return sameInode
}

// blockHolder finds out who has a block device open so that O_EXCL failed: what is built on
// it, where it is mounted, or the process that has it open.
func blockHolder(path string, rdev uint64) *LockedError {
	e := &LockedError{Path: path}
	sys := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev))
	if h, _ := os.ReadDir(filepath.Join(sys, "holders")); len(h) > 0 {
		e.By = "held by device " + h[0].Name()
		return e
	}
	if f, err := os.Open("/proc/self/mountinfo"); err == nil {
		defer f.Close()
		want := fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
		for s := bufio.NewScanner(f); s.Scan(); {
			if w := strings.Fields(s.Text()); len(w) > 4 && w[2] == want {
				e.By = "mounted on " + w[4]
				return e
			}
		}
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, p := range fds {
		var st unix.Stat_t
		if unix.Stat(p, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != rdev {
			continue
		}
		if pid, err := strconv.Atoi(strings.Split(p, "/")[2]); err == nil && pid != os.Getpid() {
			e.PID = pid
			return e
		}
	}
	return e
}

// loopHolder returns a *LockedError if a loop device is on the file: its contents belong to the
// kernel then. sysfs tells the path of each one's file.
func loopHolder(path string, st *unix.Stat_t) error {
	list, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range list {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it has just gone
		}
		// Another file system's files are not asked: its server may be this process.
		backing := strings.TrimSuffix(string(b), "\n")
		if filepath.Base(backing) != filepath.Base(path) {
			continue
		}
		var other unix.Stat_t
		if unix.Stat(backing, &other) == nil && other.Dev == st.Dev && other.Ino == st.Ino {
			return &LockedError{Path: path, By: "under loop device /dev/" + strings.Split(f, "/")[3] + ", as the files of a pool are that is active in the kernel"}
		}
	}
	return nil
}
