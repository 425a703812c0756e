package journal

import (
	"encoding/hex"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// An Identity names a pool for as long as the machine runs: by the file that holds its metadata,
// or by the number of the block device that does. A copy of the file is another pool.
type Identity struct {
	Block bool   // a block device
	Dev   uint64 // number of the device, or of the file system of the file
	Ino   uint64 // of the file
	Born  int64  // when the file was made, in ns since 1970; 0: unknown
	UID   uint32 // owner of the metadata device: whose directory the journal is in
	Path  string // as it was given; for people
}

// Identify names the pool whose metadata device is path.
func Identify(path string) (Identity, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return Identity{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	id := Identity{UID: st.Uid, Path: path}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		id.Block, id.Dev = true, unix.Mkdev(st.Rdev_major, st.Rdev_minor)
	case unix.S_IFREG:
		id.Dev, id.Ino = unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino
		if st.Mask&unix.STATX_BTIME != 0 {
			id.Born = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
		}
	default:
		return Identity{}, fmt.Errorf("%s: neither a file nor a block device", path)
	}
	return id, nil
}

// same reports whether two identities are of one pool.
func (id Identity) same(o Identity) bool {
	return id.Block == o.Block && id.Dev == o.Dev && id.Ino == o.Ino && id.Born == o.Born
}

// name is the name of the journal's file.
func (id Identity) name() string {
	if id.Block {
		return fmt.Sprintf("block-%d-%d", unix.Major(id.Dev), unix.Minor(id.Dev))
	}
	return fmt.Sprintf("file-%d-%d-%d", unix.Major(id.Dev), unix.Minor(id.Dev), id.Ino)
}

// bootID is the kernel's name for the time since it was started.
func bootID() ([16]byte, error) {
	var id [16]byte
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id, fmt.Errorf("boot id: %w", err)
	}
	n, err := hex.Decode(id[:], []byte(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")))
	if err != nil || n != len(id) {
		return id, fmt.Errorf("boot id %q: not a UUID", b)
	}
	return id, nil
}
