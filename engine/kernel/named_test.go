//go:build guest

package kernel

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strings"
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/export/loop"
	"mica/internal/dmioctl"
	"mica/thin"
)

// A foreignPool is an active thin pool that somebody else has made, with devices of his.
type foreignPool struct {
	t          testing.TB
	dm         *dmioctl.Control
	name       string
	info       dmioctl.Info
	meta, data loop.Device
	table      dmioctl.Target
}

func newForeignPool(t testing.TB, name, uuid string, devices int) *foreignPool {
	t.Helper()
	f := &foreignPool{t: t, name: name}
	var err error
	if f.dm, err = dmioctl.Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.dm.Close() })
	dir := newDir(t, 32<<20, 2<<20, 64<<10)
	attach := func(file string) loop.Device {
		d, err := loop.Attach(ctx, loop.Config{Backing: dir + file})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := loop.Detach(ctx, d, loop.DetachOptions{Backing: dir + file}); err != nil {
				t.Error(err)
			}
		})
		return d
	}
	f.meta, f.data = attach("/metadata"), attach("/data")
	f.table = dmioctl.ThinPool{Metadata: f.meta.Node, Data: f.data.Node, LengthSectors: 32 << 11, BlockSectors: 128,
		LowWaterMark: 7, Features: []string{"error_if_no_space"}}.Target()
	f.info = f.activate(name, uuid, f.table)
	for id := 1; id <= devices; id++ {
		if err := f.dm.CreateThin(name, uint32(id)); err != nil {
			t.Fatal(err)
		}
		f.write(uint32(id), byte(id))
	}
	return f
}

func (f *foreignPool) activate(name, uuid string, table dmioctl.Target) dmioctl.Info {
	f.t.Helper()
	info, err := f.dm.Activate(name, uuid, false, table)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := removePatiently(ctx, f.dm, name); err != nil {
			f.t.Error(err)
		}
	})
	return info
}

// with calls fn with the node of a device.
func (f *foreignPool) with(id uint32, fn func(d *os.File)) {
	f.t.Helper()
	info, err := f.dm.Activate("theirs", "", false, dmioctl.ThinTarget(f.info.Node(), id, 4<<11, ""))
	if err != nil {
		f.t.Fatal(err)
	}
	d, err := os.OpenFile(info.Node(), os.O_RDWR, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	fn(d)
	if err := errors.Join(d.Sync(), d.Close(), removePatiently(ctx, f.dm, "theirs")); err != nil {
		f.t.Fatal(err)
	}
}

func (f *foreignPool) write(id uint32, c byte) {
	f.with(id, func(d *os.File) {
		for off := int64(0); off < 4<<20; off += 192 << 10 {
			if _, err := d.WriteAt([]byte(strings.Repeat(string(rune('a'+c)), 5000)), off+1000); err != nil {
				f.t.Fatal(err)
			}
		}
	})
}

func (f *foreignPool) sum(id uint32) (sum uint32) {
	f.with(id, func(d *os.File) {
		h := crc32.NewIEEE()
		if _, err := io.Copy(h, d); err != nil {
			f.t.Fatal(err)
		}
		sum = h.Sum32()
	})
	return sum
}

// use does what an engine does with devices of its own.
func use(t testing.TB, p *Pool) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(p.CreateThin(ctx, 1000))
	d, err := p.Open(ctx, 1000, engine.OpenOptions{SizeBytes: 2 << 20})
	must(err)
	_, err = d.WriteAt(make([]byte, 1<<20), 0)
	must(err)
	must(p.CreateSnap(ctx, 1001, 1000))
	must(d.Discard(0, 512<<10))
	must(d.WriteZeroes(512<<10, 256<<10, false))
	n := 0
	must(p.Delta(ctx, 1000, 1001, func(thin.DeltaRange) error { n++; return nil }))
	if n == 0 {
		t.Error("an empty delta")
	}
	_, err = p.Usage(ctx)
	must(err)
	must(d.Flush())
	must(d.Close())
	must(p.Delete(ctx, 1000))
	must(p.Delete(ctx, 1001))
	must(p.SetTransactionID(ctx, 0, 5))
	must(p.SetTransactionID(ctx, 5, 0))
	must(p.Commit(ctx))
}

// TestNamedPool uses a pool that somebody else has made: an empty one as it is, one with devices
// only if asked to adopt it. Those devices stay as they are, every byte, and so does the pool.
func TestNamedPool(t *testing.T) {
	f := newForeignPool(t, "vg-thin_pool", "somebody's", 2)
	before := [2]uint32{f.sum(1), f.sum(2)}

	_, err := Open(ctx, Source{Pool: f.name}, Options{})
	if !errors.Is(err, ErrForeign) || !strings.Contains(fmt.Sprint(err), "2 thin devices") || !strings.Contains(fmt.Sprint(err), "--adopt") {
		t.Errorf("open a pool with devices: %v, want ErrForeign", err)
	}
	if err := os.MkdirAll("/dev/mapper", 0o755); err != nil {
		t.Fatal(err)
	}
	os.Symlink(f.info.Node(), "/dev/mapper/"+f.name)
	defer os.Remove("/dev/mapper/" + f.name)
	for _, name := range []string{f.name, "/dev/mapper/" + f.name, f.info.Node()} {
		p, err := Open(ctx, Source{Pool: name}, Options{Adopt: true, LowWaterMark: 100, BlockSize: 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		if st, err := p.Status(ctx); err != nil || st.Devices != 2 || st.LowWaterMark != 7 || !st.ErrorIfNoSpace {
			t.Errorf("status %+v, %v: the properties are those of the pool", st, err)
		}
		_, err = Open(ctx, Source{Pool: f.name}, Options{Adopt: true, LockWait: 1})
		if !errors.Is(err, dev.ErrLocked) {
			t.Errorf("open a pool twice: %v, want ErrLocked", err)
		}
		use(t, p)
		for what, err := range map[string]error{"grow": p.GrowData(ctx, 64<<20), "grow metadata": p.GrowMetadata(ctx, 4<<20)} {
			if !errors.Is(err, ErrForeign) {
				t.Errorf("%s: %v, want ErrForeign", what, err)
			}
		}
		if _, err := p.Trim(ctx); !errors.Is(err, ErrForeign) {
			t.Errorf("trim: %v, want ErrForeign", err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if after := [2]uint32{f.sum(1), f.sum(2)}; after != before {
		t.Errorf("foreign devices have changed: %x, were %x", after, before)
	}
	if now, err := f.dm.Table(f.name); err != nil || len(now) != 1 || now[0].Length != f.table.Length {
		t.Errorf("table %v, %v", now, err)
	}
	if info, err := f.dm.Info(f.name); err != nil || info.Suspended() || info.UUID != "somebody's" {
		t.Errorf("device %+v, %v", info, err)
	}
	// Held by somebody else.
	if err := f.dm.ReserveMetadataSnap(f.name); err != nil {
		t.Fatal(err)
	}
	p, err := Open(ctx, Source{Pool: f.name}, Options{Adopt: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Usage(ctx); !errors.Is(err, engine.ErrInUse) {
		t.Errorf("usage while somebody else holds the metadata snapshot: %v, want ErrInUse", err)
	}
	if list, err := p.Devices(ctx); err != nil || len(list) != 2 {
		t.Errorf("devices %v, %v", list, err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if st, err := f.dm.PoolStatus(f.name); err != nil || st.HeldRoot == 0 {
		t.Errorf("the metadata snapshot of somebody else is gone: %+v, %v", st, err)
	}

	empty := newForeignPool(t, "empty", "", 0)
	if p, err = Open(ctx, Source{Pool: "empty"}, Options{}); err != nil {
		t.Fatal(err)
	}
	use(t, p)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	_ = empty
}

// TestNotOurs: what cannot be used as a pool, each with its reason, and as it was afterwards.
func TestNotOurs(t *testing.T) {
	f := newForeignPool(t, "plain", "", 0)
	linear := f.activate("linear", "", dmioctl.Target{Length: 128, Type: "error"})
	_ = linear
	lvm := newForeignPool(t, "vg-pool-tpool", "LVM-abcdefgh-tpool", 1)
	lvm2 := newForeignPool(t, "vg-other", "LVM-ijklmnop", 1)
	lvm2.activate("vg-volume", "LVM-ijklmnop-volume", dmioctl.ThinTarget(lvm2.info.Node(), 1, 2048, ""))
	layer := lvm.activate("vg-pool", "LVM-abcdefgh", dmioctl.LinearTarget(lvm.info.Node(), 0, 128))
	_ = layer
	for _, c := range []struct {
		name string
		o    Options
		want error
		says string
	}{
		{"no-such-pool", Options{}, nil, "no device-mapper device"},
		{"linear", Options{}, nil, "no thin pool"},
		{"/dev/loop0", Options{}, nil, "no device-mapper device"},
		{"/no/such/path", Options{}, os.ErrNotExist, ""},
		{"plain", Options{BlockSize: 128 << 10}, nil, "65536 bytes, not of 131072"},
		{"vg-pool-tpool", Options{Adopt: true}, ErrForeign, "LVM"},
		{"vg-pool", Options{Adopt: true}, ErrForeign, "LVM"},
		{"vg-other", Options{Adopt: true}, ErrForeign, "vg-volume"},
	} {
		before := leftOver(t)
		p, err := Open(ctx, Source{Pool: c.name}, c.o)
		if err == nil {
			p.Close()
		}
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%s: %v, want %v that says %q", c.name, err, c.want, c.says)
		}
		if after := leftOver(t); len(after) != len(before) {
			t.Errorf("%s: in the kernel are %v, were %v", c.name, after, before)
		}
	}
	if err := f.dm.Suspend("plain", true, true); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, Source{Pool: "plain"}, Options{}); err == nil || !strings.Contains(err.Error(), "resume it") {
		t.Errorf("a suspended pool: %v", err)
	}
	if err := f.dm.Resume("plain"); err != nil {
		t.Fatal(err)
	}
}
