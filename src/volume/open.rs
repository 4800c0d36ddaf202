//! Builds the layers of a disk from its configuration: the only module that knows all of them.
//!
//! ```text
//!   config ─► backend ─► source ─► overlay? ─► cache, if its blocks are expensive ─► Volume
//! ```
//! A disk that can't be written to is opened for reading, with a reason. A disk that must not be written to (used by
//! another process, parent of a snapshot) is an error.

use std::sync::Arc;

use serde::Serialize;

use crate::block::BlockRead;
use crate::cache::BlockCache;
use crate::config::{DiskConfig, Locality, SourceConfig};
use crate::error::{Error, Result};
use crate::kernel_view;
use crate::overlay::{open_overlay, unfinished_commits};
use crate::source::{Backend, CacheSizes, ExportServer, Listing, Matches, Source};
use crate::store::Access;
use crate::vmdk::DiskInfo;
use crate::volume::{ServerExports, Volume};

/// Returns the back end of a source: one line for each.
fn backend(source: &SourceConfig) -> &dyn Backend {
    match source {
        SourceConfig::Local(local) => local,
        SourceConfig::Nbd(server) => server,
        SourceConfig::Https(disk) => &**disk,
        SourceConfig::Vddk(disk) => &**disk,
    }
}

/// Description of a source for `--info`. The names of the fields are those of the JSON output.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// File name in a mount.
    pub name: String,
    /// File or URI that the user named.
    pub file: String,
    /// `vmdk`, `raw`, `nbd` or `vddk`.
    pub format: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    /// Description of a VMDK.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub vmdk: Option<DiskInfo>,
    /// Reader of the files in a mount of this user: the kernel, or this program with the reason.
    pub read_by: String,
    /// True if the disk can be written to.
    pub writable: bool,
    /// Reason why it can't be written to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Disks of a mount.
#[derive(Debug)]
pub struct OpenedDisks {
    /// The open disks. At least one, unless there are `exports`.
    pub disks: Vec<(DiskConfig, Volume)>,
    /// Servers whose exports are found when they are looked up.
    pub exports: Vec<ServerExports>,
    /// The errors of disks that were found and could not be opened.
    pub skipped: Vec<Error>,
}

/// Opens all disks of a mount. A configuration that stands for every export of a server becomes none of them: its disks are
/// found when they are looked up.
///
/// A disk that a search found (`dir=`, a pattern) and that cannot be opened is left out, with a warning.
///
/// Errors: those of [`open`] for the first disk that the user named, or of the first one if none can be opened; those of
/// listing the exports.
pub fn open_all(configs: &[DiskConfig]) -> Result<OpenedDisks> {
    let (mut disks, mut exports, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    for config in configs {
        if let Some(server) = server(&config.source).filter(|_| config.source.settings().is_dynamic()) {
            exports.push(ServerExports::connect(config, server)?);
            continue;
        }
        match open(config) {
            Ok(volume) => disks.push((config.made(), volume)),
            Err(e) if config.source.settings().was_found() => skipped.push(e),
            Err(e) => return Err(e),
        }
    }
    match skipped.first() {
        Some(first) if disks.is_empty() && exports.is_empty() => Err(first.clone()),
        _ => Ok(OpenedDisks {
            disks,
            exports,
            skipped,
        }),
    }
}

/// Returns what a server offers, or `None` if the source is no server.
pub fn list(source: &SourceConfig) -> Option<Result<Listing>> {
    backend(source).list()
}

/// Returns the disks that a source is a pattern for, or `None` if it is one disk.
pub(super) fn find(source: &SourceConfig) -> Option<Result<Matches>> {
    backend(source).find()
}

/// Returns the server whose exports are disks, if the source is one of those.
pub fn server(source: &SourceConfig) -> Option<&dyn ExportServer> {
    backend(source).server()
}

/// Creates the disks that ask for it, in order, up to the first that fails.
///
/// Errors: a file that exists already, a size or name that the kind can't have, those of I/O. No file of the disk that
/// failed is left then; disks before it stay.
pub fn create(disks: &[DiskConfig]) -> Result<()> {
    disks.iter().try_for_each(|disk| backend(&disk.source).create())
}

/// Opens a disk with all its layers; for writing, unless the configuration is read-only.
///
/// A disk that can't be written to is opened for reading, with the reason in [`Volume::why_read_only`]: its files or
/// file system do not permit it, or its format can only be read.
///
/// Errors: a disk that must not be written to (used by another process, parent of a snapshot), and those of the source.
pub fn open(config: &DiskConfig) -> Result<Volume> {
    if config.overlay.is_some() {
        return with_overlay(config, &*open_source(config)?);
    }
    let (backend, asked) = (backend(&config.source), CacheSizes::of(config));
    let (source, why_read_only) = match (backend.create_for_mount()?, config.read_only) {
        (Some(created), _) => (created, None),
        (None, true) => (backend.open(asked)?, None),
        (None, false) => backend.open_for_writing(asked)?,
    };
    for sentence in unfinished_commits(&source.files()) {
        tracing::warn!("{sentence}");
    }
    Ok(volume_of(config, &*source)?.read_only_because(why_read_only))
}

/// Opens a disk for reading once more, after another process has modified or replaced the image of `old`.
///
/// The format stays what it was, and the image is looked for in the folder that is held since the first open: neither the
/// content nor a link that was put in the image's place chooses another file.
pub(crate) fn reopen(config: &DiskConfig, old: &Volume) -> Result<Volume> {
    let none = || Error::unsupported(format!("{}: has no file to open again", config.source.label()));
    let file = old.files().first().ok_or_else(none)?.reopen()?;
    let source = backend(&config.source).reopen(file)?;
    if config.overlay.is_some() {
        return with_overlay(config, &*source);
    }
    volume_of(config, &*source)
}

/// Opens the source of a disk for reading, without the layers above it.
pub fn open_source(config: &DiskConfig) -> Result<Box<dyn Source>> {
    backend(&config.source).open(CacheSizes::of(config))
}

/// Returns the volume of a source without an overlay.
pub(super) fn volume_of(config: &DiskConfig, source: &dyn Source) -> Result<Volume> {
    Ok(below(source, Volume::new(cached_disk(config, source)?, source.files())))
}

/// Returns the disk of `source` and the overlay over it. The source below is only read.
fn with_overlay(config: &DiskConfig, source: &dyn Source) -> Result<Volume> {
    let access = if config.read_only { Access::Read } else { Access::Write };
    let Some(delta) = open_overlay(config, source, access)? else {
        return volume_of(config, source);
    };
    let base = cached_disk(config, source)?;
    let mut files = source.files();
    files.extend(delta.files());
    Ok(below(source, Volume::new(Arc::new(delta.over(base)), files)))
}

/// Notes in a volume what the source below it is, whatever lies between.
fn below(source: &dyn Source, volume: Volume) -> Volume {
    // Requests that go to another process may go over a network.
    let remote = source.locality() != Locality::Here;
    volume.remote(remote).shared(source.disk().shared_content().is_some())
}

/// Returns the disk with the cache over it that its source asks for.
pub(crate) fn cached_disk(config: &DiskConfig, source: &dyn Source) -> Result<Arc<dyn BlockRead>> {
    let plain = source.disk();
    match source.cache(CacheSizes::of(config)) {
        // What cannot be kept is read all the same; the source has warned.
        Some(options) => Ok(Arc::new(BlockCache::new(
            plain,
            options,
            source.kept().and_then(Result::ok),
        )?)),
        None => Ok(plain),
    }
}

/// Compares a disk in a package with the digests that the package has. Returns a message for each that differs; none for
/// a disk that is in no package.
pub(crate) fn verify_package(config: &DiskConfig) -> Result<Vec<String>> {
    backend(&config.source).verify(CacheSizes::of(config))
}

/// Describes an open source for `--info`.
pub fn describe(config: &DiskConfig, source: &dyn Source) -> Description {
    let refusal = || source.write_refusal().map(|e| e.to_string());
    let reason = match config.read_only {
        true => Some("readonly=true was given".to_owned()),
        false => refusal(),
    };
    let (disk, described) = (source.disk(), source.describe());
    let settings = config.source.settings();
    let is_local = || settings.locality() == Locality::Here || has_local_files(source);
    let read_by = match settings.kernel_view().filter(|_| is_local()) {
        Some(view) => kernel_view::describe(&*disk, &view, reason.is_none()),
        None => "this program: the disk is on a server".to_owned(),
    };
    Description {
        name: config.name.to_string_lossy().into_owned(),
        file: config.source.label(),
        format: described.format,
        size: disk.geometry().bytes(),
        vmdk: described.vmdk,
        read_by,
        writable: reason.is_none(),
        reason,
    }
}

/// Returns true if the source has files, and the content of each is in a local file.
fn has_local_files(source: &dyn Source) -> bool {
    let files = source.files();
    !files.is_empty() && files.iter().all(|file| file.content_fd().is_some())
}
