//! Purpose of the disks of a command line, on which the valid keys depend.

/// Purpose of the disks of a command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subcommand {
    /// The disks are mounted.
    Mount {
        /// True if the whole mount is read-only.
        read_only: bool,
    },
    /// The disks are inspected.
    Query,
    /// Lists what servers offer.
    List,
    /// The disks are created and not mounted.
    Create,
    /// An overlay is committed to its base.
    Commit,
}
