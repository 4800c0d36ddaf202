//! Commit: merges an overlay into its base. The pair shows the same disk at every point, also after a crash.
//!
//! ```text
//!   0 every range can be written to the base, and there is room for all; otherwise the commit is refused
//!   1 mark := CID of the base                    in the overlay, durable; the base's file is marked too (base_mark.rs)
//!   2 parentCID := X, a new CID                  in the overlay, durable
//!   3 CID of the base := X                       durable, before its content changes
//!   4 write every range of the overlay to the base, then flush and close the base
//!   5 mark := none                               in the base, then in the overlay
//! ```
//! While the overlay has the mark, it matches a base with the old CID, with X, and with any mixture of their digits
//! that a power failure may leave. The overlay keeps all its ranges, and they hide the ranges of the base that were
//! copied. So both together are the same disk after any part of step 4, and a commit may be repeated from the start.
//! Afterwards the overlay is a delta whose content equals that of its base.
//!
//! Crash states: before 1 nothing has changed; after 1 to 4 the commit is marked as unfinished, and `--commit` starts
//! again from step 1 with the CID that the base has then; after 5 the commit is complete.
//!
//! A base without a CID (raw) has no steps 2 and 3; its mtime is stored in the overlay before step 5.

use std::sync::Arc;

use crate::block::{BlockRead, BlockWrite, Lba, SECTOR};
use crate::config::{DiskConfig, Overlay};
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::base::Base;
use crate::overlay::base_mark;
use crate::overlay::{
    MARK, NO_MARK, changed_sectors, cid_text, descriptor, for_each_change, label, mark_of, open_overlay_of,
    overlay_file,
};
use crate::source::format::{self, DiskFormat};
use crate::source::local::{chain_options, open_file};
use crate::source::{Backend, RawDisk};
use crate::store::{Access, RoomNeeded, StoredFile};
use crate::vmdk::VmdkDisk;

/// Maximum number of sectors copied at once: 1 MiB.
const COPY_STEP: u64 = 2048;

/// Maximum number of sectors zeroed at once: 64 MiB. A base without holes has to write them.
const ZERO_STEP: u64 = 1 << 17;

/// Number of sectors after which the base is flushed: 256 MiB. It bounds the wait when the user stops the commit.
const FLUSH_STEP: u64 = 1 << 19;

/// Point in a commit that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The overlay has the mark.
    Marked,
    /// The overlay has the next CID of the base as its `parentCID`.
    Told,
    /// The base has that CID.
    Begun,
    /// This many bytes in total were written to the base.
    Copied(u64),
    /// All bytes are durable in the base, which is closed.
    Closed,
}

/// Decision of the caller after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Continue with the next step.
    GoOn,
    /// Close the base and stop. Ignored after the last range was copied.
    Stop,
}

/// Commit of one overlay into its base. Both are open for writing and locked.
#[derive(Debug)]
pub struct Commit {
    overlay: VmdkDisk,
    base: Base,
    target: Target,
    /// Bytes to be merged.
    total: u64,
    /// True if an earlier commit was interrupted and is completed by this one.
    resumed: bool,
}

/// Base, open for writing.
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
    /// Opens the overlay and the base. The only changes are those of recovery, which is part of opening for writing.
    ///
    /// Errors: `ReadOnly` if the base can't be written to, `Policy` if it has other children, `Corrupt` if the overlay
    /// belongs to another disk, `Busy` if another process uses one of both, `Unsupported` for an overlay of another
    /// program.
    pub fn open(config: &DiskConfig) -> Result<Self> {
        let Some(local) = config.source.local() else {
            let context = format!("{}: --commit can only write to local files", config.source.label());
            return Err(Error::unsupported(context));
        };
        let Some(overlay @ Overlay::File(path)) = &config.overlay else {
            return Err(Error::new(
                ErrorKind::Usage,
                "--commit needs an overlay in a file (cow=FILE)",
            ));
        };
        // The overlay first: its lock is taken before anything of the base is opened.
        let child = overlay_file(path, local, Access::Write)?;
        let file = open_file(local, Access::Write)?;
        // Through the descriptor that is open for writing, so that no other process can replace or change the base in
        // between. The base is not changed before the overlay is known to belong to it.
        let source = local.reopen(Arc::clone(&file))?;
        let base = Base::of(&*source, overlay)?;
        let overlay = open_overlay_of(
            Arc::clone(&child),
            &base,
            (local.force, local.degraded.cid),
            Access::Write,
        )?;
        let descriptor = descriptor(&overlay)?;
        if descriptor
            .ddb_value(MARK)
            .is_none_or(|mark| mark.len() != NO_MARK.len())
        {
            return Err(Error::unsupported(format!(
                "{}: was not created by this program and has no space for the mark of a commit (ddb.{MARK}); merge it \
                 with the program that created it (qemu-img commit)",
                label(&overlay)
            )));
        }
        let resumed = mark_of(descriptor).is_some();
        // Its locks on the extents would conflict with those for writing.
        drop(source);
        let target = match format::decide(local, &*file)? {
            DiskFormat::Vmdk => {
                let disk = VmdkDisk::open_base(file, chain_options(local)?, &*child);
                Target::Vmdk(Arc::new(disk.map_err(|e| base_refused(&overlay, &e))?))
            }
            DiskFormat::Raw => Target::Raw(Arc::new(RawDisk::new(Arc::clone(&file))?), file),
        };
        let total = changed_sectors(&overlay)? * SECTOR;
        let commit = Self {
            overlay,
            base,
            target,
            total,
            resumed,
        };
        // Last, as it reads all tables of the overlay, and only a base that is open for writing knows what it would
        // allocate.
        commit.check_can_finish()?;
        Ok(commit)
    }

    /// Returns the number of bytes to be merged.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Runs the commit. `watch` is called after each step and decides if the commit continues; an error from it ends
    /// the commit at once, like a crash. Returns true if everything was merged, false if `watch` stopped it.
    ///
    /// Errors: those of reading and writing. After an error or a stop both together still show the same disk.
    pub fn run(&self, watch: &mut dyn FnMut(Step) -> Result<Next>) -> Result<bool> {
        if self.total == 0 && !self.resumed {
            return Ok(true);
        }
        let writer = self.base_writer()?;
        // Step 1. A base without a CID gets a mark too: it allows another mtime until the commit is finished.
        let mark = format!("ddb.{MARK}");
        self.overlay.rewrite(
            &mark,
            &self.base.cid.map_or_else(|| "f".repeat(NO_MARK.len()), cid_text),
        )?;
        // The descriptor's file or the image: the one by which the base is opened, so that an open of it finds the
        // mark.
        let named = self.target.files().into_iter().next();
        named
            .as_deref()
            .map_or(Ok(()), |file| base_mark::set(file, &label(&self.overlay)))?;
        if watch(Step::Marked)? == Next::Stop {
            return Ok(false);
        }
        // Steps 2 and 3.
        self.renew_cid(watch)?;
        // Step 4. A stop closes the base; the mark stays.
        if !self.copy(writer, watch)? {
            writer.close()?;
            return Ok(false);
        }
        writer.close()?;
        watch(Step::Closed)?;
        // Step 5. The mark is removed only after the base is durable: from here on the overlay must match exactly.
        self.base
            .renew_state(&self.overlay, self.target.disk(), &self.target.files())?;
        named.as_deref().map_or(Ok(()), base_mark::clear)?;
        self.overlay.rewrite(&mark, NO_MARK)?;
        self.overlay_writer()?.close()?;
        Ok(true)
    }

    /// Checks that every range of the overlay can be written to the base, and that there is room for all of them: a commit
    /// that ends half way leaves a base that is useless alone.
    fn check_can_finish(&self) -> Result<()> {
        let writer = self.base_writer()?;
        let mut needed = RoomNeeded::default();
        for_each_change(&self.overlay, |start, sectors, zero| {
            writer
                .add_room(start..start + sectors, zero, &mut needed)
                .map(|()| true)
        })
        .and_then(|()| needed.check())
        .map_err(|e| base_refused(&self.overlay, &e).within("nothing was merged"))
    }

    fn base_writer(&self) -> Result<&dyn BlockWrite> {
        let none = || Error::new(ErrorKind::ReadOnly, format!("{}: can't be written to", self.base.label));
        self.target.disk().writer().ok_or_else(none)
    }

    fn overlay_writer(&self) -> Result<&dyn BlockWrite> {
        let none = || {
            Error::new(
                ErrorKind::ReadOnly,
                format!("{}: is opened for reading only", label(&self.overlay)),
            )
        };
        self.overlay.writer().ok_or_else(none)
    }

    /// Gives the base a new CID, after the overlay has stored it. In the other order a crash in between would leave a
    /// base with a CID that the overlay does not know.
    fn renew_cid(&self, watch: &mut dyn FnMut(Step) -> Result<Next>) -> Result<()> {
        let Target::Vmdk(disk) = &self.target else {
            return Ok(());
        };
        let Some(cid) = self.base.cid.map_or(Ok(None), |_| disk.draw_cid())? else {
            return Ok(());
        };
        self.overlay.rewrite("parentCID", &cid_text(cid))?;
        watch(Step::Told)?;
        disk.change_cid(cid)?;
        watch(Step::Begun)?;
        Ok(())
    }

    /// Writes every range of the overlay to the base. Returns false if `watch` stopped it.
    fn copy(&self, writer: &dyn BlockWrite, watch: &mut dyn FnMut(Step) -> Result<Next>) -> Result<bool> {
        let mut buf = vec![0; (COPY_STEP * SECTOR) as usize];
        let (mut done, mut flushed, mut continues) = (0, 0, true);
        for_each_change(&self.overlay, |start, sectors, zero| {
            let mut at = 0;
            while at < sectors && continues {
                let part = (sectors - at).min(if zero { ZERO_STEP } else { COPY_STEP });
                let from = start + at;
                if zero {
                    // With `unmap`: the overlay says zero, so the base needs no space there.
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
                if done - flushed >= FLUSH_STEP {
                    writer.flush()?;
                    flushed = done;
                }
                continues = watch(Step::Copied(done * SECTOR))? == Next::GoOn;
            }
            Ok(continues)
        })?;
        Ok(continues)
    }

    fn copy_data(&self, writer: &dyn BlockWrite, at: Lba, buf: &mut [u8]) -> Result<()> {
        self.overlay.read_at(at, buf)?;
        writer.write_at(at, buf)
    }
}

/// Adds the context of a commit to the error with which the base refuses writing. The advice differs from that of a
/// mount, as the overlay exists already.
fn base_refused(overlay: &VmdkDisk, e: &Error) -> Error {
    let context = format!("{} can't be merged into its base", label(overlay));
    match e.kind() {
        ErrorKind::ReadOnly => {
            let way_out = "instead mount it with cow= and copy the disk: the copy holds both";
            e.clone().within(format!("{context} ({way_out})"))
        }
        _ => e.clone().within(context),
    }
}
