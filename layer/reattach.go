package layer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"mica/layer/catalog"
	"mica/thin"
)

// A leaving is the device of a container that was removed while somebody held it.
type leaving struct {
	object string
	dev    thin.DevID
	id     string // attachment
	since  time.Time
	// guarded by Store.mu
	attempts int
	lastErr  string
}

// reattach brings back what a predecessor left: nodes that still exist are served again (their
// users notice a pause), others of this boot are made anew, freezes are taken back, and what
// belongs to nobody is dropped.
func (s *Store) reattach(ctx context.Context) error {
	survivors, err := s.o.Exporter.Survivors(ctx)
	if err != nil {
		return fmt.Errorf("nodes of a predecessor: %w", err)
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	each := func(fn func()) {
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer wg.Done()
			defer func() { <-slots }()
			fn()
		}()
	}
	var mu sync.Mutex
	known := map[string]bool{}
	owns := map[string]int64{}
	if s.cat.ReadOnly() == nil {
		// Before anything is served: from now on the counts in the records are of the past.
		err := s.noteOwn(ctx, func(b *containerBody) bool {
			owns[b.ID] = -1
			if !b.OwnStale {
				owns[b.ID] = b.OwnBlocks
			}
			change := !b.OwnStale && !b.Attach.ReadOnly
			b.OwnStale = b.OwnStale || change
			return change
		})
		if err != nil {
			return err
		}
	}
	// With a read-only catalog survivors are still served: somebody may have them mounted.
	err = list(s, kindContainer, "", "", func(c record[containerBody]) (bool, error) {
		a := c.body.Attach
		if a == nil {
			return true, nil
		}
		adopt := slices.Contains(survivors, c.body.ID)
		known[c.body.ID] = adopt
		if s.usable(c.Ref()) != nil || !adopt && (a.Boot != s.boot || s.cat.ReadOnly() != nil) {
			known[c.body.ID] = false
			return true, nil
		}
		each(func() {
			own, ok := owns[c.body.ID]
			if !ok {
				own = -1
			}
			_, err := s.openLive(ctx, c.body.ID, c.Device, c.body.SizeBytes, own, *a, adopt && a.As == AsBlock)
			if err != nil {
				s.log.Error("attachment did not come back", "container", c.Key, "adopted", adopt, "err", err)
				mu.Lock()
				known[c.body.ID] = false
				mu.Unlock()
			}
		})
		return true, nil
	})
	if err == nil {
		err = s.reattachSnaps(ctx, survivors, func(id string, served bool) {
			mu.Lock()
			defer mu.Unlock()
			known[id] = served
		}, each)
	}
	if err != nil {
		wg.Wait()
		return err
	}
	for _, p := range s.cat.Pending() {
		var b removalBody
		if len(p.Body) == 0 || json.Unmarshal(p.Body, &b) != nil || !slices.Contains(survivors, b.ID) {
			continue
		}
		known[b.ID] = true
		each(func() {
			_, err := s.openLive(ctx, b.ID, p.Device, b.SizeBytes, -1, attachBody{As: AsBlock, ReadOnly: b.ReadOnly}, true)
			if err != nil {
				s.log.Error("node of a removed container", "object", p.Object, "err", err)
				mu.Lock()
				known[b.ID] = false
				mu.Unlock()
				return
			}
			s.mu.Lock()
			s.leaving[p.Device] = &leaving{object: p.Object, dev: p.Device, id: b.ID, since: p.Since}
			s.mu.Unlock()
		})
	}
	wg.Wait()
	err = s.thawAll(ctx)
	for _, name := range survivors {
		if known[name] {
			continue
		}
		if derr := s.o.Exporter.Drop(ctx, name); derr != nil {
			s.log.Error("drop a node that belongs to nobody", "attachment", name, "err", derr)
		}
	}
	return err
}

// closeExports stops serving, leaving nodes to the exporter's holder, and closes the devices.
func (s *Store) closeExports() error {
	s.mu.Lock()
	all := make([]*live, 0, len(s.live))
	for _, l := range s.live {
		all = append(all, l)
	}
	s.mu.Unlock()
	ctx, cancel := s.short(context.Background())
	defer cancel()
	var errs []error
	for _, l := range all {
		if l.n != nil {
			errs = append(errs, l.n.Close(ctx))
		}
	}
	errs = append(errs, s.o.Exporter.Close())
	counts := map[string]int64{}
	for _, l := range all {
		// What was counted is kept, so that the next start need not count again.
		if own := l.ownBlocks(); own >= 0 && !l.ro {
			counts[l.id] = own
		}
		if !l.ro {
			errs = append(errs, l.t.Flush())
		}
		errs = append(errs, l.closeDevice())
	}
	if s.cat.ReadOnly() == nil && len(counts) > 0 {
		keep := func(b *deviceBody) bool {
			own, ok := counts[b.ID]
			if ok {
				b.OwnBlocks, b.OwnStale = own, false
			}
			return ok
		}
		errs = append(errs, s.noteOwn(ctx, func(b *containerBody) bool { return keep(&b.deviceBody) }))
		errs = append(errs, s.noteOwnSnaps(ctx, func(b *snapBody) bool { return keep(&b.deviceBody) }))
	}
	return errors.Join(errs...)
}

// noteOwn changes what the records of attached containers say about their own blocks.
func (s *Store) noteOwn(ctx context.Context, fn func(*containerBody) bool) error {
	return s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		var changed []record[containerBody]
		err := tx.Each(kindContainer, "", "", func(r catalog.Record) (bool, error) {
			c, err := decode[containerBody](r)
			if err == nil && c.body.Attach != nil && fn(&c.body) {
				changed = append(changed, c)
			}
			return true, err
		})
		for _, c := range changed {
			if err == nil {
				err = put(tx, c)
			}
		}
		return err
	}}, nil, nil)
}

// removalOf is the intent to delete a container's device, with what the next start must know if
// its node is still there.
func removalOf(object string, dev thin.DevID, l *live, size int64) catalog.Removal {
	m := catalog.Removal{Device: dev, Object: object, Since: now()}
	if l != nil && l.a != nil {
		m.Body, _ = json.Marshal(removalBody{ID: l.id, SizeBytes: size, ReadOnly: l.ro})
	}
	return m
}
