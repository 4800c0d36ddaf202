//! A VMDK with all its parents as one disk: the only place of the engine that reads data.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, Runs, SECTOR, check_range};
use crate::error::{Error, Result};
use crate::store::{Access, StoredFile};
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::extent::{CompressedGrain, Encoding, Extent, Kind, Run};
use crate::vmdk::inflate::inflate;
use crate::vmdk::open::{Link, MAX_LINKS, OpenOptions, Opener, PlacedExtent};
use crate::vmdk::write::{Writer, refuse_with_children};

/// An open VMDK: the newest link of its chain first.
#[derive(Debug)]
pub struct VmdkDisk {
    links: Vec<Link>,
    geometry: Geometry,
    /// What lies below the oldest link, where that is no VMDK of this chain: the source of an overlay.
    base: Option<Arc<dyn BlockRead>>,
    pub(super) writer: Option<Writer>,
}

impl VmdkDisk {
    /// Opens `file`, its extents and all its parents, which lie in the file's store.
    ///
    /// Errors: `Corrupt`, `Unsupported`, `Policy`, `NotFound`, or what the system says; each names the file.
    pub fn open(file: Arc<dyn StoredFile>, options: OpenOptions) -> Result<Self> {
        Self::of(Opener::new(options, Access::Read).chain(file)?)
    }

    /// Opens `file`, which is open for writing itself, its extents for writing too, and all its parents for reading.
    /// The tables of the newest link are checked whole; an extent that was not closed properly is repaired.
    ///
    /// Errors: as [`open`](Self::open); `ReadOnly` where a format can't be written in place, `Busy` where somebody uses
    /// an extent, `Policy` where the disk has children, `Corrupt` where the tables are damaged.
    pub fn open_writable(file: Arc<dyn StoredFile>, options: OpenOptions) -> Result<Self> {
        Self::writable(Opener::new(options, Access::Write).chain(file)?, options, None)
    }

    /// As [`open_writable`](Self::open_writable), for a base that `child` is merged into: that one is no reason to
    /// refuse it.
    pub fn open_base(file: Arc<dyn StoredFile>, options: OpenOptions, child: &dyn StoredFile) -> Result<Self> {
        Self::writable(Opener::new(options, Access::Write).chain(file)?, options, Some(child))
    }

    /// Opens `file` and its extents for `access`, and none of its parents: what lies below is told with
    /// [`over`](Self::over), or not wanted. For writing as [`open_writable`](Self::open_writable).
    pub fn open_alone(file: Arc<dyn StoredFile>, options: OpenOptions, access: Access) -> Result<Self> {
        let links = Opener::new(options, access).alone(file)?;
        match access {
            Access::Read => Self::of(links),
            Access::Write => Self::writable(links, options, None),
        }
    }

    fn writable(mut links: Vec<Link>, options: OpenOptions, child: Option<&dyn StoredFile>) -> Result<Self> {
        let Some(newest) = links.first_mut() else {
            return Self::of(links);
        };
        if !options.force {
            refuse_with_children(newest, child)?;
        }
        let writer = Writer::new(newest)?;
        Ok(Self {
            writer: Some(writer),
            ..Self::of(links)?
        })
    }

    /// The same disk over `base`, which is seen where no link has anything; behind its end are zeroes.
    #[must_use]
    pub fn over(self, base: Arc<dyn BlockRead>) -> Self {
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

    fn of(links: Vec<Link>) -> Result<Self> {
        let sectors = links.first().map_or(0, |l| l.sectors);
        let preferred = links
            .iter()
            .flat_map(|l| &l.extents)
            .filter_map(|p| packed_grain(&p.extent))
            .max();
        Ok(Self {
            geometry: Geometry {
                sectors,
                granule: 1,
                preferred: preferred.unwrap_or(1),
            },
            links,
            base: None,
            writer: None,
        })
    }

    /// The links, the newest first.
    pub(crate) fn links(&self) -> &[Link] {
        &self.links
    }

    /// The descriptor of the newest link, as it was when the disk was opened.
    pub fn descriptor(&self) -> Option<&Descriptor> {
        self.links.first().map(|link| &link.descriptor)
    }

    /// Every file of the chain, descriptors and extents.
    pub fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        let mut files = Vec::new();
        for link in &self.links {
            files.push(Arc::clone(&link.file));
            files.extend(link.extents.iter().filter_map(|p| file_of(&p.extent)).map(Arc::clone));
        }
        files
    }

    /// The names of the files that were not closed after writing.
    pub fn unclean_files(&self) -> impl Iterator<Item = &str> {
        let unclean = self.links.iter().flat_map(|l| &l.extents).filter(|p| p.unclean);
        unclean.filter_map(|p| file_of(&p.extent)).map(|f| f.label())
    }

    /// Reads what the links below the newest one have.
    pub(super) fn read_below(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        self.read_from(self.links.get(1..).unwrap_or_default(), at, buf)
    }

    /// Whether the links below the newest one are known to have only zeroes there.
    pub(super) fn is_zero_below(&self, at: Lba, sectors: u64) -> bool {
        self.is_zero_in(self.links.get(1..).unwrap_or_default(), at, sectors)
    }

    /// Whether the links below the newest one, and the base, have zeroes at `at`, and for how many of `max` sectors.
    pub(super) fn zeroes_below(&self, at: Lba, max: u64) -> Result<(bool, u64)> {
        let (content, sectors) = self.content_in(self.links.get(1..).unwrap_or_default(), at, max)?;
        Ok((content.is_zero(), sectors))
    }

    /// What `links` and the base have at `at`, and for how many of `max` sectors.
    fn content_in(&self, links: &[Link], at: Lba, max: u64) -> Result<(Content, u64)> {
        let (kind, sectors) = kind_in(links, at, max)?;
        match (kind, &self.base) {
            (Kind::Data, _) => Ok((Content::Data, sectors)),
            (Kind::Zero, _) => Ok((Content::Zero, sectors)),
            (Kind::Parent, Some(base)) => match self.inside_base(&**base, at, sectors) {
                (_, 0) => Ok((Content::Hole, sectors)),
                (base, inside) => base.content_at(at).map(|(content, n)| (content, n.min(inside))),
            },
            (Kind::Parent, None) => Ok((Content::Hole, sectors)),
        }
    }

    /// Reads from `links`, and from the base where they have nothing.
    fn read_from(&self, links: &[Link], at: Lba, buf: &mut [u8]) -> Result<()> {
        // neighbours in the same file wait here for each other, to become one read
        let mut pending: Option<Pending<'_>> = None;
        let mut passed = Passed::new();
        let mut done = 0;
        while done < buf.len() {
            let lba = at + done as u64 / SECTOR;
            let run = next_run(links, lba, (buf.len() - done) as u64 / SECTOR, &mut passed)?;
            let len = (run.sectors() * SECTOR) as usize;
            if let Run::Stored { file, sector, .. } = run {
                match &mut pending {
                    Some(p) if p.is_continued_by(file, sector, done) => p.len += len,
                    other => {
                        if let Some(p) = other.take() {
                            p.read(buf)?;
                        }
                        *other = Some(Pending {
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
                    Run::Deflate { grain, skip, .. } => read_packed(&grain, skip, part)?,
                    Run::Parent { .. } => self.read_base(lba, part)?,
                    _ => part.fill(0),
                }
            }
            done += len;
        }
        pending.map_or(Ok(()), |p| p.read(buf))
    }

    fn is_zero_in(&self, links: &[Link], at: Lba, sectors: u64) -> bool {
        let mut passed = Passed::new();
        let mut done = 0;
        while done < sectors {
            match next_run(links, at + done, sectors - done, &mut passed) {
                Ok(Run::Zero { sectors }) => done += sectors,
                Ok(Run::Parent { sectors }) if self.base_is_zero(at + done, sectors) => done += sectors,
                _ => return false,
            }
        }
        true
    }

    /// Sectors of the base from `at` on, of `sectors`.
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

/// What `links` have at `at`, and for how many of `max` sectors.
fn kind_in(links: &[Link], at: Lba, max: u64) -> Result<(Kind, u64)> {
    let mut left = max;
    for link in links {
        let Some((placed, within, sectors)) = find(link, at.0, left) else {
            break;
        };
        match placed.extent.kind_at(within, sectors)? {
            (Kind::Parent, sectors) => left = sectors,
            found => return Ok(found),
        }
    }
    Ok((Kind::Parent, left))
}

/// The run at `at`, of at most `max` sectors, in a walk from lower to higher sectors that `passed` belongs to. `Parent`
/// means here that no link has anything.
fn next_run<'a>(links: &'a [Link], at: Lba, max: u64, passed: &mut Passed) -> Result<Run<'a>> {
    let mut left = max;
    for (link, nothing_before) in links.iter().zip(&mut passed.0) {
        if at.0 < *nothing_before {
            left = left.min(*nothing_before - at.0);
            continue;
        }
        let Some((placed, within, sectors)) = find(link, at.0, left) else {
            break;
        };
        match placed.extent.run_at(within, sectors)? {
            Run::Parent { sectors } => {
                left = sectors;
                *nothing_before = at.0 + sectors;
            }
            run => return Ok(run),
        }
    }
    Ok(Run::Parent { sectors: left })
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
        // compressed grains are preferred whole
        (self.geometry.preferred == 1 && self.base.is_none()).then_some(self)
    }

    fn backing_fd(&self) -> Option<BorrowedFd<'_>> {
        let extents = &self.links.first()?.extents;
        match extents.as_slice() {
            // a file that is longer would show what is behind the disk
            [
                PlacedExtent {
                    extent: Extent::Flat { file, offset: 0 },
                    ..
                },
            ] if file.len() == self.geometry.bytes() => file.fd(),
            _ => None,
        }
    }
}

/// For each link the sector before which a walk found nothing in it, so that it is asked only once where a link
/// below has many short runs. Else a deep chain of tiny grains would be asked for all of them again at each run.
struct Passed([u64; MAX_LINKS]);

impl Passed {
    fn new() -> Self {
        Self([0; MAX_LINKS])
    }
}

/// A read that has not been done yet, because the next run may continue it.
struct Pending<'a> {
    file: &'a Arc<dyn StoredFile>,
    sector: u64,
    /// Where in the buffer it goes, and its length in bytes so far.
    start: usize,
    len: usize,
}

impl Pending<'_> {
    /// Whether what is at `sector` of `file` and goes to `start` of the buffer lies behind it in both.
    fn is_continued_by(&self, file: &Arc<dyn StoredFile>, sector: u64, start: usize) -> bool {
        let next = (self.sector + self.len as u64 / SECTOR, self.start + self.len);
        Arc::ptr_eq(self.file, file) && next == (sector, start)
    }

    fn read(self, buf: &mut [u8]) -> Result<()> {
        let part = buf.get_mut(self.start..self.start + self.len).unwrap_or_default();
        read_stored(&**self.file, self.sector * SECTOR, part)
    }
}

/// Reads stored sectors. A file may end inside of the last one: what is missing of that sector reads as zero.
fn read_stored(file: &dyn StoredFile, offset: u64, part: &mut [u8]) -> Result<()> {
    let short_of = |len: u64| (part.len() as u64).saturating_sub(len.saturating_sub(offset));
    let mut short = short_of(file.len());
    if let Some(writer) = file.writer().filter(|_| short > 0) {
        // it may have grown, to whole sectors: where it ends inside of any but its old last one, somebody has cut it
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

/// Sectors `skip …` of a compressed grain.
fn read_packed(grain: &CompressedGrain<'_>, skip: u64, part: &mut [u8]) -> Result<()> {
    if skip == 0 && part.len() as u64 >= grain.inside * SECTOR {
        return inflate(grain, part);
    }
    let mut whole = vec![0; (grain.grain * SECTOR) as usize];
    inflate(grain, &mut whole)?;
    let from = (skip * SECTOR) as usize;
    match whole.get(from..from + part.len()) {
        Some(wanted) => part.copy_from_slice(wanted),
        None => return Err(Error::corrupt("a read past the end of a grain")),
    }
    Ok(())
}

/// The extent of a link that holds sector `at`, the sector inside of it, and how many of `max` it has from there.
/// `None`: the link ends before.
fn find(link: &Link, at: u64, max: u64) -> Option<(&PlacedExtent, u64, u64)> {
    let after = link.extents.partition_point(|p| p.start <= at);
    let placed = link.extents.get(after.checked_sub(1)?)?;
    let within = at - placed.start;
    (within < placed.sectors).then(|| (placed, within, max.min(placed.sectors - within)))
}

/// The file that an extent lies in.
pub(super) fn file_of(extent: &Extent) -> Option<&Arc<dyn StoredFile>> {
    match extent {
        Extent::Flat { file, .. } => Some(file),
        Extent::Sparse(s) => Some(&s.file),
        Extent::Zero => None,
    }
}

/// Sectors of a grain of a compressed extent.
fn packed_grain(extent: &Extent) -> Option<u64> {
    match extent {
        Extent::Sparse(s) if s.packing != Encoding::Plain => Some(s.geometry().grain),
        _ => None,
    }
}
