package fuse

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// fsType is the type that mountinfo shows.
const fsType = "fuse.mica"

// mountFuse opens /dev/fuse and mounts it on dir. The first request, INIT, comes by itself; the
// call does not wait for it.
func mountFuse(dir, source string, readOnly bool) (fd int, err error) {
	fd, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == unix.ENOENT {
		// A container's /dev may lack it: misc device, fixed minor.
		if err := unix.Mknod("/dev/fuse", unix.S_IFCHR|0o600, int(unix.Mkdev(10, 229))); err != nil && err != unix.EEXIST {
			return -1, fmt.Errorf("/dev/fuse is missing and cannot be made: %w", err)
		}
		fd, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return -1, fmt.Errorf("/dev/fuse: %w", err)
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	// allow_other: the loop driver's threads must be allowed to ask for statfs.
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,allow_other,max_read=%d", fd, os.Geteuid(), os.Getegid(), maxIO)
	if err := unix.Mount(source, dir, fsType, flags, data); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("mount %s on %s: %w", fsType, dir, err)
	}
	return fd, nil
}

// mounted reports whether one of our mounts is on dir. It reads mountinfo and never asks the
// file system itself, whose server may be gone.
func mounted(dir string) bool {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	want := escape(dir)
	for s.Scan() {
		left, right, ok := strings.Cut(s.Text(), " - ")
		if !ok {
			continue
		}
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) > 4 && len(r) > 0 && r[0] == fsType && l[4] == want {
			return true
		}
	}
	return false
}

// escape writes a path as mountinfo does.
func escape(s string) string {
	return strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(s)
}

// abort ends the connection of the mount on dir: every request that waits fails. The mount stays
// if its file is in use.
func abort(dir string) {
	if mounted(dir) {
		unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_FORCE)
	}
}

// unmount takes our mount from dir, also while it is in use, and removes dir. A loop device on
// its file must be gone, or its backing file can no longer be told.
func unmount(dir string) error {
	for {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if err == unix.EBUSY {
			// Somebody stands in it. Nothing depends on it any more.
			err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err == unix.EINVAL || err == unix.ENOENT {
			break // there is none
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		// The list of mounts is as long as there are devices: look only if the directory stays.
		if err := os.Remove(dir); err == nil || os.IsNotExist(err) {
			return nil
		}
		if !mounted(dir) {
			break
		}
	}
	if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}
