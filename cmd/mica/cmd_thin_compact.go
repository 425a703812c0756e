package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"mica/thin"
)

func newThinCompactCmd() *cobra.Command {
	var p poolFlags
	c := &cobra.Command{
		Use:   "compact POOL",
		Short: "Lower the snapshot time of a pool before its 24 bits are used up",
		Long: `Lower the snapshot time of a pool, and with it every time in its metadata, to the least that
keeps what the times say: which blocks devices share. The data and all mappings stay as they
are.

mica does so by itself, long before the time reaches its end at 16777215. The kernel does not:
this is for pools that it has been using for millions of snapshots.`,
		Example: "  mica thin compact /var/lib/mica/pool",
		Args:    p.metaArgs(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := p.metadataDevice(cmd.Context(), args, false)
			if err != nil {
				return err
			}
			m, err := thin.Open(d, thin.OpenOptions{})
			if err != nil {
				return errors.Join(p.about(args, err), d.Close())
			}
			if m.NeedsCheck() {
				return errors.Join(p.about(args, fmt.Errorf("the pool %w", thin.ErrNeedsCheck)), m.Close())
			}
			was := m.Time()
			err = m.CompactAll(nil)
			now := m.Time()
			if err = errors.Join(p.about(args, err), m.Close()); err == nil {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "time %d, was %d\n", now, was)
			}
			return err
		},
	}
	p.addMeta(c)
	return c
}
