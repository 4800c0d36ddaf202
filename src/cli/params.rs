//! The words after the mount point: `KEY=VALUE` and bare sources → disks.
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
use super::writing::{self, Purpose};
use super::{
    UsageError,
    values::{self, shown},
    words,
};
use crate::config::DiskConfig;

/// One disk, all its settings gathered; its name is still open.
#[derive(Debug)]
pub(super) struct Requested {
    place: Place,
    settings: Settings,
}

impl Requested {
    /// The name that the user asked for.
    pub(super) fn wanted_name(&self) -> Option<&OsStr> {
        self.settings.name.as_deref()
    }

    fn into_config(self, fixed: Option<&OsStr>, purpose: Purpose) -> Result<DiskConfig, UsageError> {
        self.settings.config(self.place, fixed, purpose)
    }
}

/// The finished disks; `fixed` is a name that the mount point gives the only one.
///
/// Errors: keys that do not go together, or two disks that would be in each other's way.
pub(super) fn configs(
    requested: Vec<Requested>,
    fixed: Option<&OsStr>,
    purpose: Purpose,
) -> Result<Vec<DiskConfig>, UsageError> {
    let disks = requested.into_iter().map(|disk| disk.into_config(fixed, purpose)).collect::<Result<Vec<_>, _>>()?;
    writing::check_files(&disks)?;
    Ok(disks)
}

/// The disks that `words` ask for, in their order. The keys of `options` (from `-o`) hold for all disks, wherever they
/// stood; a source among them is a disk before those of the words.
///
/// Errors: unknown and unfit keys, a source that gives no file, `name=` for several disks, no disk at all.
pub(super) fn disks(
    options: &[(&'static Key, OsString)],
    words: &[OsString],
    purpose: Purpose,
) -> Result<Vec<Requested>, UsageError> {
    let (common, mut groups) = settings(options, words)?;
    // Keys that name a server start no disk by themselves: they may stand in any order.
    if groups.is_empty() && common.nbd.is_named() {
        groups.push(Settings::default());
    }
    let mut disks = Vec::new();
    for group in &groups {
        let settings = group.over(&common);
        let places = settings.places(purpose)?;
        if let (Some(name), 2..) = (&group.name, places.len()) {
            return Err(name_of_many(name, places.len()));
        }
        disks.extend(places.into_iter().map(|place| Requested { place, settings: settings.clone() }));
    }
    match (&common.name, disks.len()) {
        (_, 0) => Err(UsageError::new("no disk is given: add file=PATH, or uri= of an NBD server")),
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
fn settings(options: &[(&'static Key, OsString)], words: &[OsString]) -> Result<(Settings, Vec<Settings>), UsageError> {
    let mut common = Settings::default();
    let mut groups: Vec<Settings> = Vec::new();
    for (key, value) in options {
        match key.scope {
            Scope::Starts => start(&mut groups, key, value)?,
            Scope::OneDisk | Scope::Common => common.add(key, value)?,
        }
    }
    let from_options = groups.len();
    for word in words {
        let (key, value) = words::read(word)?;
        match (key.scope, groups.len() > from_options) {
            (Scope::Starts, _) => start(&mut groups, key, value)?,
            (_, true) => groups.last_mut().map_or(Ok(()), |last| last.add(key, value))?,
            (_, false) => common.add(key, value)?,
        }
    }
    Ok((common, groups))
}

fn start(groups: &mut Vec<Settings>, key: &'static Key, value: &OsStr) -> Result<(), UsageError> {
    let mut group = Settings::default();
    group.add(key, value)?;
    groups.push(group);
    Ok(())
}

fn name_of_many(name: &OsStr, disks: usize) -> UsageError {
    UsageError::new(format!("name={} would be the name of {disks} disks: it can be given to one only", shown(name)))
}

#[cfg(test)]
mod tests;
