package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountFlags are the mount options that are flags of mount(2); the others go to the file system.
var mountFlags = map[string]struct {
	flag  uintptr
	clear bool
}{
	"ro": {unix.MS_RDONLY, false}, "rw": {unix.MS_RDONLY, true},
	"nosuid": {unix.MS_NOSUID, false}, "suid": {unix.MS_NOSUID, true},
	"nodev": {unix.MS_NODEV, false}, "dev": {unix.MS_NODEV, true},
	"noexec": {unix.MS_NOEXEC, false}, "exec": {unix.MS_NOEXEC, true},
	"sync": {unix.MS_SYNCHRONOUS, false}, "async": {unix.MS_SYNCHRONOUS, true},
	"dirsync": {unix.MS_DIRSYNC, false},
	"noatime": {unix.MS_NOATIME, false}, "atime": {unix.MS_NOATIME, true},
	"nodiratime": {unix.MS_NODIRATIME, false}, "diratime": {unix.MS_NODIRATIME, true},
	"relatime": {unix.MS_RELATIME, false}, "norelatime": {unix.MS_RELATIME, true},
	"strictatime": {unix.MS_STRICTATIME, false}, "nostrictatime": {unix.MS_STRICTATIME, true},
	"lazytime": {unix.MS_LAZYTIME, false}, "nolazytime": {unix.MS_LAZYTIME, true},
	"defaults": {0, false},
}

// splitOptions sorts options into flags and data of mount(2).
func splitOptions(options []string) (flags uintptr, data string) {
	var rest []string
	for _, o := range options {
		f, ok := mountFlags[o]
		switch {
		case !ok:
			rest = append(rest, o)
		case f.clear:
			flags &^= f.flag
		default:
			flags |= f.flag
		}
	}
	return flags, strings.Join(rest, ",")
}

func mountOptions(node, dir, fsType string, options []string) error {
	flags, data := splitOptions(options)
	err := unix.Mount(node, dir, fsType, flags, data)
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("mount %s on %s: %w: mounting needs root", node, dir, err)
	case err != nil:
		return fmt.Errorf("mount %s on %s (%s, %s): %w", node, dir, fsType, strings.Join(options, ","), err)
	}
	return nil
}

func unmount(dir string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(dir, flags)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("unmount %s: %w%s", dir, err, openFiles(dir))
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("unmount %s: %w: unmounting needs root", dir, err)
	case err != nil:
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// mountsOf lists the directories of this mount namespace on which a block device is mounted,
// oldest first.
func mountsOf(node string) ([]string, error) {
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", node, err)
	}
	want := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var dirs []string
	for s := bufio.NewScanner(f); s.Scan(); {
		// 36 35 7:0 / /mnt rw,noatime shared:1 - ext4 /dev/loop0 rw
		w := strings.Fields(s.Text())
		if len(w) > 4 && w[2] == want {
			dirs = append(dirs, unescapeMount(w[4]))
		}
	}
	return dirs, nil
}

// unescapeMount undoes the octal escapes of mountinfo (\040 is a blank).
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// openFiles names processes that keep a mounted directory busy: by their root, their working
// directory or an open file. It reads links of /proc only.
func openFiles(dir string) string {
	under := func(path string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }
	procs, _ := os.ReadDir("/proc")
	var who []string
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		base := "/proc/" + p.Name()
		links := []string{base + "/cwd", base + "/root"}
		fds, _ := os.ReadDir(base + "/fd")
		for _, fd := range fds {
			links = append(links, base+"/fd/"+fd.Name())
		}
		for _, l := range links {
			if to, err := os.Readlink(l); err == nil && under(to) {
				comm, _ := os.ReadFile(base + "/comm")
				who = append(who, fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(comm))))
				break
			}
		}
		if len(who) == 3 {
			break
		}
	}
	if len(who) == 0 {
		return ""
	}
	return ": used by " + strings.Join(who, ", ")
}
