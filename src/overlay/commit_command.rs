//! `--commit`: merges an overlay into its base and shows the progress.
//!
//! SIGTERM, SIGINT and SIGHUP stop the commit after the current range: the base is closed, and the error says how to
//! complete the commit.

use nix::sys::signal::Signal;

use crate::config::{DiskConfig, Overlay};
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::commit::{Commit, Next, Step};
use crate::process::output;
use crate::process::progress::Progress;
use crate::process::signals::Signals;

/// Runs `--commit`. Returns exit status 0 if everything was merged.
///
/// Errors: those of the commit, `Os(EINTR)` if a signal stopped it.
pub fn commit(disk: &DiskConfig) -> Result<u8> {
    let (overlay, base) = names(disk);
    // From here on signals stay pending, and the commit polls for them after each step. The default action would end
    // the process with the base unclosed.
    let signals = Signals::block()?;
    let commit = Commit::open(disk)?;
    let total = commit.total();
    let mut progress = Progress::new(total);
    let mut stopped_by = None;
    let result = commit.run(&mut |step| {
        if stopped_by.is_none() {
            // The first signal counts. It is kept, as the commit may pass several steps before it can stop.
            stopped_by = signals.take()?;
        }
        if let Step::Copied(done) = step {
            progress.did(done.saturating_sub(progress.bytes()));
        }
        Ok(if stopped_by.is_some() { Next::Stop } else { Next::GoOn })
    });
    let done = progress.bytes();
    // Before any other output, which would continue the line of the bar.
    drop(progress);
    let unfinished =
        format!("{overlay} is not merged whole: with cow= the disk is as before, --commit again completes it");
    match result {
        Err(e) => Err(e.within(unfinished)),
        Ok(false) => {
            let name = stopped_by.map_or("a signal", Signal::as_str);
            let merged = format!("stopped by {name} after {done} of {total} bytes");
            Err(Error::new(
                ErrorKind::Os(libc::EINTR),
                format!("{merged}; {unfinished}"),
            ))
        }
        Ok(true) => {
            let mut line = String::new();
            output::line(
                &mut line,
                format_args!(
                    "{overlay} was merged into {base}, {total} bytes; the overlay is no longer needed: remove it before you \
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
