//! The words after the mount point, `KEY=VALUE` and bare sources, or the tables of a file → disks.
//!
//! ```text
//!   words ─ words.rs ─► (key, value) ─ keys table ─► Settings: common, then one a source
//!                                                        │ wildcards and folders give their files
//!                                                        ▼
//!                                             Requested: one a disk, common keys below its own
//! ```
//! All keys are checked before the first look at the file system.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};

use super::keys::{Key, Scope};
use super::settings::{Place, Settings};
use super::writing::{self, Subcommand};
use super::{
    UsageError, argument,
    values::{self, shown},
};
use crate::config::DiskConfig;

/// What names a disk, for messages.
const SOURCES: &str = "add file, dir or uri, or an NBD server's hostname, socket, socket-fd, vsock-cid or command";

/// Where disks are asked for.
#[derive(Debug, Clone, Copy)]
pub(super) enum DiskArgs<'a> {
    /// In `KEY=VALUE` words and bare sources.
    Words(&'a [OsString]),
    /// In the tables of a file.
    Tables(&'a [Table]),
}

/// A table of a file that describes one source.
#[derive(Debug)]
pub(super) struct Table {
    /// The file, the line and what it is called, for messages.
    pub(super) place: String,
    /// Its keys, in their order.
    pub(super) keys: Vec<(&'static Key, OsString)>,
}

/// What was said about one source.
#[derive(Debug, Default)]
struct Group {
    settings: Settings,
    /// See [`Table`].
    place: Option<String>,
}

/// One disk, all its settings gathered; its name is still open.
#[derive(Debug)]
pub(super) struct ResolvedDisk {
    place: Place,
    settings: Settings,
    /// The place of its table.
    table: Option<String>,
}

impl ResolvedDisk {
    /// The name that the user asked for.
    pub(super) fn wanted_name(&self) -> Option<&OsStr> {
        self.settings.name.as_deref()
    }

    fn into_config(self, fixed: Option<&OsStr>, subcommand: Subcommand) -> Result<DiskConfig, UsageError> {
        self.settings
            .config(self.place, fixed, subcommand)
            .map_err(|e| within(self.table.as_deref(), e))
    }
}

/// The finished disks; `fixed` is a name that the mount point gives the only one.
///
/// Errors: keys that do not go together, or two disks that would be in each other's way.
pub(super) fn configs(
    resolved: Vec<ResolvedDisk>,
    fixed: Option<&OsStr>,
    subcommand: Subcommand,
) -> Result<Vec<DiskConfig>, UsageError> {
    let disks = resolved
        .into_iter()
        .map(|disk| disk.into_config(fixed, subcommand))
        .collect::<Result<Vec<_>, _>>()?;
    writing::check_files(&disks)?;
    Ok(disks)
}

/// The disks that are asked for, in their order. The keys of `options` (from `-o`) hold for all disks, wherever they
/// stood; a source among them is a disk before those of the words.
///
/// Errors: unknown and unfit keys, a source that gives no file, `name=` for several disks, no disk at all. Those of a
/// table tell its place.
pub(super) fn disks(
    options: &[(&'static Key, OsString)],
    disk_args_given: DiskArgs<'_>,
    subcommand: Subcommand,
) -> Result<Vec<ResolvedDisk>, UsageError> {
    let (common, mut groups) = settings(options, disk_args_given)?;
    // Keys that name a server start no disk by themselves: they may stand in any order.
    if groups.is_empty() && common.nbd.is_named() {
        groups.push(Group::default());
    }
    let mut disks = Vec::new();
    for group in &groups {
        let failed = |e| within(group.place.as_deref(), e);
        let settings = group.settings.over(&common);
        let places = settings.places(subcommand).map_err(failed)?;
        match (&group.settings.name, places.len()) {
            (Some(name), many @ 2..) => return Err(failed(name_of_many(name, many))),
            (_, 0) => return Err(failed(UsageError::new(format!("no disk is named: {SOURCES}")))),
            _ => {}
        }
        let resolved = |place| ResolvedDisk {
            place,
            settings: settings.clone(),
            table: group.place.clone(),
        };
        disks.extend(places.into_iter().map(resolved));
    }
    match (&common.name, disks.len()) {
        (_, 0) => Err(UsageError::new(
            "no disk is given: add file=PATH, or uri= of an NBD server",
        )),
        (Some(name), many @ 2..) => Err(name_of_many(name, many)),
        _ => Ok(disks),
    }
}

/// Checks that every disk can be a file of one folder. Errors: two of the same name, or a name that no file can have.
pub(super) fn check_names(disks: &[DiskConfig]) -> Result<(), UsageError> {
    let mut seen: HashMap<&OsStr, &DiskConfig> = HashMap::new();
    for disk in disks {
        let path = disk.source.label();
        values::file_name(&disk.name)
            .map_err(|e| UsageError::new(format!("{path} cannot be called {}: {e}; use name=", shown(&disk.name))))?;
        if let Some(other) = seen.insert(&disk.name, disk) {
            return Err(UsageError::new(format!(
                "{} and {path} would both be called {}: use name= for one of them",
                other.source.label(),
                shown(&disk.name),
            )));
        }
    }
    Ok(())
}

/// What holds for all disks, and what for each source.
fn settings(
    options: &[(&'static Key, OsString)],
    disk_args_given: DiskArgs<'_>,
) -> Result<(Settings, Vec<Group>), UsageError> {
    let mut common = Settings::default();
    let mut groups: Vec<Group> = Vec::new();
    for (key, value) in options {
        match key.scope {
            Scope::Starts => start(&mut groups, key, value)?,
            Scope::OneDisk | Scope::Common => common.add(key, value)?,
        }
    }
    match disk_args_given {
        DiskArgs::Words(words) => {
            let from_options = groups.len();
            for word in words {
                let (key, value) = argument::read(word)?;
                match (key.scope, groups.len() > from_options) {
                    (Scope::Starts, _) => start(&mut groups, key, value)?,
                    (_, true) => groups.last_mut().map_or(Ok(()), |last| last.settings.add(key, value))?,
                    (_, false) => common.add(key, value)?,
                }
            }
        }
        DiskArgs::Tables(tables) => {
            for Table { place, keys } in tables {
                let mut group = Group {
                    place: Some(place.clone()),
                    ..Group::default()
                };
                let added = keys.iter().try_for_each(|(key, value)| group.settings.add(key, value));
                added.map_err(|e| within(Some(place), e))?;
                groups.push(group);
            }
        }
    }
    Ok((common, groups))
}

fn start(groups: &mut Vec<Group>, key: &'static Key, value: &OsStr) -> Result<(), UsageError> {
    let mut group = Group::default();
    group.settings.add(key, value)?;
    groups.push(group);
    Ok(())
}

/// An error with the place of the table that it is in.
fn within(table: Option<&str>, e: UsageError) -> UsageError {
    match table {
        Some(place) => UsageError::new(format!("{place}: {e}")),
        None => e,
    }
}

fn name_of_many(name: &OsStr, disks: usize) -> UsageError {
    UsageError::new(format!(
        "name={} would be the name of {disks} disks: it can be given to one only",
        shown(name)
    ))
}

#[cfg(test)]
mod tests;
