#!/bin/bash
# Runs every fuzz target for a while: scripts/fuzz-short.sh [TIME [PATTERN]]
#
#   TIME     for each target, 10s if it is not given; -l only lists the targets
#   PATTERN  only targets "FOLDER NAME" that match this extended regular expression
#
# What a target finds is kept in its folder's testdata/fuzz, and runs as an ordinary test from then
# on. Every `make test` runs the same properties on mutated seeds (package internal/mutate);
# MICA_MUTATIONS=N makes N times as many of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
time=${1:-10s}
pattern=${2:-.}
found=0
failed=()
while read -r folder target; do
	found=$((found + 1))
	if [ "$time" = -l ]; then
		echo "$folder $target"
		continue
	fi
	echo "fuzz $folder $target for $time"
	go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" ${FUZZFLAGS:-} "./$folder" || failed+=("$folder $target")
done < <(git ls-files '*_test.go' | xargs -r grep -HoE '^func Fuzz[A-Za-z0-9_]+' |
	sed -E 's|^(.*)/[^/]*:func |\1 |' | sort | grep -E -- "$pattern")
[ "$time" = -l ] && exit
if [ ${#failed[@]} -gt 0 ]; then
	printf 'failed: %s\n' "${failed[@]}"
	exit 1
fi
[ "$found" -gt 0 ] || { echo "no fuzz target matches $pattern" >&2; exit 1; }
echo "$found fuzz targets ran for $time each"
