//! Reader of `--config FILE.toml`: converts a file that describes a mount to the equivalent keys and options.
//!
//! ```text
//!   readonly = true              keys above the first table ─► keys of `-o`: they apply to all disks
//!
//!   [mount]
//!   options = "allow_other"      ─► the options -o, -r, --threads, --pidfile, --log-file, --log-format
//!
//!   [[disk]]
//!   file = "a.vmdk"              ─► file=/where/the/file/is/a.vmdk
//!   name = "a.img"               ─► name=a.img
//!
//!   [[disk]]
//!   command = "nbdkit"           ─► command=nbdkit
//!   arg = ["memory", "1G"]       ─► arg=memory arg=1G
//! ```
//!
//! This module knows neither the meaning of a key nor its valid values nor its conflicts. The table of keys and the
//! parser of the command line check each value once, on its own, so that an error can name the line. After that the
//! keys take the same way as those of a command line. An error about the keys of a table as a whole starts with the
//! table's location.
//!
//! Errors from this module print no values except paths, because values may be secrets.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use toml::de::{DeInteger, DeTable, DeValue};

use super::UsageError;
use super::args::MountArgs;
use super::disk_args::Table;
use super::keys::{self, Key, Scope, ValueKind};
use super::settings::Settings;
use super::values::{self, display};

/// Largest file that is read, in bytes. It holds thousands of disks; a disk image given by mistake is usually larger.
const MAX_BYTES: u64 = 1 << 20;

/// Names of the tables in a file.
const TABLES: [&str; 2] = ["disk", "mount"];

/// Key of `[mount]` that is an argument of the command line and no option.
const MOUNT_POINT: &str = "mountpoint";

/// Keys of `[mount]`. Except for the mount point, and for `options`, which is `-o`, they have the names of the long options.
pub(super) const MOUNT_KEYS: [(&str, ValueKind, &str); 7] = [
    (
        MOUNT_POINT,
        ValueKind::Path,
        "Mount point; another one on the command line counts",
    ),
    ("options", ValueKind::Text, "Options as for -o"),
    ("read-only", ValueKind::Bool, "Mount read-only"),
    ("threads", ValueKind::Count, "Number of event loops, 1 to 64"),
    ("pidfile", ValueKind::Path, "Write the process ID to this file"),
    ("log-file", ValueKind::Path, "Append log messages to this file"),
    (
        "log-format",
        ValueKind::OneOf {
            words: &["text", "json"],
            later: &[],
        },
        "Format of log messages",
    ),
];

/// Parsed content of a file.
#[derive(Debug)]
pub(super) struct ConfigFile {
    /// Options of the mount, including the keys that apply to all disks.
    pub(super) mount_args: MountArgs,
    /// Mount point, as an absolute path, if the file names one.
    pub(super) mount_point: Option<OsString>,
    /// Disks of the mount, at least one.
    pub(super) disks: Vec<Table>,
}

/// Reads a config file. Relative paths in it are relative to the folder of `name`, even if `name` is a symbolic link.
///
/// Fails if the file cannot be read, is not a regular file, is too large or is not TOML; if a key or table is unknown,
/// misplaced or not in this build; if a value is invalid; if a disk has two sources; or if there is no disk. Errors
/// name the file and, if there is one, the line.
pub(super) fn read(name: &OsStr) -> Result<ConfigFile, UsageError> {
    let failed = |reason: String| UsageError::new(format!("--config {}: {reason}", display(name)));
    let path = values::path(name).map_err(failed)?;
    let bytes = load(&path).map_err(failed)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let line = line_of(&bytes, e.valid_up_to());
        UsageError::new(format!("{}:{line}: this is not UTF-8", display(name)))
    })?;
    Document { name, dir, text }.describe()
}

/// Text of a file that is being parsed.
struct Document<'a> {
    /// Name of the file as given, for messages.
    name: &'a OsStr,
    /// Absolute folder that relative paths are resolved against.
    dir: &'a Path,
    text: &'a str,
}

/// One key of a TOML table with its value.
struct TomlEntry<'t> {
    name: &'t str,
    value: &'t DeValue<'t>,
    /// Byte offset of the key in the file.
    at: usize,
}

impl Document<'_> {
    fn describe(&self) -> Result<ConfigFile, UsageError> {
        let table = DeTable::parse(self.text).map_err(|e| match e.span() {
            Some(span) => self.error(span.start, e.message()),
            None => UsageError::new(format!("{}: {}", display(self.name), e.message())),
        })?;
        let mut config = ConfigFile {
            mount_args: MountArgs::default(),
            mount_point: None,
            disks: Vec::new(),
        };
        let mut common = Vec::new();
        for entry in in_order(table.get_ref()) {
            match entry.name {
                "disk" => config.disks = self.disks(&entry)?,
                "mount" => (config.mount_args, config.mount_point) = self.mount(&entry)?,
                _ => common.extend(self.common(&entry)?),
            }
        }
        let options = &mut config.mount_args.options;
        // Duplicates are found here, before options of the command line can override one or both of them.
        let twice = common
            .iter()
            .find(|(key, _)| !key.repeats && options.keys.iter().any(|(o, _)| o.name == key.name));
        if let Some((key, _)) = twice {
            let (name, key) = (display(self.name), key.name);
            return Err(UsageError::new(format!(
                "{name}: {key} is given twice: above the tables and in the options of [mount]"
            )));
        }
        options.keys.extend(common);
        if config.disks.is_empty() {
            let name = display(self.name);
            return Err(UsageError::new(format!(
                "{name}: no disk is given: add a [[disk]] table with file, dir or uri, or an NBD server's keys"
            )));
        }
        Ok(config)
    }

    /// Converts a key above the tables to one pair for each of its values.
    fn common(&self, entry: &TomlEntry<'_>) -> Result<Vec<(&'static Key, OsString)>, UsageError> {
        let spellings = || TABLES.into_iter().chain(keys::spellings());
        if keys::find(entry.name).is_none() && mount_key(entry.name).is_some() {
            return Err(self.error(entry.at, format_args!("{} belongs in the [mount] table", entry.name)));
        }
        let key = self.key(entry, spellings())?;
        if key.scope != Scope::Common {
            let reason = format!("{} is for one disk: it belongs in a [[disk]] table", key.name);
            return Err(self.error(entry.at, reason));
        }
        self.pairs(key, entry)
    }

    /// Converts all `[[disk]]` tables.
    fn disks(&self, entry: &TomlEntry<'_>) -> Result<Vec<Table>, UsageError> {
        let wrong = || self.error(entry.at, "disk: must be written as [[disk]] tables");
        let DeValue::Array(items) = entry.value else {
            return Err(wrong());
        };
        let disk = |item: &toml::Spanned<DeValue<'_>>| match item.get_ref() {
            DeValue::Table(table) => self.disk(table, item.span().start),
            _ => Err(wrong()),
        };
        items.iter().map(disk).collect()
    }

    /// Converts one `[[disk]]` table, which starts at byte `at` of the file.
    fn disk(&self, table: &DeTable<'_>, at: usize) -> Result<Table, UsageError> {
        let mut source: Option<&Key> = None;
        let mut keys = Vec::new();
        for entry in in_order(table) {
            let key = self.key(&entry, keys::spellings())?;
            keys.extend(self.pairs(key, &entry)?);
            match (key.scope, source) {
                (Scope::Starts, Some(other)) => {
                    let reason = format!(
                        "a disk has one source, but this one has {} and {}",
                        other.name, key.name
                    );
                    return Err(self.error(entry.at, reason));
                }
                (Scope::Starts, None) => source = Some(key),
                (Scope::OneDisk | Scope::Common, _) => {}
            }
        }
        Ok(Table {
            location: self.error(at, "[[disk]]").to_string(),
            keys,
        })
    }

    /// Returns the key of an entry. Fails if it is unknown or not in this build; `known` gives the names to suggest.
    fn key(
        &self,
        entry: &TomlEntry<'_>,
        known: impl Iterator<Item = &'static str>,
    ) -> Result<&'static Key, UsageError> {
        let key = keys::find(entry.name).ok_or_else(|| self.unknown(entry, known))?;
        key.available().map_err(|e| self.error(entry.at, e))?;
        Ok(key)
    }

    /// Converts the values of a key, after checking each one on its own.
    fn pairs(&self, key: &'static Key, entry: &TomlEntry<'_>) -> Result<Vec<(&'static Key, OsString)>, UsageError> {
        let values: Vec<&DeValue<'_>> = match entry.value {
            DeValue::Array(items) if key.repeats => items.iter().map(|item| item.get_ref()).collect(),
            value => vec![value],
        };
        let pair = |value| {
            let value = self.value(entry, key.kind, value, key.repeats)?;
            self.try_value(entry.at, key, &value)?;
            Ok((key, value))
        };
        values.into_iter().map(pair).collect()
    }

    /// Converts the `[mount]` table to options and, if there is one, the mount point.
    fn mount(&self, entry: &TomlEntry<'_>) -> Result<(MountArgs, Option<OsString>), UsageError> {
        let DeValue::Table(table) = entry.value else {
            return Err(self.error(entry.at, "mount: must be written as one [mount] table"));
        };
        let (mut options, mut mount_point) = (Vec::new(), None);
        for entry in in_order(table) {
            let Some(kind) = mount_key(entry.name) else {
                return Err(self.unknown_in_mount(&entry));
            };
            let value = self.value(&entry, kind, entry.value, false)?;
            if entry.name == MOUNT_POINT {
                values::path(&value).map_err(|e| self.error(entry.at, format_args!("{MOUNT_POINT}: {e}")))?;
                mount_point = Some(value);
                continue;
            }
            let Some(option) = option(entry.name, kind, &value) else {
                continue;
            };
            // Each option is parsed on its own first: clap reports no position, and so the error can name the line.
            let alone = MountArgs::parse([option.clone()]).map_err(|e| self.error(entry.at, e))?;
            self.check_keys(&alone, entry.at)?;
            options.push(option);
        }
        let mut mount_args = MountArgs::parse(options).map_err(|e| self.error(entry.at, e))?;
        mount_args.options.mount().map_err(|e| self.error(entry.at, e))?;
        for (key, value) in &mut mount_args.options.keys {
            *value = self.resolve_path(key.kind, value);
        }
        Ok((mount_args, mount_point))
    }

    /// Checks the keys in the value of `options`.
    fn check_keys(&self, mount_args: &MountArgs, at: usize) -> Result<(), UsageError> {
        if let Some(key) = mount_args.options.source() {
            return Err(self.error(at, format_args!("-o {}= names a disk: use a [[disk]] table", key.name)));
        }
        mount_args
            .options
            .keys
            .iter()
            .try_for_each(|(key, value)| self.try_value(at, key, value))
    }

    /// Checks a value with the table of keys, without storing it.
    fn try_value(&self, at: usize, key: &Key, value: &OsStr) -> Result<(), UsageError> {
        key.apply(&mut Settings::default(), value)
            .map_err(|e| self.error(at, e))
    }

    /// Converts a TOML value to the text that a command line would have. Fails if its type does not fit `kind`.
    fn value(
        &self,
        entry: &TomlEntry<'_>,
        kind: ValueKind,
        value: &DeValue<'_>,
        list: bool,
    ) -> Result<OsString, UsageError> {
        let text = as_text(kind, value).ok_or_else(|| {
            let list = if list { ", or a list of them" } else { "" };
            self.error(
                entry.at,
                format_args!("{}: must be {}{list}", entry.name, kind.in_toml()),
            )
        })?;
        Ok(self.resolve_path(kind, &text))
    }

    /// Makes a path absolute, relative to the file's folder. Returns other values, and empty ones, unchanged.
    fn resolve_path(&self, kind: ValueKind, value: &OsStr) -> OsString {
        match kind {
            ValueKind::PathOr(word) if value == word => value.to_owned(),
            ValueKind::Path | ValueKind::PathOr(_) if !value.is_empty() => self.dir.join(value).into_os_string(),
            _ => value.to_owned(),
        }
    }

    /// Creates the error for an unknown key in `[mount]`, with the right place for a key of disks.
    fn unknown_in_mount(&self, entry: &TomlEntry<'_>) -> UsageError {
        if keys::find(entry.name).is_some() {
            let hint = "it belongs above the first table, or in a [[disk]] table";
            return self.error(entry.at, format_args!("{} is a key of disks: {hint}", entry.name));
        }
        self.unknown(entry, MOUNT_KEYS.into_iter().map(|(name, ..)| name))
    }

    /// Creates the error for an unknown key or table, with a suggestion from `known`.
    fn unknown(&self, entry: &TomlEntry<'_>, known: impl Iterator<Item = &'static str>) -> UsageError {
        let hint = match keys::nearest_of(entry.name, known) {
            Some(known) => format!("did you mean {known}?"),
            None => "vmdkfuse --help lists the keys".into(),
        };
        let what = if is_table(entry.value) { "table" } else { "key" };
        // TOML allows any text as a key, including line breaks, and the error must be one line.
        self.error(
            entry.at,
            format_args!("unknown {what} {}; {hint}", entry.name.escape_debug()),
        )
    }

    /// Creates an error that starts with the file and the line of byte `at`.
    fn error(&self, at: usize, what: impl Display) -> UsageError {
        UsageError::new(format!(
            "{}:{}: {what}",
            display(self.name),
            line_of(self.text.as_bytes(), at)
        ))
    }
}

/// Reads a regular file of at most [`MAX_BYTES`].
fn load(path: &PathBuf) -> Result<Vec<u8>, String> {
    // O_NONBLOCK: opening a FIFO must not block. O_NOCTTY: opening a terminal must not make it the controlling one.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = file.map_err(|e| e.to_string())?;
    if !file.metadata().map_err(|e| e.to_string())?.is_file() {
        return Err("not a regular file".into());
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!(
            "larger than {} MiB, so probably not a config file",
            MAX_BYTES >> 20
        ));
    }
    Ok(bytes)
}

/// Returns the line number, from 1, of a byte offset.
fn line_of(text: &[u8], at: usize) -> usize {
    1 + text.iter().take(at).filter(|byte| **byte == b'\n').count()
}

/// Returns the entries of a table in the order of the file, so that the first error in the file is the one reported.
fn in_order<'t>(table: &'t DeTable<'t>) -> Vec<TomlEntry<'t>> {
    let entry = |(name, value): (&'t toml::Spanned<_>, &'t toml::Spanned<DeValue<'t>>)| TomlEntry {
        name: AsRef::<str>::as_ref(name.get_ref()),
        value: value.get_ref(),
        at: name.span().start,
    };
    let mut entries: Vec<_> = table.iter().map(entry).collect();
    entries.sort_by_key(|entry| entry.at);
    entries
}

/// Returns the form of the value of a `[mount]` key, or `None` if the key is unknown.
fn mount_key(name: &str) -> Option<ValueKind> {
    MOUNT_KEYS
        .into_iter()
        .find(|(known, ..)| *known == name)
        .map(|(_, kind, _)| kind)
}

/// Returns true for a table or an array of tables.
fn is_table(value: &DeValue<'_>) -> bool {
    match value {
        DeValue::Table(_) => true,
        DeValue::Array(items) => items.iter().any(|item| matches!(item.get_ref(), DeValue::Table(_))),
        _ => false,
    }
}

/// Returns a value as text, or `None` if its type does not fit `kind`.
fn as_text(kind: ValueKind, value: &DeValue<'_>) -> Option<OsString> {
    match (kind, value) {
        (ValueKind::Bool, DeValue::Boolean(yes)) => Some(yes.to_string().into()),
        (ValueKind::Size | ValueKind::Seconds | ValueKind::Count | ValueKind::Named(_), DeValue::Integer(number)) => {
            decimal(number)
        }
        (
            ValueKind::Size
            | ValueKind::Path
            | ValueKind::PathOr(_)
            | ValueKind::Text
            | ValueKind::Known(_)
            | ValueKind::Named(_)
            | ValueKind::OneOf { .. },
            DeValue::String(text),
        ) => Some(OsString::from(text.as_ref())),
        _ => None,
    }
}

/// Converts an integer to decimal. TOML also has hexadecimal, octal and binary integers, which the keys do not accept.
fn decimal(number: &DeInteger<'_>) -> Option<OsString> {
    i128::from_str_radix(number.as_str(), number.radix())
        .ok()
        .map(|number| number.to_string().into())
}

/// Joins a name and a value that may not be UTF-8 to `NAME=VALUE`.
fn word(name: &str, value: &OsStr) -> OsString {
    let mut word = OsString::from(name);
    word.push("=");
    word.push(value);
    word
}

/// Returns the command-line option of a `[mount]` key, or `None` for a flag that is off.
fn option(name: &str, kind: ValueKind, value: &OsStr) -> Option<OsString> {
    match (name, kind) {
        ("options", _) => Some(word("-o", value)),
        (_, ValueKind::Bool) => (value == "true").then(|| format!("--{name}").into()),
        _ => Some(word(&format!("--{name}"), value)),
    }
}

#[cfg(test)]
mod tests;
