//! The listed names and their identities.
//!
//! ```text
//!   names ──▶ Device: bus, target, number, hash ──▶ record ──▶ Identity
//!                                                    the ring of records; a new identity is a new record
//! ```
//! Names and devices are written once, before `count` publishes them. An identity changes later, in any thread or vfork
//! child, while others read it, and its writer may be killed at any moment. So no lock guards it: the writer claims a
//! record of the ring, fills it, and publishes its number in the device. A reader that was overtaken by a whole round of
//! the ring notices by the count of claimed records, and reads again.
#![allow(
    unsafe_code,
    reason = "names are written before other threads see them, and read without a lock"
)]

use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use libc::{c_char, c_int};

use crate::disk::{self, Bus, Disk, SECTOR};
use crate::raw::{self, Errno, Status};
use crate::trusted;
use crate::uapi;

/// Most names of a list: more than the 4 IDE and 60 SCSI disks of a virtual machine.
const DEVICES: usize = 128;
/// Bytes of all names. One variable of the environment is not longer (`MAX_ARG_STRLEN`, linux/binfmts.h).
const NAMES: usize = 128 << 10;
/// Records in the ring. A reader would have to sleep for so many changes of a name to be overtaken.
const RECORDS: usize = 256;

/// Maximum number of reads of a record that is being replaced.
const READS_MAX: usize = 64;

/// The list of this process.
pub(crate) static TABLE: Table = Table::new();

/// Identity of the disk that a name leads to, however a program has opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Identity {
    /// Nothing that can be a disk.
    Nothing,
    /// A block device with this number.
    Block(u64),
    /// A regular file: numbers of its file system and of the file.
    File(u64, u64),
}

impl Identity {
    /// Returns the identity of a file that the kernel described.
    pub(crate) fn of(status: &Status) -> Self {
        if status.is(libc::S_IFBLK) {
            Self::Block(status.rdev)
        } else if status.is(libc::S_IFREG) {
            Self::File(status.dev, status.ino)
        } else {
            Self::Nothing
        }
    }

    fn to_words(self) -> [u64; 3] {
        match self {
            Self::Nothing => [0, 0, 0],
            Self::Block(number) => [1, number, 0],
            Self::File(dev, ino) => [2, dev, ino],
        }
    }

    fn from_words(words: [u64; 3]) -> Self {
        match words {
            [1, number, _] => Self::Block(number),
            [2, dev, ino] => Self::File(dev, ino),
            _ => Self::Nothing,
        }
    }
}

/// One listed name.
#[derive(Debug)]
pub(crate) struct Device {
    name_start: AtomicUsize,
    name_len: AtomicUsize,
    is_scsi: AtomicU8,
    target: AtomicU8,
    hash: AtomicU64,
    /// The device number that a listed file shows, as `makedev` packs it.
    number: AtomicU64,
    /// Number of the record with the identity, from 1; 0 for none yet.
    record: AtomicU64,
}

/// An identity, in words that are read and written one by one.
#[derive(Debug)]
struct Record([AtomicU64; 3]);

/// All listed names.
pub(crate) struct Table {
    names: UnsafeCell<[u8; NAMES]>,
    devices: [Device; DEVICES],
    records: [Record; RECORDS],
    /// Count of records that were ever claimed.
    claimed: AtomicU64,
    /// Count of devices; stored last.
    count: AtomicUsize,
    /// Uncommon states of the process, as bits.
    state: AtomicU32,
}

// SAFETY: `names` is written only by `fill`, before `count` publishes it, and only read afterwards.
unsafe impl Sync for Table {}

/// Bit of `Table::state`: set when a thread starts to fill the table, and never cleared.
const FILLED: u32 = 1;
/// Bit of `Table::state`: the program runs with more rights than its user (AT_SECURE).
const SECURE: u32 = 2;

impl Table {
    /// Creates an empty list.
    pub(crate) const fn new() -> Self {
        Self {
            names: UnsafeCell::new([0; NAMES]),
            devices: [const { Device::new() }; DEVICES],
            records: [const { Record([const { AtomicU64::new(0) }; 3]) }; RECORDS],
            claimed: AtomicU64::new(0),
            count: AtomicUsize::new(0),
            state: AtomicU32::new(0),
        }
    }

    /// Fills the list from the value of the variable: names, separated by colons. Does nothing the second time.
    ///
    /// Calls `report` for each name that is not used, with the reason. `number_is_free` is asked whether the kernel has
    /// no block device of this number.
    pub(crate) fn fill(
        &self,
        list: &[u8],
        secure: bool,
        number_is_free: impl Fn(u64) -> bool,
        report: impl Fn(&[u8], &[u8]),
    ) {
        let state = FILLED | if secure { SECURE } else { 0 };
        if self.state.fetch_or(state, Ordering::AcqRel) & FILLED != 0 {
            return;
        }
        let (mut start, mut count, mut target) = (0_usize, 0_usize, 0_u8);
        for name in list.split(|byte| *byte == b':').filter(|name| !name.is_empty()) {
            let Some(bus) = Bus::of(name) else {
                report(name, b"not used: a name starts with /dev/hd (IDE) or /dev/sd (SCSI)");
                continue;
            };
            let Some(device) = self.devices.get(count) else {
                report(name, b"not used: too many names");
                continue;
            };
            if !self.store_name(start, name) {
                report(name, b"not used: the list is too long");
                continue;
            }
            device.name_start.store(start, Ordering::Relaxed);
            device.name_len.store(name.len(), Ordering::Relaxed);
            device.is_scsi.store(u8::from(bus == Bus::Scsi), Ordering::Relaxed);
            device.target.store(target, Ordering::Relaxed);
            let hash = disk::hash(name);
            device.hash.store(hash, Ordering::Relaxed);
            let number = self.choose_number(hash, count, &number_is_free);
            device.number.store(number, Ordering::Relaxed);
            start = start.saturating_add(name.len()).saturating_add(1);
            target = target.wrapping_add(u8::from(bus == Bus::Scsi));
            count = count.saturating_add(1);
        }
        self.count.store(count, Ordering::Release);
    }

    /// Copies a name, which gets a NUL behind it, to `names` from `start` on; returns false if there is no room.
    fn store_name(&self, start: usize, name: &[u8]) -> bool {
        // SAFETY: only one thread ever fills the list (`FILLED`), and no name is read before `count` publishes it.
        let names = unsafe { &mut *self.names.get() };
        let end = start.saturating_add(name.len());
        // The last byte stays a NUL.
        if end >= NAMES {
            return false;
        }
        let Some(place) = names.get_mut(start..end) else {
            return false;
        };
        place.copy_from_slice(name);
        true
    }

    /// Chooses the number that a listed file shows as a block device.
    ///
    /// It follows from the name, so that it is the same in every process. The majors 120 to 127 are for local use
    /// (admin-guide/devices.txt), so that /sys/dev/block holds no disk of this number, in which tools would look.
    fn choose_number(&self, hash: u64, count: usize, is_free: &impl Fn(u64) -> bool) -> u64 {
        let mut number = 0;
        // Each failed try is another name's number or a device of the kernel, so a few tries are enough.
        for attempt in 0..=DEVICES as u64 {
            let slot = hash.wrapping_add(attempt);
            // 20 bits of minor is all that the kernel has; 8 bits of it are all that the oldest `stat` shows.
            number = libc::makedev(120 | (slot >> 20 & 7) as u32, (slot & 0xf_ffff) as u32);
            let taken = self.devices.iter().take(count).any(|device| device.number() == number);
            if !taken && is_free(number) {
                break;
            }
        }
        number
    }

    /// Returns true if any name is listed. If not, the library changes nothing.
    #[inline]
    pub(crate) fn is_active(&self) -> bool {
        self.count.load(Ordering::Acquire) != 0
    }

    /// Returns the listed devices in the order of the list.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter().take(self.count.load(Ordering::Acquire))
    }

    /// Returns the name of a device of this table, with its NUL.
    pub(crate) fn name_of(&self, device: &Device) -> &CStr {
        // SAFETY: `count` has published the names, as the caller has a device; nothing writes them afterwards.
        let names = unsafe { &*self.names.get() };
        let start = device.name_start.load(Ordering::Relaxed);
        let rest = names.get(start..).unwrap_or_default();
        CStr::from_bytes_until_nul(rest).unwrap_or_default()
    }

    /// Returns the first device with this identity.
    pub(crate) fn find(&self, identity: Identity) -> Option<&Device> {
        if identity == Identity::Nothing {
            return None;
        }
        self.devices().find(|device| self.identity(device) == identity)
    }

    /// Returns the device that a descriptor has open.
    pub(crate) fn find_open(&self, fd: c_int) -> Option<(&Device, Status)> {
        let status = raw::fstat(fd).ok()?;
        Some((self.find(Identity::of(&status))?, status))
    }

    /// Returns the device with exactly this name.
    ///
    /// # Safety
    /// `path` is a string that ends with a NUL.
    pub(crate) unsafe fn find_name(&self, path: *const c_char) -> Option<&Device> {
        // SAFETY: the caller promises it.
        self.devices()
            .find(|device| unsafe { libc::strcmp(path, self.name_of(device).as_ptr()) } == 0)
    }

    /// Returns the identity that the device has now. `Nothing` if the records of other devices have replaced its record; the
    /// next open of its name makes a new one.
    fn identity(&self, device: &Device) -> Identity {
        // A record that is replaced while it is read is followed by a newer one of the device. One that stays replaced is
        // lost, and no number of reads brings it back.
        for _ in 0..READS_MAX {
            let number = device.record.load(Ordering::Acquire);
            let Some(record) = self.record(number) else {
                return Identity::Nothing;
            };
            let words = record.0.each_ref().map(|word| word.load(Ordering::Relaxed));
            // With the fence of `set_identity`: if a word is that of a later round, so is the count.
            fence(Ordering::Acquire);
            let claimed = self.claimed.load(Ordering::Relaxed);
            if claimed < number.saturating_add(RECORDS as u64) {
                return Identity::from_words(words);
            }
        }
        Identity::Nothing
    }

    /// Returns the record with this number, from 1.
    fn record(&self, number: u64) -> Option<&Record> {
        self.records.get(number.checked_sub(1)? as usize % RECORDS)
    }

    /// Remembers what the name of a device leads to now. Under AT_SECURE only a trusted name leads anywhere.
    pub(crate) fn set_identity(&self, device: &Device, identity: Identity) {
        let is_secure = self.state.load(Ordering::Relaxed) & SECURE != 0;
        let identity = if is_secure && !trusted::is_trusted(self.name_of(device)) {
            Identity::Nothing
        } else {
            identity
        };
        if self.identity(device) == identity {
            return;
        }
        let number = self.claimed.fetch_add(1, Ordering::AcqRel).saturating_add(1);
        fence(Ordering::Release);
        let Some(record) = self.record(number) else {
            return;
        };
        for (word, value) in record.0.iter().zip(identity.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        // A slow thread must not put its older record in the place of a newer one.
        device.record.fetch_max(number, Ordering::Release);
    }

    /// Asks the kernel what the name of a device leads to.
    pub(crate) fn resolve(&self, device: &Device) -> Result<Identity, Errno> {
        let status = raw::stat_at(libc::AT_FDCWD, self.name_of(device).as_ptr(), 0)?;
        self.set_identity(device, Identity::of(&status));
        Ok(self.identity(device))
    }
}

impl Device {
    const fn new() -> Self {
        Self {
            name_start: AtomicUsize::new(0),
            name_len: AtomicUsize::new(0),
            is_scsi: AtomicU8::new(0),
            target: AtomicU8::new(0),
            hash: AtomicU64::new(0),
            number: AtomicU64::new(0),
            record: AtomicU64::new(0),
        }
    }

    /// Returns the kind of controller.
    pub(crate) fn bus(&self) -> Bus {
        if self.is_scsi.load(Ordering::Relaxed) != 0 {
            Bus::Scsi
        } else {
            Bus::Ide
        }
    }

    /// Returns the number that a listed file shows as a block device.
    pub(crate) fn number(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    /// Measures the disk that `fd` has open.
    pub(crate) fn disk(&self, fd: c_int, status: &Status) -> Result<Disk, Errno> {
        let is_block = status.is(libc::S_IFBLK);
        let size = if is_block {
            // SAFETY: BLKGETSIZE64 writes one `u64`.
            unsafe { raw::ioctl_read::<u64>(fd, uapi::BLKGETSIZE64) }?
        } else {
            status.size
        };
        let read_only = if is_block {
            // SAFETY: BLKROGET writes one `int`.
            unsafe { raw::ioctl_read::<c_int>(fd, uapi::BLKROGET) }? != 0
        } else {
            status.mode & 0o222 == 0 || raw::on_read_only_mount(fd)
        };
        Ok(Disk {
            bus: self.bus(),
            target: self.target.load(Ordering::Relaxed),
            sectors: size / SECTOR,
            read_only,
            hash: self.hash.load(Ordering::Relaxed),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::vec::Vec;
    use std::{format, thread};

    use super::*;

    fn filled(table: &Table, list: &[u8]) -> Vec<Vec<u8>> {
        let refused = Mutex::new(Vec::new());
        table.fill(
            list,
            false,
            |_| true,
            |name, _| refused.lock().unwrap().push(name.to_vec()),
        );
        refused.into_inner().unwrap()
    }

    fn names(table: &Table) -> Vec<(Vec<u8>, Bus, u8)> {
        table
            .devices()
            .map(|device| {
                let name = table.name_of(device).to_bytes().to_vec();
                (name, device.bus(), device.target.load(Ordering::Relaxed))
            })
            .collect()
    }

    #[test]
    fn the_list_is_split_at_colons() {
        static TABLE: Table = Table::new();
        assert!(!TABLE.is_active());
        let refused = filled(&TABLE, b":/dev/hdx::/dev/sd/test:/dev/null:/dev/sd/../sdb:");
        assert_eq!(refused, [b"/dev/null"]);
        let expected: [(&[u8], _, _); 3] = [
            (b"/dev/hdx", Bus::Ide, 0),
            (b"/dev/sd/test", Bus::Scsi, 0),
            (b"/dev/sd/../sdb", Bus::Scsi, 1),
        ];
        assert_eq!(
            names(&TABLE),
            expected.map(|(name, bus, target)| (name.to_vec(), bus, target))
        );
        assert_eq!(
            filled(&TABLE, b"/dev/hdy"),
            [[0_u8; 0]; 0],
            "the second time changes nothing"
        );
        assert_eq!(names(&TABLE).len(), 3);
    }

    #[test]
    fn a_list_that_is_too_long_is_cut_at_a_name() {
        static TABLE: Table = Table::new();
        let list: Vec<u8> = (0..200).flat_map(|i| format!("/dev/sd/{i}:").into_bytes()).collect();
        assert_eq!(filled(&TABLE, &list).len(), 200 - DEVICES);
        static LONG: Table = Table::new();
        let list = [&b"/dev/sd"[..], &[b'x'; NAMES - 8], b":/dev/sdb"].concat();
        assert_eq!(filled(&LONG, &list), [b"/dev/sdb"]);
        assert_eq!(LONG.name_of(&LONG.devices[0]).count_bytes(), NAMES - 1);
    }

    #[test]
    fn numbers_of_listed_files_are_free_and_distinct() {
        static TABLE: Table = Table::new();
        let first = disk::hash(b"/dev/sda") & 0xff_ffff;
        TABLE.fill(
            b"/dev/sda:/dev/sda:/dev/hdx",
            false,
            |number| number & 0xff != first & 0xff,
            |_, _| {},
        );
        let numbers: Vec<u64> = TABLE.devices().map(Device::number).collect();
        assert!(
            numbers.iter().all(|number| (120..=127).contains(&libc::major(*number))),
            "{numbers:?}"
        );
        assert_ne!(numbers[0], numbers[1]);
    }

    #[test]
    fn a_record_that_others_replaced_is_lost_and_read_in_bounded_time() {
        static TABLE: Table = Table::new();
        filled(&TABLE, b"/dev/sda:/dev/sdb");
        let [first, second] = [&TABLE.devices[0], &TABLE.devices[1]];
        TABLE.set_identity(first, Identity::File(1, 1));
        for i in 0..2 * RECORDS as u64 {
            TABLE.set_identity(second, Identity::File(2, i));
        }
        assert_eq!(TABLE.identity(first), Identity::Nothing);
        TABLE.set_identity(first, Identity::File(1, 1));
        assert_eq!(TABLE.identity(first), Identity::File(1, 1));
    }

    #[test]
    fn identities_are_whole_while_threads_change_them() {
        static TABLE: Table = Table::new();
        filled(&TABLE, b"/dev/sda:/dev/sdb");
        let device = &TABLE.devices[0];
        thread::scope(|scope| {
            for thread in 0..3 {
                scope.spawn(move || {
                    for i in 0..50_000 {
                        TABLE.set_identity(device, Identity::File(thread << 32 | i, !(thread << 32 | i)));
                    }
                });
            }
            for _ in 0..50_000 {
                match TABLE.identity(device) {
                    Identity::Nothing => {}
                    Identity::File(dev, ino) => assert_eq!(ino, !dev),
                    Identity::Block(number) => panic!("block device {number}"),
                }
            }
        });
        assert_eq!(TABLE.identity(&TABLE.devices[1]), Identity::Nothing);
        assert_eq!(TABLE.find(TABLE.identity(device)).map(Device::bus), Some(Bus::Scsi));
    }
}
