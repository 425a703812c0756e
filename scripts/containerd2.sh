#!/bin/bash
# Builds the containerd that go.mod names (2.x; Debian 12 has 1.6) from its module, once, and prints the
# directory with its programs: containerd, ctr, containerd-shim-runc-v2. For the tests only: nothing is
# installed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"

check_go || exit 1
module=github.com/containerd/containerd/v2
version=$(cd "$here/.." && go list -m -f '{{.Version}}' "$module")
dir=$cache_dir/containerd-$version
programs='containerd ctr containerd-shim-runc-v2'
for p in $programs; do
	[ -x "$dir/$p" ] || missing=yes
done
if [ -n "${missing:-}" ]; then
	say "building containerd $version (some minutes, once)"
	mkdir -p "$cache_dir"
	tmp=$(mktemp -d "$dir.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	chmod 755 "$tmp"
	for p in $programs; do
		# Outside of this module, whose go.mod has other needs.
		(cd / && GOBIN=$tmp GOFLAGS= CGO_ENABLED=0 go install -trimpath \
			-ldflags "-s -w -X $module/version.Version=$version" "$module/cmd/$p@$version") >&2
	done
	rm -rf "$dir"
	mv "$tmp" "$dir"
	trap - EXIT
fi
echo "$dir"
