//! A mount before its arguments are resolved, from the program or from the mount helper.

use std::ffi::OsStr;
use std::fs;

use super::disk_args::DiskArgs;
use super::disks::{self, ResolvedDisk};
use super::options::MountArgs;
use super::outcome::UsageError;
use super::subcommand::Subcommand;
use super::target;
use super::values::display;
use crate::config::{Action, Config, MountConfig, MountKind};

/// Arguments of a mount before they are resolved, from the program or from the mount helper.
#[derive(Debug)]
pub(super) struct MountRequest<'a> {
    pub(super) mountpoint: &'a OsStr,
    pub(super) disk_args: DiskArgs,
    pub(super) mount_args: MountArgs,
    pub(super) foreground: bool,
    /// Source that mount tables show, if it is not that of the first disk.
    pub(super) source: Option<String>,
}

impl MountRequest<'_> {
    /// Resolves the arguments into the configuration of a mount.
    pub(super) fn into_config(self) -> Result<Config, UsageError> {
        let mount_args = self.mount_args;
        let subcommand = Subcommand::Mount {
            read_only: mount_args.options.read_only,
        };
        let resolved = disks::resolve(self.disk_args, subcommand)?;
        // The keys come first: a typo in one is a better error than the state of the mount point.
        let target = target::resolve(self.mountpoint)?;
        let fixed = target.file_name.as_deref();
        if let Some(name) = fixed {
            check_one_file(name, target.target.kind, &resolved)?;
        }
        let disks = disks::configs(resolved, fixed, subcommand)?;
        disks::check_names(&disks)?;
        let mount = MountConfig {
            target: target.target,
            disks,
            foreground: self.foreground,
            pidfile: mount_args.pidfile,
            options: mount_args.options,
            threads: mount_args.threads,
            source: self.source,
        };
        Ok(Config {
            action: Action::Mount(mount),
            log: mount_args.log,
        })
    }
}

/// Checks that a mount point that names one file gets exactly one disk, and that `name=` does not contradict it.
fn check_one_file(name: &OsStr, kind: MountKind, disks: &[ResolvedDisk]) -> Result<(), UsageError> {
    let form = match kind {
        MountKind::Dir => "does not exist, so it would be the name of one file",
        MountKind::File => "is a regular file, so the mount would show one disk in its place",
    };
    if disks.len() > 1 {
        let (name, count) = (display(name), disks.len());
        return Err(UsageError::new(format!(
            "mount point {name} {form}, but there are {count} disks"
        )));
    }
    let requested = disks
        .iter()
        .find_map(|disk| disk.requested_name())
        .filter(|requested| *requested != name);
    requested.map_or(Ok(()), |requested| {
        let (name, requested) = (display(name), display(requested));
        Err(UsageError::new(format!(
            "mount point {name} {form}, but name={requested} gives another name: remove name="
        )))
    })
}

/// Returns a path as mount(8) shows and compares it: canonical where it exists, or else absolute.
pub(super) fn path_in_table(path: &OsStr) -> String {
    let canonical = fs::canonicalize(path).or_else(|_| std::path::absolute(path));
    canonical.unwrap_or_else(|_| path.into()).to_string_lossy().into_owned()
}
