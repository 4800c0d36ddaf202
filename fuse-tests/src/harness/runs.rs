//! Runs of a disk in its files, as the library reports them. A kernel view is built from them.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use vmdkfuse::block::RunPlace;
use vmdkfuse::config::{DiskConfig, LocalConfig, SourceConfig, ViewConfig};
use vmdkfuse::kernel_view;
use vmdkfuse::volume::{self, Volume};

/// Opens the image at `path` for reading, as the library does.
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

/// Walks the runs of a disk and builds its kernel view.
///
/// Panics if a run lies outside of its file, or if a view is built that does not cover the disk. A disk without runs
/// passes, and so does a process that may not build a view.
#[track_caller]
pub fn check_runs(image: &Volume) {
    let Some(runs) = image.disk().runs() else { return };
    let files: Vec<u64> = runs.files().iter().map(|f| f.len).collect();
    let (mut covered, mut steps) = (0, 0);
    let walked = runs.walk(&mut |sectors, place| {
        covered += sectors.get();
        steps += 1;
        if let RunPlace::Stored { file, sector } = place {
            let end = (sector + sectors.get()) * 512;
            assert!(
                end <= files[file].next_multiple_of(512),
                "a run ends at byte {end} of a file of {} bytes",
                files[file]
            );
        }
        // A hostile disk may have billions of short runs; a million of them are enough.
        if steps < 1 << 20 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert!(covered <= image.len() / 512);
    let view = kernel_view::build(
        &**image.disk(),
        &ViewConfig::default(),
        1 << 20,
        &AtomicBool::new(false),
    );
    if let Ok(view) = view {
        walked.expect("a view was built although the walk failed");
        assert_eq!(covered, image.len() / 512);
        assert_eq!(
            File::from(view.fd().try_clone_to_owned().expect("a descriptor"))
                .metadata()
                .expect("its size")
                .len(),
            image.len()
        );
    }
}
