//! Builds the stack of a disk from its configuration: the one place that knows all sides.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::block::BlockRead;
use crate::config::{DiskConfig, Format, LocalConfig, NbdConfig, SourceConfig};
use crate::error::{Error, Result};
use crate::image::{Image, new};
use crate::layer::{BlockCache, CacheOptions};
use crate::source::{RawDisk, export_file_names, nbd};
use crate::store::{Access, OpenPolicy, StoredFile, open_user_path};
use crate::vmdk::{self, DiskInfo, FileKind, OpenOptions, StreamDisk, VmdkDisk};

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
    /// Whether it can be written to.
    pub writable: bool,
    /// Why it can't.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Opens all disks of a mount. Where one stands for every export of a server, it becomes several, whose names are found
/// here; those are not connected to yet.
pub fn open_all(configs: &[DiskConfig]) -> Result<Vec<(DiskConfig, Image)>> {
    let mut taken: HashSet<OsString> = configs.iter().filter(|c| !is_dynamic(c)).map(|c| c.name.clone()).collect();
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
            let server = NbdConfig { export: Some(export), dynamic: false, ..server.clone() };
            let config = DiskConfig { name, source: SourceConfig::Nbd(server), ..config.clone() };
            disks.push((config, Image::new(Arc::new(disk), Vec::new())));
        }
    }
    Ok(disks)
}

/// Whether a disk stands for every export of a server.
pub fn is_dynamic(config: &DiskConfig) -> bool {
    matches!(&config.source, SourceConfig::Nbd(server) if server.dynamic)
}

/// Opens a disk with all its layers.
pub fn open(config: &DiskConfig) -> Result<Image> {
    let source = open_source(config)?;
    let files = source.files();
    let plain = source.disk();
    let geometry = plain.geometry();
    if geometry.preferred <= geometry.granule {
        return Ok(Image::new(plain, files));
    }
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
    let options = CacheOptions {
        size: config.cache_size.unwrap_or(GRAIN_CACHE),
        readahead: config.readahead.unwrap_or(GRAIN_READAHEAD),
        workers,
    };
    let cache = BlockCache::new(plain, options).map_err(|e| Error::io("starting the threads that inflate", e))?;
    Ok(Image::new(Arc::new(cache), files))
}

/// Opens only the source of a disk.
pub fn open_source(config: &DiskConfig) -> Result<Source> {
    if config.overlay.is_some() {
        let file = config.source.label();
        return Err(Error::unsupported(format!("{file}: overlays are not in this build yet")));
    }
    let local = match &config.source {
        SourceConfig::Local(local) => local,
        SourceConfig::Nbd(server) => return Ok(Source::Nbd(Arc::new(nbd::NbdDisk::connect(server, !config.read_only)?))),
    };
    if let Some(stream) = new::make(local)? {
        return Ok(Source::Stream(Arc::new(stream)));
    }
    let policy = OpenPolicy { allow: local.allow_dirs.clone(), lock: local.lock };
    let file = open_user_path(&local.path, Arc::new(policy), Access::Read)?;
    if is_vmdk(local, &*file)? {
        let options = OpenOptions { accept_cid_mismatch: local.accept_cid_mismatch, force: local.force };
        let disk = VmdkDisk::open(file, options)?;
        for unclean in disk.unclean_files() {
            tracing::info!("{unclean}: was not closed after writing; --check tells whether it is sound");
        }
        Ok(Source::Vmdk(Arc::new(disk)))
    } else {
        Ok(Source::Raw(Arc::new(RawDisk::new(Arc::clone(&file))?), file))
    }
}

impl Source {
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

    /// Describes it under its name in a mount.
    pub fn describe(&self, config: &DiskConfig) -> Description {
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
            writable: false,
            reason: Some("this version only reads".to_owned()),
        }
    }
}

/// Whether the file is to be read as a VMDK: as it was asked, else by its content. What is no VMDK by its content is
/// a raw image only where its name does not promise a VMDK: the bytes of a damaged one must not pass for a disk.
fn is_vmdk(local: &LocalConfig, file: &dyn StoredFile) -> Result<bool> {
    match local.format {
        Format::Vmdk => Ok(true),
        Format::Raw => Ok(false),
        Format::Auto if has_vmdk_name(&local.path) => Ok(true),
        Format::Auto => Ok(vmdk::file_kind(&vmdk::read_head(file)?) != FileKind::Other),
    }
}

fn has_vmdk_name(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.as_bytes().eq_ignore_ascii_case(b"vmdk"))
}
