package user

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
)

// TestZeroesWaitForTheHost: zeros that the host had no space for are written once it has, and not
// taken for written.
func TestZeroesWaitForTheHost(t *testing.T) {
	tp := newPool(t, poolSize{}, Options{CommitInterval: 2 * time.Millisecond, NoSpaceTimeout: 20 * time.Second})
	tp.create(1)
	h := tp.thin(1, 4*block)
	write(t, h, fill(1, 4*block), 0)
	for _, keep := range []bool{true, false} {
		tp.data.Add(dev.Rule{Ops: dev.OpWrite | dev.OpZero, Times: 3, Err: unix.ENOSPC})
		must(t, h.WriteZeroes(4096, 2*block+8192, keep))
		wantBytes(t, h, 0, 2*block+8192, 4096)
		wantBytes(t, h, 1, 4096, 0)
		wantBytes(t, h, 1, 2*block-12288, 2*block+12288)
		tp.data.Clear()
		write(t, h, fill(1, 4*block), 0)
	}
}
