package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mica/dev"
	"mica/engine/user"
	"mica/thin"
	"mica/thin/backup"
)

// keepBackups is how many backups stay unless something else is said.
const keepBackups = 48

// backupDir is where the backups of a pool are unless something else is said; empty for a pool on
// devices.
func backupDir(l user.Location) string {
	if l.Dir == "" {
		return ""
	}
	return filepath.Join(l.Dir, "backups")
}

func newPoolBackupCmd() *cobra.Command {
	var p poolFlags
	var dir string
	var keep int
	var asJSON bool
	c := &cobra.Command{
		Use:   "backup [POOL]",
		Short: "Write a backup of a pool's metadata",
		Long: `Write the metadata of a pool to a compressed file, POOL/backups/metadata-TRANSACTION-TIME.img.zst
or in the directory that --dir names. Decompressed (zstd -d) it is a metadata device, which
'mica thin dump', thin_dump and the other tools read. The oldest backups beyond --keep are
removed.

The daemon does so by itself, at its end and as [backup] in its configuration says. Without POOL
it is told to do it now, of its last commit; I/O goes on.

A backup holds no data. 'mica pool restore' puts a pool back to one.`,
		Example: `  mica pool backup
  mica pool backup /srv/pool
  mica pool backup --data /dev/sdb --metadata /dev/sdc --dir /root/backups`,
		Args: p.repairArgs(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if keep < 1 {
				return usagef("--keep %d: at least 1 backup is kept", keep)
			}
			if p.metadata == "" && len(args) == 0 {
				if dir != "" || cmd.Flags().Changed("keep") {
					return usagef("the daemon's backups go where its configuration says: --dir and --keep are for a closed POOL")
				}
				return backupOnline(cmd, asJSON)
			}
			if dir == "" {
				dir = backupDir(p.location(args))
			}
			if dir == "" {
				return usagef("say with --dir where the backups are to be")
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
			info, err := backup.Write(cmd.Context(), v, backup.Options{Dir: dir})
			if err != nil {
				return p.about(args, err)
			}
			if _, err := backup.Prune(dir, keep); err != nil {
				return err
			}
			return printBackup(cmd, info, asJSON)
		},
	}
	p.add(c)
	jsonFlag(c, &asJSON)
	c.Flags().StringVar(&dir, "dir", "", "directory of the backups (default: POOL/backups)")
	c.Flags().IntVar(&keep, "keep", keepBackups, "how many backups stay")
	return c
}

func printBackup(cmd *cobra.Command, i backup.Info, asJSON bool) error {
	if asJSON {
		return printJSON(cmd.OutOrStdout(), i)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s (transaction id %d, %s)\n", i.Path, i.TransactionID, size(i.Bytes))
	return err
}

func newPoolBackupsCmd() *cobra.Command {
	var p poolFlags
	var dir string
	var asJSON bool
	c := &cobra.Command{
		Use:   "backups [POOL]",
		Short: "List the backups of a pool's metadata",
		Long: `List the backups of a pool's metadata, the newest first: those of the daemon's pool, of POOL, or
in the directory that --dir names.`,
		Example: `  mica pool backups
  mica pool backups /srv/pool`,
		Args: p.repairArgs(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if dir == "" && p.metadata == "" && len(args) == 0 {
				return backupsOnline(cmd, asJSON)
			}
			if dir == "" {
				dir = backupDir(p.location(args))
			}
			if dir == "" {
				return usagef("say with --dir where the backups are")
			}
			list, err := backup.List(dir)
			if err != nil {
				return err
			}
			return printBackups(cmd, list, asJSON)
		},
	}
	p.add(c)
	jsonFlag(c, &asJSON)
	c.Flags().StringVar(&dir, "dir", "", "directory of the backups (default: POOL/backups)")
	return c
}

func printBackups(cmd *cobra.Command, list []backup.Info, asJSON bool) error {
	if asJSON {
		if list == nil {
			list = []backup.Info{}
		}
		return printJSON(cmd.OutOrStdout(), list)
	}
	rows := [][]string{{"TIME", "TRANSACTION", "SIZE", "FILE"}}
	for _, i := range list {
		rows = append(rows, []string{i.Time.Local().Format(time.DateTime), fmt.Sprint(i.TransactionID), size(i.Bytes), i.Path})
	}
	return table(cmd.OutOrStdout(), rows)
}

// A restoreCmd is one run of 'mica pool restore'.
type restoreCmd struct {
	p              poolFlags
	from, keep     string
	yes            bool
	asJSON         bool
	withoutJournal bool
	o              backup.RestoreOptions
}

func newPoolRestoreCmd() *cobra.Command {
	var r restoreCmd
	c := &cobra.Command{
		Use:   "restore POOL --from FILE",
		Short: "Put the metadata of a pool back to a backup",
		Long: `Put the metadata of a closed pool back to a backup, or to any copy of its metadata or dump of
'mica thin dump' or thin_dump, compressed or not. Devices made since are lost, and so are blocks that
were written for the first time since. A backup holds no data: a block that stays holds what was
written to it last, also after the backup.

Data blocks that the pool has given to others since are left out, so that no device reads
another's data: such ranges read as zeros. So do those that are free now, unless --keep-freed is
given, which is of use where freed blocks are not discarded. This is known from the present
metadata; if they cannot be read, nothing can be left out, and ranges that were rewritten since
read as whatever is there.

Without --yes the command only says what would be lost. With it, the present metadata stay beside
the new ones as metadata.before-TIME (or the FILE that --keep names).

The daemon notices by the transaction id that its catalog is newer than the pool and opens
read-only; start it once with 'mica serve --accept-pool'.

Exit status 0 if the pool was put back, else 1.`,
		Example: `  mica pool backups /srv/pool
  mica pool restore /srv/pool --from /srv/pool/backups/metadata-41-20310506T120000.000Z.img.zst
  mica pool restore /srv/pool --from /srv/pool/backups/metadata-41-20310506T120000.000Z.img.zst --yes`,
		Args: func(cmd *cobra.Command, args []string) error {
			if r.p.metadata == "" && len(args) == 0 {
				return fmt.Errorf("want: mica pool %s", cmd.Use)
			}
			return r.p.repairArgs()(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.from == "" {
				return usagef("say with --from which backup: 'mica pool backups' lists them")
			}
			return r.run(cmd, args)
		},
	}
	r.p.add(c)
	jsonFlag(c, &r.asJSON)
	f := c.Flags()
	f.StringVar(&r.from, "from", "", "the backup, a `FILE`")
	f.BoolVar(&r.yes, "yes", false, "do it")
	f.StringVar(&r.keep, "keep", "", "keep the present metadata as `FILE` (default: POOL/metadata.before-TIME)")
	f.BoolVar(&r.o.KeepFreed, "keep-freed", false, "keep mappings to data blocks that are free now")
	f.BoolVar(&r.withoutJournal, "without-journal", false, "give up changes of an opener that was killed which still wait for the pool")
	return c
}

func (r *restoreCmd) run(cmd *cobra.Command, args []string) error {
	l := r.p.location(args)
	if r.keep == "" && l.Dir != "" {
		r.keep = filepath.Join(l.Dir, "metadata.before-"+stamp(time.Now()))
	}
	if r.keep == "" {
		return usagef("say with --keep in which file the present metadata are to be kept")
	}
	old, err := r.p.lockMetadata(args, true)
	if err != nil {
		return err
	}
	defer old.Close()
	if r.yes {
		if err := user.RefuseExported(l); err != nil {
			return err
		}
	}
	if !r.withoutJournal && r.yes {
		if err := refuseWaiting(l); err != nil {
			return err
		}
	}
	img, tmp := r.keep+".backup", r.keep+".new"
	defer os.Remove(tmp) // gone already if it was swapped in
	rep, err := r.write(cmd, old, img, tmp)
	if err != nil {
		return err
	}
	w := cmd.OutOrStdout()
	if r.asJSON {
		err = printJSON(w, rep)
	} else {
		err = r.print(cmd, rep)
	}
	if err != nil {
		return err
	}
	if !r.yes {
		if !r.asJSON {
			fmt.Fprintln(cmd.ErrOrStderr(), "mica: nothing was changed; --yes does it")
		}
		return &exitStatus{exitError}
	}
	if r.asJSON {
		w = cmd.ErrOrStderr()
	}
	return swapMetadata(cmd.Context(), w, l, tmp, r.keep)
}

// growthLimit is how much larger than the present metadata those of a dump may become, whose devices
// do not share nodes.
const growthLimit = 64

// write makes the new metadata in the file tmp. The file img is the backup meanwhile.
func (r *restoreCmd) write(cmd *cobra.Command, old dev.Device, img, tmp string) (*backup.Report, error) {
	bar := newBar(cmd, "restore", "steps", r.asJSON)
	defer bar.end()
	r.o.Progress = func(_ string, done, total uint64) error {
		bar.set(int64(done), int64(total))
		return cmd.Context().Err()
	}
	size := old.Size()
	limit := growthLimit * size
	if _, device := old.(*dev.Block); device {
		limit = size
	}
	from, err := backup.Unpack(r.from, img, limit)
	if err != nil {
		return nil, err
	}
	defer os.Remove(img)
	defer from.Close()
	present, presentErr := thin.OpenView(old)
	if size = max(size, from.Size()); size > limit {
		return nil, fmt.Errorf("%s: metadata of %d bytes do not fit the device of %d", r.from, from.Size(), old.Size())
	}
	out, _, err := openOutput(tmp, size, true)
	if err != nil {
		return nil, err
	}
	rep, err := backup.Restore(from, present, out, r.o)
	if err = errors.Join(err, out.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", r.from, err)
	}
	if !rep.Compared && presentErr != nil {
		rep.Why = presentErr.Error()
	}
	return rep, nil
}

// print says what is lost.
func (r *restoreCmd) print(cmd *cobra.Command, rep *backup.Report) error {
	w, b := cmd.OutOrStdout(), rep.Backup
	if rep.Compared {
		fmt.Fprintf(w, "backup: transaction id %d, %d devices; the pool now: transaction id %d\n", rep.TransactionID, len(b.Devices), rep.Present)
	} else {
		fmt.Fprintf(w, "backup: transaction id %d, %d devices\n", rep.TransactionID, len(b.Devices))
		fmt.Fprintf(w, "WARNING: blocks that have been given to others since cannot be told, and show what those wrote: %s\n", rep.Why)
	}
	if b.Superblock != "" || len(b.Trees) > 0 {
		fmt.Fprintln(w, "WARNING: the backup itself is damaged:", strings.Join(append([]string{b.Superblock}, b.Trees...), " "))
	}
	if len(rep.Newer) > 0 {
		fmt.Fprintf(w, "devices that are newer than the backup and are lost: %s\n", shortList(rep.Newer))
	}
	if err := b.WriteDevices(w); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, "blocks that were written for the first time since the backup are lost; a block that stays holds what was written to it last, also after the backup")
	return err
}

// shortList names the first of many.
func shortList(ids []thin.DevID) string {
	const most = 20
	s := ""
	for i, id := range ids {
		if i == most {
			return s + fmt.Sprintf(" and %d more", len(ids)-most)
		}
		if i > 0 {
			s += ", "
		}
		s += fmt.Sprint(id)
	}
	return s
}
