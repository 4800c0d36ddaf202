//! The hostile files: damaged, contradictory or malicious ones, with what must become of them.

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

/// What must become of a hostile file. It must never crash or hang, nor take memory without bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// Opening must fail, quickly.
    Reject,
    /// Opening may fail. If it does not, damaged parts must not read as if they were good.
    Eio {
        /// Bytes of the disk whose reading, all of them in one go, must fail (parts of them may be readable).
        /// What lies outside reads as [`Bad::content`] where that is given. `None`: nothing need fail.
        damaged: Option<Range<u64>>,
    },
    /// Opening must fail unless the caller allows the folders of [`Bad::allow_dirs`].
    Policy,
    /// Opening may fail; if it does not, the disk must read as [`Bad::content`] where that is given.
    Warn,
}

/// A hostile file that was made.
#[derive(Clone)]
pub struct Bad {
    /// The file to open.
    pub open: PathBuf,
    /// Folders that lift the policy; empty where nothing can lift it.
    pub allow_dirs: Vec<PathBuf>,
    /// What a reader must see if it shows the disk at all (outside of the damage); `None`: that is not defined.
    pub content: Option<Arc<dyn Content>>,
}

impl Bad {
    /// A file with nothing good in it.
    pub fn new(open: PathBuf) -> Self {
        Self {
            open,
            allow_dirs: Vec::new(),
            content: None,
        }
    }

    /// A file that reads as `content` outside of the damage.
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

/// A hostile file that can be made.
#[derive(Debug, Clone)]
pub struct Hostile {
    /// Its name, also that of its folder.
    pub name: &'static str,
    /// What is wrong with it.
    pub note: &'static str,
    /// What must become of it.
    pub expect: Expect,
    /// Writes it into an empty folder.
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

    /// Writes it into a new folder of its name below `under`.
    pub fn make(&self, under: &Path, seed: u64) -> Result<Bad> {
        let build = || (self.build)(&Ctx::new(&under.join(self.name), seed)?);
        build().with_context(|| format!("making hostile file {}", self.name))
    }
}

/// All hostile files.
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
