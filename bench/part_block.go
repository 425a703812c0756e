package bench

import (
	"context"
	"path/filepath"

	"mica/bench/fio"
	"mica/bench/peer"
)

var blockPart = part{
	id: "block", title: "Block device on this host",
	about: "A file as a block device. The plain loop device is the ceiling: the kernel alone, direct I/O. mica is its FUSE server " +
		"with a loop device with direct I/O on it; qemu-storage-daemon is its FUSE export with a loop device on it that goes through " +
		"the page cache, because with direct I/O what it returns is wrong. fio's libaio engine with direct I/O on the node.",
	run: runBlock,
}

const (
	colLoop     = "plain loop"
	colQSDRaw   = "qemu-storage-daemon raw"
	colQSDQcow2 = "qemu-storage-daemon qcow2"
)

// blockDevices are files, pools and images in dir as block devices.
func (r *runner) blockDevices(dir string, filled bool) []device {
	file := func(name string) string { return filepath.Join(dir, name) }
	plain := func(name string) func(context.Context) error {
		return func(ctx context.Context) error { return r.plainFile(ctx, file(name), filled) }
	}
	return []device{
		{colLoop, plain("loop"), func(ctx context.Context) (*peer.Server, error) { return peer.PlainLoop(ctx, file("loop")) }},
		{colQSDRaw, plain("raw"), func(ctx context.Context) (*peer.Server, error) {
			return peer.StorageDaemon(ctx, file("raw"), "raw", r.fresh("m"))
		}},
		{colQSDQcow2, func(ctx context.Context) error { return r.qcow2(ctx, file("qcow2"), filled) },
			func(ctx context.Context) (*peer.Server, error) {
				return peer.StorageDaemon(ctx, file("qcow2"), "qcow2", r.fresh("m"))
			}},
		{colThin, func(ctx context.Context) error { return r.thinDevice(ctx, file("pool"), filled) },
			func(ctx context.Context) (*peer.Server, error) {
				return r.own("thin", peer.Own{Pool: file("pool"), ID: thinID, Size: r.Size}).Block(ctx, r.fresh("run"))
			}},
		{colPlain, plain("plain"), func(ctx context.Context) (*peer.Server, error) {
			return r.own("plain", peer.Own{File: file("plain")}).Block(ctx, r.fresh("run"))
		}},
	}
}

func runBlock(ctx context.Context, r *runner) error {
	s, err := r.mapped(ctx, r.blockDevices(r.dir, true), "block", "Mapped blocks")
	if err != nil {
		return err
	}
	for _, row := range []string{"4 KiB random read, depth 16", "4 KiB random write, depth 16"} {
		s.t.Targets = append(s.t.Targets,
			Target{Row: row, Own: colThin, Peer: colQSDQcow2, Want: 2},
			Target{Row: row, Own: colThin, Peer: colPlain, Want: 0.9},
			Target{Row: row, Own: colPlain, Peer: colLoop, Want: 0.4})
	}
	if err := r.besideFsync(ctx, s.clients, s.columns); err != nil {
		return err
	}
	return s.stop()
}

// besideFsync lets one job write 4 KiB at depth 1 while another writes and syncs each write.
func (r *runner) besideFsync(ctx context.Context, clients []*client, columns []string) error {
	t := r.table("block-fsync", "4 KiB writes of one job beside fsync of another, p99", columns...)
	half := r.Size / 2
	jobs := func(c *client) (writer, syncer fio.Job) {
		writer = c.target(fio.Job{RW: "randwrite", Block: 4096, Size: half, Runtime: 2 * r.Runtime})
		syncer = writer
		syncer.Offset, syncer.Fsync, syncer.Engine = half, 1, "psync"
		return writer, syncer
	}
	var sweeps []sweep
	for _, c := range clients {
		sweeps = append(sweeps, func(ctx context.Context) ([]figure, error) {
			w, s := jobs(c)
			alone, err := fio.Run(ctx, w)
			if err != nil {
				return nil, err
			}
			both, err := fio.Run(ctx, w, s)
			if err != nil {
				return nil, err
			}
			return []figure{
				{us(alone[0].P99), map[string]float64{"p50 us": us(alone[0].P50), "IOPS": alone[0].IOPS}},
				{us(both[0].P99), map[string]float64{"p50 us": us(both[0].P50), "IOPS": both[0].IOPS}},
				{us(both[1].SyncP99), map[string]float64{"p50 us": us(both[1].SyncP50), "IOPS": both[1].IOPS}},
			}, nil
		})
	}
	return r.sweep(ctx, t, []Row{
		{Name: "write, alone", Unit: "us", Better: "lower"},
		{Name: "write, beside fsync", Unit: "us", Better: "lower"},
		{Name: "fsync, beside writes", Unit: "us", Better: "lower"},
	}, sweeps...)
}
