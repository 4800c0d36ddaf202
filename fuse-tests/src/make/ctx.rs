//! Where one variant writes, and the disks that many variants start from.

use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use super::model::{Content, Layer, SECTOR};
use super::write::{self, Descriptor, Hosted, Places, Stream};

/// CID of the disks that [`Ctx::base`] makes.
pub const BASE_CID: u32 = 0xaaaa_0001;

/// Disks above this many bytes are compared by probes, not as a whole.
pub const HASH_LIMIT: u64 = 1 << 30;

/// A valid disk that was made.
#[derive(Clone)]
pub struct Made {
    /// The file to open.
    pub open: PathBuf,
    /// What it holds.
    pub disk: Arc<dyn Content>,
    /// Folders that must be allowed for it to open, besides the one of `open`.
    pub allow_dirs: Vec<PathBuf>,
    /// Byte ranges to compare, of a disk that is too large to be read as a whole; else empty.
    pub probes: Vec<Range<u64>>,
}

impl Made {
    /// A disk that needs nothing further.
    pub fn new(open: PathBuf, disk: Arc<dyn Content>) -> Self {
        Self {
            open,
            disk,
            allow_dirs: Vec::new(),
            probes: Vec::new(),
        }
    }

    /// The same, with ranges around `sectors` as its probes.
    #[must_use]
    pub fn probing(mut self, sectors: &[u64]) -> Self {
        let end = self.sectors();
        self.probes = sectors
            .iter()
            .map(|s| s * SECTOR..(s + 256).min(end) * SECTOR)
            .collect();
        self
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors()
    }

    /// What `count` sectors from `sector` on hold.
    pub fn read(&self, sector: u64, count: u64) -> Vec<u8> {
        self.disk.read(sector, count)
    }

    /// Whether the disk is small enough to be read and hashed as a whole.
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

/// A good sparse or stream file, to be damaged afterwards.
#[derive(Debug)]
pub struct Good {
    /// The file.
    pub path: PathBuf,
    /// What it holds.
    pub layer: Layer,
    /// Where things lie in it.
    pub at: Places,
}

impl Good {
    /// As a valid disk.
    pub fn made(self) -> Made {
        Made::new(self.path, Arc::new(self.layer))
    }
}

impl Ctx {
    /// Makes the folder, which must not exist.
    pub fn new(dir: &Path, seed: u64) -> Result<Self> {
        fs::create_dir(dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(Self {
            dir: dir.to_owned(),
            seed,
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path below the folder.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes a folder below the folder.
    pub fn subdir(&self, name: &str) -> Result<PathBuf> {
        let path = self.at(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// An empty layer with the seed of this run.
    pub fn layer(&self, label: &str, capacity: u64, grain: u64) -> Layer {
        Layer::new(self.seed, label, capacity, grain)
    }

    /// Writes a descriptor.
    pub fn text(&self, name: &str, descriptor: &Descriptor) -> Result<PathBuf> {
        write::put(self.at(name), &descriptor.bytes()?)
    }

    /// A small VMFS disk "base.vmdk" with noise in some places.
    pub fn base(&self, capacity: u64) -> Result<Arc<Layer>> {
        self.flat_disk("base", capacity, "vmfs", "VMFS", "")
    }

    /// The same as a monolithicFlat disk of any name.
    pub fn flat_base(&self, name: &str, capacity: u64) -> Result<Arc<Layer>> {
        self.flat_disk(name, capacity, "monolithicFlat", "FLAT", " 0")
    }

    fn flat_disk(&self, name: &str, capacity: u64, kind: &'static str, word: &str, offset: &str) -> Result<Arc<Layer>> {
        let layer = self
            .layer(name, capacity, 16)
            .fill([0, 3, 4, 5, 100, capacity / 16 - 1]);
        write::flat(&self.at(&format!("{name}-flat.vmdk")), &layer, 0)?;
        let line = format!("RW {capacity} {word} \"{name}-flat.vmdk\"{offset}");
        self.text(&format!("{name}.vmdk"), &Descriptor::new(kind, [line]).cid(BASE_CID))?;
        Ok(Arc::new(layer))
    }

    /// A monolithicSparse disk in the file `name`; `edit` changes the usual descriptor.
    pub fn sparse(
        &self,
        name: &str,
        layer: &Layer,
        options: &Hosted,
        edit: impl FnOnce(Descriptor) -> Descriptor,
    ) -> Result<(PathBuf, Places)> {
        let file = name.rsplit('/').next().unwrap_or(name);
        let line = format!("RW {} SPARSE \"{file}\"", layer.sectors());
        let text = edit(Descriptor::new("monolithicSparse", [line])).bytes()?;
        let path = self.at(name);
        let places = write::hosted(&path, layer, Some(&text), options)?;
        Ok((path, places))
    }

    /// A good monolithicSparse disk of 4 MiB with four grains.
    pub fn simple(&self) -> Result<Good> {
        self.simple_of(8192, 128, &[0, 1, 5, 63], &Hosted::default())
    }

    /// A good monolithicSparse disk with some grains of noise.
    pub fn simple_of(&self, capacity: u64, grain: u64, grains: &[u64], options: &Hosted) -> Result<Good> {
        let layer = self.layer("disk", capacity, grain).fill(grains.iter().copied());
        let (path, at) = self.sparse("disk.vmdk", &layer, options, |text| text)?;
        Ok(Good { path, layer, at })
    }

    /// A good streamOptimized disk of 4 MiB with four grains.
    pub fn stream(&self, options: &Stream) -> Result<Good> {
        let layer = self.layer("stream", 8192, 128).fill([0, 1, 5, 63]);
        self.stream_of(layer, "disk.vmdk", options)
    }

    /// A streamOptimized disk in "disk.vmdk", whose extent line says `name`.
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
