//! Task of a host process, as the parent passes it: library, disk, login.
//!
//! ```text
//!   memfd   ┌───────────────────────────┬────────┬──────────────┐
//!           │ statistics, shared memory │ length │ task as JSON │
//!           └───────────────────────────┴────────┴──────────────┘
//!           0                        4096     4104
//! ```
//! The memory file is the only way by which a secret reaches the host: its arguments and its environment have none. The
//! host overwrites the task as soon as it has read it. A host that only describes the library leaves its answer in the
//! same place.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::abi::open_flag;
use super::library_file::LibraryFile;
use crate::config::{SourceSettings, VddkCompression, VddkConfig, VddkOwner, VddkRemote};
use crate::error::{Error, Result};

/// Bytes of the statistics in front of the task.
pub(super) const STATISTICS_LEN: u64 = 4096;

/// Longest task or answer in bytes. The paths and secrets in it are far shorter.
const MAX_LEN: u64 = 1 << 20;

/// Transport modes that are tried if the user names none. VDDK 8 and later crash in the others where
/// `/sys/class/scsi_disk` is absent, as in containers.
const DEFAULT_TRANSPORTS: &str = "file:nbdssl:nbd";

/// Task of a host process.
#[derive(Serialize, Deserialize)]
pub(super) struct HostSpec {
    /// Files to load the library from: the first that exists.
    pub(super) library: Vec<LibraryFile>,
    /// Folder of the library, as the user gave it.
    pub(super) libdir: Option<OsString>,
    /// Configuration file of the library.
    pub(super) config: OsString,
    /// Folder of the private configuration file, which the host removes at its end.
    pub(super) private_dir: OsString,
    /// `LD_LIBRARY_PATH` of the parent, which children of the host get.
    pub(super) library_path: Option<OsString>,
    /// Highest level of log messages: 0 warnings, 1 information, 2 debug, 3 trace.
    pub(super) verbosity: u8,
    /// The disk to serve. `None`: describe the library.
    pub(super) disk: Option<DiskSpec>,
}

/// Disk that a host process serves.
#[derive(Serialize, Deserialize)]
pub(super) struct DiskSpec {
    /// Path of the disk, without a NUL byte.
    pub(super) file: OsString,
    pub(super) writable: bool,
    pub(super) remote: Option<RemoteSpec>,
    pub(super) transports: String,
    /// Flags of `VixDiskLib_Open`, except for the one of a read-only disk.
    pub(super) flags: u32,
    /// Milliseconds after which no further attempt to open the disk is made.
    pub(super) open_within: u64,
    /// Milliseconds to wait before the first attempt: the server is in maintenance, or has refused the login.
    pub(super) pause: u64,
    pub(super) create: Option<CreateSpec>,
}

/// Server and login of a remote disk.
#[derive(Serialize, Deserialize)]
pub(super) struct RemoteSpec {
    pub(super) server: String,
    pub(super) port: Option<u32>,
    pub(super) nfc_host_port: Option<u32>,
    pub(super) user: String,
    pub(super) password: String,
    pub(super) cookie: Option<String>,
    pub(super) thumbprint: Option<String>,
    pub(super) vm: Option<String>,
    pub(super) datastore: Option<String>,
    pub(super) snapshot: Option<String>,
    pub(super) prepare_for_access: bool,
}

/// Properties of a disk to create, as VDDK numbers them.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct CreateSpec {
    pub(super) sectors: u64,
    pub(super) disk_type: u32,
    pub(super) adapter_type: u32,
    pub(super) hw_version: u16,
}

/// Description of a loaded library, for `--dump`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct LibraryDescription {
    /// Version, from the name of the file.
    pub(crate) version: u32,
    /// Path of the loaded file, without symbolic links.
    pub(crate) path: String,
    /// Functions that it has.
    pub(crate) functions: Vec<String>,
    /// Transport modes that it supports, separated by colons, if it says so.
    pub(crate) transports: Option<String>,
}

impl DiskSpec {
    /// Creates the task for a disk.
    pub(super) fn new(config: &VddkConfig, writable: bool, open_within: u64) -> Result<Self> {
        if config.file.as_bytes().contains(&0) {
            return Err(Error::unsupported(format!(
                "{}: the name has a NUL byte",
                config.label()
            )));
        }
        // READ_ONLY is added where the disk is opened, as the host knows best for what.
        let mut flags = match config.compression {
            VddkCompression::None => 0,
            VddkCompression::Zlib => open_flag::ZLIB,
            VddkCompression::FastLz => open_flag::FASTLZ,
            VddkCompression::SkipZ => open_flag::SKIPZ,
        };
        if config.single_link {
            flags |= open_flag::SINGLE_LINK;
        }
        if config.unbuffered {
            flags |= open_flag::UNBUFFERED;
        }
        Ok(Self {
            file: config.file.clone(),
            writable,
            remote: config.remote.as_ref().map(RemoteSpec::new),
            transports: config
                .transports
                .clone()
                .unwrap_or_else(|| DEFAULT_TRANSPORTS.to_owned()),
            flags,
            open_within,
            pause: 0,
            create: None,
        })
    }
}

impl RemoteSpec {
    fn new(remote: &VddkRemote) -> Self {
        let (vm, datastore) = match &remote.owner {
            VddkOwner::Vm(vm) => (Some(vm.clone()), None),
            VddkOwner::Datastore(datastore) => (None, Some(datastore.clone())),
        };
        Self {
            server: remote.server.clone(),
            port: remote.port,
            nfc_host_port: remote.nfc_host_port,
            user: remote.user.clone(),
            password: remote.password.reveal().to_owned(),
            cookie: remote.cookie.as_ref().map(|cookie| cookie.reveal().to_owned()),
            thumbprint: remote.thumbprint.clone(),
            vm,
            datastore,
            snapshot: remote.snapshot.clone(),
            prepare_for_access: remote.prepare_for_access,
        }
    }
}

/// Writes a task or an answer to the memory file.
pub(super) fn put(file: &File, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(value)?;
    // The text first, then its length: a length of 0 means that nothing was written.
    file.write_all_at(&text, STATISTICS_LEN + 8)?;
    file.write_all_at(&(text.len() as u64).to_le_bytes(), STATISTICS_LEN)
}

/// Reads a task or an answer from the memory file, and overwrites it there.
pub(super) fn take<T: DeserializeOwned>(file: &File) -> io::Result<T> {
    let mut len = [0; 8];
    file.read_exact_at(&mut len, STATISTICS_LEN)?;
    let len = u64::from_le_bytes(len);
    // Bounded before it becomes an allocation: a host that has gone wrong may leave anything here.
    if len == 0 || len > MAX_LEN {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no task"));
    }
    let mut text = vec![0; len as usize];
    file.read_exact_at(&mut text, STATISTICS_LEN + 8)?;
    // Overwritten before it is parsed, so that the secrets are gone even if the text is malformed.
    file.write_all_at(&vec![0; text.len() + 8], STATISTICS_LEN)?;
    let value = serde_json::from_slice(&text);
    // The copy in the heap too. The fields of the parsed task live as long as the host.
    text.fill(0);
    value.map_err(io::Error::from)
}

/// Returns the text of a private configuration file: larger buffers than the defaults, as VMware recommends for NFC.
pub(super) fn private_config(dir: &Path) -> Vec<u8> {
    let mut text = b"tmpDirectory=\"".to_vec();
    text.extend(dir.as_os_str().as_bytes());
    // 16 × 64 KiB is 1 MiB for each buffer, and 4 of them stay far below the 48 MB that a host has for all clients.
    text.extend(b"\"\nvixDiskLib.nfcAio.Session.BufSizeIn64KB=16\nvixDiskLib.nfcAio.Session.BufCount=4\n");
    text
}
