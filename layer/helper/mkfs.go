package helper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"mica/layer/ondisk"
)

// The features of an ext4 base. All are in kernel 5.4 and older e2fsprogs; the host's
// mke2fs.conf has no say (Options of the command line and an empty configuration of our own).
const ext4Features = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit," +
	"flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

// ext4Args are the options of mke2fs beside UUID and node, with what each is for:
//
//   - a journal of 16 MiB: what a container has written wanders through all of its journal, so
//     its size is what every busy container pays; 64 MiB, the default for 10 GiB, is four times
//     that for no gain measured here;
//   - lazy_itable_init=0: inode tables count as zeroed (the device is new, and reads as zeros),
//     so that no kernel thread of a mounted container zeroes them;
//   - lazy_journal_init=1: the journal is not written; it is zeros already;
//   - packed_meta_blocks=1: bitmaps, inode tables and journal lie together at the start, so that
//     small changes touch few blocks of the pool;
//   - resize=: room for the group descriptors of 64 times the base size; beyond it the kernel
//     grows by meta_bg;
//   - nodiscard: there is nothing to discard on a new device;
//   - no blocks reserved for root (-m 0): the size asked for is the size to use.
var ext4Args = []string{"-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
	"-e", "remount-ro", "-O", ext4Features, "-J", "size=16"}

// ext4Config replaces the host's mke2fs.conf.
const ext4Config = "[defaults]\n\tbase_features = sparse_super\n\tblocksize = 4096\n\tinode_size = 256\n\tinode_ratio = 16384\n" +
	"\tdefault_mntopts = acl,user_xattr\n\tenable_periodic_fsck = 0\n[fs_types]\n\text4 = {\n\t\tfeatures = has_journal\n\t}\n"

// mkfs makes an empty file system without lost+found on a node whose device reads as zeros.
func (h *job) mkfs(ctx context.Context) error {
	if state, err := probe(h.req.Node); err != nil {
		return err
	} else if state != StateIdle {
		return fmt.Errorf("%s is in use", h.req.Node)
	}
	switch h.req.FSType {
	case "ext4":
		size, err := nodeSize(h.req.Node)
		if err != nil {
			return err
		}
		ext := fmt.Sprintf("lazy_itable_init=0,lazy_journal_init=1,nodiscard,packed_meta_blocks=1,"+
			"root_owner=0:0,hash_seed=%s,resize=%d", h.req.UUID, min(size/4096*64, 1<<32-1))
		mk := func(ext string) error {
			args := append(append([]string(nil), ext4Args...), "-E", ext, "-U", h.req.UUID, h.req.Node)
			return h.command(ctx, "mke2fs", args...)
		}
		// The device reads as zeros. mke2fs before 1.47 does not know how to be told, and
		// zeroes the inode tables, which makes holes of holes.
		if mk(ext+",assume_storage_prezeroed=1") != nil {
			if err := mk(ext); err != nil {
				return err
			}
		}
	case "xfs":
		if err := h.mkfsXFS(ctx); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown file system %q", h.req.FSType)
	}
	dir, err := h.mountActive(h.req.Node)
	if err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, "lost+found")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if err := syncFS(dir); err != nil {
		return err
	}
	return h.unmount()
}

// xfsMeta are the features of the metadata of an xfs base. Without bigtime, which came with 5.10, times
// end in 2038.
const xfsMeta = "crc=1,finobt=1,rmapbt=0,reflink=1,bigtime=0,inobtcount=0"

// xfsNewer switches off, for one release of mkfs.xfs after the other, what kernel 5.4 does not mount and
// what the release makes by default. The last is for those that do not know any of it.
var xfsNewer = [][]string{
	{"-i", "sparse=1,nrext64=0,exchange=0", "-n", "parent=0"},
	{"-i", "sparse=1,nrext64=0"},
	{"-i", "sparse=1"},
}

func (h *job) mkfsXFS(ctx context.Context) (err error) {
	for _, newer := range xfsNewer {
		args := append([]string{"-q", "-f", "-K", "-m", xfsMeta + ",uuid=" + h.req.UUID}, newer...)
		if err = h.command(ctx, "mkfs.xfs", append(args, h.req.Node)...); err == nil || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return err
	}
	f, err := os.Open(h.req.Node)
	if err != nil {
		return err
	}
	defer f.Close()
	return ondisk.CheckXFS(f)
}

// nodeSize is the length of a block device in bytes.
func nodeSize(node string) (int64, error) {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", node, err)
	}
	defer unix.Close(fd)
	n, err := unix.Seek(fd, 0, 2)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", node, err)
	}
	return n, nil
}

// command runs a tool; it dies with the helper. Its error carries what the tool said.
func (h *job) command(ctx context.Context, name string, args ...string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		for _, dir := range []string{"/usr/sbin", "/sbin"} { // not in everybody's PATH
			if p := filepath.Join(dir, name); isExecutable(p) {
				path, err = p, nil
				break
			}
		}
	}
	if err != nil {
		pkg := map[string]string{"mke2fs": "e2fsprogs", "resize2fs": "e2fsprogs"}[name]
		if pkg == "" {
			pkg = "xfsprogs"
		}
		return fmt.Errorf("%s (package %s): %w", name, pkg, exec.ErrNotFound)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	if name == "mke2fs" {
		dir, err := h.dir("conf")
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		conf := filepath.Join(dir, "mke2fs.conf")
		if err := os.WriteFile(conf, []byte(ext4Config), 0o600); err != nil {
			return err
		}
		cmd.Env = append(cmd.Env, "MKE2FS_CONFIG="+conf)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(bytes.TrimSpace(out))))
	}
	return nil
}

func isExecutable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}
