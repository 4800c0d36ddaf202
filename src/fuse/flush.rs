//! Flushes: one at a time for a disk, shared by all who wait, and never on the last event loop.
//!
//! ```text
//!   fsync, close, O_SYNC ─► one under way? ─ yes ─► joins those that the next one is for
//!                              │ no
//!                              ├─ a loop can be spared ─► here: no hop between threads
//!                              └─ else                 ─► a thread of its own
//!                              ▼
//!                           flush ─► answers ─► somebody joined meanwhile? ─► flush again
//! ```
//! A flush may take seconds, and requests of all disks wait for the loops, so at least one loop is kept free of
//! flushes. Whoever comes while a flush runs can't share it (it may have begun before his write), but all who do so
//! share the next one. So there are never more threads than disks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;

/// Gives somebody the result of the flush that he waits for.
pub(super) type Answer = Box<dyn FnOnce(&Result<()>) + Send>;

/// How many event loops more may be busy with flushes.
#[derive(Debug)]
pub(super) struct Spare(AtomicUsize);

/// A loop that is busy with a flush, until it is dropped.
struct Taken<'a>(&'a Spare);

impl Spare {
    /// All of `loops` but one.
    pub(super) fn of(loops: usize) -> Self {
        Self(AtomicUsize::new(loops.saturating_sub(1)))
    }

    fn take(&self) -> Option<Taken<'_>> {
        let taken = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        taken.is_ok().then_some(Taken(self))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// The flushes of a disk.
#[derive(Default)]
pub(super) struct Flushes(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    running: bool,
    /// Who came since the one that runs was begun.
    joined: Vec<Answer>,
}

impl std::fmt::Debug for Flushes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue();
        f.debug_struct("Flushes").field("running", &queue.running).field("joined", &queue.joined.len()).finish()
    }
}

impl Flushes {
    /// Flushes `image`, and answers when everything that was written to it before is durable. Returns at once where
    /// somebody else does the work.
    pub(super) fn flush(self: &Arc<Self>, image: &Arc<Image>, spare: &Spare, answer: Answer) {
        {
            let mut queue = self.queue();
            if queue.running {
                return queue.joined.push(answer);
            }
            queue.running = true;
        }
        if let Some(_busy) = spare.take() {
            return self.work(image, answer);
        }
        // shared with the thread, so that it is not lost where there is none to be had
        let first = Arc::new(Mutex::new(Some(answer)));
        let (this, theirs, its_image) = (Arc::clone(self), Arc::clone(&first), Arc::clone(image));
        let begun = std::thread::Builder::new().name("flush".to_owned()).spawn(move || {
            if let Some(answer) = take(&theirs) {
                this.work(&its_image, answer);
            }
        });
        if begun.is_err()
            && let Some(answer) = take(&first)
        {
            self.work(image, answer);
        }
    }

    /// Flushes for `first`, and for those who join until nobody does.
    fn work(&self, image: &Image, first: Answer) {
        let mut answers = vec![first];
        while !answers.is_empty() {
            let result = catch_unwind(AssertUnwindSafe(|| image.flush()))
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Os(libc::EIO), "a flush was given up after a panic")));
            for answer in answers {
                answer(&result);
            }
            let mut queue = self.queue();
            answers = std::mem::take(&mut queue.joined);
            queue.running = !answers.is_empty();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take(answer: &Mutex<Option<Answer>>) -> Option<Answer> {
    answer.lock().unwrap_or_else(PoisonError::into_inner).take()
}
