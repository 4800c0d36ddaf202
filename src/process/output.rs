//! Standard output and standard error: everything that this program prints goes through here, and is escaped here.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;

use crate::error::{Error, Result};
use crate::escape;

/// Prefix of all messages on standard error.
const NAME: &str = "vmdkfuse";

/// Appends a formatted line to `out`, escaped. Line breaks in the text are escaped too.
pub(crate) fn line(out: &mut String, text: fmt::Arguments<'_>) {
    out.push_str(&escape::printable(text.to_string()));
    out.push('\n');
}

/// Prints text that consists of whole lines. A closed pipe is not an error: the reader has seen enough.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => written(other),
    }
}

/// Adds the context to an error of writing to standard output.
pub(crate) fn written<T>(result: io::Result<T>) -> Result<T> {
    result.map_err(|e| Error::io("writing to standard output", e))
}

/// Returns the width of a terminal in columns; `None` if it is no terminal, or one that does not tell.
pub(crate) fn columns(terminal: impl AsFd) -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(terminal).ok()?;
    (size.ws_col > 0).then(|| size.ws_col.into())
}

/// Writes a message as one line with the program's name. A closed standard error is ignored.
///
/// Standard error has no buffer, and daemons of several mounts share it: the line is one write, so that theirs do not
/// come between its parts.
pub fn message(stderr: &mut impl Write, text: &str) {
    let line = format!("{NAME}: {}\n", escape::printable(text));
    if let Err(e) = stderr.write_all(line.as_bytes()) {
        tracing::debug!("standard error: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps what each write was given.
    #[derive(Default)]
    struct Writes(Vec<String>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.push(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn regression_a_message_is_one_write() {
        let mut writes = Writes::default();
        message(&mut writes, "a disk\nis gone");
        assert_eq!(writes.0, ["vmdkfuse: a disk\\nis gone\n"]);
    }
}
