package main

import (
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"mica/engine/user"
	"mica/thin"
)

// newThinCmd is the plumbing: one command for each thing that a thin pool can do.
func newThinCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "thin",
		Short: "Low-level operations on a closed pool and its thin devices",
		Long: `Low-level operations on a pool that no daemon has open.

POOL is the directory of a pool, or --data DEV --metadata DEV. A pool does not store the
size of a thin device, so commands that need one take it. Offsets and lengths are bytes and
take the suffixes K, M, G and T (powers of 1024).`,
	}
	c.AddCommand(
		newThinLsCmd(), newThinCreateCmd(), newThinSnapCmd(), newThinRmCmd(),
		newThinReadCmd(), newThinWriteCmd(), newThinDiscardCmd(), newThinExportCmd(),
		newThinCheckCmd(), newThinDumpCmd(), newThinRestoreCmd(), newThinDeltaCmd(), newThinRmapCmd(),
		newThinCompactCmd(),
	)
	return c
}

// parseID reads a thin device's id.
func parseID(s string) (thin.DevID, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, usagef("%q is not a device id: a number from 0 to %d", s, thin.MaxDevID)
	}
	if n > uint64(thin.MaxDevID) {
		return 0, fmt.Errorf("device id %d does not fit 24 bits (at most %d)", n, thin.MaxDevID)
	}
	return thin.DevID(n), nil
}

func newThinLsCmd() *cobra.Command {
	var p poolFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   "ls POOL",
		Short: "List the thin devices of a pool",
		Example: `  mica thin ls /var/lib/mica/pool
  mica thin ls --metadata /dev/sdc --json`,
		Args: p.metaArgs(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := p.metadataDevice(cmd.Context(), args, true)
			if err != nil {
				return err
			}
			defer d.Close()
			v, err := thin.OpenView(d)
			if err != nil {
				return p.about(args, err)
			}
			list, err := v.Ls()
			if err != nil {
				return p.about(args, err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), thinLines(list, v.DataBlockSize()))
			}
			bytes := func(blocks uint64) string { return size(int64(blocks) * v.DataBlockSize()) }
			rows := [][]string{{"ID", "MAPPED", "EXCLUSIVE", "TRANSACTION", "CREATED", "SNAPSHOTTED"}}
			for _, l := range list {
				rows = append(rows, []string{fmt.Sprint(l.ID), bytes(l.MappedBlocks), bytes(l.Exclusive),
					fmt.Sprint(l.TransactionID), fmt.Sprint(l.CreationTime), fmt.Sprint(l.SnapshottedTime)})
			}
			return table(cmd.OutOrStdout(), rows)
		},
	}
	p.addMeta(c)
	jsonFlag(c, &asJSON)
	return c
}

// A thinLine is a thin device in JSON.
type thinLine struct {
	ID              thin.DevID `json:"id"`
	MappedBlocks    uint64     `json:"mapped_blocks"`
	ExclusiveBlocks uint64     `json:"exclusive_blocks"`
	EndBytes        int64      `json:"end_bytes"` // end of the last mapped block
	BlockSize       int64      `json:"block_size"`
	TransactionID   uint64     `json:"transaction_id"`
	CreationTime    uint32     `json:"creation_time"`
	SnapshottedTime uint32     `json:"snapshotted_time"`
}

func thinLines(list []thin.Listing, blockSize int64) []thinLine {
	lines := make([]thinLine, len(list))
	for i, l := range list {
		lines[i] = thinLine{ID: l.ID, MappedBlocks: l.MappedBlocks, ExclusiveBlocks: l.Exclusive, BlockSize: blockSize,
			TransactionID: l.TransactionID, CreationTime: l.CreationTime, SnapshottedTime: l.SnapshottedTime}
		if l.AnyMapped {
			lines[i].EndBytes = (int64(l.Highest) + 1) * blockSize
		}
	}
	return lines
}

// onDevices is the work of a command whose arguments are a pool and device ids: it opens the
// pool, for reading only if asked, calls fn, and closes the pool.
func (p *poolFlags) onDevices(readOnly bool, fn func(cmd *cobra.Command, pool *user.Pool, ids []thin.DevID) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		var ids []thin.DevID
		for _, a := range p.rest(args) {
			id, err := parseID(a)
			if err != nil {
				return err
			}
			ids = append(ids, id)
		}
		pool, err := p.open(cmd.Context(), args, readOnly)
		if err != nil {
			return err
		}
		return closing(pool, fn(cmd, pool, ids))
	}
}

func newThinCreateCmd() *cobra.Command {
	var p poolFlags
	c := &cobra.Command{
		Use:     "create POOL ID",
		Short:   "Make an empty thin device",
		Example: "  mica thin create /var/lib/mica/pool 7",
		Args:    p.args(1, 1),
		RunE: p.onDevices(false, func(cmd *cobra.Command, pool *user.Pool, ids []thin.DevID) error {
			return pool.CreateThin(cmd.Context(), ids[0])
		}),
	}
	p.add(c)
	return c
}

func newThinSnapCmd() *cobra.Command {
	var p poolFlags
	c := &cobra.Command{
		Use:     "snap POOL ID ORIGIN",
		Short:   "Make a snapshot: device ID becomes a copy of device ORIGIN",
		Example: "  mica thin snap /var/lib/mica/pool 8 7",
		Args:    p.args(2, 2),
		RunE: p.onDevices(false, func(cmd *cobra.Command, pool *user.Pool, ids []thin.DevID) error {
			return pool.CreateSnap(cmd.Context(), ids[0], ids[1])
		}),
	}
	p.add(c)
	return c
}

func newThinRmCmd() *cobra.Command {
	var p poolFlags
	c := &cobra.Command{
		Use:     "rm POOL ID",
		Short:   "Delete a thin device and free the blocks that only it maps",
		Example: "  mica thin rm /var/lib/mica/pool 8",
		Args:    p.args(1, 1),
		RunE: p.onDevices(false, func(cmd *cobra.Command, pool *user.Pool, ids []thin.DevID) error {
			return pool.Delete(cmd.Context(), ids[0])
		}),
	}
	p.add(c)
	return c
}
