//! Overlay of a disk: a delta in a file of its own, which takes the writes, over a source that is only read
//! (copy-on-write).
//!
//! ```text
//!   volume ─► delta (VMDK, writable) ─ allocated? ─yes─► its grains
//!                                         └no─► source, with its cache if it has one
//! ```
//! The delta is a hosted sparse VMDK whose parent is the source. If the source is a VMDK, other programs can read the
//! chain too. The overlay must belong to exactly this content of the source, or the disk would be garbage:
//!
//! | source | stored in the delta | changed by |
//! | --- | --- | --- |
//! | has a CID | `parentCID` | every writer that keeps to the format |
//! | has no CID (raw) | `ddb.vmdkfuse.base`: size and path, `parentCID=00000000`; `ddb.vmdkfuse.baseTime`: its mtime | any write, and a mere `touch` |
//! | has no mtime either (an export, a device) | `ddb.vmdkfuse.base`: size and whole address; `ddb.vmdkfuse.baseDigest`: a digest of sampled blocks | most writes |
//!
//! The path is relative to the overlay's folder if the source lies in it or below, so that both can be moved together.
//! The mtime is compared although a `touch` changes it too: if data below an overlay change, they mix with the
//! overlay's, and the disk can't be restored. A `touch` only needs `degraded=cid` once.
//!
//! `ddb.vmdkfuse.commit` marks an unfinished commit: see `commit.rs`.

mod base;
mod base_mark;
pub mod commit;
pub mod commit_command;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::fchown;
use serde::Serialize;

use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::config::{DiskConfig, LocalConfig, Overlay};
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::base::Base;
pub(crate) use crate::overlay::base_mark::unfinished_commits;
use crate::process;
use crate::source::Source;
use crate::store::{Access, ExtentName, Store, StoredFile, make_user_path, open_user_path, unnamed};
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::{self, OpenOptions, VmdkDisk};

/// Key of the mark of an unfinished commit.
pub(super) const MARK: &str = vmdk::COMMIT_MARK;

/// Value of the mark without a commit. It has the length of a CID, which replaces it in place.
pub(super) const NO_MARK: &str = "--------";

/// CID that means "no CID".
const NO_CID: u32 = 0xffff_ffff;

/// Smallest grain in sectors: 8 KiB. A small write to a new grain writes the whole grain, so small grains are faster.
const MIN_GRAIN: u64 = 16;
/// Grain of other programs in sectors: 64 KiB. For disks above 128 GiB, whose tables would take long to check.
const USUAL_GRAIN: u64 = 128;
/// Maximum number of tables with grains below the usual size: 64 MiB of tables.
const MANY_TABLES: u64 = 1 << 15;
/// Maximum number of tables with any grain: a directory of 4 MiB in memory.
const MAX_TABLES: u64 = 1 << 19;
/// Entries of a table.
const ENTRIES: u64 = 512;

/// Description of an overlay for `--info`. The names of the fields are those of the JSON output.
#[derive(Debug, Clone, Serialize)]
pub struct OverlayInfo {
    /// File of the overlay.
    pub file: String,
    /// Bytes of the disk that the overlay holds: data, and zeroes that hide the base.
    pub changed: u64,
    /// CID of the base that the overlay stores, or 0 if the base has none.
    pub parent_cid: Option<String>,
    /// True if the overlay was not closed after writing.
    pub unclean: bool,
    /// True if a commit to the base was started and not finished.
    pub unfinished_commit: bool,
}

/// Opens the overlay of a disk over `source`, without the source below it. Returns `None` if the disk has no overlay.
/// For writing, an overlay that does not exist is created.
///
/// Errors: `Corrupt` if it belongs to another base, `Usage` if it is not an overlay, `Busy` if another process uses it,
/// `NotFound` for reading if it does not exist, those of the engine and of I/O.
pub fn open_overlay(config: &DiskConfig, source: &dyn Source, access: Access) -> Result<Option<VmdkDisk>> {
    let Some(overlay) = &config.overlay else {
        return Ok(None);
    };
    let base = Base::of(source, overlay)?;
    // The options for the disk's files hold for the overlay's file too. A server's disk has no such options.
    let usual = LocalConfig::new("");
    let local = config.source.local().unwrap_or(&usual);
    let accept = config.source.settings().accepts_cid_mismatch();
    match overlay {
        Overlay::Temporary => temporary(&base).map(Some),
        Overlay::File(path) => {
            // Without following a link: a dangling one is not "absent", and no file is created where it points to.
            let absent = || fs::symlink_metadata(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
            if absent() {
                match access {
                    Access::Write => create_overlay(path, &base)?,
                    Access::Read | Access::Peek => {
                        let context = format!(
                            "{}: the overlay does not exist, and with readonly=true it is not created",
                            path.display()
                        );
                        return Err(Error::new(ErrorKind::NotFound, context));
                    }
                }
            }
            let file = overlay_file(path, local, access)?;
            open_overlay_of(file, &base, (local.force, accept), access).map(Some)
        }
    }
}

/// Opens the file of an overlay.
pub(super) fn overlay_file(path: &Path, local: &LocalConfig, access: Access) -> Result<Arc<dyn StoredFile>> {
    let policy = local.open_policy();
    open_user_path(path, policy, access).map_err(|e| e.within("overlay"))
}

/// Opens an overlay in `file`, which must belong to `base`. Nothing is changed before that is verified.
///
/// `accept`: the base may have changed since.
fn open_overlay_of(
    file: Arc<dyn StoredFile>,
    base: &Base,
    (force, accept): (bool, bool),
    access: Access,
) -> Result<VmdkDisk> {
    if base.files.contains(&file.identity_at_open().file) {
        let context = format!(
            "{}: is a file of the disk itself and can't be its overlay too",
            file.label()
        );
        return Err(Error::new(ErrorKind::Usage, context));
    }
    let options = OpenOptions {
        force,
        ..OpenOptions::default()
    };
    // For reading first: opening for writing may recover the file, which must not happen to a file that is no overlay.
    let overlay = VmdkDisk::open_alone(Arc::clone(&file), options.clone(), Access::Read)?;
    base.check(&overlay, accept)?;
    match access {
        Access::Read | Access::Peek => Ok(overlay),
        Access::Write => {
            drop(overlay);
            VmdkDisk::open_alone(file, options, access)
        }
    }
}

/// Describes an overlay that was opened alone. Reads all its tables.
pub fn describe_overlay(delta: &VmdkDisk) -> Result<OverlayInfo> {
    let descriptor = descriptor(delta)?;
    Ok(OverlayInfo {
        file: label(delta),
        changed: changed_sectors(delta)? * SECTOR,
        parent_cid: descriptor.parent.as_ref().and_then(|parent| parent.cid).map(cid_text),
        unclean: delta.unclean_files().next().is_some(),
        unfinished_commit: mark_of(descriptor).is_some(),
    })
}

/// Returns the number of sectors that an overlay itself holds. Reads all its tables.
pub(super) fn changed_sectors(delta: &VmdkDisk) -> Result<u64> {
    let mut sum = 0;
    for_each_change(delta, |_, sectors, _| {
        sum += sectors;
        Ok(true)
    })?;
    Ok(sum)
}

/// Calls `each` for every range that an overlay, opened alone, itself holds, with its start, its sectors, and true if
/// they are zeroes. Stops when `each` returns false.
pub(super) fn for_each_change(delta: &VmdkDisk, mut each: impl FnMut(Lba, u64, bool) -> Result<bool>) -> Result<()> {
    let end = delta.geometry().sectors;
    let mut at = Lba(0);
    while at.0 < end {
        let (content, sectors) = delta.content_at(at)?;
        let continues = match content {
            // Opened alone, the overlay has no parent: a hole is a range that the base answers for.
            Content::Hole => true,
            content => each(at, sectors, content == Content::Zero)?,
        };
        if !continues {
            return Ok(());
        }
        at = at + sectors.max(1);
    }
    Ok(())
}

/// Returns the descriptor of an overlay.
pub(super) fn descriptor(delta: &VmdkDisk) -> Result<&Descriptor> {
    delta
        .descriptor()
        .ok_or_else(|| Error::corrupt("an overlay without a descriptor"))
}

/// Returns the mark of an unfinished commit, or `None` if there is none.
pub(super) fn mark_of(descriptor: &Descriptor) -> Option<&str> {
    descriptor
        .ddb_value(MARK)
        .filter(|mark| mark.bytes().any(|b| b != b'-'))
}

/// Formats a CID as in a descriptor.
pub(super) fn cid_text(cid: u32) -> String {
    format!("{cid:08x}")
}

/// Returns the file of an overlay for messages.
pub(super) fn label(delta: &VmdkDisk) -> String {
    delta
        .files()
        .first()
        .map(|file| file.label().to_owned())
        .unwrap_or_default()
}

/// Creates the overlay `path`. If another process creates a file there meanwhile, that file stays and is not an error:
/// it is opened and checked like any other.
fn create_overlay(path: &Path, base: &Base) -> Result<()> {
    let delta = base.delta()?;
    let create = |store: &dyn Store, name: &ExtentName| {
        // Still in a private folder (`make_user_path`), so that no other process sees the file with the wrong owner or
        // mode.
        vmdk::create_delta(store, name, &delta)?;
        give_permissions(&*store.open(name, Access::Read)?, base)
    };
    match make_user_path(path, create) {
        Err(e) if e.kind() == ErrorKind::Os(libc::EEXIST) => Ok(()),
        done => done.map_err(|e| e.within("overlay")),
    }
}

/// Gives a new overlay, which no other process can reach yet, the mode of its base, and for root its owner too: it holds
/// data of the same disk. Its owner may write to it.
fn give_permissions(overlay: &dyn StoredFile, base: &Base) -> Result<()> {
    let (Some(wanted), Some(fd)) = (base.permissions, overlay.fd()) else {
        return Ok(());
    };
    let context = |e: Errno| Error::io(format!("{}: owner and mode of the base", overlay.label()), e.into());
    if nix::unistd::geteuid().is_root() {
        fchown(fd, Some(wanted.uid.into()), Some(wanted.gid.into())).map_err(context)?;
    }
    let group = fstat(fd).map_err(context)?.st_gid;
    let mode = Mode::from_bits_truncate(wanted.mode_for_group(group));
    fchmod(fd, mode).map_err(context)
}

/// Creates a temporary overlay in unnamed files, which the kernel removes when this process ends.
fn temporary(base: &Base) -> Result<VmdkDisk> {
    let folder = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty());
    let folder = folder.map_or_else(|| PathBuf::from("/var/tmp"), |dir| process::start_dir().join(dir));
    let store: Arc<dyn Store> = unnamed(&folder, "temporary overlay")?;
    let name = ExtentName::new("overlay.vmdk")?;
    vmdk::create_delta(&*store, &name, &base.delta()?)?;
    // `force` skips the search for children: no folder holds the overlay, so there is none to search.
    let options = OpenOptions {
        force: true,
        ..OpenOptions::default()
    };
    VmdkDisk::open_alone(store.open(&name, Access::Write)?, options, Access::Write)
}

/// Returns the sectors of a grain for a new overlay over a disk of `sectors` with granules of `granule` sectors.
fn grain_size(sectors: u64, granule: u64) -> u64 {
    // At least a granule of the base: the rest of a new grain is read from the base in whole granules.
    let mut grain = MIN_GRAIN.max(granule.next_power_of_two());
    loop {
        let tables = sectors.div_ceil(grain * ENTRIES);
        if tables > MAX_TABLES || (tables > MANY_TABLES && grain < USUAL_GRAIN) {
            grain *= 2;
        } else {
            return grain;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grains_are_small_and_tables_few() {
        const GIB: u64 = 1 << 21;
        assert_eq!(grain_size(1, 1), 16);
        assert_eq!(grain_size(128 * GIB, 1), 16);
        assert_eq!(grain_size(128 * GIB + 1, 1), 32);
        assert_eq!(grain_size(1024 * GIB, 8), 128);
        assert_eq!(
            grain_size(8 * 1024 * GIB, 1),
            128,
            "the usual grain is enough up to here"
        );
        assert_eq!(grain_size(1, 64), 64, "at least a granule of the base");
        for tib in [16, 62] {
            assert!((tib * 1024 * GIB).div_ceil(grain_size(tib * 1024 * GIB, 1) * ENTRIES) <= MAX_TABLES);
        }
    }
}
