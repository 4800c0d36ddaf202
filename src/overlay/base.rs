//! The base of an overlay: the values by which the overlay recognizes it; see the table in `overlay/mod.rs`.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{MARK, NO_CID, NO_MARK, cid_text, descriptor, grain_size, label, mark_of};
use crate::block::{BlockRead, Lba, SECTOR};
use crate::config::Overlay;
use crate::error::{Error, ErrorKind, Result};
use crate::source::sample::{self, BlockDigest, block_digest, sampled_ranges};
use crate::source::{Source, SourceIdentity};
use crate::store::{Identity, Permissions, StoredFile};
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::{DeltaParent, NewDelta, VmdkDisk};

/// Key of the base's size and address in the disk data base, for a base without a CID.
const BASE_KEY: &str = "vmdkfuse.base";
/// Key of the base's mtime, for a base without a CID.
const BASE_TIME_KEY: &str = "vmdkfuse.baseTime";
/// Key of the digest of the base's sampled blocks, for a base with neither a CID nor an mtime.
const BASE_DIGEST_KEY: &str = "vmdkfuse.baseDigest";

/// Parent CID of an overlay over a base without one. An invented one could be the CID of another disk, and `ffffffff`
/// would mean that there is no parent.
const ABSENT_CID: u32 = 0;

/// Threads that read the sampled blocks of a base: most of them wait for a network.
const SAMPLE_THREADS: usize = 16;

/// Values by which an overlay recognizes its source.
#[derive(Debug)]
pub(super) struct Base {
    /// Path or URI as the user gave it, for messages.
    pub(super) label: String,
    /// Path as the overlay stores it: relative to its folder if the source lies in it or below, else absolute. The whole
    /// address of a disk on a server.
    path: PathBuf,
    sectors: u64,
    granule: u64,
    /// CID, if the source has one.
    pub(super) cid: Option<u32>,
    /// Time of the last change, as digits.
    time: String,
    /// Digest of the sampled blocks, if no CID and no time tell the state of the source.
    digest: Option<String>,
    /// Device and inode of each file. Not the files themselves, so that this does not keep them open or locked.
    pub(super) files: Vec<(u64, u64)>,
    /// Permissions of the files, which a new overlay gets; `None` for a disk on a server.
    pub(super) permissions: Option<Permissions>,
}

impl Base {
    /// Returns the values that `overlay` stores of `source`.
    pub(super) fn of(source: &dyn Source, overlay: &Overlay) -> Result<Self> {
        let SourceIdentity {
            label,
            address: real,
            cid,
        } = source.identity()?;
        // A disk whose CID means "no CID" is recognized by its mtime instead, like a raw one.
        let cid = cid.filter(|&cid| cid != NO_CID);
        let path = match folder_of(overlay).and_then(|folder| real.strip_prefix(folder).ok()) {
            Some(relative) => relative.to_path_buf(),
            None => real,
        };
        let geometry = source.disk().geometry();
        let files = source.files();
        let time = last_change(files.iter().map(|file| (file, file.identity_at_open())));
        // A device has an mtime too, but a write to it does not change that: only files count.
        let has_state = cid.is_some() || (has_time(&time) && files.iter().all(|file| file.detects_modification()));
        let digest = match overlay {
            Overlay::File(_) if !has_state => {
                Some(sample_digest(&*source.disk()).map_err(|e| e.within(format!("{label}: reading it for cow=")))?)
            }
            _ => None,
        };
        let permissions = Permissions::of(&files);
        // Of the open files, not of their names: a name may lead to another file by the time of the comparison.
        let files = files.iter().map(|file| file.identity_at_open().file).collect();
        Ok(Self {
            label,
            path,
            sectors: geometry.sectors,
            granule: geometry.granule,
            cid,
            time,
            digest,
            files,
            permissions,
        })
    }

    /// Returns size and address as text, for a base without a CID.
    fn identity(&self) -> String {
        format!("{} sectors of {}", self.sectors, percent_encode(&self.path))
    }

    /// Stores in the overlay the present state of the base, which is `disk` in `files`, after a commit has written to it.
    /// Does nothing for a base with a CID.
    pub(super) fn renew_state(
        &self,
        delta: &VmdkDisk,
        disk: &dyn BlockRead,
        files: &[Arc<dyn StoredFile>],
    ) -> Result<()> {
        if self.cid.is_some() {
            return Ok(());
        }
        let now: Vec<_> = files
            // Read from the files now: their identity at the open is that from before the commit.
            .iter()
            .map(|file| Ok((file, file.identity()?)))
            .collect::<Result<_>>()?;
        delta.rewrite(&format!("ddb.{BASE_TIME_KEY}"), &last_change(now.into_iter()))?;
        match self.digest {
            Some(_) => delta.rewrite(&format!("ddb.{BASE_DIGEST_KEY}"), &sample_digest(disk)?),
            None => Ok(()),
        }
    }

    /// Checks that `delta` is an overlay over this base. With `accept` the base may have changed since, and a warning
    /// is logged instead; the size must match in any case.
    pub(super) fn check(&self, delta: &VmdkDisk, accept: bool) -> Result<()> {
        let (label, descriptor) = (label(delta), descriptor(delta)?);
        let Some(parent) = &descriptor.parent else {
            let context =
                format!("{label}: is not an overlay: it has no parent (parentCID); cow= takes a delta, or a new file");
            return Err(Error::new(ErrorKind::Usage, context));
        };
        let sectors = delta.geometry().sectors;
        // Also with `accept`: behind the end of a shorter base would be zeroes in place of lost data.
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
        // An unfinished commit has changed the base on its own.
        if mark.is_some() {
            return None;
        }
        let by = match &self.digest {
            Some(digest) if descriptor.ddb_value(BASE_DIGEST_KEY) != Some(digest) => "by some of its blocks",
            None if descriptor.ddb_value(BASE_TIME_KEY) != Some(&self.time) => "by its mtime",
            _ => return None,
        };
        Some(format!(
            "{label}: is an overlay over {base}, which is another disk now, or was changed since the overlay was created \
             ({by})"
        ))
    }

    /// Returns a new delta over this base.
    pub(super) fn delta(&self) -> Result<NewDelta> {
        let hint = self.path.to_string_lossy();
        let hint: String = hint
            .chars()
            .map(|c| if c.is_control() || c == '"' { '_' } else { c })
            .collect();
        let mut ddb = vec![(MARK.to_owned(), NO_MARK.to_owned())];
        if self.cid.is_none() {
            ddb.push((BASE_KEY.to_owned(), self.identity()));
            ddb.push((BASE_TIME_KEY.to_owned(), self.time.clone()));
            ddb.extend(self.digest.clone().map(|digest| (BASE_DIGEST_KEY.to_owned(), digest)));
        }
        let cid = self.cid.unwrap_or(ABSENT_CID);
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

/// Returns true if a file has reported the time of its last change.
fn has_time(time: &str) -> bool {
    time.bytes().any(|digit| digit != b'0')
}

/// Returns the digest of the sampled blocks of a disk.
///
/// The blocks are read by several threads, so that a far server answers them in a few round trips.
fn sample_digest(disk: &dyn BlockRead) -> Result<String> {
    let geometry = disk.geometry();
    let ranges = sampled_ranges(
        geometry.bytes(),
        sample::BLOCK.max(geometry.granule * SECTOR),
        sample::THOROUGH,
    );
    let next = AtomicUsize::new(0);
    // Each thread takes the next block, so that one slow answer does not delay the others.
    let work = || -> Result<Vec<(usize, BlockDigest)>> {
        let mut digests = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(range) = ranges.get(index) else {
                return Ok(digests);
            };
            let mut block = vec![0; (range.end - range.start) as usize];
            disk.read_at(Lba(range.start / SECTOR), &mut block)?;
            digests.push((index, block_digest(&block)));
        }
    };
    let read = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..SAMPLE_THREADS.min(ranges.len()))
            .filter_map(|_| std::thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        // This thread works too, so that the digest is complete even if no thread could be started.
        let own = work();
        let panicked = || Error::new(ErrorKind::Os(libc::EIO), "a thread that read a sampled block panicked");
        let others = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(panicked())));
        std::iter::once(own)
            .chain(others.collect::<Vec<_>>())
            .collect::<Result<Vec<_>>>()
    });
    let mut digests: Vec<_> = read?.into_iter().flatten().collect();
    // The threads finish in any order, and the digest depends on it.
    digests.sort_unstable_by_key(|(index, _)| *index);
    let all: Vec<u8> = digests.into_iter().flat_map(|(_, digest)| digest).collect();
    let sum = block_digest(&all);
    Ok(sum
        .iter()
        .take(DIGEST_BYTES)
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Bytes of the digest that an overlay stores.
const DIGEST_BYTES: usize = 16;

/// Returns the folder that holds the overlay's file, or will hold it.
fn folder_of(overlay: &Overlay) -> Option<PathBuf> {
    let Overlay::File(path) = overlay else { return None };
    let real = fs::canonicalize(path).ok();
    // The overlay may not exist yet; its folder does.
    let real = real.or_else(|| Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?)));
    real.and_then(|real| real.parent().map(Path::to_path_buf))
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

#[cfg(test)]
mod tests {
    use super::*;

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
