//! What the user asked for, typed and checked. It knows nothing of how it was said (no clap, no files).

use std::ffi::OsString;
use std::path::PathBuf;

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
        let SourceConfig::Local(local) = &mut disk.source;
        local.create = None;
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
        Self { mode: KernelView::Auto, size: 256 << 20, dir: None }
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
