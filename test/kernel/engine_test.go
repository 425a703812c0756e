package kernel

import (
	"flag"
	"testing"
	"time"
)

// One of them only: go test ./test/kernel -run KernelEngine -engine.run Switch
var engineRun = flag.String("engine.run", "", "tests of engine/kernel that TestKernelEngine runs")

// engineLimit is for a host that is very busy; alone it is about a minute.
const engineLimit = 20 * time.Minute

// TestKernelEngine runs the tests of engine/kernel where there is a device-mapper.
func TestKernelEngine(t *testing.T) {
	r := machine(t)
	r.format(t)
	r.m.RunTests(t, engineLimit, nil, "/bin/kernel.test", "-test.run="+*engineRun)
}
