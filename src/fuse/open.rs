//! Opens and their ends: gathers the facts, lets `open_plan.rs` decide, and is the one place that carries the plan out.
//!
//! ```text
//!   permitted? ─► image files modified? reopen the volume ─► the kernel may write? prepare the image
//!     ─► [lock `opens`] plan ─► ask for a backing file, plan again ─► count ─► reply [unlock]
//! ```
//! Steps that may take long, or that fail with an error of their own, come first and without a lock. Counts change before the reply,
//! after which the requests of the open, and its end, may arrive at any time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{Errno, FileHandle, OpenFlags, ReplyOpen};

use crate::config::PageCache;
use crate::error::Error;
use crate::fuse::disk_file::DiskFile;
use crate::fuse::errno::errno;
use crate::fuse::open_plan::{
    Access, Backing, DiskFacts, Inode, OpenHandle, OpenMode, OpenPlan, OpenRequest, Passthrough, ServePlan, plan,
};
use crate::fuse::open_state::OpenState;
use crate::mutex::lock;

impl DiskFile {
    /// Answers an open of the disk inode by process `pid`.
    pub(super) fn open(&self, passthrough: Passthrough, flags: OpenFlags, pid: u32, reply: ReplyOpen) {
        let access = Access::of(flags);
        // Refused without looking at the image: it may be gone.
        if let Some(errno) = access.refusal(self.writable) {
            return reply.error(errno);
        }
        if let Err(e) = self.prepare_open(access, passthrough) {
            reply.error(errno(&e));
            return self.error_log.note(e);
        }
        // Locked until the reply is sent: two opens that decide at once could otherwise give the inode two modes.
        let mut opens = lock(&self.opens);
        let (mut facts, mut why_served) = self.facts(&opens, passthrough);
        let request = |facts| OpenRequest {
            access,
            inode: Inode::Disk(facts),
        };
        let mut decision = plan(&request(facts));
        if decision == OpenPlan::AcquireBacking {
            facts.backing = match self.acquire_backing(&mut opens, &reply) {
                Ok(()) => Backing::Held { current: true },
                Err(why) => {
                    why_served = Some(why);
                    Backing::None
                }
            };
            decision = plan(&request(facts));
        }
        match decision {
            OpenPlan::Serve(serve) => {
                self.log_served(serve.mode, why_served.as_deref());
                self.count_open(serve, &mut opens, pid);
                let number = if serve.writes {
                    opens.writer_opened(self.volume().error_cursor())
                } else {
                    0
                };
                answer(serve, number, &opens, reply);
            }
            OpenPlan::Refuse(errno) => {
                reply.error(errno);
                let why = why_served.unwrap_or_default();
                self.error_log
                    .note(self.view.required_but_unavailable(Error::unsupported(why)));
            }
            // Only while the kernel was not asked.
            OpenPlan::AcquireBacking => reply.error(Errno::EIO),
        }
    }

    /// Does what has to be done before an open is decided on: reads the image again if it was modified, forgets what other
    /// clients may have changed, and prepares the image for writes of the kernel.
    fn prepare_open(&self, access: Access, passthrough: Passthrough) -> Result<(), Error> {
        self.refresh()?;
        let volume = self.volume();
        if !self.detects_modification() {
            // This open must see the writes of other clients, also where the export was known to hold zeroes.
            volume.forget_content();
        }
        // Writes to the image files, so it must not run under the lock. The kernel may write to the backing file as soon
        // as the open is answered.
        let kernel_may_write = access.writes && passthrough.is_ok() && volume.disk().backing_fd().is_some();
        if kernel_may_write && !self.is_uncached() && !self.view.is_off() {
            volume.prepare_external_write()?;
        }
        Ok(())
    }

    /// Returns the facts that an open depends on, and the reason if there is no backing file.
    fn facts(&self, opens: &OpenState, passthrough: Passthrough) -> (DiskFacts, Option<String>) {
        let (backing, why) = match opens.backing(&self.volume()) {
            Backing::Possible => match self.why_no_backing(opens, passthrough) {
                None => (Backing::Possible, None),
                Some(why) => (Backing::None, Some(why.to_owned())),
            },
            held => (held, None),
        };
        let facts = DiskFacts {
            writable: self.writable,
            uncached: self.is_uncached(),
            sequential: self.sequential_write_only(),
            pages_are_current: opens.pages_are_current() && self.detects_modification(),
            backing,
            view: self.view.wish(),
        };
        (facts, why)
    }

    fn is_uncached(&self) -> bool {
        self.config.cache == Some(PageCache::None)
    }

    /// Returns the reason why the kernel need not be asked for a backing file.
    fn why_no_backing(&self, opens: &OpenState, passthrough: Passthrough) -> Option<&'static str> {
        let volume = self.volume();
        // The kernel answers EIO to a passthrough open of an inode that has cached opens.
        if opens.has_cached_opens() {
            Some("it is open with cached pages, which excludes passthrough")
        } else if volume.disk().backing_fd().is_none() && volume.may_become_local() {
            Some("its cache is not complete")
        } else if volume.disk().backing_fd().is_none() {
            Some("it is not one flat file from its first to its last byte")
        } else if self.view.is_off() {
            Some("kernel-view=off")
        } else {
            passthrough.err()
        }
    }

    /// Asks the kernel for a backing file, or returns the reason why there is none.
    fn acquire_backing(&self, opens: &mut OpenState, reply: &ReplyOpen) -> Result<(), String> {
        let volume = self.volume();
        let fd = volume.disk().backing_fd().ok_or("it is not one flat file")?;
        let id = reply.open_backing(fd).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => "FUSE passthrough needs root".to_owned(),
            _ => format!("FUSE passthrough was refused: {e}"),
        })?;
        tracing::info!(
            "{}: served by the kernel itself (FUSE passthrough)",
            self.config.name.display()
        );
        opens.set_backing(id, volume);
        Ok(())
    }

    /// Logs once why the daemon serves the disk, if the kernel neither has nor gets a way to do it.
    fn log_served(&self, mode: OpenMode, why: Option<&str>) {
        let by_daemon = matches!(mode, OpenMode::Direct | OpenMode::Cached) && !self.is_uncached();
        if let Some(why) = why
            && by_daemon
            && !self.view.is_wanted()
            && !self.logged_served.swap(true, Ordering::Relaxed)
        {
            tracing::info!("{}: served by this process: {why}", self.config.name.display());
        }
    }

    /// Counts an open as its plan says.
    fn count_open(&self, serve: ServePlan, opens: &mut OpenState, pid: u32) {
        self.open_files.fetch_add(1, Ordering::AcqRel);
        self.set_counts_data(true);
        if serve.dirties {
            self.dirtying_opens.fetch_add(1, Ordering::AcqRel);
        }
        let kernel_writes = serve.writes && serve.mode == OpenMode::Passthrough;
        if kernel_writes {
            // From here on the kernel changes the file without a request that would tell the daemon.
            self.attributes.passed();
            self.passthrough_writers.fetch_add(1, Ordering::AcqRel);
        }
        opens.opened(serve.mode, kernel_writes);
        self.view
            .disk_inode_opened(serve.mode == OpenMode::DirectBesideView, pid);
    }

    /// Answers an open of the kernel view's inode.
    pub(super) fn open_view(&self, flags: OpenFlags, pid: u32, reply: ReplyOpen) {
        if let Err(e) = self.refresh() {
            reply.error(errno(&e));
            return self.error_log.note(e);
        }
        // Counted before the reply, after which the end of the open may arrive at any time.
        self.open_files.fetch_add(1, Ordering::AcqRel);
        let opened = self.view.open(&self.volume(), Access::of(flags), pid, reply);
        if !matches!(opened, Ok(true)) {
            self.open_files.fetch_sub(1, Ordering::AcqRel);
        }
        if let Err(e) = opened {
            self.error_log.note(e);
        }
    }

    /// Ends an open of the kernel view's inode.
    pub(super) fn release_view(&self, handle: FileHandle) {
        self.open_files.fetch_sub(1, Ordering::AcqRel);
        self.view.release(handle.into());
    }

    /// Ends an open.
    pub(super) fn release(self: &Arc<Self>, handle: FileHandle) {
        let open = OpenHandle::from(handle);
        self.open_files.fetch_sub(1, Ordering::AcqRel);
        if open.dirties {
            self.dirtying_opens.fetch_sub(1, Ordering::AcqRel);
        }
        if open.writes && open.mode == OpenMode::Passthrough {
            // Counted anew from here on.
            self.volume().forget_content();
            self.passthrough_writers.fetch_sub(1, Ordering::AcqRel);
        }
        let mut opens = lock(&self.opens);
        opens.released(open.mode);
        opens.writer_released(open.number);
        if open.mode == OpenMode::DirectBesideView {
            self.view.direct_open_ended();
        }
    }
}

/// Sends the answer that a plan decided on, to the open with this number.
fn answer(serve: ServePlan, number: u64, opens: &OpenState, reply: ReplyOpen) {
    let handle = serve.handle(number);
    match (serve.mode, opens.backing_id()) {
        (OpenMode::Passthrough, Some(id)) => reply.opened_passthrough(handle, serve.flags(), id),
        // A plan is Passthrough only with a backing file.
        (OpenMode::Passthrough, None) => reply.error(Errno::EIO),
        _ => reply.opened(handle, serve.flags()),
    }
}
