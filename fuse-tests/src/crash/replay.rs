//! Replays a log and creates the crash states of each position in it.
//!
//! ```text
//!   synced      durable: a sync that succeeded covers it
//!   uncertain   since the first sync that failed: the changes before that sync may be lost for good, although later
//!               syncs succeed (Linux reports a write-back error once and drops the dirty pages); later changes
//!               that a sync covered are durable, and are applied in their order
//!   unsynced    since the last sync: any subset in any order, each write torn at its sectors
//! ```
//! Each file has its own three sets, as each file is synced separately.

use super::bytes::Bytes;
use super::store::{Event, FileOp};
use crate::make::model::Random;

/// Unit of an atomic write: a crash never leaves part of a sector.
const ATOM: u64 = 512;

/// State of all files at one position of a log.
#[derive(Debug, Clone)]
pub struct Machine {
    files: Vec<ReplayedFile>,
}

#[derive(Debug, Clone)]
struct ReplayedFile {
    name: String,
    synced: Bytes,
    /// Changes since a sync that failed; true if a later sync made the change durable.
    uncertain: Vec<(FileOp, bool)>,
    unsynced: Vec<FileOp>,
    removed: bool,
}

/// Selection of the changes that a crash keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Keeps all changes in their order: the process was killed, the machine was not.
    All,
    /// Keeps only what was synced.
    Nothing,
    /// Keeps the atoms whose bits are set in the number, in the order of the changes, or reversed if true.
    Exactly(u64, bool),
    /// Keeps a random subset, derived from this seed.
    Random(u64),
}

/// A crash state: what storage holds after a crash.
#[derive(Debug, Clone)]
pub struct Crash {
    /// Name and content of each file.
    pub files: Vec<(String, Bytes)>,
}

impl Machine {
    /// Creates the state before the first event.
    pub fn new(start: &[(String, Bytes)]) -> Self {
        Self {
            files: start
                .iter()
                .map(|(name, bytes)| ReplayedFile::new(name, bytes.clone()))
                .collect(),
        }
    }

    /// Advances by one event.
    pub fn step(&mut self, event: &Event) {
        match event {
            Event::FileOp(file, op) => self.files[*file].unsynced.push(op.clone()),
            Event::Sync(file, ok) => self.files[*file].sync(*ok),
            Event::Created(name) => self.files.push(ReplayedFile::new(name, Bytes::default())),
            Event::Removed(file) => self.files[*file].removed = true,
            Event::Disk(_) | Event::Killed | Event::Observed(_) => {}
        }
    }

    /// Returns the number of atoms (sectors and length changes) that a crash may keep or lose independently.
    pub fn atoms(&self) -> u64 {
        self.files.iter().map(ReplayedFile::atoms).sum()
    }

    /// Creates the crash state that `style` selects.
    pub fn crash(&self, style: Style) -> Crash {
        let mut choice = Choice::new(style);
        let left = self.files.iter().filter(|file| !file.removed);
        Crash {
            files: left.map(|file| (file.name.clone(), file.crash(&mut choice))).collect(),
        }
    }

    /// Describes the changes that are not durable, for messages.
    pub fn pending(&self) -> Vec<String> {
        let of = |file: &ReplayedFile| {
            let uncertain = file
                .uncertain
                .iter()
                .filter(|(_, durable)| !durable)
                .map(|(op, _)| format!("lost? {op:?}"));
            let all: Vec<_> = uncertain
                .chain(file.unsynced.iter().map(|op| format!("{op:?}")))
                .collect();
            all.into_iter()
                .map(|op| format!("{}: {op}", file.name))
                .collect::<Vec<_>>()
        };
        self.files.iter().flat_map(of).collect()
    }
}

impl ReplayedFile {
    fn new(name: &str, synced: Bytes) -> Self {
        Self {
            name: name.to_owned(),
            synced,
            uncertain: Vec::new(),
            unsynced: Vec::new(),
            removed: false,
        }
    }

    fn sync(&mut self, ok: bool) {
        if ok && self.uncertain.is_empty() {
            for op in self.unsynced.drain(..) {
                op.apply(&mut self.synced);
            }
        } else {
            self.uncertain.extend(self.unsynced.drain(..).map(|op| (op, ok)));
        }
    }

    fn atoms(&self) -> u64 {
        let uncertain = self
            .uncertain
            .iter()
            .filter(|(_, durable)| !durable)
            .map(|(op, _)| atoms(op))
            .sum::<u64>();
        uncertain + self.unsynced.iter().map(atoms).sum::<u64>()
    }

    fn crash(&self, choice: &mut Choice) -> Bytes {
        let mut bytes = self.synced.clone();
        for (op, durable) in &self.uncertain {
            if *durable {
                op.apply(&mut bytes);
            } else {
                let keep = choice.keep(atoms(op), 0);
                apply_part(op, &keep, &mut bytes);
            }
        }
        let last = self.unsynced.len();
        let kept: Vec<_> = self
            .unsynced
            .iter()
            .enumerate()
            .map(|(i, op)| choice.keep(atoms(op), last - i))
            .collect();
        for i in choice.order(last) {
            apply_part(&self.unsynced[i], &kept[i], &mut bytes);
        }
        bytes
    }
}

/// Source of the decisions about atoms.
struct Choice {
    style: Style,
    /// `Exactly`: the number of atoms decided so far. `Selection::Prefix`: 1 once the prefix has ended.
    atom: u32,
    random: Random,
    /// Selection of atoms by a random crash.
    selection: Selection,
}

/// Ways in which a random crash selects atoms. Several exist because each finds other defects.
#[derive(Clone, Copy)]
enum Selection {
    /// Keeps each change whole or not at all, with this probability in sixteenths.
    Whole(u64),
    /// Keeps each atom independently, with this probability in sixteenths.
    Torn(u64),
    /// Keeps the first changes, up to one that is torn.
    Prefix,
    /// Keeps most of the last three changes, and earlier ones with this probability in sixteenths.
    Suffix(u64),
}

impl Choice {
    fn new(style: Style) -> Self {
        let mut random = Random::new(match style {
            Style::Random(seed) => seed,
            _ => 0,
        });
        let chances = [1, 3, 8, 13, 15][random.below(5) as usize];
        let selection = match random.below(8) {
            0..=2 => Selection::Whole(chances),
            3..=4 => Selection::Torn(chances),
            5 => Selection::Prefix,
            _ => Selection::Suffix(chances),
        };
        Self {
            style,
            atom: 0,
            random,
            selection,
        }
    }

    /// Decides which of the `atoms` of a change are kept. `remaining` counts the unsynced changes of the file from this
    /// one to the last.
    fn keep(&mut self, atoms: u64, remaining: usize) -> Vec<bool> {
        let all = |keep| vec![keep; atoms as usize];
        match self.style {
            Style::All => all(true),
            Style::Nothing => all(false),
            Style::Exactly(bits, _) => {
                let first = self.atom;
                self.atom += atoms as u32;
                (first..self.atom)
                    .map(|atom| bits.checked_shr(atom).unwrap_or(0) & 1 == 1)
                    .collect()
            }
            Style::Random(_) => match self.selection {
                Selection::Whole(chances) => all(self.random.below(16) < chances),
                Selection::Torn(chances) => (0..atoms).map(|_| self.random.below(16) < chances).collect(),
                Selection::Prefix if self.atom > 0 => all(false),
                Selection::Prefix if self.random.below(remaining as u64 + 1) == 0 => {
                    self.atom = 1;
                    (0..atoms).map(|_| self.random.below(2) == 0).collect()
                }
                Selection::Prefix => all(true),
                Selection::Suffix(_) if remaining <= 3 => all(self.random.below(4) > 0),
                Selection::Suffix(chances) => all(self.random.below(16) < chances),
            },
        }
    }

    /// Returns the order in which `count` changes are applied.
    fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<_> = (0..count).collect();
        match self.style {
            Style::Exactly(_, true) => order.reverse(),
            Style::Random(_) if self.random.below(2) == 0 => self.random.shuffle(&mut order),
            _ => {}
        }
        order
    }
}

/// Returns the number of parts of a change that a crash may keep or lose independently.
fn atoms(op: &FileOp) -> u64 {
    match op {
        FileOp::Write { offset, data } => sectors(*offset, data.len() as u64),
        FileOp::Zero { offset, len, .. } => sectors(*offset, *len),
        FileOp::SetLen { .. } => 1,
    }
}

fn sectors(offset: u64, len: u64) -> u64 {
    if len == 0 {
        0
    } else {
        (offset + len).div_ceil(ATOM) - offset / ATOM
    }
}

/// Applies the atoms of a change that are kept.
fn apply_part(op: &FileOp, keep: &[bool], bytes: &mut Bytes) {
    if keep.iter().all(|&keep| keep) {
        return op.apply(bytes);
    }
    let (start, end) = match op {
        FileOp::Write { offset, data } => (*offset, *offset + data.len() as u64),
        FileOp::Zero { offset, len, .. } => (*offset, *offset + *len),
        FileOp::SetLen { .. } => return,
    };
    for atom in keep
        .iter()
        .enumerate()
        .filter(|(_, keep)| **keep)
        .map(|(atom, _)| atom as u64)
    {
        let from = (start / ATOM + atom) * ATOM;
        let (from, to) = (from.max(start), (from + ATOM).min(end));
        match op {
            FileOp::Write { data, .. } => bytes.write(from, &data[(from - start) as usize..(to - start) as usize]),
            FileOp::Zero { unmap, .. } => bytes.zero(from, to - from, *unmap),
            FileOp::SetLen { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn write(offset: u64, byte: u8, len: usize) -> Event {
        Event::FileOp(
            0,
            FileOp::Write {
                offset,
                data: vec![byte; len].into(),
            },
        )
    }

    fn machine(events: &[Event]) -> Machine {
        let mut machine = Machine::new(&[("a".to_owned(), Bytes::default())]);
        events.iter().for_each(|event| machine.step(event));
        machine
    }

    /// Returns the first byte of each sector.
    fn heads(crash: &Crash) -> Vec<u8> {
        crash.files[0].1.to_vec().chunks(512).map(|sector| sector[0]).collect()
    }

    fn crash_states(machine: &Machine, styles: impl Iterator<Item = Style>) -> BTreeSet<Vec<u8>> {
        styles.map(|style| heads(&machine.crash(style))).collect()
    }

    #[test]
    fn synced_changes_stay_and_any_subset_of_the_rest_does() {
        let unsynced = [
            write(512, 2, 1024),
            Event::FileOp(0, FileOp::SetLen { from: 1536, to: 2048 }),
        ];
        let mut events = vec![write(0, 1, 512), Event::Sync(0, true)];
        events.extend(unsynced);
        let machine = machine(&events);
        assert_eq!(machine.atoms(), 3);
        assert_eq!(heads(&machine.crash(Style::All)), [1, 2, 2, 0]);
        assert_eq!(heads(&machine.crash(Style::Nothing)), [1]);
        let all = crash_states(&machine, (0..8).map(|bits| Style::Exactly(bits, false)));
        let expected: [&[u8]; 8] = [
            &[1],
            &[1, 2],
            &[1, 0, 2],
            &[1, 2, 2],
            &[1, 0, 0, 0],
            &[1, 2, 0, 0],
            &[1, 0, 2, 0],
            &[1, 2, 2, 0],
        ];
        assert_eq!(all, expected.iter().map(|sectors| sectors.to_vec()).collect());
        let random = crash_states(&machine, (0..500).map(Style::Random));
        assert_eq!(random, all, "random crashes find every subset, and nothing else");
    }

    #[test]
    fn unsynced_changes_reach_storage_in_any_order() {
        let machine = machine(&[write(0, 1, 512), write(0, 2, 512)]);
        assert_eq!(heads(&machine.crash(Style::Exactly(3, true))), [1]);
        assert_eq!(heads(&machine.crash(Style::Exactly(3, false))), [2]);
        assert_eq!(crash_states(&machine, (0..200).map(Style::Random)).len(), 3);
    }

    #[test]
    fn a_failed_sync_leaves_earlier_changes_uncertain() {
        let events = [
            write(0, 1, 512),
            Event::Sync(0, false),
            write(512, 2, 512),
            Event::Sync(0, true),
        ];
        let machine = machine(&events);
        assert_eq!(machine.atoms(), 1);
        let expected: [&[u8]; 2] = [&[0, 2], &[1, 2]];
        assert_eq!(
            crash_states(&machine, (0..100).map(Style::Random)),
            expected.iter().map(|s| s.to_vec()).collect()
        );
        let mut later = machine;
        later.step(&write(0, 3, 512));
        later.step(&Event::Sync(0, true));
        assert_eq!(
            crash_states(&later, (0..100).map(Style::Random)),
            BTreeSet::from([vec![3, 2]])
        );
    }

    #[test]
    fn each_file_is_synced_separately() {
        let mut machine = machine(&[write(0, 1, 512), Event::Created("b".to_owned())]);
        machine.step(&Event::FileOp(
            1,
            FileOp::Write {
                offset: 0,
                data: vec![2; 512].into(),
            },
        ));
        machine.step(&Event::Sync(1, true));
        let crash = machine.crash(Style::Nothing);
        assert_eq!((crash.files[0].1.len(), crash.files[1].1.len()), (0, 512));
        assert_eq!(machine.pending().len(), 1);
    }
}
