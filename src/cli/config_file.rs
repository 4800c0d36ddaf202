//! `--config FILE.toml`: a file that describes a mount → the keys and options that would say the same.
//!
//! ```text
//!   readonly = true              keys above the first table ─► keys of `-o`: they hold for all disks
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
//! What a key or option means, which values it takes and which keys go together is not known here: the table of keys and
//! the reader of the command line try each value once so that the error can tell its line, and the keys then go the way
//! of all keys; what is wrong with those of a table as a whole is told with its place.
//! Values that are no path are not repeated in an error from here: they may be secrets.

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
use super::keys::{self, Key, Kind, Scope};
use super::settings::Settings;
use super::values::{self, shown};

/// The largest file that is read, bytes: thousands of disks. A disk image given by mistake is larger.
const MAX_BYTES: u64 = 1 << 20;

/// The tables of a file.
const TABLES: [&str; 2] = ["disk", "mount"];

/// The keys of `[mount]`: but for `options`, which is `-o`, they are called as the long options are.
const MOUNT_KEYS: [(&str, Kind); 6] = [
    ("options", Kind::Text),
    ("read-only", Kind::Bool),
    ("threads", Kind::Count),
    ("pidfile", Kind::Path),
    ("log-file", Kind::Path),
    (
        "log-format",
        Kind::OneOf {
            words: &["text", "json"],
            later: &[],
        },
    ),
];

/// What a file describes.
#[derive(Debug)]
pub(super) struct Described {
    /// How to mount, with the keys that hold for all disks.
    pub(super) manner: MountArgs,
    /// The disks; at least one.
    pub(super) disks: Vec<Table>,
}

/// Reads the file of that name. Its relative paths count from the folder that this name is in, also where it is a link.
///
/// Errors name the file and, where there is one, the line: a file that cannot be read, is no regular one, too large or no
/// TOML; keys and tables that are unknown, misplaced or not in this build; values that do not fit; a disk without a source
/// or with two, and no disk at all.
pub(super) fn read(name: &OsStr) -> Result<Described, UsageError> {
    let failed = |reason: String| UsageError::new(format!("--config {}: {reason}", shown(name)));
    let path = values::path(name).map_err(failed)?;
    let bytes = load(&path).map_err(failed)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let line = line_of(&bytes, e.valid_up_to());
        UsageError::new(format!("{}:{line}: this is not UTF-8", shown(name)))
    })?;
    Document { name, dir, text }.describe()
}

/// A file in the course of being read.
struct Document<'a> {
    /// As the user wrote it.
    name: &'a OsStr,
    /// Where its relative paths start; absolute.
    dir: &'a Path,
    text: &'a str,
}

/// A key of a table.
struct Entry<'t> {
    name: &'t str,
    value: &'t DeValue<'t>,
    /// Where the key stands in the file, bytes.
    at: usize,
}

impl Document<'_> {
    fn describe(&self) -> Result<Described, UsageError> {
        let table = DeTable::parse(self.text).map_err(|e| match e.span() {
            Some(span) => self.error(span.start, e.message()),
            None => UsageError::new(format!("{}: {}", shown(self.name), e.message())),
        })?;
        let mut described = Described {
            manner: MountArgs::default(),
            disks: Vec::new(),
        };
        let mut common = Vec::new();
        for entry in in_order(table.get_ref()) {
            match entry.name {
                "disk" => described.disks = self.disks(&entry)?,
                "mount" => described.manner = self.mount(&entry)?,
                _ => common.extend(self.common(&entry)?),
            }
        }
        let options = &mut described.manner.options;
        // Here, since options of the command line may hide one or both.
        let twice = common
            .iter()
            .find(|(key, _)| !key.repeats && options.keys.iter().any(|(o, _)| o.name == key.name));
        if let Some((key, _)) = twice {
            let (name, key) = (shown(self.name), key.name);
            return Err(UsageError::new(format!(
                "{name}: {key} stands above the tables and in the options of [mount]"
            )));
        }
        options.keys.extend(common);
        if described.disks.is_empty() {
            let name = shown(self.name);
            return Err(UsageError::new(format!(
                "{name}: no disk is described: add a [[disk]] table with file, dir or uri, or an NBD server's keys"
            )));
        }
        Ok(described)
    }

    /// A key above the tables: as many pairs as it has values.
    fn common(&self, entry: &Entry<'_>) -> Result<Vec<(&'static Key, OsString)>, UsageError> {
        let spellings = || TABLES.into_iter().chain(keys::spellings());
        if keys::find(entry.name).is_none() && mount_key(entry.name).is_some() {
            return Err(self.error(entry.at, format_args!("{} belongs into the [mount] table", entry.name)));
        }
        let key = self.key(entry, spellings())?;
        if key.scope != Scope::Common {
            let reason = format!("{} is for one disk: it belongs into a [[disk]] table", key.name);
            return Err(self.error(entry.at, reason));
        }
        self.pairs(key, entry)
    }

    /// All `[[disk]]` tables.
    fn disks(&self, entry: &Entry<'_>) -> Result<Vec<Table>, UsageError> {
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

    /// One disk.
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
            place: self.error(at, "[[disk]]").to_string(),
            keys,
        })
    }

    /// The key that an entry names, if this build has it.
    fn key(&self, entry: &Entry<'_>, known: impl Iterator<Item = &'static str>) -> Result<&'static Key, UsageError> {
        let key = keys::find(entry.name).ok_or_else(|| self.unknown(entry, known))?;
        key.available().map_err(|e| self.error(entry.at, e))?;
        Ok(key)
    }

    /// The values of a key, each tried.
    fn pairs(&self, key: &'static Key, entry: &Entry<'_>) -> Result<Vec<(&'static Key, OsString)>, UsageError> {
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

    /// The `[mount]` table.
    fn mount(&self, entry: &Entry<'_>) -> Result<MountArgs, UsageError> {
        let DeValue::Table(table) = entry.value else {
            return Err(self.error(entry.at, "mount: must be written as one [mount] table"));
        };
        let mut options = Vec::new();
        for entry in in_order(table) {
            let Some(kind) = mount_key(entry.name) else {
                return Err(self.unknown_in_mount(&entry));
            };
            let Some(option) = option(entry.name, kind, &self.value(&entry, kind, entry.value, false)?) else {
                continue;
            };
            // Alone first, for an error that tells the line.
            let alone = MountArgs::parse([option.clone()]).map_err(|e| self.error(entry.at, e))?;
            self.check_keys(&alone, entry.at)?;
            options.push(option);
        }
        let mut manner = MountArgs::parse(options).map_err(|e| self.error(entry.at, e))?;
        manner.options.mount().map_err(|e| self.error(entry.at, e))?;
        for (key, value) in &mut manner.options.keys {
            *value = self.located(key.kind, value);
        }
        Ok(manner)
    }

    /// Checks the keys that stand in `options`.
    fn check_keys(&self, manner: &MountArgs, at: usize) -> Result<(), UsageError> {
        if let Some(key) = manner.options.source() {
            return Err(self.error(
                at,
                format_args!("-o {}= names a disk: write a [[disk]] table", key.name),
            ));
        }
        manner
            .options
            .keys
            .iter()
            .try_for_each(|(key, value)| self.try_value(at, key, value))
    }

    /// Lets the table of keys look at a value.
    fn try_value(&self, at: usize, key: &Key, value: &OsStr) -> Result<(), UsageError> {
        key.apply(&mut Settings::default(), value)
            .map_err(|e| self.error(at, e))
    }

    /// A value as a command line has it. Errors: another type than `kind` takes.
    fn value(&self, entry: &Entry<'_>, kind: Kind, value: &DeValue<'_>, list: bool) -> Result<OsString, UsageError> {
        let text = as_text(kind, value).ok_or_else(|| {
            let list = if list { ", or a list of such" } else { "" };
            self.error(
                entry.at,
                format_args!("{}: must be {}{list}", entry.name, kind.in_toml()),
            )
        })?;
        Ok(self.located(kind, &text))
    }

    /// A path made absolute against the file's folder; anything else, and nothing, as it is.
    fn located(&self, kind: Kind, value: &OsStr) -> OsString {
        match kind {
            Kind::PathOr(word) if value == word => value.to_owned(),
            Kind::Path | Kind::PathOr(_) if !value.is_empty() => self.dir.join(value).into_os_string(),
            _ => value.to_owned(),
        }
    }

    fn unknown_in_mount(&self, entry: &Entry<'_>) -> UsageError {
        if keys::find(entry.name).is_some() {
            let place = "it belongs above the first table, or into a [[disk]] table";
            return self.error(entry.at, format_args!("{} is a key of disks: {place}", entry.name));
        }
        self.unknown(entry, MOUNT_KEYS.into_iter().map(|(name, _)| name))
    }

    fn unknown(&self, entry: &Entry<'_>, known: impl Iterator<Item = &'static str>) -> UsageError {
        let hint = match keys::nearest_of(entry.name, known) {
            Some(known) => format!("did you mean {known}?"),
            None => "vmdkfuse --help lists the keys".into(),
        };
        let what = if is_table(entry.value) { "table" } else { "key" };
        // TOML allows any text for a key, line ends too.
        self.error(
            entry.at,
            format_args!("unknown {what} {}; {hint}", entry.name.escape_debug()),
        )
    }

    fn error(&self, at: usize, what: impl Display) -> UsageError {
        UsageError::new(format!(
            "{}:{}: {what}",
            shown(self.name),
            line_of(self.text.as_bytes(), at)
        ))
    }
}

/// The content of a regular file of bounded size.
fn load(path: &PathBuf) -> Result<Vec<u8>, String> {
    // Without waiting, should it be a FIFO.
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
            "larger than {} MiB, so it is hardly a config file",
            MAX_BYTES >> 20
        ));
    }
    Ok(bytes)
}

/// The line, from 1, of a position.
fn line_of(text: &[u8], at: usize) -> usize {
    1 + text.iter().take(at).filter(|byte| **byte == b'\n').count()
}

/// The entries of a table in the order of the file, so that the first error is the one that is told.
fn in_order<'t>(table: &'t DeTable<'t>) -> Vec<Entry<'t>> {
    let entry = |(name, value): (&'t toml::Spanned<_>, &'t toml::Spanned<DeValue<'t>>)| Entry {
        name: AsRef::<str>::as_ref(name.get_ref()),
        value: value.get_ref(),
        at: name.span().start,
    };
    let mut entries: Vec<_> = table.iter().map(entry).collect();
    entries.sort_by_key(|entry| entry.at);
    entries
}

fn mount_key(name: &str) -> Option<Kind> {
    MOUNT_KEYS
        .into_iter()
        .find(|(known, _)| *known == name)
        .map(|(_, kind)| kind)
}

fn is_table(value: &DeValue<'_>) -> bool {
    match value {
        DeValue::Table(_) => true,
        DeValue::Array(items) => items.iter().any(|item| matches!(item.get_ref(), DeValue::Table(_))),
        _ => false,
    }
}

/// A value as text, if its type fits.
fn as_text(kind: Kind, value: &DeValue<'_>) -> Option<OsString> {
    match (kind, value) {
        (Kind::Bool, DeValue::Boolean(yes)) => Some(yes.to_string().into()),
        (Kind::Size | Kind::Seconds | Kind::Count | Kind::Named(_), DeValue::Integer(number)) => decimal(number),
        (
            Kind::Size | Kind::Path | Kind::PathOr(_) | Kind::Text | Kind::Named(_) | Kind::OneOf { .. },
            DeValue::String(text),
        ) => Some(OsString::from(text.as_ref())),
        _ => None,
    }
}

/// TOML has hexadecimal numbers and the like; the keys do not.
fn decimal(number: &DeInteger<'_>) -> Option<OsString> {
    i128::from_str_radix(number.as_str(), number.radix())
        .ok()
        .map(|number| number.to_string().into())
}

/// `KEY=VALUE`, whatever the value holds.
fn word(name: &str, value: &OsStr) -> OsString {
    let mut word = OsString::from(name);
    word.push("=");
    word.push(value);
    word
}

/// The option that a key of `[mount]` stands for; none for a flag that is off.
fn option(name: &str, kind: Kind, value: &OsStr) -> Option<OsString> {
    match (name, kind) {
        ("options", _) => Some(word("-o", value)),
        (_, Kind::Bool) => (value == "true").then(|| format!("--{name}").into()),
        _ => Some(word(&format!("--{name}"), value)),
    }
}

#[cfg(test)]
mod tests;
