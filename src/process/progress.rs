//! Progress of a long command on standard error: how much is done, how fast the rest goes, and when it will be done.
//!
//! On a terminal it is one line that is overwritten. Elsewhere, as in the log of a service, it is at most one line for
//! each percent and each [`LINE_INTERVAL`].

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use super::output;

/// Interval between two updates of the line on a terminal.
const BAR_INTERVAL: Duration = Duration::from_millis(100);
/// Interval between two lines elsewhere.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Widest and narrowest bar, in characters. A terminal without room for the narrowest one shows the text alone.
const BAR: RangeInclusive<usize> = 10..=30;
/// Columns of a terminal that does not tell its width.
const COLUMNS: usize = 80;

/// Progress of one command. The line on a terminal ends with it: a message that follows starts a line of its own.
#[derive(Debug)]
pub(crate) struct Progress {
    is_terminal: bool,
    shown: Shown,
    at: Position,
    /// Time of the last step.
    last_step: Instant,
}

/// What was shown last. At first the start, so that a short command shows no line in a log.
#[derive(Debug)]
struct Shown {
    any: bool,
    at: Instant,
    percent: u64,
}

/// How far a command is. Displayed as the text of the progress.
#[derive(Debug, Default)]
struct Position {
    /// Bytes in total.
    total: u64,
    /// Bytes that were done by an earlier command.
    found: u64,
    /// Bytes that this command has done.
    done: u64,
    /// Time that these took.
    busy: Duration,
}

impl Progress {
    /// Begins the progress of `total` bytes.
    pub(crate) fn new(total: u64) -> Self {
        let now = Instant::now();
        Self {
            is_terminal: io::stderr().is_terminal(),
            shown: Shown {
                any: false,
                at: now,
                percent: 0,
            },
            at: Position {
                total,
                ..Position::default()
            },
            last_step: now,
        }
    }

    /// Returns the bytes that are done, with those of an earlier command.
    pub(crate) fn bytes(&self) -> u64 {
        self.at.found + self.at.done
    }

    /// Adds bytes that an earlier command did. The time since the last step counts for no rate.
    pub(crate) fn found(&mut self, bytes: u64) {
        self.last_step = Instant::now();
        self.at.found += bytes;
        self.show();
    }

    /// Adds bytes that were done since the last step.
    pub(crate) fn did(&mut self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.at.busy += self.last_step.elapsed();
        self.last_step = Instant::now();
        self.at.done += bytes;
        self.show();
    }

    fn show(&mut self) {
        let (since, percent) = (self.shown.at.elapsed(), self.at.share(100));
        let is_due = match self.is_terminal {
            true => !self.shown.any || since >= BAR_INTERVAL,
            false => since >= LINE_INTERVAL && percent > self.shown.percent,
        };
        if is_due {
            self.write();
            self.shown = Shown {
                any: true,
                at: Instant::now(),
                percent,
            };
        }
    }

    /// Writes the progress in one write. Progress that cannot be shown does not matter.
    fn write(&self) {
        let mut stderr = io::stderr();
        // Asked for each time: the user may resize the window.
        let columns = self.is_terminal.then(|| output::columns(&stderr).unwrap_or(COLUMNS));
        let _ = stderr.write_all(self.at.line(columns).as_bytes());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_terminal && self.shown.any {
            self.write();
            let _ = io::stderr().write_all(b"\n");
        }
    }
}

impl Position {
    /// Returns how many of `parts` are done.
    fn share(&self, parts: u64) -> u64 {
        let share = u128::from(self.found + self.done) * u128::from(parts);
        share.checked_div(self.total.into()).unwrap_or(0).min(parts.into()) as u64
    }

    /// Returns what is written. On a terminal of `columns` it overwrites the last line, so it must not need two.
    fn line(&self, columns: Option<usize>) -> String {
        let mut text = self.to_string();
        let Some(columns) = columns else { return text + "\n" };
        // The cursor needs a column, and the bar three for its frame.
        text.truncate(columns.saturating_sub(1));
        let room = columns.saturating_sub(text.len() + 4).min(*BAR.end());
        let bar = match room < *BAR.start() {
            true => String::new(),
            false => {
                let full = self.share(room as u64) as usize;
                format!("[{}{}] ", "#".repeat(full), " ".repeat(room - full))
            }
        };
        format!("\r{bar}{text}\x1b[K")
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = (1 << 20) as f64;
        let bytes = self.found + self.done;
        write!(
            f,
            "{:3} %, {} of {} MiB",
            self.share(100),
            bytes >> 20,
            self.total >> 20
        )?;
        if self.done > 0 {
            let rate = self.done as f64 / self.busy.as_secs_f64().max(0.001);
            let digits = usize::from(rate < 10.0 * MIB);
            write!(f, ", {:.digits$} MiB/s", rate / MIB)?;
            let left = (self.total.saturating_sub(bytes) as f64 / rate).round() as u64;
            match (left / 3600, left / 60 % 60, left % 60) {
                (0, 0, seconds) => write!(f, ", {seconds} s left")?,
                (hours, minutes, seconds) => write!(f, ", {hours}:{minutes:02}:{seconds:02} left")?,
            }
        }
        match self.found >> 20 {
            0 => Ok(()),
            mib => write!(f, " ({mib} MiB were there)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(found: u64, done: u64, seconds: u64) -> Position {
        let busy = Duration::from_secs(seconds);
        Position {
            total: 4 << 30,
            found,
            done,
            busy,
        }
    }

    #[test]
    fn the_rate_is_that_of_this_command_and_not_of_what_was_there() {
        let text = |done: u64, seconds: u64| position(1 << 30, done, seconds).to_string();
        assert_eq!(text(0, 0), " 25 %, 1024 of 4096 MiB (1024 MiB were there)");
        assert_eq!(
            text(1 << 30, 8),
            " 50 %, 2048 of 4096 MiB, 128 MiB/s, 16 s left (1024 MiB were there)"
        );
        assert_eq!(
            text(2 << 30, 20_000),
            " 75 %, 3072 of 4096 MiB, 0.1 MiB/s, 2:46:40 left (1024 MiB were there)"
        );
        assert_eq!(
            position(0, 4 << 30, 40).to_string(),
            "100 %, 4096 of 4096 MiB, 102 MiB/s, 0 s left"
        );
    }

    #[test]
    fn a_terminal_shows_a_bar_and_a_log_lines() {
        let half = position(0, 2 << 30, 2);
        assert_eq!(half.line(None), " 50 %, 2048 of 4096 MiB, 1024 MiB/s, 2 s left\n");
        let bar = half.line(Some(100));
        assert!(
            bar.starts_with("\r[###############               ]  50 %, 2048"),
            "{bar:?}"
        );
        let empty = Position::default();
        assert!(empty.line(Some(80)).contains("  0 %"), "a total of 0 is not divided by");
    }

    #[test]
    fn a_line_fits_every_terminal() {
        let at = position(1 << 30, 1 << 30, 8);
        for columns in 1..200 {
            let line = at.line(Some(columns));
            let shown = line.strip_prefix('\r').unwrap().strip_suffix("\x1b[K").unwrap();
            assert!(shown.len() < columns.max(1), "{columns}: {line:?}");
        }
        assert!(at.line(Some(80)).starts_with("\r 50 %"), "no room for a bar");
        assert!(position(0, 1 << 30, 8).line(Some(80)).starts_with("\r[######"));
    }

    #[test]
    fn only_time_between_steps_of_this_command_counts() {
        let mut progress = Progress::new(8);
        progress.last_step -= Duration::from_secs(100);
        progress.found(2);
        progress.last_step -= Duration::from_secs(10);
        progress.did(2);
        progress.last_step -= Duration::from_secs(100);
        progress.found(2);
        assert_eq!((progress.bytes(), progress.at.busy.as_secs()), (6, 10));
    }

    #[test]
    fn a_log_gets_a_line_for_a_new_percent_after_the_interval() {
        let mut progress = Progress::new(1000);
        progress.is_terminal = false;
        progress.did(500);
        assert!(!progress.shown.any, "a short command shows nothing");
        progress.shown.at -= LINE_INTERVAL;
        progress.did(1);
        assert!(progress.shown.any);
        progress.shown.any = false;
        progress.shown.at -= LINE_INTERVAL;
        progress.did(1);
        assert!(!progress.shown.any, "the percent is the same");
    }
}
