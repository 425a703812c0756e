package enginetest

import (
	"testing"
)

// discards: whole blocks inside the range go, parts at its ends stay; holes in a fragmented
// device; what is freed can be used again.
func discards(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	d := p.thin(1, 4*mib)
	p.write(d, 1, 16*p.bs, 0)
	p.must(d.Discard(0, p.bs-512)) // a part of a block
	p.must(d.Discard(p.bs+512, p.bs-512))
	p.must(d.Discard(2*p.bs+512, p.bs)) // parts of two
	p.want(d, 1, 16*p.bs, 0)
	if n := d.MappedBlocks(); n != 16 {
		t.Errorf("%d blocks are mapped after discards of parts, want 16", n)
	}
	p.must(d.Discard(4*p.bs+512, 3*p.bs)) // two whole ones and parts
	p.want(d, 1, 5*p.bs, 0)
	p.want(d, 0, 2*p.bs, 5*p.bs)
	p.want(d, 1, 9*p.bs, 7*p.bs)
	if n := d.MappedBlocks(); n != 14 {
		t.Errorf("%d blocks are mapped, want 14", n)
	}
	for b := int64(0); b < 16; b += 2 {
		p.must(d.Discard(b*p.bs, p.bs))
	}
	for b := int64(0); b < 16; b++ {
		c := byte(b % 2)
		if b == 5 {
			c = 0
		}
		p.want(d, c, p.bs, b*p.bs)
	}
	if n, used := d.MappedBlocks(), p.used(); n != 7 || used != 7 {
		t.Errorf("%d blocks are mapped and %d used, want 7", n, used)
	}
	p.must(d.Discard(0, 4*mib)) // mapped or not
	p.must(d.Discard(0, 4*mib))
	p.want(d, 0, 4*mib, 0)
	if n, used := d.MappedBlocks(), p.used(); n != 0 || used != 0 {
		t.Errorf("%d blocks are mapped and %d used after a discard of all", n, used)
	}
	p.write(d, 2, 4*mib, 0)
	p.want(d, 2, 4*mib, 0)
	p.must(d.Discard(mib, 0))
	p.must(d.Flush())
	p.reopen()
	p.want(p.view(1, 4*mib), 2, 4*mib, 0)
}

// sharedDiscards: a discard takes the mapping of one device, and the block only with the last.
func sharedDiscards(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	d := p.thin(1, mib)
	p.write(d, 1, mib, 0)
	p.snap(2, 1)
	p.snap(3, 1)
	p.must(d.Discard(0, mib/2))
	p.want(d, 0, mib/2, 0)
	p.want(d, 1, mib/2, mib/2)
	s := p.thin(2, mib)
	p.want(s, 1, mib, 0)
	p.must(s.Discard(0, mib))
	p.want(s, 0, mib, 0)
	if used := p.used(); used != 16 {
		t.Errorf("%d blocks are used, snapshot 3 maps 16", used)
	}
	p.write(d, 4, mib/4, 0)
	v := p.view(3, mib)
	p.want(v, 1, mib, 0)
	p.done(v)
	p.remove(3)
	if used := p.used(); used != 12 {
		t.Errorf("%d blocks are used, device 1 maps 12", used)
	}
	p.must(d.Discard(0, mib))
	if used := p.used(); used != 0 {
		t.Errorf("%d blocks are used by nobody", used)
	}
	p.want(d, 0, mib, 0)
}

// writeZeroes reads as zeros, parts of blocks too, and other devices keep what they had.
func writeZeroes(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	d := p.thin(1, 2*mib)
	p.write(d, 1, mib, 0)
	p.snap(2, 1)
	p.must(d.WriteZeroes(1000, 10, false))
	p.want(d, 1, 1000, 0)
	p.want(d, 0, 10, 1000)
	p.want(d, 1, mib-1010, 1010)
	p.must(d.WriteZeroes(p.bs/2, 4*p.bs, false))
	p.want(d, 0, 4*p.bs, p.bs/2)
	p.want(d, 1, mib-4*p.bs-p.bs/2, 4*p.bs+p.bs/2)
	if n := d.MappedBlocks(); n != 13 {
		t.Errorf("%d blocks are mapped, want 13: zeros need none", n)
	}
	p.must(d.WriteZeroes(0, 2*mib, true))
	p.want(d, 0, 2*mib, 0)
	p.must(d.Flush())
	p.want(p.view(2, mib), 1, mib, 0)
	p.reopen()
	p.want(p.view(1, 2*mib), 0, 2*mib, 0)
}
