//! Long requests to a near server: each by a thread of its own, on a connection of its own, one command after the other.
//!
//! What such a request costs is copying: twice in the server, and twice here. A thread that waits for one command at a time
//! runs where the server's thread for this connection runs, and both copy what is in the processor's cache still. With many
//! commands under way on a connection the same bytes take twice as long. To a server that is far away just that
//! many have to be under way, so there this way is not taken.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout, poll};

use super::command::Command;
use super::connection::{Answer, Connection, SocketGuard, TICK};
use super::poller::{events_of, ready, serve};

/// How long a thread without work is kept.
const IDLE: Duration = Duration::from_secs(2);

/// The commands of one request, in their order.
pub(super) type BulkRequest = VecDeque<Box<Command>>;

/// Requests that wait for a thread, and the threads.
#[derive(Debug, Default)]
pub(super) struct BulkThreads {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    requests: VecDeque<BulkRequest>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl BulkThreads {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a request. One more thread has to be started where this is true; [`Self::not_started`] if there is none to be had.
    pub(super) fn push(&self, request: BulkRequest, most: usize) -> bool {
        let mut queue = self.queue();
        queue.requests.push_back(request);
        if queue.requests.len() > queue.idle && queue.threads < most {
            queue.threads += 1;
            return true;
        }
        drop(queue);
        self.more.notify_one();
        false
    }

    /// A thread that was asked for could not be started. What has to be done without one.
    pub(super) fn not_started(&self) -> VecDeque<BulkRequest> {
        let mut queue = self.queue();
        queue.threads -= 1;
        if queue.threads == 0 {
            std::mem::take(&mut queue.requests)
        } else {
            VecDeque::new()
        }
    }

    /// The next request; `None`: the thread is to end.
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
            let (woken, waited) = self
                .more
                .wait_timeout(queue, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            if waited.timed_out() && queue.requests.is_empty() {
                break;
            }
        }
        queue.threads -= 1;
        None
    }

    /// Ends the threads, once nothing waits.
    pub(super) fn close(&self) {
        self.queue().closed = true;
        self.more.notify_all();
    }
}

/// A connection that one thread has for itself.
#[derive(Debug)]
pub(super) struct ClaimedSocket<'g> {
    connection: &'g Connection,
    socket: SocketGuard<'g>,
}

impl<'g> ClaimedSocket<'g> {
    /// Of a connection that was free.
    pub(super) fn of(connection: &'g Connection, socket: SocketGuard<'g>) -> Self {
        Self { connection, socket }
    }

    /// Sends a command and waits for its end. What came back is given to `on_completions`.
    pub(super) fn run(&self, command: Box<Command>, mut on_completions: impl FnMut(&mut Vec<Answer>)) {
        let mut back = Vec::new();
        self.connection.begins(&command);
        self.connection.send_on(&self.socket, command, &mut back);
        on_completions(&mut back);
        while !self.socket.is_idle() {
            self.turn(&mut back);
            on_completions(&mut back);
        }
    }

    fn turn(&self, back: &mut Vec<Answer>) {
        let mut fds = [PollFd::new(self.socket.socket(), events_of(&self.socket))];
        match poll(
            &mut fds,
            PollTimeout::try_from(TICK.as_millis()).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(0) => {}
            Ok(_) => serve(self.connection, &self.socket, ready(&fds[0])),
            Err(Errno::EINTR) => {}
            Err(e) => {
                tracing::error!("polling a connection to an NBD server: {e}");
                self.connection.fail();
            }
        }
        self.connection.end_if_overdue();
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
    fn a_thread_is_asked_for_as_long_as_there_are_fewer_than_may_be() {
        let bulk = BulkThreads::default();
        assert!(bulk.push(request(), 2) && bulk.push(request(), 2));
        assert!(!bulk.push(request(), 2));
        assert!(bulk.not_started().is_empty(), "the other thread does it");
        assert_eq!(bulk.not_started().len(), 3);
        assert!(bulk.push(request(), 2));
    }

    #[test]
    fn what_waits_is_done_before_the_end() {
        let bulk = BulkThreads::default();
        bulk.push(request(), 1);
        bulk.close();
        assert!(bulk.next().is_some());
        assert!(bulk.next().is_none());
    }
}
