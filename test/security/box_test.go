// Package security tests from outside what SECURITY.md promises: who can reach what, with which
// rights, and what a name, a file system or a client cannot do. It drives the real program as root.
package security

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/internal/testbox"
)

// program is the real binary, built once, where every user can run it.
var program string

func TestMain(m *testing.M) {
	if os.Getenv("MICA_CONNECT") != "" { // a child of connectAs
		os.Exit(m.Run())
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "mica-security-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	program = filepath.Join(dir, "mica")
	if out, err := exec.Command("go", "build", "-o", program, "mica/cmd/mica").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build mica: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// nobody is a user and group without any rights.
const nobody = 65534

// A box is a place in memory for one daemon.
type box struct {
	*testing.T
	dir, root, run string
	config         string
	umask          int
	daemon         *testbox.Daemon // nil: none runs
}

func newBox(t *testing.T) *box {
	t.Helper()
	testbox.Need(t)
	dir, err := os.MkdirTemp("/dev/shm", "mica-security-")
	if err != nil {
		t.Fatal(err)
	}
	// Others may come as far as the directories of the daemon, so that those must keep them out.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b := &box{T: t, dir: dir, root: filepath.Join(dir, "root"), run: filepath.Join(dir, "run"), umask: 0o022}
	b.config = "[pool]\nsize = \"1G\"\n[containers]\nbase_size = \"64M\"\n[exports]\nlink_dir = \"" + filepath.Join(dir, "links") + "\"\n"
	t.Cleanup(b.takeDown)
	return b
}

func (b *box) path(name string) string { return filepath.Join(b.dir, name) }

func (b *box) write(name, text string) string {
	b.Helper()
	if err := os.WriteFile(b.path(name), []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	return b.path(name)
}

func (b *box) command(args ...string) *exec.Cmd {
	c := exec.Command(program, args...)
	c.Env = append(os.Environ(), "MICA_RUN="+b.run, "GORACE=atexit_sleep_ms=0")
	c.Dir = "/"
	return c
}

// as makes a command run as another user, in groups.
func as(c *exec.Cmd, uid uint32, groups ...uint32) *exec.Cmd {
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: nobody, Groups: groups}}
	return c
}

func (b *box) mica(args ...string) string {
	b.Helper()
	out, stderr, code := testbox.Run(b, b.command(args...))
	if code != 0 {
		b.Fatalf("mica %q: exit status %d\n%s\ndaemon:\n%s", args, code, stderr, b.log())
	}
	return strings.TrimSuffix(out, "\n")
}

// refused: the command fails with an error of its own, and says all the words.
func (b *box) refused(c *exec.Cmd, words ...string) {
	b.Helper()
	out, stderr, code := testbox.Run(b, c)
	if code != 1 && code != 2 {
		b.Errorf("%q: exit status %d, want 1 or 2\n%s%s", c.Args[1:], code, out, stderr)
	}
	for _, w := range words {
		if !strings.Contains(stderr, w) {
			b.Errorf("%q does not say %q: %s", c.Args[1:], w, stderr)
		}
	}
	if strings.Contains(stderr, "goroutine ") {
		b.Errorf("%q panicked: %s", c.Args[1:], stderr)
	}
}

func (b *box) serveCommand() *exec.Cmd {
	b.Helper()
	return b.command("serve", "--root", b.root, "--run", b.run, "--config", b.write("config.toml", b.config))
}

// start starts the daemon with the box's umask and waits until it answers and has its base.
func (b *box) start() {
	b.Helper()
	defer syscall.Umask(syscall.Umask(b.umask))
	b.daemon = testbox.Start(b, b.serveCommand(), b.path("log"), b.run)
	c := b.client()
	defer c.Close()
	testbox.Eventually(b, "the base is ready", func() bool {
		st, err := c.Status(context.Background())
		return err == nil && st.Store.BaseReady
	})
}

func (b *box) client() *client.Client { return client.New(b.run) }

func (b *box) stop(sig os.Signal) {
	b.Helper()
	if b.daemon != nil {
		d := b.daemon
		b.daemon = nil
		d.Stop(b, sig)
	}
}

func (b *box) log() string { return testbox.Log(b.path("log")) }

func (b *box) status() (st api.Status) {
	b.Helper()
	if err := json.Unmarshal([]byte(b.mica("status", "--json")), &st); err != nil {
		b.Fatal(err)
	}
	return st
}

// a figure is what must be as before after something was refused.
type figure struct {
	used                                  uint64
	devices, images, layers, conts, snaps int
}

func (b *box) figures() figure {
	b.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		st := b.status()
		if len(st.Store.Queue) == 0 && st.Pool.DataFreeing == 0 && st.Running == 0 {
			s := st.Store
			return figure{uint64(st.Pool.DataUsed), int(st.Pool.Devices), s.Images, s.Layers, s.Containers, s.Snapshots}
		}
		if time.Now().After(end) {
			b.Fatal("the store does not come to rest")
		}
	}
}

// takeDown leaves nothing behind.
func (b *box) takeDown() {
	if b.Failed() {
		b.Logf("daemon:\n%s", b.log())
	}
	for _, m := range testbox.Mounts(b.dir) {
		unix.Unmount(m, unix.MNT_DETACH)
	}
	if b.daemon != nil {
		b.command("shutdown").Run()
		select {
		case <-b.daemon.Exited:
		case <-time.After(testbox.DaemonLimit):
			b.Errorf("the daemon does not end\n%s", b.log())
			b.daemon.Cmd.Process.Kill()
			<-b.daemon.Exited
		}
	}
	testbox.QuitHolder(b.run)
	for range 50 {
		for _, m := range testbox.Mounts(b.dir) {
			unix.Unmount(m, unix.MNT_DETACH)
		}
		if os.RemoveAll(b.dir) == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.Errorf("%s cannot be removed", b.dir)
}

// image imports an image "small" with a file and a setuid program.
func (b *box) image() {
	b.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, h := range []tar.Header{{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "etc/secret", Mode: 0o644, Size: 6}, {Name: "su", Mode: 0o4755, Size: 6}} {
		if err := w.WriteHeader(&h); err != nil {
			b.Fatal(err)
		}
		if h.Size > 0 {
			w.Write([]byte("secret"))
		}
	}
	w.Close()
	digest := func(p []byte) string { h := sha256.Sum256(p); return "sha256:" + hex.EncodeToString(h[:]) }
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	blob := func(media string, p []byte) string {
		files["blobs/sha256/"+digest(p)[7:]] = p
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d`, media, digest(p), len(p))
	}
	l := blob("application/vnd.oci.image.layer.v1.tar", layer.Bytes()) + "}"
	c := blob("application/vnd.oci.image.config.v1+json", []byte(fmt.Sprintf(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q]}}`, digest(layer.Bytes())))) + "}"
	m := blob("application/vnd.oci.image.manifest.v1+json", []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":`+c+`,"layers":[`+l+`]}`))
	files["index.json"] = []byte(`{"schemaVersion":2,"manifests":[` + m + `,"annotations":{"org.opencontainers.image.ref.name":"small"}}]}`)
	var out bytes.Buffer
	w = tar.NewWriter(&out)
	for name, text := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))}); err != nil {
			b.Fatal(err)
		}
		w.Write(text)
	}
	w.Close()
	b.mica("image", "import", b.write("small.tar", out.String()), "--platform", "linux/amd64")
}
