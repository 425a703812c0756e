package nbdkernel

import (
	"context"
	"time"

	"mica/export/keep"
)

// An exporter is what this one has in common with others whose nodes outlive their server.
type exporter = keep.Exporter[record, *device]

// A device is a connected NBD device of ours, and its server.
type device struct {
	x    *exporter
	name string
	rec  record // Grow changes its size
	wait time.Duration
	s    *server
}

func (d *device) Grow(size int64) error {
	if err := with(func(k *control) error { return k.resize(d.rec.Index, d.rec.Backend, size) }); err != nil {
		return err
	}
	d.rec.Size = size
	return d.x.Records.Put(d.name, d.rec)
}

// Take disconnects the device.
func (d *device) Take(link string) error {
	return d.x.Help.Do(context.Background(), "nbd.disconnect", "", disconnectArgs{Index: d.rec.Index, Backend: d.rec.Backend, Link: link, Wait: d.wait}, nil)
}

func (d *device) Leave() { d.s.leave() }

// Clear waits until the kernel has given the device's state back, which it does when the last opener
// is gone; it is in use by nobody but those who came in the last moment.
func (d *device) Clear() error {
	for deadline := time.Now().Add(time.Second); d.rec.IsThere() && time.Now().Before(deadline); {
		<-time.After(time.Millisecond)
	}
	return nil
}
