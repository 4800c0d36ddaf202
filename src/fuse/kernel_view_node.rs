//! One name, two inodes: lets the kernel read a disk itself although it cannot serve every open of it.
//!
//! ```text
//!   lookup of the name ──► disk inode, served by the daemon: at first, and while an open needs it
//!                    └──► view inode: once the index of the kernel view is ready
//!   open of the view inode ─► fits ──► passthrough: the kernel reads the file of the view
//!              └──► O_DIRECT, or the image was modified ──► ESTALE: the kernel repeats the lookup, which returns the
//!                                                           disk inode
//! ```
//! There are two inodes because the kernel has an inode in one mode at a time, and never opens the file of a view with
//! `O_DIRECT`; the disk inode accepts every kind of open. Names of such disks have a lookup timeout of zero, so that a
//! change of the inode takes effect from the next open on. `stat` shows one inode number for both.
//!
//! States of the view: `Building` → `Ready` → `Unavailable`, or directly `Unavailable`. There is no way back: a view
//! that was discarded is not built again. A disk on a server begins with `Waiting`: an open that finds all of its files
//! complete in the disk cache begins to build.
//!
//! The name stays with the disk inode while an `O_DIRECT` open exists, and for a while after an open was rejected with
//! ESTALE, because the kernel repeats the lookup only once. A process that reaches the view inode without a lookup
//! (through a bind mount of the file, or `/proc/PID/fd`) would be rejected again and again; its second attempt gets the
//! best answer that the view inode has.
//!
//! A mount over a file has no name to look up, its root is the disk: the daemon serves it.
//!
//! Lock order: the mutex of a node is taken last, under the `opens` of its disk file.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fuser::{BackingId, Errno, FileAttr, Generation, INodeNo, ReplyEntry, ReplyOpen};

use crate::config::{DiskConfig, KernelView, MountKind, PageCache, ViewConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::open_plan::{
    Access, Inode, OpenHandle, OpenMode, OpenPlan, OpenRequest, ServePlan, ViewFacts, ViewWish, plan,
};
use crate::kernel_view::View;
use crate::mutex::lock;
use crate::volume::Volume;

/// For how long, at least, a name stays with the disk inode after an open of the view was rejected.
const DISK_INODE_TIME: Duration = Duration::from_secs(1);

/// For how long a retry by a rejected process is expected.
const RETRY_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest number of expected retries. Processes beyond it only risk being rejected twice.
const MAX_EXPECTED_RETRIES: usize = 256;

/// Bit that turns the inode number of a disk into that of its view.
const VIEW_NODE: u64 = 1 << 32;

/// Returns the view inode of the disk whose inode is `ino`.
fn view_inode_of(ino: INodeNo) -> INodeNo {
    INodeNo(ino.0 | VIEW_NODE)
}

/// Returns true if `ino` is a view inode.
pub(super) fn is_view_inode(ino: INodeNo) -> bool {
    ino.0 & VIEW_NODE != 0
}

/// Returns the disk inode of either inode of a disk. `stat` shows it for both.
pub(super) fn disk_inode_of(ino: INodeNo) -> INodeNo {
    INodeNo(ino.0 & !VIEW_NODE)
}

/// The two inodes of a disk, and the state of its kernel view.
#[derive(Debug)]
pub(super) struct KernelViewNode {
    name: String,
    config: ViewConfig,
    /// The disk can have no view: the kernel reads its one file, or the daemon has to serve it.
    never_has_view: bool,
    state: Mutex<NodeState>,
}

#[derive(Debug)]
struct NodeState {
    view_state: ViewState,
    /// Backing file that the kernel was given for the current opens of the view; it must be the same for all of them.
    /// Kept after the view was discarded, until the last of these opens ends.
    backing: Option<(BackingId, Arc<View>)>,
    /// Number of opens of the view inode that use `backing`.
    passthrough_opens: u64,
    /// Number of `O_DIRECT` opens of the disk inode.
    direct_opens: u64,
    /// Time at which an open was last rejected with ESTALE.
    last_rejected: Option<Instant>,
    /// Processes that were rejected and have not retried yet.
    expected_retries: Vec<(u32, Instant)>,
}

#[derive(Debug)]
enum ViewState {
    /// There is no view and will be none.
    Unavailable,
    /// The files of the disk are not local yet.
    Waiting,
    /// The index is not built yet.
    Building,
    /// The view, and the volume that it describes.
    Ready(Arc<View>, Arc<Volume>),
}

/// The inode that a lookup of the name returns.
#[derive(Debug, PartialEq, Eq)]
enum NameTarget {
    /// The disk inode, for good.
    OnlyDisk,
    /// The disk inode, for this open.
    DiskForNow,
    /// The view inode.
    View,
}

impl KernelViewNode {
    /// Creates the node of a disk. The view is built later, unless the configuration or the disk excludes it.
    pub(super) fn new(config: &DiskConfig, volume: &Volume, mount_kind: MountKind) -> Self {
        let name = config.name.to_string_lossy().into_owned();
        let view = config.source.settings().kernel_view().unwrap_or(ViewConfig {
            mode: KernelView::Off,
            ..ViewConfig::default()
        });
        let view_state = match reason_without_view(config, &view, volume, mount_kind) {
            None if volume.may_become_local() => ViewState::Waiting,
            None => ViewState::Building,
            Some(why) => {
                tracing::debug!("{name}: no kernel view: {why}");
                ViewState::Unavailable
            }
        };
        let never_has_view = matches!(view_state, ViewState::Unavailable);
        let state = NodeState {
            view_state,
            backing: None,
            passthrough_opens: 0,
            direct_opens: 0,
            last_rejected: None,
            expected_retries: Vec::new(),
        };
        Self {
            name,
            config: view,
            never_has_view,
            state: Mutex::new(state),
        }
    }

    /// Returns true if the disk has a view or may get one. The file system below a view counts as one more layer of the
    /// kernel's stack limit.
    pub(super) fn is_wanted(&self) -> bool {
        !matches!(self.lock().view_state, ViewState::Unavailable)
    }

    /// Returns true once, when the files of a disk on a server have become local and the view can be built.
    pub(super) fn becomes_buildable(&self, volume: &Volume) -> bool {
        let mut state = self.lock();
        if !matches!(state.view_state, ViewState::Waiting) || !volume.is_local() {
            return false;
        }
        // A flat file is passed through as it is.
        let is_flat = volume.disk().backing_fd().is_some();
        state.view_state = if is_flat {
            ViewState::Unavailable
        } else {
            ViewState::Building
        };
        !is_flat
    }

    /// Returns true for `kernel-view=required`: an open fails if the kernel cannot read the disk itself.
    pub(super) fn is_required(&self) -> bool {
        self.config.mode == KernelView::Required
    }

    /// Returns true for `kernel-view=off`: the daemon serves every read.
    pub(super) fn is_off(&self) -> bool {
        self.config.mode == KernelView::Off
    }

    /// Returns the need of the disk for a view, at an open of its disk inode.
    pub(super) fn wish(&self) -> ViewWish {
        match self.lock().view_state {
            ViewState::Waiting | ViewState::Building | ViewState::Ready(..) => ViewWish::Wanted,
            ViewState::Unavailable if self.is_required() && self.never_has_view => ViewWish::RequiredBacking,
            ViewState::Unavailable => ViewWish::None,
        }
    }

    /// Returns true if the view is not built yet.
    pub(super) fn is_building(&self) -> bool {
        matches!(self.lock().view_state, ViewState::Building)
    }

    /// Returns true if the view is built once the disk cache has all of the disk.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.lock().view_state, ViewState::Waiting)
    }

    /// Returns the configuration of the view.
    pub(super) fn config(&self) -> &ViewConfig {
        &self.config
    }

    /// Returns the error of a disk that the kernel must read itself, and cannot.
    pub(super) fn required_but_unavailable(&self, why: Error) -> Error {
        why.within(format!(
            "{}: kernel-view=required, but the kernel cannot read the disk itself",
            self.name
        ))
    }

    /// Answers a lookup of the name. `attr` are the attributes of the disk inode; `ttls` are for how long they and the
    /// name are valid.
    pub(super) fn reply_lookup(&self, attr: &FileAttr, ttls: (Duration, Duration), reply: ReplyEntry) {
        let (ttl, name_ttl) = (&ttls.0, &ttls.1);
        // A timeout of zero: the next open looks the name up again and sees a change of the inode.
        let no_timeout = &Duration::ZERO;
        match self.lock().name_target() {
            NameTarget::OnlyDisk => reply.entry_with_ttls(ttl, name_ttl, attr, Generation(0)),
            NameTarget::DiskForNow => reply.entry_with_ttls(ttl, no_timeout, attr, Generation(0)),
            // fuser takes the inode number from the attributes. This reply therefore shows the view's number in `stat`,
            // which the zero attribute timeout corrects: the following getattr answers with the disk's number.
            NameTarget::View => {
                let attr = FileAttr {
                    ino: view_inode_of(attr.ino),
                    ..*attr
                };
                reply.entry_with_ttls(no_timeout, no_timeout, &attr, Generation(0));
            }
        }
    }

    /// Answers an open of the view inode by process `pid`. `volume` is the current volume of the disk.
    ///
    /// Returns true if the file is open now.
    ///
    /// Errors: the view is required, but the kernel refuses its file. The open was answered with EIO.
    pub(super) fn open(&self, volume: &Arc<Volume>, access: Access, pid: u32, reply: ReplyOpen) -> Result<bool> {
        // Locked until the reply is sent: concurrent opens of the view must get the same backing file.
        let mut state = self.lock();
        if state.discard_if_outdated(volume) {
            tracing::warn!(
                "{}: the image was modified by another process, or is damaged in the disk cache: the kernel view is dropped",
                self.name
            );
        }
        if !access.direct
            && let ViewState::Ready(view, _) = &state.view_state
            && state.backing.is_none()
        {
            // Ends the borrow of the state, which the result is stored in.
            let view = Arc::clone(view);
            match reply.open_backing(view.fd()) {
                Ok(id) => state.backing = Some((id, view)),
                Err(e) if self.is_required() => {
                    reply.error(Errno::EIO);
                    return Err(self.required_but_unavailable(Error::io("FUSE passthrough was refused", e)));
                }
                Err(e) => {
                    tracing::info!("{}: no kernel view: FUSE passthrough was refused: {e}", self.name);
                    state.view_state = ViewState::Unavailable;
                }
            }
        }
        let serve = match state.plan_open(access, pid, Instant::now()) {
            OpenPlan::Serve(serve) => serve,
            OpenPlan::Refuse(errno) => {
                reply.error(errno);
                return Ok(false);
            }
            // The plan of a view inode never asks for one.
            OpenPlan::AcquireBacking => {
                reply.error(Errno::EIO);
                return Ok(false);
            }
        };
        match &state.backing {
            Some((id, _)) if serve.mode == OpenMode::Passthrough => {
                reply.opened_passthrough(serve.handle(0), serve.flags(), id);
            }
            _ => reply.opened(serve.handle(0), serve.flags()),
        }
        Ok(true)
    }

    /// Ends an open of the view inode.
    pub(super) fn release(&self, open: OpenHandle) {
        if open.mode == OpenMode::Passthrough {
            self.lock().passthrough_open_ended();
        }
    }

    /// Counts an open of the disk inode that came by the name.
    pub(super) fn disk_inode_opened(&self, direct: bool, pid: u32) {
        self.lock().disk_inode_opened(direct, pid);
    }

    /// Counts the end of an `O_DIRECT` open of the disk inode.
    pub(super) fn direct_open_ended(&self) {
        let mut state = self.lock();
        state.direct_opens = state.direct_opens.saturating_sub(1);
    }

    /// Installs the view that was built of `volume`, or logs why there will be none.
    pub(super) fn set_view(&self, view: Result<View>, volume: &Arc<Volume>) {
        // Logged once it is so: an open that follows the message uses the view.
        let publish = |view_state| self.lock().view_state = view_state;
        match view {
            Ok(view) => {
                let said = view.to_string();
                publish(ViewState::Ready(Arc::new(view), Arc::clone(volume)));
                tracing::info!("{}: read by the kernel itself: {said}", self.name);
            }
            Err(why) => {
                publish(ViewState::Unavailable);
                // A read of the damaged part reports the details; the log has the error once.
                if why.kind() == ErrorKind::Corrupt {
                    tracing::info!("{}: no kernel view: the image is damaged", self.name);
                    tracing::debug!("{}: {why}", self.name);
                } else {
                    tracing::info!("{}: no kernel view: {why}", self.name);
                }
            }
        }
    }

    /// Returns true if there is a view of `volume`, which keeps it open.
    pub(super) fn keeps(&self, volume: &Arc<Volume>) -> bool {
        matches!(&self.lock().view_state, ViewState::Ready(_, of) if Arc::ptr_eq(of, volume))
    }

    fn lock(&self) -> MutexGuard<'_, NodeState> {
        lock(&self.state)
    }
}

impl NodeState {
    fn name_target(&self) -> NameTarget {
        match self.view_state {
            ViewState::Unavailable => NameTarget::OnlyDisk,
            ViewState::Waiting | ViewState::Building => NameTarget::DiskForNow,
            ViewState::Ready(..) if self.keeps_disk_inode(Instant::now()) => NameTarget::DiskForNow,
            ViewState::Ready(..) => NameTarget::View,
        }
    }

    /// Returns true if the name has to lead to the disk inode for now.
    fn keeps_disk_inode(&self, now: Instant) -> bool {
        let within = |at: &Instant, time| now.saturating_duration_since(*at) < time;
        self.direct_opens > 0
            || self.last_rejected.is_some_and(|at| within(&at, DISK_INODE_TIME))
            || self.expected_retries.iter().any(|(_, at)| within(at, RETRY_TIMEOUT))
    }

    /// Discards the view if it does not describe `volume`, or damage was found in the disk cache. Returns true if it was
    /// discarded.
    fn discard_if_outdated(&mut self, volume: &Arc<Volume>) -> bool {
        let outdated =
            matches!(&self.view_state, ViewState::Ready(_, of) if !Arc::ptr_eq(of, volume) || !of.is_local());
        if outdated {
            self.view_state = ViewState::Unavailable;
            self.drop_backing();
        }
        outdated
    }

    /// Decides on an open of the view inode, and counts it.
    fn plan_open(&mut self, access: Access, pid: u32, now: Instant) -> OpenPlan {
        self.expected_retries
            .retain(|(_, at)| now.saturating_duration_since(*at) < RETRY_TIMEOUT);
        let facts = ViewFacts {
            is_ready: matches!(self.view_state, ViewState::Ready(..)) && self.backing.is_some(),
            has_backed_opens: self.passthrough_opens > 0,
            // PID 0 stands for every process of another PID namespace, so it says nothing about a retry.
            was_rejected: pid != 0 && self.expected_retries.iter().any(|&(waiting, _)| waiting == pid),
        };
        let decision = plan(&OpenRequest {
            access,
            inode: Inode::View(facts),
        });
        match decision {
            OpenPlan::Refuse(Errno::ESTALE) => {
                self.last_rejected = Some(now);
                if self.expected_retries.len() < MAX_EXPECTED_RETRIES {
                    self.expected_retries.push((pid, now));
                }
            }
            // The one that fits the view says nothing about the retry of another thread of the process.
            OpenPlan::Serve(ServePlan { direct_io: false, .. }) | OpenPlan::AcquireBacking => {}
            OpenPlan::Serve(_) | OpenPlan::Refuse(_) => self.retried(pid),
        }
        if let OpenPlan::Serve(serve) = decision {
            self.passthrough_opens += u64::from(serve.mode == OpenMode::Passthrough);
        }
        decision
    }

    /// Ends the wait for a retry by process `pid`.
    fn retried(&mut self, pid: u32) {
        if let Some(i) = self.expected_retries.iter().position(|&(waiting, _)| waiting == pid) {
            self.expected_retries.swap_remove(i);
        }
    }

    fn disk_inode_opened(&mut self, direct: bool, pid: u32) {
        self.direct_opens += u64::from(direct);
        self.retried(pid);
    }

    fn passthrough_open_ended(&mut self) {
        self.passthrough_opens = self.passthrough_opens.saturating_sub(1);
        self.drop_backing();
    }

    /// Releases the backing file of a discarded view after its last open.
    fn drop_backing(&mut self) {
        if self.passthrough_opens == 0 && matches!(self.view_state, ViewState::Unavailable) {
            self.backing = None;
        }
    }
}

/// Returns the reason why a disk has no view in this mount, whatever the kernel supports.
fn reason_without_view(
    config: &DiskConfig,
    view: &ViewConfig,
    volume: &Volume,
    mount_kind: MountKind,
) -> Option<&'static str> {
    if view.mode == KernelView::Off {
        Some("kernel-view=off")
    } else if volume.disk().writer().is_some() {
        Some("the disk can be written to")
    } else if config.cache == Some(PageCache::None) {
        Some("cache=none")
    } else if volume.disk().backing_fd().is_some() {
        Some("it is one flat file, which needs none")
    } else if volume.may_become_local() && volume.disk().runs().is_none() {
        Some(volume.disk().why_no_runs())
    } else if mount_kind == MountKind::File {
        Some("the mount covers a file")
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
