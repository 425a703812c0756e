# Functions of setup.sh: Go, packages, backports, the test kernel, what the machine can do.
# Sourced, not run. Everything here is idempotent.

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

kernel_package=linux-image-cloud-amd64

# The cache outlives a checkout: the kernel is 30 MB to fetch and 110 MB unpacked.
if [ -n "${MICA_CACHE:-}" ]; then
	cache_dir=$MICA_CACHE
elif [ "$(id -u)" = 0 ]; then
	cache_dir=/var/cache/mica
else
	cache_dir=${XDG_CACHE_HOME:-$HOME/.cache}/mica
fi
kernel_dir=$cache_dir/kernel
udev_dir=$cache_dir/udev

# check_go: is there a Go that builds this module?
check_go() {
	local module want have
	module=$here/../go.mod
	want=$(sed -n 's/^go \([0-9.]*\).*/\1/p' "$module" 2>/dev/null)
	if ! command -v go >/dev/null; then
		say "Go is missing: install Go $want (https://go.dev/doc/install) and put it in PATH."
		say "Any Go from 1.21 on will do where the Go module proxy can be reached: go.mod names $want, and"
		say "the go command then fetches that toolchain by itself (GOTOOLCHAIN=auto, its default)."
		return 1
	fi
	# GOTOOLCHAIN=local: what is installed, without starting a download here.
	have=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null)
	have=${have#go}
	if [ -n "$want" ] && [ "$(printf '%s\n%s\n' "$want" "${have%%[!0-9.]*}" | sort -V | head -n 1)" != "$want" ]; then
		say "Go $have is installed, go.mod needs $want: the go command fetches that toolchain (GOTOOLCHAIN=auto)."
	fi
	return 0
}

root_or_sudo() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
		sudo "$@"
	else
		return 1
	fi
}

can_be_root() { root_or_sudo true; }

# apt_update: fetch the package lists, once a run.
apt_updated=
apt_update() {
	[ -n "$apt_updated" ] && return 0
	root_or_sudo apt-get -qq -o DPkg::Lock::Timeout=120 update >/dev/null || {
		say "apt-get update failed: no network, or no mirror that answers"
		return 1
	}
	apt_updated=yes
}

# install_packages PACKAGE...: with apt, from whatever the machine's sources and pins say.
install_packages() {
	if ! command -v apt-get >/dev/null; then
		say "this is no Debian: install by hand what provides: $*"
		return 1
	fi
	can_be_root || { say "not root and no sudo: cannot install: $*"; return 1; }
	say "installing: $*"
	apt_update || return 1
	local log
	log=$(mktemp)
	if ! root_or_sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
		-o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confold install "$@" >"$log" 2>&1; then
		tail -n 15 "$log" >&2
		rm -f "$log"
		return 1
	fi
	rm -f "$log"
}

# qemu_good: QEMU 10 or later. QEMU 7.2 of bookworm miscompiles: half of the boots end in an oops.
qemu_good() {
	local v
	v=$(qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/.*version \([0-9]*\).*/\1/p')
	[ "${v:-0}" -ge 10 ]
}

# --- backports -------------------------------------------------------------------------------

release=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}")
backports_suite=$release-backports
backports_source=/etc/apt/sources.list.d/mica-backports.sources
backports_pin=/etc/apt/preferences.d/mica-backports
backports_marker='# Written by mica scripts/setup.sh for its test machine. Safe to delete.'

# backports_known: does apt know the suite already (through us or through the machine's own file)?
backports_known() {
	apt-get indextargets --format '$(SUITE) $(CODENAME)' 'Created-By: Packages' 2>/dev/null |
		grep -q -w -- "$backports_suite" && return 0
	return 1
}

# debian_entry: the machine's own entry for the release as a deb822 stanza of backports, on
# standard output. It keeps URIs, signing key and options, and takes Suites away.
debian_entry() {
	local f
	for f in /etc/apt/sources.list.d/*.sources; do
		[ -f "$f" ] && [ "$f" != "$backports_source" ] || continue
		awk -v release="$release" -v suite="$backports_suite" '
			BEGIN { RS = ""; FS = "\n" }
			{
				found = 0; out = ""; keep = 0; types = 0; off = 0
				for (i = 1; i <= NF; i++) {
					line = $i
					if (line ~ /^#/) continue
					if (line ~ /^[ \t]/) { if (keep) out = out line "\n"; continue }
					keep = 0
					split(line, kv, ":"); key = tolower(kv[1])
					if (key == "suites") { n = split(substr(line, 8), s, /[ \t]+/); for (j = 1; j <= n; j++) if (s[j] == release) found = 1 }
					else if (key == "types") { if (line ~ /(^|[ \t:])deb($|[ \t])/) types = 1 }
					else if (key == "enabled") { if (tolower(line) ~ /no|false/) off = 1 }
					else if (key != "components") { keep = 1; out = out line "\n" }
				}
				if (found && types && !off) { printf "Types: deb\nSuites: %s\nComponents: main\n%s", suite, out; exit 0 }
			}' "$f" | grep . && return 0
	done
	for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
		[ -f "$f" ] || continue
		# deb [options] URI SUITE COMPONENTS...
		sed -n 's/^deb[ \t]\+//p' "$f" | awk -v release="$release" -v suite="$backports_suite" '
			{
				opts = ""
				if (match($0, /^\[[^]]*\][ \t]*/)) { opts = substr($0, 2, RLENGTH - 2); sub(/\][ \t]*$/, "", opts); $0 = substr($0, RLENGTH + 1) }
				if ($2 != release) next
				printf "Types: deb\nSuites: %s\nComponents: main\nURIs: %s\n", suite, $1
				if (match(opts, /signed-by=[^ \t]+/)) print "Signed-By: " substr(opts, RSTART + 10, RLENGTH - 10)
				if (opts ~ /trusted=yes/) print "Trusted: yes"
				exit 0
			}' | grep . && return 0
	done
	return 1
}

# write_file FILE: standard input becomes FILE, as root, if it differs.
write_file() {
	local text
	text=$(cat)
	[ "$(cat "$1" 2>/dev/null)" = "$text" ] && return 0
	apt_updated=
	echo "$text" | root_or_sudo tee "$1" >/dev/null
}

# backports_enable: make apt know the suite, and take nothing from it but QEMU and its firmware.
backports_enable() {
	[ -n "$release" ] && command -v apt-get >/dev/null || {
		say "no Debian release here: QEMU 10 and a test kernel must be provided by hand"
		return 1
	}
	if ! can_be_root; then
		backports_known && return 0 # the kernel can still be downloaded and unpacked
		say "not root and no sudo: cannot enable $backports_suite"
		return 1
	fi
	local entry rest=
	if [ -f "$backports_source" ] || ! backports_known; then
		entry=$(debian_entry) || {
			say "no source entry for $release in /etc/apt: cannot derive one for $backports_suite"
			return 1
		}
		say "$backports_suite is enabled by $backports_source and pinned: only QEMU comes from it"
		write_file "$backports_source" <<<"$backports_marker
$entry" || return 1
		# 10: below every other source.
		rest="
Package: *
Pin: release n=$backports_suite
Pin-Priority: 10"
	fi
	write_file "$backports_pin" <<<"$backports_marker
Package: src:qemu src:seabios
Pin: release n=$backports_suite
Pin-Priority: 990
$rest" || return 1
	apt_update
}

# --- the kernel of the test machine ------------------------------------------------------------

# kernel_there: unpacked completely? The marker is written last.
kernel_there() { [ -s "$kernel_dir/version" ] && [ -s "$kernel_dir/vmlinuz" ]; }

# kernel_fetch: download the newest cloud kernel of backports and unpack it into $kernel_dir as
# vmlinuz, modules/ and version. Needs no root, only package lists.
kernel_fetch() {
	local tmp deb real version
	real=$(apt-cache show "$kernel_package/$backports_suite" 2>/dev/null |
		sed -n 's/^Depends:.*\(linux-image-[0-9][^ ,]*\).*/\1/p' | head -n 1)
	[ -n "$real" ] || { say "apt does not know $kernel_package in $backports_suite"; return 1; }
	say "fetching $real"
	mkdir -p "$cache_dir" && tmp=$(mktemp -d "$cache_dir/kernel.XXXXXX") || return 1
	if (
		cd "$tmp" || exit 1
		chmod 755 . # apt drops to its own user for downloads where it can
		apt-get -qq -o APT::Sandbox::User=root download "$real/$backports_suite" 2>apt.log || { cat apt.log >&2; exit 1; }
		deb=$(ls linux-image-*.deb) || exit 1
		dpkg-deb -x "$deb" tree && rm "$deb" apt.log || exit 1
		version=$(ls tree/lib/modules 2>/dev/null || ls tree/usr/lib/modules) || exit 1
		mv tree/boot/vmlinuz-* vmlinuz || exit 1
		cp tree/boot/config-* config 2>/dev/null
		mv tree/lib/modules/"$version" modules 2>/dev/null || mv tree/usr/lib/modules/"$version" modules || exit 1
		rm -rf tree
		echo "$version" >version
	); then
		rm -rf "$kernel_dir" && mv "$tmp" "$kernel_dir" && return 0
	fi
	rm -rf "$tmp"
	say "$real could not be downloaded and unpacked"
	return 1
}

udev_there() { [ -x "$udev_dir/bin/udevadm" ] && [ -d "$udev_dir/rules.d" ]; }

# udev_fetch: download this release's udev and unpack it into $udev_dir as bin/udevadm and rules.d/. It
# is not installed: it would start to manage this machine's devices.
udev_fetch() {
	local tmp
	say "fetching udev"
	mkdir -p "$cache_dir" && tmp=$(mktemp -d "$cache_dir/udev.XXXXXX") || return 1
	if (
		cd "$tmp" || exit 1
		chmod 755 .
		apt-get -qq -o APT::Sandbox::User=root download udev 2>apt.log || { cat apt.log >&2; exit 1; }
		dpkg-deb -x udev_*.deb tree && rm udev_*.deb apt.log || exit 1
		mkdir bin && cp -L tree/bin/udevadm bin/udevadm 2>/dev/null || cp -L tree/usr/bin/udevadm bin/udevadm || exit 1
		mv tree/lib/udev/rules.d rules.d 2>/dev/null || mv tree/usr/lib/udev/rules.d rules.d || exit 1
		rm -rf tree
	); then
		rm -rf "$udev_dir" && mv "$tmp" "$udev_dir" && return 0
	fi
	rm -rf "$tmp"
	say "udev could not be downloaded and unpacked"
	return 1
}

# --- what the machine can do -----------------------------------------------------------------

# has_capability BIT: is it in this process's effective set?
has_capability() {
	local caps
	caps=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status 2>/dev/null)
	[ -n "$caps" ] && [ $((0x$caps >> $1 & 1)) = 1 ]
}

# capabilities: one line for each thing that is not there, with what is skipped for it.
capabilities() {
	if [ "$(id -u)" != 0 ]; then
		say "SKIPPED: not root: everything that mounts (FUSE and loop exports, layers, containers), and the demo"
	elif ! has_capability 21; then
		say "SKIPPED: no CAP_SYS_ADMIN (an unprivileged container): everything that mounts, and the demo"
	fi
	[ -c /dev/fuse ] || modprobe -q fuse 2>/dev/null
	[ -c /dev/fuse ] || say "SKIPPED: no /dev/fuse (in a container: --device /dev/fuse): FUSE exports, layers, containers"
	[ -c /dev/loop-control ] || modprobe -q loop 2>/dev/null
	[ -c /dev/loop-control ] || say "SKIPPED: no /dev/loop-control (modprobe loop): block devices over FUSE, layers, containers"
	local fs
	for fs in ext4 xfs; do
		grep -q -w $fs /proc/filesystems || modprobe -q $fs 2>/dev/null ||
			say "note: this kernel has no $fs: thin devices with $fs cannot be mounted"
	done
	return 0
}
