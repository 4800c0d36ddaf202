//! Opens a chain: from a file to its links and their extents.
//!
//! ```text
//!   file ──magic──► KDMV ─► header ─► embedded descriptor ─► one extent, the file itself
//!                     └──── capacity 0: only a container ──┐
//!          ──text───► descriptor ◄──────────────────────────┘
//!                        ├─► extent lines ─► files beside it ─► magic ─► KDMV, COWD, seSparse, flat
//!                        └─► parentFileNameHint ─► the next link, checked by its CID
//!                            (VirtualBox: ddb.uuid.parent ─► neighbours.rs)
//! ```
//! Everything that can be checked without reading tables is checked here. The names come from untrusted files, so every
//! file but the first is opened through the store, whose gate (`ExtentName`, `OpenPolicy`) may refuse it.
//!
//! Bounds: [`MAX_LINKS`], [`MAX_EXTENTS`] and [`MAX_TEXT`] limit the work that a hostile image can cause; a chain that
//! comes back to one of its files is refused.

mod flat_extent;
mod named_files;

use std::ops::Range;
use std::sync::Arc;

use self::flat_extent::{device_copy, flat_extent, lost_end};
use self::named_files::{missing_extent, named_parent, open_extent};
use crate::block::{MAX_SECTORS, SECTOR};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, Store, StoredFile};
use crate::vmdk::chain::{Link, MAX_LINKS, PlacedExtent};
use crate::vmdk::descriptor::{Descriptor, ExtentAccess, ExtentKind, ExtentLine};
use crate::vmdk::extent::{Encoding, Extent, SparseExtent};
use crate::vmdk::file_kind::{FileKind, file_kind, read_head};
use crate::vmdk::header::{Cowd, DirectoryAt, HEAD_BYTES, Hosted, Role, SeSparse, StreamTail};
use crate::vmdk::open_options::OpenOptions;
use crate::vmdk::tables::TableCache;
use crate::vmdk::tables::cowd::CowdTables;
use crate::vmdk::tables::hosted::HostedTables;
use crate::vmdk::tables::sesparse::SeSparseTables;
use crate::vmdk::{lost_descriptor, neighbours, sizes};

/// Maximum number of extents of a whole chain; a single descriptor may list as many.
const MAX_EXTENTS: usize = 1 << 16;

/// Maximum bytes of a descriptor in a file of its own.
const MAX_TEXT: u64 = 1 << 20;

/// An open chain.
#[derive(Debug)]
pub(crate) struct Chain {
    /// The newest link first.
    pub(crate) links: Vec<Link>,
    /// Reason why the parent of the oldest link could not be opened, if the user accepts that.
    pub(crate) lost_parent: Option<Error>,
}

/// Opens the links of a disk, the newest first.
#[derive(Debug)]
pub(crate) struct Opener {
    options: OpenOptions,
    cache: TableCache,
    /// Number of the extent that was opened last, for the keys of the cache.
    next_extent: u32,
    /// Number of extents of the whole chain so far.
    extents: usize,
    /// Access for the extents of the next link.
    access: Access,
}

impl Opener {
    /// Creates an opener that opens the newest link for `access`. Its parents are always opened for reading.
    pub(crate) fn new(options: OpenOptions, access: Access) -> Self {
        Self {
            options,
            cache: TableCache::new(),
            next_extent: 0,
            extents: 0,
            access,
        }
    }

    /// Opens `file` and all its parents.
    ///
    /// Errors: those of the files; `Usage` if the options name a parent and every link has its own.
    pub(crate) fn chain(mut self, file: Arc<dyn StoredFile>) -> Result<Chain> {
        let mut links = vec![self.link(file)?];
        // Only the newest link is ever written. A parent may have other children, which are in use.
        self.access = Access::Read;
        let mut seen = Vec::new();
        while let Some(child) = links.last().filter(|link| names_parent(link)) {
            // By device, inode and start, so that other names of a file are recognized.
            seen.push(child.file.identity()?.place());
            let within = |e: Error| e.within(format!("{}: its parent", child.file.label()));
            if links.len() == MAX_LINKS {
                return Err(within(Error::unsupported(format!(
                    "the chain has more than {MAX_LINKS} links"
                ))));
            }
            let parent = match self.parent_of(child, &seen) {
                Ok(parent) => parent,
                Err(e) if self.options.degraded.orphan && is_missing(&e) => {
                    let lost_parent = Some(within(e));
                    return Ok(Chain { links, lost_parent });
                }
                Err(e) => return Err(within(e)),
            };
            links.push(parent);
            sizes::compare(&mut links)?;
        }
        match (&self.options.parent, links.last()) {
            (Some(parent), Some(oldest)) => Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "parent={}: the chain ends with {}, which has no parent; leave parent= out",
                    parent.label(),
                    oldest.file.label()
                ),
            )),
            _ => Ok(Chain {
                links,
                lost_parent: None,
            }),
        }
    }

    /// Opens `file` without its parents.
    pub(crate) fn alone(mut self, file: Arc<dyn StoredFile>) -> Result<Chain> {
        Ok(Chain {
            links: vec![self.link(file)?],
            lost_parent: None,
        })
    }

    /// Opens the parent of `child`: the one that it names or, if that cannot be used, the one that the user named.
    fn parent_of(&mut self, child: &Link, seen: &[((u64, u64), u64)]) -> Result<Link> {
        let named = named_parent(child, self.options.degraded).and_then(|file| self.parent_link(child, file, seen));
        match (named, &self.options.parent) {
            // `parent=` only counts where the named parent cannot be used, so it does no harm to links that find
            // theirs.
            (Err(_), Some(_)) => {}
            (named, _) => return named,
        }
        // Used once: its own parents are those that it names.
        let given = self.options.parent.take();
        given.map_or_else(
            || Err(Error::new(ErrorKind::NotFound, "is missing")),
            |file| self.parent_link(child, file, seen),
        )
    }

    /// Opens `file` as the parent of `child`. `seen` are the files of the links so far.
    fn parent_link(&mut self, child: &Link, file: Arc<dyn StoredFile>, seen: &[((u64, u64), u64)]) -> Result<Link> {
        if seen.contains(&file.identity()?.place()) {
            return Err(Error::corrupt(format!("the chain comes back to {}", file.label())));
        }
        let link = self.link(file)?;
        if child.descriptor.parent.is_some() {
            self.check_cid(child, &link)?;
        }
        Ok(link)
    }

    fn check_cid(&self, child: &Link, parent: &Link) -> Result<()> {
        let expected = child.descriptor.parent.as_ref().and_then(|p| p.cid);
        // An overlay of this program over a disk without a CID remembers 0.
        if expected.is_some_and(|expected| expected == parent.descriptor.cid.unwrap_or(0)) {
            return Ok(());
        }
        let cid = |c: Option<u32>| c.map_or_else(|| "none".to_owned(), |c| format!("{c:08x}"));
        let message = format!(
            "parentCID is {}, but the CID of {} is {}: it was changed after the snapshot was created",
            cid(expected),
            parent.file.label(),
            cid(parent.descriptor.cid)
        );
        if self.options.degraded.cid {
            tracing::warn!("{}: {message}; accepted because of degraded=cid", child.file.label());
            return Ok(());
        }
        Err(Error::corrupt(message + " (degraded=cid reads it anyway)"))
    }

    /// Opens one link.
    fn link(&mut self, file: Arc<dyn StoredFile>) -> Result<Link> {
        let head = read_head(&*file)?;
        let label = file.label().to_owned();
        let opened = match file_kind(&head) {
            FileKind::Hosted => self.hosted_link(file, &head),
            FileKind::Descriptor => self.text_link(file),
            kind => Err(no_disk(&*file, kind, &head)),
        };
        opened.map_err(|e| e.in_file(&label))
    }

    /// Opens a KDMV file with an embedded descriptor.
    fn hosted_link(&mut self, file: Arc<dyn StoredFile>, head: &[u8]) -> Result<Link> {
        let header = Hosted::parse(head, file.len(), Role::Header)?;
        let Some((at, sectors)) = header.descriptor else {
            return Err(piece(&*file, FileKind::Hosted, header.capacity));
        };
        // The file may end inside of the space for the descriptor, as the text rarely fills it.
        let len = file.len().saturating_sub(at * SECTOR).min(sectors * SECTOR);
        // At most 10 MiB, the bound of `check_descriptor`.
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(at * SECTOR, &mut bytes)?;
        let text = at * SECTOR..at * SECTOR + len;
        let descriptor = Descriptor::parse(&bytes).map_err(|e| e.within("embedded descriptor"))?;
        // A container: a header and a descriptor whose extents are other files.
        if header.capacity == 0 {
            return self.extents(file, text, descriptor);
        }
        // The name in the line is not used, so a monolithic image may be renamed.
        let [line] = descriptor.extents.as_slice() else {
            return Err(Error::corrupt(format!(
                "the embedded descriptor lists {} extents, expected one: the file itself",
                descriptor.extents.len()
            )));
        };
        let line = line.clone();
        let mut extent = match (line.kind, line.access) {
            (ExtentKind::Sparse | ExtentKind::VmfsSparse, ExtentAccess::None) => {
                PlacedExtent::new(Extent::Zero, &line, "ZERO")
            }
            (ExtentKind::Sparse | ExtentKind::VmfsSparse, _) => self.hosted_extent(Arc::clone(&file), header, &line)?,
            (kind, _) => {
                return Err(Error::corrupt(format!(
                    "the embedded descriptor (line {}) calls the file a {} extent, expected SPARSE",
                    line.line,
                    kind.as_str()
                )));
            }
        };
        let warning = sizes::agree(&mut extent, &line, true)?;
        let mut link = Link::new(file, text, descriptor, vec![extent]);
        link.warnings.extend(warning);
        Ok(link)
    }

    /// Opens a descriptor file.
    fn text_link(&mut self, file: Arc<dyn StoredFile>) -> Result<Link> {
        if file.len() > MAX_TEXT {
            return Err(Error::corrupt(format!(
                "a descriptor of {} bytes, expected at most {MAX_TEXT}",
                file.len()
            )));
        }
        let mut text = vec![0; file.len() as usize];
        file.read_exact_at(0, &mut text)?;
        let descriptor = Descriptor::parse(&text)?;
        let text = 0..file.len();
        self.extents(file, text, descriptor)
    }

    /// Opens the files that the extent lines of a descriptor name.
    fn extents(&mut self, file: Arc<dyn StoredFile>, text: Range<u64>, descriptor: Descriptor) -> Result<Link> {
        let store = file.siblings()?;
        // Counted before any file is opened: each one costs a descriptor, and 64 links may list 65536 extents each.
        self.extents += descriptor.extents.len();
        if self.extents > MAX_EXTENTS {
            return Err(Error::corrupt(format!("the chain has more than {MAX_EXTENTS} extents")));
        }
        let sole = descriptor.extents.len() == 1;
        let (mut extents, mut warnings) = (Vec::with_capacity(descriptor.extents.len()), Vec::new());
        let mut start = 0;
        for line in &descriptor.extents {
            let within = |e: Error| e.within(format!("line {}: extent", line.line)).in_file(file.label());
            let mut placed = self
                .listed_extent(&*store, line)
                .map_err(|e| within(missing_extent(e, line, &descriptor, &*store, &file.own_name())))?;
            warnings.extend(sizes::agree(&mut placed, line, sole).map_err(within)?);
            let lost = lost_end(&placed, line);
            if let Some(Extent::Lost(error)) = lost.as_ref().map(|lost| &lost.extent) {
                warnings.push(format!("line {}: {error}", line.line));
            }
            // An extent of which the file has nothing is only lost.
            let found = (placed.sectors > 0 || lost.is_none()).then_some(placed);
            for part in [found, lost].into_iter().flatten() {
                start = place(part, start, line, &mut extents)?;
            }
        }
        Ok(Link {
            warnings,
            ..Link::new(file, text, descriptor, extents)
        })
    }

    /// Opens the extent of one line.
    fn listed_extent(&mut self, store: &dyn Store, line: &ExtentLine) -> Result<PlacedExtent> {
        // NOACCESS reads as zeroes, and its file is not even opened: it need not exist.
        let zero = line.kind == ExtentKind::Zero || line.access == ExtentAccess::None;
        let Some(name) = line.name.as_ref().filter(|_| !zero) else {
            return Ok(PlacedExtent::new(Extent::Zero, line, "ZERO"));
        };
        let access = if line.access == ExtentAccess::ReadWrite {
            self.access
        } else {
            Access::Read
        };
        let file = open_extent(store, name, access)?;
        match line.kind {
            ExtentKind::Flat => flat_extent(file, line, "FLAT", self.options.degraded.short),
            ExtentKind::Vmfs => flat_extent(file, line, "VMFS", self.options.degraded.short),
            ExtentKind::VmfsRdm | ExtentKind::VmfsRaw => device_copy(file, line),
            ExtentKind::Sparse | ExtentKind::VmfsSparse | ExtentKind::SeSparse => self.sparse_extent(file, line),
            ExtentKind::Zero => Ok(PlacedExtent::new(Extent::Zero, line, "ZERO")),
        }
    }

    fn sparse_extent(&mut self, file: Arc<dyn StoredFile>, line: &ExtentLine) -> Result<PlacedExtent> {
        let head = read_head(&*file)?;
        let label = file.label().to_owned();
        let opened = match file_kind(&head) {
            FileKind::Hosted => {
                Hosted::parse(&head, file.len(), Role::Header).and_then(|h| self.hosted_extent(file, h, line))
            }
            FileKind::Cowd => self.cowd_extent(file, &head, line),
            FileKind::SeSparse => self.sesparse_extent(file, &head, line),
            kind => Err(Error::corrupt(format!(
                "is {}, expected a sparse extent (KDMV, COWD or seSparse)",
                describe(kind, &head)
            ))),
        };
        opened.map_err(|e| e.in_file(&label))
    }

    fn hosted_extent(&mut self, file: Arc<dyn StoredFile>, header: Hosted, line: &ExtentLine) -> Result<PlacedExtent> {
        if header.capacity == 0 {
            return Err(Error::corrupt(
                "header: the capacity (byte 12) is 0, which only the file with the descriptor may have; expected an extent",
            ));
        }
        let header = if header.directory == DirectoryAt::Footer {
            read_footer(&*file, &header)?
        } else {
            header
        };
        let encoding = if header.compressed {
            Encoding::Deflate {
                markers: header.markers,
            }
        } else {
            Encoding::Plain
        };
        let hosted = Arc::new(HostedTables::new(Arc::clone(&file), &header)?);
        let kind = if header.compressed {
            "SPARSE (compressed)"
        } else {
            "SPARSE"
        };
        let extent = SparseExtent::new(
            self.extent_id(),
            file,
            Arc::clone(&hosted) as _,
            self.cache.clone(),
            encoding,
        );
        Ok(PlacedExtent {
            unclean: header.unclean,
            hosted: Some(hosted),
            ..PlacedExtent::new(Extent::Sparse(extent), line, kind)
        })
    }

    fn cowd_extent(&mut self, file: Arc<dyn StoredFile>, head: &[u8], line: &ExtentLine) -> Result<PlacedExtent> {
        let header = Cowd::parse(head.get(..HEAD_BYTES).unwrap_or(head))?;
        let layout = Arc::new(CowdTables::new(Arc::clone(&file), &header)?);
        let extent = SparseExtent::new(self.extent_id(), file, layout, self.cache.clone(), Encoding::Plain);
        Ok(PlacedExtent {
            unclean: header.unclean,
            ..PlacedExtent::new(Extent::Sparse(extent), line, "VMFSSPARSE")
        })
    }

    fn sesparse_extent(&mut self, file: Arc<dyn StoredFile>, head: &[u8], line: &ExtentLine) -> Result<PlacedExtent> {
        let header = SeSparse::parse(head, file.len())?;
        let layout = Arc::new(SeSparseTables::new(Arc::clone(&file), header));
        let extent = SparseExtent::new(self.extent_id(), file, layout, self.cache.clone(), Encoding::Plain);
        Ok(PlacedExtent::new(Extent::Sparse(extent), line, "SESPARSE"))
    }

    fn extent_id(&mut self) -> u32 {
        self.next_extent += 1;
        self.next_extent
    }
}

/// Adds an extent that starts at sector `start` of the disk. Returns the sector after it.
fn place(extent: PlacedExtent, start: u64, line: &ExtentLine, extents: &mut Vec<PlacedExtent>) -> Result<u64> {
    let end = start.checked_add(extent.sectors).filter(|&s| s <= MAX_SECTORS);
    extents.push(PlacedExtent { start, ..extent });
    end.ok_or_else(|| {
        Error::corrupt(format!(
            "line {}: the extents add up to more than {MAX_SECTORS} sectors",
            line.line
        ))
    })
}

/// Reads the footer of a stream, which replaces the header `first`: its directory is only known at the end.
fn read_footer(file: &dyn StoredFile, first: &Hosted) -> Result<Hosted> {
    if !first.compressed {
        return Err(Error::corrupt(
            "header: gdOffset (byte 56) is GD_AT_END, which only a stream (compressed grains) may have",
        ));
    }
    let mut tail = vec![0; StreamTail::BYTES as usize];
    file.read_exact_at(StreamTail::offset(file.len())?, &mut tail)?;
    StreamTail::parse(&tail, file.len(), first)
}

/// Returns true if a link has a parent.
fn names_parent(link: &Link) -> bool {
    link.descriptor.parent.is_some() || neighbours::parent_uuid(link).is_some()
}

/// Returns true if an error means that a file is not there, or where the user allows it.
fn is_missing(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Policy)
}

fn describe(kind: FileKind, head: &[u8]) -> String {
    match kind {
        FileKind::Hosted => "a hosted sparse extent".to_owned(),
        FileKind::Cowd => "an ESX sparse extent (COWD)".to_owned(),
        FileKind::SeSparse => "a seSparse extent".to_owned(),
        FileKind::Descriptor => "a descriptor".to_owned(),
        FileKind::Unfinished => "an image that its writer did not finish (magic kdmv)".to_owned(),
        FileKind::Other if head.is_empty() => "an empty file".to_owned(),
        FileKind::Other => format!("no VMDK (first bytes {:02x?})", head.get(..4).unwrap_or(head)),
    }
}

/// Returns the error for a file that is no disk by itself.
fn no_disk(file: &dyn StoredFile, kind: FileKind, head: &[u8]) -> Error {
    let capacity = match kind {
        FileKind::Cowd => Cowd::parse(head.get(..HEAD_BYTES).unwrap_or(head)).map(|header| header.capacity),
        FileKind::SeSparse => SeSparse::parse(head, file.len()).map(|header| header.capacity),
        _ => {
            let what = describe(kind, head);
            return Error::corrupt(format!(
                "is {what}, expected a VMDK: a descriptor, or a KDMV file with one inside"
            ));
        }
    };
    // The header of a damaged file is no reason for another error: it is the wrong file anyway.
    piece(file, kind, capacity.unwrap_or(0))
}

/// Returns the error for an extent that is named instead of its descriptor.
fn piece(file: &dyn StoredFile, kind: FileKind, capacity: u64) -> Error {
    let (what, extent) = match kind {
        FileKind::Cowd => ("an ESX sparse extent (COWD)", ExtentKind::VmfsSparse),
        FileKind::SeSparse => ("a seSparse extent", ExtentKind::SeSparse),
        _ => ("a sparse extent without a descriptor", ExtentKind::Sparse),
    };
    Error::unsupported(format!(
        "is {what} of {capacity} sectors, a piece of a disk: {}",
        lost_descriptor::advice(file, extent, capacity)
    ))
}
