//! Creates new disks: from a path of the user to the engine's store and name.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::block::SECTOR;
use crate::config::{CreateConfig, CreateType, DiskConfig, LocalConfig, SourceConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::source::vddk;
use crate::store::{ExtentName, LocalStore};
use crate::vmdk::{self, NewDisk, StreamDisk};

/// Creates the disks that have a [`CreateConfig`], in order, up to the first that fails.
///
/// Errors: a file that exists already, a size or name that the kind can't have, those of I/O. No file of the disk that
/// failed is left then; disks before it stay.
pub fn create(disks: &[DiskConfig]) -> Result<()> {
    for disk in disks {
        if let SourceConfig::Vddk(config) = &disk.source {
            // The library creates the disk, and opens it.
            drop(vddk::connect(config, true, false)?);
        }
        if let Some(local) = disk.source.local()
            && let Some(config) = &local.create
        {
            let (store, name) = parent_store(local)?;
            vmdk::create(&store, &name, &new_disk(config)).map_err(|e| cannot_create(local, e))?;
        }
    }
    Ok(())
}

/// Creates the disk of a mount, if it has a [`CreateConfig`]. Returns a new stream open for writing, as a stream can't
/// be opened before it is complete. Returns `None` otherwise: the caller opens the disk like one that existed before.
pub(super) fn create_for_mount(local: &LocalConfig) -> Result<Option<StreamDisk>> {
    let Some(config) = &local.create else { return Ok(None) };
    let (store, name) = parent_store(local)?;
    let disk = new_disk(config);
    if config.kind == CreateType::StreamOptimized {
        return vmdk::create_stream(&store, &name, &disk)
            .map(Some)
            .map_err(|e| cannot_create(local, e));
    }
    vmdk::create(&store, &name, &disk).map_err(|e| cannot_create(local, e))?;
    Ok(None)
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
