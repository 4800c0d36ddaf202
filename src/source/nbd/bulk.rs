//! Bulk threads: each carries one long request to a near server, on a socket of its own, one command after the other.
//!
//! The cost of such a request is copying: twice in the server and twice here. A thread that waits for one command at a
//! time runs where the server's thread for this socket runs, and both copy data that is still in the processor's cache.
//! With many commands in flight on a socket the same bytes take twice as long. A far server needs many commands in
//! flight to hide its latency, so bulk threads are not used for it.
//!
//! [`BulkThreads`] counts the threads and queues the requests; the session starts the threads. Invariant: while a
//! request is queued there is at least one thread, running or about to be started, that takes it. A thread exits after
//! [`IDLE_TIMEOUT`] without a request. `queue` is the only lock; no request is carried while it is held.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout, poll};

use super::command::Command;
use super::connection::{Answer, Connection, SocketGuard, TICK};
use super::poller::{events_of, ready, serve};
use crate::mutex::{lock, wait_timeout};

/// Time after which a thread without a request exits.
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Commands of one request, in their order.
pub(super) type BulkRequest = VecDeque<Box<Command>>;

/// Queue of requests for the bulk threads, and the number of these threads.
#[derive(Debug, Default)]
pub(super) struct BulkThreads {
    queue: Mutex<BulkQueue>,
    request_added: Condvar,
}

#[derive(Debug, Default)]
struct BulkQueue {
    requests: VecDeque<BulkRequest>,
    /// Threads that run or are about to be started.
    threads: usize,
    /// Threads that wait for a request. Some of them may have been notified already.
    idle: usize,
    closed: bool,
}

impl BulkThreads {
    fn queue(&self) -> MutexGuard<'_, BulkQueue> {
        lock(&self.queue)
    }

    /// Queues a request. Returns true if the caller must start another thread, up to `max_threads`. If it cannot, it
    /// must call [`Self::thread_not_started`].
    pub(super) fn push(&self, request: BulkRequest, max_threads: usize) -> bool {
        let mut queue = self.queue();
        queue.requests.push_back(request);
        // Compared with all queued requests, not just this one: an idle thread that was notified for an earlier request
        // still counts as idle until it has acquired the lock.
        if queue.requests.len() > queue.idle && queue.threads < max_threads {
            queue.threads += 1;
            return true;
        }
        drop(queue);
        self.request_added.notify_one();
        false
    }

    /// Reports that a thread could not be started. Returns the requests that the caller must send without one.
    pub(super) fn thread_not_started(&self) -> VecDeque<BulkRequest> {
        let mut queue = self.queue();
        queue.threads -= 1;
        // Any other thread takes the queued requests before it exits.
        if queue.threads == 0 {
            std::mem::take(&mut queue.requests)
        } else {
            VecDeque::new()
        }
    }

    /// Waits for the next request. Returns `None` if the calling thread is to exit.
    pub(super) fn next(&self) -> Option<BulkRequest> {
        let mut queue = self.queue();
        loop {
            if let Some(request) = queue.requests.pop_front() {
                return Some(request);
            }
            if queue.closed {
                break;
            }
            queue.idle += 1;
            let (woken, waited) = wait_timeout(&self.request_added, queue, IDLE_TIMEOUT);
            queue = woken;
            queue.idle -= 1;
            // A request may have been queued for this thread between the timeout and the acquisition of the lock.
            if waited.timed_out() && queue.requests.is_empty() {
                break;
            }
        }
        queue.threads -= 1;
        None
    }

    /// Makes the threads exit once the queue is empty.
    pub(super) fn close(&self) {
        self.queue().closed = true;
        self.request_added.notify_all();
    }
}

/// Socket that a bulk thread has for itself, released on drop.
#[derive(Debug)]
pub(super) struct ClaimedSocket<'g> {
    connection: &'g Connection,
    socket: SocketGuard<'g>,
}

impl<'g> ClaimedSocket<'g> {
    /// Claims an idle socket of a connection for the calling thread, if there is one.
    pub(super) fn claim(connection: &'g Connection) -> Option<Self> {
        let socket = connection.claim()?;
        Some(Self { connection, socket })
    }

    /// Sends a command and waits until it is returned. Passes returned commands to `on_completions`, which drains the
    /// list.
    pub(super) fn run(&self, command: Box<Command>, mut on_completions: impl FnMut(&mut Vec<Answer>)) {
        let mut back = Vec::new();
        self.connection.count_submitted(&command);
        self.connection.send_on(&self.socket, command, &mut back);
        on_completions(&mut back);
        // Until the socket is idle, not only until this command is returned: another thread that picked the socket just
        // before the claim may have sent a command on it, and no other thread reads its answer.
        while !self.socket.is_idle() {
            self.poll_once(&mut back);
            on_completions(&mut back);
        }
    }

    /// Waits up to one [`TICK`] for an answer, once, and reads it.
    fn poll_once(&self, back: &mut Vec<Answer>) {
        let mut fds = [PollFd::new(self.socket.socket(), events_of(&self.socket))];
        match poll(
            &mut fds,
            PollTimeout::try_from(TICK.as_millis()).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(0) => {}
            Ok(_) => serve(self.connection, &self.socket, ready(&fds[0])),
            Err(Errno::EINTR) => {}
            Err(e) => {
                tracing::error!("poll on a socket of an NBD server failed: {e}; reconnecting");
                self.connection.fail();
            }
        }
        // While every caller uses bulk threads, no other thread may check for overdue answers.
        self.connection.fail_if_overdue();
        self.connection.collect(&self.socket, back);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::source::nbd::buffer_pool::Buffer;
    use crate::source::nbd::command::CommandKind;

    fn request() -> BulkRequest {
        let command = Command::new(
            CommandKind::Flush,
            0,
            0,
            Buffer::default(),
            Instant::now(),
            Box::new(|_, _| ()),
        );
        VecDeque::from([command])
    }

    #[test]
    fn threads_are_requested_up_to_the_maximum() {
        let bulk = BulkThreads::default();
        assert!(bulk.push(request(), 2) && bulk.push(request(), 2));
        assert!(!bulk.push(request(), 2));
        assert!(
            bulk.thread_not_started().is_empty(),
            "the other thread carries the requests"
        );
        assert_eq!(bulk.thread_not_started().len(), 3);
        assert!(bulk.push(request(), 2));
    }

    #[test]
    fn queued_requests_are_carried_before_the_threads_exit() {
        let bulk = BulkThreads::default();
        bulk.push(request(), 1);
        bulk.close();
        assert!(bulk.next().is_some());
        assert!(bulk.next().is_none());
    }
}
