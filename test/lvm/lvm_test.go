// Package lvm runs the tests of package lvm in a machine with a device-mapper.
package lvm

import (
	"maps"
	"os"
	"path/filepath"
	"testing"

	"mica/internal/vm"
)

func TestLVM(t *testing.T) {
	vm.Require(t)
	files, err := vm.Programs("lvm", "wipefs", "/usr/sbin/thin_check")
	if err != nil {
		t.Skipf("SKIPPED: LVM in the test machine: %v (scripts/setup.sh installs it)", err)
	}
	conf := filepath.Join(t.TempDir(), "lvm.conf")
	// There is no udev in the guest: LVM makes its nodes itself.
	if err := os.WriteFile(conf, []byte("activation { udev_sync=0 udev_rules=0 monitoring=0 }\ndevices { obtain_device_list_from_udev=0 external_device_info_source=\"none\" scan=[\"/dev\"] }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	maps.Copy(files, map[string]string{"/bin/lvm.test": vm.BuildTest(t, "mica/lvm"), "/etc/lvm/lvm.conf": conf})
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
	m := vm.Start(t, vm.Config{Disks: disks, Modules: []string{"dm-thin-pool"}, Files: files})

	t.Logf("%s", m.MustRun(t, "/bin/lvm.test", "-test.v", "-test.timeout=4m"))
}
