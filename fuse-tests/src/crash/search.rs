//! Runs of disk operations, and the search through all that crashes may leave of them.

use std::fmt;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use vmdkfuse::block::{BlockRead, BlockWrite, Lba};
use vmdkfuse::error::ErrorKind;
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk, check};

use super::bytes::Bytes;
use super::images::Image;
use super::judge::{Judge, fill, values};
use super::replay::{Crash, Machine, Style};
use super::store::{Event, Faults, Mark, SimStore};
use crate::harness::Cmd;
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

/// How much is searched.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Random crashes of each place.
    pub random: u64,
    /// All subsets where there are at most so many atoms.
    pub exhaustive: u64,
    /// One of so many states is shown to qemu-img; 0: none.
    pub qemu: u64,
    /// One of so many states goes on with a run of its own, which is searched as well; 0: none.
    pub nested: u64,
    /// For all random decisions.
    pub seed: u64,
}

/// What a search has done.
#[derive(Debug, Default)]
pub struct Report {
    /// Places in logs at which it crashed.
    pub places: u64,
    /// What crashes left, opened and judged.
    pub states: u64,
    /// How many of those came of places where every subset was tried.
    pub exhaustive: u64,
    /// How many qemu-img has seen as well.
    pub qemu: u64,
    /// Runs that went on from what a crash had left.
    pub nested: u64,
    /// The first thing that was wrong.
    pub violation: Option<Violation>,
}

/// What is wrong, and how to see it again.
#[derive(Debug)]
pub struct Violation {
    /// What is wrong.
    pub what: String,
    /// The run.
    pub steps: Vec<Step>,
    /// The place in its log.
    pub place: usize,
    /// The events before it.
    pub before: Vec<Event>,
    /// What was not durable there.
    pub pending: Vec<String>,
    /// What was kept of it.
    pub style: Style,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}\nrun: {:?}\ncrash at event {}, {:?}; before it:",
            self.what, self.steps, self.place, self.style
        )?;
        for event in &self.before {
            match event {
                Event::Shown(_) => writeln!(f, "  opened again")?,
                event => writeln!(f, "  {event:?}")?,
            }
        }
        writeln!(f, "not durable there:")?;
        self.pending.iter().try_for_each(|op| writeln!(f, "  {op}"))
    }
}

impl Report {
    /// Adds what another search has done.
    pub fn add(&mut self, other: Report) {
        self.places += other.places;
        self.states += other.states;
        self.exhaustive += other.exhaustive;
        self.qemu += other.qemu;
        self.nested += other.nested;
        self.violation = self.violation.take().or(other.violation);
    }
}

/// Values of writes start here; a run that goes on from another takes others.
const FIRST: u64 = 1;

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
    let mut runner = Runner { image, store, disk: None, shows, faulty: false, first_value };
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
    Run { image: image.clone(), steps: steps.to_vec(), log: runner.store.log(), broken, outcomes }
}

type Outcome = Result<(), (ErrorKind, String)>;

#[allow(clippy::needless_pass_by_value, reason = "it stands where errors are mapped")]
fn told(e: vmdkfuse::error::Error) -> (ErrorKind, String) {
    (e.kind(), e.to_string())
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
            return Err((ErrorKind::ReadOnly, "a disk that was opened for writing has no writer".to_owned()));
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
                return if self.faulty { Ok(()) } else { Err(format!("before any crash: {e}")) };
            }
            if sector != fill(lba, *value) {
                let shows = super::value_of(&sector);
                return Err(format!("before any crash, sector {lba} holds {shows}, expected value {value}"));
            }
        }
        Ok(())
    }
}

fn open_writable(store: &SimStore, name: &str) -> Result<VmdkDisk, (ErrorKind, String)> {
    let file = store.file(name, Access::Write).map_err(told)?;
    VmdkDisk::open_writable(file, OpenOptions::default()).map_err(told)
}

fn write(
    store: &SimStore,
    writer: &dyn BlockWrite,
    ticket: usize,
    (first, sectors, value): (u64, u64, u64),
) -> Outcome {
    let mut data = Vec::new();
    (first..first + sectors).for_each(|lba| data.extend_from_slice(&fill(lba, value)));
    store.mark(Mark::Begin { ticket, first, sectors, value });
    let done = writer.write_at(Lba(first), &data);
    store.mark(Mark::End { ticket, ok: done.is_ok() });
    done.map_err(told)
}

fn zero(
    store: &SimStore,
    writer: &dyn BlockWrite,
    ticket: usize,
    (first, sectors, unmap): (u64, u64, bool),
) -> Outcome {
    store.mark(Mark::Begin { ticket, first, sectors, value: 0 });
    let done = writer.zero(Lba(first)..Lba(first + sectors), unmap);
    store.mark(Mark::End { ticket, ok: done.is_ok() });
    done.map_err(told)
}

fn flushing(store: &SimStore, ticket: usize, writer: &dyn BlockWrite, close: bool) -> Outcome {
    store.mark(Mark::FlushBegin { ticket });
    let done = if close { writer.close() } else { writer.flush() };
    store.mark(Mark::FlushEnd { ticket, ok: done.is_ok() });
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
    Run { image: image.clone(), steps: Vec::new(), log: store.log(), broken: None, outcomes: Vec::new() }
}

/// Crashes everywhere in the log of `run`, and judges what is left.
pub fn search(run: &Run, effort: Effort) -> Report {
    search_deep(run, effort, 0)
}

fn search_deep(run: &Run, effort: Effort, depth: u64) -> Report {
    let mut report = Report::default();
    let mut random = Random::new(effort.seed);
    let mut machine = Machine::new(&run.image.files);
    let mut judge = Judge::new(&run.image.values, &run.image.repaired);
    let start = judge.clone();
    if let Some(what) = &run.broken {
        report.violation = Some(violation(what, run, run.log.len(), &machine, Style::All));
        return report;
    }
    for place in 0..=run.log.len() {
        report.places += 1;
        let exhaustive = machine.atoms() <= effort.exhaustive;
        for style in styles(&machine, effort, exhaustive, &mut random) {
            report.states += 1;
            report.exhaustive += u64::from(exhaustive);
            let crash = machine.crash(style);
            let one_of = |n: u64, random: &mut Random| n > 0 && random.below(n) == 0;
            let qemu = one_of(effort.qemu, &mut random);
            report.qemu += u64::from(qemu);
            let mut judged = judge_crash(&run.image, &crash, &judge, &start, qemu);
            if judged.is_ok() && depth < 2 && one_of(effort.nested, &mut random) {
                report.nested += 1;
                judged = go_on(&run.image, &crash, effort, depth, random.next(), &mut report);
            }
            if let Err(what) = judged {
                report.violation = Some(violation(&what, run, place, &machine, style));
                return report;
            }
        }
        if let Some(event) = run.log.get(place) {
            machine.step(event);
            judge.step(event);
        }
    }
    report
}

/// What is kept at a place.
fn styles(machine: &Machine, effort: Effort, exhaustive: bool, random: &mut Random) -> Vec<Style> {
    if machine.atoms() == 0 {
        return vec![Style::Nothing];
    }
    if exhaustive {
        let all = 0..1 << machine.atoms();
        return all.flat_map(|bits| [Style::Exactly(bits, false), Style::Exactly(bits, true)]).collect();
    }
    let chances = (0..effort.random).map(|_| Style::Random(random.next()));
    [Style::All, Style::Nothing].into_iter().chain(chances).collect()
}

fn violation(what: &str, run: &Run, place: usize, machine: &Machine, style: Style) -> Violation {
    Violation {
        what: format!("{:?}: {what}", run.image.kind),
        steps: run.steps.clone(),
        place,
        before: run.log[place.saturating_sub(25)..place].to_vec(),
        pending: machine.pending(),
        style,
    }
}

/// Another run on what a crash has left, with crashes of its own.
fn go_on(
    image: &Image,
    crash: &Crash,
    effort: Effort,
    depth: u64,
    seed: u64,
    report: &mut Report,
) -> Result<(), String> {
    let sectors = image.values.len();
    let before = values(&open(&SimStore::new(&crash.files), image.top)?, sectors)?;
    let repaired = open_writable(&SimStore::new(&crash.files), image.top).map_err(|e| e.1)?;
    let repaired = values(&repaired, sectors)?.to_vec();
    let left = Image { files: crash.files.clone(), values: before.to_vec(), repaired, ..image.clone() };
    let mut steps = random_steps(&left, seed, 6, false);
    steps.insert(0, Step::Kill);
    let run = record(&left, &steps, FIRST + 0x1000 * (depth + 1));
    let effort = Effort { random: 3, exhaustive: effort.exhaustive.min(3), seed, ..effort };
    let below = search_deep(&run, effort, depth + 1);
    report.states += below.states;
    report.places += below.places;
    report.exhaustive += below.exhaustive;
    report.qemu += below.qemu;
    report.nested += below.nested;
    below.violation.map_or(Ok(()), |violation| Err(format!("in a run after the crash: {violation}")))
}

fn open(store: &SimStore, name: &str) -> Result<VmdkDisk, String> {
    let file = store.file(name, Access::Read).map_err(|e| e.to_string())?;
    VmdkDisk::open(file, OpenOptions::default()).map_err(|e| format!("opening what is left: {e}"))
}

/// Judges what a crash has left: as it is, while it is opened for writing, and after that.
/// `start` knows what was there before the run.
fn judge_crash(image: &Image, crash: &Crash, judge: &Judge, start: &Judge, qemu: bool) -> Result<(), String> {
    let store = SimStore::new(&crash.files);
    {
        let disk = open(&store, image.top)?;
        let unfinished = sound(&disk, false)?;
        judge.verify(&disk)?;
        same_cid_same_content(image, crash, start, &disk)?;
        if qemu {
            // qemu knows the primary tables only: old where we say new
            show_qemu(image, &crash.files, &disk, !unfinished).map_err(|e| format!("before a repair: {e}"))?;
        }
    }
    {
        let disk = open_writable(&store, image.top).map_err(|e| format!("opening it for writing: {}", e.1))?;
        judge.verify(&disk).map_err(|e| format!("opened for writing: {e}"))?;
        let writer = disk.writer().ok_or("it has no writer")?;
        writer.close().map_err(|e| format!("closing it: {e}"))?;
    }
    let disk = open(&store, image.top).map_err(|e| format!("after a repair: {e}"))?;
    sound(&disk, true).map_err(|e| format!("after a repair: {e}"))?;
    judge.verify(&disk).map_err(|e| format!("after a repair: {e}"))?;
    let left = store.files();
    for parent in &image.parents {
        let bytes = |files: &[(String, Bytes)]| files.iter().find(|(name, _)| name == parent).cloned();
        if bytes(&left) != bytes(&image.files) {
            return Err(format!("the parent {parent} was written to"));
        }
    }
    if qemu {
        show_qemu(image, &left, &disk, true).map_err(|e| format!("after a repair: {e}"))?;
    }
    Ok(())
}

/// Errors where the tables are not sound; leaked grains are no fault. Whether there are entries in one table only, which
/// must not be once it was closed.
fn sound(disk: &VmdkDisk, closed: bool) -> Result<bool, String> {
    let report = check(disk);
    if let Some(error) = report.errors.first() {
        return Err(format!("--check: {error}"));
    }
    if closed && report.unfinished > 0 {
        return Err(format!("--check: {} entries are in one table only", report.unfinished));
    }
    match disk.unclean_files().next() {
        Some(file) if closed => Err(format!("{file} is marked as in use, but was closed")),
        _ => Ok(report.unfinished > 0),
    }
}

/// Who remembers the CID of the start must find the content of the start.
fn same_cid_same_content(image: &Image, crash: &Crash, start: &Judge, disk: &VmdkDisk) -> Result<(), String> {
    let cid = |files: &[(String, Bytes)]| {
        let (_, bytes) = files.iter().find(|(name, _)| name == image.top).expect("the file");
        let mut head = vec![0; bytes.len().min(8192) as usize];
        assert!(bytes.read(0, &mut head));
        let text = String::from_utf8_lossy(&head).into_owned();
        text.lines().find_map(|line| line.strip_prefix("CID=").map(str::to_owned)).expect("a CID")
    };
    if cid(&crash.files) != cid(&image.files) {
        return Ok(());
    }
    start.verify(disk).map_err(|e| format!("the content has changed, the CID has not: {e}"))
}

/// qemu-img finds no fault, and (`same`) reads the same.
fn show_qemu(image: &Image, files: &[(String, Bytes)], disk: &VmdkDisk, same: bool) -> Result<(), String> {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes.to_vec()).expect("a file");
    }
    let mut raw = vec![0; disk.geometry().bytes() as usize];
    disk.read_at(Lba(0), &mut raw).map_err(|e| e.to_string())?;
    fs::write(dir.path().join("expected.raw"), raw).expect("a file");
    let check = &["check", "-q", "-f", "vmdk", image.top][..];
    let compare = &["compare", "-q", "-f", "raw", "-F", "vmdk", "expected.raw", image.top];
    for words in [Some(check), same.then_some(compare)].into_iter().flatten() {
        let outcome = Cmd::new("qemu-img").args(words).dir(dir.path()).run();
        if outcome.ended.code != Some(0) {
            return Err(outcome.to_string());
        }
    }
    Ok(())
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
    let first = (around + random.below(4)).saturating_sub(random.below(4)).min(sectors - 1);
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

/// The same violation, or another one, with as few steps as leaving out single ones gets to. Gives up after a while.
pub fn shrink(image: &Image, steps: &[Step], effort: Effort, sabotage: Option<super::Sabotage>) -> Option<Violation> {
    let until = Instant::now() + Duration::from_secs(60);
    let fails = |steps: &[Step]| {
        let mut run = record(image, steps, FIRST);
        if let Some(sabotage) = sabotage {
            run.log = sabotage.apply(image, &run.log);
        }
        search(&run, effort).violation
    };
    let mut steps = steps.to_vec();
    let mut found = fails(&steps)?;
    let mut shorter = true;
    while shorter && Instant::now() < until {
        shorter = false;
        for left_out in (0..steps.len()).rev() {
            let mut fewer = steps.clone();
            fewer.remove(left_out);
            if let Some(violation) = fails(&fewer) {
                (steps, found, shorter) = (fewer, violation, true);
            }
        }
    }
    Some(found)
}
