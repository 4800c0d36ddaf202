//! The command line: words → [`Config`].
//!
//! ```text
//!   argv ─ program ─┬─ options.rs   -o lists ──────────┐
//!    or    helper   ├─ params.rs    KEY=VALUE, sources ┼─► assembled here ─► Config
//!      │            └─ target.rs    MOUNTPOINT ────────┘
//!      └ --config: config_file.rs turns the file into the words and options that it stands for
//!          keys.rs: the one table of keys    values.rs: text → type    sources.rs: wildcards and folders
//!          words.rs: one word → a key and its value    settings.rs: what is said about a disk → its configuration
//!          nbd.rs: the keys of NBD servers
//!          writing.rs: the keys of writing, and which of them go together
//! ```
//! Called as `mount.vmdkfuse` it is the helper of mount(8). Nothing here opens an image, except that `dir=` looks at the
//! first bytes of the files of its folder. Paths are made absolute, for the daemon leaves the current directory.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::{Action, Config, DiskConfig, LogConfig, MountConfig, MountKind, Query};

mod args;
mod argument;
mod config_file;
mod disk_args;
mod expand;
mod keys;
mod mount_helper;
mod nbd;
mod options;
mod settings;
mod target;
#[cfg(test)]
mod test_args;
mod values;
mod writing;

use disk_args::DiskArgs;
use options::Options;
use values::shown;
use writing::Subcommand;

/// What the words ask for.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    /// To do this.
    Run(Box<Config>),
    /// To print this as it is, which may be nothing, and to succeed.
    Print(String),
}

/// The words cannot be followed. Displays one line that says what is wrong, without the program's name; status 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageError(String);

impl UsageError {
    fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    /// The one answer to everything that the contract knows and this build does not have.
    fn not_yet(what: impl fmt::Display) -> Self {
        Self(format!("{what} is not in this build yet"))
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// Reads a whole command line, the program's name first: it decides between the program and the helper of mount(8).
///
/// It looks at the file system for the mount point, for wildcards and for `dir=`, and does not change it.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Parsed, UsageError> {
    let mut args = args.into_iter();
    let name = args.next().unwrap_or_default();
    if mount_helper::is_name_of(Path::new(&name)) {
        mount_helper::parse(args)
    } else {
        args::parse(args)
    }
}

/// What a mount is made of, before it is understood; of the program or of the helper.
#[derive(Debug)]
struct MountRequest<'a> {
    mountpoint: &'a OsStr,
    disk_args_given: DiskArgs<'a>,
    options: &'a Options,
    foreground: bool,
    pidfile: Option<PathBuf>,
    threads: Option<usize>,
}

impl MountRequest<'_> {
    fn into_config(self, log: LogConfig) -> Result<Config, UsageError> {
        let options = self.options.mount()?;
        let subcommand = Subcommand::Mount {
            read_only: options.read_only,
        };
        let resolved = disk_args::disks(&self.options.keys, self.disk_args_given, subcommand)?;
        let target = target::resolve(self.mountpoint)?;
        let fixed = target.file_name.as_deref();
        if let Some(name) = fixed {
            check_one_file(name, target.target.kind, &resolved)?;
        }
        let disks = disk_args::configs(resolved, fixed, subcommand)?;
        disk_args::check_names(&disks)?;
        let Self {
            foreground,
            pidfile,
            threads,
            ..
        } = self;
        let mount = MountConfig {
            target: target.target,
            disks,
            foreground,
            pidfile,
            options,
            threads,
        };
        Ok(Config {
            action: Action::Mount(mount),
            log,
        })
    }
}

/// A mount point that is one file's takes one disk, and nobody else names that.
fn check_one_file(name: &OsStr, kind: MountKind, disks: &[disk_args::ResolvedDisk]) -> Result<(), UsageError> {
    let place = match kind {
        MountKind::Dir => "does not exist, so it would be the name of one file",
        MountKind::File => "is a regular file, so the mount would show one disk in its place",
    };
    if disks.len() > 1 {
        let (name, count) = (shown(name), disks.len());
        return Err(UsageError::new(format!(
            "mount point {name} {place}, but there are {count} disks"
        )));
    }
    let wanted = disks
        .iter()
        .find_map(|disk| disk.wanted_name())
        .filter(|wanted| *wanted != name);
    wanted.map_or(Ok(()), |wanted| {
        let (name, wanted) = (shown(name), shown(wanted));
        Err(UsageError::new(format!(
            "mount point {name} {place}, but name={wanted} says otherwise"
        )))
    })
}

/// The disks of an action that mounts none.
fn unmounted(words: &[OsString], subcommand: Subcommand) -> Result<Vec<DiskConfig>, UsageError> {
    disk_args::configs(
        disk_args::disks(&[], DiskArgs::Words(words), subcommand)?,
        None,
        subcommand,
    )
}

fn query(words: &[OsString], json: bool) -> Result<Query, UsageError> {
    Ok(Query {
        disks: unmounted(words, Subcommand::Query)?,
        json,
    })
}

fn commit(words: &[OsString]) -> Result<Action, UsageError> {
    let mut disks = unmounted(words, Subcommand::Commit)?;
    match (disks.pop(), disks.len()) {
        (Some(disk), 0) => Ok(Action::Commit(disk)),
        (_, more) => Err(UsageError::new(format!(
            "--commit takes one disk, but there are {}",
            more + 1
        ))),
    }
}

/// An error of clap as one line: without its prefix, and without usage and the like, which `--help` tells.
fn one_line(error: &clap::Error) -> UsageError {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let ends = ["\n\nUsage:", "\n\nFor more information"];
    let end = ends.iter().filter_map(|end| text.find(end)).min().unwrap_or(text.len());
    let sentences = text[..end]
        .split("\n\n")
        .map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    UsageError::new(sentences.collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::ffi::OsStrExt;

    use super::test_args::{config_of, mount_of};
    use super::*;
    use crate::config::{MountOptions, MountTarget};

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
        assert!(error.contains("both be called x.raw: use name="), "{error}");
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
    fn a_source_name_too_long_for_the_mount_is_no_matter_where_the_mount_point_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let source = format!("/{}", "x".repeat(255));
        assert!(mount(&[dir.path().to_str().unwrap(), &source]).is_err());
        assert!(mount(&[dir.path().join("short").to_str().unwrap(), &source]).is_ok());
    }

    #[test]
    fn words_need_not_be_utf8() {
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
    fn the_name_of_the_program_decides_who_reads() {
        let dir = tempfile::tempdir().unwrap();
        let args = |name: &str| [name.into(), "/a".into(), dir.path().into(), "-n".into()];
        assert!(matches!(parse(args("/sbin/mount.vmdkfuse")), Ok(Parsed::Run(_))));
        assert!(parse(args("/usr/bin/vmdkfuse")).is_err(), "-n is the helper's");
        assert!(parse(Vec::new()).is_err());
    }
}
