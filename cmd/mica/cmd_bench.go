package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"mica/bench"
	"mica/daemon"
	"mica/thin"
)

// newBenchCmd measures mica beside its peers.
func newBenchCmd() *cobra.Command {
	var o bench.Options
	var out, report string
	var with []string
	var asJSON bool
	c := &cobra.Command{
		Use:   "bench [--only PART,...] [--quick] [--out DIR]",
		Short: "Measure mica beside its peers on this machine",
		Long: "Measure mica beside what one would pick instead, in one run: the same work in turn, on files in\n" +
			"memory (--memory) and on a real disk (--dir), several rounds of it. It takes about a quarter of an\n" +
			"hour, root, and the peers (scripts/setup.sh bench installs them; 'make bench' does all of it).\n\n" +
			"The tables are printed, and with --out written to DIR: results.json, performance.md and drawings.\n" +
			"With --report nothing is measured: a results.json is printed, or written again with --out.\n\n" +
			"Parts:\n\n" + partList(),
		Example: `  mica bench --only nbd,block
  mica bench --dir /var/tmp --out results
  mica bench --report results/results.json --out docs`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var res *bench.Result
			var failed error
			if report != "" {
				b, err := os.ReadFile(report)
				if err != nil {
					return err
				}
				res = new(bench.Result)
				if err := json.Unmarshal(b, res); err != nil {
					return fmt.Errorf("%s: %w", report, err)
				}
			} else {
				var err error
				if o.Exe, err = os.Executable(); err != nil {
					return err
				}
				o.Log = func(format string, args ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
				if res, failed = bench.Run(cmd.Context(), o); res == nil {
					return usageError{failed}
				}
				res.Command = "mica " + strings.Join(os.Args[1:], " ")
			}
			for _, name := range with {
				if err := addPart(res, name); err != nil {
					return err
				}
			}
			if out != "" {
				if err := bench.WriteReport(res, out); err != nil {
					return err
				}
			}
			if asJSON {
				if err := printJSON(cmd.OutOrStdout(), res); err != nil {
					return err
				}
			} else if err := bench.WriteText(cmd.OutOrStdout(), res); err != nil {
				return err
			}
			return failed
		},
	}
	c.Flags().StringSliceVar(&o.Only, "only", nil, "measure only these parts")
	c.Flags().BoolVar(&o.Quick, "quick", false, "only show that it works: tiny devices, one round")
	c.Flags().IntVar(&o.Rounds, "rounds", 5, "rounds of each job")
	c.Flags().DurationVar(&o.Runtime, "runtime", 0, "how long a job runs (default 400ms)")
	sizeVar(c, &o.Size, "size", 0, "length of the devices (default 1G)")
	c.Flags().StringVar(&o.Memory, "memory", "/dev/shm", "directory in memory")
	c.Flags().StringVar(&o.Disk, "dir", "/var/tmp", "directory on a real disk; \"\" leaves those parts out")
	c.Flags().StringVar(&out, "out", "", "write JSON, tables and drawings to this directory")
	c.Flags().StringVar(&report, "report", "", "measure nothing, report this results.json")
	c.Flags().StringSliceVar(&with, "with", nil, "add a part that was measured elsewhere, from this file")
	c.Flags().StringVar(&o.Profile, "profile", "", "write profiles of mica's servers to this directory")
	jsonFlag(c, &asJSON)
	c.AddCommand(newBenchServeCmd(), newBenchGuestCmd())
	return c
}

// addPart adds a part from a file, before the others of its kind.
func addPart(res *bench.Result, name string) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var p bench.Part
	if err := json.Unmarshal(b, &p); err != nil || p.ID == "" {
		return fmt.Errorf("%s: not a part of a measurement: %w", name, err)
	}
	res.Add(p)
	return nil
}

func partList() string {
	var b strings.Builder
	for _, p := range bench.PartNames() {
		fmt.Fprintf(&b, "    %-10s %s\n", p[0], p[1])
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// newBenchServeCmd is the role of a server that is measured.
func newBenchServeCmd() *cobra.Command {
	var s bench.Serve
	var ids []uint
	c := &cobra.Command{
		Use:    "serve --nbd SOCKET | --block DIR  --file FILE | --pool DIR --id N,... --size N",
		Short:  "Serve a device that is measured",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			daemon.SetName("mica-bench")
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			for _, id := range ids {
				s.IDs = append(s.IDs, thin.DevID(id))
			}
			s.Loop = []string{exe, "helper", "loop"}
			if s.NBD != "" {
				if s.NBD, err = filepath.Abs(s.NBD); err != nil {
					return err
				}
			}
			return s.Run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	c.Flags().StringVar(&s.NBD, "nbd", "", "serve on this Unix socket")
	c.Flags().StringVar(&s.Block, "block", "", "serve a block device, with this directory for its mount point")
	c.Flags().StringVar(&s.File, "file", "", "what is served: a file")
	c.Flags().StringVar(&s.Pool, "pool", "", "what is served: a thin device of the pool in this directory")
	c.Flags().UintSliceVar(&ids, "id", nil, "the thin device, or several")
	sizeVar(c, &s.Size, "size", 0, "length of each thin device")
	c.Flags().StringVar(&s.Profile, "cpuprofile", "", "write a profile of the processor time to this file")
	c.MarkFlagsRequiredTogether("pool", "id", "size")
	c.MarkFlagsOneRequired("nbd", "block")
	c.MarkFlagsOneRequired("file", "pool")
	c.MarkFlagsMutuallyExclusive("nbd", "block")
	c.MarkFlagsMutuallyExclusive("file", "pool")
	return c
}

// newBenchGuestCmd is the role of the program in the test machine.
func newBenchGuestCmd() *cobra.Command {
	var o bench.Options
	c := &cobra.Command{
		Use:    "guest DISK...",
		Short:  "Measure in a test machine",
		Hidden: true,
		Args:   cobra.ExactArgs(bench.GuestDisks),
		RunE: func(cmd *cobra.Command, args []string) error {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			o.Log = func(format string, args ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
			p, err := bench.Guest(cmd.Context(), o, args, []string{exe, "helper", "loop"})
			if err != nil {
				return err
			}
			return printJSON(cmd.OutOrStdout(), p)
		},
	}
	c.Flags().IntVar(&o.Rounds, "rounds", 3, "rounds of each job")
	c.Flags().DurationVar(&o.Runtime, "runtime", 0, "how long a job runs")
	sizeVar(c, &o.Size, "size", 0, "length of the devices")
	return c
}
