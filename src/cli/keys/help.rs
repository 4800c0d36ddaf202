//! The table of keys as sections of the help.

use std::fmt::Write as _;

use super::{Group, KEYS};

/// Columns of the help, so that it fits a terminal of that width with clap's wrapping never at work.
pub(in crate::cli) const HELP_WIDTH: usize = 96;

/// Columns before the explanation of a key.
const HELP_INDENT: usize = 32;

/// The keys as a section of the help.
pub(in crate::cli) fn help() -> String {
    let mut out = String::from("Keys (before the first file= they hold for all disks, after it for its disk):\n");
    for group in Group::ALL {
        let mut keys = KEYS
            .iter()
            .filter(|key| key.group == group && key.is_local())
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

/// The form of a key and its explanation beside it, in lines of the help's width.
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

/// The keys that are not in this build yet, by heading, as lines for the help.
pub(in crate::cli) fn help_later() -> String {
    let mut out = String::new();
    for group in Group::ALL {
        let names = KEYS
            .iter()
            .filter(|key| key.group == group && !key.is_local())
            .map(|key| format!("{}=", key.name));
        out.push_str(&wrapped(group.title(), names));
    }
    out
}

/// `title: word word …` in lines of the help's width; nothing where there are no words.
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
