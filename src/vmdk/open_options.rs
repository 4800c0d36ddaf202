//! Defects and risks of a disk that the user accepts when it is opened.

use std::sync::Arc;

use crate::store::StoredFile;

/// Defects of a chain that the user accepts (`degraded=`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Degraded {
    /// Accept a parent whose CID is not the one that its child remembers.
    pub cid: bool,
    /// Open a snapshot without its parent: reading what only the parent holds fails.
    pub orphan: bool,
    /// Open a flat extent whose file is shorter than its line: reading what is missing fails.
    pub short: bool,
}

/// Defects and risks that the user accepts, and what the user knows of the chain.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Defects that are accepted.
    pub degraded: Degraded,
    /// Parent of the oldest link that is found.
    pub parent: Option<Arc<dyn StoredFile>>,
    /// Write to a disk although a child of it lies in its folder.
    pub force: bool,
}
