package vm

import (
	"bytes"
	"encoding/binary"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mica/internal/vm/wire"
)

// TestArchiveIsCpio lists and reads what we wrote with busybox's cpio.
func TestArchiveIsCpio(t *testing.T) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("no busybox")
	}
	a := newArchive()
	a.file("/bin/deep/tool", 0o755, []byte("odd length: 15!"))
	a.file("empty", 0o600, nil)
	a.symlink("link", "bin/deep/tool")
	a.dir("proc")
	var buf bytes.Buffer
	if err := a.writeTo(&buf); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command(busybox, "cpio", "-idv")
	cmd.Dir = dir
	cmd.Stdin = &buf
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	out, err := exec.Command("find", dir, "-mindepth", "1", "-printf", `%P %y %m %s %l\n`).Output()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		name, rest, _ := strings.Cut(line, " ")
		got[name] = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "d") {
			got[name] = "d"
		}
	}
	want := map[string]string{"bin": "d", "bin/deep": "d", "bin/deep/tool": "f 755 15", "empty": "f 600 0",
		"link": "l 777 13 bin/deep/tool", "proc": "d"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	Require(t)
	tree, err := openModuleTree(filepath.Join(cacheDir(), "kernel", "modules"))
	if err != nil {
		t.Fatal(err)
	}
	mods, err := tree.resolve("dm-thin-pool", "dm_thin_pool", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, m := range mods {
		if seen[m.name] {
			t.Errorf("%s twice", m.name)
		}
		deps, _, err := moduleDeps(m.image)
		if err != nil {
			t.Fatal(err)
		}
		for _, dep := range deps {
			if dep = normalName(dep); !seen[dep] && !tree.builtin[dep] {
				t.Errorf("%s comes before %s, which it needs", m.name, dep)
			}
		}
		seen[m.name] = true
	}
	for _, want := range []string{"dm_thin_pool", "dm_persistent_data", "dm_bio_prison", "nbd"} {
		if !seen[want] {
			t.Errorf("%s is missing", want)
		}
	}
	if _, err := tree.resolve("no-such-module"); err == nil {
		t.Error("a module that does not exist was resolved")
	}
}

func TestComplaints(t *testing.T) {
	console := "[    1.0] all is well\n[    2.0] BUG: kernel NULL pointer dereference\n[    2.1] debugging on\n"
	if got := Complaints(console); len(got) != 1 || !strings.Contains(got[0], "NULL") {
		t.Errorf("got %q", got)
	}
}

func TestFramesDistrustLengths(t *testing.T) {
	var buf bytes.Buffer
	if err := wire.NewWriter(&buf).Send(wire.Stdout, 7, []byte("abc")); err != nil {
		t.Fatal(err)
	}
	whole := append([]byte{}, buf.Bytes()...)
	f, err := wire.Read(&buf)
	if err != nil || f.Type != wire.Stdout || f.ID != 7 || string(f.Payload) != "abc" {
		t.Errorf("got %+v, %v", f, err)
	}
	if _, err := wire.Read(bytes.NewReader(whole[:len(whole)-1])); err == nil {
		t.Error("a frame cut short was read")
	}
	binary.LittleEndian.PutUint32(whole[5:], 1<<31)
	if _, err := wire.Read(bytes.NewReader(whole)); err == nil {
		t.Error("a frame of 2 GiB was accepted")
	}
}
