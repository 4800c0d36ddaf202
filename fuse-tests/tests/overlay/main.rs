//! Overlays: a disk with `cow=` holds what was written to it, its source is never touched, other programs read the chain,
//! and a commit may stop anywhere.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, in which a panic is the verdict"
)]

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
