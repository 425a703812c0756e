package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
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
	o := p.options()
	o.ReadOnly = readOnly
	pool, err := user.Open(ctx, p.location(args), o)
	if err != nil {
		return nil, explainLock(err)
	}
	if s, err := pool.Status(ctx); err == nil {
		j := s.Journal
		if j.State == "waiting" {
			noteWaiting(p.location(args), j.Path, int(j.Entries))
		}
		if j.TakenOver > 0 {
			fmt.Fprintf(os.Stderr, "mica: %s: its last opener was killed: %d blocks that were written or discarded since the last commit were taken over\n", p.location(args), j.TakenOver)
		}
		if j.Problem != "" {
			fmt.Fprintf(os.Stderr, "mica: %s: %s\n", p.location(args), j.Problem)
		}
	}
	return pool, nil
}

// options are those of every command.
func (p *poolFlags) options() user.Options {
	return user.Options{
		ErrorIfNoSpace:  true, // nobody would free space while this process waits
		LockWait:        lockWait,
		JournalOptional: true,                                           // what a command writes is worth something when it has ended well
		Logger:          slog.New(slog.NewTextHandler(io.Discard, nil)), // errors come back from the calls
	}
}

// noteWaiting says that what is shown is not all.
func noteWaiting(l user.Location, path string, entries int) {
	where := l.String()
	if l.Dir == "" {
		where = l.Metadata
	}
	fmt.Fprintf(os.Stderr, "mica: %s: its last opener was killed: %d changes since the last commit wait in %s and do not show; whoever opens the pool for writing takes them over\n",
		where, entries, path)
}

// metadataDevice opens the metadata device alone, under its lock. What an opener that was killed has
// left is taken over first, if the device is to be written.
func (p *poolFlags) metadataDevice(ctx context.Context, args []string, readOnly bool) (dev.Device, error) {
	d, err := p.lockMetadata(args, readOnly)
	if err != nil {
		return nil, err
	}
	l := p.location(args)
	w, err := user.JournalWaiting(l)
	switch {
	case err != nil:
		d.Close()
		return nil, err
	case w == nil:
		return d, nil
	case w.Entries == 0:
		fmt.Fprintf(os.Stderr, "mica: %s: journal %s cannot be taken over: %s\n", l, w.Path, w.Why)
		return d, nil
	case readOnly:
		noteWaiting(l, w.Path, w.Entries)
		return d, nil
	}
	d.Close()
	if l.Dir == "" && l.Data == "" {
		return nil, fmt.Errorf("the last opener of the pool was killed and %d changes wait in %s: they must be taken over first, which needs the data device too: mica pool trim --data DEV --metadata %s",
			w.Entries, w.Path, l.Metadata)
	}
	if err := user.TakeOver(ctx, l, p.options()); err != nil {
		return nil, explainLock(err)
	}
	return p.lockMetadata(args, readOnly)
}

// nothingWaits refuses a change of the metadata with which changes that wait would be lost: a pool
// that is marked needs_check does not take them over.
func (p *poolFlags) nothingWaits(args []string) error {
	l := p.location(args)
	w, err := user.JournalWaiting(l)
	if err == nil && w != nil && w.Entries > 0 {
		err = fmt.Errorf("%s: %d changes wait in %s, which a repair would make worthless: take the needs_check mark away first (--clear-needs-check)",
			l.MetadataPath(), w.Entries, w.Path)
	}
	return err
}

// lockMetadata opens the metadata device as it is; to be written only if no devices of the pool wait
// for a daemon.
func (p *poolFlags) lockMetadata(args []string, readOnly bool) (dev.Device, error) {
	l := p.location(args)
	d, err := dev.Open(l.MetadataPath(), dev.OpenOptions{ReadOnly: readOnly, Lock: true})
	if err == nil && !readOnly {
		if err = user.RefuseExported(l); err != nil {
			d.Close()
			return nil, err
		}
	}
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
