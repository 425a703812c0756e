package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"mica/dev"
	"mica/engine"
	"mica/engine/kernel"
	"mica/engine/user"
	"mica/journal"
	"mica/thin"
)

func newPoolSwitchCmd() *cobra.Command {
	var p poolFlags
	var to string
	c := &cobra.Command{
		Use:   "switch POOL --to user|kernel",
		Short: "Choose the engine that opens a closed pool",
		Long: `Choose who reads and writes a pool from now on: the daemon itself (user), or the kernel's
dm-thin, which needs device-mapper (kernel). Both work on the same bytes, so nothing is
converted, and switching back is as easy.

The pool must be closed. The command refuses while a process has it open, while devices of it
are in use in the kernel, while writes of a killed daemon wait in a journal to be taken over,
and if the pool is marked needs_check. What a killed daemon left active in the kernel and nobody
uses is taken away.

The choice is noted in the pool's directory, for daemons whose pool.engine is auto. A pool on
devices has no place for a note: set pool.engine in the configuration.`,
		Example: `  mica pool switch /var/lib/mica/pool --to kernel`,
		Args:    p.args(0, 0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if to != engine.User && to != engine.Kernel {
				return usagef("--to %q: want %s or %s", to, engine.User, engine.Kernel)
			}
			l := p.location(args)
			if err := switchEngine(cmd.Context(), l, to); err != nil {
				return fmt.Errorf("switch %s to the %s engine: %w", l, to, err)
			}
			out := fmt.Sprintf("%s: %s engine\n", l, to)
			if l.Dir == "" {
				out = fmt.Sprintf("%s can be opened by the %s engine: set engine = %q in [pool] of the configuration\n", l, to, to)
			}
			_, err := fmt.Fprint(cmd.OutOrStdout(), out)
			return err
		},
	}
	p.add(c)
	c.Flags().StringVar(&to, "to", "", "`ENGINE` that opens the pool from now on: user or kernel")
	c.MarkFlagRequired("to")
	c.RegisterFlagCompletionFunc("to", cobra.FixedCompletions([]cobra.Completion{engine.User, engine.Kernel}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// switchEngine sees that a pool is closed and whole, and notes its engine.
func switchEngine(ctx context.Context, l user.Location, to string) error {
	if to == engine.Kernel {
		if err := kernel.Available(); err != nil {
			return err
		}
	}
	src := kernel.Source{Dir: l.Dir, Data: l.Data, Metadata: l.Metadata}
	if err := kernel.Deactivate(ctx, src, lockWait); err != nil {
		return explainLock(err)
	}
	// Under the locks of both devices, as every opener takes them.
	meta, err := dev.Open(l.MetadataPath(), dev.OpenOptions{Lock: true})
	if err != nil {
		return explainLock(err)
	}
	defer meta.Close()
	data, err := dev.Open(l.DataPath(), dev.OpenOptions{Lock: true})
	if err != nil {
		return explainLock(err)
	}
	defer data.Close()
	if err := user.RefuseExported(l); err != nil {
		return err
	}
	v, err := thin.OpenView(meta)
	if err != nil {
		return err
	}
	sb := v.Superblock()
	if sb.NeedsCheck() {
		return fmt.Errorf("the pool %w: run 'mica thin check --clear-needs-check' on it first", thin.ErrNeedsCheck)
	}
	if have := uint64(data.Size() / v.DataBlockSize()); have < sb.DataMap.NrBlocks {
		return fmt.Errorf("data device of %d bytes is too short: the pool has %d blocks of %d bytes", data.Size(), sb.DataMap.NrBlocks, v.DataBlockSize())
	}
	w, err := journal.WaitingFor(l.MetadataPath(), journal.Options{})
	if err != nil {
		return err
	}
	if w != nil && w.Entries > 0 && to == engine.Kernel {
		return fmt.Errorf("%w with %d changes (%s): start the daemon once with --engine user, which takes them over, and end it", kernel.ErrJournal, w.Entries, w.Path)
	}
	if l.Dir == "" {
		return nil
	}
	if now, err := engine.Noted(l.Dir); err == nil && now == to {
		return nil
	}
	return errors.Join(engine.Note(l.Dir, to))
}
