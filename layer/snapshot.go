package layer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"mica/layer/catalog"
	"mica/thin"
)

// maxForks bounds the copies of one Fork.
const maxForks = 4096

// Snapshot is described at API.
func (s *Store) Snapshot(ctx context.Context, name string, o SnapshotOptions) (Snapshot, error) {
	if o.Name == "" {
		o.Name = time.Now().UTC().Format("20060102-150405.000000")
	}
	if err := errors.Join(checkName("snapshot", o.Name), checkLabels(o.Labels)); err != nil {
		return Snapshot{}, err
	}
	c, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return Snapshot{}, err
	}
	defer unlock()
	if err := s.usable(c.Ref()); err != nil {
		return Snapshot{}, err
	}
	key := name + "/" + o.Name
	if _, err := load[snapshotBody](s, kindSnapshot, key); err == nil {
		return Snapshot{}, fmt.Errorf("snapshot %q of container %q: %w", o.Name, name, ErrExists)
	} else if !errors.Is(err, ErrNotFound) {
		return Snapshot{}, err
	}
	id, level, own, err := s.takeCopy(ctx, c, o.QuiesceOptions)
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot container %q: %w", name, err)
	}
	rec := record[snapshotBody]{Record: catalog.Record{Kind: kindSnapshot, Key: key, Device: id, Parent: c.Parent}}
	rec.body = snapshotBody{Container: name, Name: o.Name, ChainID: c.body.ChainID, Level: level, deviceBody: deviceBody{
		SizeBytes: c.body.SizeBytes, FSType: c.body.FSType, Owner: c.body.Owner, Labels: o.Labels, Created: now(),
		GuestOwned: c.body.GuestOwned}}
	rec.body.setOwn(own)
	err = s.step(ctx, catalog.Step{Consume: []thin.DevID{id}, Apply: func(tx *catalog.Tx) error {
		var err error
		if rec.body.ID, err = s.newID(tx); err != nil {
			return err
		}
		return put(tx, rec)
	}}, []catalog.Record{rec.Record}, nil)
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot container %q: %w", name, err)
	}
	s.hub.emit(EventSnapshot, rec.Ref(), string(level))
	return s.describeSnapshot(rec), nil
}

// usableContainer reads a container that is not broken.
func (s *Store) usableContainer(name string) (record[containerBody], error) {
	c, err := s.containerRecord(name)
	if err == nil {
		err = s.usable(c.Ref())
	}
	return c, err
}

func (s *Store) describeSnapshot(r record[snapshotBody]) Snapshot {
	b := r.body
	return Snapshot{Container: b.Container, Name: b.Name, ID: b.ID, ChainID: b.ChainID, Device: r.Device,
		SizeBytes: b.SizeBytes, Level: b.Level, Labels: b.Labels, Created: b.Created, GuestOwned: b.GuestOwned,
		UsedBytes: s.ownBytes(r.Record, b.deviceBody, nil), Broken: s.cat.Broken(r.Ref())}
}

// Snapshots is described at API.
func (s *Store) Snapshots(ctx context.Context, name string) ([]Snapshot, error) {
	if _, err := s.containerRecord(name); err != nil {
		return nil, err
	}
	var recs []record[snapshotBody]
	err := list(s, kindSnapshot, name+"/", "", func(r record[snapshotBody]) (bool, error) {
		recs = append(recs, r)
		return true, ctx.Err()
	})
	var out []Snapshot
	for _, r := range recs {
		out = append(out, s.describeSnapshot(r))
	}
	return out, err
}

// RemoveSnapshot is described at API.
func (s *Store) RemoveSnapshot(ctx context.Context, name, snap string) error {
	_, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := s.snapshotRecord(name, snap)
	if err != nil {
		return err
	}
	err = s.step(ctx, catalog.Step{Apply: func(tx *catalog.Tx) error {
		if err := tx.Delete(r.Kind, r.Key); err != nil {
			return err
		}
		return tx.Remove(removalOf(r.Ref(), r.Device, nil, 0))
	}}, nil, []catalog.Record{r.Record})
	if err != nil {
		return fmt.Errorf("remove snapshot %q of container %q: %w", snap, name, err)
	}
	s.hub.emit(EventRemove, r.Ref(), "")
	s.collectAfter(ctx, r.body.ChainID)
	return nil
}

func (s *Store) snapshotRecord(name, snap string) (record[snapshotBody], error) {
	r, err := load[snapshotBody](s, kindSnapshot, name+"/"+snap)
	if errors.Is(err, ErrNotFound) {
		if _, cerr := s.containerRecord(name); cerr != nil {
			return r, cerr
		}
		return r, fmt.Errorf("snapshot %q of container %q: %w", snap, name, ErrNotFound)
	}
	return r, err
}

// Fork is described at API.
func (s *Store) Fork(ctx context.Context, name string, o ForkOptions) (ForkResult, error) {
	if err := s.writable(); err != nil {
		return ForkResult{}, err
	}
	if len(o.Names) == 0 || len(o.Names) > maxForks {
		return ForkResult{}, fmt.Errorf("fork container %q: %w: %d names, want 1 to %d", name, ErrInvalid, len(o.Names), maxForks)
	}
	want := []string{kindContainer + "/" + name}
	seen := map[string]bool{name: true}
	for _, n := range o.Names {
		if err := checkName("container", n); err != nil {
			return ForkResult{}, err
		}
		if seen[n] {
			return ForkResult{}, fmt.Errorf("fork container %q: %w: name %q twice", name, ErrInvalid, n)
		}
		seen[n] = true
		want = append(want, kindContainer+"/"+n)
	}
	if err := errors.Join(checkLabels(o.Labels), checkTTL(o.TTL)); err != nil {
		return ForkResult{}, err
	}
	unlock, err := s.locks.lock(ctx, want...)
	if err != nil {
		return ForkResult{}, err
	}
	defer unlock()
	c, err := s.usableContainer(name)
	if err != nil {
		return ForkResult{}, err
	}
	for _, n := range o.Names {
		if _, err := s.containerRecord(n); err == nil {
			return ForkResult{}, fmt.Errorf("fork container %q: container %q %w", name, n, ErrExists)
		}
	}
	res, err := s.fork(ctx, c, o)
	if err != nil {
		return ForkResult{}, fmt.Errorf("fork container %q: %w", name, err)
	}
	s.hub.emit(EventFork, c.Ref(), fmt.Sprintf("%d copies", len(o.Names)))
	return res, nil
}

// fork takes one copy, however long the file system may be frozen for it, replays it if need be,
// and makes the others from it: they are of the same moment.
func (s *Store) fork(ctx context.Context, c record[containerBody], o ForkOptions) (ForkResult, error) {
	rest, err := s.cat.Alloc(ctx, len(o.Names)-1)
	if err != nil {
		return ForkResult{}, s.wrap(err)
	}
	first, level, own, err := s.takeCopy(ctx, c, o.QuiesceOptions)
	if err != nil {
		s.cat.Release(rest...)
		return ForkResult{}, err
	}
	recs := make([]record[containerBody], len(o.Names))
	creates := make([]catalog.Create, 0, len(rest))
	created := make([]catalog.Record, len(o.Names))
	for i, n := range o.Names {
		id := first
		if i > 0 {
			id = rest[i-1]
			creates = append(creates, catalog.Create{ID: id, Origin: first})
		}
		recs[i] = record[containerBody]{Record: catalog.Record{Kind: kindContainer, Key: n, Device: id, Parent: c.Parent}}
		b := &recs[i].body
		*b = containerBody{Image: c.body.Image, ChainID: c.body.ChainID, deviceBody: deviceBody{
			SizeBytes: c.body.SizeBytes, FSType: c.body.FSType, Owner: c.body.Owner, Labels: c.body.Labels,
			Created: now(), GuestOwned: c.body.GuestOwned}}
		if o.Labels != nil {
			b.Labels = o.Labels
		}
		b.setTTL(o.TTL)
		if i == 0 {
			b.setOwn(own)
		}
		created[i] = recs[i].Record
	}
	err = s.step(ctx, catalog.Step{Consume: []thin.DevID{first}, Creates: creates, Apply: func(tx *catalog.Tx) error {
		for i := range recs {
			var err error
			if recs[i].body.ID, err = s.newID(tx); err != nil {
				return err
			}
			if err := put(tx, recs[i]); err != nil {
				return err
			}
		}
		return nil
	}}, created, nil)
	if err != nil {
		return ForkResult{}, err
	}
	res := ForkResult{Level: level}
	for _, r := range recs {
		s.noteExpiry(r.Key, r.body.Expires)
		s.hub.emit(EventCreate, r.Ref(), "fork of "+c.Key)
		res.Containers = append(res.Containers, s.describeContainer(r))
	}
	return res, nil
}

// Rollback is described at API.
func (s *Store) Rollback(ctx context.Context, name, snap string) (Container, error) {
	c, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return Container{}, err
	}
	defer unlock()
	r, err := s.snapshotRecord(name, snap)
	if err == nil {
		err = s.usable(r.Ref())
	}
	if err != nil {
		return Container{}, err
	}
	if c.body.Attach != nil {
		return Container{}, fmt.Errorf("roll back container %q: it is attached as %s: %w; detach it first",
			name, describe(*c.body.Attach), ErrInUse)
	}
	ids, err := s.cat.Alloc(ctx, 1)
	if err != nil {
		return Container{}, s.wrap(err)
	}
	err = s.step(ctx, catalog.Step{Creates: []catalog.Create{{ID: ids[0], Origin: r.Device}}, Apply: func(tx *catalog.Tx) error {
		cur, err := get[containerBody](tx, kindContainer, name)
		if err != nil {
			return err
		}
		old := cur.Device
		cur.Device = ids[0]
		cur.body.SizeBytes = r.body.SizeBytes
		cur.body.GuestOwned = cur.body.GuestOwned || r.body.GuestOwned
		cur.body.OwnBlocks, cur.body.OwnStale = 0, false
		c = cur
		if err := put(tx, cur); err != nil {
			return err
		}
		return tx.Remove(removalOf(c.Ref()+" before its rollback", old, nil, 0))
	}}, nil, nil)
	if err != nil {
		return Container{}, fmt.Errorf("roll back container %q to %q: %w", name, snap, err)
	}
	s.hub.emit(EventRollback, c.Ref(), snap)
	return s.describeContainer(c), nil
}
