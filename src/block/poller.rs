//! Polling: the optional ability of a [`BlockQueue`](super::BlockQueue) to have its answers read by the thread that
//! waits for them.

use std::os::fd::BorrowedFd;

/// Queue whose answers a caller may read, which saves the switch to another thread.
///
/// After one or more submissions the caller must call [`poll_completions`](Self::poll_completions); otherwise it may
/// take long until a thread reads the answers.
pub trait CompletionPoller {
    /// Ensures that answers are read: by this thread for as long as `stay` allows, and by another thread afterwards.
    fn poll_completions(&self, stay: Stay<'_>);
}

/// Time for which a thread may read the answers of a [`CompletionPoller`].
#[derive(Debug, Clone, Copy)]
pub enum Stay<'a> {
    /// Not at all: the thread has other work.
    No,
    /// For as long as the next answer arrives soon.
    Patiently,
    /// Until the descriptor is readable, which announces other work for the thread. Such a thread polls again soon.
    Until(BorrowedFd<'a>),
}
