package node

import (
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// LimitDirty bounds what the kernel keeps in memory of writes to a node ("/dev/loop7") until it writes them back;
// at half of it, it begins to. 0 takes the bound of an earlier owner of the minor away. It is a
// matter of speed only: where the kernel (before Linux 6.2) has no such bound, nothing happens.
//
// Source of the names: the kernel's Documentation/ABI/testing/sysfs-class-bdi.
func LimitDirty(node string, bytes int64) {
	dir := filepath.Join("/sys/block", filepath.Base(node), "bdi")
	strict := filepath.Join(dir, "strict_limit")
	now, err := readByte(strict)
	switch {
	case err != nil || bytes <= 0 && now == '0':
	case bytes <= 0:
		_ = os.WriteFile(strict, []byte("0"), 0)
		_ = os.WriteFile(filepath.Join(dir, "max_ratio"), []byte("100"), 0)
	case os.WriteFile(filepath.Join(dir, "max_bytes"), strconv.AppendInt(nil, bytes, 10), 0) == nil:
		_ = os.WriteFile(strict, []byte("1"), 0)
	}
}

// readByte reads the first byte of a file of sysfs, in the three calls that it takes.
func readByte(path string) (byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var b [1]byte
	_, err = unix.Read(fd, b[:])
	return b[0], err
}
