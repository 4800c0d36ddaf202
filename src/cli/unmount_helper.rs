//! Helper of umount(8): `umount.vmdkfuse [-flnrv] [-N NAMESPACE] [-t TYPE] MOUNTPOINT`, the same as `--unmount`.
//!
//! umount(8) runs it for mounts that have `uhelper=vmdkfuse`, and `umount.fuse.vmdkfuse` for those of ordinary users.

use std::ffi::OsString;
use std::path::Path;

use clap::builder::OsStringValueParser;
use clap::{Arg, ArgAction, Command};

use super::args::verbosity;
use super::{Parsed, UsageError, has_name_of, mount_helper, one_line, values};
use crate::config::{Action, Config, LogConfig, UnmountConfig};

/// Program names under which umount(8) runs the helper.
const NAMES: [&str; 2] = ["umount.vmdkfuse", "umount.fuse.vmdkfuse"];

/// Returns true if `program` is the name of the helper.
pub(super) fn is_name_of(program: &Path) -> bool {
    has_name_of(program, &NAMES)
}

/// Parses the arguments after the helper's name.
pub(super) fn parse(args: impl Iterator<Item = OsString>) -> Result<Parsed, UsageError> {
    let matches = command().try_get_matches_from(args).map_err(|e| one_line(&e))?;
    if let Some(namespace) = matches.get_one::<OsString>("namespace") {
        mount_helper::enter(namespace)?;
    }
    let words = matches.get_many::<OsString>("mountpoints").into_iter().flatten();
    let action = Action::Unmount(mounts(words, matches.get_flag("lazy"))?);
    let log = LogConfig {
        verbosity: verbosity(&matches),
        ..LogConfig::default()
    };
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

fn command() -> Command {
    let flag = |name: &'static str, short| Arg::new(name).short(short).action(ArgAction::SetTrue);
    let word = |name: &'static str| Arg::new(name).value_parser(OsStringValueParser::new());
    Command::new(NAMES[0])
        .no_binary_name(true)
        .disable_help_flag(true)
        .arg(word("mountpoints").num_args(1..).required(true))
        // Of the flags of umount(8) only `-l` has a meaning here. `-f` is for a server that does not answer: every wait of
        // the daemon has a deadline.
        .args([
            flag("lazy", 'l'),
            flag("force", 'f'),
            flag("no-mtab", 'n'),
            flag("remount", 'r'),
        ])
        .arg(Arg::new("verbose").short('v').action(ArgAction::Count))
        .args([word("namespace").short('N'), word("type").short('t')])
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
