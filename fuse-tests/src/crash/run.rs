//! Recorded runs: sequences of operations on a disk in a simulated store.

use std::thread;

use vmdkfuse::block::{BlockRead, BlockWrite, Lba};
use vmdkfuse::error::ErrorKind;
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

use super::images::Image;
use super::oracle::{fill, value_of, values};
use super::store::{DiskEvent, Event, Faults, SimStore};
use crate::make::model::Random;

/// One operation of a run.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// Writes a new value to sectors: the first sector, the number of sectors.
    Write(u64, u64),
    /// Zeroes sectors: the first sector, the number of sectors, and true to make holes.
    Zero(u64, u64, bool),
    /// Flushes the disk.
    Flush,
    /// Flushes the disk and marks it clean; a later write marks it as in use again.
    Close,
    /// Closes the disk and opens it again.
    Reopen,
    /// Kills the process, but not the machine, without a close; then opens the disk again.
    Kill,
    /// Injects these faults from now on.
    Fail(Faults),
}

/// A recorded run.
#[derive(Debug, Clone)]
pub struct Run {
    /// The image at the start.
    pub image: Image,
    /// The operations of the run.
    pub steps: Vec<Step>,
    /// The log of the store.
    pub log: Vec<Event>,
    /// The first failure that no injected fault explains, before any crash.
    pub broken: Option<String>,
    /// The result of each step.
    pub outcomes: Vec<Result<(), ErrorKind>>,
}

/// A run while it is being recorded.
struct Runner<'a> {
    image: &'a Image,
    store: SimStore,
    disk: Option<VmdkDisk>,
    /// The value that each sector should read as now, where that is known.
    expected: Vec<Option<u64>>,
    /// True once faults were injected.
    faulty: bool,
    first_value: u64,
}

/// Runs the steps on a disk in a simulated store and records them. Step `n` writes the value `first_value + n`.
pub fn record(image: &Image, steps: &[Step], first_value: u64) -> Run {
    let store = SimStore::new(&image.files);
    let expected: Vec<_> = image.repaired.iter().map(|&value| Some(value)).collect();
    let mut runner = Runner {
        image,
        store,
        disk: None,
        expected,
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
                self.expect(first, sectors, value, done)
            }
            Step::Zero(first, sectors, unmap) => {
                let done = zero(&self.store, writer, number, (first, sectors, unmap));
                self.expect(first, sectors, 0, done)
            }
            Step::Flush => flush(&self.store, number, writer, false),
            Step::Close => flush(&self.store, number, writer, true),
            Step::Reopen => {
                let closed = flush(&self.store, number, writer, true);
                self.kill();
                self.open()?;
                closed
            }
            Step::Kill | Step::Fail(_) => Ok(()),
        }
    }

    /// Drops the disk without a close, as the end of the process would.
    fn kill(&mut self) {
        self.disk = None;
        self.store.log_event(Event::Killed);
        self.expected.fill(None);
    }

    /// Opens the disk for writing and logs the values that it holds.
    fn open(&mut self) -> Outcome {
        let disk = self.disk.insert(open_writable(&self.store, self.image.top)?);
        match values(disk, self.image.values.len()) {
            Ok(values) => {
                self.expected = values.iter().copied().map(Some).collect();
                self.store.log_event(Event::Observed(values));
                Ok(())
            }
            Err(_) if self.faulty => Ok(()),
            Err(e) => Err((ErrorKind::Corrupt, e)),
        }
    }

    /// Updates the expected values after a request; a failed request leaves them unknown.
    fn expect(&mut self, first: u64, sectors: u64, value: u64, done: Outcome) -> Outcome {
        let expected = done.is_ok().then_some(value);
        self.expected[first as usize..(first + sectors) as usize].fill(expected);
        done
    }

    /// Compares the content of the disk, if it is open, with the expected values.
    fn compare(&self) -> Result<(), String> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let mut sector = [0; 512];
        for (lba, expected) in (0..).zip(&self.expected) {
            let Some(value) = expected else { continue };
            if let Err(e) = disk.read_at(Lba(lba), &mut sector) {
                return if self.faulty {
                    Ok(())
                } else {
                    Err(format!("before any crash: {e}"))
                };
            }
            if sector != fill(lba, *value) {
                let found = value_of(&sector);
                return Err(format!(
                    "before any crash, sector {lba} holds {found}, expected value {value}"
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
    store.log_disk_event(DiskEvent::Begin {
        ticket,
        first,
        sectors,
        value,
    });
    let done = writer.write_at(Lba(first), &data);
    store.log_disk_event(DiskEvent::End {
        ticket,
        ok: done.is_ok(),
    });
    done.map_err(error_parts)
}

fn zero(
    store: &SimStore,
    writer: &dyn BlockWrite,
    ticket: usize,
    (first, sectors, unmap): (u64, u64, bool),
) -> Outcome {
    store.log_disk_event(DiskEvent::Begin {
        ticket,
        first,
        sectors,
        value: 0,
    });
    let done = writer.zero(Lba(first)..Lba(first + sectors), unmap);
    store.log_disk_event(DiskEvent::End {
        ticket,
        ok: done.is_ok(),
    });
    done.map_err(error_parts)
}

fn flush(store: &SimStore, ticket: usize, writer: &dyn BlockWrite, close: bool) -> Outcome {
    store.log_disk_event(DiskEvent::FlushBegin { ticket });
    let done = if close { writer.close() } else { writer.flush() };
    store.log_disk_event(DiskEvent::FlushEnd {
        ticket,
        ok: done.is_ok(),
    });
    done.map_err(error_parts)
}

/// Records random writes, zeroes and flushes of several threads on one disk.
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
                        _ => flush(store, ticket, writer, false),
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

/// Creates random steps, most of them near the boundaries of grains, of tables and of earlier requests.
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
        0 => faults.free_bytes = Some(random.below(6) * 4096),
        1 => faults.change = soon(random),
        2 => faults.sync = soon(random),
        3 => faults.read = soon(random),
        // No fault: everything works again.
        _ => {}
    }
    faults
}

/// A result whose error is its kind and its text.
pub(super) type Outcome<T = ()> = Result<T, (ErrorKind, String)>;

#[allow(clippy::needless_pass_by_value, reason = "passed to map_err")]
fn error_parts(e: vmdkfuse::error::Error) -> (ErrorKind, String) {
    (e.kind(), e.to_string())
}

/// Opens the disk called `name` in the store for writing.
pub(super) fn open_writable(store: &SimStore, name: &str) -> Outcome<VmdkDisk> {
    let file = store.file(name, Access::Write).map_err(error_parts)?;
    VmdkDisk::open_writable(file, OpenOptions::default()).map_err(error_parts)
}
