#!/bin/bash
# The demo: builds a real image from the distribution's packages (cached), imports it, and walks
# through what a block-level storage driver does. See demo/walk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache=${MICA_DEMO_CACHE:-.cache/demo}
dir=${MICA_DEMO_DIR:-/var/tmp/mica-demo}

[ "$(id -u)" = 0 ] || { echo "demo: needs root (mounts, loop devices, FUSE)" >&2; exit 1; }
for node in /dev/fuse /dev/loop-control; do
	[ -e "$node" ] || { echo "demo: this machine has no $node: containers cannot become block devices here" >&2; exit 1; }
done
if [ -e "$dir" ]; then
	echo "demo: $dir is left over from an earlier run; taking it away" >&2
	MICA_DEMO_CACHE=/nonexistent demo/undemo.sh
fi

mkdir -p "$cache"
demo/build-image.sh "$cache"
go build -trimpath -o bin/demo ./demo/walk
bin/demo -mica "$PWD/bin/mica" -image "$cache/image.tar" -big "$(cat "$cache/big-file")" -dir "$dir"
rm -rf --one-file-system "$dir"
