package lvm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"mica/dev/signature"
)

// checkDevice refuses what must not become part of a volume group: anything that is not a block
// device, one that is mounted, swapped to, held by something, or opened exclusively, and, unless
// forced, one with a signature on it. It returns the device number.
func checkDevice(ctx context.Context, path string, force bool) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("device %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("device %s is not a block device", path)
	}
	if err := checkFree(path, st.Rdev); err != nil {
		return 0, err
	}
	// The kernel refuses an exclusive open of a device that is mounted, swapped to, or part of a
	// mapped device or an array, in any mount namespace.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		if err == unix.EBUSY {
			return 0, fmt.Errorf("device %s: %w: it is mounted or part of something else", path, ErrBusy)
		}
		return 0, fmt.Errorf("device %s: %w", path, err)
	}
	unix.Close(fd)
	if force {
		return st.Rdev, nil
	}
	if err := signature.Check(ctx, path); err != nil {
		return 0, fmt.Errorf("%w (to lose it and go on: force)", err)
	}
	return st.Rdev, nil
}

// checkFree asks sysfs and the mount table, which name the user of a device.
func checkFree(path string, rdev uint64) error {
	number := fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 4 && f[2] == number {
				return fmt.Errorf("device %s: %w: mounted on %s", path, ErrBusy, f[4])
			}
		}
	}
	sys := "/sys/dev/block/" + number
	for _, dir := range []string{sys, sys + "/*"} { // the device and its partitions
		holders, _ := filepath.Glob(dir + "/holders/*")
		if len(holders) > 0 {
			return fmt.Errorf("device %s: %w: held by %s", path, ErrBusy, filepath.Base(holders[0]))
		}
	}
	return nil
}

// checkDevices checks all before anything is written to one. The same device under two names is
// refused.
func checkDevices(ctx context.Context, paths []string, force bool) error {
	seen := map[uint64]string{}
	for _, path := range paths {
		rdev, err := checkDevice(ctx, path, force)
		if err != nil {
			return err
		}
		if other, ok := seen[rdev]; ok {
			return fmt.Errorf("devices %s and %s are the same", other, path)
		}
		seen[rdev] = path
	}
	return nil
}
