package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"mica/bench/fio"
	"mica/bench/peer"
	"mica/dev"
	"mica/engine"
	"mica/engine/kernel"
	"mica/engine/user"
	"mica/export"
	"mica/export/fuse"
	"mica/export/nbdkernel"
	"mica/export/ublk"
	"mica/thin"
)

// GuestDisks are the disks of the machine that Guest runs in, in the order of its kernel: one that is
// measured as it is, then data and metadata of the kernel's pool, and of ours.
const GuestDisks = 5

// GuestDiskBytes is the length of the i-th disk for devices of size bytes.
func GuestDiskBytes(i int, size int64) int64 {
	switch i {
	case 0:
		return size
	case 1:
		return 3*size + 64<<20
	case 3:
		return 6*size + 64<<20
	}
	return 16 << 20
}

const aboutVM = "A machine in an emulator (QEMU without hardware support), because the kernel that the rest runs on has no device-mapper, " +
	"ublk or NBD client: a plain disk, the kernel's dm-thin, and thin devices of our engine through ublk, the kernel's NBD client, and " +
	"FUSE with a loop device, all on disks of the same kind, whose files lie in memory. An emulated processor runs our code and the " +
	"kernel's alike some ten times slower than a real one, and waking another processor is dearer still, which our servers do more " +
	"often than dm-thin. On the other hand they read and write through the page cache, while dm-thin goes to the disk. The emulator copies " +
	"memory by words here, because byte by byte, as it would otherwise, is a hundred times slower than a real processor."

// The columns in the machine.
const (
	colDisk = "plain disk"
	colDM   = "kernel dm-thin"
	colUblk = "mica ublk"
	colNBDK = "mica NBD client"
	colFuse = "mica FUSE and loop"
)

// Guest measures inside the machine, on its disks, which are empty. helper is the command that
// changes loop devices for this process.
func Guest(ctx context.Context, o Options, disks []string, helper []string) (_ Part, err error) {
	o.setDefaults()
	r := &runner{Options: o, out: Part{ID: "vm", Title: "Block device, on a kernel with dm-thin and ublk", About: aboutVM}}
	if r.dir, err = os.MkdirTemp("", "guest-"); err != nil {
		return r.out, err
	}
	r.out.Medium = "disks of the emulator in files in memory"
	err = r.guest(ctx, disks, helper)
	return r.out, errors.Join(err, r.cleanUp())
}

// A self is a client that this process serves, or its kernel.
func self(name, node string, own bool) *client {
	s := &peer.Server{Node: node}
	if own {
		s.Self = os.Getpid()
	}
	return &client{name: name, s: s}
}

func (r *runner) guest(ctx context.Context, disks, helper []string) error {
	if len(disks) != GuestDisks {
		return fmt.Errorf("%d disks, want %d", len(disks), GuestDisks)
	}
	r.Log("== vm: filling devices of %s", bytesName(r.Size))
	d, err := dev.OpenBlock(disks[0], dev.OpenOptions{})
	if err != nil {
		return err
	}
	if err := errors.Join(peer.FillDevice(ctx, d), d.Flush(), d.Close()); err != nil {
		return err
	}
	kpool, err := r.kernelPool(ctx, disks[1], disks[2])
	if err != nil {
		return err
	}
	kdev, err := r.filled(ctx, kpool, 1)
	if err != nil {
		return err
	}
	upool, err := r.userPool(ctx, disks[3], disks[4])
	if err != nil {
		return err
	}
	var nodes []string
	exporters, err := r.exporters(helper)
	if err != nil {
		return err
	}
	for i, e := range exporters {
		h, err := r.filled(ctx, upool, thin.DevID(i+1))
		if err != nil {
			return err
		}
		node, err := r.attach(ctx, e, fmt.Sprint("d", i), h)
		if err != nil {
			return err
		}
		nodes = append(nodes, node)
	}
	clients := []*client{self(colDisk, disks[0], false), self(colDM, kdev.(export.Noder).Node(), false),
		self(colUblk, nodes[0], true), self(colNBDK, nodes[1], true), self(colFuse, nodes[2], true)}
	t := r.table("vm", "Mapped blocks", colDisk, colDM, colUblk, colNBDK, colFuse)
	synced := job{"4 KiB write and fsync, depth 1", fio.Job{RW: "randwrite", Block: 4096, Size: r.Size, Runtime: r.Runtime, Fsync: 1}, "IOPS", iops}
	err = r.loads(ctx, t, clients,
		r.random("4 KiB random read, depth 1", "randread", 1, 1),
		r.random("4 KiB random read, depth 16", "randread", 16, 1),
		r.random("4 KiB random write, depth 16", "randwrite", 16, 1),
		synced,
		r.sequential("1 MiB read", "read", 1),
		r.sequential("1 MiB write, mapped", "write", 1))
	if err != nil {
		return err
	}
	for _, row := range []string{"4 KiB random read, depth 16", "4 KiB random write, depth 16"} {
		t.Targets = append(t.Targets, Target{Row: row, Own: colUblk, Peer: colDM, Want: 0.5})
	}
	return r.guestSnapshots(ctx, kpool, upool, exporters[0])
}

// guestSnapshots writes into fresh snapshots of the devices that were measured.
func (r *runner) guestSnapshots(ctx context.Context, kpool, upool engine.Pool, ublk export.Exporter) error {
	t := r.table("vm-snapshot", "Fresh snapshots", colDM, colUblk)
	j := fio.Job{RW: "randwrite", Block: 4096, Depth: 16, Size: r.Size, Count: int(r.Size / blockBytes / 2)}
	id := thin.DevID(100)
	on := func(pool engine.Pool, attach func(h engine.Thin) (node string, detach func() error, err error)) meter {
		return func(ctx context.Context) (figure, error) {
			id++
			if err := pool.CreateSnap(ctx, id, 1); err != nil {
				return figure{}, err
			}
			h, err := pool.Open(ctx, id, engine.OpenOptions{SizeBytes: r.Size})
			if err != nil {
				return figure{}, err
			}
			node, detach, err := attach(h)
			if err != nil {
				return figure{}, errors.Join(err, h.Close())
			}
			f, err := load(self("", node, false), j, iops)(ctx)
			return f, errors.Join(err, detach(), h.Close(), pool.Delete(ctx, id))
		}
	}
	row := Row{Name: "4 KiB random write into a fresh snapshot", Unit: "IOPS", Better: "higher"}
	return r.measure(ctx, t, row,
		on(kpool, func(h engine.Thin) (string, func() error, error) {
			return h.(export.Noder).Node(), func() error { return nil }, nil
		}),
		on(upool, func(h engine.Thin) (string, func() error, error) {
			a, err := ublk.Attach(ctx, fmt.Sprint("s", id), h, export.AttachOptions{})
			if err != nil {
				return "", nil, err
			}
			return a.Node(), func() error { return a.Detach(context.Background()) }, nil
		}))
}

func (r *runner) kernelPool(ctx context.Context, data, metadata string) (engine.Pool, error) {
	if err := user.Format(ctx, user.Location{Data: data, Metadata: metadata}, user.FormatOptions{}); err != nil {
		return nil, err
	}
	p, err := kernel.Open(ctx, kernel.Source{Data: data, Metadata: metadata}, kernel.Options{})
	if err != nil {
		return nil, err
	}
	r.defers(p.Close)
	return p, nil
}

func (r *runner) userPool(ctx context.Context, data, metadata string) (engine.Pool, error) {
	l := user.Location{Data: data, Metadata: metadata}
	if err := user.Format(ctx, l, user.FormatOptions{}); err != nil {
		return nil, err
	}
	p, err := user.Open(ctx, l, user.Options{})
	if err != nil {
		return nil, err
	}
	r.defers(p.Close)
	return p, nil
}

// filled makes a thin device that is written all over.
func (r *runner) filled(ctx context.Context, p engine.Pool, id thin.DevID) (engine.Thin, error) {
	if err := p.CreateThin(ctx, id); err != nil {
		return nil, err
	}
	h, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: r.Size})
	if err != nil {
		return nil, err
	}
	r.defers(h.Close)
	return h, errors.Join(peer.FillDevice(ctx, h), h.Flush())
}

// exporters are ours, in the order of the columns.
func (r *runner) exporters(helper []string) ([]export.Exporter, error) {
	run := r.path("run")
	if err := os.Mkdir(run, 0o700); err != nil {
		return nil, err
	}
	u, err := ublk.New(ublk.Options{RunDir: run})
	if err != nil {
		return nil, err
	}
	n, err := nbdkernel.New(nbdkernel.Options{RunDir: run})
	if err != nil {
		return nil, err
	}
	f, err := fuse.New(fuse.Options{RunDir: run, HelperCommand: helper})
	if err != nil {
		return nil, err
	}
	r.defers(func() error { return errors.Join(u.Close(), n.Close(), f.Close()) })
	return []export.Exporter{u, n, f}, nil
}

func (r *runner) attach(ctx context.Context, e export.Exporter, name string, d dev.Device) (string, error) {
	a, err := e.Attach(ctx, name, d, export.AttachOptions{})
	if err != nil {
		return "", fmt.Errorf("%s: %w", e.Kind(), err)
	}
	r.defers(func() error { return a.Detach(context.Background()) })
	return filepath.Clean(a.Node()), nil
}
