package ublk

import (
	"context"
	"fmt"
	"time"

	"mica/dev"
	"mica/export/keep"
)

// An exporter is what this one has in common with others whose nodes outlive their server.
type exporter = keep.Exporter[record, *device]

// A device is a ublk device of ours, and its server.
type device struct {
	x     *exporter
	name  string
	rec   record // Grow changes its size
	wait  time.Duration
	s     *server
	flags uint64 // features of the device
	swept uint64 // the sweeper's: requests served when it last looked
}

// Grow needs Linux 6.16.
func (d *device) Grow(size int64) error {
	if d.flags&featUpdateSize == 0 {
		return fmt.Errorf("this kernel's ublk devices keep their size (Linux 6.16 can change it): detach and attach it again: %w", dev.ErrUnsupported)
	}
	if err := updateSize(d.rec.ID, size>>9); err != nil {
		return err
	}
	d.rec.Size = size
	return d.x.Records.Put(d.name, d.rec)
}

// Take ends the block device.
func (d *device) Take(link string) error {
	return d.x.Help.Do(context.Background(), "ublk.stop", "", stopArgs{ID: d.rec.ID, Cookie: d.rec.Cookie, Link: link, Wait: d.wait}, nil)
}

func (d *device) Leave() {
	d.s.leave()
	d.s.close()
}

// Clear removes the driver's device.
func (d *device) Clear() error {
	return d.x.Help.Do(context.Background(), "ublk.delete", "", deleteArgs{d.rec.ID, d.rec.Cookie}, nil)
}
