package kernel

import (
	"errors"
	"os"
	"testing"

	"mica/dev"
	"mica/internal/crossing"
	"mica/pdata/block"
	"mica/thin"
	"mica/thin/repair"
)

// TestTimeAtItsEnd: a pool of the kernel whose time stands at 2^24 - 2 goes to mica, which compacts it
// with the first snapshot; the kernel then takes it, and shares and copies what it should.
func TestTimeAtItsEnd(t *testing.T) {
	s := newScenario(t, 9, 64*kib, 64*mib, 4*mib, 8*mib)
	s.gen.NoMetadataSnap = true
	s.kernel(func(sc *script) { sc.random(150) })
	s.setTime(thin.MaxTime - 2)
	s.mica(userSide, func(sc *script) {
		sc.random(20)
		sc.do(crossing.Op{Kind: crossing.CreateThin, Dev: 900, Size: 8 * mib},
			crossing.Op{Kind: crossing.Scatter, Dev: 900, Len: 4096, Stride: 64 * kib, Count: 100, Seed: 1},
			crossing.Op{Kind: crossing.CreateSnap, Dev: 901, Origin: 900},
			crossing.Op{Kind: crossing.Scatter, Dev: 900, Len: 4096, Stride: 128 * kib, Count: 50, Seed: 2},
			crossing.Op{Kind: crossing.CreateSnap, Dev: 902, Origin: 900})
		sc.random(200)
	})
	if time := s.superblock().Time; time > 1000 {
		t.Errorf("after snapshots the pool's time is %d", time)
	}
	s.kernel(func(sc *script) { sc.random(150) })
	s.mica(userSide, func(sc *script) { sc.random(100) })
}

// TestRepairedPools: metadata that were repaired, with a superblock that had to be guessed, serve
// both engines.
func TestRepairedPools(t *testing.T) {
	s := newScenario(t, 10, 64*kib, 64*mib, 4*mib, 8*mib)
	s.gen.NoMetadataSnap = true
	s.kernel(func(sc *script) { sc.random(150) })
	s.repair(repair.Options{})
	s.kernel(func(sc *script) { sc.random(100) })
	s.mica(userSide, func(sc *script) { sc.random(100) })
	trans := s.superblock().TransactionID
	s.changeMetadata(func(d dev.Device) error {
		_, err := d.WriteAt(make([]byte, block.Size), 0)
		return err
	})
	s.repair(repair.Options{DataBlockSize: s.model.BlockBytes, DataBytes: s.model.DataBytes, TransactionID: &trans})
	s.kernel(func(sc *script) { sc.random(100) })
	s.mica(userSide, func(sc *script) { sc.random(100) })
}

func (s *scenario) changeMetadata(fn func(d dev.Device) error) {
	s.t.Helper()
	d, err := dev.OpenFile(s.rig.meta, dev.OpenOptions{})
	if err == nil {
		err = errors.Join(fn(d), d.Flush(), d.Close())
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *scenario) superblock() (sb thin.Superblock) {
	s.t.Helper()
	s.changeMetadata(func(d dev.Device) error {
		v, err := thin.OpenView(d)
		if err == nil {
			sb = v.Superblock()
		}
		return err
	})
	return sb
}

// setTime sets the pool's time.
func (s *scenario) setTime(time uint32) {
	s.t.Helper()
	s.changeMetadata(func(d dev.Device) error {
		b := make([]byte, block.Size)
		if _, err := d.ReadAt(b, 0); err != nil {
			return err
		}
		sb := thin.DecodeSuperblock(b)
		sb.Time = time
		sb.Encode(b)
		block.Seal(b, 0, block.Superblock)
		_, err := d.WriteAt(b, 0)
		return err
	})
}

// repair puts repaired metadata in place of the pool's. Nothing may be lost.
func (s *scenario) repair(o repair.Options) {
	s.t.Helper()
	size := s.model.MetadataBytes
	out := dev.NewMem(size)
	var rep *repair.Report
	s.changeMetadata(func(d dev.Device) (err error) {
		rep, err = repair.Repair(d, out, o)
		return err
	})
	if !rep.Complete {
		rep.WriteText(os.Stderr)
		s.t.Fatal("something is lost")
	}
	s.changeMetadata(func(d dev.Device) error {
		buf := make([]byte, size)
		if _, err := out.ReadAt(buf, 0); err != nil {
			return err
		}
		_, err := d.WriteAt(buf, 0)
		return err
	})
	s.last = "repair"
	s.verify()
}
