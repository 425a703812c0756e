package catalog

import (
	"errors"
	"fmt"
	"os"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// roomBytes is what is kept free in the file, with space of its host allocated for it, for steps
// that make nothing new: a removal writes pages before it frees any, and must work on a full disk.
const roomBytes = 512 << 10

// room keeps count of the host's space under the file.
type room struct {
	f         *os.File
	allocated int64 // bytes from the beginning of the file that have space; only commitLoop and Open use it
	unknown   bool  // the file system cannot allocate: nothing is known, and nothing kept
}

// makeRoom sees to it that roomBytes can be written without new space of the host: pages that are
// free in the file, and allocated ones behind its end. What is missing is allocated.
func (c *Catalog) makeRoom() error {
	r := &c.room
	if r.f == nil || r.unknown {
		return nil
	}
	var size int64
	if err := c.db.View(func(tx *bbolt.Tx) error { size = tx.Size(); return nil }); err != nil {
		return err
	}
	st := c.db.Stats()
	free := int64(st.FreePageN+st.PendingPageN) * int64(c.db.Info().PageSize)
	if free+max(0, r.allocated-size) >= roomBytes {
		return nil
	}
	want := size + 2*roomBytes - min(free, roomBytes)
	err := allocate(r.f, want)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		want = size + roomBytes - min(free, roomBytes) // a little will do
		err = allocate(r.f, want)
	}
	switch {
	case err == nil:
		r.allocated = want
	case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS):
		r.unknown = true
		return nil
	}
	return err
}

// allocate takes space for the first n bytes of the file, whose length stays.
func allocate(f *os.File, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, n)
		if err != unix.EINTR {
			return err
		}
	}
}

// admit takes out of a batch what makes something new while there is no room for it.
func (c *Catalog) admit(batch []*request) (admitted []*request) {
	err := c.makeRoom()
	if err == nil {
		return batch
	}
	for _, r := range batch {
		if len(r.Creates)+len(r.Consume)+len(r.reserve) == 0 {
			admitted = append(admitted, r)
			continue
		}
		r.err = c.refuse(r, fmt.Errorf("catalog %s: %d KiB are kept for removals: %w", c.o.Path, roomBytes>>10, err))
		close(r.done)
	}
	return admitted
}
