//! Walks a log and makes crashes of each place in it.
//!
//! ```text
//!   sure       what a sync has made durable
//!   doubtful   ─ after a sync that failed: what was before it may be lost for ever, whatever later syncs say;
//!                and what came behind that, as durable as it may be, in its order
//!   open       since the last sync: any subset in any order, each write torn at its sectors
//! ```
//! Each file has its own.

use super::bytes::Bytes;
use super::store::{Event, Op};
use crate::make::model::Random;

/// Bytes that are written whole or not at all.
const ATOM: u64 = 512;

/// The files at one place of a log.
#[derive(Debug, Clone)]
pub struct Machine {
    files: Vec<Sim>,
}

#[derive(Debug, Clone)]
struct Sim {
    name: String,
    sure: Bytes,
    /// With whether it is durable.
    doubtful: Vec<(Op, bool)>,
    open: Vec<Op>,
    removed: bool,
}

/// How to choose what a crash keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// All of the operations, in their order: the process was killed, the machine was not.
    All,
    /// Nothing that was not synced.
    Nothing,
    /// The subset that this number says, an atom for each bit, in the order of the operations; the other way round if true.
    Exactly(u64, bool),
    /// By chance, from this seed.
    Random(u64),
}

/// What a crash has left.
#[derive(Debug, Clone)]
pub struct Crash {
    /// The files.
    pub files: Vec<(String, Bytes)>,
}

impl Machine {
    /// The files before the first event.
    pub fn new(start: &[(String, Bytes)]) -> Self {
        Self {
            files: start
                .iter()
                .map(|(name, bytes)| Sim::new(name, bytes.clone()))
                .collect(),
        }
    }

    /// Goes on by one event.
    pub fn step(&mut self, event: &Event) {
        match event {
            Event::Op(file, op) => self.files[*file].open.push(op.clone()),
            Event::Sync(file, ok) => self.files[*file].sync(*ok),
            Event::Made(name) => self.files.push(Sim::new(name, Bytes::default())),
            Event::Removed(file) => self.files[*file].removed = true,
            Event::Disk(_) | Event::Killed | Event::Shown(_) => {}
        }
    }

    /// How many sectors and other things may each be kept or not.
    pub fn atoms(&self) -> u64 {
        self.files.iter().map(Sim::atoms).sum()
    }

    /// Makes a crash.
    pub fn crash(&self, style: Style) -> Crash {
        let mut choice = Choice::new(style);
        let left = self.files.iter().filter(|file| !file.removed);
        Crash {
            files: left.map(|file| (file.name.clone(), file.crash(&mut choice))).collect(),
        }
    }

    /// The operations that are not durable.
    pub fn pending(&self) -> Vec<String> {
        let of = |file: &Sim| {
            let doubtful = file
                .doubtful
                .iter()
                .filter(|(_, durable)| !durable)
                .map(|(op, _)| format!("lost? {op:?}"));
            let all: Vec<_> = doubtful.chain(file.open.iter().map(|op| format!("{op:?}"))).collect();
            all.into_iter()
                .map(|op| format!("{}: {op}", file.name))
                .collect::<Vec<_>>()
        };
        self.files.iter().flat_map(of).collect()
    }
}

impl Sim {
    fn new(name: &str, sure: Bytes) -> Self {
        Self {
            name: name.to_owned(),
            sure,
            doubtful: Vec::new(),
            open: Vec::new(),
            removed: false,
        }
    }

    fn sync(&mut self, ok: bool) {
        if ok && self.doubtful.is_empty() {
            for op in self.open.drain(..) {
                op.apply(&mut self.sure);
            }
        } else {
            self.doubtful.extend(self.open.drain(..).map(|op| (op, ok)));
        }
    }

    fn atoms(&self) -> u64 {
        let doubtful = self
            .doubtful
            .iter()
            .filter(|(_, durable)| !durable)
            .map(|(op, _)| atoms(op))
            .sum::<u64>();
        doubtful + self.open.iter().map(atoms).sum::<u64>()
    }

    fn crash(&self, choice: &mut Choice) -> Bytes {
        let mut bytes = self.sure.clone();
        for (op, durable) in &self.doubtful {
            if *durable {
                op.apply(&mut bytes);
            } else {
                let keep = choice.keep(atoms(op), 0);
                apply_part(op, &keep, &mut bytes);
            }
        }
        let last = self.open.len();
        let kept: Vec<_> = self
            .open
            .iter()
            .enumerate()
            .map(|(i, op)| choice.keep(atoms(op), last - i))
            .collect();
        for i in choice.order(last) {
            apply_part(&self.open[i], &kept[i], &mut bytes);
        }
        bytes
    }
}

/// Where the decisions about atoms come from.
struct Choice {
    style: Style,
    /// Atoms decided so far.
    atom: u32,
    random: Random,
    /// How a random crash is made.
    manner: Manner,
}

/// The manners of a random crash: bugs hide in different ones.
#[derive(Clone, Copy)]
enum Manner {
    /// Each operation whole or not, kept with so many chances of 16.
    Whole(u64),
    /// Each atom by itself.
    Torn(u64),
    /// The first operations up to a torn one.
    Prefix,
    /// The last operations, and what came before only with a chance of so many of 16.
    Suffix(u64),
}

impl Choice {
    fn new(style: Style) -> Self {
        let mut random = Random::new(match style {
            Style::Random(seed) => seed,
            _ => 0,
        });
        let chances = [1, 3, 8, 13, 15][random.below(5) as usize];
        let manner = match random.below(8) {
            0..=2 => Manner::Whole(chances),
            3..=4 => Manner::Torn(chances),
            5 => Manner::Prefix,
            _ => Manner::Suffix(chances),
        };
        Self {
            style,
            atom: 0,
            random,
            manner,
        }
    }

    /// Which of `atoms` are kept of an operation that has `behind` operations of its file from it to the end.
    fn keep(&mut self, atoms: u64, behind: usize) -> Vec<bool> {
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
            Style::Random(_) => match self.manner {
                Manner::Whole(chances) => all(self.random.below(16) < chances),
                Manner::Torn(chances) => (0..atoms).map(|_| self.random.below(16) < chances).collect(),
                Manner::Prefix if self.atom > 0 => all(false),
                Manner::Prefix if self.random.below(behind as u64 + 1) == 0 => {
                    self.atom = 1;
                    (0..atoms).map(|_| self.random.below(2) == 0).collect()
                }
                Manner::Prefix => all(true),
                Manner::Suffix(_) if behind <= 3 => all(self.random.below(4) > 0),
                Manner::Suffix(chances) => all(self.random.below(16) < chances),
            },
        }
    }

    /// In what order `count` operations are done.
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

/// How many parts of an operation may each be kept or not.
fn atoms(op: &Op) -> u64 {
    match op {
        Op::Write { offset, data } => sectors(*offset, data.len() as u64),
        Op::Zero { offset, len, .. } => sectors(*offset, *len),
        Op::SetLen { .. } => 1,
    }
}

fn sectors(offset: u64, len: u64) -> u64 {
    if len == 0 {
        0
    } else {
        (offset + len).div_ceil(ATOM) - offset / ATOM
    }
}

/// Does the parts of an operation that are kept.
fn apply_part(op: &Op, keep: &[bool], bytes: &mut Bytes) {
    if keep.iter().all(|&keep| keep) {
        return op.apply(bytes);
    }
    let (start, end) = match op {
        Op::Write { offset, data } => (*offset, *offset + data.len() as u64),
        Op::Zero { offset, len, .. } => (*offset, *offset + *len),
        Op::SetLen { .. } => return,
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
            Op::Write { data, .. } => bytes.write(from, &data[(from - start) as usize..(to - start) as usize]),
            Op::Zero { unmap, .. } => bytes.zero(from, to - from, *unmap),
            Op::SetLen { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn write(offset: u64, byte: u8, len: usize) -> Event {
        Event::Op(
            0,
            Op::Write {
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

    /// The first byte of each sector.
    fn heads(crash: &Crash) -> Vec<u8> {
        crash.files[0].1.to_vec().chunks(512).map(|sector| sector[0]).collect()
    }

    fn seen(machine: &Machine, styles: impl Iterator<Item = Style>) -> BTreeSet<Vec<u8>> {
        styles.map(|style| heads(&machine.crash(style))).collect()
    }

    #[test]
    fn what_was_synced_stays_and_the_rest_is_any_subset() {
        let open = [write(512, 2, 1024), Event::Op(0, Op::SetLen { from: 1536, to: 2048 })];
        let mut events = vec![write(0, 1, 512), Event::Sync(0, true)];
        events.extend(open);
        let machine = machine(&events);
        assert_eq!(machine.atoms(), 3);
        assert_eq!(heads(&machine.crash(Style::All)), [1, 2, 2, 0]);
        assert_eq!(heads(&machine.crash(Style::Nothing)), [1]);
        let all = seen(&machine, (0..8).map(|bits| Style::Exactly(bits, false)));
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
        let random = seen(&machine, (0..500).map(Style::Random));
        assert_eq!(random, all, "chance finds every subset, and nothing else");
    }

    #[test]
    fn the_order_may_be_any() {
        let machine = machine(&[write(0, 1, 512), write(0, 2, 512)]);
        assert_eq!(heads(&machine.crash(Style::Exactly(3, true))), [1]);
        assert_eq!(heads(&machine.crash(Style::Exactly(3, false))), [2]);
        assert_eq!(seen(&machine, (0..200).map(Style::Random)).len(), 3);
    }

    #[test]
    fn after_a_sync_that_failed_nothing_before_it_is_sure_any_more() {
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
            seen(&machine, (0..100).map(Style::Random)),
            expected.iter().map(|s| s.to_vec()).collect()
        );
        let mut later = machine;
        later.step(&write(0, 3, 512));
        later.step(&Event::Sync(0, true));
        assert_eq!(seen(&later, (0..100).map(Style::Random)), BTreeSet::from([vec![3, 2]]));
    }

    #[test]
    fn files_have_their_own_syncs() {
        let mut machine = machine(&[write(0, 1, 512), Event::Made("b".to_owned())]);
        machine.step(&Event::Op(
            1,
            Op::Write {
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
