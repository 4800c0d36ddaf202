//! Keys of a disk as given, and the disk's configuration that follows from them.
//!
//! The keys of all disks and of each source are collected in separate [`Settings`]. [`Settings::over`] merges them, and
//! [`Settings::config`] makes the configuration of one disk; only then are conflicts among the keys visible.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::args::Subcommand;
use super::create_args::CreateArgs;
use super::keys::{Group, Key};
use super::values::PageCacheArg;
use super::{UsageError, expand, https, nbd, overlay_args, values, vddk};
use crate::config::{
    Degraded, DiskConfig, Format, HttpsConfig, KernelView, LocalConfig, NamedBy, NbdConfig, Overlay, SourceConfig,
    VddkConfig, ViewConfig,
};

/// Keys of one disk, or of all disks.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    /// Source of the disk. Never set in the common settings.
    pub(super) source: Option<SourceSpec>,
    /// `name=`
    pub(super) name: Option<OsString>,
    /// `readonly=`
    pub(super) read_only: Option<bool>,
    /// `cache=`
    pub(super) cache: Option<PageCacheArg>,
    /// `cache-size=`
    pub(super) cache_size: Option<u64>,
    /// `cache-dir=`
    pub(super) cache_dir: Option<PathBuf>,
    /// `cache-dir-size=`
    pub(super) cache_dir_size: Option<u64>,
    /// `readahead=`
    pub(super) readahead: Option<u64>,
    /// `format=`
    pub(super) format: Option<Format>,
    /// `allow-dir=`
    pub(super) allow_dirs: Vec<PathBuf>,
    /// `degraded=`
    pub(super) degraded: Degraded,
    /// `parent=`, as it was given: in a datastore it is no path of this machine.
    pub(super) parent: Option<OsString>,
    /// `member=`
    pub(super) member: Option<String>,
    /// `extents=self`
    pub(super) single_file: Option<bool>,
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
    /// `create=` and the other `create-*=` keys
    pub(super) creation: CreateArgs,
    /// Keys of an NBD server.
    pub(super) nbd: nbd::NbdArgs,
    /// Keys of a web server.
    pub(super) https: https::HttpsArgs,
    /// Keys of a disk that VDDK opens.
    pub(super) vddk: vddk::VddkArgs,
    /// `file=` as it was given: in a datastore it is no path of this machine.
    pub(super) file_text: Option<OsString>,
    /// `backend=`
    pub(super) backend: Option<Backend>,
    /// `limit=`
    pub(super) map_limit: Option<u64>,
    /// Keys that were given. Used to detect duplicates and keys that do not apply to the source.
    given: Vec<&'static Key>,
}

/// `backend=`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// The built-in engine.
    Native,
    /// An NBD server.
    Nbd,
    /// A web server.
    Https,
    /// VMware's library.
    Vddk,
}

/// Source as given, before patterns and folders are expanded.
#[derive(Debug, Clone)]
pub(super) enum SourceSpec {
    /// One file, or a pattern that matches several.
    File(PathBuf),
    /// All disks of a folder.
    Dir(PathBuf),
    /// URI of an NBD server.
    Nbd(String),
    /// URL of a file on a web server.
    Url(https::HttpsSource),
}

/// Source of one disk.
#[derive(Debug)]
pub(super) enum DiskSource {
    /// A local file, and the disk in it if it is a package.
    File(PathBuf, Option<String>),
    /// An NBD server, with its URI if `uri=` was given.
    Nbd(Option<String>),
    /// A file on a web server.
    Https(https::HttpsSource),
    /// A disk that VDDK opens: a local path, or the name in a datastore as it was given.
    Vddk(OsString),
}

impl Settings {
    /// Adds a key. Fails as [`Key::apply`] does, or if a key that is not repeatable is given twice.
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

    /// Returns these settings, with the values of `common` for keys that are not set here. The `allow-dir=` folders of
    /// both apply.
    pub(super) fn over(&self, common: &Self) -> Self {
        Self {
            source: self.source.clone(),
            name: self.name.clone().or_else(|| common.name.clone()),
            read_only: self.read_only.or(common.read_only),
            cache: self.cache.or(common.cache),
            cache_size: self.cache_size.or(common.cache_size),
            cache_dir: self.cache_dir.clone().or_else(|| common.cache_dir.clone()),
            cache_dir_size: self.cache_dir_size.or(common.cache_dir_size),
            readahead: self.readahead.or(common.readahead),
            format: self.format.or(common.format),
            allow_dirs: [common.allow_dirs.as_slice(), &self.allow_dirs].concat(),
            degraded: Degraded {
                cid: self.degraded.cid || common.degraded.cid,
                orphan: self.degraded.orphan || common.degraded.orphan,
                short: self.degraded.short || common.degraded.short,
            },
            parent: self.parent.clone().or_else(|| common.parent.clone()),
            member: self.member.clone().or_else(|| common.member.clone()),
            single_file: self.single_file.or(common.single_file),
            lock: self.lock.or(common.lock),
            view: self.view.or(common.view),
            view_size: self.view_size.or(common.view_size),
            view_dir: self.view_dir.clone().or_else(|| common.view_dir.clone()),
            overlay: self.overlay.clone().or_else(|| common.overlay.clone()),
            force: self.force.or(common.force),
            creation: self.creation.over(common.creation),
            nbd: self
                .nbd
                .over(&common.nbd, matches!(self.source, Some(SourceSpec::Nbd(_)))),
            https: self.https.over(&common.https),
            vddk: self.vddk.over(&common.vddk),
            file_text: self.file_text.clone(),
            backend: self.backend.or(common.backend),
            map_limit: self.map_limit.or(common.map_limit),
            // A common key that fits no disk is an error of the whole mount, not of each disk. Those of web servers are
            // checked before any file is searched for.
            given: common
                .given
                .iter()
                .filter(|key| key.group == Group::VMware)
                .chain(&self.given)
                .copied()
                .collect(),
        }
    }

    /// Returns the first given key that belongs to one of `groups`.
    pub(super) fn first_of(&self, groups: &[Group]) -> Option<&'static str> {
        self.given
            .iter()
            .find(|key| groups.contains(&key.group))
            .map(|key| key.name)
    }

    /// Returns the first given key that does not fit a disk on an NBD server.
    pub(super) fn unfit_for_server(&self) -> Option<&'static str> {
        let local = [Group::Local, Group::Create];
        // An overlay over an export has a parent too.
        let fits = |name: &str| name == "degraded" && self.overlay.is_some();
        let unfit = self
            .given
            .iter()
            .find(|key| local.contains(&key.group) && !fits(key.name));
        unfit.map(|key| key.name)
    }

    /// Returns the files of the source. The file of a created disk is never expanded, even if its name has wildcards.
    fn files(&self, subcommand: Subcommand) -> Result<Vec<PathBuf>, UsageError> {
        match &self.source {
            Some(SourceSpec::Dir(_)) if self.creation.is_enabled(subcommand) => Err(UsageError::new(
                "a created disk needs file=PATH, but dir= means all disks of a folder",
            )),
            Some(SourceSpec::File(path)) if self.creation.is_enabled(subcommand) => Ok(vec![path.clone()]),
            Some(SourceSpec::File(path)) => expand::expand(path),
            Some(SourceSpec::Dir(dir)) => expand::disks_of(dir),
            Some(SourceSpec::Nbd(_) | SourceSpec::Url(_)) | None => Ok(Vec::new()),
        }
    }

    /// Returns the disks of a file: itself, or those of a package.
    fn disks_in(&self, path: PathBuf, subcommand: Subcommand) -> Result<Vec<DiskSource>, UsageError> {
        let is_package = self.format.is_none() && Format::is_package(&path);
        if self.creation.is_enabled(subcommand) || (!is_package && self.member.is_none()) {
            return Ok(vec![DiskSource::File(path, None)]);
        }
        let members = match &self.member {
            Some(member) => vec![member.clone()],
            None => expand::disks_of_package(&path)?,
        };
        let disk = |member| DiskSource::File(path.clone(), Some(member));
        Ok(members.into_iter().map(disk).collect())
    }

    /// Returns the source on a web server, if the disk is on one: `url=`, or `file=` with `server=` or `backend=https`.
    fn https_source(&self, subcommand: Subcommand) -> Result<Option<https::HttpsSource>, UsageError> {
        match &self.source {
            None if subcommand == Subcommand::List && self.https.server.is_some() && !self.nbd.names_server() => {
                Ok(Some(https::HttpsSource::Server))
            }
            Some(SourceSpec::Url(url)) => Ok(Some(url.clone())),
            Some(SourceSpec::File(_)) if self.https.server.is_some() || self.backend == Some(Backend::Https) => {
                let text = self.file_text.as_deref().and_then(OsStr::to_str);
                let text = text.ok_or_else(|| UsageError::new("file=: the name of a file in a datastore is UTF-8"))?;
                Ok(Some(match subcommand {
                    Subcommand::List => https::HttpsSource::Folder(text.to_owned()),
                    _ => https::HttpsSource::File(text.to_owned()),
                }))
            }
            _ => Ok(None),
        }
    }

    /// Returns true if VDDK opens the disk.
    fn is_vddk(&self) -> bool {
        let is_file = matches!(self.source, Some(SourceSpec::File(_) | SourceSpec::Dir(_)));
        match self.backend {
            Some(backend) => backend == Backend::Vddk,
            None => (is_file || self.is_vddk_export()) && self.vddk.libdir.is_some(),
        }
    }

    /// Returns true if a pattern names the disks that VDDK opens, in place of `file=`.
    pub(super) fn is_vddk_export(&self) -> bool {
        let asked = self.vddk.libdir.is_some() || self.backend == Some(Backend::Vddk);
        self.source.is_none() && self.nbd.export.is_some() && asked && !self.nbd.names_server()
    }

    /// Returns the disks that VDDK opens: that of a datastore, or local files. Fails if a key does not fit them.
    fn vddk_sources(&self, subcommand: Subcommand) -> Result<Vec<DiskSource>, UsageError> {
        const ALSO_HERE: [&str; 9] = [
            "file",
            "export",
            "port",
            "server",
            "user",
            "password",
            "cookie",
            "thumbprint",
            "credentials",
        ];
        let elsewhere = [Group::Local, Group::Nbd, Group::VMware];
        // An overlay has a parent.
        let only_cid = !self.degraded.orphan && !self.degraded.short;
        let fits = |name: &str| name == "degraded" && self.overlay.is_some() && only_cid;
        let unfit = self
            .given
            .iter()
            .find(|key| elsewhere.contains(&key.group) && !ALSO_HERE.contains(&key.name) && !fits(key.name));
        if let Some(key) = unfit {
            let name = key.name;
            return Err(UsageError::new(format!("{name}= does not fit a disk that VDDK opens")));
        }
        let text = self.file_text.clone().filter(|_| vddk::is_remote(self));
        let export = self.nbd.export.as_deref();
        if let (Some(pattern), Some(file)) = (export, &self.file_text)
            && !vddk::matches(pattern, file)
        {
            let (file, pattern) = (values::display(file), values::display(pattern));
            return Err(UsageError::new(format!("file={file}: does not match export={pattern}")));
        }
        match (&self.source, text) {
            (None, None) if self.is_vddk_export() && !vddk::is_remote(self) => {
                let pattern = values::path(export.unwrap_or_default());
                let pattern = pattern.map_err(|e| UsageError::new(format!("export=: {e}")))?;
                let files = expand::expand(&pattern)?.into_iter();
                Ok(files.map(|path| DiskSource::Vddk(path.into_os_string())).collect())
            }
            (None, None) if self.is_vddk_export() => Err(UsageError::new(
                "export=: VDDK lists no disks of a server: name each by file=, and export= is the pattern that they match",
            )),
            (Some(SourceSpec::File(_)), Some(text)) => Ok(vec![DiskSource::Vddk(text)]),
            (Some(SourceSpec::File(_)), None) => {
                let files = self.files(subcommand)?.into_iter();
                Ok(files.map(|path| DiskSource::Vddk(path.into_os_string())).collect())
            }
            _ => Err(UsageError::new(
                "a disk for VDDK needs file=: the path of a VMDK, or \"[datastore] folder/disk.vmdk\"",
            )),
        }
    }

    /// Returns the sources of all disks that the settings describe. Empty if no source is given.
    pub(super) fn disk_sources(&self, subcommand: Subcommand) -> Result<Vec<DiskSource>, UsageError> {
        if self.is_vddk() {
            return self.vddk_sources(subcommand);
        }
        if let Some(key) = self.first_of(&[Group::Vddk]) {
            return Err(UsageError::new(format!("{key}= {}", vddk::NOT_VDDK)));
        }
        if let Some(source) = self.https_source(subcommand)? {
            return match self.backend {
                None | Some(Backend::Https) => Ok(vec![DiskSource::Https(source)]),
                Some(_) => Err(UsageError::new(
                    "the disk is on a web server: it needs backend=https, or no backend=",
                )),
            };
        }
        if let Some(key) = self.first_of(&[Group::VMware]) {
            return Err(UsageError::new(format!(
                "{key}= is for disks on a web server: add server= and file=\"[datastore] folder/disk.vmdk\", or url="
            )));
        }
        let is_nbd = matches!(self.source, Some(SourceSpec::Nbd(_))) || self.source.is_none();
        match (self.backend, &self.source) {
            (Some(Backend::Native), _) if is_nbd => {
                Err(UsageError::new("backend=native reads files, but no file is given"))
            }
            (Some(Backend::Nbd), Some(SourceSpec::File(_) | SourceSpec::Dir(_))) => {
                Err(UsageError::new("backend=nbd needs a server, but a file is given"))
            }
            (Some(Backend::Https), _) => Err(UsageError::new("backend=https needs url=, or server= and file=")),
            (_, Some(SourceSpec::Nbd(uri))) => Ok(vec![DiskSource::Nbd(Some(uri.clone()))]),
            (_, Some(_)) => {
                if let Some(key) = self.first_of(&[Group::Nbd]) {
                    return Err(UsageError::new(format!(
                        "{key}= is for NBD servers, but the disk is a local file"
                    )));
                }
                let mut disks = Vec::new();
                for path in self.files(subcommand)? {
                    disks.extend(self.disks_in(path, subcommand)?);
                }
                Ok(disks)
            }
            (_, None) if self.nbd.names_server() => Ok(vec![DiskSource::Nbd(None)]),
            (_, None) => Ok(Vec::new()),
        }
    }

    /// Returns the configuration of the disk with source `disk_source`. `fixed` is the file name that the mount point
    /// gives it.
    ///
    /// Fails if keys conflict with each other or do not apply to the source.
    pub(super) fn config(
        &self,
        disk_source: DiskSource,
        fixed: Option<&OsStr>,
        subcommand: Subcommand,
    ) -> Result<DiskConfig, UsageError> {
        match &disk_source {
            DiskSource::Https(_) if self.cache_dir.is_none() && self.cache_dir_size.is_some() => {
                return Err(UsageError::new("cache-dir-size= needs cache-dir="));
            }
            DiskSource::Https(_) => {}
            _ if self.cache_dir.is_some() || self.cache_dir_size.is_some() => {
                return Err(UsageError::new(
                    "cache-dir= and cache-dir-size= are for disks on web servers: url=, or server= with file=",
                ));
            }
            _ => {}
        }
        let requested = fixed.map(OsStr::to_owned).or_else(|| self.name.clone());
        let mut warnings: Vec<&'static str> = self.cache.and_then(|(_, warning)| warning).into_iter().collect();
        let (default_name, source) = match disk_source {
            DiskSource::File(path, member) => (
                expand::default_name(member.as_deref().map_or(&path, Path::new)),
                SourceConfig::Local(self.local(path, member, subcommand)?),
            ),
            DiskSource::Nbd(uri) => {
                let server = self.server(uri, requested.is_some(), subcommand)?;
                (expand::export_name(&server), SourceConfig::Nbd(server))
            }
            DiskSource::Vddk(file) => {
                let (disk, of_disk) = self.vddk_disk(file, subcommand)?;
                warnings.extend(of_disk);
                (vddk::default_name(&disk), SourceConfig::Vddk(Box::new(disk)))
            }
            DiskSource::Https(source) => {
                let (mut disk, of_server) = self.web_disk(source, subcommand)?;
                if requested.is_some() {
                    disk.named = NamedBy::FileAndName;
                }
                warnings.extend(of_server);
                let name = crate::store::https::file_name(&disk).map_err(|e| UsageError::new(e.to_string()))?;
                (
                    expand::default_name(Path::new(&name)),
                    SourceConfig::Https(Box::new(disk)),
                )
            }
        };
        let disk = DiskConfig {
            name: requested.unwrap_or(default_name),
            read_only: self.read_only.unwrap_or_default(),
            cache: self.cache.map(|(mode, _)| mode),
            cache_size: self.cache_size,
            readahead: self.readahead,
            overlay: self.overlay.clone(),
            map_limit: self.map_limit,
            source,
            warnings,
        };
        if self.map_limit.is_some() && subcommand != Subcommand::Query {
            return Err(UsageError::new(
                "limit= bounds the output of --map; a mount has no such limit",
            ));
        }
        overlay_args::check_disk(&disk, subcommand)?;
        Ok(disk)
    }

    /// Returns the configuration of a local file.
    fn local(&self, path: PathBuf, member: Option<String>, subcommand: Subcommand) -> Result<LocalConfig, UsageError> {
        let create = self.creation.config(subcommand);
        let create = create.map_err(|e| UsageError::new(format!("{}: {e}", path.display())))?;
        let found_in = match &self.source {
            Some(SourceSpec::Dir(dir)) => Some(dir.clone()),
            Some(SourceSpec::File(pattern)) if create.is_none() => expand::searched_folder(pattern),
            _ => None,
        };
        Ok(LocalConfig {
            path,
            member,
            found_in,
            format: self.format.unwrap_or_default(),
            allow_dirs: self.allow_dirs.clone(),
            degraded: self.degraded,
            parent: self
                .parent
                .as_deref()
                .map(|parent| values::path(parent).map_err(|e| UsageError::new(format!("parent=: {e}"))))
                .transpose()?,
            single_file: self.single_file.unwrap_or_default(),
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

    /// Returns the configuration of a disk on a web server, and what to tell the user about it.
    fn web_disk(
        &self,
        source: https::HttpsSource,
        subcommand: Subcommand,
    ) -> Result<(HttpsConfig, Vec<&'static str>), UsageError> {
        let elsewhere = [Group::Local, Group::Create, Group::Nbd];
        let unfit = self
            .given
            .iter()
            .find(|key| elsewhere.contains(&key.group) && !key.fits(Group::VMware));
        if let Some(key) = unfit {
            let name = key.name;
            return Err(UsageError::new(format!("{name}= does not fit a disk on a web server")));
        }
        if subcommand == Subcommand::Create {
            return Err(UsageError::new(
                "--create creates local VMDKs, but a web server is given",
            ));
        }
        let common = https::CommonArgs {
            port: self.nbd.port.clone(),
            connections: self.nbd.connections,
            timeout: self.nbd.timeout,
            retry: self.nbd.retry,
            cache_dir: self.cache_dir.clone().map(|dir| (dir, self.cache_dir_size)),
            format: self.format.unwrap_or_default(),
            degraded: self.degraded,
            parent: self
                .parent
                .as_deref()
                .map(|parent| parent.to_string_lossy().into_owned()),
            member: self.member.clone(),
        };
        self.https.clone().config(source, &common)
    }

    /// Returns the configuration of a disk that VDDK opens, and what to tell the user about it.
    fn vddk_disk(&self, file: OsString, subcommand: Subcommand) -> Result<(VddkConfig, Vec<&'static str>), UsageError> {
        let create = self.creation.config(subcommand)?;
        vddk::config(self, file, create)
    }

    /// Returns the configuration of an NBD server. `named` is true if a file name is given.
    fn server(&self, uri: Option<String>, named: bool, subcommand: Subcommand) -> Result<NbdConfig, UsageError> {
        if let Some(key) = self.unfit_for_server() {
            return Err(UsageError::new(format!(
                "{key}= is for local files, but the disk is on an NBD server"
            )));
        }
        if subcommand == Subcommand::Create {
            return Err(UsageError::new(
                "--create creates local VMDKs, but an NBD server is given",
            ));
        }
        if self.degraded.orphan || self.degraded.short {
            return Err(UsageError::new(
                "degraded=orphan and degraded=short are for images, but the disk is on an NBD server",
            ));
        }
        let server = NbdConfig {
            accept_cid_mismatch: self.degraded.cid,
            ..self.nbd.clone().config(uri)?
        };
        if server.dynamic && (named || self.overlay.is_some()) {
            let key = if named { "one name" } else { "cow=" };
            return Err(UsageError::new(format!(
                "dynamic-export=true shows every export as a file, but {key} is for one file"
            )));
        }
        Ok(server)
    }
}
