package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/engine/user"
	"mica/thin"
)

// newPoolCmd is about whole pools.
func newPoolCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "pool",
		Short: "Make, grow, trim, check, repair and back up pools",
		Long: `Make, grow, trim, check, repair, back up and switch pools of blocks.

POOL is a pool that no daemon has open: its directory, or --data DEV --metadata DEV. Without
POOL a command is about the pool of the running daemon.`,
	}
	c.AddCommand(newPoolCreateCmd(), newPoolGrowCmd(), newPoolTrimCmd(), newPoolCheckCmd(), newPoolSwitchCmd(), newPoolRepairCmd(),
		newPoolBackupCmd(), newPoolBackupsCmd(), newPoolRestoreCmd())
	return c
}

func newPoolCreateCmd() *cobra.Command {
	var p poolFlags
	var o user.FormatOptions
	var volume lvmFlags
	c := &cobra.Command{
		Use:   "create DIR | --data DEV --metadata DEV | --lvm DEV...",
		Short: "Make an empty pool",
		Long: `Make an empty pool in a directory, as the files data (sparse) and metadata, or on two
devices. Files are made with the given sizes; the default for the data is the smaller of
100G and 80 % of the host's free space, for the metadata 48 bytes a data block. Block
devices are used as long as they are.

With --lvm the pool is made with the LVM tools, as a thin pool in a volume group over the given
block devices, which are used as a whole. It is for the kernel engine; names and percentages are
those of [lvm] in the configuration. The command prints what to put there, so that the daemon
uses the pool.

A pool that is there already is refused, and so is a device with a file system, a partition
table or another signature on it, unless --force is given.`,
		Example: `  mica pool create /srv/pool --size 200G
  mica pool create --data /dev/sdb --metadata /dev/nvme0n1p3 --block-size 128K
  mica pool create --lvm /dev/sdb --lvm /dev/sdc`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(volume.devices) > 0 && !p.byDevices() && len(args) == 0 {
				return nil
			}
			return p.args(0, 0)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(volume.devices) > 0 {
				return volume.create(cmd, o)
			}
			return explainLock(user.Format(cmd.Context(), p.location(args), o))
		},
	}
	p.add(c)
	volume.add(c)
	sizeVar(c, &o.DataBytes, "size", 0, "length of the data file (default: see above)")
	sizeVar(c, &o.MetadataBytes, "metadata-size", 0, "length of the metadata file (default: see above)")
	sizeVar(c, &o.BlockSize, "block-size", thin.MinBlockSize, "length of a data block: a multiple of 64K up to 1G")
	c.Flags().BoolVar(&o.Force, "force", false, "overwrite what is there")
	return c
}

func newPoolGrowCmd() *cobra.Command {
	var p poolFlags
	var data, metadata int64
	var devices []string
	var force bool
	c := &cobra.Command{
		Use:   "grow [POOL] [--size N] [--metadata-size N] [--device DEV]...",
		Short: "Make the data or the metadata of a pool longer",
		Long: `Make the data or the metadata of a pool longer, to the given lengths. Pools never shrink.
Writes that wait for space go on at once.

A pool that the daemon made with the LVM tools grows over further block devices, which are taken
as a whole, by the percentages of the configuration.`,
		Example: `  mica pool grow --size 400G
  mica pool grow --device /dev/sdc
  mica pool grow /srv/pool --metadata-size 1G`,
		Args: p.optionalArgs(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if data == 0 && metadata == 0 && len(devices) == 0 {
				return usagef("nothing to grow: give --size, --metadata-size or --device")
			}
			if !p.named(args) {
				return growOnline(cmd, api.GrowPool{SizeBytes: data, MetadataBytes: metadata, Devices: devices, Force: force})
			}
			if len(devices) > 0 {
				return usagef("--device is for the daemon's pool: add a device to the volume group of a closed one with vgextend and lvextend")
			}
			pool, err := p.open(cmd.Context(), args, false)
			if err != nil {
				return err
			}
			if metadata != 0 {
				err = pool.GrowMetadata(cmd.Context(), metadata)
			}
			if err == nil && data != 0 {
				err = pool.GrowData(cmd.Context(), data)
			}
			return closing(pool, err)
		},
	}
	p.add(c)
	sizeVar(c, &data, "size", 0, "new length of the data")
	sizeVar(c, &metadata, "metadata-size", 0, "new length of the metadata")
	c.Flags().StringArrayVar(&devices, "device", nil, "further block device `DEV` of a pool on LVM; may be repeated")
	c.Flags().BoolVar(&force, "force", false, "take devices that carry a signature: what they hold is lost")
	return c
}

func newPoolTrimCmd() *cobra.Command {
	var p poolFlags
	c := &cobra.Command{
		Use:   "trim [POOL]",
		Short: "Give the space of free blocks back to the host",
		Long: `Give the space of all free blocks back to the host: holes in the data file, or discards to
the data device. mica does so by itself when blocks are freed; this is for pools that
something else has written.`,
		Example: "  mica pool trim /srv/pool",
		Args:    p.optionalArgs(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !p.named(args) {
				return trimOnline(cmd)
			}
			pool, err := p.open(cmd.Context(), args, false)
			if err != nil {
				return err
			}
			n, err := pool.Trim(cmd.Context())
			if err = closing(pool, err); err == nil {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "trimmed %s\n", size(n))
			}
			return err
		},
	}
	p.add(c)
	return c
}

func newPoolCheckCmd() *cobra.Command {
	var p poolFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   "check [POOL]",
		Short: "Check the metadata of a pool",
		Long: `Check the metadata of a pool and report everything that is wrong with it. A closed pool is
checked as by 'mica thin check', which can also repair leaks and clear needs_check. The
daemon's pool is checked while it runs, as of its last commit.

Exit status 0 if the pool is clean, else 1.`,
		Example: `  mica pool check
  mica pool check /srv/pool`,
		Args: p.optionalArgs(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !p.named(args) {
				return checkOnline(cmd, asJSON)
			}
			return checkMetadata(cmd, &p, args, thin.CheckOptions{}, asJSON, false)
		},
	}
	p.add(c)
	jsonFlag(c, &asJSON)
	return c
}

// named reports whether the command line names a closed pool.
func (p *poolFlags) named(args []string) bool { return p.byDevices() || len(args) > 0 }

// optionalArgs takes a pool or none.
func (p *poolFlags) optionalArgs() cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(p.rest(args)) > 0 || p.byDevices() && (p.data == "" || p.metadata == "") {
			return fmt.Errorf("want: mica %s %s", cmd.Parent().Name(), cmd.Use)
		}
		return nil
	}
}
