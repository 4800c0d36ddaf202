//! Files on a web server: VMDKs and raw images, also as members of a package (OVA). `store/https` reads them.

mod search;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use super::format;
use super::image::Image;
use super::{Backend, CacheSizes, Listed, Listing, Matches, Source, SourceDescription, SourceIdentity};
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::config::{Format, HttpsAddress, HttpsConfig, Locality, SourceSettings};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoredFile, https, package};
use crate::vmdk::{CheckReport, OpenOptions};

/// Size of the cache for inflated grains, in bytes. The stored blocks have a cache of their own, which `cache-size=` sets.
const GRAIN_CACHE: u64 = 16 << 20;

/// An open image on a web server.
#[derive(Debug)]
struct HttpsSource {
    image: Image,
    label: String,
}

impl Source for HttpsSource {
    fn disk(&self) -> Arc<dyn BlockRead> {
        self.image.disk()
    }

    fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        self.image.files()
    }

    fn locality(&self) -> Locality {
        Locality::OtherMachine
    }

    fn describe(&self) -> SourceDescription {
        self.image.describe()
    }

    fn write_refusal(&self) -> Option<Error> {
        let text = "a disk on a web server is only read; add cow=FILE to keep writes in a local overlay";
        Some(Error::new(ErrorKind::ReadOnly, text))
    }

    fn identity(&self) -> Result<SourceIdentity> {
        Ok(SourceIdentity {
            label: self.label.clone(),
            address: self.label.clone().into(),
            cid: self.image.cid(),
        })
    }

    fn cache(&self, asked: CacheSizes) -> Option<CacheOptions> {
        self.image.grain_cache(GRAIN_CACHE, asked)
    }

    fn check(&self) -> CheckReport {
        self.image.check()
    }
}

impl Backend for HttpsConfig {
    fn open(&self, asked: CacheSizes) -> Result<Box<dyn Source>> {
        let mut name = https::file_name(self)?;
        let mut file = open_file(self, asked)?;
        if is_package(self, &name) {
            file = package::open(file)?.disk(self.member.as_deref())?;
            name = file.own_name();
        }
        let format = match self.format {
            Format::Auto if https::is_raw_by_name(self, &name) => Format::Raw,
            format => format,
        };
        let format = format::decide_named(OsStr::new(&name), format, &*file)?;
        let beside = |address: &HttpsAddress| {
            let parent = Self {
                address: address.clone(),
                ..self.clone()
            };
            open_file(&parent, asked).map_err(|e| e.within("parent="))
        };
        let options = || {
            Ok(OpenOptions {
                degraded: self.degraded,
                parent: self.parent.as_ref().map(beside).transpose()?,
                force: false,
            })
        };
        Ok(Box::new(HttpsSource {
            image: Image::open(file, format, options)?,
            label: self.label(),
        }))
    }

    /// Opens the disk for reading. No reason to warn about: such a disk is never written to, and the mount shows that.
    fn open_for_writing(&self, asked: CacheSizes) -> Result<(Box<dyn Source>, Option<String>)> {
        Ok((self.open(asked)?, None))
    }

    fn find(&self) -> Option<Result<Matches>> {
        search::find(self)
    }

    fn list(&self) -> Option<Result<Listing>> {
        Some(https::Browser::new(self).and_then(|browser| listing(&browser)))
    }

    fn verify(&self, asked: CacheSizes) -> Result<Vec<String>> {
        if is_package(self, &https::file_name(self)?) {
            return package::open(open_file(self, asked)?)?.verify(self.member.as_deref());
        }
        Ok(Vec::new())
    }
}

fn open_file(https: &HttpsConfig, asked: CacheSizes) -> Result<Arc<dyn StoredFile>> {
    https::open(https, asked.size, asked.readahead)
}

/// Returns true if the file with this name is a package, by its name or because a disk of it is named.
fn is_package(https: &HttpsConfig, name: &str) -> bool {
    let is_named = https.format == Format::Auto && Format::is_package(Path::new(name));
    is_named || https.member.is_some()
}

fn listing(browser: &https::Browser) -> Result<Listing> {
    if browser.is_inventory() {
        return Ok(Listing::Inventory {
            server: browser.label(),
            datacenters: browser.datacenters()?.into_iter().map(Listed::from).collect(),
        });
    }
    Ok(Listing::Folder {
        folder: browser.label(),
        names: browser.names()?.into_iter().map(Listed::from).collect(),
    })
}
