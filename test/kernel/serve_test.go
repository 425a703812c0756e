package kernel

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"mica/internal/vm/wire"
)

// sh runs a script in the guest; it must succeed.
func (r *rig) sh(t *testing.T, format string, args ...any) string {
	t.Helper()
	script := "set -e\n" + fmt.Sprintf(format, args...)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	res, err := r.m.Run(ctx, wire.Command{Args: []string{"/bin/sh", "-c", script}})
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 0 {
		log, _ := r.m.Run(ctx, wire.Command{Args: []string{"/bin/sh", "-c", "tail -n 40 /tmp/mica.log; dmesg | tail -n 5"}})
		t.Fatalf("%s\nexit status %d\n%s%s\nlog of the daemon:\n%s", script, res.Code, res.Stdout, res.Stderr, log.Stdout)
	}
	return strings.TrimSpace(string(res.Stdout))
}

// fails runs a script that must fail, and returns what it said.
func (r *rig) fails(t *testing.T, want string, format string, args ...any) string {
	t.Helper()
	script := fmt.Sprintf(format, args...)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	res, err := r.m.Run(ctx, wire.Command{Args: []string{"/bin/sh", "-c", script}})
	if err != nil {
		t.Fatal(err)
	}
	said := string(res.Stdout) + string(res.Stderr)
	if res.Code == 0 || !strings.Contains(said, want) {
		t.Errorf("%s\nexit status %d, said %q, want failure with %q", script, res.Code, said, want)
	}
	return said
}

// serve starts the daemon in the guest and waits until it answers.
func (r *rig) serve(t *testing.T, flags string) {
	t.Helper()
	r.sh(t, `
		mica serve %s >>/tmp/mica.log 2>&1 </dev/null &
		echo $! >/tmp/mica.pid
		for i in $(seq 300); do mica status >/dev/null 2>&1 && exit 0; kill -0 $! || exit 1; sleep 0.1; done
		exit 1`, flags)
}

// stop ends it with a signal and waits for its end; nobody reaps it.
func (r *rig) stop(t *testing.T, signal string) {
	t.Helper()
	r.sh(t, `p=$(cat /tmp/mica.pid); kill -%s $p; for i in $(seq 300); do grep -q '^State:.[RSDT]' /proc/$p/status || exit 0; sleep 0.1; done; exit 1`, signal)
}

func (r *rig) want(t *testing.T, want string, format string, args ...any) {
	t.Helper()
	if got := r.sh(t, format, args...); !strings.Contains(got, want) {
		t.Errorf("%s\nsaid %q, want %q", fmt.Sprintf(format, args...), got, want)
	}
}

// TestServeKernel is the life of containers on a daemon with the kernel engine.
func TestServeKernel(t *testing.T) {
	r := machine(t)
	r.sh(t, "mkdir -p /dev/shm/root /mnt/a /mnt/b; rm -f /tmp/mica.log")
	const flags = "--root /dev/shm/root --engine kernel"
	r.serve(t, flags)
	r.want(t, `"engine": "kernel"`, "mica status --json")
	r.sh(t, "mica image import /root/image.tar --name base")
	r.sh(t, "mica create base a")
	r.sh(t, "mica mount a /mnt/a")
	r.want(t, "/dev/dm-", "grep /mnt/a /proc/mounts; readlink -f /dev/mica/*")
	r.sh(t, "head -c 300 /dev/zero | tr '\\0' x >/mnt/a/written; sync")
	r.sh(t, "mica snapshot a before; echo after >/mnt/a/written")
	r.sh(t, "mica fork a b; mica mount b /mnt/b; cmp /mnt/a/written /mnt/b/written")
	r.sh(t, "mica commit b image2; mica df; mica pool check")

	// Killed: what is mounted goes on, and the next daemon takes it over.
	r.stop(t, "KILL")
	r.sh(t, "echo without >/mnt/a/without; sync; cat /mnt/a/bin/large >/dev/null")
	r.serve(t, flags)
	r.want(t, "without", "cat /mnt/a/without; mica ls")
	r.sh(t, "mica snapshot a again; echo more >/mnt/a/more")
	// Ended in order, the same.
	r.stop(t, "TERM")
	r.sh(t, "echo without >/mnt/b/without; sync")
	r.fails(t, "in use", "mica pool switch /dev/shm/root/pool --to user")
	r.fails(t, "loop", "mica thin ls /dev/shm/root/pool")
	r.serve(t, flags)
	r.sh(t, "mica umount a; mica umount b; mica detach a; mica detach b")
	r.sh(t, "mica rollback a before; mica mount a /mnt/a; grep -q xxx /mnt/a/written; mica umount a; mica detach a")
	r.sh(t, "mica resize a 11G; mica mount a /mnt/a; df -m /mnt/a; mica umount a; mica detach a")
	before := r.sh(t, "du -k /dev/shm/root/pool/data")
	r.sh(t, "mica snapshot rm a before; mica snapshot rm a again; mica rm a b; mica image rm image2; mica image rm base; mica df")
	// What was deleted goes back to the host by itself.
	r.sh(t, `for i in $(seq 100); do [ $(du -k /dev/shm/root/pool/data | cut -f1) -lt 2000 ] && exit 0; sleep 0.1; done
		echo "before: %s"; du -k /dev/shm/root/pool/data; mica status; exit 1`, before)
	r.sh(t, "mica shutdown; ! ls /dev/mapper | grep mica; ! losetup -a | grep root/pool")
	r.sh(t, "mica pool check /dev/shm/root/pool; cat /tmp/mica.log")
	r.sh(t, "rm -rf /dev/shm/root")
}
