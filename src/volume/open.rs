//! Builds the stack of a disk from its configuration: the one place that knows all sides.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};
use serde::Serialize;

use crate::block::BlockRead;
use crate::cache::{BlockCache, CacheOptions};
use crate::config::{DiskConfig, Format, LocalConfig, NbdConfig, SourceConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::kernel_view;
use crate::overlay::open_overlay;
use crate::source::{RawDisk, export_file_names, nbd};
use crate::store::{Access, OpenPolicy, StoredFile, open_user_path};
use crate::vmdk::{self, DiskInfo, FileKind, OpenOptions, StreamDisk, VmdkDisk};
use crate::volume::{Volume, create};

/// Memory for inflated grains: the working set of a few readers, as whole grains of 64 KiB.
const GRAIN_CACHE: u64 = 32 << 20;
/// As far ahead as the kernel reads itself where it is let.
const GRAIN_READAHEAD: u64 = 2 << 20;
/// More threads than this don't make one reader faster.
const MAX_WORKERS: usize = 8;

/// A source without the layers above it.
#[derive(Debug)]
pub enum Source {
    /// A VMDK.
    Vmdk(Arc<VmdkDisk>),
    /// A raw image.
    Raw(Arc<RawDisk>, Arc<dyn StoredFile>),
    /// An export of an NBD server.
    Nbd(Arc<nbd::NbdDisk>),
    /// A compressed stream that was just made, to be written in order.
    Stream(Arc<StreamDisk>),
}

/// What a source is, for `--info`.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// Its file name in a mount.
    pub name: String,
    /// The file that was named.
    pub file: String,
    /// `vmdk` or `raw`.
    pub format: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    /// What a VMDK is made of.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub vmdk: Option<DiskInfo>,
    /// Who reads its files in a mount of this user, and why not the kernel by itself.
    pub read_by: String,
    /// Whether it can be written to.
    pub writable: bool,
    /// Why it can't.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Opens all disks of a mount. Where one stands for every export of a server, it becomes several, whose names are found
/// here; those are not connected to yet.
pub fn open_all(configs: &[DiskConfig]) -> Result<Vec<(DiskConfig, Volume)>> {
    let mut taken: HashSet<OsString> = configs
        .iter()
        .filter(|c| !is_dynamic(c))
        .map(|c| c.name.clone())
        .collect();
    let mut disks = Vec::new();
    for config in configs {
        let SourceConfig::Nbd(server) = &config.source else {
            disks.push((config.made(), open(config)?));
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
    Ok(disks)
}

/// Whether a disk stands for every export of a server.
pub fn is_dynamic(config: &DiskConfig) -> bool {
    matches!(&config.source, SourceConfig::Nbd(server) if server.dynamic)
}

/// Opens a disk with all its layers; for writing, unless it was asked for otherwise.
///
/// What can't be written to is opened for reading, with the reason in [`Volume::why_read_only`]: files and file systems
/// that don't permit it, formats that are only read. What must not be written to is an error: files that somebody else
/// uses, the parent of a snapshot.
pub fn open(config: &DiskConfig) -> Result<Volume> {
    if config.overlay.is_some() {
        return open_with_overlay(config);
    }
    let made = config.source.local().map_or(Ok(None), create::make)?;
    let (source, why_read_only) = match (made, config.read_only) {
        (Some(stream), _) => (Source::Stream(Arc::new(stream)), None),
        (None, true) => (open_source(config)?, None),
        (None, false) => open_for_writing(config)?,
    };
    let files = source.files();
    let remote = source.is_remote();
    Ok(Volume::new(cached(config, source.disk())?, files)
        .remote(remote)
        .read_only_because(why_read_only))
}

/// Opens a disk whose writes go to an overlay: what is below is only read, and may be cached.
fn open_with_overlay(config: &DiskConfig) -> Result<Volume> {
    let source = open_source(config)?;
    let mut files = source.files();
    let access = if config.read_only { Access::Read } else { Access::Write };
    let delta = open_overlay(config, &source, access)?;
    let base = cached(config, source.disk())?;
    let remote = source.is_remote();
    let Some(delta) = delta else {
        return Ok(Volume::new(base, files).remote(remote));
    };
    files.extend(delta.files());
    Ok(Volume::new(Arc::new(delta.over(base)), files).remote(remote))
}

/// The disk, with a cache over it where its blocks are dear.
fn cached(config: &DiskConfig, plain: Arc<dyn BlockRead>) -> Result<Arc<dyn BlockRead>> {
    let geometry = plain.geometry();
    // what is written to has no cache above it that would keep what was there before
    if geometry.preferred <= geometry.granule || plain.writer().is_some() {
        return Ok(plain);
    }
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MAX_WORKERS);
    let options = CacheOptions {
        size: config.cache_size.unwrap_or(GRAIN_CACHE),
        readahead: config.readahead.unwrap_or(GRAIN_READAHEAD),
        workers,
    };
    let cache = BlockCache::new(plain, options).map_err(|e| Error::io("starting the threads that inflate", e))?;
    Ok(Arc::new(cache))
}

/// Opens only the source of a disk, for reading.
pub fn open_source(config: &DiskConfig) -> Result<Source> {
    if let SourceConfig::Nbd(server) = &config.source {
        return nbd_disk(server, false).map(|(source, _)| source);
    }
    let local = local(config)?;
    let file = open_file(local, Access::Read)?;
    if !is_vmdk(local, &*file)? {
        return raw(file);
    }
    let disk = VmdkDisk::open(file, options(local))?;
    for unclean in disk.unclean_files() {
        tracing::info!("{unclean}: was not closed after writing; --check tells whether it is sound");
    }
    Ok(Source::Vmdk(Arc::new(disk)))
}

/// Opens the source of a disk for writing; where that can't be, for reading, and says why.
///
/// It is opened for reading first. So nothing is locked against others that would not be written to anyway, and what
/// is in the way of a writer is told by the image and not by the locks of its readers.
fn open_for_writing(config: &DiskConfig) -> Result<(Source, Option<String>)> {
    if let SourceConfig::Nbd(server) = &config.source {
        return nbd_disk(server, true);
    }
    let local = local(config)?;
    let source = open_source(config)?;
    if let Some(refusal) = source.refuses_writing(local) {
        return only_read(refusal, source);
    }
    let is_vmdk = matches!(source, Source::Vmdk(_));
    // its locks would be in our own way
    drop(source);
    let written = open_file(local, Access::Write).and_then(|file| {
        if is_vmdk {
            Ok(Source::Vmdk(Arc::new(VmdkDisk::open_writable(file, options(local))?)))
        } else {
            raw(file)
        }
    });
    match written {
        Ok(source) => Ok((source, None)),
        Err(e) if e.kind() == ErrorKind::ReadOnly => only_read(e, open_source(config)?),
        Err(e) => Err(e),
    }
}

/// The source for reading, if that is what the refusal to write to it leaves.
fn only_read(refusal: Error, source: Source) -> Result<(Source, Option<String>)> {
    if refusal.kind() == ErrorKind::ReadOnly {
        Ok((source, Some(refusal.to_string())))
    } else {
        Err(refusal)
    }
}

/// The export of a server; why it can't be written to, where that was wanted.
fn nbd_disk(server: &NbdConfig, writable: bool) -> Result<(Source, Option<String>)> {
    let disk = nbd::NbdDisk::connect(server, writable)?;
    let why = (writable && disk.is_read_only()).then(|| "the server says so".to_owned());
    Ok((Source::Nbd(Arc::new(disk)), why))
}

/// The files that a disk comes from.
fn local(config: &DiskConfig) -> Result<&LocalConfig> {
    let none = || Error::unsupported(format!("{}: this is no local file", config.source.label()));
    config.source.local().ok_or_else(none)
}

fn open_file(local: &LocalConfig, access: Access) -> Result<Arc<dyn StoredFile>> {
    let policy = OpenPolicy {
        allow: local.allow_dirs.clone(),
        lock: local.lock,
    };
    open_user_path(&local.path, Arc::new(policy), access)
}

fn options(local: &LocalConfig) -> OpenOptions {
    OpenOptions {
        accept_cid_mismatch: local.accept_cid_mismatch,
        force: local.force,
    }
}

fn raw(file: Arc<dyn StoredFile>) -> Result<Source> {
    Ok(Source::Raw(Arc::new(RawDisk::new(Arc::clone(&file))?), file))
}

impl Source {
    /// Whether its answers come over a network.
    fn is_remote(&self) -> bool {
        matches!(self, Source::Nbd(_))
    }

    /// The disk.
    pub fn disk(&self) -> Arc<dyn BlockRead> {
        match self {
            Source::Vmdk(disk) => Arc::clone(disk) as Arc<dyn BlockRead>,
            Source::Raw(disk, _) => Arc::clone(disk) as Arc<dyn BlockRead>,
            Source::Nbd(disk) => Arc::clone(disk) as Arc<dyn BlockRead>,
            Source::Stream(disk) => Arc::clone(disk) as Arc<dyn BlockRead>,
        }
    }

    /// The files that it is made of.
    pub fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        match self {
            Source::Vmdk(disk) => disk.files(),
            Source::Raw(_, file) => vec![Arc::clone(file)],
            Source::Nbd(_) => Vec::new(),
            Source::Stream(disk) => vec![disk.file()],
        }
    }

    /// Why a mount would not write to it, as far as that can be told without opening it for writing.
    fn refuses_writing(&self, local: &LocalConfig) -> Option<Error> {
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

    /// Describes it under its name in a mount.
    pub fn describe(&self, config: &DiskConfig) -> Description {
        let reason = match (config.read_only, config.source.local()) {
            (true, _) => Some("readonly=true was asked for".to_owned()),
            (false, Some(local)) => self.refuses_writing(local).map(|e| e.to_string()),
            (false, None) => None,
        };
        let (format, vmdk) = match self {
            Source::Vmdk(disk) => ("vmdk", Some(disk.info())),
            Source::Raw(..) => ("raw", None),
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
                None => "this program: it is behind a network".to_owned(),
            },
            writable: reason.is_none(),
            reason,
        }
    }
}

/// Why a file that is open can't be opened for writing: its permissions, or a read-only file system.
fn not_permitted(file: &dyn StoredFile) -> Option<Error> {
    let open = PathBuf::from(format!("/proc/self/fd/{}", file.fd()?.as_raw_fd()));
    let refused = faccessat(AT_FDCWD, &open, AccessFlags::W_OK, AtFlags::AT_EACCESS).err()?;
    let text = format!("{}: open for writing: {}", file.label(), io::Error::from(refused));
    Some(Error::new(ErrorKind::ReadOnly, text))
}

/// Whether the file is to be read as a VMDK: as it was asked, else by its content. What is no VMDK by its content is
/// a raw image only where its name does not promise a VMDK: the bytes of a damaged one must not pass for a disk.
pub(crate) fn is_vmdk(local: &LocalConfig, file: &dyn StoredFile) -> Result<bool> {
    match local.format {
        Format::Vmdk => Ok(true),
        Format::Raw => Ok(false),
        Format::Auto if has_vmdk_name(&local.path) => Ok(true),
        Format::Auto => Ok(vmdk::file_kind(&vmdk::read_head(file)?) != FileKind::Other),
    }
}

fn has_vmdk_name(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e.as_bytes().eq_ignore_ascii_case(b"vmdk"))
}
