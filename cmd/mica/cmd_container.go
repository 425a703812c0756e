package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/layer"
)

func newCreateCmd() *cobra.Command {
	var in api.CreateContainer
	var labels labelsFlag
	var ttl ttlFlag
	var asJSON bool
	c := &cobra.Command{
		Use:   "create IMAGE NAME",
		Short: "Make a container's writable layer from an image",
		Long: `Make a container: a thin snapshot of an image, with a file system of its own that can be written.
It takes no space until something is written, and is there at once however large the image is.

If there is a container of that name with the same image, size, labels and time to live, that
is not an error.`,
		Example: `  mica create debian:12 web
  mica create debian:12 build --size 50G --ttl 2h --label team=web`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if in.Labels, err = labels.labels(); err != nil {
				return err
			}
			in.Image, in.Name, in.TTL = args[0], args[1], api.Duration(ttl.d)
			v, _, err := connect().CreateContainer(cmd.Context(), in)
			if err != nil {
				return err
			}
			return printContainer(cmd, v, asJSON)
		},
	}
	sizeVar(c, &in.SizeBytes, "size", 0, "size of the device (default: that of the image)")
	labels.add(c)
	ttl.add(c)
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(imageNames)
	return c
}

func printContainer(cmd *cobra.Command, v api.Container, asJSON bool) error {
	if asJSON {
		return printJSON(cmd.OutOrStdout(), v)
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout(), v.Name)
	return err
}

func newLsCmd() *cobra.Command {
	var f client.Filter
	var asJSON, all bool
	c := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List containers",
		Example: `  mica ls
  mica ls --image debian:12 --label team=web
  mica ls --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if all {
				f.Owner = "*"
			}
			list, err := connect().Containers(cmd.Context(), f)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), list)
			}
			rows := [][]string{{"NAME", "IMAGE", "SIZE", "USED", "SNAPSHOTS", "ATTACHED", "CREATED"}}
			if all {
				rows[0] = append(rows[0], "OWNER")
			}
			for _, v := range list {
				name := v.Name
				if v.Broken != "" {
					name += " (broken)"
				}
				row := []string{name, dash(v.Image), size(v.SizeBytes), size(v.UsedBytes), fmt.Sprint(v.Snapshots), attached(v.Attachment), when(v.Created)}
				if all {
					row = append(row, v.Owner)
				}
				rows = append(rows, row)
			}
			return table(cmd.OutOrStdout(), rows)
		},
	}
	c.Flags().StringArrayVar(&f.Labels, "label", nil, "only containers with this label, `KEY[=VALUE]`; may be repeated")
	c.Flags().StringVar(&f.Prefix, "prefix", "", "only names that begin so")
	c.Flags().StringVar(&f.Image, "image", "", "only containers of this image")
	c.Flags().BoolVar(&all, "all", false, "also what containerd owns")
	jsonFlag(c, &asJSON)
	return c
}

// attached says in a word where a container is attached.
func attached(a *layer.Attachment) string {
	switch {
	case a == nil:
		return "-"
	case len(a.Mounts) > 0:
		return a.Mounts[0]
	case a.As == layer.AsNBD:
		return "nbd"
	case a.Node != "":
		return a.Node
	}
	return string(a.As) // before its node is back after a reboot
}

func newInspectCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "inspect NAME",
		Short: "Print all there is to know about a container or an image, as JSON",
		Long: `Print all there is to know about a container or, if there is none of that name, an image, as
JSON. A snapshot is named CONTAINER/SNAPSHOT.`,
		Example: `  mica inspect web
  mica inspect debian:12 | jq .config
  mica inspect web/before-upgrade`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := inspect(cmd.Context(), connect(), args[0])
			if err != nil {
				return err
			}
			return printJSON(cmd.OutOrStdout(), v)
		},
	}
	c.ValidArgsFunction = complete(containerNames)
	return c
}

// inspect looks for a container, an image and a snapshot, in this order.
func inspect(ctx context.Context, c *client.Client, name string) (any, error) {
	v, err := c.Container(ctx, name)
	if !absent(err) {
		return v, err
	}
	i, err := c.Image(ctx, name)
	if !absent(err) {
		return i, err
	}
	if container, snap, ok := cutSnapshot(name); ok {
		p, err := c.Snapshot(ctx, container, snap)
		if !absent(err) {
			return p, err
		}
	}
	return nil, fmt.Errorf("there is no container, image or snapshot %q", name)
}

// absent: nothing has the name, or nothing can have it.
func absent(err error) bool {
	var e *api.Error
	return errors.As(err, &e) && (e.Code == api.CodeNotFound || e.Code == api.CodeInvalid)
}

func newRmCmd() *cobra.Command {
	var o layer.RemoveOptions
	c := &cobra.Command{
		Use:     "rm NAME...",
		Aliases: []string{"remove"},
		Short:   "Remove containers",
		Long: `Remove containers. They are gone at once; their blocks are freed in the background.

A container that is mounted or attached and in use is refused, and the error names who uses
it. With --deferred it goes from the lists and is removed when it is free.`,
		Example: `  mica rm web
  mica rm web build --snapshots
  mica rm --deferred web`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client := connect()
			return each(cmd, args, func(name string) error { return client.RemoveContainer(cmd.Context(), name, o) })
		},
	}
	c.Flags().BoolVar(&o.Deferred, "deferred", false, "one that is in use is removed when it is free")
	c.Flags().BoolVar(&o.Snapshots, "snapshots", false, "remove its snapshots too")
	c.ValidArgsFunction = complete(containerNames)
	return c
}

func newResizeCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "resize NAME SIZE",
		Short:   "Enlarge a container's device and its file system",
		Long:    `Enlarge a container's device and its file system, mounted or not. It costs no space by itself.`,
		Example: `  mica resize web 40G`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseSize(args[1])
			if err != nil {
				return usageError{err}
			}
			v, err := connect().Resize(cmd.Context(), args[0], n)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), v)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", v.Name, size(v.SizeBytes))
			return err
		},
	}
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(containerNames)
	return c
}

func newForkCmd() *cobra.Command {
	var in api.ForkContainer
	var labels labelsFlag
	var ttl ttlFlag
	var q quiesceFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   "fork NAME NEW... | NAME --count N --prefix P",
		Short: "Make consistent copies of a container, also of a running one",
		Long: `Make copies of a container, all of the same moment. If it is in use, its file system is frozen
for that moment. Copies take no space until one of them, or the container, is written.

Give the names of the copies, or --count and --prefix.`,
		Example: `  mica fork web web-debug
  mica fork golden --count 100 --prefix job- --ttl 1h`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if in.Labels, err = labels.labels(); err != nil {
				return err
			}
			byCount := cmd.Flags().Changed("count") || cmd.Flags().Changed("prefix")
			switch {
			case len(args) > 1 && byCount:
				return usagef("give the names of the copies, or --count and --prefix, not both")
			case len(args) == 1 && (in.Count < 1 || in.Prefix == ""):
				return usagef("give the names of the copies, or --count (at least 1) and --prefix")
			}
			in.Names, in.TTL, in.Quiesce = args[1:], api.Duration(ttl.d), q.z
			r, err := connect().Fork(cmd.Context(), args[0], in)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), r)
			}
			for _, v := range r.Containers {
				fmt.Fprintln(cmd.OutOrStdout(), v.Name)
			}
			noteLevel(cmd, r.Level)
			return nil
		},
	}
	c.Flags().IntVar(&in.Count, "count", 0, "number of copies")
	c.Flags().StringVar(&in.Prefix, "prefix", "", "their names are PREFIX1, PREFIX2, ...")
	labels.add(c)
	ttl.add(c)
	q.add(c)
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(containerNames)
	return c
}

// noteLevel says it when a copy is less than a clean file system.
func noteLevel(cmd *cobra.Command, l layer.Level) {
	if l == layer.LevelCrash {
		fmt.Fprintln(cmd.ErrOrStderr(), "The copy is as after power loss: the file system could not be frozen.")
	}
}
