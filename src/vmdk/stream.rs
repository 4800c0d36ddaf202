//! Writer of compressed streams (`streamOptimized`): each sector is written once, in ascending order.
//!
//! ```text
//!   write_at ─► Window: the grains that can still change ──full──► compressed in parallel ─► WrittenPart: the file
//!                 │ gaps are zeroes                                  all-zero grains are left out    │
//!   read_at ◄─────┴─────────────────────────────────────────────────────── grain tables ◄────────────┘
//!
//!   the file    kdmv header · descriptor · ( grains of a table · GT marker · GT )… · GD marker · GD · footer · EOS
//!                 └ becomes KDMV when the stream is closed         └─ written by `close`, `flush` ─┘
//! ```
//! States of the file ([`StreamEnd`]): open (magic `kdmv`, which no program opens as an image) ⇄ closed (a complete
//! stream). A write after `close` truncates the file to its grains and continues after them, so a stream can be closed
//! more than once.
//!
//! A failed sync, or a file that another process has truncated, sets the write latch: no later write, flush or close
//! succeeds. Reads continue to work.
//!
//! A compressed grain cannot be changed. Sequential writers still rewrite recent sectors: a caller that fills a block
//! in parts writes it again, and several threads may deliver sequential requests out of order. So the newest grains
//! stay in the window, and only writes before the window are refused. Sectors after the newest write read as zeroes,
//! and zeroing them does nothing.
//!
//! One mutex protects the whole state. No other lock is taken while it is held.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use libdeflater::{CompressionLvl, Compressor, Decompressor};

use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, SECTOR, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;
use crate::store::{RoomNeeded, StoredFile, StoredWrite, writer};
use crate::vmdk::header::{DirectoryAt, Hosted, KDMV_MAGIC, KDMV_UNFINISHED, MAX_DIRECTORY_ENTRIES};
use crate::vmdk::hosted_layout::{DESCRIPTOR_SECTORS, ENTRIES, MAX_FILE_SECTORS, TABLE_SECTORS};
use crate::write_latch::WriteLatch;

/// Sectors of a grain: 64 KiB, the grain size of all streams in the field.
const GRAIN: u64 = 128;
const GRAIN_BYTES: usize = (GRAIN * SECTOR) as usize;
/// Grains in the window: 4 MiB.
const WINDOW: u64 = 64;
/// Grains that stay in the window when it advances: 2 MiB, a few of the kernel's largest requests. The older ones are
/// compressed together.
const KEEP: u64 = 32;
/// Sectors that are kept free at the end of what tables can address: 512 MiB. Without them a stream that has reached its
/// limit could not be closed, and all of it would be lost. The window takes at most 9 thousand sectors, the directory 2^18.
const TAIL: u64 = 1 << 20;
/// Maximum number of threads that compress: the window has too few grains to keep more of them busy.
const MAX_THREADS: usize = 8;
/// Compression level: zlib's default. libdeflate needs a fraction of zlib's time for the same size.
const LEVEL: i32 = 6;
/// Bytes of the header of a compressed grain: its LBA (u64) and the size of its compressed data (u32).
const GRAIN_HEADER: usize = 12;

// Types of markers, as the format numbers them.
const MARK_TABLE: u32 = 1;
const MARK_DIRECTORY: u32 = 2;
const MARK_FOOTER: u32 = 3;

/// Compressed stream that is being written: a disk that accepts sequential writes only.
#[derive(Debug)]
pub struct StreamDisk {
    geometry: Geometry,
    /// Held for each whole operation: operations on a stream are serialized.
    state: Mutex<StreamState>,
    /// Set by a failed sync or a truncated file.
    latch: Arc<WriteLatch>,
}

#[derive(Debug)]
struct StreamState {
    written: WrittenPart,
    window: Window,
    end: StreamEnd,
    /// That of the disk.
    latch: Arc<WriteLatch>,
    /// Grain that was inflated last, as readers fetch a grain in several small requests.
    last_inflated: Option<(u64, Vec<u8>)>,
}

/// State of the end of the file, which makes it a complete stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StreamEnd {
    /// The file ends with its grains: the stream is incomplete.
    Open,
    /// An attempt to close the stream has not succeeded: tables, footer or magic may be in the file.
    Tried,
    /// The stream is complete and durable.
    Closed,
}

/// Part of the stream that is in the file, compressed. A change is made on a clone where a failure has to undo it.
#[derive(Debug, Clone)]
struct WrittenPart {
    file: Arc<dyn StoredFile>,
    header: Hosted,
    /// Number of sectors of the file in use; the next grain is written there.
    end: u64,
    /// Directory entries of the grain tables that are in the file; 0 for a table without grains.
    directory: Vec<u32>,
    /// Entries so far of the grain table after those, which is in memory only.
    table: Vec<u32>,
}

/// Newest grains, which are in memory and can still change.
#[derive(Debug)]
struct Window {
    /// Number of the first grain in the window.
    first: u64,
    /// Contents up to the last sector that was written.
    bytes: Vec<u8>,
}

impl StreamDisk {
    /// Starts a stream in the empty `file` for a disk of `sectors` sectors, with the descriptor `text`. The stream is
    /// incomplete until [`close`](BlockWrite::close).
    ///
    /// Errors: `Usage` if the grain tables cannot cover the size, otherwise the error of the system call.
    pub(crate) fn new(file: Arc<dyn StoredFile>, sectors: u64, text: &[u8]) -> Result<Self> {
        let descriptor_sectors = (text.len() as u64).div_ceil(SECTOR).max(DESCRIPTOR_SECTORS);
        // A grain may start at any sector. VMware's streams begin them at 128, and so do these.
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
                format!(
                    "a stream has tables for {most} sectors at most, but the disk has {sectors}: choose another create-type"
                ),
            ));
        }
        let out = writer(&*file)?;
        out.set_len(overhead * SECTOR)?;
        out.write_all_at(0, &header.to_bytes(KDMV_UNFINISHED))?;
        out.write_all_at(SECTOR, text)?;
        out.sync()?;
        let written = WrittenPart {
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
        let latch = Arc::<WriteLatch>::default();
        let state = StreamState {
            written,
            window,
            end: StreamEnd::Open,
            latch: Arc::clone(&latch),
            last_inflated: None,
        };
        Ok(Self {
            geometry: Geometry {
                sectors,
                granule: 1,
                preferred: 1,
            },
            state: Mutex::new(state),
            latch,
        })
    }

    /// Returns the stored file of the stream.
    pub fn file(&self) -> Arc<dyn StoredFile> {
        Arc::clone(&self.state().written.file)
    }

    fn state(&self) -> MutexGuard<'_, StreamState> {
        // A panic can only leave a window that did not advance, which is a valid state.
        lock(&self.state)
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
        // The window is not searched for zeroes, as a later write may still change it.
        let (stored, grains) = if grain >= state.window.first {
            (true, 1)
        } else {
            state.written.content(grain)?
        };
        let end = ((grain + grains) * GRAIN).min(next);
        Ok((if stored { Content::Data } else { Content::Hole }, end - at.0))
    }

    fn is_zero(&self, at: Lba, _: u64) -> bool {
        // Without a read of tables only what lies behind all writes is known to be zero.
        at.0 >= self.state().window.next()
    }

    fn writer(&self) -> Option<&dyn BlockWrite> {
        Some(self)
    }
}

impl BlockWrite for StreamDisk {
    fn latch(&self) -> &WriteLatch {
        &self.latch
    }

    /// Opens a closed stream again: takes its end off the file.
    fn prepare_external_write(&self) -> Result<()> {
        self.state().reopen()
    }

    /// Writes sectors inside of or after the window.
    ///
    /// Errors: `Unsupported` for a write before the window; the stream does not change.
    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let mut state = self.state();
        state.check_latch()?;
        state.refuse_out_of_order(at.0)?;
        state.reopen()?;
        let mut done = 0;
        while done < buf.len() {
            let lba = at.0 + done as u64 / SECTOR;
            state.advance_window(lba)?;
            done += state.window.put(lba, buf.get(done..).unwrap_or_default());
        }
        Ok(())
    }

    /// Zeroes the part of the range in the window. Sectors that were never written are zeroes already.
    ///
    /// Errors: `Unsupported` if the range holds a compressed grain; the stream does not change.
    fn zero(&self, range: Range<Lba>, _: bool) -> Result<()> {
        let sectors = range.end.0.saturating_sub(range.start.0);
        check_range(&self.geometry, range.start, 0)?;
        check_range(&self.geometry, range.end, 0)?;
        let mut state = self.state();
        state.check_latch()?;
        let window = state.window.first * GRAIN;
        // Tools clear the whole target before they copy: that is fine as long as no compressed grain has to change.
        if sectors > 0
            && state
                .written
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

    fn add_room(&self, _range: Range<Lba>, _zero: bool, _needed: &mut RoomNeeded) -> Result<()> {
        // How much room a write takes depends on how well its data compress, so nothing can be said before.
        Ok(())
    }

    fn allocate(&self, _range: Range<Lba>) -> Result<()> {
        Ok(())
    }

    fn slow_zeroing(&self, range: Range<Lba>) -> Option<String> {
        let state = self.state();
        let end = range.end.0.min(state.window.first * GRAIN);
        let held = state.written.holds(range.start.0 / GRAIN..end.div_ceil(GRAIN));
        (!matches!(held, Ok(false))).then(|| state.out_of_order("zeroing", range.start.0).to_string())
    }

    /// Closes the stream: without its end no program reads it, so nothing of it would be durable.
    fn flush(&self) -> Result<()> {
        self.close()
    }

    /// Writes the window, the remaining tables and the footer, and last the magic that makes the file an image.
    fn close(&self) -> Result<()> {
        let mut state = self.state();
        state.check_latch()?;
        if state.end == StreamEnd::Closed {
            return Ok(());
        }
        state.writable_file()?;
        state.end = StreamEnd::Tried;
        // The end is written from a clone: `state.written` still describes the grains alone, so a later write truncates
        // the file to them and continues.
        let mut written = state.written.clone();
        // The window and the end of the stream may use the tail that is kept free for them.
        written.append(state.window.first, &state.window.bytes, 0)?;
        written.finish()?;
        // Everything is durable before the magic changes: after a crash the file is complete or is not an image.
        state.sync()?;
        state.writable_file()?.write_all_at(0, KDMV_MAGIC)?;
        state.sync()?;
        state.end = StreamEnd::Closed;
        Ok(())
    }

    fn sequential_write_only(&self) -> bool {
        true
    }
}

impl StreamState {
    /// Removes the end of a closed stream from the file, if it has one.
    fn reopen(&mut self) -> Result<()> {
        if self.end == StreamEnd::Open {
            return Ok(());
        }
        let out = self.writable_file()?;
        // The magic goes first, durably: a crash during the truncation must not leave an image without its footer.
        out.write_all_at(0, KDMV_UNFINISHED)?;
        self.sync()?;
        out.set_len(self.written.end * SECTOR)?;
        self.end = StreamEnd::Open;
        Ok(())
    }

    /// Syncs the file. A failure sets the latch.
    fn sync(&self) -> Result<()> {
        self.latch.sync(&*self.written.file)
    }

    /// Returns the writing half of the file. Sets the latch if another process truncated the file: its grains are lost,
    /// and a write beyond its new end would put zeroes in their place.
    fn writable_file(&self) -> Result<&dyn StoredWrite> {
        self.latch
            .check_not_truncated(&*self.written.file, self.written.end * SECTOR)
    }

    fn check_latch(&self) -> Result<()> {
        let within = |e: Error| e.within("the stream cannot be finished");
        self.latch.check().map_err(within)
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
            self.written.file.label(),
            self.window.first * GRAIN
        ))
    }

    /// Advances the window until it covers sector `at`, and writes the grains that leave it.
    fn advance_window(&mut self, at: u64) -> Result<()> {
        let grain = at / GRAIN;
        if grain < self.window.first + WINDOW {
            return Ok(());
        }
        // Cannot underflow: the window has more grains than are kept, and `grain` lies behind all of them.
        let first = grain - KEEP;
        let moved = usize::try_from(first - self.window.first)
            .unwrap_or(usize::MAX)
            .saturating_mul(GRAIN_BYTES);
        let moved = moved.min(self.window.bytes.len());
        // If the append fails, for example because the store is full, the grains stay in the window and the caller can
        // retry.
        self.writable_file()?;
        let before = self.written.position();
        let leaving = self.window.bytes.get(..moved).unwrap_or_default();
        if let Err(e) = self.written.append(self.window.first, leaving, TAIL) {
            self.written.roll_back(before);
            return Err(e);
        }
        self.window.bytes.drain(..moved);
        self.window.first = first;
        Ok(())
    }

    /// Reads a part of a grain, from its byte `skip` on.
    fn read_grain(&mut self, grain: u64, skip: usize, out: &mut [u8]) -> Result<()> {
        if let Some(index) = grain.checked_sub(self.window.first) {
            let from = (index as usize).saturating_mul(GRAIN_BYTES) + skip;
            let written = self.window.bytes.get(from..).unwrap_or_default();
            let (copied, missing) = out.split_at_mut(written.len().min(out.len()));
            copied.copy_from_slice(written.get(..copied.len()).unwrap_or_default());
            missing.fill(0);
            return Ok(());
        }
        if self.last_inflated.as_ref().is_none_or(|(number, _)| *number != grain) {
            self.last_inflated = Some((grain, self.written.read(grain)?));
        }
        let whole = self.last_inflated.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        out.copy_from_slice(whole.get(skip..skip + out.len()).unwrap_or_default());
        Ok(())
    }
}

impl Window {
    /// Returns the sector after the last one that was written.
    fn next(&self) -> u64 {
        self.first * GRAIN + self.bytes.len() as u64 / SECTOR
    }

    /// Stores as much of `buf` as fits from sector `at` on, which must be in the window. Returns the number of bytes
    /// stored.
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

/// Lengths and current table of a [`WrittenPart`] before an append, to undo the append.
struct Position {
    end: u64,
    tables: usize,
    table: Vec<u32>,
}

impl WrittenPart {
    fn position(&self) -> Position {
        Position {
            end: self.end,
            tables: self.directory.len(),
            table: self.table.clone(),
        }
    }

    /// Undoes the appends since `to`. The file keeps the bytes, and the next append overwrites them.
    fn roll_back(&mut self, to: Position) {
        self.end = to.end;
        self.directory.truncate(to.tables);
        self.table = to.table;
    }

    /// Compresses grains from number `first` on, and writes them with the grain tables that they complete. `kept` sectors
    /// that tables can address stay free.
    fn append(&mut self, first: u64, bytes: &[u8], kept: u64) -> Result<()> {
        let compressed = compress(first, bytes)?;
        let mut out = Vec::with_capacity(compressed.iter().map(Vec::len).sum::<usize>() + GRAIN_BYTES);
        // Grains and tables are collected in memory, so that one write appends them all.
        let start = self.end;
        for (grain, body) in (first..).zip(compressed) {
            if body.is_empty() {
                continue;
            }
            self.tables_before(grain / ENTRIES, &mut out)?;
            self.table.resize((grain % ENTRIES) as usize, 0);
            self.table.push(self.next_sector(kept)?);
            self.append_padded(&body, &mut out);
        }
        writer(&*self.file)?.write_all_at(start * SECTOR, &out)
    }

    /// Appends the current grain table to `out`. The tables between it and table `number` are empty: each gets a
    /// directory entry of 0.
    fn tables_before(&mut self, number: u64, out: &mut Vec<u8>) -> Result<()> {
        while (self.directory.len() as u64) < number {
            if self.table.is_empty() {
                self.directory.push(0);
                continue;
            }
            self.append_padded(&marker(TABLE_SECTORS, MARK_TABLE), out);
            let at = self.next_sector(0)?;
            self.directory.push(at);
            let mut table = std::mem::take(&mut self.table);
            table.resize(ENTRIES as usize, 0);
            self.append_padded(&le_bytes(&table), out);
        }
        Ok(())
    }

    /// Appends bytes to `out`, padded with zeroes to whole sectors.
    fn append_padded(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(SECTOR as usize), 0);
        self.end += (bytes.len() as u64).div_ceil(SECTOR);
    }

    /// Returns the sector of the next append.
    ///
    /// Errors: `ENOSPC` if table entries of 32 bits cannot address it and `kept` sectors after it.
    fn next_sector(&self, kept: u64) -> Result<u32> {
        let full = || {
            let context = format!(
                "{}: the stream has reached {MAX_FILE_SECTORS} sectors, the most that its tables can address",
                self.file.label()
            );
            Error::new(ErrorKind::Os(libc::ENOSPC), context)
        };
        u32::try_from(self.end)
            .ok()
            .filter(|_| self.end + kept < MAX_FILE_SECTORS)
            .ok_or_else(full)
    }

    /// Writes the end of the stream: the last tables, the directory, the footer and the end-of-stream marker.
    fn finish(&mut self) -> Result<()> {
        let start = self.end;
        let mut out = Vec::new();
        self.tables_before(self.header.tables(), &mut out)?;
        let directory = le_bytes(&self.directory);
        self.append_padded(
            &marker((directory.len() as u64).div_ceil(SECTOR), MARK_DIRECTORY),
            &mut out,
        );
        let at = u64::from(self.next_sector(0)?);
        self.append_padded(&directory, &mut out);
        self.append_padded(&marker(1, MARK_FOOTER), &mut out);
        let footer = Hosted {
            directory: DirectoryAt::Sector(at),
            ..self.header.clone()
        };
        self.append_padded(&footer.to_bytes(KDMV_MAGIC), &mut out);
        // The marker of the end: one of type 0 is a sector of zeroes.
        self.append_padded(&[0; SECTOR as usize], &mut out);
        let file = writer(&*self.file)?;
        file.write_all_at(start * SECTOR, &out)?;
        // Readers find the footer from the end of the file, so the leftovers of an earlier attempt have to go.
        file.set_len(self.end * SECTOR)
    }

    /// Returns the table entry of a grain: its sector in the file, or 0 if the file does not have it.
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

    /// Returns true if the grain is in the file, and the number of grains from it on for which the answer holds.
    fn content(&self, grain: u64) -> Result<(bool, u64)> {
        match self.directory.get((grain / ENTRIES) as usize) {
            // Without a table the answer holds up to the end of the range that the table would cover.
            Some(0) => Ok((false, ENTRIES - grain % ENTRIES)),
            _ => Ok((self.entry(grain)? != 0, 1)),
        }
    }

    /// Returns true if any of these grains is in the file. A table in the file names at least one grain, so the search
    /// ends soon.
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

    /// Returns the bytes of a grain; zeroes if the file does not have it.
    ///
    /// Errors: `Corrupt` if the compressed grain is damaged.
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
                "{label}: grain {grain} at byte {at} differs from what was written there: another process changed the file"
            ))
        };
        // The size comes from the file: it is bounded before it becomes an allocation.
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

/// Compresses grains in parallel and puts a header before each. The result is empty for a grain that is all zeroes. The
/// last grain may be partial: it is padded with zeroes.
fn compress(first: u64, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
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
                .spawn_scoped(scope, move || compress_all(part))
        };
        let others: Vec<_> = others.chunks(share).map(|part| (part, spawn(part))).collect();
        let mut compressed = compress_all(own)?;
        for (part, thread) in others {
            // If a thread could not be spawned, or panicked, this thread compresses its part.
            let done = thread.ok().and_then(|thread| thread.join().ok());
            compressed.extend(done.unwrap_or_else(|| compress_all(part))?);
        }
        Ok(compressed)
    })
}

fn compress_all(grains: &[(u64, &[u8])]) -> Result<Vec<Vec<u8>>> {
    let level = CompressionLvl::new(LEVEL).unwrap_or_default();
    let mut compressor = Compressor::new(level);
    grains
        .iter()
        .map(|(number, grain)| compress_one(&mut compressor, *number, grain))
        .collect()
}

fn compress_one(compressor: &mut Compressor, number: u64, grain: &[u8]) -> Result<Vec<u8>> {
    if is_zero(grain) {
        return Ok(Vec::new());
    }
    let mut whole = Vec::new();
    let grain = if grain.len() == GRAIN_BYTES {
        grain
    } else {
        // The last grain of the disk is stored whole too: all readers accept that.
        whole.extend_from_slice(grain);
        whole.resize(GRAIN_BYTES, 0);
        &whole
    };
    let mut out = vec![0; GRAIN_HEADER + compressor.zlib_compress_bound(GRAIN_BYTES)];
    let body = out.get_mut(GRAIN_HEADER..).unwrap_or_default();
    let size = compressor
        .zlib_compress(grain, body)
        .map_err(|e| Error::corrupt(format!("compressing grain {number}: {e}")))?;
    let header = [
        (number * GRAIN).to_le_bytes().as_slice(),
        (size as u32).to_le_bytes().as_slice(),
    ]
    .concat();
    out.get_mut(..GRAIN_HEADER).unwrap_or_default().copy_from_slice(&header);
    out.truncate(GRAIN_HEADER + size);
    Ok(out)
}

/// Returns true if all bytes are zero. Chunks without an early exit let the compiler vectorize the loop.
fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Returns the bytes of a marker: the number of sectors that follow it, and their type.
fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    [sectors.to_le_bytes().as_slice(), &[0; 4], &kind.to_le_bytes()].concat()
}

fn le_bytes(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests;
