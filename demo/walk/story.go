package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	mib        = 1 << 20
	newFile    = 4 * mib  // step "a new file"
	tempFile   = 64 * mib // step "written and deleted"
	metaBlocks = 12       // blocks that a file system's own bookkeeping may touch in a step
)

func (w *walk) story(image, big string) error {
	if err := w.serve(); err != nil {
		return err
	}
	w.title("An empty pool: one file for the data, one for the metadata")
	w.mica("status")
	empty := w.numbers()

	w.title("Import a real image: every layer is a snapshot of the one below")
	w.mica("image", "import", image, "--name", "demo")
	w.mica("image", "ls")
	imported := w.numbers()
	w.say("pool: %s", imported.since(empty, w.blockSize))

	w.title("Two containers: snapshots of the image, ready at once")
	w.mica("create", "demo", "one")
	w.mica("create", "demo", "two")
	one, two := filepath.Join(w.dir, "one"), filepath.Join(w.dir, "two")
	w.mount("one", one)
	w.mount("two", two)
	// ext4 notes the mount point in its superblock when the first file is opened.
	w.quietly("head -c1 " + filepath.Join(one, "etc/passwd") + " " + filepath.Join(two, "etc/passwd"))
	mounted := w.numbers()
	w.promise(mounted.used-imported.used <= 2*metaBlocks, "two mounted containers cost %d blocks of %s", mounted.used-imported.used, size(w.blockSize))
	if w.err != nil {
		return w.err
	}

	w.title("A file that the container does not have: read from the image's blocks")
	before := w.numbers()
	w.shell("sha256sum " + filepath.Join(one, big))
	after := w.numbers()
	w.promise(after.used == before.used, "reading %s allocated %d blocks", size(fileSize(filepath.Join(one, big))), after.used-before.used)

	w.title("A new file: blocks are allocated on demand")
	before = w.numbers()
	w.shell(fmt.Sprintf("dd if=/dev/urandom of=%s bs=1M count=%d conv=fsync status=none", filepath.Join(one, "root/new"), newFile/mib))
	after = w.numbers()
	need := int64(newFile) / w.blockSize
	got := after.used - before.used
	w.promise(got >= need && got <= need+metaBlocks, "a file of %s took %d blocks (%d for the contents)", size(newFile), got, need)

	w.title("4 KiB changed inside a file of %s: one block is copied", size(fileSize(filepath.Join(one, big))))
	w.change(one, big)
	if err := w.overlayfs(two, big); err != nil {
		return err
	}

	w.title("A deleted file: gone in the container, still in the image and in the other container")
	name := "usr/bin/env"
	w.shell("rm " + filepath.Join(one, name))
	w.promise(!exists(filepath.Join(one, name)), "container one: %s is gone", name)
	w.promise(exists(filepath.Join(two, name)), "container two: %s is there", name)
	w.mica("create", "demo", "three")
	w.mount("three", filepath.Join(w.dir, "three"))
	w.promise(exists(filepath.Join(w.dir, "three", name)), "a new container of the image: %s is there", name)
	w.mica("umount", "three")
	w.mica("rm", "three")

	w.title("A file written and deleted: its blocks go back to the pool, and to the host")
	before = w.numbers()
	temp := filepath.Join(one, "root/temporary")
	w.shell(fmt.Sprintf("dd if=/dev/urandom of=%s bs=1M count=%d conv=fsync status=none", temp, tempFile/mib))
	full := w.numbers()
	w.promise(full.used-before.used >= tempFile/w.blockSize, "written: %s", full.since(before, w.blockSize))
	w.shell("rm " + temp + " && fstrim " + one)
	after = w.numbers()
	w.promise(full.used-after.used >= (full.used-before.used)*95/100, "deleted: %s", after.since(full, w.blockSize))
	w.promise(full.host-after.host >= tempFile*9/10, "the data file on the host is %s smaller again", size(full.host-after.host))

	w.title("A fork of a running container, and a rollback")
	w.forkAndRollback(one)

	w.title("A command inside a container's root")
	w.shell("chroot " + two + " /bin/sh -c '. /etc/os-release; echo \"hello from $PRETTY_NAME, $(ls /usr/bin | wc -l) programs\"'")

	w.title("Remove everything: usage returns to where it began")
	for _, c := range []string{"one", "two"} {
		w.mica("umount", c)
	}
	for _, c := range w.containers() {
		w.mica("rm", c, "--snapshots")
	}
	w.mica("image", "rm", "demo")
	w.settle(empty)
	end := w.numbers()
	w.promise(end.used == empty.used, "%d blocks in use, %d when it began", end.used, empty.used)
	w.mica("df")
	return w.err
}

// change writes 4 KiB in the middle of the image's big file.
func (w *walk) change(one, big string) {
	file := filepath.Join(one, big)
	// The inode and the journal are the container's own after the first change of any kind.
	w.quietly("touch " + file + " && sync -f " + file)
	before := w.numbers()
	w.shell(fmt.Sprintf("dd if=/dev/urandom of=%s bs=4K count=1 seek=%d conv=notrunc,fdatasync status=none",
		file, fileSize(file)/4096/2))
	after := w.numbers()
	got := after.used - before.used
	w.promise(got >= 1 && got <= 3, "mica copied %s (%d block(s) of %s, the file system's journal included)",
		size(got*w.blockSize), got, size(w.blockSize))
}

// overlayfs makes the same change through overlayfs and says what that copies.
func (w *walk) overlayfs(lower, big string) error {
	base := filepath.Join(w.dir, "overlay")
	upper, work, merged := filepath.Join(base, "upper"), filepath.Join(base, "work"), filepath.Join(base, "merged")
	for _, d := range []string{upper, work, merged} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work)
	if err := syscall.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		w.say("overlayfs, to compare: not possible here (%v)", err)
		return nil
	}
	file := filepath.Join(merged, big)
	w.quietly(fmt.Sprintf("dd if=/dev/urandom of=%s bs=4K count=1 seek=%d conv=notrunc,fdatasync status=none", file, fileSize(file)/4096/2))
	w.say("overlayfs, for the same change, copied %s", size(fileSize(filepath.Join(upper, big))))
	if err := syscall.Unmount(merged, 0); err != nil {
		return err
	}
	return os.RemoveAll(base)
}

// forkAndRollback forks a container while it is being written to, and takes a change back.
func (w *walk) forkAndRollback(one string) {
	stop := w.writer(filepath.Join(one, "root/log"))
	before := w.numbers()
	w.mica("fork", "one", "one-fork")
	after := w.numbers()
	lines := stop()
	w.promise(after.used-before.used <= 2*metaBlocks, "the fork cost %d blocks", after.used-before.used)
	dir := filepath.Join(w.dir, "fork")
	w.mount("one-fork", dir)
	log, _ := os.ReadFile(filepath.Join(dir, "root/log"))
	n := strings.Count(string(log), "\n")
	w.promise(n > 0 && n <= lines && inOrder(string(log)), "the fork holds the first %d of %d lines that a program was writing, none missing", n, lines)
	w.mica("umount", "one-fork")

	w.mica("snapshot", "one", "good")
	w.shell("rm -rf " + filepath.Join(one, "etc"))
	w.mica("umount", "one")
	w.mica("rollback", "one", "good")
	w.mount("one", one)
	w.promise(exists(filepath.Join(one, "etc/passwd")), "after the rollback /etc is there again")
}
