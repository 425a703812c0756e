package repair

import (
	"encoding/binary"
	"hash/fnv"
	"maps"
	"slices"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/thin"
)

// Classes of metadata blocks, as far as one block alone shows.
const (
	classNone     = iota
	classDetails  // leaf of a details tree
	classLeaf     // leaf with values of 8 bytes: of a mapping tree, or of the device tree
	classInternal // internal node of any tree
	classSuper    // superblock, or a copy of one
)

// A scan knows every block that is intact, whether the pool uses it or left it behind.
type scan struct {
	f      *forest
	class  []uint8
	supers []block.Loc
	// details are the newest of each device in any leaf of a details tree; nil: not gathered yet.
	details map[thin.DevID]thin.Details
}

// newScan reads all blocks.
func newScan(f *forest, step func(done, total uint64) error) (*scan, error) {
	s := &scan{f: f, class: make([]uint8, f.n)}
	const batch = 256
	buf := make([]byte, batch*block.Size)
	for loc := block.Loc(0); loc < f.n; loc += batch {
		if err := step(uint64(loc), uint64(f.n)); err != nil {
			return nil, err
		}
		b := buf[:min(batch, f.n-loc)*block.Size]
		if _, err := f.d.ReadAt(b, int64(loc)*block.Size); err == nil {
			for i := range block.Loc(len(b) / block.Size) {
				s.classify(loc+i, b[i*block.Size:(i+1)*block.Size])
			}
			continue
		}
		for i := range block.Loc(len(b) / block.Size) { // somewhere in there the device fails
			one := b[:block.Size]
			if _, err := f.d.ReadAt(one, int64(loc+i)*block.Size); err == nil {
				s.classify(loc+i, one)
			}
		}
	}
	return s, nil
}

func (s *scan) classify(loc block.Loc, b []byte) {
	k, ok := block.Identify(b)
	if !ok || block.Verify(b, loc, k) != nil {
		return
	}
	switch k {
	case block.Superblock:
		if sb := thin.DecodeSuperblock(b); sb.Validate(true) == nil {
			s.class[loc] = classSuper
			s.supers = append(s.supers, loc)
		}
	case block.Node:
		if n, err := btree.ParseNode(b, loc, 8); err == nil {
			s.class[loc] = classInternal
			if n.Leaf() {
				s.class[loc] = classLeaf
			}
		} else if n, err := btree.ParseNode(b, loc, thin.DetailsSize); err == nil && n.Leaf() {
			s.class[loc] = classDetails
		}
	}
}

func (s *scan) classOf(loc block.Loc) uint8 {
	if loc >= s.f.n {
		return classNone
	}
	return s.class[loc]
}

// firstLeaf returns the class of the first leaf below a node and where it is.
func (s *scan) firstLeaf(loc block.Loc) (uint8, block.Loc) {
	for range btree.MaxDepth + 1 {
		c := s.classOf(loc)
		if c != classInternal {
			return c, loc
		}
		n, err := s.f.read(loc)
		if err != nil {
			break
		}
		loc = n.Child(0)
	}
	return classNone, 0
}

// namesDevices reports whether a leaf may be one of the device tree: ids, and blocks of which at
// least one is a node of a mapping tree.
func (s *scan) namesDevices(loc block.Loc) bool {
	n, err := s.f.read(loc)
	if err != nil || !n.Leaf() || n.Len() == 0 || n.Key(n.Len()-1) > uint64(thin.MaxDevID) {
		return false
	}
	nodes := 0
	for i := range n.Len() {
		root := block.Loc(binary.LittleEndian.Uint64(n.Value(i)))
		if root == 0 || root >= s.f.n {
			return false
		}
		if c := s.class[root]; c == classLeaf || c == classInternal {
			nodes++
		}
	}
	return nodes > 0
}

// A candidate is the root of a tree that may be the pool's, of devices or of details.
type candidate struct {
	root  block.Loc
	ids   uint64 // digest of its device ids
	n     int
	time  uint32 // details: newest time, and newest transaction id
	trans uint64
}

// newer orders details by what can only grow.
func (c candidate) newer(o candidate) bool {
	if c.time != o.time {
		return c.time > o.time
	}
	return c.trans > o.trans
}

// candidates lists the trees of devices and of details that are whole.
func (s *scan) candidates() (tops, details []candidate) {
	for loc := block.Loc(1); loc < s.f.n; loc++ {
		leaf, at := s.firstLeaf(loc)
		switch {
		case leaf == classDetails:
			t := readDetailsTree(s.f.cache, loc)
			if len(t.gaps) > 0 {
				continue
			}
			c := candidate{root: loc, n: len(t.details), ids: digest(slices.Sorted(maps.Keys(t.details)))}
			for _, d := range t.details {
				c.time = max(c.time, d.SnapshottedTime, d.CreationTime)
				c.trans = max(c.trans, d.TransactionID)
			}
			details = append(details, c)
		case leaf == classLeaf && s.namesDevices(at):
			t := readDeviceTree(s.f.cache, loc)
			if len(t.gaps) > 0 {
				continue
			}
			tops = append(tops, candidate{root: loc, n: len(t.roots), ids: digest(slices.Sorted(maps.Keys(t.roots)))})
		}
	}
	return tops, details
}

func digest(ids []thin.DevID) uint64 {
	h := fnv.New64a()
	var b [4]byte
	for _, id := range ids {
		binary.LittleEndian.PutUint32(b[:], uint32(id))
		h.Write(b[:])
	}
	return h.Sum64()
}
