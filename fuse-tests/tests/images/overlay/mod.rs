//! Overlays: a disk with `cow=` keeps every write, its source is never written, qemu reads the chain of overlay and
//! base, and a commit may be interrupted at any moment.

mod commit;
mod folder;
mod interrupted;
mod mounts;
mod pair;
mod refusals;
mod sources;
mod unfinished;

use std::path::Path;

/// Returns a path as a string.
fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
