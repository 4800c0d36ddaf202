//! Search for the files that a pattern in a datastore matches: a tree whose names come from the listings of its server.
//!
//! Bounds against a hostile server: a search reads [`MAX_FOLDERS`] listings and finds [`MAX_MATCHES`] files at most.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use crate::config::{HttpsAddress, HttpsConfig, NamedBy, SourceConfig, SourceSettings};
use crate::error::{Error, ErrorKind, Result};
use crate::search::{Names, Tree, default_name, has_wildcard, matches};
use crate::source::{Match, Matches};
use crate::store::https::{Browser, ListedName};

/// Most folders whose listings a search reads.
const MAX_FOLDERS: usize = 1000;
/// Most files that a search finds: each is a disk of the mount, and is asked for whether it is a descriptor.
const MAX_MATCHES: usize = 1000;

/// Returns the disks that the pattern of `https` gives, or `None` if it has no pattern.
///
/// Errors: no file matches; those of the server.
pub(super) fn find(https: &HttpsConfig) -> Option<Result<Matches>> {
    let HttpsAddress::Datastore { path, .. } = &https.address else {
        return None;
    };
    has_wildcard(OsStr::new(path)).then(|| expand(https, Path::new(path)))
}

fn expand(https: &HttpsConfig, pattern: &Path) -> Result<Matches> {
    let browser = Browser::new(https)?;
    let disks = match is_literal(&browser, pattern) {
        true => vec![Match {
            name: None,
            config: SourceConfig::Https(Box::new(https.clone())),
        }],
        false => {
            let usage = |text: String| Error::new(ErrorKind::Usage, format!("file={}: {text}", https.label()));
            let files = matches(&RemoteTree::new(&browser), pattern).map_err(usage)?;
            files.iter().map(|file| disk(https, file)).collect()
        }
    };
    Ok(Matches {
        disks,
        login: Box::new(browser),
    })
}

/// Returns true if a file of that very name exists. An error other than "missing" counts as existing, so that opening the
/// file reports it.
fn is_literal(browser: &Browser, path: &Path) -> bool {
    let start = browser.read_start(path, 1);
    start.map_or_else(|e| e.kind() != ErrorKind::NotFound, |_| true)
}

/// Returns the disk of a file that matches the pattern of `https`.
fn disk(https: &HttpsConfig, file: &Path) -> Match {
    let has_name = https.named == NamedBy::FileAndName;
    let mut https = https.clone();
    https.named = NamedBy::Search;
    if let HttpsAddress::Datastore { path, .. } = &mut https.address {
        *path = file.to_string_lossy().into_owned();
    }
    Match {
        name: (!has_name).then(|| default_name(file)),
        config: SourceConfig::Https(Box::new(https)),
    }
}

/// The datastore of a browser.
struct RemoteTree<'b> {
    browser: &'b Browser,
    /// Names of the folders that were listed.
    listed: RefCell<HashMap<PathBuf, Vec<ListedName>>>,
}

impl<'b> RemoteTree<'b> {
    fn new(browser: &'b Browser) -> Self {
        let listed = RefCell::default();
        Self { browser, listed }
    }

    /// Returns the names in a folder, of which each is asked for once.
    fn list<T>(&self, folder: &Path, take: impl FnOnce(&[ListedName]) -> T) -> Result<T> {
        let mut listed = self.listed.borrow_mut();
        if !listed.contains_key(folder) && listed.len() >= MAX_FOLDERS {
            let text = format!("more than {MAX_FOLDERS} folders are to be searched: name some of them");
            return Err(Error::new(ErrorKind::Usage, text));
        }
        let names = match listed.get(folder) {
            Some(names) => names,
            None => {
                let names = self.browser.names_in(folder)?;
                listed.entry(folder.to_owned()).or_insert(names)
            }
        };
        Ok(take(names))
    }

    /// Returns what the listing of its folder says of a path. `None`: it is not there.
    fn listed(&self, path: &Path) -> Result<Option<ListedName>> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(None);
        };
        self.list(folder, |names| names.iter().find(|listed| listed.name == name).cloned())
    }
}

impl Tree for RemoteTree<'_> {
    fn exists(&self, path: &Path) -> bool {
        match self.listed(path) {
            Ok(listed) => listed.is_some(),
            Err(e) => !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Unsupported),
        }
    }

    fn is_folder(&self, path: &Path) -> bool {
        self.listed(path)
            .is_ok_and(|listed| listed.is_some_and(|listed| listed.is_folder))
    }

    fn names_in(&self, folder: &Path) -> Result<Names, String> {
        let is_utf8 = |listed: &&ListedName| listed.name.to_str().is_some();
        let known = self.list(folder, |names| {
            let names = names.iter().filter(is_utf8);
            names.map(|listed| listed.name.clone()).collect::<Vec<OsString>>()
        });
        match known {
            Ok(names) => Ok(Names::Known(names)),
            Err(e) if e.kind() == ErrorKind::Unsupported => Ok(Names::NoFolder),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Os(libc::EACCES)) => {
                Ok(Names::Unreadable(e.to_string()))
            }
            Err(e) => Err(e.to_string()),
        }
    }

    fn read_start(&self, path: &Path, most: u64) -> io::Result<Vec<u8>> {
        self.browser.read_start(path, most).map_err(io::Error::other)
    }

    fn max_matches(&self) -> usize {
        MAX_MATCHES
    }
}
