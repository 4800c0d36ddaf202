//! Standard output and standard error: everything that this program prints goes through here, and is escaped here.

use std::fmt;
use std::io::{self, Write};

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

/// Writes a message as one line with the program's name. A closed standard error is ignored.
pub fn message(stderr: &mut impl Write, text: &str) {
    let text = escape::printable(text);
    if let Err(e) = writeln!(stderr, "{NAME}: {text}") {
        tracing::debug!("standard error: {e}");
    }
}
