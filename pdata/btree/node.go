// Package btree holds the B-trees of a pool: 64-bit keys, values of 4, 8, 16 or 24 bytes, nodes
// of one metadata block, changed by shadowing only.
package btree

import (
	"encoding/binary"
	"sort"

	"mica/pdata/block"
)

// B-tree node: one metadata block, little-endian.
//
//	offset  size  field
//	0       4     csum         salt 121107
//	4       4     flags        1 = internal, 2 = leaf
//	8       8     blocknr
//	16      4     nr_entries
//	20      4     max_entries
//	24      4     value_size   bytes
//	28      4     padding
//	32      8*max keys         ascending; the first nr_entries are valid
//	...     value_size*max     values, from 32 + 8*max_entries, in the same order
//
// max_entries is ((4064 / (8 + value_size)) / 3) * 3. Internal nodes have values of 8 bytes, the
// numbers of their children, whatever the leaves hold. Entry i of an internal node covers the
// keys from its key up to the next entry's key; its key may be smaller than the first key of
// the child. Source: format description, sections 3.1 and 3.5; TestNodeWorkedExample.

const (
	headerSize   = 32
	flagInternal = 1
	flagLeaf     = 2
	internalSize = 8 // value size of internal nodes

	// MaxDepth bounds every descent: 84^12 entries do not exist, a cycle does.
	MaxDepth = 12
)

// MaxEntries is the capacity of a node with values of size bytes.
func MaxEntries(size int) int { return (block.Size - headerSize) / (8 + size) / 3 * 3 }

type node []byte

func newNode(buf []byte, leaf bool, size int) node {
	n := node(buf)
	flags := uint32(flagInternal)
	if leaf {
		flags = flagLeaf
	}
	binary.LittleEndian.PutUint32(n[4:], flags)
	binary.LittleEndian.PutUint32(n[20:], uint32(MaxEntries(size)))
	binary.LittleEndian.PutUint32(n[24:], uint32(size))
	return n
}

func (n node) leaf() bool   { return n[4]&flagLeaf != 0 }
func (n node) len() int     { return int(binary.LittleEndian.Uint32(n[16:])) }
func (n node) setLen(l int) { binary.LittleEndian.PutUint32(n[16:], uint32(l)) }
func (n node) max() int     { return int(binary.LittleEndian.Uint32(n[20:])) }
func (n node) size() int    { return int(binary.LittleEndian.Uint32(n[24:])) }
func (n node) min() int     { return n.max() / 3 }

func (n node) key(i int) uint64       { return binary.LittleEndian.Uint64(n[headerSize+8*i:]) }
func (n node) setKey(i int, k uint64) { binary.LittleEndian.PutUint64(n[headerSize+8*i:], k) }

func (n node) value(i int) []byte {
	o, s := headerSize+8*n.max(), n.size()
	return n[o+s*i : o+s*(i+1) : o+s*(i+1)]
}

func (n node) child(i int) block.Loc { return block.Loc(binary.LittleEndian.Uint64(n.value(i))) }
func (n node) setChild(i int, l block.Loc) {
	binary.LittleEndian.PutUint64(n.value(i), uint64(l))
}

// search returns the first entry with a key >= k, and whether it is k.
func (n node) search(k uint64) (int, bool) {
	l := n.len()
	i := sort.Search(l, func(i int) bool { return n.key(i) >= k })
	return i, i < l && n.key(i) == k
}

// childFor returns the entry of an internal node whose child covers k: the last with a key
// <= k, or -1.
func (n node) childFor(k uint64) int {
	i, ok := n.search(k)
	if ok {
		return i
	}
	return i - 1
}

// insert makes room at i and stores key and value. The node must not be full.
func (n node) insert(i int, k uint64, v []byte) {
	l := n.len()
	n.move(i, l, 1)
	n.setKey(i, k)
	copy(n.value(i), v)
	n.setLen(l + 1)
}

// move shifts entries [from, to) by d places.
func (n node) move(from, to, d int) {
	k := headerSize
	copy(n[k+8*(from+d):k+8*(to+d)], n[k+8*from:k+8*to])
	v, s := headerSize+8*n.max(), n.size()
	copy(n[v+s*(from+d):v+s*(to+d)], n[v+s*from:v+s*to])
}

// remove drops entries [i, j) and clears the slots at the end.
func (n node) remove(i, j int) {
	l := n.len()
	n.move(j, l, i-j)
	n.truncate(l - (j - i))
}

// truncate keeps the first l entries and clears the slots of the rest.
func (n node) truncate(l int) {
	old := n.len()
	clear(n[headerSize+8*l : headerSize+8*old])
	v, s := headerSize+8*n.max(), n.size()
	clear(n[v+s*l : v+s*old])
	n.setLen(l)
}

// appendFrom copies entries [i, j) of o behind the last entry of n.
func (n node) appendFrom(o node, i, j int) {
	l := n.len()
	copy(n[headerSize+8*l:], o[headerSize+8*i:headerSize+8*j])
	s := n.size()
	copy(n[headerSize+8*n.max()+s*l:], o[headerSize+8*o.max()+s*i:headerSize+8*o.max()+s*j])
	n.setLen(l + j - i)
}

// prependFrom copies entries [i, j) of o before the first entry of n.
func (n node) prependFrom(o node, i, j int) {
	l := n.len()
	n.move(0, l, j-i)
	copy(n[headerSize:], o[headerSize+8*i:headerSize+8*j])
	s := n.size()
	copy(n[headerSize+8*n.max():], o[headerSize+8*o.max()+s*i:headerSize+8*o.max()+s*j])
	n.setLen(l + j - i)
}

// checkNode validates what readers depend on: the header. leafSize is the tree's value size.
func checkNode(n node, loc block.Loc, leafSize int) error {
	flags := binary.LittleEndian.Uint32(n[4:])
	want := leafSize
	switch flags {
	case flagInternal:
		want = internalSize
	case flagLeaf:
	default:
		return block.Corruptf(loc, "node flags %#x, want 1 (internal) or 2 (leaf)", flags)
	}
	if n.size() != want {
		return block.Corruptf(loc, "node with values of %d bytes, want %d", binary.LittleEndian.Uint32(n[24:]), want)
	}
	m := binary.LittleEndian.Uint32(n[20:])
	if m == 0 || m > uint32((block.Size-headerSize)/(8+want)) {
		return block.Corruptf(loc, "node for %d entries, at most %d fit", m, MaxEntries(want))
	}
	if l := binary.LittleEndian.Uint32(n[16:]); l > m {
		return block.Corruptf(loc, "node has %d entries, more than its %d places", l, m)
	}
	if flags == flagInternal && n.len() == 0 {
		return block.Corruptf(loc, "internal node without entries")
	}
	return nil
}

// A Node is a read-only look at one node, for checkers and printers.
type Node struct{ n node }

// ParseNode validates the header of a block as a node of a tree with values of leafSize bytes.
func ParseNode(buf []byte, loc block.Loc, leafSize int) (Node, error) {
	return Node{node(buf)}, checkNode(node(buf), loc, leafSize)
}

// Leaf reports whether the node is a leaf.
func (n Node) Leaf() bool { return n.n.leaf() }

// Len is the number of entries.
func (n Node) Len() int { return n.n.len() }

// Key returns key i.
func (n Node) Key(i int) uint64 { return n.n.key(i) }

// Value returns value i; it must not be changed.
func (n Node) Value(i int) []byte { return n.n.value(i) }

// Child returns child i of an internal node.
func (n Node) Child(i int) block.Loc { return n.n.child(i) }

// EncodeNode writes a node with n entries into a zeroed block, for those who build trees from what
// is left of others. Values of a leaf have size bytes, those of an internal node are its
// children. Keys ascend; n is at most MaxEntries of the size. The block is not sealed.
func EncodeNode(buf []byte, leaf bool, size, n int, entry func(i int) (key uint64, v []byte)) {
	if !leaf {
		size = internalSize
	}
	b := newNode(buf, leaf, size)
	b.setLen(n)
	for i := range n {
		k, v := entry(i)
		b.setKey(i, k)
		copy(b.value(i), v)
	}
}

// Sound reports whether the header is what this package writes: the capacity that belongs to the
// size of the values. Readers accept others.
func (n Node) Sound() bool { return n.n.max() == MaxEntries(n.n.size()) }

// MinEntries is the least number of entries of a node with values of size bytes that is not a
// root.
func MinEntries(size int) int { return MaxEntries(size) / 3 }
