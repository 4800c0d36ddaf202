//! Views of small disks, mounted if the test runs as root and the kernel supports it.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::block::{Content, Geometry, Lba, RunPlace};
use crate::store::{Access, OpenPolicy, StoredFile, open_user_path};

const MIB: u64 = 1 << 20;

/// A disk whose runs a test chooses.
#[derive(Debug)]
struct ScriptedDisk {
    files: Vec<Arc<dyn StoredFile>>,
    runs: Vec<(u64, RunPlace)>,
}

impl ScriptedDisk {
    /// Creates the disk over files of the given content in `dir`.
    fn new(dir: &Path, files: &[&[u8]], runs: Vec<(u64, RunPlace)>) -> Self {
        let policy = Arc::new(OpenPolicy::new(Vec::new(), true));
        let open = |(i, bytes): (usize, &&[u8])| {
            let path = dir.join(i.to_string());
            fs::write(&path, bytes).unwrap();
            open_user_path(&path, Arc::clone(&policy), Access::Read).unwrap()
        };
        Self {
            files: files.iter().enumerate().map(open).collect(),
            runs,
        }
    }
}

impl BlockRead for ScriptedDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.runs.iter().map(|r| r.0).sum(),
            granule: 1,
            preferred: 1,
        }
    }
    fn read_at(&self, _at: Lba, _buf: &mut [u8]) -> Result<()> {
        panic!("the kernel reads the disk, not the daemon");
    }
    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        Ok((Content::Data, self.geometry().sectors - at.0))
    }
    fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
        false
    }
    fn runs(&self) -> Option<&dyn Runs> {
        Some(self)
    }
}

impl Runs for ScriptedDisk {
    fn files(&self) -> Vec<RunFile<'_>> {
        self.files
            .iter()
            .map(|f| RunFile {
                len: f.len(),
                fd: f.fd(),
            })
            .collect()
    }
    fn walk(&self, each: &mut dyn FnMut(NonZeroU64, RunPlace) -> ControlFlow<()>) -> Result<()> {
        for &(sectors, place) in &self.runs {
            if each(NonZeroU64::new(sectors).unwrap(), place).is_break() {
                break;
            }
        }
        Ok(())
    }
}

fn run(disk: &ScriptedDisk, config: &ViewConfig) -> Result<View> {
    build(disk, config, config.size, &AtomicBool::new(false))
}

fn content(view: &View) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::from(view.fd().try_clone_to_owned().unwrap())
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// Returns true if views can be created here; otherwise prints `SKIPPED`.
fn possible_here() -> bool {
    match (nix::unistd::geteuid().is_root(), privileged()) {
        (true, Ok(())) => true,
        (is_root, here) => {
            eprintln!("SKIPPED: no kernel view: root: {is_root}, {here:?}");
            false
        }
    }
}

#[test]
fn kernel_releases_are_parsed() {
    assert_eq!(version("6.12.48+deb13-amd64"), (6, 12, 48));
    assert_eq!(version("6.18.44-fc-v595"), (6, 18, 44));
    assert_eq!(version("7.0-rc1"), (7, 0, 0));
    assert_eq!(version(""), (0, 0, 0));
}

fn three_runs(dir: &Path) -> (ScriptedDisk, Vec<u8>) {
    let a: Vec<u8> = (0..MIB as u32).map(|i| (i >> 9) as u8).collect();
    // It ends inside of a sector, after the part that is read.
    let b: Vec<u8> = (0..5 * 512 + 100).map(|i| (i % 251) as u8).collect();
    let stored = |file, sector| RunPlace::Stored { file, sector };
    let runs = vec![
        (100, stored(0, 7)),
        (33, RunPlace::Zero),
        (5, stored(1, 0)),
        (10, stored(0, 0)),
    ];
    let mut expected = a[7 * 512..107 * 512].to_vec();
    expected.resize(133 * 512, 0);
    expected.extend(&b[..5 * 512]);
    expected.extend(&a[..10 * 512]);
    (ScriptedDisk::new(dir, &[&a, &b], runs), expected)
}

#[test]
fn the_kernel_reads_runs_and_holes_of_any_size() {
    if !possible_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (disk, expected) = three_runs(dir.path());
    let view = run(&disk, &ViewConfig::default()).unwrap();
    assert!(view.to_string().contains("in memory"), "{view}");
    assert_eq!(content(&view), expected);
}

#[test]
fn an_index_in_a_directory_has_no_name_there() {
    if !possible_here() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (disk, expected) = three_runs(dir.path());
    let config = ViewConfig {
        dir: Some(dir.path().to_owned()),
        ..ViewConfig::default()
    };
    let view = run(&disk, &config).unwrap();
    assert_eq!(content(&view), expected);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "only the two extents");
}

#[test]
fn a_directory_that_cannot_hold_an_index_is_named_with_the_reason() {
    if !possible_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (disk, _) = three_runs(dir.path());
    for (dir, word) in [("/dev/shm", "not from tmpfs"), ("/no/such/folder", "No such file")] {
        let config = ViewConfig {
            dir: Some(dir.into()),
            ..ViewConfig::default()
        };
        let e = run(&disk, &config).unwrap_err().to_string();
        assert!(e.contains(dir) && e.contains(word), "{e}");
    }
}

#[test]
fn a_stopped_walk_ends() {
    if !possible_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (disk, _) = three_runs(dir.path());
    let e = build(&disk, &ViewConfig::default(), MIB, &AtomicBool::new(true)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Os(libc::EINTR));
}

#[test]
fn a_view_is_not_in_the_mount_table() {
    if !possible_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (disk, _) = three_runs(dir.path());
    let view = run(&disk, &ViewConfig::default()).unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts
            .lines()
            .any(|l| l.contains(" - erofs ") || l.contains(" - ramfs ")),
        "{mounts}"
    );
    drop(view);
}
