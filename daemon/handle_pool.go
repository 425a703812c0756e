package daemon

import (
	"context"
	"errors"
	"net/http"
	"os"
	"time"

	"mica/daemon/api"
)

// metaBlock is the size of a metadata block in bytes.
const metaBlock = 4096

func (s *server) poolNow(ctx context.Context) (api.Pool, error) {
	st, err := s.pool.Status(ctx)
	if err != nil {
		return api.Pool{}, err
	}
	p := api.Pool{Status: st, HostFreeBytes: -1}
	p.DataSpaceBytes = int64(st.DataBlocks) * st.BlockSize
	p.DataUsedBytes = int64(st.DataUsed) * st.BlockSize
	p.DataFreeBytes = max(0, p.DataSpaceBytes-p.DataUsedBytes)
	p.MetadataSpaceBytes = int64(st.MetaBlocks) * metaBlock
	p.MetadataUsedBytes = int64(st.MetaUsed) * metaBlock
	p.MetadataFreeBytes = max(0, p.MetadataSpaceBytes-p.MetadataUsedBytes)
	s.describePool(&p)
	return p, nil
}

func (s *server) poolStatus(q *request) (int, any, error) {
	p, err := s.poolNow(q.Context())
	return http.StatusOK, p, err
}

func (s *server) df(q *request) (int, any, error) {
	d, err := s.store.DF(q.Context())
	return http.StatusOK, d, err
}

func (s *server) growPool(q *request) (int, any, error) {
	b := q.body.(*api.GrowPool)
	if b.SizeBytes < 0 || b.MetadataBytes < 0 || b.SizeBytes == 0 && b.MetadataBytes == 0 && len(b.Devices) == 0 {
		return 0, nil, api.Errorf(api.CodeInvalid, "grow: give size_bytes or metadata_bytes, the new size of the data or the metadata device, or devices")
	}
	if len(b.Devices) > 0 && s.addDevices == nil {
		return 0, nil, api.Errorf(api.CodeUnsupported, "grow: devices can be added to a pool that was made with the LVM tools ([lvm] of the configuration), which this one was not")
	}
	return s.background(q, "grow", "pool", b, func(ctx context.Context, _ *operation) (any, error) {
		if len(b.Devices) > 0 {
			if err := s.addDevices(ctx, b.Devices, b.Force); err != nil {
				return nil, err
			}
		}
		// Metadata first: what it could not take must not be there to be filled.
		if b.MetadataBytes > 0 {
			if err := s.pool.GrowMetadata(ctx, b.MetadataBytes); err != nil {
				return nil, err
			}
		}
		if b.SizeBytes > 0 {
			if err := s.pool.GrowData(ctx, b.SizeBytes); err != nil {
				return nil, err
			}
		}
		s.hub.publish(api.EventGrow, "pool", "", time.Time{})
		return s.poolNow(ctx)
	})
}

func (s *server) trimPool(q *request) (int, any, error) {
	return s.background(q, "trim", "pool", nil, func(ctx context.Context, _ *operation) (any, error) {
		n, err := s.pool.Trim(ctx)
		return api.TrimResult{TrimmedBytes: n}, err
	})
}

func (s *server) checkPool(q *request) (int, any, error) {
	if s.check == nil {
		return 0, nil, api.Errorf(api.CodeUnsupported, "this pool cannot be checked while it is open")
	}
	return s.background(q, "check", "pool", nil, func(ctx context.Context, op *operation) (any, error) {
		return s.check(ctx, op)
	})
}

func (s *server) status(q *request) (int, any, error) {
	st := api.Status{PID: os.Getpid(), Running: s.ops.running(), LastEvent: s.hub.lastID()}
	var err error
	if st.Pool, err = s.poolNow(q.Context()); err != nil {
		return 0, nil, err
	}
	if st.Store.Status, err = s.store.Status(q.Context()); err != nil {
		return 0, nil, err
	}
	if st.Store.Attachments, err = s.attachmentList(q.Context(), "*"); err != nil {
		return 0, nil, err
	}
	s.describe(&st)
	return http.StatusOK, st, nil
}

func (s *server) openAPI(q *request) (int, any, error) {
	q.w.Header().Set("Content-Type", "application/json")
	_, err := q.w.Write(s.page)
	return 0, nil, errors.Join(errAnswered, err)
}
