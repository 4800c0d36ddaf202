//! `--commit`: merges an overlay into its base, and says how far it is.
//!
//! On a terminal a line that is written over itself, else a line a second at most. SIGTERM, SIGINT and SIGHUP are heeded
//! between ranges: the base is closed properly, and what is left to do is said.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::config::{DiskConfig, Overlay};
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::commit::{Commit, Next, Step};
use crate::process::signals::Signals;

/// Between two lines of progress, and between two looks at a terminal's.
const LINE_EVERY: Duration = Duration::from_secs(1);
const BAR_EVERY: Duration = Duration::from_millis(100);

/// Cells of the bar.
const BAR: u64 = 30;

/// `--commit`: status 0 when all was merged.
pub fn commit(disk: &DiskConfig) -> Result<u8> {
    let (overlay, base) = names(disk);
    // from here on a signal waits until it is looked for
    let signals = Signals::block()?;
    let commit = Commit::open(disk)?;
    let mut progress = Progress::new(commit.total());
    let mut ended = None;
    let done = commit.run(&mut |step| {
        if ended.is_none() {
            ended = signals.take()?;
        }
        if let Step::Copied(done) = step {
            progress.show(done);
        }
        Ok(if ended.is_some() { Next::Stop } else { Next::GoOn })
    });
    progress.end();
    let unfinished =
        format!("{overlay} is not merged whole: with cow= the disk is as before, --commit again completes it");
    match done {
        Err(e) => Err(e.within(unfinished)),
        Ok(false) => {
            let name = ended.map_or("a signal", Signal::as_str);
            let merged = format!(
                "ended by {name} after {} of {} MiB",
                progress.done >> 20,
                progress.total >> 20
            );
            Err(Error::new(
                ErrorKind::Os(libc::EINTR),
                format!("{merged}; {unfinished}"),
            ))
        }
        Ok(true) => {
            let mib = progress.total.div_ceil(1 << 20);
            let line = format!(
                "{overlay} was merged into {base}, {mib} MiB; the overlay is not needed any more and may be removed\n"
            );
            match io::stdout().lock().write_all(line.as_bytes()) {
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
                written => written
                    .map(|()| 0)
                    .map_err(|e| Error::io("writing to standard output", e)),
            }
        }
    }
}

/// What overlay and base are called.
fn names(disk: &DiskConfig) -> (String, String) {
    let overlay = match &disk.overlay {
        Some(Overlay::File(path)) => path.display().to_string(),
        _ => "the overlay".to_owned(),
    };
    (overlay, disk.source.label())
}

/// How far a commit is, for people.
#[derive(Debug)]
struct Progress {
    total: u64,
    done: u64,
    begun: Instant,
    /// When something was shown last.
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    fn new(total: u64) -> Self {
        Self {
            total,
            done: 0,
            begun: Instant::now(),
            shown: None,
            terminal: io::stderr().is_terminal(),
        }
    }

    /// Shows it, if it is time. Nobody is told where it can't be shown.
    fn show(&mut self, done: u64) {
        self.done = done;
        let (every, since) = match self.shown {
            Some(shown) if self.terminal => (BAR_EVERY, shown),
            Some(shown) => (LINE_EVERY, shown),
            None if self.terminal => (Duration::ZERO, self.begun),
            // what takes less than a second needs no line
            None => (LINE_EVERY, self.begun),
        };
        if since.elapsed() >= every {
            self.shown = Some(Instant::now());
            let line = line(self.total, done, self.begun.elapsed(), self.terminal);
            let _ = io::stderr().lock().write_all(line.as_bytes());
        }
    }

    /// Leaves the last state on the terminal.
    fn end(&self) {
        if self.terminal && self.shown.is_some() {
            let line = line(self.total, self.done, self.begun.elapsed(), true) + "\n";
            let _ = io::stderr().lock().write_all(line.as_bytes());
        }
    }
}

/// One state of progress; for a terminal it is written over the last one.
fn line(total: u64, done: u64, time: Duration, terminal: bool) -> String {
    let share = |of: u64| {
        (u128::from(done) * u128::from(of))
            .checked_div(total.into())
            .unwrap_or(0) as usize
    };
    let mib = (done >> 20, total >> 20);
    let rate = done as f64 / f64::from(1 << 20) / time.as_secs_f64().max(0.001);
    let text = format!("{:3} %  {} of {} MiB  {rate:.0} MiB/s", share(100), mib.0, mib.1);
    match terminal {
        true => format!(
            "\r[{}{}] {text}\x1b[K",
            "#".repeat(share(BAR)),
            " ".repeat(BAR as usize - share(BAR))
        ),
        false => text + "\n",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_in_a_line_and_in_a_bar() {
        let second = Duration::from_secs(2);
        assert_eq!(
            line(200 << 20, 50 << 20, second, false),
            " 25 %  50 of 200 MiB  25 MiB/s\n"
        );
        let bar = line(200 << 20, 100 << 20, second, true);
        assert!(
            bar.starts_with("\r[###############               ]  50 %  100 of 200 MiB  50 MiB/s"),
            "{bar:?}"
        );
        assert!(
            line(0, 0, Duration::ZERO, true).contains("  0 %"),
            "nothing to do is no division"
        );
    }
}
