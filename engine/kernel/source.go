package kernel

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mica/thin"
)

// A Source names a pool: a directory with the files data and metadata, two devices (each a block
// device or a file), or an active thin pool of device-mapper.
type Source struct {
	Dir            string
	Data, Metadata string // if Dir is empty
	// Pool is the name of an active thin-pool device, or its path below /dev. Its table and its
	// life belong to whoever made it.
	Pool string
}

func (s Source) dataPath() string {
	if s.Dir != "" {
		return filepath.Join(s.Dir, "data")
	}
	return s.Data
}

func (s Source) metadataPath() string {
	if s.Dir != "" {
		return filepath.Join(s.Dir, "metadata")
	}
	return s.Metadata
}

func (s Source) String() string {
	switch {
	case s.Pool != "":
		return "device-mapper pool " + s.Pool
	case s.Dir != "":
		return s.Dir
	}
	return s.Data + " with metadata " + s.Metadata
}

func (s Source) check() error {
	n := 0
	for _, given := range []bool{s.Dir != "", s.Data != "" || s.Metadata != "", s.Pool != ""} {
		if given {
			n++
		}
	}
	switch {
	case n != 1:
		return errors.New("pool: want a directory, a data and a metadata device, or the name of an active thin pool")
	case s.Pool == "" && (s.dataPath() == "" || s.metadataPath() == ""):
		return errors.New("pool: data and metadata devices go together")
	}
	return nil
}

// prefix begins the names of everything that this engine makes.
const prefix = "mica-"

// identity makes the POOL part of names from what does not change while the pool is active.
func identity(kind string, numbers ...uint64) string {
	h := sha256.New()
	fmt.Fprint(h, kind)
	for _, n := range numbers {
		fmt.Fprintf(h, " %d", n)
	}
	return hex.EncodeToString(h.Sum(nil))[:10]
}

// identityOf is that of the pool whose metadata is on the file or block device at path.
func identityOf(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return identity("block", st.Rdev), nil
	}
	return identity("file", st.Dev, st.Ino), nil
}

func poolName(id string) string { return prefix + id + "-pool" }

func thinName(id string, dev thin.DevID) string { return fmt.Sprintf("%s%s-%d", prefix, id, dev) }

func viewName(id string, dev thin.DevID, n uint64) string {
	return fmt.Sprintf("%s%s-%d-r%d", prefix, id, dev, n)
}

// parseThinName is the inverse of thinName and viewName.
func parseThinName(id, name string) (dev thin.DevID, readOnly, ok bool) {
	rest, ok := strings.CutPrefix(name, prefix+id+"-")
	if !ok {
		return 0, false, false
	}
	num, _, readOnly := strings.Cut(rest, "-r")
	n, err := strconv.ParseUint(num, 10, 24)
	if err != nil {
		return 0, false, false
	}
	return thin.DevID(n), readOnly, true
}

// number is a block device's number as tables name it.
func number(rdev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev)) }
