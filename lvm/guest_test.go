//go:build guest

package lvm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"mica/dev/signature"
	"mica/internal/dmioctl"
)

// These tests run inside the test machine (test/lvm builds and starts them), with three empty
// disks of 256, 256 and 64 MiB.
const (
	disk1 = "/dev/vda"
	disk2 = "/dev/vdb"
	small = "/dev/vdc"
)

var ctx = context.Background()

func must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// clean makes a disk all zeros.
func clean(t *testing.T, disks ...string) {
	t.Helper()
	for _, d := range disks {
		f, err := os.OpenFile(d, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		n, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			t.Fatal(err)
		}
		zeros := make([]byte, 1<<20)
		for off := int64(0); off < n; off += 1 << 20 {
			if _, err := f.WriteAt(zeros, off); err != nil {
				t.Fatal(err)
			}
		}
		f.Close()
	}
}

// sum is what a disk holds.
func sum(t *testing.T, disk string) string {
	t.Helper()
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// groups is what vgs and pvs list.
func groups(t *testing.T) string {
	t.Helper()
	return must(t, "lvm", "vgs", "--noheadings") + must(t, "lvm", "pvs", "--noheadings")
}

func config(devices ...string) Config {
	c := Defaults()
	c.Devices = devices
	c.ExtendThreshold, c.ExtendPercent = 50, 20
	return c
}

// ensure sets a pool up that goes with the test.
func ensure(t *testing.T, c Config) (*Pool, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "lvm.json")
	p, err := Ensure(ctx, file, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Remove(ctx, file); err != nil {
			t.Error(err)
		}
		if left := groups(t); strings.TrimSpace(left) != "" {
			t.Errorf("left after Remove: %s", left)
		}
	})
	return p, file
}

// TestRefused: every device that must not be taken is refused with the reason, and its bytes and
// LVM's lists are as they were.
func TestRefused(t *testing.T) {
	must(t, "mkswap", small)
	before, lists := sum(t, small), groups(t)
	refused := func(t *testing.T, want error, text string, devices ...string) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "lvm.json")
		_, err := Ensure(ctx, file, config(devices...))
		if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
			t.Errorf("Ensure(%v): %v, want %v with %q", devices, err, want, text)
		}
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a set-up was remembered: %v", err)
		}
		if got := sum(t, small); got != before {
			t.Error("the device was written to")
		}
		if got := groups(t); got != lists {
			t.Errorf("LVM lists %q, before %q", got, lists)
		}
	}
	t.Run("signature", func(t *testing.T) { refused(t, signature.ErrFound, "swap", disk1, small) })
	t.Run("swapped to", func(t *testing.T) {
		must(t, "swapon", small)
		defer must(t, "swapoff", small)
		refused(t, ErrBusy, small, disk1, small)
	})
	t.Run("held", func(t *testing.T) {
		c, err := dmioctl.Open()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Activate("holder", "", false, dmioctl.LinearTarget(small, 0, 2048)); err != nil {
			t.Fatal(err)
		}
		defer c.Remove("holder", false)
		refused(t, ErrBusy, "held by dm-", small)
	})
	t.Run("twice by another name", func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(disk1, link); err != nil {
			t.Fatal(err)
		}
		refused(t, nil, "are the same", disk1, link)
	})
	t.Run("group exists", func(t *testing.T) {
		clean(t, small)
		must(t, "lvm", "vgcreate", "-y", "mica", small)
		before, lists = sum(t, small), groups(t)
		refused(t, ErrExists, "mica-thinpool", disk1)
		must(t, "lvm", "vgremove", "-ff", "-y", "mica")
		must(t, "lvm", "pvremove", "-y", small)
	})
	clean(t, small)
}

// TestLife sets a pool up, uses it as mica does, with thin devices that LVM does not know and a
// transaction id that it did not set, has LVM take it down and up again, grows it by a device
// while it is in use, and has LVM extend it by its own policy.
func TestLife(t *testing.T) {
	settings := config(disk1)
	settings.DataPercent = 75
	p, file := ensure(t, settings)
	if data, want := p.Bytes, int64(252<<20)*75/100; data < want-(8<<20) || data > want+(8<<20) {
		t.Errorf("data is %d bytes, want about %d", data, want)
	}
	if p.BlockSize != 64<<10 || p.ThinVolumes != 0 {
		t.Errorf("pool: %+v, want blocks of 64 KiB and no thin volume", p)
	}
	n, managed, err := ThinVolumes(ctx, p.DMName())
	if n != 0 || !managed || err != nil {
		t.Errorf("ThinVolumes: %d, %v, %v, want 0 in a pool of LVM's", n, managed, err)
	}

	// As mica uses it.
	c, err := dmioctl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	pool := p.DMName()
	if err := c.CreateThin(pool, 7); err != nil {
		t.Fatal(err)
	}
	if err := c.SetTransactionID(pool, 0, 5); err != nil {
		t.Fatal(err)
	}
	node := activate(t, c, p, 7, 1<<30)
	content := bytes.Repeat([]byte("mica"), 256<<10)
	write(t, node, content, 0)
	if err := c.Remove("thin7", false); err != nil {
		t.Fatal(err)
	}

	t.Run("LVM takes it down and up", func(t *testing.T) {
		must(t, "lvm", "lvchange", "--activate", "n", p.FullName())
		if names, err := c.List(); err != nil || len(names) != 0 {
			t.Errorf("after deactivation: %v, %v, want no mapped device", names, err)
		}
		again, err := Ensure(ctx, file, settings)
		if err != nil {
			t.Fatal(err)
		}
		if again.Bytes != p.Bytes {
			t.Errorf("data is %d bytes, was %d", again.Bytes, p.Bytes)
		}
		node = activate(t, c, p, 7, 1<<30)
		if got := read(t, node, len(content)); !bytes.Equal(got, content) {
			t.Error("content differs")
		}
	})
	t.Run("other values", func(t *testing.T) {
		other := settings
		other.DataPercent = 50
		if _, err := Ensure(ctx, file, other); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "was 75, is now 50") {
			t.Errorf("Ensure with 50 %%: %v, want ErrChanged naming both", err)
		}
		other = settings
		other.Devices = []string{disk1, disk2}
		if _, err := Ensure(ctx, file, other); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "grow --device "+disk2) {
			t.Errorf("Ensure with a second device: %v, want ErrChanged and what to do", err)
		}
	})
	t.Run("a second device", func(t *testing.T) { // while the thin device is active
		before := p.Bytes
		if err := p.AddDevices(ctx, file, []string{disk2}, false); err != nil {
			t.Fatal(err)
		}
		if p.Bytes < before*19/10 {
			t.Errorf("data is %d bytes, was %d: want about twice", p.Bytes, before)
		}
		st, err := c.PoolStatus(pool)
		if err != nil || int64(st.DataSize)*p.BlockSize != p.Bytes {
			t.Errorf("the kernel's pool: %+v, %v, want %d bytes", st, err, p.Bytes)
		}
		if got := read(t, node, len(content)); !bytes.Equal(got, content) {
			t.Error("content differs")
		}
		both := settings
		both.Devices = []string{disk1, disk2}
		if _, err := Ensure(ctx, file, both); err != nil {
			t.Errorf("the next start, with both devices: %v", err)
		}
	})
	t.Run("by policy", func(t *testing.T) {
		if grew, err := p.Extend(ctx); grew || err != nil {
			t.Errorf("Extend of a pool with room: %v, %v, want nothing", grew, err)
		}
		var off int64
		fill := func() { // past the threshold
			for ; off < p.Bytes*55/100; off += int64(len(content)) {
				write(t, node, content, off)
			}
		}
		for _, want := range []string{"by the step", "by what is left"} {
			fill()
			before := p.Bytes
			if grew, err := p.Extend(ctx); !grew || err != nil || p.Bytes <= before {
				t.Fatalf("Extend %s: %v, %v, %d bytes, before %d: want more", want, grew, err, p.Bytes, before)
			}
		}
		fill()
		if grew, err := p.Extend(ctx); grew || !errors.Is(err, ErrNoRoom) {
			t.Errorf("Extend with a full volume group: %v, %v, want ErrNoRoom", grew, err)
		}
	})
	if err := c.Remove("thin7", false); err != nil {
		t.Error(err)
	}
}

func activate(t *testing.T, c *dmioctl.Control, p *Pool, id uint32, bytes uint64) string {
	t.Helper()
	name := "thin" + strconv.Itoa(int(id))
	pool, err := c.Info(p.DMName())
	if err != nil {
		t.Fatal(err)
	}
	info, err := c.Activate(name, "", false, dmioctl.ThinTarget(pool.Node(), id, bytes/512, ""))
	if err != nil {
		t.Fatal(err)
	}
	return info.Node()
}

func write(t *testing.T, node string, b []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(node, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, node string, n int) []byte {
	t.Helper()
	f, err := os.Open(node)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := io.ReadFull(f, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestThinVolumesOfLVM: a pool in which LVM holds volumes is told from one that is free to use.
func TestThinVolumesOfLVM(t *testing.T) {
	p, _ := ensure(t, config(disk1))
	must(t, "lvm", "lvcreate", "-y", "-V", "32m", "-n", "theirs", "--thinpool", p.FullName())
	if err := p.Refresh(ctx); err != nil || p.ThinVolumes != 1 {
		t.Errorf("%d thin volumes, %v, want 1", p.ThinVolumes, err)
	}
	for _, name := range []string{p.DMName(), p.DMName() + "-tpool"} {
		if n, managed, err := ThinVolumes(ctx, name); n != 1 || !managed || err != nil {
			t.Errorf("ThinVolumes(%s): %d, %v, %v, want 1", name, n, managed, err)
		}
	}
	if _, managed, err := ThinVolumes(ctx, "something"); managed || err != nil {
		t.Errorf("ThinVolumes of another device: %v, %v, want not managed", managed, err)
	}
}

// TestEveryStepFails: whichever of the changing commands fails, nothing of the set-up is left, and
// the next one succeeds. The same with a set-up that died between two commands.
func TestEveryStepFails(t *testing.T) {
	real := must(t, "which", "lvm")
	for n := 1; ; n++ {
		path := os.Getenv("PATH")
		dir := t.TempDir()
		count := filepath.Join(dir, "count")
		// The wrapper fails the n-th changing command and its repetitions: undoing goes on.
		script := fmt.Sprintf(`#!/bin/sh
case $1 in
pvcreate|vgcreate|lvcreate|lvconvert|lvchange)
	echo x >>%[1]s
	if [ $(wc -l <%[1]s) = %[2]d ]; then echo "broken on purpose" >&2; exit 5; fi
esac
exec %[3]s "$@"
`, count, n, strings.TrimSpace(real))
		if err := os.WriteFile(filepath.Join(dir, "lvm"), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		os.Setenv("PATH", dir+":"+path)
		file := filepath.Join(dir, "lvm.json")
		p, err := Ensure(ctx, file, config(small))
		os.Setenv("PATH", path)
		if err == nil {
			if n < 7 {
				t.Errorf("a set-up took only %d changing commands", n-1)
			}
			if err := Remove(ctx, file); err != nil {
				t.Error(err)
			}
			_ = p
			break
		}
		if !strings.Contains(err.Error(), "broken on purpose") {
			t.Fatalf("step %d: %v, want the command's own words", n, err)
		}
		if n == 7 { // only the activation of the finished pool is left: nothing to undo
			if err := Remove(ctx, file); err != nil {
				t.Error(err)
			}
			continue
		}
		if left := strings.TrimSpace(groups(t)); left != "" {
			t.Fatalf("step %d: left: %s", n, left)
		}
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("step %d: the set-up is still remembered: %v", n, err)
		}
	}

	// Died: the state says begun, the group is there with its tag.
	file := filepath.Join(t.TempDir(), "lvm.json")
	s := state{Config: config(small), Tag: "mica.died"}
	if err := s.save(file); err != nil {
		t.Fatal(err)
	}
	must(t, "lvm", "vgcreate", "-y", "--addtag", s.Tag, s.VolumeGroup, small)
	if _, err := Ensure(ctx, file, config(small)); err != nil {
		t.Errorf("set-up after one that died: %v", err)
	}
	if err := Remove(ctx, file); err != nil {
		t.Error(err)
	}
}

// TestForce: what a device held is lost only when that is asked for.
func TestForce(t *testing.T) {
	must(t, "mkswap", small)
	c := config(small)
	file := filepath.Join(t.TempDir(), "lvm.json")
	if _, err := Ensure(ctx, file, c); !errors.Is(err, signature.ErrFound) {
		t.Fatalf("Ensure: %v, want ErrFound", err)
	}
	c.Force = true
	if _, err := Ensure(ctx, file, c); err != nil {
		t.Fatal(err)
	}
	if err := Remove(ctx, file); err != nil {
		t.Error(err)
	}
}
