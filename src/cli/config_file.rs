//! Reader of `--config FILE.toml`: a file that describes a mount → pairs.
//!
//! ```text
//!   readonly = true              keys above the first table ─► pairs that apply to all disks
//!
//!   [mount]
//!   options = "allow_other"      ─► pairs of the mount; those of `-o` in them apply to all disks, too
//!
//!   [[disk]]
//!   file = "a.vmdk"              ─► file=a.vmdk
//!   name = "a.img"               ─► name=a.img
//!
//!   [[disk]]
//!   command = "nbdkit"           ─► command=nbdkit
//!   arg = ["memory", "1G"]       ─► arg=memory arg=1G
//! ```
//!
//! This module knows neither the meaning of a key nor its valid values nor its conflicts: the pairs take the same way as
//! those of a command line. Each holds its line, and the folder of the file, where relative paths start.
//!
//! Errors from this module print no values, because values may be secrets.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::rc::Rc;

use toml::de::{DeInteger, DeTable, DeValue};

use super::disk_args::{DiskArgs, SourceArgs};
use super::key::{Scope, ValueKind};
use super::keys;
use super::options::{MOUNT_KEYS, MountArgs, MountKey, mount_key};
use super::outcome::UsageError;
use super::pair::{Origin, Pair};
use super::settings::{DiskKey, DiskPair};
use super::values::{self, display};

/// Largest file that is read, in bytes. It holds thousands of disks; a disk image given by mistake is usually larger.
const MAX_BYTES: u64 = 1 << 20;

/// Names of the tables in a file.
const TABLES: [&str; 2] = ["disk", "mount"];

/// Pairs of a file.
#[derive(Debug, Default)]
pub(super) struct ConfigFile {
    /// Name of the file, for messages.
    name: String,
    /// Options of the mount.
    mount: Vec<Pair<MountKey>>,
    /// Keys that apply to all disks.
    common: Vec<DiskPair>,
    /// Disks of the mount.
    disks: Vec<SourceArgs>,
}

impl ConfigFile {
    /// Applies the options of the mount to `mount_args`, and returns the disks.
    ///
    /// Fails as [`MountArgs::layer`] does, or if the options name a disk.
    pub(super) fn apply(self, mount_args: &mut MountArgs) -> Result<DiskArgs, UsageError> {
        let options = mount_args.layer(&self.mount)?;
        let disks = DiskArgs {
            common: Vec::new(),
            sources: self.disks,
            file: Some(self.name),
        };
        disks.with(self.common.into_iter().chain(options).collect())
    }
}

/// Reads a config file. Relative paths in it are relative to the folder of `name`, even if `name` is a symbolic link.
///
/// Fails if the file cannot be read, is not a regular file, is too large or is not TOML; if a key or table is unknown,
/// misplaced or not in this build; if a value has another type than the key; or if a disk has two sources. Errors name
/// the file and, if there is one, the line.
pub(super) fn read(name: &OsStr) -> Result<ConfigFile, UsageError> {
    let failed = |reason: String| UsageError::new(format!("--config {}: {reason}", display(name)));
    let path = values::path(name).map_err(failed)?;
    let bytes = load(&path).map_err(failed)?;
    let dir = path.parent().unwrap_or(Path::new("/")).into();
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
    /// Absolute folder where relative paths start.
    dir: Rc<Path>,
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
            name: display(self.name).to_string(),
            ..ConfigFile::default()
        };
        for entry in in_order(table.get_ref()) {
            match entry.name {
                "disk" => config.disks = self.disks(&entry)?,
                "mount" => config.mount = self.mount(&entry)?,
                _ => config.common.extend(self.common(&entry)?),
            }
        }
        Ok(config)
    }

    /// Converts a key above the tables to one pair for each of its values.
    fn common(&self, entry: &TomlEntry<'_>) -> Result<Vec<DiskPair>, UsageError> {
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
    fn disks(&self, entry: &TomlEntry<'_>) -> Result<Vec<SourceArgs>, UsageError> {
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
    fn disk(&self, table: &DeTable<'_>, at: usize) -> Result<SourceArgs, UsageError> {
        let mut source: Option<&DiskKey> = None;
        let mut pairs = Vec::new();
        for entry in in_order(table) {
            let key = self.key(&entry, keys::spellings())?;
            pairs.extend(self.pairs(key, &entry)?);
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
        let table = Some(format!("{}: [[disk]]", self.line(at)));
        Ok(SourceArgs { pairs, table })
    }

    /// Returns the key of an entry. Fails if it is unknown or not in this build; `known` gives the names to suggest.
    fn key(
        &self,
        entry: &TomlEntry<'_>,
        known: impl Iterator<Item = &'static str>,
    ) -> Result<&'static DiskKey, UsageError> {
        let key = keys::find(entry.name).ok_or_else(|| self.unknown(entry, known))?;
        key.available().map_err(|e| self.error(entry.at, e))?;
        Ok(key)
    }

    /// Converts the values of a key.
    fn pairs(&self, key: &'static DiskKey, entry: &TomlEntry<'_>) -> Result<Vec<DiskPair>, UsageError> {
        let values: Vec<&DeValue<'_>> = match entry.value {
            DeValue::Array(items) if key.repeats => items.iter().map(|item| item.get_ref()).collect(),
            value => vec![value],
        };
        let pair = |value| self.pair(key, entry, key.kind, value, key.repeats);
        values.into_iter().map(pair).collect()
    }

    /// Converts the `[mount]` table.
    fn mount(&self, entry: &TomlEntry<'_>) -> Result<Vec<Pair<MountKey>>, UsageError> {
        let DeValue::Table(table) = entry.value else {
            return Err(self.error(entry.at, "mount: must be written as one [mount] table"));
        };
        let pair = |entry: TomlEntry<'_>| {
            let key = mount_key(entry.name).ok_or_else(|| self.unknown_in_mount(&entry))?;
            self.pair(key, &entry, key.kind, entry.value, false)
        };
        in_order(table).into_iter().map(pair).collect()
    }

    /// Converts a TOML value to the text that a command line would have. Fails if its type does not fit `kind`.
    fn pair<K>(
        &self,
        key: &'static K,
        entry: &TomlEntry<'_>,
        kind: ValueKind,
        value: &DeValue<'_>,
        list: bool,
    ) -> Result<Pair<K>, UsageError> {
        let value = as_text(kind, value).ok_or_else(|| {
            let list = if list { ", or a list of them" } else { "" };
            let expected = kind.in_toml();
            self.error(entry.at, format_args!("{}: must be {expected}{list}", entry.name))
        })?;
        let (line, dir) = (self.line(entry.at), Rc::clone(&self.dir));
        let origin = Origin::File { line, dir };
        Ok(Pair { key, value, origin })
    }

    /// Creates the error for an unknown key in `[mount]`, with the right place for a key of disks.
    fn unknown_in_mount(&self, entry: &TomlEntry<'_>) -> UsageError {
        if keys::find(entry.name).is_some() {
            let hint = "it belongs above the first table, or in a [[disk]] table";
            return self.error(entry.at, format_args!("{} is a key of disks: {hint}", entry.name));
        }
        self.unknown(entry, MOUNT_KEYS.iter().map(|key| key.name))
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
        UsageError::new(what.to_string()).at(&self.line(at))
    }

    /// Returns the file and the line of byte `at`.
    fn line(&self, at: usize) -> String {
        format!("{}:{}", display(self.name), line_of(self.text.as_bytes(), at))
    }
}

/// Reads a regular file of at most [`MAX_BYTES`].
fn load(path: &Path) -> Result<Vec<u8>, String> {
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

#[cfg(test)]
mod tests;
