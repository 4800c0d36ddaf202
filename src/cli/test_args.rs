//! What words stand for, for tests.

use super::{Parsed, UsageError};
use crate::config::{Action, Config, MountConfig};

/// What is to be done. Panics where something is only to be printed.
pub(super) fn config_of(parsed: Result<Parsed, UsageError>) -> Result<Config, String> {
    match parsed.map_err(|e| e.to_string())? {
        Parsed::Run(config) => Ok(*config),
        Parsed::Print(text) => panic!("only prints {text:?}"),
    }
}

/// The mount that is to be done. Panics where it is something else.
pub(super) fn mount_of(config: Config) -> MountConfig {
    match config.action {
        Action::Mount(mount) => mount,
        other => panic!("no mount: {other:?}"),
    }
}
