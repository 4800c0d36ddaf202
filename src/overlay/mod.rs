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
//! | has no CID (raw) | `ddb.vmdkfuse.base`: size and path, `parentCID` a hash of them; `ddb.vmdkfuse.baseTime`: its mtime | any write, and a mere `touch` |
//!
//! The path is relative to the overlay's folder if the source lies in it or below, so that both can be moved together.
//! The mtime is compared although a `touch` changes it too: if data below an overlay change, they mix with the
//! overlay's, and the disk can't be restored. A `touch` only needs `degraded=cid` once.
//!
//! `ddb.vmdkfuse.commit` marks an unfinished commit: see `commit.rs`.

pub mod commit;
pub mod commit_command;

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::fchown;
use serde::Serialize;

use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::config::{DiskConfig, LocalConfig, Overlay, SourceConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::process;
use crate::store::{
    Access, ExtentName, Identity, Permissions, Store, StoredFile, make_user_path, open_user_path, unnamed,
};
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::{self, DeltaParent, NewDelta, OpenOptions, VmdkDisk};
use crate::volume::Source;

/// Key of the base's size and path in the disk data base, for a base without a CID.
const BASE_KEY: &str = "vmdkfuse.base";
/// Key of the base's mtime, for a base without a CID.
const BASE_TIME_KEY: &str = "vmdkfuse.baseTime";
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
    /// CID of the base that the overlay stores, or a hash if the base has no CID.
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
pub fn open_overlay(config: &DiskConfig, source: &Source, access: Access) -> Result<Option<VmdkDisk>> {
    let Some(overlay) = &config.overlay else {
        return Ok(None);
    };
    let base = Base::of(source, &config.source, overlay)?;
    // The options for the disk's files hold for the overlay's file too. A server's disk has no such options.
    let usual = LocalConfig::new("");
    let local = config.source.local().unwrap_or(&usual);
    match overlay {
        Overlay::Temporary => temporary(&base).map(Some),
        Overlay::File(path) => {
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
            open_overlay_of(file, &base, local, access).map(Some)
        }
    }
}

/// Opens the file of an overlay.
pub(super) fn overlay_file(path: &Path, local: &LocalConfig, access: Access) -> Result<Arc<dyn StoredFile>> {
    let policy = local.open_policy();
    open_user_path(path, policy, access).map_err(|e| e.within("overlay"))
}

/// Opens an overlay in `file`, which must belong to `base`. Nothing is changed before that is verified.
pub(super) fn open_overlay_of(
    file: Arc<dyn StoredFile>,
    base: &Base,
    local: &LocalConfig,
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
        accept_cid_mismatch: local.accept_cid_mismatch,
        force: local.force,
    };
    // For reading first: opening for writing may recover the file, which must not happen to a file that is no overlay.
    let overlay = VmdkDisk::open_alone(Arc::clone(&file), options, Access::Read)?;
    base.check(&overlay, local.accept_cid_mismatch)?;
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

/// Values by which an overlay recognizes its source.
#[derive(Debug)]
pub(super) struct Base {
    /// Path or URI as the user gave it, for messages.
    pub(super) label: String,
    /// Path as the overlay stores it: relative to its folder if the source lies in it or below, else absolute.
    path: PathBuf,
    sectors: u64,
    granule: u64,
    /// CID, if the source has one.
    pub(super) cid: Option<u32>,
    /// Time of the last change, as digits.
    time: String,
    /// Device and inode of each file. Not the files themselves, so that this does not keep them open or locked.
    files: Vec<(u64, u64)>,
    /// Permissions of the files, which a new overlay gets; `None` for a disk on a server.
    permissions: Option<Permissions>,
}

impl Base {
    /// Returns the values that `overlay` stores of `source`.
    pub(super) fn of(source: &Source, config: &SourceConfig, overlay: &Overlay) -> Result<Self> {
        let label = config.label();
        let real = match config {
            SourceConfig::Local(local) => fs::canonicalize(&local.path).map_err(|e| Error::io(label.clone(), e))?,
            SourceConfig::Nbd(_) | SourceConfig::Https(_) => PathBuf::from(&label),
        };
        let path = match folder_of(overlay).and_then(|folder| real.strip_prefix(folder).ok()) {
            Some(relative) => relative.to_path_buf(),
            None => real,
        };
        let geometry = source.disk().geometry();
        let cid = match source {
            Source::Vmdk(disk) => disk.descriptor().and_then(|d| d.cid).filter(|&cid| cid != NO_CID),
            _ => None,
        };
        let files = source.files();
        let time = last_change(files.iter().map(|file| (file, file.identity_at_open())));
        let permissions = Permissions::of(&files);
        let files = files.iter().map(|file| file.identity_at_open().file).collect();
        Ok(Self {
            label,
            path,
            sectors: geometry.sectors,
            granule: geometry.granule,
            cid,
            time,
            files,
            permissions,
        })
    }

    /// Returns size and path as text, for a base without a CID.
    fn identity(&self) -> String {
        format!("{} sectors of {}", self.sectors, percent_encode(&self.path))
    }

    /// Stores in the overlay the current mtime of `files`, the files of the base, after a commit has written to them.
    /// Does nothing for a base with a CID.
    pub(super) fn renew_time(&self, delta: &VmdkDisk, files: &[Arc<dyn StoredFile>]) -> Result<()> {
        if self.cid.is_some() {
            return Ok(());
        }
        let now: Vec<_> = files
            .iter()
            .map(|file| Ok((file, file.identity()?)))
            .collect::<Result<_>>()?;
        delta.rewrite(&format!("ddb.{BASE_TIME_KEY}"), &last_change(now.into_iter()))
    }

    /// Checks that `delta` is an overlay over this base. With `accept` the base may have changed since, and a warning
    /// is logged instead; the size must match in any case.
    fn check(&self, delta: &VmdkDisk, accept: bool) -> Result<()> {
        let (label, descriptor) = (label(delta), descriptor(delta)?);
        let Some(parent) = &descriptor.parent else {
            let context =
                format!("{label}: is not an overlay: it has no parent (parentCID); cow= takes a delta, or a new file");
            return Err(Error::new(ErrorKind::Usage, context));
        };
        let sectors = delta.geometry().sectors;
        if sectors != self.sectors {
            return Err(Error::corrupt(format!(
                "{label}: is an overlay over a disk of {sectors} sectors ({}), but {} has {} sectors",
                parent.hint.name(),
                self.label,
                self.sectors
            )));
        }
        self.check_grain(delta, &label)?;
        let mark = mark_of(descriptor);
        if mark.is_some() {
            let base = &self.label;
            tracing::warn!("{label}: a commit to {base} was started and not finished; --commit completes it");
        }
        let Some(message) = self.difference(descriptor, parent.cid.unwrap_or(NO_CID), mark, &label) else {
            return Ok(());
        };
        if accept {
            tracing::warn!("{message}; accepted because of degraded=cid");
            return Ok(());
        }
        Err(Error::corrupt(format!("{message} (degraded=cid accepts it anyway)")))
    }

    /// Checks that a grain is not smaller than a granule of the base. The rest of a new grain is read from the base,
    /// and such a read must be whole granules.
    fn check_grain(&self, delta: &VmdkDisk, label: &str) -> Result<()> {
        let grain = delta.info().extents.iter().filter_map(|extent| extent.grain).min();
        match grain {
            Some(grain) if grain < self.granule * SECTOR => Err(Error::unsupported(format!(
                "{label}: has grains of {grain} bytes, expected at least the {1} bytes in which {0} is read",
                self.label,
                self.granule * SECTOR
            ))),
            _ => Ok(()),
        }
    }

    /// Returns a message if the overlay was created over another disk, or over another content of this one.
    fn difference(&self, descriptor: &Descriptor, parent_cid: u32, mark: Option<&str>, label: &str) -> Option<String> {
        let base = &self.label;
        if let Some(cid) = self.cid {
            let (cid, expected) = (cid_text(cid), cid_text(parent_cid));
            // During a commit the base has the old CID (the mark), the next one (parentCID), or a mixture of both.
            let fits = cid == expected || mark.is_some_and(|mark| is_mixture(&cid, mark, &expected));
            return (!fits).then(|| {
                format!(
                    "{label}: is an overlay over a disk with the CID {expected}, but {base} has the CID {cid}: it is \
                     another disk, or was changed since the overlay was created"
                )
            });
        }
        let (identity, expected) = (self.identity(), descriptor.ddb_value(BASE_KEY));
        if expected != Some(&identity) {
            let expected = expected.map_or_else(
                || format!("a disk with the CID {}", cid_text(parent_cid)),
                str::to_owned,
            );
            return Some(format!(
                "{label}: is an overlay over {expected}, but {base} is {identity}"
            ));
        }
        // An unfinished commit has changed the mtime on its own.
        let changed = mark.is_none() && descriptor.ddb_value(BASE_TIME_KEY) != Some(&self.time);
        changed.then(|| {
            format!(
                "{label}: is an overlay over {base}, which was changed since the overlay was created (by its mtime)"
            )
        })
    }

    /// Returns a new delta over this base.
    fn delta(&self) -> Result<NewDelta> {
        let hint = self.path.to_string_lossy();
        let hint: String = hint
            .chars()
            .map(|c| if c.is_control() || c == '"' { '_' } else { c })
            .collect();
        let mut ddb = vec![(MARK.to_owned(), NO_MARK.to_owned())];
        if self.cid.is_none() {
            ddb.push((BASE_KEY.to_owned(), self.identity()));
            ddb.push((BASE_TIME_KEY.to_owned(), self.time.clone()));
        }
        let cid = self.cid.unwrap_or_else(|| hash_cid(&self.identity()));
        Ok(NewDelta {
            sectors: self.sectors,
            grain: grain_size(self.sectors, self.granule),
            // Version 1 until a zeroed grain is needed: libvmdk and VirtualBox read no other.
            zeroed_grains: false,
            parent: Some(DeltaParent { cid, hint }),
            ddb,
        })
    }
}

/// Returns the latest mtime of the files as digits. Devices do not count: their mtime does not show writes.
fn last_change<'a>(files: impl Iterator<Item = (&'a Arc<dyn StoredFile>, Identity)>) -> String {
    let times = files
        .filter(|(file, _)| file.detects_modification())
        .map(|(_, identity)| identity.mtime_ns);
    format!("{:020}", times.max().unwrap_or(0).max(0))
}

/// Returns the folder that holds the overlay's file, or will hold it.
fn folder_of(overlay: &Overlay) -> Option<PathBuf> {
    let Overlay::File(path) = overlay else { return None };
    let real = fs::canonicalize(path).ok();
    let real = real.or_else(|| Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?)));
    real.and_then(|real| real.parent().map(Path::to_path_buf))
}

/// Creates the overlay `path`. If another process creates a file there meanwhile, that file stays and is not an error:
/// it is opened and checked like any other.
fn create_overlay(path: &Path, base: &Base) -> Result<()> {
    let delta = base.delta()?;
    let create = |store: &dyn Store, name: &ExtentName| {
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
        accept_cid_mismatch: false,
        force: true,
    };
    VmdkDisk::open_alone(store.open(&name, Access::Write)?, options, Access::Write)
}

/// Returns the sectors of a grain for a new overlay over a disk of `sectors` with granules of `granule` sectors.
fn grain_size(sectors: u64, granule: u64) -> u64 {
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

/// Returns true if each digit of `cid` is that of `one` or `other`: the result of an interrupted in-place change of one
/// into the other.
fn is_mixture(cid: &str, one: &str, other: &str) -> bool {
    let same_length = cid.len() == one.len() && cid.len() == other.len();
    same_length
        && cid
            .bytes()
            .zip(one.bytes().zip(other.bytes()))
            .all(|(c, (a, b))| c == a.to_ascii_lowercase() || c == b)
}

/// Percent-encodes a path for the value of a setting: a quote, `%`, and bytes that are not printable ASCII.
fn percent_encode(path: &Path) -> String {
    let mut out = String::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'"' | b'%' => out.push_str(&format!("%{byte:02x}")),
            b' '..=b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02x}")),
        }
    }
    out
}

/// Returns a CID that is a hash of `text`.
fn hash_cid(text: &str) -> u32 {
    // Below 2^31, as the two highest CIDs are reserved.
    libdeflater::crc32(text.as_bytes()) & 0x7fff_ffff
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

    #[test]
    fn an_interrupted_change_of_a_cid_is_a_mixture_of_both() {
        assert!(!is_mixture("12cd56ef", "12345678", "abcd12ee"));
        assert!(is_mixture("12cd56ef", "12345678", "abcd90ef"));
        assert!(is_mixture("12345678", "12345678", "abcd90ef"));
        assert!(!is_mixture("12345679", "12345678", "abcd90ef"));
        assert!(!is_mixture("12345678", "--------", "abcd90ef"));
    }

    #[test]
    fn any_path_is_a_valid_setting() {
        assert_eq!(percent_encode(Path::new("/a b/c.img")), "/a b/c.img");
        assert_eq!(percent_encode(Path::new("\"ä%\n")), "%22%c3%a4%25%0a");
    }
}
