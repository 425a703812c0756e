package main

import (
	"maps"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"mica/daemon"
	"mica/export/fuse"
	exporthelper "mica/export/helper"
	"mica/export/holder"
	"mica/export/nbdkernel"
	"mica/export/ublk"
	"mica/layer/helper"
)

// The roles that the daemon starts this program in. They are hidden: nobody else needs them.

func newHolderCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "holder SOCKET",
		Short:  "Keep the daemon's descriptors while it is away",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			daemon.SetName("mica-holder")
			// Ctrl-C goes to every process of the terminal; the holder must outlive the daemon.
			signal.Ignore(os.Interrupt, syscall.SIGHUP)
			return holder.Run(cmd.Context(), args[0])
		},
	}
}

func newHelperCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "helper [loop|exports]",
		Short:  "Do work for the daemon that may wait for its devices",
		Hidden: true,
		Args:   cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),

		ValidArgs: []string{"loop", "exports"},
		RunE: func(cmd *cobra.Command, args []string) error {
			daemon.SetName("mica-helper")
			if len(args) == 1 && args[0] == "exports" {
				calls, known := maps.Clone(ublk.Calls), maps.Clone(ublk.Errors)
				maps.Copy(calls, nbdkernel.Calls)
				maps.Copy(known, nbdkernel.Errors)
				return exporthelper.Run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), calls, known)
			}
			if len(args) == 1 {
				return exporthelper.Run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), fuse.Calls, fuse.Errors)
			}
			return helper.Run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), nil)
		},
	}
}
