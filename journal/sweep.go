package journal

import (
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A pool that is removed after its opener was killed leaves its journal behind, locked in nobody's
// memory and in everybody's way. Its path says nothing: the pool may have another name now, or be
// seen from another mount namespace only. But the file system can tell whether a file that it has
// given a handle for is still there, under whatever name.

// handleOf asks for the handle of a pool's metadata file; none if there are no handles here.
func handleOf(id Identity) handle {
	if id.Block {
		return handle{}
	}
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, id.Path, unix.AT_SYMLINK_FOLLOW)
	if err != nil || h.Size() > maxHandle {
		return handle{}
	}
	return handle{h.Type(), h.Bytes()}
}

// gone reports whether the metadata file that a header tells of is certainly no more.
func (h *header) gone() bool {
	if h.id.Block || len(h.handle.data) == 0 || !filepath.IsAbs(h.id.Path) {
		return false
	}
	// Any file of the same file system will do to ask it.
	for dir := filepath.Dir(h.id.Path); ; dir = filepath.Dir(dir) {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err == nil && st.Dev == h.id.Dev {
			fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return false
			}
			defer unix.Close(fd)
			file, err := unix.OpenByHandleAt(fd, unix.NewFileHandle(h.handle.kind, h.handle.data), unix.O_PATH|unix.O_CLOEXEC)
			if err == nil {
				unix.Close(file)
			}
			return err == unix.ESTALE
		}
		if dir == "/" {
			return false
		}
	}
}

// sweepTime bounds how long a new journal waits for a sweep: a file system may hang.
const sweepTime = 2 * time.Second

// sweep removes journals of pools that are gone from a directory of ours. Whatever is in doubt
// stays.
func sweep(dir int, uid uint32, boot [16]byte) {
	if int(uid) != os.Geteuid() {
		return // the paths are somebody else's words
	}
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		d := os.NewFile(uintptr(fd), "journals")
		defer d.Close()
		names, _ := d.Readdirnames(-1)
		for _, name := range names {
			if h, ok := headerIn(fd, name, uid); ok && h.boot == boot && h.gone() || goneNote(fd, name, uid, boot) {
				unix.Unlinkat(fd, name, 0)
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(sweepTime):
	}
}

// headerIn reads the header of a journal in a directory.
func headerIn(dir int, name string, uid uint32) (header, bool) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return header{}, false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	b := make([]byte, slotsAt)
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != uid {
		return header{}, false
	}
	if n, err := unix.Pread(fd, b, 0); err != nil || n != len(b) {
		return header{}, false
	}
	if v, ok := isJournal(b); !ok || v != version {
		return header{}, false
	}
	h, err := decodeHeader(b)
	return h, err == nil && h.id.name() == name
}
