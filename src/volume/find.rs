//! Disks that patterns on servers give. Local patterns are expanded when the command line is parsed, those on a server when
//! the daemon has started: that may take long, and needs the login.

use std::any::Any;

use crate::config::DiskConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::source::Match;
use crate::volume::open;

/// Disks whose patterns on servers are expanded.
#[derive(Debug)]
pub struct FoundDisks {
    /// The disks, in the order of their configurations.
    pub disks: Vec<DiskConfig>,
    /// Logins of the search, kept until the disks are opened.
    _logins: Vec<Box<dyn Any>>,
}

/// Expands the patterns of disks on servers. All other configurations stay as they are, and cost no request.
///
/// Errors: no file matches; those of the server; `Usage` if one name in the mount is for several files.
pub fn find_disks(configs: &[DiskConfig]) -> Result<FoundDisks> {
    let (mut disks, mut logins) = (Vec::new(), Vec::new());
    for config in configs {
        let Some(found) = open::find(&config.source) else {
            disks.push(config.clone());
            continue;
        };
        let found = found?;
        if found.disks.len() > 1 && found.disks.iter().any(|disk| disk.name.is_none()) {
            return Err(name_of_many(config, found.disks.len()));
        }
        disks.extend(found.disks.into_iter().map(|disk| with_source(config, disk)));
        logins.push(found.login);
    }
    Ok(FoundDisks { disks, _logins: logins })
}

fn with_source(config: &DiskConfig, found: Match) -> DiskConfig {
    DiskConfig {
        name: found.name.unwrap_or_else(|| config.name.clone()),
        source: found.config,
        ..config.clone()
    }
}

/// Creates the error for a name in the mount that the user chose, if several disks would have it.
fn name_of_many(config: &DiskConfig, count: usize) -> Error {
    let (label, name) = (config.source.label(), config.name.display());
    let text = format!("file={label}: the name {name} would apply to {count} disks, but a file name is for one disk");
    Error::new(ErrorKind::Usage, text)
}
