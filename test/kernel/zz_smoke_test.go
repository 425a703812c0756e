package kernel

import (
	"testing"
	"mica/internal/vm"
)

func TestZZSmoke(t *testing.T) {
	m := vm.Start(t, vm.Config{Modules: []string{"ublk_drv", "nbd"}, CPUs: 2, Files: map[string]string{"/bin/ublk.test": vm.BuildTest(t, "mica/export/ublk")},
		Trace: func(line string) { t.Log("console:", line) },
	})
	t.Logf("%s", m.MustRun(t, "sh", "-c", "/bin/ublk.test -test.v -test.timeout 60s 2>&1"))
}
