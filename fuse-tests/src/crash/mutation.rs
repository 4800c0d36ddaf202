//! Mutations of a log: the log of an engine that breaks one ordering rule. The search must find each of them.

use std::ops::Range;

use super::images::Image;
use super::store::{Event, FileOp};

/// One way to break the order of writes that keeps an image sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Table entries are written and synced before the data that they name.
    EntryBeforeData,
    /// The sync between data and table entries is left out.
    NoSyncBetween,
    /// The sync after table entries is left out, although the flush succeeds.
    NoSyncAfter,
    /// Table entries are written to the primary tables only.
    OnlyPrimary,
    /// Table entries are written to the redundant tables only.
    OnlyRedundant,
    /// The header is never marked as in use (uncleanShutdown).
    NoUncleanFlag,
    /// The CID is never changed.
    NoNewCid,
}

/// Offset of the header's uncleanShutdown byte, which marks the image as in use.
const UNCLEAN_FLAG: u64 = 72;

impl Mutation {
    /// All mutations.
    pub const ALL: [Self; 7] = [
        Self::EntryBeforeData,
        Self::NoSyncBetween,
        Self::NoSyncAfter,
        Self::OnlyPrimary,
        Self::OnlyRedundant,
        Self::NoUncleanFlag,
        Self::NoNewCid,
    ];

    /// Returns the mutated log of a run over `image`, which must be a sparse extent in one file with all its tables.
    pub fn apply(self, image: &Image, log: &[Event]) -> Vec<Event> {
        let file = image
            .files
            .iter()
            .position(|(name, _)| name == image.top)
            .expect("the file");
        let layout = Layout::of(image);
        let drop_writes = |into: &dyn Fn(u64) -> bool| -> Vec<Event> {
            let dropped = |event: &&Event| write_offset(event, file).is_some_and(into);
            log.iter().filter(|event| !dropped(event)).cloned().collect()
        };
        match self {
            Self::OnlyPrimary => drop_writes(&|at| layout.redundant.iter().any(|range| range.contains(&at))),
            Self::OnlyRedundant => drop_writes(&|at| layout.primary.iter().any(|range| range.contains(&at))),
            Self::NoUncleanFlag => drop_writes(&|at| at == UNCLEAN_FLAG),
            Self::NoNewCid => drop_writes(&|at| layout.descriptor.contains(&at)),
            _ => self.reorder(log, file, &layout),
        }
    }

    /// Applies the mutations of syncs: moves or drops one of the syncs in `data… SYNC entries… SYNC`.
    fn reorder(self, log: &[Event], file: usize, layout: &Layout) -> Vec<Event> {
        let is_entry = |event: &Event| write_offset(event, file).is_some_and(|at| layout.is_table(at));
        let is_sync = |event: &Event| matches!(event, Event::Sync(of, _) if *of == file);
        let mut out: Vec<Event> = Vec::new();
        // Index in `out` of the first write of data after the last sync.
        let mut data = None;
        let mut at = 0;
        while at < log.len() {
            let event = &log[at];
            let entries = log[at + 1..].iter().take_while(|event| is_entry(event)).count();
            if is_sync(event) && entries > 0 {
                let entries = &log[at + 1..at + 1 + entries];
                match self {
                    Self::EntryBeforeData => {
                        let first_data = data.unwrap_or(out.len());
                        let moved = entries.iter().cloned().chain([event.clone()]);
                        out.splice(first_data..first_data, moved);
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
            } else if write_offset(event, file).is_some() {
                data = data.or(Some(out.len()));
            }
            out.push(event.clone());
            at += 1;
        }
        out
    }
}

/// Byte ranges of the descriptor and the tables in a hosted sparse file.
struct Layout {
    descriptor: Range<u64>,
    primary: Vec<Range<u64>>,
    redundant: Vec<Range<u64>>,
}

impl Layout {
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

/// Returns the offset of a write to the file, or `None` for any other event.
fn write_offset(event: &Event, file: usize) -> Option<u64> {
    match event {
        Event::FileOp(of, FileOp::Write { offset, .. }) if *of == file => Some(*offset),
        _ => None,
    }
}
