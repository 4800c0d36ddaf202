//! The log as a store would have it that breaks the engine's order: what the search must find.

use std::ops::Range;

use super::images::Image;
use super::store::{Event, Op};

/// One way to break the order in which an image stays sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Entries are written, and durable, before the data that they name.
    EntryBeforeData,
    /// The sync between data and entries does nothing.
    NoSyncBetween,
    /// The sync after entries does nothing, though a flush says that it is done.
    NoSyncAfter,
    /// Entries go to the primary tables only.
    OnlyPrimary,
    /// Entries go to the redundant tables only.
    OnlyRedundant,
    /// The header never says that the image is in use.
    NoMark,
    /// The CID stays what it was.
    NoNewCid,
}

/// Byte of the header that says that the image is in use.
const MARK: u64 = 72;

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::EntryBeforeData,
        Self::NoSyncBetween,
        Self::NoSyncAfter,
        Self::OnlyPrimary,
        Self::OnlyRedundant,
        Self::NoMark,
        Self::NoNewCid,
    ];

    /// What becomes of the log of a run over `image`, a sparse disk in one file with all its tables.
    pub fn apply(self, image: &Image, log: &[Event]) -> Vec<Event> {
        let file = image
            .files
            .iter()
            .position(|(name, _)| name == image.top)
            .expect("the file");
        let places = Places::of(image);
        let drop_writes = |into: &dyn Fn(u64) -> bool| -> Vec<Event> {
            let dropped = |event: &&Event| written(event, file).is_some_and(into);
            log.iter().filter(|event| !dropped(event)).cloned().collect()
        };
        match self {
            Self::OnlyPrimary => drop_writes(&|at| places.redundant.iter().any(|range| range.contains(&at))),
            Self::OnlyRedundant => drop_writes(&|at| places.primary.iter().any(|range| range.contains(&at))),
            Self::NoMark => drop_writes(&|at| at == MARK),
            Self::NoNewCid => drop_writes(&|at| places.descriptor.contains(&at)),
            _ => self.reorder(log, file, &places),
        }
    }

    /// The sabotages of syncs: `data… SYNC entries… SYNC` becomes something else.
    fn reorder(self, log: &[Event], file: usize, places: &Places) -> Vec<Event> {
        let is_entry = |event: &Event| written(event, file).is_some_and(|at| places.is_table(at));
        let is_sync = |event: &Event| matches!(event, Event::Sync(of, _) if *of == file);
        let mut out: Vec<Event> = Vec::new();
        // where in `out` the first data after the last sync is
        let mut data = None;
        let mut at = 0;
        while at < log.len() {
            let event = &log[at];
            let entries = log[at + 1..].iter().take_while(|event| is_entry(event)).count();
            if is_sync(event) && entries > 0 {
                let entries = &log[at + 1..at + 1 + entries];
                match self {
                    Self::EntryBeforeData => {
                        let place = data.unwrap_or(out.len());
                        let first = entries.iter().cloned().chain([event.clone()]);
                        out.splice(place..place, first);
                    }
                    Self::NoSyncBetween => out.extend_from_slice(entries),
                    _ => {
                        out.push(event.clone());
                        out.extend_from_slice(entries);
                    }
                }
                at += 1 + entries.len();
                if self == Self::NoSyncAfter && log.get(at).is_some_and(is_sync) {
                    at += 1;
                }
                data = None;
                continue;
            }
            if is_sync(event) {
                data = None;
            } else if written(event, file).is_some() {
                data = data.or(Some(out.len()));
            }
            out.push(event.clone());
            at += 1;
        }
        out
    }
}

/// Where things are in a hosted sparse file, in bytes.
struct Places {
    descriptor: Range<u64>,
    primary: Vec<Range<u64>>,
    redundant: Vec<Range<u64>>,
}

impl Places {
    fn of(image: &Image) -> Self {
        let (_, bytes) = image
            .files
            .iter()
            .find(|(name, _)| name == image.top)
            .expect("the file");
        let bytes = bytes.to_vec();
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let word = |at: usize| u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")));
        assert_eq!(&bytes[..4], b"KDMV", "a sparse disk in one file");
        let entries = word(44);
        let tables = long(12).div_ceil(long(20) * entries);
        let of = |directory: u64| {
            let directory = directory * 512;
            let tables = (0..tables).map(|table| word((directory + table * 4) as usize) * 512);
            let tables = tables.filter(|&at| at != 0).map(|at| at..at + entries * 4);
            tables.chain(std::iter::once(directory..directory + 512)).collect()
        };
        Self {
            descriptor: long(28) * 512..(long(28) + long(36)) * 512,
            primary: of(long(56)),
            redundant: of(long(48)),
        }
    }

    fn is_table(&self, at: u64) -> bool {
        self.primary
            .iter()
            .chain(&self.redundant)
            .any(|range| range.contains(&at))
    }
}

/// Where an event writes to the file.
fn written(event: &Event, file: usize) -> Option<u64> {
    match event {
        Event::Op(of, Op::Write { offset, .. }) if *of == file => Some(*offset),
        _ => None,
    }
}
