//! Folder of one variant, and builders of the disks that many variants start from.

use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use super::model::{Content, Layer, SECTOR};
use super::write::{self, Descriptor, FileLayout, Hosted, Stream};

/// CID of the disks that [`Ctx::base`] writes.
pub const BASE_CID: u32 = 0xaaaa_0001;

/// Disks larger than this many bytes are compared at their probes, not as a whole.
pub const HASH_LIMIT: u64 = 1 << 30;

/// A valid disk that was written.
#[derive(Clone)]
pub struct Made {
    /// The file to open.
    pub open: PathBuf,
    /// Model of its content.
    pub disk: Arc<dyn Content>,
    /// Folders that must be allowed to open it, besides the folder of `open`.
    pub allow_dirs: Vec<PathBuf>,
    /// Byte ranges to compare if the disk is too large to be read as a whole; else empty.
    pub probes: Vec<Range<u64>>,
}

impl Made {
    /// Creates a disk without further folders or probes.
    pub fn new(open: PathBuf, disk: Arc<dyn Content>) -> Self {
        Self {
            open,
            disk,
            allow_dirs: Vec::new(),
            probes: Vec::new(),
        }
    }

    /// Sets its probes to ranges of 256 sectors from each of `sectors` on.
    #[must_use]
    pub fn probing(mut self, sectors: &[u64]) -> Self {
        let end = self.sectors();
        self.probes = sectors
            .iter()
            .map(|s| s * SECTOR..(s + 256).min(end) * SECTOR)
            .collect();
        self
    }

    /// Returns the size of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors()
    }

    /// Returns the content of `count` sectors from `sector` on.
    pub fn read(&self, sector: u64, count: u64) -> Vec<u8> {
        self.disk.read(sector, count)
    }

    /// Returns true if the disk is small enough to be read and hashed as a whole.
    pub fn is_hashable(&self) -> bool {
        self.sectors() * SECTOR <= HASH_LIMIT
    }
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Made")
            .field("open", &self.open)
            .field("sectors", &self.sectors())
            .finish_non_exhaustive()
    }
}

/// The folder of one variant, and the seed of its noise.
#[derive(Debug)]
pub struct Ctx {
    dir: PathBuf,
    seed: u64,
}

/// A valid sparse or stream file that a test may damage afterwards.
#[derive(Debug)]
pub struct Good {
    /// The file.
    pub path: PathBuf,
    /// Model of its content.
    pub layer: Layer,
    /// Positions of its tables and grains.
    pub at: FileLayout,
}

impl Good {
    /// Converts it into a valid disk.
    pub fn made(self) -> Made {
        Made::new(self.path, Arc::new(self.layer))
    }
}

impl Ctx {
    /// Creates the folder, which must not exist.
    pub fn new(dir: &Path, seed: u64) -> Result<Self> {
        fs::create_dir(dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Self {
            dir: dir.to_owned(),
            seed,
        })
    }

    /// Returns the folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns a path below the folder.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Creates a folder below the folder.
    pub fn subdir(&self, name: &str) -> Result<PathBuf> {
        let path = self.at(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Creates an empty layer with the seed of this run.
    pub fn layer(&self, label: &str, capacity: u64, grain: u64) -> Layer {
        Layer::new(self.seed, label, capacity, grain)
    }

    /// Writes a descriptor and returns its path.
    pub fn text(&self, name: &str, descriptor: &Descriptor) -> Result<PathBuf> {
        write::put(self.at(name), &descriptor.bytes()?)
    }

    /// Writes a small VMFS disk "base.vmdk" with a few grains of noise.
    pub fn base(&self, capacity: u64) -> Result<Arc<Layer>> {
        self.flat_disk("base", capacity, "vmfs", "VMFS", "")
    }

    /// Writes a monolithicFlat disk of this name with a few grains of noise.
    pub fn flat_base(&self, name: &str, capacity: u64) -> Result<Arc<Layer>> {
        self.flat_disk(name, capacity, "monolithicFlat", "FLAT", " 0")
    }

    fn flat_disk(
        &self,
        name: &str,
        capacity: u64,
        create_type: &'static str,
        extent_type: &str,
        offset: &str,
    ) -> Result<Arc<Layer>> {
        let layer = self
            .layer(name, capacity, 16)
            .fill([0, 3, 4, 5, 100, capacity / 16 - 1]);
        write::flat(&self.at(&format!("{name}-flat.vmdk")), &layer, 0)?;
        let line = format!("RW {capacity} {extent_type} \"{name}-flat.vmdk\"{offset}");
        self.text(
            &format!("{name}.vmdk"),
            &Descriptor::new(create_type, [line]).cid(BASE_CID),
        )?;
        Ok(Arc::new(layer))
    }

    /// Writes a monolithicSparse disk into the file `name`; `edit` modifies the usual descriptor.
    pub fn sparse(
        &self,
        name: &str,
        layer: &Layer,
        options: &Hosted,
        edit: impl FnOnce(Descriptor) -> Descriptor,
    ) -> Result<(PathBuf, FileLayout)> {
        let file = name.rsplit('/').next().unwrap_or(name);
        let line = format!("RW {} SPARSE \"{file}\"", layer.sectors());
        let text = edit(Descriptor::new("monolithicSparse", [line])).bytes()?;
        let path = self.at(name);
        let layout = write::hosted(&path, layer, Some(&text), options)?;
        Ok((path, layout))
    }

    /// Writes a valid monolithicSparse disk of 4 MiB with four grains.
    pub fn simple(&self) -> Result<Good> {
        self.simple_of(8192, 128, &[0, 1, 5, 63], &Hosted::default())
    }

    /// Writes a valid monolithicSparse disk with these grains of noise.
    pub fn simple_of(&self, capacity: u64, grain: u64, grains: &[u64], options: &Hosted) -> Result<Good> {
        let layer = self.layer("disk", capacity, grain).fill(grains.iter().copied());
        let (path, at) = self.sparse("disk.vmdk", &layer, options, |text| text)?;
        Ok(Good { path, layer, at })
    }

    /// Writes a valid streamOptimized disk of 4 MiB with four grains.
    pub fn stream(&self, options: &Stream) -> Result<Good> {
        let layer = self.layer("stream", 8192, 128).fill([0, 1, 5, 63]);
        self.stream_of(layer, "disk.vmdk", options)
    }

    /// Writes a streamOptimized disk into "disk.vmdk"; its extent line names the file `name`.
    pub fn stream_of(&self, layer: Layer, name: &str, options: &Stream) -> Result<Good> {
        let line = format!("RDONLY {} SPARSE \"{name}\"", layer.sectors());
        let text = Descriptor {
            encoding: None,
            ..Descriptor::new("streamOptimized", [line])
        };
        let path = self.at("disk.vmdk");
        let at = write::stream(&path, &layer, &text.bytes()?, options)?;
        Ok(Good { path, layer, at })
    }
}
