//! The search through all that crashes may leave of a run.

use std::fmt;
use std::time::{Duration, Instant};

use super::images::Image;
use super::mutation::Mutation;
use super::oracle::{Oracle, values};
use super::recovery_check::{judge_crash, open};
use super::replay::{Crash, Machine, Style};
use super::run::{Run, Step, open_writable, random_steps, record};
use super::store::{Event, SimStore};
use crate::make::model::Random;

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

/// Crashes everywhere in the log of `run`, and judges what is left.
pub fn search(run: &Run, effort: Effort) -> Report {
    search_deep(run, effort, 0)
}

fn search_deep(run: &Run, effort: Effort, depth: u64) -> Report {
    let mut report = Report::default();
    let mut random = Random::new(effort.seed);
    let mut machine = Machine::new(&run.image.files);
    let mut oracle = Oracle::new(&run.image.values, &run.image.repaired);
    let start = oracle.clone();
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
            let mut judged = judge_crash(&run.image, &crash, &oracle, &start, qemu);
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
            oracle.step(event);
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
        return all
            .flat_map(|bits| [Style::Exactly(bits, false), Style::Exactly(bits, true)])
            .collect();
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
    let left = Image {
        files: crash.files.clone(),
        values: before.to_vec(),
        repaired,
        ..image.clone()
    };
    let mut steps = random_steps(&left, seed, 6, false);
    steps.insert(0, Step::Kill);
    let run = record(&left, &steps, FIRST + 0x1000 * (depth + 1));
    let effort = Effort {
        random: 3,
        exhaustive: effort.exhaustive.min(3),
        seed,
        ..effort
    };
    let mut below = search_deep(&run, effort, depth + 1);
    let violation = below.violation.take();
    report.add(below);
    violation.map_or(Ok(()), |violation| {
        Err(format!("in a run after the crash: {violation}"))
    })
}

/// The same violation, or another one, with as few steps as leaving out single ones gets to. Gives up after a while.
pub fn shrink(image: &Image, steps: &[Step], effort: Effort, mutation: Option<Mutation>) -> Option<Violation> {
    let until = Instant::now() + Duration::from_secs(60);
    let fails = |steps: &[Step]| {
        let mut run = record(image, steps, FIRST);
        if let Some(mutation) = mutation {
            run.log = mutation.apply(image, &run.log);
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
