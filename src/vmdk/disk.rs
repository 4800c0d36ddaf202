//! A VMDK with all its parents as one disk: the only module of the engine that reads data.
//!
//! ```text
//!   sector ─► newest link ─► its parent ─► … ─► base (the source below an overlay) ─► zeroes
//! ```
//! The first link that has a grain, a zero range or flat data at a sector answers for it. Runs that follow each other
//! in one file are coalesced into one read.

use std::collections::HashSet;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, Runs, SECTOR, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, StoredFile};
use crate::vmdk::chain::{ChainCursor, Link, PlacedExtent, content_in};
use crate::vmdk::check::{self, CheckReport};
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::extent::{CompressedGrain, Extent, Mapping, MappingKind};
use crate::vmdk::inflate::inflate;
use crate::vmdk::open::{Chain, Opener};
use crate::vmdk::open_options::OpenOptions;
use crate::vmdk::orphan::LostParent;
use crate::vmdk::write::{Writer, refuse_with_children};
use crate::write_latch::WriteLatch;

/// An open VMDK with its chain.
#[derive(Debug)]
pub struct VmdkDisk {
    /// The newest link first.
    links: Vec<Link>,
    geometry: Geometry,
    /// Source below the oldest link, for an overlay that was opened alone.
    base: Option<Arc<dyn BlockRead>>,
    /// Reason why the parent of the oldest link is missing. `base` is then what fails in its place.
    pub(super) lost_parent: Option<Error>,
    /// Writing half, if the disk was opened for writing.
    pub(super) writer: Option<Writer>,
    /// Write latch of `writer`; never set without one.
    pub(super) latch: Arc<WriteLatch>,
}

impl VmdkDisk {
    /// Opens `file` for reading, with its extents and all its parents, which lie in the file's store.
    ///
    /// Errors: `Corrupt`, `Unsupported`, `Policy`, `NotFound`, those of I/O; each names the file.
    pub fn open(file: Arc<dyn StoredFile>, options: OpenOptions) -> Result<Self> {
        Self::of(Opener::new(options, Access::Read).chain(file)?)
    }

    /// Opens `file`, which itself must be open for writing, with its extents for writing and all its parents for
    /// reading. All tables of the newest link are checked; an extent that was not closed is recovered.
    ///
    /// Errors: as [`open`](Self::open); `ReadOnly` if a format can't be written in place, `Busy` if another process
    /// uses an extent, `Policy` if the disk has children, `Corrupt` if the tables are damaged.
    pub fn open_writable(file: Arc<dyn StoredFile>, options: OpenOptions) -> Result<Self> {
        let force = options.force;
        Self::writable(Opener::new(options, Access::Write).chain(file)?, force, None)
    }

    /// As [`open_writable`](Self::open_writable), for a base that `child` is merged into: `child` does not count as a
    /// child of the base.
    pub(crate) fn open_base(file: Arc<dyn StoredFile>, options: OpenOptions, child: &dyn StoredFile) -> Result<Self> {
        let force = options.force;
        Self::writable(Opener::new(options, Access::Write).chain(file)?, force, Some(child))
    }

    /// Opens `file` and its extents for `access`, without its parents. The caller adds the source below with
    /// [`over`](Self::over), or does without. For writing as [`open_writable`](Self::open_writable).
    pub(crate) fn open_alone(file: Arc<dyn StoredFile>, options: OpenOptions, access: Access) -> Result<Self> {
        let force = options.force;
        let chain = Opener::new(options, access).alone(file)?;
        match access {
            Access::Read | Access::Peek => Self::of(chain),
            Access::Write => Self::writable(chain, force, None),
        }
    }

    fn writable(mut chain: Chain, force: bool, child: Option<&dyn StoredFile>) -> Result<Self> {
        let Some(newest) = chain.links.first_mut() else {
            return Self::of(chain);
        };
        refuse_without_parent(chain.lost_parent.as_ref())?;
        if !force {
            // Before `Writer::new`, whose recovery changes files.
            refuse_with_children(newest, child)?;
        }
        let writer = Writer::new(newest)?;
        Ok(Self {
            latch: Arc::clone(&writer.latch),
            writer: Some(writer),
            ..Self::of(chain)?
        })
    }

    /// Returns this disk over `base`, which shows where no link has anything. After the end of `base` are zeroes.
    #[must_use]
    pub fn over(self, base: Arc<dyn BlockRead>) -> Self {
        // Ranges of the base are read whenever a request falls through the links, so requests have to fit its granules
        // too.
        let granule = self.geometry.granule.max(base.geometry().granule);
        let geometry = Geometry {
            granule,
            preferred: self.geometry.preferred.max(granule),
            ..self.geometry
        };
        Self {
            geometry,
            base: Some(base),
            ..self
        }
    }

    fn of(Chain { links, lost_parent }: Chain) -> Result<Self> {
        let sectors = links.first().map_or(0, |l| l.sectors);
        let preferred = links
            .iter()
            .flat_map(|l| &l.extents)
            .filter_map(|p| p.extent.compressed_grain())
            .max();
        Ok(Self {
            geometry: Geometry {
                sectors,
                granule: 1,
                preferred: preferred.unwrap_or(1),
            },
            links,
            base: lost_parent
                .clone()
                .map(|reason| Arc::new(LostParent { sectors, reason }) as Arc<dyn BlockRead>),
            lost_parent,
            writer: None,
            latch: Arc::default(),
        })
    }

    /// Returns the links, the newest first.
    pub(crate) fn links(&self) -> &[Link] {
        &self.links
    }

    /// Returns true if there are links below the newest one, or a base.
    pub(super) fn has_backing(&self) -> bool {
        self.links.len() > 1 || self.base.is_some()
    }

    /// Returns the descriptor of the newest link, as it was when the disk was opened.
    pub fn descriptor(&self) -> Option<&Descriptor> {
        self.links.first().map(|link| &link.descriptor)
    }

    /// Returns every file of the chain once: the descriptor of each link, then its extents.
    pub fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        let mut files = Vec::new();
        for link in &self.links {
            files.push(Arc::clone(&link.file));
            files.extend(link.extents.iter().filter_map(|p| p.extent.file()).map(Arc::clone));
        }
        // A monolithic image is its own descriptor file, and several extents may lie in one file.
        let mut seen = HashSet::new();
        files.retain(|file| seen.insert(Arc::as_ptr(file).cast::<()>()));
        files
    }

    /// Returns what is odd about the descriptors and sizes: what decides no byte here and other programs may refuse.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        let lost = self.lost_parent.iter();
        let lost = lost.map(|e| format!("{e}; what only the parent holds cannot be read (degraded=orphan)"));
        self.links.iter().flat_map(Link::all_warnings).chain(lost)
    }

    /// Checks all links. A read error is an error in the report.
    pub fn check(&self) -> CheckReport {
        let mut report = check::check(&self.links);
        if let Some(lost) = &self.lost_parent {
            report.add_note(lost.to_string());
        }
        report
    }

    /// Returns the names of the files that were not closed after writing.
    pub fn unclean_files(&self) -> impl Iterator<Item = &str> {
        let unclean = self.links.iter().flat_map(|l| &l.extents).filter(|p| p.unclean);
        unclean.filter_map(|p| p.extent.file()).map(|f| f.label())
    }

    /// Reads from the links below the newest one, and the base.
    pub(super) fn read_below(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        self.read_from(self.links.get(1..).unwrap_or_default(), at, buf)
    }

    /// Returns true if the links below the newest one, and the base, are known to have only zeroes there.
    pub(super) fn is_zero_below(&self, at: Lba, sectors: u64) -> bool {
        self.is_zero_in(self.links.get(1..).unwrap_or_default(), at, sectors)
    }

    /// Returns true if the links below the newest one, and the base, have zeroes at `at`, and for how many of `max`
    /// sectors the answer holds.
    pub(super) fn zeroes_below(&self, at: Lba, max: u64) -> Result<(bool, u64)> {
        let (content, sectors) = self.content_in(self.links.get(1..).unwrap_or_default(), at, max)?;
        Ok((content.is_zero(), sectors))
    }

    /// Returns the content of `links` and the base at `at`, and for how many of `max` sectors it holds.
    fn content_in(&self, links: &[Link], at: Lba, max: u64) -> Result<(Content, u64)> {
        let (kind, sectors) = content_in(links, at, max)?;
        match (kind, &self.base) {
            (MappingKind::Data, _) => Ok((Content::Data, sectors)),
            (MappingKind::Zero, _) => Ok((Content::Zero, sectors)),
            (MappingKind::Hole, Some(base)) => match self.inside_base(&**base, at, sectors) {
                (_, 0) => Ok((Content::Hole, sectors)),
                // The base's answer may reach behind the range in which the links have nothing.
                (base, inside) => base.content_at(at).map(|(content, n)| (content, n.min(inside))),
            },
            (MappingKind::Hole, None) => Ok((Content::Hole, sectors)),
        }
    }

    /// Reads from `links`, and from the base where they have nothing.
    fn read_from(&self, links: &[Link], at: Lba, buf: &mut [u8]) -> Result<()> {
        // A stored run is not read at once: if the next one follows it in the same file, both become one read.
        let mut pending: Option<PendingRead<'_>> = None;
        let mut cursor = ChainCursor::reader(links);
        let mut done = 0;
        while done < buf.len() {
            let lba = at + done as u64 / SECTOR;
            let run = cursor.map(lba, (buf.len() - done) as u64 / SECTOR)?.mapping;
            // At most what is left of `buf`: `map` returns no longer run than it was asked for.
            let len = (run.sectors() * SECTOR) as usize;
            if let Mapping::Stored { file, sector, .. } = run {
                match &mut pending {
                    Some(p) if p.is_continued_by(file, sector, done) => p.len += len,
                    other => {
                        if let Some(p) = other.take() {
                            p.read(buf)?;
                        }
                        *other = Some(PendingRead {
                            file,
                            sector,
                            start: done,
                            len,
                        });
                    }
                }
            } else {
                let part = buf.get_mut(done..done + len).unwrap_or_default();
                match run {
                    Mapping::Compressed { grain, skip, .. } => read_compressed(&grain, skip, part)?,
                    Mapping::Hole { .. } => self.read_base(lba, part)?,
                    _ => part.fill(0),
                }
            }
            done += len;
        }
        pending.map_or(Ok(()), |p| p.read(buf))
    }

    fn is_zero_in(&self, links: &[Link], at: Lba, sectors: u64) -> bool {
        let mut cursor = ChainCursor::reader(links);
        let mut done = 0;
        while done < sectors {
            match cursor.map(at + done, sectors - done).map(|found| found.mapping) {
                Ok(Mapping::Zero { sectors }) => done += sectors,
                Ok(Mapping::Hole { sectors }) if self.base_is_zero(at + done, sectors) => done += sectors,
                _ => return false,
            }
        }
        true
    }

    /// Returns `base`, and how many of `sectors` from `at` on lie inside of it. A base may be smaller than its overlay.
    fn inside_base<'a>(&self, base: &'a dyn BlockRead, at: Lba, sectors: u64) -> (&'a dyn BlockRead, u64) {
        (base, base.geometry().sectors.saturating_sub(at.0).min(sectors))
    }

    fn read_base(&self, at: Lba, part: &mut [u8]) -> Result<()> {
        let sectors = part.len() as u64 / SECTOR;
        let inside = match &self.base {
            Some(base) => match self.inside_base(&**base, at, sectors) {
                (base, inside @ 1..) => {
                    base.read_at(at, part.get_mut(..(inside * SECTOR) as usize).unwrap_or_default())?;
                    inside
                }
                _ => 0,
            },
            None => 0,
        };
        part.get_mut((inside * SECTOR) as usize..).unwrap_or_default().fill(0);
        Ok(())
    }

    fn base_is_zero(&self, at: Lba, sectors: u64) -> bool {
        self.base
            .as_ref()
            .is_none_or(|base| match self.inside_base(&**base, at, sectors) {
                (_, 0) => true,
                (base, inside) => base.is_zero(at, inside),
            })
    }
}

impl BlockRead for VmdkDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        self.read_from(&self.links, at, buf)
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        check_range(&self.geometry, at, SECTOR as usize)?;
        self.content_in(&self.links, at, self.geometry.sectors - at.0)
    }

    fn is_zero(&self, at: Lba, sectors: u64) -> bool {
        self.is_zero_in(&self.links, at, sectors)
    }

    fn writer(&self) -> Option<&dyn BlockWrite> {
        self.writer.as_ref().map(|_| self as &dyn BlockWrite)
    }

    fn runs(&self) -> Option<&dyn Runs> {
        // A preferred size above one sector means compressed grains, which have no runs.
        (self.geometry.preferred == 1 && self.base.is_none()).then_some(self)
    }

    fn why_no_runs(&self) -> &'static str {
        match self.base {
            Some(_) if self.lost_parent.is_some() => "a part of its data is missing (degraded=orphan)",
            Some(_) => "its data are not stored as they are read (below an overlay)",
            None => "its data are not stored as they are read (compressed)",
        }
    }

    fn backing_fd(&self) -> Option<BorrowedFd<'_>> {
        // The newest link alone: its flat extent hides all parents.
        let extents = &self.links.first()?.extents;
        match extents.as_slice() {
            // The kernel reads the file up to its end, so a longer file would show bytes after the end of the disk.
            [
                PlacedExtent {
                    extent: Extent::Flat { file, offset: 0 },
                    ..
                },
            ] if file.len() == self.geometry.bytes() => file.content_fd(),
            _ => None,
        }
    }
}

/// Refuses to write to a disk whose parent is missing: a grain that is written in part could not be filled.
pub(super) fn refuse_without_parent(lost: Option<&Error>) -> Result<()> {
    lost.map_or(Ok(()), |e| {
        Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{e}; without it the disk can only be read; cow=FILE writes to an overlay instead"),
        ))
    })
}

/// A read that is delayed, because the next run may continue it.
struct PendingRead<'a> {
    file: &'a Arc<dyn StoredFile>,
    sector: u64,
    /// Position in the buffer.
    start: usize,
    /// Bytes so far.
    len: usize,
}

impl PendingRead<'_> {
    /// Returns true if `sector` of `file` and position `start` of the buffer both follow the end of this read.
    fn is_continued_by(&self, file: &Arc<dyn StoredFile>, sector: u64, start: usize) -> bool {
        let next = (self.sector + self.len as u64 / SECTOR, self.start + self.len);
        Arc::ptr_eq(self.file, file) && next == (sector, start)
    }

    fn read(self, buf: &mut [u8]) -> Result<()> {
        let part = buf.get_mut(self.start..self.start + self.len).unwrap_or_default();
        read_stored(&**self.file, self.sector * SECTOR, part)
    }
}

/// Reads stored sectors. A file may end inside of its last sector: the missing part of that sector reads as zeroes.
/// More than that missing is an error.
fn read_stored(file: &dyn StoredFile, offset: u64, part: &mut [u8]) -> Result<()> {
    let short_of = |len: u64| (part.len() as u64).saturating_sub(len.saturating_sub(offset));
    let mut short = short_of(file.len());
    if let Some(writer) = file.writer().filter(|_| short > 0) {
        // `len` is that of the open. A file that is written to may have grown since, always to whole sectors. If it now
        // ends inside of any sector but its old last one, another process has truncated it, and the read has to fail.
        let now = writer.current_len()?;
        let as_before = (file.len()..file.len().next_multiple_of(SECTOR)).contains(&now);
        short = if as_before { short_of(now) } else { 0 };
    }
    if short == 0 || short >= SECTOR {
        return file.read_exact_at(offset, part);
    }
    let left = part.len() as u64 - short;
    let (real, missing) = part.split_at_mut(left as usize);
    missing.fill(0);
    file.read_exact_at(offset, real)
}

/// Reads the sectors of a compressed grain from sector `skip` of the grain on.
fn read_compressed(grain: &CompressedGrain<'_>, skip: u64, part: &mut [u8]) -> Result<()> {
    // A whole grain is inflated in place, without a copy. The cache above asks for whole grains.
    if skip == 0 && part.len() as u64 >= grain.inside * SECTOR {
        return inflate(grain, part);
    }
    let mut whole = vec![0; (grain.grain * SECTOR) as usize];
    inflate(grain, &mut whole)?;
    let from = (skip * SECTOR) as usize;
    match whole.get(from..from + part.len()) {
        Some(sectors) => part.copy_from_slice(sectors),
        None => return Err(Error::corrupt("a read past the end of a grain")),
    }
    Ok(())
}
