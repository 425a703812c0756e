package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"mica/internal/crossing"
	"mica/internal/dmioctl"
)

const (
	metaName = "mica-metadata"
	poolName = "mica-pool"
)

func thinName(id uint32) string { return fmt.Sprintf("mica-thin-%d", id) }

// A dmPool is an active thin pool of the kernel. The metadata device is a linear mapping over the
// start of the disk, so that it can grow while the pool is active.
type dmPool struct {
	dm        *dmioctl.Control
	job       crossing.Job
	meta      dmioctl.Info
	pool      dmioctl.Info
	dataBytes int64
	active    map[uint32]bool // thin devices
}

var _ crossing.Pool = (*dmPool)(nil)

func activate(job crossing.Job) (*dmPool, error) {
	dm, err := dmioctl.Open()
	if err != nil {
		return nil, err
	}
	p := &dmPool{dm: dm, job: job, dataBytes: job.DataBytes, active: map[uint32]bool{}}
	p.meta, err = dm.Activate(metaName, "", false, dmioctl.LinearTarget(job.Metadata, 0, uint64(job.MetadataBytes/crossing.SectorSize)))
	if err != nil {
		dm.Close()
		return nil, err
	}
	if p.pool, err = dm.Activate(poolName, "", false, p.table()); err != nil {
		dm.Remove(metaName, false)
		dm.Close()
		return nil, err
	}
	return p, nil
}

func (p *dmPool) table() dmioctl.Target {
	return dmioctl.ThinPool{
		Metadata: p.meta.Node(), Data: p.job.Data,
		LengthSectors: uint64(p.dataBytes / crossing.SectorSize),
		BlockSectors:  uint64(p.job.BlockBytes / crossing.SectorSize),
		Features:      p.job.Features,
	}.Target()
}

// Close deactivates everything. Thin devices must be closed.
func (p *dmPool) Close() error {
	var errs []error
	for id := range p.active {
		errs = append(errs, p.dm.Remove(thinName(id), false))
	}
	errs = append(errs, p.dm.Remove(poolName, false), p.dm.Remove(metaName, false), p.dm.Close())
	return errors.Join(errs...)
}

func (p *dmPool) CreateThin(id uint32) error { return p.dm.CreateThin(poolName, id) }

// CreateSnap suspends the origin meanwhile if it is active: the kernel leaves that to the caller.
func (p *dmPool) CreateSnap(id, origin uint32) error {
	if p.active[origin] {
		if err := p.dm.Suspend(thinName(origin), false, false); err != nil {
			return err
		}
	}
	err := p.dm.CreateSnap(poolName, id, origin)
	if p.active[origin] {
		err = errors.Join(err, p.dm.Resume(thinName(origin)))
	}
	return err
}

func (p *dmPool) Delete(id uint32) error {
	if p.active[id] {
		if err := p.dm.Remove(thinName(id), false); err != nil {
			return err
		}
		delete(p.active, id)
	}
	return p.dm.DeleteThin(poolName, id)
}

func (p *dmPool) SetTransactionID(old, next uint64) error {
	return p.dm.SetTransactionID(poolName, old, next)
}

func (p *dmPool) ReserveMetadataSnap() error { return p.dm.ReserveMetadataSnap(poolName) }
func (p *dmPool) ReleaseMetadataSnap() error { return p.dm.ReleaseMetadataSnap(poolName) }

// Commit: a status query makes a pool commit.
func (p *dmPool) Commit() error {
	s, err := p.dm.PoolStatus(poolName)
	if err == nil && (s.Failed || s.Mode != "rw") {
		err = fmt.Errorf("pool status %+v", s)
	}
	return err
}

func (p *dmPool) GrowData(sizeBytes int64) error {
	p.dataBytes = sizeBytes
	return p.dm.Reload(poolName, false, false, false, p.table())
}

func (p *dmPool) GrowMetadata(sizeBytes int64) error {
	if err := p.dm.Suspend(poolName, false, false); err != nil {
		return err
	}
	err := p.dm.Reload(metaName, false, false, false, dmioctl.LinearTarget(p.job.Metadata, 0, uint64(sizeBytes/crossing.SectorSize)))
	return errors.Join(err, p.dm.Resume(poolName)) // a resume takes the new size
}

func (p *dmPool) Open(id uint32, sizeBytes int64) (crossing.Thin, error) {
	if !p.active[id] {
		table := dmioctl.ThinTarget(p.pool.Node(), id, uint64(sizeBytes/crossing.SectorSize), "")
		if _, err := p.dm.Activate(thinName(id), "", false, table); err != nil {
			return nil, err
		}
		p.active[id] = true
	}
	info, err := p.dm.Info(thinName(id))
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(info.Node(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	return &dmThin{f}, nil
}

// A dmThin is the block device of a thin device, without the page cache.
type dmThin struct{ f *os.File }

func (t *dmThin) ReadAt(b []byte, off int64) (int, error)  { return t.f.ReadAt(b, off) }
func (t *dmThin) WriteAt(b []byte, off int64) (int, error) { return t.f.WriteAt(b, off) }
func (t *dmThin) Flush() error                             { return t.f.Sync() }
func (t *dmThin) Close() error                             { return t.f.Close() }
func (t *dmThin) Discard(off, n int64) error               { return rangeIoctl(t.f, unix.BLKDISCARD, off, n) }
func (t *dmThin) WriteZeroes(off, n int64) error           { return rangeIoctl(t.f, unix.BLKZEROOUT, off, n) }
