//! Limits of a handshake, against a server that never ends it.
//!
//! libnbd reads replies for as long as data arrives: one call returns only when the socket is empty. A server that sends
//! replies without end keeps the thread inside that call, past every deadline, and libnbd stores each metadata context
//! that it receives. The library has no limit and no callback for replies in general, but it reports each transition
//! of its state machine as a message for debugging. That callback counts the transitions and checks the deadline. When
//! either limit is exceeded it shuts the socket down, and libnbd finds the end of the connection in its next read.
//!
//! Payloads that libnbd does not store are up to 64 MiB long and read without a transition. They delay the end by less
//! than the time in which the server sends one of them, since libnbd returns when the socket is empty.
//!
//! The messages themselves are discarded. After the handshake they are switched off, because they cost time.

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use libnbd_sys as sys;
use nix::sys::socket::{Shutdown, shutdown};

use super::text::text;
use crate::mutex::lock;

/// Transitions that one option of the handshake may take. About 40 are needed, and 4 for each reply.
pub(super) const OPTION_TURNS: u32 = 1000;

/// Transitions that a list of exports may take: four for each of 16,000 exports.
pub(super) const LIST_TURNS: u32 = 64_000;

/// Start of the message about a transition.
const TRANSITION: &[u8] = b"transition:";

/// Limit of a handshake that was exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::source::nbd) enum HandshakeLimit {
    /// More transitions than any server needs.
    Turns,
    /// The deadline has passed.
    Time,
}

/// Limits of the handshake of one handle, shared with the callback.
#[derive(Debug)]
pub(super) struct Turns(Mutex<TurnsLeft>);

#[derive(Debug)]
struct TurnsLeft {
    /// Transitions until the limit.
    left: u32,
    deadline: Option<Instant>,
    /// Duplicate of the socket's descriptor: libnbd may close its own at any time.
    socket: Option<OwnedFd>,
    exceeded: Option<HandshakeLimit>,
}

impl Turns {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(TurnsLeft {
            left: OPTION_TURNS,
            deadline: None,
            socket: None,
            exceeded: None,
        })))
    }

    /// Allows `turns` transitions from now on, for the next option.
    pub(super) fn allow(&self, turns: u32) {
        self.left(|left| left.left = turns);
    }

    /// Sets the socket and the deadline for the next call that lets libnbd read or write.
    pub(super) fn watch(&self, socket: Option<OwnedFd>, deadline: Instant) {
        self.left(|left| (left.socket, left.deadline) = (socket, Some(deadline)));
    }

    /// Releases the socket.
    pub(super) fn unwatch(&self) {
        self.left(|left| left.socket = None);
    }

    /// Returns the limit that was exceeded, if any. The connection has ended then.
    pub(super) fn exceeded(&self) -> Option<HandshakeLimit> {
        self.left(|left| left.exceeded)
    }

    fn left<T>(&self, use_it: impl FnOnce(&mut TurnsLeft) -> T) -> T {
        use_it(&mut lock(&self.0))
    }

    /// Counts a transition. Shuts the socket down if a limit is exceeded.
    fn turn(&self) {
        self.left(|left| {
            left.left = left.left.saturating_sub(1);
            let late = left.deadline.is_some_and(|deadline| deadline <= Instant::now());
            let exceeded = match (left.left, late) {
                (0, _) => HandshakeLimit::Turns,
                (_, true) => HandshakeLimit::Time,
                _ => return,
            };
            if let Some(socket) = left.socket.take() {
                left.exceeded = Some(exceeded);
                // Fails only if the connection has ended already.
                let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
            }
        });
    }
}

/// Returns the callback that counts the transitions of a handle, with a reference to `turns` until it is freed.
pub(super) fn callback(turns: &Arc<Turns>) -> sys::nbd_debug_callback {
    sys::nbd_debug_callback {
        callback: Some(on_message),
        user_data: Arc::into_raw(Arc::clone(turns)).cast_mut().cast(),
        free: Some(free_turns),
    }
}

unsafe extern "C" fn on_message(data: *mut c_void, _context: *const c_char, message: *const c_char) -> c_int {
    // SAFETY: `data` is the pointer of `callback`, not freed yet; the text is valid during this call.
    let (turns, message) = unsafe { (&*data.cast_const().cast::<Turns>(), text(message)) };
    if message.to_bytes().starts_with(TRANSITION) {
        turns.turn();
    }
    0
}

unsafe extern "C" fn free_turns(data: *mut c_void) {
    // SAFETY: `data` is the pointer of `callback`; it is freed once.
    drop(unsafe { Arc::from_raw(data.cast_const().cast::<Turns>()) });
}
