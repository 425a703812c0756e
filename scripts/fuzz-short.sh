#!/bin/bash
# Runs every fuzz target for a short while: scripts/fuzz-short.sh [TIME]   (default 10s each)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
time=${1:-10s}
found=0
while IFS=: read -r file target; do
	found=$((found + 1))
	echo "fuzz $(dirname "$file") $target for $time"
	go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "./$(dirname "$file")"
done < <(git ls-files '*_test.go' | xargs -r grep -HoE '^func Fuzz[A-Za-z0-9_]+' | sed 's/:func /:/')
echo "$found fuzz targets ran for $time each"
