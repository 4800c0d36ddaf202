//! Many images in one test: all are tried, and the failed ones are reported together.
//!
//! [`each`] runs one check for every item on a few threads. [`open_hostile`] mounts an image that must not be trusted,
//! with bounded memory and time, and reports whether the program refused it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::cmd::Outcome;
use super::mount::Mount;
use super::scratch::Scratch;

/// Threads of one test. A small number, since other tests run at the same time.
const THREADS: usize = 2;

/// Limit on the private memory of the program, in bytes: a hostile image must not make it allocate more.
const MEMORY: u64 = 128 << 20;

/// Deadline for the program's answer to a hostile image. It only ends a hang; speed is measured elsewhere.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `check` for every item, continues after a failure, and panics at the end with the names of all failed items.
///
/// A check fails by a panic, whose message is reported. An empty list of items fails as well.
#[track_caller]
pub fn each<T: Sync>(items: &[T], name: impl Fn(&T) -> String + Sync, check: impl Fn(&T) + Sync) {
    let failed = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(item))) {
                // The payload of a panic with format arguments is a `String`, without them a `&str`.
                let message = panic.downcast_ref::<String>().cloned();
                let message = message.or_else(|| panic.downcast_ref::<&str>().map(|message| (*message).to_owned()));
                failed
                    .lock()
                    .expect("the list")
                    .push(format!("{}: {}", name(item), message.unwrap_or_default()));
            }
        }
    };
    thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(work))));
    let failed = failed.into_inner().expect("the list");
    let (bad, all) = (failed.len(), items.len());
    assert!(failed.is_empty(), "{bad} of {all} failed:\n\n{}", failed.join("\n\n"));
    assert!(all > 0, "no item to check");
}

/// Reaction of the program to a hostile image.
#[derive(Debug)]
pub enum Answer {
    /// The program refused the image: exit status 1, one line of error, no mount left.
    Refused(Outcome),
    /// The program mounted the image; the path is that of the raw file. Dropping the answer unmounts it.
    Mounted(Box<Mount>, PathBuf),
}

impl Answer {
    /// Panics with `why` unless the program refused the image.
    #[track_caller]
    pub fn refused(self, why: &str) -> Outcome {
        match self {
            Answer::Refused(outcome) => outcome,
            Answer::Mounted(..) => panic!("mounted, but: {why}"),
        }
    }
}

/// Mounts a hostile image at a mount point `mnt-NAME` of its own, with bounded memory and time.
///
/// Panics if a refusal is not one line of error, or leaves a mount.
#[track_caller]
pub fn open_hostile(scratch: &Scratch, name: &str, image: &Path, allow: &[PathBuf]) -> Answer {
    let point = format!("mnt-{name}");
    scratch.mkdir(&point);
    let mut command = scratch
        .mount()
        .at(&point)
        .memory(MEMORY)
        .deadline(DEADLINE)
        .file(image)
        .arg("name=disk")
        .arg("-r");
    for dir in allow {
        command = command.arg(format!("allow-dir={}", dir.display()));
    }
    match command.try_start() {
        Ok(mount) => {
            let path = mount.file("disk");
            Answer::Mounted(Box::new(mount), path)
        }
        Err(outcome) => {
            let left = super::mounts::mounts_below(&scratch.path(&point));
            assert!(left.is_empty(), "refused, but left a mount: {outcome}");
            let outcome = outcome.one_error(1, &[]);
            let line = outcome.stderr.trim();
            assert!(
                line.len() < 1000,
                "the error line is too long, it has {} bytes: {:.300}",
                line.len(),
                line
            );
            Answer::Refused(outcome)
        }
    }
}
