package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mica/daemon/api"
)

func newSnapshotCmd() *cobra.Command {
	var in api.CreateSnapshot
	var labels labelsFlag
	var q quiesceFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   "snapshot NAME [SNAP]",
		Short: "Keep a container's contents as of now; list and remove snapshots",
		Long: `Keep a container's contents as of now under a name, or one made from the time. The container may
be in use: its file system is frozen for that moment. A snapshot takes no space until the
container changes.

If there is a snapshot of that name with the same labels, nothing is taken: its name is printed
all the same, a line on stderr says since when it is there, and that is not an error, as with every
command that makes something of a name.

Go back to a snapshot with 'mica rollback'.`,
		Example: `  mica snapshot web before-upgrade
  mica snapshot ls web
  mica snapshot rm web before-upgrade`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if in.Labels, err = labels.labels(); err != nil {
				return err
			}
			in.Container, in.Quiesce = args[0], q.z
			if len(args) == 2 {
				in.Name = args[1]
			}
			v, created, err := connect().CreateSnapshot(cmd.Context(), in)
			if err != nil {
				return err
			}
			if !created {
				fmt.Fprintf(cmd.ErrOrStderr(), "mica: container %q has had a snapshot %q since %s; nothing was taken now\n",
					v.Container, v.Name, v.Created.Format(time.RFC3339))
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), v)
			}
			fmt.Fprintln(cmd.OutOrStdout(), v.Name)
			noteLevel(cmd, v.Level)
			return nil
		},
	}
	labels.add(c)
	q.add(c)
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(containerNames)
	c.AddCommand(newSnapshotLsCmd(), newSnapshotRmCmd())
	return c
}

func newSnapshotLsCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "ls [NAME]",
		Aliases: []string{"list"},
		Short:   "List the snapshots of a container, or of all",
		Example: `  mica snapshot ls web`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) == 1 {
				name = args[0]
			}
			list, err := connect().Snapshots(cmd.Context(), name)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), list)
			}
			rows := [][]string{{"CONTAINER", "SNAPSHOT", "SIZE", "CONSISTENT", "CREATED"}}
			for _, v := range list {
				snap := v.Name
				if v.Broken != "" {
					snap += " (broken)"
				}
				rows = append(rows, []string{v.Container, snap, size(v.SizeBytes), string(v.Level), when(v.Created)})
			}
			return table(cmd.OutOrStdout(), rows)
		},
	}
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(containerNames)
	return c
}

func newSnapshotRmCmd() *cobra.Command {
	c := &cobra.Command{
		Use:     "rm NAME SNAP...",
		Aliases: []string{"remove"},
		Short:   "Remove snapshots of a container",
		Example: `  mica snapshot rm web before-upgrade`,
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			client := connect()
			return each(cmd, args[1:], func(snap string) error { return client.RemoveSnapshot(cmd.Context(), args[0], snap) })
		},
	}
	c.ValidArgsFunction = complete(containerNames)
	return c
}

func newRollbackCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "rollback NAME SNAP",
		Short: "Give a container the contents of one of its snapshots",
		Long: `Give a container the contents of one of its snapshots. What it has now is lost; the snapshot
stays. The container must be detached: mica umount NAME, or mica detach NAME.`,
		Example: `  mica umount web
  mica rollback web before-upgrade
  mica mount web`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := connect().Rollback(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			return printContainer(cmd, v, asJSON)
		},
	}
	jsonFlag(c, &asJSON)
	c.ValidArgsFunction = complete(containerNames)
	return c
}

// cutSnapshot splits CONTAINER/SNAPSHOT.
func cutSnapshot(name string) (container, snap string, ok bool) {
	container, snap, ok = strings.Cut(name, "/")
	return container, snap, ok && container != "" && snap != "" && !strings.Contains(snap, "/")
}
