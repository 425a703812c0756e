// Command mica keeps container images and containers as thin, copy-on-write snapshots in one
// pool of blocks. `mica serve` is the daemon; the other commands talk to it, or, where their
// help says so, work on a pool that no daemon has open.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// Exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

// run is main without the process: it returns the exit code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	var silent *exitStatus
	if errors.As(err, &silent) {
		return silent.code
	}
	fmt.Fprintf(stderr, "mica: %v\n", err)
	if isUsage(err) {
		fmt.Fprintf(stderr, "See '%s --help'.\n", cmd.CommandPath())
		return exitUsage
	}
	return exitError
}

// A usageError is a mistake in the command line: exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func isUsage(err error) bool {
	var u usageError
	return errors.As(err, &u) || strings.HasPrefix(err.Error(), "unknown command") || strings.HasPrefix(err.Error(), "required flag")
}

// An exitStatus ends the program with a code and no further message: the command has said all.
type exitStatus struct{ code int }

func (e *exitStatus) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// newRoot makes the command tree.
func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "mica",
		Short: "Thin, copy-on-write block storage for container images and containers",
		Long: `mica keeps container images and containers as thin snapshots in one pool of blocks.

A container starts as a snapshot of its image: it costs nothing, reads the image's blocks,
and gets its own copy of a block when it first changes it. Every container is a real block
device with its own file system.

Start the daemon with 'mica serve', then:

    mica image import debian.tar --name debian
    mica create debian web
    mica mount web /mnt
    mica snapshot web before-upgrade
    mica status

The pools are those of the kernel's device mapper (dm-thin), byte for byte.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		CompletionOptions: cobra.CompletionOptions{
			HiddenDefaultCmd: true,
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.PersistentFlags().StringVar(&runFlag, "run", "", "RUN directory of the daemon (default $MICA_RUN or /run/mica)")
	root.AddGroup(groups()...)
	root.AddCommand(commands()...)
	for _, c := range root.Commands() {
		usageArgs(c)
	}
	return root
}

// usageArgs makes every complaint about arguments a usage error.
func usageArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	if c.HasSubCommands() && c.Run == nil && c.RunE == nil {
		c.Args = nil
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("unknown command %q for %q%s", args[0], cmd.CommandPath(), suggest(cmd, args[0]))
			}
			return cmd.Help()
		}
	}
	for _, sub := range c.Commands() {
		usageArgs(sub)
	}
}

// suggest names the commands that may have been meant.
func suggest(c *cobra.Command, typed string) string {
	if c.SuggestionsMinimumDistance <= 0 {
		c.SuggestionsMinimumDistance = 2
	}
	list := c.SuggestionsFor(typed)
	if len(list) == 0 {
		return ""
	}
	return "\nDid you mean: " + strings.Join(list, ", ") + "?"
}

// groups are the headings of the commands in the help, in order.
func groups() []*cobra.Group {
	return []*cobra.Group{
		{ID: "daemon", Title: "The daemon:"},
		{ID: "everyday", Title: "Images and containers:"},
		{ID: "pools", Title: "Pools:"},
	}
}

// group puts commands under a heading.
func group(id string, list ...*cobra.Command) []*cobra.Command {
	for _, c := range list {
		c.GroupID = id
	}
	return list
}

// commands lists every command of the program.
func commands() []*cobra.Command {
	return slices.Concat(
		group("daemon", newServeCmd(), newShutdownCmd(), newStatusCmd(), newTopCmd(), newEventsCmd(), newExportsCmd()),
		group("everyday", newImageCmd(), newCreateCmd(), newMountCmd(), newUmountCmd(), newAttachCmd(), newDetachCmd(),
			newSnapshotCmd(), newRollbackCmd(), newForkCmd(), newCommitCmd(), newDiffCmd(), newResizeCmd(),
			newLsCmd(), newInspectCmd(), newRmCmd(), newDfCmd()),
		group("pools", newPoolCmd(), newThinCmd(), newBenchCmd()),
		group("", newVersionCmd(), newCompletionCmd(), newHolderCmd(), newHelperCmd(), newManCmd()),
	)
}
