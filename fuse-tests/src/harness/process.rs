//! Processes and events: waiting for them with a deadline.

use std::fs;
use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How often an event is looked for that the system does not announce.
const TICK: Duration = Duration::from_millis(5);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status, where it exited.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

/// Looks at `event` until it is true; false after `limit`.
pub fn poll_until(limit: Duration, mut event: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if event() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(TICK);
    }
}

/// The most memory that a process has had, in bytes; of our own since `/proc/self/clear_refs` was told to count anew.
pub fn peak_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the status of the process");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("its peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// Waits until the process `pid` has ended, and reaps it; `None` after `limit`.
///
/// Where it is not a child of ours (and nobody's orphan either) only the end itself is seen: both fields are `None`.
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

/// Whether a process of this number runs (a zombie does not).
pub fn is_running(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state follows the name, which is in parentheses and may hold anything.
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}

/// Makes orphans below this process its children, so that a daemon's exit status can be seen.
pub(super) fn reap_orphans() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| nix::sys::prctl::set_child_subreaper(true).expect("becoming the reaper of orphans"));
}
