//! Escapes text for terminals and logs. The only place that decides which characters are shown as they are.
//!
//! Names come from file systems, images and servers, whose authors are not trusted. A control character in a name could
//! move the cursor, set the terminal's title or end the line, so that a name looks like a message of this program.
//!
//! ```text
//!   error, warning ── output::message ─┐
//!   text of --info … ── output::line ──┼─ printable ──► terminal
//!   log line ── LogLines ──────────────┘
//!   JSON ── json ── `\u` escapes, which any parser turns back
//! ```
//! Every text passes one of these writers, so the code that makes a message need not escape the names in it. Text that is
//! escaped already passes unchanged.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// Returns `text` as one line without control sequences: see [`is_unsafe`]. A byte that is not UTF-8 becomes `\xNN`.
pub(crate) fn printable(text: impl AsRef<OsStr>) -> String {
    let mut out = String::new();
    for chunk in text.as_ref().as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            if is_unsafe(c) {
                out.extend(c.escape_default());
            } else {
                out.push(c);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Returns a JSON text with `\u` escapes for the unsafe characters that JSON allows in its strings. Line breaks between
/// the values stay.
pub(crate) fn json(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if is_unsafe(c) && c != '\n' {
            // JSON has escapes of 16 bits only: a character above U+FFFF becomes two of them.
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    out
}

/// Returns true for a character that a terminal obeys instead of showing it, or that is invisible: controls (C0, DEL, C1),
/// line and paragraph separators, and the characters that change the writing direction or take no room.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Makes the writers of log lines, which escape each event.
pub(crate) struct LogLines {
    inner: BoxMakeWriter,
    json: bool,
}

impl LogLines {
    /// Escapes what is written to the writers of `inner`; as JSON with `json`.
    pub(crate) fn new(inner: BoxMakeWriter, json: bool) -> Self {
        Self { inner, json }
    }
}

impl<'a> MakeWriter<'a> for LogLines {
    type Writer = LogLine<<BoxMakeWriter as MakeWriter<'a>>::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        LogLine {
            inner: self.inner.make_writer(),
            json: self.json,
        }
    }

    fn make_writer_for(&'a self, meta: &tracing::Metadata<'_>) -> Self::Writer {
        LogLine {
            inner: self.inner.make_writer_for(meta),
            json: self.json,
        }
    }
}

/// Writer of one log event. The subscriber passes an event in one call, with a line break at its end.
pub(crate) struct LogLine<W> {
    inner: W,
    json: bool,
}

impl<W: Write> Write for LogLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        // The end of the event is the only line break that stays: another one in it would start a line of its own.
        let text = event.strip_suffix(b"\n").unwrap_or(event);
        let mut line = if self.json {
            json(&String::from_utf8_lossy(text))
        } else {
            printable(OsStr::from_bytes(text))
        };
        line.push('\n');
        // In one call, so that the lines of several threads do not mix.
        self.inner.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name with a title sequence, a line break, C1 and bidi controls, and a byte that is not UTF-8.
    const HOSTILE: &[u8] = b"a\x1b]0;x\x07\nb\xc2\x9b\xe2\x80\xae\xe2\x80\xa8\xff\x7f\xc3\xa9";

    #[test]
    fn unsafe_characters_and_bytes_are_escaped() {
        let text = printable(OsStr::from_bytes(HOSTILE));
        assert_eq!(text, "a\\u{1b}]0;x\\u{7}\\nb\\u{9b}\\u{202e}\\u{2028}\\xff\\u{7f}é");
        assert_eq!(printable(&text), text, "escaped text stays");
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({ "name": "a\u{9b}\u{202e}\u{e0001}\n" });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let escaped = json(&text);
        assert!(
            escaped.is_ascii() && escaped.contains("\\u009b\\u202e\\udb40\\udc01\\n"),
            "{escaped}"
        );
        assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap(), value);
    }

    #[test]
    fn a_log_event_is_one_line() {
        let mut out = Vec::new();
        let mut line = LogLine {
            inner: &mut out,
            json: false,
        };
        line.write_all(b"WARN a\nERROR fake\x1b[2J\n").unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "WARN a\\nERROR fake\\u{1b}[2J\n");
    }
}
