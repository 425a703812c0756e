package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/thin"
)

// ioChunk is how much read and write move at once, in bytes.
const ioChunk = 1 << 20

func newThinReadCmd() *cobra.Command {
	var p poolFlags
	var off, length int64
	c := &cobra.Command{
		Use:   "read POOL ID [--offset N] [--length N]",
		Short: "Write the contents of a thin device to standard output",
		Long: `Write the contents of a thin device to standard output. What is not mapped reads as
zeros. Without --length it goes on to the end of the last mapped block.`,
		Example: "  mica thin read /var/lib/mica/pool 7 --length 1M | hexdump -C | head",
		Args:    p.args(1, 1),
		RunE: p.onDevices(true, func(cmd *cobra.Command, pool *user.Pool, ids []thin.DevID) error {
			ctx, id := cmd.Context(), ids[0]
			if !cmd.Flags().Changed("length") {
				end, err := mappedEnd(ctx, pool, id)
				if err != nil {
					return err
				}
				length = max(end-off, 0)
			}
			if length == 0 {
				_, err := pool.Device(ctx, id) // nothing to read, but it must exist
				return err
			}
			return onThin(ctx, pool, id, engine.OpenOptions{SizeBytes: sectors(off + length), ReadOnly: true}, func(t engine.Thin) error {
				_, err := io.CopyBuffer(cmd.OutOrStdout(), io.NewSectionReader(t, off, length), make([]byte, ioChunk))
				return err
			})
		}),
	}
	p.add(c)
	sizeVar(c, &off, "offset", 0, "where to begin, in bytes")
	sizeVar(c, &length, "length", 0, "how many bytes")
	return c
}

// mappedEnd is the end in bytes of the last mapped block of a device.
func mappedEnd(ctx context.Context, pool engine.Pool, id thin.DevID) (int64, error) {
	last, ok, err := pool.HighestMapped(ctx, id)
	if err != nil || !ok {
		return 0, err
	}
	st, err := pool.Status(ctx)
	return (int64(last) + 1) * st.BlockSize, err
}

// onThin opens a device, calls fn, and closes it; one that may be written is flushed before.
func onThin(ctx context.Context, pool engine.Pool, id thin.DevID, o engine.OpenOptions, fn func(engine.Thin) error) error {
	t, err := pool.Open(ctx, id, o)
	if err != nil {
		return err
	}
	err = fn(t)
	if !o.ReadOnly {
		err = errors.Join(err, t.Flush())
	}
	return errors.Join(err, t.Close())
}

func sectors(n int64) int64 { return (n + 511) / 512 * 512 }

func newThinWriteCmd() *cobra.Command {
	var p poolFlags
	var off int64
	c := &cobra.Command{
		Use:   "write POOL ID [--offset N]",
		Short: "Write standard input to a thin device, and flush it",
		Long: `Write standard input to a thin device. Only the blocks that are written get space. The
command ends well only after everything has been flushed.`,
		Example: "  mica thin write /var/lib/mica/pool 7 --offset 1M < boot.img",
		Args:    p.args(1, 1),
		RunE: p.onDevices(false, func(cmd *cobra.Command, pool *user.Pool, ids []thin.DevID) error {
			ctx := cmd.Context()
			return onThin(ctx, pool, ids[0], engine.OpenOptions{SizeBytes: sectors(off + ioChunk)}, func(t engine.Thin) error {
				return copyIn(ctx, t, off, cmd.InOrStdin())
			})
		}),
	}
	p.add(c)
	sizeVar(c, &off, "offset", 0, "where to begin, in bytes")
	return c
}

// copyIn writes r to t from off on; the device grows as it must.
func copyIn(ctx context.Context, t engine.Thin, off int64, r io.Reader) error {
	buf := make([]byte, ioChunk)
	// Whole chunks on chunk borders: whole blocks then need no zeroing first.
	for want := ioChunk - int(off%ioChunk); ctx.Err() == nil; want = ioChunk {
		n, err := io.ReadFull(r, buf[:want])
		if n > 0 {
			if end := off + int64(n); end > t.Size() {
				if err := t.Resize(sectors(max(end, 2*t.Size()))); err != nil {
					return err
				}
			}
			if _, err := t.WriteAt(buf[:n], off); err != nil {
				return err
			}
			off += int64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

func newThinDiscardCmd() *cobra.Command {
	var p poolFlags
	var off, length int64
	c := &cobra.Command{
		Use:   "discard POOL ID --offset N --length N",
		Short: "Unmap the whole blocks inside a range; they read as zeros afterwards",
		Long: `Unmap the blocks that lie wholly inside a range. They read as zeros afterwards, and blocks
that no other device maps are freed. Parts of blocks at the ends keep their contents.`,
		Example: "  mica thin discard /var/lib/mica/pool 7 --offset 1G --length 512M",
		Args:    p.args(1, 1),
		RunE: p.onDevices(false, func(cmd *cobra.Command, pool *user.Pool, ids []thin.DevID) error {
			if length < 0 || off > 1<<62-length {
				return fmt.Errorf("discard %d bytes at %d: %w", length, off, dev.ErrOutOfRange)
			}
			return onThin(cmd.Context(), pool, ids[0], engine.OpenOptions{SizeBytes: sectors(off + length)}, func(t engine.Thin) error {
				return t.Discard(off, length)
			})
		}),
	}
	p.add(c)
	sizeVar(c, &off, "offset", 0, "where the range begins, in bytes")
	sizeVar(c, &length, "length", 0, "how long it is, in bytes")
	c.MarkFlagRequired("offset")
	c.MarkFlagRequired("length")
	return c
}
