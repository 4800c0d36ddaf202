//! Sections of the completions: options, keys, and the values of keys that are words or paths.

use std::fmt::Write as _;

use clap::{Arg, ArgAction};

use super::super::flags::command;
use super::super::key::{Group, ValueKind};
use super::super::keys::ready;
use super::super::settings::DiskKey;
use super::roff::words_of;

/// Values of a boolean that are offered.
const BOOLEAN: [&str; 2] = ["true", "false"];

/// Words that a shell offers after `key=`.
enum Offer {
    Words(Vec<&'static str>),
    /// Files, and these words beside them.
    Files(Vec<&'static str>),
    Nothing,
}

fn offer(key: &DiskKey) -> Offer {
    match key.kind {
        ValueKind::Bool => Offer::Words(BOOLEAN.into()),
        ValueKind::OneOf { words, .. } | ValueKind::Known(words) => Offer::Words(words.into()),
        ValueKind::Path => Offer::Files(Vec::new()),
        ValueKind::PathOr(word) => Offer::Files(vec![word]),
        ValueKind::Size | ValueKind::Seconds | ValueKind::Count | ValueKind::Named(_) | ValueKind::Text => {
            Offer::Nothing
        }
    }
}

fn keys() -> impl Iterator<Item = &'static DiskKey> {
    Group::ALL.into_iter().flat_map(ready)
}

/// Calls `each` with every visible option: its names with hyphens, the option, and true if a value follows.
fn options(mut each: impl FnMut(&[String], &Arg, bool)) {
    for arg in command().get_arguments().filter(|arg| !arg.is_hide_set()) {
        let short = arg.get_short().map(|short| format!("-{short}"));
        let long = arg.get_long().map(|long| format!("--{long}"));
        let names: Vec<String> = short.into_iter().chain(long).collect();
        each(
            &names,
            arg,
            matches!(arg.get_action(), ArgAction::Set | ArgAction::Append),
        );
    }
}

/// First sentence of an explanation, for a list of candidates.
fn brief(text: &str) -> String {
    let text = text.split(" (default").next().unwrap_or_default();
    text.split("; ").next().unwrap_or_default().to_owned()
}

fn help_of(arg: &Arg) -> String {
    brief(&arg.get_help().map(ToString::to_string).unwrap_or_default())
}

pub(super) fn bash_keys() -> String {
    let names: Vec<String> = keys().map(|key| format!("{}=", key.name)).collect();
    format!("    local keys='{}'\n", names.join(" "))
}

/// The arms of a `case` on the key.
pub(super) fn bash_values() -> String {
    let mut out = String::new();
    for key in keys() {
        let names: Vec<&str> = std::iter::once(key.name).chain(key.aliases.iter().copied()).collect();
        let names = names.join("|");
        _ = match offer(key) {
            Offer::Words(words) => writeln!(out, "        {names}) words='{}' ;;", words.join(" ")),
            Offer::Files(words) => writeln!(out, "        {names}) words='{}' files=1 ;;", words.join(" ")),
            Offer::Nothing => Ok(()),
        };
    }
    out
}

pub(super) fn bash_options() -> String {
    let mut all = Vec::new();
    options(|names, _, _| all.extend(names.iter().cloned()));
    format!("    local options='{}'\n", all.join(" "))
}

pub(super) fn zsh_keys() -> String {
    let mut out = String::new();
    for key in keys() {
        let help = quoted(&brief(&key.explanation()));
        _ = writeln!(out, "    '{}:{help}'", key.name);
    }
    out
}

pub(super) fn zsh_values() -> String {
    let mut out = String::new();
    for key in keys() {
        let names: Vec<&str> = std::iter::once(key.name).chain(key.aliases.iter().copied()).collect();
        let names = names.join("|");
        _ = match offer(key) {
            Offer::Words(words) => writeln!(out, "      ({names}) compadd -- {} ;;", words.join(" ")),
            Offer::Files(words) if words.is_empty() => writeln!(out, "      ({names}) _files ;;"),
            Offer::Files(words) => writeln!(out, "      ({names}) compadd -- {}; _files ;;", words.join(" ")),
            Offer::Nothing => Ok(()),
        };
    }
    out
}

pub(super) fn zsh_options() -> String {
    let mut out = String::new();
    options(|names, arg, valued| {
        let help = quoted(&help_of(arg))
            .replace('[', "\\[")
            .replace(']', "\\]")
            .replace(':', "\\:");
        let action = match (valued, words_of(arg)) {
            (false, _) => String::new(),
            (true, Some(words)) => format!(":value:({})", words.join(" ")),
            (true, None) if names.iter().any(|name| name == "-o") => ":option:_vmdkfuse_mount_options".into(),
            (true, None) if names.iter().any(|name| name == "--threads") => ":number: ".into(),
            (true, None) => ":file:_files".into(),
        };
        let repeats = matches!(arg.get_action(), ArgAction::Append | ArgAction::Count);
        for name in names {
            let star = if repeats { "*" } else { "" };
            _ = writeln!(out, "    '{star}{name}[{help}]{action}' \\");
        }
    });
    out
}

/// Quotes for a text in single quotes, where a colon would end the name of a candidate.
fn quoted(text: &str) -> String {
    text.replace('\'', "'\\''").replace('`', "")
}

pub(super) fn fish_keys() -> String {
    let mut out = String::new();
    for key in keys() {
        let help = brief(&key.explanation()).replace('\\', "").replace('\'', "\\'");
        _ = writeln!(out, "    printf '%s\\t%s\\n' {}= '{help}'", key.name);
        if let Offer::Words(words) | Offer::Files(words) = offer(key) {
            for word in words {
                _ = writeln!(out, "    printf '%s\\t%s\\n' {}={word} '{help}'", key.name);
            }
        }
    }
    out
}

pub(super) fn fish_options() -> String {
    let mut out = String::new();
    options(|names, arg, valued| {
        let mut line = String::from("complete -c vmdkfuse");
        for name in names {
            _ = match name.strip_prefix("--") {
                Some(long) => write!(line, " -l {long}"),
                None => write!(line, " -s {}", name.trim_start_matches('-')),
            };
        }
        let values = match words_of(arg) {
            Some(words) if valued => format!(" -x -a '{}'", words.join(" ")),
            _ if valued => " -r".into(),
            _ => String::new(),
        };
        let help = help_of(arg).replace('\\', "").replace('\'', "\\'");
        _ = writeln!(out, "{line}{values} -d '{help}'");
    });
    out
}
