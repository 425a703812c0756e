package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/keep"

	"golang.org/x/sys/unix"
)

// clean removes what nobody can go on with: devices of ours that were never given to anybody or
// were being taken away, records of devices that are gone, stale links. It runs before any device
// is attached.
func (e *Exporter) clean() error {
	if err := e.dir.Tidy(); err != nil {
		return err
	}
	recs, err := e.dir.List()
	if err != nil {
		return err
	}
	live := make(map[int]string)
	for name, rec := range recs {
		if rec != nil {
			if _, there := rec.isThere(); there {
				live[rec.ID] = name
				continue
			}
		}
		e.o.Logger.Warn("the device of an attachment is gone", "name", name)
		if err := errors.Join(e.links.Remove(name), e.dir.Drop(name)); err != nil {
			return err
		}
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
		if err := e.help.Do(context.Background(), "ublk.delete", "", deleteArgs{id, i.cookie}, nil); err != nil {
			return err
		}
		delete(cookies, id)
	}
	err = e.links.UnmarkIf(e.o.RunDir, func(name string) bool {
		id, err := NumberOf("/dev/" + name)
		return err == nil && live[id] == ""
	})
	if err != nil {
		return err
	}
	// Links of other daemons in the same directory are told by the cookie, too.
	_, err = e.links.RemoveIf(func(link, target string) bool {
		id, err := NumberOf(target)
		if err != nil {
			return false
		}
		if name, ok := live[id]; ok {
			return name != link
		}
		c, ok := cookies[id]
		return !ok || c&cookieName != cookieOf("", link)&cookieName
	})
	return err
}

// Survivors lists what a predecessor left: its nodes exist, their requests wait.
func (e *Exporter) Survivors(context.Context) ([]string, error) {
	recs, err := e.dir.List()
	if err != nil {
		return nil, fmt.Errorf("survivors: %w", err)
	}
	var names []string
	for name := range recs {
		if !e.names.Has(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// recoverWait bounds how long the driver may take to notice that a server has died.
const recoverWait = 30 * time.Second

// Adopt takes a survivor over and serves it from d. If its device is gone by now, the error is
// export.ErrNotFound, and the name is free.
func (e *Exporter) Adopt(ctx context.Context, name string, d dev.Device) (export.Attachment, error) {
	if err := e.names.Claim(name); err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	a, err := e.adopt(ctx, name, d)
	e.names.Settle(name, a)
	if err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	if d.Size() > a.rec.Size {
		if err := a.Resize(ctx); err != nil {
			e.o.Logger.Warn("grow an adopted device", "name", name, "error", err)
		}
	}
	return a, nil
}

func (e *Exporter) adopt(ctx context.Context, name string, d dev.Device) (_ *attachment, err error) {
	rec, err := e.dir.Get(name)
	if err != nil {
		return nil, err
	}
	if rec == nil {
		return nil, export.ErrNotFound
	}
	i, there := rec.isThere()
	if !there {
		if err := errors.Join(e.links.Remove(name), e.dir.Drop(name)); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("ublk device %d is gone: %w", rec.ID, export.ErrNotFound)
	}
	if d.Size() < rec.Size {
		return nil, fmt.Errorf("device of %d bytes, the node has %d", d.Size(), rec.Size)
	}
	if err := startRecoveryWait(ctx, rec.ID); err != nil {
		return nil, err
	}
	a := &attachment{e: e, name: name, d: d, rec: *rec, flags: i.flags, life: keep.NewLife()}
	if a.s, err = newServer(&i, d, rec.ReadOnly, &e.o); err != nil {
		return nil, err
	}
	a.s.onEnd = a.cut
	if err := a.s.start(); err != nil {
		a.s.close()
		return nil, err
	}
	if err = e.links.Make(name, nodeOf(rec.ID)); err == nil {
		err = endRecovery(rec.ID, os.Getpid())
	}
	if err != nil {
		a.s.leave()
		a.s.close()
		return nil, err
	}
	return a, nil
}

// startRecoveryWait begins a recovery as soon as the driver lets us: it does when the last thread
// of the dead server is gone.
func startRecoveryWait(ctx context.Context, id int) error {
	deadline := time.Now().Add(recoverWait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := startRecovery(id)
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the driver still has its old server after %v: %w", recoverWait, err)
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// Drop cuts a survivor off: its requests fail, and its node goes as soon as nobody uses it.
func (e *Exporter) Drop(ctx context.Context, name string) error {
	if err := e.names.Claim(name); err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	defer e.names.Settle(name, nil)
	rec, err := e.dir.Get(name)
	if err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	if rec == nil {
		return fmt.Errorf("drop %q: %w", name, export.ErrNotFound)
	}
	err = e.links.Remove(name)
	if err == nil {
		err = e.help.Do(ctx, "ublk.delete", "", deleteArgs{rec.ID, rec.Cookie}, nil)
	}
	if err == nil {
		err = errors.Join(e.dir.Drop(name), e.links.Unmark(kernelName(rec.ID)))
	}
	if err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	return nil
}
