package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"mica/bench/fio"
	"mica/bench/peer"
)

// Options of a run. Zero values are defaults.
type Options struct {
	Exe    string // the mica program, which serves
	Memory string // directory in memory; /dev/shm
	Disk   string // directory on a real disk; "": parts that need one are left out
	Rounds int    // of each job; 5
	// Runtime is how long a job that runs for a time runs; 400 ms.
	Runtime time.Duration
	Size    int64    // of the devices, bytes; 1 GiB
	Only    []string // parts; nil: all
	// Quick makes everything so small that a run only shows whether it works.
	Quick   bool
	Profile string // directory for profiles of our servers; "": none
	Log     func(format string, args ...any)
}

func (o *Options) setDefaults() {
	if o.Memory == "" {
		o.Memory = "/dev/shm"
	}
	if o.Quick {
		o.Rounds, o.Runtime, o.Size = 1, 30*time.Millisecond, 16<<20
	}
	if o.Rounds <= 0 {
		o.Rounds = 5
	}
	if o.Runtime <= 0 {
		o.Runtime = 400 * time.Millisecond
	}
	if o.Size <= 0 {
		o.Size = 1 << 30
	}
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
}

// A part is one kind of measurement.
type part struct {
	id, title string
	about     string
	disk      bool // it needs the real disk
	run       func(ctx context.Context, r *runner) error
}

var parts = []part{nbdPart, nbdDiskPart, blockPart, lifePart, lifeDiskPart, cowPart, cowDiskPart, scalePart, durablePart}

// PartNames are the names that Options.Only takes, with what they are.
func PartNames() (list [][2]string) {
	for _, p := range parts {
		list = append(list, [2]string{p.id, p.title})
	}
	return list
}

// Run measures. A part that fails is in the result with the reason, and fails the run at its end.
func Run(ctx context.Context, o Options) (*Result, error) {
	o.setDefaults()
	for _, id := range o.Only {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.id == id }) {
			return nil, fmt.Errorf("there is no part %q", id)
		}
	}
	begin := time.Now()
	res := &Result{Version: 1, When: begin.UTC().Truncate(time.Second), Machine: describeMachine(), Rounds: o.Rounds, Quick: o.Quick}
	var errs []error
	for _, p := range parts {
		if len(o.Only) > 0 && !slices.Contains(o.Only, p.id) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return res, err
		}
		got, err := runPart(ctx, o, p)
		res.Parts = append(res.Parts, got)
		if err != nil {
			errs = append(errs, fmt.Errorf("part %s: %w", p.id, err))
		}
	}
	res.Machine.Load[1] = loadNow()
	res.Seconds = time.Since(begin).Seconds()
	return res, errors.Join(errs...)
}

func runPart(ctx context.Context, o Options, p part) (_ Part, err error) {
	begin := time.Now()
	r := &runner{Options: o, out: Part{ID: p.id, Title: p.title, About: p.about}}
	base := o.Memory
	if p.disk {
		base = o.Disk
	}
	if base == "" {
		r.note("left out: no directory on a real disk was given")
		return r.out, nil
	}
	o.Log("== %s: %s", p.id, p.title)
	if r.dir, err = os.MkdirTemp(base, "mica-bench-"); err != nil {
		return r.out, err
	}
	r.out.Medium = describeMedium(base)
	err = p.run(ctx, r)
	err = errors.Join(err, r.cleanUp())
	if err != nil {
		r.note("failed: %v", err)
	}
	r.out.Seconds = time.Since(begin).Seconds()
	return r.out, err
}

// A runner is what a part works with.
type runner struct {
	Options
	dir   string // of the part, empty at first and removed at the end
	out   Part
	undo  []func() error
	seq   int
	rowNo int
}

// note tells the reader of the report.
func (r *runner) note(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	r.out.Notes = append(r.out.Notes, s)
	r.Log("   note: %s", s)
}

// defers something to the end of the part.
func (r *runner) defers(f func() error) { r.undo = append(r.undo, f) }

func (r *runner) cleanUp() error {
	var errs []error
	for i := len(r.undo) - 1; i >= 0; i-- {
		errs = append(errs, r.undo[i]())
	}
	return errors.Join(append(errs, os.RemoveAll(r.dir))...)
}

// path names a file in the part's directory.
func (r *runner) path(name string) string { return filepath.Join(r.dir, name) }

// fresh names a file that was not named before. Sockets have short names.
func (r *runner) fresh(prefix string) string {
	r.seq++
	return r.path(fmt.Sprintf("%s%d", prefix, r.seq))
}

// table adds a table to the part and returns it; it is filled by measure.
func (r *runner) table(id, title string, columns ...string) *Table {
	r.out.Tables = append(r.out.Tables, Table{ID: id, Title: title, Columns: columns})
	return &r.out.Tables[len(r.out.Tables)-1]
}

// A figure is what one measurement came to.
type figure struct {
	value float64
	more  map[string]float64
}

// A meter measures once. One that cannot measure here returns an error of unavailable.
type meter func(ctx context.Context) (figure, error)

// A sweep is a measurement that gives several rows at once: a figure for each.
type sweep func(ctx context.Context) ([]figure, error)

// measure does one row: every meter once a round. A nil meter is a job that means nothing for its
// column.
func (r *runner) measure(ctx context.Context, t *Table, row Row, meters ...meter) error {
	sweeps := make([]sweep, len(meters))
	for i, m := range meters {
		if m != nil {
			sweeps[i] = func(ctx context.Context) ([]figure, error) {
				f, err := m(ctx)
				return []figure{f}, err
			}
		}
	}
	return r.sweep(ctx, t, []Row{row}, sweeps...)
}

// sweep does rows that are measured together, everybody once a round, in an order that turns from
// round to round so that nobody always comes first.
func (r *runner) sweep(ctx context.Context, t *Table, rows []Row, sweeps ...sweep) error {
	cells := make([][]Cell, len(rows))
	more := make([][]map[string][]float64, len(rows))
	for i := range rows {
		cells[i] = make([]Cell, len(sweeps))
		more[i] = make([]map[string][]float64, len(sweeps))
	}
	for round := range r.Rounds {
		for i := range sweeps {
			k := (i + round + r.rowNo) % len(sweeps)
			if sweeps[k] == nil || cells[0][k].Why != "" {
				continue
			}
			figures, err := sweeps[k](ctx)
			var no unavailable
			if errors.As(err, &no) {
				for row := range rows {
					cells[row][k].Why = string(no)
				}
				continue
			}
			if err != nil {
				return fmt.Errorf("%s: %s: %w", rows[0].Name, t.Columns[k], err)
			}
			for row, f := range figures {
				cells[row][k].Samples = append(cells[row][k].Samples, f.value)
				for name, v := range f.more {
					if more[row][k] == nil {
						more[row][k] = map[string][]float64{}
					}
					more[row][k][name] = append(more[row][k][name], v)
				}
			}
		}
	}
	r.rowNo++
	for i, row := range rows {
		var line []string
		for k := range sweeps {
			for name, v := range more[i][k] {
				if cells[i][k].More == nil {
					cells[i][k].More = map[string]float64{}
				}
				cells[i][k].More[name] = median(v)
			}
			line = append(line, t.Columns[k]+" "+cells[i][k].String())
		}
		row.Cells = cells[i]
		t.Rows = append(t.Rows, row)
		r.Log("   %s [%s]: %s", row.Name, row.Unit, strings.Join(line, ", "))
	}
	return nil
}

// unavailable is the error of a meter that cannot measure on this machine, and why.
type unavailable string

func (u unavailable) Error() string { return string(u) }

// A client is a server with what a load generator needs to know to work on it.
type client struct {
	name string
	s    *peer.Server
	own  bool // cost is worth reporting in detail
}

// fioTarget is where fio finds the server.
func (c *client) target(j fio.Job) fio.Job {
	if c.s.URI != "" {
		j.Engine, j.Target = "nbd", c.s.URI
	} else {
		j.Engine, j.Target, j.Direct = "libaio", c.s.Node, true
	}
	return j
}

// load is a meter that runs a job of fio on a client; value picks the figure.
func load(c *client, j fio.Job, value func(fio.Figures) float64) meter {
	return func(ctx context.Context) (figure, error) {
		before, err := peer.CostOf(c.s.Pid())
		if err != nil {
			return figure{}, err
		}
		f, err := fio.Run(ctx, c.target(j))
		if err != nil {
			return figure{}, err
		}
		after, err := peer.CostOf(c.s.Pid())
		if err != nil {
			return figure{}, err
		}
		n := float64(f[0].Requests)
		more := map[string]float64{"p50 us": us(f[0].P50), "p99 us": us(f[0].P99)}
		if c.s.Pid() != 0 {
			more["server cpu us per request"] = us(after.CPU-before.CPU) / n
			if d := after.Switches - before.Switches; d >= 0 {
				more["server context switches per request"] = float64(d) / n
			}
		}
		return figure{value(f[0]), more}, nil
	}
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

func iops(f fio.Figures) float64  { return f.IOPS }
func mbps(f fio.Figures) float64  { return f.BytesPerSec / 1e6 }
func p99us(f fio.Figures) float64 { return us(f.P99) }
