package thin

import (
	"fmt"
	"maps"
	"slices"

	"mica/pdata/block"
)

func (m *Metadata) sortedIDsLocked() []DevID {
	return slices.Sorted(maps.Keys(m.devs))
}

func (m *Metadata) deviceLocked(id DevID) (*device, error) {
	d := m.devs[id]
	if d == nil {
		return nil, fmt.Errorf("thin %d: %w", id, ErrNotFound)
	}
	return d, nil
}

// addLocked enters a device whose mapping root's reference the caller hands over.
func (m *Metadata) addLocked(id DevID, d *device) error {
	var v [8]byte
	putLoc(v[:], d.root)
	var err error
	if m.sb.MappingRoot, _, err = m.top.Insert(m.sb.MappingRoot, uint64(id), v[:]); err != nil {
		return err
	}
	m.devs[id] = d
	m.mapped += d.MappedBlocks
	m.dirty[id] = struct{}{}
	return nil
}

func (m *Metadata) newDeviceLocked(what string, id DevID, sharing bool) error {
	if err := m.writableLocked(); err != nil {
		return err
	}
	if err := checkID(id); err != nil {
		return err
	}
	if m.devs[id] != nil {
		return fmt.Errorf("%s: device id %d %w", what, id, ErrExists)
	}
	return m.admitLocked(what, 1, sharing, false)
}

// CreateThin makes an empty device.
func (m *Metadata) CreateThin(id DevID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.newDeviceLocked(fmt.Sprintf("create thin %d", id), id, false); err != nil {
		return err
	}
	m.changed = true
	root, err := m.bottom.Empty()
	if err == nil {
		err = m.addLocked(id, &device{root: root, newestKnown: true,
			Details: Details{TransactionID: m.sb.TransactionID, CreationTime: m.sb.Time, SnapshottedTime: m.sb.Time}})
	}
	if err != nil {
		return m.failLocked(fmt.Errorf("create thin %d: %w", id, err))
	}
	return nil
}

// CreateSnap makes id a copy of origin: one reference to its tree, whatever its size. Mappings
// of the origin that are still pending elsewhere are inserted first by the caller, who also
// keeps writers away.
//
// The pool's time is raised only if the origin may have a mapping of the current time: without
// one, every mapping is older than the snapshot time already, which is what sharing needs.
func (m *Metadata) CreateSnap(id, origin DevID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	what := fmt.Sprintf("create snapshot %d of thin %d", id, origin)
	o, err := m.deviceLocked(origin)
	if err != nil {
		return fmt.Errorf("create snapshot %d: %w", id, err)
	}
	if err := m.newDeviceLocked(what, id, true); err != nil {
		return err
	}
	t := m.sb.Time
	if o.MappedBlocks > 0 && (!o.newestKnown || o.newest >= t) {
		if t++; t >= MaxTime {
			return fmt.Errorf("%s: %w: %d is the last that 24 bits hold", what, ErrTime, MaxTime-1)
		}
	}
	m.changed = true
	m.sb.Time = t
	// The entry of the origin comes first: below a shared node its root counts once only.
	if m.sb.MappingRoot, err = m.top.Touch(m.sb.MappingRoot, uint64(origin)); err == nil {
		err = m.tm.Inc(o.root)
	}
	if err == nil {
		newest := uint32(0)
		if t > 0 {
			newest = t - 1
		}
		s := &device{root: o.root, newest: newest, newestKnown: true, Details: o.Details, compacted: o.compacted}
		if o.MappedBlocks == 0 {
			s.newest = 0
		}
		s.TransactionID, s.CreationTime, s.SnapshottedTime = m.sb.TransactionID, t, t
		o.SnapshottedTime, o.newest, o.newestKnown = t, s.newest, true
		m.dirty[origin] = struct{}{}
		err = m.addLocked(id, s)
	}
	if err != nil {
		return m.failLocked(fmt.Errorf("%s: %w", what, err))
	}
	return nil
}

// deleteLeaves bounds the work of a step of DeleteStep, in nodes of the mapping tree.
const deleteLeaves = 4

// DeleteStep removes a bounded part of a device: all of it if few nodes of its tree are its own,
// else the end of it, less when metadata blocks are short. Until done is true the device is there
// with fewer mappings, and every state in between may be committed.
func (m *Metadata) DeleteStep(id DevID) (done bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return false, err
	}
	d, err := m.deviceLocked(id)
	if err != nil {
		return false, fmt.Errorf("delete: %w", err)
	}
	budget := deleteLeaves
	if m.tm.Count(d.root) > 1 {
		budget = 0 // the tree loses a reference, and nothing in it
	}
	for !m.fitsLocked(m.deleteCostLocked(budget), levelDelete) {
		if budget /= 4; budget == 0 {
			return false, fmt.Errorf("delete thin %d: %d metadata blocks free: %w", id, m.meta.Free(), ErrNoMetaSpace)
		}
	}
	return m.deleteLocked(id, d, max(budget, 1))
}

// UndoSnap takes back a snapshot that was made in the open transaction and has not been written to
// since. It is not refused for want of metadata blocks: the nodes that it changes are those that the
// snapshot has changed.
func (m *Metadata) UndoSnap(id DevID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return err
	}
	d, err := m.deviceLocked(id)
	if err == nil && m.tm.Count(d.root) < 2 {
		err = fmt.Errorf("its tree is its own")
	}
	if err == nil {
		_, err = m.deleteLocked(id, d, 1)
	}
	if err != nil {
		return fmt.Errorf("undo snapshot %d: %w", id, err)
	}
	return nil
}

// deleteLocked is a step of a delete of so many leaves that has been admitted.
func (m *Metadata) deleteLocked(id DevID, d *device, budget int) (done bool, err error) {
	m.changed = true
	if m.sb.MappingRoot, err = m.top.Touch(m.sb.MappingRoot, uint64(id)); err != nil {
		return false, m.failLocked(fmt.Errorf("delete thin %d: %w", id, err))
	}
	root, gone, done, err := m.bottom.ReleaseStep(d.root, budget)
	if err != nil {
		return false, m.failLocked(fmt.Errorf("delete thin %d: %w", id, err))
	}
	if !done {
		m.unmappedLocked(d, gone)
		m.dirty[id] = struct{}{}
		if err := m.setRootLocked(id, d, root); err != nil {
			return false, m.failLocked(fmt.Errorf("delete thin %d: %w", id, err))
		}
		return false, nil
	}
	// The tree is gone: its entry is dropped without releasing it again.
	if m.sb.MappingRoot, _, err = m.rawTop().Remove(m.sb.MappingRoot, uint64(id)); err == nil {
		m.sb.DetailsRoot, _, err = m.details.Remove(m.sb.DetailsRoot, uint64(id))
	}
	if err != nil {
		return false, m.failLocked(fmt.Errorf("delete thin %d: %w", id, err))
	}
	m.unmappedLocked(d, d.MappedBlocks)
	delete(m.devs, id)
	delete(m.dirty, id)
	return true, nil
}

// unmappedLocked notes that n mappings of a device have gone.
func (m *Metadata) unmappedLocked(d *device, n uint64) {
	n = min(n, d.MappedBlocks)
	d.MappedBlocks -= n
	m.mapped -= n
}

// setRootLocked stores a device's new root, whose entry has been touched in this transaction.
func (m *Metadata) setRootLocked(id DevID, d *device, root block.Loc) error {
	if root == d.root {
		return nil
	}
	d.root = root
	var v [8]byte
	putLoc(v[:], root)
	var err error
	m.sb.MappingRoot, _, err = m.top.Insert(m.sb.MappingRoot, uint64(id), v[:])
	return err
}

// Details returns what is recorded about a device.
func (m *Metadata) Details(id DevID) (Details, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	d, err := m.deviceLocked(id)
	if err != nil {
		return Details{}, err
	}
	return d.Details, nil
}

// Devices lists the devices, by id.
func (m *Metadata) Devices() ([]DeviceInfo, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	list := make([]DeviceInfo, 0, len(m.devs))
	for _, id := range m.sortedIDsLocked() {
		list = append(list, DeviceInfo{id, m.devs[id].Details})
	}
	return list, nil
}

// HighestMapped returns the last virtual block of a device that is mapped.
func (m *Metadata) HighestMapped(id DevID) (VBlock, bool, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	d, err := m.deviceLocked(id)
	if err != nil {
		return 0, false, err
	}
	k, ok, err := m.bottom.Last(d.root)
	return VBlock(k), ok, err
}
