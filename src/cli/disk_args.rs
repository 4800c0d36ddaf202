//! Pairs of a command line or a config file, sorted: those that apply to all disks, and those of each source.

use std::ffi::OsString;
use std::path::PathBuf;

use super::argument;
use super::key::Scope;
use super::outcome::UsageError;
use super::settings::{DiskPair, Settings};
use crate::config::VddkLibrary;

/// Pairs that describe disks.
#[derive(Debug, Default)]
pub(super) struct DiskArgs {
    /// Layers of pairs that apply to all disks. A later one wins over an earlier one.
    pub(super) common: Vec<Vec<DiskPair>>,
    /// Sources, in their order.
    pub(super) sources: Vec<SourceArgs>,
    /// Name of the config file, if the sources are its tables.
    pub(super) file: Option<String>,
}

/// Pairs of one source.
#[derive(Debug, Default)]
pub(super) struct SourceArgs {
    pub(super) pairs: Vec<DiskPair>,
    /// Start of the messages about the table of a config file; none on a command line.
    pub(super) table: Option<String>,
}

impl DiskArgs {
    /// Returns the pairs of `-o` and of the arguments. Those before the first source apply to all disks, and so do those of
    /// `-o`, wherever it was on the command line. A source among them is a disk before those of the arguments.
    ///
    /// Fails if a key is unknown.
    pub(super) fn of_words(options: Vec<DiskPair>, words: &[OsString]) -> Result<Self, UsageError> {
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
    pub(super) fn with(mut self, options: Vec<DiskPair>) -> Result<Self, UsageError> {
        if let Some(pair) = options.iter().find(|pair| pair.key.scope == Scope::Starts) {
            let reason = format!("-o {}= names a disk: use a [[disk]] table", pair.key.name);
            return Err(pair.origin.blame(UsageError::new(reason)));
        }
        self.common.push(options);
        Ok(self)
    }

    /// Returns the settings that apply to all disks. Fails as [`Settings::layer`] does.
    pub(super) fn common(&self) -> Result<Settings, UsageError> {
        let mut common = Settings::default();
        self.common.iter().try_for_each(|layer| common.layer(layer))?;
        Ok(common)
    }
}

/// Returns the keys of an action that needs no disk, or `None` if a key other than `keys` is given.
///
/// Fails if a key is unknown or its value invalid.
fn only(keys: &[&str], words: &[OsString]) -> Result<Option<Settings>, UsageError> {
    let args = DiskArgs::of_words(Vec::new(), words)?;
    let is_known = |pair: &DiskPair| keys.contains(&pair.key.name);
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
    let server = common.server;
    let port = server.port_number()?.unwrap_or(443);
    Ok((server.host.ok_or_else(missing)?, port))
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
