//! Configuration of one disk: its name, its caches, its overlay and its source.

use std::ffi::OsString;
use std::path::PathBuf;

use super::source::SourceConfig;

/// Disk of a mount or of another action.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskConfig {
    /// Its file name in the mount. In a mount: 1 to 255 bytes, not `.` or `..`, no `/` and no NUL; need not be UTF-8.
    pub name: OsString,
    /// True if the disk must not be written to.
    pub read_only: bool,
    /// Mode of the kernel's page cache. `None`: chosen by the type of source.
    pub cache: Option<PageCache>,
    /// Memory limit of the block cache of this disk, in bytes. `None`: chosen by the type of source.
    pub cache_size: Option<u64>,
    /// Upper bound of the daemon's read-ahead, in bytes. `None`: chosen by the type of source.
    pub readahead: Option<u64>,
    /// Overlay that takes the writes. The source is then opened read-only.
    pub overlay: Option<Overlay>,
    /// Maximum number of ranges that `--map` lists; 0: no limit. `None`: the default.
    pub map_limit: Option<u64>,
    /// Source of the disk's sectors.
    pub source: SourceConfig,
    /// Warnings about its settings, to report when it is mounted.
    pub warnings: Vec<&'static str>,
}

impl DiskConfig {
    /// Creates the configuration of a disk with all settings at their defaults.
    pub fn new(name: impl Into<OsString>, source: SourceConfig) -> Self {
        Self {
            name: name.into(),
            read_only: false,
            cache: None,
            cache_size: None,
            readahead: None,
            overlay: None,
            map_limit: None,
            source,
            warnings: Vec::new(),
        }
    }

    /// Returns the configuration for a disk that has been created: a copy that does not create it again.
    #[must_use]
    pub fn made(&self) -> Self {
        let mut disk = self.clone();
        disk.source.settings_mut().set_created();
        disk
    }
}

/// Delta in a local file, over a source that is only read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Overlay {
    /// The file at this absolute path, which is created if it does not exist.
    File(PathBuf),
    /// A file without a name, which is deleted when the mount ends.
    Temporary,
}

/// Mode of the kernel's page cache for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageCache {
    /// No pages are cached: every read and write reaches the daemon.
    None,
    /// Pages are cached for reads. Writes reach the daemon immediately.
    WriteThrough,
}
