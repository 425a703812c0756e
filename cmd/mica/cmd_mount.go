package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/layer"
)

func newAttachCmd() *cobra.Command {
	var in api.CreateAttachment
	var asJSON bool
	c := &cobra.Command{
		Use:   "attach NAME",
		Short: "Export a container as a block device or an NBD socket",
		Long: `Export a container's device and print where it is: a block device of this host, or the URI of an
NBD export for a virtual machine. It stays, also over a restart of the daemon, until
'mica detach'.

An NBD export is on a socket that only root may use. With --tcp it can be reached over TCP too,
at the address that the daemon's configuration names (nbd.listen), and its URI is printed: nbds
if clients must use TLS and show a certificate, nbd on a loopback address without.

A container that was attached as NBD is owned by its guest from then on: this host does not
mount what a guest wrote unless it is told to (--trust-guest).`,
		Example: `  mica attach web
  mica attach vm1 --as nbd
  mica attach vm2 --as nbd --tcp
  qemu-system-x86_64 ... -drive file=$(mica attach vm1 --as nbd),format=raw`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if in.As != string(layer.AsBlock) && in.As != string(layer.AsNBD) {
				return usagef("--as %s: want block or nbd", in.As)
			}
			if in.TCP && in.As != string(layer.AsNBD) {
				return usagef("--tcp goes with --as nbd")
			}
			in.Container = args[0]
			a, _, err := connect().Attach(cmd.Context(), in)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), a)
			}
			where := a.URI
			if a.As == layer.AsBlock {
				where = device(a.Attachment)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), where)
			return err
		},
	}
	c.Flags().StringVar(&in.As, "as", string(layer.AsBlock), "block or nbd")
	c.Flags().BoolVar(&in.ReadOnly, "read-only", false, "export it read-only")
	c.Flags().BoolVar(&in.TCP, "tcp", false, "with nbd: serve it over TCP too")
	c.Flags().BoolVar(&in.TrustGuest, "trust-guest", false, "with nbd: this host may go on mounting it")
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(containerNames)
	return c
}

// device is the path to use for an attachment: the link, which is never reused.
func device(a layer.Attachment) string {
	if a.Link != "" {
		return a.Link
	}
	return a.Node
}

func newDetachCmd() *cobra.Command {
	var deferred bool
	c := &cobra.Command{
		Use:   "detach NAME...",
		Short: "Take the block device or NBD export of a container away",
		Long: `Take the block device or NBD export of a container away. One that is mounted or open is refused,
and the error names by whom.`,
		Example: `  mica detach web
  mica detach --deferred web`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := connect()
			return each(cmd, args, func(name string) error { return c.Detach(cmd.Context(), name, deferred) })
		},
	}
	c.Flags().BoolVar(&deferred, "deferred", false, "if it is busy, let the daemon go on trying")
	c.ValidArgsFunction = complete(containerNames)
	return c
}

func newMountCmd() *cobra.Command {
	var readOnly, trust, asJSON bool
	c := &cobra.Command{
		Use:   "mount NAME [DIR]",
		Short: "Attach a container and mount its file system",
		Long: `Attach a container and mount its file system on DIR, or on RUN/mnt/NAME, and print the directory.
The mount is made by this command, in its own mount namespace, so that it is there for
whoever runs it. It stays when the daemon is restarted.`,
		Example: `  mica mount web
  mica mount web /mnt
  chroot $(mica mount web) /bin/sh`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir := ""
			if len(args) == 2 {
				dir = args[1]
			}
			m, err := mountContainer(cmd.Context(), connect(), args[0], dir, readOnly, trust)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), m)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), m.Directory)
			return err
		},
	}
	c.Flags().BoolVar(&readOnly, "read-only", false, "mount it read-only")
	c.Flags().BoolVar(&trust, "trust-guest", false, "mount it although a guest wrote its file system")
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(containerNames, nil)
	return c
}

// A mounted says where a container is mounted.
type mounted struct {
	Container string `json:"container"`
	Directory string `json:"directory"`
	Device    string `json:"device"`
	ReadOnly  bool   `json:"read_only"`
}

func mountContainer(ctx context.Context, c *client.Client, name, dir string, readOnly, trust bool) (m mounted, err error) {
	v, err := c.Container(ctx, name)
	if err != nil {
		return m, err
	}
	if v.GuestOwned && !trust {
		return m, fmt.Errorf("container %q: a guest wrote its file system, and a broken one can harm this host: mount it only with --trust-guest", name)
	}
	made := false // the directory
	if dir == "" {
		if dir, err = filepath.Abs(filepath.Join(runDir(), "mnt", name)); err != nil {
			return m, err
		}
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return m, err
			}
			made = true
		}
	} else if dir, err = filepath.Abs(dir); err != nil {
		return m, err
	}
	if st, err := os.Stat(dir); err != nil {
		return m, err
	} else if !st.IsDir() {
		return m, fmt.Errorf("mount %q: %s is not a directory", name, dir)
	}
	a, created, err := c.Attach(ctx, api.CreateAttachment{Container: name, As: string(layer.AsBlock), ReadOnly: readOnly, TrustGuest: trust})
	if err == nil {
		err = mountNode(a.Attachment, dir)
		if err != nil && created {
			err = errors.Join(err, c.Detach(context.WithoutCancel(ctx), name, false))
		}
	}
	if err != nil {
		if made {
			os.Remove(dir)
		}
		return m, err
	}
	// A hint for others; the mount is there without it.
	_ = c.NoteMount(ctx, name, dir)
	return mounted{name, dir, device(a.Attachment), a.ReadOnly}, nil
}

// mountNode mounts an attachment on a directory; if it is mounted there already, that is fine.
func mountNode(a layer.Attachment, dir string) error {
	node := device(a)
	where, err := mountsOf(node)
	if err != nil {
		return err
	}
	for _, d := range where {
		if d == dir {
			return nil
		}
	}
	return mountOptions(node, dir, a.FSType, a.MountOptions)
}

func newUmountCmd() *cobra.Command {
	var keep, lazy bool
	c := &cobra.Command{
		Use:     "umount NAME...",
		Aliases: []string{"unmount"},
		Short:   "Unmount a container's file system and detach it",
		Long: `Unmount a container's file system wherever it is mounted in this mount namespace, and detach it.
If it is mounted in other namespaces too, the error names the process there, and the
container stays attached.`,
		Example: `  mica umount web`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := connect()
			return each(cmd, args, func(name string) error { return umountContainer(cmd.Context(), c, name, keep, lazy) })
		},
	}
	c.Flags().BoolVar(&keep, "keep-attached", false, "leave the block device there")
	c.Flags().BoolVar(&lazy, "lazy", false, "take the mount out of the tree although files in it are open")
	c.ValidArgsFunction = complete(containerNames)
	return c
}

func umountContainer(ctx context.Context, c *client.Client, name string, keep, lazy bool) error {
	v, err := c.Container(ctx, name)
	if err != nil {
		return err
	}
	if v.Attachment == nil {
		return fmt.Errorf("container %q is neither mounted nor attached", name)
	}
	if v.Attachment.Node != "" {
		dirs, err := mountsOf(v.Attachment.Node)
		if err != nil {
			return err
		}
		// The last mount first: one may lie on top of another.
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := unmount(dirs[i], lazy); err != nil {
				return fmt.Errorf("container %q: %w", name, err)
			}
			_ = c.ForgetMount(ctx, name, dirs[i])
			if own, err := filepath.Abs(filepath.Join(runDir(), "mnt", name)); err == nil && own == dirs[i] {
				os.Remove(own)
			}
		}
	}
	if keep {
		return nil
	}
	return c.Detach(ctx, name, false)
}
