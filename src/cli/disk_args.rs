//! Disks of a command line or a config file: `KEY=VALUE` arguments and bare sources, or tables → disks.
//!
//! ```text
//!   arguments ─ argument.rs ─► (key, value) ─ keys.rs ─► Settings: the common ones, then one for each source
//!                                                            │ wildcards and folders give their files
//!                                                            ▼
//!                                                 ResolvedDisk: one for each disk; its own keys win over common ones
//! ```
//! All keys are checked before the file system is read.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::args::Subcommand;
use super::keys::{Group, Key, Scope};
use super::settings::{DiskSource, Settings};
use super::vddk::NOT_VDDK;
use super::{
    UsageError, argument, https, overlay_args,
    values::{self, display},
};
use crate::config::{DiskConfig, VddkLibrary};

/// Keys that name a disk, for messages.
const SOURCES: &str = "add file, dir or uri, or an NBD server's hostname, socket, socket-fd, vsock-cid or command";

/// Origin of the disks.
#[derive(Debug, Clone, Copy)]
pub(super) enum DiskArgs<'a> {
    /// `KEY=VALUE` arguments and bare sources of the command line.
    Words(&'a [OsString]),
    /// `[[disk]]` tables of a config file.
    Tables(&'a [Table]),
}

/// A `[[disk]]` table of a config file. It describes one source.
#[derive(Debug)]
pub(super) struct Table {
    /// File, line and kind of the table, which start its error messages.
    pub(super) location: String,
    /// Keys of the table, in the order of the file.
    pub(super) keys: Vec<(&'static Key, OsString)>,
}

/// Keys of one source.
#[derive(Debug, Default)]
struct SourceArgs {
    settings: Settings,
    /// Location of the source's table ([`Table::location`]); none on a command line.
    location: Option<String>,
}

/// One disk with all its settings merged. Its file name is not chosen yet.
#[derive(Debug)]
pub(super) struct ResolvedDisk {
    disk_source: DiskSource,
    settings: Settings,
    /// Location of its table ([`Table::location`]); none on a command line.
    table: Option<String>,
}

impl ResolvedDisk {
    /// Returns the value of `name=`, if it was given.
    pub(super) fn requested_name(&self) -> Option<&OsStr> {
        self.settings.name.as_deref()
    }

    fn into_config(self, fixed: Option<&OsStr>, subcommand: Subcommand) -> Result<DiskConfig, UsageError> {
        self.settings
            .config(self.disk_source, fixed, subcommand)
            .map_err(|e| within(self.table.as_deref(), e))
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

/// Returns the disks in the order of their sources. The keys of `options` (from `-o`) apply to all disks, wherever `-o`
/// was on the command line. A source among them is a disk before those of `disk_args`.
///
/// Fails if a key is unknown or its value invalid, if a source gives no file, if `name=` applies to several disks, or
/// if there is no disk at all. Errors of a table start with its location.
pub(super) fn disks(
    options: &[(&'static Key, OsString)],
    disk_args: DiskArgs<'_>,
    subcommand: Subcommand,
) -> Result<Vec<ResolvedDisk>, UsageError> {
    let (common, mut sources) = settings(options, disk_args)?;
    // The keys that name a server may come in any order, so none of them starts a disk on its own. They make one disk,
    // but only if no argument or table started another one.
    let is_listed = subcommand == Subcommand::List && common.https.server.is_some();
    if sources.is_empty() && (common.nbd.names_server() || common.is_vddk_export() || is_listed) {
        sources.push(SourceArgs::default());
    }
    let mut disks = Vec::new();
    for source in &sources {
        let failed = |e| within(source.location.as_deref(), e);
        let settings = source.settings.over(&common);
        let disk_sources = settings.disk_sources(subcommand).map_err(failed)?;
        match (&source.settings.name, disk_sources.len()) {
            (Some(name), count @ 2..) => return Err(failed(name_of_many(name, count))),
            (_, 0) => return Err(failed(UsageError::new(format!("no disk is given: {SOURCES}")))),
            _ => {}
        }
        let resolved = |disk_source| ResolvedDisk {
            disk_source,
            settings: settings.clone(),
            table: source.location.clone(),
        };
        disks.extend(disk_sources.into_iter().map(resolved));
    }
    check_common_keys(&common, &disks)?;
    match (&common.name, disks.len()) {
        (_, 0) => Err(UsageError::new(
            "no disk is given: add file=PATH, or uri= of an NBD server",
        )),
        (Some(name), count @ 2..) => Err(name_of_many(name, count)),
        _ => Ok(disks),
    }
}

/// Returns the server of an action that needs no disk, and its port.
///
/// Fails if `server=` is missing, or if any key but it and `port=` is given.
pub(super) fn server(words: &[OsString]) -> Result<(String, u16), UsageError> {
    let (common, sources) = settings(&[], DiskArgs::Words(words))?;
    match (sources.is_empty(), common.https.server) {
        (true, Some(server)) => Ok((server, https::port(common.nbd.port.as_deref())?.unwrap_or(443))),
        _ => Err(UsageError::new("--fingerprint needs server=HOST, and takes no disk")),
    }
}

/// Returns VMware's library of an action that needs no disk. Fails if any key but `libdir=` and `config=` is given.
pub(super) fn library(words: &[OsString]) -> Result<VddkLibrary, UsageError> {
    let (common, sources) = settings(&[], DiskArgs::Words(words))?;
    let library = common.vddk.library();
    let keys = usize::from(library.libdir.is_some()) + usize::from(library.config.is_some());
    match sources.is_empty() && keys == words.len() {
        true => Ok(library),
        false => Err(UsageError::new("--dump takes no disk, only libdir=DIR")),
    }
}

/// Returns the folder of an action that takes `cache-dir=` alone, and its `cache-dir-size=`; `None` if a disk is given too,
/// or no folder.
///
/// Fails if a key is unknown or its value invalid.
pub(super) fn cache_dir(words: &[OsString]) -> Result<Option<(PathBuf, Option<u64>)>, UsageError> {
    // The words of a disk are parsed once, by its own action: some keys ask for a password, or empty a pipe.
    let is_of_folder = |word: &OsString| word.as_encoded_bytes().starts_with(b"cache-dir");
    if words.len() > 2 || !words.iter().all(is_of_folder) {
        return Ok(None);
    }
    let (common, sources) = settings(&[], DiskArgs::Words(words))?;
    let limit = common.cache_dir_size;
    let dir = common.cache_dir.filter(|_| sources.is_empty());
    Ok(dir.map(|dir| (dir, limit)))
}

/// Fails if a common key fits none of the disks. One that fits some of them applies to those.
fn check_common_keys(common: &Settings, disks: &[ResolvedDisk]) -> Result<(), UsageError> {
    let count = |sort: fn(&DiskSource) -> bool| disks.iter().filter(|disk| sort(&disk.disk_source)).count();
    let nbd = count(|source| matches!(source, DiskSource::Nbd(_)));
    let web = count(|source| matches!(source, DiskSource::Https(_)));
    let vddk = count(|source| matches!(source, DiskSource::Vddk(_)));
    if let (0, Some(key)) = (vddk, common.first_of(&[Group::Vddk])) {
        return Err(UsageError::new(format!("{key}= {NOT_VDDK}")));
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
        Some((key, (sort, disk))) if !disks.is_empty() => {
            Err(UsageError::new(format!("{key}= is for {sort}, but the disk is {disk}")))
        }
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

/// Collects the keys that apply to all disks, and the keys of each source.
fn settings(
    options: &[(&'static Key, OsString)],
    disk_args: DiskArgs<'_>,
) -> Result<(Settings, Vec<SourceArgs>), UsageError> {
    let mut common = Settings::default();
    let mut sources: Vec<SourceArgs> = Vec::new();
    for (key, value) in options {
        match key.scope {
            Scope::Starts => start(&mut sources, key, value)?,
            Scope::OneDisk | Scope::Common => common.add(key, value)?,
        }
    }
    match disk_args {
        DiskArgs::Words(words) => {
            // Keys before the first source are common. A source given with -o does not end them: keys of the command
            // line must not depend on whether -o named a disk.
            let from_options = sources.len();
            for word in words {
                let (key, value) = argument::read(word)?;
                match (key.scope, sources.len() > from_options) {
                    (Scope::Starts, _) => start(&mut sources, key, value)?,
                    (_, true) => sources
                        .last_mut()
                        .map_or(Ok(()), |last| last.settings.add(key, value))?,
                    (_, false) => common.add(key, value)?,
                }
            }
        }
        DiskArgs::Tables(tables) => {
            for Table { location, keys } in tables {
                let mut source = SourceArgs {
                    location: Some(location.clone()),
                    ..SourceArgs::default()
                };
                let added = keys.iter().try_for_each(|(key, value)| source.settings.add(key, value));
                added.map_err(|e| within(Some(location), e))?;
                sources.push(source);
            }
        }
    }
    Ok((common, sources))
}

/// Starts another source with the key that names it.
fn start(sources: &mut Vec<SourceArgs>, key: &'static Key, value: &OsStr) -> Result<(), UsageError> {
    let mut source = SourceArgs::default();
    source.settings.add(key, value)?;
    sources.push(source);
    Ok(())
}

/// Puts the location of a table in front of an error, if the disk comes from a table.
fn within(table: Option<&str>, e: UsageError) -> UsageError {
    match table {
        Some(location) => UsageError::new(format!("{location}: {e}")),
        None => e,
    }
}

/// Creates the error for `name=` that would apply to more than one disk.
fn name_of_many(name: &OsStr, disks: usize) -> UsageError {
    UsageError::new(format!(
        "name={} would apply to {disks} disks, but a file name is for one disk: give it after that disk",
        display(name)
    ))
}

#[cfg(test)]
mod tests;
