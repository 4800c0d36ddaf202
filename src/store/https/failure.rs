//! Failed attempts: what to do after one, and how long to wait before the next.

use std::time::Duration;

use super::request::Trouble;
use crate::error::{Error, ErrorKind};

/// First and longest pause before a retry.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// Next step after a failed attempt.
#[derive(Debug)]
pub(super) enum Next {
    GiveUp,
    /// Try again, after the pause that the server asks for.
    Retry(Option<Duration>),
    /// Try again if the server could be reached before.
    Reconnect,
    /// The session has ended: log in and try again.
    Login,
    /// The place that the server had redirected to is gone: ask at the file's own address.
    Return,
    /// The deadline has passed.
    TimedOut,
}

#[derive(Debug)]
pub(super) struct Failure {
    pub(super) next: Next,
    pub(super) error: Error,
}

impl Failure {
    pub(super) fn new(next: Next, kind: ErrorKind, text: impl Into<String>) -> Self {
        let error = Error::new(kind, text);
        Self { next, error }
    }

    pub(super) fn retry(text: impl Into<String>) -> Self {
        Self::new(Next::Retry(None), ErrorKind::Os(libc::EIO), text)
    }

    pub(super) fn fatal(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self::new(Next::GiveUp, kind, text)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let next = Next::GiveUp;
        Self { next, error }
    }
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Unreachable(text) => Self::new(Next::Reconnect, ErrorKind::Os(libc::EIO), text),
            Trouble::Broken(text) => Self::retry(text),
            Trouble::Stalled(time) => Self::retry(format!("the answer stalled for {} s", time.as_secs())),
            Trouble::TimedOut => Self::new(Next::TimedOut, ErrorKind::Os(libc::EIO), "no answer in time"),
            Trouble::Closed => Self::fatal(ErrorKind::Os(libc::ECANCELED), "the file was closed"),
        }
    }
}

/// Returns the pause before retry number `tries`: none before the first, as an idle connection that the server has closed
/// is the usual reason; then longer each time, with a random part so that many requests do not come back at once.
pub(super) fn pause_before(tries: u32) -> Duration {
    let [first, most] = PAUSE;
    let Some(doublings) = tries.checked_sub(2) else {
        return Duration::ZERO;
    };
    let pause = first.saturating_mul(1 << doublings.min(16)).min(most);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let percent = clock.map_or(0, |now| now.subsec_micros() % 50);
    pause * (75 + percent) / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_bound() {
        assert_eq!(pause_before(1), Duration::ZERO);
        assert!(pause_before(2) < PAUSE[0] * 2);
        assert!(pause_before(100) <= PAUSE[1] * 2);
    }
}
