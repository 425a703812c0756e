package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"mica/daemon"
	"mica/daemon/config"
	"mica/engine/user"
)

// lvmFlags say from what a thin pool is made with the LVM tools.
type lvmFlags struct {
	devices    []string
	root, file string
}

func (f *lvmFlags) add(c *cobra.Command) {
	c.Flags().StringArrayVar(&f.devices, "lvm", nil, "make a thin pool with the LVM tools on this block device `DEV`; may be repeated")
	c.Flags().StringVar(&f.root, "root", "", "with --lvm: directory of the daemon that will use it (default: that of the configuration, else /var/lib/mica)")
	c.Flags().StringVar(&f.file, "config", "", "with --lvm: configuration `FILE` (default: "+config.DefaultFile+" if it is there)")
	c.MarkFlagDirname("root")
}

// create makes the pool and says how to use it.
func (f *lvmFlags) create(cmd *cobra.Command, o user.FormatOptions) error {
	for _, name := range []string{"size", "metadata-size"} {
		if cmd.Flags().Changed(name) {
			return usagef("--%s does not go with --lvm: the percentages of [lvm] in the configuration say how large it is", name)
		}
	}
	c, _, err := config.Load(f.file)
	if err != nil {
		return err
	}
	if f.root != "" {
		if c.Root, err = filepath.Abs(f.root); err != nil {
			return err
		}
	}
	c.LVM.Devices, c.LVM.DevicesForce = f.devices, o.Force
	if cmd.Flags().Changed("block-size") {
		c.Pool.BlockSize = config.Size(o.BlockSize)
	}
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return err
	}
	p, err := daemon.CreateVolume(cmd.Context(), c)
	if err != nil {
		return err
	}
	quoted := make([]string, len(f.devices))
	for i, d := range f.devices {
		quoted[i] = fmt.Sprintf("%q", d)
	}
	lines := fmt.Sprintf("[lvm]\ndevices = [%s]\n", strings.Join(quoted, ", "))
	if cmd.Flags().Changed("block-size") {
		lines += fmt.Sprintf("\n[pool]\nblock_size = %q\n", c.Pool.BlockSize)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "thin pool %s: %s of data, %s of metadata, %s left in the volume group\nput into %s:\n\n%s",
		p.FullName(), size(p.Bytes), size(p.MetadataBytes), size(p.FreeBytes), config.DefaultFile, lines)
	return err
}
