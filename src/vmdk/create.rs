//! Creates images: all files of a new disk, or none of them.
//!
//! ```text
//!   NewDisk ─► Plan: descriptor text, pieces
//!                │ 1 create the named file exclusively, still empty: no program opens it as an image
//!                │ 2 create the pieces exclusively, write their headers and tables, sync them
//!                ▼ 3 write the content of the named file, sync it: from here on it is an image
//! ```
//! Existing files are never opened or changed. If a step fails, the files that were created are removed again. The
//! grain tables of sparse files are allocated from the start, as VMware and qemu do: they are holes of the file, which
//! read as "nothing is allocated".

use std::ops::Range;
use std::sync::Arc;

use crate::block::{BlockWrite, MAX_SECTORS, SECTOR};
use crate::config::{AdapterType, CreateType};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{ExtentName, Identity, Store, StoredFile, writer};
use crate::vmdk::descriptor::{ExtentAccess, ExtentKind};
use crate::vmdk::header::KDMV_MAGIC;
use crate::vmdk::hosted_layout::HostedLayout;
use crate::vmdk::stream::StreamDisk;

mod text;

use text::{NewExtent, NewText};

/// Sectors of a piece of a split disk: 2047 MiB, the size that VMware uses.
const PIECE: u64 = 4_192_256;

/// Default sectors of a grain: 64 KiB, as in the images of other programs.
const GRAIN: u64 = 128;

/// Name of the extent in the descriptor of a stream. The name is not used: VMware writes the same one into each stream.
const STREAM_NAME: &str = "generated-stream.vmdk";

/// Maximum size of a descriptor in a file of its own, in bytes; larger ones are not readable.
const MAX_TEXT: usize = 1 << 20;

/// Description of a disk to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewDisk {
    /// Size of the disk in sectors; at least 1.
    pub sectors: u64,
    /// Layout of the image: which files it consists of.
    pub kind: CreateType,
    /// Adapter that the descriptor names; determines the geometry.
    pub adapter: AdapterType,
    /// Virtual hardware version that the descriptor names.
    pub hardware_version: u32,
}

/// Description of a delta to create: one sparse file over a parent, without grains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDelta {
    /// Size of the disk in sectors, which is that of the parent.
    pub sectors: u64,
    /// Sectors of a grain: a power of two, at least 8. Small grains (16) suit scattered writes, as copy-on-write copies
    /// whole grains.
    pub grain: u64,
    /// True if grain tables may mark zero grains, which hide the parent. Programs that only know version 1 of the
    /// format cannot read such a delta.
    pub zeroed_grains: bool,
    /// Parent to name in the descriptor, by which other programs find it. `None` if the parent is not a VMDK: then the
    /// descriptor names no chain, and the opener of the delta has to supply the base.
    pub parent: Option<DeltaParent>,
    /// Additional lines of the disk data base: names without `ddb.`, values without quotes in them. They are written
    /// verbatim, so that a value can be rewritten in place later by one of the same length.
    pub ddb: Vec<(String, String)>,
}

/// Parent as a delta's descriptor names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeltaParent {
    /// Current CID of the parent.
    pub cid: u32,
    /// Path of the parent: relative to the folder of the delta, or absolute.
    pub hint: String,
}

/// Creates an empty disk: the named file is `name`, and the other files are created beside it. A `StreamOptimized` disk
/// is closed at once and cannot be written afterwards; use [`create_stream`] to fill one.
///
/// Errors: `Usage` if such an image cannot have the size or the name, `Os(EEXIST)` if one of its files exists,
/// otherwise the error of the system call. After an error none of the files exist.
pub fn create(store: &dyn Store, name: &ExtentName, disk: &NewDisk) -> Result<()> {
    check_size(disk.sectors)?;
    if disk.kind == CreateType::StreamOptimized {
        let stream = create_stream(store, name, disk)?;
        let identity = stream.file().identity_at_open();
        return stream.close().inspect_err(|_| {
            // The error of `close` is the cause; one of this clean-up would hide it.
            let _ = store.remove(name, &identity);
        });
    }
    let plan = Plan::of(name, disk)?;
    let mut pending = PendingFiles::new(store);
    // The named file first: it reserves the name, and nothing refers to the pieces before its content is written.
    let named = pending.file(name)?;
    for piece in &plan.pieces {
        pending.piece(piece)?;
    }
    match plan.whole {
        Some(layout) => layout.write(writer(&*named)?, Some(plan.text.as_bytes()), KDMV_MAGIC)?,
        None => {
            let out = writer(&*named)?;
            out.write_all_at(0, plan.text.as_bytes())?;
            out.sync()?;
        }
    }
    pending.finish()
}

/// Creates an open compressed stream of the disk's size, which the caller writes sequentially and then closes.
///
/// Errors: as for [`create`].
pub fn create_stream(store: &dyn Store, name: &ExtentName, disk: &NewDisk) -> Result<StreamDisk> {
    check_size(disk.sectors)?;
    let extent = NewExtent {
        // VMware's own streams have `RDONLY` here.
        access: ExtentAccess::ReadOnly,
        sectors: disk.sectors,
        kind: ExtentKind::Sparse,
        name: STREAM_NAME.to_owned(),
    };
    if !disk.sectors.is_multiple_of(2) {
        let sectors = disk.sectors;
        tracing::warn!("{name}: {sectors} sectors are no multiple of 1 KiB, which some readers of streams expect");
    }
    let text = NewText::stream(disk, extent).to_text();
    let mut pending = PendingFiles::new(store);
    let file = pending.file(name)?;
    let stream = StreamDisk::new(file, disk.sectors, text.as_bytes())?;
    pending.finish()?;
    Ok(stream)
}

/// Creates an empty delta: a `monolithicSparse` image in the file `name`.
///
/// Errors: as for [`create`]; also `Usage` if grain tables with such grains cannot cover the size.
pub fn create_delta(store: &dyn Store, name: &ExtentName, delta: &NewDelta) -> Result<()> {
    check_size(delta.sectors)?;
    if !delta.grain.is_power_of_two() || delta.grain < 8 {
        let grain = delta.grain;
        return Err(usage(format!(
            "a grain of {grain} sectors, expected a power of two of at least 8"
        )));
    }
    let text = NewText::delta(delta, text::label(name))?.to_text();
    let layout = HostedLayout::new(delta.sectors, delta.grain, Some(text.len()), delta.zeroed_grains)?;
    let mut pending = PendingFiles::new(store);
    let named = pending.file(name)?;
    layout.write(writer(&*named)?, Some(text.as_bytes()), KDMV_MAGIC)?;
    pending.finish()
}

/// Files of a disk, before any is created.
struct Plan {
    text: String,
    /// Layout of the named file, if it holds the data as well as the descriptor.
    whole: Option<HostedLayout>,
    pieces: Vec<Piece>,
}

/// File beside the named one, with a part of the disk's data.
struct Piece {
    name: ExtentName,
    content: PieceContent,
}

enum PieceContent {
    /// Zeroes; their blocks are allocated at once if `allocate` is true.
    Flat {
        sectors: u64,
        allocate: bool,
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
            CreateType::MonolithicFlat => Self::beside(name, disk, "monolithicFlat", ExtentKind::Flat, true),
            CreateType::VmfsFlat => Self::beside(name, disk, "vmfs", ExtentKind::Vmfs, true),
            CreateType::VmfsThin => Self::beside(name, disk, "vmfs", ExtentKind::Vmfs, false),
            CreateType::SplitSparse => Self::split(name, disk, "twoGbMaxExtentSparse", 's'),
            CreateType::SplitFlat => Self::split(name, disk, "twoGbMaxExtentFlat", 'f'),
        }
    }

    /// Plans a descriptor and one file of data.
    fn beside(name: &ExtentName, disk: &NewDisk, label: &str, kind: ExtentKind, allocate: bool) -> Result<Self> {
        let content = PieceContent::Flat {
            sectors: disk.sectors,
            allocate,
        };
        let piece = Piece {
            name: text::sibling(name, "-flat.vmdk")?,
            content,
        };
        Self::pieces(disk, label, kind, vec![piece])
    }

    /// Plans a descriptor and a file for each 2047 MiB of the disk: `x-s001.vmdk` and so on.
    fn split(name: &ExtentName, disk: &NewDisk, label: &str, letter: char) -> Result<Self> {
        let mut pieces = Vec::new();
        // Bounds the number of pieces before they are listed in memory; the exact check of the descriptor's length
        // comes after that, in `pieces`.
        let most = (MAX_TEXT / text::SHORTEST_EXTENT) as u64;
        if disk.sectors.div_ceil(PIECE) > most {
            return Err(too_many_pieces());
        }
        // Numbered from 1, as VMware does; more than 999 pieces get more digits.
        for (start, number) in (0..disk.sectors).step_by(PIECE as usize).zip(1..) {
            let sectors = PIECE.min(disk.sectors - start);
            let content = match letter {
                's' => PieceContent::Sparse(HostedLayout::new(sectors, GRAIN, None, false)?),
                _ => PieceContent::Flat {
                    sectors,
                    allocate: true,
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

/// Files that are being created: dropped before [`finish`](Self::finish), it removes those that it created.
struct PendingFiles<'s> {
    store: &'s dyn Store,
    created: Vec<(ExtentName, Identity)>,
}

impl<'s> PendingFiles<'s> {
    fn new(store: &'s dyn Store) -> Self {
        Self {
            store,
            created: Vec::new(),
        }
    }

    /// Creates an empty file.
    fn file(&mut self, name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        let file = self.store.create(name).map_err(|e| match e.kind() {
            ErrorKind::Os(errno) if errno == libc::EEXIST => e.within("a new disk never takes the place of a file"),
            _ => e,
        })?;
        self.created.push((name.clone(), file.identity_at_open()));
        Ok(file)
    }

    /// Creates a piece with its content.
    fn piece(&mut self, piece: &Piece) -> Result<()> {
        let file = self.file(&piece.name)?;
        let out = writer(&*file)?;
        match &piece.content {
            PieceContent::Sparse(layout) => layout.write(out, None, KDMV_MAGIC),
            PieceContent::Flat { sectors, allocate } => {
                out.set_len(sectors * SECTOR)?;
                if *allocate {
                    out.allocate(0, sectors * SECTOR)?;
                }
                out.sync()
            }
        }
    }

    /// Makes the names durable and keeps the files.
    fn finish(mut self) -> Result<()> {
        // Last: as long as the names are not durable, a crash may leave the descriptor without its pieces.
        self.store.sync()?;
        self.created.clear();
        Ok(())
    }
}

impl Drop for PendingFiles<'_> {
    fn drop(&mut self) {
        for (name, identity) in self.created.drain(..).rev() {
            // Removal is by identity: another process may have put its own file under the name.
            if let Err(e) = self.store.remove(&name, &identity) {
                tracing::warn!("{e}: creating the disk failed, and this file of it was not removed; remove it by hand");
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
        "a disk in that many pieces of 2 GB needs a descriptor of more than {MAX_TEXT} bytes: choose another create-type, which does not split it"
    ))
}

#[cfg(test)]
mod tests;
