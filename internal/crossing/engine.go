package crossing

import (
	"context"

	"mica/engine"
	"mica/thin"
)

// An EnginePool is an opened pool of either engine as scripts want it.
type EnginePool struct{ engine.Pool }

var _ Pool = EnginePool{}

func (p EnginePool) CreateThin(id uint32) error {
	return p.Pool.CreateThin(context.Background(), thin.DevID(id))
}

func (p EnginePool) CreateSnap(id, origin uint32) error {
	return p.Pool.CreateSnap(context.Background(), thin.DevID(id), thin.DevID(origin))
}

func (p EnginePool) Delete(id uint32) error {
	return p.Pool.Delete(context.Background(), thin.DevID(id))
}

func (p EnginePool) SetTransactionID(old, next uint64) error {
	return p.Pool.SetTransactionID(context.Background(), old, next)
}

// A holder holds the metadata snapshot for others.
type holder interface {
	ReserveMetadataSnap(ctx context.Context) error
	ReleaseMetadataSnap(ctx context.Context) error
}

func (p EnginePool) ReserveMetadataSnap() error {
	return p.Pool.(holder).ReserveMetadataSnap(context.Background())
}

func (p EnginePool) ReleaseMetadataSnap() error {
	return p.Pool.(holder).ReleaseMetadataSnap(context.Background())
}

func (p EnginePool) Commit() error { return p.Pool.Commit(context.Background()) }

func (p EnginePool) GrowData(sizeBytes int64) error {
	return p.Pool.GrowData(context.Background(), sizeBytes)
}

func (p EnginePool) GrowMetadata(sizeBytes int64) error {
	return p.Pool.GrowMetadata(context.Background(), sizeBytes)
}

func (p EnginePool) Open(id uint32, sizeBytes int64) (Thin, error) {
	t, err := p.Pool.Open(context.Background(), thin.DevID(id), engine.OpenOptions{SizeBytes: sizeBytes})
	if err != nil {
		return nil, err
	}
	return engineThin{t}, nil
}

// An engineThin gives blocks back where it can when zeros are written.
type engineThin struct{ engine.Thin }

func (d engineThin) WriteZeroes(off, n int64) error { return d.Thin.WriteZeroes(off, n, false) }
