package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"mica/daemon/config"
	"mica/dev"
	"mica/engine/user"
	"mica/thin"
)

// poolLocation is where the daemon's pool is.
func poolLocation(root string, c config.Pool) user.Location {
	if c.Data != "" {
		return user.Location{Data: c.Data, Metadata: c.Metadata}
	}
	return user.Location{Dir: filepath.Join(root, "pool")}
}

// makePool makes the pool at the first start. A new directory appears with a whole pool in it or
// not at all; ROOT is locked.
func makePool(ctx context.Context, l user.Location, c config.Pool, log *slog.Logger) error {
	o := user.FormatOptions{BlockSize: int64(c.BlockSize), DataBytes: int64(c.Size), MetadataBytes: int64(c.MetadataSize)}
	if l.Dir == "" {
		return makeDevicePool(ctx, l, o, log)
	}
	if _, err := os.Stat(l.Dir); err == nil {
		return nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	tmp := l.Dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := user.Format(ctx, user.Location{Dir: tmp}, o); err != nil {
		return err
	}
	if err := os.Rename(tmp, l.Dir); err != nil {
		return err
	}
	log.Info("pool made", "pool", l.Dir)
	return dev.SyncDir(filepath.Dir(l.Dir))
}

// makeDevicePool formats devices that hold nothing at all. Anything else is left to
// `mica pool create`, which can be told to overwrite.
func makeDevicePool(ctx context.Context, l user.Location, o user.FormatOptions, log *slog.Logger) error {
	b := make([]byte, 4096)
	f, err := os.Open(l.MetadataPath())
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	default:
		_, err := f.ReadAt(b, 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("read %s: %w", l.MetadataPath(), err)
		}
		for _, x := range b {
			if x != 0 {
				return nil // a pool, or not: opening it tells
			}
		}
	}
	if err := user.Format(ctx, l, o); err != nil {
		return err
	}
	log.Info("pool made", "pool", l.String())
	return nil
}

// lowWaterMark turns the configured part of the data space into blocks.
func lowWaterMark(l user.Location, part config.Percent) (uint64, error) {
	if part == 0 {
		return 0, nil
	}
	d, err := dev.Open(l.MetadataPath(), dev.OpenOptions{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	m, err := thin.Open(d, thin.OpenOptions{ReadOnly: true})
	if err != nil {
		d.Close()
		return 0, nil // opening it for good tells why
	}
	defer m.Close()
	return m.DataBlocks() * uint64(part) / 100, nil
}
