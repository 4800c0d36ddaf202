//! Help sections that are generated from the table of keys.

use std::fmt::Write as _;

use super::{Group, KEYS};

/// Width of the help in columns. The text is wrapped here, so that clap never wraps it again.
pub(in crate::cli) const HELP_WIDTH: usize = 96;

/// Column at which the explanation of a key starts.
const HELP_INDENT: usize = 32;

/// Returns the help section of the keys that work in this build, by group.
pub(in crate::cli) fn help() -> String {
    let mut out = String::from("Keys (before the first file= they apply to all disks, after it to its disk):\n");
    for group in Group::ALL {
        let mut keys = KEYS
            .iter()
            .filter(|key| key.group == group && key.is_ready())
            .peekable();
        if keys.peek().is_some() {
            _ = writeln!(out, "  {}:", group.title());
        }
        for key in keys {
            let head = format!("    {}={}", key.name, key.kind.placeholder());
            let repeats = if key.repeats { " (repeatable)" } else { "" };
            _ = write!(out, "{}", explained(&head, &format!("{}{repeats}", key.help)));
        }
    }
    out.push_str("\nSIZE takes K, M, G, T; BOOL takes true/false, yes/no, on/off, 1/0.\n");
    out
}

/// Returns the form of a key with its explanation next to it, wrapped to the width of the help.
fn explained(form: &str, explanation: &str) -> String {
    let mut out = String::new();
    let mut line = form.to_owned();
    if form.len() > HELP_INDENT {
        _ = writeln!(out, "{line}");
        line.clear();
    }
    line = format!("{line:HELP_INDENT$}");
    for word in explanation.split(' ') {
        if line.len() + 1 + word.len() > HELP_WIDTH {
            _ = writeln!(out, "{line}");
            line = " ".repeat(HELP_INDENT);
        }
        _ = write!(line, " {word}");
    }
    _ = writeln!(out, "{line}");
    out
}

/// Returns the help lines of the keys that are not in this build yet, by group.
pub(in crate::cli) fn help_later() -> String {
    let mut out = String::new();
    for group in Group::ALL {
        let names = KEYS
            .iter()
            .filter(|key| key.group == group && !key.is_ready())
            .map(|key| format!("{}=", key.name));
        out.push_str(&wrapped(group.title(), names));
    }
    out
}

/// Returns `title: word word …`, wrapped to the width of the help. Returns an empty text if there are no words.
pub(in crate::cli) fn wrapped(title: &str, words: impl Iterator<Item = String>) -> String {
    let mut out = String::new();
    let mut line = format!("  {title}:");
    let mut empty = true;
    for word in words {
        empty = false;
        if line.len() + 1 + word.len() > HELP_WIDTH {
            _ = writeln!(out, "{line}");
            line = String::from("   ");
        }
        _ = write!(line, " {word}");
    }
    if !empty {
        _ = writeln!(out, "{line}");
    }
    out
}
