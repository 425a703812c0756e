package peer

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// DiskCounts are what the disk under a directory has done since it is there, for everybody.
type DiskCounts struct {
	Writes  int64 // requests
	Bytes   int64 // written
	Flushes int64
}

// Sub is the difference to an earlier look.
func (c DiskCounts) Sub(o DiskCounts) DiskCounts {
	return DiskCounts{c.Writes - o.Writes, c.Bytes - o.Bytes, c.Flushes - o.Flushes}
}

// CountDisk reads the counters of the block device that a directory's file system is on. The fields
// are those of Documentation/block/stat.rst; flushes are counted since Linux 5.5.
func CountDisk(dir string) (c DiskCounts, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return c, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	path := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))
	b, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("%s is not on a block device: %w", dir, err)
	}
	f := strings.Fields(string(b))
	if len(f) < 17 {
		return c, fmt.Errorf("%s: %d fields, want 17", path, len(f))
	}
	n := func(i int) int64 { v, _ := strconv.ParseInt(f[i], 10, 64); return v }
	return DiskCounts{Writes: n(4), Bytes: n(6) * 512, Flushes: n(15)}, nil
}
