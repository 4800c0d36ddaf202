//! Many images in one test: all are tried, and those that failed are named together.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::cmd::Outcome;
use super::mount::Mount;
use super::scratch::Scratch;

/// Threads that work on the images of one test: other tests run beside it.
const THREADS: usize = 2;

/// The most memory of its own that the program may take for an image that wants more than it should get.
const MEMORY: u64 = 128 << 20;

/// The most time for the answer to such an image. It is far above what is expected; speed is measured elsewhere.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `check` for every item, also after one has failed, and panics with the names of those that did.
#[track_caller]
pub fn each<T: Sync>(items: &[T], name: impl Fn(&T) -> String + Sync, check: impl Fn(&T) + Sync) {
    let failed = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(item))) {
                let said = panic.downcast_ref::<String>().cloned();
                let said = said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned()));
                failed
                    .lock()
                    .expect("the list")
                    .push(format!("{}: {}", name(item), said.unwrap_or_default()));
            }
        }
    };
    thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(work))));
    let failed = failed.into_inner().expect("the list");
    let (bad, all) = (failed.len(), items.len());
    assert!(failed.is_empty(), "{bad} of {all} failed:\n\n{}", failed.join("\n\n"));
    assert!(all > 0, "there was nothing to try");
}

/// What the program did with an image that nobody should trust.
#[derive(Debug)]
pub enum Answer {
    /// It refused: status 1, one clear line, nothing left behind.
    Refused(Outcome),
    /// It mounted; the path is that of the raw file. The mount goes with the answer.
    Mounted(Box<Mount>, PathBuf),
}

impl Answer {
    /// Panics unless it refused.
    #[track_caller]
    pub fn refused(self, why: &str) -> Outcome {
        match self {
            Answer::Refused(outcome) => outcome,
            Answer::Mounted(..) => panic!("mounted, but: {why}"),
        }
    }
}

/// Opens a hostile image, at the mount point `name` of its own, with bounded memory and time.
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
                "the error is no clear line, it has {} bytes: {:.300}",
                line.len(),
                line
            );
            Answer::Refused(outcome)
        }
    }
}
