package helper

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"mica/layer/archive"
)

// apply mounts the node, applies the layer tar that comes on the stream, and unmounts: when it
// answers, everything is on the device.
func (h *job) apply(ctx context.Context) (resp Response, err error) {
	in, err := stream()
	if err != nil {
		return resp, err
	}
	defer in.Close()
	dir, err := h.mountActive(h.req.Node)
	if err != nil {
		return resp, err
	}
	st, err := archive.Apply(ctx, dir, in, archive.ApplyOptions{Limits: h.req.Limits, Warn: h.warn})
	resp.Entries, resp.Bytes = st.Entries, st.Bytes
	if err == nil {
		err = syncFS(dir)
	}
	if err != nil {
		return resp, whatIsFull(dir, err)
	}
	if h.req.Trim {
		if resp.Trimmed, err = trimDir(dir); err != nil {
			return resp, err
		}
	}
	return resp, h.unmount()
}

// whatIsFull says of a file system that is full what it has too little of: the error that the kernel
// has for bytes and for inodes is the same.
func whatIsFull(dir string, err error) error {
	var st unix.Statfs_t
	if !errors.Is(err, unix.ENOSPC) || unix.Statfs(dir, &st) != nil {
		return err
	}
	return fmt.Errorf("%w (the file system has %d of %d inodes and %d of %d MiB free: a larger base has more of both)",
		err, st.Ffree, st.Files, st.Bavail*uint64(st.Bsize)>>20, st.Blocks*uint64(st.Bsize)>>20)
}

// diff mounts both nodes read-only and writes the layer tar that leads from one to the other.
func (h *job) diff(ctx context.Context) (resp Response, err error) {
	out, err := stream()
	if err != nil {
		return resp, err
	}
	defer out.Close()
	lower := ""
	if h.req.Lower != "" {
		if lower, err = h.mountView("lower", h.req.Lower); err != nil {
			return resp, err
		}
	}
	upper, err := h.mountView("upper", h.req.Node)
	if err != nil {
		return resp, err
	}
	st, err := archive.Diff(ctx, lower, upper, out, archive.DiffOptions{Snapshot: true, Changed: h.req.Changed, Warn: h.warn})
	resp.Entries, resp.Bytes = st.Entries, st.Bytes
	return resp, err
}

// replay mounts the node once, so that its journal is replayed and orphans are dropped.
func (h *job) replay() (resp Response, err error) {
	dir, err := h.mountActive(h.req.Node)
	if err != nil {
		return resp, err
	}
	if err := syncFS(dir); err != nil {
		return resp, err
	}
	return resp, h.unmount()
}

// trim gives the blocks that the file system does not use back to the pool.
func (h *job) trim() (resp Response, err error) {
	dir, err := h.mountActive(h.req.Node)
	if err != nil {
		return resp, err
	}
	if err := syncFS(dir); err != nil {
		return resp, err
	}
	if resp.Trimmed, err = trimDir(dir); err != nil {
		return resp, err
	}
	return resp, h.unmount()
}

func trimDir(dir string) (int64, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	n, err := trimFD(fd)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return 0, nil // the node cannot discard: nothing to give back
	}
	if err != nil {
		return n, fmt.Errorf("trim: %w", err)
	}
	return n, nil
}
