package image

import (
	"bytes"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mica/layer/archive"
	"mica/layer/archive/treecmp"
)

// needTools skips what needs root and programs that are not there.
func needTools(t *testing.T, names ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: needs root (chown, mknod)")
	}
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			t.Skipf("SKIPPED: %s is not installed", n)
		}
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// fill makes a small tree with all that an image can hold.
func fill(t *testing.T, root string, rng *rand.Rand) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"bin", "dev", "etc/conf.d", "usr/lib/deep/er", "var/empty"} {
		check(os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	for i := range 30 {
		body := make([]byte, rng.Intn(40_000))
		rng.Read(body)
		p := filepath.Join(root, []string{"bin", "etc", "etc/conf.d", "usr/lib", "usr/lib/deep/er"}[rng.Intn(5)], fmt.Sprint("f", i))
		check(os.WriteFile(p, body, 0o644))
		check(os.Lchown(p, rng.Intn(3)*1000, rng.Intn(3)*1000))
		check(unix.Chmod(p, []uint32{0o644, 0o755, 0o4755, 0o2755, 0o600}[rng.Intn(5)]))
	}
	check(os.WriteFile(filepath.Join(root, "bin/su"), []byte("su"), 0o755))
	check(unix.Chmod(filepath.Join(root, "bin/su"), 0o4755))
	check(unix.Lsetxattr(filepath.Join(root, "bin/su"), "user.note", []byte("a\x00b"), 0))
	check(os.Link(filepath.Join(root, "bin/su"), filepath.Join(root, "bin/also-su")))
	check(os.Symlink("../bin/su", filepath.Join(root, "usr/lib/link")))
	check(unix.Mknod(filepath.Join(root, "dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	check(unix.Mknod(filepath.Join(root, "dev/disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(8, 1))))
	check(unix.Mknod(filepath.Join(root, "dev/pipe"), unix.S_IFIFO|0o600, 0))
	check(os.WriteFile(filepath.Join(root, "var/sparse"), nil, 0o644))
	check(os.Truncate(filepath.Join(root, "var/sparse"), 3<<20))
}

// An image made by umoci, carried by skopeo into every form, imports as the same tree that
// umoci unpacks.
func TestRealArchives(t *testing.T) {
	needTools(t, "umoci", "skopeo")
	dir := t.TempDir()
	in := func(n string) string { return filepath.Join(dir, n) }
	layout := in("layout")
	run(t, "umoci", "init", "--layout", layout)
	run(t, "umoci", "new", "--image", layout+":t")
	rng := rand.New(rand.NewSource(7))
	for i := range 3 {
		b := in(fmt.Sprint("bundle", i))
		run(t, "umoci", "unpack", "--image", layout+":t", b)
		root := filepath.Join(b, "rootfs")
		if i == 0 {
			fill(t, root, rng)
		} else {
			for _, p := range []string{"etc/conf.d", "bin/also-su", "dev/pipe", "usr/lib/deep"}[2*i-2 : 2*i] {
				if err := os.RemoveAll(filepath.Join(root, p)); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(root, "etc/conf.d"), []byte(fmt.Sprint("now a file ", i)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		run(t, "umoci", "repack", "--image", layout+":t", b)
	}
	run(t, "umoci", "config", "--image", layout+":t", "--config.cmd", "/bin/su", "--config.env", "A=b", "--config.workingdir", "/etc")
	run(t, "umoci", "unpack", "--image", layout+":t", in("ref"))
	policy := in("policy.json")
	if err := os.WriteFile(policy, []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	skopeo := func(args ...string) {
		t.Helper()
		run(t, "skopeo", append([]string{"--policy", policy, "copy"}, args...)...)
	}
	src := "oci:" + layout + ":t"
	skopeo(src, "oci-archive:"+in("oci.tar")+":demo:1")
	skopeo(src, "docker-archive:"+in("docker.tar")+":demo:1")
	skopeo("--dest-compress-format", "zstd", "--dest-decompress=false", src, "oci:"+in("zstd")+":demo")
	run(t, "sh", "-c", "gzip -c "+in("docker.tar")+" > "+in("docker.tar.gz")+" && zstd -q "+in("oci.tar"))
	if err := os.Mkdir(in("unpacked"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "tar", "-C", in("unpacked"), "-xf", in("docker.tar"))
	for _, form := range []string{"layout", "oci.tar", "docker.tar", "zstd", "docker.tar.gz", "oci.tar.zst", "unpacked"} {
		t.Run(form, func(t *testing.T) {
			a, err := Open(bg, in(form), Options{SpoolDir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			im := a.Images()[0]
			if c := im.Config.Config; fmt.Sprintf("%v %v %s", c.Cmd, c.Env, c.WorkingDir) != "[/bin/su] [A=b] /etc" {
				t.Errorf("config %+v", c)
			}
			if mt := im.Layers[0].MediaType; form == "zstd" && !strings.HasSuffix(mt, "+zstd") {
				t.Errorf("media type %q, want zstd", mt)
			}
			s := newFakeStore()
			if _, err := Import(bg, s, a, ImportOptions{Name: "demo"}); err != nil {
				t.Fatal(err)
			}
			root := t.TempDir()
			for _, chain := range s.images["demo"].Layers {
				if _, err := archive.Apply(bg, root, bytes.NewReader(s.layers[chain].tar), archive.ApplyOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			diffs, err := treecmp.Diff(root, in("ref/rootfs"), treecmp.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range diffs {
				t.Error(d)
			}
		})
	}
	// Every archive, cut anywhere, is refused and leaves nothing in the store.
	for _, form := range []string{"oci.tar", "docker.tar", "docker.tar.gz", "oci.tar.zst"} {
		data, err := os.ReadFile(in(form))
		if err != nil {
			t.Fatal(err)
		}
		end := len(bytes.TrimRight(data, "\x00"))
		for i := range 20 {
			s := newFakeStore()
			a, err := OpenStream(bg, bytes.NewReader(data[:end*i/20]), Options{SpoolDir: t.TempDir()})
			if err == nil {
				_, err = Import(bg, s, a, ImportOptions{Name: "demo"})
				a.Close()
			}
			if err == nil {
				t.Errorf("%s cut at %d of %d bytes: no error", form, end*i/20, len(data))
			}
			if got := s.left(); got != "0 layers, 0 images, 0 sessions" {
				t.Errorf("%s cut at %d of %d bytes: left %s", form, end*i/20, len(data), got)
			}
		}
	}
}
