package enginetest

import (
	"math"
	"strings"
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// emptyThins makes a lot of devices that nothing is ever written to.
func emptyThins(t *testing.T, e Engine) {
	f := small
	f.MetadataBytes = 8 * mib // each has a root
	p := newPool(t, e, f, Options{})
	n := 1000 / e.Slow
	for i := range n {
		p.create(thin.DevID(i))
	}
	list, err := p.p.Devices(ctx)
	p.must(err)
	if len(list) != n || p.status().Devices != n || p.used() != 0 {
		t.Errorf("%d devices, status %+v, want %d devices and no block", len(list), p.status(), n)
	}
	for i, d := range list {
		if d.ID != thin.DevID(i) || d.MappedBlocks != 0 {
			t.Fatalf("device %d of the list: %+v", i, d)
		}
	}
	d := p.view(thin.DevID(n/2), mib)
	p.want(d, 0, mib, 0)
	p.done(d)
	p.reopen()
	if got := p.status().Devices; got != n {
		t.Errorf("%d devices after reopening, want %d", got, n)
	}
	for i := range n {
		p.remove(thin.DevID(i))
	}
	if list, err := p.p.Devices(ctx); err != nil || len(list) != 0 {
		t.Errorf("after deleting all: %s, %v", idList(list), err)
	}
}

// ids: 24 bits, zero included.
func ids(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	const last = 1<<24 - 1
	p.create(0, last)
	p.snap(last-1, last)
	for _, id := range []thin.DevID{last + 1, math.MaxUint32} {
		if err := p.p.CreateThin(ctx, id); err == nil {
			t.Errorf("device %d was made", id)
		}
		if err := p.p.CreateSnap(ctx, id, 0); err == nil {
			t.Errorf("snapshot %d was made", id)
		}
		if err := p.p.CreateSnap(ctx, 5, id); err == nil {
			t.Errorf("a snapshot of device %d was made", id)
		}
		if err := p.p.Delete(ctx, id); err == nil {
			t.Errorf("device %d was deleted", id)
		}
	}
	list, err := p.p.Devices(ctx)
	p.must(err)
	if got := idList(list); got != "0 16777214 16777215 " {
		t.Errorf("devices %s", got)
	}
	p.remove(0)
	p.remove(last)
}

// errorsOfAdmin: each condition has its error, and changes nothing.
func errorsOfAdmin(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	p.snap(2, 1)
	p.wantErr(p.p.CreateThin(ctx, 2), thin.ErrExists, "create a device that is there")
	p.wantErr(p.p.CreateSnap(ctx, 2, 1), thin.ErrExists, "snapshot onto a device that is there")
	p.wantErr(p.p.CreateSnap(ctx, 3, 77), thin.ErrNotFound, "snapshot of a device that is not there")
	p.wantErr(p.p.Delete(ctx, 77), thin.ErrNotFound, "delete a device that is not there")
	_, err := p.p.Open(ctx, 77, engine.OpenOptions{SizeBytes: mib})
	p.wantErr(err, thin.ErrNotFound, "open a device that is not there")
	_, err = p.p.Device(ctx, 77)
	p.wantErr(err, thin.ErrNotFound, "look at a device that is not there")
	_, _, err = p.p.HighestMapped(ctx, 77)
	p.wantErr(err, thin.ErrNotFound, "highest block of a device that is not there")
	p.wantErr(p.p.Delta(ctx, 1, 77, func(thin.DeltaRange) error { return nil }), thin.ErrNotFound, "delta with a device that is not there")
	for _, ro := range []bool{false, true} {
		d := p.with(1, engine.OpenOptions{SizeBytes: mib, ReadOnly: ro})
		p.wantErr(p.p.Delete(ctx, 1), engine.ErrInUse, "delete an open device")
		p.done(d)
	}
	if list, err := p.p.Devices(ctx); err != nil || idList(list) != "1 2 " {
		t.Errorf("devices %s, %v", idList(list), err)
	}
	p.remove(1)
	if list, err := p.p.Devices(ctx); err != nil || idList(list) != "2 " {
		t.Errorf("devices %s, %v", idList(list), err)
	}
}

// transactionIDs: compare and swap of any 64-bit number, durable, noted in new devices.
func transactionIDs(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	last := uint64(0)
	for _, next := range []uint64{1, 2, 1 << 40, math.MaxUint64, 0, 7} {
		if err := p.p.SetTransactionID(ctx, last+1, next); err == nil {
			t.Errorf("set from %d, it is %d", last+1, last)
		} else if !strings.Contains(err.Error(), "it is") {
			t.Errorf("the error does not say what the id is: %v", err)
		}
		p.must(p.p.SetTransactionID(ctx, last, next))
		last = next
		p.reopen()
		if got := p.status().TransactionID; got != next {
			t.Errorf("transaction id %d after reopening, want %d", got, next)
		}
	}
	p.create(1)
	d, err := p.p.Device(ctx, 1)
	if err != nil || d.TransactionID != 7 {
		t.Errorf("device %+v, %v, want transaction id 7", d, err)
	}
}

// blockSizes: the limits, and sizes that are no power of two.
func blockSizes(t *testing.T, e Engine) {
	for _, bs := range []int64{0, 512, 32 * kib, 96 * kib, 64*kib + 512, 1<<30 + 64*kib, 2 << 30} {
		d := dev.NewMem(4 * mib)
		if err := thin.Format(d, thin.FormatOptions{DataBlockSize: bs, DataBlocks: 16}); bs != 0 && err == nil {
			t.Errorf("a pool with blocks of %d bytes was made", bs)
		}
	}
	for i, bs := range []int64{64 * kib, 128 * kib, 192 * kib, 448 * kib, mib, 4 * mib} {
		if e.Slow > 1 && i%2 == 1 {
			continue
		}
		p := newPool(t, e, Format{BlockSize: bs, DataBytes: 12 * bs, MetadataBytes: 2 * mib}, Options{ErrorIfNoSpace: true})
		p.create(1)
		d := p.thin(1, 8*bs)
		p.write(d, 1, 1000, bs-500) // the end of one block and the beginning of the next
		p.snap(2, 1)
		p.write(d, 2, bs, bs/2)
		p.want(d, 0, bs/2, 0)
		p.want(d, 2, bs, bs/2)
		p.want(d, 0, bs/2, bs+bs/2)
		s := p.view(2, 8*bs)
		p.want(s, 0, bs-500, 0)
		p.want(s, 1, 1000, bs-500)
		p.want(s, 0, bs-500, bs+500)
		if st := p.status(); st.BlockSize != bs || st.DataBlocks != 12 {
			t.Errorf("blocks of %d bytes: status %+v", bs, st)
		}
		p.must(d.Flush())
		p.close()
		p.check()
	}
}

// createDelete: whatever a device used is free again after its end, of metadata too.
func createDelete(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1000)
	p.must(p.p.Commit(ctx))
	before := p.status()
	for i := range 100 / e.Slow {
		id := thin.DevID(i % 3)
		p.create(id)
		d := p.thin(id, 16*mib)
		for b := range int64(8) {
			p.write(d, byte(i+1), 512, b*2*mib)
		}
		p.snap(500, id)
		p.write(d, byte(i+2), p.bs, 0)
		p.must(d.Flush())
		p.done(d)
		p.remove(id)
		s := p.view(500, 16*mib)
		p.want(s, byte(i+1), 512, 14*mib)
		p.done(s)
		p.remove(500)
	}
	if used := p.used(); used != before.DataUsed {
		t.Errorf("%d data blocks are used, %d were before", used, before.DataUsed)
	}
	if after := p.status(); after.MetaUsed > before.MetaUsed+1 || after.Devices != 1 {
		t.Errorf("status %+v, before %+v", after, before)
	}
}
