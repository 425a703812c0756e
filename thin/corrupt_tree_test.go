package thin

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// A tall pool has trees of two levels and a metadata snapshot. Its blocks are found by name.
type tallPool struct {
	mem              *dev.Mem
	sb               Superblock
	root             block.Loc // mapping tree of thin 0: an internal node
	leaves           []block.Loc
	keys             []uint64 // of the root
	top, details     block.Loc
	heldTop          block.Loc
	metaBit, dataBit block.Loc // bitmap 0 of each map
}

func newTallPool(t *testing.T) tallPool {
	t.Helper()
	p := newTestPool(t, 6, 512, 20000)
	p.create(0)
	p.insert(0, 10, 900, 3)
	p.create(5)
	p.commit()
	p.must(p.m.ReserveMetadataSnap())
	p.commit()
	p.insert(0, 3000, 20, 1)
	p.create(7)
	p.insert(7, 0, 3, 1)
	p.commit()
	x := tallPool{mem: p.mem, sb: DecodeSuperblock(readBlock(t, p.mem, 0))}
	x.top, x.details = x.sb.MappingRoot, x.sb.DetailsRoot
	x.heldTop = DecodeSuperblock(readBlock(t, p.mem, x.sb.HeldRoot)).MappingRoot
	x.root = block.Loc(binary.LittleEndian.Uint64(readBlock(t, p.mem, x.top)[2048:]))
	b := readBlock(t, p.mem, x.root)
	if b[4] != 1 || x.heldTop == x.top {
		t.Fatal("the tree of thin 0 has one level, or nothing has changed since the metadata snapshot")
	}
	for i := range int(binary.LittleEndian.Uint32(b[16:])) {
		x.keys = append(x.keys, binary.LittleEndian.Uint64(b[32+8*i:]))
		x.leaves = append(x.leaves, block.Loc(binary.LittleEndian.Uint64(b[2048+8*i:])))
	}
	x.dataBit = spacemap.DecodeIndexEntry(readBlock(t, p.mem, x.sb.DataMap.BitmapRoot)[1376:]).Block
	x.metaBit = spacemap.MetaIndexEntry(readBlock(t, p.mem, x.sb.MetaMap.BitmapRoot), 0).Block
	return x
}

// TestCheckFindsInTrees damages a pool with trees of two levels and a metadata snapshot in one
// place each: the finding names block, path, device and range.
func TestCheckFindsInTrees(t *testing.T) {
	x := newTallPool(t)
	node, super := block.Node, block.Superblock
	n := len(x.leaves)
	// raw changes a byte and not the checksum.
	raw := func(loc block.Loc, kind block.Kind) func(t *testing.T, mem *dev.Mem) {
		return func(t *testing.T, mem *dev.Mem) {
			b := readBlock(t, mem, loc)
			b[3000] ^= 1
			if _, err := mem.WriteAt(b, int64(loc)*block.Size); err != nil {
				t.Fatal(err)
			}
		}
	}
	set := func(loc block.Loc, kind block.Kind, fn func([]byte)) func(t *testing.T, mem *dev.Mem) {
		return func(t *testing.T, mem *dev.Mem) { patch(t, mem, loc, kind, fn) }
	}
	for _, c := range []struct {
		name string
		harm func(t *testing.T, mem *dev.Mem)
		sev  Severity
		want string
	}{
		{"leaf checksum", raw(x.leaves[1], node), Fatal,
			fmt.Sprintf("metadata block %d: mapping tree of thin 0 (%d/%d): b-tree node checksum 0x", x.leaves[1], x.root, x.leaves[1])},
		{"root checksum", raw(x.root, node), Fatal, fmt.Sprintf("metadata block %d: mapping tree of thin 0: b-tree node checksum 0x", x.root)},
		{"device tree checksum", raw(x.top, node), Fatal, fmt.Sprintf("metadata block %d: device tree: b-tree node checksum 0x", x.top)},
		{"details checksum", raw(x.details, node), Fatal, fmt.Sprintf("metadata block %d: details tree: b-tree node checksum 0x", x.details)},
		{"superblock checksum", raw(0, super), Fatal, "metadata block 0: superblock: superblock checksum 0x"},
		{"data bitmap checksum", raw(x.dataBit, block.Bitmap), Fatal, fmt.Sprintf("metadata block %d: data space map: data block [0, 16320): bitmap checksum 0x", x.dataBit)},
		{"metadata bitmap checksum", raw(x.metaBit, block.Bitmap), Fatal, fmt.Sprintf("metadata block %d: metadata space map: metadata block [0, 512): bitmap checksum 0x", x.metaBit)},
		{"metadata index checksum", raw(x.sb.MetaMap.BitmapRoot, block.Index), Fatal, fmt.Sprintf("metadata block %d: metadata space map index: metadata index checksum 0x", x.sb.MetaMap.BitmapRoot)},
		{"data index checksum", raw(x.sb.DataMap.BitmapRoot, node), Fatal, fmt.Sprintf("metadata block %d: data space map index: b-tree node checksum 0x", x.sb.DataMap.BitmapRoot)},
		{"data overflow checksum", raw(x.sb.DataMap.Overflow, node), Fatal, fmt.Sprintf("metadata block %d: data overflow tree: b-tree node checksum 0x", x.sb.DataMap.Overflow)},
		{"metadata overflow checksum", raw(x.sb.MetaMap.Overflow, node), Fatal, fmt.Sprintf("metadata block %d: metadata overflow tree: b-tree node checksum 0x", x.sb.MetaMap.Overflow)},
		{"metadata snapshot checksum", raw(x.sb.HeldRoot, super), Fatal, fmt.Sprintf("metadata block %d: metadata snapshot: superblock checksum 0x", x.sb.HeldRoot)},

		{"parent key above the child's first", set(x.root, node, le64(32+8, x.keys[1]+1)), Fatal,
			fmt.Sprintf("metadata block %d: mapping tree of thin 0 (%d/%d): virtual block [%d, ", x.leaves[1], x.root, x.leaves[1], x.keys[1])},
		{"child beyond the next parent key", set(x.root, node, le64(32+8*(n-1), x.keys[n-2]+1)), Fatal, fmt.Sprintf("the parent admits [%d, %d)", x.keys[n-2], x.keys[n-2]+1)},
		{"two children the same", set(x.root, node, le64(2048+8, uint64(x.leaves[0]))), Fatal, fmt.Sprintf("keys %d to ", x.keys[0])},
		{"a leaf among internal nodes", set(x.top, node, le64(2048+16, uint64(x.root))), Fatal, "thin 7"},
		{"a child below itself", set(x.root, node, le64(2048, uint64(x.root))), Fatal, fmt.Sprintf("mapping tree of thin 0 (%d/%d): is below itself", x.root, x.root)},
		{"a child that does not exist", set(x.root, node, le64(2048+8, 512)), Fatal, "used as node of a mapping tree, there are 512 blocks"},
		{"a child that is the superblock", set(x.root, node, le64(2048+8, 0)), Fatal, "used as superblock and as node of a mapping tree"},
		{"too few entries", set(x.leaves[1], node, le32(16, 83)), Fatal, fmt.Sprintf("thin 0 (%d/%d): 83 entries, a node that is not the root has at least 84", x.root, x.leaves[1])},
		{"internal node without entries", set(x.root, node, le32(16, 0)), Fatal, "internal node without entries"},
		{"leaves of two depths", set(x.leaves[n-1], node, func(b []byte) {
			// The last leaf becomes an internal node over itself's neighbour.
			nr := binary.LittleEndian.Uint32(b[16:])
			clear(b[32:])
			le32(4, 1)(b)
			for i := range nr {
				le64(32+8*int(i), x.keys[n-1]+uint64(i))(b)
				le64(2048+8*int(i), uint64(x.leaves[0]))(b)
			}
		}), Fatal, fmt.Sprintf("child %d is 2 levels high, the ones before it are 1", n-1)},

		{"details root beyond the end", set(0, super, le64(328, 600)), Fatal, "used as node of the details tree, there are 512 blocks"},
		{"data index beyond the end", set(0, super, le64(80, 600)), Fatal, "used as node of the data index, there are 512 blocks"},
		{"data overflow beyond the end", set(0, super, le64(88, 600)), Fatal, "used as node of the data overflow tree, there are 512 blocks"},
		{"metadata index beyond the end", set(0, super, le64(208, 600)), Fatal, "used as metadata index, there are 512 blocks"},
		{"metadata overflow beyond the end", set(0, super, le64(216, 600)), Fatal, "used as node of the metadata overflow tree, there are 512 blocks"},
		{"held root beyond the end", set(0, super, le64(56, 600)), Fatal, "used as metadata snapshot, there are 512 blocks"},
		{"more metadata than the format knows", set(0, super, le64(192, spacemap.MaxMetaBlocks+1)), Fatal, "metadata blocks, more than 4161600"},
		{"more data than 40 bits", set(0, super, le64(64, 1<<40+1)), Fatal, "data blocks, more than 40 bits"},
		{"details of an id over 24 bits", set(x.details, node, le64(32+16, 1<<24)), Fatal, "details tree: device 16777216: device id does not fit 24 bits"},

		{"held magic", set(x.sb.HeldRoot, super, le64(32, 5)), Fatal, "metadata snapshot: magic 5, want 27022010"},
		{"held block number", set(x.sb.HeldRoot, super, le64(8, 0)), Fatal, "metadata snapshot: superblock says it is block 0"},
		{"held root of its own", set(x.sb.HeldRoot, super, le64(56, 9)), Fatal, "metadata snapshot: has a metadata snapshot 9 of its own"},
		{"held data space map root", set(x.sb.HeldRoot, super, le64(64, 1)), Warning, "metadata snapshot: has a data space map root"},
		{"held metadata space map root", set(x.sb.HeldRoot, super, le64(192, 1)), Warning, "metadata snapshot: has a metadata space map root"},
		{"held block size", set(x.sb.HeldRoot, super, le32(336, 256)), Fatal, "metadata snapshot: data block size 256 sectors, the pool's is 128"},
		{"held time of the future", set(x.sb.HeldRoot, super, le32(44, 9)), Fatal, "metadata snapshot: time 9, the pool's is 0"},
		{"held device tree elsewhere", set(x.sb.HeldRoot, super, le64(320, uint64(x.top))), Leak, fmt.Sprintf("metadata block %d: count 1, 0 references", x.heldTop)},
		{"not held any more", set(0, super, le64(56, 0)), Leak, fmt.Sprintf("metadata block %d: count 1, 0 references", x.sb.HeldRoot)},
		{"held tree's node not counted", set(x.metaBit, block.Bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, int(x.heldTop), 0) }), Fatal,
			fmt.Sprintf("metadata space map: metadata block %d: count 0, 1 references", x.heldTop)},

		{"metadata nr_free", set(x.sb.MetaMap.BitmapRoot, block.Index, le32(16+8, 1)), Warning, "metadata space map index: bitmap 0: nr_free 1, want "},
		{"metadata none_free_before", set(x.sb.MetaMap.BitmapRoot, block.Index, le32(16+12, 511)), Warning, "none_free_before 511, but entry "},
		{"metadata bits beyond the last block", set(x.metaBit, block.Bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 512, 1) }), Warning, "entry 512 is not zero, the last block is entry 511"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := x.mem.Clone()
			c.harm(t, mem)
			r, err := Check(mem, CheckOptions{})
			if err != nil {
				t.Fatal(err)
			}
			found := false
			var all []string
			for i := range r.Findings {
				f := &r.Findings[i]
				all = append(all, fmt.Sprintf("%s: %v", f.Severity, f))
				s := f.String()
				if f.Keys != nil && f.Where == whereMetaMap && f.Block == nil { // ranges are found by their begin
					s += fmt.Sprintf(" metadata block %d: %s", f.Keys.Begin, f.What)
				}
				found = found || f.Severity == c.sev && strings.Contains(s, c.want)
			}
			if !found {
				t.Errorf("want %s %q, found\n%s", c.sev, c.want, strings.Join(all, "\n"))
			}
			if r.Clean() != (c.sev == Warning) {
				t.Errorf("clean %v with a %s finding", r.Clean(), c.sev)
			}
			poke(t, mem)
		})
	}
}
