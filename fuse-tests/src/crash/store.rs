//! Simulated store: files in memory that log each operation and inject faults.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::store::{Access, ExtentName, Identity, Store, StoredFile, StoredWrite};

use super::bytes::Bytes;

/// Unit of an atomic write: an injected fault never leaves part of a sector.
const SECTOR: u64 = 512;

/// A logged change of a file.
#[derive(Clone, PartialEq, Eq)]
pub enum FileOp {
    /// Bytes were written to the file.
    Write {
        /// First byte of the range.
        offset: u64,
        /// The bytes written.
        data: Arc<[u8]>,
    },
    /// The file was truncated or extended.
    SetLen {
        /// Its length before.
        from: u64,
        /// Its length after.
        to: u64,
    },
    /// A range was zeroed.
    Zero {
        /// First byte of the range.
        offset: u64,
        /// Length of the range in bytes.
        len: u64,
        /// True if the range also becomes a hole.
        unmap: bool,
    },
}

impl fmt::Debug for FileOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { offset, data } => {
                let head: Vec<_> = data.iter().take(8).collect();
                write!(
                    f,
                    "write {} bytes at {offset:#x} (sector {}) {head:02x?}",
                    data.len(),
                    offset / 512
                )
            }
            Self::SetLen { from, to } => write!(f, "length {from:#x} → {to:#x}"),
            Self::Zero { offset, len, unmap } => write!(f, "zero {len} bytes at {offset:#x}, unmap {unmap}"),
        }
    }
}

/// A request of the run to the disk, logged between the operations of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskEvent {
    /// A write is about to begin. It gives each sector of the range one value (0: zeroes).
    Begin {
        /// Identifies the request.
        ticket: usize,
        /// First sector of the range.
        first: u64,
        /// Length of the range in sectors.
        sectors: u64,
        /// The value that the sectors will hold.
        value: u64,
    },
    /// The write has returned.
    End {
        /// The ticket of its start.
        ticket: usize,
        /// True if it succeeded.
        ok: bool,
    },
    /// A flush or a close is about to begin.
    FlushBegin {
        /// Identifies the flush.
        ticket: usize,
    },
    /// The flush or the close has returned.
    FlushEnd {
        /// The ticket of its start.
        ticket: usize,
        /// True if it succeeded.
        ok: bool,
    },
}

/// One record of the log. Files are numbered in the order of their creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A change of the file with this number.
    FileOp(usize, FileOp),
    /// A sync of the file: all of its earlier changes are durable, or (`false`) the sync failed.
    Sync(usize, bool),
    /// A file was created; it gets the next number. Its directory entry is durable at once.
    Created(String),
    /// A file was removed; its number is not reused. The removal is durable at once.
    Removed(usize),
    /// A request to the disk began or ended.
    Disk(DiskEvent),
    /// The writing process was killed; what it had only in memory is lost.
    Killed,
    /// The disk was opened again and its sectors held these values.
    Observed(Arc<[u64]>),
}

/// Faults to inject. Each counter counts calls down from now (1: the next call fails) and fires once.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Bytes of pages that can still be allocated; holes take none, freed pages are returned.
    pub free_bytes: Option<u64>,
    /// A write, a zeroed range or a new length fails with EIO; of the first two, half is applied.
    pub change: Option<u64>,
    /// A read fails with EIO.
    pub read: Option<u64>,
    /// A sync fails with EIO. Changes that were not durable may be lost, although later syncs succeed.
    pub sync: Option<u64>,
}

/// A folder in memory. It does not check names as a local store does: a name is only looked up among its files.
#[derive(Debug, Clone, Default)]
pub struct SimStore {
    state: Arc<Mutex<StoreState>>,
}

#[derive(Debug, Default)]
struct StoreState {
    files: Vec<FileState>,
    log: Vec<Event>,
    faults: Faults,
}

#[derive(Debug)]
struct FileState {
    name: String,
    bytes: Bytes,
    /// Number of changes so far; stands in for the file's mtime and ctime.
    changes: u64,
    /// True once the file was unlinked.
    removed: bool,
}

impl FileState {
    fn new(name: String, bytes: Bytes) -> Self {
        Self {
            name,
            bytes,
            changes: 0,
            removed: false,
        }
    }
}

impl StoreState {
    /// Returns the number of the file called `name`.
    fn named(&self, name: &str) -> Option<usize> {
        self.files.iter().position(|file| file.name == name && !file.removed)
    }
}

impl SimStore {
    /// Creates a folder with these files, all of them durable.
    pub fn new(files: &[(String, Bytes)]) -> Self {
        let files = files
            .iter()
            .map(|(name, bytes)| FileState::new(name.clone(), bytes.clone()));
        Self {
            state: Arc::new(Mutex::new(StoreState {
                files: files.collect(),
                ..StoreState::default()
            })),
        }
    }

    /// Opens the file called `name`, or fails with `NotFound`.
    pub fn file(&self, name: &str, access: Access) -> Result<Arc<dyn StoredFile>> {
        let state = self.lock();
        let number = state.named(name);
        let number = number.ok_or_else(|| Error::new(ErrorKind::NotFound, name))?;
        Ok(Arc::new(self.opened(&state, number, access)))
    }

    /// Returns a copy of the log.
    pub fn log(&self) -> Vec<Event> {
        self.lock().log.clone()
    }

    /// Logs a request to the disk.
    pub fn log_disk_event(&self, log_disk_event: DiskEvent) {
        self.log_event(Event::Disk(log_disk_event));
    }

    /// Logs an event that is not a change of a file.
    pub fn log_event(&self, event: Event) {
        self.lock().log.push(event);
    }

    /// Replaces the faults that are injected from now on.
    pub fn fail(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// Returns the faults that have not fired yet.
    pub fn faults(&self) -> Faults {
        self.lock().faults
    }

    /// Returns the present content of all files, durable or not.
    pub fn files(&self) -> Vec<(String, Bytes)> {
        let state = self.lock();
        state
            .files
            .iter()
            .filter(|file| !file.removed)
            .map(|file| (file.name.clone(), file.bytes.clone()))
            .collect()
    }

    /// Truncates a file as another process would, while the engine has it open. The change is not logged.
    pub fn truncate(&self, name: &str, len: u64) {
        let mut state = self.lock();
        let number = state.named(name).expect("a file of that name");
        let file = &mut state.files[number];
        file.bytes.set_len(len);
        file.changes += 1;
    }

    fn opened(&self, state: &StoreState, number: usize, access: Access) -> SimFile {
        let file = &state.files[number];
        SimFile {
            store: self.clone(),
            number,
            label: file.name.clone(),
            opened: identity(number, file),
            writable: access == Access::Write,
        }
    }

    fn lock(&self) -> MutexGuard<'_, StoreState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for SimStore {
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
        self.file(&String::from_utf8_lossy(name.as_bytes()), access)
    }

    fn create(&self, name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        let name = String::from_utf8_lossy(name.as_bytes()).into_owned();
        let mut state = self.lock();
        if state.named(&name).is_some() {
            return Err(Error::new(ErrorKind::Os(libc::EEXIST), name));
        }
        state.log.push(Event::Created(name.clone()));
        state.files.push(FileState::new(name, Bytes::default()));
        let number = state.files.len() - 1;
        Ok(Arc::new(self.opened(&state, number, Access::Write)))
    }

    fn remove(&self, name: &ExtentName, identity: &Identity) -> Result<()> {
        let mut state = self.lock();
        let number = state.named(&String::from_utf8_lossy(name.as_bytes()));
        let number = number.filter(|&number| identity.file == (0, number as u64));
        let number = number.ok_or_else(|| Error::new(ErrorKind::NotFound, name.to_string()))?;
        state.files[number].removed = true;
        state.log.push(Event::Removed(number));
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn names(&self, most: usize) -> Result<Vec<ExtentName>> {
        self.files()
            .iter()
            .take(most)
            .map(|(name, _)| ExtentName::new(name))
            .collect()
    }
}

/// An open file of a [`SimStore`].
#[derive(Debug)]
struct SimFile {
    store: SimStore,
    number: usize,
    label: String,
    opened: Identity,
    writable: bool,
}

impl SimFile {
    fn failed(&self, errno: i32, operation: &str) -> Error {
        Error::new(
            ErrorKind::Os(errno),
            format!(
                "{}: {operation}: {}",
                self.label,
                std::io::Error::from_raw_os_error(errno)
            ),
        )
    }

    /// Applies and logs one change. If a fault fires, applies and logs only the part that precedes the failure.
    fn change(&self, mut op: FileOp) -> Result<()> {
        assert!(self.writable, "{}: {op:?}, but it was opened for reading", self.label);
        let mut state = self.store.lock();
        let StoreState { files, log, faults } = &mut *state;
        let file = &mut files[self.number];
        if let FileOp::SetLen { from, .. } = &mut op {
            *from = file.bytes.len();
        }
        let (done, error) = if fires(&mut faults.change) {
            (first_half(&op), Some(self.failed(libc::EIO, &format!("{op:?}"))))
        } else {
            match fitting_part(&op, &file.bytes, faults.free_bytes) {
                None => (Some(op), None),
                Some(part) => (part, Some(self.failed(libc::ENOSPC, &format!("{op:?}")))),
            }
        };
        if let Some(op) = done {
            let before = file.bytes.allocated();
            op.apply(&mut file.bytes);
            if let Some(free_bytes) = &mut faults.free_bytes {
                *free_bytes = (*free_bytes + before).saturating_sub(file.bytes.allocated());
            }
            file.changes += 1;
            log.push(Event::FileOp(self.number, op));
        }
        error.map_or(Ok(()), Err)
    }
}

impl StoredFile for SimFile {
    fn len(&self) -> u64 {
        self.opened.len
    }

    fn writer(&self) -> Option<&dyn StoredWrite> {
        self.writable.then_some(self as &dyn StoredWrite)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut state = self.store.lock();
        if fires(&mut state.faults.read) {
            return Err(self.failed(libc::EIO, &format!("read of {} bytes at byte {offset}", buf.len())));
        }
        let bytes = &state.files[self.number].bytes;
        if bytes.read(offset, buf) {
            return Ok(());
        }
        let context = format!("{}: read of {} bytes at byte {offset}", self.label, buf.len());
        Err(Error::corrupt(format!(
            "{context}: the file ends at byte {}",
            bytes.len()
        )))
    }

    fn identity(&self) -> Result<Identity> {
        Ok(identity(self.number, &self.store.lock().files[self.number]))
    }

    fn identity_at_open(&self) -> Identity {
        self.opened
    }

    fn detects_modification(&self) -> bool {
        true
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.store.lock().files[self.number].bytes.allocated())
    }

    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        let state = self.store.lock();
        let bytes = &state.files[self.number].bytes;
        // The file may be shorter now than when it was opened; the rest up to the old end then counts as a hole.
        let left = if offset < bytes.len() {
            bytes.same_until(offset)
        } else {
            self.len().saturating_sub(offset)
        };
        Ok((bytes.is_stored(offset), left.max(1)))
    }

    fn check_named(&self) -> Result<()> {
        Ok(())
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn siblings(&self) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(self.store.clone()))
    }
}

impl StoredWrite for SimFile {
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.change(FileOp::Write {
            offset,
            data: buf.into(),
        })
    }

    fn current_len(&self) -> Result<u64> {
        Ok(self.store.lock().files[self.number].bytes.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(FileOp::SetLen { from: 0, to: len })
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.change(FileOp::Zero { offset, len, unmap })
    }

    fn allocate(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn slow_zeroing(&self) -> Option<String> {
        None
    }

    fn sync(&self) -> Result<()> {
        let mut state = self.store.lock();
        let failed = fires(&mut state.faults.sync);
        state.log.push(Event::Sync(self.number, !failed));
        if failed {
            Err(self.failed(libc::EIO, "fdatasync"))
        } else {
            Ok(())
        }
    }
}

impl FileOp {
    /// Applies the change to `bytes`.
    pub fn apply(&self, bytes: &mut Bytes) {
        match self {
            Self::Write { offset, data } => bytes.write(*offset, data),
            // A crash state may apply changes in another order than the engine did. An extension must then not truncate
            // a file that a later extension already made longer, nor a truncation extend a shorter one.
            Self::SetLen { from, to } if to >= from => bytes.set_len(bytes.len().max(*to)),
            Self::SetLen { to, .. } => bytes.set_len(bytes.len().min(*to)),
            Self::Zero { offset, len, unmap } => bytes.zero(*offset, *len, *unmap),
        }
    }
}

fn identity(number: usize, file: &FileState) -> Identity {
    let changes = i128::from(file.changes);
    Identity {
        file: (0, number as u64),
        start: 0,
        len: file.bytes.len(),
        mtime_ns: changes,
        ctime_ns: changes,
    }
}

/// Counts one call. Returns true if the fault fires now, and clears the counter so that it fires once.
fn fires(counter: &mut Option<u64>) -> bool {
    match counter {
        Some(0 | 1) => counter.take().is_some(),
        Some(left) => {
            *left -= 1;
            false
        }
        None => false,
    }
}

/// Returns the part of a change that is applied before EIO: its first half, up to a sector boundary.
fn first_half(op: &FileOp) -> Option<FileOp> {
    let part = |offset: u64, len: u64| {
        ((offset + len / 2) / SECTOR * SECTOR)
            .checked_sub(offset)
            .filter(|&len| len > 0)
    };
    match op {
        FileOp::Write { offset, data } => {
            let len = part(*offset, data.len() as u64)?;
            Some(FileOp::Write {
                offset: *offset,
                data: data[..len as usize].into(),
            })
        }
        FileOp::SetLen { .. } => None,
        FileOp::Zero { offset, len, unmap } => Some(FileOp::Zero {
            offset: *offset,
            len: part(*offset, *len)?,
            unmap: *unmap,
        }),
    }
}

/// Returns `None` if the change fits into the free bytes, else the longest part that fits, up to a sector boundary.
fn fitting_part(op: &FileOp, bytes: &Bytes, free_bytes: Option<u64>) -> Option<Option<FileOp>> {
    let (FileOp::Write { offset, data }, Some(free_bytes)) = (op, free_bytes) else {
        return None;
    };
    if bytes.bytes_to_allocate(*offset, data.len() as u64) <= free_bytes {
        return None;
    }
    let ends_at_sector = |len: &u64| (*offset + len).is_multiple_of(SECTOR);
    let fits = (1..data.len() as u64)
        .rev()
        .filter(ends_at_sector)
        .find(|&len| bytes.bytes_to_allocate(*offset, len) <= free_bytes);
    Some(fits.map(|len| FileOp::Write {
        offset: *offset,
        data: data[..len as usize].into(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(bytes: &[u8]) -> (SimStore, Arc<dyn StoredFile>) {
        let store = SimStore::new(&[("a".to_owned(), Bytes::from(bytes))]);
        let file = store.file("a", Access::Write).unwrap();
        (store, file)
    }

    #[test]
    fn changes_and_syncs_are_logged() {
        let (store, file) = one(b"0123456789");
        let write = file.writer().unwrap();
        write.write_all_at(8, b"abcd").unwrap();
        write.set_len(20).unwrap();
        write.zero(0, 2, true).unwrap();
        write.sync().unwrap();
        let mut all = [1; 20];
        file.read_exact_at(0, &mut all).unwrap();
        assert_eq!(&all, b"\0\x00234567abcd\0\0\0\0\0\0\0\0");
        let log = store.log();
        assert_eq!(log.len(), 4);
        assert_eq!(log[1], Event::FileOp(0, FileOp::SetLen { from: 12, to: 20 }));
        assert_eq!(log[3], Event::Sync(0, true));
        assert!(store.file("a", Access::Read).unwrap().writer().is_none());
        assert_eq!(store.file("b", Access::Read).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_full_store_takes_part_of_a_write_and_reuses_freed_pages() {
        let (store, file) = one(&[7; 4096]);
        let write = file.writer().unwrap();
        store.fail(Faults {
            free_bytes: Some(8192),
            ..Faults::default()
        });
        let error = write.write_all_at(0, &[1; 5 * 4096]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Os(libc::ENOSPC));
        assert!(write.current_len().unwrap() > 8192 && write.current_len().unwrap() <= 3 * 4096);
        write.write_all_at(0, &[2; 4096]).unwrap();
        write.set_len(1 << 30).unwrap();
        assert!(write.write_all_at(1 << 20, &[1]).is_err());
        write.zero(4096, 4096, true).unwrap();
        write.write_all_at(1 << 20, &[1]).unwrap();
        assert!(write.write_all_at(1 << 21, &[1]).is_err());
    }

    #[test]
    fn faults_fire_at_their_count() {
        let (store, file) = one(&[7; 4096]);
        let write = file.writer().unwrap();
        let eio = |result: Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::Os(libc::EIO));
        store.fail(Faults {
            change: Some(2),
            read: Some(1),
            sync: Some(2),
            free_bytes: None,
        });
        write.write_all_at(0, &[1; 2048]).unwrap();
        eio(write.write_all_at(100, &[2; 1900]));
        eio(file.read_exact_at(0, &mut [0; 10]));
        let mut now = [0; 2048];
        file.read_exact_at(0, &mut now).unwrap();
        assert_eq!(now.iter().position(|&byte| byte == 2), Some(100));
        assert_eq!(now.iter().rposition(|&byte| byte == 2), Some(1023));
        write.sync().unwrap();
        eio(write.sync());
        write.sync().unwrap();
        assert_eq!(
            store.log()[2..],
            [Event::Sync(0, true), Event::Sync(0, false), Event::Sync(0, true)]
        );
    }
}
