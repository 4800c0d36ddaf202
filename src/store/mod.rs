//! Stores: the places that hold the files of an image: a local folder ([`LocalStore`]), a folder on a web server
//! ([`https`]), or a package in one of them (`package.rs`).
//!
//! ```text
//!   descriptor line   "disk-s001.vmdk"          an untrusted name
//!        │ ExtentName: checks the syntax of the name
//!        ▼
//!   Store::open       checks where the name leads, then opens the file and locks it
//!        ▼
//!   StoredFile        length, identity, exact reads; StoredWrite: writes, holes, sync
//! ```
//! The engine in `vmdk/` knows no paths and opens files only through a store, so no name from an image can reach a file
//! without both checks.
//!
//! Reads and writes take an offset and `&self`: several threads use one file at the same time without a lock. A stored
//! file keeps its image lock until its last reference is dropped.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::cache::disk_tier::TierFile;
use crate::error::{Error, ErrorKind, Result};

mod archive;
mod atomic_create;
#[cfg(test)]
pub(crate) mod fault_injection;
pub mod https;
mod local;
mod lock_holder;
mod member;
mod name;
mod ofd_lock;
mod open_policy;
mod owner;
pub(crate) mod package;
mod permissions;
mod room;
mod vmware_lock_file;

pub(crate) use crate::escape::printable;
pub use atomic_create::{make_user_path, unnamed};
pub use local::{LocalStore, open_found_path, open_user_path};
pub(crate) use local::{proc_path, real_path};
pub(crate) use name::shell_word;
pub use name::{ExtentName, NAME_MAX};
pub use open_policy::OpenPolicy;
pub(crate) use permissions::Permissions;
pub(crate) use room::AllocationUnit;
pub use room::RoomNeeded;

/// Access for which a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only. The lock excludes writers and allows other readers.
    Read,
    /// Reading and writing. The lock excludes all other programs.
    Write,
    /// Reading a file that is no part of the image, without a lock.
    Peek,
}

/// A place that holds the files of an image.
pub trait Store: fmt::Debug + Send + Sync {
    /// Opens a file that an image names, if the policy of the store allows it. Never blocks on a FIFO or a device.
    ///
    /// A file that the image has named before is shared, also if it has another name.
    ///
    /// Errors: `Policy` if the name leads out of the allowed folders or to something other than a regular file,
    /// `NotFound`, `Busy` if another program uses the file in a way that conflicts with `access`, `ReadOnly` if the
    /// file cannot be written to (permissions, a read-only file system), or the error of the operating system.
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>>;

    /// Creates an empty file for writing. Its name must have a single component: it lies in the folder itself.
    ///
    /// Errors: `Os(EEXIST)` if the name exists, `Policy` for any other name, or the error of the operating system.
    fn create(&self, name: &ExtentName) -> Result<Arc<dyn StoredFile>>;

    /// Removes a file from the folder itself, to undo [`create`](Self::create), if the name still belongs to the file
    /// with `identity`. Open handles of the file stay valid.
    ///
    /// Errors: `NotFound` if another file or none has the name, `Policy`, or the error of the operating system.
    fn remove(&self, name: &ExtentName, identity: &Identity) -> Result<()>;

    /// Makes the creation and removal of names in the folder durable.
    fn sync(&self) -> Result<()>;

    /// Returns the names of at most `most` files in the folder itself, in no particular order.
    fn names(&self, most: usize) -> Result<Vec<ExtentName>>;

    /// Returns the paths of the further folders that names may lead to.
    fn allowed(&self) -> Vec<ExtentName> {
        Vec::new()
    }

    /// Returns the store of a folder near this one, under the same policy.
    ///
    /// Errors: `NotFound` if there is none, or the error of the operating system.
    fn neighbour(&self, which: Neighbour) -> Result<Arc<dyn Store>> {
        let name = which.path().display();
        Err(Error::new(
            ErrorKind::NotFound,
            format!("the store has no folder {name}"),
        ))
    }
}

/// A folder in which programs keep other images of the same chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbour {
    /// The folder above: VirtualBox keeps the base of its snapshots there.
    Above,
    /// The folder `Snapshots` in this one.
    Snapshots,
}

impl Neighbour {
    /// Returns the path of the folder, relative to that of the store.
    fn path(self) -> &'static Path {
        Path::new(match self {
            Self::Above => "..",
            Self::Snapshots => "Snapshots",
        })
    }
}

/// Identity of a file and of its content: changes when the file is replaced or modified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device and inode. For a block device: `u64::MAX` and the device number.
    pub file: (u64, u64),
    /// Byte of that file at which the content starts: 0, except for a member of a package.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Time of the last change of the content, in nanoseconds since 1970.
    pub mtime_ns: i128,
    /// Time of the last change of content or attributes, in nanoseconds since 1970. The kernel sets it and programs
    /// cannot, so a content change with a restored mtime is still detected.
    pub ctime_ns: i128,
}

impl Identity {
    /// Returns what tells the file from others, whatever its content is.
    pub fn place(&self) -> ((u64, u64), u64) {
        (self.file, self.start)
    }
}

/// An open file of a store.
pub trait StoredFile: fmt::Debug + Send + Sync {
    /// Returns the length in bytes at the time of the open. [`StoredWrite::current_len`] returns the present one.
    fn len(&self) -> u64;

    /// Returns true if the file was empty when it was opened.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the write interface, or `None` if the file was opened for reading.
    fn writer(&self) -> Option<&dyn StoredWrite> {
        None
    }

    /// Fills `buf` from byte `offset`.
    ///
    /// Errors: `Corrupt` if the file ends within the range, `OutOfRange` if no file can be that long, or the error of
    /// the operating system.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Returns the present identity.
    fn identity(&self) -> Result<Identity>;

    /// Returns the identity at the time of the open, before the first read.
    fn identity_at_open(&self) -> Identity;

    /// Returns true if [`Self::identity`] changes with the content. It does not for a block device.
    fn detects_modification(&self) -> bool;

    /// Returns true for a block device.
    fn is_device(&self) -> bool {
        false
    }

    /// Returns the number of bytes allocated for the file, which is less than its length if it is sparse.
    fn allocated(&self) -> Result<u64>;

    /// Returns true if the byte at `offset` is stored, false if it is in a hole, and the number of bytes from `offset`
    /// for which this holds (at least 1, and not beyond the end of the file).
    ///
    /// A store that does not know its holes reports everything as stored. The range beyond the end of a file that was
    /// truncated after the open also counts as stored, so that its reader gets an error instead of zeroes.
    fn data_at(&self, offset: u64) -> Result<(bool, u64)>;

    /// Returns the path under which the file was opened, escaped for messages.
    fn label(&self) -> &str;

    /// Returns the name in the file's own folder, escaped for messages. Symlinks that led to the file are resolved.
    fn own_name(&self) -> String {
        self.label().rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// Returns the store of the folder that holds this file, in which the names inside the file are looked up.
    ///
    /// Errors: `NotFound` if the file was moved or deleted after the open, or the error of the operating system.
    fn siblings(&self) -> Result<Arc<dyn Store>>;

    /// Opens, for reading, the file that has this file's name now, in the folder that was held since the user named it.
    ///
    /// Errors: `Policy` if the name is a symbolic link or the file belongs to another user now, `Unsupported` for a file
    /// that the user did not name, or the error of the operating system.
    fn reopen(&self) -> Result<Arc<dyn StoredFile>> {
        Err(Error::unsupported(format!("{}: cannot be opened again", self.label())))
    }

    /// Checks that the file still has a name in its file system, if it had one when it was opened. A file without a name
    /// is gone once this process ends.
    ///
    /// Errors: `Os(ESTALE)` if another process has deleted the file, or put another one in its place.
    fn check_named(&self) -> Result<()>;

    /// Returns the file descriptor, or `None` if the file is not a local file.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns the file descriptor of a local file with the content of this file: its own, or that of its complete copy
    /// in the disk cache, which has nothing else of this file (owner, mode, attributes). May begin, and end, with any call.
    fn content_fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd()
    }

    /// Returns the blocks of the file in the disk cache (`cache-dir=`), or the reason why they are not kept there. `None`
    /// if the file has no disk cache.
    fn cached(&self) -> Option<Result<&TierFile>> {
        None
    }
}

/// An open file of a store that can be written to.
///
/// Readers see a write as soon as it returns. It is durable after [`sync`](Self::sync). A crash before that may keep
/// any part of the writes since the last sync, in any order.
pub trait StoredWrite: StoredFile {
    /// Writes all of `buf` at byte `offset`. A write beyond the end extends the file, and a gap reads as zeroes.
    ///
    /// Errors: the error of the operating system, such as `Os(ENOSPC)`. Then any part of `buf` may have been written.
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Returns the present length in bytes. Cheap, because callers need it for every write.
    fn current_len(&self) -> Result<u64>;

    /// Truncates the file to `len` bytes, or extends it with a hole. The length of a device cannot change: a smaller
    /// `len` is ignored.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Makes a range within the file read as zeroes.
    ///
    /// With `unmap`, the range becomes a hole if the store supports holes. Without it, the range is allocated if the
    /// store supports that, so that a later write to the range cannot fail for lack of space.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;

    /// Allocates a range within the file, so that a later write to it cannot fail for lack of space. The content stays.
    ///
    /// The caller excludes other writes of the range.
    fn allocate(&self, offset: u64, len: u64) -> Result<()>;

    /// Returns the reason why [`zero`](Self::zero) with `unmap` has to write zeroes; `None` if the store has a cheaper
    /// way. Changes nothing.
    fn slow_zeroing(&self) -> Option<String>;

    /// Makes all earlier writes durable, and the length with them.
    ///
    /// An error is final: the kernel may have dropped the dirty pages, so a later success does not cover them.
    fn sync(&self) -> Result<()>;
}

/// Returns the write interface of a file. Errors: `ReadOnly` if the file was opened for reading.
pub(crate) fn writer(file: &dyn StoredFile) -> Result<&dyn StoredWrite> {
    let refusal = || {
        Error::new(
            ErrorKind::ReadOnly,
            format!("{}: the file is not open for writing", file.label()),
        )
    };
    file.writer().ok_or_else(refusal)
}
