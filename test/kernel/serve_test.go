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

// TestPoolSwitch moves the pool of a daemon between the engines and back. What containers hold is
// the same byte for byte, and a pool that is in use or not whole is refused.
func TestPoolSwitch(t *testing.T) {
	r := machine(t)
	r.sh(t, "mkdir -p /dev/shm/sw /mnt/a; rm -f /tmp/mica.log")
	const root, pool = "--root /dev/shm/sw", "/dev/shm/sw/pool"
	sums := func() string { return r.sh(t, "cd /mnt/a; find . -type f -exec md5sum {} + | sort") }
	serve := func(engine string) {
		t.Helper()
		r.serve(t, root)
		r.want(t, fmt.Sprintf(`"engine": %q`, engine), "mica status --json")
		r.sh(t, "mica mount a /mnt/a")
	}
	end := func() {
		t.Helper()
		r.sh(t, "mica umount a; mica detach a; mica shutdown")
	}

	r.sh(t, "mica pool create %s --size 256M", pool)
	r.want(t, "kernel engine", "mica pool switch %s --to kernel; cat %s/engine", pool, pool)
	r.serve(t, root)
	r.want(t, `"engine": "kernel"`, "mica status --json")
	r.sh(t, "mica image import /root/image.tar --name base; mica create base a; mica mount a /mnt/a")
	r.sh(t, "for i in $(seq 12); do head -c $((i * 13000)) /dev/urandom >/mnt/a/f$i; done; rm /mnt/a/f7 /mnt/a/f9; mica snapshot a s")
	r.fails(t, "process", "mica pool switch %s --to user", pool)
	want := sums()
	r.stop(t, "KILL")
	r.fails(t, "mounted on /mnt/a", "mica pool switch %s --to user", pool)
	r.serve(t, root)
	end()
	r.want(t, "user engine", "mica pool switch %s --to user", pool)

	serve("user")
	if got := sums(); got != want {
		t.Errorf("with the user engine the container holds\n%s\nwant\n%s", got, want)
	}
	r.sh(t, "for i in $(seq 9); do head -c $((i * 15000)) /dev/urandom >/mnt/a/k$i; done; rm /mnt/a/f1*; mica pool check")
	want = sums()
	r.fails(t, "process", "mica pool switch %s --to kernel", pool)
	end()

	r.sh(t, "mica pool switch %s --to kernel", pool)
	serve("kernel")
	if got := sums(); got != want {
		t.Errorf("back with the kernel engine the container holds\n%s\nwant\n%s", got, want)
	}
	r.sh(t, "mica pool check")
	end()

	// A daemon that is killed leaves an idle pool active: the switch takes it away.
	r.serve(t, root)
	r.stop(t, "KILL")
	r.sh(t, "losetup -a | grep -q sw/pool; mica pool switch %s --to user; ! losetup -a | grep sw/pool", pool)
	r.want(t, "clean", "mica pool check %s", pool)

	// Devices have no place for a note.
	r.sh(t, "truncate -s 64M /dev/shm/d; truncate -s 4M /dev/shm/m; mica pool create --data /dev/shm/d --metadata /dev/shm/m")
	r.want(t, `engine = "kernel"`, "mica pool switch --data /dev/shm/d --metadata /dev/shm/m --to kernel")
	r.fails(t, "want user or kernel", "mica pool switch %s --to both", pool)
	r.fails(t, "no such file", "mica pool switch /dev/shm/none --to user")
	r.sh(t, "rm -rf /dev/shm/sw /dev/shm/d /dev/shm/m")
}

// TestServeNamedPool is a daemon on a thin pool that somebody else has made and holds devices in.
func TestServeNamedPool(t *testing.T) {
	r := machine(t)
	r.format(t)
	r.resize(t, 512*mib, 4*mib)
	r.sh(t, "mkdir -p /dev/shm/named /mnt/a; rm -f /tmp/mica.log")
	r.sh(t, `cat >/tmp/named.toml <<-E
		root = "/dev/shm/named"
		[pool]
		thin_pool = "theirs"
		[containers]
		base_size = "64M"
	E
	dmsetup --noudevrules --noudevsync create theirs --table "0 1048576 thin-pool /dev/vdb /dev/vda 128 0"; dmsetup message theirs 0 "create_thin 1"
	dmsetup --noudevrules --noudevsync create theirs-1 --table "0 65536 thin $(dmsetup info -c --noheadings -o major,minor --separator : theirs) 1"
	ln -s dm-$(dmsetup info -c --noheadings -o minor theirs-1) /dev/theirs
	head -c 33554432 /dev/urandom >/tmp/theirs; cat /tmp/theirs >/dev/theirs; sync`)
	r.fails(t, "adopt", "mica serve --config /tmp/named.toml")
	r.serve(t, "--config /tmp/named.toml --adopt")
	r.want(t, `"engine": "kernel"`, "mica status --json; mica status")
	r.want(t, "1 devices of the pool are foreign", "mica status")
	life := func() {
		t.Helper()
		r.sh(t, "mica image import /root/image.tar --name base; mica create base a; mica mount a /mnt/a; head -c 5242880 /dev/urandom >/mnt/a/x; sync")
		r.sh(t, "mica fork a b; mica umount a; mica detach a; mica rm a b; mica image rm base")
		r.sh(t, "echo 3 >/proc/sys/vm/drop_caches; cmp /tmp/theirs /dev/theirs")
	}
	life()
	r.fails(t, "made longer by whoever made it", "mica pool grow --size 1G")
	r.sh(t, "mica shutdown")
	r.serve(t, "--config /tmp/named.toml") // its own devices are known by now
	life()
	r.sh(t, "mica shutdown; cmp /tmp/theirs /dev/theirs; dmsetup --noudevrules --noudevsync remove theirs-1; dmsetup --noudevrules --noudevsync remove theirs; rm -rf /dev/shm/named /tmp/theirs /dev/theirs")
}
