//! Runs: what is done to a disk in a simulated store, recorded.

use std::thread;

use vmdkfuse::block::{BlockRead, BlockWrite, Lba};
use vmdkfuse::error::ErrorKind;
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

use super::images::Image;
use super::oracle::{fill, value_of, values};
use super::store::{Event, Faults, Mark, SimStore};
use crate::make::model::Random;

/// One operation of a run.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// New values for `1` sectors from `0` on.
    Write(u64, u64),
    /// Zeroes; `true`: and holes.
    Zero(u64, u64, bool),
    /// Makes it durable.
    Flush,
    /// Flushes and marks it as closed; a later step begins anew.
    Close,
    /// Closes it, and opens it again.
    Reopen,
    /// The process ends without closing, the machine does not; it is opened again.
    Kill,
    /// Something goes wrong from now on.
    Fail(Faults),
}

/// A run that was recorded.
#[derive(Debug, Clone)]
pub struct Run {
    /// What it began with.
    pub image: Image,
    /// What it did.
    pub steps: Vec<Step>,
    /// What the store saw of it.
    pub log: Vec<Event>,
    /// What went wrong although nothing was told to, before any crash.
    pub broken: Option<String>,
    /// How each step ended.
    pub outcomes: Vec<Result<(), ErrorKind>>,
}

/// A disk that a run is done on.
struct Runner<'a> {
    image: &'a Image,
    store: SimStore,
    disk: Option<VmdkDisk>,
    /// What the disk shows now, where that is known.
    shows: Vec<Option<u64>>,
    /// Whether anything may go wrong.
    faulty: bool,
    first_value: u64,
}

/// Does the steps on a disk in a simulated store.
pub fn record(image: &Image, steps: &[Step], first_value: u64) -> Run {
    let store = SimStore::new(&image.files);
    let shows: Vec<_> = image.repaired.iter().map(|&value| Some(value)).collect();
    let mut runner = Runner {
        image,
        store,
        disk: None,
        shows,
        faulty: false,
        first_value,
    };
    let mut outcomes = Vec::new();
    let mut broken = None;
    for (number, step) in steps.iter().enumerate() {
        let outcome = runner.step(number, *step);
        if let Err(e) = &outcome
            && !runner.faulty
            && broken.is_none()
        {
            broken = Some(format!("step {number} {step:?}: {}", e.1));
        }
        outcomes.push(outcome.map_err(|e| e.0));
    }
    if let Err(e) = runner.compare() {
        broken = broken.or(Some(e));
    }
    Run {
        image: image.clone(),
        steps: steps.to_vec(),
        log: runner.store.log(),
        broken,
        outcomes,
    }
}

impl Runner<'_> {
    fn step(&mut self, number: usize, step: Step) -> Outcome {
        if let Step::Fail(faults) = step {
            self.faulty = true;
            self.store.fail(faults);
            return Ok(());
        }
        if matches!(step, Step::Kill) {
            self.kill();
        }
        if self.disk.is_none() {
            self.open()?;
        }
        let Some(writer) = self.disk.as_ref().and_then(|disk| disk.writer()) else {
            return Err((
                ErrorKind::ReadOnly,
                "a disk that was opened for writing has no writer".to_owned(),
            ));
        };
        let value = self.first_value + number as u64;
        match step {
            Step::Write(first, sectors) => {
                let done = write(&self.store, writer, number, (first, sectors, value));
                self.note(first, sectors, value, done)
            }
            Step::Zero(first, sectors, unmap) => {
                let done = zero(&self.store, writer, number, (first, sectors, unmap));
                self.note(first, sectors, 0, done)
            }
            Step::Flush => flushing(&self.store, number, writer, false),
            Step::Close => flushing(&self.store, number, writer, true),
            Step::Reopen => {
                let closed = flushing(&self.store, number, writer, true);
                self.kill();
                self.open()?;
                closed
            }
            Step::Kill | Step::Fail(_) => Ok(()),
        }
    }

    /// Ends the process that has the disk open.
    fn kill(&mut self) {
        self.disk = None;
        self.store.note(Event::Killed);
        self.shows.fill(None);
    }

    /// Opens it, and sees what is there.
    fn open(&mut self) -> Outcome {
        let disk = self.disk.insert(open_writable(&self.store, self.image.top)?);
        match values(disk, self.image.values.len()) {
            Ok(values) => {
                self.shows = values.iter().copied().map(Some).collect();
                self.store.note(Event::Shown(values));
                Ok(())
            }
            Err(_) if self.faulty => Ok(()),
            Err(e) => Err((ErrorKind::Corrupt, e)),
        }
    }

    /// Notes what a request has done to what the disk shows, and reads it.
    fn note(&mut self, first: u64, sectors: u64, value: u64, done: Outcome) -> Outcome {
        let shows = done.is_ok().then_some(value);
        self.shows[first as usize..(first + sectors) as usize].fill(shows);
        done
    }

    /// Compares all that the disk shows, if it is open, with what was written to it.
    fn compare(&self) -> Result<(), String> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let mut sector = [0; 512];
        for (lba, shows) in (0..).zip(&self.shows) {
            let Some(value) = shows else { continue };
            if let Err(e) = disk.read_at(Lba(lba), &mut sector) {
                return if self.faulty {
                    Ok(())
                } else {
                    Err(format!("before any crash: {e}"))
                };
            }
            if sector != fill(lba, *value) {
                let shows = value_of(&sector);
                return Err(format!(
                    "before any crash, sector {lba} holds {shows}, expected value {value}"
                ));
            }
        }
        Ok(())
    }
}

fn write(
    store: &SimStore,
    writer: &dyn BlockWrite,
    ticket: usize,
    (first, sectors, value): (u64, u64, u64),
) -> Outcome {
    let mut data = Vec::new();
    (first..first + sectors).for_each(|lba| data.extend_from_slice(&fill(lba, value)));
    store.mark(Mark::Begin {
        ticket,
        first,
        sectors,
        value,
    });
    let done = writer.write_at(Lba(first), &data);
    store.mark(Mark::End {
        ticket,
        ok: done.is_ok(),
    });
    done.map_err(told)
}

fn zero(
    store: &SimStore,
    writer: &dyn BlockWrite,
    ticket: usize,
    (first, sectors, unmap): (u64, u64, bool),
) -> Outcome {
    store.mark(Mark::Begin {
        ticket,
        first,
        sectors,
        value: 0,
    });
    let done = writer.zero(Lba(first)..Lba(first + sectors), unmap);
    store.mark(Mark::End {
        ticket,
        ok: done.is_ok(),
    });
    done.map_err(told)
}

fn flushing(store: &SimStore, ticket: usize, writer: &dyn BlockWrite, close: bool) -> Outcome {
    store.mark(Mark::FlushBegin { ticket });
    let done = if close { writer.close() } else { writer.flush() };
    store.mark(Mark::FlushEnd {
        ticket,
        ok: done.is_ok(),
    });
    done.map_err(told)
}

/// Several threads write to one disk by chance, and one flushes it.
pub fn record_threads(image: &Image, seed: u64, threads: usize, count: usize) -> Run {
    let store = SimStore::new(&image.files);
    let disk = open_writable(&store, image.top).unwrap_or_else(|e| panic!("{}", e.1));
    let writer = disk.writer().expect("a writer");
    thread::scope(|scope| {
        for thread in 0..threads {
            let (store, steps) = (&store, random_steps(image, seed + thread as u64, count, false));
            scope.spawn(move || {
                for (step, ticket) in steps.into_iter().zip(thread * count..) {
                    let done = match step {
                        Step::Write(first, sectors) => {
                            write(store, writer, ticket, (first, sectors, ticket as u64 + 1))
                        }
                        Step::Zero(first, sectors, unmap) => zero(store, writer, ticket, (first, sectors, unmap)),
                        _ => flushing(store, ticket, writer, false),
                    };
                    done.unwrap_or_else(|e| panic!("{step:?}: {}", e.1));
                }
            });
        }
    });
    drop(disk);
    Run {
        image: image.clone(),
        steps: Vec::new(),
        log: store.log(),
        broken: None,
        outcomes: Vec::new(),
    }
}

/// Steps by chance: mostly around the borders of grains, tables and what was touched before.
pub fn random_steps(image: &Image, seed: u64, count: usize, faults: bool) -> Vec<Step> {
    let mut random = Random::new(seed);
    let sectors = image.values.len() as u64;
    let mut focus = Vec::new();
    let mut steps = Vec::new();
    for _ in 0..count {
        let (first, length) = range(image, sectors, &mut focus, &mut random);
        steps.push(match random.below(if faults { 24 } else { 20 }) {
            0..=9 => Step::Write(first, length),
            10..=11 => Step::Zero(first, length, true),
            12 => Step::Zero(first, length, false),
            13..=16 => Step::Flush,
            17 => Step::Close,
            18 => Step::Reopen,
            19 => Step::Kill,
            _ => Step::Fail(random_faults(&mut random)),
        });
    }
    steps
}

fn range(image: &Image, sectors: u64, focus: &mut Vec<u64>, random: &mut Random) -> (u64, u64) {
    let grain = image.grain;
    let around = match random.below(6) {
        0 => random.below(sectors),
        1 => image.coverage * random.below(3),
        2 => sectors - 1 - random.below(2 * grain),
        3 => grain * random.below(sectors / grain),
        _ if !focus.is_empty() => focus[random.below(focus.len() as u64) as usize],
        _ => random.below(sectors),
    };
    let first = (around + random.below(4))
        .saturating_sub(random.below(4))
        .min(sectors - 1);
    focus.push(first);
    let length = match random.below(5) {
        0 => 1,
        1 => grain - first % grain,
        2 => 1 + random.below(3 * grain),
        3 => grain,
        _ => 1 + random.below(grain),
    };
    (first, length.min(sectors - first))
}

fn random_faults(random: &mut Random) -> Faults {
    let soon = |random: &mut Random| Some(1 + random.below(8));
    let mut faults = Faults::default();
    match random.below(5) {
        0 => faults.room = Some(random.below(6) * 4096),
        1 => faults.change = soon(random),
        2 => faults.sync = soon(random),
        3 => faults.read = soon(random),
        // all is well again
        _ => {}
    }
    faults
}

/// How something ended; with the kind and the words of its error.
pub(super) type Outcome<T = ()> = Result<T, (ErrorKind, String)>;

#[allow(clippy::needless_pass_by_value, reason = "it stands where errors are mapped")]
fn told(e: vmdkfuse::error::Error) -> (ErrorKind, String) {
    (e.kind(), e.to_string())
}

/// Opens a disk of the store for writing.
pub(super) fn open_writable(store: &SimStore, name: &str) -> Outcome<VmdkDisk> {
    let file = store.file(name, Access::Write).map_err(told)?;
    VmdkDisk::open_writable(file, OpenOptions::default()).map_err(told)
}
