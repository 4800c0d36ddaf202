//! Command line of `vmdkfuse` itself: its options and words → what to run or print.
//!
//! clap parses only the options. All other arguments go through the table in `keys.rs`, because sources need not be UTF-8
//! and the order of the keys decides which disk each of them belongs to.

use std::borrow::Cow;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use clap::ValueEnum as _;
use clap::error::ErrorKind;

use super::disk_args::{self, DiskArgs};
use super::flags::Cli;
use super::mount_request::{MountRequest, path_in_table};
use super::options::{MountArgs, MountKey, mount_key};
use super::outcome::{Parsed, UsageError};
use super::pair::{Origin, Pair};
use super::subcommand::Subcommand;
use super::{argument, config_file, disks, unmount_helper, values};
use crate::config::{Action, Config, DiskConfig, Query};

/// Parses the arguments after the program's name.
pub(super) fn parse(args: impl Iterator<Item = OsString>) -> Result<Parsed, UsageError> {
    let args: Vec<OsString> = args.collect();
    parse_words(&args).map_err(|e| match args.iter().any(|arg| arg == "-ro") {
        // Rightly read as `-r -o`, so that the next argument is taken for a mount option.
        true => UsageError::new(format!("{e}; -ro means -r -o: -r or -o ro alone mounts read-only")),
        false => e,
    })
}

fn parse_words(args: &[OsString]) -> Result<Parsed, UsageError> {
    match Cli::read(args) {
        Ok(cli) => config(&cli).map(|config| Parsed::Run(Box::new(config))),
        // The short help shows no options, and clap leaves blank lines in their place.
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            Ok(Parsed::Print(e.render().to_string().replace("\n\n\n", "\n")))
        }
        Err(e) => Err(UsageError::of_clap(&e)),
    }
}

/// Returns the configuration that the arguments stand for.
fn config(cli: &Cli) -> Result<Config, UsageError> {
    let later = [
        ("--status", cli.later.status),
        ("--watch", cli.later.watch),
        ("--doctor", cli.later.doctor),
    ];
    if let Some((option, _)) = later.iter().find(|(_, given)| *given) {
        return Err(UsageError::not_yet(option));
    }
    let Some(action) = action(cli)? else {
        return mount(cli);
    };
    let mut mount_args = MountArgs::default();
    mount_args.layer(&mount_pairs(cli))?;
    mount_args.verbosity(cli.log.verbose);
    let log = mount_args.log;
    Ok(Config { action, log })
}

/// Returns the action if it is not a mount.
fn action(cli: &Cli) -> Result<Option<Action>, UsageError> {
    let (flags, words, json) = (&cli.actions, &*cli.words, cli.json);
    let cache_dir = match flags.list || flags.check {
        true => disk_args::cache_dir(words)?,
        false => None,
    };
    Ok(Some(if let Some((dir, limit)) = cache_dir {
        let check = flags.check;
        if limit.is_some() && !check {
            return Err(UsageError::new(
                "--list changes nothing: cache-dir-size= is for --check",
            ));
        }
        Action::CacheDir {
            dir,
            limit,
            check,
            json,
        }
    } else if flags.list {
        Action::List(list(words, json)?)
    } else if flags.info {
        Action::Info(query(words, Subcommand::Query, json)?)
    } else if flags.map {
        Action::Map(query(words, Subcommand::Query, json)?)
    } else if flags.check {
        Action::Check(query(words, Subcommand::Query, json)?)
    } else if flags.prefetch {
        Action::Prefetch(query(words, Subcommand::Query, json)?)
    } else if flags.fingerprint {
        let (server, port) = disk_args::server(words)?;
        Action::Fingerprint { server, port, json }
    } else if flags.dump {
        let library = disk_args::library(words)?;
        Action::Dump { json, library }
    } else if json {
        return Err(UsageError::new(
            "--json needs --list, --info, --map, --check, --prefetch, --fingerprint or --dump",
        ));
    } else if flags.unmount {
        unmount(cli)?
    } else if flags.create {
        Action::Create(unmounted(words, Subcommand::Create)?)
    } else if flags.commit {
        commit(words)?
    } else {
        return Ok(None);
    }))
}

fn mount(cli: &Cli) -> Result<Config, UsageError> {
    let words = &*mount_point_first(&cli.words);
    let (mountpoint, words) = words
        .split_first()
        .map_or((None, words), |(point, rest)| (Some(point), rest));
    let is_key = |point: &&OsString| !Path::new(point).exists();
    if let Some(first) = mountpoint.filter(is_key).and_then(|point| argument::source_like(point)) {
        // The value is not printed because it may be a secret. An existing path wins over the key that it looks like.
        return Err(UsageError::new(format!(
            "the mount point must come before the keys, but the first argument is {first}..."
        )));
    }
    let (mut mount_args, pairs) = (MountArgs::default(), mount_pairs(cli));
    let file = cli.mount.config.as_ref();
    let disk_args = match file {
        Some(file) => {
            check_no_words(words)?;
            let disk_args = config_file::read(file)?.apply(&mut mount_args)?;
            disk_args.with(mount_args.layer(&pairs)?)?
        }
        None => DiskArgs::of_words(mount_args.layer(&pairs)?, words)?,
    };
    mount_args.verbosity(cli.log.verbose);
    let in_file = mount_args.mount_point.take();
    let Some(mountpoint) = mountpoint.or(in_file.as_ref()) else {
        return Err(no_mount_point(file));
    };
    if file.is_none() && words.is_empty() && cannot_be_covered(mountpoint) {
        let image = values::display(mountpoint);
        return Err(UsageError::new(format!(
            "{image}: no mount point is given: vmdkfuse MOUNTPOINT file={image}"
        )));
    }
    MountRequest {
        mountpoint,
        disk_args,
        mount_args,
        foreground: cli.mount.foreground,
        source: file.map(|file| path_in_table(file)),
    }
    .into_config()
}

/// Returns the mounts of `--unmount`: the words, or the one that a config file describes.
fn unmount(cli: &Cli) -> Result<Action, UsageError> {
    let Some(file) = cli.mount.config.as_ref().filter(|_| cli.words.is_empty()) else {
        return unmount_helper::mounts(cli.words.iter(), false).map(Action::Unmount);
    };
    let mut mount_args = MountArgs::default();
    config_file::read(file)?.apply(&mut mount_args)?;
    let point = mount_args.mount_point.ok_or_else(|| no_mount_point(Some(file)))?;
    unmount_helper::mounts(std::iter::once(&point), false).map(Action::Unmount)
}

/// Returns the options that have names of their own as pairs.
fn mount_pairs(cli: &Cli) -> Vec<Pair<MountKey>> {
    let format = cli.log.log_format.and_then(|format| format.to_possible_value());
    let named = [
        ("read-only", cli.mount.read_only.then(|| "true".into())),
        ("threads", cli.mount.threads.clone()),
        ("pidfile", cli.mount.pidfile.clone()),
        ("log-file", cli.log.log_file.clone()),
        ("log-format", format.map(|format| format.get_name().into())),
    ];
    let lists = cli.mount.options.iter().map(|list| ("options", Some(list.clone())));
    let pair = |(name, value): (&str, Option<OsString>)| {
        let (key, value, origin) = (mount_key(name)?, value?, Origin::Argument);
        Some(Pair { key, value, origin })
    };
    lists.chain(named).filter_map(pair).collect()
}

/// Creates the error for a mount or unmount without a mount point. `file`: the config file, if there is one.
fn no_mount_point(file: Option<&OsString>) -> UsageError {
    UsageError::new(match file {
        Some(file) => format!(
            "{}: no mount point is given: add mountpoint = \"PATH\" to the table [mount], or a mount point to the command line",
            values::display(file)
        ),
        None => "no mount point is given; see vmdkfuse --help".into(),
    })
}

/// Returns the words with the mount point first. mount.fuse(8) names the image first, and users of other tools do.
///
/// Only where no other reading is possible: the first word is a file that a mount cannot cover, as it is not empty, and the
/// second one is a directory or an empty file.
fn mount_point_first(words: &[OsString]) -> Cow<'_, [OsString]> {
    let is_point = |word: &OsString| match fs::metadata(word) {
        Ok(found) => found.is_dir() || found.is_file() && found.len() == 0,
        Err(_) => false,
    };
    match words {
        [image, point, keys @ ..] if cannot_be_covered(image) && is_point(point) => {
            Cow::Owned([&[point.clone(), image.clone()], keys].concat())
        }
        _ => Cow::Borrowed(words),
    }
}

/// Returns true for a file that a mount cannot cover, and that may be an image.
fn cannot_be_covered(word: &OsString) -> bool {
    fs::metadata(word).is_ok_and(|found| found.file_type().is_block_device() || found.is_file() && found.len() > 0)
}

/// Checks that the command line has no words besides a config file and the mount point.
fn check_no_words(words: &[OsString]) -> Result<(), UsageError> {
    let hint = "the file describes the disks, and -o KEY=VALUE applies to all of them";
    match words.is_empty() {
        true => Ok(()),
        false => Err(UsageError::new(format!(
            "--config allows no arguments except the mount point: {hint}"
        ))),
    }
}

/// Returns the query of `--list`. It accepts servers only; the export in the address of an NBD server is ignored.
fn list(words: &[OsString], json: bool) -> Result<Query, UsageError> {
    let query = query(words, Subcommand::List, json)?;
    match query.disks.iter().find(|disk| !disk.source.settings().is_server()) {
        Some(disk) if disk.source.local().is_none() => Err(UsageError::new(
            "--list shows what a server offers; VDDK lists nothing: leave out libdir=",
        )),
        Some(disk) => {
            let file = disk.source.label();
            Err(UsageError::new(format!(
                "--list needs a server, but {file} is a local file"
            )))
        }
        None => Ok(query),
    }
}

/// Returns the disks of an action other than a mount, where no `-o` keys and no mount point take part.
fn unmounted(words: &[OsString], subcommand: Subcommand) -> Result<Vec<DiskConfig>, UsageError> {
    let disks = disks::resolve(DiskArgs::of_words(Vec::new(), words)?, subcommand)?;
    disks::configs(disks, None, subcommand)
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

#[cfg(test)]
mod tests {
    use super::super::test_args::{config_of, mount_of};
    use super::*;
    use crate::config::{LogConfig, MountConfig};

    fn run(args: &[&str]) -> Result<Config, String> {
        config_of(parse(args.iter().map(OsString::from)))
    }

    fn mount(args: &[&str]) -> MountConfig {
        mount_of(run(args).unwrap())
    }

    #[test]
    fn read_only_without_a_space_gets_a_hint() {
        for words in [&["-ro", "mnt", "x.vmdk"][..], &["mnt", "x.vmdk", "-ro"]] {
            let error = run(words).unwrap_err();
            assert!(
                error.ends_with("; -ro means -r -o: -r or -o ro alone mounts read-only"),
                "{error}"
            );
        }
    }

    #[test]
    fn an_image_before_its_mount_point_is_understood() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        fs::create_dir(path("mnt")).unwrap();
        fs::write(path("empty"), "").unwrap();
        fs::write(path("x.vmdk"), "text").unwrap();
        for point in ["mnt", "empty"] {
            let mount_config = mount(&[&path("x.vmdk"), &path(point)]);
            assert_eq!(mount_config.target.path, Path::new(&path(point)));
            assert_eq!(
                mount_config.disks[0].source.local().unwrap().path,
                Path::new(&path("x.vmdk"))
            );
        }
        // An empty file can be covered, so it is the mount point.
        assert_eq!(
            mount(&[&path("empty"), &path("x.vmdk")]).target.path,
            Path::new(&path("empty"))
        );
    }

    #[test]
    fn every_option_is_parsed() {
        let here = std::env::current_dir().unwrap();
        let mount_config = mount(&[
            "-r",
            "-f",
            "-P",
            "pid",
            "--threads",
            "64",
            "-oallow_other",
            "-o",
            "uid=5",
            "src",
            "./a=b",
        ]);
        assert!(mount_config.options.read_only && mount_config.foreground && mount_config.options.allow_other);
        assert_eq!(mount_config.options.uid, Some(5));
        assert_eq!(mount_config.pidfile, Some(here.join("pid")));
        assert_eq!(mount_config.threads, Some(64));
        assert_eq!(mount_config.target.path, here.join("src"));
        let local = mount_config.disks[0].source.local().unwrap();
        assert_eq!(local.path, here.join("a=b"));
    }

    #[test]
    fn options_may_follow_the_other_arguments() {
        let config = mount(&["src", "/x", "--read-only", "cache=none", "--foreground"]);
        assert!(config.options.read_only && config.foreground);
        let config = mount(&["--", "src", "/x"]);
        assert!(!config.options.read_only);
    }

    #[test]
    fn log_options() {
        let log = run(&["-vv", "--log-file", "/l", "--log-format", "json", "src", "/x"])
            .unwrap()
            .log;
        assert_eq!(
            log,
            LogConfig {
                verbosity: 2,
                file: Some("/l".into()),
                json: true
            }
        );
        assert_eq!(
            run(&["-vvvvv", "--log-format=text", "src", "/x"])
                .unwrap()
                .log
                .verbosity,
            3
        );
        assert_eq!(run(&["--info", "/x"]).unwrap().log, LogConfig::default());
        assert!(run(&["--log-format", "xml", "src", "/x"]).unwrap_err().contains("xml"));
        assert!(run(&["--log-file", "", "src", "/x"]).is_err());
    }

    #[test]
    fn query_actions() {
        let disks = |query: Query| (query.disks.len(), query.json);
        assert!(matches!(run(&["--info", "/x"]).unwrap().action, Action::Info(q) if disks(q.clone()) == (1, false)));
        assert!(
            matches!(run(&["/x", "--map", "--json"]).unwrap().action, Action::Map(q) if disks(q.clone()) == (1, true))
        );
        assert!(matches!(run(&["--list", "nbd://h"]).unwrap().action, Action::List(q) if q.disks.len() == 1));
        assert_eq!(
            run(&["--list", "/x"]).unwrap_err(),
            "--list needs a server, but /x is a local file"
        );
        assert!(matches!(run(&["--check", "/a/x", "/b/x"]).unwrap().action, Action::Check(q) if q.disks.len() == 2));
        let dump = |json| Action::Dump {
            json,
            library: crate::config::VddkLibrary::default(),
        };
        assert_eq!(run(&["--dump"]).unwrap().action, dump(false));
        assert_eq!(run(&["--dump", "--json"]).unwrap().action, dump(true));
        assert_eq!(
            run(&["--info"]).unwrap_err(),
            "no disk is given: add file=PATH, or uri= of an NBD server"
        );
        assert_eq!(
            run(&["--dump", "/x"]).unwrap_err(),
            "--dump takes no disk, only libdir=DIR"
        );
        let library = run(&["--dump", "libdir=/x"]).unwrap().action;
        assert!(matches!(library, Action::Dump { library, .. } if library.libdir == Some("/x".into())));
    }

    #[test]
    fn contradictions_are_refused() {
        for args in [
            &["--info", "--map", "/x"][..],
            &["--json", "src", "/x"],
            &["--info", "-f", "/x"],
            &["--check", "-o", "ro", "/x"],
            &["--dump", "-P", "p"],
            &["-r", "-o", "rw", "src", "/x"],
            &["-o", "ro", "-o", "rw", "src", "/x"],
            &["-o", "allow_other,allow_root", "src", "/x"],
            &["--threads", "0", "src", "/x"],
            &["--threads", "65", "src", "/x"],
            &["--threads", "many", "src", "/x"],
            &["-P", "a", "-P", "b", "src", "/x"],
        ] {
            let error = run(args).unwrap_err();
            assert!(
                !error.is_empty() && !error.contains('\n') && !error.contains("Usage"),
                "{args:?}: {error}"
            );
        }
    }

    #[test]
    fn options_that_are_not_in_this_build_are_reported() {
        for option in ["--status", "--watch", "--doctor"] {
            assert_eq!(
                run(&[option, "src"]).unwrap_err(),
                format!("{option} is not in this build yet")
            );
        }
    }

    #[test]
    fn missing_and_unknown_arguments_are_named() {
        assert!(run(&[]).unwrap_err().contains("no mount point"));
        assert_eq!(
            run(&["Cargo.toml"]).unwrap_err(),
            "Cargo.toml: no mount point is given: vmdkfuse MOUNTPOINT file=Cargo.toml"
        );
        assert_eq!(
            run(&["src"]).unwrap_err(),
            "no disk is given: add file=PATH, or uri= of an NBD server"
        );
        let error = run(&["file=/x", "src"]).unwrap_err();
        assert_eq!(
            error,
            "the mount point must come before the keys, but the first argument is file=..."
        );
        let error = run(&["nbd://u:hunter2@h", "src"]).unwrap_err();
        assert!(error.ends_with("the first argument is nbd://..."), "{error}");
        let error = run(&["--forground", "src", "/x"]).unwrap_err();
        assert_eq!(
            error,
            "unexpected argument '--forground' found; tip: a similar argument exists: '--foreground'"
        );
    }

    #[test]
    fn version_and_help_are_printed() {
        for option in ["-V", "--version"] {
            let printed = parse([OsString::from(option)].into_iter());
            assert_eq!(
                printed,
                Ok(Parsed::Print(format!("vmdkfuse {}\n", env!("CARGO_PKG_VERSION"))))
            );
        }
        let Ok(Parsed::Print(help)) = parse([OsString::from("--help")].into_iter()) else {
            panic!("no help")
        };
        for word in [
            "Usage:",
            "MOUNTPOINT[/FILENAME]",
            "--read-only",
            "--log-format",
            "    allow-dir=PATH",
            " server=",
        ] {
            assert!(help.contains(word), "{word} is missing in:\n{help}");
        }
        assert!(
            !help.contains("--doctor") && !help.contains("not in this build"),
            "{help}"
        );
        let Ok(Parsed::Print(short)) = parse([OsString::from("-h")].into_iter()) else {
            panic!("no help")
        };
        let examples = short.split("Examples:").nth(1).unwrap();
        assert_eq!(
            examples.lines().filter(|line| line.starts_with("  vmdkfuse ")).count(),
            10,
            "{short}"
        );
        assert!(
            short.starts_with(env!("CARGO_PKG_DESCRIPTION")) && short.contains("man vmdkfuse"),
            "{short}"
        );
        assert!(!short.contains("--log-format") && short.lines().count() < 30, "{short}");
    }
}
