//! One name, two nodes: how a disk is read by the kernel itself although some opens of it can't be.
//!
//! ```text
//!   lookup of the name ──► node B, served by us: at first, and while an open needs it
//!                    └──► node A, the kernel view: once its index is there
//!   open of A ─► fits ──► passed: the kernel reads the file of the view
//!         └──► O_DIRECT, or the image was changed ──► ESTALE: the kernel looks the name up once more, and gets B
//! ```
//! Two nodes, because the kernel has an inode in one mode at a time, and opens the file of a view never with
//! `O_DIRECT`; B takes every kind of open. Names of such disks are looked up for each open, so that a switch holds
//! from the next open on. Both nodes have one inode number in `stat`.
//!
//! The name stays with B while an `O_DIRECT` open is left, and for a while after an open was turned away: the kernel
//! looks only once more. Who comes to A without a lookup (a bind mount of the file, `/proc/PID/fd`) would be turned away
//! again and again; the second time he gets what can be had on A.
//!
//! A mount over a file has no name to look up, its root is the disk: it is served.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuser::{BackingId, Errno, FileAttr, FileHandle, FopenFlags, Generation, INodeNo, ReplyEntry, ReplyOpen};

use crate::config::{DiskConfig, KernelView, MountKind, PageCache, ViewConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::error_log::ErrorLog;
use crate::kernel_view::View;
use crate::volume::Volume;

mod builder;

pub(super) use builder::{Builder, Wanted};

/// How long a name stays with the served node, at least, after an open was turned away from the view.
const SETTLE: Duration = Duration::from_secs(1);

/// How long it is waited for one that was turned away to come again.
const COME_AGAIN: Duration = Duration::from_secs(10);

/// The most that are waited for; more at once only risk to be turned away twice.
const MOST_TURNED: usize = 256;

/// Added to the number of a disk's node, it is that of its view.
const VIEW_NODE: u64 = 1 << 32;

/// The node of the view of the disk whose node is `ino`.
fn view_of(ino: INodeNo) -> INodeNo {
    INodeNo(ino.0 | VIEW_NODE)
}

/// Whether `ino` is the node of a view.
pub(super) fn is_view(ino: INodeNo) -> bool {
    ino.0 & VIEW_NODE != 0
}

/// The disk's node, whichever of the two `ino` is. It is what `stat` shows for both.
pub(super) fn disk_of(ino: INodeNo) -> INodeNo {
    INodeNo(ino.0 & !VIEW_NODE)
}

/// Opens of a view that the kernel serves from its file.
const PASSED: FileHandle = FileHandle(1);
/// Opens of a view that reach us.
const ASKED: FileHandle = FileHandle(2);

/// Nothing is to be made durable when an open of a view ends.
const QUIET: FopenFlags = FopenFlags::FOPEN_NOFLUSH;

/// The two nodes of a disk.
#[derive(Debug)]
pub(super) struct KernelViewNode {
    name: String,
    config: ViewConfig,
    /// The disk has no need of a view: the kernel reads its one file, or nobody but us does.
    never: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    way: Way,
    /// What the kernel was given for the opens of the view that there are; it must be the same for all.
    backing: Option<(BackingId, Arc<View>)>,
    /// Opens of the view that have it.
    passed: u64,
    /// `O_DIRECT` opens of the served node.
    direct: u64,
    /// When an open was last turned away.
    turned: Option<Instant>,
    /// Who was turned away, and has not come again.
    waited_for: Vec<(u32, Instant)>,
}

#[derive(Debug)]
enum Way {
    /// No view, now and later.
    Served,
    /// One may come.
    Building,
    /// The view, and the image that it is of.
    Ready(Arc<View>, Arc<Volume>),
}

/// Which node a name is, and whether that may change.
#[derive(Debug, PartialEq, Eq)]
enum Now {
    Fixed,
    Served,
    View,
}

/// What is answered to an open of a view.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// The kernel reads the view.
    Pass,
    /// The name is to be looked up once more.
    Again,
    /// Every read reaches us. `with_backing`: there are opens that don't, so the kernel has to be given their file as well.
    Ask { with_backing: bool },
    /// There is no such open.
    Refuse,
}

impl KernelViewNode {
    /// For a disk in a mount of this shape: the view is still to come, or will never come.
    pub(super) fn new(config: &DiskConfig, volume: &Volume, shape: MountKind) -> Self {
        let name = config.name.to_string_lossy().into_owned();
        // what is no local disk has no files that the kernel could read
        let off = ViewConfig {
            mode: KernelView::Off,
            ..ViewConfig::default()
        };
        let view = config.source.local().map_or(off, |local| local.view.clone());
        let way = match no_view(config, &view, volume, shape) {
            None => Way::Building,
            Some(why) => {
                tracing::debug!("{name}: no kernel view: {why}");
                Way::Served
            }
        };
        let never = matches!(way, Way::Served);
        let state = State {
            way,
            backing: None,
            passed: 0,
            direct: 0,
            turned: None,
            waited_for: Vec::new(),
        };
        Self {
            name,
            config: view,
            never,
            state: Mutex::new(state),
        }
    }

    /// Whether a view may come or is there: then the file system below it counts as one more layer.
    pub(super) fn is_wanted(&self) -> bool {
        !matches!(self.lock().way, Way::Served)
    }

    /// Whether the mount is only good where the kernel reads the disk.
    pub(super) fn is_required(&self) -> bool {
        self.config.mode == KernelView::Required
    }

    /// Whether the kernel must not read the disk by itself.
    pub(super) fn is_off(&self) -> bool {
        self.config.mode == KernelView::Off
    }

    /// Whether an open that the kernel can't serve by itself, because of `why`, is to fail. Not where there is a view: the
    /// opens that don't fit it are served.
    pub(super) fn refuses(&self, why: &str, error_log: &ErrorLog) -> bool {
        let refuses = self.is_required() && matches!(self.lock().way, Way::Served) && self.never;
        if refuses {
            error_log.note(refused(&self.name, Error::unsupported(why)));
        }
        refuses
    }

    /// Answers a lookup of the name; `attr` are those of the disk's node.
    pub(super) fn entry(&self, attr: &FileAttr, ttl: &Duration, reply: ReplyEntry) {
        let asked_again = &Duration::ZERO;
        match self.lock().now() {
            Now::Fixed => reply.entry(ttl, attr, Generation(0)),
            Now::Served => reply.entry_with_ttls(ttl, asked_again, attr, Generation(0)),
            // the library takes the node's number from the attributes; those with the right one are asked for next
            Now::View => {
                let attr = FileAttr {
                    ino: view_of(attr.ino),
                    ..*attr
                };
                reply.entry_with_ttls(asked_again, asked_again, &attr, Generation(0));
            }
        }
    }

    /// Answers an open of the view's node by process `pid`; `volume` is the disk as it is now.
    ///
    /// Errors: where the disk has to be read by the kernel, why it can't be. Then nothing was answered to the reader but EIO.
    pub(super) fn open(&self, volume: &Arc<Volume>, direct: bool, pid: u32, reply: ReplyOpen) -> Result<()> {
        let mut state = self.lock();
        if state.outdate(volume) {
            tracing::warn!(
                "{}: the image was changed underneath, the kernel view is given up",
                self.name
            );
        }
        if !direct
            && let Way::Ready(view, _) = &state.way
            && state.backing.is_none()
        {
            let view = Arc::clone(view);
            match reply.open_backing(view.fd()) {
                Ok(id) => state.backing = Some((id, view)),
                Err(e) if self.is_required() => {
                    reply.error(Errno::EIO);
                    return Err(refused(&self.name, Error::io("FUSE passthrough was refused", e)));
                }
                Err(e) => {
                    tracing::info!("{}: no kernel view: FUSE passthrough was refused: {e}", self.name);
                    state.way = Way::Served;
                }
            }
        }
        match (state.answer(direct, pid, Instant::now()), &state.backing) {
            (Answer::Pass, Some((id, _))) => reply.opened_passthrough(PASSED, QUIET, id),
            (Answer::Ask { with_backing: true }, Some((id, _))) => {
                reply.opened_passthrough(PASSED, QUIET | FopenFlags::FOPEN_DIRECT_IO, id);
            }
            (Answer::Ask { .. }, _) => reply.opened(ASKED, QUIET | FopenFlags::FOPEN_DIRECT_IO),
            (Answer::Refuse, _) => reply.error(Errno::EINVAL),
            (Answer::Again | Answer::Pass, _) => reply.error(Errno::ESTALE),
        }
        Ok(())
    }

    /// Ends an open of the view's node.
    pub(super) fn release(&self, handle: FileHandle) {
        if handle == PASSED {
            self.lock().passed_ended();
        }
    }

    /// Notes an open of the served node, which came by the name.
    pub(super) fn served(&self, direct: bool, pid: u32) {
        self.lock().served(direct, pid);
    }

    /// Notes the end of an `O_DIRECT` open of the served node.
    pub(super) fn direct_ended(&self) {
        let mut state = self.lock();
        state.direct = state.direct.saturating_sub(1);
    }

    /// The view is there, of `volume`; or there will be none.
    fn built(&self, view: Result<View>, volume: &Arc<Volume>) {
        let way = match view {
            Ok(view) => {
                tracing::info!("{}: read by the kernel itself: {view}", self.name);
                Way::Ready(Arc::new(view), Arc::clone(volume))
            }
            // reading tells what exactly, and once is enough
            Err(why) if why.kind() == ErrorKind::Corrupt => {
                tracing::info!("{}: no kernel view: the image is damaged", self.name);
                tracing::debug!("{}: {why}", self.name);
                Way::Served
            }
            Err(why) => {
                tracing::info!("{}: no kernel view: {why}", self.name);
                Way::Served
            }
        };
        self.lock().way = way;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn now(&self) -> Now {
        match self.way {
            Way::Served => Now::Fixed,
            Way::Building => Now::Served,
            Way::Ready(..) if self.is_turned(Instant::now()) => Now::Served,
            Way::Ready(..) => Now::View,
        }
    }

    /// Whether the name has to stay with the served node for a while.
    fn is_turned(&self, now: Instant) -> bool {
        let within = |at: &Instant, time| now.saturating_duration_since(*at) < time;
        self.direct > 0
            || self.turned.is_some_and(|at| within(&at, SETTLE))
            || self.waited_for.iter().any(|(_, at)| within(at, COME_AGAIN))
    }

    /// Gives the view up where it is not of `volume`; whether it was.
    fn outdate(&mut self, volume: &Arc<Volume>) -> bool {
        let outdated = matches!(&self.way, Way::Ready(_, of) if !Arc::ptr_eq(of, volume));
        if outdated {
            self.way = Way::Served;
            self.drop_backing();
        }
        outdated
    }

    /// Decides on an open of the view's node, and counts it.
    fn answer(&mut self, direct: bool, pid: u32, now: Instant) -> Answer {
        let with_backing = self.passed > 0;
        if matches!(self.way, Way::Ready(..)) && self.backing.is_some() && !direct {
            self.passed += 1;
            Answer::Pass
        } else if self.turn_away(pid, now) {
            Answer::Again
        } else if direct && with_backing {
            Answer::Refuse
        } else {
            self.passed += u64::from(with_backing);
            Answer::Ask { with_backing }
        }
    }

    /// Whether process `pid` is told to look the name up again: not if it was told so just now.
    fn turn_away(&mut self, pid: u32, now: Instant) -> bool {
        self.waited_for
            .retain(|(_, at)| now.saturating_duration_since(*at) < COME_AGAIN);
        // 0 stands for every process of another PID namespace
        let known = self.waited_for.iter().position(|&(who, _)| who == pid && pid != 0);
        if let Some(i) = known {
            self.waited_for.swap_remove(i);
            return false;
        }
        self.turned = Some(now);
        if self.waited_for.len() < MOST_TURNED {
            self.waited_for.push((pid, now));
        }
        true
    }

    fn served(&mut self, direct: bool, pid: u32) {
        self.direct += u64::from(direct);
        if let Some(i) = self.waited_for.iter().position(|&(who, _)| who == pid) {
            self.waited_for.swap_remove(i);
        }
    }

    fn passed_ended(&mut self) {
        self.passed = self.passed.saturating_sub(1);
        self.drop_backing();
    }

    /// Lets go of the file of a view that was given up, after its last open.
    fn drop_backing(&mut self) {
        if self.passed == 0 && matches!(self.way, Way::Served) {
            self.backing = None;
        }
    }
}

/// Why a disk will have no view in this mount, whatever the kernel offers.
fn no_view(config: &DiskConfig, view: &ViewConfig, volume: &Volume, shape: MountKind) -> Option<&'static str> {
    if view.mode == KernelView::Off {
        Some("kernel-view=off")
    } else if volume.disk().writer().is_some() {
        Some("the disk can be written to")
    } else if config.cache == Some(PageCache::None) {
        Some("cache=none")
    } else if volume.disk().backing_fd().is_some() {
        Some("it is one flat file, which needs none")
    } else if shape == MountKind::File {
        Some("the mount covers a file")
    } else {
        None
    }
}

fn refused(name: &str, why: Error) -> Error {
    why.within(format!(
        "{name}: kernel-view=required, but the kernel does not read the disk by itself"
    ))
}

#[cfg(test)]
mod tests;
