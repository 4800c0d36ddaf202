//! Helper of umount(8): `umount.vmdkfuse [-flnrv] [-N NAMESPACE] [-t TYPE] MOUNTPOINT`, the same as `--unmount`.
//!
//! umount(8) runs it for mounts that have `uhelper=vmdkfuse`, and `umount.fuse.vmdkfuse` for those of ordinary users.

use std::ffi::OsString;
use std::path::Path;

use clap::{ArgAction, Parser};

use super::options::MountArgs;
use super::outcome::{Parsed, UsageError};
use super::{mount_helper, values};
use crate::config::{Action, Config, UnmountConfig};

/// Program names under which umount(8) runs the helper.
const NAMES: [&str; 2] = ["umount.vmdkfuse", "umount.fuse.vmdkfuse"];

/// Returns true if `program` is the name of the helper.
pub(super) fn is_name_of(program: &Path) -> bool {
    mount_helper::has_name_of(program, &NAMES)
}

/// Arguments of the helper. Of the flags of umount(8) only `-l` has a meaning here. `-f` is for a server that does not
/// answer: every wait of the daemon has a deadline.
#[derive(Debug, Parser)]
#[command(name = NAMES[0], no_binary_name = true, disable_help_flag = true)]
struct Helper {
    #[arg(required = true)]
    mountpoints: Vec<OsString>,
    #[arg(short)]
    lazy: bool,
    #[arg(short = 'f')]
    _force: bool,
    #[arg(short = 'n')]
    _no_mtab: bool,
    #[arg(short = 'r')]
    _remount: bool,
    #[arg(short, action = ArgAction::Count)]
    verbose: u8,
    #[arg(short = 'N')]
    namespace: Option<OsString>,
    #[arg(short = 't')]
    _fstype: Option<OsString>,
}

/// Parses the arguments after the helper's name.
pub(super) fn parse(args: impl Iterator<Item = OsString>) -> Result<Parsed, UsageError> {
    let helper = Helper::try_parse_from(args).map_err(|e| UsageError::of_clap(&e))?;
    if let Some(namespace) = &helper.namespace {
        mount_helper::enter(namespace)?;
    }
    let action = Action::Unmount(mounts(helper.mountpoints.iter(), helper.lazy)?);
    let mut mount_args = MountArgs::default();
    mount_args.verbosity(helper.verbose);
    let log = mount_args.log;
    Ok(Parsed::Run(Box::new(Config { action, log })))
}

/// Returns the mounts at these mount points.
pub(super) fn mounts<'a>(words: impl Iterator<Item = &'a OsString>, lazy: bool) -> Result<UnmountConfig, UsageError> {
    let absolute = |word: &OsString| {
        values::path(word).map_err(|e| UsageError::new(format!("mount point {}: {e}", values::display(word))))
    };
    let points = words.map(absolute).collect::<Result<Vec<_>, _>>()?;
    if points.is_empty() {
        return Err(UsageError::new("--unmount needs a mount point"));
    }
    Ok(UnmountConfig { points, lazy })
}

#[cfg(test)]
mod tests {
    use super::super::test_args::{action, config_of};
    use super::*;

    fn unmount(args: &[&str]) -> Result<UnmountConfig, String> {
        match config_of(parse(args.iter().map(OsString::from)))?.action {
            Action::Unmount(mounts) => Ok(mounts),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_helper_takes_the_flags_of_umount() {
        assert!(is_name_of(Path::new("/sbin/umount.fuse.vmdkfuse")) && !is_name_of(Path::new("umount")));
        for flags in [
            &[] as &[&str],
            &["-f"],
            &["-n", "-v"],
            &["-t", "fuse.vmdkfuse"],
            &["-r"],
        ] {
            let config = unmount(&[flags, &["/mnt"]].concat()).unwrap();
            assert!(config.points == [Path::new("/mnt")] && !config.lazy, "{flags:?}");
        }
        assert!(unmount(&["-l", "/mnt"]).unwrap().lazy);
        assert!(unmount(&["-l"]).is_err());
        assert!(
            unmount(&["-N", "/no/ns", "/mnt"])
                .unwrap_err()
                .starts_with("-N /no/ns: ")
        );
    }

    #[test]
    fn unmount_takes_mount_points_and_nothing_else() {
        let here = std::env::current_dir().unwrap();
        let Ok(Action::Unmount(mounts)) = action(&["--unmount", "a", "/b"]) else {
            panic!("not an unmount")
        };
        assert_eq!(mounts.points, [here.join("a"), "/b".into()]);
        assert!(action(&["--unmount"]).unwrap_err().contains("needs a mount point"));
        assert!(action(&["--unmount", "--json", "/b"]).is_err() && action(&["--unmount", "-f", "/b"]).is_err());
    }
}
