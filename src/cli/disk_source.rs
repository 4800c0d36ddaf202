//! Sources of disks: what `file=`, `dir=` and the other sources of settings stand for, with patterns, folders and packages
//! expanded.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::expand::{self, Found};
use super::https::HttpsSource;
use super::key::Group;
use super::outcome::UsageError;
use super::settings::{Backend, DiskKey, Settings, SourceSpec};
use super::subcommand::Subcommand;
use super::values;
use super::vddk::{self, NOT_VDDK};
use crate::config::Format;

/// Source of one disk.
#[derive(Debug)]
pub(super) enum DiskSource {
    /// A local file.
    File {
        path: PathBuf,
        /// Disk of the package at that path.
        member: Option<String>,
        /// Folder that the user named, if a search below it found the file.
        found_in: Option<PathBuf>,
    },
    /// An NBD server, with its URI if `uri=` was given.
    Nbd(Option<String>),
    /// A file on a web server.
    Https(HttpsSource),
    /// A disk that VDDK opens: a local path, or the name in a datastore as it was given.
    Vddk(OsString),
}

impl DiskSource {
    /// Returns the sources of all disks that the settings describe. Empty if no source is given.
    ///
    /// Fails if a pattern or folder gives no file, or if a key does not fit the source.
    pub(super) fn all_of(settings: &Settings, subcommand: Subcommand) -> Result<Vec<Self>, UsageError> {
        if settings.is_vddk() {
            return of_vddk(settings, subcommand);
        }
        if let Some(key) = settings.first_of(&[Group::Vddk]) {
            return Err(UsageError::of(key, format_args!(" {NOT_VDDK}")));
        }
        if let Some(source) = on_web_server(settings, subcommand)? {
            return match settings.backend {
                None | Some(Backend::Https) => Ok(vec![Self::Https(source)]),
                Some(_) => Err(UsageError::new(
                    "the disk is on a web server: it needs backend=https, or no backend=",
                )),
            };
        }
        if let Some(key) = settings.first_of(&[Group::VMware]) {
            return Err(UsageError::of(
                key,
                " is for disks on a web server: add server= and file=\"[datastore] folder/disk.vmdk\", or url=",
            ));
        }
        let is_nbd = matches!(settings.source, Some(SourceSpec::Nbd(_)) | None);
        match (settings.backend, &settings.source) {
            (Some(Backend::Native), _) if is_nbd => {
                Err(UsageError::of("backend", "native reads files, but no file is given"))
            }
            (Some(Backend::Nbd), Some(SourceSpec::File(_) | SourceSpec::Dir(_))) => {
                Err(UsageError::of("backend", "nbd needs a server, but a file is given"))
            }
            (Some(Backend::Https), _) => Err(UsageError::of("backend", "https needs url=, or server= and file=")),
            (_, Some(SourceSpec::Nbd(uri))) => Ok(vec![Self::Nbd(Some(uri.clone()))]),
            (_, Some(_)) => local(settings, subcommand),
            (_, None) if settings.nbd.names_server() => Ok(vec![Self::Nbd(None)]),
            (_, None) => Ok(Vec::new()),
        }
    }
}

/// Returns the disks that VDDK opens: that of a datastore, or local files. Fails if a key does not fit them.
fn of_vddk(settings: &Settings, subcommand: Subcommand) -> Result<Vec<DiskSource>, UsageError> {
    let elsewhere = [Group::Local, Group::Nbd, Group::VMware];
    // An overlay has a parent.
    let degraded = settings.image.degraded;
    let only_cid = !degraded.orphan && !degraded.short;
    let fits = |name: &str| name == "degraded" && settings.overlay.is_some() && only_cid;
    let unfit = |key: &DiskKey| elsewhere.contains(&key.group) && !key.fits(Group::Vddk) && !fits(key.name);
    if let Some(key) = settings.first(unfit) {
        return Err(UsageError::of(key, " does not fit a disk that VDDK opens"));
    }
    let is_remote = settings.vddk.is_remote(&settings.server, &settings.login);
    let export = settings.nbd.export.as_ref();
    let of_files = |found: Found| {
        let files = found.files.into_iter();
        files.map(|path| DiskSource::Vddk(path.into_os_string())).collect()
    };
    match &settings.source {
        None if settings.is_vddk_export() && !is_remote => {
            let pattern = export.filter(|export| !export.text.is_empty());
            let pattern = pattern.ok_or_else(|| UsageError::of("export", ": a path is missing"))?;
            expand::expand(&pattern.path).map(of_files)
        }
        None if settings.is_vddk_export() => Err(UsageError::of(
            "export",
            ": VDDK lists no disks of a server: name each by file=, and export= is the pattern that they match",
        )),
        Some(SourceSpec::File(file)) => {
            if let Some(pattern) = export.filter(|pattern| !vddk::matches(&pattern.text, &file.text)) {
                let (file, pattern) = (values::display(&file.text), values::display(&pattern.text));
                let rest = format_args!("{file}: does not match export={pattern}");
                return Err(UsageError::of("file", rest));
            }
            match is_remote {
                true => Ok(vec![DiskSource::Vddk(file.text.clone())]),
                false => files(settings, subcommand).map(of_files),
            }
        }
        _ => Err(UsageError::new(
            "a disk for VDDK needs file=: the path of a VMDK, or \"[datastore] folder/disk.vmdk\"",
        )),
    }
}

/// Returns the source on a web server, if the disk is on one: `url=`, or `file=` with `server=` or `backend=https`.
fn on_web_server(settings: &Settings, subcommand: Subcommand) -> Result<Option<HttpsSource>, UsageError> {
    let has_server = settings.server.host.is_some();
    match &settings.source {
        None if subcommand == Subcommand::List && has_server && !settings.nbd.names_server() => {
            Ok(Some(HttpsSource::Server))
        }
        Some(SourceSpec::Url(url)) => Ok(Some(url.clone())),
        Some(SourceSpec::File(file)) if has_server || settings.backend == Some(Backend::Https) => {
            let text = file.text.to_str();
            let text = text.ok_or_else(|| UsageError::of("file", ": the name of a file in a datastore is UTF-8"))?;
            Ok(Some(match subcommand {
                Subcommand::List => HttpsSource::Folder(text.to_owned()),
                _ => HttpsSource::File(text.to_owned()),
            }))
        }
        _ => Ok(None),
    }
}

/// Returns the disks in local files. Fails if a key does not fit them.
fn local(settings: &Settings, subcommand: Subcommand) -> Result<Vec<DiskSource>, UsageError> {
    if let Some(key) = settings.first_of(&[Group::Nbd]) {
        return Err(UsageError::of(key, " is for NBD servers, but the disk is a local file"));
    }
    let found = files(settings, subcommand)?;
    let mut disks = Vec::new();
    for path in found.files {
        let members = members(settings, &path, subcommand)?.into_iter();
        disks.extend(members.map(|member| DiskSource::File {
            path: path.clone(),
            member,
            found_in: found.folder.clone(),
        }));
    }
    Ok(disks)
}

/// Returns the files of the source. The file of a created disk is never expanded, even if its name has wildcards.
fn files(settings: &Settings, subcommand: Subcommand) -> Result<Found, UsageError> {
    match &settings.source {
        Some(SourceSpec::Dir(_)) if settings.creation.is_enabled(subcommand) => Err(UsageError::new(
            "a created disk needs file=PATH, but dir= means all disks of a folder",
        )),
        Some(SourceSpec::File(file)) if settings.creation.is_enabled(subcommand) => Ok(Found::named(&file.path)),
        Some(SourceSpec::File(file)) => expand::expand(&file.path),
        Some(SourceSpec::Dir(dir)) => expand::disks_of(dir),
        Some(SourceSpec::Nbd(_) | SourceSpec::Url(_)) | None => Ok(Found::default()),
    }
}

/// Returns the members of a package that are the disks of a file; `None` is the file itself.
fn members(settings: &Settings, path: &Path, subcommand: Subcommand) -> Result<Vec<Option<String>>, UsageError> {
    let image = &settings.image;
    let is_package = image.format == Format::Auto && Format::is_package(path);
    if settings.creation.is_enabled(subcommand) || (!is_package && image.member.is_none()) {
        return Ok(vec![None]);
    }
    let members = match &image.member {
        Some(member) => vec![member.clone()],
        None => expand::disks_of_package(path)?,
    };
    Ok(members.into_iter().map(Some).collect())
}
