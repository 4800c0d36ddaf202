//! The words after the mount point: `KEY=VALUE` and bare sources → disks.
//!
//! ```text
//!   words ─ classify ─► (key, value) ─ keys table ─► Settings: common, then one a source
//!                                                        │ wildcards and folders give their files
//!                                                        ▼
//!                                             Requested: one a disk, common keys below its own
//! ```
//! All keys are checked before the first look at the file system.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::keys::{self, Key, Scope};
use super::{
    UsageError, nbd, sources,
    values::{self, shown},
    writing::{self, Creation, Purpose},
};
use crate::config::{DiskConfig, Format, KernelView, LocalConfig, Overlay, PageCache, SourceConfig, ViewConfig};

/// What was said about one disk, or about all.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    /// Where it comes from; never in the common ones.
    pub(super) source: Option<SourceSpec>,
    /// `name=`
    pub(super) name: Option<OsString>,
    /// `readonly=`
    pub(super) read_only: Option<bool>,
    /// `cache=`
    pub(super) cache: Option<PageCache>,
    /// `cache-size=`
    pub(super) cache_size: Option<u64>,
    /// `readahead=`
    pub(super) readahead: Option<u64>,
    /// `format=`
    pub(super) format: Option<Format>,
    /// `allow-dir=`
    pub(super) allow_dirs: Vec<PathBuf>,
    /// `degraded=cid`
    pub(super) accept_cid_mismatch: Option<bool>,
    /// `lock=`
    pub(super) lock: Option<bool>,
    /// `kernel-view=`
    pub(super) view: Option<KernelView>,
    /// `view-size=`
    pub(super) view_size: Option<u64>,
    /// `view-dir=`
    pub(super) view_dir: Option<PathBuf>,
    /// `cow=`
    pub(super) overlay: Option<Overlay>,
    /// `force=`
    pub(super) force: Option<bool>,
    /// `create=` and its company
    pub(super) creation: Creation,
    /// The keys of an NBD server.
    pub(super) nbd: nbd::Server,
    /// `backend=`
    pub(super) backend: Option<Backend>,
    /// The keys that were given, to find the one that was given twice.
    given: Vec<&'static str>,
}

/// `backend=`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// The built-in engine.
    Native,
    /// An NBD server.
    Nbd,
}

/// A source as it was written.
#[derive(Debug, Clone)]
pub(super) enum SourceSpec {
    /// One file, or a pattern of several.
    File(PathBuf),
    /// All disks of a folder.
    Dir(PathBuf),
    /// An NBD server's URI.
    Nbd(String),
}

/// One disk, all its settings gathered; its name is still open.
#[derive(Debug)]
pub(super) struct Requested {
    place: Place,
    settings: Settings,
}

/// Where one disk comes from.
#[derive(Debug)]
enum Place {
    /// A file.
    File(PathBuf),
    /// An NBD server; its URI, if it has one.
    Nbd(Option<String>),
}

/// A word, taken apart.
#[derive(Debug, PartialEq, Eq)]
enum Word<'a> {
    /// `KEY=VALUE`, whether the key is known or not.
    Key(&'a str, &'a OsStr),
    /// A source without its key.
    Bare(&'a OsStr),
}

impl Settings {
    /// Takes one more key. Errors: see [`Key::apply`]; also a key given twice that may not be.
    fn add(&mut self, key: &'static Key, value: &OsStr) -> Result<(), UsageError> {
        key.apply(self, value)?;
        if !key.repeats && self.given.contains(&key.name) {
            return Err(UsageError::new(format!("{}= is given twice for the same disk", key.name)));
        }
        self.given.push(key.name);
        Ok(())
    }

    /// These settings, with `common` where they are silent. Folders of both are allowed.
    fn over(&self, common: &Self) -> Self {
        Self {
            source: self.source.clone(),
            name: self.name.clone().or_else(|| common.name.clone()),
            read_only: self.read_only.or(common.read_only),
            cache: self.cache.or(common.cache),
            cache_size: self.cache_size.or(common.cache_size),
            readahead: self.readahead.or(common.readahead),
            format: self.format.or(common.format),
            allow_dirs: [common.allow_dirs.as_slice(), &self.allow_dirs].concat(),
            accept_cid_mismatch: self.accept_cid_mismatch.or(common.accept_cid_mismatch),
            lock: self.lock.or(common.lock),
            view: self.view.or(common.view),
            view_size: self.view_size.or(common.view_size),
            view_dir: self.view_dir.clone().or_else(|| common.view_dir.clone()),
            overlay: self.overlay.clone().or_else(|| common.overlay.clone()),
            force: self.force.or(common.force),
            creation: self.creation.over(common.creation),
            nbd: self.nbd.over(&common.nbd),
            backend: self.backend.or(common.backend),
            given: Vec::new(),
        }
    }

    /// The files that the source stands for; a disk that is to be made is one, whatever its name looks like.
    fn files(&self, purpose: Purpose) -> Result<Vec<PathBuf>, UsageError> {
        match &self.source {
            Some(SourceSpec::Dir(_)) if self.creation.is_wanted(purpose) => {
                Err(UsageError::new("a new disk is named with file=PATH, but dir= means the disks of a folder"))
            }
            Some(SourceSpec::File(path)) if self.creation.is_wanted(purpose) => Ok(vec![path.clone()]),
            Some(SourceSpec::File(path)) => sources::expand(path),
            Some(SourceSpec::Dir(dir)) => sources::disks_of(dir),
            Some(SourceSpec::Nbd(_)) | None => Ok(Vec::new()),
        }
    }

    /// The disks that the source stands for.
    fn places(&self, purpose: Purpose) -> Result<Vec<Place>, UsageError> {
        let is_nbd = matches!(self.source, Some(SourceSpec::Nbd(_))) || self.source.is_none();
        match (self.backend, &self.source) {
            (Some(Backend::Native), _) if is_nbd => {
                Err(UsageError::new("backend=native reads files, but no file is named"))
            }
            (Some(Backend::Nbd), Some(SourceSpec::File(_) | SourceSpec::Dir(_))) => {
                Err(UsageError::new("backend=nbd needs a server, but a file is named"))
            }
            (_, Some(SourceSpec::Nbd(uri))) => Ok(vec![Place::Nbd(Some(uri.clone()))]),
            (_, Some(_)) => {
                if let Some(key) = self.nbd.first_key() {
                    return Err(UsageError::new(format!("{key}= is for NBD servers, but the disk is a local file")));
                }
                Ok(self.files(purpose)?.into_iter().map(Place::File).collect())
            }
            (_, None) if self.nbd.is_named() => Ok(vec![Place::Nbd(None)]),
            (_, None) => Ok(Vec::new()),
        }
    }
}

impl Requested {
    /// The name that the user asked for.
    pub(super) fn wanted_name(&self) -> Option<&OsStr> {
        self.settings.name.as_deref()
    }

    /// The finished disk; `fixed` is a name that the mount point gives it.
    fn into_config(self, fixed: Option<&OsStr>, purpose: Purpose) -> Result<DiskConfig, UsageError> {
        let Self { place, settings } = self;
        let path = match place {
            Place::File(path) => path,
            Place::Nbd(uri) => return nbd_config(uri, settings, fixed, purpose),
        };
        let wanted = fixed.map(OsStr::to_owned).or(settings.name);
        let create = settings.creation.config(purpose);
        let create = create.map_err(|e| UsageError::new(format!("{}: {e}", path.display())))?;
        let disk = DiskConfig {
            name: wanted.unwrap_or_else(|| sources::default_name(&path)),
            read_only: settings.read_only.unwrap_or_default(),
            cache: settings.cache,
            cache_size: settings.cache_size,
            readahead: settings.readahead,
            overlay: settings.overlay,
            source: SourceConfig::Local(LocalConfig {
                path,
                format: settings.format.unwrap_or_default(),
                allow_dirs: settings.allow_dirs,
                accept_cid_mismatch: settings.accept_cid_mismatch.unwrap_or_default(),
                lock: settings.lock.unwrap_or(true),
                force: settings.force.unwrap_or_default(),
                create,
                view: ViewConfig {
                    mode: settings.view.unwrap_or_default(),
                    size: settings.view_size.unwrap_or(ViewConfig::default().size),
                    dir: settings.view_dir,
                },
            }),
        };
        writing::check_disk(&disk, purpose)?;
        Ok(disk)
    }
}

/// The finished disks; `fixed` is a name that the mount point gives the only one.
///
/// Errors: keys that do not go together, or two disks that would be in each other's way.
pub(super) fn configs(
    requested: Vec<Requested>,
    fixed: Option<&OsStr>,
    purpose: Purpose,
) -> Result<Vec<DiskConfig>, UsageError> {
    let disks = requested.into_iter().map(|disk| disk.into_config(fixed, purpose)).collect::<Result<Vec<_>, _>>()?;
    writing::check_files(&disks)?;
    Ok(disks)
}

/// The disks that `words` ask for, in their order. The keys of `options` (from `-o`) hold for all disks, wherever they
/// stood; a source among them is a disk before those of the words.
///
/// Errors: unknown and unfit keys, a source that gives no file, `name=` for several disks, no disk at all.
pub(super) fn disks(
    options: &[(&'static Key, OsString)],
    words: &[OsString],
    purpose: Purpose,
) -> Result<Vec<Requested>, UsageError> {
    let (common, mut groups) = settings(options, words)?;
    // Keys that name a server start no disk by themselves: they may stand in any order.
    if groups.is_empty() && common.nbd.is_named() {
        groups.push(Settings::default());
    }
    let mut disks = Vec::new();
    for group in &groups {
        let settings = group.over(&common);
        let places = settings.places(purpose)?;
        if let (Some(name), 2..) = (&group.name, places.len()) {
            return Err(name_of_many(name, places.len()));
        }
        disks.extend(places.into_iter().map(|place| Requested { place, settings: settings.clone() }));
    }
    match (&common.name, disks.len()) {
        (_, 0) => Err(UsageError::new("no disk is given: add file=PATH, or uri= of an NBD server")),
        (Some(name), many @ 2..) => Err(name_of_many(name, many)),
        _ => Ok(disks),
    }
}

/// Checks that every disk can be a file of one folder. Errors: two of the same name, or a name that no file can have.
pub(super) fn check_names(disks: &[DiskConfig]) -> Result<(), UsageError> {
    let mut seen: HashMap<&OsStr, &DiskConfig> = HashMap::new();
    for disk in disks {
        let path = disk.source.label();
        values::file_name(&disk.name)
            .map_err(|e| UsageError::new(format!("{path} cannot be called {}: {e}; use name=", shown(&disk.name))))?;
        if let Some(other) = seen.insert(&disk.name, disk) {
            return Err(UsageError::new(format!(
                "{} and {path} would both be called {}: use name= for one of them",
                other.source.label(),
                shown(&disk.name),
            )));
        }
    }
    Ok(())
}

/// A source that is bare whatever it looks like, with its key in front.
pub(super) fn with_key(source: &OsStr) -> OsString {
    let mut word = OsString::from(key_of_bare(source));
    word.push("=");
    word.push(source);
    word
}

/// The known key that a word starts with; then it is hardly a path.
pub(super) fn known_key(word: &OsStr) -> Option<&'static str> {
    split_key(word).and_then(|(name, _)| keys::find(name)).map(|key| key.name)
}

/// The error for a key that is not in the table. The value is not repeated: it may be a secret.
pub(super) fn unknown_key(name: &str) -> UsageError {
    let hint = match keys::nearest(name) {
        Some(known) => format!("did you mean {known}=?"),
        None => "--help lists the keys.".into(),
    };
    UsageError::new(format!("unknown key {name}=; {hint} A file whose name holds a = is written file={name}=..."))
}

fn settings(options: &[(&'static Key, OsString)], words: &[OsString]) -> Result<(Settings, Vec<Settings>), UsageError> {
    let mut common = Settings::default();
    let mut groups: Vec<Settings> = Vec::new();
    for (key, value) in options {
        match key.scope {
            Scope::Starts => start(&mut groups, key, value)?,
            Scope::OneDisk | Scope::Common => common.add(key, value)?,
        }
    }
    let from_options = groups.len();
    for word in words {
        let (key, value) = known(&classify(word))?;
        match (key.scope, groups.len() > from_options) {
            (Scope::Starts, _) => start(&mut groups, key, value)?,
            (_, true) => groups.last_mut().map_or(Ok(()), |last| last.add(key, value))?,
            (_, false) => common.add(key, value)?,
        }
    }
    Ok((common, groups))
}

fn start(groups: &mut Vec<Settings>, key: &'static Key, value: &OsStr) -> Result<(), UsageError> {
    let mut group = Settings::default();
    group.add(key, value)?;
    groups.push(group);
    Ok(())
}

fn known<'a>(word: &Word<'a>) -> Result<(&'static Key, &'a OsStr), UsageError> {
    let (name, value) = match *word {
        Word::Key(name, value) => (name, value),
        Word::Bare(value) => (key_of_bare(value), value),
    };
    match keys::find(name) {
        Some(key) => Ok((key, value)),
        None => Err(unknown_key(name)),
    }
}

/// A word is `KEY=VALUE` only where what stands before the first `=` has the shape of a key.
fn classify(word: &OsStr) -> Word<'_> {
    split_key(word).map_or(Word::Bare(word), |(name, value)| Word::Key(name, value))
}

/// Splits at the first `=`, if the shape of a key, `[a-z][a-z0-9-]*`, stands before it.
pub(super) fn split_key(word: &OsStr) -> Option<(&str, &OsStr)> {
    let bytes = word.as_bytes();
    let (name, value) = bytes.split_at(bytes.iter().position(|b| *b == b'=')?);
    let shaped = name.first().is_some_and(u8::is_ascii_lowercase)
        && name.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    let name = std::str::from_utf8(name).ok().filter(|_| shaped)?;
    Some((name, OsStr::from_bytes(value.strip_prefix(b"=")?)))
}

/// The key that a bare value goes without.
fn key_of_bare(value: &OsStr) -> &'static str {
    const SCHEMES: [(&str, &str); 7] = [
        ("nbd://", "uri"),
        ("nbds://", "uri"),
        ("nbd+unix://", "uri"),
        ("nbds+unix://", "uri"),
        ("nbd+vsock://", "uri"),
        ("https://", "url"),
        ("http://", "url"),
    ];
    let starts = |scheme: &str| {
        value.as_bytes().get(..scheme.len()).is_some_and(|head| head.eq_ignore_ascii_case(scheme.as_bytes()))
    };
    SCHEMES.iter().find(|(scheme, _)| starts(scheme)).map_or("file", |(_, key)| key)
}

fn name_of_many(name: &OsStr, disks: usize) -> UsageError {
    UsageError::new(format!("name={} would be the name of {disks} disks: it can be given to one only", shown(name)))
}

/// The finished disk of an NBD server.
fn nbd_config(
    uri: Option<String>,
    settings: Settings,
    fixed: Option<&OsStr>,
    purpose: Purpose,
) -> Result<DiskConfig, UsageError> {
    let (format, allow) = (settings.format.is_some(), !settings.allow_dirs.is_empty());
    let local = [
        ("format", format),
        ("allow-dir", allow),
        ("degraded", settings.accept_cid_mismatch.is_some()),
        ("lock", settings.lock.is_some()),
        ("force", settings.force.is_some()),
        ("create", settings.creation.asked.is_some()),
    ];
    if let Some((key, _)) = local.into_iter().find(|(_, given)| *given) {
        return Err(UsageError::new(format!("{key}= is for local files, but the disk is an NBD server's")));
    }
    if purpose == Purpose::Create {
        return Err(UsageError::new("--create makes VMDKs, but an NBD server is named"));
    }
    let nbd = settings.nbd.config(uri)?;
    let wanted = fixed.map(OsStr::to_owned).or(settings.name);
    if nbd.dynamic && (wanted.is_some() || settings.overlay.is_some()) {
        let key = if wanted.is_some() { "one name" } else { "cow=" };
        return Err(UsageError::new(format!("dynamic-export=true makes a file of every export, but {key} is for one")));
    }
    let disk = DiskConfig {
        name: wanted.unwrap_or_else(|| sources::export_name(&nbd)),
        read_only: settings.read_only.unwrap_or_default(),
        cache: settings.cache,
        cache_size: settings.cache_size,
        readahead: settings.readahead,
        overlay: settings.overlay,
        source: SourceConfig::Nbd(nbd),
    };
    writing::check_disk(&disk, purpose)?;
    Ok(disk)
}

#[cfg(test)]
mod tests;
