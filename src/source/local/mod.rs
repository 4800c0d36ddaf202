//! Local files: VMDKs and raw images, also as members of a package (OVA).

mod create;

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

use super::format;
use super::image::{Image, StreamSource};
use super::{Backend, CacheSizes, Source, SourceDescription, SourceIdentity};
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::config::{LocalConfig, Locality, SourceSettings};
use crate::error::{Error, ErrorKind, Result};
use crate::store::package::{self, Package};
use crate::store::{Access, StoredFile, open_found_path, open_user_path};
use crate::vmdk::{CheckReport, OpenOptions};

/// Default size of the cache for inflated grains, in bytes: the working set of a few readers in grains of 64 KiB.
const GRAIN_CACHE: u64 = 32 << 20;

/// An open local image.
#[derive(Debug)]
struct LocalSource {
    image: Image,
    config: LocalConfig,
}

impl Source for LocalSource {
    fn disk(&self) -> Arc<dyn BlockRead> {
        self.image.disk()
    }

    fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        self.image.files()
    }

    fn locality(&self) -> Locality {
        self.config.locality()
    }

    fn describe(&self) -> SourceDescription {
        self.image.describe()
    }

    fn write_refusal(&self) -> Option<Error> {
        if self.config.is_package() {
            return Some(package_is_read_only(&self.config));
        }
        let refusal = self.image.write_refusal(self.config.force);
        refusal.or_else(|| {
            self.image
                .files_written()
                .iter()
                .find_map(|file| not_permitted(&**file))
        })
    }

    fn identity(&self) -> Result<SourceIdentity> {
        let label = self.config.label();
        Ok(SourceIdentity {
            address: fs::canonicalize(&self.config.path).map_err(|e| Error::io(label.clone(), e))?,
            label,
            cid: self.image.cid(),
        })
    }

    fn cache(&self, asked: CacheSizes) -> Option<CacheOptions> {
        self.image.grain_cache(asked.size.unwrap_or(GRAIN_CACHE), asked)
    }

    fn check(&self) -> CheckReport {
        self.image.check()
    }
}

impl Backend for LocalConfig {
    fn open(&self, _asked: CacheSizes) -> Result<Box<dyn Source>> {
        self.reopen(open_file(self, Access::Read)?)
    }

    /// The source is always opened for reading first. So a disk that would not be written to anyway is not locked against
    /// other readers, and the reason that the user gets comes from the image and not from the locks of its readers.
    fn open_for_writing(&self, asked: CacheSizes) -> Result<(Box<dyn Source>, Option<String>)> {
        let source = self.open(asked)?;
        if let Some(refusal) = source.write_refusal() {
            return only_read(refusal, source);
        }
        // The locks of the reading source would conflict with those of the writing one.
        drop(source);
        let written = open_file(self, Access::Write).and_then(|file| {
            let format = format::decide(self, &*file)?;
            Image::open_writable(file, format, || chain_options(self))
        });
        match written {
            Ok(image) => Ok((source_of(self, image), None)),
            // Some reasons only show when the files are opened for writing.
            Err(e) if e.kind() == ErrorKind::ReadOnly => only_read(e, self.open(asked)?),
            Err(e) => Err(e),
        }
    }

    fn reopen(&self, file: Arc<dyn StoredFile>) -> Result<Box<dyn Source>> {
        let format = format::decide(self, &*file)?;
        Ok(source_of(self, Image::open(file, format, || chain_options(self))?))
    }

    fn create(&self) -> Result<()> {
        create::create(self)
    }

    fn create_for_mount(&self) -> Result<Option<Box<dyn Source>>> {
        let stream = create::create_for_mount(self)?;
        Ok(stream.map(|disk| Box::new(StreamSource::new(disk, self)) as Box<dyn Source>))
    }

    fn verify(&self, _asked: CacheSizes) -> Result<Vec<String>> {
        if self.is_package() {
            return open_package(self)?.verify(self.member.as_deref());
        }
        Ok(Vec::new())
    }
}

fn source_of(config: &LocalConfig, image: Image) -> Box<dyn Source> {
    Box::new(LocalSource {
        image,
        config: config.clone(),
    })
}

/// Opens the image of a local disk: its file, or the member of a package.
///
/// Errors: `ReadOnly` for writing to a package.
pub(crate) fn open_file(local: &LocalConfig, access: Access) -> Result<Arc<dyn StoredFile>> {
    if local.is_package() {
        let refusal = (access == Access::Write).then(|| package_is_read_only(local));
        return refusal.map_or_else(|| open_package(local)?.disk(local.member.as_deref()), Err);
    }
    open_path(local, access)
}

/// Returns the options with which the chain of a local disk is opened.
///
/// Errors: those of opening the parent that the user named.
pub(crate) fn chain_options(local: &LocalConfig) -> Result<OpenOptions> {
    let parent = |path: &PathBuf| {
        let opened = open_user_path(path, local.open_policy(), Access::Read);
        opened.map_err(|e| e.within("parent="))
    };
    Ok(OpenOptions {
        degraded: local.degraded,
        parent: local.parent.as_ref().map(parent).transpose()?,
        force: local.force,
    })
}

fn open_path(local: &LocalConfig, access: Access) -> Result<Arc<dyn StoredFile>> {
    match &local.found_in {
        Some(folder) => open_found_path(folder, &local.path, local.open_policy(), access),
        None => open_user_path(&local.path, local.open_policy(), access),
    }
}

fn open_package(local: &LocalConfig) -> Result<Package> {
    package::open(open_path(local, Access::Read)?)
}

fn package_is_read_only(local: &LocalConfig) -> Error {
    let text = "a disk in a package is only read; add cow=FILE to keep writes in a local overlay";
    Error::new(ErrorKind::ReadOnly, text).in_file(&local.label())
}

/// Returns the source for reading with the reason, if `refusal` means "can't be written to"; else the error.
fn only_read(refusal: Error, source: Box<dyn Source>) -> Result<(Box<dyn Source>, Option<String>)> {
    if refusal.kind() == ErrorKind::ReadOnly {
        Ok((source, Some(refusal.to_string())))
    } else {
        Err(refusal)
    }
}

/// Returns an error if an open file can't be opened for writing because of its permissions or a read-only file system.
fn not_permitted(file: &dyn StoredFile) -> Option<Error> {
    // Through /proc, so that the file itself is checked and not another one that has its name by now.
    let open = PathBuf::from(format!("/proc/self/fd/{}", file.fd()?.as_raw_fd()));
    let refused = faccessat(AT_FDCWD, &open, AccessFlags::W_OK, AtFlags::AT_EACCESS).err()?;
    let text = format!("{}: open for writing: {}", file.label(), io::Error::from(refused));
    Some(Error::new(ErrorKind::ReadOnly, text))
}
