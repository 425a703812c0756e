package layer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"mica/layer/catalog"
)

// maxTTL bounds times to live: 100 years.
const maxTTL = 100 * 365 * 24 * time.Hour

// Create is described at API.
func (s *Store) Create(ctx context.Context, o CreateOptions) (Container, bool, error) {
	if err := s.writable(); err != nil {
		return Container{}, false, err
	}
	if o.Owner == "" {
		o.Owner = OwnerMica
	}
	if err := errors.Join(checkName("container", o.Name), checkImageName(o.Image), checkLabels(o.Labels), checkTTL(o.TTL)); err != nil {
		return Container{}, false, err
	}
	unlock, err := s.locks.lock(ctx, kindContainer+"/"+o.Name)
	if err != nil {
		return Container{}, false, err
	}
	defer unlock()
	old, err := s.containerRecord(o.Name)
	if err == nil {
		b := old.body
		if b.Image == o.Image && b.AskedSize == o.SizeBytes && maps.Equal(b.Labels, o.Labels) && b.TTL == o.TTL && b.Owner == o.Owner {
			return s.describeContainer(old), false, nil
		}
		return Container{}, false, fmt.Errorf("container %q %w, %s", o.Name, ErrExists, b.differs(o))
	}
	if !errors.Is(err, ErrNotFound) {
		return Container{}, false, err
	}
	soon := s.cat.Expect()
	defer soon.End()
	img, err := load[imageBody](s, kindImage, o.Image)
	if err != nil {
		return Container{}, false, err
	}
	l, release, err := s.holdLayer(ctx, img.body.ChainID)
	if err != nil {
		return Container{}, false, fmt.Errorf("image %q: %w", o.Image, err)
	}
	defer release()
	size := l.body.SizeBytes
	if o.SizeBytes != 0 {
		if err := checkSize(o.SizeBytes); err != nil {
			return Container{}, false, err
		}
		if o.SizeBytes < size {
			return Container{}, false, fmt.Errorf("container %q: %w size of %d bytes: the image has %d", o.Name, ErrInvalid, o.SizeBytes, size)
		}
		size = o.SizeBytes
	}
	rec := record[containerBody]{Record: catalog.Record{Kind: kindContainer, Key: o.Name, Parent: l.Ref()}}
	rec.body = containerBody{Image: o.Image, ChainID: l.Key, AskedSize: o.SizeBytes, deviceBody: deviceBody{
		SizeBytes: size, FSType: l.body.FSType, Owner: o.Owner, Labels: o.Labels, Created: now(), GuestOwned: l.body.GuestOwned}}
	rec.body.setTTL(o.TTL)
	var grown func(own int64)
	if size > l.body.SizeBytes && !l.body.GuestOwned {
		grown = rec.body.setOwn
	}
	if err := makeDevice(ctx, s, &rec, &rec.body.deviceBody, l.Device, soon, grown); err != nil {
		return Container{}, false, fmt.Errorf("create container %q: %w", o.Name, err)
	}
	s.noteExpiry(o.Name, rec.body.Expires)
	s.hub.emit(EventCreate, rec.Ref(), o.Image)
	return s.describeContainer(rec), true, nil
}

// differs says in what a container is not the one that is asked for.
func (c *containerBody) differs(o CreateOptions) string {
	var list []string
	say := func(differ bool, format string, a ...any) {
		if differ {
			list = append(list, fmt.Sprintf(format, a...))
		}
	}
	sized := func(n int64) string {
		if n == 0 {
			return "the size of its image"
		}
		return fmt.Sprintf("%d bytes", n)
	}
	say(c.Image != o.Image, "with image %q, not %q", c.Image, o.Image)
	say(c.AskedSize != o.SizeBytes, "made with %s, not %s", sized(c.AskedSize), sized(o.SizeBytes))
	say(!maps.Equal(c.Labels, o.Labels), "with labels %v, not %v", printable(c.Labels), printable(o.Labels))
	say(c.TTL != o.TTL, "with time to live %v, not %v", c.TTL, o.TTL)
	say(c.Owner != o.Owner, "owned by %q, not %q", c.Owner, o.Owner)
	return strings.Join(list, "; ")
}

// printable are labels as somebody writes them: k=v, in order.
func printable(labels map[string]string) []string {
	list := []string{}
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		list = append(list, shorten(k+"="+labels[k]))
	}
	return list
}

func checkTTL(d time.Duration) error {
	if d < 0 || d > maxTTL {
		return fmt.Errorf("%w time to live %v", ErrInvalid, d)
	}
	return nil
}

func (c *containerBody) setTTL(d time.Duration) {
	c.TTL, c.Expires = d, nil
	if d > 0 {
		t := now().Add(d)
		c.Expires = &t
	}
}

func (s *Store) describeContainer(c record[containerBody]) Container {
	b := c.body
	l := s.liveOf(b.ID)
	out := Container{Name: c.Key, ID: b.ID, Image: b.Image, ChainID: b.ChainID, Device: c.Device, SizeBytes: b.SizeBytes,
		FSType: b.FSType, Owner: b.Owner, Labels: b.Labels, Created: b.Created, TTL: b.TTL, Expires: b.Expires,
		GuestOwned: b.GuestOwned, UsedBytes: s.ownBytes(c.Record, b.deviceBody, l), Broken: s.cat.Broken(c.Ref())}
	s.mu.Lock()
	out.Snapshots = s.children[c.Key]
	s.mu.Unlock()
	if b.Attach != nil {
		a := s.attachment(c, l)
		out.Attachment = &a
	}
	return out
}

// Containers is described at API.
func (s *Store) Containers(ctx context.Context, f Filter) ([]Container, error) {
	var recs []record[containerBody]
	err := list(s, kindContainer, f.Prefix, f.Cursor, func(c record[containerBody]) (bool, error) {
		if f.match(c.body.Owner, c.body.Labels, c.body.Image) {
			recs = append(recs, c)
		}
		return f.Limit == 0 || len(recs) < f.Limit, ctx.Err()
	})
	var out []Container
	for _, c := range recs {
		out = append(out, s.describeContainer(c))
	}
	if err != nil {
		return out, err
	}
	snaps, err := s.snapContainers(ctx, f)
	return mergeContainers(out, snaps, f.Limit), err
}

// Container is described at API.
func (s *Store) Container(ctx context.Context, name string) (Container, error) {
	c, err := s.containerRecord(name)
	if err != nil {
		return Container{}, err
	}
	return s.describeContainer(c), nil
}

// Update is described at API.
func (s *Store) Update(ctx context.Context, name string, o UpdateOptions) (Container, error) {
	for k, v := range o.Labels {
		if v != nil {
			if err := checkLabel(k, *v); err != nil {
				return Container{}, err
			}
		}
	}
	if o.TTL != nil {
		if err := checkTTL(*o.TTL); err != nil {
			return Container{}, err
		}
	}
	_, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return Container{}, err
	}
	defer unlock()
	c, err := s.editContainer(ctx, name, func(c *containerBody) error {
		labels := maps.Clone(c.Labels)
		for k, v := range o.Labels {
			if v == nil {
				delete(labels, k)
				continue
			}
			if labels == nil {
				labels = map[string]string{}
			}
			labels[k] = *v
		}
		if len(labels) == 0 {
			labels = nil
		}
		c.Labels = labels
		if o.TTL != nil {
			c.setTTL(*o.TTL)
		}
		return checkLabels(labels)
	})
	if err != nil {
		return Container{}, err
	}
	s.noteExpiry(name, c.body.Expires)
	s.hub.emit(EventUpdate, c.Ref(), "")
	return s.describeContainer(c), nil
}

// Remove is described at API.
func (s *Store) Remove(ctx context.Context, name string, o RemoveOptions) error {
	c, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return err
	}
	defer unlock()
	var snaps []record[snapshotBody]
	err = list(s, kindSnapshot, name+"/", "", func(r record[snapshotBody]) (bool, error) {
		snaps = append(snaps, r)
		return true, nil
	})
	if err != nil {
		return err
	}
	if len(snaps) > 0 && !o.Snapshots {
		return fmt.Errorf("container %q has %d snapshots: %w", name, len(snaps), ErrInUse)
	}
	l := s.liveOf(c.body.ID)
	if l != nil {
		err := s.endLive(ctx, l)
		switch {
		case err == nil:
			l = nil
		case s.liveOf(c.body.ID) == nil:
			s.log.Warn("detach of a container that is removed", "container", name, "err", err)
			l = nil
		case !errors.Is(err, ErrBusy) || !o.Deferred:
			return fmt.Errorf("remove container %q: %w", name, err)
		}
	}
	ref := c.Ref()
	dropped := []catalog.Record{c.Record}
	for _, r := range snaps {
		dropped = append(dropped, r.Record)
	}
	err = s.step(ctx, catalog.Step{Apply: func(tx *catalog.Tx) error {
		for _, r := range dropped {
			if err := tx.Delete(r.Kind, r.Key); err != nil {
				return err
			}
		}
		for _, r := range snaps {
			if err := tx.Remove(removalOf(r.Ref(), r.Device, nil, 0)); err != nil {
				return err
			}
		}
		return tx.Remove(removalOf(ref, c.Device, l, c.body.SizeBytes))
	}}, nil, dropped)
	if err != nil {
		if l == nil && c.body.Attach != nil {
			// Still there, but no longer attached.
			cctx, cancel := s.short(ctx)
			defer cancel()
			err = errors.Join(err, s.detachLocked(cctx, c))
		}
		return fmt.Errorf("remove container %q: %w", name, err)
	}
	if l != nil {
		s.mu.Lock()
		s.leaving[c.Device] = &leaving{object: ref, dev: c.Device, id: l.id, since: now()}
		s.mu.Unlock()
		signalLoop(s.wake)
	}
	s.hub.emit(EventRemove, ref, "")
	s.collectAfter(ctx, c.body.ChainID)
	return nil
}
