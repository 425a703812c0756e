package user

import (
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/engine/enginetest"
	"mica/thin"
)

// A memStore is a pool on two memory devices.
type memStore struct {
	data, meta *dev.Mem
	fault      *dev.Fault // of the metadata, while the pool is open
}

func (s *memStore) Open(o enginetest.Options) (engine.Pool, error) {
	s.data, s.meta = s.data.Clone(), s.meta.Clone()
	s.fault = dev.NewFault(s.meta)
	p, err := New(s.fault, s.data, Options{ReadOnly: o.ReadOnly, ErrorIfNoSpace: o.ErrorIfNoSpace,
		NoSpaceTimeout: o.NoSpaceTimeout, LowWaterMark: o.LowWaterMark})
	if err != nil {
		return nil, err
	}
	return p, nil
}

func (s *memStore) Metadata(testing.TB) dev.Device {
	s.meta = s.meta.Clone()
	return s.meta
}

// Fail leaves the superblock alone, so that the pool can be marked.
func (s *memStore) Fail(_ testing.TB, on bool) {
	if s.fault.Clear(); on {
		s.fault.Add(dev.Rule{Ops: dev.OpWrite, Off: 4096, Len: s.meta.Size() - 4096})
	}
}

func TestEngine(t *testing.T) {
	enginetest.Run(t, enginetest.Engine{Name: "user", Slow: slow, New: func(t testing.TB, f enginetest.Format) enginetest.Store {
		s := &memStore{data: dev.NewMem(f.DataBytes), meta: dev.NewMem(f.MetadataBytes)}
		err := thin.Format(s.meta, thin.FormatOptions{DataBlockSize: f.BlockSize, DataBlocks: uint64(f.DataBytes / f.BlockSize)})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}})
}
