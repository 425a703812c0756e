//go:build guest

package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/engine/enginetest"
	"mica/export/loop"
	"mica/internal/dmioctl"
)

// A dirStore is a pool in files.
type dirStore struct {
	t   testing.TB
	dir string
}

func (s *dirStore) Open(o enginetest.Options) (engine.Pool, error) {
	return openFor(s.t, Source{Dir: s.dir}, o)
}

func (s *dirStore) Metadata(t testing.TB) dev.Device { return openDevice(t, s.dir+"/metadata") }

func (s *dirStore) Fail(t testing.TB, on bool) { t.Fatal("made without faults") }

func openDevice(t testing.TB, path string) dev.Device {
	d, err := dev.Open(path, dev.OpenOptions{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func openFor(t testing.TB, src Source, o enginetest.Options) (engine.Pool, error) {
	limit := 60
	if o.NoSpaceTimeout > 0 {
		limit = int(o.NoSpaceTimeout.Seconds())
	}
	if err := os.WriteFile("/sys/module/dm_thin_pool/parameters/no_space_timeout", []byte(strconv.Itoa(limit)), 0); err != nil {
		t.Fatal(err)
	}
	p, err := Open(ctx, src, Options{ReadOnly: o.ReadOnly, ErrorIfNoSpace: o.ErrorIfNoSpace, LowWaterMark: o.LowWaterMark})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// A faultStore is a pool on two block devices, of which the metadata device can be made to fail
// all writes but those of the superblock.
type faultStore struct {
	dirStore
	dm         *dmioctl.Control
	data, meta loop.Device
	name, node string // of the metadata's linear device
	sectors    uint64
}

func newFaultStore(t testing.TB, dir string, metadataBytes int64) *faultStore {
	s := &faultStore{dirStore: dirStore{t, dir}, sectors: uint64(metadataBytes / sectorSize), name: "fault-" + filepath.Base(dir)}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	s.dm, err = dmioctl.Open()
	must(err)
	s.data, err = loop.Attach(ctx, loop.Config{Backing: dir + "/data"})
	must(err)
	s.meta, err = loop.Attach(ctx, loop.Config{Backing: dir + "/metadata"})
	must(err)
	info, err := s.dm.Activate(s.name, "", false, s.table(false)...)
	must(err)
	s.node = info.Node()
	t.Cleanup(func() {
		err := s.dm.Remove(s.name, false)
		for _, d := range []loop.Device{s.data, s.meta} {
			err = errors.Join(err, loop.Detach(ctx, d, loop.DetachOptions{Backing: loop.Backing(d.Number)}))
		}
		if err := errors.Join(err, s.dm.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

// table keeps the superblock apart. dm-flakey with an up interval of 0 s is always down.
func (s *faultStore) table(fail bool) []dmioctl.Target {
	all := dmioctl.LinearTarget(s.meta.Node, 0, s.sectors)
	if !fail {
		return []dmioctl.Target{all}
	}
	const head = metaBlock / sectorSize
	return []dmioctl.Target{
		dmioctl.LinearTarget(s.meta.Node, 0, head),
		{Start: head, Length: s.sectors - head, Type: "flakey", Params: fmt.Sprintf("%s %d 0 3600 1 error_writes", s.meta.Node, head)},
	}
}

func (s *faultStore) Fail(t testing.TB, on bool) {
	if err := s.dm.Reload(s.name, false, true, true, s.table(on)...); err != nil {
		t.Fatal(err)
	}
}

func (s *faultStore) Open(o enginetest.Options) (engine.Pool, error) {
	return openFor(s.t, Source{Data: s.data.Node, Metadata: s.node}, o)
}

func (s *faultStore) Metadata(t testing.TB) dev.Device { return openDevice(t, s.node) }

// TestEngine runs the suite of all engines.
func TestEngine(t *testing.T) {
	enginetest.Run(t, enginetest.Engine{Name: "kernel", Slow: 10, New: func(t testing.TB, f enginetest.Format) enginetest.Store {
		dir := newDir(t, f.DataBytes, f.MetadataBytes, f.BlockSize)
		if f.Faults {
			return newFaultStore(t, dir, f.MetadataBytes)
		}
		return &dirStore{t, dir}
	}})
	if left := leftOver(t); len(left) > 0 {
		t.Errorf("left in the kernel: %v", left)
	}
}

// leftOver lists what this engine has left in the kernel.
func leftOver(t testing.TB) (list []string) {
	dm, err := dmioctl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer dm.Close()
	names, err := dm.List()
	if err != nil {
		t.Fatal(err)
	}
	for name := range names {
		list = append(list, name)
	}
	for _, n := range loop.Find(func(string) bool { return true }) {
		list = append(list, fmt.Sprintf("/dev/loop%d on %s", n, loop.Backing(n)))
	}
	return list
}
