//! Hostile files: damaged, contradictory or malicious, each with the result that a reader must give.

mod chain;
mod delta;
mod header;
mod stream;
mod tables;
mod text;

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result};

use super::ctx::{Ctx, Good};
use super::model::Content;

/// Required result for a hostile file. No file may crash or hang the reader, or make it use unbounded memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// Opening must fail, quickly.
    Reject,
    /// Opening may fail. If it succeeds, damaged parts must not read as valid data.
    Eio {
        /// Byte range that must fail when it is read in one request (parts of it may be readable). Bytes outside of it
        /// read as [`Bad::content`] if that is given. `None`: no read has to fail.
        damaged: Option<Range<u64>>,
    },
    /// Opening must fail unless the caller allows the folders of [`Bad::allow_dirs`].
    Policy,
    /// Opening may fail; if it succeeds, the disk must read as [`Bad::content`] if that is given.
    Warn,
}

/// A hostile file that was written.
#[derive(Clone)]
pub struct Bad {
    /// The file to open.
    pub open: PathBuf,
    /// Folders that must be allowed to open it; empty if it must not open at all.
    pub allow_dirs: Vec<PathBuf>,
    /// Content that a reader must return outside of the damage if it opens the disk; `None`: undefined.
    pub content: Option<Arc<dyn Content>>,
}

impl Bad {
    /// Creates a file without defined content.
    pub fn new(open: PathBuf) -> Self {
        Self {
            open,
            allow_dirs: Vec::new(),
            content: None,
        }
    }

    /// Creates a file that reads as `content` outside of the damage.
    pub fn holding(open: PathBuf, content: Arc<dyn Content>) -> Self {
        Self {
            content: Some(content),
            ..Self::new(open)
        }
    }
}

impl From<Good> for Bad {
    fn from(good: Good) -> Self {
        Self::holding(good.path, Arc::new(good.layer))
    }
}

impl fmt::Debug for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bad")
            .field("open", &self.open)
            .field("allow_dirs", &self.allow_dirs)
            .finish_non_exhaustive()
    }
}

/// A hostile file that can be written.
#[derive(Debug, Clone)]
pub struct Hostile {
    /// Name of the file's variant and of its folder.
    pub name: &'static str,
    /// Description of its defect.
    pub note: &'static str,
    /// Required result.
    pub expect: Expect,
    /// Writes the file into an empty folder.
    pub build: fn(&Ctx) -> Result<Bad>,
}

impl Hostile {
    const fn reject(name: &'static str, note: &'static str, build: fn(&Ctx) -> Result<Bad>) -> Self {
        Self {
            name,
            note,
            expect: Expect::Reject,
            build,
        }
    }

    const fn eio(
        name: &'static str,
        note: &'static str,
        damaged: Option<Range<u64>>,
        build: fn(&Ctx) -> Result<Bad>,
    ) -> Self {
        Self {
            name,
            note,
            expect: Expect::Eio { damaged },
            build,
        }
    }

    const fn policy(name: &'static str, note: &'static str, build: fn(&Ctx) -> Result<Bad>) -> Self {
        Self {
            name,
            note,
            expect: Expect::Policy,
            build,
        }
    }

    const fn warn(name: &'static str, note: &'static str, build: fn(&Ctx) -> Result<Bad>) -> Self {
        Self {
            name,
            note,
            expect: Expect::Warn,
            build,
        }
    }

    /// Writes the file into a new folder of its name below `under`.
    pub fn make(&self, under: &Path, seed: u64) -> Result<Bad> {
        let build = || (self.build)(&Ctx::new(&under.join(self.name), seed)?);
        build().with_context(|| format!("creating hostile file {}", self.name))
    }
}

/// Returns all hostile files.
pub fn hostile() -> &'static [Hostile] {
    static ALL: LazyLock<Vec<Hostile>> = LazyLock::new(|| {
        [
            header::FILES,
            tables::FILES,
            text::FILES,
            chain::FILES,
            stream::FILES,
            delta::FILES,
        ]
        .concat()
    });
    &ALL
}
