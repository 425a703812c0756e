#!/bin/bash
# build-image.sh OUTDIR: builds the demo's image from the distribution's packages, on the mirror
# that this machine is configured for. Three layers:
#
#   1  a minimal Debian, by mmdebstrap
#   2  sqlite3 added, by apt inside it
#   3  files changed, replaced and deleted, and one large file
#
# Leaves OUTDIR/image.tar (an OCI archive) and OUTDIR/big-file (the large file's path in the
# image). What is there already from the same script and suite is kept. Needs root, mmdebstrap
# and Go; about 30 seconds the first time, and 1 GiB in OUTDIR while it works.
set -euo pipefail
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

big_file=var/lib/demo/measurements.txt
big_mib=128

out=${1:?usage: build-image.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { echo "image: $*"; }
die() { echo "image: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "needs root (a root file system has owners and devices)"
command -v mmdebstrap >/dev/null || die "needs mmdebstrap: apt-get install mmdebstrap"

suite=$(. /etc/os-release; [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-}")
suite=${suite:-bookworm}

key=$(sha256sum <"${BASH_SOURCE[0]}" | cut -c1-64)-$suite-$(dpkg --print-architecture)
if [ "$(cat "$out/key" 2>/dev/null)" = "$key" ] && [ -s "$out/image.tar" ] && [ -s "$out/big-file" ]; then
	say "$out/image.tar is there already"
	exit 0
fi
rm -f "$out/key"

# The mirror that apt uses here for the suite, and its proxy.
mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
	awk -v s="$suite" '$1 == s && $2 == "main" { print $3; exit }')
case $mirror in
mirror+file:*) mirror=$(awk '$1 ~ /^https?:/ { print $1; exit }' "${mirror#mirror+file:}") ;;
esac
[ -n "$mirror" ] || die "apt has no source for $suite main on this machine"
proxy=()
for scheme in http https; do
	p=$(apt-config dump --format '%v' "Acquire::$scheme::Proxy" 2>/dev/null || true)
	[ -z "$p" ] || proxy+=(--aptopt="Acquire::$scheme::Proxy \"$p\"")
done

work=$(mktemp -d "$out/work.XXXXXX")
clean_up() {
	# Nothing should be mounted below; if an interrupted mmdebstrap left something, it goes first.
	awk -v w="$work/" 'index($5, w) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r m; do
		umount -l "$(printf '%b' "$m")" || true
	done
	rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

say "layer 1: a minimal $suite from $mirror"
# No file system in between that refuses devices or setuid files.
if ! mmdebstrap --quiet --variant=minbase --skip=cleanup/apt "${proxy[@]}" \
	"$suite" "$work/1" "deb $mirror $suite main" >"$work/log" 2>&1; then
	tail -n 20 "$work/log" >&2
	die "mmdebstrap failed"
fi

say "layer 2: sqlite3"
cp -a --reflink=auto "$work/1" "$work/2"
printf '#!/bin/sh\nexit 101\n' >"$work/2/usr/sbin/policy-rc.d" && chmod 755 "$work/2/usr/sbin/policy-rc.d"
if ! chroot "$work/2" apt-get -qq -y --no-install-recommends install sqlite3 >"$work/log" 2>&1 </dev/null; then
	tail -n 20 "$work/log" >&2
	die "installing sqlite3 failed"
fi
rm "$work/2/usr/sbin/policy-rc.d"
touch -r "$work/1/usr/sbin" "$work/2/usr/sbin"
for root in "$work/1" "$work/2"; do
	chroot "$root" apt-get clean
	rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/log/apt "$root"/var/log/*.log "$root"/etc/resolv.conf
done

say "layer 3: files changed, replaced and deleted, and $big_file of $big_mib MiB"
cp -a --reflink=auto "$work/2" "$work/3"
(
	cd "$work/3"
	rm -rf usr/share/doc usr/share/man usr/share/locale usr/share/info      # deleted directories
	mkdir usr/share/doc && echo "the packages' documents were left out" >usr/share/doc/README  # one that was replaced
	echo 'a Debian with sqlite3, made for the demo of mica' >etc/motd                         # a changed file
	rm etc/issue.net && ln -s issue etc/issue.net                          # a file becomes a link
	ln usr/bin/sqlite3 usr/local/bin/sql                                    # a second name for a file of layer 2
	chmod 750 root && chown root:adm etc/motd
	mkdir -p "$(dirname "$big_file")"
	# Every line is different, so that no two blocks are equal; it still compresses well.
	{ seq -f 'measurement %012.0f: 42.5 degrees' 1 99999999 || true; } | head -c "${big_mib}M" >"$big_file"
)

say "packing"
(cd "$here/.." && go run ./internal/cmd/mkimage -o "$out/image.tar" -name demo:latest -cmd /bin/bash "$work/1" "$work/2" "$work/3") | sed 's/^/image: /'
echo "/$big_file" >"$out/big-file"
echo "$key" >"$out/key"
say "$out/image.tar: $(du -h "$out/image.tar" | cut -f1) in three layers"
