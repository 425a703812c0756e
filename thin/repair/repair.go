package repair

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"mica/dev"
	"mica/pdata/block"
	"mica/thin"
)

// Options say what is known of a pool beside its metadata.
type Options struct {
	// TransactionID and DataBlockSize (bytes) replace what is found, if not nil or 0. The block
	// size must be given where the superblock is lost and no copy of it is found.
	TransactionID *uint64
	DataBlockSize int64
	// DataBytes is the length of the data device, 0 if it is not known; DataBlocks, if not 0, is
	// the number of data blocks whatever else is found.
	DataBytes  int64
	DataBlocks uint64
	// MappingRoot and DetailsRoot, if not 0, are the trees to take: one of the candidates of an
	// earlier report.
	MappingRoot, DetailsRoot block.Loc
	// Keep, if set, is asked for every mapping, with the first device that has it: why it must go, or
	// nothing. A mapping in a node that devices share is asked for once.
	Keep func(id thin.DevID, vb thin.VBlock, m thin.Mapping) (why string)
	// Progress, if set, is called now and then; an error ends the repair with that error.
	Progress func(what string, done, total uint64) error
}

func (o *Options) progress(what string, done, total uint64) error {
	if o.Progress == nil {
		return nil
	}
	return o.Progress(what, done, total)
}

// Repair makes a pool on out from what can be read on src, which is not written. It returns what
// is lost; an error means that there is no new pool, and block 0 of out is all zeros then. out
// must be as long as src, and its block 0 all zeros before. If out is nil nothing is written: the
// report says what a repair would save.
//
// The caller checks the result (thin.Check) before it takes the place of the old metadata.
func Repair(src, out dev.Device, o Options) (*Report, error) {
	f := newForest(src)
	if f.n < 2 {
		return nil, fmt.Errorf("repair: metadata device of %d bytes", src.Size())
	}
	if out != nil && out.Size() < src.Size() {
		return nil, fmt.Errorf("repair: the new metadata device of %d bytes is shorter than the old one of %d", out.Size(), src.Size())
	}
	rep := &Report{}
	x := &finder{o: &o, f: f, rep: rep}
	st, err := x.find()
	if err != nil {
		return nil, fmt.Errorf("repair: %w", err)
	}
	r := &repairer{o: &o, f: f, rep: rep, out: out}
	if err := r.devices(x, st); err != nil {
		return nil, fmt.Errorf("repair: %w", err)
	}
	if err := r.rebuild(st); err != nil {
		return nil, fmt.Errorf("repair: %w", err)
	}
	return rep, nil
}

// A repairer makes the new pool of a state.
type repairer struct {
	o   *Options
	f   *forest
	rep *Report
	out dev.Device

	list  []thin.AssembledDevice // by id; Root in the old metadata
	time  uint32
	trans uint64
}

// devices lists the devices of a state, and reports those of which nothing is left.
func (r *repairer) devices(x *finder, st *state) error {
	rep := r.rep
	rep.From, rep.MappingRoot, rep.DetailsRoot = st.from, st.sb.MappingRoot, st.sb.DetailsRoot
	rep.DataBlockSize, rep.DataBlocks = int64(st.sb.DataBlockSize)*512, st.sb.DataMap.NrBlocks
	rep.SnapshotDropped = st.known && st.sb.HeldRoot != 0
	for _, t := range []struct {
		name string
		gaps []gap
	}{{"device tree", st.top.gaps}, {"details tree", st.det.gaps}} {
		for _, g := range t.gaps {
			rep.Trees = append(rep.Trees, fmt.Sprintf("%s: %s: %s", t.name, idRange(g.Range), g.why))
		}
	}
	rep.UnknownDevices = overlap(st.top.gaps, st.det.gaps)
	if rep.UnknownDevices && len(st.top.roots)+len(st.det.details) == 0 {
		return errors.New("neither the device tree nor the details tree can be read")
	}
	found, err := x.resolve(st)
	if err != nil {
		return err
	}
	r.time, r.trans = r.clock(st)
	ids := slices.Sorted(maps.Keys(st.det.details))
	for id := range st.top.roots {
		if _, ok := st.det.details[id]; !ok {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		root, hasRoot := st.top.roots[id]
		d, hasDetails := st.det.details[id]
		line := Device{ID: id}
		if hasDetails {
			m := d.MappedBlocks
			line.Mapped = &m
		} else if d, err = x.olderDetails(id); err != nil {
			return err
		} else {
			note := "its details are lost: it is taken for as new as the pool"
			if d.SnapshottedTime > 0 || d.CreationTime > 0 || d.TransactionID > 0 {
				note = "its details are lost: those of an earlier state are taken"
			} else {
				d.TransactionID, d.CreationTime = r.trans, r.time
			}
			// Everything that was not mapped at the pool's time now is taken for shared.
			d.SnapshottedTime = r.time
			line.Notes = append(line.Notes, note)
		}
		if by := found[id]; by != "" {
			line.Notes = append(line.Notes, fmt.Sprintf("its entry in the device tree is lost: the tree in metadata block %d was found by %s", root, by))
		}
		d.SnapshottedTime = min(d.SnapshottedTime, r.time)
		d.CreationTime = min(d.CreationTime, d.SnapshottedTime)
		if !hasRoot && d.MappedBlocks > 0 {
			line.Gone = true
			line.Lost = []LostRange{{Why: "its entry in the device tree cannot be read"}}
		}
		rep.Devices = append(rep.Devices, line)
		if !line.Gone {
			r.list = append(r.list, thin.AssembledDevice{DeviceInfo: thin.DeviceInfo{ID: id, Details: d}, Root: root})
		}
	}
	return nil
}

// olderDetails looks for the details of a device in the leaves that earlier states have left; of
// several it takes those of the latest snapshot. Nothing of them counts but when it was made.
func (x *finder) olderDetails(id thin.DevID) (d thin.Details, err error) {
	s, err := x.scanned()
	if err != nil {
		return d, err
	}
	if s.details == nil {
		s.details = map[thin.DevID]thin.Details{}
		for loc := block.Loc(1); loc < x.f.n; loc++ {
			if s.class[loc] != classDetails {
				continue
			}
			n, err := readNode(x.f.cache, loc, thin.DetailsSize)
			if err != nil {
				continue
			}
			for i := range n.Len() {
				v, k := thin.DecodeDetails(n.Value(i)), thin.DevID(n.Key(i))
				if old, ok := s.details[k]; n.Key(i) <= uint64(thin.MaxDevID) && (!ok || v.SnapshottedTime > old.SnapshottedTime) {
					s.details[k] = v
				}
			}
		}
	}
	return s.details[id], nil
}

// overlap reports whether two trees lack the same keys.
func overlap(a, b []gap) bool {
	for _, x := range a {
		for _, y := range b {
			if (x.End == 0 || y.Begin < x.End) && (y.End == 0 || x.Begin < y.End) {
				return true
			}
		}
	}
	return false
}

func idRange(r Range) string {
	switch {
	case r == Range{}:
		return "all devices"
	case r.End == 0:
		return fmt.Sprintf("devices from %d on", r.Begin)
	}
	return fmt.Sprintf("devices %d to %d", r.Begin, r.End-1)
}

// clock returns the pool's time and transaction id: those of the superblock, or the least that
// contradict nothing.
func (r *repairer) clock(st *state) (time uint32, trans uint64) {
	time, trans = st.sb.Time, st.sb.TransactionID
	if st.known {
		return time, trans
	}
	for _, d := range st.det.details {
		for _, t := range []uint32{d.CreationTime, d.SnapshottedTime} {
			if t < thin.MaxTime {
				time = max(time, t)
			}
		}
		if r.o.TransactionID == nil && d.TransactionID > trans {
			trans = d.TransactionID
		}
	}
	for _, root := range st.top.roots {
		time = max(time, r.f.look(root).maxTime)
	}
	r.rep.TransactionGuessed = r.o.TransactionID == nil
	return time, trans
}

// rebuild makes the trees, counts what they refer to, and makes the pool.
func (r *repairer) rebuild(st *state) error {
	c := newClaims(r.f, r.o.Keep)
	claimants := make([]claimant, len(r.list))
	for i, d := range r.list {
		claimants[i] = claimant{id: d.ID, root: d.Root, snap: d.SnapshottedTime}
	}
	c.count(claimants)
	r.rep.Conflicts = c.settle(claimants)
	if err := r.bump(claimants); err != nil {
		return err
	}
	b := newBuilder(r.f, c, r.out)
	for i, d := range r.list {
		if err := r.o.progress("repair", uint64(i), 2*uint64(len(r.list))); err != nil {
			return err
		}
		b.reserve(d.Root)
	}
	for i := range r.list {
		if err := r.o.progress("repair", uint64(len(r.list)+i), 2*uint64(len(r.list))); err != nil {
			return err
		}
		if err := r.device(b, i); err != nil {
			return err
		}
	}
	r.list = slices.DeleteFunc(r.list, func(d thin.AssembledDevice) bool { return d.Root == 0 })
	rep := r.rep
	rep.Time, rep.TransactionID = r.time, r.trans
	rep.Complete = !rep.UnknownDevices
	for i := range rep.Devices {
		rep.Complete = rep.Complete && rep.Devices[i].whole()
	}
	if r.out == nil {
		return nil
	}
	return r.write(b)
}

// bump raises the pool's time and the snapshot time of devices whose mappings must be taken for
// shared.
func (r *repairer) bump(list []claimant) error {
	if !slices.ContainsFunc(list, func(c claimant) bool { return c.bump }) {
		return nil
	}
	if r.time++; r.time == thin.MaxTime {
		return fmt.Errorf("devices claim the same blocks for their own, and the pool's time of %d cannot be raised to tell that they share them", r.time-1)
	}
	for i, c := range list {
		if !c.bump {
			continue
		}
		r.list[i].SnapshottedTime = r.time
		line := r.line(r.list[i].ID)
		line.Notes = append(line.Notes, "shares blocks that it took for its own: all of its blocks are copied when they are written next")
	}
	return nil
}

func (r *repairer) line(id thin.DevID) *Device {
	i, _ := slices.BinarySearchFunc(r.rep.Devices, id, func(d Device, id thin.DevID) int { return int(d.ID) - int(id) })
	return &r.rep.Devices[i]
}

// device makes the mapping tree of device i.
func (r *repairer) device(b *builder, i int) error {
	d := &r.list[i]
	line := r.line(d.ID)
	t := tree{}
	var err error
	if d.Root != 0 {
		if t, err = b.tree(d.Root); err != nil {
			return err
		}
	}
	line.Lost, line.Kept = append(line.Lost, t.lost...), t.entries
	if line.Mapped == nil && len(t.lost) == 0 {
		n := t.entries
		line.Mapped = &n
	}
	if t.root == 0 && len(t.lost) > 0 {
		line.Gone = true
		d.Root = 0
		return nil
	}
	if t.root == 0 {
		if t.root, err = b.node(true, nil); err != nil {
			return err
		}
	}
	d.Root, d.MappedBlocks = t.root, t.entries
	return nil
}
