//! Description of a source by its settings, whatever its back end is.

use std::path::Path;

use super::view::ViewConfig;

/// Locality of a disk's data, as seen from the daemon, from near to far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Locality {
    /// In files that the daemon reads itself.
    Here,
    /// Served by another process on this machine.
    OtherProcess,
    /// Possibly served by another machine.
    OtherMachine,
}

/// Describes a source by its settings alone, without opening it.
pub trait SourceSettings {
    /// Returns a name of the source for messages and mount tables: the path, or server and export. No secrets.
    fn label(&self) -> String;

    /// Returns the locality of the source's data.
    fn locality(&self) -> Locality;

    /// Returns true if an overlay is accepted although the source is another one than it was created over.
    fn accepts_cid_mismatch(&self) -> bool;

    /// Returns true if the user accepts that a part of the disk cannot be read.
    fn accepts_loss(&self) -> bool {
        false
    }

    /// Returns the number of the connected socket that the caller passed.
    fn socket_fd(&self) -> Option<i32> {
        None
    }

    /// Returns true if no other program can write to the files of the disk unnoticed while this one writes to the disk or to
    /// an overlay over it: a lock keeps them off, or each read checks that it gets the version of before.
    fn excludes_writers(&self) -> bool {
        false
    }

    /// Returns true if a search found the file of the disk, which the user did not name.
    fn was_found(&self) -> bool {
        false
    }

    /// Returns true if the source is a server that lists what it offers.
    fn is_server(&self) -> bool {
        false
    }

    /// Returns true if the settings stand for every export of a server.
    fn is_dynamic(&self) -> bool {
        false
    }

    /// Returns true if the source reads ahead as far as its distance needs, whatever the settings are.
    fn reads_ahead(&self) -> bool {
        false
    }

    /// Returns the folder that keeps fetched blocks across mounts.
    fn cache_dir(&self) -> Option<&Path> {
        None
    }

    /// Returns the settings of the disk's kernel view, or `None` if the kernel can never read its files.
    fn kernel_view(&self) -> Option<ViewConfig> {
        None
    }

    /// Returns true if warnings about the settings concern every action that opens the source, not only a mount.
    fn warns_of_connection(&self) -> bool {
        false
    }

    /// Notes that the disk was created, if the settings ask for that: opening it again does not create it again.
    fn set_created(&mut self) {}
}
