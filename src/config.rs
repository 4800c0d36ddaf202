//! Configuration of one run, typed and validated.
//!
//! [`Config`] is the result of parsing. It does not depend on the syntax that it was written in: command line, mount
//! helper and configuration file all produce the same types. Paths are absolute, and a value that the user left out is
//! `None`, so that the code that uses the value chooses the default.

use std::path::PathBuf;

pub use crate::vmdk::Degraded;

mod create;
mod disk;
mod https;
mod local;
mod nbd;
mod secret;
mod source;
mod source_settings;
mod vddk;
mod view;

pub use create::{AdapterType, CreateConfig, CreateType};
pub use disk::{DiskConfig, Overlay, PageCache};
pub use https::{HttpsAddress, HttpsConfig, HttpsServer, NamedBy, Thumbprint, Trust};
pub use local::{Format, LocalConfig};
pub use nbd::{NbdAddress, NbdConfig, NbdTls};
pub use secret::Secret;
pub use source::SourceConfig;
pub use source_settings::{Locality, SourceSettings};
pub use vddk::{VddkCompression, VddkConfig, VddkLibrary, VddkOwner, VddkRemote};
pub use view::{KernelView, ViewConfig};

/// Configuration of one run of the program.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The action to perform.
    pub action: Action,
    /// Log destination, format and level.
    pub log: LogConfig,
}

/// Action of one run.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Mount disks and serve them.
    Mount(MountConfig),
    /// Show what a source is.
    Info(Query),
    /// List the exports that a server offers.
    List(Query),
    /// Show where data, holes and zero ranges lie.
    Map(Query),
    /// Verify the tables and the chain.
    Check(Query),
    /// Complete the disk cache of disks on web servers.
    Prefetch(Query),
    /// Show what a folder of cached blocks holds, or verify it.
    CacheDir {
        /// The folder.
        dir: PathBuf,
        /// Size in bytes that `--check` makes the folder smaller than.
        limit: Option<u64>,
        /// Verify all blocks.
        check: bool,
        /// JSON output instead of text.
        json: bool,
    },
    /// Create VMDKs: each disk has a [`CreateConfig`].
    Create(Vec<DiskConfig>),
    /// Unmount, and wait until the daemons have ended.
    Unmount(UnmountConfig),
    /// Merge the overlay of a disk into its base: the disk has an [`Overlay::File`].
    Commit(DiskConfig),
    /// Show the thumbprints of a server's certificate.
    Fingerprint {
        /// Host name or IP address.
        server: String,
        /// Port.
        port: u16,
        /// JSON output instead of text.
        json: bool,
    },
    /// Print versions and available sources.
    Dump {
        /// JSON output instead of `key=value` lines.
        json: bool,
        /// VMware's library to describe too.
        library: VddkLibrary,
    },
}

impl Action {
    /// Returns the disks that the action uses.
    pub fn disks(&self) -> &[DiskConfig] {
        match self {
            Self::Mount(mount) => &mount.disks,
            Self::Info(query) | Self::List(query) | Self::Map(query) | Self::Check(query) | Self::Prefetch(query) => {
                &query.disks
            }
            Self::Create(disks) => disks,
            Self::Commit(disk) => std::slice::from_ref(disk),
            Self::Dump { .. } | Self::Unmount(_) | Self::Fingerprint { .. } | Self::CacheDir { .. } => &[],
        }
    }

    /// Returns the descriptors that the caller passed as connected sockets of NBD servers. They must stay open when
    /// inherited descriptors are closed at the start.
    pub fn handed_over(&self) -> Vec<u32> {
        let number = |disk: &DiskConfig| {
            disk.source
                .settings()
                .socket_fd()
                .and_then(|number| u32::try_from(number).ok())
        };
        self.disks().iter().filter_map(number).collect()
    }
}

/// Disks of an action that only examines them.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    /// The disks to examine, at least one.
    pub disks: Vec<DiskConfig>,
    /// JSON output instead of text.
    pub json: bool,
}

/// Mounts to unmount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnmountConfig {
    /// Mount points as absolute paths, at least one.
    pub points: Vec<PathBuf>,
    /// Detach a mount that is in use, and do not wait for its daemon.
    pub lazy: bool,
}

/// Mount and the process that serves it.
#[derive(Debug, Clone, PartialEq)]
pub struct MountConfig {
    /// Mount point.
    pub target: MountTarget,
    /// The disks, at least one, with distinct file names. Exactly one if [`target`](Self::target) is a file.
    pub disks: Vec<DiskConfig>,
    /// Stay in the foreground.
    pub foreground: bool,
    /// File that receives the process ID of the daemon, as an absolute path.
    pub pidfile: Option<PathBuf>,
    /// FUSE mount options.
    pub options: MountOptions,
    /// Number of event loops. `None`: chosen from the number of processors.
    pub threads: Option<usize>,
    /// Source that mount tables show. `None`: that of the first disk.
    pub source: Option<String>,
}

/// Mount point of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountTarget {
    /// The directory or file, as an absolute path. Symbolic links in it are not resolved.
    pub path: PathBuf,
    /// Type of file that the mount shows there.
    pub kind: MountKind,
}

/// Type of file that a mount shows at its mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    /// A directory that holds one file per disk. Also assumed if a stale mount hides the type of the mount point.
    Dir,
    /// The single disk itself: the mount covers a regular file.
    File,
}

/// Mount options with an effect on this program. Options that mount(8) handles itself are dropped by the parser.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MountOptions {
    /// The whole mount read-only (`-r`, `-o ro`).
    pub read_only: bool,
    /// All users have access to the mount.
    pub allow_other: bool,
    /// The owner of the mount and root have access to it.
    pub allow_root: bool,
    /// The kernel enforces owner and mode.
    pub default_permissions: bool,
    /// Unmount when the daemon exits for any reason, including a crash.
    pub auto_unmount: bool,
    /// Owner of the files. `None`: the user that runs the daemon.
    pub uid: Option<u32>,
    /// Group of the files. `None`: the group that runs the daemon.
    pub gid: Option<u32>,
    /// Permission bits that are removed from the mode of the files.
    pub umask: Option<u32>,
    /// The source that mount tables show. `None`: the first disk.
    pub fsname: Option<String>,
    /// A mount point that is not empty is mounted on all the same.
    pub nonempty: bool,
    /// Mount flags by their names in mount(8), in the order in which they were given.
    pub flags: Vec<&'static str>,
    /// Options for the kernel's security modules, `NAME=VALUE`.
    pub contexts: Vec<String>,
}

/// Log destination, format and level.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LogConfig {
    /// Number of `-v` options: 0 warnings, 1 information, 2 debug, 3 or more trace.
    pub verbosity: u8,
    /// Absolute path of a file to append to, instead of standard error.
    pub file: Option<PathBuf>,
    /// One JSON object per line instead of text.
    pub json: bool,
}
