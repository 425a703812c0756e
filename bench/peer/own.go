package peer

import (
	"context"
	"encoding/binary"
	"strconv"
	"strings"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/thin"
)

// Own says how mica serves: the program, and what it serves.
type Own struct {
	Exe  string // the mica program
	File string // a plain file, or
	Pool string // a pool's directory, and
	ID   thin.DevID
	More []thin.DevID // served beside ID, as block devices
	Size int64
	// Profile, if not empty, is where a profile of the server's processor time goes.
	Profile string
}

// NBD serves on a socket.
func (o Own) NBD(ctx context.Context, socket string) (*Server, error) {
	return o.start(ctx, "--nbd", socket)
}

// Block serves a block device: our FUSE server with a loop device on it. run is a directory for
// the mount point.
func (o Own) Block(ctx context.Context, run string) (*Server, error) {
	return o.start(ctx, "--block", run)
}

func (o Own) start(ctx context.Context, how, where string) (*Server, error) {
	args := []string{"bench", "serve", how, where}
	if o.File != "" {
		args = append(args, "--file", o.File)
	} else {
		var ids []string
		for _, id := range append([]thin.DevID{o.ID}, o.More...) {
			ids = append(ids, strconv.Itoa(int(id)))
		}
		args = append(args, "--pool", o.Pool, "--id", strings.Join(ids, ","), "--size", strconv.FormatInt(o.Size, 10))
	}
	if o.Profile != "" {
		args = append(args, "--cpuprofile", o.Profile)
	}
	p, err := start(o.Exe, args...)
	if err != nil {
		return nil, err
	}
	s := &Server{proc: p}
	s.onStop(p.stop)
	if err := p.until(ctx, func() bool { return strings.HasSuffix(p.printed(), "\n") }); err != nil {
		s.Stop()
		return nil, err
	}
	if addr := strings.Fields(p.printed()); how == "--nbd" {
		s.URI = addr[0]
	} else {
		s.Node, s.More = addr[0], addr[1:]
	}
	return s, nil
}

// MakePool makes a pool whose data file is sparse.
func MakePool(ctx context.Context, dir string, dataBytes int64) error {
	return user.Format(ctx, user.Location{Dir: dir}, user.FormatOptions{DataBytes: dataBytes})
}

// OnPool opens a pool for one piece of work.
func OnPool(ctx context.Context, dir string, fn func(engine.Pool) error) error {
	p, err := user.Open(ctx, user.Location{Dir: dir}, user.Options{LockWait: 10 * time.Second})
	if err != nil {
		return err
	}
	if err := fn(p); err != nil {
		p.Close()
		return err
	}
	return p.Close()
}

// Fill writes all of a thin device of a pool, which is made.
func Fill(ctx context.Context, dir string, id thin.DevID, size int64) error {
	return OnPool(ctx, dir, func(p engine.Pool) error {
		if err := p.CreateThin(ctx, id); err != nil {
			return err
		}
		t, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: size})
		if err != nil {
			return err
		}
		defer t.Close()
		if err := FillDevice(ctx, t); err != nil {
			return err
		}
		return t.Flush()
	})
}

// FillDevice writes bytes that are not zero over a whole device.
func FillDevice(ctx context.Context, d dev.Device) error {
	chunk := make([]byte, 4<<20)
	for off := int64(0); off < d.Size(); off += int64(len(chunk)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		for i := 0; i < len(chunk); i += 8 { // each word of a device differs from the others
			binary.LittleEndian.PutUint64(chunk[i:], uint64(off+int64(i))*0x9E3779B97F4A7C15|1)
		}
		if _, err := d.WriteAt(chunk[:min(int64(len(chunk)), d.Size()-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// FillFile makes a file of size bytes that are not zero.
func FillFile(ctx context.Context, path string, size int64) error {
	f, err := dev.CreateFile(path, size, dev.OpenOptions{})
	if err != nil {
		return err
	}
	defer f.Close()
	return FillDevice(ctx, f)
}
