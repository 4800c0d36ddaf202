#!/usr/bin/env bash
# Builds the program as a distribution does: from vendored crates, without network and without the caller's cargo folder.
# Called by `make vendor-test`. Then packs both crates as a registry gets them.
set -euo pipefail
source=$(cd "${0%/*}/../.." && pwd)
mkdir -p "$1"
work=$(mktemp -d "$1/vendor-test.XXXXXX")
trap 'rm -rf "$work"' EXIT
say() { printf 'vendor-test: %s\n' "$*"; }
# Files of the last commit: what a tarball of the release has.
git -C "$source" archive --prefix=vmdkfuse/ HEAD | tar -x -C "$work"
cd "$work/vmdkfuse"
say 'vendor'
mkdir .cargo
cargo vendor --locked vendor >.cargo/config.toml 2>vendor.log || { cat vendor.log >&2; exit 1; }
say 'build without network'
# Without privileges to create a network namespace, --offline alone keeps cargo from the network.
if unshare -n true 2>/dev/null; then alone=(unshare -n); else alone=(); fi
env -u CARGO_TARGET_DIR CARGO_HOME="$work/home" "${alone[@]}" \
  cargo build --release --offline --frozen --quiet -p vmdkfuse -p vmware-bdwrapper
target/release/vmdkfuse --version
say 'packages for a registry'
cd "$source"
cargo package --quiet --locked --allow-dirty -p libnbd-sys -p vmdkfuse --list >"$work/list"
for file in README.md LICENSE CHANGELOG.md src/main.rs; do
  if ! grep -qx "$file" "$work/list"; then say "no package has $file"; exit 1; fi
done
cargo package --quiet --locked --allow-dirty -p libnbd-sys -p vmdkfuse --target-dir "$work/package"
say 'passed'
