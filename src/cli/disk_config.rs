//! Configuration of one disk: its settings and its source → [`DiskConfig`].

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::disk_source::DiskSource;
use super::https::HttpsSource;
use super::key::Group;
use super::outcome::UsageError;
use super::settings::Settings;
use super::subcommand::Subcommand;
use super::{expand, overlay_args, vddk};
use crate::config::{DiskConfig, HttpsConfig, LocalConfig, NamedBy, NbdConfig, SourceConfig};

/// Source of a disk, with its default file name and what to tell the user about it.
struct Source {
    config: SourceConfig,
    default_name: OsString,
    warnings: Vec<&'static str>,
}

/// Returns the configuration of the disk with source `disk_source`. `fixed` is the file name that the mount point gives
/// it.
///
/// Fails if keys conflict with each other or do not apply to the source.
pub(super) fn config(
    settings: &Settings,
    disk_source: DiskSource,
    fixed: Option<&OsStr>,
    subcommand: Subcommand,
) -> Result<DiskConfig, UsageError> {
    check_cache_dir(settings, &disk_source, subcommand)?;
    let name = fixed.map(OsStr::to_owned).or_else(|| settings.name.clone());
    let source = source(settings, disk_source, name.is_some(), subcommand)?;
    let of_cache = settings.cache.and_then(|(_, warning)| warning);
    let disk = DiskConfig {
        name: name.unwrap_or(source.default_name),
        read_only: settings.read_only,
        cache: settings.cache.map(|(mode, _)| mode),
        cache_size: settings.cache_size,
        readahead: settings.readahead,
        overlay: settings.overlay.clone(),
        map_limit: settings.map_limit,
        source: source.config,
        warnings: of_cache.into_iter().chain(source.warnings).collect(),
    };
    if settings.map_limit.is_some() && subcommand != Subcommand::Query {
        return Err(UsageError::of(
            "limit",
            " bounds the output of --map; a mount has no such limit",
        ));
    }
    overlay_args::check_disk(&disk, subcommand)?;
    Ok(disk)
}

/// Fails if the disk has keys of the disk cache that it does not take.
fn check_cache_dir(settings: &Settings, disk_source: &DiskSource, subcommand: Subcommand) -> Result<(), UsageError> {
    let (has_dir, has_size) = (settings.cache_dir.is_some(), settings.cache_dir_size.is_some());
    match disk_source {
        _ if !has_dir && !has_size => Ok(()),
        DiskSource::Https(_) | DiskSource::Vddk(_) if !has_dir => {
            Err(UsageError::of("cache-dir-size", " needs cache-dir="))
        }
        DiskSource::Https(_) => Ok(()),
        DiskSource::Vddk(_) => check_cache_dir_of_snapshot(settings, subcommand),
        DiskSource::File { .. } | DiskSource::Nbd(_) => {
            let key = if has_dir { "cache-dir" } else { "cache-dir-size" };
            let reason = "cache-dir= and cache-dir-size= are for disks on web servers (url=, or server= with file=) and for \
                          snapshots that VDDK opens (snapshot=): nothing shows between mounts that another disk has changed";
            Err(UsageError::new(reason).about(key))
        }
    }
}

/// Returns the folder of the disk cache and its size limit.
fn cache_dir(settings: &Settings) -> Option<(PathBuf, Option<u64>)> {
    settings.cache_dir.clone().map(|dir| (dir, settings.cache_dir_size))
}

/// Fails if the disk of VDDK may change between two mounts: the library tells nothing by which that would show.
fn check_cache_dir_of_snapshot(settings: &Settings, subcommand: Subcommand) -> Result<(), UsageError> {
    let only_read =
        settings.read_only || settings.overlay.is_some() || subcommand != Subcommand::Mount { read_only: false };
    match settings.vddk.snapshot.is_some() && only_read {
        true => Ok(()),
        false => Err(UsageError::of(
            "cache-dir",
            " needs snapshot=moref and -r (or cow=) with VDDK: only the disk of a snapshot cannot change between mounts",
        )),
    }
}

/// Returns the configuration of the source. `named` is true if the user gives the disk a file name.
fn source(
    settings: &Settings,
    disk_source: DiskSource,
    named: bool,
    subcommand: Subcommand,
) -> Result<Source, UsageError> {
    let mut warnings = Vec::new();
    let (default_name, config) = match disk_source {
        DiskSource::File { path, member, found_in } => {
            let create = settings.creation.config(subcommand);
            let create = create.map_err(|e| UsageError::new(format!("{}: {e}", path.display())))?;
            let name = expand::default_name(member.as_deref().map_or(&path, Path::new));
            let local = LocalConfig {
                path,
                member,
                found_in,
                parent: settings.parent.as_ref().map(|parent| parent.path.clone()),
                create,
                ..settings.image.clone()
            };
            (name, SourceConfig::Local(local))
        }
        DiskSource::Nbd(uri) => {
            let server = nbd(settings, uri, named, subcommand)?;
            (expand::export_name(&server), SourceConfig::Nbd(server))
        }
        DiskSource::Vddk(file) => {
            let create = settings.creation.config(subcommand)?;
            let cid = settings.image.degraded.cid;
            let (mut disk, of_disk) = settings
                .vddk
                .config(file, create, &settings.server, &settings.login, cid)?;
            disk.cache_dir = cache_dir(settings);
            warnings = of_disk;
            (vddk::default_name(&disk), SourceConfig::Vddk(Box::new(disk)))
        }
        DiskSource::Https(source) => {
            let (mut disk, of_server) = https(settings, source, subcommand)?;
            if named {
                disk.named = NamedBy::FileAndName;
            }
            warnings = of_server;
            let name = crate::store::https::file_name(&disk).map_err(|e| UsageError::new(e.to_string()))?;
            (
                expand::default_name(Path::new(&name)),
                SourceConfig::Https(Box::new(disk)),
            )
        }
    };
    Ok(Source {
        config,
        default_name,
        warnings,
    })
}

/// Returns the configuration of a disk on a web server, and what to tell the user about it.
fn https(
    settings: &Settings,
    source: HttpsSource,
    subcommand: Subcommand,
) -> Result<(HttpsConfig, Vec<&'static str>), UsageError> {
    let elsewhere = [Group::Local, Group::Create, Group::Nbd];
    if let Some(key) = settings.first(|key| elsewhere.contains(&key.group) && !key.fits(Group::VMware)) {
        return Err(UsageError::of(key, " does not fit a disk on a web server"));
    }
    if subcommand == Subcommand::Create {
        return Err(UsageError::new(
            "--create creates local VMDKs, but a web server is given",
        ));
    }
    let parent = settings.parent.as_ref().map(|parent| &*parent.text);
    let (login, image) = (&settings.login, &settings.image);
    let (mut disk, warnings) = settings.https.config(source, &settings.server, login, image, parent)?;
    disk.cache_dir = cache_dir(settings);
    Ok((disk, warnings))
}

/// Returns the configuration of an NBD server. `named` is true if a file name is given.
fn nbd(settings: &Settings, uri: Option<String>, named: bool, subcommand: Subcommand) -> Result<NbdConfig, UsageError> {
    if let Some(key) = settings.unfit_for_server() {
        return Err(UsageError::of(
            key,
            " is for local files, but the disk is on an NBD server",
        ));
    }
    if subcommand == Subcommand::Create {
        return Err(UsageError::new(
            "--create creates local VMDKs, but an NBD server is given",
        ));
    }
    let degraded = settings.image.degraded;
    if degraded.orphan || degraded.short {
        return Err(UsageError::of(
            "degraded",
            "orphan and degraded=short are for images, but the disk is on an NBD server",
        ));
    }
    let server = settings.nbd.config(uri, &settings.server, degraded.cid)?;
    if server.dynamic && (named || settings.overlay.is_some()) {
        let key = if named { "one name" } else { "cow=" };
        let rest = format_args!("true shows every export as a file, but {key} is for one file");
        return Err(UsageError::of("dynamic-export", rest));
    }
    Ok(server)
}
