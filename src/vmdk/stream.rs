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

mod packed_grain;
mod written_part;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use self::packed_grain::{GRAIN, GRAIN_BYTES};
use self::written_part::WrittenPart;
use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, SECTOR, check_range};
use crate::error::{Error, Result};
use crate::mutex::lock;
use crate::store::{RoomNeeded, StoredFile, StoredWrite};
use crate::vmdk::header::{KDMV_MAGIC, KDMV_UNFINISHED};
use crate::write_latch::WriteLatch;

/// Grains in the window: 4 MiB.
const WINDOW: u64 = 64;
/// Grains that stay in the window when it advances: 2 MiB, a few of the kernel's largest requests. The older ones are
/// compressed together.
const KEEP: u64 = 32;
/// Sectors that are kept free at the end of what tables can address: 512 MiB. Without them a stream that has reached its
/// limit could not be closed, and all of it would be lost. The window takes at most 9 thousand sectors, the directory 2^18.
const TAIL: u64 = 1 << 20;

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
        let written = WrittenPart::start(file, sectors, text)?;
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

#[cfg(test)]
mod tests;
