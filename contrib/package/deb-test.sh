#!/usr/bin/env bash
# Installs the Debian package in a fresh, minimal Debian without build tools and without libnbd, uses it there, and purges
# it. Called by `make deb-test`; needs root, debootstrap, /dev/fuse and a mirror of Debian (DEBIAN_MIRROR).
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
out=$1
# Everything happens in a mount namespace that ends with this script, so no mount is left behind.
if [[ ${IN_NAMESPACE:-} != 1 ]]; then
  exec env IN_NAMESPACE=1 unshare -m --propagation private "$0" "$@"
fi
root=$(mktemp -d "$out/deb-test.XXXXXX")
clean() {
  chroot "$root" sh -c 'for m in /mnt/*; do umount -l "$m" 2>/dev/null || :; done' 2>/dev/null || :
  umount -R "$root/proc" "$root/dev" 2>/dev/null || :
  rm -rf --one-file-system "$root"
}
trap clean EXIT
say() { printf 'deb-test: %s\n' "$*"; }

say "a minimal Debian in $root"
debootstrap --variant=minbase bookworm "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$root.log" 2>&1 ||
  { tail -20 "$root.log" >&2; exit 1; }
rm -f "$root.log"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
in_root() { chroot "$root" "$@"; }
# All files but those that every installation of a package writes.
files() { in_root find / -xdev \( -path /var/cache -o -path /var/log -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /tmp -o -path /run \
  -o -path /etc/ld.so.cache -o -path /var/lib/systemd \) -prune -o -print | sort; }
cp "$out/vmdkfuse_$2_$(dpkg --print-architecture).deb" "$root/tmp/"
in_root apt-get -q update >/dev/null
in_root apt-get -q install -y --no-install-recommends fuse3 mount >/dev/null
files >"$out/deb-test.before"
say 'install'
in_root sh -c 'apt-get -q install -y --no-install-recommends /tmp/vmdkfuse_*.deb' >/dev/null
if in_root sh -c 'command -v cc || command -v cargo || ls /usr/lib/*/libnbd.so.0' 2>/dev/null; then
  say 'this system has build tools or libnbd: it shows nothing'; exit 1
fi

say 'create, mount, write, unmount'
in_root sh -eu <"${0%/*}/smoke.sh"
in_root sh -eu <<'WITHOUT'
vmdkfuse --dump | grep -q '^libnbd_error=.*libnbd0'
if vmdkfuse /mnt nbd://127.0.0.1:1/x 2>/tmp/error; then exit 1; fi
grep -q 'package libnbd0' /tmp/error
WITHOUT

say 'purge'
in_root apt-get -q purge -y vmdkfuse >/dev/null
files >"$out/deb-test.after"
diff "$out/deb-test.before" "$out/deb-test.after"
rm -f "$out/deb-test.before" "$out/deb-test.after"
say 'passed: nothing is left behind'
