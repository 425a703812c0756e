package ublk

import (
	"context"
	"fmt"
	"os"

	"mica/dev"
	"mica/export"
	"mica/export/keep"

	"golang.org/x/sys/unix"
)

// clean removes what nobody can go on with: devices of ours that were never given to anybody or
// were being taken away, records of devices that are gone, stale links. It runs before any device
// is attached.
func (e *Exporter) clean() error {
	live, err := e.x.Live(func(rec record) int { return rec.ID })
	if err != nil {
		return err
	}
	cookies := make(map[int]uint64)
	for _, id := range devices() {
		i, err := getInfo(id)
		if err != nil {
			continue
		}
		cookies[id] = i.cookie
		if _, ok := live[id]; ok || i.cookie&cookieRun != cookieOf(e.o.RunDir, "")&cookieRun {
			continue
		}
		e.o.Logger.Warn("clear away the rest of an attachment", "ublk", id)
		if err := e.x.Help.Do(context.Background(), "ublk.delete", "", deleteArgs{id, i.cookie}, nil); err != nil {
			return err
		}
		delete(cookies, id)
	}
	return e.x.CleanLinks(e.o.RunDir, live, NumberOf, func(id int, link string) bool {
		c, ok := cookies[id]
		return !ok || c&cookieName != cookieOf("", link)&cookieName
	})
}

// Survivors lists what a predecessor left: its nodes exist, their requests wait.
func (e *Exporter) Survivors(context.Context) ([]string, error) { return e.x.Survivors() }

// Adopt takes a survivor over and serves it from d. If its device is gone by now, the error is
// export.ErrNotFound, and the name is free.
func (e *Exporter) Adopt(ctx context.Context, name string, d dev.Device) (export.Attachment, error) {
	return e.x.Adopt(ctx, name, d, func(rec record, cut func()) (*device, error) {
		i, there := rec.info()
		if !there {
			return nil, fmt.Errorf("ublk device %d is gone: %w", rec.ID, export.ErrNotFound)
		}
		// The driver lets us when the last thread of the dead server is gone.
		if err := keep.Recover(ctx, unix.EBUSY, func() error { return startRecovery(rec.ID) }); err != nil {
			return nil, err
		}
		n, err := e.serve(name, d, rec, &i, cut)
		if err != nil {
			return nil, err
		}
		if err = e.x.Links.Make(name, nodeOf(rec.ID)); err == nil {
			err = endRecovery(rec.ID, os.Getpid())
		}
		if err != nil {
			n.Leave()
			return nil, err
		}
		return n, nil
	})
}

// Drop cuts a survivor off: its requests fail, and its node goes as soon as nobody uses it.
func (e *Exporter) Drop(ctx context.Context, name string) error {
	return e.x.Drop(name, func(rec record) error {
		return e.x.Help.Do(ctx, "ublk.delete", "", deleteArgs{rec.ID, rec.Cookie}, nil)
	})
}
