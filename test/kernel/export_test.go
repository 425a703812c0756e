package kernel

import (
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/internal/vm"
)

// exportConfig is a machine with both block drivers, the exporters' test programs, and mkfs.
func exportConfig(t *testing.T) vm.Config {
	t.Helper()
	files := map[string]string{
		"/bin/ublk.test": vm.BuildTest(t, "mica/export/ublk"),
		"/bin/nbd.test":  vm.BuildTest(t, "mica/export/nbdkernel"),
	}
	mkfs, err := vm.Programs("mkfs.ext4")
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(files, mkfs)
	return vm.Config{Modules: []string{"ublk_drv", "nbd", "ext4"}, Files: files, CPUs: 2, MemoryMB: 1536}
}

// TestExports runs the conformance suite of the exports on the kernel's drivers. MICA_KILLS and
// MICA_ROUNDS make it longer.
func TestExports(t *testing.T) {
	c := exportConfig(t)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Disks = []vm.Disk{{Path: disk}}
	m := vm.Start(t, c)
	env := []string{"MICA_DISK=/dev/" + vm.DiskName(0), "MICA_KILLS=" + getenv("MICA_KILLS", "2"), "MICA_ROUNDS=" + getenv("MICA_ROUNDS", "2")}
	t.Run("ublk", func(t *testing.T) { m.RunTests(t, 10*time.Minute, env, "/bin/ublk.test", "-test.skip=^TestUdev$") })
	t.Run("nbd", func(t *testing.T) {
		m.RunTests(t, 10*time.Minute, env, "/bin/nbd.test", "-test.run=^TestConformance")
		m.RunTests(t, 10*time.Minute, env, "/bin/nbd.test", "-test.run=^TestSeveral.*/^(concurrent|waiting writes|restart|kill)$")
	})
}

// ext4Disk is a file with an ext4 file system.
func ext4Disk(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", file).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return file
}

func getenv(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}

// TestExportSpeed compares the nodes on memory, in the emulator: not their speed counts but which is
// the faster one. It runs with MICA_EXPORT_SPEED=1.
func TestExportSpeed(t *testing.T) {
	if os.Getenv("MICA_EXPORT_SPEED") == "" {
		t.Skip("SKIPPED: a measurement; MICA_EXPORT_SPEED=1 runs it")
	}
	c := exportConfig(t)
	c.Files["/bin/fuse.test"] = vm.BuildTest(t, "mica/export/fuse")
	c.Modules = append(c.Modules, "loop", "fuse")
	m := vm.Start(t, c)
	for round := range 2 {
		for _, p := range []string{"ublk", "nbd", "fuse"} {
			t.Logf("round %d, %s:\n%s", round, p, m.MustRun(t, "/bin/"+p+".test", "-test.run=^$", "-test.bench=Transport", "-test.benchtime=400ms"))
		}
	}
}

// TestUdev: with the rules that are shipped udevd leaves our nodes alone; without them it does not,
// which is how this test knows that it sees something. MICA_UDEV_CYCLES is how often each kind of
// node is attached and detached.
func TestUdev(t *testing.T) {
	vm.Require(t)
	c := exportConfig(t)
	udev, err := vm.Udev()
	if errors.Is(err, vm.ErrUnavailable) {
		t.Skipf("SKIPPED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(c.Files, udev)
	c.Files["/bin/fuse.test"] = vm.BuildTest(t, "mica/export/fuse")
	rules, err := filepath.Abs("../../packaging/udev/59-mica.rules")
	if err != nil {
		t.Fatal(err)
	}
	c.Files["/rules/59-mica.rules"] = rules
	c.Modules = append(c.Modules, "loop", "fuse")
	dmsetup, err := vm.Programs("dmsetup")
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(c.Files, dmsetup)
	c.Files["/sbin/dmsetup"] = dmsetup["/bin/dmsetup"] // where udev's rules run it
	c.Modules = append(c.Modules, "dm-mod")
	c.Disks = []vm.Disk{{Path: ext4Disk(t)}}
	m := vm.Start(t, c)
	m.MustRun(t, "/lib/systemd/systemd-udevd", "--daemon")
	m.MustRun(t, "udevadm", "settle")
	dm := func(t *testing.T, uuid string) (props string) {
		m.MustRun(t, "dmsetup", "create", "test", "--uuid", uuid, "--table", "0 4096 linear /dev/vda 0")
		m.MustRun(t, "udevadm", "settle")
		props = string(m.MustRun(t, "udevadm", "info", "--query=property", "--name=/dev/mapper/test"))
		m.MustRun(t, "dmsetup", "remove", "test")
		return props
	}
	programs := []string{"ublk", "nbd", "fuse"}
	for _, p := range programs {
		t.Run("without rules/"+p, func(t *testing.T) {
			m.RunTests(t, 2*time.Minute, []string{"MICA_UDEVD=without"}, "/bin/"+p+".test", "-test.run=^TestUdev$")
		})
	}
	t.Run("without rules/dm", func(t *testing.T) {
		if props := dm(t, "mica-test"); !strings.Contains(props, "ID_FS_UUID=") {
			t.Errorf("udevd does not look into it: this test sees nothing:\n%s", props)
		}
	})
	m.MustRun(t, "cp", "/rules/59-mica.rules", "/lib/udev/rules.d/")
	m.MustRun(t, "udevadm", "control", "--reload")
	t.Run("dm", func(t *testing.T) {
		props := dm(t, "mica-test")
		if strings.Contains(props, "ID_FS_UUID=") || strings.Contains(props, "by-uuid") || !strings.Contains(props, "SYSTEMD_READY=0") {
			t.Errorf("ours:\n%s", props)
		}
		if props := dm(t, "other-test"); !strings.Contains(props, "ID_FS_UUID=") || strings.Contains(props, "SYSTEMD_READY=0") {
			t.Errorf("somebody else's:\n%s", props)
		}
	})
	env := []string{"MICA_UDEVD=with", "MICA_UDEV_CYCLES=" + os.Getenv("MICA_UDEV_CYCLES")}
	for _, p := range programs {
		t.Run(p, func(t *testing.T) {
			m.RunTests(t, time.Hour, env, "/bin/"+p+".test", "-test.run=^TestUdev$")
		})
	}
}
