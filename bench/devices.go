package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"mica/bench/fio"
	"mica/bench/peer"
	"mica/engine"
	"mica/thin"
)

// A device is a medium for one server: how it is made, and how it is served.
type device struct {
	name  string
	make  func(ctx context.Context) error
	serve func(ctx context.Context) (*peer.Server, error)
}

// own is how mica serves here.
func (r *runner) own(name string, o peer.Own) peer.Own {
	o.Exe = r.Exe
	if r.Profile != "" {
		r.seq++
		o.Profile = filepath.Join(r.Profile, fmt.Sprintf("%s-%s-%d.prof", r.out.ID, name, r.seq))
	}
	return o
}

// thinID is the device that is written first; snapshots have higher numbers.
const thinID thin.DevID = 1

// makeAll makes the media of devices.
func (r *runner) makeAll(ctx context.Context, devices []device) error {
	r.Log("   making %d devices of %s", len(devices), bytesName(r.Size))
	for _, d := range devices {
		if err := d.make(ctx); err != nil {
			return fmt.Errorf("%s: %w", d.name, err)
		}
	}
	return nil
}

// plainFile makes a file that is written all over, or a hole.
func (r *runner) plainFile(ctx context.Context, path string, filled bool) error {
	if filled {
		return peer.FillFile(ctx, path, r.Size)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(r.Size)
}

// qcow2 makes a qcow2 image as long as the others; filled is every cluster written.
func (r *runner) qcow2(ctx context.Context, file string, filled bool) error {
	if err := peer.Qcow2(ctx, file, r.Size); err != nil || !filled {
		return err
	}
	s, err := peer.QemuNBD(ctx, file, "qcow2", r.fresh("s"))
	if err != nil {
		return err
	}
	_, err = fio.Run(ctx, fio.Job{Engine: "nbd", Target: s.URI, RW: "write", Block: 1 << 20, Depth: 4, Size: r.Size})
	if e := s.Stop(); err == nil {
		err = e
	}
	return err
}

// thinDevice makes a pool with one thin device. It has room for snapshots of it.
func (r *runner) thinDevice(ctx context.Context, pool string, filled bool) error {
	if err := peer.MakePool(ctx, pool, 3*r.Size+1<<30); err != nil {
		return err
	}
	if filled {
		return peer.Fill(ctx, pool, thinID, r.Size)
	}
	return peer.OnPool(ctx, pool, func(p engine.Pool) error { return p.CreateThin(ctx, thinID) })
}

// start serves devices until the part ends or stop is called.
func (r *runner) start(ctx context.Context, devices []device) (clients []*client, stop func() error, err error) {
	var servers []*peer.Server
	done := false
	stop = func() error {
		if done {
			return nil
		}
		done = true
		var first error
		for _, s := range servers {
			if err := s.Stop(); first == nil {
				first = err
			}
		}
		return first
	}
	r.defers(stop)
	for _, d := range devices {
		s, err := d.serve(ctx)
		if err != nil {
			return nil, stop, fmt.Errorf("%s: %w", d.name, err)
		}
		servers = append(servers, s)
		clients = append(clients, &client{name: d.name, s: s})
	}
	return clients, stop, nil
}

// served are devices that are being measured.
type served struct {
	clients []*client
	columns []string // their names
	t       *Table   // of mapped blocks
	stop    func() error
}

// mapped makes devices, serves them until the part ends or stop is called, and does the jobs that all
// transports have in common: a table of mapped blocks.
func (r *runner) mapped(ctx context.Context, devices []device, id, title string) (s *served, err error) {
	if err := r.makeAll(ctx, devices); err != nil {
		return nil, err
	}
	s = &served{}
	if s.clients, s.stop, err = r.start(ctx, devices); err != nil {
		return nil, err
	}
	for _, d := range devices {
		s.columns = append(s.columns, d.name)
	}
	s.t = r.table(id, title, s.columns...)
	return s, r.loads(ctx, s.t, s.clients,
		r.random("4 KiB random read, depth 1", "randread", 1, 1),
		r.random("4 KiB random read, depth 16", "randread", 16, 1),
		r.random("4 KiB random write, depth 1", "randwrite", 1, 1),
		r.random("4 KiB random write, depth 16", "randwrite", 16, 1),
		r.sequential("1 MiB read", "read", 1),
		r.sequential("1 MiB write, mapped", "write", 1))
}

// A job is a row of a table of loads.
type job struct {
	name  string
	fio   fio.Job
	unit  string
	value func(fio.Figures) float64
}

func (r *runner) random(name, rw string, depth, jobs int) job {
	return job{name, fio.Job{RW: rw, Block: 4096, Depth: depth, Jobs: jobs, Size: r.Size, Runtime: r.Runtime}, "IOPS", iops}
}

func (r *runner) sequential(name, rw string, jobs int) job {
	return job{name, fio.Job{RW: rw, Block: 1 << 20, Depth: 4, Jobs: jobs, Size: r.Size, Runtime: r.Runtime}, "MB/s", mbps}
}

// loads does jobs on clients, a row each.
func (r *runner) loads(ctx context.Context, t *Table, clients []*client, jobs ...job) error {
	for _, j := range jobs {
		var meters []meter
		for _, c := range clients {
			meters = append(meters, load(c, j.fio, j.value))
		}
		if err := r.measure(ctx, t, Row{Name: j.name, Unit: j.unit, Better: "higher"}, meters...); err != nil {
			return err
		}
	}
	return nil
}
