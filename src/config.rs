//! What the user asked for, typed and checked. It knows nothing of how it was said (no clap, no files).

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Everything about one run of the program.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// What to do.
    pub action: Action,
    /// Where messages go.
    pub log: LogConfig,
}

/// What one run does.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Mount disks and serve them.
    Mount(MountConfig),
    /// Say what a source is.
    Info(Query),
    /// Say what a server offers.
    List(Query),
    /// Say where data, holes and zeroes lie.
    Map(Query),
    /// Verify tables and chain.
    Check(Query),
    /// Make VMDKs: each disk has a [`CreateConfig`].
    Create(Vec<DiskConfig>),
    /// Merge the overlay of a disk into its base: the disk has an [`Overlay::File`].
    Commit(DiskConfig),
    /// Print versions and back ends.
    Dump {
        /// As JSON instead of `key=value` lines.
        json: bool,
    },
}

impl Action {
    /// The disks that it is about.
    pub fn disks(&self) -> &[DiskConfig] {
        match self {
            Self::Mount(mount) => &mount.disks,
            Self::Info(query) | Self::List(query) | Self::Map(query) | Self::Check(query) => &query.disks,
            Self::Create(disks) => disks,
            Self::Commit(disk) => std::slice::from_ref(disk),
            Self::Dump { .. } => &[],
        }
    }

    /// The descriptors that were handed over, as sockets of NBD servers: they are not to be closed at the start.
    pub fn handed_over(&self) -> Vec<u32> {
        let number = |disk: &DiskConfig| match &disk.source {
            SourceConfig::Nbd(NbdConfig {
                address: NbdAddress::Fd(number),
                ..
            }) => u32::try_from(*number).ok(),
            _ => None,
        };
        self.disks().iter().filter_map(number).collect()
    }
}

/// The disks of an action that only looks.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    /// At least one.
    pub disks: Vec<DiskConfig>,
    /// As JSON instead of text.
    pub json: bool,
}

/// A mount and its life.
#[derive(Debug, Clone, PartialEq)]
pub struct MountConfig {
    /// Where the mount goes.
    pub target: MountTarget,
    /// At least one; their file names differ. Exactly one where [`target`](Self::target) is a file.
    pub disks: Vec<DiskConfig>,
    /// Stay in the foreground.
    pub foreground: bool,
    /// Where to write the process id of the daemon, made absolute.
    pub pidfile: Option<PathBuf>,
    /// FUSE mount options.
    pub options: MountOptions,
    /// Event loops; `None`: by the number of processors.
    pub threads: Option<usize>,
}

/// What a mount is put on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountTarget {
    /// The directory or file itself, made absolute; symbolic links in it are not resolved.
    pub path: PathBuf,
    /// What shall be seen there.
    pub kind: MountKind,
}

/// What is seen at the place of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    /// A directory that holds one file a disk. Also where a stale mount hides what there is.
    Dir,
    /// The one disk itself: the mount covers a regular file.
    File,
}

/// The mount options that mean something here; those that mount(8) handles itself are dropped before.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MountOptions {
    /// The whole mount read-only (`-r`, `-o ro`).
    pub read_only: bool,
    /// Every user may look in.
    pub allow_other: bool,
    /// The owner and root may look in.
    pub allow_root: bool,
    /// The kernel checks owner and mode.
    pub default_permissions: bool,
    /// Unmount when this process ends, however it ends.
    pub auto_unmount: bool,
    /// Owner of the files; `None`: who mounts.
    pub uid: Option<u32>,
    /// Group of the files; `None`: who mounts.
    pub gid: Option<u32>,
    /// Permission bits that the files don't have.
    pub umask: Option<u32>,
    /// What mount tables show as the source; `None`: the first disk.
    pub fsname: Option<String>,
}

/// One disk of a mount.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskConfig {
    /// Its file name in the mount. In a mount: 1 to 255 bytes, not `.` or `..`, no `/` and no NUL; need not be UTF-8.
    pub name: OsString,
    /// Nothing may be written to it.
    pub read_only: bool,
    /// How the kernel may keep its pages; `None`: what fits its kind.
    pub cache: Option<PageCache>,
    /// RAM for blocks of this disk, bytes; `None`: what fits its kind.
    pub cache_size: Option<u64>,
    /// Upper bound of our read-ahead, bytes; `None`: what fits its kind.
    pub readahead: Option<u64>,
    /// Where writes go instead of the source, which is opened read-only then.
    pub overlay: Option<Overlay>,
    /// Where it comes from.
    pub source: SourceConfig,
}

impl DiskConfig {
    /// A disk with every setting at its default.
    pub fn new(name: impl Into<OsString>, source: SourceConfig) -> Self {
        Self {
            name: name.into(),
            read_only: false,
            cache: None,
            cache_size: None,
            readahead: None,
            overlay: None,
            source,
        }
    }

    /// The same disk once it was made: it is not made again when it is opened anew.
    #[must_use]
    pub fn made(&self) -> Self {
        let mut disk = self.clone();
        if let SourceConfig::Local(local) = &mut disk.source {
            local.create = None;
        }
        disk
    }
}

/// A local delta over a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Overlay {
    /// This file, made absolute; it is made where there is none.
    File(PathBuf),
    /// A file without a name that ends with the mount.
    Temporary,
}

/// What the kernel's page cache does with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageCache {
    /// Every read and write reaches us.
    None,
    /// Pages are kept; writes go through at once.
    WriteThrough,
    /// Pages are kept; writes reach us later, gathered, and at the latest with fsync or the last close.
    WriteBack,
}

/// Where a disk comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum SourceConfig {
    /// Files on this machine, read by the built-in engine.
    Local(LocalConfig),
    /// An export of an NBD server.
    Nbd(NbdConfig),
}

/// How far away the bytes of a disk are; the farther, the greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// In files that we read.
    Here,
    /// With another process of this machine.
    OtherProcess,
    /// Maybe with another machine.
    OtherMachine,
}

impl SourceConfig {
    /// The local files, where it is made of such.
    pub fn local(&self) -> Option<&LocalConfig> {
        match self {
            Self::Local(local) => Some(local),
            Self::Nbd(_) => None,
        }
    }

    /// How far away its bytes are.
    pub fn distance(&self) -> Distance {
        match self {
            Self::Local(_) => Distance::Here,
            Self::Nbd(nbd) if nbd.is_far() => Distance::OtherMachine,
            Self::Nbd(_) => Distance::OtherProcess,
        }
    }

    /// What was named, for messages.
    pub fn label(&self) -> String {
        match self {
            Self::Local(local) => local.path.display().to_string(),
            Self::Nbd(nbd) => nbd.label(),
        }
    }
}

/// An export of an NBD server.
#[derive(Debug, Clone, PartialEq)]
pub struct NbdConfig {
    /// Where the server is.
    pub address: NbdAddress,
    /// The export's name; `None`: what a URI says, else the one without a name.
    pub export: Option<OsString>,
    /// Every export of the server is a disk.
    pub dynamic: bool,
    /// Connections at most, where the server takes several; `None`: the usual number.
    pub connections: Option<usize>,
    /// Whether to encrypt.
    pub tls: NbdTls,
    /// The folder of certificates; `None`: where the TLS library looks.
    pub tls_certificates: Option<PathBuf>,
    /// Whether the server's certificate is verified; `None`: it is.
    pub tls_verify: Option<bool>,
    /// The user of a pre-shared key.
    pub tls_username: Option<String>,
    /// The file of pre-shared keys.
    pub tls_psk: Option<PathBuf>,
    /// After which a request fails; `None`: the usual time.
    pub timeout: Option<Duration>,
    /// How often it is tried again to connect; `None`: not at the start, and later until a request's time is over.
    pub retry: Option<u32>,
}

impl NbdConfig {
    /// The export at an address, with every setting at its default.
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
            retry: None,
        }
    }

    /// Whether the server may be on another machine.
    pub fn is_far(&self) -> bool {
        match &self.address {
            NbdAddress::Tcp { .. } => true,
            NbdAddress::Uri(uri) => uri.split(':').next().is_some_and(|scheme| !scheme.contains('+')),
            _ => false,
        }
    }

    /// The server and export, for messages. What may be a secret in a URI is left out.
    pub fn label(&self) -> String {
        let address = match &self.address {
            NbdAddress::Uri(uri) => without_secrets(uri),
            NbdAddress::Tcp { host, port: None } => format!("NBD server {host}"),
            NbdAddress::Tcp { host, port: Some(port) } => format!("NBD server {host}:{port}"),
            NbdAddress::Unix(path) => format!("NBD server {}", path.display()),
            NbdAddress::Fd(number) => format!("NBD server on descriptor {number}"),
            NbdAddress::Vsock { cid, port: None } => format!("NBD server vsock:{cid}"),
            NbdAddress::Vsock { cid, port: Some(port) } => format!("NBD server vsock:{cid}:{port}"),
            NbdAddress::Command(words) => {
                format!(
                    "NBD server {}",
                    words.first().map(|w| w.display().to_string()).unwrap_or_default()
                )
            }
        };
        match &self.export {
            Some(name) if !name.is_empty() => {
                format!("{address}, export {}", name.display().to_string().escape_debug())
            }
            _ => address,
        }
    }
}

/// A URI without a password before its host.
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

/// Where an NBD server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddress {
    /// What a URI says.
    Uri(String),
    /// TCP.
    Tcp {
        /// Name or number.
        host: String,
        /// Number or name of a service; `None`: the usual one.
        port: Option<String>,
    },
    /// A Unix socket, made absolute.
    Unix(PathBuf),
    /// A connected socket that was handed over.
    Fd(i32),
    /// A virtual machine's socket.
    Vsock {
        /// The machine.
        cid: u32,
        /// `None`: the usual one.
        port: Option<u32>,
    },
    /// A program that we run, with its arguments, and that is told its socket by socket activation.
    Command(Vec<OsString>),
}

/// Whether a connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NbdTls {
    /// Never.
    #[default]
    Off,
    /// Where the server offers it.
    On,
    /// Always.
    Require,
}

/// A disk in local files.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalConfig {
    /// The file that was named, made absolute; need not be UTF-8.
    pub path: PathBuf,
    /// How to read it.
    pub format: Format,
    /// Folders that names inside an image may point into, besides the image's own.
    pub allow_dirs: Vec<PathBuf>,
    /// Accept a parent whose CID differs from the one its child remembers.
    pub accept_cid_mismatch: bool,
    /// Lock its files: against writers, or against everybody where it is written to.
    pub lock: bool,
    /// Write to it although a snapshot is based on it.
    pub force: bool,
    /// Make it first.
    pub create: Option<CreateConfig>,
    /// Whether the kernel reads its files by itself.
    pub view: ViewConfig,
}

impl LocalConfig {
    /// The disk in the file at `path`, with every setting at its default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: Format::Auto,
            allow_dirs: Vec::new(),
            accept_cid_mismatch: false,
            lock: true,
            force: false,
            create: None,
            view: ViewConfig::default(),
        }
    }
}

/// How the kernel may read a disk by itself, without a request to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewConfig {
    /// Whether it may.
    pub mode: KernelView,
    /// The most bytes of memory for the index that it needs where the disk is not one flat file.
    pub size: u64,
    /// Where that index goes; `None`: into memory.
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

/// Whether the kernel reads a disk by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelView {
    /// Where it can.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always; a mount that can't is an error.
    Required,
}

/// A VMDK that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateConfig {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// What files it is made of.
    pub kind: CreateType,
    /// The adapter that its descriptor names.
    pub adapter: AdapterType,
    /// The virtual hardware version that its descriptor names.
    pub hardware_version: u32,
}

/// The kinds of VMDKs that can be made.
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
    /// As on ESXi: a descriptor and one flat file with all its room.
    VmfsFlat,
    /// The same without room that was not written to.
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
    /// By its content; a raw file only where its name does not end in `.vmdk`.
    #[default]
    Auto,
    /// A VMDK, or an error.
    Vmdk,
    /// A plain image.
    Raw,
}

/// Where messages go and how many.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LogConfig {
    /// 0 warnings, 1 information, 2 debug, 3 trace.
    pub verbosity: u8,
    /// Append to this file instead of standard error, made absolute.
    pub file: Option<PathBuf>,
    /// One JSON object a line.
    pub json: bool,
}
