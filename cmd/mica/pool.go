package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
)

// lockWait is how long a command waits for a pool whose opener is about to go.
const lockWait = 2 * time.Second

// poolFlags name a closed pool on the command line: POOL is the first argument, a directory, or
// the devices are given by flags and the argument is left out.
type poolFlags struct {
	data, metadata string
}

func (p *poolFlags) addMeta(c *cobra.Command) {
	c.Flags().StringVar(&p.metadata, "metadata", "", "metadata device of a pool that is not a directory")
}

func (p *poolFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&p.data, "data", "", "data device of a pool that is not a directory")
	p.addMeta(c)
}

// byDevices reports whether flags name the pool.
func (p *poolFlags) byDevices() bool { return p.metadata != "" || p.data != "" }

// args checks that the pool is named once and that least to most arguments follow it.
func (p *poolFlags) args(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if p.byDevices() && (p.data == "" || p.metadata == "") {
			return fmt.Errorf("--data and --metadata go together")
		}
		if n := len(p.rest(args)); !p.byDevices() && len(args) == 0 || n < least || n > most {
			return fmt.Errorf("want: mica %s %s", cmd.Parent().Name(), cmd.Use)
		}
		return nil
	}
}

// rest returns the arguments behind the pool.
func (p *poolFlags) rest(args []string) []string {
	if p.byDevices() || len(args) == 0 {
		return args
	}
	return args[1:]
}

func (p *poolFlags) location(args []string) user.Location {
	if p.byDevices() {
		return user.Location{Data: p.data, Metadata: p.metadata}
	}
	return user.Location{Dir: args[0]}
}

// open opens the pool, for reading only if asked.
func (p *poolFlags) open(ctx context.Context, args []string, readOnly bool) (*user.Pool, error) {
	o := user.Options{ReadOnly: readOnly}
	o.ErrorIfNoSpace = true // nobody would free space while this process waits
	o.LockWait = lockWait
	o.Logger = slog.New(slog.NewTextHandler(io.Discard, nil)) // errors come back from the calls
	pool, err := user.Open(ctx, p.location(args), o)
	return pool, explainLock(err)
}

// metadataDevice opens the metadata device alone, under its lock.
func (p *poolFlags) metadataDevice(args []string, readOnly bool) (dev.Device, error) {
	d, err := dev.Open(p.location(args).MetadataPath(), dev.OpenOptions{ReadOnly: readOnly, Lock: true})
	return d, explainLock(err)
}

// about names the metadata device in an error that only says what is wrong with it.
func (p *poolFlags) about(args []string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", p.location(args).MetadataPath(), err)
}

// explainLock adds what to do to the error of a pool that is open elsewhere.
func explainLock(err error) error {
	if errors.Is(err, dev.ErrLocked) {
		return fmt.Errorf("%w\nThe pool is open. If that is the daemon: 'mica status', 'mica df' and 'mica pool check' look at it "+
			"while it runs, 'mica shutdown' ends it", err)
	}
	return err
}

// closing closes the pool and joins the errors; a pool that did not close well has not kept
// what the command did.
func closing(p engine.Pool, err error) error { return errors.Join(err, p.Close()) }
