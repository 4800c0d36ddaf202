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

use super::drive::{events_of, ready, serve};
use super::generation::{Answer, Generation, Serving, TICK};
use super::op::Op;

/// How long a thread without work is kept.
const IDLE: Duration = Duration::from_secs(2);

/// The commands of one request, in their order.
pub(super) type Load = VecDeque<Box<Op>>;

/// Requests that wait for a thread, and the threads.
#[derive(Debug, Default)]
pub(super) struct Carriers {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    loads: VecDeque<Load>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Carriers {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a request. One more thread has to be started where this is true; [`Self::not_started`] if there is none to be had.
    pub(super) fn push(&self, load: Load, most: usize) -> bool {
        let mut queue = self.queue();
        queue.loads.push_back(load);
        if queue.loads.len() > queue.idle && queue.threads < most {
            queue.threads += 1;
            return true;
        }
        drop(queue);
        self.more.notify_one();
        false
    }

    /// A thread that was asked for could not be started. What has to be done without one.
    pub(super) fn not_started(&self) -> VecDeque<Load> {
        let mut queue = self.queue();
        queue.threads -= 1;
        if queue.threads == 0 { std::mem::take(&mut queue.loads) } else { VecDeque::new() }
    }

    /// The next request; `None`: the thread is to end.
    pub(super) fn next(&self) -> Option<Load> {
        let mut queue = self.queue();
        loop {
            if let Some(load) = queue.loads.pop_front() {
                return Some(load);
            }
            if queue.closed {
                break;
            }
            queue.idle += 1;
            let (woken, waited) = self.more.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            if waited.timed_out() && queue.loads.is_empty() {
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
pub(super) struct Claim<'g> {
    generation: &'g Generation,
    conn: Serving<'g>,
}

impl<'g> Claim<'g> {
    /// Of a connection that was free.
    pub(super) fn of(generation: &'g Generation, conn: Serving<'g>) -> Self {
        Self { generation, conn }
    }

    /// Sends a command and waits for its end. What came back is given to `told`.
    pub(super) fn run(&self, op: Box<Op>, mut told: impl FnMut(&mut Vec<Answer>)) {
        let mut back = Vec::new();
        self.generation.begins(&op);
        self.generation.send_on(&self.conn, op, &mut back);
        told(&mut back);
        while !self.conn.is_idle() {
            self.turn(&mut back);
            told(&mut back);
        }
    }

    fn turn(&self, back: &mut Vec<Answer>) {
        let mut fds = [PollFd::new(self.conn.socket(), events_of(&self.conn))];
        match poll(&mut fds, PollTimeout::try_from(TICK.as_millis()).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => {}
            Ok(_) => serve(self.generation, &self.conn, ready(&fds[0])),
            Err(Errno::EINTR) => {}
            Err(e) => {
                tracing::error!("polling a connection to an NBD server: {e}");
                self.generation.fail();
            }
        }
        self.generation.end_if_overdue();
        self.generation.collect(&self.conn, back);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::source::nbd::op::Kind;
    use crate::source::nbd::pool::Buffer;

    fn load() -> Load {
        let op = Op::new(Kind::Flush, 0, 0, Buffer::default(), Instant::now(), Box::new(|_, _| ()));
        VecDeque::from([op])
    }

    #[test]
    fn a_thread_is_asked_for_as_long_as_there_are_fewer_than_may_be() {
        let carriers = Carriers::default();
        assert!(carriers.push(load(), 2) && carriers.push(load(), 2));
        assert!(!carriers.push(load(), 2));
        assert!(carriers.not_started().is_empty(), "the other thread does it");
        assert_eq!(carriers.not_started().len(), 3);
        assert!(carriers.push(load(), 2));
    }

    #[test]
    fn what_waits_is_done_before_the_end() {
        let carriers = Carriers::default();
        carriers.push(load(), 1);
        carriers.close();
        assert!(carriers.next().is_some());
        assert!(carriers.next().is_none());
    }
}
