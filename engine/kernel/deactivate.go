package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mica/engine"
	"mica/internal/dmioctl"
)

// Active reports whether a pool of this engine is active in the kernel: opened now, or left by a
// process that died or kept its nodes. A host without device-mapper has none.
func Active(src Source) (bool, error) {
	if src.Pool != "" {
		return true, nil
	}
	id, err := identityOf(src.metadataPath())
	if err != nil {
		return false, err
	}
	dm, err := dmioctl.Open()
	if isAny(err, os.ErrNotExist, unix.ENODEV, unix.ENXIO, os.ErrPermission) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dm.Close()
	_, err = dm.Info(poolName(id))
	if errors.Is(err, unix.ENXIO) {
		return false, nil
	}
	return err == nil, err
}

// Deactivate takes what a predecessor left active of a pool out of the kernel, so that it is
// closed. Nothing active is fine. ErrInUse names the nodes that somebody uses; then the pool is as
// it was.
func Deactivate(ctx context.Context, src Source, lockWait time.Duration) error {
	if src.Pool != "" {
		return fmt.Errorf("deactivate %s: %w: it is deactivated by whoever made it", src, ErrForeign)
	}
	active, err := Active(src)
	if err != nil || !active {
		return err
	}
	p, err := Open(ctx, src, Options{LockWait: lockWait, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	var used []string
	for _, node := range p.Sweep() {
		var st unix.Stat_t
		who := ""
		if unix.Stat(node, &st) == nil {
			who = usersOf(st.Rdev, node)
		}
		used = append(used, strings.TrimSuffix(node+": "+who, ": "))
	}
	err = p.Close()
	if len(used) > 0 {
		return errors.Join(fmt.Errorf("the kernel has pool %s active, and devices of it are in use (%s): %w", src, strings.Join(used, "; "), engine.ErrInUse), err)
	}
	return err
}
