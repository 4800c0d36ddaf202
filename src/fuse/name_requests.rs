//! Requests about names: lookup, reading a directory, forget. They run on the calling event loop as long as no provider of
//! names has to wait for another process, and else in the worker pool: a server that is dead holds up no other request.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::{Errno, FileHandle, FileType, Generation, INodeNo, ReplyDirectory, ReplyEntry};

use crate::error::Result;
use crate::error_log::ErrorLog;
use crate::fuse::errno::errno;
use crate::fuse::stat::{StatRules, TTL};
use crate::fuse::tree::{Entry, Listed, ROOT, Tree};
use crate::volume::worker_pool::DiskShare;

/// Answers the requests about the names of a mount.
#[derive(Debug, Clone)]
pub(super) struct NameRequests {
    pub(super) tree: Arc<Tree>,
    pub(super) stat: Arc<StatRules>,
    pub(super) error_log: Arc<ErrorLog>,
    /// Worker threads for answers that wait.
    pub(super) threads: Arc<DiskShare>,
}

impl NameRequests {
    /// Answers a lookup.
    pub(super) fn lookup(&self, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(Entry::Directory(_, directory)) = self.tree.entry(parent) else {
            return reply.error(Errno::ENOENT);
        };
        if let Some(found) = directory.lookup_at_once(name) {
            return self.answer_lookup(found, reply);
        }
        let (requests, name) = (self.clone(), name.to_owned());
        self.threads.run(Box::new(move || {
            requests.answer_lookup(directory.lookup(&name), reply);
        }));
    }

    fn answer_lookup(&self, found: Result<Option<Entry>>, reply: ReplyEntry) {
        let entry = match found {
            Ok(Some(entry)) => entry,
            Ok(None) => return reply.error(Errno::ENOENT),
            Err(e) => {
                reply.error(errno(&e));
                return self.error_log.note(e);
            }
        };
        // Before the answer: its FORGET may arrive on another loop at once.
        self.tree.looked_up(&entry);
        match &entry {
            Entry::Directory(ino, _) => reply.entry(&TTL, &self.stat.directory(*ino), Generation(0)),
            Entry::File(ino, file) => {
                let attr = self.stat.file(*ino, file);
                file.view.reply_lookup(&attr, (self.stat.ttl(&attr), TTL), reply);
            }
        }
    }

    /// Answers a read of a directory from position `offset` on.
    pub(super) fn readdir(&self, ino: INodeNo, handle: FileHandle, offset: u64, reply: ReplyDirectory) {
        let Some(Entry::Directory(_, directory)) = self.tree.entry(ino) else {
            return reply.error(Errno::ENOTDIR);
        };
        // The first read, and one after rewinddir(3), shows the names of now.
        if let Some(listing) = self.tree.listing(handle).filter(|_| offset > 0) {
            return fill(ino, &listing, offset, reply);
        }
        let (requests, waits) = (self.clone(), directory.may_wait());
        let job = move || match directory.list() {
            Ok(listing) => {
                let listing: Arc<[Listed]> = listing.into();
                requests.tree.set_listing(handle, &listing);
                fill(ino, &listing, offset, reply);
            }
            Err(e) => {
                reply.error(errno(&e));
                requests.error_log.note(e);
            }
        };
        if waits { self.threads.run(Box::new(job)) } else { job() }
    }

    /// Takes back answers that the kernel has forgotten, and closes a disk that it does not know any more.
    pub(super) fn forget(&self, ino: INodeNo, lookups: u64) {
        let Some(Entry::File(_, file)) = self.tree.forget(ino, lookups) else {
            return;
        };
        let tree = Arc::clone(&self.tree);
        // Closing flushes, and waits for the threads of a session.
        self.threads.run(Box::new(move || {
            // It has logged its error.
            let _ = file.close();
            tree.closed(&file);
        }));
    }
}

/// Fills the answer with the names from position `offset` on. Positions count the two dots first.
fn fill(ino: INodeNo, listing: &[Listed], offset: u64, mut reply: ReplyDirectory) {
    let dots = [(ino, "."), (ROOT, "..")].map(|(ino, name)| (ino, FileType::Directory, OsStr::new(name)));
    let names = listing
        .iter()
        .map(|listed| (listed.ino, listed.kind, listed.name.as_os_str()));
    let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
    for (position, (ino, kind, name)) in (1u64..).zip(dots.into_iter().chain(names)).skip(skipped) {
        if reply.add(ino, position, kind, name) {
            break;
        }
    }
    reply.ok();
}
