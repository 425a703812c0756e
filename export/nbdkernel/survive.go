package nbdkernel

import (
	"context"
	"strings"

	"mica/dev"
	"mica/export"
	"mica/export/keep"

	"golang.org/x/sys/unix"
)

// clean removes what nobody can go on with: devices of ours that were never given to anybody,
// records of devices that are gone, stale links. It runs before any device is attached.
func (e *Exporter) clean() error {
	live, err := e.x.Live(func(rec record) int { return rec.Index })
	if err != nil {
		return err
	}
	for index := range devices() {
		b := backendOf(index)
		if _, ok := live[index]; ok || !strings.HasPrefix(b, e.backend("")) {
			continue
		}
		e.o.Logger.Warn("clear away the rest of an attachment", "nbd", index)
		if err := e.x.Help.Do(context.Background(), "nbd.drop", "", dropArgs{index, b}, nil); err != nil {
			return err
		}
	}
	// Links of other daemons in the same directory are told by the backend, too.
	return e.x.CleanLinks(e.o.RunDir, live, NumberOf, func(index int, link string) bool {
		b := backendOf(index)
		return !strings.HasPrefix(b, backendPrefix) || !strings.HasSuffix(b, ":"+link) || b == e.backend(link)
	})
}

// Survivors lists what a predecessor left: its nodes exist, their requests wait.
func (e *Exporter) Survivors(context.Context) ([]string, error) { return e.x.Survivors() }

// Adopt takes a survivor over and serves it from d. If its device is gone by now, the error is
// export.ErrNotFound, and the name is free.
func (e *Exporter) Adopt(ctx context.Context, name string, d dev.Device) (export.Attachment, error) {
	return e.x.Adopt(ctx, name, d, func(rec record, cut func()) (*device, error) {
		if err := e.x.Links.Make(name, nodeOf(rec.Index)); err != nil {
			return nil, err
		}
		k, err := openControl()
		if err != nil {
			return nil, err
		}
		defer k.close()
		n := e.newDevice(name, d, rec, cut)
		err = n.s.start(rec.Connections, func(fds []int) (int, error) {
			for _, fd := range fds {
				// There is room for a socket when the kernel has noticed that an old one is dead.
				err := keep.Recover(ctx, unix.ENOSPC, func() error { return k.reconnect(rec.Index, rec.Backend, []int{fd}) })
				if err != nil {
					return rec.Index, err
				}
			}
			return rec.Index, nil
		})
		if err != nil {
			return nil, err
		}
		return n, nil
	})
}

// Drop cuts a survivor off: its requests fail, and its node goes as soon as nobody uses it.
func (e *Exporter) Drop(ctx context.Context, name string) error {
	return e.x.Drop(name, func(rec record) error {
		return e.x.Help.Do(ctx, "nbd.drop", "", dropArgs{rec.Index, rec.Backend}, nil)
	})
}

// Close stops serving. Attachments stay: their requests wait for a successor.
func (e *Exporter) Close() error { return e.x.Close(nil) }
