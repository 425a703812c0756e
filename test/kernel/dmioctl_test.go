package kernel

import "testing"

// TestDeviceMapper runs the tests of internal/dmioctl where there is a device-mapper.
func TestDeviceMapper(t *testing.T) {
	r := machine(t)
	r.format(t)
	r.resize(t, 64*mib, 4*mib)
	t.Logf("%s", r.m.MustRun(t, "/bin/dmioctl.test", "-test.v", "-test.timeout=2m"))
}
