//! A disk with its overlay, and a model of the content that both show together.

use std::path::Path;

use fuse_tests::make::SECTOR;
use fuse_tests::make::model::Random;
use fuse_tests::model::{Model, data, read};
use vmdkfuse::block::Lba;
use vmdkfuse::config::{DiskConfig, LocalConfig, Overlay, SourceConfig};
use vmdkfuse::error::Result;
use vmdkfuse::overlay::commit::{Commit, Next, Step};
use vmdkfuse::overlay::{describe_overlay, open_overlay};
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::VmdkDisk;
use vmdkfuse::volume::{self, Volume, open_source};

/// Returns the configuration of the disk `base` with the overlay `cow`.
pub(crate) fn disk(base: &Path, cow: &Path) -> DiskConfig {
    let mut disk = DiskConfig::new("disk", SourceConfig::Local(LocalConfig::new(base)));
    disk.overlay = Some(Overlay::File(cow.to_path_buf()));
    disk
}

/// Returns the options with which the base is opened.
pub(crate) fn local(disk: &mut DiskConfig) -> &mut LocalConfig {
    let SourceConfig::Local(local) = &mut disk.source else {
        panic!("a disk in a file")
    };
    local
}

/// Returns the configuration of the same disk, read-only.
pub(crate) fn reading(disk: &DiskConfig) -> DiskConfig {
    DiskConfig {
        read_only: true,
        ..disk.clone()
    }
}

/// Opens the overlay of a disk as a VMDK, without its base.
fn delta(disk: &DiskConfig) -> Result<VmdkDisk> {
    Ok(open_overlay(&reading(disk), &*open_source(disk)?, Access::Read)?.unwrap())
}

/// Callback of a commit that runs to its end.
pub(crate) fn go_on(_: Step) -> Result<Next> {
    Ok(Next::GoOn)
}

/// Closes the writer, which makes its writes durable, and the volume.
#[track_caller]
pub(crate) fn close(image: Volume) {
    image.disk().writer().unwrap().close().unwrap();
    drop(image);
}

/// A disk with its overlay and the model of its content.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) disk: DiskConfig,
    pub(crate) model: Model,
}

impl Pair {
    /// Creates an overlay over `base`, whose content is that of the file `raw`, and applies `steps` random operations.
    #[track_caller]
    pub(crate) fn changed(base: &Path, cow: &Path, raw: &Path, seed: u64, steps: u64) -> Self {
        let mut pair = Self {
            disk: disk(base, cow),
            model: Model::of_file(raw),
        };
        pair.change(&mut Random::new(seed), steps);
        pair
    }

    /// Opens the disk for writing.
    #[track_caller]
    pub(crate) fn open(&self) -> Volume {
        volume::open(&self.disk).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Opens the disk, applies random operations and closes it.
    #[track_caller]
    pub(crate) fn change(&mut self, random: &mut Random, steps: u64) {
        let image = self.open();
        self.exercise(&image, random, steps);
        close(image);
    }

    /// Applies random writes, zeroes, reads and flushes to the disk and to the model.
    #[track_caller]
    pub(crate) fn exercise(&mut self, image: &Volume, random: &mut Random, steps: u64) {
        let disk = image.disk().as_ref();
        let writer = disk.writer().expect("a disk with an overlay can be written to");
        for step in 0..steps {
            let (at, sectors) = random_range(random, self.model.sectors());
            match random.below(8) {
                0..=3 => {
                    let data = data(step, sectors);
                    writer.write_at(Lba(at), &data).unwrap();
                    self.model.write(at, &data);
                }
                4 => {
                    writer.zero(Lba(at)..Lba(at + sectors), random.below(2) == 0).unwrap();
                    self.model.write(at, &vec![0; (sectors * SECTOR) as usize]);
                }
                5 if step % 9 == 0 => writer.flush().unwrap(),
                _ => {
                    let expected = self.model.read(at, sectors);
                    assert!(
                        read(disk, at, sectors) == expected,
                        "step {step}: {at}, {sectors} sectors"
                    );
                }
            }
        }
    }

    /// Opens the disk for reading, compares it with the model and checks its overlay.
    #[track_caller]
    pub(crate) fn same(&self, what: &str) {
        let image = volume::open(&reading(&self.disk)).unwrap_or_else(|e| panic!("{what}: {e}"));
        self.model.compare(image.disk().as_ref(), what);
        drop(image);
        let report = delta(&self.disk).unwrap().check();
        assert_eq!(report.errors, Vec::<String>::new(), "{what}");
    }

    /// Runs a complete commit.
    #[track_caller]
    pub(crate) fn merge(&self) {
        assert!(Commit::open(&self.disk).unwrap().run(&mut go_on).unwrap());
    }

    /// Checks everything that must hold after a complete commit.
    #[track_caller]
    pub(crate) fn merged(&self, what: &str) {
        self.same(&format!("{what}: both"));
        let overlay = describe_overlay(&delta(&self.disk).unwrap()).unwrap();
        assert!(!overlay.unfinished_commit, "{what}: it is still marked as unfinished");
        let alone = DiskConfig {
            overlay: None,
            ..reading(&self.disk)
        };
        self.model.compare(
            volume::open(&alone).unwrap().disk().as_ref(),
            &format!("{what}: the base alone"),
        );
    }
}

/// Returns start and length of a random range, often near the end of a grain, a table or the disk.
fn random_range(random: &mut Random, sectors: u64) -> (u64, u64) {
    const EDGES: [u64; 5] = [8, 16, 128, 8192, 65536];
    let mut at = random.below(sectors);
    match random.below(4) {
        0 | 1 => {
            let edge = EDGES[random.below(EDGES.len() as u64) as usize];
            at = (at / edge * edge + random.below(3)).saturating_sub(1).min(sectors - 1);
        }
        2 => at = sectors - 1 - random.below(sectors.min(40)),
        _ => {}
    }
    let len = if random.below(8) == 0 {
        1 + random.below(300)
    } else {
        1 + random.below(24)
    };
    (at, len.min(sectors - at))
}
