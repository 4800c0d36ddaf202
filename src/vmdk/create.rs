//! New images: what files a disk is made of, and making them so that either all of it is there or nothing.
//!
//! ```text
//!   NewDisk ─► plan: descriptor text, pieces
//!                │ 1 the named file, made exclusively and still empty: no program takes it for an image
//!                │ 2 the pieces, made exclusively, with their headers and tables, synced
//!                ▼ 3 the named file's content, synced: from here on it is an image
//! ```
//! Nothing that exists is ever opened, let alone changed. Where a step fails, the files that were made are removed
//! again. The tables of sparse files are there from the start, as VMware and qemu make them: holes of the file, which
//! read as "nothing is allocated".

use std::ops::Range;
use std::sync::Arc;

use crate::block::{BlockWrite, MAX_SECTORS, SECTOR};
use crate::config::{AdapterType, CreateType};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{ExtentName, Identity, Store, StoredFile, writer};
use crate::vmdk::descriptor::{ExtentAccess, ExtentKind};
use crate::vmdk::header::KDMV_MAGIC;
use crate::vmdk::stream::StreamDisk;

mod hosted;
mod text;

use hosted::HostedLayout;
pub(super) use hosted::{DESCRIPTOR_SECTORS, ENTRIES, MAX_FILE_SECTORS, TABLE_SECTORS};
use text::{NewExtent, NewText};

/// Sectors of a piece of a split disk: 2047 MiB, as VMware makes them.
const PIECE: u64 = 4_192_256;

/// Sectors of a grain where nobody asks for another one: 64 KiB, as all programs make them.
const GRAIN: u64 = 128;

/// The most bytes of a descriptor in a file of its own; more no program reads.
const MAX_TEXT: usize = 1 << 20;

/// A disk to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewDisk {
    /// Its size, at least one sector.
    pub sectors: u64,
    /// What files it is made of.
    pub kind: CreateType,
    /// The adapter that its descriptor names; the geometry goes by it.
    pub adapter: AdapterType,
    /// The virtual hardware version that its descriptor names.
    pub hardware_version: u32,
}

/// A delta to be made: one sparse file over a parent, with nothing in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDelta {
    /// Its size; that of the parent.
    pub sectors: u64,
    /// Sectors of a grain, a power of two from 8 on. Small ones (16) suit scattered writes, as a grain is copied whole.
    pub grain: u64,
    /// Whether its tables may mark grains as zeroes that hide the parent. Programs that know version 1 only can't read it.
    pub zeroed_grains: bool,
    /// The parent, where that is a VMDK: others find it by what is said here. `None`: no chain that others could
    /// follow; who opens it knows what lies below.
    pub parent: Option<DeltaParent>,
    /// Further lines of the disk data base: names without `ddb.`, and values without quotes in them. They are written
    /// exactly so, as long as they are, and can be rewritten in place later by text of the same length.
    pub ddb: Vec<(String, String)>,
}

/// What a delta says of its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeltaParent {
    /// The parent's CID now.
    pub cid: u32,
    /// Where it is: its name from the delta's folder, or an absolute path.
    pub hint: String,
}

/// Makes a disk with nothing in it; its named file is `name`, the others lie beside it. A `StreamOptimized` one is
/// closed, and can't be written to any more: see [`create_stream`].
///
/// Errors: `Usage` for what no such image can be, `Os(EEXIST)` where one of its files exists already, or what the system
/// says. After an error none of its files is there.
pub fn create(store: &dyn Store, name: &ExtentName, disk: &NewDisk) -> Result<()> {
    check_size(disk.sectors)?;
    if disk.kind == CreateType::StreamOptimized {
        let stream = create_stream(store, name, disk)?;
        let identity = stream.file().identity_at_open();
        return stream.close().inspect_err(|_| {
            // the first error is the one to tell
            let _ = store.remove(name, &identity);
        });
    }
    let plan = Plan::of(name, disk)?;
    let mut making = Making::new(store);
    let named = making.file(name)?;
    for piece in &plan.pieces {
        making.piece(piece)?;
    }
    match plan.whole {
        Some(layout) => layout.write(writer(&*named)?, Some(plan.text.as_bytes()), KDMV_MAGIC)?,
        None => {
            let out = writer(&*named)?;
            out.write_all_at(0, plan.text.as_bytes())?;
            out.sync()?;
        }
    }
    making.finish()
}

/// Makes a compressed stream of a disk's size that is to be written now, in order.
///
/// Errors: as [`create`].
pub fn create_stream(store: &dyn Store, name: &ExtentName, disk: &NewDisk) -> Result<StreamDisk> {
    check_size(disk.sectors)?;
    let extent = NewExtent {
        // as VMware's own streams say it
        access: ExtentAccess::ReadOnly,
        sectors: disk.sectors,
        kind: ExtentKind::Sparse,
        name: text::label(name),
    };
    let text = NewText::disk("streamOptimized", disk, vec![extent]).to_text();
    let mut making = Making::new(store);
    let file = making.file(name)?;
    let stream = StreamDisk::new(file, disk.sectors, text.as_bytes())?;
    making.finish()?;
    Ok(stream)
}

/// Makes a delta with nothing in it, a `monolithicSparse` image in the file `name`.
///
/// Errors: as [`create`]; `Usage` also for a size that no tables of such grains cover.
pub fn create_delta(store: &dyn Store, name: &ExtentName, delta: &NewDelta) -> Result<()> {
    check_size(delta.sectors)?;
    if !delta.grain.is_power_of_two() || delta.grain < 8 {
        let grain = delta.grain;
        return Err(usage(format!(
            "a grain of {grain} sectors, expected a power of two from 8 on"
        )));
    }
    let text = NewText::delta(delta, text::label(name))?.to_text();
    let layout = HostedLayout::new(delta.sectors, delta.grain, Some(text.len()), delta.zeroed_grains)?;
    let mut making = Making::new(store);
    let named = making.file(name)?;
    layout.write(writer(&*named)?, Some(text.as_bytes()), KDMV_MAGIC)?;
    making.finish()
}

/// The files of a disk, before any is made.
struct Plan {
    text: String,
    /// The layout of the named file, where it holds the disk itself.
    whole: Option<HostedLayout>,
    pieces: Vec<Piece>,
}

/// A file beside the named one.
struct Piece {
    name: ExtentName,
    content: PieceContent,
}

enum PieceContent {
    /// Zeroes; `allocator`: which take their room at once.
    Flat {
        sectors: u64,
        allocator: bool,
    },
    Sparse(HostedLayout),
}

impl Plan {
    fn of(name: &ExtentName, disk: &NewDisk) -> Result<Self> {
        let sectors = disk.sectors;
        match disk.kind {
            CreateType::MonolithicSparse | CreateType::StreamOptimized => {
                let extent = NewExtent {
                    access: ExtentAccess::ReadWrite,
                    sectors,
                    kind: ExtentKind::Sparse,
                    name: text::label(name),
                };
                let text = NewText::disk("monolithicSparse", disk, vec![extent]).to_text();
                let whole = Some(HostedLayout::new(sectors, GRAIN, Some(text.len()), false)?);
                Ok(Self {
                    text,
                    whole,
                    pieces: Vec::new(),
                })
            }
            CreateType::MonolithicFlat => Self::beside(name, disk, "monolithicFlat", ExtentKind::Flat, false),
            CreateType::VmfsFlat => Self::beside(name, disk, "vmfs", ExtentKind::Vmfs, true),
            CreateType::VmfsThin => Self::beside(name, disk, "vmfs", ExtentKind::Vmfs, false),
            CreateType::SplitSparse => Self::split(name, disk, "twoGbMaxExtentSparse", 's'),
            CreateType::SplitFlat => Self::split(name, disk, "twoGbMaxExtentFlat", 'f'),
        }
    }

    /// A descriptor and one file of data.
    fn beside(name: &ExtentName, disk: &NewDisk, label: &str, kind: ExtentKind, allocator: bool) -> Result<Self> {
        let content = PieceContent::Flat {
            sectors: disk.sectors,
            allocator,
        };
        let piece = Piece {
            name: text::sibling(name, "-flat.vmdk")?,
            content,
        };
        Self::pieces(disk, label, kind, vec![piece])
    }

    /// A descriptor and a file for each 2047 MiB: `x-s001.vmdk` and so on.
    fn split(name: &ExtentName, disk: &NewDisk, label: &str, letter: char) -> Result<Self> {
        let mut pieces = Vec::new();
        // the bound of a descriptor's length, long before the bound of memory
        let most = (MAX_TEXT / text::SHORTEST_EXTENT) as u64;
        if disk.sectors.div_ceil(PIECE) > most {
            return Err(too_many_pieces());
        }
        for (start, number) in (0..disk.sectors).step_by(PIECE as usize).zip(1..) {
            let sectors = PIECE.min(disk.sectors - start);
            let content = match letter {
                's' => PieceContent::Sparse(HostedLayout::new(sectors, GRAIN, None, false)?),
                _ => PieceContent::Flat {
                    sectors,
                    allocator: false,
                },
            };
            pieces.push(Piece {
                name: text::sibling(name, &format!("-{letter}{number:03}.vmdk"))?,
                content,
            });
        }
        let kind = if letter == 's' {
            ExtentKind::Sparse
        } else {
            ExtentKind::Flat
        };
        Self::pieces(disk, label, kind, pieces)
    }

    fn pieces(disk: &NewDisk, label: &str, kind: ExtentKind, pieces: Vec<Piece>) -> Result<Self> {
        let extent = |piece: &Piece| NewExtent {
            access: ExtentAccess::ReadWrite,
            sectors: piece.content.sectors(),
            kind,
            name: text::label(&piece.name),
        };
        let text = NewText::disk(label, disk, pieces.iter().map(extent).collect()).to_text();
        if text.len() > MAX_TEXT {
            return Err(too_many_pieces());
        }
        Ok(Self {
            text,
            whole: None,
            pieces,
        })
    }
}

impl PieceContent {
    fn sectors(&self) -> u64 {
        match self {
            Self::Flat { sectors, .. } => *sectors,
            Self::Sparse(layout) => layout.sectors(),
        }
    }
}

/// Files in the making: those that exist are removed again unless all went well.
struct Making<'s> {
    store: &'s dyn Store,
    made: Vec<(ExtentName, Identity)>,
}

impl<'s> Making<'s> {
    fn new(store: &'s dyn Store) -> Self {
        Self {
            store,
            made: Vec::new(),
        }
    }

    /// Makes an empty file.
    fn file(&mut self, name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        let file = self.store.create(name).map_err(|e| match e.kind() {
            ErrorKind::Os(errno) if errno == libc::EEXIST => e.within("a new disk never takes the place of a file"),
            _ => e,
        })?;
        self.made.push((name.clone(), file.identity_at_open()));
        Ok(file)
    }

    /// Makes a piece with all that is in it.
    fn piece(&mut self, piece: &Piece) -> Result<()> {
        let file = self.file(&piece.name)?;
        let out = writer(&*file)?;
        match &piece.content {
            PieceContent::Sparse(layout) => layout.write(out, None, KDMV_MAGIC),
            PieceContent::Flat { sectors, allocator } => {
                out.set_len(sectors * SECTOR)?;
                if *allocator {
                    out.zero(0, sectors * SECTOR, false)?;
                }
                out.sync()
            }
        }
    }

    /// Makes the names durable; from now on the files stay.
    fn finish(mut self) -> Result<()> {
        self.store.sync()?;
        self.made.clear();
        Ok(())
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        for (name, identity) in self.made.drain(..).rev() {
            if let Err(e) = self.store.remove(&name, &identity) {
                tracing::warn!("{e}: what was made of a disk that could not be made is left");
            }
        }
    }
}

fn check_size(sectors: u64) -> Result<()> {
    const VALID: Range<u64> = 1..MAX_SECTORS + 1;
    if VALID.contains(&sectors) {
        return Ok(());
    }
    Err(usage(format!(
        "a disk of {sectors} sectors, expected 1 to {MAX_SECTORS}"
    )))
}

fn usage(why: String) -> Error {
    Error::new(ErrorKind::Usage, why)
}

fn too_many_pieces() -> Error {
    usage(format!(
        "a disk in so many pieces of 2 GB needs a descriptor of more than {MAX_TEXT} bytes: another create-type does not split it"
    ))
}

#[cfg(test)]
mod tests;
