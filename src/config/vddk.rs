//! Configuration of a disk that VMware's VDDK opens.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::create::CreateConfig;
use super::secret::Secret;
use super::source_settings::{Locality, SourceSettings};

/// A disk that VDDK opens: a local VMDK, or a disk of an ESXi host or a vCenter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VddkConfig {
    /// Absolute path of a local disk, or `[datastore] folder/disk.vmdk` of a remote one.
    pub file: OsString,
    /// The library.
    pub library: VddkLibrary,
    /// Server of a remote disk. `None`: the disk is local.
    pub remote: Option<VddkRemote>,
    /// Transport modes, separated by colons in the order in which VDDK tries them. `None`: the default.
    pub transports: Option<String>,
    /// Open one link of a chain, without its parents.
    pub single_link: bool,
    /// Bypass the page cache.
    pub unbuffered: bool,
    /// Compression of the transport.
    pub compression: VddkCompression,
    /// Create the disk before it is opened.
    pub create: Option<CreateConfig>,
    /// Accept an overlay that was created over another state of the disk.
    pub accept_cid_mismatch: bool,
    /// Folder that keeps fetched blocks across mounts, and its size limit in bytes. Only for the disk of a snapshot that is
    /// only read, which cannot change unseen.
    pub cache_dir: Option<(PathBuf, Option<u64>)>,
    /// Time after which a request fails. `None`: the default time.
    pub timeout: Option<Duration>,
    /// Number of retries of a failed attempt to open the disk.
    pub retry: Option<u32>,
}

/// Location of the library.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VddkLibrary {
    /// Folder of the library. `None`: the default folder, then the search path of the dynamic linker.
    pub libdir: Option<PathBuf>,
    /// Configuration file of the library. `None`: a private one.
    pub config: Option<PathBuf>,
}

/// Server of a remote disk, and the login.
#[derive(Debug, Clone, PartialEq)]
pub struct VddkRemote {
    /// Host name or IP address of the ESXi host or the vCenter.
    pub server: String,
    /// Port. `None`: the default of the library.
    pub port: Option<u32>,
    /// Port of the NFC service. `None`: the default of the library.
    pub nfc_host_port: Option<u32>,
    /// User name.
    pub user: String,
    /// Password, or the key of a session cookie.
    pub password: Secret,
    /// Session cookie.
    pub cookie: Option<Secret>,
    /// Thumbprint of the server's certificate, as it was given.
    pub thumbprint: Option<String>,
    /// Owner of the disk.
    pub owner: VddkOwner,
    /// Managed object reference of a snapshot.
    pub snapshot: Option<String>,
    /// Forbid migration of the virtual machine while the disk is open.
    pub prepare_for_access: bool,
}

/// Owner of a remote disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VddkOwner {
    /// The virtual machine, as `moref=ID`.
    Vm(String),
    /// The datastore, by the ID of its managed object reference.
    Datastore(String),
}

/// Compression of a transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VddkCompression {
    /// None.
    #[default]
    None,
    /// zlib.
    Zlib,
    /// FastLZ.
    FastLz,
    /// SkipZ.
    SkipZ,
}

impl SourceSettings for VddkConfig {
    fn label(&self) -> String {
        self.file.display().to_string()
    }

    fn locality(&self) -> Locality {
        match self.remote {
            Some(_) => Locality::OtherMachine,
            None => Locality::OtherProcess,
        }
    }

    fn accepts_cid_mismatch(&self) -> bool {
        self.accept_cid_mismatch
    }

    fn cache_dir(&self) -> Option<&Path> {
        self.cache_dir.as_ref().map(|(dir, _)| dir.as_path())
    }

    fn set_created(&mut self) {
        self.create = None;
    }
}
