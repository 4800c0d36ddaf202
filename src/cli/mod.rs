//! Command line: parses the arguments into a [`Config`](crate::config::Config).
//!
//! ```text
//!   mod                           the program, or a helper of mount(8) or umount(8)
//!   args, unmount_helper, mount_helper            command lines → configuration
//!   mount_request                 a mount: its arguments → its configuration (target: MOUNTPOINT)
//!   disks, disk_config            pairs → settings → configuration of each disk
//!   disk_source                   a source → its disks, by expand: wildcards and folders → files
//!   flags, help                   options of the program; texts of the help
//!   config_file, disk_args, options, argument     readers: TOML, words, -o lists → pairs
//!   keys                          the table of all keys of disks
//!   settings                      the pairs of a disk, applied in layers
//!   https, nbd, vddk, create_args, overlay_args   keys of one back end or feature
//!   login, server_args            keys of every kind of server
//!   key, pair                     a row of a table of keys; a key with its value
//!   values, scheme, subcommand, outcome           text → type; errors
//! ```
//!
//! A file uses only files below it in this list. Where keys of several files meet, the file above passes them as values.
//!
//! When the program is started as `mount.vmdkfuse`, it is the helper of mount(8), and as `umount.vmdkfuse` that of
//! umount(8). Parsing opens no image but to list disks: `dir=` reads the first bytes of the files in its folder, and a
//! package its list of members. All paths become absolute here, because the daemon changes its current directory later.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use crate::config::DiskConfig;
use crate::error::{Error, ErrorKind};
use crate::process::daemon::Failure;

mod args;
mod argument;
mod config_file;
mod create_args;
mod disk_args;
mod disk_config;
mod disk_source;
mod disks;
mod expand;
mod flags;
mod help;
mod https;
mod key;
mod keys;
mod login;
#[cfg(test)]
mod manual;
mod mount_helper;
mod mount_request;
mod nbd;
mod options;
mod outcome;
mod overlay_args;
mod pair;
mod scheme;
mod server_args;
mod settings;
mod subcommand;
mod target;
#[cfg(test)]
mod test_args;
mod unmount_helper;
mod values;
mod vddk;

pub use outcome::{Parsed, UsageError};

/// Parses a whole command line. The first argument is the program's name, which selects between the program itself and
/// the helpers of mount(8) and umount(8).
///
/// Parsing reads the file system to classify the mount point and to expand wildcards and `dir=`. It changes no file. `-N`
/// enters a mount namespace, and `password=-` asks on the terminal.
///
/// # Errors
///
/// Returns a [`UsageError`] if an argument is unknown, invalid, or conflicts with another one.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Parsed, UsageError> {
    let mut args = args.into_iter();
    let name = args.next().unwrap_or_default();
    if mount_helper::is_name_of(Path::new(&name)) {
        mount_helper::parse(args)
    } else if unmount_helper::is_name_of(Path::new(&name)) {
        unmount_helper::parse(args)
    } else {
        args::parse(args)
    }
}

/// Checks the disks of a mount of which a search on a server has found some.
///
/// # Errors
///
/// Fails if two of them have the same file name or write to the same overlay.
pub fn check_found(disks: &[DiskConfig]) -> crate::error::Result<()> {
    disks::check_found(disks).map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))
}

/// Exit statuses of the program. mount(8) defines those of its helpers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatuses {
    /// The command line is invalid.
    pub usage: u8,
    permission: u8,
    system: u8,
    other: u8,
}

impl ExitStatuses {
    /// Returns the statuses of the program, or of a helper if `program` is the name of one.
    pub fn of(program: &OsStr) -> Self {
        let program = Path::new(program);
        let [usage, permission, system, other] =
            if mount_helper::is_name_of(program) || unmount_helper::is_name_of(program) {
                [1, 1, 2, 32]
            } else {
                [2, 1, 1, 1]
            };
        Self {
            usage,
            permission,
            system,
            other,
        }
    }

    /// Returns the status for an action that failed.
    pub fn failed(&self, failure: Failure) -> u8 {
        match failure {
            Failure::Permission => self.permission,
            Failure::System => self.system,
            Failure::Other => self.other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::ffi::OsStrExt;

    use super::test_args::{config_of, mount_of};
    use super::*;
    use crate::config::{Action, MountConfig, MountKind, MountOptions, MountTarget};

    fn mount(args: &[&str]) -> Result<MountConfig, String> {
        config_of(parse(["vmdkfuse"].iter().chain(args).map(OsString::from))).map(mount_of)
    }

    #[test]
    fn a_mount_on_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mnt = dir.path().to_str().unwrap();
        let mount = mount(&[mnt, "/a/Fedora.vmdk", "/b/y.img", "name=z", "-o", "uid=1,cache-size=1M"]).unwrap();
        assert_eq!(
            mount.target,
            MountTarget {
                path: dir.path().into(),
                kind: MountKind::Dir
            }
        );
        assert_eq!(
            mount.options,
            MountOptions {
                uid: Some(1),
                ..MountOptions::default()
            }
        );
        let names: Vec<_> = mount.disks.iter().map(|disk| disk.name.as_os_str()).collect();
        assert_eq!(names, ["Fedora.raw", "z"]);
        assert!(mount.disks.iter().all(|disk| disk.cache_size == Some(1 << 20)));
        assert!(!mount.foreground && mount.pidfile.is_none() && mount.threads.is_none());
    }

    #[test]
    fn disks_of_the_same_name_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = mount(&[dir.path().to_str().unwrap(), "/a/x.vmdk", "/b/x.vmdk"]).unwrap_err();
        assert!(error.contains("both have the file name x.raw: use name="), "{error}");
    }

    #[test]
    fn a_mount_point_that_names_the_file_takes_one_disk() {
        let dir = tempfile::tempdir().unwrap();
        let new = dir.path().join("new.img");
        let new = new.to_str().unwrap();
        let config = mount(&[new, "/a/x.vmdk"]).unwrap();
        assert_eq!(
            config.target,
            MountTarget {
                path: dir.path().into(),
                kind: MountKind::Dir
            }
        );
        assert_eq!(config.disks[0].name, "new.img");
        assert!(mount(&[new, "/a/x.vmdk", "name=new.img"]).is_ok());
        let error = mount(&[new, "/a/x.vmdk", "name=other"]).unwrap_err();
        assert!(error.contains("new.img") && error.contains("name=other"), "{error}");
        let error = mount(&[new, "/a/x.vmdk", "/a/y.vmdk"]).unwrap_err();
        assert!(error.contains("does not exist") && error.contains("2 disks"), "{error}");
    }

    #[test]
    fn a_mount_over_a_file_takes_one_disk() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cover");
        fs::write(&file, "").unwrap();
        let path = file.to_str().unwrap();
        let config = mount(&[path, "/a/x.vmdk"]).unwrap();
        assert_eq!(
            config.target,
            MountTarget {
                path: file.clone(),
                kind: MountKind::File
            }
        );
        assert_eq!(config.disks[0].name, "cover");
        let error = mount(&[path, "/a/x.vmdk", "/a/y.vmdk"]).unwrap_err();
        assert!(error.contains("regular file") && error.contains("2 disks"), "{error}");
    }

    #[test]
    fn a_source_name_may_be_too_long_if_the_mount_point_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let source = format!("/{}", "x".repeat(255));
        assert!(mount(&[dir.path().to_str().unwrap(), &source]).is_err());
        assert!(mount(&[dir.path().join("short").to_str().unwrap(), &source]).is_ok());
    }

    #[test]
    fn arguments_need_not_be_utf8() {
        let dir = tempfile::tempdir().unwrap();
        let odd = OsStr::from_bytes(b"/\xff.vmdk");
        let args = [OsStr::new("vmdkfuse"), dir.path().as_os_str(), odd];
        let Ok(Parsed::Run(config)) = parse(args.map(OsString::from)) else {
            panic!("refused")
        };
        let Action::Mount(mount) = config.action else {
            panic!("no mount")
        };
        assert_eq!(mount.disks[0].name, OsStr::from_bytes(b"\xff.raw"));
    }

    #[test]
    fn the_program_name_selects_the_parser() {
        let dir = tempfile::tempdir().unwrap();
        let args = |name: &str| [name.into(), "/a".into(), dir.path().into(), "-n".into()];
        assert!(matches!(parse(args("/sbin/mount.vmdkfuse")), Ok(Parsed::Run(_))));
        assert!(
            parse(args("/usr/bin/vmdkfuse")).is_err(),
            "-n is an option of the helper only"
        );
        assert!(parse(Vec::new()).is_err());
    }
}
