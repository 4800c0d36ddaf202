//! Data model of an open chain, and its one mapping query.
//!
//! ```text
//!   Link (newest) ─► Link (its parent) ─► … ─► base: the source below an overlay
//!     │ extents, without gaps
//!     └─► PlacedExtent { start, sectors, Extent }
//! ```
//! [`ChainCursor::map`] is the query "where is this sector": it asks the links from the newest on until one has an
//! answer. Reading, the detection of zeroes and the walk of the kernel view derive from it. [`content_in`] is the same
//! descent for "data, zeroes or hole", which need not stop where neighbouring grains are not neighbours in the file.
//!
//! A [`Mapping::Hole`] of an extent means "ask the parent"; a `Hole` of the chain means that no link has anything, so
//! that the base answers, or zeroes.

use std::ops::Range;
use std::sync::Arc;

use crate::block::Lba;
use crate::error::Result;
use crate::store::StoredFile;
use crate::vmdk::descriptor::{Descriptor, ExtentAccess, ExtentLine};
use crate::vmdk::extent::{Extent, Mapping, MappingKind, TableCursor};
use crate::vmdk::tables::hosted::HostedTables;

/// Maximum number of links of a chain. vSphere allows 32 (31 snapshots).
pub const MAX_LINKS: usize = 64;

/// One link of a chain: a descriptor and its extents.
#[derive(Debug)]
pub(crate) struct Link {
    /// File of the descriptor; the extent itself if the descriptor is embedded.
    pub(crate) file: Arc<dyn StoredFile>,
    /// Bytes of the file that hold the text of the descriptor.
    pub(crate) text: Range<u64>,
    pub(crate) descriptor: Descriptor,
    /// In the order of their sectors, without gaps.
    pub(crate) extents: Vec<PlacedExtent>,
    pub(crate) sectors: u64,
    /// Warnings about its files, in addition to those of the descriptor.
    pub(crate) warnings: Vec<String>,
}

impl Link {
    /// Creates a link of extents that follow each other.
    pub(super) fn new(
        file: Arc<dyn StoredFile>,
        text: Range<u64>,
        descriptor: Descriptor,
        extents: Vec<PlacedExtent>,
    ) -> Self {
        Self {
            // The extents follow each other without gaps, so the link ends where the last one does.
            sectors: extents.last().map_or(0, |last| last.start + last.sectors),
            warnings: Vec::new(),
            file,
            text,
            descriptor,
            extents,
        }
    }

    /// Returns the extent that holds sector `at` with its number, the sector inside of the extent, and how many of
    /// `max` sectors it holds from there. `None` if the link ends before: a parent may be smaller than its child.
    fn find(&self, at: u64, max: u64) -> Option<Found<'_>> {
        // The extents are sorted by their starts, so a binary search finds the last one that starts at `at` or before.
        // A linear one would be slow: a split disk of 8 TiB has 4096 extents.
        let number = self.extents.partition_point(|p| p.start <= at).checked_sub(1)?;
        let placed = self.extents.get(number)?;
        let within = at - placed.start;
        // Behind the end of the last extent there is nothing: extents have no gaps between them.
        (within < placed.sectors).then(|| Found {
            number,
            placed,
            within,
            sectors: max.min(placed.sectors - within),
        })
    }

    /// Returns what is odd about its descriptor and sizes, with the name of its file.
    pub(super) fn all_warnings(&self) -> impl Iterator<Item = String> {
        let label = self.file.label();
        let texts = self.descriptor.warnings.iter().chain(&self.warnings);
        texts.map(move |text| format!("{label}: {text}"))
    }
}

/// Part of an extent that answers for a sector.
struct Found<'a> {
    /// Number of the extent in its link.
    number: usize,
    placed: &'a PlacedExtent,
    /// Sector inside of the extent.
    within: u64,
    sectors: u64,
}

/// Extent with its position in the link.
#[derive(Debug)]
pub(crate) struct PlacedExtent {
    /// First sector of the disk that the extent holds.
    pub(crate) start: u64,
    pub(crate) sectors: u64,
    pub(crate) access: ExtentAccess,
    pub(crate) extent: Extent,
    /// Type for lists and messages, as in descriptors: `FLAT`, `SPARSE`, …
    pub(crate) kind: &'static str,
    /// True if the header has the in-use mark: the extent was not closed after writing.
    pub(crate) unclean: bool,
    /// Layout of a hosted extent, for the check, the recovery and writing.
    pub(crate) hosted: Option<Arc<HostedTables>>,
}

impl PlacedExtent {
    /// Creates the extent of a line, which is not placed yet. `kind`: its format, for messages.
    pub(super) fn new(extent: Extent, line: &ExtentLine, kind: &'static str) -> Self {
        Self {
            start: 0,
            sectors: line.sectors,
            access: line.access,
            extent,
            kind,
            unclean: false,
            hosted: None,
        }
    }
}

/// Position of a reader in a chain, for requests from lower to higher sectors.
///
/// For each link it keeps the sector before which the reader has found it empty. A link is asked once about an empty
/// range, even if a link below has many short runs there. Without it every run of a deep chain of small grains would
/// ask all links again.
pub(crate) struct ChainCursor<'a> {
    links: &'a [Link],
    // An array and not a vector, so that a read allocates nothing.
    nothing_before: [u64; MAX_LINKS],
    /// Last table of each link, for a walk; empty for a reader, so that a read allocates nothing.
    tables: Vec<TableCursor>,
}

/// Answer of a chain: the mapping, and the extent that holds it.
pub(crate) struct ChainMapping<'a> {
    pub(crate) mapping: Mapping<'a>,
    /// Number of the link, and of the extent in it. `None` for a hole.
    pub(crate) extent: Option<(usize, usize)>,
}

impl<'a> ChainCursor<'a> {
    /// Creates a cursor for a reader, which uses the shared cache of tables.
    pub(crate) fn reader(links: &'a [Link]) -> Self {
        Self {
            links,
            nothing_before: [0; MAX_LINKS],
            tables: Vec::new(),
        }
    }

    /// Creates a cursor for a walk over the whole disk. It keeps one table of each link, and leaves the cache to the
    /// readers.
    pub(crate) fn walk(links: &'a [Link]) -> Self {
        Self {
            tables: links.iter().map(|_| TableCursor::default()).collect(),
            ..Self::reader(links)
        }
    }

    /// Returns the mapping at `at`, of at most `max` sectors, from the newest link that has one. It may end before the
    /// mapping changes.
    ///
    /// Errors: `Corrupt` for a damaged table or entry, those of reading a table.
    pub(crate) fn map(&mut self, at: Lba, max: u64) -> Result<ChainMapping<'a>> {
        // Shrinks from link to link: the answer of an older link only counts as far as all newer ones have nothing.
        let mut left = max;
        for (number, (link, nothing_before)) in self.links.iter().zip(&mut self.nothing_before).enumerate() {
            if at.0 < *nothing_before {
                left = left.min(*nothing_before - at.0);
                continue;
            }
            let Some(found) = link.find(at.0, left) else {
                // An older link that is longer is not asked: its child shows zeroes behind its own end, and so does
                // this disk. `sizes::compare` has refused chains in which that would hide data.
                break;
            };
            // `None` for a reader, whose `tables` are empty: the extent then uses the shared cache.
            let table = self.tables.get_mut(number);
            match found.placed.extent.map(found.within, found.sectors, table)? {
                Mapping::Hole { sectors } => {
                    left = sectors;
                    *nothing_before = at.0 + sectors;
                }
                mapping => {
                    return Ok(ChainMapping {
                        mapping,
                        extent: Some((number, found.number)),
                    });
                }
            }
        }
        Ok(ChainMapping {
            mapping: Mapping::Hole { sectors: left },
            extent: None,
        })
    }
}

/// Returns the kind of mapping of `links` at `at`, and for how many of `max` sectors it holds. `Hole` means that no
/// link has anything.
pub(crate) fn content_in(links: &[Link], at: Lba, max: u64) -> Result<(MappingKind, u64)> {
    let mut left = max;
    for link in links {
        let Some(found) = link.find(at.0, left) else {
            // As in `ChainCursor::map`: what an older link has behind the end of this one does not show.
            break;
        };
        match found.placed.extent.mapping_kind_at(found.within, found.sectors)? {
            (MappingKind::Hole, sectors) => left = sectors,
            answer => return Ok(answer),
        }
    }
    Ok((MappingKind::Hole, left))
}
