//! Valid variants: each must read exactly as its model.

mod chain;
mod delta;
pub(super) mod sparse;
mod split;
mod stream;
mod text;

use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result};

use super::ctx::{Ctx, Made};

pub(super) use delta::sesparse_disk;

/// A valid disk that can be written.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    /// Name of the variant and of its folder.
    pub name: &'static str,
    /// Description of its unusual form.
    pub note: &'static str,
    /// Writes the disk into an empty folder.
    pub build: fn(&Ctx) -> Result<Made>,
}

impl Variant {
    const fn new(name: &'static str, note: &'static str, build: fn(&Ctx) -> Result<Made>) -> Self {
        Self { name, note, build }
    }

    /// Writes the disk into a new folder of its name below `under`.
    pub fn make(&self, under: &Path, seed: u64) -> Result<Made> {
        let build = || (self.build)(&Ctx::new(&under.join(self.name), seed)?);
        build().with_context(|| format!("creating variant {}", self.name))
    }
}

/// Returns all valid variants.
pub fn valid() -> &'static [Variant] {
    static ALL: LazyLock<Vec<Variant>> = LazyLock::new(|| {
        [
            delta::VARIANTS,
            sparse::VARIANTS,
            stream::VARIANTS,
            split::VARIANTS,
            text::VARIANTS,
            chain::VARIANTS,
        ]
        .concat()
    });
    &ALL
}
