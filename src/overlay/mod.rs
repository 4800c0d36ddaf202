//! The overlay of a disk: a delta in a file of its own, which takes the writes, over a source that is only read.
//!
//! ```text
//!   image ─► delta (vmdk, writable) ─ has it? ─yes─► its grains
//!                                      └no─► source, with its cache where it has one
//! ```
//! The delta is a hosted sparse VMDK whose parent is the source, so other programs read the chain as well where the
//! source is a VMDK. What ties the two together:
//!
//! | source | in the delta | says that it is another one |
//! | --- | --- | --- |
//! | has a CID | `parentCID` | every writer that keeps to the format, ours and others |
//! | has none (raw) | `ddb.vmdkfuse.base`: size and path, `parentCID` a hash of them; `ddb.vmdkfuse.baseTime`: its mtime | any write, and a mere `touch` |
//!
//! A path counts from the overlay's folder where the source lies there or below, so that both can be moved together. The
//! mtime is compared although a `touch` changes it too: data that changed below an overlay mix with those in it, and
//! there is no way back from that, while `degraded=cid` is a way past a `touch`.
//!
//! `ddb.vmdkfuse.commit` marks a commit that was begun and not finished: see `commit.rs`.

pub mod commit;
pub mod commit_command;

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::config::{DiskConfig, LocalConfig, Overlay, SourceConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{
    Access, ExtentName, Identity, OpenPolicy, Store, StoredFile, make_user_path, open_user_path, unnamed,
};
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::{self, DeltaParent, NewDelta, OpenOptions, VmdkDisk};
use crate::volume::Source;

/// Entries of the disk data base: the base of an overlay whose base has no CID, its mtime, and the mark of a commit.
const BASE: &str = "vmdkfuse.base";
const TIME: &str = "vmdkfuse.baseTime";
pub(super) const MARK: &str = vmdk::COMMIT_MARK;

/// The mark where there is no commit. As long as a CID, which takes its place.
pub(super) const NO_MARK: &str = "--------";

/// Stands for "no CID".
const NO_CID: u32 = 0xffff_ffff;

/// Sectors of a grain: 8 KiB, as a write to a new grain writes the whole of it.
const GRAIN: u64 = 16;
/// As other programs make them: for disks of more than 128 GiB, whose tables would take long to check.
const USUAL_GRAIN: u64 = 128;
/// Tables from which on grains get larger: 64 MiB of them.
const MANY_TABLES: u64 = 1 << 15;
/// Tables from which on even usual grains do: a directory of 4 MiB in memory.
const MOST_TABLES: u64 = 1 << 19;
/// Entries of a table.
const ENTRIES: u64 = 512;

/// What an overlay is, for `--info`.
#[derive(Debug, Clone, Serialize)]
pub struct OverlayInfo {
    /// Its file.
    pub file: String,
    /// Bytes of the disk that it holds: data, and zeroes that hide the base.
    pub changed: u64,
    /// The CID that it remembers of its base, or a hash where the base has none.
    pub parent_cid: Option<String>,
    /// It was not closed after writing.
    pub unclean: bool,
    /// A commit to its base was begun and not finished.
    pub unfinished_commit: bool,
}

/// Opens the overlay of a disk over `source`, without the source below it; `None`: it has none. For writing one that is
/// absent is made.
///
/// Errors: `Corrupt` where it belongs to another base, `Usage` where it is no overlay, `Busy` where somebody uses it,
/// `NotFound` for reading, or what the engine or the system says.
pub fn open_overlay(config: &DiskConfig, source: &Source, access: Access) -> Result<Option<VmdkDisk>> {
    let Some(overlay) = &config.overlay else {
        return Ok(None);
    };
    let base = Base::of(source, &config.source, overlay)?;
    // what is said of a disk's files holds for its overlay's; a server's disk has none
    let usual = LocalConfig::new("");
    let local = config.source.local().unwrap_or(&usual);
    match overlay {
        Overlay::Temporary => temporary(&base).map(Some),
        Overlay::File(path) => {
            let absent = || fs::symlink_metadata(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
            if absent() {
                match access {
                    Access::Write => make(path, &base)?,
                    Access::Read => {
                        let context = format!(
                            "{}: there is no such overlay, and for reading none is made",
                            path.display()
                        );
                        return Err(Error::new(ErrorKind::NotFound, context));
                    }
                }
            }
            let file = overlay_file(path, local, access)?;
            open_tied(file, &base, local, access).map(Some)
        }
    }
}

/// Opens the file of an overlay.
pub(super) fn overlay_file(path: &Path, local: &LocalConfig, access: Access) -> Result<Arc<dyn StoredFile>> {
    let policy = OpenPolicy {
        allow: local.allow_dirs.clone(),
        lock: local.lock,
    };
    open_user_path(path, Arc::new(policy), access).map_err(|e| e.within("overlay"))
}

/// Opens an overlay in `file` that must belong to `base`. Nothing is changed before that is known.
pub(super) fn open_tied(
    file: Arc<dyn StoredFile>,
    base: &Base,
    local: &LocalConfig,
    access: Access,
) -> Result<VmdkDisk> {
    if base.files.contains(&file.identity_at_open().file) {
        let context = format!(
            "{}: is a file of the disk itself and can't be its overlay",
            file.label()
        );
        return Err(Error::new(ErrorKind::Usage, context));
    }
    let options = OpenOptions {
        accept_cid_mismatch: local.accept_cid_mismatch,
        force: local.force,
    };
    let seen = VmdkDisk::open_alone(Arc::clone(&file), options, Access::Read)?;
    base.check(&seen, local.accept_cid_mismatch)?;
    match access {
        Access::Read => Ok(seen),
        Access::Write => {
            drop(seen);
            VmdkDisk::open_alone(file, options, access)
        }
    }
}

/// Describes an overlay that was opened alone; reads its tables.
pub fn describe_overlay(delta: &VmdkDisk) -> Result<OverlayInfo> {
    let descriptor = descriptor(delta)?;
    Ok(OverlayInfo {
        file: label(delta),
        changed: changed(delta)? * SECTOR,
        parent_cid: descriptor.parent.as_ref().map(|parent| digits(parent.cid)),
        unclean: delta.unclean_files().next().is_some(),
        unfinished_commit: mark_of(descriptor).is_some(),
    })
}

/// Sectors that an overlay has itself.
pub(super) fn changed(delta: &VmdkDisk) -> Result<u64> {
    let mut sum = 0;
    each_change(delta, |_, sectors, _| {
        sum += sectors;
        Ok(true)
    })?;
    Ok(sum)
}

/// Gives `each` the ranges that an overlay, opened alone, has itself: start, sectors, whether they are zeroes. It stops
/// where `each` says false.
pub(super) fn each_change(delta: &VmdkDisk, mut each: impl FnMut(Lba, u64, bool) -> Result<bool>) -> Result<()> {
    let end = delta.geometry().sectors;
    let mut at = Lba(0);
    while at.0 < end {
        let (content, sectors) = delta.content_at(at)?;
        let go_on = match content {
            // nothing is below here: a hole is what the base shows
            Content::Hole => true,
            content => each(at, sectors, content == Content::Zero)?,
        };
        if !go_on {
            return Ok(());
        }
        at = at + sectors.max(1);
    }
    Ok(())
}

/// The descriptor of a disk that has one.
pub(super) fn descriptor(delta: &VmdkDisk) -> Result<&Descriptor> {
    delta
        .descriptor()
        .ok_or_else(|| Error::corrupt("an overlay without a descriptor"))
}

/// What a commit that was begun and not finished left in the descriptor.
pub(super) fn mark_of(descriptor: &Descriptor) -> Option<&str> {
    descriptor
        .ddb_value(MARK)
        .filter(|mark| mark.bytes().any(|b| b != b'-'))
}

/// A CID as descriptors have it.
pub(super) fn digits(cid: u32) -> String {
    format!("{cid:08x}")
}

/// The file of an overlay, for messages.
pub(super) fn label(delta: &VmdkDisk) -> String {
    delta
        .files()
        .first()
        .map(|file| file.label().to_owned())
        .unwrap_or_default()
}

/// What an overlay remembers of its source.
#[derive(Debug)]
pub(super) struct Base {
    /// Its path as the user said it.
    pub(super) shown: String,
    /// Its path as the overlay remembers it: from its own folder where it lies there or below, else the whole.
    path: PathBuf,
    sectors: u64,
    granule: u64,
    /// Its CID, where it has one that tells something.
    pub(super) cid: Option<u32>,
    /// When it was changed last, as digits.
    time: String,
    /// Which files it is made of; none of them is kept open by this.
    files: Vec<(u64, u64)>,
}

impl Base {
    /// What `overlay` is to remember of `source`.
    pub(super) fn of(source: &Source, config: &SourceConfig, overlay: &Overlay) -> Result<Self> {
        let shown = config.label();
        let real = match config {
            SourceConfig::Local(local) => fs::canonicalize(&local.path).map_err(|e| Error::io(shown.clone(), e))?,
            SourceConfig::Nbd(_) => PathBuf::from(&shown),
        };
        let path = match folder_of(overlay).and_then(|folder| real.strip_prefix(folder).ok()) {
            Some(below) => below.to_path_buf(),
            None => real,
        };
        let geometry = source.disk().geometry();
        let cid = match source {
            Source::Vmdk(disk) => disk.descriptor().and_then(|d| d.cid).filter(|&cid| cid != NO_CID),
            _ => None,
        };
        let files = source.files();
        let time = last_change(files.iter().map(|file| (file, file.identity_at_open())));
        let files = files.iter().map(|file| file.identity_at_open().file).collect();
        Ok(Self {
            shown,
            path,
            sectors: geometry.sectors,
            granule: geometry.granule,
            cid,
            time,
            files,
        })
    }

    /// Size and path as text, for a base without a CID.
    fn identity(&self) -> String {
        format!("{} sectors of {}", self.sectors, plain(&self.path))
    }

    /// Notes in the overlay the state in which a commit left `files`, those of a base without a CID.
    pub(super) fn renew_time(&self, delta: &VmdkDisk, files: &[Arc<dyn StoredFile>]) -> Result<()> {
        if self.cid.is_some() {
            return Ok(());
        }
        let now: Vec<_> = files
            .iter()
            .map(|file| Ok((file, file.identity()?)))
            .collect::<Result<_>>()?;
        delta.rewrite(&format!("ddb.{TIME}"), &last_change(now.into_iter()))
    }

    /// Checks that `delta` is an overlay over this very disk. `accept`: it may have changed since.
    fn check(&self, delta: &VmdkDisk, accept: bool) -> Result<()> {
        let (label, descriptor) = (label(delta), descriptor(delta)?);
        let Some(parent) = &descriptor.parent else {
            let context =
                format!("{label}: is no overlay, as it has no parent (parentCID); cow= names a delta, or a new file");
            return Err(Error::new(ErrorKind::Usage, context));
        };
        let sectors = delta.geometry().sectors;
        if sectors != self.sectors {
            return Err(Error::corrupt(format!(
                "{label}: is an overlay over a disk of {sectors} sectors ({}), but {} has {} sectors",
                parent.hint.name(),
                self.shown,
                self.sectors
            )));
        }
        self.check_grain(delta, &label)?;
        let mark = mark_of(descriptor);
        if mark.is_some() {
            let base = &self.shown;
            tracing::warn!("{label}: a commit to {base} was begun and not finished; --commit completes it");
        }
        let Some(message) = self.difference(descriptor, parent.cid, mark, &label) else {
            return Ok(());
        };
        if accept {
            tracing::warn!("{message}; accepted, as degraded=cid says");
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "{message} (degraded=cid accepts it all the same)"
        )))
    }

    /// A part of a grain that is new is read from the base, in the base's units.
    fn check_grain(&self, delta: &VmdkDisk, label: &str) -> Result<()> {
        let grain = delta.info().extents.iter().filter_map(|extent| extent.grain).min();
        match grain {
            Some(grain) if grain < self.granule * SECTOR => Err(Error::unsupported(format!(
                "{label}: has grains of {grain} bytes, but {} is read in units of {} bytes",
                self.shown,
                self.granule * SECTOR
            ))),
            _ => Ok(()),
        }
    }

    /// What tells that the overlay was made over another disk, or another state of this one.
    fn difference(&self, descriptor: &Descriptor, parent_cid: u32, mark: Option<&str>, label: &str) -> Option<String> {
        let base = &self.shown;
        if let Some(cid) = self.cid {
            let (cid, wanted) = (digits(cid), digits(parent_cid));
            let fits = cid == wanted || mark.is_some_and(|mark| is_between(&cid, mark, &wanted));
            return (!fits).then(|| {
                format!(
                    "{label}: is an overlay over a disk with the CID {wanted}, but {base} has the CID {cid}: it is \
                     another disk, or was changed since the overlay was made"
                )
            });
        }
        let (identity, wanted) = (self.identity(), descriptor.ddb_value(BASE));
        if wanted != Some(&identity) {
            let wanted = wanted.map_or_else(|| format!("a disk with the CID {}", digits(parent_cid)), str::to_owned);
            return Some(format!(
                "{label}: is an overlay over {wanted}, but {base} is {identity}"
            ));
        }
        // a commit changes it
        let changed = mark.is_none() && descriptor.ddb_value(TIME) != Some(&self.time);
        changed.then(|| {
            format!("{label}: is an overlay over {base}, which was changed since the overlay was made (by its mtime)")
        })
    }

    /// A new delta over it.
    fn delta(&self) -> Result<NewDelta> {
        let hint = self.path.to_string_lossy();
        let hint: String = hint
            .chars()
            .map(|c| if c.is_control() || c == '"' { '_' } else { c })
            .collect();
        let mut ddb = vec![(MARK.to_owned(), NO_MARK.to_owned())];
        if self.cid.is_none() {
            ddb.push((BASE.to_owned(), self.identity()));
            ddb.push((TIME.to_owned(), self.time.clone()));
        }
        let cid = self.cid.unwrap_or_else(|| hash(&self.identity()));
        Ok(NewDelta {
            sectors: self.sectors,
            grain: grain(self.sectors, self.granule),
            zeroed_grains: true,
            parent: Some(DeltaParent { cid, hint }),
            ddb,
        })
    }
}

/// The last change of files of which all that can tell are asked, as digits.
fn last_change<'a>(files: impl Iterator<Item = (&'a Arc<dyn StoredFile>, Identity)>) -> String {
    let times = files
        .filter(|(file, _)| file.detects_modification())
        .map(|(_, identity)| identity.mtime_ns);
    format!("{:020}", times.max().unwrap_or(0).max(0))
}

/// The folder that holds the overlay's file, or will hold it.
fn folder_of(overlay: &Overlay) -> Option<PathBuf> {
    let Overlay::File(path) = overlay else { return None };
    let real = fs::canonicalize(path).ok();
    let real = real.or_else(|| Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?)));
    real.and_then(|real| real.parent().map(Path::to_path_buf))
}

/// Makes the overlay `path`. Another one that appears meanwhile stays.
fn make(path: &Path, base: &Base) -> Result<()> {
    let delta = base.delta()?;
    match make_user_path(path, |store, name| vmdk::create_delta(store, name, &delta)) {
        Err(e) if e.kind() == ErrorKind::Os(libc::EEXIST) => Ok(()),
        done => done.map_err(|e| e.within("overlay")),
    }
}

/// An overlay that nobody sees and that ends with this process.
fn temporary(base: &Base) -> Result<VmdkDisk> {
    let folder = std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or("/var/tmp".into(), PathBuf::from);
    let store: Arc<dyn Store> = unnamed(&folder, "temporary overlay")?;
    let name = ExtentName::new("overlay.vmdk")?;
    vmdk::create_delta(&*store, &name, &base.delta()?)?;
    // no folder holds it, so none has children of it
    let options = OpenOptions {
        accept_cid_mismatch: false,
        force: true,
    };
    VmdkDisk::open_alone(store.open(&name, Access::Write)?, options, Access::Write)
}

/// Sectors of a grain of a new overlay over a disk of `sectors` that is read in units of `granule`.
fn grain(sectors: u64, granule: u64) -> u64 {
    let mut grain = GRAIN.max(granule.next_power_of_two());
    loop {
        let tables = sectors.div_ceil(grain * ENTRIES);
        if tables > MOST_TABLES || (tables > MANY_TABLES && grain < USUAL_GRAIN) {
            grain *= 2;
        } else {
            return grain;
        }
    }
}

/// Whether each digit of `cid` is that of one of both: what is left where a change of one into the other was cut short.
fn is_between(cid: &str, one: &str, other: &str) -> bool {
    let same_length = cid.len() == one.len() && cid.len() == other.len();
    same_length
        && cid
            .bytes()
            .zip(one.bytes().zip(other.bytes()))
            .all(|(c, (a, b))| c == a.to_ascii_lowercase() || c == b)
}

/// A path as text for the value of a setting: what can't stand there is written as `%` and two digits.
fn plain(path: &Path) -> String {
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

/// A CID that stands for a text.
fn hash(text: &str) -> u32 {
    // the two highest have a meaning of their own
    libdeflater::crc32(text.as_bytes()) & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grains_are_small_and_tables_few() {
        const GIB: u64 = 1 << 21;
        assert_eq!(grain(1, 1), 16);
        assert_eq!(grain(128 * GIB, 1), 16);
        assert_eq!(grain(128 * GIB + 1, 1), 32);
        assert_eq!(grain(1024 * GIB, 8), 128);
        assert_eq!(grain(8 * 1024 * GIB, 1), 128, "the usual size does for long");
        assert_eq!(grain(1, 64), 64, "the base is read in its own units");
        for tib in [16, 62] {
            assert!((tib * 1024 * GIB).div_ceil(grain(tib * 1024 * GIB, 1) * ENTRIES) <= MOST_TABLES);
        }
    }

    #[test]
    fn a_change_of_a_cid_that_was_cut_short_lies_between_both() {
        assert!(!is_between("12cd56ef", "12345678", "abcd12ee"));
        assert!(is_between("12cd56ef", "12345678", "abcd90ef"));
        assert!(is_between("12345678", "12345678", "abcd90ef"));
        assert!(!is_between("12345679", "12345678", "abcd90ef"));
        assert!(!is_between("12345678", "--------", "abcd90ef"));
    }

    #[test]
    fn any_path_can_stand_in_a_setting() {
        assert_eq!(plain(Path::new("/a b/c.img")), "/a b/c.img");
        assert_eq!(plain(Path::new("\"ä%\n")), "%22%c3%a4%25%0a");
    }
}
