package enginetest

import (
	"os"
	"path/filepath"
	"testing"

	"mica/dev"
	"mica/dev/devtest"
	"mica/engine"
)

// device runs the suite of dev.Device on thin devices of several block sizes.
func device(t *testing.T, e Engine) {
	const size = 5*mib + 512
	for _, bs := range []int64{64 * kib, 192 * kib, mib} {
		var last *pool
		devtest.Run(t, size, func(t *testing.T) dev.Device {
			last = newPool(t, e, Format{BlockSize: bs, DataBytes: 32*mib/bs*bs + 8*bs, MetadataBytes: 4 * mib}, Options{})
			last.create(1)
			return last.thin(1, size)
		}, devtest.Options{Ops: 300 / e.Slow, Fixed: true, Reopen: func(t *testing.T) dev.Device {
			last.reopen()
			return last.thin(1, size)
		}})
		if e.Slow > 1 {
			break
		}
	}
}

// handles: one writer, or several readers; a size each; what is read-only stays as it is.
func handles(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	w := p.thin(1, mib)
	if w.ID() != 1 || w.ReadOnly() || w.Size() != mib || w.BlockSize() != p.bs {
		t.Errorf("writable handle: id %d, read-only %v, size %d, block size %d", w.ID(), w.ReadOnly(), w.Size(), w.BlockSize())
	}
	for _, ro := range []bool{false, true} {
		_, err := p.p.Open(ctx, 1, engine.OpenOptions{SizeBytes: mib, ReadOnly: ro})
		p.wantErr(err, engine.ErrInUse, "open a device that is open for writing")
	}
	p.write(w, 1, 100*kib, 300*kib)
	p.must(w.Flush())
	if n := w.MappedBlocks(); n != 3 {
		t.Errorf("%d blocks are mapped, want 3", n)
	}
	p.done(w)
	a, b := p.view(1, mib), p.view(1, 2*mib)
	if !a.ReadOnly() {
		t.Error("a read-only handle says that it is not")
	}
	_, err := p.p.Open(ctx, 1, engine.OpenOptions{SizeBytes: mib})
	p.wantErr(err, engine.ErrInUse, "open a device that has readers for writing")
	_, err = a.WriteAt([]byte{1}, 0)
	p.wantErr(err, dev.ErrReadOnly, "write through a read-only handle")
	p.wantErr(a.Discard(0, mib), dev.ErrReadOnly, "discard through a read-only handle")
	p.wantErr(a.WriteZeroes(0, mib, false), dev.ErrReadOnly, "write zeroes through a read-only handle")
	p.must(a.Flush())
	p.want(a, 1, 100*kib, 300*kib)
	p.want(b, 0, mib, mib)
	p.done(a)
	p.want(b, 1, 100*kib, 300*kib)
	for _, size := range []int64{0, -512, 1000} {
		if _, err := p.p.Open(ctx, 1, engine.OpenOptions{SizeBytes: size, ReadOnly: true}); err == nil {
			t.Errorf("a device of %d bytes was opened", size)
		}
	}
}

// resize: what is cut off is hidden, not lost.
func resize(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	d := p.thin(1, 2*mib)
	p.write(d, 1, 2*mib, 0)
	p.must(d.Resize(8 * mib))
	if d.Size() != 8*mib {
		t.Errorf("size %d after growth", d.Size())
	}
	p.want(d, 0, 6*mib, 2*mib)
	p.write(d, 2, mib, 7*mib)
	p.must(d.Resize(mib))
	if _, err := d.WriteAt([]byte{1}, mib); err == nil {
		t.Error("a write beyond the end of a device that was made shorter")
	}
	p.want(d, 1, mib, 0)
	p.must(d.Resize(8 * mib))
	p.want(d, 1, 2*mib, 0)
	p.want(d, 2, mib, 7*mib)
	if err := d.Resize(1000); err == nil {
		t.Error("a size that is no multiple of 512 was taken")
	}
	if last, ok, err := p.p.HighestMapped(ctx, 1); err != nil || !ok || int64(last) != 8*mib/p.bs-1 {
		t.Errorf("highest mapped block: %d %v %v", last, ok, err)
	}
}

// externalOrigin: read where nothing is mapped, a shorter tail included; copied where only a
// part of a block is written; in sight again after a discard.
func externalOrigin(t *testing.T, e Engine) {
	dir, err := os.MkdirTemp("/dev/shm", "origin-")
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	const originSize = mib + 100*kib + 512 // ends inside a block
	path := filepath.Join(dir, "origin")
	origin, err := dev.CreateFile(path, originSize, dev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { origin.Close() })
	p := newPool(t, e, small, Options{})
	p.write(origin, 9, originSize, 0)
	p.must(origin.Flush())
	p.create(1)
	o := engine.OpenOptions{SizeBytes: 2 * mib, ExternalOrigin: origin}
	d := p.with(1, o)
	p.want(d, 9, originSize, 0)
	p.want(d, 0, 2*mib-originSize, originSize)

	p.write(d, 1, 4096, 8192) // a part of a block
	p.want(d, 9, 8192, 0)
	p.want(d, 1, 4096, 8192)
	p.want(d, 9, 64*kib-12288, 12288)
	tail := originSize / p.bs * p.bs // the block in which the origin ends
	p.write(d, 2, 512, tail)
	p.want(d, 2, 512, tail)
	p.want(d, 9, originSize-tail-512, tail+512)
	p.want(d, 0, tail+p.bs-originSize, originSize)
	if n := d.MappedBlocks(); n != 2 {
		t.Errorf("%d blocks are mapped, want 2", n)
	}
	p.must(d.WriteZeroes(128*kib, 64*kib, false))
	p.want(d, 0, 64*kib, 128*kib)
	p.must(d.Discard(0, 64*kib))
	p.want(d, 9, 64*kib, 0)
	// A snapshot of it needs the same origin.
	p.snap(2, 1)
	p.write(d, 3, 64*kib, 0)
	s := p.with(2, engine.OpenOptions{SizeBytes: 2 * mib, ReadOnly: true, ExternalOrigin: origin})
	p.want(s, 9, 128*kib, 0)
	p.want(s, 0, 64*kib, 128*kib)
	p.want(s, 2, 512, tail)
	p.must(d.Flush())
	p.done(d)
	p.done(s)
	p.want(origin, 9, originSize, 0)
}
