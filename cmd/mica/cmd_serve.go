package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"mica/daemon"
	"mica/daemon/client"
	"mica/daemon/config"
)

// self is this program, as a command: also when its file was replaced by a newer one.
const self = "/proc/self/exe"

func newServeCmd() *cobra.Command {
	var root, run, file, engineName string
	var accept, adopt bool
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: `Run the daemon in the foreground. It needs root and no configuration at all.

At the first start it makes a pool in ROOT/pool: a sparse file for the data, as large as the
smaller of 100 GiB and 80 % of the free space, and a file for the metadata. The other commands
talk to it over RUN/mica.sock.

SIGTERM or Ctrl-C ends it. Containers that are attached or mounted stay so: their I/O waits
until the daemon is started again, also after kill -9. To take everything down first, use
'mica shutdown'.

With --engine kernel, or after 'mica pool switch', the kernel's dm-thin reads and writes the
pool. What is mounted then goes on without the daemon.

Several daemons can run on one host, each with its own --root and --run; the other commands
find theirs by --run or MICA_RUN.

The transaction id says whether pool and catalog are of the same moment. If one of the two was
restored from a copy, the daemon opens read-only and says which of them is old. With
--accept-pool it takes the pool as it is, once: what the catalog has and the pool lacks is shown
as broken, what only the pool has is left alone, nothing is deleted.

The configuration is TOML; docs/configuration.md lists every key.`,
		Example: `  mica serve
  mica serve --root /srv/mica --run /run/mica-2
  mica serve --config /etc/mica/config.toml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, path, err := config.Load(file)
			if err != nil {
				return err
			}
			for _, d := range []struct {
				flag string
				to   *string
			}{{root, &c.Root}, {run, &c.Run}} {
				if d.flag != "" {
					if *d.to, err = filepath.Abs(d.flag); err != nil {
						return err
					}
				}
			}
			if run == "" && os.Getenv("MICA_RUN") != "" {
				c.Run = os.Getenv("MICA_RUN")
			}
			if engineName != "" {
				c.Pool.Engine = engineName
			}
			c.Pool.Adopt = c.Pool.Adopt || adopt
			if err := c.Validate(); err != nil {
				return err
			}
			log := newLogger(cmd.ErrOrStderr(), c.Log)
			slog.SetDefault(log)
			if err := daemon.BecomeIOFlusher(self, os.Args, os.Environ()); err != nil {
				log.Debug("not an I/O flusher", "error", err)
			}
			daemon.SetName("mica")
			return daemon.Run(cmd.Context(), daemon.Options{
				Config: c, ConfigFile: path, Version: version(), Exe: []string{self}, Log: log, AcceptPool: accept,
				Ready: func(socket string, notes []string) {
					for _, n := range notes {
						log.Warn(n)
					}
					log.Info("ready", "socket", socket, "root", c.Root, "pid", os.Getpid())
				},
			})
		},
	}
	c.Flags().StringVar(&root, "root", "", "directory of the pool and the catalog (default: that of the configuration, else /var/lib/mica)")
	c.Flags().StringVar(&run, "run", "", "directory of sockets (default: that of the configuration or $MICA_RUN, else "+client.DefaultRun+")")
	c.Flags().StringVar(&engineName, "engine", "", "who reads and writes the pool: user, kernel or auto (default: that of the configuration)")
	c.Flags().BoolVar(&adopt, "adopt", false, "use a thin_pool of the configuration that has thin devices already, and leave those alone")
	c.Flags().StringVar(&file, "config", "", "configuration `FILE` (default: "+config.DefaultFile+" if it is there)")
	c.Flags().BoolVar(&accept, "accept-pool", false, "serve although pool and catalog are not of the same moment; see above")
	c.MarkFlagDirname("root")
	c.MarkFlagDirname("run")
	c.MarkFlagFilename("config", "toml")
	return c
}

// newLogger logs to w as the configuration says.
func newLogger(w io.Writer, c config.Log) *slog.Logger {
	level := slog.LevelInfo
	_ = level.UnmarshalText([]byte(c.Level)) // validated
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

func newShutdownCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "shutdown",
		Short: "Detach everything and end the daemon",
		Long: `Detach every container and end the daemon. If one is in use, nothing is done, and the error
names who uses it. Containers that are mounted must be unmounted first: mica umount NAME.

To end only the daemon and leave what is mounted waiting for its next start, send it SIGTERM.`,
		Example: `  mica shutdown`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return shutdown(cmd.Context(), connect())
		},
	}
	return c
}

func newVersionCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this program",
		Example: `  mica version`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if asJSON {
				return printJSON(cmd.OutOrStdout(), map[string]string{"version": version(), "go": goVersion()})
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "mica %s (%s)\n", version(), goVersion())
			return err
		},
	}
	jsonFlag(c, &asJSON)
	return c
}
