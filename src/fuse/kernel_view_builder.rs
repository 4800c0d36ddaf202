//! Builds the kernel views of a mount: required ones before the mount is ready, all others in a thread afterwards.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::config::MountKind;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::kernel_view_node::KernelViewNode;
use crate::fuse::open_plan::Passthrough;
use crate::kernel_view::{self, View};
use crate::mutex::lock;
use crate::volume::Volume;

/// The node of a disk, and the volume that its view is to describe.
pub(super) type PlannedView = (Arc<KernelViewNode>, Arc<Volume>);

/// Builds the views of a mount. When it is dropped, views that are not built yet are abandoned.
#[derive(Debug, Default)]
pub(super) struct Builder(BuildState);

/// State that the threads of a builder share.
#[derive(Debug, Clone, Default)]
struct BuildState {
    stop: Arc<AtomicBool>,
    /// Held during a build: one view is built at a time.
    indexes: Arc<Mutex<Indexes>>,
}

/// Indexes of a mount. All together take at most the largest `view-size=` of its disks.
#[derive(Debug, Default)]
struct Indexes {
    /// Bytes of those built so far.
    taken: u64,
    /// Largest `view-size=` of the disks seen so far.
    limit: u64,
}

impl Builder {
    /// Builds the required views before it returns. Errors: the reason why a disk that must have a view has none.
    pub(super) fn required(&self, disks: &[PlannedView], mount_kind: MountKind) -> Result<()> {
        for (node, volume) in disks.iter().filter(|(s, _)| s.is_required()) {
            if node.is_wanted() {
                let view = self
                    .0
                    .build(disks, node, volume)
                    .map_err(|why| node.required_but_unavailable(why))?;
                node.set_view(Ok(view), volume);
            } else if volume.disk().backing_fd().is_none() || volume.disk().writer().is_some() {
                let why = match mount_kind {
                    MountKind::File => "a mount over a file has no second inode for the view; mount on a directory",
                    MountKind::Dir => "the disk must be mounted read-only (-r), and without cache=none",
                };
                return Err(node.required_but_unavailable(Error::new(ErrorKind::Usage, why)));
            }
        }
        Ok(())
    }

    /// Builds the views of `disks` that are not built yet, one after the other in a thread, while the mount already serves
    /// requests. Builds none if `passthrough` is the reason why the kernel accepts no backing file.
    pub(super) fn start(&self, mut disks: Vec<PlannedView>, passthrough: Passthrough) {
        // Where no view can be built, none is waited for either.
        disks.retain(|(node, _)| node.is_building() || (passthrough.is_err() && node.is_waiting()));
        if disks.is_empty() {
            return;
        }
        if let Err(why) = passthrough {
            return disks
                .iter()
                .for_each(|(node, volume)| node.set_view(Err(Error::unsupported(why)), volume));
        }
        let work = self.0.clone();
        let build = move || {
            for (node, volume) in &disks {
                let view = work.build(&disks, node, volume);
                // Dropping the builder ends the walk with an error, which must not be logged as the disk's.
                if work.stop.load(Ordering::Relaxed) {
                    break;
                }
                node.set_view(view, volume);
            }
        };
        // Without a thread the disks stay with the disk inode, which serves every open.
        if let Err(e) = std::thread::Builder::new().name("view".to_owned()).spawn(build) {
            tracing::info!("no kernel view: cannot start the thread that builds it: {e}");
        }
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

impl BuildState {
    fn build(&self, disks: &[PlannedView], node: &KernelViewNode, volume: &Arc<Volume>) -> Result<View> {
        let mut indexes = lock(&self.indexes);
        // A disk that the cache has completed later comes alone, and the indexes of the others count all the same.
        let sizes = disks.iter().map(|(s, _)| s.config().size);
        indexes.limit = sizes.fold(indexes.limit, u64::max);
        let budget = node.config().size.min(indexes.limit.saturating_sub(indexes.taken));
        let view = kernel_view::build(&**volume.disk(), node.config(), budget, &self.stop)?;
        indexes.taken += view.index_bytes();
        Ok(view)
    }
}
