// Package loop attaches, resizes and detaches loop devices: a file as a block device.
//
// Everything here may wait for whoever serves the backing file (opening it, syncing the device,
// freezing its queue). A process that serves that file itself must not call this package from
// its own threads, or SIGKILL at the wrong moment leaves a thread that waits for itself; see
// package fuse, which runs these calls in a small process of their own.
package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"mica/export/node"

	"golang.org/x/sys/unix"
)

var (
	// ErrBusy: the device is mounted, open, or used by another block device. A *BusyError says by whom.
	ErrBusy = node.ErrBusy
	// ErrNotBound: there is no such loop device, or it is not (or no longer) on the expected file.
	ErrNotBound = errors.New("loop device not bound")
	// ErrNotSynced: the device was detached, but what its last users had written through the page
	// cache could not be written to the file.
	ErrNotSynced = errors.New("loop device detached with unwritten data")
)

// Config describes a loop device.
type Config struct {
	Backing    string // absolute path of the file
	ReadOnly   bool
	SectorSize int  // logical sector size in bytes, a power of two from 512 to 4096; 0 is 512
	Buffered   bool // leave the page cache of the backing file in; only one request is then in flight
}

// A Device names an attached loop device.
type Device struct {
	Number  int    `json:"number"`
	Node    string `json:"node"`    // "/dev/loop7"
	Created bool   `json:"created"` // the kernel made this minor for us; Remove takes it away again
}

// attempts bounds the retries after somebody else took the free device that the kernel named.
const attempts = 64

// Attach puts a free loop device on a file (LOOP_CONFIGURE, Linux 5.8). No partition scan is made. The device stays when
// the process ends.
func Attach(ctx context.Context, c Config) (Device, error) {
	if c.SectorSize == 0 {
		c.SectorSize = 512
	}
	if c.SectorSize < 512 || c.SectorSize > 4096 || c.SectorSize&(c.SectorSize-1) != 0 {
		return Device{}, fmt.Errorf("loop device on %s: sector size %d: want 512, 1024, 2048 or 4096", c.Backing, c.SectorSize)
	}
	backing, err := openBacking(c)
	if err != nil {
		return Device{}, fmt.Errorf("loop device on %s: %w", c.Backing, err)
	}
	defer unix.Close(backing)
	ctl, err := openControl()
	if err != nil {
		return Device{}, err
	}
	defer unix.Close(ctl)

	var last error
	for range attempts {
		if err := ctx.Err(); err != nil {
			return Device{}, fmt.Errorf("loop device on %s: %w", c.Backing, err)
		}
		knowMinors()
		n, err := unix.IoctlRetInt(ctl, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return Device{}, fmt.Errorf("loop-control: get a free device: %w", err)
		}
		d := Device{Number: n, Created: newMinor(n)}
		if d.Node, err = ensureNode(n); err != nil {
			// The device may have been taken away between the two calls.
			if last = err; errors.Is(err, ErrNotBound) {
				continue
			}
			return Device{}, err
		}
		err = configure(d.Node, backing, c)
		if err == nil {
			minors.setUp(n)
			return d, nil
		}
		last = fmt.Errorf("%s on %s: %w", d.Node, c.Backing, err)
		// EBUSY: somebody else configured it first. ENXIO, ENODEV: it went away again.
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENODEV) {
			return Device{}, last
		}
	}
	return Device{}, fmt.Errorf("no free loop device after %d attempts: %w", attempts, last)
}

// maxRequestKiB is the longest request of a device, so that one of it is one of the file system
// under it: FUSE takes at most 1 MiB, the kernel's own limit here is 1.25.
const maxRequestKiB = 1024

// limitRequests sets it. Without sysfs it stays as the kernel has it, which costs some memory only.
// A minor keeps its limit for the next file. To write it freezes the queue, which takes some
// 15 ms: many times what the rest of an attach does, so that it is read first.
func limitRequests(n int) {
	file, limit := sysfs(n)+"/queue/max_sectors_kb", strconv.Itoa(maxRequestKiB)
	if now, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(now)) != limit {
		_ = os.WriteFile(file, []byte(limit), 0)
	}
}

func openBacking(c Config) (int, error) {
	mode := unix.O_RDWR
	if c.ReadOnly {
		mode = unix.O_RDONLY
	}
	if !c.Buffered {
		mode |= unix.O_DIRECT
	}
	fd, err := openRetry(c.Backing, mode)
	if errors.Is(err, unix.EINVAL) && !c.Buffered {
		fd, err = openRetry(c.Backing, mode&^unix.O_DIRECT)
	}
	return fd, err
}

func configure(node string, backing int, c Config) error {
	mode := unix.O_RDWR
	if c.ReadOnly {
		mode = unix.O_RDONLY
	}
	fd, err := openRetry(node, mode)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	cfg := unix.LoopConfig{Fd: uint32(backing), Size: uint32(c.SectorSize)}
	if c.ReadOnly {
		cfg.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	if !c.Buffered {
		cfg.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], c.Backing)
	for {
		err := unix.IoctlLoopConfigure(fd, &cfg)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("LOOP_CONFIGURE: %w", err)
		}
		return nil
	}
}

// Resize makes the device as long as its backing file is now.
func Resize(node string) error {
	fd, err := openRetry(node, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("%s: resize: %w", node, err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("%s: LOOP_SET_CAPACITY: %w", node, err)
	}
	return nil
}

// Backing returns the path of the file that loop device n is on, or "" if it is free. It asks
// sysfs and never waits for the file's server.
func Backing(n int) string {
	b, err := os.ReadFile(sysfs(n) + "/loop/backing_file")
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)")
}

// isOn reports whether the opened loop device n is on a file, and which name the kernel has for
// the file now. If the file's mount was detached lazily, that name is no longer the path, and the
// name that Attach gave to the kernel tells.
func isOn(fd, n int, backing string) (now string, ok bool) {
	now = Backing(n)
	if now == backing || now == "" {
		return now, now != ""
	}
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil || filepath.Base(now) != filepath.Base(backing) {
		return now, false
	}
	name := unix.ByteSliceToString(info.File_name[:])
	return now, name == backing && len(name) < len(info.File_name)-1
}

// Find returns the numbers of the loop devices whose backing file satisfies ok.
func Find(ok func(backing string) bool) []int {
	var found []int
	for n := range devices() {
		if b := Backing(n); b != "" && ok(b) {
			found = append(found, n)
		}
	}
	return found
}

// Options of Detach.
type DetachOptions struct {
	// Backing is the file that the device must be on. If it is on another one, somebody else
	// detached and reused it: ErrNotBound, and nothing is touched.
	Backing string
	// Wait is how long to wait for an opener that is neither a mount nor another exclusive
	// user; udev opens every changed device for some milliseconds. 0 is 2 seconds.
	Wait time.Duration
	// Release is called, if not nil, when the device is exclusively ours and before its minor
	// is given back. If the device turns out to be open all the same, Restore is called.
	Release func() error
	Restore func()
}

// Detach syncs the device, takes it from its file and returns when its minor is really free.
// If it is mounted or open, the error is a *BusyError and the device stays as it was; it is free
// all the same after ErrNotSynced.
func Detach(ctx context.Context, d Device, o DetachOptions) error {
	if o.Wait == 0 {
		o.Wait = 2 * time.Second
	}
	deadline := time.Now().Add(o.Wait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := detachOnce(ctx, d, o)
		if err == nil || !errors.Is(err, ErrBusy) {
			return err
		}
		// A mount or a stacked device does not go away by itself; a bare opener may.
		who := Users(d.Number)
		if time.Now().After(deadline) || who.Settled() {
			return &BusyError{Node: d.Node, Users: who}
		}
		if err := sleep(ctx, pause); err != nil {
			return &BusyError{Node: d.Node, Users: who}
		}
	}
}

func detachOnce(ctx context.Context, d Device, o DetachOptions) error {
	fd, err := openRetry(d.Node, unix.O_RDONLY|unix.O_EXCL)
	switch {
	case errors.Is(err, unix.EBUSY):
		return ErrBusy
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%s: %w", d.Node, ErrNotBound)
	case err != nil:
		return fmt.Errorf("%s: detach: %w", d.Node, err)
	}
	closed := false
	shut := func() {
		if !closed {
			closed = true
			unix.Close(fd)
		}
	}
	defer shut()
	now, ok := isOn(fd, d.Number, o.Backing)
	if !ok {
		return fmt.Errorf("%s is on %q, not %q: %w", d.Node, now, o.Backing, ErrNotBound)
	}
	// Buffered writes of openers that are gone. An error here is reported to nobody else.
	syncErr := unix.Fsync(fd)
	if o.Release != nil {
		if err := o.Release(); err != nil {
			return err
		}
	}
	marked := autoclear(d.Number)
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil {
		if o.Restore != nil {
			o.Restore()
		}
		if err == unix.EBUSY {
			return ErrBusy
		}
		return fmt.Errorf("%s: LOOP_CLR_FD: %w", d.Node, err)
	}
	// The kernel refuses nobody: with other openers it only marks the device to be cleared by
	// the last close. Take the mark off again, unless it was there before: then somebody has
	// abandoned the device.
	if info, err := unix.IoctlLoopGetStatus64(fd); err == nil {
		info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
		if !marked {
			err = unix.IoctlLoopSetStatus64(fd, info)
		}
		if err != nil {
			return fmt.Errorf("%s: take back LOOP_CLR_FD: %w", d.Node, err)
		}
		if o.Restore != nil {
			o.Restore()
		}
		return ErrBusy
	}
	shut()
	for pause := 100 * time.Microsecond; Backing(d.Number) == now; pause = min(2*pause, 20*time.Millisecond) {
		if err := sleep(ctx, pause); err != nil {
			return fmt.Errorf("%s: wait until it is free: %w", d.Node, err)
		}
	}
	if syncErr != nil {
		return fmt.Errorf("%s: %w: %w", d.Node, ErrNotSynced, syncErr)
	}
	return nil
}

// abandonWatch is how long Abandon looks after a device that is in use: a detach under way in
// another process may take back the mark that it believes to be its own.
const abandonWatch = 100 * time.Millisecond

// Abandon marks a device whose server is gone to be cleared by its last close, whoever has it
// open. It is for devices that nobody can serve any more. If the device is free at once, it is
// when Abandon returns.
func Abandon(d Device, backing string) error {
	deadline := time.Now().Add(abandonWatch)
	for {
		if err := abandonOnce(d, backing); err != nil {
			return err
		}
		for autoclear(d.Number) {
			if time.Now().After(deadline) {
				return nil
			}
			<-time.After(2 * time.Millisecond)
		}
		if now := Backing(d.Number); now == "" || now != backing && filepath.Base(now) != filepath.Base(backing) {
			return nil
		}
	}
}

func abandonOnce(d Device, backing string) error {
	fd, err := openRetry(d.Node, unix.O_RDONLY)
	if err == unix.ENXIO || err == unix.ENODEV || err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: abandon: %w", d.Node, err)
	}
	defer unix.Close(fd)
	if now, ok := isOn(fd, d.Number, backing); now == "" {
		return nil
	} else if !ok {
		return fmt.Errorf("%s is on %q, not %q: %w", d.Node, now, backing, ErrNotBound)
	}
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil && err != unix.ENXIO {
		return fmt.Errorf("%s: LOOP_CLR_FD: %w", d.Node, err)
	}
	return nil
}

// autoclear reports whether a bound device is marked to be cleared by its last close.
func autoclear(n int) bool {
	b, err := os.ReadFile(sysfs(n) + "/loop/autoclear")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// Remove takes a free minor that the kernel made on demand away again. Devices that are in use
// stay.
func Remove(n int) error {
	ctl, err := openControl()
	if err != nil {
		return err
	}
	defer unix.Close(ctl)
	if err := unix.IoctlSetInt(ctl, unix.LOOP_CTL_REMOVE, n); err != nil && err != unix.ENODEV {
		return fmt.Errorf("loop-control: remove %d: %w", n, err)
	}
	forgetMinor(n)
	return nil
}

func openRetry(path string, mode int) (int, error) {
	for {
		fd, err := unix.Open(path, mode|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// sleep waits, or returns the context's error.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func sysfs(n int) string { return "/sys/block/loop" + strconv.Itoa(n) }
