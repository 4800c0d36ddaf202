//! Discovery of a server's exports for `--list` and `--info`.
//!
//! One handle that is negotiating answers all questions: NBD_OPT_LIST names the exports, and NBD_OPT_INFO returns the
//! properties of each without opening it. With a server of the oldest protocol variant the handle is up at once, and
//! its one export is described by the handle itself.

use std::ffi::{CStr, CString};
use std::time::Instant;

use super::connect::Connector;
use super::disk::timeout;
use super::ffi::{ExportFlag, Handle};
use super::own_server::never;
use crate::config::NbdConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::source::server_info::{ExportInfo, ServerInfo};

/// Flags of an export, by the names that `nbdinfo` uses.
const FLAGS: [(&str, ExportFlag); 10] = [
    ("is_rotational", ExportFlag::Rotational),
    ("is_read_only", ExportFlag::ReadOnly),
    ("can_cache", ExportFlag::Cache),
    ("can_df", ExportFlag::Df),
    ("can_fast_zero", ExportFlag::FastZero),
    ("can_flush", ExportFlag::Flush),
    ("can_fua", ExportFlag::Fua),
    ("can_multi_conn", ExportFlag::MultiConn),
    ("can_trim", ExportFlag::Trim),
    ("can_zero", ExportFlag::Zero),
];

/// Returns the properties of all exports that the server lists.
pub(super) fn list(config: &NbdConfig) -> Result<ServerInfo> {
    let connector = Connector::new(config)?;
    let until = Instant::now() + timeout(config);
    let (names, dropped) = connector.list(until)?;
    if dropped > 0 {
        tracing::warn!("{}", connector.left_out(dropped, names.len()));
    }
    discover(&connector, &names, until)
}

/// Returns the properties of the export of `config`. Errors: the server refuses it.
pub(super) fn info(config: &NbdConfig) -> Result<ServerInfo> {
    let connector = Connector::new(config)?;
    let until = Instant::now() + timeout(config);
    let mut handle = connector.negotiate(true, until, &never)?;
    let names = [(handle.export(), CString::default())];
    let server = server_info(&connector, &mut handle, &names, until)?;
    match server.exports.first().and_then(|e| e.error.clone()) {
        Some(e) => Err(Error::new(ErrorKind::NotFound, e)),
        None => Ok(server),
    }
}

fn discover(connector: &Connector, names: &[(CString, CString)], until: Instant) -> Result<ServerInfo> {
    let mut handle = connector.negotiate(true, until, &never)?;
    server_info(connector, &mut handle, names, until)
}

/// Returns the properties of the server and of the named exports. Ends the connection of `handle`.
fn server_info(
    connector: &Connector,
    handle: &mut Handle,
    names: &[(CString, CString)],
    until: Instant,
) -> Result<ServerInfo> {
    // The oldest protocol variant has no options: there is one export, and it is open.
    let open = handle.is_up();
    let mut exports = Vec::new();
    if !open {
        // Descriptions and canonical names are only sent if they are asked for.
        handle.set_full_info()?;
    }
    for (name, description) in names {
        exports.push(if open {
            export_info(handle, name)
        } else {
            query_export(connector, handle, name, description, until)
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

/// Asks the server for the properties of one export. An error is stored in the result, so that one bad export does not
/// hide the others.
fn query_export(
    connector: &Connector,
    handle: &mut Handle,
    name: &CStr,
    description: &CStr,
    until: Instant,
) -> ExportInfo {
    match connector.info(handle, name, until) {
        Err(e) => ExportInfo {
            error: Some(e.to_string()),
            ..unknown(name, description)
        },
        Ok(_) => {
            // The description of NBD_OPT_INFO has priority over that of NBD_OPT_LIST.
            let full_description = handle.description();
            let description = if full_description.is_empty() {
                description
            } else {
                &full_description
            };
            let info = ExportInfo {
                description: description.to_string_lossy().into_owned(),
                ..export_info(handle, name)
            };
            // A server without metadata contexts refuses this option. That is not an error of the export.
            let contexts = connector.contexts(handle, until).unwrap_or_default();
            ExportInfo { contexts, ..info }
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

/// Returns the properties of the export that the handle has opened or asked for.
fn export_info(handle: &Handle, name: &CStr) -> ExportInfo {
    let (size, error) = match handle.size() {
        Ok(size) => (size, None),
        Err(e) => (0, Some(e.to_string())),
    };
    let flags = FLAGS.map(|(name, flag)| (name, handle.can(flag))).to_vec();
    ExportInfo {
        size,
        error,
        block_sizes: handle.block_sizes(),
        flags,
        ..unknown(name, c"")
    }
}
