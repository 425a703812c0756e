package layer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"mica/layer/catalog"
	"mica/thin"
)

// Views of one parent share one read-only export, which costs the pool no commit. It has a record
// of its own, because it may outlive them: somebody may still have it mounted when the last view
// is removed. Its key is the device's number: there is one at most.
type exportBody struct {
	ID        string     `json:"id"` // of the attachment
	Device    thin.DevID `json:"device"`
	SizeBytes int64      `json:"size_bytes"`
	FSType    string     `json:"fs_type"`
	Owner     string     `json:"owner"`
	Boot      string     `json:"boot"`
	Object    string     `json:"object"` // what it shows, for people
	Since     time.Time  `json:"since"`
}

func exportKey(dev thin.DevID) string { return strconv.FormatUint(uint64(dev), 10) }

// exportLock is the name of the lock of a device's shared export. Innermost.
func exportLock(dev thin.DevID) string { return "view/" + exportKey(dev) }

// View makes a read-only look at a committed snapshot.
func (n *SnapStore) View(ctx context.Context, o SnapSpec) (SnapMount, error) {
	m, err := n.view(ctx, o)
	if err != nil {
		return m, fmt.Errorf("view %q: %w", shorten(o.Name), err)
	}
	return m, nil
}

func (n *SnapStore) view(ctx context.Context, o SnapSpec) (m SnapMount, err error) {
	s := n.s
	if err := s.writable(); err != nil {
		return m, err
	}
	if err := errors.Join(checkSnapName(o.Name), checkSnapLabels(o.Labels)); err != nil {
		return m, err
	}
	src, release, err := n.holdParent(ctx, o.Parent)
	if err != nil {
		return m, err
	}
	defer release()
	unlock, err := s.locks.lock(ctx, n.ref(o.Name), exportLock(src.dev))
	if err != nil {
		return m, err
	}
	defer unlock()
	if err := n.mustBeNew(o.Name); err != nil {
		return m, err
	}
	ex, err := s.exportOf(src.dev)
	fresh := errors.Is(err, ErrNotFound)
	if err != nil && !fresh {
		return m, err
	}
	if fresh {
		ex = record[exportBody]{Record: catalog.Record{Kind: kindExport, Key: exportKey(src.dev)}, body: exportBody{Device: src.dev,
			SizeBytes: src.body.SizeBytes, FSType: src.body.FSType, Owner: n.Owner(), Boot: s.boot, Object: src.ref, Since: snapNow()}}
	}
	rec := record[snapBody]{Record: catalog.Record{Kind: kindSnap, Key: n.key(o.Name), Parent: src.ref}}
	rec.body = snapBody{Kind: SnapView, ParentName: o.Parent, Updated: snapNow(), Attach: &attachBody{As: AsBlock, ReadOnly: true, Boot: s.boot},
		deviceBody: deviceBody{SizeBytes: src.body.SizeBytes, FSType: src.body.FSType, Owner: n.Owner(), Labels: o.Labels,
			GuestOwned: src.body.GuestOwned}}
	rec.body.Created = rec.body.Updated
	err = s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		if fresh {
			var err error
			if ex.body.ID, err = s.newID(tx); err != nil {
				return err
			}
			if err := put(tx, ex); err != nil {
				return err
			}
		}
		rec.body.ID = ex.body.ID
		return put(tx, rec)
	}}, []catalog.Record{rec.Record}, nil)
	if err != nil {
		return m, err
	}
	s.useExport(src.dev, 1)
	if err := s.openExport(ctx, ex); err != nil {
		cctx, cancel := s.short(ctx)
		defer cancel()
		return m, errors.Join(fmt.Errorf("attach: %w", err), n.dropView(cctx, rec, src.dev))
	}
	s.hub.emit(EventCreate, rec.Ref(), o.Parent)
	return n.snapMount(rec)
}

// exportOf reads the record of a device's shared export.
func (s *Store) exportOf(dev thin.DevID) (record[exportBody], error) {
	return load[exportBody](s, kindExport, exportKey(dev))
}

// useExport counts the views of a device.
func (s *Store) useExport(dev thin.DevID, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.viewers[dev] += n; s.viewers[dev] <= 0 {
		delete(s.viewers, dev)
	}
}

// openExport makes a shared export live if it is not. The caller holds its lock.
func (s *Store) openExport(ctx context.Context, ex record[exportBody]) error {
	if l := s.liveOf(ex.body.ID); l != nil {
		if !l.dead.Load() {
			return nil
		}
		if err := s.endLive(ctx, l); err != nil {
			return fmt.Errorf("its node was taken away: %w", err)
		}
	}
	return s.openShared(ctx, ex.body, false)
}

func (s *Store) openShared(ctx context.Context, b exportBody, adopt bool) error {
	_, err := s.openNoting(ctx, b.ID, b.Device, b.SizeBytes, 0, attachBody{As: AsBlock, ReadOnly: true}, adopt, 0, exportLock(b.Device), nil)
	return err
}

// viewAgain brings a view's node back. The caller holds the view's lock.
func (n *SnapStore) viewAgain(ctx context.Context, r record[snapBody]) (SnapMount, error) {
	s := n.s
	ex, err := s.exportByID(r.body.ID)
	if err != nil {
		return SnapMount{}, err
	}
	dev := ex.body.Device
	unlock, err := s.locks.lock(ctx, exportLock(dev))
	if err != nil {
		return SnapMount{}, err
	}
	defer unlock()
	if ex, err = s.exportOf(dev); err != nil {
		return SnapMount{}, err
	}
	if err := s.openExport(ctx, ex); err != nil {
		return SnapMount{}, fmt.Errorf("attach: %w", err)
	}
	if ex.body.Boot != s.boot {
		ex.body.Boot = s.boot
		err := s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error { return put(tx, ex) }}, nil, nil)
		if err != nil {
			return SnapMount{}, err
		}
	}
	return n.snapMount(r)
}

// dropView takes a view's record away, and the export with the last one. The caller holds the
// view's lock and the export's. An export that is busy is left to the background.
func (n *SnapStore) dropView(ctx context.Context, r record[snapBody], dev thin.DevID) error {
	s := n.s
	err := s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		return tx.Delete(kindSnap, r.Key)
	}}, nil, []catalog.Record{r.Record})
	if err != nil {
		return err
	}
	s.useExport(dev, -1)
	if err := s.endExport(ctx, dev); err != nil {
		s.log.Info("a view was removed while in use", "view", r.Key, "err", err)
		s.noteIdleExport(dev, r.Ref(), err)
	}
	return nil
}

// endExport takes a device's shared export away if it has no views. The caller holds its lock.
func (s *Store) endExport(ctx context.Context, dev thin.DevID) error {
	s.mu.Lock()
	used := s.viewers[dev] > 0
	s.mu.Unlock()
	if used {
		return nil
	}
	ex, err := s.exportOf(dev)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if l := s.liveOf(ex.body.ID); l != nil {
		if err := s.endLiveSoon(ctx, l); err != nil {
			return err
		}
	}
	err = s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		return tx.Delete(kindExport, ex.Key)
	}}, nil, nil)
	if err == nil {
		s.cat.Retry(dev) // the device may be on its way out
	}
	return err
}

// noteIdleExport leaves an export without views to the background.
func (s *Store) noteIdleExport(dev thin.DevID, object string, cause error) {
	s.mu.Lock()
	if s.idle[dev] == nil {
		s.idle[dev] = &leaving{object: object, dev: dev, since: now()}
	}
	s.idle[dev].lastErr = cause.Error()
	s.mu.Unlock()
	signalLoop(s.wake)
}

// endIdleExports tries to take away exports that no view needs any more; true if some are left.
func (s *Store) endIdleExports(ctx context.Context) bool {
	s.mu.Lock()
	devs := make([]thin.DevID, 0, len(s.idle))
	for dev := range s.idle {
		devs = append(devs, dev)
	}
	s.mu.Unlock()
	slices.Sort(devs)
	left := false
	for _, dev := range devs {
		err := s.endIdleExport(ctx, dev)
		s.mu.Lock()
		if e := s.idle[dev]; err == nil || s.viewers[dev] > 0 {
			delete(s.idle, dev)
		} else if e != nil {
			e.attempts++
			e.lastErr = err.Error()
			left = true
		}
		s.mu.Unlock()
	}
	return left
}

func (s *Store) endIdleExport(ctx context.Context, dev thin.DevID) error {
	cctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	unlock, err := s.locks.lock(cctx, exportLock(dev))
	if err != nil {
		return err
	}
	defer unlock()
	return s.endExport(cctx, dev)
}
