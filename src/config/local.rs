//! Configuration of a disk in local files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::create::CreateConfig;
use super::source_settings::{Locality, SourceSettings};
use super::view::ViewConfig;
use crate::store::OpenPolicy;
use crate::vmdk::Degraded;

/// Disk in local files.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalConfig {
    /// Absolute path of the image. It need not be UTF-8.
    pub path: PathBuf,
    /// Disk of the package at that path, as the package names it.
    pub member: Option<String>,
    /// Folder that the user named, if the image was found by a search below it.
    pub found_in: Option<PathBuf>,
    /// Format of the image.
    pub format: Format,
    /// Folders that names inside an image may lead to, besides the image's own.
    pub allow_dirs: Vec<PathBuf>,
    /// Defects of the chain that are accepted.
    pub degraded: Degraded,
    /// Parent of the oldest link that is found, as an absolute path.
    pub parent: Option<PathBuf>,
    /// Refuse an image that names other files, extents or a parent.
    pub single_file: bool,
    /// Lock the files of the image: a read-only disk excludes writers, a writable disk excludes all other programs.
    pub lock: bool,
    /// Write to the image although a snapshot is based on it.
    pub force: bool,
    /// Create the image before it is opened.
    pub create: Option<CreateConfig>,
    /// Kernel view: lets the kernel read the files without the daemon.
    pub view: ViewConfig,
}

impl Default for LocalConfig {
    fn default() -> Self {
        Self::new(PathBuf::new())
    }
}

impl LocalConfig {
    /// Creates the configuration of the disk in the file at `path`, with all settings at their defaults.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            member: None,
            found_in: None,
            format: Format::Auto,
            allow_dirs: Vec::new(),
            degraded: Degraded::default(),
            parent: None,
            single_file: false,
            lock: true,
            force: false,
            create: None,
            view: ViewConfig::default(),
        }
    }

    /// Returns true if the path is that of a package (OVA), by its name or because a disk of it is named.
    pub(crate) fn is_package(&self) -> bool {
        self.member.is_some() || (self.format == Format::Auto && Format::is_package(&self.path))
    }

    /// Returns the rules for one open of the disk.
    pub(crate) fn open_policy(&self) -> Arc<OpenPolicy> {
        Arc::new(OpenPolicy::new(self.allow_dirs.clone(), self.lock).single_file(self.single_file))
    }
}

impl SourceSettings for LocalConfig {
    /// Returns the path, with the disk in a package.
    fn label(&self) -> String {
        let path = self.path.display();
        match &self.member {
            Some(member) => format!("{path}({})", member.escape_debug()),
            None => path.to_string(),
        }
    }

    fn locality(&self) -> Locality {
        Locality::Here
    }

    fn accepts_loss(&self) -> bool {
        self.degraded.orphan || self.degraded.short
    }

    fn accepts_cid_mismatch(&self) -> bool {
        self.degraded.cid
    }

    fn was_found(&self) -> bool {
        self.found_in.is_some()
    }

    fn excludes_writers(&self) -> bool {
        self.lock
    }

    fn kernel_view(&self) -> Option<ViewConfig> {
        Some(self.view.clone())
    }

    fn set_created(&mut self) {
        self.create = None;
    }
}

/// The format of a local file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Decided by the suffix of the file name. A file whose content contradicts its suffix is refused.
    #[default]
    Auto,
    /// A VMDK. Another format is an error.
    Vmdk,
    /// A raw image.
    Raw,
}

impl Format {
    /// Returns true if the name of a file promises a package of disks.
    pub(crate) fn is_package(path: &Path) -> bool {
        path.extension()
            .is_some_and(|suffix| suffix.eq_ignore_ascii_case("ova"))
    }
}
