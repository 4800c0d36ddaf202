//! Disks that are to be made: from a path of the user to the engine's store and name.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crate::block::SECTOR;
use crate::config::{CreateConfig, CreateType, DiskConfig, LocalConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{ExtentName, LocalStore, OpenPolicy};
use crate::vmdk::{self, NewDisk, StreamDisk};

/// Makes the disks that have a [`CreateConfig`], in their order, up to the first that can't be made.
///
/// Errors: a file that exists already, a size or name that the kind can't have, or what the system says. Nothing of the
/// disk that it is about is left then.
pub fn create(disks: &[DiskConfig]) -> Result<()> {
    for disk in disks {
        if let Some(local) = disk.source.local()
            && let Some(wanted) = &local.create
        {
            let (store, name) = place(local)?;
            vmdk::create(&store, &name, &new_disk(wanted)).map_err(|e| failed(local, e))?;
        }
    }
    Ok(())
}

/// Makes the disk of a mount, if it is to be made. A stream is open for writing, as nobody can open it before it is
/// whole; others are opened as if they had been there.
pub(super) fn make(local: &LocalConfig) -> Result<Option<StreamDisk>> {
    let Some(wanted) = &local.create else { return Ok(None) };
    let (store, name) = place(local)?;
    let disk = new_disk(wanted);
    if wanted.kind == CreateType::StreamOptimized {
        return vmdk::create_stream(&store, &name, &disk)
            .map(Some)
            .map_err(|e| failed(local, e));
    }
    vmdk::create(&store, &name, &disk).map_err(|e| failed(local, e))?;
    Ok(None)
}

/// The folder of a new file, and its name there.
fn place(local: &LocalConfig) -> Result<(LocalStore, ExtentName)> {
    let path = &local.path;
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        let context = format!("{}: is no name of a new file", path.display());
        return Err(Error::new(ErrorKind::Usage, context));
    };
    let policy = OpenPolicy {
        allow: local.allow_dirs.clone(),
        lock: local.lock,
    };
    let store = LocalStore::new(dir, Arc::new(policy)).map_err(|e| failed(local, e))?;
    Ok((store, ExtentName::new(name.as_bytes())?))
}

fn new_disk(wanted: &CreateConfig) -> NewDisk {
    NewDisk {
        sectors: wanted.size / SECTOR,
        kind: wanted.kind,
        adapter: wanted.adapter,
        hardware_version: wanted.hardware_version,
    }
}

fn failed(local: &LocalConfig, e: Error) -> Error {
    let path: &Path = &local.path;
    e.within(format!("{}: cannot be made", path.display()))
}
