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
mod tests {
    use std::fs;

    use super::*;
    use crate::config::{NbdAddress, NbdConfig, NbdTls};

    fn parse(words: &[&str]) -> Result<Vec<DiskConfig>, String> {
        parse_with(&[], words)
    }

    fn parse_with(options: &[(&str, &str)], words: &[&str]) -> Result<Vec<DiskConfig>, String> {
        let options: Vec<_> = options.iter().map(|(key, value)| (keys::find(key).unwrap(), value.into())).collect();
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let purpose = Purpose::Mount { read_only: false };
        let requested = disks(&options, &words, purpose).map_err(|e| e.to_string())?;
        configs(requested, None, purpose).map_err(|e| e.to_string())
    }

    fn local(disk: &DiskConfig) -> &LocalConfig {
        disk.source.local().unwrap()
    }

    #[test]
    fn a_word_is_a_key_only_where_it_looks_like_one() {
        let key = |word, name, value| assert_eq!(classify(OsStr::new(word)), Word::Key(name, OsStr::new(value)));
        key("file=x", "file", "x");
        key("vm=moref=42", "vm", "moref=42");
        key("no-such-1=", "no-such-1", "");
        for bare in ["/a=b", "./a=b", "a/b=c", "A=b", "=a", "-a=b", "1a=b", "a_b=c", "a b=c", "x.vmdk", ""] {
            assert_eq!(classify(OsStr::new(bare)), Word::Bare(OsStr::new(bare)));
        }
        let odd = OsStr::from_bytes(b"a\xff=b");
        assert_eq!(classify(odd), Word::Bare(odd));
    }

    #[test]
    fn bare_values_find_their_key() {
        for uri in ["nbd://h", "nbds://h/x", "nbd+unix:///x?socket=/s", "nbds+unix:///", "nbd+vsock://2", "NBD://h"] {
            let disk = parse(&[uri]).unwrap().remove(0);
            assert!(matches!(&disk.source, SourceConfig::Nbd(n) if n.address == NbdAddress::Uri(uri.into())), "{uri}");
        }
        for url in ["https://h/folder/x?dcPath=d", "http://h/x"] {
            assert_eq!(parse(&[url]).unwrap_err(), "url= is not in this build yet", "{url}");
        }
        for file in ["/x.vmdk", "/nbd://h", "/a=b"] {
            assert_eq!(local(&parse(&[file]).unwrap()[0]).path, PathBuf::from(file));
        }
        assert!(local(&parse(&["nbd:h"]).unwrap()[0]).path.ends_with("nbd:h"));
    }

    #[test]
    fn every_setting_arrives() {
        let disks = parse(&[
            "file=/a.vmdk",
            "name=n",
            "readonly=yes",
            "cache=none",
            "cache-size=1M",
            "readahead=2M",
            "backend=native",
            "format=raw",
            "allow-dir=/one",
            "allow-dir=/two",
            "degraded=cid",
            "lock=off",
            "kernel-view=required",
            "view-size=4M",
            "view-dir=/v",
            "cow=/c.vmdk",
            "force=yes",
        ]);
        let expected = DiskConfig {
            name: "n".into(),
            read_only: true,
            cache: Some(PageCache::None),
            cache_size: Some(1 << 20),
            readahead: Some(2 << 20),
            overlay: Some(Overlay::File("/c.vmdk".into())),
            source: SourceConfig::Local(LocalConfig {
                path: "/a.vmdk".into(),
                format: Format::Raw,
                allow_dirs: vec!["/one".into(), "/two".into()],
                accept_cid_mismatch: true,
                lock: false,
                force: true,
                create: None,
                view: ViewConfig { mode: KernelView::Required, size: 4 << 20, dir: Some("/v".into()) },
            }),
        };
        assert_eq!(disks, Ok(vec![expected]));
    }

    #[test]
    fn nothing_said_is_the_default() {
        let disks = parse(&["/a.vmdk"]).unwrap();
        assert_eq!(disks[0].name, "a.raw");
        assert_eq!((disks[0].read_only, disks[0].cache), (false, None));
        assert_eq!((disks[0].cache_size, disks[0].readahead, &disks[0].overlay), (None, None, &None));
        assert!(!local(&disks[0]).force && local(&disks[0]).create.is_none());
        assert_eq!(local(&disks[0]).format, Format::Auto);
        assert!(!local(&disks[0]).accept_cid_mismatch && local(&disks[0]).allow_dirs.is_empty());
        assert!(local(&disks[0]).lock);
        assert_eq!(local(&disks[0]).view, ViewConfig::default());
    }

    #[test]
    fn a_second_source_starts_another_disk_and_common_keys_hold_for_all() {
        let disks = parse(&[
            "cache=none",
            "format=vmdk",
            "allow-dir=/all",
            "file=/a",
            "format=raw",
            "readonly=1",
            "file=/b",
            "allow-dir=/b-only",
            "/c",
        ])
        .unwrap();
        let formats: Vec<_> = disks.iter().map(|disk| local(disk).format).collect();
        assert_eq!(formats, [Format::Raw, Format::Vmdk, Format::Vmdk]);
        assert!(disks.iter().all(|disk| disk.cache == Some(PageCache::None)));
        assert_eq!(disks.iter().map(|disk| disk.read_only).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!(local(&disks[0]).allow_dirs, [PathBuf::from("/all")]);
        assert_eq!(local(&disks[1]).allow_dirs, [PathBuf::from("/all"), "/b-only".into()]);
    }

    #[test]
    fn keys_of_options_are_common_and_their_sources_are_disks() {
        let disks =
            parse_with(&[("cache", "none"), ("file", "/o")], &["readonly=yes", "/a", "cache=writethrough"]).unwrap();
        assert_eq!(disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>(), ["o.raw", "a.raw"]);
        assert_eq!(
            disks.iter().map(|disk| disk.cache).collect::<Vec<_>>(),
            [Some(PageCache::None), Some(PageCache::WriteThrough)]
        );
        assert!(disks.iter().all(|disk| disk.read_only));
    }

    #[test]
    fn a_key_given_twice_is_refused() {
        for words in [&["/a", "cache=none", "cache=none"][..], &["cache=none", "cache=none", "/a"]] {
            assert_eq!(parse(words).unwrap_err(), "cache= is given twice for the same disk");
        }
        assert!(parse(&["cache=none", "/a", "cache=none", "/b", "cache=none"]).is_ok());
        assert!(parse(&["allow-dir=/x", "allow-dir=/y", "/a"]).is_ok());
    }

    #[test]
    fn an_unknown_key_names_the_nearest_and_how_to_write_a_file_name() {
        let error = parse(&["/a", "cashe=none"]).unwrap_err();
        assert!(error.starts_with("unknown key cashe=; did you mean cache=? "), "{error}");
        assert!(error.contains("file=cashe="), "{error}");
        let error = parse(&["banana=secret"]).unwrap_err();
        assert!(error.contains("--help") && !error.contains("did you mean") && !error.contains("secret"), "{error}");
        let disks = parse(&["file=cashe=none.vmdk"]).unwrap();
        assert!(local(&disks[0]).path.ends_with("cashe=none.vmdk"));
    }

    #[test]
    fn keys_of_other_back_ends_answer_before_files_are_looked_for() {
        let error = parse(&["file=[ds1] dir/x.vmdk", "server=h"]).unwrap_err();
        assert_eq!(error, "server= is not in this build yet");
        let error = parse(&["password=hunter2", "/a"]).unwrap_err();
        assert_eq!(error, "password= is not in this build yet");
    }

    #[test]
    fn keys_after_a_pattern_hold_for_each_match_but_a_name_only_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let pattern = format!("file={}/*.img", dir.path().display());
        fs::write(dir.path().join("a.img"), "").unwrap();
        assert_eq!(parse(&[&pattern, "name=one"]).unwrap()[0].name, "one");
        fs::write(dir.path().join("b.img"), "").unwrap();
        let disks = parse(&[&pattern, "cache=none"]).unwrap();
        assert_eq!(disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>(), ["a.raw", "b.raw"]);
        assert!(disks.iter().all(|disk| disk.cache == Some(PageCache::None)));
        let error = parse(&[&pattern, "name=one"]).unwrap_err();
        assert_eq!(error, "name=one would be the name of 2 disks: it can be given to one only");
    }

    #[test]
    fn a_common_name_is_for_one_disk() {
        assert_eq!(parse(&["name=n", "/a"]).unwrap()[0].name, "n");
        assert_eq!(parse_with(&[("name", "n")], &["/a"]).unwrap()[0].name, "n");
        assert!(parse(&["name=n", "/a", "/b"]).unwrap_err().contains("2 disks"));
    }

    #[test]
    fn a_folder_gives_a_disk_for_each_of_its_images() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.vmdk", "a.vmdk"] {
            fs::write(dir.path().join(name), "# Disk DescriptorFile\n").unwrap();
        }
        let word = format!("dir={}", dir.path().display());
        let disks = parse(&[&word, "readonly=yes", "/c"]).unwrap();
        assert_eq!(disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>(), ["a.raw", "b.raw", "c.raw"]);
        assert_eq!(disks.iter().map(|disk| disk.read_only).collect::<Vec<_>>(), [true, true, false]);
        assert!(parse(&[&word, "name=n"]).is_err());
    }

    #[test]
    fn no_disk_is_an_error() {
        assert_eq!(parse(&[]).unwrap_err(), "no disk is given: add file=PATH, or uri= of an NBD server");
        assert_eq!(parse(&["cache=none"]).unwrap_err(), "no disk is given: add file=PATH, or uri= of an NBD server");
        assert_eq!(parse(&[""]).unwrap_err(), "file=: a path is missing");
    }

    fn server(words: &[&str]) -> Result<NbdConfig, String> {
        match parse(words)?.remove(0).source {
            SourceConfig::Nbd(server) => Ok(server),
            other => panic!("no server: {other:?}"),
        }
    }

    #[test]
    fn every_way_to_name_a_server_is_understood() {
        let of = |words: &[&str]| server(words).unwrap().address;
        let tcp = |host: &str, port: Option<&str>| NbdAddress::Tcp { host: host.into(), port: port.map(str::to_owned) };
        assert_eq!(of(&["hostname=h"]), tcp("h", None));
        assert_eq!(of(&["port=nbd", "hostname=::1"]), tcp("::1", Some("nbd")));
        assert_eq!(of(&["socket=/s", "export=a"]), NbdAddress::Unix("/s".into()));
        assert_eq!(of(&["socket-fd=7"]), NbdAddress::Fd(7));
        assert_eq!(of(&["vsock-cid=2"]), NbdAddress::Vsock { cid: 2, port: None });
        assert_eq!(of(&["vhost-cid=4294967295", "port=99"]), NbdAddress::Vsock { cid: u32::MAX, port: Some(99) });
        let words = ["nbdkit", "memory", "", "1G"].map(OsString::from).to_vec();
        assert_eq!(of(&["arg=memory", "command=nbdkit", "arg=", "arg=1G"]), NbdAddress::Command(words));
        assert_eq!(of(&["nbd+vsock://2:1/x"]), NbdAddress::Uri("nbd+vsock://2:1/x".into()));
    }

    #[test]
    fn every_setting_of_a_server_arrives() {
        let all = server(&[
            "nbds://h/a",
            "export=b",
            "connections=2",
            "tls-certificates=/c",
            "tls-verify=no",
            "tls-username=u",
            "tls-psk=/p",
            "timeout=7",
            "retry=3",
        ]);
        let expected = NbdConfig {
            export: Some("b".into()),
            connections: Some(2),
            tls: NbdTls::Require,
            tls_certificates: Some("/c".into()),
            tls_verify: Some(false),
            tls_username: Some("u".into()),
            tls_psk: Some("/p".into()),
            timeout: Some(std::time::Duration::from_secs(7)),
            retry: Some(3),
            ..NbdConfig::new(NbdAddress::Uri("nbds://h/a".into()))
        };
        assert_eq!(all, Ok(expected));
        assert_eq!(server(&["nbd://h", "shared=1"]).unwrap().connections, Some(1));
        assert_eq!(server(&["nbd://h"]).unwrap().tls, NbdTls::Off);
        assert_eq!(server(&["nbd://h", "tls=on"]).unwrap().tls, NbdTls::On);
        assert_eq!(server(&["nbd://h", "tls-psk=/p"]).unwrap().tls, NbdTls::Require);
        assert!(server(&["nbd://h", "dynamic-export=1"]).unwrap().dynamic);
    }

    #[test]
    fn words_about_servers_that_do_not_go_together_are_refused() {
        for (words, said) in [
            (&["nbd://h", "socket=/s"][..], "uri= and socket= both say where"),
            (&["hostname=h", "command=c"], "hostname= and command= both say where"),
            (&["socket=/s", "port=1"], "port= goes with hostname="),
            (&["nbd://h", "arg=x"], "arg= is an argument for command="),
            (&["vsock-cid=2", "port=nbd"], "port=nbd: a VSOCK port is a number"),
            (&["nbd://h", "dynamic-export=1", "export=a"], "but export= names one"),
            (&["nbd://h", "dynamic-export=1", "name=a"], "one name"),
            (&["nbd://h", "dynamic-export=1", "cow=/a"], "cow="),
            (&["nbd://h", "shared=1", "connections=2"], "shared=true means one connection"),
            (&["socket-fd=7", "connections=2"], "socket-fd= means one connection"),
            (&["nbds://h", "tls=off"], "the URI asks for TLS"),
            (&["nbd://h", "tls=off", "tls-psk=/p"], "tls-psk= says how to encrypt"),
            (&["nbd://h", "format=raw"], "format= is for local files"),
            (&["nbd://h", "create=1"], "create= is for local files"),
            (&["nbd://h", "backend=native"], "backend=native reads files"),
            (&["/x", "backend=nbd"], "backend=nbd needs a server"),
            (&["/x", "socket=/s"], "socket= is for NBD servers"),
            (&["/x", "timeout=3"], "timeout= is for NBD servers"),
            (&["uri=http://h"], "must start with nbd://"),
            (&["uri="], "a value is missing"),
            (&["socket-fd=2"], "must be a number from 3 to"),
            (&["nbd://h", "connections=0"], "must be a number from 1 to 16"),
            (&["nbd://h", "timeout=0"], "must be a number from 1 to 1800"),
            (&["hostname=a b"], "holds no blanks"),
            (&["nbd://h", "tls=maybe"], "must be off or on or require"),
        ] {
            let error = parse(words).unwrap_err();
            assert!(error.contains(said), "{words:?}: {error}");
        }
    }

    #[test]
    fn the_file_of_an_export_is_called_after_it() {
        for (words, name) in [
            (&["nbd://h"][..], "disk.raw"),
            (&["nbd://h/vm1"], "vm1.raw"),
            (&["nbd+unix:///a%2Fb?socket=/s/x"], "a%2Fb.raw"),
            (&["nbd+unix:///?socket=/s/x"], "disk.raw"),
            (&["nbd://h/a", "export=../b"], "..%2Fb.raw"),
            (&["hostname=h", "export=v"], "v.raw"),
            (&["hostname=h", "name=n"], "n"),
        ] {
            assert_eq!(parse(words).unwrap()[0].name, name, "{words:?}");
        }
    }

    #[test]
    fn two_servers_are_two_disks_and_secrets_are_not_shown() {
        let disks = parse(&["timeout=9", "nbd://a/x", "retry=1", "nbd://b/y"]).unwrap();
        assert_eq!(disks.len(), 2);
        let label = server(&["nbd://user:hunter2@h/x"]).unwrap().label();
        assert_eq!(label, "nbd://user@h/x");
    }

    #[test]
    fn names_in_a_mount_differ_and_are_possible() {
        assert!(check_names(&parse(&["/a/x.vmdk", "/b/y.vmdk"]).unwrap()).is_ok());
        let error = check_names(&parse(&["/a/x.vmdk", "/b/x.img"]).unwrap()).unwrap_err().to_string();
        assert_eq!(error, "/a/x.vmdk and /b/x.img would both be called x.raw: use name= for one of them");
        assert!(check_names(&parse(&["/a/x.vmdk", "/b/x.img", "name=z"]).unwrap()).is_ok());
        let long = format!("/{}", "x".repeat(255));
        let error = check_names(&parse(&[&long]).unwrap()).unwrap_err().to_string();
        assert!(error.contains("255 bytes; use name="), "{error}");
    }

    #[test]
    fn paths_that_are_not_utf8_go_through() {
        let mut word = OsString::from("file=");
        word.push(OsStr::from_bytes(b"/\xff.vmdk"));
        for word in [word, OsStr::from_bytes(b"/\xff.vmdk").to_owned()] {
            let disk = configs(disks(&[], &[word], Purpose::Query).unwrap(), None, Purpose::Query).unwrap().remove(0);
            assert_eq!(disk.name, OsStr::from_bytes(b"\xff.raw"));
            assert_eq!(local(&disk).path.as_os_str(), OsStr::from_bytes(b"/\xff.vmdk"));
        }
    }
}
