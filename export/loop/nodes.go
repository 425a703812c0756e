package loop

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Device files. On a host devtmpfs makes them. In a container with a /dev of its own they may be
// missing, so they are made here from what sysfs says.

const (
	controlPath = "/dev/loop-control"
	// controlMinor is the fixed misc minor of loop-control (major 10).
	controlMajor = 10
	controlMinor = 237
)

func openControl() (int, error) {
	fd, err := openRetry(controlPath, unix.O_RDWR)
	if errors.Is(err, unix.ENOENT) {
		if err := unix.Mknod(controlPath, unix.S_IFCHR|0o660, int(unix.Mkdev(controlMajor, controlMinor))); err != nil && err != unix.EEXIST {
			return -1, fmt.Errorf("%s is missing and cannot be made: %w", controlPath, err)
		}
		fd, err = openRetry(controlPath, unix.O_RDWR)
	}
	if err != nil {
		return -1, fmt.Errorf("%s: %w", controlPath, err)
	}
	return fd, nil
}

// ensureNode returns the device file of loop device n and makes it if it is missing or belongs
// to something else. ErrNotBound if the kernel has no such device.
func ensureNode(n int) (string, error) {
	path := "/dev/loop" + strconv.Itoa(n)
	var st unix.Stat_t
	if known, ok := minors.number(n); ok && unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == known {
		return path, nil
	}
	dev, err := deviceNumber(n)
	if err != nil {
		return "", err
	}
	err = unix.Stat(path, &st)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == dev {
		return path, nil
	}
	if err == nil {
		return "", fmt.Errorf("%s is not block device %d:%d", path, unix.Major(dev), unix.Minor(dev))
	}
	if err != unix.ENOENT {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if err := unix.Mknod(path, unix.S_IFBLK|0o660, int(dev)); err != nil && err != unix.EEXIST {
		return "", fmt.Errorf("%s is missing and cannot be made: %w", path, err)
	}
	return path, nil
}

// deviceNumber reads the device number of loop device n from sysfs.
func deviceNumber(n int) (uint64, error) {
	b, err := os.ReadFile(sysfs(n) + "/dev")
	if errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("loop%d: %w", n, ErrNotBound)
	}
	if err != nil {
		return 0, err
	}
	maj, min, ok := strings.Cut(strings.TrimSpace(string(b)), ":")
	if ok {
		a, err1 := strconv.ParseUint(maj, 10, 32)
		i, err2 := strconv.ParseUint(min, 10, 32)
		if err1 == nil && err2 == nil {
			return unix.Mkdev(uint32(a), uint32(i)), nil
		}
	}
	return 0, fmt.Errorf("%s/dev says %q: want MAJOR:MINOR", sysfs(n), b)
}

// devices is the set of loop devices that exist, bound or not.
func devices() map[int]bool {
	set := make(map[int]bool)
	list, err := os.ReadDir("/sys/block")
	if err != nil {
		return set
	}
	for _, e := range list {
		if s, ok := strings.CutPrefix(e.Name(), "loop"); ok {
			if n, err := strconv.Atoi(s); err == nil {
				set[n] = true
			}
		}
	}
	return set
}

// NumberOf returns the loop number of a node such as "/dev/loop7".
func NumberOf(node string) (int, error) {
	s, ok := strings.CutPrefix(node, "/dev/loop")
	n, err := strconv.Atoi(s)
	if !ok || err != nil || n < 0 {
		return 0, fmt.Errorf("%q is not a loop device", node)
	}
	return n, nil
}

// minors remembers which minors this process has seen, so that an attach does not read a list of
// all devices to tell whether the kernel has made one for it. What others make or remove
// meanwhile it does not learn: the worst that comes of it is a free minor that is taken away,
// which the kernel makes again when somebody wants it, or one that stays. It also remembers which it
// has set up; if others made such a one anew, its requests are longer than they should be.
var minors minorTable

type minorTable struct {
	mu    sync.Mutex
	seen  map[int]bool   // guarded by mu; nil before the first look
	ready map[int]uint64 // guarded by mu; device numbers of those that are set up as we want them
}

// knowMinors looks which minors are there, the first time.
func knowMinors() {
	minors.mu.Lock()
	defer minors.mu.Unlock()
	if minors.seen == nil {
		minors.seen = devices()
	}
}

// newMinor reports whether a minor was not there before, and remembers it.
func newMinor(n int) bool {
	minors.mu.Lock()
	defer minors.mu.Unlock()
	was := minors.seen[n]
	minors.seen[n] = true
	return !was
}

// number returns the device number of a minor that was set up.
func (m *minorTable) number(n int) (uint64, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	number, ok := m.ready[n]
	return number, ok
}

// setUp limits the requests of a minor that the next file finds as this one leaves it, once.
func (m *minorTable) setUp(n int) {
	if _, ok := m.number(n); ok {
		return
	}
	limitRequests(n)
	number, err := deviceNumber(n)
	if err != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ready == nil {
		m.ready = make(map[int]uint64)
	}
	m.ready[n] = number
}

// forgetMinor is for one that was removed.
func forgetMinor(n int) {
	minors.mu.Lock()
	defer minors.mu.Unlock()
	delete(minors.seen, n)
	delete(minors.ready, n)
}
