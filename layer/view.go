package layer

import (
	"context"
	"sync"

	"mica/thin"
)

// A view is a read-only export of a committed device, shared by all who look at it. It costs no
// commit of the pool.
type view struct {
	refs int // guarded by Store.mu
	once sync.Once
	w    *work
	err  error
}

// useView calls fn with the node of a read-only export of a device that does not change.
func (s *Store) useView(ctx context.Context, id thin.DevID, size int64, fn func(node string) error) error {
	s.mu.Lock()
	v := s.views[id]
	if v == nil {
		v = &view{}
		s.views[id] = v
	}
	v.refs++
	s.mu.Unlock()
	// The export must not depend on the first user's context: others wait for it.
	v.once.Do(func() {
		cctx, cancel := s.short(ctx)
		defer cancel()
		v.w, v.err = s.openWork(cctx, id, size, true)
	})
	err := v.err
	if err == nil {
		err = fn(v.w.node())
	}
	s.mu.Lock()
	v.refs--
	last := v.refs == 0
	if last {
		delete(s.views, id)
	}
	s.mu.Unlock()
	if last && v.w != nil {
		cctx, cancel := s.short(ctx)
		defer cancel()
		if cerr := v.w.close(cctx, nil, false); err == nil {
			err = cerr
		}
	}
	return err
}
