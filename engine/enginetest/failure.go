package enginetest

import (
	"errors"
	"hash/crc32"
	"io"
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// heldRoot: one metadata snapshot at a time; while it is held nothing that it shows is freed.
func heldRoot(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	h, ok := p.p.(metadataSnapper)
	if !ok {
		t.Skipf("%s does not hold metadata snapshots for others", e.Name)
	}
	for i := range max(3, 20/e.Slow) {
		p.create(1)
		d := p.thin(1, mib)
		p.write(d, 1, mib, 0)
		p.must(d.Flush())
		if err := h.ReleaseMetadataSnap(ctx); err == nil {
			t.Errorf("cycle %d: released what is not held", i)
		}
		p.must(h.ReserveMetadataSnap(ctx))
		if p.status().HeldRoot == 0 {
			t.Errorf("cycle %d: nothing is held", i)
		}
		if err := h.ReserveMetadataSnap(ctx); err == nil {
			t.Errorf("cycle %d: held twice", i)
		}
		p.write(d, 2, mib/2, 0)
		p.done(d)
		p.remove(1)
		if used := p.used(); used < 16 {
			t.Errorf("cycle %d: %d blocks are used, the metadata snapshot shows 16", i, used)
		}
		p.must(h.ReleaseMetadataSnap(ctx))
		if s := p.status(); s.HeldRoot != 0 {
			t.Errorf("cycle %d: status after the release %+v", i, s)
		}
		if used := p.used(); used != 0 {
			t.Errorf("cycle %d: %d blocks are used by nobody", i, used)
		}
	}
}

func sum(t testing.TB, d dev.Device) uint32 {
	t.Helper()
	h := crc32.NewIEEE()
	if _, err := io.Copy(h, io.NewSectionReader(d, 0, d.Size())); err != nil {
		t.Fatal(err)
	}
	return h.Sum32()
}

// readOnly: everything can be read, nothing changes, not a bit of the metadata.
func readOnly(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	d := p.thin(1, mib)
	p.write(d, 1, mib/2, 0)
	p.must(d.Flush())
	p.snap(2, 1)
	p.close()
	m := p.s.Metadata(t)
	before := sum(t, m)
	m.Close()

	p.o.ReadOnly = true
	p.reopen()
	if s := p.status(); s.Mode != "ro" || s.NeedsCheck || s.DataUsed != 8 || s.Devices != 2 {
		t.Errorf("status %+v", s)
	}
	p.wantErr(p.p.CreateThin(ctx, 5), dev.ErrReadOnly, "create")
	p.wantErr(p.p.CreateSnap(ctx, 5, 1), dev.ErrReadOnly, "snapshot")
	p.wantErr(p.p.Delete(ctx, 1), dev.ErrReadOnly, "delete")
	p.wantErr(p.p.SetTransactionID(ctx, 0, 1), dev.ErrReadOnly, "set transaction id")
	p.wantErr(p.p.GrowData(ctx, 65*mib), dev.ErrReadOnly, "grow data")
	p.wantErr(p.p.GrowMetadata(ctx, 5*mib), dev.ErrReadOnly, "grow metadata")
	if _, err := p.p.Trim(ctx); !errors.Is(err, dev.ErrReadOnly) {
		t.Errorf("trim: %v", err)
	}
	p.must(p.p.Commit(ctx))
	for _, id := range []thin.DevID{1, 2} {
		v := p.view(id, mib)
		p.want(v, 1, mib/2, 0)
		p.want(v, 0, mib/2, mib/2)
		_, err := v.WriteAt([]byte{1}, 0)
		p.wantErr(err, dev.ErrReadOnly, "write")
	}
	u, err := p.p.Usage(ctx)
	if err != nil || u[1].Mapped != 8 || u[1].Exclusive != 0 {
		t.Errorf("usage %v, %v", u, err)
	}
	same := uint64(0)
	p.must(p.p.Delta(ctx, 1, 2, func(r thin.DeltaRange) error { same += r.Len; return nil }))
	if same != 8 {
		t.Errorf("%d blocks are the same, want 8", same)
	}
	p.close()
	m = p.s.Metadata(t)
	defer m.Close()
	if after := sum(t, m); after != before {
		t.Error("the metadata has changed")
	}
}

// needsCheck: when metadata cannot be written the pool turns read-only and no flush succeeds any
// more; it stays so when it is opened again, until it was checked. What was flushed before is all
// there.
func needsCheck(t *testing.T, e Engine) {
	f := small
	f.Faults = true
	p := newPool(t, e, f, Options{})
	p.create(1)
	d := p.thin(1, mib)
	p.write(d, 1, mib/2, 0)
	p.must(d.Flush())
	p.dirty = true
	p.s.Fail(t, true)
	p.write(d, 2, p.bs, mib/2)
	if err := d.Flush(); err == nil {
		t.Fatal("a flush whose commit failed was acknowledged")
	}
	p.eventually("read-only", func() bool { m := p.status().Mode; return m == "ro" || m == "Fail" })
	if s := p.status(); s.FailReason == "" {
		t.Errorf("the status does not say why: %+v", s)
	}
	if err := d.Flush(); err == nil && e.Name != "kernel" { // the kernel tells once, as it does for files
		t.Error("a later flush was acknowledged")
	}
	if _, err := d.WriteAt(make([]byte, 512), mib-p.bs); err == nil {
		t.Error("a write that needs a block was taken")
	}
	if err := p.p.CreateThin(ctx, 5); err == nil {
		t.Error("a device was made")
	}
	p.want(d, 1, mib/2, 0)
	p.s.Fail(t, false)
	p.close()

	p.reopen()
	if s := p.status(); !s.NeedsCheck || s.Mode != "ro" {
		t.Fatalf("status of the reopened pool %+v, want needs_check", s)
	}
	p.wantErr(p.p.CreateThin(ctx, 5), thin.ErrNeedsCheck, "create")
	p.wantErr(p.p.CreateThin(ctx, 5), dev.ErrReadOnly, "create")
	p.wantErr(p.p.Delete(ctx, 1), thin.ErrNeedsCheck, "delete")
	p.wantErr(p.p.GrowMetadata(ctx, 5*mib), thin.ErrNeedsCheck, "grow metadata")
	p.want(p.view(1, mib), 1, mib/2, 0)
	p.recover()
	if s := p.status(); s.NeedsCheck || s.Mode != "rw" {
		t.Errorf("status after the check %+v", s)
	}
	d = p.thin(1, mib)
	p.want(d, 1, mib/2, 0)
	p.write(d, 3, mib, 0)
	p.must(d.Flush())
	p.snap(2, 1)
	p.dirty = false
}

// closing: not while devices are open; twice is fine.
func closing(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	events, cancel := p.p.Events()
	defer cancel()
	d := p.thin(1, mib)
	p.write(d, 1, mib, 0) // not flushed
	p.wantErr(p.p.Close(), engine.ErrInUse, "close a pool with an open device")
	p.want(d, 1, mib, 0)
	p.done(d)
	p.must(d.Close())
	if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, dev.ErrClosed) {
		t.Errorf("read from a closed device: %v", err)
	}
	p.must(p.p.Close())
	p.must(p.p.Close())
	for range events { // ends
	}
	p.p, p.open = nil, nil
	p.reopen()
	p.want(p.view(1, mib), 1, mib, 0) // a close in order loses nothing
}
