package helper

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// grow makes the file system as large as its node, also if somebody else has it mounted. The
// kernel grows a mounted ext4 for holders of CAP_SYS_RESOURCE only; without it one that is not
// mounted elsewhere is grown by resize2fs.
func (h *job) grow(ctx context.Context) error {
	state, err := probe(h.req.Node)
	if err != nil {
		return err
	}
	size, err := nodeSize(h.req.Node)
	if err != nil {
		return err
	}
	dir, err := h.mountActive(h.req.Node) // replays the journal, if there is one to replay
	if err != nil {
		return err
	}
	if h.req.FSType == "xfs" {
		return h.command(ctx, "xfs_growfs", "-d", dir)
	}
	err = growExt4(dir, size)
	if !errors.Is(err, syscall.EPERM) {
		return err
	}
	if state != StateIdle {
		return fmt.Errorf("grow the mounted ext4 on %s: needs CAP_SYS_RESOURCE: %w", h.req.Node, err)
	}
	if err := h.unmount(); err != nil {
		return err
	}
	// -f: it was mounted since the last e2fsck, which resize2fs takes for a reason to refuse.
	return h.command(ctx, "resize2fs", "-f", h.req.Node)
}

func growExt4(dir string, size int64) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return err
	}
	if err := resizeExt4FD(fd, uint64(size/st.Bsize)); err != nil {
		return fmt.Errorf("grow ext4 to %d bytes: %w", size, err)
	}
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}
