//! Sources: where the sectors of a disk come from. Each back end is a folder here, and one line in `volume/open.rs`.
//!
//! ```text
//!   settings (config) ─ Backend: opens, creates, lists ─► Source: an open one ─ disk ─► BlockRead
//! ```
//! | folder | settings | opens |
//! | --- | --- | --- |
//! | `local/` | `LocalConfig` | VMDKs and raw images in local files, disks in a package |
//! | `https/` | `HttpsConfig` | the same on a web server |
//! | `nbd/` | `NbdConfig` | exports of NBD servers |
//! | `vddk/` | `VddkConfig` | disks that VMware's library opens, in a process of its own that is an NBD server |
//!
//! The layers above know the two traits alone; `overlay/commit.rs` opens local files itself. `image.rs` is the part that `local/` and `https/` share: stored files
//! that the engine or `raw.rs` reads.

mod export_name;
pub(crate) mod format;
mod https;
mod image;
mod listing;
pub(crate) mod local;
pub mod nbd;
pub mod nbd_uri;
mod raw;
pub(crate) mod sample;
mod server_info;
pub mod vddk;

use std::any::Any;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

pub use export_name::{export_file_name, export_file_names};
pub use listing::{Listed, Listing};
pub use nbd::{ExportCatalog, FoundExport};
pub use raw::RawDisk;
pub use server_info::{ExportInfo, ServerInfo};

use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::cache::disk_tier::KeptFile;
use crate::config::{DiskConfig, Locality, SourceConfig, SourceSettings};
use crate::error::{Error, Result};
use crate::store::StoredFile;
use crate::vmdk::{CheckReport, DiskInfo};

/// Sizes that the user asks of a cache, in bytes. `None`: the default of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheSizes {
    /// Memory (`cache-size=`).
    pub size: Option<u64>,
    /// Read-ahead (`readahead=`).
    pub readahead: Option<u64>,
}

impl CacheSizes {
    /// Returns the sizes that a disk asks for.
    pub fn of(config: &DiskConfig) -> Self {
        Self {
            size: config.cache_size,
            readahead: config.readahead,
        }
    }
}

/// An open source, without the layers above it.
pub trait Source: fmt::Debug + Send + Sync {
    /// Returns the disk.
    fn disk(&self) -> Arc<dyn BlockRead>;

    /// Returns the files that the source consists of, each once; none for a disk behind a protocol.
    fn files(&self) -> Vec<Arc<dyn StoredFile>>;

    /// Returns the locality of the data: what is not here may have to be waited for.
    fn locality(&self) -> Locality;

    /// Describes the source for `--info`.
    fn describe(&self) -> SourceDescription;

    /// Returns the error with which a mount would refuse to write to the source, as far as that shows without opening it
    /// for writing. Its kind is `ReadOnly` for a disk that can't be written to; any other kind means that it must not.
    fn write_refusal(&self) -> Option<Error>;

    /// Returns by what an overlay recognizes the source.
    ///
    /// Errors: the path of a local file cannot be resolved.
    fn identity(&self) -> Result<SourceIdentity>;

    /// Returns the cache that belongs over the disk, or `None` if it needs none.
    fn cache(&self, asked: CacheSizes) -> Option<CacheOptions>;

    /// Returns the file in the disk tier that keeps the blocks of that cache, or why it has none. `None`: the disk tier is
    /// not asked for, or lies below the source.
    fn kept(&self) -> Option<Result<KeptFile>> {
        None
    }

    /// Checks the tables. A source without tables of its own is always clean.
    fn check(&self) -> CheckReport {
        CheckReport::default()
    }
}

/// Description of an open source.
#[derive(Debug, Clone)]
pub struct SourceDescription {
    /// `vmdk`, `raw`, `nbd` or `vddk`.
    pub format: &'static str,
    /// Description of a VMDK.
    pub vmdk: Option<DiskInfo>,
}

/// Identity of a source across mounts.
#[derive(Debug, Clone)]
pub struct SourceIdentity {
    /// Path or address for messages.
    pub label: String,
    /// Real path of a local file, or the whole address without secrets.
    pub address: PathBuf,
    /// CID in the descriptor, if it has one.
    pub cid: Option<u32>,
}

/// Settings of a source that can be opened.
pub trait Backend: SourceSettings {
    /// Opens the source for reading.
    fn open(&self, asked: CacheSizes) -> Result<Box<dyn Source>>;

    /// Opens the source for writing. If it can't be written to, opens it for reading and returns the reason, or `None` if
    /// the user needs no message.
    ///
    /// Errors: a disk that must not be written to (used by another process, parent of a snapshot).
    fn open_for_writing(&self, asked: CacheSizes) -> Result<(Box<dyn Source>, Option<String>)>;

    /// Opens the disk for reading once more in `file`, the file that has its name now.
    fn reopen(&self, _file: Arc<dyn StoredFile>) -> Result<Box<dyn Source>> {
        Err(Error::unsupported(format!(
            "{}: has no file to open again",
            self.label()
        )))
    }

    /// Creates the disk if the settings ask for that (`--create`). No file is left after an error.
    fn create(&self) -> Result<()> {
        Ok(())
    }

    /// Creates the disk of a mount if the settings ask for that. Returns it if it cannot be opened again before it is
    /// complete.
    fn create_for_mount(&self) -> Result<Option<Box<dyn Source>>> {
        Ok(None)
    }

    /// Compares the disk with the digests that its package has. Returns a message for each that differs.
    fn verify(&self, _asked: CacheSizes) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Returns the disks that the settings are a pattern for, or `None` if they name one disk.
    fn find(&self) -> Option<Result<Matches>> {
        None
    }

    /// Returns what the server offers, or `None` if the source is no server.
    fn list(&self) -> Option<Result<Listing>> {
        None
    }

    /// Returns the server whose exports are disks.
    fn server(&self) -> Option<&dyn ExportServer> {
        None
    }
}

/// Server that offers several disks.
pub trait ExportServer {
    /// Returns the properties of the server and of all its exports.
    fn list(&self) -> Result<ServerInfo>;

    /// Returns the properties of the server and of the export that the settings name.
    fn info(&self) -> Result<ServerInfo>;

    /// Connects to the server and lists its exports, again and again from then on.
    fn catalog(&self) -> Result<ExportCatalog>;
}

/// Disks that a pattern on a server gives.
#[derive(Debug)]
pub struct Matches {
    /// The disks, sorted.
    pub disks: Vec<Match>,
    /// Login of the search. A disk that is opened while it exists needs no login of its own.
    pub login: Box<dyn Any>,
}

/// Disk that a pattern on a server gives.
#[derive(Debug)]
pub struct Match {
    /// Default name in a mount. `None`: the user has chosen one, or no other disk can be meant.
    pub name: Option<OsString>,
    /// Its settings.
    pub config: SourceConfig,
}

/// Export of a server.
#[derive(Debug)]
pub struct OpenExport {
    /// Its settings.
    pub config: SourceConfig,
    /// The disk.
    pub source: Box<dyn Source>,
}
