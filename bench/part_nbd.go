package bench

import (
	"context"
	"path/filepath"

	"mica/bench/peer"
)

var nbdPart = part{
	id: "nbd", title: "Network block device on a Unix socket",
	about: "nbdkit with its file plugin, qemu-nbd on a raw file and on qcow2 (clusters of 64 KiB), mica on a thin device and on a " +
		"plain file. The client is fio's nbd engine, the same for all. Every server has a file of its own on the same medium; it " +
		"is written before, but for allocation. A request is 4 KiB at a random place, or 1 MiB in sequence at depth 4.",
	run: runNBD,
}

var nbdDiskPart = part{
	id: "nbd-disk", title: "Network block device, on a real disk", disk: true,
	about: "The same servers and jobs, with files on a real disk. All of them go through the page cache, which has what was written " +
		"before; what is new is written back while a job runs.",
	run: func(ctx context.Context, r *runner) error {
		return r.rounds(3, func() error {
			s, err := r.mapped(ctx, r.nbdDevices(r.dir, true), "nbd-disk", "Mapped blocks, one connection")
			if err == nil {
				err = s.stop()
			}
			if err != nil {
				return err
			}
			_, err = r.nbdFirstWrites(ctx, "nbd-disk-first", s.columns)
			return err
		})
	},
}

// The columns of most tables.
const (
	colNBDKit    = "nbdkit file"
	colQemuRaw   = "qemu-nbd raw"
	colQemuQcow2 = "qemu-nbd qcow2"
	colThin      = "mica thin"
	colPlain     = "mica plain file"
)

// nbdDevices are the five of them, with media in dir that are written
// all over or empty.
func (r *runner) nbdDevices(dir string, filled bool) []device {
	file := func(name string) string { return filepath.Join(dir, name) }
	plain := func(name string) func(context.Context) error {
		return func(ctx context.Context) error { return r.plainFile(ctx, file(name), filled) }
	}
	return []device{
		{colNBDKit, plain("kit"), func(ctx context.Context) (*peer.Server, error) {
			return peer.NBDKitFile(ctx, file("kit"), r.fresh("s"))
		}},
		{colQemuRaw, plain("raw"), func(ctx context.Context) (*peer.Server, error) {
			return peer.QemuNBD(ctx, file("raw"), "raw", r.fresh("s"))
		}},
		{colQemuQcow2, func(ctx context.Context) error { return r.qcow2(ctx, file("qcow2"), filled) },
			func(ctx context.Context) (*peer.Server, error) {
				return peer.QemuNBD(ctx, file("qcow2"), "qcow2", r.fresh("s"))
			}},
		{colThin, func(ctx context.Context) error { return r.thinDevice(ctx, file("pool"), filled) },
			func(ctx context.Context) (*peer.Server, error) {
				return r.own("thin", peer.Own{Pool: file("pool"), ID: thinID, Size: r.Size}).NBD(ctx, r.fresh("s"))
			}},
		{colPlain, plain("plain"), func(ctx context.Context) (*peer.Server, error) {
			return r.own("plain", peer.Own{File: file("plain")}).NBD(ctx, r.fresh("s"))
		}},
	}
}

func runNBD(ctx context.Context, r *runner) error {
	s, err := r.mapped(ctx, r.nbdDevices(r.dir, true), "nbd", "Mapped blocks, one connection")
	if err != nil {
		return err
	}
	t := s.t
	for _, row := range []string{"4 KiB random read, depth 16", "4 KiB random write, depth 16"} {
		t.Targets = append(t.Targets, Target{Row: row, Own: colThin, Peer: colQemuQcow2, Want: 2},
			Target{Row: row, Own: colThin, Peer: colPlain, Want: 0.9})
	}
	t.Targets = append(t.Targets,
		Target{Row: "4 KiB random read, depth 16", Own: colPlain, Peer: colNBDKit, Want: 0.9},
		Target{Row: "4 KiB random write, depth 16", Own: colPlain, Peer: colNBDKit, Want: 0.75},
		Target{Row: "1 MiB read", Own: colThin, Peer: "best", Want: 1},
		Target{Row: "1 MiB write, mapped", Own: colThin, Peer: "best", Want: 1})

	t = r.table("nbd-4", "Mapped blocks, four connections", s.columns...)
	err = r.loads(ctx, t, s.clients,
		r.random("4 KiB random read, depth 16, 4 connections", "randread", 16, 4),
		r.random("4 KiB random write, depth 16, 4 connections", "randwrite", 16, 4),
		r.sequential("1 MiB read, 4 connections", "read", 4),
		r.sequential("1 MiB write, 4 connections", "write", 4))
	if err != nil {
		return err
	}
	if err := s.stop(); err != nil {
		return err
	}
	t, err = r.nbdFirstWrites(ctx, "nbd-first", s.columns)
	if err == nil {
		t.Targets = append(t.Targets, Target{Row: t.Rows[0].Name, Own: colThin, Peer: "best", Want: 1},
			Target{Row: t.Rows[2].Name, Own: colThin, Peer: colQemuQcow2, Want: 2.5})
	}
	return err
}
