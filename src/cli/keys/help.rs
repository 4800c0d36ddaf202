//! Help sections that are generated from the table of keys.

use std::fmt::Write as _;

use super::{Group, KEYS, Key};

/// Column at which the explanation of a key starts.
const INDENT: usize = 32;

/// Columns that an explanation needs beside a key. With fewer it starts on a line of its own.
const NARROW: usize = 30;

/// Column at which an explanation on a line of its own starts.
const NARROW_INDENT: usize = 8;

/// Returns the help section of the keys that work in this build, by group, wrapped to `width` columns.
pub(in crate::cli) fn help(width: usize) -> String {
    let mut out = String::from("Keys (before the first file= they apply to all disks, after it to its disk):\n");
    for group in Group::ALL {
        let mut keys = ready(group).peekable();
        if keys.peek().is_some() {
            _ = writeln!(out, "  {}:", group.title());
        }
        for key in keys {
            let head = format!("    {}={}", key.name, key.kind.placeholder());
            explain(&mut out, &head, &key.explanation(), width);
        }
    }
    out
}

/// Returns the keys of a group that work in this build, in the order of the table.
pub(in crate::cli) fn ready(group: Group) -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(move |key| key.group == group && key.is_ready())
}

/// Appends the form of a key with its explanation next to it, or below it where the lines are short.
fn explain(out: &mut String, form: &str, explanation: &str, width: usize) {
    let indent = if width < INDENT + NARROW { NARROW_INDENT } else { INDENT };
    if form.len() > indent {
        _ = writeln!(out, "{form}");
        wrap(out, "", explanation, indent, width);
    } else {
        wrap(out, form, explanation, indent, width);
    }
}

/// Returns paragraphs, which a blank line separates, wrapped to `width` columns.
pub(in crate::cli) fn paragraphs(text: &str, width: usize) -> String {
    let mut out = String::new();
    for (number, paragraph) in text.split("\n\n").enumerate() {
        if number > 0 {
            out.push('\n');
        }
        wrap(&mut out, "", paragraph, 0, width);
    }
    out
}

/// Appends `first` and the words of `text`, in lines of at most `width` columns. All words start at column `indent`.
fn wrap(out: &mut String, first: &str, text: &str, indent: usize, width: usize) {
    let mut line = format!("{first:indent$}");
    let blank = if indent > 0 { " " } else { "" };
    let mut separator = blank;
    for word in text.split_whitespace() {
        let is_empty = line.trim_start().is_empty();
        if !is_empty && line.chars().count() + 1 + word.chars().count() > width {
            _ = writeln!(out, "{line}");
            line = " ".repeat(indent);
            separator = blank;
        }
        _ = write!(line, "{separator}{word}");
        separator = " ";
    }
    _ = writeln!(out, "{line}");
}
