//! Configuration of one run, typed and validated.
//!
//! [`Config`] is the result of parsing. It does not depend on the syntax that it was written in: command line, mount
//! helper and configuration file all produce the same types. Paths are absolute, and a value that the user left out is
//! `None`, so that the code that uses the value chooses the default.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::store::OpenPolicy;
pub use crate::vmdk::Degraded;

mod https;
mod vddk;

pub use https::{HttpsAddress, HttpsConfig, HttpsServer, NamedBy, Secret, Thumbprint, Trust};
pub use vddk::{VddkCompression, VddkConfig, VddkLibrary, VddkOwner, VddkRemote};

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
        let number = |disk: &DiskConfig| disk.source.socket_fd().and_then(|number| u32::try_from(number).ok());
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

/// Disk of a mount or of another action.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskConfig {
    /// Its file name in the mount. In a mount: 1 to 255 bytes, not `.` or `..`, no `/` and no NUL; need not be UTF-8.
    pub name: OsString,
    /// True if the disk must not be written to.
    pub read_only: bool,
    /// Mode of the kernel's page cache. `None`: chosen by the type of source.
    pub cache: Option<PageCache>,
    /// Memory limit of the block cache of this disk, in bytes. `None`: chosen by the type of source.
    pub cache_size: Option<u64>,
    /// Upper bound of the daemon's read-ahead, in bytes. `None`: chosen by the type of source.
    pub readahead: Option<u64>,
    /// Overlay that takes the writes. The source is then opened read-only.
    pub overlay: Option<Overlay>,
    /// Maximum number of ranges that `--map` lists; 0: no limit. `None`: the default.
    pub map_limit: Option<u64>,
    /// Source of the disk's sectors.
    pub source: SourceConfig,
    /// Warnings about its settings, to report when it is mounted.
    pub warnings: Vec<&'static str>,
}

impl DiskConfig {
    /// Creates the configuration of a disk with all settings at their defaults.
    pub fn new(name: impl Into<OsString>, source: SourceConfig) -> Self {
        Self {
            name: name.into(),
            read_only: false,
            cache: None,
            cache_size: None,
            readahead: None,
            overlay: None,
            map_limit: None,
            source,
            warnings: Vec::new(),
        }
    }

    /// Returns the configuration for a disk that has been created: a copy without [`LocalConfig::create`], so that
    /// opening it again does not create it again.
    #[must_use]
    pub fn made(&self) -> Self {
        let mut disk = self.clone();
        match &mut disk.source {
            SourceConfig::Local(local) => local.create = None,
            SourceConfig::Vddk(vddk) => vddk.create = None,
            SourceConfig::Nbd(_) | SourceConfig::Https(_) => {}
        }
        disk
    }
}

/// Delta in a local file, over a source that is only read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Overlay {
    /// The file at this absolute path, which is created if it does not exist.
    File(PathBuf),
    /// A file without a name, which is deleted when the mount ends.
    Temporary,
}

/// Mode of the kernel's page cache for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageCache {
    /// No pages are cached: every read and write reaches the daemon.
    None,
    /// Pages are cached for reads. Writes reach the daemon immediately.
    WriteThrough,
}

/// Source of a disk.
#[derive(Debug, Clone, PartialEq)]
pub enum SourceConfig {
    /// Files on this machine: a VMDK, which the native engine reads, or a raw image.
    Local(LocalConfig),
    /// An export of an NBD server.
    Nbd(NbdConfig),
    /// Files on a web server, which are only read.
    Https(Box<HttpsConfig>),
    /// A disk that VMware's VDDK opens.
    Vddk(Box<VddkConfig>),
}

/// Distance of a disk's data from the daemon, from near to far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// In files that the daemon reads itself.
    Here,
    /// Served by another process on this machine.
    OtherProcess,
    /// Possibly served by another machine.
    OtherMachine,
}

impl SourceConfig {
    /// Returns the configuration of a local disk, or `None` for other sources.
    pub fn local(&self) -> Option<&LocalConfig> {
        match self {
            Self::Local(local) => Some(local),
            Self::Nbd(_) | Self::Https(_) | Self::Vddk(_) => None,
        }
    }

    /// Returns the number of the connected socket that the caller passed, if the source is that of an NBD server.
    pub fn socket_fd(&self) -> Option<i32> {
        match self {
            Self::Nbd(NbdConfig {
                address: NbdAddress::Fd(number),
                ..
            }) => Some(*number),
            _ => None,
        }
    }

    /// Returns true if a search found the file of the disk, which the user did not name.
    pub fn was_found(&self) -> bool {
        match self {
            Self::Local(local) => local.found_in.is_some(),
            Self::Https(https) => https.named == NamedBy::Search,
            Self::Nbd(_) | Self::Vddk(_) => false,
        }
    }

    /// Returns true if the user accepts that a part of the disk cannot be read.
    pub fn accepts_loss(&self) -> bool {
        let degraded = match self {
            Self::Local(local) => local.degraded,
            Self::Https(https) => https.degraded,
            Self::Nbd(_) | Self::Vddk(_) => return false,
        };
        degraded.orphan || degraded.short
    }

    /// Returns the distance of the source's data from the daemon.
    pub fn distance(&self) -> Distance {
        match self {
            Self::Local(_) => Distance::Here,
            Self::Https(_) => Distance::OtherMachine,
            Self::Nbd(nbd) if nbd.is_far() => Distance::OtherMachine,
            Self::Vddk(vddk) if vddk.remote.is_some() => Distance::OtherMachine,
            Self::Nbd(_) | Self::Vddk(_) => Distance::OtherProcess,
        }
    }

    /// Returns true if an overlay is accepted although the source is another one than it was created over.
    pub fn accepts_cid_mismatch(&self) -> bool {
        match self {
            Self::Local(local) => local.degraded.cid,
            Self::Nbd(nbd) => nbd.accept_cid_mismatch,
            Self::Https(https) => https.degraded.cid,
            Self::Vddk(vddk) => vddk.accept_cid_mismatch,
        }
    }

    /// Returns a name of the source for messages: the path, or server and export.
    pub fn label(&self) -> String {
        match self {
            Self::Local(local) => local.label(),
            Self::Nbd(nbd) => nbd.label(),
            Self::Https(https) => https.label(),
            Self::Vddk(vddk) => vddk.label(),
        }
    }
}

/// Export of an NBD server.
#[derive(Debug, Clone, PartialEq)]
pub struct NbdConfig {
    /// Address of the server.
    pub address: NbdAddress,
    /// Name of the export. `None`: the name in the URI, or else the export with the empty name.
    pub export: Option<OsString>,
    /// True if every export of the server becomes a disk.
    pub dynamic: bool,
    /// Largest number of connections if the server supports several. `None`: the default number.
    pub connections: Option<usize>,
    /// Encryption of the connections.
    pub tls: NbdTls,
    /// Folder of the certificates, also that of a URI. `None`: libnbd's own folder if it exists, or else the CAs of the
    /// system.
    pub tls_certificates: Option<PathBuf>,
    /// True if the server's certificate is verified, which is also the default.
    pub tls_verify: Option<bool>,
    /// User name of a pre-shared key.
    pub tls_username: Option<String>,
    /// File of pre-shared keys.
    pub tls_psk: Option<PathBuf>,
    /// Time after which a request fails. `None`: the default time.
    pub timeout: Option<Duration>,
    /// True if an overlay over the export is accepted although the export is in another state than it was.
    pub accept_cid_mismatch: bool,
    /// Number of retries of a failed connection attempt. `None`: no retry at the start; afterwards reconnects until the
    /// requests that wait have timed out.
    pub retry: Option<u32>,
}

impl NbdConfig {
    /// Creates the configuration of an export with all settings at their defaults.
    pub fn new(address: NbdAddress) -> Self {
        Self {
            address,
            export: None,
            dynamic: false,
            connections: None,
            tls: NbdTls::Off,
            tls_certificates: None,
            tls_verify: None,
            tls_username: None,
            tls_psk: None,
            timeout: None,
            accept_cid_mismatch: false,
            retry: None,
        }
    }

    /// Returns true if the server may be on another machine.
    pub fn is_far(&self) -> bool {
        match &self.address {
            NbdAddress::Tcp { .. } => true,
            // Only these transports are known to be local: `nbd+ssh`, for example, would not be.
            NbdAddress::Uri(_) => !matches!(self.transport(), Some("unix" | "vsock")),
            _ => false,
        }
    }

    /// Returns true if the address holds the host name of the server.
    pub fn names_host(&self) -> bool {
        match &self.address {
            NbdAddress::Tcp { .. } => true,
            NbdAddress::Uri(_) => self.transport().is_none(),
            _ => false,
        }
    }

    /// Returns the transport that the scheme of a URI names after a `+`. `None`: TCP, or the address is not a URI.
    fn transport(&self) -> Option<&str> {
        let NbdAddress::Uri(uri) = &self.address else {
            return None;
        };
        let scheme = uri.split(':').next().unwrap_or_default();
        scheme.split_once('+').map(|(_, transport)| transport)
    }

    /// Returns the whole address of the export: what an overlay over it stores. No secrets: the words of a command, one
    /// of which may be a password, are hashed.
    pub fn identity(&self) -> String {
        match &self.address {
            // The number differs with each mount.
            NbdAddress::Fd(_) => self.label_at("NBD server on a passed socket".to_owned()),
            NbdAddress::Command(words) => {
                let mut all = ring::digest::Context::new(&ring::digest::SHA256);
                for word in words {
                    all.update(&(word.len() as u64).to_le_bytes());
                    all.update(word.as_encoded_bytes());
                }
                let sum: String = all
                    .finish()
                    .as_ref()
                    .iter()
                    .take(8)
                    .map(|b| format!("{b:02x}"))
                    .collect();
                let program = self.address_label();
                self.label_at(format!(
                    "{program} with {} arguments ({sum})",
                    words.len().saturating_sub(1)
                ))
            }
            _ => self.label(),
        }
    }

    /// Returns the server and export for messages, without the password of a URI.
    pub fn label(&self) -> String {
        self.label_at(self.address_label())
    }

    /// Returns the server for messages, without the password of a URI.
    fn address_label(&self) -> String {
        match &self.address {
            NbdAddress::Uri(uri) => without_secrets(uri),
            NbdAddress::Tcp { host, port: None } => format!("NBD server {host}"),
            NbdAddress::Tcp { host, port: Some(port) } => format!("NBD server {host}:{port}"),
            NbdAddress::Unix(path) => format!("NBD server {}", path.display()),
            NbdAddress::Fd(number) => format!("NBD server on descriptor {number}"),
            NbdAddress::Vsock { cid, port: None } => format!("NBD server vsock:{cid}"),
            NbdAddress::Vsock { cid, port: Some(port) } => format!("NBD server vsock:{cid}:{port}"),
            NbdAddress::Own(name) => name.clone(),
            NbdAddress::Command(arguments) => {
                format!(
                    "NBD server {}",
                    arguments
                        .first()
                        .map(|program| program.display().to_string())
                        .unwrap_or_default()
                )
            }
        }
    }

    /// Returns `address` and the export.
    fn label_at(&self, address: String) -> String {
        match &self.export {
            Some(name) if !name.is_empty() => {
                format!("{address}, export {}", name.display().to_string().escape_debug())
            }
            _ => address,
        }
    }
}

/// Removes the password from the user information of a URI.
fn without_secrets(uri: &str) -> String {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return uri.to_owned();
    };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    match authority.rsplit_once('@') {
        Some((user, host)) => {
            let name = user.split(':').next().unwrap_or_default();
            format!("{scheme}://{name}@{host}{path}")
        }
        None => uri.to_owned(),
    }
}

/// Address of an NBD server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddress {
    /// An NBD URI, which also selects the transport and may name the export.
    Uri(String),
    /// A server that listens on TCP.
    Tcp {
        /// Host name or IP address.
        host: String,
        /// Port number or service name. `None`: the default port of NBD.
        port: Option<String>,
    },
    /// The absolute path of a Unix socket.
    Unix(PathBuf),
    /// The descriptor of a connected socket that the caller passed to this process.
    Fd(i32),
    /// An AF_VSOCK socket, between a virtual machine and its host.
    Vsock {
        /// Context ID of the machine.
        cid: u32,
        /// Port number. `None`: the default port of NBD.
        port: Option<u32>,
    },
    /// A program and its arguments, which the daemon starts as a captive server. It receives its socket by systemd
    /// socket activation.
    Command(Vec<OsString>),
    /// A process of this program that serves one disk. The text is the disk's name for messages.
    Own(String),
}

/// Encryption of NBD connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NbdTls {
    /// Never encrypted.
    #[default]
    Off,
    /// Encrypted if the server offers TLS.
    On,
    /// Always encrypted: a server without TLS is an error.
    Require,
}

/// Disk in local files.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalConfig {
    /// Absolute path of the image. It need not be UTF-8.
    pub path: PathBuf,
    /// Disk of the package at that path, as the package names it.
    pub member: Option<String>,
    /// Folder that the user named, if the image was found by a search below it.
    pub found_in: Option<PathBuf>,
    /// Format of the image.
    pub format: Format,
    /// Folders that names inside an image may lead to, besides the image's own.
    pub allow_dirs: Vec<PathBuf>,
    /// Defects of the chain that are accepted.
    pub degraded: Degraded,
    /// Parent of the oldest link that is found, as an absolute path.
    pub parent: Option<PathBuf>,
    /// Refuse an image that names other files, extents or a parent.
    pub single_file: bool,
    /// Lock the files of the image: a read-only disk excludes writers, a writable disk excludes all other programs.
    pub lock: bool,
    /// Write to the image although a snapshot is based on it.
    pub force: bool,
    /// Create the image before it is opened.
    pub create: Option<CreateConfig>,
    /// Kernel view: lets the kernel read the files without the daemon.
    pub view: ViewConfig,
}

impl LocalConfig {
    /// Creates the configuration of the disk in the file at `path`, with all settings at their defaults.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            member: None,
            found_in: None,
            format: Format::Auto,
            allow_dirs: Vec::new(),
            degraded: Degraded::default(),
            parent: None,
            single_file: false,
            lock: true,
            force: false,
            create: None,
            view: ViewConfig::default(),
        }
    }

    /// Returns the path for messages, with the disk in a package.
    pub fn label(&self) -> String {
        let path = self.path.display();
        match &self.member {
            Some(member) => format!("{path}({})", member.escape_debug()),
            None => path.to_string(),
        }
    }

    /// Returns true if the path is that of a package (OVA), by its name or because a disk of it is named.
    pub fn is_package(&self) -> bool {
        self.member.is_some() || (self.format == Format::Auto && Format::is_package(&self.path))
    }

    /// Returns the rules for one open of the disk.
    pub fn open_policy(&self) -> Arc<OpenPolicy> {
        Arc::new(OpenPolicy::new(self.allow_dirs.clone(), self.lock).single_file(self.single_file))
    }
}

/// Settings of the kernel view of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewConfig {
    /// Use of the kernel view.
    pub mode: KernelView,
    /// Size limit of the index, in bytes. A disk that is not one flat file needs an index.
    pub size: u64,
    /// Folder of the index. `None`: the index is kept in memory.
    pub dir: Option<PathBuf>,
}

impl Default for ViewConfig {
    fn default() -> Self {
        Self {
            mode: KernelView::Auto,
            size: 256 << 20,
            dir: None,
        }
    }
}

/// Use of the kernel view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelView {
    /// Used if the kernel and the image allow it.
    #[default]
    Auto,
    /// Never used.
    Off,
    /// Always used: the mount fails if it is not possible.
    Required,
}

/// Properties of a VMDK to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateConfig {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Layout of the VMDK's files.
    pub kind: CreateType,
    /// Adapter in the descriptor.
    pub adapter: AdapterType,
    /// Virtual hardware version in the descriptor.
    pub hardware_version: u32,
}

/// VMDK layouts that can be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CreateType {
    /// One sparse file with the descriptor inside.
    #[default]
    MonolithicSparse,
    /// A descriptor and one flat file.
    MonolithicFlat,
    /// A descriptor and sparse files of 2 GB at most.
    SplitSparse,
    /// A descriptor and flat files of 2 GB at most.
    SplitFlat,
    /// As on ESXi: a descriptor and one flat file, fully allocated.
    VmfsFlat,
    /// As on ESXi: a descriptor and one flat file that is sparse (thin provisioned).
    VmfsThin,
    /// One file of compressed grains, written once from start to end. A mount of it never delays writes.
    StreamOptimized,
}

/// Virtual disk adapters, as `ddb.adapterType` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdapterType {
    /// `ide`
    Ide,
    /// `buslogic`
    BusLogic,
    /// `lsilogic`
    #[default]
    LsiLogic,
    /// `legacyESX`
    LegacyEsx,
    /// `pvscsi`
    PvScsi,
}

/// The format of a local file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Decided by the suffix of the file name. A file whose content contradicts its suffix is refused.
    #[default]
    Auto,
    /// A VMDK. Another format is an error.
    Vmdk,
    /// A raw image.
    Raw,
}

impl Format {
    /// Returns true if the name of a file promises a package of disks.
    pub fn is_package(path: &Path) -> bool {
        path.extension()
            .is_some_and(|suffix| suffix.eq_ignore_ascii_case("ova"))
    }
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
