#!/bin/bash
# Takes away what the demo made: its daemon, mounts, pool and cached image. Packages stay.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache=${MICA_DEMO_CACHE:-.cache/demo}
dir=${MICA_DEMO_DIR:-/var/tmp/mica-demo}

# Mounts below the directory, the deepest first.
unmount() {
	awk -v d="$dir/" 'index($5, d) == 1 && $0 !~ / - fuse/ { print $5 }' /proc/self/mountinfo | sort -r |
		while read -r m; do umount "$m"; done
}

if [ -d "$dir" ]; then
	unmount
	MICA_RUN=$dir/run bin/mica shutdown 2>/dev/null || true
	# What an interrupted demo left: processes that were started for this directory, by their id.
	for p in /proc/[0-9]*; do
		if tr '\0' '\n' <"$p/cmdline" 2>/dev/null | grep -qxE "$dir|$dir/run|$dir/run/.*"; then
			exe=$(readlink "$p/exe" 2>/dev/null)
			case $exe in */mica | */mica\ *) kill "${p#/proc/}" 2>/dev/null ;; esac
		fi
	done
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		grep -q " $dir/" /proc/self/mountinfo || break
		sleep 0.3
	done
	for loop in /sys/block/loop*/loop/backing_file; do
		[ -e "$loop" ] || continue
		case $(cat "$loop") in "$dir"/*) n=${loop#/sys/block/}; losetup -d "/dev/${n%%/*}" ;; esac
	done
	awk -v d="$dir/" 'index($5, d) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r m; do umount -l "$m"; done
	rm -rf --one-file-system "$dir" && echo "removed $dir"
fi
if [ -d "$cache" ]; then
	rm -rf "$cache" && echo "removed $cache"
fi
exit 0
