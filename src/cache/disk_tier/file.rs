//! Blocks of one file in the folder: a sparse data file and its map.
//!
//! ```text
//!   write:  data ─► entry "in this boot" ─► (later, for many blocks) sync of the data ─► entry "durable"
//!   read:   entry ─► data ─► do they match? ─ no ─► entry 0: the block is fetched again
//!   all entries durable, all blocks verified by this process ─► completion record: the data file is a local file
//! ```
//! The entry is written soon after the data, so that other processes find the block, and so that a killed one loses no
//! more than the last MiB of each fetch: the kernel has the pages. Only a crash of the machine loses what was not synced,
//! and the entries with it.
//!
//! A complete file is read without checksums, so all of its blocks are compared with theirs first, also those that this
//! process has written: another program may have damaged them since. The times of the data file tell whether that is still
//! true: any write changes them. Damage that is found withdraws the record.
//!
//! # Locks
//!
//! OFD locks on the map, which end with the process: byte 0 shared while the file is in use (nothing evicts it), and the
//! bytes of an entry exclusively while a process fetches the block. `verified` is held while the completion is looked for,
//! and acquired before all others; `flushing` is held during a flush. No reader or writer waits for these two. `changing`
//! is held during a write of entries or of the completion record, and acquired before `checked`. `pending` and `checked`
//! are held for a few instructions.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use super::checked::CheckedBlocks;
use super::completion::{NONE, RECORD, completion_of, is_complete};
use super::entries::Entries;
use super::flusher::{Flush, FlushQueue};
use super::folder::Folder;
use super::format::{self, Checksum, Durability, ENTRY, FileKey, HEADER};
use super::lock::{Lock, LockMode};
use super::storage::Storage;
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;

/// Bytes that are written before the data is synced, which bounds `pending`. Rarely reached within [`FLUSH_DELAY`]: a sync
/// beside fetches slows them down, with one for each 512 MiB by a fifth.
const FLUSH_AFTER: u64 = 8 << 30;
/// Part of the folder's limit that is written before the data is synced: the limit is kept with each sync.
const FLUSH_PART: u64 = 8;
/// Time after which fewer blocks are synced: bounds what a crash of the machine loses.
const FLUSH_DELAY: Duration = Duration::from_secs(5);
/// Pause between two looks at a lock of another process.
const LOCK_PAUSE: Duration = Duration::from_millis(5);
/// Wait for the folder's lock before an eviction; a process that holds it longer evicts itself.
const EVICTION_WAIT: Duration = Duration::from_millis(500);

/// Blocks of one file.
pub struct TierFile {
    key: FileKey,
    data: Box<dyn Storage>,
    entries: Entries,
    /// The files behind `data` and `entries`; `None` in a simulation.
    files: Option<Files>,
    boot: u64,
    /// Thread that flushes, and this file for its queue. Without it the writer flushes.
    flusher: Option<(Arc<FlushQueue<Self>>, Weak<Self>)>,
    /// Blocks whose data is not synced yet, with their durable entries.
    pending: Mutex<Vec<(u64, u64)>>,
    /// Number of such blocks from which on they are synced at once.
    flush_after: usize,
    flushing: Mutex<()>,
    /// Held while entries of new blocks or the completion are put, or those of a damaged block are cleared.
    changing: Mutex<()>,
    /// Number of blocks from the first one on that were seen to be there.
    present_to: AtomicU64,
    checked: Mutex<CheckedBlocks>,
    verified: Mutex<Verified>,
    /// True if damage was found, but the completion record could not be withdrawn.
    distrusted: AtomicBool,
    /// Reason why nothing more is kept: a write has failed, or the folder is full.
    refusal: OnceLock<Error>,
}

/// Blocks at the start of a file that were compared with their checksums, all in one state of its data.
#[derive(Debug)]
struct Verified {
    /// State of the data file: its completion record.
    state: [u8; RECORD],
    /// Number of the block after the last one.
    end: u64,
}

/// End of an attempt to note the completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Noted {
    /// It is noted, or the file is not complete.
    Done,
    /// Not all blocks are verified yet.
    Stopped,
}

/// Open files of the folder.
pub(super) struct Files {
    pub(super) folder: Arc<Folder>,
    pub(super) data: Arc<File>,
    pub(super) map: Arc<File>,
    /// Keeps the file from being evicted.
    pub(super) _in_use: Lock,
}

impl fmt::Debug for TierFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TierFile")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl TierFile {
    /// Creates the blocks of a file, which are flushed through `queue`, or by their writers without one.
    pub(super) fn new(key: FileKey, files: Files, boot: u64, queue: Option<&Arc<FlushQueue<Self>>>) -> Arc<Self> {
        let (data, map) = (Box::new(Arc::clone(&files.data)), Box::new(Arc::clone(&files.map)));
        Arc::new_cyclic(|this| {
            let flusher = queue.map(|queue| (Arc::clone(queue), Weak::clone(this)));
            Self::over(key, data, map, Some(files), boot, flusher)
        })
    }

    pub(super) fn over(
        key: FileKey,
        data: Box<dyn Storage>,
        map: Box<dyn Storage>,
        files: Option<Files>,
        boot: u64,
        flusher: Option<(Arc<FlushQueue<Self>>, Weak<Self>)>,
    ) -> Self {
        let limit = files.as_ref().and_then(|files| files.folder.limit());
        let flush_after = limit.map_or(FLUSH_AFTER, |limit| FLUSH_AFTER.min(limit / FLUSH_PART));
        Self {
            entries: Entries::new(map, key.blocks()),
            flush_after: (flush_after / key.block).max(1) as usize,
            key,
            data,
            files,
            boot,
            flusher,
            pending: Mutex::default(),
            flushing: Mutex::default(),
            changing: Mutex::default(),
            present_to: AtomicU64::new(0),
            checked: Mutex::default(),
            verified: Mutex::new(Verified { state: NONE, end: 0 }),
            distrusted: AtomicBool::new(false),
            refusal: OnceLock::new(),
        }
    }

    /// Returns the key of the file.
    pub fn key(&self) -> &FileKey {
        &self.key
    }

    /// Returns the reason why nothing more is kept, if there is one.
    pub fn refusal(&self) -> Option<&Error> {
        self.refusal.get()
    }

    /// Returns the bytes of the blocks that this process has written, or compared with their checksums.
    pub(crate) fn known_bytes(&self) -> u64 {
        (lock(&self.checked).count() * self.key.block).min(self.key.len)
    }

    /// Returns true if the map has an entry for the block.
    pub fn has(&self, number: u64) -> bool {
        self.entries.get(number) != 0
    }

    /// Returns the number of blocks without an entry, one after the other, at the start of `blocks`.
    pub(super) fn missing(&self, blocks: Range<u64>) -> u64 {
        self.entries.missing(blocks)
    }

    /// Returns the next range of bytes from `offset` on of which no block is there.
    pub(crate) fn missing_from(&self, offset: u64) -> Option<Range<u64>> {
        let mut start = None;
        self.entries.each(offset / self.key.block, |number, entry| match entry {
            0 => {
                start = Some(number);
                ControlFlow::Break(())
            }
            _ => ControlFlow::Continue(()),
        });
        let (start, mut end) = (start?, self.key.blocks());
        self.entries.each_present(start, |number, _| {
            end = number;
            ControlFlow::Break(())
        });
        let bytes = |number: u64| (number * self.key.block).min(self.key.len);
        Some(bytes(start)..bytes(end))
    }

    /// Returns a block, if it is there and undamaged. Forgets a damaged one, and that the file is complete.
    pub fn read(&self, number: u64) -> Option<Vec<u8>> {
        // The entry decides, not the data: a hole in the data file reads as zeroes, which may be the right ones or not.
        let entry = self.entries.get(number);
        if entry == 0 {
            return None;
        }
        let mut data = vec![0; self.key.block_len(number)];
        self.read_into(number, entry, &mut data).map(|_| data)
    }

    /// Reads a block that has an entry into `data`, which has its length. Returns its checksums, or `None` for a damaged
    /// block, which it forgets.
    fn read_into(&self, number: u64, entry: u64, data: &mut [u8]) -> Option<Checksum> {
        let read = self.data.read(data, number * self.key.block);
        if read.is_ok()
            && let Some(sum) = format::matching(entry, number, data, self.boot)
        {
            lock(&self.checked).insert(number);
            return Some(sum);
        }
        self.forget_damaged(number, entry);
        None
    }

    /// Forgets a block whose data does not match `entry`, and that the file is complete.
    pub(super) fn forget_damaged(&self, number: u64, entry: u64) {
        let _changing = lock(&self.changing);
        // Another thread may have written the block anew since the entry was read: the data is compared with the old one.
        if self.entries.get(number) != entry {
            return;
        }
        tracing::info!("{}: a cached block was damaged: fetching it again", self.key.label);
        // Before the entry is cleared: the kernel may read a complete file without checksums, and the next open must not
        // allow it.
        self.revoke_completion();
        let _ = self.entries.put(number, &[0]);
    }

    /// Keeps a block, unless it is there. A failure only means that it is not kept.
    pub fn write(&self, number: u64, data: &[u8]) {
        if !self.has(number) {
            self.write_run(number, &[data], &[Checksum::of(data)]);
        }
    }

    /// Keeps neighbouring blocks, the first of which is `first`. `sums` are their checksums. A failure only means that they
    /// are not kept.
    pub(super) fn write_run(&self, first: u64, blocks: &[&[u8]], sums: &[Checksum]) {
        let mut numbered = (first..).zip(blocks);
        if self.refusal().is_some() || numbered.any(|(number, data)| data.len() != self.key.block_len(number)) {
            return;
        }
        // Data first, then its entry: a crash between them leaves a block that counts as missing.
        match self.data.write_parts(blocks, first * self.key.block) {
            Ok(()) => self.publish(first, sums),
            Err(e) => self.give_up(&e),
        }
    }

    /// Publishes written blocks: `sums` are the checksums of those from `first` on.
    fn publish(&self, first: u64, sums: &[Checksum]) {
        let numbered = || (first..).zip(sums);
        let in_boot = Durability::InBoot(self.boot);
        let entries: Vec<u64> = numbered().map(|(number, sum)| sum.entry(number, in_boot)).collect();
        let put = {
            let _changing = lock(&self.changing);
            self.entries.put(first, &entries)
        };
        if let Err(e) = put {
            return self.give_up(&e);
        }
        let all_checked = {
            let mut checked = lock(&self.checked);
            numbered().for_each(|(number, _)| checked.insert(number));
            checked.count() == self.key.blocks()
        };
        let (before, count) = {
            let mut pending = lock(&self.pending);
            let before = pending.len();
            pending.extend(numbered().map(|(number, sum)| (number, sum.entry(number, Durability::Durable))));
            (before, pending.len())
        };
        let due = match count >= self.flush_after || all_checked {
            true => Duration::ZERO,
            false if before == 0 => FLUSH_DELAY,
            false => return,
        };
        self.schedule(due, count >= self.flush_after);
    }

    /// Lets the thread of the tier flush the file after `delay`. Without a thread, flushes at once where it must be.
    pub(super) fn schedule(&self, delay: Duration, must: bool) {
        let scheduled = self.flusher.as_ref();
        let scheduled = scheduled.is_some_and(|(queue, this)| queue.push(this, Instant::now() + delay));
        if !scheduled && must {
            self.flush();
        }
    }

    /// Makes the blocks that were written durable, and keeps the folder within its limit.
    pub fn flush(&self) {
        let _flushing = lock(&self.flushing);
        let mut pending = std::mem::take(&mut *lock(&self.pending));
        if pending.is_empty() {
            return;
        }
        if let Err(e) = self.data.sync() {
            // The entries stay those of this boot.
            return self.give_up(&e);
        }
        pending.sort_unstable();
        for run in pending.chunk_by(|a, b| a.0 + 1 == b.0) {
            let entries: Vec<u64> = run.iter().map(|(_, entry)| *entry).collect();
            let first = run.first().map_or(0, |(number, _)| *number);
            if let Err(e) = self.entries.put(first, &entries) {
                return self.give_up(&e);
            }
        }
        self.keep_within_limit();
    }

    fn keep_within_limit(&self) {
        let Some((files, limit)) = self
            .files
            .as_ref()
            .and_then(|files| Some((files, files.folder.limit()?)))
        else {
            return;
        };
        // Where the folder is busy another process evicts.
        let evicted = files.folder.evict(EVICTION_WAIT);
        if evicted.is_ok_and(|evicted| !evicted.within_limit) {
            self.refuse(Error::new(
                ErrorKind::Os(libc::ENOSPC),
                format!(
                    "{}: the files in use take more than cache-dir-size={limit}; raise it",
                    files.folder.label()
                ),
            ));
        }
    }

    /// Keeps no more blocks.
    pub(super) fn give_up(&self, error: &io::Error) {
        let folder = self
            .files
            .as_ref()
            .map(|files| files.folder.label())
            .unwrap_or_default();
        let source = error
            .raw_os_error()
            .map_or_else(|| io::Error::from(error.kind()), io::Error::from_raw_os_error);
        self.refuse(Error::io(
            format!("{folder}: keeping blocks of {}", self.key.label),
            source,
        ));
    }

    fn refuse(&self, why: Error) {
        if self.refusal.set(why).is_ok()
            && let Some(why) = self.refusal.get()
        {
            tracing::warn!("the disk cache keeps no more blocks: {why}");
        }
    }

    /// Locks blocks against fetches by other processes. Returns without a lock once the first block has arrived, or at
    /// `end`.
    ///
    /// Errors: `closing` was set while it waited.
    pub(super) fn lock(&self, blocks: Range<u64>, end: Instant, closing: &AtomicBool) -> Result<Option<Lock>> {
        let Some(files) = &self.files else { return Ok(None) };
        let bytes = HEADER + blocks.start * ENTRY..HEADER + blocks.end * ENTRY;
        loop {
            match Lock::take(&files.map, bytes.clone(), LockMode::Exclusive) {
                Ok(Some(lock)) => return Ok(Some(lock)),
                Ok(None) if closing.load(Ordering::Relaxed) => {
                    let text = "the disk was closed while another process fetched the block";
                    return Err(Error::new(ErrorKind::Os(libc::EIO), text).in_file(&self.key.label));
                }
                Ok(None) if Instant::now() < end && !self.has(blocks.start) => std::thread::sleep(LOCK_PAUSE),
                // A file system without such locks: the block may be fetched twice.
                Ok(None) | Err(_) => return Ok(None),
            }
        }
    }

    /// Returns the number of blocks with an entry, and of those that are damaged, which it forgets.
    pub fn verify(&self) -> (u64, u64) {
        let (mut all, mut damaged) = (0, 0);
        self.entries.each_present(0, |number, _| {
            all += 1;
            damaged += u64::from(self.read(number).is_none());
            ControlFlow::Continue(())
        });
        (all, damaged)
    }

    /// Verifies the blocks that are there and that this process has neither written nor verified, and makes those of a
    /// process that was killed durable with the next flush. `each` is called with the bytes of each block that is there.
    /// Damaged blocks are forgotten.
    pub(crate) fn verify_rest(&self, mut each: impl FnMut(u64)) {
        let mut data = Vec::new();
        self.entries.each_present(0, |number, entry| {
            let is_known = entry & 1 == 1 && lock(&self.checked).contains(number);
            if !is_known {
                self.verify_block(number, entry, &mut data);
            }
            each(self.key.block_len(number) as u64);
            ControlFlow::Continue(())
        });
    }

    /// Compares a block that has an entry with its checksum, and makes one of a process that was killed durable with the
    /// next flush. Forgets a damaged block. `buf` is memory for it.
    fn verify_block(&self, number: u64, entry: u64, buf: &mut Vec<u8>) {
        buf.resize(self.key.block_len(number), 0);
        if let Some(sum) = self.read_into(number, entry, buf)
            && entry & 1 == 0
        {
            lock(&self.pending).push((number, sum.entry(number, Durability::Durable)));
        }
    }

    /// Verifies all blocks, from where the last call stopped if the data is still in the same `state`. Returns false if
    /// `stop` broke that off.
    fn verify_all(&self, verified: &mut Verified, state: [u8; RECORD], stop: &dyn Fn() -> bool) -> bool {
        if verified.state != state {
            *verified = Verified { state, end: 0 };
        }
        let mut data = Vec::new();
        self.entries.each(verified.end, |number, entry| {
            if stop() {
                return ControlFlow::Break(());
            }
            if entry != 0 {
                self.verify_block(number, entry, &mut data);
            }
            verified.end = number + 1;
            ControlFlow::Continue(())
        })
    }

    /// Makes the file complete, if all of its blocks are there.
    ///
    /// Errors: why it is not complete.
    pub fn finish(&self) -> Result<()> {
        self.flush();
        self.note_completion(&|| false);
        if self.complete().is_some() {
            return Ok(());
        }
        let why = self.refusal().cloned();
        Err(why.unwrap_or_else(|| {
            let mut missing = 0u64;
            self.entries.each(0, |_, entry| {
                missing += u64::from(entry == 0);
                ControlFlow::Continue(())
            });
            let text = format!("{missing} of {} blocks are not in the cache", self.key.blocks());
            Error::new(ErrorKind::Os(libc::EIO), text).in_file(&self.key.label)
        }))
    }

    /// Notes that all blocks are there, durable and undamaged, if they are. Their file can then be read without this
    /// program. Verifies no more of them once `stop` returns true.
    fn note_completion(&self, stop: &dyn Fn() -> bool) -> Noted {
        let Some(files) = &self.files else { return Noted::Done };
        // Another thread that verifies is waited for: it leaves nothing to do.
        let mut verified = lock(&self.verified);
        if self.complete().is_some() || self.refusal().is_some() || !self.is_whole() {
            return Noted::Done;
        }
        // Taken first: a write after the checks below changes the times, and the record does not match.
        let Some(record) = completion_of(&files.data) else {
            return Noted::Done;
        };
        if !self.verify_all(&mut verified, record, stop) {
            return Noted::Stopped;
        }
        self.flush();
        let durable = self.entries.each(0, |_, entry| match entry & 1 {
            1 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        });
        if !durable {
            return Noted::Done;
        }
        let _changing = lock(&self.changing);
        // Another thread may have noted a later state meanwhile, which this record would replace by one that matches nothing.
        if completion_of(&files.data) == Some(record) && self.put_completion(&record) {
            tracing::info!("{}: complete in {}", self.key.label, files.folder.label());
        }
        Noted::Done
    }

    /// Returns true if all blocks have entries. Goes on where the last call stopped.
    fn is_whole(&self) -> bool {
        let start = self.present_to.load(Ordering::Relaxed);
        let mut end = start;
        let whole = self.entries.each(start, |number, entry| {
            if entry == 0 {
                return ControlFlow::Break(());
            }
            end = number + 1;
            ControlFlow::Continue(())
        });
        // A block that is forgotten meanwhile is found by the caller's look at all entries.
        self.present_to.store(end, Ordering::Relaxed);
        whole
    }

    /// Withdraws the completion record: it would let the damage that was found be read without a look at the checksums.
    fn revoke_completion(&self) {
        self.present_to.store(0, Ordering::Relaxed);
        // What was counted as known may be damaged, too.
        lock(&self.checked).clear();
        let Some(files) = &self.files else { return };
        // Another thread or process may be about to write a record: with the new times it matches no more.
        let _ = files.data.set_modified(SystemTime::now());
        // Once: many blocks may be damaged, and each record costs a sync.
        if self.entries.record() != Some(NONE) && !self.put_completion(&NONE) {
            self.distrusted.store(true, Ordering::Relaxed);
        }
    }

    fn put_completion(&self, record: &[u8; RECORD]) -> bool {
        let noted = self.entries.put_record(record);
        noted
            .inspect_err(|e| tracing::debug!("{}: {e}", self.key.label))
            .is_ok()
    }

    /// Returns the data file if it is complete, and unchanged since that was noted.
    pub fn complete(&self) -> Option<BorrowedFd<'_>> {
        let files = self.files.as_ref()?;
        let is_trusted = !self.distrusted.load(Ordering::Relaxed);
        (is_trusted && is_complete(&files.map, &files.data)).then(|| files.data.as_fd())
    }
}

impl Flush for TierFile {
    /// Flushes, and notes the completion.
    fn flush_in_background(&self) {
        self.flush();
        let stop = || self.flusher.as_ref().is_some_and(|(queue, _)| queue.is_wanted());
        // To verify a whole file may take minutes, in which the other files have to be flushed. It goes on where it stopped.
        if self.note_completion(&stop) == Noted::Stopped {
            self.schedule(Duration::ZERO, false);
        }
    }
}

impl Drop for TierFile {
    fn drop(&mut self) {
        self.flush();
        if let Some(files) = &self.files {
            // Locked meanwhile: all files of the folder share the time.
            let mut left = lock(&files.folder.end_time);
            let (start, most) = (Instant::now(), *left);
            self.note_completion(&|| start.elapsed() >= most);
            *left = most.saturating_sub(start.elapsed());
        }
        if let (Some(files), Some(_)) = (&self.files, &self.flusher) {
            // The last use, for the eviction. Not that of a look by `--check`, which has no flusher.
            let _ = files.map.set_modified(SystemTime::now());
        }
    }
}
