package thin

import (
	"encoding/binary"
	"maps"
	"slices"

	"mica/pdata/block"
)

// devices checks the two trees of devices that a superblock, or its copy, names, and the
// mapping trees below.
func (c *checker) devices(s *Superblock, where string, held bool) {
	of := func(tree string) place {
		if held {
			return place{where: where}
		}
		return place{where: tree}
	}
	t := treeCheck{c: c, at: of(whereDetails), use: useDetails, size: detailsSize, held: held}
	t.walk(s.DetailsRoot)
	details := map[DevID]Details{}
	c.scan(s.DetailsRoot, useDetails, func(at place, k uint64, v []byte) {
		at.where = t.at.where
		if k > uint64(MaxDevID) {
			c.fatal(at.span(k, k+1), "device id does not fit 24 bits")
			return
		}
		d := decodeDetails(v)
		details[DevID(k)] = d
		at.device, at.dev = DevID(k), true
		if d.SnapshottedTime > s.Time || d.CreationTime > d.SnapshottedTime {
			c.fatal(at, "created at time %d, last in a snapshot at time %d, the pool's time is %d", d.CreationTime, d.SnapshottedTime, s.Time)
		}
	}, detailsSize)

	// The mapping trees hang on the leaves that have not been seen before; a leaf that the
	// metadata snapshot shares with the present state counts its pointers once.
	type device struct {
		at   place
		root block.Loc
	}
	var fresh []device
	t = treeCheck{c: c, at: of(whereTop), use: useTop, size: 8, held: held, leaf: func(t *treeCheck, n checkNode) {
		for i := 0; i < n.nr; i++ {
			at := place{where: whereMapping, device: DevID(n.key(i)), dev: true}
			fresh = append(fresh, device{at, block.Loc(n.u64(i))})
		}
	}}
	t.walk(s.MappingRoot)
	roots := map[DevID]block.Loc{}
	c.scan(s.MappingRoot, useTop, func(at place, k uint64, v []byte) {
		at.where = t.at.where
		if k > uint64(MaxDevID) {
			c.fatal(at.span(k, k+1), "device id does not fit 24 bits")
			return
		}
		roots[DevID(k)] = block.Loc(binary.LittleEndian.Uint64(v))
	}, 8)
	c.sameDevices(of(whereDetails), s, roots, details)

	if c.o.SkipMappings {
		c.rep.Partial = true
		return
	}
	m := treeCheck{c: c, use: useMapping, size: 8, held: held}
	for _, f := range fresh {
		m.at, m.snap = f.at, noSnap
		if d, ok := details[f.at.device]; ok {
			m.snap = d.SnapshottedTime
		}
		m.walk(f.root)
	}
	for _, id := range slices.Sorted(maps.Keys(roots)) {
		d, ok := details[id]
		root := roots[id]
		if !ok || uint64(root) >= c.meta.n || c.use[root] != useMapping {
			continue
		}
		at := of(whereDetails)
		at.device, at.dev, at.block = id, true, s.DetailsRoot
		if info := c.infoOf(root); info.whole && info.entries != d.MappedBlocks {
			c.fatal(at, "says %d mapped blocks, the mapping tree has %d", d.MappedBlocks, info.entries)
		}
		if !held {
			c.rep.Mappings += c.infoOf(root).entries
		}
	}
	if !held {
		c.rep.Devices = len(roots)
	}
}

// sameDevices compares the ids of the two trees, if both could be read.
func (c *checker) sameDevices(at place, s *Superblock, roots map[DevID]block.Loc, details map[DevID]Details) {
	at.dev = true
	if c.whole(s.DetailsRoot, useDetails) {
		at.block = s.DetailsRoot
		for _, id := range slices.Sorted(maps.Keys(roots)) {
			if _, ok := details[id]; !ok {
				at.device = id
				c.fatal(at, "the device has a mapping tree but no details")
			}
		}
	}
	if c.whole(s.MappingRoot, useTop) {
		at.block = s.MappingRoot
		for _, id := range slices.Sorted(maps.Keys(details)) {
			if _, ok := roots[id]; !ok {
				at.device = id
				c.fatal(at, "the device has details but no mapping tree")
			}
		}
	}
}

func (c *checker) whole(root block.Loc, u use) bool {
	return uint64(root) < c.meta.n && c.use[root] == u && c.infoOf(root).whole
}

// scan calls fn for every entry of a tree that has been walked, without checking it again and
// without what is unreadable.
func (c *checker) scan(root block.Loc, u use, fn func(at place, k uint64, v []byte), size int) {
	seen := map[block.Loc]bool{}
	var visit func(loc block.Loc, depth int)
	visit = func(loc block.Loc, depth int) {
		if uint64(loc) >= c.meta.n || c.use[loc] != u || c.stop != nil || seen[loc] {
			return
		}
		if c.infoOf(loc).height == 0 {
			return // unreadable
		}
		seen[loc] = true
		for len(c.bufs) <= depth {
			c.bufs = append(c.bufs, make([]byte, block.Size))
		}
		b := c.bufs[depth]
		if _, err := c.d.ReadAt(b, int64(loc)*block.Size); err != nil {
			return // it was readable a moment ago; what is missing shows as a difference
		}
		n := checkNode{b: b, nr: int(binary.LittleEndian.Uint32(b[16:])), leaf: b[4] == 2,
			vals: 32 + 8*int(binary.LittleEndian.Uint32(b[20:]))}
		for i := 0; i < n.nr; i++ {
			if n.leaf {
				fn(place{block: loc}, n.key(i), n.value(i, size))
			} else {
				visit(block.Loc(n.u64(i)), depth+1)
			}
		}
	}
	visit(root, 0)
}

// exclusiveTimes finds data blocks that a device takes for its own, because they were mapped at
// or after its last snapshot, although something else refers to them: a kernel would write
// them in place. The metadata snapshot is not counted yet.
func (c *checker) exclusiveTimes() {
	for b := uint64(0); b < c.data.n; b++ {
		if c.data.st[b]&stOwned != 0 && c.data.walked(b) > 1 {
			c.add(Finding{Severity: Fatal, Where: whereDataMap, Keys: &Span{b, b + 1},
				What: "mapped more than once, but a device's times say that it alone has it"})
		}
	}
}
