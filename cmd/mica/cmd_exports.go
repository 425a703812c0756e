package main

import (
	"fmt"
	"log/slog"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"mica/daemon"
	"mica/daemon/config"
)

func newExportsCmd() *cobra.Command {
	var configFile string
	var asJSON bool
	c := &cobra.Command{
		Use:   "exports",
		Short: "List the block devices that a daemon has left, or cut them off",
		Long: `List the block devices that a daemon which is gone has left.

They stay when the daemon is killed or ends while they are in use, and everything that is read or
written waits for the next daemon. If there will be none, 'mica exports drop' cuts them off: what waits
fails, and they go as soon as nobody has them mounted or open. While a daemon runs this command
refuses; then 'mica detach' and 'mica shutdown' take devices away.`,
		Example: `  mica exports
  mica exports drop --all`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := leftExports(cmd, configFile, nil)
			if err != nil {
				return err
			}
			if asJSON {
				if list == nil {
					list = []daemon.LeftExport{}
				}
				return printJSON(cmd.OutOrStdout(), list)
			}
			rows := [][]string{{"NAME", "KIND", "NODE"}}
			for _, l := range list {
				rows = append(rows, []string{l.Name, l.Kind, dash(l.Node)})
			}
			return table(cmd.OutOrStdout(), rows)
		},
	}
	jsonFlag(c, &asJSON)
	c.Flags().StringVar(&configFile, "config", "", "configuration of the daemon that is gone (default "+config.DefaultFile+", if it exists)")
	c.AddCommand(newExportsDropCmd())
	return c
}

func newExportsDropCmd() *cobra.Command {
	var configFile string
	var all bool
	c := &cobra.Command{
		Use:   "drop NAME... | --all",
		Short: "Cut off block devices that a daemon has left",
		Long: `Cut off block devices that a daemon has left and that no other daemon will serve.

Everything that waits for them fails with an I/O error, and so does what is written to them from then
on. File systems on them have to be unmounted; then the devices are gone. Whatever was acknowledged to
containers is still in the pool or in its journal, for the next daemon.`,
		Example: `  mica exports drop 14d86946-1
  mica exports drop --all`,
		Args: func(_ *cobra.Command, args []string) error {
			if all != (len(args) == 0) {
				return usagef("name devices, or give --all")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := leftExports(cmd, configFile, func(list []daemon.LeftExport) ([]string, error) {
				if all {
					args = nil
					for _, l := range list {
						args = append(args, l.Name)
					}
				}
				for _, name := range args {
					if !slices.ContainsFunc(list, func(l daemon.LeftExport) bool { return l.Name == name }) {
						return nil, fmt.Errorf("no daemon has left a device %q", name)
					}
				}
				return args, nil
			})
			for _, l := range list {
				fmt.Fprintln(cmd.OutOrStdout(), l.Name)
			}
			return err
		},
	}
	c.Flags().BoolVar(&all, "all", false, "all that are left")
	c.Flags().StringVar(&configFile, "config", "", "configuration of the daemon that is gone (default "+config.DefaultFile+", if it exists)")
	return c
}

func leftExports(cmd *cobra.Command, configFile string, drop func([]daemon.LeftExport) ([]string, error)) ([]daemon.LeftExport, error) {
	c, _, err := config.Load(configFile)
	if err != nil {
		return nil, err
	}
	if runFlag != "" || os.Getenv("MICA_RUN") != "" {
		c.Run = runDir()
	}
	return daemon.LeftExports(cmd.Context(), daemon.LeftOptions{
		Config: c, Exe: []string{"/proc/self/exe"},
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	}, drop)
}
