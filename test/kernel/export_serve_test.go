package kernel

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mica/daemon/api"
	"mica/internal/vm"
)

// serveScript runs in the guest: a daemon with one kind of export, a container on it that is written
// to all the time, the daemon killed in the middle three times, everything verified. It prints the
// daemon's status.
const serveScript = `
kind=$1
fail() { echo "$*" >&2; tail -n 20 /tmp/log >&2; kill -9 $daemon 2>/dev/null; exit 1; }
start() {
	mica serve --root /tmp/root --config /tmp/config.toml >>/tmp/log 2>&1 &
	daemon=$!
	for i in $(seq 100); do mica status >/dev/null 2>&1 && return; sleep 0.2; done
	fail "the daemon does not answer"
}
rm -rf /tmp/root /tmp/log /tmp/sums /tmp/errors; mkdir -p /tmp/root /mnt/c /var/lib
printf '[exports]\nkind = "%s"\n[containers]\nbase_size = "256M"\n[pool]\nsize = "512M"\n[containerd]\nenabled = false\n' $kind >/tmp/config.toml
start
mica image import /image.tar --name img >/dev/null || fail import
mica create img c >/dev/null || fail create
mica mount c /mnt/c >/dev/null || fail mount
[ "$(cat /mnt/c/hello)" = "from the image" ] || fail "contents of the image"
writer() {
	i=0
	while [ ! -e /tmp/stop ]; do
		i=$((i + 1))
		dd if=/dev/urandom of=/mnt/c/f$((i % 20)).tmp bs=16k count=3 conv=fsync 2>>/tmp/dd || echo "write $i" >>/tmp/errors
		sum=$(sha256sum </mnt/c/f$((i % 20)).tmp) || echo "read $i" >>/tmp/errors
		mv /mnt/c/f$((i % 20)).tmp /mnt/c/f$((i % 20)) || echo "rename $i" >>/tmp/errors
		echo "$((i % 20)) $sum" >>/tmp/sums
	done
}
rm -f /tmp/stop
writer &
writes=$!
for round in 1 2 3; do
	before=$(cat /tmp/sums 2>/dev/null | wc -l)
	for i in $(seq 300); do [ $(cat /tmp/sums 2>/dev/null | wc -l) -gt $((before + 2)) ] && break; sleep 0.1; done
	[ $(cat /tmp/sums | wc -l) -gt $((before + 2)) ] || fail "round $round: nothing is written any more"
	kill -9 $daemon
	wait $daemon 2>/dev/null
	start
done
before=$(cat /tmp/sums | wc -l)
for i in $(seq 300); do [ $(cat /tmp/sums | wc -l) -gt $((before + 2)) ] && break; sleep 0.1; done
touch /tmp/stop
wait $writes
[ -e /tmp/errors ] && fail "the writer saw errors: $(cat /tmp/errors | head -n 5) $(tail -n 5 /tmp/dd)"
check() {
	for n in $(seq 0 19); do
		want=$(grep "^$n " /tmp/sums | tail -n 1 | cut -d' ' -f2-)
		[ -z "$want" ] || [ "$(sha256sum </mnt/c/f$n)" = "$want" ] || fail "$1: file $n is not what was written"
	done
}
check "mounted"
mica umount c || fail umount
mica detach c >/dev/null || fail detach
mica mount c /mnt/c >/dev/null || fail "mount again"
check "mounted again"
mica status --json
mica umount c && mica detach c >/dev/null || fail "umount and detach again"
mica shutdown || fail shutdown
wait $daemon
[ -z "$(ls /dev/mica)" ] || fail "links are left: $(ls /dev/mica)"
[ -z "$(ls -A /dev/mica/.nodes 2>/dev/null)" ] || fail "marks are left: $(ls /dev/mica/.nodes)"
ls /dev/ublkb* >/dev/null 2>&1 && fail "ublk devices are left: $(ls /dev/ublkb*)"
ls /sys/block/nbd*/pid >/dev/null 2>&1 && fail "NBD devices are connected"
echo "files written: $(cat /tmp/sums | wc -l)" >&2
exit 0
`

// TestServeExports runs the daemon on the kernel's block drivers.
func TestServeExports(t *testing.T) {
	vm.Require(t)
	files, err := vm.Programs("mke2fs", "mkfs.ext4", "e2fsck", "tune2fs")
	if err != nil {
		t.Fatal(err)
	}
	files["/bin/mica"] = vm.Build(t, "mica/cmd/mica")
	files["/image.tar"] = smallImage(t)
	files["/serve.sh"] = scriptFile(t, serveScript)
	m := vm.Start(t, vm.Config{Modules: []string{"ublk_drv", "nbd", "ext4", "fuse", "loop"}, Files: maps.Clone(files), CPUs: 2, MemoryMB: 2048})
	// chosen runs the daemon and returns what it says about its exports.
	chosen := func(t *testing.T, kind string) api.Exports {
		t.Helper()
		var st api.Status
		if out := m.MustRun(t, "sh", "/serve.sh", kind); json.Unmarshal(out, &st) != nil {
			t.Fatalf("status: %s", out)
		}
		return st.Exports
	}
	for _, kind := range []string{"ublk", "nbd"} {
		t.Run(kind, func(t *testing.T) {
			x := chosen(t, kind)
			if x.Kind != kind || !x.Resend {
				t.Errorf("exports %+v, want %s", x, kind)
			}
		})
	}
	// What auto chooses where less and less is there, and why not the others.
	for _, c := range []struct {
		name, command, want string
		not                 map[string]string
	}{
		{"auto", "true", "ublk", map[string]string{"nbd": "ublk is preferred", "fuse": "ublk is preferred"}},
		{"auto without io_uring", "echo 2 >/proc/sys/kernel/io_uring_disabled", "nbd",
			map[string]string{"ublk": "io_uring is not allowed here", "fuse": "nbd is preferred"}},
		{"auto without ublk", "rmmod ublk_drv", "nbd", map[string]string{"ublk": "modprobe ublk_drv", "fuse": "nbd is preferred"}},
		{"auto without both", "rmmod nbd", "fuse", map[string]string{"ublk": "/dev/ublk-control is missing", "nbd": "modprobe nbd"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m.MustRun(t, "sh", "-c", c.command)
			out := m.MustRun(t, "sh", "-c", `
mkdir -p /var/lib; rm -rf /tmp/root /tmp/config.toml
mica serve --root /tmp/root >/tmp/log 2>&1 &
for i in $(seq 100); do mica status --json 2>/dev/null && break; sleep 0.2; done
mica shutdown; wait`)
			var st api.Status
			if err := json.Unmarshal(out, &st); err != nil {
				t.Fatalf("%v: %s%s", err, out, m.MustRun(t, "cat", "/tmp/log"))
			}
			if st.Exports.Kind != c.want {
				t.Errorf("%s was chosen, want %s", st.Exports.Kind, c.want)
			}
			for kind, why := range c.not {
				found := false
				for _, n := range st.Exports.NotChosen {
					found = found || n.Kind == kind && strings.Contains(n.Why, why)
				}
				if !found {
					t.Errorf("not chosen: %+v; want %s with %q", st.Exports.NotChosen, kind, why)
				}
			}
		})
	}
	for kind, want := range map[string]string{"ublk": "modprobe ublk_drv", "nbd": "modprobe nbd"} {
		t.Run(kind+" that is not there", func(t *testing.T) {
			out := string(m.MustRun(t, "sh", "-c", fmt.Sprintf(`
printf '[exports]\nkind = "%s"\n' >/tmp/config.toml
if mica serve --root /tmp/root --config /tmp/config.toml 2>&1; then echo started; fi`, kind)))
			if strings.Contains(out, "started") || !strings.Contains(out, want) {
				t.Errorf("%s; want an error with %q", out, want)
			}
		})
	}
}

func scriptFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

// smallImage makes an image with one file.
func smallImage(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/root/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/root/hello", []byte("from the image\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "run", "mica/internal/cmd/mkimage", "-o", dir+"/image.tar", "-name", "img:latest", dir+"/root").CombinedOutput()
	if err != nil {
		t.Fatalf("mkimage: %v\n%s", err, out)
	}
	return dir + "/image.tar"
}
