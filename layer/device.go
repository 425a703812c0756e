package layer

import (
	"context"
	"fmt"

	"mica/layer/catalog"
	"mica/thin"
)

// makeDevice takes a snapshot of origin and registers it as rec, of whose body common is a part. If its
// file system must be enlarged to common's size, grown is not nil: then that comes first, and grown is
// told how many blocks it took. soon is what the catalog expects.
func makeDevice[T any](ctx context.Context, s *Store, rec *record[T], common *deviceBody, origin thin.DevID, soon *catalog.Expected, grown func(own int64)) error {
	ids, err := s.cat.Alloc(ctx, 1)
	if err != nil {
		return s.wrap(err)
	}
	rec.Device = ids[0]
	create := []catalog.Create{{ID: ids[0], Origin: origin}}
	st := catalog.Step{Creates: create, Expected: soon, Apply: func(tx *catalog.Tx) error {
		var err error
		if common.ID, err = s.newID(tx); err != nil {
			return err
		}
		return put(tx, *rec)
	}}
	if grown != nil {
		soon.End() // it takes a while
		if err := s.cat.CreateHeld(ctx, create); err != nil {
			return err
		}
		own := int64(0)
		err := s.work(ctx, ids[0], common.SizeBytes, false, func(w *work) error {
			return s.files.Grow(ctx, w.node(), common.FSType)
		}, &own)
		if err != nil {
			s.cat.Abandon(ids...)
			return fmt.Errorf("grow to %d bytes: %w", common.SizeBytes, err)
		}
		grown(own)
		st.Creates, st.Consume = nil, ids
	}
	return s.step(ctx, st, []catalog.Record{rec.Record}, nil)
}
