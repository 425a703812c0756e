package repair

import (
	"slices"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/thin"
)

// Claims finds data blocks that several mappings name although no snapshot explains it. A mapping
// of a time not before its device's last snapshot says that the device alone has the block; if
// others name it too, somebody is wrong. Mappings of the newest time are right: the block was
// freed and given out again. Several of that time are treated as shared.
type claims struct {
	f     *forest
	pages map[uint64]*[claimPage]uint32
	// ask is Options.Keep. What it refuses is noted by leaf: for each entry 0, or a number of why.
	ask     func(thin.DevID, thin.VBlock, thin.Mapping) string
	refused map[block.Loc][]uint8
	why     []string
}

const claimPage = 4096

// Bits of a claim, above the 24 of the newest time.
const (
	claimed     = 1 << 24 // by somebody
	claimedMore = 1 << 25 // by several mappings of the newest time
	claimedOld  = 1 << 26 // by an older mapping too
	claimedOwn  = 1 << 27 // by a device that takes it for its own
)

func newClaims(f *forest, ask func(thin.DevID, thin.VBlock, thin.Mapping) string) *claims {
	return &claims{f: f, pages: map[uint64]*[claimPage]uint32{}, ask: ask, refused: map[block.Loc][]uint8{}}
}

// refuses asks whether entry i of a leaf may stay, and notes it if not.
func (c *claims) refuses(id thin.DevID, loc block.Loc, n btree.Node, i int, m thin.Mapping) bool {
	if c.ask == nil {
		return false
	}
	why := c.ask(id, thin.VBlock(n.Key(i)), m)
	if why == "" {
		return false
	}
	k := slices.Index(c.why, why)
	if k < 0 {
		if k = len(c.why); k == 255 {
			k--
		} else {
			c.why = append(c.why, why)
		}
	}
	if c.refused[loc] == nil {
		c.refused[loc] = make([]uint8, n.Len())
	}
	c.refused[loc][i] = uint8(k) + 1
	return true
}

// refusal is why entry i of a leaf was refused, empty if it was not.
func (c *claims) refusal(loc block.Loc, i int) string {
	if r := c.refused[loc]; r != nil && r[i] != 0 {
		return c.why[r[i]-1]
	}
	return ""
}

func (c *claims) of(b thin.DataBlock) *uint32 {
	p := c.pages[uint64(b)/claimPage]
	if p == nil {
		p = new([claimPage]uint32)
		c.pages[uint64(b)/claimPage] = p
	}
	return &p[uint64(b)%claimPage]
}

func (c *claims) add(m thin.Mapping, own bool) {
	v := c.of(m.Block)
	t := *v & (thin.MaxTime - 1)
	switch {
	case *v == 0:
		*v = claimed | m.Time
	case m.Time == t:
		*v |= claimedMore
	case m.Time < t:
		*v |= claimedOld
	default:
		*v = *v&claimedOwn | claimed | claimedOld | m.Time
	}
	if own {
		*v |= claimedOwn
	}
}

// conflict reports whether the claims of a block contradict each other.
func conflict(v uint32) bool { return v&claimedOwn != 0 && v&(claimedMore|claimedOld) != 0 }

// keeps reports whether a mapping may stay.
func (c *claims) keeps(m thin.Mapping) bool {
	v := *c.of(m.Block)
	return !conflict(v) || m.Time == v&(thin.MaxTime-1)
}

// shares reports whether a mapping stays, but not for its device alone.
func (c *claims) shares(m thin.Mapping) bool {
	v := *c.of(m.Block)
	return conflict(v) && v&claimedMore != 0 && m.Time == v&(thin.MaxTime-1)
}

// A claimant is a device whose mappings are counted.
type claimant struct {
	id   thin.DevID
	root block.Loc
	snap uint32 // its last snapshot's time
	bump bool   // its mappings must all be taken for shared
}

// count counts the mappings of all devices, every node once. A node that several devices reach is
// shared; who takes a mapping in it for its own is to be bumped.
func (c *claims) count(list []claimant) {
	for i := range list {
		c.visit(list, i, list[i].root, func(m thin.Mapping) { c.add(m, m.Time >= list[i].snap) })
	}
}

func (c *claims) visit(list []claimant, i int, loc block.Loc, fn func(thin.Mapping)) {
	x := c.f.look(loc)
	if x.state != usable {
		return
	}
	if x.dev != 0 {
		if first := &list[x.dev-1]; x.entries > 0 {
			list[i].bump = list[i].bump || x.maxTime >= list[i].snap
			first.bump = first.bump || x.maxTime >= first.snap
		}
		return
	}
	x.dev = uint32(i) + 1
	n, err := c.f.read(loc)
	if err != nil {
		return
	}
	for j := range n.Len() {
		if !n.Leaf() {
			if _, ok := c.f.child(n, x, j); ok {
				c.visit(list, i, n.Child(j), fn)
			}
		} else if m, ok := c.f.mapping(n, j); ok {
			if c.refuses(list[i].id, loc, n, j, m) {
				x.odd = true
				continue
			}
			fn(m)
		}
	}
}

// settle bumps the devices that would write a block that others have too, and returns how many
// data blocks were claimed in contradiction.
func (c *claims) settle(list []claimant) (conflicts int) {
	for _, p := range c.pages {
		for _, v := range p {
			if conflict(v) {
				conflicts++
			}
		}
	}
	if conflicts == 0 {
		return 0
	}
	for i := range list {
		c.again(list, i, list[i].root)
	}
	return conflicts
}

// again looks at the leaves that device i reached first.
func (c *claims) again(list []claimant, i int, loc block.Loc) {
	x := c.f.at(loc)
	if x.state != usable || x.dev != uint32(i)+1 {
		return
	}
	n, err := c.f.read(loc)
	if err != nil {
		return
	}
	for j := range n.Len() {
		if !n.Leaf() {
			if _, ok := c.f.child(n, x, j); ok {
				c.again(list, i, n.Child(j))
			}
			continue
		}
		m, ok := c.f.mapping(n, j)
		if !ok || c.refusal(loc, j) != "" {
			continue
		}
		x.odd = x.odd || !c.keeps(m)
		if m.Time >= list[i].snap && c.shares(m) {
			list[i].bump = true
		}
	}
}
