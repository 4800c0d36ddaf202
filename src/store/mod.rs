//! Where the bytes of an image's files live: a folder of this machine, later a datastore over HTTPS.
//!
//! ```text
//!   descriptor line   "disk-s001.vmdk"          a name that somebody else wrote
//!        │ ExtentName: the gate's first half (shape)
//!        ▼
//!   Store::open       the gate's second half (where it leads), then the file
//!        ▼
//!   StoredFile        length, identity, exact reads
//! ```
//! The engine in `vmdk/` knows no paths and opens nothing else.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

mod atomic_create;
#[cfg(test)]
pub(crate) mod fault_injection;
mod local;
mod name;
mod ofd_lock;
mod vmware_lock_file;
mod write_latch;

pub use atomic_create::{make_user_path, unnamed};
pub use local::{LocalStore, open_user_path};
pub(crate) use name::printable;
pub use name::{ExtentName, NAME_MAX};
pub(crate) use write_latch::WriteLatch;

/// What the files of an image may be, and what is done with each when it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenPolicy {
    /// Folders that names inside an image may lead into, besides the image's own.
    pub allow: Vec<PathBuf>,
    /// Locks each file against writers, and refuses one that has a writer.
    pub lock: bool,
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only. Others may read it too, nobody may write to it.
    Read,
    /// Reading and writing, alone.
    Write,
}

/// A place that holds the files of an image.
pub trait Store: fmt::Debug + Send + Sync {
    /// Opens a file that an image names, if the policy of the store lets it.
    ///
    /// Errors: `Policy` where the name leads out of what is allowed or to something that is no plain file,
    /// `NotFound`, `Busy` if somebody uses the file in a way that does not go with `access`, `ReadOnly` where it can't
    /// be written (its permissions, a read-only file system), or what the system says. Never blocks on a FIFO or a device.
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>>;

    /// Makes a new, empty file for writing, whose name must be a plain one of the folder itself.
    ///
    /// Errors: `Os(EEXIST)` where there is one, `Policy`, or what the system says.
    fn create(&self, name: &ExtentName) -> Result<Arc<dyn StoredFile>>;

    /// Takes a file out of the folder itself, if what has the name is the very file of `identity`: it undoes
    /// [`create`](Self::create). Who has it open keeps it.
    ///
    /// Errors: `NotFound` where that file has the name no more, `Policy`, or what the system says.
    fn remove(&self, name: &ExtentName, identity: &Identity) -> Result<()>;

    /// Makes the names durable: of files that were made, and that removed ones are gone.
    fn sync(&self) -> Result<()>;

    /// Names of the files in the folder itself, in no order, at most `most`.
    fn names(&self, most: usize) -> Result<Vec<ExtentName>>;
}

/// What tells one file from another, and one state of it from a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device and inode, or what stands for them.
    pub file: (u64, u64),
    /// Length in bytes.
    pub len: u64,
    /// Last change of the content, nanoseconds since 1970.
    pub mtime_ns: i128,
    /// Last change of anything, as the system keeps it by itself: a rename over the file or a restored mtime show here.
    pub ctime_ns: i128,
}

/// An open file of a store.
pub trait StoredFile: fmt::Debug + Send + Sync {
    /// Its length in bytes when it was opened.
    fn len(&self) -> u64;

    /// Whether it had no byte when it was opened.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its writing half; `None`: it was opened for reading.
    fn writer(&self) -> Option<&dyn StoredWrite> {
        None
    }

    /// Fills `buf` from byte `offset`; a file that ends before is an error.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Its identity now.
    fn identity(&self) -> Result<Identity>;

    /// Its identity when it was opened, before anything was read of it.
    fn identity_at_open(&self) -> Identity;

    /// Whether [`Self::identity`] shows a change of the content: it does not for a device.
    fn detects_modification(&self) -> bool;

    /// Bytes that it takes in its store now, where that is known (sparse files take less than their length).
    fn allocated(&self) -> Result<u64>;

    /// Whether the byte at `offset` is stored or in a hole of the file, and for how many bytes on that holds
    /// (at least 1, not past the end). A store that can't tell says that all is stored; so it is behind the end of a file
    /// that was cut since it was opened, where a read is an error.
    fn data_at(&self, offset: u64) -> Result<(bool, u64)>;

    /// What to call it in messages: the path.
    fn label(&self) -> &str;

    /// What it is called in its own folder, as messages show it, whatever name it was opened by.
    fn own_name(&self) -> String {
        self.label().rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// The store that holds the files beside this one, for the names inside of it.
    fn siblings(&self) -> Result<Arc<dyn Store>>;

    /// Its file descriptor, where it is a file of this machine.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A file of a store that is open for writing. What is written is seen by readers at once, and durable after
/// [`sync`](Self::sync); until then a crash keeps any part of it, in any order.
pub trait StoredWrite: StoredFile {
    /// Writes all of `buf` at byte `offset`. Where the file ended before, it grows; a gap reads as zeroes.
    ///
    /// Errors: `Os(ENOSPC)` and the like; then any part of it may have been written.
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Its length now. Cheap: it is asked for each write.
    fn current_len(&self) -> Result<u64>;

    /// Cuts it, or makes it longer with zeroes that take no room.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Makes a range within the file read as zeroes. `unmap`: and gives its room back where the store can; else the
    /// range keeps its room, so that a write to it later can't fail for want of it, where the store can.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;

    /// Makes everything written before durable, the length included. An error is final: what it was about may be lost
    /// although a later call succeeds.
    fn sync(&self) -> Result<()>;
}

/// The writing half of a file. Errors: `ReadOnly` where it has none.
pub(crate) fn writer(file: &dyn StoredFile) -> Result<&dyn StoredWrite> {
    let refusal = || {
        Error::new(
            ErrorKind::ReadOnly,
            format!("{}: the file is not opened for writing", file.label()),
        )
    };
    file.writer().ok_or_else(refusal)
}
