package containerd

import (
	"strings"
	"testing"
	"time"
)

// TestSharedLayers: an image costs nothing in a second namespace, nor when it was imported into mica
// before. Only containerd 2 asks for that with ctr; with 1.6 the CRI plugin does.
func TestSharedLayers(t *testing.T) {
	each(t, func(t *testing.T, b *box) {
		if b.major < 2 {
			t.Skip("SKIPPED: ctr of containerd 1.x unpacks without asking for shared layers")
		}
		b.up()
		before := b.settled()
		archive := b.testImage()
		b.load(archive)
		one := b.settled()
		first := b.ns
		b.ns = first + "b"
		b.load(archive)
		if two := b.settled(); two.Pool.DataUsed != one.Pool.DataUsed {
			t.Errorf("the second namespace costs %d blocks", two.Pool.DataUsed-one.Pool.DataUsed)
		}
		if got := b.in(imageName, "c", "cat /etc/greeting"); got != "hello again\n" {
			t.Errorf("a container of the second namespace says %q", got)
		}
		b.ns = first
		b.ctr("images", "rm", "--sync", imageName)
		if st := b.settled(); st.Pool.DataUsed != one.Pool.DataUsed {
			t.Errorf("%d blocks with the second namespace left, want %d", st.Pool.DataUsed, one.Pool.DataUsed)
		}
		b.ns = first + "b"
		b.ctr("images", "rm", "--sync", imageName)
		b.wantBack(before)

		b.mustMica("image", "import", archive)
		imported := b.settled()
		b.load(archive)
		if st := b.settled(); st.Pool.DataUsed != imported.Pool.DataUsed {
			t.Errorf("after 'mica image import', containerd's import costs %d blocks", st.Pool.DataUsed-imported.Pool.DataUsed)
		}
		if got := b.in(imageName, "c", "cat /etc/greeting"); got != "hello again\n" {
			t.Errorf("a container on imported layers says %q", got)
		}
		b.mustMica("image", "rm", imageName) // containerd's names keep the layers
		if got := b.in(imageName, "c", "cat /etc/greeting"); got != "hello again\n" {
			t.Errorf("after the image was removed, a container says %q", got)
		}
		b.ctr("images", "rm", "--sync", imageName)
		b.wantBack(before)
	})
}

func (b *box) mustMica(args ...string) string {
	b.Helper()
	out, err := b.tryMica(args...)
	if err != nil {
		b.logs()
		b.Fatal(err)
	}
	return out
}

// TestFullPool: a pool that is full in the middle of an unpack fails that with a clear error and gives
// its space back. While writers wait for space, another namespace gets its answers in time, and
// deleting makes room.
func TestFullPool(t *testing.T) {
	each(t, func(t *testing.T, b *box) {
		b.poolSize, b.waitSpace = "64M", "2s"
		b.up()
		before := b.settled()
		b.load(b.archive(imageName, shell(t)))
		image := b.settled()

		big := strings.Repeat("random enough to be something else than zeros", 2<<20)
		const bigName = "docker.io/library/big:latest"
		_, err := b.tryCtr(time.Minute, "images", "import", "--snapshotter", "mica", b.archive(bigName, shell(t), layerOf(t, entry{name: "big", data: big})))
		if err == nil {
			t.Error("90 MiB were unpacked into a pool of 64 MiB")
		} else {
			t.Logf("an unpack that does not fit: %v", err)
		}
		b.tryCtr(time.Minute, "images", "rm", "--sync", bigName)
		b.collect()
		b.load(b.archive(imageName, shell(t)))
		if st := b.settled(); st.Pool.DataUsed > image.Pool.DataUsed {
			t.Errorf("%d blocks after the failure, %d before", st.Pool.DataUsed, image.Pool.DataUsed)
		}

		b.run(imageName, "filler", "sleep 2; while true; do dd if=/dev/zero of=/fill bs=1048576 count=100 conv=fsync; done")
		b.run(imageName, "bystander", "sleep 1000")
		b.waitFor("a full pool", func() bool { return b.status().Pool.Waiting > 0 })
		other := *b
		other.ns = b.ns + "b"
		for i, args := range [][]string{
			{"snapshots", "--snapshotter", "mica", "ls"},
			{"images", "ls"},
			{"snapshots", "--snapshotter", "mica", "prepare", "p"},
			{"snapshots", "--snapshotter", "mica", "view", "v"},
			{"snapshots", "--snapshotter", "mica", "commit", "c", "p"},
			{"snapshots", "--snapshotter", "mica", "rm", "v"},
			{"images", "import", "--no-unpack", b.path("image.tar")},
			{"images", "rm", "--sync", imageName}, // with a garbage collection
		} {
			start := time.Now()
			_, err := other.tryCtr(10*time.Second, args...)
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("%v took %v with the pool full: %v", args, took, err)
			}
			if err != nil {
				t.Logf("%d %v: %v", i, args, err)
			}
		}
		if got := b.exec("bystander", "cat /etc/passwd"); !strings.HasPrefix(got, "root:") {
			t.Errorf("a reader gets %q", got)
		}
		b.kill("filler", "bystander")
		b.tryCtr(time.Minute, "images", "rm", "--sync", imageName)
		b.waitFor("room", func() bool {
			_, err := b.tryCtr(time.Minute, "images", "import", "--snapshotter", "mica", b.archive(imageName, shell(t)))
			return err == nil
		})
		if got := b.in(imageName, "after", "echo works > /x; cat /x"); got != "works\n" {
			t.Errorf("afterwards a container says %q", got)
		}
		b.ctr("images", "rm", "--sync", imageName)
		for _, key := range []string{"p", "c", "v"} {
			other.tryCtr(time.Minute, "snapshots", "--snapshotter", "mica", "rm", key)
		}
		b.wantBack(before)
	})
}
