package nbdkernel

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// lanePair is a lane of a gate and the kernel's end of its socket.
func lanePair(t *testing.T, g *gate) (*lane, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return g.add(fds[0]), fds[1]
}

// A stuckDevice keeps its first write until it is let go.
type stuckDevice struct {
	*dev.Mem
	first atomic.Bool
	began chan struct{}
	let   chan struct{}
}

func (d *stuckDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.first.CompareAndSwap(false, true) {
		close(d.began)
		<-d.let
	}
	return d.Mem.WriteAt(p, off)
}

// TestGate: a write whose connection was shut is under way; sent again on another connection it waits
// for the first, so that old data cannot land after new.
func TestGate(t *testing.T) {
	g := newGate()
	a, kernelA := lanePair(t, g)
	b, _ := lanePair(t, g)
	m := &stuckDevice{Mem: dev.NewMem(1 << 20), began: make(chan struct{}), let: make(chan struct{})}
	onA, onB := a.wrap(m), b.wrap(m)
	first := make(chan error, 1)
	go func() {
		_, err := onA.WriteAt([]byte("old"), 0)
		first <- err
	}()
	<-m.began
	// While A is not shut, B goes on.
	if _, err := onB.WriteAt([]byte("else"), 4096); err != nil {
		t.Fatal(err)
	}
	unix.Shutdown(kernelA, unix.SHUT_RDWR)
	second := make(chan error, 1)
	go func() {
		_, err := onB.WriteAt([]byte("new"), 0)
		second <- err
	}()
	select {
	case <-second:
		t.Fatal("the write overtook itself")
	case <-time.After(100 * time.Millisecond):
	}
	// Nothing begins on A any more, though what was sent there can still be read.
	if _, err := onA.WriteAt([]byte("late"), 0); !errors.Is(err, dev.ErrClosed) {
		t.Errorf("a write on a connection that was shut: %v", err)
	}
	close(m.let)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if err := <-second; err != nil {
		t.Error(err)
	}
	got := make([]byte, 3)
	if m.ReadAt(got, 0); string(got) != "new" {
		t.Errorf("the device has %q", got)
	}
	// A lane that is gone keeps nobody.
	a.remove()
	if err := onB.Flush(); err != nil {
		t.Error(err)
	}
}

// TestGateForwards: a gated device has the extras of the device, and says where it has none.
func TestGateForwards(t *testing.T) {
	g := newGate()
	l, _ := lanePair(t, g)
	m := dev.NewMem(1 << 20)
	d := l.wrap(m)
	if err := errors.Join(d.(dev.Discarder).Discard(0, 4096), d.(dev.Zeroer).WriteZeroes(0, 4096, true)); err != nil {
		t.Error(err)
	}
	if _, ok := d.(dev.Trier); ok {
		t.Error("it tries what the device cannot try")
	}
	plain := l.wrap(struct{ dev.Device }{m})
	if err := plain.(dev.Discarder).Discard(0, 1); !errors.Is(err, dev.ErrUnsupported) {
		t.Errorf("discard: %v", err)
	}
	if err := plain.(dev.Zeroer).WriteZeroes(0, 1, true); !errors.Is(err, dev.ErrUnsupported) {
		t.Errorf("zeroes: %v", err)
	}
	if l.under != 0 {
		t.Errorf("%d requests are counted as under way", l.under)
	}
}
