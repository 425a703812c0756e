package helper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// privateFlags are for mounts that only the helper sees: nothing is run from them.
const privateFlags = unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NOATIME

// viewOptions are the options of a mount that must not write, not even to its journal.
func viewOptions(fstype string) string {
	if fstype == "xfs" {
		return "nouuid,norecovery"
	}
	return "noload"
}

// activeOptions are the options of a mount that may write.
func activeOptions(fstype string) string {
	if fstype == "xfs" {
		return "nouuid"
	}
	return ""
}

// dir makes a directory to mount on, below a tmpfs that only this process sees.
func (h *job) dir(name string) (string, error) {
	if !h.scratch {
		if h.req.Dir == "" {
			return "", errors.New("no directory to mount under")
		}
		if err := unix.Mount("tmpfs", h.req.Dir, "tmpfs", privateFlags, "size=64k,mode=0700"); err != nil {
			return "", fmt.Errorf("mount a tmpfs on %s: %w", h.req.Dir, err)
		}
		h.scratch = true
	}
	path := filepath.Join(h.req.Dir, name)
	return path, os.Mkdir(path, 0o700)
}

// mountActive mounts a node for writing; flags are added to privateFlags.
func (h *job) mountActive(node string) (string, error) {
	return h.mount("active", node, privateFlags, activeOptions(h.req.FSType))
}

// mountView mounts a node so that nothing is written.
func (h *job) mountView(name, node string) (string, error) {
	return h.mount(name, node, privateFlags|unix.MS_RDONLY, viewOptions(h.req.FSType))
}

func (h *job) mount(name, node string, flags uintptr, data string) (string, error) {
	dir, err := h.dir(name)
	if err != nil {
		return "", err
	}
	data = strings.Join(append(splitOptions(data), h.req.Options...), ",")
	if err := unix.Mount(node, dir, h.req.FSType, flags, data); err != nil {
		os.Remove(dir)
		return "", fsError(node, h.req.FSType, err)
	}
	h.mounts = append(h.mounts, dir)
	return dir, nil
}

func splitOptions(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// unmount takes the last mount away and waits for it: the file system is clean on its node when
// it returns, unless somebody else has it mounted.
func (h *job) unmount() error {
	dir := h.mounts[len(h.mounts)-1]
	if err := unix.Unmount(dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	h.mounts = h.mounts[:len(h.mounts)-1]
	return nil
}

func (h *job) unmountAll() error {
	for len(h.mounts) > 0 {
		if err := h.unmount(); err != nil {
			return err
		}
	}
	if h.scratch {
		if err := unix.Unmount(h.req.Dir, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", h.req.Dir, err)
		}
		h.scratch = false
	}
	return nil
}

// syncFS writes everything of the file system at dir to its device.
func syncFS(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

// probe tells whether anybody has claimed a block device (mounted it, in whatever mount
// namespace, or opened it exclusively).
func probe(node string) (State, error) {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, syscall.EBUSY) {
		return StateBusy, nil
	}
	if err != nil {
		return "", fmt.Errorf("open %s: %w", node, err)
	}
	unix.Close(fd)
	return StateIdle, nil
}

// hostMount mounts in the namespace that the helper was started in.
func (h *job) hostMount() error {
	var flags uintptr
	var data []string
	for _, o := range h.req.Options {
		switch o {
		case "ro":
			flags |= unix.MS_RDONLY
		case "rw":
		case "noatime":
			flags |= unix.MS_NOATIME
		case "nodev":
			flags |= unix.MS_NODEV
		case "nosuid":
			flags |= unix.MS_NOSUID
		case "noexec":
			flags |= unix.MS_NOEXEC
		default:
			data = append(data, o)
		}
	}
	if err := unix.Mount(h.req.Node, h.req.Target, h.req.FSType, flags, strings.Join(data, ",")); err != nil {
		return fsError(h.req.Node, h.req.FSType, err)
	}
	return nil
}

func hostUnmount(target string) error {
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}
