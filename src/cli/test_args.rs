//! Helpers for tests that parse a command line.

use std::ffi::OsString;

use super::outcome::{Parsed, UsageError};
use super::parse;
use crate::config::{Action, Config, DiskConfig, HttpsConfig, MountConfig, SourceConfig};

/// Returns the configuration. Panics if the command line only prints a text.
pub(super) fn config_of(parsed: Result<Parsed, UsageError>) -> Result<Config, String> {
    match parsed.map_err(|e| e.to_string())? {
        Parsed::Run(config) => Ok(*config),
        Parsed::Print(text) => panic!("only prints {text:?}"),
    }
}

/// Returns the mount of a configuration. Panics if its action is another one.
pub(super) fn mount_of(config: Config) -> MountConfig {
    match config.action {
        Action::Mount(mount) => mount,
        other => panic!("not a mount: {other:?}"),
    }
}

/// Returns the action of a command line without the program's name, or its error message.
pub(super) fn action(args: &[&str]) -> Result<Action, String> {
    config_of(parse(["vmdkfuse"].iter().chain(args).map(OsString::from))).map(|config| config.action)
}

/// Returns the disks of a command line that is valid.
pub(super) fn disks(args: &[&str]) -> Vec<DiskConfig> {
    action(args).unwrap().disks().to_vec()
}

/// Returns the one disk of a mount, which is on a web server.
pub(super) fn web(args: &[&str]) -> HttpsConfig {
    match disks(&[&["src"], args].concat()).remove(0).source {
        SourceConfig::Https(https) => *https,
        other => panic!("{other:?}"),
    }
}

/// Returns the number of warnings about the first disk of a mount.
pub(super) fn warnings(args: &[&str]) -> usize {
    disks(&[&["src"], args].concat())[0].warnings.len()
}
