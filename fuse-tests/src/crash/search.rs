//! Search through the crash states of a run.

use std::fmt;
use std::time::{Duration, Instant};

use super::images::Image;
use super::mutation::Mutation;
use super::oracle::{Oracle, values};
use super::recovery_check::{check_crash, open};
use super::replay::{Crash, Machine, Style};
use super::run::{Run, Step, open_writable, random_steps, record};
use super::store::{Event, SimStore};
use crate::make::model::Random;

/// Extent of a search.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Number of random crashes at each position of the log.
    pub random: u64,
    /// Tries all subsets at positions with at most this many atoms.
    pub exhaustive: u64,
    /// Lets qemu-img check one in this many crash states, chosen at random; 0: none.
    pub qemu: u64,
    /// Continues one in this many crash states with another run, which is searched too; 0: none.
    pub nested: u64,
    /// Seed of all random decisions.
    pub seed: u64,
}

/// Statistics and result of a search.
#[derive(Debug, Default)]
pub struct Report {
    /// Positions in logs at which crashes were created.
    pub positions: u64,
    /// Crash states that were opened and checked.
    pub states: u64,
    /// Number of those that came from positions where every subset was tried.
    pub exhaustive: u64,
    /// Number of those that qemu-img checked as well.
    pub qemu: u64,
    /// Runs that continued from a crash state.
    pub nested: u64,
    /// The first violation found.
    pub violation: Option<Violation>,
}

/// A violation, with all that is needed to reproduce it.
#[derive(Debug)]
pub struct Violation {
    /// Description of the violation.
    pub description: String,
    /// Steps of the run.
    pub steps: Vec<Step>,
    /// Position in its log.
    pub position: usize,
    /// The last events before that position, at most 25.
    pub before: Vec<Event>,
    /// The changes that were not durable there.
    pub pending: Vec<String>,
    /// Which of them the crash kept.
    pub style: Style,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}\nrun: {:?}\ncrash at event {}, {:?}; before it:",
            self.description, self.steps, self.position, self.style
        )?;
        for event in &self.before {
            match event {
                Event::Observed(_) => writeln!(f, "  opened again")?,
                event => writeln!(f, "  {event:?}")?,
            }
        }
        writeln!(f, "not durable there:")?;
        self.pending.iter().try_for_each(|op| writeln!(f, "  {op}"))
    }
}

impl Report {
    /// Adds the statistics of another search; keeps the earlier violation.
    pub fn add(&mut self, other: Report) {
        self.positions += other.positions;
        self.states += other.states;
        self.exhaustive += other.exhaustive;
        self.qemu += other.qemu;
        self.nested += other.nested;
        self.violation = self.violation.take().or(other.violation);
    }
}

/// First value that a run writes. A run that continues after a crash adds to it, so that values stay distinct.
const FIRST: u64 = 1;

/// Creates crash states at every position in the log of `run`, and checks each of them.
pub fn search(run: &Run, effort: Effort) -> Report {
    search_deep(run, effort, 0)
}

fn search_deep(run: &Run, effort: Effort, depth: u64) -> Report {
    let mut report = Report::default();
    let mut random = Random::new(effort.seed);
    let mut machine = Machine::new(&run.image.files);
    let mut oracle = Oracle::new(&run.image.values, &run.image.repaired);
    let start = oracle.clone();
    if let Some(description) = &run.broken {
        report.violation = Some(violation(description, run, run.log.len(), &machine, Style::All));
        return report;
    }
    for position in 0..=run.log.len() {
        report.positions += 1;
        let exhaustive = machine.atoms() <= effort.exhaustive;
        for style in styles(&machine, effort, exhaustive, &mut random) {
            report.states += 1;
            report.exhaustive += u64::from(exhaustive);
            let crash = machine.crash(style);
            let one_of = |n: u64, random: &mut Random| n > 0 && random.below(n) == 0;
            let qemu = one_of(effort.qemu, &mut random);
            report.qemu += u64::from(qemu);
            let mut outcome = check_crash(&run.image, &crash, &oracle, &start, qemu);
            if outcome.is_ok() && depth < 2 && one_of(effort.nested, &mut random) {
                report.nested += 1;
                outcome = continue_after_crash(&run.image, &crash, effort, depth, random.next(), &mut report);
            }
            if let Err(description) = outcome {
                report.violation = Some(violation(&description, run, position, &machine, style));
                return report;
            }
        }
        if let Some(event) = run.log.get(position) {
            machine.step(event);
            oracle.step(event);
        }
    }
    report
}

/// Chooses the crashes to create at a position.
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
    let randoms = (0..effort.random).map(|_| Style::Random(random.next()));
    [Style::All, Style::Nothing].into_iter().chain(randoms).collect()
}

fn violation(description: &str, run: &Run, position: usize, machine: &Machine, style: Style) -> Violation {
    Violation {
        description: format!("{:?}: {description}", run.image.kind),
        steps: run.steps.clone(),
        position,
        before: run.log[position.saturating_sub(25)..position].to_vec(),
        pending: machine.pending(),
        style,
    }
}

/// Records another run on a crash state, and searches its crash states.
fn continue_after_crash(
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
    let crash_image = Image {
        files: crash.files.clone(),
        values: before.to_vec(),
        repaired,
        ..image.clone()
    };
    let mut steps = random_steps(&crash_image, seed, 6, false);
    steps.insert(0, Step::Kill);
    let run = record(&crash_image, &steps, FIRST + 0x1000 * (depth + 1));
    let effort = Effort {
        random: 3,
        exhaustive: effort.exhaustive.min(3),
        seed,
        ..effort
    };
    let mut nested = search_deep(&run, effort, depth + 1);
    let violation = nested.violation.take();
    report.add(nested);
    violation.map_or(Ok(()), |violation| {
        Err(format!("in a run after the crash: {violation}"))
    })
}

/// Shortens a run that violates: leaves out single steps as long as any violation remains. Stops after 60 seconds and
/// returns the violation of the shortest run, or `None` if `steps` do not violate at all.
pub fn shrink(image: &Image, steps: &[Step], effort: Effort, mutation: Option<Mutation>) -> Option<Violation> {
    let until = Instant::now() + Duration::from_secs(60);
    let violation_of = |steps: &[Step]| {
        let mut run = record(image, steps, FIRST);
        if let Some(mutation) = mutation {
            run.log = mutation.apply(image, &run.log);
        }
        search(&run, effort).violation
    };
    let mut steps = steps.to_vec();
    let mut found = violation_of(&steps)?;
    let mut shorter = true;
    while shorter && Instant::now() < until {
        shorter = false;
        for omitted in (0..steps.len()).rev() {
            let mut fewer = steps.clone();
            fewer.remove(omitted);
            if let Some(violation) = violation_of(&fewer) {
                (steps, found, shorter) = (fewer, violation, true);
            }
        }
    }
    Some(found)
}
