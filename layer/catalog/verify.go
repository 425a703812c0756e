package catalog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// ErrDamaged: the file is no catalog, or no longer. bbolt follows what pages say without looking,
// so a damaged file must not get that far: it would end the process.
var ErrDamaged = errors.New("catalog file is damaged")

// openFile opens the file for bbolt: for this user only, not through a link, locked, and looked
// through. The lock is on the descriptor that bbolt gets, and stays with it.
func openFile(path string, wait time.Duration) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := prepareFile(f, wait); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func prepareFile(f *os.File, wait time.Duration) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("not a file but %s", st.Mode().Type())
	}
	for deadline := time.Now().Add(wait); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			return &os.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %v: %w", wait, ErrLocked)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if st.Mode().Perm()&0o077 != 0 {
		if err := f.Chmod(0o600); err != nil {
			return err
		}
	}
	return verifyFile(f)
}

// verifyFile looks through a bbolt file as far as bbolt believes it: the newer of the two valid
// meta pages, the tree of pages that it leads to with the buckets in it, and the list of free
// pages.
//
//	page     offset 0 id, 8 flags, 10 count, 12 overflow (pages that follow); 16 bytes, then
//	branch   count x {pos, ksize: uint32, page: uint64}
//	leaf     count x {flags, pos, ksize, vsize: uint32}; pos counts from the element
//	meta     {magic, version, page size, flags: uint32, root, sequence, free list, pages, txid, checksum: uint64}
//	bucket   a leaf's value: {root, sequence: uint64}; root 0: a leaf page follows in the value
//	freelist count x uint64; count 0xffff: the first is the count
//
// All numbers are of the machine's byte order. Source: go.etcd.io/bbolt, internal/common.
func verifyFile(f *os.File) error {
	st, err := f.Stat()
	if err != nil || st.Size() == 0 { // a new one
		return err
	}
	v := &verifier{f: f, size: st.Size(), seen: map[uint64]bool{}}
	if err := v.run(); err != nil {
		return fmt.Errorf("%w: %w; bring back a copy, or move it away and begin with none: then nothing is deleted, and every device of the pool is foreign", ErrDamaged, err)
	}
	return nil
}

const (
	pageHead  = 16
	elemSize  = 16
	metaSize  = 64
	magicBolt = 0xED0CDAED

	flagBranch   = 1
	flagLeaf     = 2
	flagMeta     = 4
	flagFreelist = 16
	elemBucket   = 1

	maxDepth = 64 // of pages; bbolt's own trees have a handful
)

var ne = binary.NativeEndian

type verifier struct {
	f        *os.File
	size     int64
	pageSize int64
	pages    uint64 // ids are below
	seen     map[uint64]bool
}

type meta struct {
	pageSize              uint32
	root, freelist, pages uint64
	txid                  uint64
}

// readMeta decodes the meta page at an offset; ok is false if its checksum is wrong.
func (v *verifier) readMeta(off int64) (m meta, ok bool) {
	b := make([]byte, pageHead+metaSize)
	if _, err := v.f.ReadAt(b, off); err != nil {
		return m, false
	}
	p := b[pageHead:]
	h := fnv.New64a()
	h.Write(p[:56])
	if ne.Uint32(p) != magicBolt || ne.Uint32(p[4:]) != 2 || ne.Uint64(p[56:]) != h.Sum64() {
		return m, false
	}
	m = meta{pageSize: ne.Uint32(p[8:]), root: ne.Uint64(p[16:]), freelist: ne.Uint64(p[32:]), pages: ne.Uint64(p[40:]), txid: ne.Uint64(p[48:])}
	n := m.pageSize
	return m, n >= 1024 && n <= 64<<10 && n&(n-1) == 0 && ne.Uint16(b[8:]) == flagMeta
}

// meta finds the meta page that counts, as bbolt does: the second is at the page size that the
// first says or, if that is broken, at one of those that there are.
func (v *verifier) meta() (meta, error) {
	a, okA := v.readMeta(0)
	var b meta
	okB := false
	for n := int64(1024); n <= 64<<10 && !okB; n *= 2 {
		if b, okB = v.readMeta(n); okB && (int64(b.pageSize) != n || okA && a.pageSize != b.pageSize) {
			okB = false
		}
	}
	switch {
	case okA && (!okB || a.txid >= b.txid):
		return a, nil
	case okB:
		return b, nil
	}
	return a, errors.New("neither of its two meta pages is valid")
}

func (v *verifier) run() error {
	m, err := v.meta()
	if err != nil {
		return err
	}
	v.pageSize, v.pages = int64(m.pageSize), m.pages
	if m.pages < 4 || m.pages > uint64(v.size/v.pageSize) {
		return fmt.Errorf("%d pages of %d bytes in a file of %d", m.pages, m.pageSize, v.size)
	}
	if err := v.tree(m.root, 0); err != nil {
		return err
	}
	const noFreelist = 1<<64 - 1
	if m.freelist == noFreelist {
		return nil
	}
	return v.freelist(m.freelist)
}

// page reads a page with what follows it, and counts it as used.
func (v *verifier) page(id uint64) (flags uint16, count int, b []byte, err error) {
	if id < 2 || id >= v.pages {
		return 0, 0, nil, fmt.Errorf("page %d of %d", id, v.pages)
	}
	b = make([]byte, v.pageSize)
	if _, err := v.f.ReadAt(b, int64(id)*v.pageSize); err != nil {
		return 0, 0, nil, fmt.Errorf("page %d: %w", id, err)
	}
	over := uint64(ne.Uint32(b[12:]))
	if got := ne.Uint64(b); got != id {
		return 0, 0, nil, fmt.Errorf("page %d says that it is page %d", id, got)
	}
	if over >= v.pages-id {
		return 0, 0, nil, fmt.Errorf("page %d is followed by %d more, of %d", id, over, v.pages)
	}
	for i := id; i <= id+over; i++ {
		if v.seen[i] {
			return 0, 0, nil, fmt.Errorf("page %d is used twice", i)
		}
		v.seen[i] = true
	}
	if over > 0 {
		b = make([]byte, int64(over+1)*v.pageSize) // within the file
		if _, err := v.f.ReadAt(b, int64(id)*v.pageSize); err != nil && err != io.EOF {
			return 0, 0, nil, fmt.Errorf("page %d: %w", id, err)
		}
	}
	return ne.Uint16(b[8:]), int(ne.Uint16(b[10:])), b, nil
}

func (v *verifier) tree(id uint64, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d is more than %d deep", id, maxDepth)
	}
	flags, count, b, err := v.page(id)
	if err != nil {
		return err
	}
	switch flags {
	case flagLeaf:
		err = v.leaf(b, count, depth)
	case flagBranch:
		err = v.branch(b, count, depth)
	default:
		err = fmt.Errorf("flags 0x%x are those of no tree", flags)
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// item is the piece of b at pos from an element, n bytes long.
func item(b []byte, elem int, pos, n uint32) ([]byte, error) {
	from := uint64(elem) + uint64(pos)
	if to := from + uint64(n); to <= uint64(len(b)) {
		return b[from:to:to], nil
	}
	return nil, fmt.Errorf("element at %d: %d bytes at %d, the page has %d", elem, n, from, len(b))
}

func elements(b []byte, count int) error {
	if pageHead+count*elemSize > len(b) {
		return fmt.Errorf("%d elements in %d bytes", count, len(b))
	}
	return nil
}

func (v *verifier) branch(b []byte, count, depth int) error {
	if err := elements(b, count); err != nil {
		return err
	}
	if count == 0 {
		return errors.New("a branch of nothing")
	}
	var last []byte
	for i := range count {
		at := pageHead + i*elemSize
		key, err := item(b, at, ne.Uint32(b[at:]), ne.Uint32(b[at+4:]))
		if err != nil {
			return err
		}
		if i > 0 && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("key %d is not after the one before", i)
		}
		last = key
		if err := v.tree(ne.Uint64(b[at+8:]), depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) leaf(b []byte, count, depth int) error {
	if err := elements(b, count); err != nil {
		return err
	}
	var last []byte
	for i := range count {
		at := pageHead + i*elemSize
		flags, pos, ksize, vsize := ne.Uint32(b[at:]), ne.Uint32(b[at+4:]), ne.Uint32(b[at+8:]), ne.Uint32(b[at+12:])
		key, err := item(b, at, pos, ksize)
		if err != nil {
			return err
		}
		value, err := item(b, at+int(ksize), pos, vsize)
		if err != nil {
			return err
		}
		if i > 0 && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("key %d is not after the one before", i)
		}
		last = key
		if len(key) == 0 || len(key) > bbolt.MaxKeySize {
			return fmt.Errorf("key %d of %d bytes", i, len(key))
		}
		if flags&^elemBucket != 0 {
			return fmt.Errorf("element %d has flags 0x%x", i, flags)
		}
		if flags == elemBucket {
			if err := v.bucket(value, depth); err != nil {
				return fmt.Errorf("bucket %q: %w", key, err)
			}
		}
	}
	return nil
}

func (v *verifier) bucket(value []byte, depth int) error {
	if len(value) < 16 {
		return fmt.Errorf("%d bytes, want 16 at least", len(value))
	}
	if root := ne.Uint64(value); root != 0 {
		return v.tree(root, depth+1)
	}
	p := value[16:]
	if len(p) < pageHead {
		return fmt.Errorf("inline page of %d bytes", len(p))
	}
	if flags := ne.Uint16(p[8:]); flags != flagLeaf {
		return fmt.Errorf("inline page with flags 0x%x", flags)
	}
	if depth > maxDepth {
		return fmt.Errorf("more than %d deep", maxDepth)
	}
	return v.leaf(p, int(ne.Uint16(p[10:])), depth+1)
}

func (v *verifier) freelist(id uint64) error {
	flags, n, b, err := v.page(id)
	if err != nil {
		return fmt.Errorf("free list: %w", err)
	}
	if flags != flagFreelist {
		return fmt.Errorf("free list: page %d has flags 0x%x", id, flags)
	}
	ids, count := b[pageHead:], uint64(n)
	if n == 0xffff {
		count, ids = ne.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return fmt.Errorf("free list: %d pages in %d bytes", count, len(ids))
	}
	for i := range count {
		p := ne.Uint64(ids[8*i:])
		if p < 2 || p >= v.pages {
			return fmt.Errorf("free list: page %d of %d", p, v.pages)
		}
		if v.seen[p] {
			return fmt.Errorf("free list: page %d is in use, or there twice", p)
		}
		v.seen[p] = true
	}
	return nil
}
