package layer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"mica/layer/catalog"
)

// baseState says whether the base is there.
type baseState struct {
	ready chan struct{} // closed when the base is there
	mu    sync.Mutex
	err   error // why the last try failed; guarded by mu
	tried chan struct{}
}

func (b *baseState) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
	if b.tried != nil {
		close(b.tried)
		b.tried = nil
	}
}

// next returns a channel that is closed at the end of the try that is under way or comes next.
func (b *baseState) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tried == nil {
		b.tried = make(chan struct{})
	}
	return b.tried
}

func (b *baseState) status() (ready bool, err error) {
	select {
	case <-b.ready:
		return true, nil
	default:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return false, b.err
}

// baseRecord returns the base, and waits for it if it is being made. If making it fails, so does
// the call; the background goes on trying.
func (s *Store) baseRecord(ctx context.Context) (record[baseBody], error) {
	if err := s.writable(); err != nil {
		return record[baseBody]{}, err
	}
	tried := s.base.next()
	signalLoop(s.wake)
	select {
	case <-s.base.ready:
	case <-tried:
		if ready, err := s.base.status(); !ready {
			return record[baseBody]{}, fmt.Errorf("base file system: %w", err)
		}
	case <-ctx.Done():
		return record[baseBody]{}, ctx.Err()
	case <-s.ctx.Done():
		return record[baseBody]{}, ErrClosed
	}
	b, err := s.findBase()
	if err == nil {
		err = s.usable(b.Ref())
	}
	return b, err
}

// findBase returns the base if there is one. There is one at most, whatever its file system.
func (s *Store) findBase() (rec record[baseBody], err error) {
	err = ErrNotFound
	lerr := list(s, kindBase, "", "", func(r record[baseBody]) (bool, error) {
		rec, err = r, nil
		return false, nil
	})
	return rec, errors.Join(err, lerr)
}

// checkBase refuses a base that cannot be made. A store that has one keeps it, whatever the options say.
func checkBase(fstype string, size int64) error {
	if fstype == "xfs" && size < minXFS {
		return fmt.Errorf("base: %w size of %d bytes: an xfs has at least %d (300 MiB, of which 64 MiB are its log)", ErrInvalid, size, int64(minXFS))
	}
	return nil
}

// baseLoop makes the base if there is none, again and again until it is there.
func (s *Store) baseLoop() {
	defer s.wg.Done()
	delay := time.Second
	for {
		err := s.makeBase(s.ctx)
		if err == nil {
			close(s.base.ready)
			s.base.fail(nil)
			return
		}
		if s.ctx.Err() != nil {
			return
		}
		s.log.Error("making the base file system", "err", err)
		s.base.fail(err)
		select {
		case <-time.After(delay):
		case <-s.ctx.Done():
			return
		}
		delay = min(2*delay, time.Minute)
	}
}

func (s *Store) makeBase(ctx context.Context) error {
	b, err := s.findBase()
	if err == nil {
		if why := s.cat.Broken(b.Ref()); why != "" {
			return fmt.Errorf("%w: %s", ErrBroken, why)
		}
		return nil
	}
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	start := time.Now()
	ids, err := s.cat.Alloc(ctx, 1)
	if err != nil {
		return err
	}
	id := ids[0]
	if err := s.cat.CreateHeld(ctx, []catalog.Create{{ID: id}}); err != nil {
		return err
	}
	uuid := newUUID()
	own := int64(0)
	err = s.work(ctx, id, s.o.BaseSize, false, func(w *work) error {
		if err := s.files.Mkfs(ctx, w.node(), s.o.FSType, uuid); err != nil {
			return err
		}
		return nil
	}, &own)
	if err != nil {
		s.cat.Abandon(id)
		return err
	}
	rec := record[baseBody]{Record: catalog.Record{Kind: kindBase, Key: s.o.FSType, Device: id}}
	rec.body.deviceBody = deviceBody{SizeBytes: s.o.BaseSize, FSType: s.o.FSType, Owner: OwnerMica,
		Created: time.Now().UTC(), OwnBlocks: own}
	rec.body.UUID = uuid
	err = s.step(ctx, catalog.Step{Consume: ids, Apply: func(tx *catalog.Tx) error { return put(tx, rec) }}, nil, nil)
	if err != nil {
		return err
	}
	s.log.Info("made the base file system", "fs", s.o.FSType, "size_bytes", s.o.BaseSize,
		"blocks", own, "took", time.Since(start).Round(time.Millisecond))
	s.hub.emit(EventBase, kindBase+"/"+s.o.FSType, "")
	return nil
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
