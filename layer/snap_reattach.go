package layer

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"mica/layer/catalog"
	"mica/thin"
)

// indexSnapsLocked reads from the catalog what is kept in memory about snapshots. Called by index, under
// Store.mu.
func (s *Store) indexSnapsLocked(tx *catalog.Tx) error {
	devs := map[string]thin.DevID{} // export -> device
	err := tx.Each(kindExport, "", "", func(r catalog.Record) (bool, error) {
		ex, err := decode[exportBody](r)
		devs[ex.body.ID] = ex.body.Device
		return err == nil, err
	})
	if err != nil {
		return err
	}
	return tx.Each(kindSnap, "", "", func(r catalog.Record) (bool, error) {
		d, err := decode[snapBody](r)
		if err != nil {
			return false, err
		}
		s.refs[r.Parent]++
		if d.body.ChainID != "" {
			s.leases[d.body.ChainID]++
		}
		if d.body.Kind == SnapView {
			s.viewers[devs[d.body.ID]]++
		}
		return true, nil
	})
}

// exportByID finds a shared export by its attachment.
func (s *Store) exportByID(id string) (found record[exportBody], err error) {
	err = list(s, kindExport, "", "", func(ex record[exportBody]) (bool, error) {
		if ex.body.ID == id {
			found = ex
		}
		return found.Key == "", nil
	})
	if err == nil && found.Key == "" {
		err = fmt.Errorf("export %s: %w", id, ErrNotFound)
	}
	return found, err
}

// reattachSnaps brings back the nodes of snapshots: see reattach, which gives the survivors, keeps
// note of which are known, and runs the work. Before anything is served, records are marked as
// being written to.
func (s *Store) reattachSnaps(ctx context.Context, survivors []string, note func(id string, served bool), each func(func())) error {
	owns := map[string]int64{}
	if s.cat.ReadOnly() == nil {
		err := s.noteOwnSnaps(ctx, func(b *snapBody) bool {
			owns[b.ID] = -1
			if !b.OwnStale {
				owns[b.ID] = b.OwnBlocks
			}
			change := !b.OwnStale
			b.OwnStale = true
			return change
		})
		if err != nil {
			return err
		}
	}
	err := list(s, kindSnap, "", "", func(r record[snapBody]) (bool, error) {
		a := r.body.Attach
		if a == nil || r.body.Kind != SnapActive {
			return true, nil
		}
		adopt := slices.Contains(survivors, r.body.ID)
		note(r.body.ID, adopt)
		if s.usable(r.Ref()) != nil || !adopt && (a.Boot != s.boot || s.cat.ReadOnly() != nil) {
			note(r.body.ID, false)
			return true, nil
		}
		each(func() {
			own, ok := owns[r.body.ID]
			if !ok {
				own = -1
			}
			if _, err := s.openSnap(ctx, r, own, adopt, 0); err != nil {
				s.log.Error("node did not come back", "snapshot", r.Key, "adopted", adopt, "err", err)
				note(r.body.ID, false)
			}
		})
		return true, nil
	})
	if err != nil {
		return err
	}
	return s.reattachExports(ctx, survivors, note, each)
}

// reattachExports brings back the shared exports of views.
func (s *Store) reattachExports(ctx context.Context, survivors []string, note func(id string, served bool), each func(func())) error {
	var gone []record[exportBody]
	err := list(s, kindExport, "", "", func(ex record[exportBody]) (bool, error) {
		b := ex.body
		adopt := slices.Contains(survivors, b.ID)
		note(b.ID, adopt)
		s.mu.Lock()
		used := s.viewers[b.Device] > 0
		s.mu.Unlock()
		if !adopt && !used {
			gone = append(gone, ex)
			return true, nil
		}
		if !adopt && (b.Boot != s.boot || s.cat.ReadOnly() != nil) {
			return true, nil
		}
		each(func() {
			if err := s.openShared(ctx, b, adopt); err != nil {
				s.log.Error("node of views did not come back", "object", b.Object, "adopted", adopt, "err", err)
				note(b.ID, false)
				return
			}
			if !used {
				s.noteIdleExport(b.Device, b.Object, errors.New("its views were removed while somebody had it mounted"))
			}
		})
		return true, nil
	})
	if err != nil || len(gone) == 0 || s.cat.ReadOnly() != nil {
		return err
	}
	return s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		for _, ex := range gone {
			if err := tx.Delete(kindExport, ex.Key); err != nil {
				return err
			}
		}
		return nil
	}}, nil, nil)
}

// noteOwnSnaps changes what the records of active snapshots say about their own blocks.
func (s *Store) noteOwnSnaps(ctx context.Context, fn func(*snapBody) bool) error {
	return s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		var changed []record[snapBody]
		err := tx.Each(kindSnap, "", "", func(r catalog.Record) (bool, error) {
			d, err := decode[snapBody](r)
			if err == nil && d.body.Kind == SnapActive && fn(&d.body) {
				changed = append(changed, d)
			}
			return true, err
		})
		for _, d := range changed {
			if err == nil {
				err = put(tx, d)
			}
		}
		return err
	}}, nil, nil)
}
