//! Actions that examine a disk, a server or a cache folder and print the result: `--info`, `--list`, `--map`, `--check`,
//! `--prefetch`, `--dump`. None writes to a disk.
//!
//! ```text
//!   Query ─► open the disks ─► serializable value ─► JSON or text ─► standard output
//! ```
//! Each action is a module. It builds a value and prints it as JSON (`--json`) or as text, both escaped; the map alone is
//! streamed, as the image determines its length. A disk that cannot be opened ends the action with an error, so that the output
//! never lacks a requested disk without notice.

use serde::Serialize;

use crate::config::DiskConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::escape;
use crate::overlay::unfinished_commits;
use crate::process::output;
use crate::source::{ServerInfo, Source};
use crate::volume;

mod cache_dir;
mod check;
mod dump;
mod fingerprint;
mod info;
mod list;
mod map;
mod prefetch;

pub use cache_dir::{check_cache, list_cache};
pub use check::check;
pub use dump::dump;
pub use fingerprint::fingerprint;
pub use info::info;
pub use list::list;
pub use map::map;
pub use prefetch::prefetch;

/// Returns the file or address of a disk's source, for messages.
pub fn source_name(disk: &DiskConfig) -> String {
    disk.source.label()
}

/// Opens the source of a disk for reading, and warns where it is not what it was meant to be.
fn open_source(disk: &DiskConfig) -> Result<Box<dyn Source>> {
    let source = volume::open_source(disk)?;
    let files = source.files();
    for sentence in unfinished_commits(&files)
        .into_iter()
        // With its overlay an unfinished commit shows the right disk, so there is nothing to warn of.
        .filter(|_| disk.overlay.is_none())
    {
        output::message(&mut std::io::stderr(), &format!("warning: {sentence}"));
    }
    Ok(source)
}

/// Appends a formatted line to a `String`, escaped.
macro_rules! line {
    ($out:expr, $($arg:tt)*) => { crate::process::output::line($out, format_args!($($arg)*)) };
}

use line;

/// Prints `value` as JSON, or the lines that `text` appends.
fn print(json: bool, value: &impl Serialize, text: impl FnOnce(&mut String)) -> Result<()> {
    let mut out = String::new();
    // The whole text is made before anything is printed, so that an error leaves no half of it.
    if json {
        out = serde_json::to_string_pretty(value)
            .map_err(|e| Error::new(ErrorKind::Usage, format!("writing JSON: {e}")))?;
        // JSON allows some characters that a terminal obeys; as `\u` escapes they mean the same to a parser.
        out = escape::json(&out);
        out.push('\n');
    } else {
        text(&mut out);
    }
    output::print(&out)
}

/// Appends the description of an NBD server, similar to `nbdinfo`. Quotes in text from the server are escaped too.
fn server_text(s: &ServerInfo, out: &mut String) {
    let yes = |yes: bool| if yes { "yes" } else { "no" };
    line!(out, "{}:", s.server);
    line!(
        out,
        "  protocol  {}, {} TLS",
        s.protocol,
        if s.tls { "with" } else { "without" }
    );
    line!(
        out,
        "  replies   {}",
        if s.structured { "structured" } else { "simple" }
    );
    for e in &s.exports {
        line!(out, "  export \"{}\":", e.export.escape_debug());
        if !e.description.is_empty() {
            line!(out, "    description      {}", e.description.escape_debug());
        }
        // The server refused this export, so it reported no size and no flags.
        if let Some(error) = &e.error {
            line!(out, "    error            {}", error.escape_debug());
            continue;
        }
        line!(out, "    size             {} bytes", e.size);
        for (flag, is) in &e.flags {
            line!(out, "    {flag:16} {}", yes(*is));
        }
        for (name, size) in ["minimum", "preferred", "maximum"].iter().zip(e.block_sizes) {
            let size = if size == 0 {
                "not reported".to_owned()
            } else {
                format!("{size} bytes")
            };
            line!(out, "    block_size {name:9} {size}");
        }
        if !e.contexts.is_empty() {
            line!(out, "    contexts         {}", e.contexts.join(", ").escape_debug());
        }
    }
}
