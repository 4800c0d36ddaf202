//! Keys of a disk, applied in layers.
//!
//! [`Settings::layer`] applies pairs in their order: first those that hold for all disks, then those of the disk. A later
//! layer wins over an earlier one. Conflicts among the keys are visible when all layers are applied, and only then is it
//! known if a name is a path of this machine: `disk_source.rs` and `disk_config.rs` find them.

use std::ffi::OsString;
use std::path::PathBuf;

use super::create_args::CreateArgs;
use super::https::{HttpsArgs, HttpsSource};
use super::key::{Choice, Group, Key};
use super::login::LoginArgs;
use super::nbd::NbdArgs;
use super::outcome::UsageError;
use super::pair::{Origin, Pair};
use super::server_args::ServerArgs;
use super::values::{FileName, PageCacheArg};
use super::vddk::VddkArgs;
use crate::config::{LocalConfig, Overlay};

/// A key of disks.
pub(super) type DiskKey = Key<Settings>;

/// A key of disks with its value.
pub(super) type DiskPair = Pair<DiskKey>;

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
    /// Keys of the login at a server.
    pub(super) login: LoginArgs,
    /// Keys of an NBD server.
    pub(super) nbd: NbdArgs,
    /// Keys of a web server.
    pub(super) https: HttpsArgs,
    /// Keys of a disk that VDDK opens.
    pub(super) vddk: VddkArgs,
    /// Keys that were given. Used to detect duplicates and keys that do not apply to the source.
    given: Vec<Given>,
}

/// A key that was given.
#[derive(Debug, Clone)]
struct Given {
    key: &'static DiskKey,
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
    Url(HttpsSource),
}

impl Settings {
    /// Returns the settings of a disk with these common ones, to which the disk's own pairs are applied.
    ///
    /// Fails as [`Self::layer`] does.
    pub(super) fn of_disk(&self, pairs: &[DiskPair]) -> Result<Self, UsageError> {
        let mut disk = self.clone();
        disk.given.iter_mut().for_each(|given| given.is_common = true);
        disk.layer(pairs)?;
        Ok(disk)
    }

    /// Applies a layer of pairs over the earlier ones. Each value is read once, because some ask for a password.
    ///
    /// Fails as [`Key::apply`] does, or if the layer has a key twice that is not repeatable.
    pub(super) fn layer(&mut self, pairs: &[DiskPair]) -> Result<(), UsageError> {
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
        let named = |given: &&Given| e.key() == Some(given.key.name);
        match self.given.iter().rev().find(named) {
            Some(given) => given.origin.blame(e),
            None => e,
        }
    }

    /// Returns the first given key that is unfit. A common key that fits no disk is an error of the whole mount, not of
    /// each disk. Those of web servers are checked before any file is searched for.
    pub(super) fn first(&self, unfit: impl Fn(&DiskKey) -> bool) -> Option<&'static str> {
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

    /// Returns true if VDDK opens the disk.
    pub(super) fn is_vddk(&self) -> bool {
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
}
