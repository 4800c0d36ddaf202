//! Who makes the views of a mount: those that are required before it is ready, the others behind it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{KernelViewNode, Way, refused};
use crate::config::MountKind;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::disk_file::Passthrough;
use crate::kernel_view::{self, View};
use crate::volume::Volume;

/// A disk of a mount, and its view that is to be made.
pub(in crate::fuse) type Wanted = (Arc<KernelViewNode>, Arc<Volume>);

/// Makes the views of a mount. Dropped, it gives up those that are not there yet.
#[derive(Debug, Default)]
pub(in crate::fuse) struct Builder(Work);

/// What a builder and its thread share.
#[derive(Debug, Clone, Default)]
struct Work {
    stop: Arc<AtomicBool>,
    /// Bytes of the indexes that are there. All of a mount together take no more than the largest `view-size=` allows.
    taken: u64,
}

impl Builder {
    /// Makes the views that are required, at once. Errors: why there is none of a disk that must have one.
    pub(in crate::fuse) fn required(&mut self, disks: &[Wanted], shape: MountKind) -> Result<()> {
        for (switch, volume) in disks.iter().filter(|(s, _)| s.is_required()) {
            if switch.is_wanted() {
                let view = self
                    .0
                    .build(disks, switch, volume)
                    .map_err(|why| refused(&switch.name, why))?;
                switch.built(Ok(view), volume);
            } else if volume.disk().backing_fd().is_none() || volume.disk().writer().is_some() {
                let why = match shape {
                    MountKind::File => "a mount over a file has no second node for it; mount at a folder",
                    MountKind::Dir => "it takes a disk that is read-only (-r), and not cache=none",
                };
                return Err(refused(&switch.name, Error::new(ErrorKind::Usage, why)));
            }
        }
        Ok(())
    }

    /// Makes all others, one after the other, behind the mount that is ready already; none where `passthrough` says why
    /// the kernel takes no file of ours.
    pub(in crate::fuse) fn start(&mut self, mut disks: Vec<Wanted>, passthrough: Passthrough) {
        disks.retain(|(switch, _)| matches!(switch.lock().way, Way::Building));
        if disks.is_empty() {
            return;
        }
        if let Err(why) = passthrough {
            return disks
                .iter()
                .for_each(|(switch, volume)| switch.built(Err(Error::unsupported(why)), volume));
        }
        let mut work = self.0.clone();
        let build = move || {
            for (switch, volume) in &disks {
                let view = work.build(&disks, switch, volume);
                if work.stop.load(Ordering::Relaxed) {
                    break;
                }
                switch.built(view, volume);
            }
        };
        // where no thread is to be had the disks are served
        if let Err(e) = std::thread::Builder::new().name("view".to_owned()).spawn(build) {
            tracing::info!("no kernel view: a thread to make it: {e}");
        }
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

impl Work {
    fn build(&mut self, disks: &[Wanted], switch: &KernelViewNode, volume: &Arc<Volume>) -> Result<View> {
        let all = disks.iter().map(|(s, _)| s.config.size).max().unwrap_or(0);
        let budget = switch.config.size.min(all.saturating_sub(self.taken));
        let view = kernel_view::build(&**volume.disk(), &switch.config, budget, &self.stop)?;
        self.taken += view.index_bytes();
        Ok(view)
    }
}
