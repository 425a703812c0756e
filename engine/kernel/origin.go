package kernel

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/export/loop"
)

// originNumber is the external origin as the table names it. The kernel wants a block device: a
// file gets a loop device, read-only, for as long as the thin device is open.
func (t *Thin) originNumber(ctx context.Context) (string, error) {
	if t.under != nil {
		return number(t.under.rdev), nil
	}
	path := ""
	switch o := t.origin.(type) {
	case interface{ Node() string }:
		path = o.Node()
	case interface{ Path() string }:
		path = o.Path()
	default:
		return "", fmt.Errorf("external origin of type %T: the kernel engine wants a file or a block device: %w", o, dev.ErrUnsupported)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &os.PathError{Op: "external origin", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return number(st.Rdev), nil
	}
	d, err := loop.Attach(ctx, loop.Config{Backing: path, ReadOnly: true})
	if err != nil {
		return "", fmt.Errorf("external origin: %w", err)
	}
	m := &medium{path: path, loop: d, node: d.Node}
	if err := unix.Stat(d.Node, &st); err != nil {
		return "", &os.PathError{Op: "external origin", Path: d.Node, Err: err}
	}
	m.rdev = st.Rdev
	t.under = m
	return number(m.rdev), nil
}

// release takes the loop device of an external origin away.
func (m *medium) release() {
	if m == nil {
		return
	}
	_ = loop.Detach(context.Background(), m.loop, loop.DetachOptions{Backing: loop.Backing(m.loop.Number)})
}
