//! Disks of a command line or a config file: pairs → disks.
//!
//! ```text
//!   arguments, -o lists, tables ─► pairs: the common ones, then those of each source
//!                                    │ applied in this order
//!                                    ▼
//!                                  Settings of each source
//!                                    │ wildcards and folders give their files
//!                                    ▼
//!                                  ResolvedDisk: one for each disk
//! ```
//! All values are checked before the file system is searched.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::args::Subcommand;
use super::keys::{Group, Scope};
use super::pair::Pair;
use super::settings::{DiskSource, Settings};
use super::vddk::NOT_VDDK;
use super::{
    UsageError, argument, https, overlay_args,
    values::{self, display},
};
use crate::config::{DiskConfig, VddkLibrary};

/// Keys that name a disk, for messages.
const SOURCES: &str = "add file, dir or uri, or an NBD server's hostname, socket, socket-fd, vsock-cid or command";

/// Pairs that describe disks.
#[derive(Debug, Default)]
pub(super) struct DiskArgs {
    /// Layers of pairs that apply to all disks. A later one wins over an earlier one.
    pub(super) common: Vec<Vec<Pair>>,
    /// Sources, in their order.
    pub(super) sources: Vec<SourceArgs>,
    /// Name of the config file, if the sources are its tables.
    pub(super) file: Option<String>,
}

/// Pairs of one source.
#[derive(Debug, Default)]
pub(super) struct SourceArgs {
    pub(super) pairs: Vec<Pair>,
    /// Start of the messages about the table of a config file; none on a command line.
    pub(super) table: Option<String>,
}

/// One disk with all its settings. Its file name is not chosen yet.
#[derive(Debug)]
pub(super) struct ResolvedDisk {
    disk_source: DiskSource,
    settings: Settings,
    /// [`SourceArgs::table`]
    table: Option<String>,
}

impl DiskArgs {
    /// Returns the pairs of `-o` and of the arguments. Those before the first source apply to all disks, and so do those of
    /// `-o`, wherever it was on the command line. A source among them is a disk before those of the arguments.
    ///
    /// Fails if a key is unknown.
    pub(super) fn of_words(options: Vec<Pair>, words: &[OsString]) -> Result<Self, UsageError> {
        let source = |pair| SourceArgs {
            pairs: vec![pair],
            table: None,
        };
        let (sources, mut common): (Vec<_>, Vec<_>) =
            options.into_iter().partition(|pair| pair.key.scope == Scope::Starts);
        let mut sources: Vec<_> = sources.into_iter().map(source).collect();
        // A source given with -o does not end the common pairs: keys of the command line must not depend on whether -o
        // named a disk.
        let from_options = sources.len();
        for word in words {
            let pair = argument::read(word)?;
            match sources.get_mut(from_options..).and_then(<[_]>::last_mut) {
                _ if pair.key.scope == Scope::Starts => sources.push(source(pair)),
                Some(last) => last.pairs.push(pair),
                None => common.push(pair),
            }
        }
        Ok(Self {
            common: vec![common],
            sources,
            file: None,
        })
    }

    /// Returns the disks of a config file with options over those of the file. Fails if an option names a disk.
    pub(super) fn with(mut self, options: Vec<Pair>) -> Result<Self, UsageError> {
        if let Some(pair) = options.iter().find(|pair| pair.key.scope == Scope::Starts) {
            let reason = format!("-o {}= names a disk: use a [[disk]] table", pair.key.name);
            return Err(pair.origin.blame(UsageError::new(reason)));
        }
        self.common.push(options);
        Ok(self)
    }

    /// Returns the settings that apply to all disks. Fails as [`Settings::layer`] does.
    fn common(&self) -> Result<Settings, UsageError> {
        let mut common = Settings::default();
        self.common.iter().try_for_each(|layer| common.layer(layer))?;
        Ok(common)
    }
}

impl ResolvedDisk {
    /// Returns the value of `name=`, if it was given.
    pub(super) fn requested_name(&self) -> Option<&OsStr> {
        self.settings.name.as_deref()
    }

    fn into_config(self, fixed: Option<&OsStr>, subcommand: Subcommand) -> Result<DiskConfig, UsageError> {
        self.settings
            .config(self.disk_source, fixed, subcommand)
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
pub(super) fn disks(mut args: DiskArgs, subcommand: Subcommand) -> Result<Vec<ResolvedDisk>, UsageError> {
    let common = args.common()?;
    // The keys that name a server may come in any order, so none of them starts a disk on its own. They make one disk,
    // but only if no argument or table started another one.
    let starts_disk = args.sources.is_empty() && args.file.is_none();
    let is_listed = subcommand == Subcommand::List && common.https.server.is_some();
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
        let disk_sources = settings.disk_sources(subcommand).map_err(failed)?;
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

/// Returns the keys of an action that needs no disk, or `None` if a key other than `keys` is given.
///
/// Fails if a key is unknown or its value invalid.
fn only(keys: &[&str], words: &[OsString]) -> Result<Option<Settings>, UsageError> {
    let args = DiskArgs::of_words(Vec::new(), words)?;
    let is_known = |pair: &Pair| keys.contains(&pair.key.name);
    // The values of a disk are read once, by its own action: some ask for a password, or empty a pipe.
    match args.sources.is_empty() && args.common.iter().flatten().all(is_known) {
        true => args.common().map(Some),
        false => Ok(None),
    }
}

/// Returns the server of an action that needs no disk, and its port.
///
/// Fails if `server=` is missing, or if any key but it and `port=` is given.
pub(super) fn server(words: &[OsString]) -> Result<(String, u16), UsageError> {
    let common = only(&["server", "port"], words)?.unwrap_or_default();
    let missing = || UsageError::new("--fingerprint needs server=HOST, and takes no disk and no key but port=");
    let server = common.https.server.ok_or_else(missing)?;
    Ok((server, https::port(common.server.port.as_deref())?.unwrap_or(443)))
}

/// Returns VMware's library of an action that needs no disk. Fails if any key but `libdir=` and `config=` is given.
pub(super) fn library(words: &[OsString]) -> Result<VddkLibrary, UsageError> {
    let common = only(&["libdir", "config"], words)?;
    let common = common.ok_or_else(|| UsageError::new("--dump takes no disk, only libdir=DIR"))?;
    Ok(common.vddk.disk.library)
}

/// Returns the folder of an action that takes `cache-dir=` alone, and its `cache-dir-size=`; `None` if any other key is
/// given, or no folder.
///
/// Fails if a key is unknown or its value invalid.
pub(super) fn cache_dir(words: &[OsString]) -> Result<Option<(PathBuf, Option<u64>)>, UsageError> {
    let common = only(&["cache-dir", "cache-dir-size"], words)?;
    Ok(common.and_then(|common| common.cache_dir.map(|dir| (dir, common.cache_dir_size))))
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
