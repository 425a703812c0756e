package kernel

import (
	"errors"
	"fmt"
	"os"

	"mica/dev"
	"mica/internal/crossing"
	"mica/thin"
)

// A thinPool is the metadata layer of mica with the simplest data path that can be: one request
// at a time, block by block. It shows whether the bytes are right before anything is fast.
type thinPool struct {
	meta       *thin.Metadata
	metaFile   *dev.File
	data       *dev.File
	blockBytes int64
}

var _ crossing.Pool = (*thinPool)(nil)

func openThinPool(dataPath, metaPath string) (*thinPool, error) {
	data, err := dev.OpenFile(dataPath, dev.OpenOptions{})
	if err != nil {
		return nil, err
	}
	metaFile, err := dev.OpenFile(metaPath, dev.OpenOptions{})
	if err != nil {
		return nil, err
	}
	meta, err := thin.Open(metaFile, thin.OpenOptions{})
	if err != nil {
		return nil, err
	}
	return &thinPool{meta: meta, metaFile: metaFile, data: data, blockBytes: meta.DataBlockSize()}, nil
}

// Close commits first.
func (p *thinPool) Close() error {
	return errors.Join(p.Commit(), p.meta.Close(), p.data.Close())
}

func (p *thinPool) Commit() error {
	if !p.meta.Changed() {
		return nil
	}
	freed, err := p.meta.Commit(p.data.Flush)
	if err != nil {
		return err
	}
	for _, r := range freed {
		if err := p.data.Discard(int64(r.Begin)*p.blockBytes, int64(r.Len)*p.blockBytes); err != nil {
			return err
		}
		p.meta.ReleaseData(r)
	}
	return nil
}

func (p *thinPool) CreateThin(id uint32) error { return p.meta.CreateThin(thin.DevID(id)) }

func (p *thinPool) CreateSnap(id, origin uint32) error {
	return p.meta.CreateSnap(thin.DevID(id), thin.DevID(origin))
}

func (p *thinPool) Delete(id uint32) error {
	for {
		done, err := p.meta.DeleteStep(thin.DevID(id))
		if done || err != nil {
			return err
		}
	}
}

func (p *thinPool) SetTransactionID(old, next uint64) error {
	return p.meta.SetTransactionID(old, next)
}

func (p *thinPool) ReserveMetadataSnap() error {
	return errors.Join(p.Commit(), p.meta.ReserveMetadataSnap(), p.Commit())
}

func (p *thinPool) ReleaseMetadataSnap() error {
	return errors.Join(p.Commit(), p.meta.ReleaseMetadataSnap(), p.Commit())
}

func (p *thinPool) GrowData(sizeBytes int64) error {
	return errors.Join(p.data.Resize(sizeBytes), p.meta.GrowData(uint64(sizeBytes/p.blockBytes)), p.Commit())
}

func (p *thinPool) GrowMetadata(sizeBytes int64) error {
	return errors.Join(p.metaFile.Resize(sizeBytes), p.meta.GrowMetadata(), p.Commit())
}

func (p *thinPool) Open(id uint32, sizeBytes int64) (crossing.Thin, error) {
	if _, err := p.meta.Details(thin.DevID(id)); err != nil {
		return nil, err
	}
	return &thinDevice{p, thin.DevID(id)}, nil
}

type thinDevice struct {
	p  *thinPool
	id thin.DevID
}

func (d *thinDevice) Close() error { return nil }

func (d *thinDevice) Flush() error { return d.p.Commit() }

// pieces calls fn for the part of [off, off+n) in each block.
func (d *thinDevice) pieces(n int, off int64, fn func(vb thin.VBlock, in int64, from, to int) error) error {
	for at := 0; at < n; {
		pos := off + int64(at)
		vb, in := pos/d.p.blockBytes, pos%d.p.blockBytes
		to := min(n, at+int(d.p.blockBytes-in))
		if err := fn(thin.VBlock(vb), in, at, to); err != nil {
			return fmt.Errorf("thin %d block %d: %w", d.id, vb, err)
		}
		at = to
	}
	return nil
}

func (d *thinDevice) ReadAt(b []byte, off int64) (int, error) {
	err := d.pieces(len(b), off, func(vb thin.VBlock, in int64, from, to int) error {
		m, ok, err := d.p.meta.Lookup(d.id, vb)
		if err != nil {
			return err
		}
		if !ok {
			clear(b[from:to])
			return nil
		}
		_, err = d.p.data.ReadAt(b[from:to], int64(m.Block)*d.p.blockBytes+in)
		return err
	})
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

func (d *thinDevice) WriteAt(b []byte, off int64) (int, error) {
	err := d.pieces(len(b), off, func(vb thin.VBlock, in int64, from, to int) error {
		return d.writeBlock(b[from:to], vb, in)
	})
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

// writeBlock writes in place if the block is the device's own, else to a fresh block.
func (d *thinDevice) writeBlock(b []byte, vb thin.VBlock, in int64) error {
	p := d.p
	details, err := p.meta.Details(d.id)
	if err != nil {
		return err
	}
	m, mapped, err := p.meta.Lookup(d.id, vb)
	if err != nil {
		return err
	}
	if mapped && details.SnapshottedTime <= m.Time {
		_, err := p.data.WriteAt(b, int64(m.Block)*p.blockBytes+in)
		return err
	}
	run, ok := p.meta.AllocData(0, 1)
	if !ok { // a commit may free some
		if err := p.Commit(); err != nil {
			return err
		}
		if run, ok = p.meta.AllocData(0, 1); !ok {
			return dev.ErrNoSpace
		}
	}
	whole := make([]byte, p.blockBytes)
	if mapped {
		if _, err := p.data.ReadAt(whole, int64(m.Block)*p.blockBytes); err != nil {
			return err
		}
	}
	copy(whole[in:], b)
	if _, err := p.data.WriteAt(whole, int64(run.Begin)*p.blockBytes); err != nil {
		return err
	}
	return p.meta.Insert(d.id, []thin.Entry{{VBlock: vb, Mapping: thin.Mapping{Block: run.Begin, Time: p.meta.Time()}}})
}

func (d *thinDevice) WriteZeroes(off, n int64) error {
	_, err := d.WriteAt(make([]byte, n), off)
	return err
}

func (d *thinDevice) Discard(off, n int64) error {
	begin := thin.VBlock((off + d.p.blockBytes - 1) / d.p.blockBytes)
	end := thin.VBlock((off + n) / d.p.blockBytes)
	for begin < end {
		_, next, done, err := d.p.meta.Remove(d.id, begin, end, 100)
		if done || err != nil {
			return err
		}
		begin = next
	}
	return nil
}

// formatThin makes an empty pool in files of the given sizes.
func formatThin(dataPath, metaPath string, blockBytes, dataBytes, metadataBytes int64) error {
	for path, size := range map[string]int64{dataPath: dataBytes, metaPath: metadataBytes} {
		if err := os.Truncate(path, size); err != nil {
			return err
		}
	}
	f, err := dev.OpenFile(metaPath, dev.OpenOptions{})
	if err != nil {
		return err
	}
	return errors.Join(thin.Format(f, thin.FormatOptions{DataBlockSize: blockBytes, DataBlocks: uint64(dataBytes / blockBytes)}), f.Close())
}
