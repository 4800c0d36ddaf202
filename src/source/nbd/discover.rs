//! A look at a server: what `--list` and `--info` show, and the exports of a mount of all of them.

use std::ffi::{CStr, CString, OsString};
use std::os::unix::ffi::OsStringExt;
use std::time::Instant;

use super::connect::{Connector, never};
use super::disk::{NbdDisk, timeout};
use super::ffi::{Ask, Handle};
use crate::config::NbdConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::source::server_info::{ExportInfo, ServerInfo};

/// Abilities, as `nbdinfo` calls them.
const FLAGS: [(&str, Ask); 10] = [
    ("is_rotational", Ask::Rotational),
    ("is_read_only", Ask::ReadOnly),
    ("can_cache", Ask::Cache),
    ("can_df", Ask::Df),
    ("can_fast_zero", Ask::FastZero),
    ("can_flush", Ask::Flush),
    ("can_fua", Ask::Fua),
    ("can_multi_conn", Ask::MultiConn),
    ("can_trim", Ask::Trim),
    ("can_zero", Ask::Zero),
];

/// All exports that the server lists.
pub fn list(config: &NbdConfig) -> Result<ServerInfo> {
    let connector = Connector::new(config)?;
    let until = Instant::now() + timeout(config);
    let names = connector.list(until)?;
    discover(&connector, &names, until)
}

/// The one export of `config`.
pub fn info(config: &NbdConfig) -> Result<ServerInfo> {
    let connector = Connector::new(config)?;
    let until = Instant::now() + timeout(config);
    let handle = connector.negotiate(true, until, &never)?;
    let names = [(handle.export(), CString::default())];
    let server = facts_of(&connector, &handle, &names, until)?;
    match server.exports.first().and_then(|e| e.error.clone()) {
        Some(e) => Err(Error::new(ErrorKind::NotFound, e)),
        None => Ok(server),
    }
}

/// The disks of all exports that the server lists, by the exports' names. Each is connected to when it is first used.
/// What the server lists but then says nothing of is left out, with a warning.
pub fn exports(config: &NbdConfig, writable: bool) -> Result<Vec<(OsString, NbdDisk)>> {
    let connector = Connector::new(config)?;
    let until = Instant::now() + timeout(config);
    let names = connector.list(until)?;
    let handle = connector.negotiate(true, until, &never)?;
    let mut disks = Vec::new();
    for (name, _) in names {
        let export = match connector.info(&handle, &name, until) {
            Ok(export) => export,
            Err(e) => {
                tracing::warn!("the export {} is left out: {e}", name.to_string_lossy().escape_debug());
                continue;
            }
        };
        let name = OsString::from_vec(name.into_bytes());
        let disk = NbdDisk::later(connector.for_export(&name), export, config, writable)?;
        disks.push((name, disk));
    }
    handle.opt_abort();
    if disks.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{}: it lists no export", connector.label()),
        ));
    }
    Ok(disks)
}

fn discover(connector: &Connector, names: &[(CString, CString)], until: Instant) -> Result<ServerInfo> {
    let handle = connector.negotiate(true, until, &never)?;
    facts_of(connector, &handle, names, until)
}

fn facts_of(
    connector: &Connector,
    handle: &Handle,
    names: &[(CString, CString)],
    until: Instant,
) -> Result<ServerInfo> {
    // The oldest variant of the protocol has no options: there is one export, and it is open.
    let open = handle.is_up();
    let mut exports = Vec::new();
    if !open {
        handle.set_full_info()?;
    }
    for (name, description) in names {
        exports.push(if open {
            facts(handle, name)
        } else {
            ask(connector, handle, name, description, until)
        });
    }
    let server = ServerInfo {
        server: connector.label(),
        protocol: handle.protocol(),
        tls: handle.is_encrypted(),
        structured: handle.is_structured(),
        exports,
    };
    if open {
        handle.disconnect();
    } else {
        handle.opt_abort();
    }
    Ok(server)
}

fn ask(connector: &Connector, handle: &Handle, name: &CStr, description: &CStr, until: Instant) -> ExportInfo {
    match connector.info(handle, name, until) {
        Err(e) => ExportInfo {
            error: Some(e.to_string()),
            ..unknown(name, description)
        },
        Ok(_) => {
            let on_completions = handle.description();
            let description = if on_completions.is_empty() {
                description
            } else {
                &on_completions
            };
            let found = ExportInfo {
                description: description.to_string_lossy().into_owned(),
                ..facts(handle, name)
            };
            // A server without metadata contexts refuses the question.
            let contexts = connector.contexts(handle, until).unwrap_or_default();
            ExportInfo { contexts, ..found }
        }
    }
}

fn unknown(name: &CStr, description: &CStr) -> ExportInfo {
    ExportInfo {
        export: name.to_string_lossy().into_owned(),
        description: description.to_string_lossy().into_owned(),
        size: 0,
        block_sizes: [0; 3],
        flags: Vec::new(),
        contexts: Vec::new(),
        error: None,
    }
}

fn facts(handle: &Handle, name: &CStr) -> ExportInfo {
    let (size, error) = match handle.size() {
        Ok(size) => (size, None),
        Err(e) => (0, Some(e.to_string())),
    };
    let flags = FLAGS.map(|(flag, ask)| (flag, handle.can(ask))).to_vec();
    ExportInfo {
        size,
        error,
        block_sizes: handle.block_sizes(),
        flags,
        ..unknown(name, c"")
    }
}
