//! Merging an overlay into its base, so that the pair shows the same disk whenever it stops.
//!
//! ```text
//!   1 mark := CID of the base                    in the overlay, durable
//!   2 parentCID := X, a new CID                  in the overlay, durable
//!   3 CID of the base := X                       durable, before its content changes
//!   4 every range of the overlay is written to the base, which is flushed and closed
//!   5 mark := none                               in the overlay
//! ```
//! While the mark is there the overlay fits a base with the old CID, with X, and with any mixture of their digits that a
//! power cut may leave. The overlay itself keeps all its ranges, which hide what was copied, so both together are the
//! same disk after any part of step 4, and the whole may be done again from the start. Afterwards the overlay is a delta
//! that repeats what its base has.
//!
//! A base without a CID (raw) has no steps 2 and 3; its mtime is noted before step 5.

use std::sync::Arc;

use crate::block::{BlockRead, BlockWrite, Lba, SECTOR};
use crate::config::{DiskConfig, LocalConfig, Overlay, SourceConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::{
    Base, MARK, NO_MARK, changed, descriptor, digits, each_change, label, mark_of, open_tied, overlay_file,
};
use crate::source::RawDisk;
use crate::store::{Access, OpenPolicy, StoredFile, open_user_path};
use crate::vmdk::{OpenOptions, VmdkDisk};
use crate::volume::Source;
use crate::volume::open::is_vmdk;

/// The most sectors that are copied at once: 1 MiB.
const STEP: u64 = 2048;

/// The most sectors that are made zeroes at once: 64 MiB, which has to be written where there are no holes.
const ZERO_STEP: u64 = 1 << 17;

/// Sectors after which the base is flushed: so much is written to storage at once when somebody stops the commit.
const FLUSH: u64 = 1 << 19;

/// A place in a commit, after what it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The overlay has the mark.
    Marked,
    /// The overlay remembers the CID that the base will have.
    Told,
    /// The base has it.
    Begun,
    /// So many bytes of all that are to be merged were written to the base.
    Copied(u64),
    /// All of them are durable there.
    Closed,
}

/// What to do after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The next one.
    GoOn,
    /// Close the base and stop. Not heeded when all is done.
    Stop,
}

/// An overlay and its base, both open for writing.
#[derive(Debug)]
pub struct Commit {
    overlay: VmdkDisk,
    base: Base,
    target: Target,
    /// Bytes to be merged.
    total: u64,
    /// One that was begun before is completed.
    resumed: bool,
}

/// A base, open for writing.
#[derive(Debug)]
enum Target {
    Vmdk(Arc<VmdkDisk>),
    Raw(Arc<RawDisk>, Arc<dyn StoredFile>),
}

impl Target {
    fn disk(&self) -> &dyn BlockRead {
        match self {
            Target::Vmdk(disk) => &**disk,
            Target::Raw(disk, _) => &**disk,
        }
    }

    fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        match self {
            Target::Vmdk(disk) => disk.files(),
            Target::Raw(_, file) => vec![Arc::clone(file)],
        }
    }
}

impl Commit {
    /// Opens both. Nothing is changed but what opening for writing repairs.
    ///
    /// Errors: `ReadOnly` where the base can't be written to, `Policy` where it has other children, `Corrupt` where the
    /// overlay belongs to another disk, `Busy` where somebody uses one of both.
    pub fn open(config: &DiskConfig) -> Result<Self> {
        let Some(local) = config.source.local() else {
            let context = format!("{}: a commit writes to local files only", config.source.label());
            return Err(Error::unsupported(context));
        };
        let Some(overlay @ Overlay::File(path)) = &config.overlay else {
            return Err(Error::new(
                ErrorKind::Usage,
                "a commit needs the file of an overlay (cow=FILE)",
            ));
        };
        let child = overlay_file(path, local, Access::Write)?;
        let policy = OpenPolicy {
            allow: local.allow_dirs.clone(),
            lock: local.lock,
        };
        let file = open_user_path(&local.path, Arc::new(policy), Access::Write)?;
        let (base, source) = look(local, overlay, &file)?;
        let overlay = open_tied(Arc::clone(&child), &base, local, Access::Write)?;
        let descriptor = descriptor(&overlay)?;
        if descriptor
            .ddb_value(MARK)
            .is_none_or(|mark| mark.len() != NO_MARK.len())
        {
            return Err(Error::unsupported(format!(
                "{}: was not made by this program and has no room for the mark of a commit (ddb.{MARK}); the program \
                 that made it can merge it (qemu-img commit)",
                label(&overlay)
            )));
        }
        let resumed = mark_of(descriptor).is_some();
        let target = match source {
            Source::Vmdk(seen) => {
                drop(seen);
                let options = OpenOptions {
                    accept_cid_mismatch: local.accept_cid_mismatch,
                    force: local.force,
                };
                let disk = VmdkDisk::open_base(file, options, &*child);
                Target::Vmdk(Arc::new(disk.map_err(|e| refused(&overlay, &e))?))
            }
            _ => Target::Raw(Arc::new(RawDisk::new(Arc::clone(&file))?), file),
        };
        let total = changed(&overlay)? * SECTOR;
        Ok(Self {
            overlay,
            base,
            target,
            total,
            resumed,
        })
    }

    /// Bytes to be merged.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Merges. `watch` is told each step, and says whether to go on; an error of it ends everything as it is, as a
    /// crash would. Whether all was merged.
    ///
    /// Errors: what reading or writing says. Then, as after a stop, both together show the same disk as before.
    pub fn run(&self, watch: &mut dyn FnMut(Step) -> Result<Next>) -> Result<bool> {
        if self.total == 0 && !self.resumed {
            return Ok(true);
        }
        let writer = self.writer()?;
        let mark = format!("ddb.{MARK}");
        self.overlay
            .rewrite(&mark, &self.base.cid.map_or_else(|| "f".repeat(NO_MARK.len()), digits))?;
        if watch(Step::Marked)? == Next::Stop {
            return Ok(false);
        }
        self.renew_cid(watch)?;
        if !self.copy(writer, watch)? {
            writer.close()?;
            return Ok(false);
        }
        writer.close()?;
        watch(Step::Closed)?;
        self.base.renew_time(&self.overlay, &self.target.files())?;
        self.overlay.rewrite(&mark, NO_MARK)?;
        self.overlay_writer()?.close()?;
        Ok(true)
    }

    fn writer(&self) -> Result<&dyn BlockWrite> {
        let none = || Error::new(ErrorKind::ReadOnly, format!("{}: can't be written to", self.base.shown));
        self.target.disk().writer().ok_or_else(none)
    }

    fn overlay_writer(&self) -> Result<&dyn BlockWrite> {
        let none = || {
            Error::new(
                ErrorKind::ReadOnly,
                format!("{}: is open for reading", label(&self.overlay)),
            )
        };
        self.overlay.writer().ok_or_else(none)
    }

    /// Gives the base its new CID, after the overlay knows it.
    fn renew_cid(&self, watch: &mut dyn FnMut(Step) -> Result<Next>) -> Result<()> {
        let Target::Vmdk(disk) = &self.target else {
            return Ok(());
        };
        let Some(cid) = self.base.cid.map_or(Ok(None), |_| disk.draw_cid())? else {
            return Ok(());
        };
        self.overlay.rewrite("parentCID", &digits(cid))?;
        watch(Step::Told)?;
        disk.begin_with(cid)?;
        watch(Step::Begun)?;
        Ok(())
    }

    /// Writes every range of the overlay to the base. Whether it came to the end.
    fn copy(&self, writer: &dyn BlockWrite, watch: &mut dyn FnMut(Step) -> Result<Next>) -> Result<bool> {
        let mut buf = vec![0; (STEP * SECTOR) as usize];
        let (mut done, mut flushed, mut whole) = (0, 0, true);
        each_change(&self.overlay, |start, sectors, zero| {
            let mut at = 0;
            while at < sectors && whole {
                let part = (sectors - at).min(if zero { ZERO_STEP } else { STEP });
                let from = start + at;
                if zero {
                    writer.zero(from..from + part, true)?;
                } else {
                    self.copy_data(
                        writer,
                        from,
                        buf.get_mut(..(part * SECTOR) as usize).unwrap_or_default(),
                    )?;
                }
                at += part;
                done += part;
                if done - flushed >= FLUSH {
                    writer.flush()?;
                    flushed = done;
                }
                whole = watch(Step::Copied(done * SECTOR))? == Next::GoOn;
            }
            Ok(whole)
        })?;
        Ok(whole)
    }

    fn copy_data(&self, writer: &dyn BlockWrite, at: Lba, buf: &mut [u8]) -> Result<()> {
        self.overlay.read_at(at, buf)?;
        writer.write_at(at, buf)
    }
}

/// What the base in `file`, which is open for writing, is: nothing of it is changed yet.
fn look(local: &LocalConfig, overlay: &Overlay, file: &Arc<dyn StoredFile>) -> Result<(Base, Source)> {
    let source = if is_vmdk(local, &**file)? {
        let options = OpenOptions {
            accept_cid_mismatch: local.accept_cid_mismatch,
            force: local.force,
        };
        Source::Vmdk(Arc::new(VmdkDisk::open(Arc::clone(file), options)?))
    } else {
        Source::Raw(Arc::new(RawDisk::new(Arc::clone(file))?), Arc::clone(file))
    };
    let config = SourceConfig::Local(local.clone());
    Ok((Base::of(&source, &config, overlay)?, source))
}

/// Why the base can't be written to, in the words of somebody who has an overlay already.
fn refused(overlay: &VmdkDisk, e: &Error) -> Error {
    let context = format!("{} can't be merged into its base", label(overlay));
    match e.kind() {
        ErrorKind::ReadOnly => {
            let way_out = "a copy of the disk as it is mounted with cow= holds both";
            e.clone().within(format!("{context} ({way_out})"))
        }
        _ => e.clone().within(context),
    }
}
