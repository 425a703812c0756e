// Package lvm tests storage on LVM in a machine with a device-mapper: package lvm by itself, and a
// daemon whose pool LVM has made.
package lvm

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/internal/vm"
	"mica/internal/vm/wire"
)

// machine boots a machine with the LVM tools and three empty disks, of 256, 256 and 64 MiB.
func machine(t *testing.T, files map[string]string) *vm.Machine {
	t.Helper()
	vm.Require(t)
	tools, err := vm.Programs("lvm", "wipefs", "/usr/sbin/thin_check", "mke2fs", "e2fsck")
	if err != nil {
		t.Skipf("SKIPPED: LVM in the test machine: %v (scripts/setup.sh installs it)", err)
	}
	maps.Copy(files, tools)
	conf := filepath.Join(t.TempDir(), "lvm.conf")
	// There is no udev in the guest: LVM makes its nodes itself.
	if err := os.WriteFile(conf, []byte(`activation { udev_sync=0 udev_rules=0 monitoring=0 }
devices { obtain_device_list_from_udev=0 external_device_info_source="none" scan=["/dev"] }
`), 0o600); err != nil {
		t.Fatal(err)
	}
	files["/etc/lvm/lvm.conf"] = conf
	var disks []vm.Disk
	for i, mib := range []int64{256, 256, 64} {
		path := filepath.Join(t.TempDir(), string(rune('a'+i)))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, mib<<20); err != nil {
			t.Fatal(err)
		}
		disks = append(disks, vm.Disk{Path: path})
	}
	return vm.Start(t, vm.Config{Disks: disks, Modules: []string{"dm-thin-pool", "loop"}, Files: files, MemoryMB: 1024})
}

// TestPackage runs the tests of package lvm that need block devices.
func TestPackage(t *testing.T) {
	vm.Require(t)
	m := machine(t, map[string]string{"/bin/lvm.test": vm.BuildTest(t, "mica/lvm")})
	t.Logf("%s", m.MustRun(t, "/bin/lvm.test", "-test.v", "-test.timeout=4m"))
}

// TestDaemon has a daemon make its pool from a block device, runs a container on it, grows it over
// a second device, restarts it with these and with other values, and reboots LVM under it.
func TestDaemon(t *testing.T) {
	vm.Require(t)
	m := machine(t, map[string]string{"/bin/mica": vm.Build(t, "mica/cmd/mica"), "/root/image.tar": image(t)})
	sh := func(want, script string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		res, err := m.Run(ctx, wire.Command{Args: []string{"/bin/sh", "-c", "set -e\n" + script}})
		if err != nil {
			t.Fatal(err)
		}
		said := string(res.Stdout) + string(res.Stderr)
		if res.Code != 0 || !strings.Contains(said, want) {
			log := m.MustRun(t, "/bin/sh", "-c", "tail -n 20 /tmp/log; true")
			t.Fatalf("%s\nexit status %d, said %q, want 0 and %q\nlog of the daemon: %s", script, res.Code, said, want, log)
		}
		return said
	}
	configure := func(devices string) {
		t.Helper()
		sh("", fmt.Sprintf(`mkdir -p /etc/mica /var/lib/mica
cat >/etc/mica/config.toml <<'END'
[lvm]
devices = [%s]
data_percent = 60
autoextend_threshold = 50
[containers]
base_size = "512M"
END`, devices))
	}
	const serve = `mica serve >>/tmp/log 2>&1 </dev/null &
echo $! >/tmp/pid
for i in $(seq 300); do mica status >/dev/null 2>&1 && exit 0; kill -0 $! 2>/dev/null || exit 1; sleep 0.1; done
exit 1`
	const stop = `mica shutdown`

	configure(`"/dev/vda"`)
	sh("", serve)
	sh(`"engine": "kernel"`, "mica status --json; lvm lvs")
	sh("", "mica image import /root/image.tar --name base; mica create base web; mkdir -p /mnt/web; mica mount web /mnt/web")
	sh("base", "cat /mnt/web/etc/release; head -c 1000000 /dev/urandom >/mnt/web/data; sync; md5sum /mnt/web/data >/root/sum")
	before := sh("", "lvm lvs --noheadings --nosuffix --units m -o lv_size mica/thinpool")

	// A second device while the container is mounted; the daemon takes it at the next start too.
	sh("", "mica pool grow --device /dev/vdb; md5sum -c /root/sum")
	if after := sh("", "lvm lvs --noheadings --nosuffix --units m -o lv_size mica/thinpool"); after == before {
		t.Errorf("the pool has %s MiB before and after a device was added", strings.TrimSpace(before))
	}
	sh("named twice", "mica pool grow --device /dev/vda 2>&1 || true")
	sh("mkswap", "echo mkswap; mkswap /dev/vdc >/dev/null")
	sh("swap", "mica pool grow --device /dev/vdc 2>&1 || true")

	// It fills up past the threshold: LVM extends it, and the container goes on.
	sh("", `head -c 200000000 /dev/urandom >/mnt/web/fill; sync`)
	sh("grow", `for i in $(seq 300); do mica events --after 0 --no-follow --kind grow | grep extended && exit 0; sleep 0.1; done; mica status; exit 1`)

	sh("", "mica umount web; mica detach web; "+stop)
	sh("", "lvm vgchange --activate n mica; ! ls /dev/mapper | grep -v control")
	sh("", "echo 1 >/proc/sys/vm/drop_caches; "+serve)
	sh("", "mica mount web /mnt/web; md5sum -c /root/sum; mica umount web; mica detach web; "+stop)

	// Other values are refused with the reason.
	sh("", "sed -i s/60/70/ /etc/mica/config.toml")
	sh("data percentage was 60, is now 70", "mica serve 2>&1 || true")
	// LVM keeps its hands off the pool, and mica off one in which LVM has volumes.
	sh("Cannot use thin pool mica/thinpool", "lvm lvcreate -y -V 32m -n theirs --thinpool mica/thinpool 2>&1 || true")
	sh("", "lvm vgcreate -y theirs /dev/vdc; lvm lvcreate -y -L 40m -T theirs/pool; lvm lvcreate -y -V 32m -n volume --thinpool theirs/pool")
	sum := sh("", "sync; md5sum /dev/mapper/theirs-volume")
	for _, name := range []string{"theirs-pool", "theirs-pool-tpool"} {
		sh("", fmt.Sprintf("printf '[pool]\nthin_pool = \"%s\"\n' >/etc/mica/config.toml", name))
		sh("LVM holds 1 thin volumes", "mica serve --adopt 2>&1 || true")
	}
	if now := sh("", "md5sum /dev/mapper/theirs-volume"); now != sum {
		t.Errorf("LVM's volume: %s, was %s", now, sum)
	}
	// A second pool of the same name is refused, one with another name is made by one command.
	sh("volume group exists: mica", "rm /etc/mica/config.toml; mica pool create --lvm /dev/vdc --root /tmp/other 2>&1 || true")
	sh("", "lvm vgremove -ff -y theirs; lvm pvremove -y /dev/vdc; printf '[lvm]\nvolume_group = \"second\"\n' >/etc/mica/config.toml")
	t.Logf("%s", sh(`devices = ["/dev/vdc"]`, "mica pool create --lvm /dev/vdc --root /tmp/other"))
}

// image makes a small image with the project's own tool.
func image(t *testing.T) string {
	t.Helper()
	root, file := filepath.Join(t.TempDir(), "root"), filepath.Join(t.TempDir(), "image.tar")
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "etc/release"), []byte("base\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "run", "mica/internal/cmd/mkimage", "-o", file, "-name", "base:1", root).CombinedOutput()
	if err != nil {
		t.Fatalf("mkimage: %v: %s", err, out)
	}
	return file
}
