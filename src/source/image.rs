//! Images in stored files: VMDKs, which the engine reads, and raw images. Shared by the back ends that have files.

use std::sync::Arc;
use std::time::Duration;

use super::format::DiskFormat;
use super::{CacheSizes, RawDisk, Source, SourceDescription, SourceIdentity};
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::config::{Locality, SourceSettings};
use crate::error::{Error, Result};
use crate::store::StoredFile;
use crate::vmdk::{CheckReport, OpenOptions, StreamDisk, VmdkDisk};

/// Read-ahead of inflated grains by default, in bytes: as far as the kernel itself reads ahead if it is allowed to.
const GRAIN_READAHEAD: u64 = 2 << 20;

/// Maximum number of threads that inflate: more do not make one reader faster.
const MAX_WORKERS: usize = 8;

/// Maximum time that a reader waits for a grain that another thread inflates: that thread may wait for a server.
const GRAIN_DEADLINE: Duration = Duration::from_secs(60);

/// An open image.
#[derive(Debug)]
pub(super) enum Image {
    /// A VMDK with its chain.
    Vmdk(Arc<VmdkDisk>),
    /// A raw image, and its file.
    Raw(Arc<RawDisk>, Arc<dyn StoredFile>),
}

impl Image {
    /// Opens the image in `file` for reading, and logs what is odd about it.
    pub(super) fn open(
        file: Arc<dyn StoredFile>,
        format: DiskFormat,
        options: impl FnOnce() -> Result<OpenOptions>,
    ) -> Result<Self> {
        if format == DiskFormat::Raw {
            return Self::raw(file);
        }
        let disk = VmdkDisk::open(file, options()?)?;
        for warning in disk.warnings() {
            tracing::warn!("{warning}");
        }
        for unclean in disk.unclean_files() {
            tracing::info!("{unclean}: was not closed after writing; --check verifies it");
        }
        Ok(Self::Vmdk(Arc::new(disk)))
    }

    /// Opens the image in `file`, which is open for writing.
    pub(super) fn open_writable(
        file: Arc<dyn StoredFile>,
        format: DiskFormat,
        options: impl FnOnce() -> Result<OpenOptions>,
    ) -> Result<Self> {
        match format {
            DiskFormat::Raw => Self::raw(file),
            DiskFormat::Vmdk => VmdkDisk::open_writable(file, options()?).map(|disk| Self::Vmdk(Arc::new(disk))),
        }
    }

    fn raw(file: Arc<dyn StoredFile>) -> Result<Self> {
        Ok(Self::Raw(Arc::new(RawDisk::new(Arc::clone(&file))?), file))
    }

    /// Returns the disk.
    pub(super) fn disk(&self) -> Arc<dyn BlockRead> {
        match self {
            Self::Vmdk(disk) => Arc::clone(disk) as Arc<dyn BlockRead>,
            Self::Raw(disk, _) => Arc::clone(disk) as Arc<dyn BlockRead>,
        }
    }

    pub(super) fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        match self {
            Self::Vmdk(disk) => disk.files(),
            Self::Raw(_, file) => vec![Arc::clone(file)],
        }
    }

    /// Returns the files that a write may change.
    pub(super) fn files_written(&self) -> Vec<Arc<dyn StoredFile>> {
        match self {
            Self::Vmdk(disk) => disk.files_written(),
            Self::Raw(_, file) => vec![Arc::clone(file)],
        }
    }

    /// Returns the error with which the format refuses writing. With `force` children do not matter.
    pub(super) fn write_refusal(&self, force: bool) -> Option<Error> {
        match self {
            Self::Vmdk(disk) => disk.refuses_writing(force),
            Self::Raw(..) => None,
        }
    }

    pub(super) fn describe(&self) -> SourceDescription {
        match self {
            Self::Vmdk(disk) => SourceDescription {
                format: "vmdk",
                vmdk: Some(disk.info()),
            },
            Self::Raw(..) => SourceDescription {
                format: "raw",
                vmdk: None,
            },
        }
    }

    pub(super) fn cid(&self) -> Option<u32> {
        match self {
            Self::Vmdk(disk) => disk.descriptor().and_then(|d| d.cid),
            Self::Raw(..) => None,
        }
    }

    pub(super) fn check(&self) -> CheckReport {
        match self {
            Self::Vmdk(disk) => disk.check(),
            Self::Raw(..) => CheckReport::default(),
        }
    }

    /// Returns the cache for inflated grains, of `size` bytes, if the image has compressed ones. A disk that is written to
    /// has one only where the user asks for it.
    pub(super) fn grain_cache(&self, size: u64, asked: CacheSizes) -> Option<CacheOptions> {
        let geometry = self.disk().geometry();
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let wanted = self.disk().writer().is_none() || asked.size.is_some();
        (wanted && geometry.preferred > geometry.granule).then(|| CacheOptions {
            size,
            readahead: asked.readahead.unwrap_or(GRAIN_READAHEAD),
            workers: workers.min(MAX_WORKERS),
            block: geometry.preferred,
            // Each block is work of its own for a processor.
            max_run: 1,
            deadline: GRAIN_DEADLINE,
            drop_at_open: false,
        })
    }
}

/// A new compressed stream, which is written in order.
#[derive(Debug)]
pub(super) struct StreamSource {
    disk: Arc<StreamDisk>,
    label: String,
}

impl StreamSource {
    /// Creates the source of a stream that `settings` have created.
    pub(super) fn new(disk: StreamDisk, settings: &dyn SourceSettings) -> Self {
        Self {
            disk: Arc::new(disk),
            label: settings.label(),
        }
    }
}

impl Source for StreamSource {
    fn disk(&self) -> Arc<dyn BlockRead> {
        Arc::clone(&self.disk) as Arc<dyn BlockRead>
    }

    fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        vec![self.disk.file()]
    }

    fn locality(&self) -> Locality {
        Locality::Here
    }

    fn describe(&self) -> SourceDescription {
        SourceDescription {
            format: "vmdk",
            vmdk: None,
        }
    }

    fn write_refusal(&self) -> Option<Error> {
        None
    }

    fn identity(&self) -> Result<SourceIdentity> {
        Ok(SourceIdentity {
            label: self.label.clone(),
            address: self.label.clone().into(),
            cid: None,
        })
    }

    fn cache(&self, _asked: CacheSizes) -> Option<CacheOptions> {
        None
    }
}
