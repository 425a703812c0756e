package e2e

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/layer/archive/treecmp"
)

// sameTree mounts a container of an image and compares it with a directory.
func (b *box) sameTree(image, want string) {
	b.Helper()
	name := "tree"
	b.mica("create", image, name)
	dir := b.mount(name, "--read-only")
	diffs, err := treecmp.Diff(dir, want, treecmp.Options{})
	if err != nil {
		b.Fatal(err)
	}
	for i, d := range diffs {
		if i == 20 {
			b.Errorf("and %d differences more", len(diffs)-20)
			break
		}
		b.Errorf("%s: %s", image, d)
	}
	b.mica("umount", name)
	b.mica("rm", name)
}

// change makes, changes and removes files of all kinds at random, with times that have
// nanoseconds.
func change(t *testing.T, rng *rand.Rand, root string, n int) {
	t.Helper()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dirs := []string{"a", "a/b", "usr/lib", "usr/lib/x", "opt"}
	for _, d := range dirs {
		ok(os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	wasDir := map[string]bool{} // before the first change
	for range n {
		p := filepath.Join(root, dirs[rng.Intn(len(dirs))], fmt.Sprint("n", rng.Intn(12)))
		if _, seen := wasDir[p]; !seen {
			st, err := os.Lstat(p)
			wasDir[p] = err == nil && st.IsDir()
		}
		ok(os.RemoveAll(p))
		switch rng.Intn(9) {
		case 0: // stays away
			continue
		case 1:
			// Where a directory becomes a link, umoci hides what was in it below the link's name, and
			// its own unpacking takes that away where the link leads.
			to := fmt.Sprint("../n", rng.Intn(12))
			if wasDir[p] {
				to = "../nothing"
			}
			ok(os.Symlink(to, p))
		case 2:
			ok(unix.Mknod(p, unix.S_IFCHR|0o620, int(unix.Mkdev(5, uint32(rng.Intn(300))))))
		case 3:
			ok(unix.Mknod(p, unix.S_IFIFO|0o600, 0))
		case 4:
			ok(os.MkdirAll(filepath.Join(p, "in"), 0o750))
			ok(os.WriteFile(filepath.Join(p, "in", "f"), []byte(p), 0o644))
		case 5:
			ok(unix.Mknod(p, unix.S_IFBLK|0o660, int(unix.Mkdev(8, uint32(rng.Intn(300))))))
		default:
			body := make([]byte, rng.Intn(100_000))
			rng.Read(body)
			ok(os.WriteFile(p, body, 0o644))
			ok(os.Lchown(p, rng.Intn(3)*1000, rng.Intn(3)*1000))
			ok(unix.Chmod(p, []uint32{0o644, 0o755, 0o4755, 0o2755, 0o1600}[rng.Intn(5)]))
			if rng.Intn(3) == 0 {
				ok(unix.Lsetxattr(p, "user.note", body[:min(len(body), 100)], 0))
			}
			if rng.Intn(3) == 0 {
				q := p + "-also"
				ok(os.RemoveAll(q))
				ok(os.Link(p, q))
			}
		}
		when := unix.NsecToTimespec(1_600_000_000_000_000_000 + rng.Int63n(1e17))
		ok(unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

// TestSameTreesAsUmoci: an image of many layers (whiteouts, directories that hide what was there,
// devices, attributes, hard links, setuid files, times with nanoseconds) shows, imported and
// mounted, the tree that umoci unpacks; so does what is left after every one of its layers was
// imported as the top of an image of its own.
func TestSameTreesAsUmoci(t *testing.T) { eachFS(t, testSameTreesAsUmoci) }

func testSameTreesAsUmoci(t *testing.T, fs string) {
	b := newBox(t, "umoci")
	b.fileSystem(fs)
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewSource(seed))
	layout := b.path("layout")
	b.sh("umoci", "init", "--layout", layout)
	b.sh("umoci", "new", "--image", layout+":v0")
	const rounds = 4
	for i := range rounds {
		bundle := b.path(fmt.Sprint("bundle", i))
		b.sh("umoci", "unpack", "--image", fmt.Sprintf("%s:v%d", layout, i), bundle)
		change(t, rng, rootOf(bundle), 50)
		b.sh("umoci", "repack", "--image", fmt.Sprintf("%s:v%d", layout, i+1), bundle)
	}
	extra := b.mkdir("extra/sub")
	if err := os.WriteFile(filepath.Join(extra, "f"), []byte("opaque"), 0o4711); err != nil {
		t.Fatal(err)
	}
	last := fmt.Sprintf("%s:v%d", layout, rounds)
	b.sh("umoci", "insert", "--image", last, b.path("extra"), "/plain")
	b.sh("umoci", "insert", "--image", last, "--opaque", extra, "/plain")
	b.sh("umoci", "insert", "--image", last, "--opaque", extra, "/usr/lib")
	b.sh("umoci", "insert", "--image", last, "--whiteout", "/opt")

	b.start()
	for i := 1; i <= rounds; i++ {
		ref := b.path(fmt.Sprint("ref", i))
		b.sh("umoci", "unpack", "--image", fmt.Sprintf("%s:v%d", layout, i), ref)
		name := fmt.Sprint("umoci:", i)
		r := asJSON[imported](b, "image", "import", layout, "--ref", fmt.Sprint("v", i), "--name", name)
		want := 1
		if i == rounds {
			want = 1 + 4
		}
		if len(r.Images) != 1 || r.Images[0].NewLayers != want {
			t.Errorf("version %d: %+v, want %d new layers", i, r.Images, want)
		}
		b.sameTree(name, rootOf(ref))
	}
}

// TestDemoImage: the image of the demo, a whole Debian in three layers, if it was built here.
func TestDemoImage(t *testing.T) {
	demo, err := filepath.Abs("../../.cache/demo/image.tar")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(demo); err != nil {
		t.Skip("SKIPPED: the demo's image was not built here (make demo)")
	}
	b := newBox(t, "umoci", "skopeo")
	policy := b.writeFile("policy.json", []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`))
	// This umoci knows no zstd.
	b.sh("skopeo", "--policy", policy, "copy", "--dest-compress-format", "gzip", "--dest-compress-level", "1",
		"oci-archive:"+demo, "oci:"+b.path("layout")+":demo")
	b.sh("umoci", "unpack", "--image", b.path("layout")+":demo", b.path("ref"))
	b.start()
	for _, from := range []string{demo, b.path("layout")} {
		r := asJSON[imported](b, "image", "import", from, "--name", filepath.Base(from))
		if len(r.Images) != 1 || len(r.Images[0].Layers) != 3 || r.Images[0].NewLayers != 3*btoi(from == demo) {
			t.Errorf("import of %s: %+v", from, r)
		}
	}
	b.sameTree("image.tar", rootOf(b.path("ref")))
}

func btoi(v bool) int {
	if v {
		return 1
	}
	return 0
}
