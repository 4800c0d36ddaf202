//! Model checks of the lock-free parts: the sources themselves, over loom's primitives, in all interleavings.

/// Synchronization primitives of loom, which the included sources use in place of those of the standard library.
mod sync {
    pub(super) use loom::sync::Mutex;
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    pub(super) fn lock<T>(mutex: &Mutex<T>) -> loom::sync::MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }
}

#[path = "../../../src/source/nbd/handoff.rs"]
mod handoff;

use handoff::{Handoff, Offered};
use loom::sync::Arc;
use loom::thread;

/// Sends a command as `Connection::submit` does.
fn submit(handoff: &Handoff<usize>, item: usize, sent: &sync::AtomicUsize) {
    let now = sync::Ordering::SeqCst;
    match handoff.offer(item) {
        Offered::SendIt(_) => sent.fetch_add(1, now),
        Offered::Queued => 0,
        Offered::SendQueue => sent.fetch_add(handoff.take().len(), now),
    };
}

/// Polls until nothing is left and sleeps then, as `Poller` does: the last look comes after it has fallen asleep.
fn poll(handoff: &Handoff<usize>, sent: &sync::AtomicUsize) {
    loop {
        handoff.wake_up();
        sent.fetch_add(handoff.take().len(), sync::Ordering::SeqCst);
        handoff.fall_asleep();
        if handoff.len() == 0 {
            return;
        }
    }
}

#[test]
fn no_command_is_left_in_the_queue_while_the_poller_sleeps() {
    // Every interleaving with at most three preemptions: without the bound the search takes hours.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let handoff = Arc::new(Handoff::new());
        let sent = Arc::new(sync::AtomicUsize::new(0));
        let submitters: Vec<_> = (0..2)
            .map(|item| {
                let (handoff, sent) = (Arc::clone(&handoff), Arc::clone(&sent));
                thread::spawn(move || submit(&handoff, item, &sent))
            })
            .collect();
        poll(&handoff, &sent);
        submitters.into_iter().for_each(|submitter| submitter.join().unwrap());
        assert_eq!(sent.load(sync::Ordering::SeqCst), 2, "a command was left behind");
        assert_eq!(handoff.len(), 0);
        assert!(!handoff.is_awake());
    });
}
