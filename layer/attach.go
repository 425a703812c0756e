package layer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"mica/engine"
	"mica/export"
	"mica/layer/catalog"
	"mica/thin"
)

// A live attachment is a container's device that is open and exported. It is made, changed and
// ended under the container's lock, but for its end by somebody else (watchLoop).
type live struct {
	id   string
	dev  thin.DevID
	as   As
	ro   bool
	t    engine.Thin
	a    export.Attachment // AsBlock
	n    NBDExport         // AsNBD
	own  int64             // own blocks when it was opened; -1: not known
	once sync.Once         // closes t
	end  chan struct{}     // closed by endLive, so that watchLoop does not take it for an accident
	mu   sync.Mutex        // held while endLive detaches
	dead atomic.Bool       // the node was taken away by somebody else
	// noted watches writes that fail; nil if nobody wants to know
	noted *noting
	snap  string // of a snapshot: the name of the lock that it is made and ended under; guarded by Store.mu
}

func (l *live) closeDevice() (err error) {
	l.once.Do(func() { err = l.t.Close() })
	return err
}

// ownBlocks returns the device's own blocks now, -1 if they must be counted.
func (l *live) ownBlocks() int64 {
	if c, ok := l.t.(ownCounter); ok && l.own >= 0 {
		return l.own + c.OwnChange()
	}
	return -1
}

func (s *Store) liveOf(id string) *live {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live[id]
}

// openLive opens a device and exports it under id. adopt: a predecessor's node is still there.
func (s *Store) openLive(ctx context.Context, id string, dev thin.DevID, size, own int64, a attachBody, adopt bool) (*live, error) {
	return s.openNoting(ctx, id, dev, size, own, a, adopt, 0, "", nil)
}

// openNoting is openLive for a snapshot; dirty bounds what waits for write-back, bytes (0: the kernel's own bound);
// lost, if not nil, is told of the first write that fails.
func (s *Store) openNoting(ctx context.Context, id string, dev thin.DevID, size, own int64, a attachBody, adopt bool, dirty int64, snap string, lost func(error)) (*live, error) {
	l := &live{id: id, dev: dev, as: a.As, ro: a.ReadOnly, own: own, end: make(chan struct{})}
	var err error
	l.t, err = s.pool.Open(ctx, dev, engine.OpenOptions{SizeBytes: size, ReadOnly: a.ReadOnly})
	if err != nil {
		return nil, err
	}
	served := l.t
	if lost != nil {
		l.noted = &noting{Thin: l.t, lost: lost}
		served = l.noted
		if n, ok := l.t.(export.Noder); ok {
			served = notedNode{l.noted, n}
		}
	}
	switch {
	case a.As == AsNBD && s.o.NBD == nil:
		err = fmt.Errorf("%w: no NBD server", ErrInvalid)
	case a.As == AsNBD:
		l.n, err = s.o.NBD.Serve(ctx, id, served, NBDOptions{ReadOnly: a.ReadOnly, TCP: a.TCP})
	case adopt:
		l.a, err = s.o.Exporter.Adopt(ctx, id, served)
	default:
		l.a, err = s.o.Exporter.Attach(ctx, id, served, export.AttachOptions{ReadOnly: a.ReadOnly, DirtyBytes: dirty})
	}
	if err != nil {
		l.closeDevice()
		return nil, err
	}
	s.mu.Lock()
	l.snap = snap
	s.live[id] = l
	s.mu.Unlock()
	if l.a != nil {
		s.background(func(ctx context.Context) { s.watchLoop(ctx, l) })
	}
	return l, nil
}

// watchLoop notices that a node was taken away by somebody else, and clears away what is left of
// it. The attachment stays wanted: the next Attach makes a new node.
func (s *Store) watchLoop(ctx context.Context, l *live) {
	select {
	case <-ctx.Done():
		return
	case <-l.end:
		return
	case <-l.a.Done():
	}
	l.mu.Lock()
	select {
	case <-l.end: // it was our own Detach
		l.mu.Unlock()
		return
	default:
	}
	l.dead.Store(true)
	l.mu.Unlock()
	s.log.Warn("a node was taken away", "attachment", l.id, "device", l.dev)
	s.hub.emit(EventDetach, "attachment/"+l.id, "the node was taken away by somebody else")
	for ctx.Err() == nil && s.endLive(ctx, l) != nil {
		sleep(ctx, time.Second)
	}
}

// endLive takes a live attachment away. ErrBusy, and the end of ctx, leave it as it is; after
// other errors it may be gone all the same (it is no longer in s.live), without all of its data.
func (s *Store) endLive(ctx context.Context, l *live) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.end: // the background was quicker
		return nil
	default:
	}
	var derr error
	if l.n != nil {
		for end := time.Now().Add(2 * time.Second); l.n.Clients() > 0; {
			if time.Now().After(end) || !sleep(ctx, 20*time.Millisecond) {
				return fmt.Errorf("%w: %d NBD clients are connected to %s", ErrBusy, l.n.Clients(), l.n.URI())
			}
		}
		if err := l.n.Close(ctx); err != nil {
			return err
		}
	} else if derr = l.a.Detach(ctx); derr != nil {
		select {
		case <-l.a.Done(): // it is gone all the same
			if l.dead.Load() && errors.Is(derr, ErrBusy) {
				return derr // its file system is still mounted, and dead
			}
		default:
			return derr
		}
	}
	close(l.end)
	s.mu.Lock()
	if s.live[l.id] == l {
		delete(s.live, l.id)
	}
	s.mu.Unlock()
	err := derr
	if l.dead.Load() && err != nil {
		s.log.Warn("clearing away a node that was taken away", "attachment", l.id, "err", err)
		err = nil // nobody was promised anything by this node any more
	}
	if !l.ro && err == nil {
		err = l.t.Flush()
	}
	own := l.ownBlocks()
	if cerr := l.closeDevice(); err == nil {
		err = cerr
	}
	l.own = own
	return err
}

// Attach is described at API.
func (s *Store) Attach(ctx context.Context, name string, o AttachOptions) (Attachment, error) {
	if o.As == "" {
		o.As = AsBlock
	}
	if o.As != AsBlock && o.As != AsNBD {
		return Attachment{}, fmt.Errorf("%w kind of attachment %q: want block or nbd", ErrInvalid, o.As)
	}
	if o.TCP && o.As != AsNBD {
		return Attachment{}, fmt.Errorf("%w: an attachment as %s cannot be served over TCP, one as nbd can", ErrInvalid, o.As)
	}
	c, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return Attachment{}, err
	}
	defer unlock()
	want := attachBody{As: o.As, ReadOnly: o.ReadOnly, TCP: o.TCP, Boot: s.boot}
	if old := c.body.Attach; old != nil {
		if old.As != want.As || old.ReadOnly != want.ReadOnly || old.TCP != want.TCP {
			return Attachment{}, fmt.Errorf("container %q is attached as %s: %w; detach it first", name, describe(*old), ErrInUse)
		}
		l := s.liveOf(c.body.ID)
		if l != nil && l.dead.Load() {
			if err := s.endLive(ctx, l); err != nil {
				return Attachment{}, fmt.Errorf("container %q: its node was taken away: %w", name, err)
			}
			l = nil
		}
		if l != nil {
			s.mu.Lock()
			delete(s.expiries, detachKey+name) // it is wanted again
			s.mu.Unlock()
			return s.attachment(c, l), nil
		}
	}
	if err := s.usable(c.Ref()); err != nil {
		return Attachment{}, err
	}
	if c.body.GuestOwned && o.As == AsBlock && !o.TrustGuest {
		return Attachment{}, fmt.Errorf("container %q: %w; the host mounts it only if told to trust the guest", name, ErrGuestOwned)
	}
	guest := o.As == AsNBD && !o.ReadOnly && !o.TrustGuest && !c.body.GuestOwned
	if guest || !o.ReadOnly && !c.body.OwnStale {
		// Before the first write can happen.
		c, err = s.editContainer(ctx, name, func(c *containerBody) error {
			c.GuestOwned = c.GuestOwned || guest
			c.OwnStale = c.OwnStale || !o.ReadOnly
			return nil
		})
		if err != nil {
			return Attachment{}, err
		}
	}
	own := c.body.OwnBlocks
	if c.body.Attach != nil && !o.ReadOnly {
		own = -1 // it was open before, and nobody counted at its end
	}
	l, err := s.openLive(ctx, c.body.ID, c.Device, c.body.SizeBytes, own, want, false)
	if err != nil {
		return Attachment{}, fmt.Errorf("attach container %q: %w", name, err)
	}
	c, err = s.editContainer(ctx, name, func(c *containerBody) error {
		c.Attach = &want
		c.Mounts = nil
		return nil
	})
	if err != nil {
		cctx, cancel := s.short(ctx)
		defer cancel()
		return Attachment{}, errors.Join(err, s.endLive(cctx, l))
	}
	s.hub.emit(EventAttach, c.Ref(), describe(want))
	return s.attachment(c, l), nil
}

func describe(a attachBody) string {
	s := string(a.As)
	if a.TCP {
		s += " over TCP"
	}
	if a.ReadOnly {
		s += ", read-only"
	}
	return s
}

// attachment describes a container's attachment; l is nil if it is not live now.
func (s *Store) attachment(c record[containerBody], l *live) Attachment {
	a := Attachment{As: c.body.Attach.As, ReadOnly: c.body.Attach.ReadOnly, TCP: c.body.Attach.TCP, ID: c.body.ID, FSType: c.body.FSType,
		MountOptions: s.mountOptions(c.body.FSType, c.body.Attach.ReadOnly), Mounts: c.body.Mounts}
	if l != nil && l.a != nil && !l.dead.Load() {
		a.Node, a.Link = l.a.Node(), l.a.Link()
	}
	if l != nil && l.n != nil {
		a.URI = l.n.URI()
	}
	return a
}

// mountOptions are those for a container's node. Without noatime the first read of a file would
// be a write: of its inode, and so of a block of the image. Options of the configuration come
// last and win (relatime).
func (s *Store) mountOptions(fstype string, readOnly bool) []string {
	var o []string
	if readOnly {
		o = append(o, "ro")
	} else {
		o = append(o, "rw", "noatime")
	}
	if fstype == "xfs" {
		o = append(o, "nouuid")
		if readOnly {
			o = append(o, "norecovery")
		}
	} else if readOnly {
		o = append(o, "noload")
	}
	if s.o.Discard && !readOnly {
		o = append(o, "discard")
	}
	return append(o, s.o.MountOptions...)
}

// Detach is described at API.
func (s *Store) Detach(ctx context.Context, name string, o DetachOptions) error {
	c, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return err
	}
	defer unlock()
	err = s.detachLocked(ctx, c)
	if o.Deferred && errors.Is(err, ErrBusy) {
		s.deferDetach(name)
	}
	return err
}

// detachLocked takes a container's attachment away, live or not. The caller holds its lock.
func (s *Store) detachLocked(ctx context.Context, c record[containerBody]) error {
	if c.body.Attach == nil {
		return nil
	}
	own := int64(-1)
	var lost error
	if l := s.liveOf(c.body.ID); l != nil {
		if err := s.endLive(ctx, l); err != nil {
			lost = fmt.Errorf("detach container %q: %w", c.Key, err)
			if s.liveOf(c.body.ID) != nil {
				return lost
			}
		} else {
			own = l.own
		}
	}
	cctx, cancel := s.short(ctx) // the node is gone: the record must follow
	defer cancel()
	_, err := s.editContainer(cctx, c.Key, func(b *containerBody) error {
		if own >= 0 {
			b.OwnBlocks, b.OwnStale = own, false
		}
		b.Attach, b.Mounts = nil, nil
		return nil
	})
	if err != nil {
		return errors.Join(lost, fmt.Errorf("detach container %q: %w", c.Key, err))
	}
	s.hub.emit(EventDetach, c.Ref(), "")
	return lost
}

// NoteMount and ForgetMount are described at API.
func (s *Store) NoteMount(ctx context.Context, name, dir string) error {
	return s.editMounts(ctx, name, func(m []string) []string {
		if slices.Contains(m, dir) {
			return m
		}
		return append(m, dir)
	})
}

func (s *Store) ForgetMount(ctx context.Context, name, dir string) error {
	return s.editMounts(ctx, name, func(m []string) []string {
		return slices.DeleteFunc(m, func(d string) bool { return d == dir })
	})
}

func (s *Store) editMounts(ctx context.Context, name string, fn func([]string) []string) error {
	_, unlock, err := lockRecord[containerBody](ctx, s, kindContainer, name)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = s.editContainer(ctx, name, func(c *containerBody) error {
		if c.Attach == nil {
			return fmt.Errorf("container %q is not attached: %w", name, ErrInvalid)
		}
		if c.Mounts = fn(c.Mounts); len(c.Mounts) > 64 {
			return fmt.Errorf("container %q: %w: mounted in %d places, at most 64 are kept", name, ErrInvalid, len(c.Mounts))
		}
		return nil
	})
	return err
}

// editContainer changes a container's record without touching its device.
func (s *Store) editContainer(ctx context.Context, name string, fn func(*containerBody) error) (record[containerBody], error) {
	var out record[containerBody]
	err := s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		c, err := get[containerBody](tx, kindContainer, name)
		if err != nil {
			return err
		}
		if err := fn(&c.body); err != nil {
			return err
		}
		out = c
		return put(tx, c)
	}}, nil, nil)
	return out, err
}

// containerRecord reads a container.
func (s *Store) containerRecord(name string) (record[containerBody], error) {
	return load[containerBody](s, kindContainer, name)
}
