package node

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

// A User is one reason why a device is busy.
type User struct {
	Mount  string // mount point, as process PID sees it
	PID    int    // a process that has it mounted (0: this one) or open
	Comm   string // name of that process
	Holder string // a block device stacked on it
	Swap   bool
}

func (u User) String() string {
	switch {
	case u.Mount != "" && u.PID == 0:
		return "mounted on " + u.Mount
	case u.Mount != "":
		return fmt.Sprintf("mounted on %s in the mount namespace of process %d (%s)", u.Mount, u.PID, u.Comm)
	case u.Holder != "":
		return "used by block device " + u.Holder
	case u.Swap:
		return "used as swap"
	}
	return fmt.Sprintf("open in process %d (%s)", u.PID, u.Comm)
}

// UserList is everything that keeps a device busy, as far as it can be seen.
type UserList []User

// Settled: at least one of them will not go away by itself. A mount that only another namespace
// has may: whoever starts in a new namespace gets a copy of every mount, and helpers drop it.
func (l UserList) Settled() bool {
	for _, u := range l {
		if u.Mount != "" && u.PID == 0 || u.Holder != "" || u.Swap {
			return true
		}
	}
	return false
}

// ErrBusy: the device is mounted, open, or used by another block device. A *BusyError says by whom.
var ErrBusy = errors.New("device busy")

// A BusyError is ErrBusy with the names of the users.
type BusyError struct {
	Node  string
	Users UserList
}

func (e *BusyError) Error() string {
	if len(e.Users) == 0 {
		return e.Node + " open or mounted by a process that cannot be seen from here"
	}
	s := make([]string, 0, 3)
	for i, u := range e.Users {
		if i == 2 && len(e.Users) > 3 {
			s = append(s, fmt.Sprintf("and %d more", len(e.Users)-2))
			break
		}
		s = append(s, u.String())
	}
	return e.Node + " " + strings.Join(s, "; ")
}

func (e *BusyError) Is(target error) bool { return target == ErrBusy }

// Users lists what uses a block device, given by its number and the path of its node: mounts in
// every mount namespace that /proc shows, stacked devices, swap, and processes other than this one
// that have it open. It reads /proc and sysfs only.
func Users(dev uint64, node string) UserList {
	id := fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))
	var list UserList
	if holders, err := os.ReadDir("/sys/dev/block/" + id + "/holders"); err == nil {
		for _, h := range holders {
			list = append(list, User{Holder: h.Name()})
		}
	}
	if b, err := os.ReadFile("/proc/swaps"); err == nil {
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 0 && f[0] == node {
				list = append(list, User{Swap: true})
			}
		}
	}
	self := os.Getpid()
	own, _ := os.Readlink("/proc/self/ns/mnt")
	for _, m := range mountsOf("self", id, node) {
		list = append(list, User{Mount: m})
	}
	seen := map[string]bool{own: true}
	procs, _ := os.ReadDir("/proc")
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		if ns, err := os.Readlink("/proc/" + p.Name() + "/ns/mnt"); err == nil && !seen[ns] {
			seen[ns] = true
			for _, m := range mountsOf(p.Name(), id, node) {
				list = append(list, User{Mount: m, PID: pid, Comm: comm(p.Name())})
			}
		}
		if pid != self && hasOpen(p.Name(), dev, node) {
			list = append(list, User{PID: pid, Comm: comm(p.Name())})
		}
	}
	return list
}

func comm(pid string) string {
	b, _ := os.ReadFile("/proc/" + pid + "/comm")
	return strings.TrimSpace(string(b))
}

// hasOpen reports whether a process has a block device open. The descriptors of a process that
// was killed and waits for I/O are those of its last threads.
func hasOpen(pid string, dev uint64, node string) bool {
	if listed, open := opens("/proc/"+pid+"/fd", dev, node); listed {
		return open
	}
	tasks, _ := os.ReadDir("/proc/" + pid + "/task")
	for _, t := range tasks {
		if _, open := opens("/proc/"+pid+"/task/"+t.Name()+"/fd", dev, node); open {
			return true
		}
	}
	return false
}

// opens looks at link texts first and stats only those under /dev, so that it never waits for a
// remote file system. listed is false if the directory shows no descriptors at all.
func opens(dir string, dev uint64, node string) (listed, open bool) {
	fds, err := os.ReadDir(dir)
	if err != nil || len(fds) == 0 {
		return false, false
	}
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		to, err := os.Readlink(path)
		if err != nil || !strings.HasPrefix(to, "/dev/") {
			continue
		}
		if to == node {
			return true, true
		}
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == dev {
			return true, true
		}
	}
	return true, false
}

// mountsOf lists the mount points in pid's mount namespace that are on device id ("7:3"). Btrfs
// mounts carry an anonymous device number, so the source is compared too.
func mountsOf(pid, id, node string) []string {
	f, err := os.Open("/proc/" + pid + "/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	var list []string
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if m, ok := parseMount(s.Text()); ok && (m.id == id || m.source == node) {
			list = append(list, m.point)
		}
	}
	return list
}

type mount struct{ id, point, fstype, source string }

// parseMount reads one line of mountinfo:
//
//	36 35 98:0 /root /mnt/point rw,noatime shared:1 - ext3 /dev/root rw,errors=continue
func parseMount(line string) (mount, bool) {
	left, right, ok := strings.Cut(line, " - ")
	if !ok {
		return mount{}, false
	}
	l, r := strings.Fields(left), strings.Fields(right)
	if len(l) < 6 || len(r) < 2 {
		return mount{}, false
	}
	return mount{id: l[2], point: unescape(l[4]), fstype: r[0], source: unescape(r[1])}, true
}

// unescape undoes the octal escapes of blanks, tabs, newlines and backslashes in mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
