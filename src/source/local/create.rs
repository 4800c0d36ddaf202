//! Creates new disks in local files: from a path of the user to the engine's store and name.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::block::SECTOR;
use crate::config::{CreateConfig, CreateType, LocalConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{ExtentName, LocalStore};
use crate::vmdk::{self, NewDisk, StreamDisk};

/// Creates the disk if it has a [`CreateConfig`].
///
/// Errors: a file that exists already, a size or name that the kind can't have, those of I/O. No file of the disk is left
/// then.
pub(super) fn create(local: &LocalConfig) -> Result<()> {
    let Some(config) = &local.create else { return Ok(()) };
    let (store, name) = parent_store(local)?;
    vmdk::create(&store, &name, &new_disk(config)).map_err(|e| cannot_create(local, e))
}

/// Creates the disk of a mount, if it has a [`CreateConfig`]. Returns a new stream open for writing, as a stream can't
/// be opened before it is complete. Returns `None` otherwise: the caller opens the disk like one that existed before.
pub(super) fn create_for_mount(local: &LocalConfig) -> Result<Option<StreamDisk>> {
    if let Some(config) = &local.create
        && config.kind == CreateType::StreamOptimized
    {
        let (store, name) = parent_store(local)?;
        return vmdk::create_stream(&store, &name, &new_disk(config))
            .map(Some)
            .map_err(|e| cannot_create(local, e));
    }
    create(local).map(|()| None)
}

/// Opens the folder of a new file as a store. Returns it with the file's name.
fn parent_store(local: &LocalConfig) -> Result<(LocalStore, ExtentName)> {
    let path = &local.path;
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        let context = format!("{}: can't be the name of a new file", path.display());
        return Err(Error::new(ErrorKind::Usage, context));
    };
    let policy = local.open_policy();
    let store = LocalStore::new(dir, policy).map_err(|e| cannot_create(local, e))?;
    Ok((store, ExtentName::new(name.as_bytes())?))
}

fn new_disk(config: &CreateConfig) -> NewDisk {
    NewDisk {
        sectors: config.size / SECTOR,
        kind: config.kind,
        adapter: config.adapter,
        hardware_version: config.hardware_version,
    }
}

fn cannot_create(local: &LocalConfig, e: Error) -> Error {
    let path: &Path = &local.path;
    e.within(format!("{}: can't be created", path.display()))
}
