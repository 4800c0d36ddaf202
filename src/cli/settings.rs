//! Keys of a disk, applied in layers, and the disk's configuration that follows from them.
//!
//! [`Settings::layer`] applies pairs in their order: first those that hold for all disks, then those of the disk. A later
//! layer wins over an earlier one. [`Settings::config`] makes the configuration of one disk; only then are conflicts
//! among the keys visible, and only then is it known if a name is a path of this machine.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::Subcommand;
use super::create_args::CreateArgs;
use super::keys::{Choice, Group, Key};
use super::pair::{Origin, Pair, Value};
use super::values::PageCacheArg;
use super::{UsageError, expand, https, nbd, overlay_args, values, vddk};
use crate::config::{
    DiskConfig, Format, HttpsConfig, LocalConfig, NamedBy, NbdConfig, Overlay, SourceConfig, VddkConfig,
};

/// Keys of one disk, or of all disks.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    /// Source of the disk. Never set in the common settings.
    pub(super) source: Option<SourceSpec>,
    /// `name=`
    pub(super) name: Option<OsString>,
    /// `readonly=`
    pub(super) read_only: bool,
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
    /// `cow=`
    pub(super) overlay: Option<Overlay>,
    /// `limit=`
    pub(super) map_limit: Option<u64>,
    /// `backend=`
    pub(super) backend: Option<Backend>,
    /// Keys of image files, without the path. Some hold for other sources too.
    pub(super) image: LocalConfig,
    /// `parent=`
    pub(super) parent: Option<FileName>,
    /// `create=` and the other `create-*=` keys
    pub(super) creation: CreateArgs,
    /// Keys of every kind of server.
    pub(super) server: ServerArgs,
    /// Keys of an NBD server.
    pub(super) nbd: nbd::NbdArgs,
    /// Keys of a web server.
    pub(super) https: https::HttpsArgs,
    /// Keys of a disk that VDDK opens.
    pub(super) vddk: vddk::VddkArgs,
    /// Keys that were given. Used to detect duplicates and keys that do not apply to the source.
    given: Vec<Given>,
}

/// Keys of every kind of server.
#[derive(Debug, Clone, Default)]
pub(super) struct ServerArgs {
    /// `port=`
    pub(super) port: Option<String>,
    /// `connections=`
    pub(super) connections: Option<usize>,
    /// `timeout=`
    pub(super) timeout: Option<Duration>,
    /// `retry=`
    pub(super) retry: Option<u32>,
}

/// A key that was given.
#[derive(Debug, Clone)]
struct Given {
    key: &'static Key,
    origin: Origin,
    /// True if it holds for all disks. If it fits no disk, that is an error of the whole mount, not of each disk.
    is_common: bool,
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

/// Name of a file as it was given, and as a path of this machine. The back end decides which of them counts: in a
/// datastore it is no path.
#[derive(Debug, Clone)]
pub(super) struct FileName {
    pub(super) text: OsString,
    pub(super) path: PathBuf,
}

/// Source as given, before patterns and folders are expanded.
#[derive(Debug, Clone)]
pub(super) enum SourceSpec {
    /// One file, or a pattern that matches several.
    File(FileName),
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

impl FileName {
    pub(super) fn of(value: &Value<'_>, path: PathBuf) -> Self {
        let text = value.text.to_owned();
        Self { text, path }
    }
}

impl Settings {
    /// Returns the settings of a disk with these common ones, to which the disk's own pairs are applied.
    ///
    /// Fails as [`Self::layer`] does.
    pub(super) fn of_disk(&self, pairs: &[Pair]) -> Result<Self, UsageError> {
        let mut disk = self.clone();
        disk.given.iter_mut().for_each(|given| given.is_common = true);
        disk.layer(pairs)?;
        Ok(disk)
    }

    /// Applies a layer of pairs over the earlier ones. Each value is read once, because some ask for a password.
    ///
    /// Fails as [`Key::apply`] does, or if the layer has a key twice that is not repeatable.
    pub(super) fn layer(&mut self, pairs: &[Pair]) -> Result<(), UsageError> {
        pairs
            .iter()
            .filter_map(|pair| pair.key.choice)
            .for_each(|choice| self.reset(choice));
        let before = self.given.len();
        for pair in pairs {
            let key = pair.key;
            if !key.repeats && self.given[before..].iter().any(|given| given.key.name == key.name) {
                let twice = UsageError::of(key.name, " is given twice for the same disk");
                return Err(pair.origin.blame(twice));
            }
            key.apply(self, &pair.value()).map_err(|e| pair.origin.blame(e))?;
            self.given.push(Given {
                key,
                origin: pair.origin.clone(),
                is_common: false,
            });
        }
        Ok(())
    }

    /// Removes the values of the keys that make a choice together.
    fn reset(&mut self, choice: Choice) {
        match choice {
            Choice::Trust => (self.https.thumbprint, self.https.cainfo, self.https.insecure) = Default::default(),
            Choice::Owner => (self.vddk.vm, self.vddk.datastore) = Default::default(),
            Choice::Address { has_port } => {
                (self.nbd.addresses, self.nbd.args) = Default::default();
                // `port=` stays the default for addresses that have a port.
                self.server.port = self.server.port.take().filter(|_| has_port);
            }
        }
    }

    /// Points an error about a key to the place where the key was given.
    pub(super) fn blame(&self, e: UsageError) -> UsageError {
        let named = |given: &&Given| e.key == Some(given.key.name);
        match self.given.iter().rev().find(named) {
            Some(given) => given.origin.blame(e),
            None => e,
        }
    }

    /// Returns the first given key that is unfit. A common key that fits no disk is an error of the whole mount, not of
    /// each disk. Those of web servers are checked before any file is searched for.
    fn first(&self, unfit: impl Fn(&Key) -> bool) -> Option<&'static str> {
        let counts = |given: &&Given| !given.is_common || given.key.group == Group::VMware;
        let keys = self.given.iter().filter(counts).map(|given| given.key);
        keys.filter(|key| unfit(key)).map(|key| key.name).next()
    }

    /// Returns the first given key that belongs to one of `groups`.
    pub(super) fn first_of(&self, groups: &[Group]) -> Option<&'static str> {
        self.first(|key| groups.contains(&key.group))
    }

    /// Returns the first given key that does not fit a disk on an NBD server.
    pub(super) fn unfit_for_server(&self) -> Option<&'static str> {
        // An overlay over an export has a parent too.
        let fits = |name: &str| name == "degraded" && self.overlay.is_some();
        self.first(|key| [Group::Local, Group::Create].contains(&key.group) && !fits(key.name))
    }

    /// Returns the files of the source. The file of a created disk is never expanded, even if its name has wildcards.
    fn files(&self, subcommand: Subcommand) -> Result<Vec<PathBuf>, UsageError> {
        match &self.source {
            Some(SourceSpec::Dir(_)) if self.creation.is_enabled(subcommand) => Err(UsageError::new(
                "a created disk needs file=PATH, but dir= means all disks of a folder",
            )),
            Some(SourceSpec::File(file)) if self.creation.is_enabled(subcommand) => Ok(vec![file.path.clone()]),
            Some(SourceSpec::File(file)) => expand::expand(&file.path),
            Some(SourceSpec::Dir(dir)) => expand::disks_of(dir),
            Some(SourceSpec::Nbd(_) | SourceSpec::Url(_)) | None => Ok(Vec::new()),
        }
    }

    /// Returns the disks of a file: itself, or those of a package.
    fn disks_in(&self, path: PathBuf, subcommand: Subcommand) -> Result<Vec<DiskSource>, UsageError> {
        let is_package = self.image.format == Format::Auto && Format::is_package(&path);
        if self.creation.is_enabled(subcommand) || (!is_package && self.image.member.is_none()) {
            return Ok(vec![DiskSource::File(path, None)]);
        }
        let members = match &self.image.member {
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
            Some(SourceSpec::File(file)) if self.https.server.is_some() || self.backend == Some(Backend::Https) => {
                let text = file.text.to_str();
                let text =
                    text.ok_or_else(|| UsageError::of("file", ": the name of a file in a datastore is UTF-8"))?;
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
            None => (is_file || self.is_vddk_export()) && self.vddk.disk.library.libdir.is_some(),
        }
    }

    /// Returns true if a pattern names the disks that VDDK opens, in place of `file=`.
    pub(super) fn is_vddk_export(&self) -> bool {
        let asked = self.vddk.disk.library.libdir.is_some() || self.backend == Some(Backend::Vddk);
        self.source.is_none() && self.nbd.export.is_some() && asked && !self.nbd.names_server()
    }

    /// Returns the disks that VDDK opens: that of a datastore, or local files. Fails if a key does not fit them.
    fn vddk_sources(&self, subcommand: Subcommand) -> Result<Vec<DiskSource>, UsageError> {
        let elsewhere = [Group::Local, Group::Nbd, Group::VMware];
        // An overlay has a parent.
        let only_cid = !self.image.degraded.orphan && !self.image.degraded.short;
        let fits = |name: &str| name == "degraded" && self.overlay.is_some() && only_cid;
        let unfit = |key: &Key| elsewhere.contains(&key.group) && !key.fits(Group::Vddk) && !fits(key.name);
        if let Some(key) = self.first(unfit) {
            return Err(UsageError::of(key, " does not fit a disk that VDDK opens"));
        }
        let is_remote = vddk::is_remote(self);
        let export = self.nbd.export.as_ref();
        match &self.source {
            None if self.is_vddk_export() && !is_remote => {
                let pattern = export.filter(|export| !export.text.is_empty());
                let pattern = pattern.ok_or_else(|| UsageError::of("export", ": a path is missing"))?;
                let files = expand::expand(&pattern.path)?.into_iter();
                Ok(files.map(|path| DiskSource::Vddk(path.into_os_string())).collect())
            }
            None if self.is_vddk_export() => Err(UsageError::of(
                "export",
                ": VDDK lists no disks of a server: name each by file=, and export= is the pattern that they match",
            )),
            Some(SourceSpec::File(file)) => {
                if let Some(pattern) = export.filter(|pattern| !vddk::matches(&pattern.text, &file.text)) {
                    let (file, pattern) = (values::display(&file.text), values::display(&pattern.text));
                    let rest = format_args!("{file}: does not match export={pattern}");
                    return Err(UsageError::of("file", rest));
                }
                if is_remote {
                    return Ok(vec![DiskSource::Vddk(file.text.clone())]);
                }
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
            return Err(UsageError::of(key, format_args!(" {}", vddk::NOT_VDDK)));
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
            return Err(UsageError::of(
                key,
                " is for disks on a web server: add server= and file=\"[datastore] folder/disk.vmdk\", or url=",
            ));
        }
        let is_nbd = matches!(self.source, Some(SourceSpec::Nbd(_))) || self.source.is_none();
        match (self.backend, &self.source) {
            (Some(Backend::Native), _) if is_nbd => {
                Err(UsageError::of("backend", "native reads files, but no file is given"))
            }
            (Some(Backend::Nbd), Some(SourceSpec::File(_) | SourceSpec::Dir(_))) => {
                Err(UsageError::of("backend", "nbd needs a server, but a file is given"))
            }
            (Some(Backend::Https), _) => Err(UsageError::of("backend", "https needs url=, or server= and file=")),
            (_, Some(SourceSpec::Nbd(uri))) => Ok(vec![DiskSource::Nbd(Some(uri.clone()))]),
            (_, Some(_)) => {
                if let Some(key) = self.first_of(&[Group::Nbd]) {
                    return Err(UsageError::of(key, " is for NBD servers, but the disk is a local file"));
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
                return Err(UsageError::of("cache-dir-size", " needs cache-dir="));
            }
            DiskSource::Https(_) => {}
            _ if self.cache_dir.is_some() || self.cache_dir_size.is_some() => {
                let key = if self.cache_dir.is_some() {
                    "cache-dir"
                } else {
                    "cache-dir-size"
                };
                let reason = "cache-dir= and cache-dir-size= are for disks on web servers: url=, or server= with file=";
                return Err(UsageError::new(reason).about(key));
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
            read_only: self.read_only,
            cache: self.cache.map(|(mode, _)| mode),
            cache_size: self.cache_size,
            readahead: self.readahead,
            overlay: self.overlay.clone(),
            map_limit: self.map_limit,
            source,
            warnings,
        };
        if self.map_limit.is_some() && subcommand != Subcommand::Query {
            return Err(UsageError::of(
                "limit",
                " bounds the output of --map; a mount has no such limit",
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
            Some(SourceSpec::File(pattern)) if create.is_none() => expand::searched_folder(&pattern.path),
            _ => None,
        };
        Ok(LocalConfig {
            path,
            member,
            found_in,
            parent: self.parent.as_ref().map(|parent| parent.path.clone()),
            create,
            ..self.image.clone()
        })
    }

    /// Returns the configuration of a disk on a web server, and what to tell the user about it.
    fn web_disk(
        &self,
        source: https::HttpsSource,
        subcommand: Subcommand,
    ) -> Result<(HttpsConfig, Vec<&'static str>), UsageError> {
        let elsewhere = [Group::Local, Group::Create, Group::Nbd];
        if let Some(key) = self.first(|key| elsewhere.contains(&key.group) && !key.fits(Group::VMware)) {
            return Err(UsageError::of(key, " does not fit a disk on a web server"));
        }
        if subcommand == Subcommand::Create {
            return Err(UsageError::new(
                "--create creates local VMDKs, but a web server is given",
            ));
        }
        self.https.config(source, self)
    }

    /// Returns the configuration of a disk that VDDK opens, and what to tell the user about it.
    fn vddk_disk(&self, file: OsString, subcommand: Subcommand) -> Result<(VddkConfig, Vec<&'static str>), UsageError> {
        let create = self.creation.config(subcommand)?;
        vddk::config(self, file, create)
    }

    /// Returns the configuration of an NBD server. `named` is true if a file name is given.
    fn server(&self, uri: Option<String>, named: bool, subcommand: Subcommand) -> Result<NbdConfig, UsageError> {
        if let Some(key) = self.unfit_for_server() {
            return Err(UsageError::of(
                key,
                " is for local files, but the disk is on an NBD server",
            ));
        }
        if subcommand == Subcommand::Create {
            return Err(UsageError::new(
                "--create creates local VMDKs, but an NBD server is given",
            ));
        }
        if self.image.degraded.orphan || self.image.degraded.short {
            return Err(UsageError::of(
                "degraded",
                "orphan and degraded=short are for images, but the disk is on an NBD server",
            ));
        }
        let server = self.nbd.config(uri, self)?;
        if server.dynamic && (named || self.overlay.is_some()) {
            let key = if named { "one name" } else { "cow=" };
            let rest = format_args!("true shows every export as a file, but {key} is for one file");
            return Err(UsageError::of("dynamic-export", rest));
        }
        Ok(server)
    }
}
