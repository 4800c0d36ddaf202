//! Sections of the manual pages, in the man macros of roff.

use std::fmt::Write as _;

use clap::{Arg, ArgAction};

use super::super::flags::command;
use super::super::key::{Group, ValueKind};
use super::super::keys::ready;
use super::super::options::{MOUNT_KEYS, MountKey};
use super::super::settings::DiskKey;

/// Widest line of the source; mandoc's lint complains about longer ones than 80.
const WIDTH: usize = 78;

/// Returns the options of the program, by the headings of the help.
pub(super) fn options() -> String {
    let command = command();
    let mut out = String::new();
    let mut last = "";
    let mut arguments: Vec<&Arg> = command.get_arguments().filter(|arg| !arg.is_hide_set()).collect();
    arguments.sort_by_key(|arg| position(arg));
    for arg in arguments {
        let heading = arg.get_help_heading().unwrap_or_default();
        if heading != last {
            _ = writeln!(out, ".SS {heading}");
            last = heading;
        }
        let short = arg.get_short().map(|short| format!("\\fB\\-{short}\\fR"));
        let long = arg
            .get_long()
            .map(|long| format!("\\fB{}\\fR", escape(&format!("--{long}"))));
        let names: Vec<String> = short.into_iter().chain(long).collect();
        let value = match arg.get_value_names() {
            Some([name, ..]) if matches!(arg.get_action(), ArgAction::Set | ArgAction::Append) => {
                format!(" \\fI{}\\fR", escape(name))
            }
            _ => String::new(),
        };
        _ = writeln!(out, ".TP\n{}{value}", names.join(", "));
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        text(&mut out, &format!("{help}."));
        if let Some(words) = words_of(arg) {
            text(&mut out, &format!("Values: {}.", words.join(", ")));
        }
    }
    out
}

/// Position of an option in the manual: the headings stand in the order of their first options.
fn position(arg: &Arg) -> usize {
    let order = ["Options of a mount", "Actions other than a mount", "Log", "Information"];
    order
        .iter()
        .position(|heading| arg.get_help_heading() == Some(heading))
        .unwrap_or(order.len())
}

/// Returns the words that an option accepts, if they are a fixed set.
pub(super) fn words_of(arg: &Arg) -> Option<Vec<String>> {
    let words: Vec<String> = arg
        .get_possible_values()
        .iter()
        .map(|value| value.get_name().to_owned())
        .collect();
    (!words.is_empty() && matches!(arg.get_action(), ArgAction::Set)).then_some(words)
}

/// Returns the keys by group.
pub(super) fn keys() -> String {
    sections(|key| format!("\\fI{}\\fR", escape(&key.kind.placeholder())), "=")
}

/// Returns the keys by group, with the TOML values that they take.
pub(super) fn toml_keys() -> String {
    sections(
        |key| {
            let value = key.kind.in_toml();
            let value = if key.repeats {
                format!("{value}, or a list of such values")
            } else {
                value
            };
            format!("\\fI{}\\fR", escape(&value))
        },
        " = ",
    )
}

/// Returns the keys of the table `[mount]`.
pub(super) fn mount_table() -> String {
    let mut out = String::new();
    for MountKey { name, kind, help, .. } in &MOUNT_KEYS {
        _ = writeln!(
            out,
            ".TP\n\\fB{}\\fR = \\fI{}\\fR",
            escape(name),
            escape(&kind.in_toml())
        );
        text(&mut out, &format!("{help}."));
    }
    out
}

fn sections(value: impl Fn(&DiskKey) -> String, equals: &str) -> String {
    let mut out = String::new();
    for group in Group::ALL {
        let mut keys = ready(group).peekable();
        if keys.peek().is_some() {
            _ = writeln!(out, ".SS {}", group.title());
        }
        for key in keys {
            _ = writeln!(out, ".TP\n\\fB{}\\fR{equals}{}", escape(key.name), value(key));
            entry(&mut out, key);
        }
    }
    out
}

/// Appends what is known of a key: explanation, default, other names, and the back ends that accept it.
fn entry(out: &mut String, key: &DiskKey) {
    let explanation = key.explanation();
    let (before, default) = match explanation.split_once(" (default: ") {
        // The default may hold parentheses of its own; what follows the last one is about the key again.
        Some((before, rest)) => {
            let (default, after) = rest
                .rsplit_once(") (")
                .map_or((rest.trim_end_matches(')'), None), |(d, a)| (d, Some(a)));
            (
                after.map_or(before.to_owned(), |after| format!("{before} ({after}")),
                Some(default.to_owned()),
            )
        }
        None => (explanation, None),
    };
    let mut letters = before.chars();
    let first = letters.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    // A first word that is a value or an address keeps its case.
    let is_word = before
        .split(' ')
        .next()
        .is_some_and(|word| word.chars().all(|c| c.is_ascii_lowercase() || c == ','));
    let sentence = if is_word && !matches!(key.kind, ValueKind::Known(_)) {
        first + letters.as_str()
    } else {
        before
    };
    text(out, &format!("{sentence}."));
    if let Some(default) = default {
        text(out, &format!("Default: {default}."));
    }
    if !key.aliases.is_empty() {
        text(out, &format!("Also: {}=.", key.aliases.join("=, ")));
    }
    text(out, &format!("Back ends: {}.", back_ends(key)));
}

/// Returns the back ends that accept the key.
fn back_ends(key: &DiskKey) -> String {
    if key.group == Group::Every || key.group == Group::Views {
        return "all".into();
    }
    let names = [
        (Group::Local, "native"),
        (Group::Create, "native"),
        (Group::VMware, "https"),
        (Group::Vddk, "vddk"),
        (Group::Nbd, "nbd"),
    ];
    let fitting: Vec<&str> = names
        .iter()
        .filter(|(group, _)| key.fits(*group))
        .map(|(_, name)| *name)
        .collect();
    fitting.join(", ")
}

/// Appends a text, wrapped and escaped.
fn text(out: &mut String, text: &str) {
    let mut line = String::new();
    for word in text.split_whitespace().map(escape) {
        if !line.is_empty() && line.len() + 1 + word.len() > WIDTH {
            _ = writeln!(out, "{line}");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        // A line that starts with a dot or an apostrophe would be a request.
        if line.is_empty() && word.starts_with(['.', '\'']) {
            line.push_str("\\&");
        }
        line.push_str(&word);
    }
    _ = writeln!(out, "{line}");
}

/// Escapes what roff would change: backslashes, and hyphens, which users copy.
fn escape(text: &str) -> String {
    text.replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('\'', "\\(aq")
        .replace('`', "\\(ga")
}
