//! Builds the layers of a disk from its configuration: the only module that knows all of them.
//!
//! ```text
//!   config ─► source (VMDK, raw, NBD, new stream) ─► overlay? ─► cache, if blocks are expensive ─► Volume
//! ```
//! A disk that can't be written to is opened for reading, with a reason. A disk that must not be written to (used by
//! another process, parent of a snapshot) is an error.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};
use serde::Serialize;

use crate::block::BlockRead;
use crate::cache::{BlockCache, CacheOptions};
use crate::config::{
    DiskConfig, Distance, Format, HttpsAddress, HttpsConfig, LocalConfig, NbdConfig, SourceConfig, VddkConfig,
};
use crate::error::{Error, ErrorKind, Result};
use crate::kernel_view;
use crate::overlay::{open_overlay, unfinished_commits};
use crate::source::{RawDisk, export_file_names, nbd, vddk};
use crate::store::package::{self, Package};
use crate::store::{Access, StoredFile, https, open_found_path, open_user_path};
use crate::vmdk::{DiskInfo, OpenOptions, StreamDisk, VmdkDisk};
use crate::volume::format::{self, DiskFormat};
use crate::volume::{Volume, create};

/// Default size of the cache for inflated grains, in bytes: the working set of a few readers in grains of 64 KiB.
const GRAIN_CACHE: u64 = 32 << 20;
/// The same for a disk on a server, whose stored blocks have a cache of their own.
const REMOTE_GRAIN_CACHE: u64 = 16 << 20;
/// Default read-ahead in bytes: as far as the kernel itself reads ahead if it is allowed to.
const GRAIN_READAHEAD: u64 = 2 << 20;
/// Default size of the cache for a disk that VDDK reads from a server, and its read-ahead, in bytes: those of HTTPS.
const VDDK_CACHE: u64 = 64 << 20;
const VDDK_READAHEAD: u64 = 16 << 20;
/// Fetches in flight for such a disk. They wait for the server, not for a processor.
const VDDK_FETCHES: usize = 16;
/// Maximum number of threads that inflate: more do not make one reader faster.
const MAX_WORKERS: usize = 8;

/// Source of a volume without the layers above it.
#[derive(Debug)]
pub enum Source {
    /// A VMDK with its chain.
    Vmdk(Arc<VmdkDisk>),
    /// A raw image.
    Raw(Arc<RawDisk>, Arc<dyn StoredFile>),
    /// An export of an NBD server.
    Nbd(Arc<nbd::NbdDisk>),
    /// A new compressed stream, which is written in order.
    Stream(Arc<StreamDisk>),
}

/// Description of a source for `--info`. The names of the fields are those of the JSON output.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// File name in a mount.
    pub name: String,
    /// File or URI that the user named.
    pub file: String,
    /// `vmdk`, `raw` or `nbd`.
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
    /// The open disks, at least one.
    pub disks: Vec<(DiskConfig, Volume)>,
    /// The errors of disks that were found and could not be opened.
    pub skipped: Vec<Error>,
}

/// Opens all disks of a mount. A configuration that stands for every export of a server becomes several disks, whose
/// names are chosen here; they are not connected to yet.
///
/// A disk that a search found (`dir=`, a pattern) and that cannot be opened is left out, with a warning.
///
/// Errors: those of [`open`] for the first disk that the user named, or of the first one if none can be opened; those of
/// listing the exports.
pub fn open_all(configs: &[DiskConfig]) -> Result<OpenedDisks> {
    let mut taken: HashSet<OsString> = configs
        .iter()
        .filter(|c| !is_dynamic(c))
        .map(|c| c.name.clone())
        .collect();
    let (mut disks, mut skipped) = (Vec::new(), Vec::new());
    for config in configs {
        let SourceConfig::Nbd(server) = &config.source else {
            match open(config) {
                Ok(volume) => disks.push((config.made(), volume)),
                Err(e) if config.source.was_found() => skipped.push(e),
                Err(e) => return Err(e),
            }
            continue;
        };
        if !server.dynamic {
            disks.push((config.made(), open(config)?));
            continue;
        }
        let exports = nbd::exports(server, !config.read_only)?;
        let names = export_file_names(exports.iter().map(|(export, _)| export.as_os_str()), &taken);
        for ((export, disk), name) in exports.into_iter().zip(names) {
            taken.insert(name.clone());
            let server = NbdConfig {
                export: Some(export),
                dynamic: false,
                ..server.clone()
            };
            let config = DiskConfig {
                name,
                source: SourceConfig::Nbd(server),
                ..config.clone()
            };
            disks.push((config, Volume::new(Arc::new(disk), Vec::new())));
        }
    }
    match skipped.first() {
        Some(first) if disks.is_empty() => Err(first.clone()),
        _ => Ok(OpenedDisks { disks, skipped }),
    }
}

/// Returns true if a configuration stands for every export of a server.
pub fn is_dynamic(config: &DiskConfig) -> bool {
    matches!(&config.source, SourceConfig::Nbd(server) if server.dynamic)
}

/// Opens a disk with all its layers; for writing, unless the configuration is read-only.
///
/// A disk that can't be written to is opened for reading, with the reason in [`Volume::why_read_only`]: its files or
/// file system do not permit it, or its format can only be read.
///
/// Errors: a disk that must not be written to (used by another process, parent of a snapshot), and those of the source.
pub fn open(config: &DiskConfig) -> Result<Volume> {
    if config.overlay.is_some() {
        return open_with_overlay(config);
    }
    let created = config.source.local().map_or(Ok(None), create::create_for_mount)?;
    let (source, why_read_only) = match (created, config.read_only) {
        (Some(stream), _) => (Source::Stream(Arc::new(stream)), None),
        (None, true) => (open_source(config)?, None),
        (None, false) => open_for_writing(config)?,
    };
    let files = source.files();
    for sentence in unfinished_commits(&files) {
        tracing::warn!("{sentence}");
    }
    let remote = is_remote(config);
    Ok(Volume::new(cached(config, source.disk())?, files)
        .remote(remote)
        .read_only_because(why_read_only))
}

/// Opens a disk for reading once more, after another process has modified or replaced the image of `old`.
///
/// The format stays what it was, and the image is looked for in the folder that is held since the first open: neither the
/// content nor a link that was put in the image's place chooses another file.
pub(crate) fn reopen(config: &DiskConfig, old: &Volume) -> Result<Volume> {
    let none = || Error::unsupported(format!("{}: has no file to open again", config.source.label()));
    let file = old.files().first().ok_or_else(none)?.reopen()?;
    let source = source_of(local(config)?, file)?;
    if config.overlay.is_some() {
        return with_overlay(config, &source);
    }
    Ok(Volume::new(cached(config, source.disk())?, source.files()))
}

/// Opens a disk whose writes go to an overlay. The source below is only read, so it may be cached.
fn open_with_overlay(config: &DiskConfig) -> Result<Volume> {
    with_overlay(config, &open_source(config)?)
}

/// Returns the disk of `source` and the overlay over it.
fn with_overlay(config: &DiskConfig, source: &Source) -> Result<Volume> {
    let mut files = source.files();
    let access = if config.read_only { Access::Read } else { Access::Write };
    let delta = open_overlay(config, source, access)?;
    let base = cached(config, source.disk())?;
    let remote = is_remote(config);
    let Some(delta) = delta else {
        return Ok(Volume::new(base, files).remote(remote));
    };
    files.extend(delta.files());
    Ok(Volume::new(Arc::new(delta.over(base)), files).remote(remote))
}

/// Returns true if requests go to another process, perhaps over a network.
fn is_remote(config: &DiskConfig) -> bool {
    config.source.distance() != Distance::Here
}

/// Returns the disk with a cache over it if its blocks are expensive.
fn cached(config: &DiskConfig, plain: Arc<dyn BlockRead>) -> Result<Arc<dyn BlockRead>> {
    let geometry = plain.geometry();
    // A writable disk gets no cache: writes would not go through it, and it would return old blocks.
    if geometry.preferred <= geometry.granule || plain.writer().is_some() {
        return Ok(plain);
    }
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MAX_WORKERS);
    let (size, readahead, workers) = match config.source {
        SourceConfig::Https(_) => (REMOTE_GRAIN_CACHE, GRAIN_READAHEAD, workers),
        SourceConfig::Vddk(_) => (config.cache_size.unwrap_or(VDDK_CACHE), VDDK_READAHEAD, VDDK_FETCHES),
        _ => (config.cache_size.unwrap_or(GRAIN_CACHE), GRAIN_READAHEAD, workers),
    };
    let options = CacheOptions {
        size,
        readahead: config.readahead.unwrap_or(readahead),
        workers,
    };
    Ok(Arc::new(BlockCache::new(plain, options)?))
}

/// Opens the source of a disk for reading, without the layers above it.
pub fn open_source(config: &DiskConfig) -> Result<Source> {
    if let SourceConfig::Nbd(server) = &config.source {
        return nbd_disk(server, false).map(|(source, _)| source);
    }
    if let SourceConfig::Https(https) = &config.source {
        return https_disk(https, config);
    }
    if let SourceConfig::Vddk(disk) = &config.source {
        return vddk_disk(disk, false, config.cache_size.is_some());
    }
    let local = local(config)?;
    source_of(local, open_file(local, Access::Read)?)
}

/// Opens the source that `file` is, for reading.
fn source_of(local: &LocalConfig, file: Arc<dyn StoredFile>) -> Result<Source> {
    if format::decide(local, &*file)? == DiskFormat::Raw {
        return raw(file);
    }
    vmdk(file, chain_options(local)?)
}

/// Opens a VMDK for reading, and logs what is odd about it.
fn vmdk(file: Arc<dyn StoredFile>, options: OpenOptions) -> Result<Source> {
    let disk = VmdkDisk::open(file, options)?;
    for warning in disk.warnings() {
        tracing::warn!("{warning}");
    }
    for unclean in disk.unclean_files() {
        tracing::info!("{unclean}: was not closed after writing; --check verifies it");
    }
    Ok(Source::Vmdk(Arc::new(disk)))
}

/// Opens the source of a disk for writing. If that can't be, opens it for reading and returns the reason too.
///
/// The source is always opened for reading first. So a disk that would not be written to anyway is not locked against
/// other readers, and the reason that the user gets comes from the image and not from the locks of its readers.
fn open_for_writing(config: &DiskConfig) -> Result<(Source, Option<String>)> {
    if let SourceConfig::Nbd(server) = &config.source {
        return nbd_disk(server, true);
    }
    if let SourceConfig::Vddk(disk) = &config.source {
        return Ok((vddk_disk(disk, true, false)?, None));
    }
    if matches!(config.source, SourceConfig::Https(_)) {
        // No reason to warn about: such a disk is never written to, and the mount shows that.
        return Ok((open_source(config)?, None));
    }
    let local = local(config)?;
    let source = open_source(config)?;
    if let Some(refusal) = source.refuses_writing(local) {
        return only_read(refusal, source);
    }
    // The locks of the reading source would conflict with those of the writing one.
    drop(source);
    let written = open_file(local, Access::Write).and_then(|file| match format::decide(local, &*file)? {
        DiskFormat::Vmdk => Ok(Source::Vmdk(Arc::new(VmdkDisk::open_writable(
            file,
            chain_options(local)?,
        )?))),
        DiskFormat::Raw => raw(file),
    });
    match written {
        Ok(source) => Ok((source, None)),
        // Some reasons only show when the files are opened for writing.
        Err(e) if e.kind() == ErrorKind::ReadOnly => only_read(e, open_source(config)?),
        Err(e) => Err(e),
    }
}

/// Returns the source for reading with the reason, if `refusal` means "can't be written to"; else the error.
fn only_read(refusal: Error, source: Source) -> Result<(Source, Option<String>)> {
    if refusal.kind() == ErrorKind::ReadOnly {
        Ok((source, Some(refusal.to_string())))
    } else {
        Err(refusal)
    }
}

/// Connects to the export of a server. If `writable` was requested and the export is read-only, returns the reason too.
fn nbd_disk(server: &NbdConfig, writable: bool) -> Result<(Source, Option<String>)> {
    let disk = nbd::NbdDisk::connect(server, writable)?;
    let why = (writable && disk.is_read_only()).then(|| "the server offers the export read-only".to_owned());
    Ok((Source::Nbd(Arc::new(disk)), why))
}

/// Opens a disk in a process of its own, which serves it as an NBD server.
fn vddk_disk(disk: &VddkConfig, writable: bool, cached: bool) -> Result<Source> {
    vddk::connect(disk, writable, cached).map(|disk| Source::Nbd(Arc::new(disk)))
}

/// Reason why a disk on a web server cannot be written to.
const HTTPS_READ_ONLY: &str = "a disk on a web server is only read; add cow=FILE to keep writes in a local overlay";

/// Opens a disk on a web server.
fn https_disk(https: &HttpsConfig, config: &DiskConfig) -> Result<Source> {
    let mut name = https::file_name(https)?;
    let mut file = https::open(https, config.cache_size, config.readahead)?;
    if is_remote_package(https)? {
        file = package::open(file)?.disk(https.member.as_deref())?;
        name = file.own_name();
    }
    let format = match https.format {
        Format::Auto if https::is_raw_by_name(https, &name) => Format::Raw,
        format => format,
    };
    if format::decide_named(OsStr::new(&name), format, &*file)? == DiskFormat::Raw {
        return raw(file);
    }
    let beside = |address: &HttpsAddress| {
        let parent = HttpsConfig {
            address: address.clone(),
            ..https.clone()
        };
        https::open(&parent, config.cache_size, config.readahead).map_err(|e| e.within("parent="))
    };
    let options = OpenOptions {
        degraded: https.degraded,
        parent: https.parent.as_ref().map(beside).transpose()?,
        force: false,
    };
    vmdk(file, options)
}

/// Returns the local configuration of a disk.
fn local(config: &DiskConfig) -> Result<&LocalConfig> {
    let none = || Error::unsupported(format!("{}: is not a local file", config.source.label()));
    config.source.local().ok_or_else(none)
}

/// Opens the image of a local disk: its file, or the member of a package.
///
/// Errors: `ReadOnly` for writing to a package.
pub(crate) fn open_file(local: &LocalConfig, access: Access) -> Result<Arc<dyn StoredFile>> {
    if local.is_package() {
        let refusal = (access == Access::Write).then(|| package_is_read_only(local));
        return refusal.map_or_else(|| open_package(local)?.disk(local.member.as_deref()), Err);
    }
    open_path(local, access)
}

fn open_path(local: &LocalConfig, access: Access) -> Result<Arc<dyn StoredFile>> {
    match &local.found_in {
        Some(folder) => open_found_path(folder, &local.path, local.open_policy(), access),
        None => open_user_path(&local.path, local.open_policy(), access),
    }
}

/// Opens a local package.
fn open_package(local: &LocalConfig) -> Result<Package> {
    package::open(open_path(local, Access::Read)?)
}

fn package_is_read_only(local: &LocalConfig) -> Error {
    let text = "a disk in a package is only read; add cow=FILE to keep writes in a local overlay";
    Error::new(ErrorKind::ReadOnly, text).in_file(&local.label())
}

/// Compares a disk in a package with the digests that the package has. Returns a message for each that differs; none for
/// a disk that is in no package.
pub(crate) fn verify_package(config: &DiskConfig) -> Result<Vec<String>> {
    match &config.source {
        SourceConfig::Local(local) if local.is_package() => open_package(local)?.verify(local.member.as_deref()),
        SourceConfig::Https(https) if is_remote_package(https)? => {
            let file = https::open(https, config.cache_size, config.readahead)?;
            package::open(file)?.verify(https.member.as_deref())
        }
        _ => Ok(Vec::new()),
    }
}

/// Returns true if the file on a web server is a package, by its name or because a disk of it is named.
fn is_remote_package(https: &HttpsConfig) -> Result<bool> {
    let is_named = https.format == Format::Auto && Format::is_package(Path::new(&https::file_name(https)?));
    Ok(is_named || https.member.is_some())
}

/// Returns the options with which the chain of a local disk is opened.
///
/// Errors: those of opening the parent that the user named.
pub(crate) fn chain_options(local: &LocalConfig) -> Result<OpenOptions> {
    let parent = |path: &PathBuf| {
        let opened = open_user_path(path, local.open_policy(), Access::Read);
        opened.map_err(|e| e.within("parent="))
    };
    Ok(OpenOptions {
        degraded: local.degraded,
        parent: local.parent.as_ref().map(parent).transpose()?,
        force: local.force,
    })
}

fn raw(file: Arc<dyn StoredFile>) -> Result<Source> {
    Ok(Source::Raw(Arc::new(RawDisk::new(Arc::clone(&file))?), file))
}

impl Source {
    /// Returns the disk.
    pub fn disk(&self) -> Arc<dyn BlockRead> {
        match self {
            Source::Vmdk(disk) => Arc::clone(disk) as Arc<dyn BlockRead>,
            Source::Raw(disk, _) => Arc::clone(disk) as Arc<dyn BlockRead>,
            Source::Nbd(disk) => Arc::clone(disk) as Arc<dyn BlockRead>,
            Source::Stream(disk) => Arc::clone(disk) as Arc<dyn BlockRead>,
        }
    }

    /// Returns the files that the source consists of; none for an NBD export.
    pub fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        match self {
            Source::Vmdk(disk) => disk.files(),
            Source::Raw(_, file) => vec![Arc::clone(file)],
            Source::Nbd(_) => Vec::new(),
            Source::Stream(disk) => vec![disk.file()],
        }
    }

    /// Returns the error with which a mount would refuse to write to the source, as far as that shows without opening
    /// it for writing.
    fn refuses_writing(&self, local: &LocalConfig) -> Option<Error> {
        if local.is_package() {
            return Some(package_is_read_only(local));
        }
        let files = match self {
            Source::Vmdk(disk) => {
                if let Some(refusal) = disk.refuses_writing(local.force) {
                    return Some(refusal);
                }
                disk.files_written()
            }
            Source::Raw(_, file) => vec![Arc::clone(file)],
            Source::Nbd(_) | Source::Stream(_) => Vec::new(),
        };
        files.iter().find_map(|file| not_permitted(&**file))
    }

    /// Describes the source for `--info`.
    pub fn describe(&self, config: &DiskConfig) -> Description {
        let reason = match (config.read_only, config.source.local()) {
            (true, _) => Some("readonly=true was given".to_owned()),
            (false, Some(local)) => self.refuses_writing(local).map(|e| e.to_string()),
            (false, None) if matches!(config.source, SourceConfig::Https(_)) => Some(HTTPS_READ_ONLY.to_owned()),
            (false, None) => None,
        };
        let (format, vmdk) = match self {
            Source::Vmdk(disk) => ("vmdk", Some(disk.info())),
            Source::Raw(..) => ("raw", None),
            Source::Nbd(_) if matches!(config.source, SourceConfig::Vddk(_)) => ("vddk", None),
            Source::Nbd(_) => ("nbd", None),
            Source::Stream(_) => ("vmdk", None),
        };
        Description {
            name: config.name.to_string_lossy().into_owned(),
            file: config.source.label(),
            format,
            size: self.disk().geometry().bytes(),
            vmdk,
            read_by: match config.source.local() {
                Some(local) => kernel_view::describe(&*self.disk(), &local.view, reason.is_none()),
                None => "this program: the disk is on a server".to_owned(),
            },
            writable: reason.is_none(),
            reason,
        }
    }
}

/// Returns an error if an open file can't be opened for writing because of its permissions or a read-only file system.
fn not_permitted(file: &dyn StoredFile) -> Option<Error> {
    // Through /proc, so that the file itself is checked and not another one that has its name by now.
    let open = PathBuf::from(format!("/proc/self/fd/{}", file.fd()?.as_raw_fd()));
    let refused = faccessat(AT_FDCWD, &open, AccessFlags::W_OK, AtFlags::AT_EACCESS).err()?;
    let text = format!("{}: open for writing: {}", file.label(), io::Error::from(refused));
    Some(Error::new(ErrorKind::ReadOnly, text))
}
