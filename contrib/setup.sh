#!/usr/bin/env bash
# Installs the Debian packages that a part of this project needs and that are missing.
#
#   contrib/setup.sh demo|test|bench
#
# Only this step needs root: root calls apt-get directly, an ordinary user through sudo. If neither works, the script lists
# the packages and fails. It never removes a package: it simulates the installation first, and stops if apt would remove one.
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# Items are PACKAGE:COMMAND or PACKAGE:/FILE. A package counts as installed if dpkg lists it or the command or file exists.
# BUILD holds the packages that the build needs.
BUILD="gcc:cc libc6-dev:/usr/include/stdio.h"
DEMO="$BUILD fuse3:fusermount3 qemu-utils:qemu-img e2fsprogs:mkfs.ext4"
TEST="$DEMO man-db:man mandoc:mandoc bsdutils:script zsh:zsh fish:fish restic:restic qemu-system-x86:qemu-system-x86_64 systemd:systemd-analyze dpkg-dev:dpkg-shlibdeps lintian:lintian erofs-utils:fsck.erofs fio:fio python3:python3 procps:ps util-linux:losetup mount:mount guestfish:guestfish guestfs-tools:virt-filesystems KERNEL nbdkit:nbdkit nbdkit-plugin-dev:/usr/include/nbdkit-plugin.h libnbd-bin:nbdcopy libnbd-dev:/usr/include/libnbd.h nbd-server:nbd-server gnutls-bin:certtool xz-utils:xz hdparm:hdparm sg3-utils:sg_inq smartmontools:smartctl fdisk:sfdisk git:git autofs:automount nginx-light:nginx golang-go:go golang-github-vmware-govmomi-dev:/usr/share/gocode/src/github.com/vmware/govmomi golang-github-google-uuid-dev:/usr/share/gocode/src/github.com/google/uuid"
BENCH="$BUILD nbdkit:nbdkit fuse3:fusermount3 qemu-utils:qemu-nbd qemu-system-common:qemu-storage-daemon fio:fio python3:python3 libnbd-bin:nbdfuse libvmdk-utils:vmdkmount"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# Succeeds if a kernel image is readable and its modules are installed: guestfish boots an appliance that supermin builds of
# them.
kernel_is_there() {
  local image
  for image in /boot/vmlinu[xz]-*; do
    [[ -r $image && -d /lib/modules/${image#*/vmlinu?-} ]] && return 0
  done
  return 1
}

# Prints the missing packages of the items "$@", one per line.
missing() {
  local item
  for item in "$@"; do
    if [[ $item == KERNEL ]]; then
      kernel_is_there || printf 'linux-image-cloud-%s\n' "$(dpkg --print-architecture 2>/dev/null || echo amd64)"
    elif ! dpkg -s "${item%:*}" 2>/dev/null | grep -q '^Status: .* installed$' &&
      ! command -v "${item#*:}" >/dev/null && [[ ! -e ${item#*:} ]]; then
      printf '%s\n' "${item%:*}"
    fi
  done
}

as_root() { if [[ $(id -u) == 0 ]]; then "$@"; else sudo DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"; fi; }
apt() { as_root apt-get -q -o DPkg::Lock::Timeout=600 "${apt_options[@]}" "$@"; }

# guestfish depends on qemu-system-x86. If qemu-utils comes from backports, the emulator of the stable release conflicts with
# it, so the emulator has to come from backports too. $1 is a directory for additional files of apt.
follow_backports() {
  local version codename repo key option
  version=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true)
  [[ $version == *~bpo* ]] || return 0
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  say "qemu-utils $version is from backports: installing the emulator from backports too"
  cat /etc/apt/sources.list >"$1/sources.list" 2>/dev/null || true
  cat /etc/apt/preferences >"$1/preferences" 2>/dev/null || true
  if ! apt-get indextargets --format '$(CODENAME)' | grep -qx "$codename-backports"; then
    repo=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $codename" 'Created-By: Packages' | sed -n 1p)
    key=/usr/share/keyrings/debian-archive-keyring.gpg option=
    [[ ! -r $key ]] || option="[signed-by=$key] "
    echo "deb $option$repo $codename-backports main" >>"$1/sources.list"
  fi
  printf '\nPackage: qemu-system-* seabios\nPin: release n=%s-backports\nPin-Priority: 900\n' "$codename" >>"$1/preferences"
  chmod -R a+rX "$1"
  apt_options=(-o "Dir::Etc::sourcelist=$1/sources.list" -o "Dir::Etc::preferences=$1/preferences")
}

install() {
  local packages=("$@") plan
  command -v apt-get >/dev/null || die "apt-get not found; install the equivalents of: ${packages[*]}"
  if [[ $(id -u) != 0 ]]; then
    { command -v sudo >/dev/null && { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; } ||
      die "installing packages needs root, and sudo cannot be used here; run as root:
  apt-get install --no-install-recommends ${packages[*]}"
    say "installing packages needs root: using sudo"
  fi
  apt_options=()
  extra=$(mktemp -d)
  trap 'rm -rf "$extra"' EXIT
  [[ " ${packages[*]} " != *" guestfish "* ]] || follow_backports "$extra"
  apt update >/dev/null || say "apt-get update failed; continuing with the existing package lists"
  plan=$(apt install -s --no-install-recommends "${packages[@]}") ||
    die "apt-get cannot install: ${packages[*]}"$'\n'"$plan"
  ! grep -q '^Remv ' <<<"$plan" ||
    die "apt-get would remove packages, so nothing was installed:"$'\n'"$(grep '^Remv ' <<<"$plan")"
  apt install -y --no-install-recommends "${packages[@]}" >&2 ||
    die "apt-get install failed for: ${packages[*]}"
}

# Adds rustfmt and clippy, which rustup's minimal profile leaves out.
rust_components() {
  cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 && return
  command -v rustup >/dev/null || die "cargo fmt or cargo clippy is missing, and rustup is not installed; install rustfmt and clippy"
  rustup component add rustfmt clippy
}

case ${1:-} in
  demo) items=$DEMO ;;
  test) items=$TEST ;;
  bench) items=$BENCH ;;
  *) echo "usage: contrib/setup.sh demo|test|bench" >&2; exit 2 ;;
esac
command -v cargo >/dev/null || die "cargo not found in PATH: install a Rust toolchain first (1.89 or newer)"
# shellcheck disable=SC2086 # word splitting is intended
mapfile -t wanted < <(missing $items)
if ((${#wanted[@]})); then
  say "missing for '$1': ${wanted[*]}"
  install "${wanted[@]}"
  # shellcheck disable=SC2086
  mapfile -t wanted < <(missing $items)
  ((${#wanted[@]} == 0)) || die "still missing: ${wanted[*]}"
fi
[[ $1 != test ]] || rust_components
