package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/engine"
	"mica/layer"
)

func newStatusCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the state of the daemon, its pool and its exports",
		Long: `Show the state of the daemon: the fields that 'docker info' showed for the devicemapper storage
driver, and more. Used and free space of the pool are those of now.`,
		Example: `  mica status
  mica status --json | jq .pool.data_used_bytes`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := connect().Status(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), st)
			}
			printStatus(cmd.OutOrStdout(), st)
			return nil
		},
	}
	jsonFlag(c, &asJSON)
	return c
}

// journalText says whether what is not flushed outlives the daemon.
func journalText(j engine.Journal) string {
	text := j.State
	if text == "" {
		return "not needed: the pool is in the kernel"
	}
	if j.Path != "" {
		text += ", " + j.Path
	}
	if j.TakenOver > 0 {
		text += fmt.Sprintf(", %d blocks taken over", j.TakenOver)
	}
	if j.Problem != "" {
		text += "; " + j.Problem
	}
	return text
}

func yes(b bool) string {
	if b {
		return "true"
	}
	return "false"
}

// printStatus writes the fields one a line, in groups.
func printStatus(w io.Writer, st api.Status) {
	p, s, x := st.Pool, st.Store, st.Exports
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, " %s: %s\n", name, fmt.Sprintf(format, args...))
	}
	fmt.Fprintln(w, "Storage:")
	line("Pool Name", "%s", st.PoolName)
	line("Pool Blocksize", "%s", size(p.BlockSize))
	line("Base Device Size", "%s", size(s.BaseSize))
	line("Backing Filesystem", "%s", s.FSType)
	line("Data file", "%s", p.Data)
	line("Metadata file", "%s", p.Metadata)
	line("Data Space Used", "%s", size(p.DataUsedBytes))
	line("Data Space Total", "%s", size(p.DataSpaceBytes))
	line("Data Space Available", "%s", size(p.DataFreeBytes))
	line("Metadata Space Used", "%s", size(p.MetadataUsedBytes))
	line("Metadata Space Total", "%s", size(p.MetadataSpaceBytes))
	line("Metadata Space Available", "%s", size(p.MetadataFreeBytes))
	line("Thin Pool Minimum Free Space", "%s", size(int64(p.LowWaterMark)*p.BlockSize))
	line("Udev Sync Supported", "not needed (%s)", x.Kind)
	line("Deferred Removal Enabled", "true")
	line("Deferred Deletion Enabled", "true")
	line("Deferred Deleted Device Count", "%d", countQueue(s.Queue, "delete"))
	if p.HostBytes >= 0 {
		line("Data Space On Host", "%s", size(p.HostBytes))
	}
	if p.HostFreeBytes >= 0 {
		line("Host Space Available", "%s", size(p.HostFreeBytes))
	}
	auto := "off"
	if a := p.AutoExtend; a != nil {
		auto = fmt.Sprintf("by %d%% at %d%%", a.StepPercent, a.ThresholdPercent)
	}
	line("Auto-extension", "%s", auto)
	if b := st.Backups; b != nil {
		last := "none yet"
		if b.Last != nil {
			last = b.Last.Path
		}
		line("Last Metadata Backup", "%s", last)
	}

	fmt.Fprintln(w, "Engine:")
	line("Engine", "%s", p.Engine)
	line("Mode", "%s", p.Mode)
	line("Needs Check", "%s", yes(p.NeedsCheck))
	if p.FailReason != "" {
		line("Failure", "%s", p.FailReason)
	}
	line("Transaction Id", "%d", p.TransactionID)
	line("Snapshot Time", "%d", p.Time)
	line("Devices", "%d", p.Devices)
	line("Blocks Being Freed", "%d", p.DataFreeing)
	line("Commits", "%d", p.Commits)
	line("Flushes", "%d data, %d metadata", p.DataFlushes, p.MetaFlushes)
	line("Journal", "%s", journalText(p.Journal))
	full := "wait"
	if p.ErrorIfNoSpace {
		full = "fail"
	}
	line("Writes When Full", "%s", full)
	line("Writers Waiting For Space", "%d", p.WaitingForSpace)

	fmt.Fprintln(w, "Store:")
	line("Id", "%s", s.StoreID)
	line("Catalog", "%s", s.Catalog)
	line("Images", "%d", s.Images)
	line("Layers", "%d", s.Layers)
	line("Containers", "%d", s.Containers)
	line("Snapshots", "%d", s.Snapshots)
	line("Containerd Snapshots", "%d", s.Snaps)
	line("Attached", "%d", s.Attached)
	if len(s.Foreign) > 0 {
		line("Foreign Devices", "%s", strings.Trim(fmt.Sprint(s.Foreign), "[]"))
	} else {
		line("Foreign Devices", "0")
	}
	line("Queue", "%d", len(s.Queue))
	for _, q := range s.Queue {
		fmt.Fprintf(w, "  %s %s%s\n", q.Kind, q.Object, queueState(q))
	}
	for _, b := range s.Broken {
		line("Broken", "%s", b)
	}

	fmt.Fprintln(w, "Exports:")
	line("Kind", "%s", x.Kind)
	for _, c := range x.NotChosen {
		line("Not "+c.Kind, "%s", c.Why)
	}
	line("Restartable", "%s", yes(x.Resend))
	holder := "none"
	if x.HolderPID != 0 {
		holder = fmt.Sprintf("process %d", x.HolderPID)
	}
	line("Holder", "%s", holder)
	line("NBD Socket", "%s", dash(x.NBDSocket))
	line("NBD Address", "%s", dash(x.NBDAddress))
	line("IO Flusher", "%s", yes(x.IOFlusher))
	line("Host Namespaces", "%s", x.HostNamespaces)
	for _, a := range s.Attachments {
		fmt.Fprintf(w, "  %s: %s\n", a.Container, attachmentText(a.Attachment))
	}

	fmt.Fprintln(w, "Daemon:")
	line("Version", "%s", st.Version)
	line("Process", "%d", st.PID)
	line("Started", "%s", when(st.Started))
	line("Root Dir", "%s", st.Root)
	line("Run Dir", "%s", st.Run)
	line("Configuration", "%s", dash(st.Config))
	line("Operations Running", "%d", st.Running)
	line("Memory", "%s of %s", size(st.MemoryBytes), size(st.MemoryLimitBytes))
	for _, n := range st.Notes {
		fmt.Fprintf(w, "NOTE: %s\n", n)
	}
}

func countQueue(list []layer.QueueItem, kind string) int {
	n := 0
	for _, q := range list {
		if q.Kind == kind {
			n++
		}
	}
	return n
}

func queueState(q layer.QueueItem) string {
	s := ""
	if q.Running {
		s += ", running"
	}
	if q.Attempts > 1 {
		s += fmt.Sprintf(", %d attempts", q.Attempts)
	}
	if q.LastErr != "" {
		s += ": " + q.LastErr
	}
	return s
}

func attachmentText(a layer.Attachment) string {
	s := a.URI
	if a.As == layer.AsBlock {
		s = dash(a.Node)
	}
	if a.ReadOnly {
		s += " read-only"
	}
	if len(a.Mounts) > 0 {
		s += " on " + strings.Join(a.Mounts, ", ")
	}
	return s
}

func newEventsCmd() *cobra.Command {
	var o client.EventOptions
	var after uint64
	var asJSON bool
	c := &cobra.Command{
		Use:   "events",
		Short: "Show what happens, as it happens",
		Long: `Show what happens to images, containers and the pool, until Ctrl-C; a restart of the daemon does
not end it. Every event has an id; --after goes on behind one, so that a program that was
away misses nothing. An event of kind 'lost' says that older ones are no longer kept.`,
		Example: `  mica events
  mica events --after 0 --no-follow
  mica events --object container/web --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("after") {
				o.After = &after
			}
			w := cmd.OutOrStdout()
			err := connect().Events(cmd.Context(), o, time.Minute, func(e api.Event) error {
				if asJSON {
					return printJSONLine(w, e)
				}
				_, err := fmt.Fprintf(w, "%d  %s  %-12s %s\n", e.ID, when(e.Time), e.Kind, strings.TrimSpace(e.Object+"  "+e.Detail))
				return err
			})
			if cmd.Context().Err() != nil {
				return nil // Ctrl-C is the way to end it
			}
			return err
		},
	}
	c.Flags().Uint64Var(&after, "after", 0, "begin behind the event with this `ID`; 0: with the oldest that is kept (default: from now on)")
	c.Flags().StringArrayVar(&o.Kinds, "kind", nil, "only events of this kind; may be repeated")
	c.Flags().StringVar(&o.Object, "object", "", "only events about objects that begin so, such as container/web")
	c.Flags().BoolVar(&o.NoFollow, "no-follow", false, "end after the events that are kept")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, one event a line")
	return c
}

func newDfCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "df",
		Short: "Show what uses the pool's space",
		Long: `Show what uses the pool's space, device by device. EXCLUSIVE is what only this device holds, and
what its removal frees; SHARED is held by others too; USED was written since the device was
made from its parent.`,
		Example: `  mica df
  mica df --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := connect().DF(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), d)
			}
			w := cmd.OutOrStdout()
			rows := [][]string{{"KIND", "NAME", "DEVICE", "MAPPED", "EXCLUSIVE", "SHARED", "USED"}}
			for _, e := range d.Entries {
				name := e.Name
				if e.Kind == "layer" {
					name = short(name)
				}
				rows = append(rows, []string{e.Kind, dash(name), fmt.Sprint(e.Device), size(e.MappedBytes), size(e.ExclusiveBytes), size(e.SharedBytes), size(e.UsedBytes)})
			}
			if err := table(w, rows); err != nil {
				return err
			}
			_, err = fmt.Fprintf(w, "\n%s of %s used, %s free, in blocks of %s\n", size(d.UsedBytes), size(d.TotalBytes), size(d.FreeBytes), size(d.BlockSize))
			return err
		},
	}
	jsonFlag(c, &asJSON)
	return c
}

// shutdown ends the daemon and waits until it is gone.
func shutdown(ctx context.Context, c *client.Client) error {
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if err := c.Shutdown(ctx, api.Shutdown{}); err != nil {
		return err
	}
	c.Close()
	for {
		if gone(st.PID) {
			return nil
		}
		t := time.NewTimer(50 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return errors.New("interrupted: the daemon is ending, everything is detached")
		}
	}
}
