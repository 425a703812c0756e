package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mica/daemon/api"
	"mica/export/holder"
	"mica/export/loop"
)

// TestGuestOwned: a container that a virtual machine had is not mounted by this host unless it is
// told to; the NBD export works with other people's clients.
func TestGuestOwned(t *testing.T) {
	b := newBox(t)
	b.start()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "vm")
	uri := b.mica("attach", "vm", "--as", "nbd")
	if !strings.HasPrefix(uri, "nbd+unix:///") || !strings.HasSuffix(uri, "?socket="+b.run+"/nbd.sock") {
		t.Errorf("attach --as nbd: %q", uri)
	}
	if tool, err := exec.LookPath("nbdinfo"); err == nil {
		out, err := exec.Command(tool, "--size", uri).CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != strconv.Itoa(10<<30) {
			t.Errorf("nbdinfo --size: %v %s", err, out)
		}
	}
	if msg := b.fails("mount", "vm"); !strings.Contains(msg, "--trust-guest") {
		t.Errorf("mount of what is attached to a guest: %s", msg)
	}
	b.mica("detach", "vm")
	if msg := b.fails("mount", "vm"); !strings.Contains(msg, "--trust-guest") {
		t.Errorf("mount of what a guest wrote: %s", msg)
	}
	if list := asJSON[api.Status](b, "status").Store.Attachments; len(list) != 0 {
		t.Errorf("the refused mount left it attached: %+v", list)
	}
	dir := b.mica("mount", "vm", "--trust-guest")
	if got := b.read(dir + "/etc/hostname"); got != "high\n" {
		t.Errorf("hostname %q", got)
	}
	b.mica("umount", "vm")
}

// TestHolderGone: without daemon and holder, as after a reboot, an attached container gets its
// node back, and its contents are those of the last sync.
func TestHolderGone(t *testing.T) {
	b := newBox(t)
	b.start()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	dir := b.mica("mount", "web")
	b.write(dir+"/kept", "kept")
	b.mica("umount", "web", "--keep-attached")
	b.stop(syscall.SIGKILL)
	c, err := holder.Dial(filepath.Join(b.run, "holder.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Quit(true); err != nil {
		t.Fatal(err)
	}
	c.Close()
	// Nobody clears the loop device away whose mount is taken from under it here.
	for _, n := range loop.Find(func(file string) bool { return strings.HasPrefix(file, b.run+"/") }) {
		defer loop.Abandon(loop.Device{Number: n, Node: fmt.Sprintf("/dev/loop%d", n)}, loop.Backing(n))
	}
	if err := os.RemoveAll(b.run); err != nil { // RUN is a tmpfs on a host
		for _, m := range mountsBelow(b.run) {
			syscall.Unmount(m, syscall.MNT_DETACH)
		}
		if err := os.RemoveAll(b.run); err != nil {
			t.Fatal(err)
		}
	}
	b.start()
	dir = b.mica("mount", "web")
	if got := b.read(dir + "/kept"); got != "kept" {
		t.Errorf("kept holds %q", got)
	}
	b.mica("umount", "web")
}

// TestNotify: the service manager hears when the daemon is ready and when it ends.
func TestNotify(t *testing.T) {
	b := newBox(t)
	sock := filepath.Join(b.dir, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: sock, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", sock)
	b.start()
	b.stop(syscall.SIGTERM)
	for _, want := range []string{"READY=1", "STOPPING=1"} {
		p := make([]byte, 100)
		l.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := l.Read(p)
		if err != nil || string(p[:n]) != want {
			t.Errorf("got %q %v, want %s", p[:n], err, want)
		}
	}
}

// TestGroup: the socket belongs to a group where that is configured; others are told why they
// cannot use it.
func TestGroup(t *testing.T) {
	b := newBox(t)
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Skip("SKIPPED: needs setpriv (util-linux)")
	}
	// Others must be able to reach the program and the socket.
	exe := filepath.Join(b.dir, "mica")
	copyFile(t, b.exe, exe)
	if err := os.Chmod(b.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	as := func(group string) (string, int) {
		c := exec.Command(setpriv, "--reuid=65534", "--regid="+group, "--clear-groups", exe, "status", "--run", b.run)
		out, _ := c.CombinedOutput()
		return string(out), c.ProcessState.ExitCode()
	}
	b.config = filepath.Join(b.dir, "config.toml")
	b.write(b.config, "[api]\ngroup = \"64321\"\n")
	b.start()
	if out, code := as("64321"); code != 0 || !strings.Contains(out, "Pool Name") {
		t.Errorf("a member of the group: exit status %d\n%s", code, out)
	}
	out, code := as("64322")
	if code != 1 || !strings.Contains(out, "no permission to use "+b.run+"/mica.sock") {
		t.Errorf("another: exit status %d\n%s", code, out)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestStopDuringImport: SIGTERM while an import runs undoes it and ends with 0.
func TestStopDuringImport(t *testing.T) {
	b := newBox(t)
	b.start()
	empty := b.settle()
	archive, err := os.ReadFile(b.testImage())
	if err != nil {
		t.Fatal(err)
	}
	c := b.command("image", "import", "-", "--name", "half")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write(archive[:len(archive)/2]); err != nil {
		t.Fatal(err)
	}
	b.eventually("the import runs", func() bool { return asJSON[api.Status](b, "status").Running > 0 })
	start := time.Now()
	if code := b.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if d := time.Since(start); d > 15*time.Second {
		t.Errorf("the daemon took %v to end", d)
	}
	c.Wait()
	if code := c.ProcessState.ExitCode(); code != 1 {
		t.Errorf("the import: exit status %d, want 1", code)
	}
	b.start()
	if n := b.settle().DataUsed; n != empty.DataUsed {
		t.Errorf("%d blocks are used, %d before", n, empty.DataUsed)
	}
}

// TestOwnMountNamespace: a daemon in a mount namespace of its own says so, and where it is sure
// that it is not on the host, hands out no nodes.
func TestOwnMountNamespace(t *testing.T) {
	b := newBox(t)
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("SKIPPED: needs unshare (util-linux)")
	}
	wrapper := filepath.Join(b.dir, "wrapper")
	// exec -a keeps the name by which the test binary knows what it is.
	script := fmt.Sprintf("#!/bin/bash\nexec %s -m --propagation private bash -c 'exec -a mica %s \"$@\"' mica \"$@\"\n", unshare, b.exe)
	if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	host := b.exe
	b.exe = wrapper
	b.start()
	b.exe = host
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	st := asJSON[api.Status](b, "status")
	switch st.Exports.HostNamespaces {
	case "no":
		if msg := b.fails("attach", "web"); !strings.Contains(msg, "mount namespace of its own") {
			t.Errorf("attach: %s", msg)
		}
	case "unknown":
		found := false
		for _, n := range st.Notes {
			found = found || strings.Contains(n, "namespace")
		}
		if !found {
			t.Errorf("no note about namespaces: %q", st.Notes)
		}
	default:
		t.Errorf("host namespaces: %q", st.Exports.HostNamespaces)
	}
}

// TestManyAtOnce: a hundred containers made at the same time, and a hundred forks at once.
func TestManyAtOnce(t *testing.T) {
	b := newBox(t)
	b.start()
	b.mica("image", "import", b.testImage())
	before := b.settle()
	c := b.client()
	defer c.Close()
	var wg sync.WaitGroup
	errs := make(chan error, 100)
	for i := range 100 {
		wg.Go(func() {
			_, created, err := c.CreateContainer(context.Background(), api.CreateContainer{Name: fmt.Sprint("c", i), Image: "test:1"})
			if err == nil && !created {
				err = fmt.Errorf("c%d was there", i)
			}
			errs <- err
		})
	}
	wg.Wait()
	for range 100 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if out := b.mica("fork", "c0", "--count", "100", "--prefix", "f"); strings.Count(out, "\n") != 99 {
		t.Errorf("fork: %d lines", strings.Count(out, "\n")+1)
	}
	if n := len(asJSON[[]api.Container](b, "ls")); n != 200 {
		t.Errorf("%d containers, want 200", n)
	}
	if n := b.settle().DataUsed; n != before.DataUsed {
		t.Errorf("200 containers take %d blocks, want none", n-before.DataUsed)
	}
	names := []string{"rm"}
	for i := range 100 {
		names = append(names, fmt.Sprint("c", i), fmt.Sprint("f", i+1))
	}
	b.mica(names...)
	if p := b.settle(); p.DataUsed != before.DataUsed || p.Devices != before.Devices {
		t.Errorf("after rm: %d blocks, %d devices; before %d, %d", p.DataUsed, p.Devices, before.DataUsed, before.Devices)
	}
}
