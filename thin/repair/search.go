package repair

import (
	"errors"
	"slices"

	"mica/pdata/block"
	"mica/thin"
)

// maxPairs bounds how many pairs of trees a search compares.
const maxPairs = 20000

// A pair is a tree of devices and one of details with the same ids, and mapping trees with as
// many mappings as the details say.
type pair struct {
	top, det candidate
	time     uint32 // of the newest mapping
}

// search looks for the newest state of which every tree is whole. Where there is none, it takes
// the newest details, and for each device the tree that fits it.
func (x *finder) search(st *state) (*state, error) {
	s, err := x.scanned()
	if err != nil {
		return nil, err
	}
	tops, details := s.candidates()
	byIDs := map[uint64][]candidate{}
	for _, c := range tops {
		byIDs[c.ids] = append(byIDs[c.ids], c)
	}
	slices.SortStableFunc(details, func(a, b candidate) int {
		switch {
		case a.newer(b):
			return -1
		case b.newer(a):
			return 1
		}
		return 0
	})
	var found []pair
	compared := 0
	for i, d := range details {
		if len(found) > 0 && details[i-1].newer(d) || compared > maxPairs {
			break
		}
		for _, t := range byIDs[d.ids] {
			compared++
			if p, ok := x.pair(t, d); ok {
				found = append(found, p)
			}
		}
	}
	st.from, st.known = FromSearch, false
	switch {
	case len(found) > 0:
		p := newest(found, x.f.n)
		for _, q := range found {
			x.rep.Candidates = append(x.rep.Candidates, Candidate{q.top.root, q.det.root, q.det.n, q == p})
		}
		st.sb.MappingRoot, st.sb.DetailsRoot = p.top.root, p.det.root
		x.readTrees(st)
	case len(details) > 0:
		st.sb.MappingRoot, st.sb.DetailsRoot = 0, details[0].root
		x.readTrees(st)
	case len(tops) > 0:
		t := slices.MaxFunc(tops, func(a, b candidate) int { return a.n - b.n })
		st.sb.MappingRoot, st.sb.DetailsRoot = t.root, 0
		x.readTrees(st)
	default:
		return nil, errors.New("no tree of devices can be found: there is nothing to repair")
	}
	return st, nil
}

// pair compares two trees with the same ids.
func (x *finder) pair(t, d candidate) (pair, bool) {
	p := pair{top: t, det: d}
	top, det := readDeviceTree(x.f.cache, t.root), readDetailsTree(x.f.cache, d.root)
	for id, root := range top.roots {
		n := x.f.look(root)
		if n.state != usable || !n.lossless || n.entries != det.details[id].MappedBlocks {
			return p, false
		}
		p.time = max(p.time, n.maxTime)
	}
	return p, true
}

// newest chooses among states that no field tells apart. Blocks are allocated in ascending order
// until the end of the device, then from its beginning: the roots of successive commits follow
// one another, and the newest is the one before the widest gap.
func newest(list []pair, n block.Loc) pair {
	last := slices.MaxFunc(list, func(a, b pair) int { return int(a.time) - int(b.time) }).time
	list = slices.DeleteFunc(slices.Clone(list), func(p pair) bool { return p.time != last })
	slices.SortFunc(list, func(a, b pair) int {
		if a.top.root != b.top.root {
			return int(a.top.root) - int(b.top.root)
		}
		return int(a.det.root) - int(b.det.root)
	})
	best, widest := len(list)-1, block.Loc(0)
	for i, p := range list {
		next := list[(i+1)%len(list)].top.root
		gap := next - p.top.root
		if i == len(list)-1 {
			gap = next + n - p.top.root
		}
		if gap >= widest {
			best, widest = i, gap
		}
	}
	// With one tree of devices, the details that were written with it are the nearest behind.
	top := list[best].top.root
	p := list[best]
	for _, q := range list {
		if q.top.root == top && (q.det.root-top+n)%n < (p.det.root-top+n)%n {
			p = q
		}
	}
	return p
}

// A resolver finds mapping trees for devices whose entry in the device tree is lost: by older
// versions of that entry, and by trees that the pool counts as used and nothing else names.
type resolver struct {
	x      *finder
	used   func(block.Loc) (used, known bool)
	named  map[thin.DevID][]block.Loc
	orphan []block.Loc
}

// resolve adds to the device tree what it finds for the ids that have details but no root. It
// returns the devices that it found, and by what.
func (x *finder) resolve(st *state) (map[thin.DevID]string, error) {
	var lost []thin.DevID
	for id := range st.det.details {
		if _, ok := st.top.roots[id]; !ok {
			lost = append(lost, id)
		}
	}
	if len(lost) == 0 {
		return nil, nil
	}
	slices.Sort(lost)
	if _, err := x.scanned(); err != nil {
		return nil, err
	}
	r := resolver{x: x, named: map[thin.DevID][]block.Loc{}, used: x.usedBlocks(st)}
	r.gather(st)
	found := map[thin.DevID]string{}
	taken := map[block.Loc]bool{}
	for _, id := range lost {
		if root, ok := r.byName(id, st.det.details[id]); ok {
			st.top.roots[id] = root
			taken[root] = true
			found[id] = "an earlier version of the entry"
		}
	}
	// What is left goes by the number of mappings, if that fits only one tree and one device.
	fits := map[thin.DevID][]block.Loc{}
	users := map[block.Loc]int{}
	for _, id := range lost {
		if _, ok := st.top.roots[id]; ok {
			continue
		}
		for _, root := range r.orphan {
			if !taken[root] && r.fits(root, st.det.details[id]) {
				fits[id] = append(fits[id], root)
				users[root]++
			}
		}
	}
	for _, id := range lost {
		if l := fits[id]; len(l) == 1 && users[l[0]] == 1 {
			st.top.roots[id] = l[0]
			found[id] = "its number of mappings alone"
		}
	}
	return found, nil
}

// gather lists the roots that any leaf of a device tree, of whatever age, names, and the used
// nodes that no used node points at.
func (r *resolver) gather(st *state) {
	s, f := r.x.scan, r.x.f
	child := make([]bool, f.n)
	for loc := block.Loc(1); loc < f.n; loc++ {
		if c := s.class[loc]; c != classLeaf && c != classInternal {
			continue
		}
		n, err := f.read(loc)
		if err != nil {
			continue
		}
		used, known := r.used(loc)
		for i := range n.Len() {
			switch {
			case !n.Leaf():
				if c := n.Child(i); c < f.n && used && known {
					child[c] = true
				}
			case s.namesDevices(loc):
				id, root := thin.DevID(n.Key(i)), block.Loc(raw(n, i))
				if !slices.Contains(r.named[id], root) {
					r.named[id] = append(r.named[id], root)
				}
			}
		}
	}
	for _, root := range st.top.roots {
		if root < f.n {
			child[root] = true
		}
	}
	for loc := block.Loc(1); loc < f.n; loc++ {
		if c := s.class[loc]; child[loc] || c != classLeaf && c != classInternal {
			continue
		}
		if used, known := r.used(loc); used && known && !s.namesDevices(loc) {
			r.orphan = append(r.orphan, loc)
		}
	}
}

func (r *resolver) fits(root block.Loc, d thin.Details) bool {
	n := r.x.f.look(root)
	used, known := r.used(root)
	return n.state == usable && n.lossless && n.entries == d.MappedBlocks && (used || !known)
}

// byName chooses among the roots that old entries name: the one with the newest mapping.
func (r *resolver) byName(id thin.DevID, d thin.Details) (block.Loc, bool) {
	var best block.Loc
	ties := 0
	for _, root := range r.named[id] {
		if !r.fits(root, d) {
			continue
		}
		switch n, b := r.x.f.look(root), r.x.f.at(best); {
		case best == 0 || n.maxTime > b.maxTime:
			best, ties = root, 0
		case n.maxTime == b.maxTime:
			ties++
		}
	}
	return best, best != 0 && ties == 0
}
