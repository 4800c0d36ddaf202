//! Overlays: a disk with `cow=` holds what was written to it, its source is never touched, other programs read the chain,
//! and a commit may stop anywhere.

mod commit;
mod folder;
mod interrupted;
mod mounts;
mod pair;
mod refusals;
mod sources;

use std::path::Path;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
