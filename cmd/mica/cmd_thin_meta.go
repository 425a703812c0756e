package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"mica/engine/user"
	"mica/thin"
)

func newThinCheckCmd() *cobra.Command {
	var p poolFlags
	var o thin.CheckOptions
	var asJSON, quiet bool
	c := &cobra.Command{
		Use:   "check POOL",
		Short: "Check the metadata of a pool and report everything that is wrong with it",
		Long: `Check the metadata of a pool: every block, every pointer, every count. Each finding is
printed with its place: the block, the tree and the path to it, the device and the keys.
Leaks are blocks that count as used and are not: space is lost, nothing else.

Exit status 0 if the pool is clean, else 1.`,
		Example: `  mica thin check /var/lib/mica/pool
  mica thin check --metadata /dev/sdc --clear-needs-check`,
		Args: p.metaArgs(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return checkMetadata(cmd, &p, args, o, asJSON, quiet)
		},
	}
	p.addMeta(c)
	jsonFlag(c, &asJSON)
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing, exit status only")
	c.Flags().BoolVar(&o.SuperblockOnly, "super-block-only", false, "look at nothing but the superblock")
	c.Flags().BoolVar(&o.SkipMappings, "skip-mappings", false, "leave out the mapping trees")
	c.Flags().BoolVar(&o.ClearNeedsCheck, "clear-needs-check", false, "take the needs_check mark away if the pool is clean")
	c.Flags().BoolVar(&o.RepairLeaks, "repair-leaks", false, "free leaked blocks if there are no fatal findings")
	return c
}

// checkMetadata checks a closed pool and prints the report.
func checkMetadata(cmd *cobra.Command, p *poolFlags, args []string, o thin.CheckOptions, asJSON, quiet bool) error {
	d, err := p.metadataDevice(cmd.Context(), args, !o.ClearNeedsCheck && !o.RepairLeaks)
	if err != nil {
		return err
	}
	if o.RepairLeaks {
		if err := p.nothingWaits(args); err != nil {
			d.Close()
			return err
		}
	}
	bar := newBar(cmd, "check", "blocks", asJSON || quiet)
	o.Progress = func(done, total uint64) error {
		bar.set(int64(done), int64(total))
		return cmd.Context().Err()
	}
	r, err := thin.Check(d, o)
	bar.end()
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	switch {
	case quiet:
	case asJSON:
		err = r.WriteJSON(cmd.OutOrStdout())
	default:
		err = r.WriteText(cmd.OutOrStdout())
	}
	if err == nil && !r.Clean() {
		err = &exitStatus{exitError}
	}
	return err
}

func newThinDumpCmd() *cobra.Command {
	var p poolFlags
	var o thin.DumpOptions
	var output string
	c := &cobra.Command{
		Use:   "dump POOL [-o FILE]",
		Short: "Write the devices and mappings of a pool as XML",
		Long: `Write the devices and mappings of a pool as XML, in the form that thin_dump writes and
that 'mica thin restore' and thin_restore read.`,
		Example: "  mica thin dump /var/lib/mica/pool -o pool.xml",
		Args:    p.metaArgs(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := p.metadataDevice(cmd.Context(), args, true)
			if err != nil {
				return err
			}
			err = writeOutput(cmd, output, func(w io.Writer) error { return p.about(args, thin.Dump(d, w, o)) })
			return errors.Join(err, d.Close())
		},
	}
	p.addMeta(c)
	c.Flags().StringVarP(&output, "output", "o", "", "write to FILE instead of standard output")
	c.Flags().BoolVarP(&o.MetadataSnap, "metadata-snap", "m", false, "dump the metadata snapshot that the pool holds")
	return c
}

// writeOutput calls fn with the named file, or with standard output. A file that was not
// written completely is removed.
func writeOutput(cmd *cobra.Command, name string, fn func(io.Writer) error) error {
	if name == "" || name == "-" {
		w := bufio.NewWriterSize(cmd.OutOrStdout(), 1<<16)
		return errors.Join(fn(w), w.Flush())
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	if err = errors.Join(fn(f), f.Close()); err != nil {
		os.Remove(name)
	}
	return err
}

func newThinRestoreCmd() *cobra.Command {
	var p poolFlags
	var o thin.RestoreOptions
	var input string
	c := &cobra.Command{
		Use:   "restore POOL -i FILE",
		Short: "Write the metadata of a pool anew from a dump",
		Long: `Write the metadata of a pool anew from the XML of 'mica thin dump' or thin_dump. What the
metadata device held before is lost; the data is not touched. Data that devices share stays
shared. If it fails, the metadata device is left without a superblock.`,
		Example: "  mica thin restore /var/lib/mica/pool -i pool.xml --force",
		Args:    p.metaArgs(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := cmd.InOrStdin()
			if input != "" && input != "-" {
				f, err := os.Open(input)
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			d, err := p.lockMetadata(args, false)
			if err != nil {
				return err
			}
			w, err := user.JournalWaiting(p.location(args))
			if err == nil {
				err = p.about(args, thin.Restore(bufio.NewReaderSize(in, 1<<16), d, o))
			}
			if err == nil { // what waited for the pool that was there is worth nothing now
				err = user.DiscardJournal(p.location(args))
			}
			if err == nil && w != nil && w.Entries > 0 {
				fmt.Fprintf(cmd.ErrOrStderr(), "mica: %s: %d changes of an opener that was killed, which waited in %s, are given up\n", p.location(args).MetadataPath(), w.Entries, w.Path)
			}
			return errors.Join(err, d.Close())
		},
	}
	p.addMeta(c)
	c.Flags().StringVarP(&input, "input", "i", "", "read the dump from FILE instead of standard input")
	c.Flags().BoolVar(&o.Force, "force", false, "overwrite a metadata device that holds a pool")
	return c
}

func newThinDeltaCmd() *cobra.Command {
	var p poolFlags
	var o thin.DeltaOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "delta POOL LEFT RIGHT",
		Short: "List the blocks in which two devices of a pool differ",
		Long: `List the blocks in which two devices of a pool differ, as the XML that thin_delta writes:
same, different, left_only, right_only, in units of the pool's data block size. Blocks are
compared by where they live, not by their contents.`,
		Example: "  mica thin delta /var/lib/mica/pool 7 8",
		Args:    p.metaArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			rest := p.rest(args)
			left, err := parseID(rest[0])
			if err != nil {
				return err
			}
			right, err := parseID(rest[1])
			if err != nil {
				return err
			}
			d, err := p.metadataDevice(cmd.Context(), args, true)
			if err != nil {
				return err
			}
			defer d.Close()
			v, err := thin.OpenView(d)
			if err != nil {
				return p.about(args, err)
			}
			if !asJSON {
				return p.about(args, v.WriteDelta(cmd.OutOrStdout(), left, right, o))
			}
			type line struct {
				Kind  string `json:"kind"`
				Begin uint64 `json:"begin"`
				Len   uint64 `json:"length"`
			}
			lines := []line{}
			err = v.Delta(left, right, func(r thin.DeltaRange) error {
				if n := len(lines); n > 0 && lines[n-1].Kind == r.Kind && lines[n-1].Begin+lines[n-1].Len == uint64(r.Begin) {
					lines[n-1].Len += r.Len
				} else {
					lines = append(lines, line{r.Kind, uint64(r.Begin), r.Len})
				}
				return nil
			})
			if err != nil {
				return p.about(args, err)
			}
			return printJSON(cmd.OutOrStdout(), struct {
				Left      thin.DevID `json:"left"`
				Right     thin.DevID `json:"right"`
				BlockSize int64      `json:"block_size"`
				Ranges    []line     `json:"ranges"`
			}{left, right, int64(v.Superblock().DataBlockSize) * 512, lines})
		},
	}
	p.addMeta(c)
	jsonFlag(c, &asJSON)
	c.Flags().BoolVar(&o.Verbose, "verbose", false, "print the data blocks too")
	return c
}

// A metadata device is named by its own flag, or by the directory of the pool.
func (p *poolFlags) metaArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if got := len(p.rest(args)); got != n || p.metadata == "" && len(args) == 0 {
			return fmt.Errorf("want %s", cmd.Use)
		}
		return nil
	}
}
