//! Files in memory that log what is done to them, and fail when they are told to.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::store::{Access, ExtentName, Identity, Store, StoredFile, StoredWrite};

use super::bytes::Bytes;

/// Bytes that are written whole or not at all.
const SECTOR: u64 = 512;

/// A change of a file.
#[derive(Clone, PartialEq, Eq)]
pub enum Op {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// The file was cut or made longer.
    SetLen {
        /// Its length before.
        from: u64,
        /// Its length after.
        to: u64,
    },
    /// A range was made zeroes.
    Zero {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// And a hole.
        unmap: bool,
    },
}

impl fmt::Debug for Op {
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

/// What the run did to the disk, noted between the operations of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Sectors are about to be given a value (0: zeroes).
    Begin {
        /// Names this request.
        ticket: usize,
        /// First sector.
        first: u64,
        /// How many.
        sectors: u64,
        /// What they will hold.
        value: u64,
    },
    /// The request has ended.
    End {
        /// Which one.
        ticket: usize,
        /// Whether it succeeded.
        ok: bool,
    },
    /// A flush or a close is about to begin.
    FlushBegin {
        /// Names it.
        ticket: usize,
    },
    /// It has ended.
    FlushEnd {
        /// Which one.
        ticket: usize,
        /// Whether it succeeded.
        ok: bool,
    },
}

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A change of the file of that number.
    Op(usize, Op),
    /// All changes of the file before this are durable, or (`false`) the sync failed.
    Sync(usize, bool),
    /// A file was made; it has the next number. That it is there is durable at once.
    Made(String),
    /// A file was taken out; it keeps its number. That it is gone is durable at once.
    Removed(usize),
    /// Something was done to the disk.
    Disk(Mark),
    /// The process that wrote to the disk is gone, and with it what it had only in memory.
    Killed,
    /// Who has opened the disk after that sees these values.
    Shown(Arc<[u64]>),
}

/// What shall go wrong. Counters count down from now, 1 is the next call; each fires once.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Bytes of pages that can be taken yet; holes are free, freed pages come back.
    pub room: Option<u64>,
    /// A write, a new length or zeroes: EIO, after a part of it was done.
    pub change: Option<u64>,
    /// A read: EIO.
    pub read: Option<u64>,
    /// A sync: EIO, and what was not durable may be lost although later ones succeed.
    pub sync: Option<u64>,
}

/// A folder in memory. It has no gate: what it does not hold is not found, whatever the name looks like.
#[derive(Debug, Clone, Default)]
pub struct SimStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    files: Vec<Named>,
    log: Vec<Event>,
    faults: Faults,
}

#[derive(Debug)]
struct Named {
    name: String,
    bytes: Bytes,
    /// Counts its changes, in the place of a time.
    changes: u64,
    /// It has no name any more.
    removed: bool,
}

impl Named {
    fn new(name: String, bytes: Bytes) -> Self {
        Self {
            name,
            bytes,
            changes: 0,
            removed: false,
        }
    }
}

impl State {
    /// The number of the file that is called `name`.
    fn named(&self, name: &str) -> Option<usize> {
        self.files.iter().position(|file| file.name == name && !file.removed)
    }
}

impl SimStore {
    /// A folder with these files, all durable.
    pub fn new(files: &[(String, Bytes)]) -> Self {
        let files = files
            .iter()
            .map(|(name, bytes)| Named::new(name.clone(), bytes.clone()));
        Self {
            state: Arc::new(Mutex::new(State {
                files: files.collect(),
                ..State::default()
            })),
        }
    }

    /// Opens a file.
    pub fn file(&self, name: &str, access: Access) -> Result<Arc<dyn StoredFile>> {
        let state = self.lock();
        let number = state.named(name);
        let number = number.ok_or_else(|| Error::new(ErrorKind::NotFound, name))?;
        Ok(Arc::new(self.opened(&state, number, access)))
    }

    /// Everything that was done so far.
    pub fn log(&self) -> Vec<Event> {
        self.lock().log.clone()
    }

    /// Notes what is done to the disk.
    pub fn mark(&self, mark: Mark) {
        self.note(Event::Disk(mark));
    }

    /// Notes what is not done to a file.
    pub fn note(&self, event: Event) {
        self.lock().log.push(event);
    }

    /// What goes wrong from now on.
    pub fn fail(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// What is left of the faults.
    pub fn faults(&self) -> Faults {
        self.lock().faults
    }

    /// What the files hold now, durable or not.
    pub fn files(&self) -> Vec<(String, Bytes)> {
        let state = self.lock();
        state
            .files
            .iter()
            .filter(|file| !file.removed)
            .map(|file| (file.name.clone(), file.bytes.clone()))
            .collect()
    }

    /// Cuts a file behind the back of those who have it open. It is not logged.
    pub fn cut(&self, name: &str, len: u64) {
        let mut state = self.lock();
        let number = state.named(name).expect("a file of that name");
        let file = &mut state.files[number];
        file.bytes.set_len(len);
        file.changes += 1;
    }

    fn opened(&self, state: &State, number: usize, access: Access) -> SimFile {
        let file = &state.files[number];
        SimFile {
            store: self.clone(),
            number,
            label: file.name.clone(),
            opened: identity(number, file),
            writable: access == Access::Write,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
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
        state.log.push(Event::Made(name.clone()));
        state.files.push(Named::new(name, Bytes::default()));
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
    fn failed(&self, errno: i32, what: &str) -> Error {
        Error::new(
            ErrorKind::Os(errno),
            format!("{}: {what}: {}", self.label, std::io::Error::from_raw_os_error(errno)),
        )
    }

    /// Does and logs one change, or the part of it that is done before it fails.
    fn change(&self, mut op: Op) -> Result<()> {
        assert!(self.writable, "{}: {op:?}, but it was opened for reading", self.label);
        let mut state = self.store.lock();
        let State { files, log, faults } = &mut *state;
        let file = &mut files[self.number];
        if let Op::SetLen { from, .. } = &mut op {
            *from = file.bytes.len();
        }
        let (done, error) = if fires(&mut faults.change) {
            (half(&op), Some(self.failed(libc::EIO, &format!("{op:?}"))))
        } else {
            match fitting(&op, &file.bytes, faults.room) {
                None => (Some(op), None),
                Some(part) => (part, Some(self.failed(libc::ENOSPC, &format!("{op:?}")))),
            }
        };
        if let Some(op) = done {
            let before = file.bytes.allocated();
            op.apply(&mut file.bytes);
            if let Some(room) = &mut faults.room {
                *room = (*room + before).saturating_sub(file.bytes.allocated());
            }
            file.changes += 1;
            log.push(Event::Op(self.number, op));
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
        // it may have been cut since
        let left = if offset < bytes.len() {
            bytes.same_until(offset)
        } else {
            self.len().saturating_sub(offset)
        };
        Ok((bytes.is_stored(offset), left.max(1)))
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
        self.change(Op::Write {
            offset,
            data: buf.into(),
        })
    }

    fn current_len(&self) -> Result<u64> {
        Ok(self.store.lock().files[self.number].bytes.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(Op::SetLen { from: 0, to: len })
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.change(Op::Zero { offset, len, unmap })
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

impl Op {
    /// Does it.
    pub fn apply(&self, bytes: &mut Bytes) {
        match self {
            Self::Write { offset, data } => bytes.write(*offset, data),
            // in another order than the engine's a growth must not cut what grew further
            Self::SetLen { from, to } if to >= from => bytes.set_len(bytes.len().max(*to)),
            Self::SetLen { to, .. } => bytes.set_len(bytes.len().min(*to)),
            Self::Zero { offset, len, unmap } => bytes.zero(*offset, *len, *unmap),
        }
    }
}

fn identity(number: usize, file: &Named) -> Identity {
    let changes = i128::from(file.changes);
    Identity {
        file: (0, number as u64),
        len: file.bytes.len(),
        mtime_ns: changes,
        ctime_ns: changes,
    }
}

/// Whether a counter is at its end.
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

/// The part of a change that is done before it fails: half of it, no sector in part.
fn half(op: &Op) -> Option<Op> {
    let part = |offset: u64, len: u64| {
        ((offset + len / 2) / SECTOR * SECTOR)
            .checked_sub(offset)
            .filter(|&len| len > 0)
    };
    match op {
        Op::Write { offset, data } => {
            let len = part(*offset, data.len() as u64)?;
            Some(Op::Write {
                offset: *offset,
                data: data[..len as usize].into(),
            })
        }
        Op::SetLen { .. } => None,
        Op::Zero { offset, len, unmap } => Some(Op::Zero {
            offset: *offset,
            len: part(*offset, *len)?,
            unmap: *unmap,
        }),
    }
}

/// `None`: there is room for it; else the part that there is room for.
fn fitting(op: &Op, bytes: &Bytes, room: Option<u64>) -> Option<Option<Op>> {
    let (Op::Write { offset, data }, Some(room)) = (op, room) else {
        return None;
    };
    if bytes.room_for(*offset, data.len() as u64) <= room {
        return None;
    }
    let to_border = |len: &u64| (*offset + len).is_multiple_of(SECTOR);
    let fits = (1..data.len() as u64)
        .rev()
        .filter(to_border)
        .find(|&len| bytes.room_for(*offset, len) <= room);
    Some(fits.map(|len| Op::Write {
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
    fn it_logs_what_was_done() {
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
        assert_eq!(log[1], Event::Op(0, Op::SetLen { from: 12, to: 20 }));
        assert_eq!(log[3], Event::Sync(0, true));
        assert!(store.file("a", Access::Read).unwrap().writer().is_none());
        assert_eq!(store.file("b", Access::Read).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_full_disk_takes_a_part_and_gives_room_back() {
        let (store, file) = one(&[7; 4096]);
        let write = file.writer().unwrap();
        store.fail(Faults {
            room: Some(8192),
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
    fn faults_come_when_they_are_told_to() {
        let (store, file) = one(&[7; 4096]);
        let write = file.writer().unwrap();
        let eio = |result: Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::Os(libc::EIO));
        store.fail(Faults {
            change: Some(2),
            read: Some(1),
            sync: Some(2),
            room: None,
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
