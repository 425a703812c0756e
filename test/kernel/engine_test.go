package kernel

import (
	"flag"
	"testing"
)

// One of them only: go test ./test/kernel -run KernelEngine -engine.run Switch
var engineRun = flag.String("engine.run", "", "tests of engine/kernel that TestKernelEngine runs")

// TestKernelEngine runs the tests of engine/kernel where there is a device-mapper.
func TestKernelEngine(t *testing.T) {
	r := machine(t)
	r.format(t)
	r.resize(t, 64*mib, 4*mib)
	t.Logf("%s", r.m.MustRun(t, "/bin/kernel.test", "-test.v", "-test.timeout=5m", "-test.run="+*engineRun))
}
