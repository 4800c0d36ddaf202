//! Disks of a mount or another action: pairs → disks.
//!
//! ```text
//!   DiskArgs: the common pairs, then those of each source
//!      │ applied in this order
//!      ▼
//!   Settings of each source
//!      │ wildcards and folders give their files
//!      ▼
//!   ResolvedDisk: one for each disk
//!      │ the mount point may give the file name
//!      ▼
//!   DiskConfig
//! ```
//! All values are checked before the file system is searched.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;

use super::disk_args::{DiskArgs, SourceArgs};
use super::disk_source::DiskSource;
use super::key::Group;
use super::outcome::UsageError;
use super::settings::Settings;
use super::subcommand::Subcommand;
use super::values::{self, display};
use super::vddk::NOT_VDDK;
use super::{disk_config, overlay_args};
use crate::config::DiskConfig;

/// Keys that name a disk, for messages.
const SOURCES: &str = "add file, dir or uri, or an NBD server's hostname, socket, socket-fd, vsock-cid or command";

/// One disk with all its settings. Its file name is not chosen yet.
#[derive(Debug)]
pub(super) struct ResolvedDisk {
    disk_source: DiskSource,
    settings: Settings,
    /// [`SourceArgs::table`]
    table: Option<String>,
}

impl ResolvedDisk {
    /// Returns the value of `name=`, if it was given.
    pub(super) fn requested_name(&self) -> Option<&OsStr> {
        self.settings.name.as_deref()
    }

    fn into_config(self, fixed: Option<&OsStr>, subcommand: Subcommand) -> Result<DiskConfig, UsageError> {
        disk_config::config(&self.settings, self.disk_source, fixed, subcommand)
            .map_err(|e| within(self.table.as_deref(), self.settings.blame(e)))
    }
}

/// Returns the configurations of the disks. `fixed` is the file name that the mount point gives to the only disk.
///
/// Fails if keys of a disk conflict, if a file that one disk writes belongs to another disk too, or if two disks use one
/// socket.
pub(super) fn configs(
    resolved: Vec<ResolvedDisk>,
    fixed: Option<&OsStr>,
    subcommand: Subcommand,
) -> Result<Vec<DiskConfig>, UsageError> {
    let disks = resolved
        .into_iter()
        .map(|disk| disk.into_config(fixed, subcommand))
        .collect::<Result<Vec<_>, _>>()?;
    overlay_args::check_files(&disks)?;
    check_sockets(&disks)?;
    Ok(disks)
}

/// Fails if several disks use the same socket: a connected socket serves one export.
fn check_sockets(disks: &[DiskConfig]) -> Result<(), UsageError> {
    let mut used = HashSet::new();
    match disks
        .iter()
        .filter_map(|disk| disk.source.settings().socket_fd())
        .find(|number| !used.insert(*number))
    {
        Some(number) => Err(UsageError::new(format!(
            "socket-fd={number} is given for two disks, but a connected socket serves one: pass another socket for each"
        ))),
        None => Ok(()),
    }
}

/// Returns the disks in the order of their sources.
///
/// Fails if a value is invalid, if a source gives no file, if `name=` applies to several disks, or if there is no disk at
/// all.
pub(super) fn resolve(mut args: DiskArgs, subcommand: Subcommand) -> Result<Vec<ResolvedDisk>, UsageError> {
    let common = args.common()?;
    // The keys that name a server may come in any order, so none of them starts a disk on its own. They make one disk,
    // but only if no argument or table started another one.
    let starts_disk = args.sources.is_empty() && args.file.is_none();
    let is_listed = subcommand == Subcommand::List && common.server.host.is_some();
    if starts_disk && (common.nbd.names_server() || common.is_vddk_export() || is_listed) {
        args.sources.push(SourceArgs::default());
    }
    let settings = |source: &SourceArgs| {
        let settings = common.of_disk(&source.pairs);
        settings.map_err(|e| within(source.table.as_deref(), e))
    };
    let all: Vec<Settings> = args.sources.iter().map(settings).collect::<Result<_, _>>()?;
    let mut disks = Vec::new();
    for (source, settings) in args.sources.iter().zip(all) {
        let failed = |e| within(source.table.as_deref(), settings.blame(e));
        let disk_sources = DiskSource::all_of(&settings, subcommand).map_err(failed)?;
        let name = settings.name.as_ref().filter(|_| common.name.is_none());
        match (name, disk_sources.len()) {
            (Some(name), count @ 2..) => return Err(failed(name_of_many(name, count))),
            (_, 0) => return Err(failed(UsageError::new(format!("no disk is given: {SOURCES}")))),
            _ => {}
        }
        let resolved = |disk_source| ResolvedDisk {
            disk_source,
            settings: settings.clone(),
            table: source.table.clone(),
        };
        disks.extend(disk_sources.into_iter().map(resolved));
    }
    check_common_keys(&common, &disks).map_err(|e| common.blame(e))?;
    match (&common.name, disks.len()) {
        (_, 0) => Err(no_disk(args.file.as_deref())),
        (Some(name), count @ 2..) => Err(common.blame(name_of_many(name, count))),
        _ => Ok(disks),
    }
}

/// Creates the error for a command line or a file without a disk.
fn no_disk(file: Option<&str>) -> UsageError {
    match file {
        Some(file) => {
            UsageError::new("no disk is given: add a [[disk]] table with file, dir or uri, or an NBD server's keys")
                .at(file)
        }
        None => UsageError::new("no disk is given: add file=PATH, or uri= of an NBD server"),
    }
}

/// Fails if a common key fits none of the disks. One that fits some of them applies to those.
fn check_common_keys(common: &Settings, disks: &[ResolvedDisk]) -> Result<(), UsageError> {
    let count = |sort: fn(&DiskSource) -> bool| disks.iter().filter(|disk| sort(&disk.disk_source)).count();
    let nbd = count(|source| matches!(source, DiskSource::Nbd(_)));
    let web = count(|source| matches!(source, DiskSource::Https(_)));
    let vddk = count(|source| matches!(source, DiskSource::Vddk(_)));
    if let (0, Some(key)) = (vddk, common.first_of(&[Group::Vddk])) {
        return Err(UsageError::of(key, format_args!(" {NOT_VDDK}")));
    }
    // `port=` is listed as a key of NBD servers, but web servers have one too. Web disks are checked where they are read.
    let unfit = if nbd == disks.len() {
        common.unfit_for_server().zip(Some(("local files", "on an NBD server")))
    } else if nbd + web + vddk == 0 {
        common
            .first_of(&[Group::Nbd])
            .zip(Some(("NBD servers", "a local file")))
    } else {
        None
    };
    match unfit {
        Some((key, (sort, disk))) if !disks.is_empty() => Err(UsageError::of(
            key,
            format_args!(" is for {sort}, but the disk is {disk}"),
        )),
        _ => Ok(()),
    }
}

/// Checks the disks of a mount of which a search on a server has found some, as [`configs`] and [`check_names`] check those
/// that are known at the start.
pub(super) fn check_found(disks: &[DiskConfig]) -> Result<(), UsageError> {
    overlay_args::check_files(disks)?;
    check_names(disks)
}

/// Checks that all disks can be files of one folder. Fails if two have the same name, or if a name is not a file name.
pub(super) fn check_names(disks: &[DiskConfig]) -> Result<(), UsageError> {
    let mut seen: HashMap<&OsStr, &DiskConfig> = HashMap::new();
    for disk in disks {
        let path = disk.source.label();
        values::file_name(&disk.name).map_err(|e| {
            UsageError::new(format!(
                "{path} cannot have the file name {}: {e}; use name=",
                display(&disk.name)
            ))
        })?;
        if let Some(other) = seen.insert(&disk.name, disk) {
            return Err(UsageError::new(format!(
                "{} and {path} would both have the file name {}: use name= for one of them",
                other.source.label(),
                display(&disk.name),
            )));
        }
    }
    Ok(())
}

/// Points an error to the table of its disk, unless it points to a line already.
fn within(table: Option<&str>, e: UsageError) -> UsageError {
    match table {
        Some(table) => e.at(table),
        None => e,
    }
}

/// Creates the error for `name=` that would apply to more than one disk.
fn name_of_many(name: &OsStr, disks: usize) -> UsageError {
    let name = display(name);
    UsageError::of(
        "name",
        format_args!("{name} would apply to {disks} disks, but a file name is for one disk: give it after that disk"),
    )
}

#[cfg(test)]
mod tests;
