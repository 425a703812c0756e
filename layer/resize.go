package layer

import (
	"context"
	"errors"
	"fmt"
)

// Resize is described at API.
//
// The record gets the new size first: a device that is longer than its file system is fine, the
// other way round it could not be mounted after a crash.
func (s *Store) Resize(ctx context.Context, name string, sizeBytes int64) (Container, error) {
	if err := checkSize(sizeBytes); err != nil {
		return Container{}, err
	}
	c, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return Container{}, err
	}
	defer unlock()
	if err := s.usable(c.Ref()); err != nil {
		return Container{}, err
	}
	old := c.body.SizeBytes
	if sizeBytes < old {
		return Container{}, fmt.Errorf("resize container %q: %w size of %d bytes: it has %d, and cannot shrink", name, ErrInvalid, sizeBytes, old)
	}
	if sizeBytes == old {
		return s.describeContainer(c), nil
	}
	set := func(ctx context.Context, n int64) (record[containerBody], error) {
		return s.editContainer(ctx, name, func(b *containerBody) error {
			b.SizeBytes = n
			b.OwnStale = true // until it is counted
			return nil
		})
	}
	known := !c.body.OwnStale && s.liveOf(c.body.ID) == nil
	if c, err = set(ctx, sizeBytes); err != nil {
		return Container{}, err
	}
	change := int64(0)
	if err := s.growDevice(ctx, c, &change); err != nil {
		cctx, cancel := s.short(ctx)
		defer cancel()
		err = fmt.Errorf("resize container %q to %d bytes: %w", name, sizeBytes, err)
		if l := s.liveOf(c.body.ID); l != nil {
			err = errors.Join(err, l.t.Resize(old)) // its node stays as it is: nodes do not shrink
		}
		if _, serr := set(cctx, old); serr != nil {
			err = errors.Join(err, serr)
		}
		return Container{}, err
	}
	if known && change >= 0 {
		c, err = s.editContainer(ctx, name, func(b *containerBody) error {
			b.setOwn(b.OwnBlocks + change)
			return nil
		})
		if err != nil {
			return Container{}, err
		}
	}
	s.hub.emit(EventResize, c.Ref(), fmt.Sprintf("%d bytes", sizeBytes))
	return s.describeContainer(c), nil
}

// growDevice makes the device, its node and its file system as large as the record says. change
// gets the own blocks that came, of a container that is not attached.
func (s *Store) growDevice(ctx context.Context, c record[containerBody], change *int64) error {
	l := s.liveOf(c.body.ID)
	if l == nil {
		if c.body.GuestOwned {
			return nil
		}
		return s.work(ctx, c.Device, c.body.SizeBytes, false, func(w *work) error {
			return s.files.Grow(ctx, w.node(), c.body.FSType)
		}, change)
	}
	if err := l.t.Resize(c.body.SizeBytes); err != nil {
		return err
	}
	if l.a == nil {
		return nil // an NBD client sees it when it connects again
	}
	if err := l.a.Resize(ctx); err != nil {
		return err
	}
	if c.body.GuestOwned || l.ro {
		return nil
	}
	return s.files.Grow(ctx, l.a.Node(), c.body.FSType)
}
