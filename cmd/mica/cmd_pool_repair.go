package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"mica/dev"
	"mica/engine/user"
	"mica/pdata/block"
	"mica/thin"
	"mica/thin/repair"
)

// A repairCmd is one run of 'mica pool repair'.
type repairCmd struct {
	p              poolFlags
	o              repair.Options
	output, keep   string
	swap, dry      bool
	force          bool
	asJSON         bool
	withoutJournal bool
	dataSize       int64
	trans          uint64
	mapping, det   uint64
}

func newPoolRepairCmd() *cobra.Command {
	var r repairCmd
	c := &cobra.Command{
		Use:   "repair POOL [--output FILE] | POOL --swap",
		Short: "Make the metadata of a damaged pool anew from what can be read",
		Long: `Make new metadata for a damaged pool from whatever of the old can be read, and say what is lost:
which ranges of which devices. The pool itself is not changed: the new metadata goes to
POOL/metadata.repaired, or to the FILE that --output names, a new file or a device with nothing
on it.

Space maps are always made anew. Below a broken node of a mapping tree a range of one device is
lost; lost ranges read as zeros. If the superblock is broken, what it still says is used, else
the newest trees that fit together are looked for in all of the metadata; if it is wiped out,
give --block-size, and --data-size where the data device is not named.

Look at the report first. Then --swap puts the new metadata in place of the old ones, which stay
beside them as metadata.before-TIME (or the FILE that --keep names).

A pool that is open is refused. If changes of an opener that was killed still wait for the pool,
they would be worthless afterwards; --without-journal gives them up.

Exit status 0 if nothing is lost, 1 if something is lost or the repair was not possible.`,
		Example: `  mica pool repair /var/lib/mica/pool --dry-run
  mica pool repair /var/lib/mica/pool
  mica pool repair /var/lib/mica/pool --swap
  mica pool repair --data /dev/sdb --metadata /dev/sdc --output /root/sdc.repaired`,
		Args: r.p.repairArgs(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.p.metadata == "" && len(args) == 0 {
				return repairOnline(cmd, "repair")
			}
			if cmd.Flags().Changed("transaction-id") {
				r.o.TransactionID = &r.trans
			}
			r.o.MappingRoot, r.o.DetailsRoot = block.Loc(r.mapping), block.Loc(r.det)
			return r.run(cmd, args)
		},
	}
	r.p.add(c)
	jsonFlag(c, &r.asJSON)
	f := c.Flags()
	f.StringVarP(&r.output, "output", "o", "", "write the new metadata to `FILE`, or take them from there with --swap (default: POOL/metadata.repaired)")
	f.BoolVar(&r.dry, "dry-run", false, "only say what would be saved and what is lost")
	f.BoolVar(&r.force, "force", false, "overwrite what is in the output file, or on the output device")
	f.BoolVar(&r.swap, "swap", false, "put metadata that were repaired before in place of the old ones")
	f.StringVar(&r.keep, "keep", "", "with --swap: keep the old metadata as `FILE` (default: POOL/metadata.before-TIME)")
	f.BoolVar(&r.withoutJournal, "without-journal", false, "give up changes of an opener that was killed which still wait for the pool")
	sizeVar(c, &r.o.DataBlockSize, "block-size", 0, "length of a data block, if the superblock is lost")
	sizeVar(c, &r.dataSize, "data-size", 0, "length of the data device, if the superblock is lost and the device is not named")
	f.Uint64Var(&r.trans, "transaction-id", 0, "transaction id of the new pool (default: that of the old one, or the least that it can be)")
	f.Uint64Var(&r.mapping, "mapping-root", 0, "metadata block of the device tree to use, one of those that an earlier report lists")
	f.Uint64Var(&r.det, "details-root", 0, "metadata block of the details tree to use, likewise")
	return c
}

// repairArgs takes a directory, or a metadata device with or without its data device, or nothing.
func (p *poolFlags) repairArgs() cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(p.rest(args)) > 0 || p.data != "" && p.metadata == "" {
			return fmt.Errorf("want: mica %s %s", cmd.Parent().Name(), cmd.Use)
		}
		return nil
	}
}

// repairOnline says what to do about the pool of a running daemon.
func repairOnline(cmd *cobra.Command, verb string) error {
	c := connect()
	defer c.Close()
	st, err := c.Status(cmd.Context())
	if err != nil {
		return usageError{fmt.Errorf("name the pool: mica pool %s POOL", verb)}
	}
	where := filepath.Dir(st.Pool.Data)
	if st.Pool.Data != filepath.Join(where, "data") || st.Pool.Metadata != filepath.Join(where, "metadata") {
		where = "--data " + st.Pool.Data + " --metadata " + st.Pool.Metadata
	}
	return fmt.Errorf("the daemon (process %d) has its pool open: end it with 'mica shutdown', or with SIGTERM, then: mica pool %s %s", st.PID, verb, where)
}

func (r *repairCmd) run(cmd *cobra.Command, args []string) error {
	l := r.p.location(args)
	if r.output == "" && l.Dir != "" {
		r.output = filepath.Join(l.Dir, "metadata.repaired")
	}
	if r.output == "" && !r.dry {
		return usagef("say with --output where the new metadata are to be written, or with --dry-run that they are not")
	}
	old, err := r.p.lockMetadata(args, true)
	if err != nil {
		return err
	}
	defer old.Close()
	if !r.withoutJournal && !r.dry {
		if err := refuseWaiting(l); err != nil {
			return err
		}
	}
	if r.swap {
		if err := user.RefuseExported(l); err != nil {
			return err
		}
		return r.swapIn(cmd, l)
	}
	return r.repair(cmd, l, old)
}

// refuseWaiting refuses to write the metadata of a pool anew for which changes wait.
func refuseWaiting(l user.Location) error {
	w, err := user.JournalWaiting(l)
	if err == nil && w != nil && w.Entries > 0 {
		where := l.Dir
		if where == "" {
			where = "--data " + l.Data + " --metadata " + l.Metadata
		}
		err = fmt.Errorf("the last opener of the pool was killed, and %d changes wait in %s: let the pool take them over first (mica pool trim %s), or give them up with --without-journal",
			w.Entries, w.Path, where)
	}
	return err
}

// repair writes new metadata beside the old ones.
func (r *repairCmd) repair(cmd *cobra.Command, l user.Location, old dev.Device) (err error) {
	if r.o.DataBytes = r.dataSize; r.o.DataBytes == 0 && l.DataPath() != "" {
		if d, err := dev.Open(l.DataPath(), dev.OpenOptions{ReadOnly: true}); err == nil {
			r.o.DataBytes = d.Size()
			d.Close()
		} else if l.Dir == "" {
			return err
		}
	}
	bar := newBar(cmd, "repair", "steps", r.asJSON)
	r.o.Progress = func(what string, done, total uint64) error {
		bar.set(int64(done), int64(total))
		return cmd.Context().Err()
	}
	var out dev.Device
	made := false
	if !r.dry {
		if out, made, err = openOutput(r.output, old.Size(), r.force); err != nil {
			return err
		}
		defer func() {
			err = errors.Join(err, out.Close())
			var silent *exitStatus
			if err != nil && made && !errors.As(err, &silent) {
				os.Remove(r.output)
			}
		}()
	}
	rep, err := repair.Repair(old, out, r.o)
	bar.end()
	if err != nil {
		return fmt.Errorf("%s: %w", l.MetadataPath(), err)
	}
	if out != nil {
		if err := checkNew(cmd.Context(), out); err != nil {
			return err
		}
		if made {
			if err := dev.SyncDir(filepath.Dir(r.output)); err != nil {
				return err
			}
		}
	}
	w := cmd.OutOrStdout()
	if r.asJSON {
		err = rep.WriteJSON(w)
	} else if err = rep.WriteText(w); err == nil && out != nil {
		_, err = fmt.Fprintf(w, "new metadata: %s (checked: clean)\nnothing is changed yet; to use them: mica pool repair %s --swap%s\n",
			r.output, poolWords(l), r.outputWords(l))
	}
	if err == nil && !rep.Complete {
		err = &exitStatus{exitError}
	}
	return err
}

// poolWords names a pool as on the command line.
func poolWords(l user.Location) string {
	switch {
	case l.Dir != "":
		return l.Dir
	case l.Data != "":
		return "--data " + l.Data + " --metadata " + l.Metadata
	}
	return "--metadata " + l.Metadata
}

func (r *repairCmd) outputWords(l user.Location) string {
	if l.Dir != "" && r.output == filepath.Join(l.Dir, "metadata.repaired") {
		return ""
	}
	return " --output " + r.output
}

// openOutput makes a file for new metadata of size bytes, or opens a device with nothing on it.
func openOutput(path string, size int64, force bool) (d dev.Device, made bool, err error) {
	st, err := os.Stat(path)
	switch {
	case err == nil && st.Mode().IsRegular() && force:
		if err := os.Remove(path); err != nil {
			return nil, false, err
		}
	case err == nil && st.Mode().IsRegular():
		return nil, false, fmt.Errorf("%s: %w (--force overwrites it)", path, os.ErrExist)
	case err == nil:
		return openEmpty(path, size, force)
	case !errors.Is(err, os.ErrNotExist):
		return nil, false, err
	}
	f, err := dev.CreateFile(path, size, dev.OpenOptions{Lock: true})
	if err != nil {
		return nil, false, err
	}
	if err := f.Allocate(0, size); err != nil && !errors.Is(err, dev.ErrUnsupported) {
		f.Close()
		os.Remove(path)
		return nil, false, err
	}
	return f, true, nil
}

// openEmpty opens a device whose first block is all zeros, or becomes so by force.
func openEmpty(path string, size int64, force bool) (dev.Device, bool, error) {
	d, err := dev.Open(path, dev.OpenOptions{Lock: true})
	if err != nil {
		return nil, false, err
	}
	first, zeros := make([]byte, block.Size), make([]byte, block.Size)
	_, err = d.ReadAt(first, 0)
	switch {
	case err != nil:
	case string(first) == string(zeros):
	case !force:
		err = fmt.Errorf("%s: its first block is not empty (--force overwrites it)", path)
	default:
		if _, err = d.WriteAt(zeros, 0); err == nil {
			err = d.Flush()
		}
	}
	if err != nil {
		d.Close()
		return nil, false, err
	}
	return d, false, nil
}

// checkNew refuses metadata that are not clean: nothing that was made here may be used then.
func checkNew(ctx context.Context, d dev.Device) error {
	c, err := thin.Check(d, thin.CheckOptions{Progress: func(_, _ uint64) error { return ctx.Err() }})
	if err == nil {
		err = c.Err()
	}
	if err != nil {
		return fmt.Errorf("the new metadata are not clean and must not be used: %w", err)
	}
	return nil
}

// swapIn puts metadata that were written before in place of the old ones.
func (r *repairCmd) swapIn(cmd *cobra.Command, l user.Location) error {
	if r.keep == "" && l.Dir != "" {
		r.keep = filepath.Join(l.Dir, "metadata.before-"+stamp(time.Now()))
	}
	if r.keep == "" {
		return usagef("say with --keep in which file the old metadata are to be kept")
	}
	return swapMetadata(cmd.Context(), cmd.OutOrStdout(), l, r.output, r.keep)
}

// stamp is a moment in the name of a file.
func stamp(t time.Time) string { return t.UTC().Format("20060102T150405Z") }

// swapMetadata checks new metadata and puts them in place of a pool's, which the caller has locked.
func swapMetadata(ctx context.Context, w io.Writer, l user.Location, from, keep string) error {
	d, err := dev.Open(from, dev.OpenOptions{ReadOnly: true, Lock: true})
	if err != nil {
		return err
	}
	defer d.Close()
	if err := checkNew(ctx, d); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	v, err := thin.OpenView(d)
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	if l.DataPath() != "" {
		data, err := dev.Open(l.DataPath(), dev.OpenOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		size := data.Size()
		data.Close()
		if want := int64(v.Superblock().DataMap.NrBlocks) * v.DataBlockSize(); size < want {
			return fmt.Errorf("%s is for data of %d bytes, %s has %d", from, want, l.DataPath(), size)
		}
	}
	if err := repair.Swap(l.MetadataPath(), from, keep); err != nil {
		return err
	}
	// A file took its identity with it, a device has it still.
	for _, old := range []user.Location{{Metadata: keep}, l} {
		if err := user.DiscardJournal(old); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(w, "%s: metadata replaced, transaction id %d; the old ones are kept as %s\n", l.MetadataPath(), v.Superblock().TransactionID, keep)
	return err
}
