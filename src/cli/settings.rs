//! What was said about a disk by `KEY=VALUE`, and the disk's configuration that follows from it.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::keys::{Group, Key};
use super::writing::{self, Creation, Subcommand};
use super::{UsageError, expand, nbd};
use crate::config::{
    DiskConfig, Format, KernelView, LocalConfig, NbdConfig, Overlay, PageCache, SourceConfig, ViewConfig,
};

/// What was said about one disk, or about all.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    /// Where it comes from; never in the common ones.
    pub(super) source: Option<SourceSpec>,
    /// `name=`
    pub(super) name: Option<OsString>,
    /// `readonly=`
    pub(super) read_only: Option<bool>,
    /// `cache=`
    pub(super) cache: Option<PageCache>,
    /// `cache-size=`
    pub(super) cache_size: Option<u64>,
    /// `readahead=`
    pub(super) readahead: Option<u64>,
    /// `format=`
    pub(super) format: Option<Format>,
    /// `allow-dir=`
    pub(super) allow_dirs: Vec<PathBuf>,
    /// `degraded=cid`
    pub(super) accept_cid_mismatch: Option<bool>,
    /// `lock=`
    pub(super) lock: Option<bool>,
    /// `kernel-view=`
    pub(super) view: Option<KernelView>,
    /// `view-size=`
    pub(super) view_size: Option<u64>,
    /// `view-dir=`
    pub(super) view_dir: Option<PathBuf>,
    /// `cow=`
    pub(super) overlay: Option<Overlay>,
    /// `force=`
    pub(super) force: Option<bool>,
    /// `create=` and its company
    pub(super) creation: Creation,
    /// The keys of an NBD server.
    pub(super) nbd: nbd::Server,
    /// `backend=`
    pub(super) backend: Option<Backend>,
    /// The keys that were given, to find one that was given twice, or is of no use for such a source.
    given: Vec<&'static Key>,
}

/// `backend=`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// The built-in engine.
    Native,
    /// An NBD server.
    Nbd,
}

/// A source as it was written.
#[derive(Debug, Clone)]
pub(super) enum SourceSpec {
    /// One file, or a pattern of several.
    File(PathBuf),
    /// All disks of a folder.
    Dir(PathBuf),
    /// An NBD server's URI.
    Nbd(String),
}

/// Where one disk comes from.
#[derive(Debug)]
pub(super) enum Place {
    /// A file.
    File(PathBuf),
    /// An NBD server; its URI, if it has one.
    Nbd(Option<String>),
}

impl Settings {
    /// Takes one more key. Errors: see [`Key::apply`]; also a key given twice that may not be.
    pub(super) fn add(&mut self, key: &'static Key, value: &OsStr) -> Result<(), UsageError> {
        key.apply(self, value)?;
        if !key.repeats && self.given.iter().any(|given| given.name == key.name) {
            return Err(UsageError::new(format!(
                "{}= is given twice for the same disk",
                key.name
            )));
        }
        self.given.push(key);
        Ok(())
    }

    /// These settings, with `common` where they are silent. Folders of both are allowed.
    pub(super) fn over(&self, common: &Self) -> Self {
        Self {
            source: self.source.clone(),
            name: self.name.clone().or_else(|| common.name.clone()),
            read_only: self.read_only.or(common.read_only),
            cache: self.cache.or(common.cache),
            cache_size: self.cache_size.or(common.cache_size),
            readahead: self.readahead.or(common.readahead),
            format: self.format.or(common.format),
            allow_dirs: [common.allow_dirs.as_slice(), &self.allow_dirs].concat(),
            accept_cid_mismatch: self.accept_cid_mismatch.or(common.accept_cid_mismatch),
            lock: self.lock.or(common.lock),
            view: self.view.or(common.view),
            view_size: self.view_size.or(common.view_size),
            view_dir: self.view_dir.clone().or_else(|| common.view_dir.clone()),
            overlay: self.overlay.clone().or_else(|| common.overlay.clone()),
            force: self.force.or(common.force),
            creation: self.creation.over(common.creation),
            nbd: self.nbd.over(&common.nbd),
            backend: self.backend.or(common.backend),
            given: [common.given.as_slice(), &self.given].concat(),
        }
    }

    /// The first key that was given, of those that only some sources have.
    fn first_of(&self, groups: &[Group]) -> Option<&'static str> {
        self.given
            .iter()
            .find(|key| groups.contains(&key.group))
            .map(|key| key.name)
    }

    /// The files that the source stands for; a disk that is to be made is one, whatever its name looks like.
    fn files(&self, subcommand: Subcommand) -> Result<Vec<PathBuf>, UsageError> {
        match &self.source {
            Some(SourceSpec::Dir(_)) if self.creation.is_wanted(subcommand) => Err(UsageError::new(
                "a new disk is named with file=PATH, but dir= means the disks of a folder",
            )),
            Some(SourceSpec::File(path)) if self.creation.is_wanted(subcommand) => Ok(vec![path.clone()]),
            Some(SourceSpec::File(path)) => expand::expand(path),
            Some(SourceSpec::Dir(dir)) => expand::disks_of(dir),
            Some(SourceSpec::Nbd(_)) | None => Ok(Vec::new()),
        }
    }

    /// The disks that the source stands for.
    pub(super) fn places(&self, subcommand: Subcommand) -> Result<Vec<Place>, UsageError> {
        let is_nbd = matches!(self.source, Some(SourceSpec::Nbd(_))) || self.source.is_none();
        match (self.backend, &self.source) {
            (Some(Backend::Native), _) if is_nbd => {
                Err(UsageError::new("backend=native reads files, but no file is named"))
            }
            (Some(Backend::Nbd), Some(SourceSpec::File(_) | SourceSpec::Dir(_))) => {
                Err(UsageError::new("backend=nbd needs a server, but a file is named"))
            }
            (_, Some(SourceSpec::Nbd(uri))) => Ok(vec![Place::Nbd(Some(uri.clone()))]),
            (_, Some(_)) => {
                if let Some(key) = self.first_of(&[Group::Nbd]) {
                    return Err(UsageError::new(format!(
                        "{key}= is for NBD servers, but the disk is a local file"
                    )));
                }
                Ok(self.files(subcommand)?.into_iter().map(Place::File).collect())
            }
            (_, None) if self.nbd.is_named() => Ok(vec![Place::Nbd(None)]),
            (_, None) => Ok(Vec::new()),
        }
    }

    /// The finished disk at `place`; `fixed` is a name that the mount point gives it.
    ///
    /// Errors: keys that do not go together, or not with such a source.
    pub(super) fn config(
        &self,
        place: Place,
        fixed: Option<&OsStr>,
        subcommand: Subcommand,
    ) -> Result<DiskConfig, UsageError> {
        let wanted = fixed.map(OsStr::to_owned).or_else(|| self.name.clone());
        let (usual, source) = match place {
            Place::File(path) => (
                expand::default_name(&path),
                SourceConfig::Local(self.local(path, subcommand)?),
            ),
            Place::Nbd(uri) => {
                let server = self.server(uri, wanted.is_some(), subcommand)?;
                (expand::export_name(&server), SourceConfig::Nbd(server))
            }
        };
        let disk = DiskConfig {
            name: wanted.unwrap_or(usual),
            read_only: self.read_only.unwrap_or_default(),
            cache: self.cache,
            cache_size: self.cache_size,
            readahead: self.readahead,
            overlay: self.overlay.clone(),
            source,
        };
        writing::check_disk(&disk, subcommand)?;
        Ok(disk)
    }

    /// The file as a source.
    fn local(&self, path: PathBuf, subcommand: Subcommand) -> Result<LocalConfig, UsageError> {
        let create = self.creation.config(subcommand);
        let create = create.map_err(|e| UsageError::new(format!("{}: {e}", path.display())))?;
        Ok(LocalConfig {
            path,
            format: self.format.unwrap_or_default(),
            allow_dirs: self.allow_dirs.clone(),
            accept_cid_mismatch: self.accept_cid_mismatch.unwrap_or_default(),
            lock: self.lock.unwrap_or(true),
            force: self.force.unwrap_or_default(),
            create,
            view: ViewConfig {
                mode: self.view.unwrap_or_default(),
                size: self.view_size.unwrap_or(ViewConfig::default().size),
                dir: self.view_dir.clone(),
            },
        })
    }

    /// The NBD server as a source; `named`: its file has a name.
    fn server(&self, uri: Option<String>, named: bool, subcommand: Subcommand) -> Result<NbdConfig, UsageError> {
        if let Some(key) = self.first_of(&[Group::Local, Group::Create]) {
            return Err(UsageError::new(format!(
                "{key}= is for local files, but the disk is an NBD server's"
            )));
        }
        if subcommand == Subcommand::Create {
            return Err(UsageError::new("--create makes VMDKs, but an NBD server is named"));
        }
        let server = self.nbd.clone().config(uri)?;
        if server.dynamic && (named || self.overlay.is_some()) {
            let key = if named { "one name" } else { "cow=" };
            return Err(UsageError::new(format!(
                "dynamic-export=true makes a file of every export, but {key} is for one"
            )));
        }
        Ok(server)
    }
}
