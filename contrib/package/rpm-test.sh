#!/usr/bin/env bash
# Installs the RPM in a copy of this system that is thrown away, uses it there, and erases it. Called by `make rpm-test`; needs
# root, rpm and /dev/fuse. The copy is an overlay of /, in which nothing but the package and its use leave files.
set -euo pipefail
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
package=$1
# Everything happens in a mount namespace that ends with this script, so no mount is left behind.
if [[ ${IN_NAMESPACE:-} != 1 ]]; then
  exec env IN_NAMESPACE=1 unshare -m --propagation private "$0" "$@"
fi
base=$(mktemp -d)
root=$base/root changes=$base/tmp/changes
clean() {
  for mount in "$root"/mnt/*; do umount -l "$mount" 2>/dev/null || :; done
  umount -R -l "$root" "$base/tmp" 2>/dev/null || :
  rm -rf --one-file-system "$base"
}
trap clean EXIT
say() { printf 'rpm-test: %s\n' "$*"; }
mkdir "$root" "$base/tmp"
mount -t tmpfs none "$base/tmp"
mkdir "$changes" "$base/tmp/work"
mount -t overlay overlay -o "lowerdir=/,upperdir=$changes,workdir=$base/tmp/work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs none "$root/run"
mount -t tmpfs none "$root/tmp"
rpm_in_root() { rpm --root "$root" --dbpath /tmp/rpmdb "$@"; }
# All files and folders that the copy has and this system has not, or that differ. What ldconfig and a shell write is no part.
changed() {
  find "$changes" -mindepth 1 -printf '%P\n' | sort | while read -r name; do
    # A device in place of a folder: it was empty, and the package owned it together with others that this database lacks.
    if [[ -d /$name && (-d $changes/$name || -c $changes/$name) ]]; then continue; fi
    case $name in etc/ld.so.cache | var/cache/ldconfig* | root/.*) continue ;; esac
    printf '%s\n' "/$name"
  done
}

say install
rpm_in_root --initdb
rpm_in_root -i --nodeps "$package"
rpm_in_root -V --nodeps vmdkfuse
changed >"$base/installed"
rpm_in_root -ql vmdkfuse | while read -r name; do
  [[ -e $root/$name || -L $root/$name ]] || { say "missing: $name"; exit 1; }
done
if ! grep -q '/mount.vmdkfuse$' "$base/installed"; then say 'no helper of mount(8)'; exit 1; fi

say 'create, mount, write, unmount'
chroot "$root" sh -eu <"${0%/*}/smoke.sh"

say erase
rpm_in_root -e vmdkfuse
left=$(changed)
if [[ -n $left ]]; then
  printf 'rpm-test: left behind:\n%s\n' "$left" >&2
  exit 1
fi
say 'passed: nothing is left behind'
