package main

import (
	"encoding/json"
	"testing"

	"mica/daemon/api"
	"mica/internal/vm"
)

// TestOnAHost: on a machine of its own, with all rights, the daemon becomes an I/O flusher (it
// begins again for that) and sees that it is on the host. There is no mkfs in that machine, which
// is a note in the status and no reason not to start.
func TestOnAHost(t *testing.T) {
	vm.Require(t)
	m := vm.Start(t, vm.Config{
		Modules: []string{"fuse", "loop", "ext4"},
		Files:   map[string]string{"/bin/mica": vm.Build(t, "mica/cmd/mica")},
	})
	out := m.MustRun(t, "sh", "-c", `
mkdir -p /var/lib /run /tmp
mica serve --root /tmp/root >/tmp/log 2>&1 &
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
	mica status --json && exit 0
	sleep 1
done 2>/dev/null
cat /tmp/log
exit 1`)
	var st api.Status
	if err := json.Unmarshal(out, &st); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !st.Exports.IOFlusher || st.Exports.HostNamespaces != "yes" || !st.Exports.Resend {
		t.Errorf("exports: %+v, notes %q", st.Exports, st.Notes)
	}
	m.MustRun(t, "sh", "-c", "mica shutdown")
}
