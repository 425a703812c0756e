#!/bin/bash
# Sees to it that this machine has what mica needs, and says in words what it lacks.
#
#   scripts/setup.sh [PURPOSE...]     PURPOSE: build runtime tests vm (default: these four), bench
#   scripts/setup.sh --list           the packages by purpose, nothing else
#   scripts/setup.sh --check [...]    say what is missing, install nothing, exit 1 if anything is
#
# Packages come with apt from the mirrors this machine is already configured for. Only QEMU and
# the test kernel come from <release>-backports: its source entry is derived from the machine's
# own Debian entry, written to a file of ours, and pinned so that nothing else is taken from it.
# The test kernel is downloaded and unpacked into a cache directory, never installed.
#
# Exit 0 also when something optional could not be had: then it is said, with what is skipped.
# When everything is there it does nothing and takes a fraction of a second.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"

# One line per package: purpose, package, a file that proves it is there, what it is for. The
# file test is what makes the quick path quick; dpkg is asked only when a file is missing.
packages='
build    ca-certificates          /etc/ssl/certs/ca-certificates.crt   fetching Go modules
runtime  e2fsprogs                /sbin/mkfs.ext4                      ext4 in thin devices
runtime  xfsprogs                 /sbin/mkfs.xfs                       xfs in thin devices
runtime  mount                    /bin/mount                           mount, losetup
runtime  util-linux               /sbin/blkid                          blkid, fsfreeze, unshare
runtime  mmdebstrap               /usr/bin/mmdebstrap                  the image of the demo
runtime  thin-provisioning-tools  /usr/sbin/thin_check                 an independent check of every pool
runtime  jq                       /usr/bin/jq                          reading --json in scripts
runtime  runc                     /usr/sbin/runc                       a command in a container
tests    fio                      /usr/bin/fio                         verified load
tests    nbdkit                   /usr/bin/nbdkit                      a peer of the NBD server
tests    libnbd-bin               /usr/bin/nbdinfo                     nbdinfo, nbdcopy
tests    qemu-utils               /usr/bin/qemu-io                     qemu-img, qemu-io
tests    python3-libnbd           /usr/bin/nbdsh                       nbdsh
tests    zstd                     /usr/bin/zstd                        compressed images
tests    curl                     /usr/bin/curl                        the HTTP API as a stranger uses it
tests    umoci                    /usr/bin/umoci                       a second opinion on image unpacking
tests    skopeo                   /usr/bin/skopeo                      converting images
tests    containerd               /usr/bin/containerd                  the client of the layer store
tests    attr                     /usr/bin/setfattr                    extended attributes
tests    gcc                      /usr/bin/gcc                         go test -race
tests    libc6-dev                /usr/include/stdlib.h                go test -race
tests    xz-utils                 /usr/bin/xz                          kernel modules
vm       lvm2                     /sbin/lvm                            thin pools that LVM manages
bench    fio                      /usr/bin/fio                         the load
bench    nbdkit                   /usr/bin/nbdkit                      a peer of the NBD server
bench    qemu-utils               /usr/bin/qemu-storage-daemon         peers: qemu-nbd, qemu-storage-daemon
bench    btrfs-progs              /sbin/mkfs.btrfs                     a peer: the btrfs snapshotter of containerd
bench    gcc                      /usr/bin/gcc                         the same (cgo)
bench    libc6-dev                /usr/include/stdlib.h                the same
vm       busybox-static           /bin/busybox                         user space of the test machine
vm       qemu-system-x86          /usr/bin/qemu-system-x86_64          the test machine (10 or later, from backports)
'

mode=install
purposes=()
for arg in "$@"; do
	case $arg in
	--list) mode=list ;;
	--check) mode=check ;;
	build | runtime | tests | vm | bench) purposes+=("$arg") ;;
	*) die "unknown argument $arg (purposes: build runtime tests vm bench; options: --list --check)" ;;
	esac
done
[ ${#purposes[@]} -gt 0 ] || purposes=(build runtime tests vm)

if [ $mode = list ]; then
	echo "$packages" | sed '/^$/d' | while read -r purpose package _ why; do
		printf '%-8s %-24s %s\n' "$purpose" "$package" "$why"
	done
	printf '%-8s %-24s %s\n' vm "$kernel_package" "kernel of the test machine (unpacked from backports, not installed)"
	printf '%-8s %-24s %s\n' vm udev "udevd of the test machine (unpacked, not installed)"
	exit 0
fi

wanted() { local p; for p in "${purposes[@]}"; do [ "$p" = "$1" ] && return 0; done; return 1; }

check_go || exit 1

missing=() backports=() kernel= udev=
while read -r purpose package proof why; do
	[ -n "$purpose" ] && wanted "$purpose" || continue
	if [ "$package" = qemu-system-x86 ]; then
		qemu_good || { backports+=("$package"); say "missing: $package 10 or later ($why)"; }
	elif [ ! -e "$proof" ]; then
		missing+=("$package")
		say "missing: $package ($why)"
	fi
done <<<"$packages"
if wanted vm && ! kernel_there; then
	kernel=yes
	say "missing: $kernel_package of backports, to be unpacked into $kernel_dir (kernel of the test machine)"
fi
if wanted vm && ! udev_there; then
	udev=yes
	say "missing: udev, to be unpacked into $udev_dir (udevd of the test machine)"
fi

if [ $mode = check ]; then
	[ ${#missing[@]} -eq 0 ] && [ ${#backports[@]} -eq 0 ] && [ -z "$kernel$udev" ]
	exit
fi

failed=()
if [ ${#missing[@]} -gt 0 ]; then
	install_packages "${missing[@]}" || failed+=("${missing[*]}")
fi
if [ ${#backports[@]} -gt 0 ] || [ -n "$kernel" ]; then
	if backports_enable; then
		if [ ${#backports[@]} -gt 0 ]; then
			install_packages "${backports[@]}" && qemu_good || failed+=("qemu-system-x86 >= 10")
		fi
		if [ -n "$kernel" ]; then
			kernel_fetch || failed+=("$kernel_package")
		fi
	else
		failed+=("$backports_suite")
	fi
fi
if [ -n "$udev" ]; then
	{ udev_there || { apt_update && udev_fetch; }; } || failed+=(udev)
fi
for f in ${failed+"${failed[@]}"}; do
	say "could not be had: $f"
done

# What the machine itself must offer. Nothing can be installed for these: say what is skipped.
if wanted runtime || wanted tests; then
	capabilities
fi
if wanted vm && ! { qemu_good && kernel_there && [ -x /bin/busybox ]; }; then
	say "SKIPPED: every test that needs a real kernel (no test machine: QEMU 10, $kernel_package and busybox-static are needed)"
fi
exit 0
