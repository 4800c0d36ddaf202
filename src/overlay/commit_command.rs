//! `--commit`: merges an overlay into its base and shows the progress.
//!
//! On a terminal the progress is one line that is overwritten, otherwise at most one line per second. SIGTERM, SIGINT
//! and SIGHUP stop the commit after the current range: the base is closed, and the error says how to complete the
//! commit.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::config::{DiskConfig, Overlay};
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::commit::{Commit, Next, Step};
use crate::process::output;
use crate::process::signals::Signals;

/// Interval between two lines of progress.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// Interval between two updates of the bar on a terminal.
const BAR_INTERVAL: Duration = Duration::from_millis(100);

/// Width of the bar in characters.
const BAR_WIDTH: u64 = 30;

/// Runs `--commit`. Returns exit status 0 if everything was merged.
///
/// Errors: those of the commit, `Os(EINTR)` if a signal stopped it.
pub fn commit(disk: &DiskConfig) -> Result<u8> {
    let (overlay, base) = names(disk);
    // From here on signals stay pending, and the commit polls for them after each step. The default action would end
    // the process with the base unclosed.
    let signals = Signals::block()?;
    let commit = Commit::open(disk)?;
    let mut progress = Progress::new(commit.total());
    let mut stopped_by = None;
    let result = commit.run(&mut |step| {
        if stopped_by.is_none() {
            // The first signal counts. It is kept, as the commit may pass several steps before it can stop.
            stopped_by = signals.take()?;
        }
        if let Step::Copied(done) = step {
            progress.show(done);
        }
        Ok(if stopped_by.is_some() { Next::Stop } else { Next::GoOn })
    });
    // Before any other output, which would continue the line of the bar.
    progress.end();
    let unfinished =
        format!("{overlay} is not merged whole: with cow= the disk is as before, --commit again completes it");
    match result {
        Err(e) => Err(e.within(unfinished)),
        Ok(false) => {
            let name = stopped_by.map_or("a signal", Signal::as_str);
            let merged = format!("stopped by {name} after {} of {} bytes", progress.done, progress.total);
            Err(Error::new(
                ErrorKind::Os(libc::EINTR),
                format!("{merged}; {unfinished}"),
            ))
        }
        Ok(true) => {
            let bytes = progress.total;
            let mut line = String::new();
            output::line(
                &mut line,
                format_args!(
                    "{overlay} was merged into {base}, {bytes} bytes; the overlay is no longer needed: remove it before you \
                     write to the image"
                ),
            );
            output::print(&line).map(|()| 0)
        }
    }
}

/// Returns the names of the overlay and the base for messages.
fn names(disk: &DiskConfig) -> (String, String) {
    let overlay = match &disk.overlay {
        Some(Overlay::File(path)) => path.display().to_string(),
        _ => "the overlay".to_owned(),
    };
    (overlay, disk.source.label())
}

/// Progress of a commit on standard error.
#[derive(Debug)]
struct Progress {
    /// Bytes in total.
    total: u64,
    /// Bytes done.
    done: u64,
    started: Instant,
    /// Time of the last output.
    last_shown: Option<Instant>,
    /// True if standard error is a terminal.
    terminal: bool,
}

impl Progress {
    fn new(total: u64) -> Self {
        Self {
            total,
            done: 0,
            started: Instant::now(),
            last_shown: None,
            terminal: io::stderr().is_terminal(),
        }
    }

    /// Shows the progress if the interval has passed. Errors of writing are ignored.
    fn show(&mut self, done: u64) {
        self.done = done;
        let (interval, since) = match self.last_shown {
            Some(last) if self.terminal => (BAR_INTERVAL, last),
            Some(last) => (LINE_INTERVAL, last),
            None if self.terminal => (Duration::ZERO, self.started),
            // A commit of less than a second shows no line.
            None => (LINE_INTERVAL, self.started),
        };
        if since.elapsed() >= interval {
            self.last_shown = Some(Instant::now());
            let line = line(self.total, done, self.started.elapsed(), self.terminal);
            let _ = io::stderr().lock().write_all(line.as_bytes());
        }
    }

    /// Shows the last progress on a terminal and ends its line.
    fn end(&self) {
        if self.terminal && self.last_shown.is_some() {
            let line = line(self.total, self.done, self.started.elapsed(), true) + "\n";
            let _ = io::stderr().lock().write_all(line.as_bytes());
        }
    }
}

/// Returns the progress as a line. For a terminal the line overwrites the last one.
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
            "#".repeat(share(BAR_WIDTH)),
            " ".repeat(BAR_WIDTH as usize - share(BAR_WIDTH))
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
            "a total of 0 is not divided by"
        );
    }
}
