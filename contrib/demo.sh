#!/usr/bin/env bash
# Demonstrates the program: creates a VMDK with a file system, mounts it, compares the raw file with the original, writes to
# it and unmounts it. Works as root and as an ordinary user. All files are in a temporary directory that is removed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LC_ALL=C PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:${HOME:-}/.cargo/bin

./contrib/setup.sh demo
bin=${VMDKFUSE_BIN:-${CARGO_TARGET_DIR:-target}/release/vmdkfuse}
bin=$(realpath -m "$bin")
cargo build --release --locked -p vmdkfuse -p vmware-bdwrapper

bold='' plain=''
if [[ -t 1 ]]; then bold=$'\033[1m' plain=$'\033[0m'; fi
step() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
# Prints a command as it is typed in a shell, then runs it.
run() {
  local word line='$'
  for word in "$@"; do
    if [[ $word == *' '* ]]; then line+=" '$word'"; else line+=" $word"; fi
  done
  printf '%s\n' "$line"
  "$@"
}
fail() { printf 'demo: %s\n' "$*" >&2; exit 1; }

[[ -c /dev/fuse ]] || fail "/dev/fuse not found: load the fuse module, or pass the device into the container"
dir=$(mktemp -d "${TMPDIR:-/tmp}/vmdkfuse-demo.XXXXXX")
cleanup() {
  cd /
  if mountpoint -q "$dir/mnt"; then fusermount3 -u -z "$dir/mnt" || true; fi
  rm -rf "$dir"
}
trap cleanup EXIT

step "Create a VMDK with a file system that holds two files"
mkdir "$dir/tree" "$dir/mnt"
echo "Hello from inside a VMDK" >"$dir/tree/hello.txt"
head -c 8M /dev/urandom >"$dir/tree/noise.bin"
cd "$dir"
run mkfs.ext4 -q -F -L demo -d tree original.raw 64M
run qemu-img convert -f raw -O vmdk -o subformat=monolithicSparse original.raw sample.vmdk
run ls -lh original.raw sample.vmdk

# Unmounts and waits for the daemon, which exits an instant after the unmount and holds its locks until then.
unmount() {
  local daemon
  daemon=$(<"$dir/pid")
  run fusermount3 -u mnt
  timeout 10 tail --pid="$daemon" -f /dev/null || fail "daemon $daemon did not exit within 10 seconds of the unmount"
  ! mountpoint -q mnt || fail "$dir/mnt is still mounted after the unmount"
}

step "Mount it read-only, so that other programs may read the image too"
PATH=$(dirname "$bin"):$PATH
run vmdkfuse -r -P "$dir/pid" mnt/ file=sample.vmdk
run ls -l mnt

step "Read it: the raw file is the disk, byte for byte"
run qemu-img convert -f vmdk -O raw sample.vmdk by-qemu.raw
run sha256sum mnt/sample.raw by-qemu.raw original.raw
[[ $(sha256sum <mnt/sample.raw) == "$(sha256sum <by-qemu.raw)" ]] || fail "the raw file differs from what qemu-img reads"
[[ $(sha256sum <mnt/sample.raw) == "$(sha256sum <original.raw)" ]] || fail "the raw file differs from the original"

step "List its file system (debugfs reads the raw file, which needs no root)"
run debugfs -R 'ls -l /' mnt/sample.raw
run debugfs -R 'cat /hello.txt' mnt/sample.raw
[[ $(debugfs -R 'cat /hello.txt' mnt/sample.raw 2>/dev/null) == "$(<tree/hello.txt)" ]] || fail "hello.txt reads differently"

step "Unmount it"
unmount
run ls -l mnt

step "Mount it again, and write a file into its file system"
run vmdkfuse -P "$dir/pid" mnt/ file=sample.vmdk
echo "Written through the raw file" >written.txt
run debugfs -w -R 'write written.txt written.txt' mnt/sample.raw
unmount

step "Read the new file from the VMDK with qemu-img"
run qemu-img check sample.vmdk
run qemu-img convert -f vmdk -O raw sample.vmdk by-qemu.raw
run debugfs -R 'cat /written.txt' by-qemu.raw
[[ $(debugfs -R 'cat /written.txt' by-qemu.raw 2>/dev/null) == "$(<written.txt)" ]] || fail "written.txt reads differently"

step "Everything matched."
