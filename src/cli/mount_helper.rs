//! Helper of mount(8): `mount.vmdkfuse SOURCE MOUNTPOINT [-sfnv] [-o OPTS]`.
//!
//! mount(8) runs it for the fstab types `vmdkfuse` and `fuse.vmdkfuse`. Its flags have the meaning that mount(8)
//! defines for all helpers: `-s` ignores unknown options, `-f` succeeds without mounting, `-n` writes no mtab entry.

use std::ffi::OsString;
use std::path::Path;

use clap::builder::OsStringValueParser;
use clap::{Arg, ArgAction, Command};

use super::args::verbosity;
use super::disk_args::DiskArgs;
use super::options::Options;
use super::{MountRequest, Parsed, UsageError, argument, has_name_of, one_line};
use crate::config::LogConfig;

/// Program names under which mount(8) runs the helper.
const NAMES: [&str; 2] = ["mount.vmdkfuse", "mount.fuse.vmdkfuse"];

/// Returns true if `program` is the name of the helper.
pub(super) fn is_name_of(program: &Path) -> bool {
    has_name_of(program, &NAMES)
}

/// Parses the arguments after the helper's name.
pub(super) fn parse(args: impl Iterator<Item = OsString>) -> Result<Parsed, UsageError> {
    let matches = command().try_get_matches_from(args).map_err(|e| one_line(&e))?;
    if matches.get_flag("fake") {
        return Ok(Parsed::Print(String::new()));
    }
    let word = |name: &str| matches.get_one::<OsString>(name).cloned().unwrap_or_default();
    let lists = matches.get_many::<OsString>("options").into_iter().flatten();
    let options = Options::parse(lists.map(OsString::as_os_str), matches.get_flag("sloppy"))?;
    let source = argument::with_key(&word("source"));
    let mount = MountRequest {
        mountpoint: &word("mountpoint"),
        disk_args: DiskArgs::Words(&[source]),
        options: &options,
        foreground: false,
        pidfile: None,
        threads: None,
    };
    let log = LogConfig {
        verbosity: verbosity(&matches),
        ..LogConfig::default()
    };
    mount.into_config(log).map(|config| Parsed::Run(Box::new(config)))
}

fn command() -> Command {
    let flag = |name: &'static str, short| Arg::new(name).short(short).action(ArgAction::SetTrue);
    let word = |name: &'static str| Arg::new(name).value_parser(OsStringValueParser::new());
    Command::new(NAMES[0])
        .no_binary_name(true)
        .disable_help_flag(true)
        .arg(word("source").required(true))
        .arg(word("mountpoint").required(true))
        // `-n` asks for no entry in /etc/mtab. The helper writes none, so the flag is accepted and ignored.
        .args([flag("sloppy", 's'), flag("fake", 'f'), flag("no-mtab", 'n')])
        .arg(Arg::new("verbose").short('v').action(ArgAction::Count))
        .arg(word("options").short('o').action(ArgAction::Append))
        // The type in fstab. It selected this helper, so there is nothing left to check.
        .arg(word("type").short('t'))
}

#[cfg(test)]
mod tests {
    use super::super::test_args::{config_of, mount_of};
    use super::*;
    use crate::config::{Config, MountConfig};

    fn run(args: &[&str]) -> Result<Config, String> {
        config_of(parse(args.iter().map(OsString::from)))
    }

    fn mount(args: &[&str]) -> MountConfig {
        mount_of(run(args).unwrap())
    }

    #[test]
    fn program_names() {
        for name in ["mount.vmdkfuse", "/sbin/mount.vmdkfuse", "mount.fuse.vmdkfuse"] {
            assert!(is_name_of(Path::new(name)), "{name}");
        }
        for name in ["vmdkfuse", "mount.fuse", "/mount.vmdkfuse/vmdkfuse", ""] {
            assert!(!is_name_of(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn arguments_of_mount_are_parsed() {
        let dir = tempfile::tempdir().unwrap();
        let mnt = dir.path().to_str().unwrap();
        let config = mount(&[
            "/a/x.vmdk",
            mnt,
            "-n",
            "-v",
            "-o",
            "ro,nofail,x-y=z,uid=7,name=n.raw",
            "-t",
            "fuse.vmdkfuse",
        ]);
        assert_eq!(config.target.path, dir.path());
        assert!(config.options.read_only && !config.foreground);
        assert_eq!((config.options.uid, config.disks.len()), (Some(7), 1));
        assert_eq!(config.disks[0].name, "n.raw");
        assert_eq!(run(&["/x", mnt, "-vv"]).unwrap().log.verbosity, 2);
        assert!(!mount(&["/x", mnt, "-o", "rw"]).options.read_only);
    }

    #[test]
    fn the_source_is_always_a_bare_value() {
        let mnt = "/";
        for source in ["/a=b", "cache=none", "cashe=x"] {
            let mount = mount(&[source, mnt]);
            let local = mount.disks[0].source.local().unwrap();
            assert!(local.path.ends_with(source.trim_start_matches('/')), "{local:?}");
        }
        assert_eq!(mount(&["nbd://h/x", mnt]).disks[0].source.label(), "nbd://h/x");
    }

    #[test]
    fn sloppy_ignores_unknown_options() {
        assert!(run(&["/x", "/", "-o", "what,ever=1"]).is_err());
        assert!(mount(&["-s", "/x", "/", "-o", "what,ever=1,ro"]).options.read_only);
    }

    #[test]
    fn fake_does_nothing_and_succeeds() {
        let printed = parse(["-f", "/none", "/none/none"].iter().map(OsString::from));
        assert_eq!(printed, Ok(Parsed::Print(String::new())));
        assert!(run(&["/none", "/none/none"]).is_err());
    }

    #[test]
    fn other_arguments_are_refused() {
        for args in [
            &[][..],
            &["/x"],
            &["/x", "/", "cache=none"],
            &["/x", "/", "-z"],
            &["/x", "/", "--info"],
        ] {
            let error = run(args).unwrap_err();
            assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        }
    }
}
