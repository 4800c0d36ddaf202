//! Where the sectors of a disk lie in its files, asked of the library: what a kernel view is made from.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use vmdkfuse::block::RunPlace;
use vmdkfuse::config::{DiskConfig, LocalConfig, SourceConfig, ViewConfig};
use vmdkfuse::kernel_view;
use vmdkfuse::volume::{self, Volume};

/// The image at `path`, opened for reading by the library.
pub fn open_read_only(path: &Path, allow: &[PathBuf]) -> vmdkfuse::error::Result<Volume> {
    let local = LocalConfig {
        allow_dirs: allow.to_vec(),
        ..LocalConfig::new(path)
    };
    volume::open(&DiskConfig {
        read_only: true,
        ..DiskConfig::new("disk", SourceConfig::Local(local))
    })
}

/// Walks the runs of a disk, none of which may lie outside of its file, and makes its kernel view if this process may.
#[track_caller]
pub fn check_runs(image: &Volume) {
    let Some(runs) = image.disk().runs() else { return };
    let files: Vec<u64> = runs.files().iter().map(|f| f.len).collect();
    let (mut told, mut steps) = (0, 0);
    let walked = runs.walk(&mut |sectors, place| {
        told += sectors.get();
        steps += 1;
        if let RunPlace::Stored { file, sector } = place {
            let end = (sector + sectors.get()) * 512;
            assert!(
                end <= files[file].next_multiple_of(512),
                "up to byte {end} of {}",
                files[file]
            );
        }
        if steps < 1 << 20 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert!(told <= image.len() / 512);
    let view = kernel_view::build(
        &**image.disk(),
        &ViewConfig::default(),
        1 << 20,
        &AtomicBool::new(false),
    );
    if let Ok(view) = view {
        walked.expect("a view of a disk whose runs are not known");
        assert_eq!(told, image.len() / 512);
        assert_eq!(
            File::from(view.fd().try_clone_to_owned().expect("a descriptor"))
                .metadata()
                .expect("its size")
                .len(),
            image.len()
        );
    }
}
