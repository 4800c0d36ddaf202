//! Replies of a server to the options of the handshake.

use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};

/// Maximum number of exports that are accepted from a server, and of bytes in their names and descriptions. Bounds the
/// memory for an untrusted list.
pub(super) const MAX_EXPORTS: (usize, usize) = (4096, 4 << 20);

/// Maximum number of metadata contexts of an export, and of bytes in their names. The list of each export is kept.
pub(super) const MAX_CONTEXTS: (usize, usize) = (256, 16 << 10);

/// Reply to an option of the handshake: -1 while the option is in flight, then its `errno`, 0 for success.
#[derive(Debug)]
pub(in crate::source::nbd) struct OptDone(AtomicI32);

impl OptDone {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(AtomicI32::new(-1)))
    }

    /// Notes the reply: its `errno`, 0 for success.
    pub(super) fn set(&self, errno: i32) {
        self.0.store(errno.max(0), Ordering::Release);
    }

    /// Returns the `errno` of the reply, 0 for success. Returns `None` while the option is in flight.
    pub(in crate::source::nbd) fn get(&self) -> Option<i32> {
        Some(self.0.load(Ordering::Acquire)).filter(|e| *e >= 0)
    }
}

/// List that a server sends: names, each with its description if it is an export.
pub(in crate::source::nbd) type Listed = Arc<Mutex<List>>;

/// Entries of a list that were accepted, and the number of those that were not.
#[derive(Debug)]
pub(in crate::source::nbd) struct List {
    /// Names and descriptions.
    pub(in crate::source::nbd) entries: Vec<(CString, CString)>,
    /// Number of entries beyond the limits.
    pub(in crate::source::nbd) dropped: usize,
    /// Entries and bytes that are still accepted.
    left: (usize, usize),
}

impl List {
    pub(super) fn new(left: (usize, usize)) -> Listed {
        Arc::new(Mutex::new(Self {
            entries: Vec::new(),
            dropped: 0,
            left,
        }))
    }

    /// Appends an entry, or drops it if it exceeds the limits.
    pub(super) fn add(&mut self, name: &CStr, description: &CStr) {
        let bytes = name.count_bytes() + description.count_bytes();
        match (self.left.0.checked_sub(1), self.left.1.checked_sub(bytes)) {
            (Some(entries), Some(bytes)) => {
                self.left = (entries, bytes);
                self.entries.push((name.to_owned(), description.to_owned()));
            }
            _ => self.dropped += 1,
        }
    }
}
