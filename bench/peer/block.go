package peer

import (
	"context"
	"os"

	"mica/export/loop"
)

// attachLoop puts a loop device on a file; it goes before what is below it.
func (s *Server) attachLoop(ctx context.Context, file string, buffered bool) error {
	d, err := loop.Attach(ctx, loop.Config{Backing: file, Buffered: buffered})
	if err != nil {
		return err
	}
	s.Node = d.Node
	s.onStop(func() error {
		return loop.Detach(context.Background(), d, loop.DetachOptions{Backing: file, Wait: stopWait})
	})
	return nil
}

// PlainLoop is a loop device with direct I/O on a file: what a block device made of a file costs
// at the least.
func PlainLoop(ctx context.Context, file string) (*Server, error) {
	s := new(Server)
	return s, s.attachLoop(ctx, file, false)
}

// StorageDaemon is qemu-storage-daemon's FUSE export of an image, with a loop device on it. The
// loop device goes through the page cache: with direct I/O the export reuses a request's buffer
// before its reply is written, and what is read is wrong.
func StorageDaemon(ctx context.Context, file, format, mountpoint string) (_ *Server, err error) {
	before, err := os.Create(mountpoint)
	if err != nil {
		return nil, err
	}
	old, err := before.Stat()
	before.Close()
	if err != nil {
		return nil, err
	}
	args := []string{"--blockdev", "driver=file,node-name=file,filename=" + file}
	node := "file"
	if format != "raw" {
		args = append(args, "--blockdev", "driver="+format+",node-name=image,file=file")
		node = "image"
	}
	args = append(args, "--export", "type=fuse,id=e,node-name="+node+",mountpoint="+mountpoint+",writable=on")
	p, err := start("qemu-storage-daemon", args...)
	if err != nil {
		return nil, err
	}
	s := &Server{proc: p}
	s.onStop(func() error { return os.Remove(mountpoint) })
	s.onStop(p.stop)
	defer func() {
		if err != nil {
			s.Stop()
		}
	}()
	mounted := func() bool {
		now, err := os.Stat(mountpoint)
		return err == nil && !os.SameFile(old, now)
	}
	if err = p.until(ctx, mounted); err != nil {
		return nil, err
	}
	return s, s.attachLoop(ctx, mountpoint, true)
}
