//! A connection, and the files that it leads to.

use std::path::PathBuf;

use crate::abi::VixError;
use crate::{library, violation};

pub(crate) const FAIL: VixError = 1;
pub(crate) const FILE_NOT_FOUND: VixError = 4;

/// A connection.
pub(crate) struct ConnectionState {
    pub(crate) remote: bool,
    /// The thumbprint is wrong: like the real library, Open reports that.
    pub(crate) untrusted: bool,
    pub(crate) read_only: bool,
}

impl ConnectionState {
    /// Returns the file of a disk.
    pub(crate) fn path_of(&self, path: &str) -> Result<PathBuf, VixError> {
        if self.untrusted {
            return Err(FAIL);
        }
        if !self.remote {
            if !path.starts_with('/') {
                violation("a local path is not absolute");
            }
            return Ok(path.into());
        }
        let (datastore, name) = path
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("] "))
            .ok_or(FILE_NOT_FOUND)?;
        let folder = library().folder.clone().ok_or(FILE_NOT_FOUND)?;
        Ok(folder.join(datastore).join(name))
    }
}
