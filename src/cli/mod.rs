//! Command line: parses the arguments into a [`Config`].
//!
//! ```text
//!   argv ─ args ──────────┬─ argument.rs  KEY=VALUE, sources ─┐
//!    or    mount_helper   ├─ options.rs   -o lists, --threads ┼─► pairs (pair.rs), applied in layers ─► Config
//!    or    config_file    └─ ...          tables, keys        ┘
//!                             target.rs   MOUNTPOINT ─────────►
//!
//!   keys.rs: the table of all keys                values.rs: text → type
//!   disk_args.rs: pairs → disks                   expand.rs: wildcards and folders → files
//!   settings.rs: the pairs of a disk → its configuration
//!   https.rs: keys of web servers                 nbd.rs: keys of NBD servers
//!   vddk.rs: keys of disks that VDDK opens        create_args.rs: create=, create-*=
//!   overlay_args.rs: cow=, --commit, and the conflicts of keys that write
//! ```
//!
//! When the program is started as `mount.vmdkfuse`, it is the helper of mount(8), and as `umount.vmdkfuse` that of
//! umount(8). Parsing opens no image but to list disks: `dir=` reads the first bytes of the files in its folder, and a
//! package its list of members. All paths become absolute here, because the daemon changes its current directory later.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;

use crate::config::{Action, Config, DiskConfig, MountConfig, MountKind, Query};
use crate::error::{Error, ErrorKind};
use crate::process::daemon::Failure;

mod args;
mod argument;
mod config_file;
mod create_args;
mod disk_args;
mod expand;
mod https;
mod keys;
#[cfg(test)]
mod manual;
mod mount_helper;
mod nbd;
mod options;
mod overlay_args;
mod pair;
mod scheme;
mod settings;
mod target;
#[cfg(test)]
mod test_args;
mod unmount_helper;
mod values;
mod vddk;

use args::Subcommand;
use disk_args::DiskArgs;
use options::MountArgs;
use values::display;

/// Outcome of parsing a command line.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    /// Run the program with this configuration.
    Run(Box<Config>),
    /// Print this text unchanged and exit with status 0. The text may be empty.
    Print(String),
}

/// Invalid command line or configuration file; the program exits with status 2.
///
/// `Display` writes the reason as one line, without the program's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageError {
    /// Place in a configuration file.
    place: Option<String>,
    /// Key that the error is about.
    key: Option<&'static str>,
    message: String,
}

impl UsageError {
    fn new(message: impl Into<String>) -> Self {
        Self {
            place: None,
            key: None,
            message: message.into(),
        }
    }

    /// Creates an error about a key. The message is `KEY=` and `rest`.
    fn of(key: &'static str, rest: impl fmt::Display) -> Self {
        Self::new(format!("{key}={rest}")).about(key)
    }

    /// Returns the error with the key that it is about.
    fn about(self, key: &'static str) -> Self {
        Self { key: Some(key), ..self }
    }

    /// Creates the error for an option, key or value that is documented but missing from this build.
    fn not_yet(what: impl fmt::Display) -> Self {
        Self::new(format!("{what} is not in this build yet"))
    }

    /// Returns the error with a place in a configuration file, unless it has one.
    fn at(mut self, place: &str) -> Self {
        self.place.get_or_insert_with(|| place.to_owned());
        self
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for UsageError {}

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
    disk_args::check_found(disks).map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))
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

/// Arguments of a mount before they are resolved, from the program or from the mount helper.
#[derive(Debug)]
struct MountRequest<'a> {
    mountpoint: &'a OsStr,
    disk_args: DiskArgs,
    mount_args: MountArgs,
    foreground: bool,
    /// Source that mount tables show, if it is not that of the first disk.
    source: Option<String>,
}

impl MountRequest<'_> {
    /// Resolves the arguments into the configuration of a mount.
    fn into_config(self) -> Result<Config, UsageError> {
        let mount_args = self.mount_args;
        let subcommand = Subcommand::Mount {
            read_only: mount_args.options.read_only,
        };
        let resolved = disk_args::disks(self.disk_args, subcommand)?;
        // The keys come first: a typo in one is a better error than the state of the mount point.
        let target = target::resolve(self.mountpoint)?;
        let fixed = target.file_name.as_deref();
        if let Some(name) = fixed {
            check_one_file(name, target.target.kind, &resolved)?;
        }
        let disks = disk_args::configs(resolved, fixed, subcommand)?;
        disk_args::check_names(&disks)?;
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
fn check_one_file(name: &OsStr, kind: MountKind, disks: &[disk_args::ResolvedDisk]) -> Result<(), UsageError> {
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

/// Returns the disks of an action other than a mount, where no `-o` keys and no mount point take part.
fn unmounted(words: &[OsString], subcommand: Subcommand) -> Result<Vec<DiskConfig>, UsageError> {
    let disks = disk_args::disks(DiskArgs::of_words(Vec::new(), words)?, subcommand)?;
    disk_args::configs(disks, None, subcommand)
}

fn query(words: &[OsString], subcommand: Subcommand, json: bool) -> Result<Query, UsageError> {
    Ok(Query {
        disks: unmounted(words, subcommand)?,
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

/// Returns true if the file name of `program` is one of `names`.
fn has_name_of(program: &Path, names: &[&str]) -> bool {
    program
        .file_name()
        .is_some_and(|name| names.iter().any(|helper| name == *helper))
}

/// Converts an error of clap to one line: drops the `error:` prefix, the usage and the pointer to `--help`.
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
