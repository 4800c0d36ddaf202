//! A compressed stream (`streamOptimized`) in the course of being written: once, from the first sector up.
//!
//! ```text
//!   write_at ─► Window: the grains that can still change ──full──► packed, several at once ─► Packed, in the file
//!                 │ a gap is zeroes                                   all-zero grains are left out
//!   read_at ◄─────┴──────────────────────────────────────────────── tables of Packed ◄──┘
//!
//!   the file    kdmv header · descriptor · ( grains of a table · GT marker · GT )… · GD marker · GD · footer · EOS
//!                 └ becomes KDMV when the stream is closed         └──── written by `close` only ────┘
//! ```
//! A sync that fails is final: from then on nothing more is written or said to be whole; reads go on.
//!
//! States: unfinished (magic `kdmv`, which no program takes for an image) ⇄ closed (a whole stream). A write after
//! `close` cuts the end off again and goes on where it stopped, so closing twice is no harm.
//!
//! A compressed grain cannot be changed any more. But who writes in order writes the same sectors again all the same, as
//! those of which a part is new are written anew, and what was sent in order may arrive in another one where several
//! threads carry it. So the newest grains wait in the window, and only what lies before it is out of reach. What lies
//! behind the newest write reads as zeroes, and zeroing it does nothing.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libdeflater::{CompressionLvl, Compressor, Decompressor};

use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, SECTOR, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoredFile, writer};
use crate::vmdk::create::{DESCRIPTOR_SECTORS, ENTRIES, MAX_FILE_SECTORS, TABLE_SECTORS};
use crate::vmdk::header::{DirectoryAt, Hosted, KDMV_MAGIC, KDMV_UNFINISHED, MAX_DIRECTORY_ENTRIES};

/// Sectors of a grain; every program writes streams with it.
const GRAIN: u64 = 128;
const GRAIN_BYTES: usize = (GRAIN * SECTOR) as usize;
/// Grains of the window: 4 MiB.
const WINDOW: u64 = 64;
/// Grains of it that stay when it moves on: 2 MiB, a few of the kernel's largest requests. The others are packed at once.
const KEEP: u64 = 32;
/// The most threads that pack: more than the window holds grains for each would only wait.
const MAX_THREADS: usize = 8;
/// As zlib does by default; libdeflate needs a fraction of its time for the same size.
const LEVEL: i32 = 6;
/// Bytes of the header of a packed grain.
const GRAIN_HEADER: usize = 12;

/// Kinds of markers.
const MARK_TABLE: u32 = 1;
const MARK_DIRECTORY: u32 = 2;
const MARK_FOOTER: u32 = 3;

/// A stream that is being written; see the module.
#[derive(Debug)]
pub struct StreamDisk {
    geometry: Geometry,
    /// Held while anything is done: whoever writes a stream does so alone.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    packed: Packed,
    window: Window,
    end: End,
    /// Why nothing is written any more: a sync failed, and the system may have dropped what it was about.
    lost: Option<Error>,
    /// The grain that was inflated last: who reads does so in small parts.
    last: Option<(u64, Vec<u8>)>,
}

/// Whether the file is a whole stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It is not.
    Open,
    /// It may be: an attempt to close it was begun, and did not succeed.
    Tried,
    /// It is, durably.
    Closed,
}

/// What lies compressed in the file. A clone is a state to go back to, or to try something out.
#[derive(Debug, Clone)]
struct Packed {
    file: Arc<dyn StoredFile>,
    header: Hosted,
    /// Sectors of the file that are in use; the next grain goes there.
    end: u64,
    /// Directory entries of the tables that are in the file.
    directory: Vec<u32>,
    /// The entries of the table that follows them, as far as they are known.
    table: Vec<u32>,
}

/// The grains that can still change.
#[derive(Debug)]
struct Window {
    /// Number of its first grain.
    first: u64,
    /// Their bytes; as long as what was written. Whole sectors.
    bytes: Vec<u8>,
}

impl StreamDisk {
    /// Makes an empty file a stream for a disk of `sectors` sectors, with the descriptor `text`. It is unfinished until
    /// [`close`](BlockWrite::close).
    ///
    /// Errors: `Usage` for a size that no tables cover, or what the system says.
    pub(crate) fn new(file: Arc<dyn StoredFile>, sectors: u64, text: &[u8]) -> Result<Self> {
        let descriptor_sectors = (text.len() as u64).div_ceil(SECTOR).max(DESCRIPTOR_SECTORS);
        let overhead = (1 + descriptor_sectors).next_multiple_of(GRAIN);
        let header = Hosted {
            version: 3,
            capacity: sectors,
            grain: GRAIN,
            descriptor: Some((1, descriptor_sectors)),
            entries_per_table: ENTRIES,
            redundant: None,
            directory: DirectoryAt::Footer,
            overhead,
            unclean: false,
            zeroed_grains: false,
            compressed: true,
            markers: true,
        };
        if header.tables() > MAX_DIRECTORY_ENTRIES {
            let most = MAX_DIRECTORY_ENTRIES * GRAIN * ENTRIES;
            return Err(Error::new(
                ErrorKind::Usage,
                format!("a stream has tables for {most} sectors at most, but the disk has {sectors}"),
            ));
        }
        let out = writer(&*file)?;
        out.set_len(overhead * SECTOR)?;
        out.write_all_at(0, &header.to_bytes(KDMV_UNFINISHED))?;
        out.write_all_at(SECTOR, text)?;
        out.sync()?;
        let packed = Packed {
            file,
            header,
            end: overhead,
            directory: Vec::new(),
            table: Vec::new(),
        };
        let window = Window {
            first: 0,
            bytes: Vec::new(),
        };
        let state = State {
            packed,
            window,
            end: End::Open,
            lost: None,
            last: None,
        };
        Ok(Self {
            geometry: Geometry {
                sectors,
                granule: 1,
                preferred: 1,
            },
            state: Mutex::new(state),
        })
    }

    /// Its file.
    pub fn file(&self) -> Arc<dyn StoredFile> {
        Arc::clone(&self.state().packed.file)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // what a panic can leave behind is a window that was not moved on: nothing of it is wrong
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockRead for StreamDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let mut state = self.state();
        let mut done = 0;
        while done < buf.len() {
            let lba = at.0 + done as u64 / SECTOR;
            let skip = (lba % GRAIN * SECTOR) as usize;
            let len = (GRAIN_BYTES - skip).min(buf.len() - done);
            state.read_grain(lba / GRAIN, skip, buf.get_mut(done..done + len).unwrap_or_default())?;
            done += len;
        }
        Ok(())
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        check_range(&self.geometry, at, SECTOR as usize)?;
        let state = self.state();
        let next = state.window.next();
        if at.0 >= next {
            return Ok((Content::Hole, self.geometry.sectors - at.0));
        }
        let grain = at.0 / GRAIN;
        let (stored, grains) = if grain >= state.window.first {
            (true, 1)
        } else {
            state.packed.content(grain)?
        };
        let end = ((grain + grains) * GRAIN).min(next);
        Ok((if stored { Content::Data } else { Content::Hole }, end - at.0))
    }

    fn is_zero(&self, at: Lba, _: u64) -> bool {
        at.0 >= self.state().window.next()
    }

    fn writer(&self) -> Option<&dyn BlockWrite> {
        Some(self)
    }
}

impl BlockWrite for StreamDisk {
    /// Makes a closed stream unfinished again.
    fn prepare_external_write(&self) -> Result<()> {
        self.state().reopen()
    }

    /// Errors: `Unsupported` for a write before the window; the stream stays as it was.
    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let mut state = self.state();
        state.refuse_lost()?;
        state.refuse_out_of_order(at.0)?;
        state.reopen()?;
        let mut done = 0;
        while done < buf.len() {
            let lba = at.0 + done as u64 / SECTOR;
            state.make_room(lba)?;
            done += state.window.put(lba, buf.get(done..).unwrap_or_default());
        }
        Ok(())
    }

    /// Zeroes are there already where nothing was written; where a grain is compressed it is too late for them.
    fn zero(&self, range: Range<Lba>, _: bool) -> Result<()> {
        let sectors = range.end.0.saturating_sub(range.start.0);
        check_range(&self.geometry, range.start, 0)?;
        check_range(&self.geometry, range.end, 0)?;
        let mut state = self.state();
        let window = state.window.first * GRAIN;
        if sectors > 0
            && state
                .packed
                .holds(range.start.0 / GRAIN..range.end.0.min(window).div_ceil(GRAIN))?
        {
            return Err(state.out_of_order("zeroing", range.start.0));
        }
        let part = range.start.0.max(window)..range.end.0.min(state.window.next());
        if part.is_empty() {
            return Ok(());
        }
        state.reopen()?;
        let from = ((part.start - window) * SECTOR) as usize;
        let to = ((part.end - window) * SECTOR) as usize;
        state.window.bytes.get_mut(from..to).unwrap_or_default().fill(0);
        Ok(())
    }

    /// Says whether the system kept what was given to it up to now. It cannot keep more than that: the newest grains are not
    /// in the file, and without its end no program reads it. Only [`close`](Self::close) makes the stream durable.
    fn flush(&self) -> Result<()> {
        self.state().sync()
    }

    /// Writes all that is still to come, tables and footer, and last the magic that makes an image of the file.
    fn has_unflushed_metadata(&self) -> bool {
        false
    }

    fn close(&self) -> Result<()> {
        let mut state = self.state();
        if state.end == End::Closed {
            return Ok(());
        }
        state.refuse_lost()?;
        state.end = End::Tried;
        // of a copy, so that writing can go on behind what is in the file for good
        let mut packed = state.packed.clone();
        packed.append(state.window.first, &state.window.bytes)?;
        packed.finish()?;
        state.sync()?;
        writer(&*packed.file)?.write_all_at(0, KDMV_MAGIC)?;
        state.sync()?;
        state.end = End::Closed;
        Ok(())
    }

    fn sequential_write_only(&self) -> bool {
        true
    }
}

impl State {
    /// Takes the end off a closed stream.
    fn reopen(&mut self) -> Result<()> {
        if self.end == End::Open {
            return Ok(());
        }
        let file = Arc::clone(&self.packed.file);
        let out = writer(&*file)?;
        out.write_all_at(0, KDMV_UNFINISHED)?;
        self.sync()?;
        out.set_len(self.packed.end * SECTOR)?;
        self.end = End::Open;
        Ok(())
    }

    /// Makes what is in the file durable.
    fn sync(&mut self) -> Result<()> {
        self.refuse_lost()?;
        writer(&*self.packed.file)?
            .sync()
            .inspect_err(|e| self.lost = Some(e.clone()))
    }

    fn refuse_lost(&self) -> Result<()> {
        let lost = |e: &Error| {
            e.clone()
                .within("the stream cannot be finished: an earlier sync failed")
        };
        self.lost.as_ref().map_or(Ok(()), |e| Err(lost(e)))
    }

    fn refuse_out_of_order(&self, at: u64) -> Result<()> {
        if at >= self.window.first * GRAIN {
            Ok(())
        } else {
            Err(self.out_of_order("a write", at))
        }
    }

    fn out_of_order(&self, what: &str, at: u64) -> Error {
        Error::unsupported(format!(
            "{}: {what} at sector {at}, but the stream is compressed up to sector {}: it is written once, in order",
            self.packed.file.label(),
            self.window.first * GRAIN
        ))
    }

    /// Moves the window on until sector `at` lies in it.
    fn make_room(&mut self, at: u64) -> Result<()> {
        let grain = at / GRAIN;
        if grain < self.window.first + WINDOW {
            return Ok(());
        }
        let first = grain - KEEP;
        let moved = usize::try_from(first - self.window.first)
            .unwrap_or(usize::MAX)
            .saturating_mul(GRAIN_BYTES);
        let moved = moved.min(self.window.bytes.len());
        let before = self.packed.position();
        if let Err(e) = self
            .packed
            .append(self.window.first, self.window.bytes.get(..moved).unwrap_or_default())
        {
            self.packed.go_back(before);
            return Err(e);
        }
        self.window.bytes.drain(..moved);
        self.window.first = first;
        Ok(())
    }

    /// A part of a grain, from its byte `skip` on.
    fn read_grain(&mut self, grain: u64, skip: usize, out: &mut [u8]) -> Result<()> {
        if let Some(index) = grain.checked_sub(self.window.first) {
            let from = (index as usize).saturating_mul(GRAIN_BYTES) + skip;
            let there = self.window.bytes.get(from..).unwrap_or_default();
            let (copied, missing) = out.split_at_mut(there.len().min(out.len()));
            copied.copy_from_slice(there.get(..copied.len()).unwrap_or_default());
            missing.fill(0);
            return Ok(());
        }
        if self.last.as_ref().is_none_or(|(number, _)| *number != grain) {
            self.last = Some((grain, self.packed.read(grain)?));
        }
        let whole = self.last.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        out.copy_from_slice(whole.get(skip..skip + out.len()).unwrap_or_default());
        Ok(())
    }
}

impl Window {
    /// The sector behind the last one that was written.
    fn next(&self) -> u64 {
        self.first * GRAIN + self.bytes.len() as u64 / SECTOR
    }

    /// Takes as much of `buf`, from sector `at` on, as fits; how many bytes. `at` lies in the window.
    fn put(&mut self, at: u64, buf: &[u8]) -> usize {
        let from = ((at - self.first * GRAIN) * SECTOR) as usize;
        let len = buf.len().min((WINDOW as usize * GRAIN_BYTES).saturating_sub(from));
        if self.bytes.len() < from + len {
            self.bytes.resize(from + len, 0);
        }
        if let (Some(to), Some(part)) = (self.bytes.get_mut(from..from + len), buf.get(..len)) {
            to.copy_from_slice(part);
        }
        len
    }
}

/// What [`Packed`] was before something was appended.
struct Position {
    end: u64,
    tables: usize,
    table: Vec<u32>,
}

impl Packed {
    fn position(&self) -> Position {
        Position {
            end: self.end,
            tables: self.directory.len(),
            table: self.table.clone(),
        }
    }

    /// Forgets what was appended since: the room is written again by the next try.
    fn go_back(&mut self, to: Position) {
        self.end = to.end;
        self.directory.truncate(to.tables);
        self.table = to.table;
    }

    /// Compresses grains, from number `first` on, and writes them with the tables that they complete.
    fn append(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        let packed = pack(first, bytes)?;
        let mut out = Vec::with_capacity(packed.iter().map(Vec::len).sum::<usize>() + GRAIN_BYTES);
        let start = self.end;
        for (grain, body) in (first..).zip(packed) {
            if body.is_empty() {
                continue;
            }
            self.tables_before(grain / ENTRIES, &mut out)?;
            self.table.resize((grain % ENTRIES) as usize, 0);
            self.table.push(self.sector()?);
            self.take(&body, &mut out);
        }
        writer(&*self.file)?.write_all_at(start * SECTOR, &out)
    }

    /// Appends the table in the making, and nothing for those between it and table `number`, as they are empty.
    fn tables_before(&mut self, number: u64, out: &mut Vec<u8>) -> Result<()> {
        while (self.directory.len() as u64) < number {
            if self.table.is_empty() {
                self.directory.push(0);
                continue;
            }
            self.take(&marker(TABLE_SECTORS, MARK_TABLE), out);
            let at = self.sector()?;
            self.directory.push(at);
            let mut table = std::mem::take(&mut self.table);
            table.resize(ENTRIES as usize, 0);
            self.take(&le_bytes(&table), out);
        }
        Ok(())
    }

    /// Appends bytes, up to a whole sector.
    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(SECTOR as usize), 0);
        self.end += (bytes.len() as u64).div_ceil(SECTOR);
    }

    /// The sector at which the next thing will lie.
    fn sector(&self) -> Result<u32> {
        // the end of a stream, with its tables, must fit as well
        const TAIL: u64 = 1 << 20;
        let full = || {
            let context = format!("{}: the stream is as long as its tables can tell", self.file.label());
            Error::new(ErrorKind::Os(libc::ENOSPC), context)
        };
        u32::try_from(self.end)
            .ok()
            .filter(|_| self.end + TAIL < MAX_FILE_SECTORS)
            .ok_or_else(full)
    }

    /// Writes the end of the stream.
    fn finish(&mut self) -> Result<()> {
        let start = self.end;
        let mut out = Vec::new();
        self.tables_before(self.header.tables(), &mut out)?;
        let directory = le_bytes(&self.directory);
        self.take(
            &marker((directory.len() as u64).div_ceil(SECTOR), MARK_DIRECTORY),
            &mut out,
        );
        let at = u64::from(self.sector()?);
        self.take(&directory, &mut out);
        self.take(&marker(1, MARK_FOOTER), &mut out);
        let footer = Hosted {
            directory: DirectoryAt::Sector(at),
            ..self.header.clone()
        };
        self.take(&footer.to_bytes(KDMV_MAGIC), &mut out);
        self.take(&[0; SECTOR as usize], &mut out);
        let file = writer(&*self.file)?;
        file.write_all_at(start * SECTOR, &out)?;
        // the footer is found from the end: what a try before left behind it has to go
        file.set_len(self.end * SECTOR)
    }

    /// The entry of a grain; 0 where it has none.
    fn entry(&self, grain: u64) -> Result<u32> {
        let (table, entry) = (grain / ENTRIES, grain % ENTRIES);
        match self.directory.get(table as usize) {
            Some(0) => Ok(0),
            Some(&at) => {
                let mut raw = [0; 4];
                self.file.read_exact_at(u64::from(at) * SECTOR + entry * 4, &mut raw)?;
                Ok(u32::from_le_bytes(raw))
            }
            None if table == self.directory.len() as u64 => Ok(self.table.get(entry as usize).copied().unwrap_or(0)),
            None => Ok(0),
        }
    }

    /// Whether a grain is in the file, and for how many grains on that holds at least.
    fn content(&self, grain: u64) -> Result<(bool, u64)> {
        match self.directory.get((grain / ENTRIES) as usize) {
            // without a table to the end of what it would cover
            Some(0) => Ok((false, ENTRIES - grain % ENTRIES)),
            _ => Ok((self.entry(grain)? != 0, 1)),
        }
    }

    /// Whether any of these grains is in the file. A table that is there has one, so it is soon found.
    fn holds(&self, grains: Range<u64>) -> Result<bool> {
        let mut grain = grains.start;
        while grain < grains.end {
            let (stored, grains) = self.content(grain)?;
            if stored {
                return Ok(true);
            }
            grain += grains;
        }
        Ok(false)
    }

    /// The bytes of a grain.
    fn read(&self, grain: u64) -> Result<Vec<u8>> {
        let mut whole = vec![0; GRAIN_BYTES];
        let sector = self.entry(grain)?;
        if sector == 0 {
            return Ok(whole);
        }
        let at = u64::from(sector) * SECTOR;
        let mut header = [0; GRAIN_HEADER];
        self.file.read_exact_at(at, &mut header)?;
        let [_, _, _, _, _, _, _, _, size @ ..] = header;
        let size = u32::from_le_bytes(size) as usize;
        let damaged = || {
            let label = self.file.label();
            Error::corrupt(format!(
                "{label}: grain {grain} at byte {at} is not what was written there: somebody changed it"
            ))
        };
        if size > 2 * GRAIN_BYTES {
            return Err(damaged());
        }
        let mut body = vec![0; size];
        self.file.read_exact_at(at + GRAIN_HEADER as u64, &mut body)?;
        match Decompressor::new().zlib_decompress(&body, &mut whole) {
            Ok(GRAIN_BYTES) => Ok(whole),
            _ => Err(damaged()),
        }
    }
}

/// Packs grains, each with its header; nothing of one that is all zeroes. The last one may be a part: zeroes follow.
fn pack(first: u64, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let grains: Vec<(u64, &[u8])> = (first..).zip(bytes.chunks(GRAIN_BYTES)).collect();
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MAX_THREADS);
    let share = grains.len().div_ceil(threads).max(1);
    let Some((own, others)) = grains.split_at_checked(share.min(grains.len())) else {
        return Ok(Vec::new());
    };
    std::thread::scope(|scope| {
        let spawn = |part| {
            std::thread::Builder::new()
                .name("pack".to_owned())
                .spawn_scoped(scope, move || pack_all(part))
        };
        let others: Vec<_> = others.chunks(share).map(|part| (part, spawn(part))).collect();
        let mut packed = pack_all(own)?;
        for (part, thread) in others {
            // where no thread is to be had, or where one died, this one does its work
            let done = thread.ok().and_then(|thread| thread.join().ok());
            packed.extend(done.unwrap_or_else(|| pack_all(part))?);
        }
        Ok(packed)
    })
}

fn pack_all(grains: &[(u64, &[u8])]) -> Result<Vec<Vec<u8>>> {
    let level = CompressionLvl::new(LEVEL).unwrap_or_default();
    let mut compressor = Compressor::new(level);
    grains
        .iter()
        .map(|(number, grain)| pack_one(&mut compressor, *number, grain))
        .collect()
}

fn pack_one(compressor: &mut Compressor, number: u64, grain: &[u8]) -> Result<Vec<u8>> {
    if is_zero(grain) {
        return Ok(Vec::new());
    }
    let mut whole = Vec::new();
    let grain = if grain.len() == GRAIN_BYTES {
        grain
    } else {
        // whole also at the end of the disk: every program reads it so
        whole.extend_from_slice(grain);
        whole.resize(GRAIN_BYTES, 0);
        &whole
    };
    let mut out = vec![0; GRAIN_HEADER + compressor.zlib_compress_bound(GRAIN_BYTES)];
    let body = out.get_mut(GRAIN_HEADER..).unwrap_or_default();
    let size = compressor
        .zlib_compress(grain, body)
        .map_err(|e| Error::corrupt(format!("grain {number} cannot be compressed: {e}")))?;
    let header = [
        (number * GRAIN).to_le_bytes().as_slice(),
        (size as u32).to_le_bytes().as_slice(),
    ]
    .concat();
    out.get_mut(..GRAIN_HEADER).unwrap_or_default().copy_from_slice(&header);
    out.truncate(GRAIN_HEADER + size);
    Ok(out)
}

/// Whether all bytes are zero; by words, which the compiler makes wide.
fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// A marker: what follows it, and how many sectors that is.
fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    [sectors.to_le_bytes().as_slice(), &[0; 4], &kind.to_le_bytes()].concat()
}

fn le_bytes(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests;
