//! Hand-over of commands to the poller while it is awake.
//!
//! ```text
//!   submitter   push ── poller awake? ─ yes ─► nothing: the poller sends it
//!                                     └ no ──► the submitter sends all that is queued
//!   poller      send all ─ poll ─ …  before it sleeps: awake := false, then queue empty? ─ no ─► does not sleep
//! ```
//! A submitter would otherwise wait for the lock of a libnbd handle that the poller holds. Both sides first write their own
//! flag and then read the other's, all in one total order (`SeqCst`), so at least one of them sees the other: a command is
//! never left in the queue while the poller sleeps. `fuse-tests` checks this with loom over all interleavings.

use std::collections::VecDeque;

use super::sync::{AtomicBool, AtomicUsize, Mutex, Ordering, lock};

/// Items that submitters hand to a poller.
#[derive(Debug)]
pub(super) struct Handoff<T> {
    /// The poller sends what is queued before it sleeps.
    awake: AtomicBool,
    queue: Mutex<VecDeque<T>>,
    /// The length of `queue`, so that a look at it needs no lock.
    len: AtomicUsize,
}

/// Duty of the caller of [`Handoff::offer`].
#[derive(Debug)]
pub(super) enum Offered<T> {
    /// Send the item: the poller sleeps.
    SendIt(T),
    /// Nothing: the poller is awake and sends the item.
    Queued,
    /// Send what [`Handoff::take`] returns: the item is queued, and the poller may have gone to sleep without it.
    SendQueue,
}

impl<T> Handoff<T> {
    /// An empty queue, and no poller that is awake.
    pub(super) fn new() -> Self {
        Self {
            awake: AtomicBool::new(false),
            queue: Mutex::new(VecDeque::new()),
            len: AtomicUsize::new(0),
        }
    }

    /// Queues `item` if the poller is awake. Returns what the caller has to do now.
    pub(super) fn offer(&self, item: T) -> Offered<T> {
        if !self.is_awake() {
            return Offered::SendIt(item);
        }
        {
            let mut queue = lock(&self.queue);
            queue.push_back(item);
            self.len.store(queue.len(), Ordering::SeqCst);
        }
        // The poller may have gone to sleep since the first check, after its last look at the queue.
        if self.is_awake() {
            Offered::Queued
        } else {
            Offered::SendQueue
        }
    }

    /// Takes all that is queued.
    pub(super) fn take(&self) -> VecDeque<T> {
        let mut queue = lock(&self.queue);
        self.len.store(0, Ordering::SeqCst);
        std::mem::take(&mut *queue)
    }

    /// Returns the number of queued items.
    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::SeqCst)
    }

    /// Returns true while a poller is awake.
    pub(super) fn is_awake(&self) -> bool {
        self.awake.load(Ordering::SeqCst)
    }

    /// Marks the poller as awake: from now on submitters leave their items to it.
    pub(super) fn wake_up(&self) {
        self.awake.store(true, Ordering::SeqCst);
    }

    /// Marks the poller as asleep, before it looks at [`Self::len`] for the last time.
    pub(super) fn fall_asleep(&self) {
        self.awake.store(false, Ordering::SeqCst);
    }
}
