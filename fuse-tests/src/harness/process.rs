//! Processes: their end, their memory, and polling with a deadline for events that the system does not announce.

use std::fs;
use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Poll interval.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// End of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Exit status; `None` if a signal ended the process or the status is not known.
    pub code: Option<i32>,
    /// Signal that ended the process, if any.
    pub signal: Option<i32>,
}

/// Polls `event` until it returns true. Returns false if it does not within `limit`; `event` is polled at least once.
pub fn poll_until(limit: Duration, mut event: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if event() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Returns the peak resident memory of a process (`VmHWM`) in bytes.
///
/// A process resets its own peak by writing 5 to `/proc/self/clear_refs`.
pub fn peak_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the status of the process");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("its peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// Waits until the process `pid` has ended, and reaps it. Returns `None` if it still runs after `limit`.
///
/// If the process is not a child of this process, its status is not known: both fields of the answer are `None`.
pub fn wait_end(pid: i32, limit: Duration) -> Option<Ended> {
    let mut ended = None;
    poll_until(limit, || {
        ended = match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => Some(Ended {
                code: Some(code),
                signal: None,
            }),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(Ended {
                code: None,
                signal: Some(signal as i32),
            }),
            Err(Errno::ECHILD) if !is_running(pid) => Some(Ended {
                code: None,
                signal: None,
            }),
            _ => None,
        };
        ended.is_some()
    });
    ended
}

/// Returns true if a process with this ID runs. A zombie does not run.
pub fn is_running(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state follows the program's name, which is in parentheses and may itself contain parentheses and blanks.
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}

/// Makes this process a child subreaper: an orphaned descendant becomes its child, so it can wait for a daemon.
pub(super) fn reap_orphans() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| nix::sys::prctl::set_child_subreaper(true).expect("becoming a child subreaper"));
}
