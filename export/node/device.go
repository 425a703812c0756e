package node

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Number reads the device number from a directory of sysfs, such as /sys/block/nbd7.
func Number(sysfs string) (uint64, error) {
	b, err := os.ReadFile(sysfs + "/dev")
	if err != nil {
		return 0, err
	}
	major, minor, ok := strings.Cut(strings.TrimSpace(string(b)), ":")
	if ok {
		a, err1 := strconv.ParseUint(major, 10, 32)
		i, err2 := strconv.ParseUint(minor, 10, 32)
		if err1 == nil && err2 == nil {
			return unix.Mkdev(uint32(a), uint32(i)), nil
		}
	}
	return 0, fmt.Errorf("%s/dev says %q: want MAJOR:MINOR", sysfs, b)
}

// Ensure makes a device file that is missing, with the number that sysfs says; kind is unix.S_IFBLK
// or S_IFCHR. On a host devtmpfs has made it before the driver said that the device is there.
func Ensure(path, sysfs string, kind uint32) error {
	want, err := Number(sysfs)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Stat(path, &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == kind && st.Rdev == want:
		return nil
	case err == nil:
		return fmt.Errorf("%s is not device %d:%d", path, unix.Major(want), unix.Minor(want))
	case err != unix.ENOENT:
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := unix.Mknod(path, kind|0o600, int(want)); err != nil && err != unix.EEXIST {
		return fmt.Errorf("%s is missing and cannot be made: %w", path, err)
	}
	return nil
}
