package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/layer"
)

func newTopCmd() *cobra.Command {
	var asJSON, all bool
	interval, rounds := time.Second, 0
	c := &cobra.Command{
		Use:   "top",
		Short: "Show who reads and writes, as it happens",
		Long: `Show the pool and the containers with what they read, write, flush and discard, until Ctrl-C;
those that do most come first. On a terminal the screen is redrawn, elsewhere one table follows
the other.

The figures of a container are those that the kernel keeps for its block device; what a
virtual machine does over NBD passes no block device here and is shown as "-". BUSY is the part
of the time in which the device had something to do.`,
		Example: `  mica top
  mica top --interval 5s --all
  mica top --rounds 1 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if interval < 100*time.Millisecond {
				return usagef("--interval %s: want at least 100ms", interval)
			}
			if rounds < 0 {
				return usagef("--rounds %d: want 0 (for ever) or more", rounds)
			}
			f := client.Filter{}
			if all {
				f.Owner = "*"
			}
			t := &topView{c: connect(), filter: f, w: cmd.OutOrStdout(), json: asJSON}
			t.screen = !asJSON && rounds == 0 && isTerminal(t.w)
			err := t.run(cmd.Context(), interval, rounds)
			if cmd.Context().Err() != nil {
				return nil // Ctrl-C is the way to end it
			}
			return err
		},
	}
	c.Flags().DurationVar(&interval, "interval", interval, "time between two looks")
	c.Flags().IntVar(&rounds, "rounds", rounds, "end after so many tables; 0: never")
	c.Flags().BoolVar(&all, "all", false, "also what containerd owns")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, one table a line")
	return c
}

// A topSample is one look at everything.
type topSample struct {
	at         time.Time
	pool       api.Pool
	containers []api.Container
	stats      map[string]blockStat // by the attachment's id
}

// topPool is the pool's part of a table; rates are per second.
type topPool struct {
	Time          time.Time `json:"time"`
	Mode          string    `json:"mode"`
	UsedBytes     int64     `json:"data_used_bytes"`
	SpaceBytes    int64     `json:"data_space_bytes"`
	MetadataUsed  int64     `json:"metadata_used_bytes"`
	MetadataSpace int64     `json:"metadata_space_bytes"`
	Commits       float64   `json:"commits"`
	Flushes       float64   `json:"flushes"` // of both devices
	Waiting       int       `json:"writers_waiting"`
	Rows          []topRow  `json:"containers"`
}

// topRow is a container's part; rates are per second and zero where Counted is false.
type topRow struct {
	Name         string   `json:"name"`
	Owner        string   `json:"owner"`
	Image        string   `json:"image,omitempty"`
	UsedBytes    int64    `json:"used_bytes"`
	Counted      bool     `json:"counted"`
	Reads        float64  `json:"reads"`
	ReadBytes    float64  `json:"read_bytes"`
	Writes       float64  `json:"writes"`
	WriteBytes   float64  `json:"write_bytes"`
	Flushes      float64  `json:"flushes"`
	DiscardBytes float64  `json:"discard_bytes"`
	Busy         float64  `json:"busy"` // 0 to 1
	InFlight     uint64   `json:"in_flight"`
	Mounts       []string `json:"mounts,omitempty"`
	Attached     string   `json:"attached"` // as ls shows it
}

// topView shows samples until it has shown enough.
type topView struct {
	c      *client.Client
	filter client.Filter
	w      io.Writer
	json   bool
	screen bool // redraw
}

func (t *topView) run(ctx context.Context, interval time.Duration, rounds int) error {
	last, err := t.sample(ctx)
	if err != nil {
		return err
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		now, err := t.sample(ctx)
		if err != nil {
			return err
		}
		if err := t.show(compareSamples(last, now)); err != nil {
			return err
		}
		if n == rounds {
			return nil
		}
		last = now
	}
}

func (t *topView) sample(ctx context.Context) (topSample, error) {
	s := topSample{stats: map[string]blockStat{}}
	var err error
	if s.pool, err = t.c.Pool(ctx); err != nil {
		return s, err
	}
	if s.containers, err = t.c.Containers(ctx, t.filter); err != nil {
		return s, err
	}
	for _, c := range s.containers {
		if a := c.Attachment; a != nil && a.As == layer.AsBlock && a.Node != "" {
			if st, err := readBlockStat(a.Node); err == nil { // else it was detached meanwhile
				s.stats[a.ID] = st
			}
		}
	}
	s.at = time.Now()
	return s, nil
}

// compareSamples makes rates of two looks. A device that was not there at the first, or was made
// anew, counts from zero.
func compareSamples(a, b topSample) topPool {
	seconds := b.at.Sub(a.at).Seconds()
	rate := func(before, now uint64) float64 {
		if now < before {
			before = 0
		}
		return float64(now-before) / seconds
	}
	p := topPool{
		Time: b.at, Mode: b.pool.Mode, UsedBytes: b.pool.DataUsedBytes, SpaceBytes: b.pool.DataSpaceBytes,
		MetadataUsed: b.pool.MetadataUsedBytes, MetadataSpace: b.pool.MetadataSpaceBytes,
		Commits: rate(a.pool.Commits, b.pool.Commits),
		Flushes: rate(a.pool.DataFlushes+a.pool.MetaFlushes, b.pool.DataFlushes+b.pool.MetaFlushes),
		Waiting: b.pool.WaitingForSpace, Rows: []topRow{},
	}
	for _, c := range b.containers {
		r := topRow{Name: c.Name, Owner: c.Owner, Image: c.Image, UsedBytes: c.UsedBytes, Attached: attached(c.Attachment)}
		if c.Attachment != nil {
			r.Mounts = c.Attachment.Mounts
			if now, ok := b.stats[c.Attachment.ID]; ok {
				old := a.stats[c.Attachment.ID]
				r.Counted = true
				r.Reads, r.ReadBytes = rate(old.Reads, now.Reads), rate(old.ReadBytes, now.ReadBytes)
				r.Writes, r.WriteBytes = rate(old.Writes, now.Writes), rate(old.WriteBytes, now.WriteBytes)
				r.Flushes, r.DiscardBytes = rate(old.Flushes, now.Flushes), rate(old.DiscardBytes, now.DiscardBytes)
				r.Busy, r.InFlight = min(rate(old.BusyMS, now.BusyMS)/1000, 1), now.InFlight
			}
		}
		p.Rows = append(p.Rows, r)
	}
	slices.SortStableFunc(p.Rows, func(x, y topRow) int {
		return cmp.Or(cmp.Compare(y.ReadBytes+y.WriteBytes, x.ReadBytes+x.WriteBytes),
			cmp.Compare(y.Reads+y.Writes, x.Reads+x.Writes), strings.Compare(x.Name, y.Name))
	})
	return p
}

func (t *topView) show(p topPool) error {
	if t.json {
		return printJSONLine(t.w, p)
	}
	if t.screen {
		fmt.Fprint(t.w, "\x1b[H\x1b[2J") // to the corner, and clear
	}
	fmt.Fprintf(t.w, "%s  pool %s, %s of %s used, metadata %s of %s, %.0f commits/s, %.0f flushes/s, %d writers waiting\n",
		p.Time.Format(time.TimeOnly), p.Mode, size(p.UsedBytes), size(p.SpaceBytes), size(p.MetadataUsed), size(p.MetadataSpace),
		p.Commits, p.Flushes, p.Waiting)
	rows := [][]string{{"NAME", "IMAGE", "USED", "R/S", "READ/S", "W/S", "WRITTEN/S", "FLUSH/S", "DISCARD/S", "BUSY", "ATTACHED"}}
	for _, r := range p.Rows {
		row := []string{r.Name, dash(r.Image), size(r.UsedBytes)}
		if r.Counted {
			row = append(row, fmt.Sprintf("%.0f", r.Reads), size(int64(r.ReadBytes)), fmt.Sprintf("%.0f", r.Writes), size(int64(r.WriteBytes)),
				fmt.Sprintf("%.0f", r.Flushes), size(int64(r.DiscardBytes)), fmt.Sprintf("%.0f%%", 100*r.Busy))
		} else {
			row = append(row, "-", "-", "-", "-", "-", "-", "-")
		}
		rows = append(rows, append(row, r.Attached))
	}
	if err := table(t.w, rows); err != nil {
		return err
	}
	if !t.screen {
		fmt.Fprintln(t.w)
	}
	return nil
}
