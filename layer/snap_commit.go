package layer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"strings"

	"mica/layer/catalog"
	"mica/thin"
)

// Labels that containerd's clients give a meaning to.
const (
	// LabelSnapRef of a snapshot that is made to unpack a layer is the chain id which it will have.
	LabelSnapRef = "containerd.io/snapshot.ref"
	// inheritedLabels begin those that go on from an active snapshot to the committed one.
	inheritedLabels = "containerd.io/snapshot/"
)

// errLostWrites: what somebody wrote to a snapshot is not all there.
var errLostWrites = fmt.Errorf("writes to it failed, its contents are not complete: %w", ErrNoSpace)

// Commit makes a committed snapshot of an active one, which is gone afterwards. parent, if not
// empty, must be what Prepare was given.
//
// Of one that nobody has mounted, the file system is not touched: the node goes away, the device
// is flushed, the catalog commits. One that is mounted is copied while its file system is frozen;
// its device goes when whoever has it mounted has let go. A file system that was not unmounted in
// order (the host crashed) is replayed first.
func (n *SnapStore) Commit(ctx context.Context, name, key, parent string, labels map[string]string) error {
	if err := n.commit(ctx, name, key, parent, labels); err != nil {
		return fmt.Errorf("commit snapshot %q as %q: %w", shorten(key), shorten(name), err)
	}
	return nil
}

func (n *SnapStore) commit(ctx context.Context, name, key, parent string, labels map[string]string) error {
	s := n.s
	if err := s.writable(); err != nil {
		return err
	}
	if err := errors.Join(checkSnapName(name), checkSnapLabels(labels)); err != nil {
		return err
	}
	unlock, err := s.locks.lock(ctx, n.ref(name), n.ref(key))
	if err != nil {
		return err
	}
	defer unlock()
	if err := n.mustBeNew(name); err != nil {
		return err
	}
	r, err := n.record(key)
	if err != nil {
		return err
	}
	if r.body.Kind != SnapActive {
		return fmt.Errorf("it is %s, not active: %w", r.body.Kind, ErrState)
	}
	if parent != "" && parent != r.body.ParentName {
		return fmt.Errorf("%w parent %q: it was prepared on %q, and cannot be moved to another", ErrInvalid, shorten(parent), shorten(r.body.ParentName))
	}
	if err := s.usable(r.Ref()); err != nil {
		return err
	}
	l := s.liveOf(r.body.ID)
	if r.body.LostWrites || l.lostWrites() {
		return errLostWrites
	}
	next := r
	next.Key = n.key(name)
	next.body.Kind, next.body.Attach, next.body.Labels = SnapCommitted, nil, commitLabels(name, r.body.Labels, labels)
	next.body.Created = snapNow()
	next.body.Updated = next.body.Created

	own := int64(-1)
	if l != nil {
		err := s.endLive(ctx, l)
		switch {
		case l.lostWrites(): // the detach wrote what the kernel still had
			return errors.Join(errLostWrites, err)
		case err == nil:
			own = l.own
		case errors.Is(err, ErrBusy) && s.liveOf(r.body.ID) == l:
			return n.commitMounted(ctx, r, next, l)
		default:
			return err
		}
	}
	if err := n.makeClean(ctx, r, &own); err != nil {
		return err
	}
	next.body.setOwn(own)
	return n.putCommitted(ctx, r, next, catalog.Step{FileOnly: true}, nil)
}

// commitLabels are those given, and what is inherited from the active snapshot.
func commitLabels(name string, active, given map[string]string) map[string]string {
	out := maps.Clone(given)
	for k, v := range active {
		if _, ok := given[k]; ok {
			continue
		}
		if !strings.HasPrefix(k, inheritedLabels) && (k != LabelSnapRef || path.Base(name) != v) {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[k] = v
	}
	return out
}

// makeClean replays a file system that was not unmounted in order. own, if it is known, gets the
// blocks added that this took.
func (n *SnapStore) makeClean(ctx context.Context, r record[snapBody], own *int64) error {
	if r.body.GuestOwned {
		return nil // the host keeps its hands off
	}
	clean, err := n.s.isClean(ctx, r.Device, r.body.SizeBytes, r.body.FSType)
	if err != nil || clean {
		return err
	}
	added := int64(0)
	err = n.s.work(ctx, r.Device, r.body.SizeBytes, false, func(w *work) error {
		return n.s.files.Replay(ctx, w.node(), r.body.FSType)
	}, &added)
	if err != nil {
		return fmt.Errorf("replay the journal: %w", err)
	}
	if *own >= 0 && added >= 0 {
		*own += added
	} else {
		*own = -1
	}
	return nil
}

// commitMounted commits a copy of a snapshot that somebody has mounted.
func (n *SnapStore) commitMounted(ctx context.Context, r, next record[snapBody], l *live) error {
	s := n.s
	id, level, copied, err := s.takeCopy(ctx, asContainer(r), QuiesceOptions{})
	if err != nil {
		return err
	}
	own := l.ownBlocks()
	if own >= 0 && copied >= 0 {
		own += copied
	}
	next.Device = id
	next.body.setOwn(max(own, 0)) // a count of the copy's own would leave out what it began with
	if err := n.putCommitted(ctx, r, next, catalog.Step{Consume: []thin.DevID{id}}, l); err != nil {
		return err
	}
	s.log.Info("committed a snapshot that is mounted", "snapshot", r.Key, "level", level)
	return nil
}

// asContainer lends a snapshot to the functions that copy containers.
func asContainer(r record[snapBody]) record[containerBody] {
	return record[containerBody]{Record: r.Record, body: containerBody{deviceBody: r.body.deviceBody}}
}

// putCommitted replaces the active snapshot's record by the committed one's. l is given if the
// active one's device stays behind.
func (n *SnapStore) putCommitted(ctx context.Context, r, next record[snapBody], st catalog.Step, l *live) error {
	s := n.s
	st.Apply = func(tx *catalog.Tx) error {
		cur, err := get[snapBody](tx, kindSnap, r.Key)
		if err != nil {
			return err
		}
		if cur.body.LostWrites {
			return errLostWrites
		}
		if err := tx.Delete(kindSnap, r.Key); err != nil {
			return err
		}
		if l != nil {
			if err := tx.Remove(removalOf(r.Ref(), r.Device, l, r.body.SizeBytes)); err != nil {
				return err
			}
		}
		return put(tx, next)
	}
	if err := s.step(ctx, st, []catalog.Record{next.Record}, []catalog.Record{r.Record}); err != nil {
		return err
	}
	if l != nil {
		s.leave(r.Device, r.Ref(), l)
	}
	s.hub.emit(EventCommit, r.Ref(), next.Ref())
	return nil
}

// leave hands a device that somebody still holds to the background, which detaches it as soon as
// it can; then it is deleted.
func (s *Store) leave(dev thin.DevID, object string, l *live) {
	s.mu.Lock()
	s.leaving[dev] = &leaving{object: object, dev: dev, id: l.id, since: now()}
	s.mu.Unlock()
	signalLoop(s.wake)
}
