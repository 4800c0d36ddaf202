//! Decides how an open is served: a pure function of facts. `open.rs` and `kernel_view_node.rs` follow the plan.
//!
//! ```text
//!   disk inode ─► permitted? ─┬─ cache=none                     Direct       every request reaches the daemon
//!                             ├─ one flat file, root, 6.9+      Passthrough  the kernel reads and writes the file itself
//!                             ├─ O_DIRECT, or only for writing  Direct       no page would be read again
//!                             └─ else                           Cached       the kernel keeps pages of the daemon's answers
//!   view inode ─► fits ─► Passthrough    first rejection ─► ESTALE    else ─► Direct, or EINVAL
//! ```
//! The kernel has an inode in one mode at a time, so Passthrough and Cached exclude each other: the first open decides.
//! Direct goes with both.
//!
//! The kernel writes to a backing file without knowing where the disk ends. An open only for writing (`cp`, `dd`, the
//! `>` of a shell), which is how data beyond the end usually gets written, or for appending, is therefore Passthrough
//! with `FOPEN_DIRECT_IO`: its requests reach the daemon all the same. Any other write beyond the end is truncated by
//! the next flush, which reports it as an error.
//!
//! O_TRUNC is no fact: the kernel opens without it and sends the truncation as a request of its own.

use fuser::{Errno, FileHandle, FopenFlags, OpenAccMode, OpenFlags};

/// `Ok` if the kernel accepts a backing file for FUSE passthrough, otherwise the reason why not.
pub(super) type Passthrough = Result<(), &'static str>;

/// Everything that decides how an open is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpenRequest {
    pub(super) access: Access,
    pub(super) inode: Inode,
}

/// Access that the process asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Access {
    /// O_WRONLY or O_RDWR.
    pub(super) writes: bool,
    /// O_RDONLY or O_RDWR.
    pub(super) reads: bool,
    /// O_APPEND.
    pub(super) appends: bool,
    /// O_DIRECT.
    pub(super) direct: bool,
}

/// The inode that is opened, with its facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inode {
    /// The inode that the daemon can serve.
    Disk(DiskFacts),
    /// The inode of the kernel view.
    View(ViewFacts),
}

/// Facts of a disk inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskFacts {
    /// The disk can be written to.
    pub(super) writable: bool,
    /// `cache=none`.
    pub(super) uncached: bool,
    /// The disk accepts sequential writes only.
    pub(super) sequential: bool,
    /// The pages that the kernel has of the inode are those of the current content.
    pub(super) pages_are_current: bool,
    pub(super) backing: Backing,
    pub(super) view: ViewWish,
}

/// Backing file for passthrough opens of a disk inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backing {
    /// The kernel has it. `current`: it is the file of the current volume.
    Held { current: bool },
    /// The kernel was not asked yet if it accepts it.
    Possible,
    /// There is none.
    None,
}

/// The kernel view of a disk whose disk inode is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ViewWish {
    /// There is none and will be none.
    None,
    /// There is one, or it is being built.
    Wanted,
    /// The disk must be read by the kernel itself (`kernel-view=required`), and can have no view.
    RequiredBacking,
}

/// Facts of a view inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ViewFacts {
    /// The view describes the current content, and the kernel has its file.
    pub(super) is_ready: bool,
    /// The inode has opens with a backing file, which the kernel then requires for each further open.
    pub(super) has_backed_opens: bool,
    /// The process was rejected with ESTALE and came back without a lookup.
    pub(super) was_rejected: bool,
}

/// Mode of an open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenMode {
    /// The daemon serves it through the kernel's pages.
    Cached,
    /// The daemon serves it without pages.
    Direct,
    /// `Direct`, for a disk that may have a kernel view: while such an open exists the name does not lead to the view.
    DirectBesideView,
    /// The kernel has a backing file for it.
    Passthrough,
}

/// Decision on an open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenPlan {
    /// The open fails.
    Refuse(Errno),
    /// The kernel has to be asked for a backing file first; [`plan`] then decides with the answer.
    AcquireBacking,
    /// The open is served.
    Serve(ServePlan),
}

/// Decision on how an open is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ServePlan {
    pub(super) mode: OpenMode,
    /// Requests reach the daemon and bypass the pages of the inode.
    pub(super) direct_io: bool,
    /// The kernel may send the parts of direct writes in parallel.
    pub(super) parallel_writes: bool,
    /// The kernel keeps the pages that it has. Otherwise it drops them at this open, which is the only way to get rid of
    /// pages from before an unnoticed modification.
    pub(super) keep_pages: bool,
    /// The open may write.
    pub(super) writes: bool,
    /// The kernel may hold dirty pages of its mappings, of which it tells the daemon nothing.
    pub(super) dirties: bool,
}

impl Access {
    /// Returns the access that the flags of open(2) ask for.
    pub(super) fn of(flags: OpenFlags) -> Self {
        let mode = flags.acc_mode();
        Self {
            writes: mode != OpenAccMode::O_RDONLY,
            reads: mode != OpenAccMode::O_WRONLY,
            appends: flags.0 & libc::O_APPEND != 0,
            direct: flags.0 & libc::O_DIRECT != 0,
        }
    }

    /// Returns the errno for an access that the disk does not permit, whatever else is known of it.
    pub(super) fn refusal(self, writable: bool) -> Option<Errno> {
        (self.writes && !writable).then_some(Errno::EROFS)
    }

    /// Returns true if pages of it would be written through at once and gain nothing, and its writes may go beyond the end.
    fn is_streaming(self) -> bool {
        self.writes && (!self.reads || self.appends)
    }
}

impl ServePlan {
    /// Returns the flags of the answer.
    pub(super) fn flags(&self) -> FopenFlags {
        let mut flags = FopenFlags::empty();
        flags.set(FopenFlags::FOPEN_DIRECT_IO, self.direct_io);
        flags.set(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES, self.parallel_writes);
        flags.set(FopenFlags::FOPEN_KEEP_CACHE, self.keep_pages);
        // A read-only open leaves nothing to flush when it is closed, which saves the kernel a request.
        flags.set(FopenFlags::FOPEN_NOFLUSH, !self.writes);
        flags
    }

    /// Returns the file handle of the open.
    pub(super) fn handle(&self, number: u64) -> FileHandle {
        let mode = match self.mode {
            OpenMode::Cached => 0,
            OpenMode::Passthrough => 1,
            OpenMode::Direct => 2,
            OpenMode::DirectBesideView => 3,
        };
        let bits = mode | if self.writes { WRITES } else { 0 } | if self.dirties { DIRTIES } else { 0 };
        FileHandle(bits | number << NUMBER)
    }
}

/// Properties of an open that its file handle encodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpenHandle {
    pub(super) mode: OpenMode,
    pub(super) writes: bool,
    /// As [`ServePlan::dirties`].
    pub(super) dirties: bool,
    /// Number of an open for writing; 0 for others.
    pub(super) number: u64,
}

const WRITES: u64 = 4;
const DIRTIES: u64 = 8;
/// Bits below the number.
const NUMBER: u32 = 4;

impl From<FileHandle> for OpenHandle {
    fn from(FileHandle(bits): FileHandle) -> Self {
        let mode = match bits & 3 {
            0 => OpenMode::Cached,
            1 => OpenMode::Passthrough,
            3 => OpenMode::DirectBesideView,
            _ => OpenMode::Direct,
        };
        Self {
            mode,
            writes: bits & WRITES != 0,
            dirties: bits & DIRTIES != 0,
            number: bits >> NUMBER,
        }
    }
}

/// Decides how an open is served.
pub(super) fn plan(request: &OpenRequest) -> OpenPlan {
    match request.inode {
        Inode::Disk(facts) => plan_disk(request.access, facts),
        Inode::View(facts) => plan_view(request.access, facts),
    }
}

fn plan_disk(access: Access, facts: DiskFacts) -> OpenPlan {
    if let Some(errno) = access.refusal(facts.writable) {
        return OpenPlan::Refuse(errno);
    }
    let serve = |mode, bypasses_pages| {
        OpenPlan::Serve(ServePlan {
            mode,
            // The kernel must be given the same backing file while there are opens of it. Where that file belongs to a
            // volume that has been replaced since, the requests go to the daemon all the same.
            direct_io: bypasses_pages || facts.backing == (Backing::Held { current: false }),
            // The kernel may reorder the parts, which a disk that must be written in order does not accept.
            parallel_writes: bypasses_pages && !facts.sequential,
            keep_pages: mode == OpenMode::Cached && facts.pages_are_current,
            writes: access.writes,
            // A mapping needs an open that can read. The pages of a Passthrough open are those of the backing file.
            dirties: access.writes && access.reads && mode != OpenMode::Passthrough,
        })
    };
    if facts.uncached {
        return serve(OpenMode::Direct, true);
    }
    match (facts.backing, facts.view) {
        (Backing::Possible, _) => OpenPlan::AcquireBacking,
        (Backing::Held { .. }, _) => serve(OpenMode::Passthrough, access.is_streaming()),
        (Backing::None, ViewWish::RequiredBacking) => OpenPlan::Refuse(Errno::EIO),
        (Backing::None, ViewWish::Wanted) if access.direct => serve(OpenMode::DirectBesideView, true),
        (Backing::None, _) if access.direct || access.is_streaming() => serve(OpenMode::Direct, true),
        (Backing::None, _) => serve(OpenMode::Cached, false),
    }
}

fn plan_view(access: Access, facts: ViewFacts) -> OpenPlan {
    let serve = |mode, direct_io| {
        OpenPlan::Serve(ServePlan {
            mode,
            direct_io,
            parallel_writes: false,
            keep_pages: false,
            writes: false,
            dirties: false,
        })
    };
    match facts {
        _ if access.writes => OpenPlan::Refuse(Errno::EROFS),
        ViewFacts { is_ready: true, .. } if !access.direct => serve(OpenMode::Passthrough, false),
        // The kernel repeats the lookup of the name, which then returns the disk inode.
        ViewFacts {
            was_rejected: false, ..
        } => OpenPlan::Refuse(Errno::ESTALE),
        // O_DIRECT is not possible beside opens with a backing file.
        ViewFacts {
            has_backed_opens: true, ..
        } if access.direct => OpenPlan::Refuse(Errno::EINVAL),
        ViewFacts {
            has_backed_opens: true, ..
        } => serve(OpenMode::Passthrough, true),
        _ => serve(OpenMode::Direct, true),
    }
}

#[cfg(test)]
mod tests;
