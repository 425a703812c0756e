package kernel

import (
	"maps"
	"os"
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
	m := vm.Start(t, exportConfig(t))
	env := []string{"MICA_KILLS=" + getenv("MICA_KILLS", "2"), "MICA_ROUNDS=" + getenv("MICA_ROUNDS", "4")}
	t.Run("ublk", func(t *testing.T) { m.RunTests(t, 10*time.Minute, env, "/bin/ublk.test") })
	t.Run("nbd", func(t *testing.T) {
		m.RunTests(t, 10*time.Minute, env, "/bin/nbd.test", "-test.run=^TestConformance")
		m.RunTests(t, 10*time.Minute, env, "/bin/nbd.test", "-test.run=^TestSeveral.*/^(concurrent|waiting writes|restart|kill)$")
	})
}

func getenv(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}
