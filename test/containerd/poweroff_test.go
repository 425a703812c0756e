package containerd

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// powerOff plays the last part of a shutdown in namespaces of its own: process 1 becomes
// systemd-shutdown, everything is killed but the programs whose names begin with an "@", and then
// what is mounted is unmounted.
const powerOff = `
set -eu
dir=$1 mica=$2 image=$3
run="$mica --run $dir/run"
(exec -a @mica "$mica" serve --config "$dir/mica.toml") >>"$dir/mica.log" 2>&1 &
daemon=$!
for i in $(seq 300); do $run status >/dev/null 2>&1 && break; sleep 0.1; done
$run image import "$dir/image.tar" >/dev/null
$run create "$image" c >/dev/null
$run create "$image" idle >/dev/null
$run attach idle >/dev/null
mkdir "$dir/m"
$run mount c "$dir/m"
echo durable >"$dir/m/durable"
sync -f "$dir/m/durable"
(
	while ! grep -q '^systemd-shutdow' /proc/1/comm; do sleep 0.05; done
	sleep 0.5
	for p in /proc/[0-9]*; do
		pid=${p#/proc/}
		name=$(tr '\0' ' ' <"$p/cmdline" 2>/dev/null || true)
		case "$pid $name" in
		"1 "* | "$BASHPID "* | *" @"*) ;;
		*) kill -9 "$pid" 2>/dev/null || true ;;
		esac
	done
	kill -0 $daemon
	echo late >"$dir/m/late"
	umount "$dir/m"
	# Nobody reaps it here: process 1 is only called so.
	for i in $(seq 200); do grep -q '^State:.*zombie' /proc/$daemon/status && break; sleep 0.05; done
	if grep -q '^State:.*zombie' /proc/$daemon/status; then echo ended >"$dir/done.new"; else echo "still runs" >"$dir/done.new"; fi
	mv "$dir/done.new" "$dir/done"
) </dev/null >>"$dir/script.log" 2>&1 &
exec "$dir/systemd-shutdown" 60
`

// TestPowerOff: the daemon outlives the kill at the end of a shutdown, serves until the last mount is
// gone, commits and ends. Nothing is lost, and the file system is clean.
func TestPowerOff(t *testing.T) {
	t.Run("ext4", func(t *testing.T) { testPowerOff(t, "ext4", "e2fsck", "-f", "-n") })
	t.Run("xfs", func(t *testing.T) { testPowerOff(t, "xfs", "xfs_repair", "-n") })
}

func testPowerOff(t *testing.T, fs string, check ...string) {
	b := newBox(t, releases(t)[0])
	b.fs = fs
	if _, err := exec.LookPath(check[0]); err != nil {
		t.Skipf("SKIPPED: %s is not installed (packages e2fsprogs, xfsprogs)", check[0])
	}
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skipf("SKIPPED: no sleep: %v", err)
	}
	text, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.path("systemd-shutdown"), text, 0o755); err != nil {
		t.Fatal(err)
	}
	b.testImage()
	b.writeConfig()
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
		"bash", "-c", powerOff, "poweroff", b.dir, b.mica, imageName)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	var done []byte
	for end := time.Now().Add(50 * time.Second); time.Now().Before(end) && done == nil; time.Sleep(50 * time.Millisecond) {
		done, _ = os.ReadFile(b.path("done"))
		select {
		case <-ended:
			end = time.Now()
		default:
		}
	}
	cmd.Process.Kill()
	<-ended
	if got := strings.TrimSpace(string(done)); got != "ended" {
		script, _ := os.ReadFile(b.path("script.log"))
		b.logs()
		t.Fatalf("the daemon %q\n%s%s", got, out.String(), script)
	}
	if log, _ := os.ReadFile(b.path("mica.log")); !strings.Contains(string(log), "the last node is free") {
		t.Errorf("the log does not say why it ended:\n%s", log)
	}
	if out, err := run(time.Minute, b.mica, "thin", "check", b.path("root/pool")); err != nil {
		t.Errorf("check: %v\n%s", err, out)
	}
	b.startMica()
	node := strings.TrimSpace(b.mustMica("attach", "c"))
	if out, err := run(time.Minute, append(check, node)...); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	dir := b.path("again")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b.mustMica("mount", "c", dir)
	for _, name := range []string{"durable", "late"} {
		if text, err := os.ReadFile(dir + "/" + name); err != nil || string(text) != name+"\n" {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
	b.mustMica("umount", "c")
	b.mustMica("shutdown")
}
