package kernel

import (
	"context"
	"errors"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/internal/crossing"
	"mica/thin"
)

// A userPool is the user engine on the files of the rig, as a script wants it.
type userPool struct {
	dataPath, metaPath string
	pool               *user.Pool
}

var _ crossing.Pool = (*userPool)(nil)

func openUserPool(dataPath, metaPath string) (*userPool, error) {
	p := &userPool{dataPath: dataPath, metaPath: metaPath}
	return p, p.reopen()
}

func (p *userPool) reopen() error {
	data, err := dev.OpenFile(p.dataPath, dev.OpenOptions{Lock: true})
	if err != nil {
		return err
	}
	meta, err := dev.OpenFile(p.metaPath, dev.OpenOptions{Lock: true})
	if err != nil {
		data.Close()
		return err
	}
	p.pool, err = user.New(meta, data, user.Options{ErrorIfNoSpace: true})
	return err
}

func (p *userPool) Close() error { return p.pool.Close() }

func (p *userPool) Commit() error { return p.pool.Commit(context.Background()) }

func (p *userPool) CreateThin(id uint32) error {
	return p.pool.CreateThin(context.Background(), thin.DevID(id))
}

func (p *userPool) CreateSnap(id, origin uint32) error {
	return p.pool.CreateSnap(context.Background(), thin.DevID(id), thin.DevID(origin))
}

func (p *userPool) Delete(id uint32) error {
	return p.pool.Delete(context.Background(), thin.DevID(id))
}

func (p *userPool) SetTransactionID(old, next uint64) error {
	return p.pool.SetTransactionID(context.Background(), old, next)
}

// whileClosed changes the metadata of the closed pool: the engine itself holds no snapshots of
// its metadata.
func (p *userPool) whileClosed(change func(*thin.Metadata) error) error {
	if err := p.pool.Close(); err != nil {
		return err
	}
	t, err := openThinPool(p.dataPath, p.metaPath)
	if err != nil {
		return err
	}
	if err := errors.Join(change(t.meta), t.Close()); err != nil {
		return err
	}
	return p.reopen()
}

func (p *userPool) ReserveMetadataSnap() error {
	return p.whileClosed((*thin.Metadata).ReserveMetadataSnap)
}

func (p *userPool) ReleaseMetadataSnap() error {
	return p.whileClosed((*thin.Metadata).ReleaseMetadataSnap)
}

func (p *userPool) GrowData(sizeBytes int64) error {
	return p.pool.GrowData(context.Background(), sizeBytes)
}

func (p *userPool) GrowMetadata(sizeBytes int64) error {
	return p.pool.GrowMetadata(context.Background(), sizeBytes)
}

func (p *userPool) Open(id uint32, sizeBytes int64) (crossing.Thin, error) {
	t, err := p.pool.Open(context.Background(), thin.DevID(id), engine.OpenOptions{SizeBytes: sizeBytes})
	if err != nil {
		return nil, err
	}
	return userDevice{t}, nil
}

// A userDevice gives blocks back where it can when zeros are written.
type userDevice struct{ engine.Thin }

func (d userDevice) WriteZeroes(off, n int64) error { return d.Thin.WriteZeroes(off, n, false) }
