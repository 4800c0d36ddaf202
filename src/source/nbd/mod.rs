//! Exports of NBD servers as disks. libnbd is the client.
//!
//! ```text
//!   disk.rs        sectors ─► commands, split as the server wants them; zeroes that are known are not fetched (map.rs)
//!   parts.rs       requests of several commands
//!   link.rs        what becomes of a command: sent, answered, or sent again on a new connection; its end is bounded
//!   link/          attend.rs: who serves the connections; connect.rs: who makes new ones
//!   journal.rs     changes that no flush has covered, to be sent again
//!   generation.rs  the connections of now: who sends      drive.rs    who reads answers
//!   carry.rs       long requests, each by a thread with a connection of its own
//!   dial.rs        from an address to a connection        server.rs   a server that we run ourselves
//!   look.rs        --list, --info, all exports as files   export.rs   size and abilities
//!   ffi.rs         the only calls of libnbd
//! ```
//! All numbers of a server are checked where they come in (`export.rs`, `map.rs`), and how long and how many names there
//! are is bounded (`ffi.rs`). A server that breaks the protocol loses its connection, as libnbd decides.

mod buffer_pool;
mod bulk;
mod captive;
mod command;
mod connect;
mod connection;
mod discover;
mod disk;
mod export;
mod extent_cache;
mod ffi;
mod poller;
mod replay_log;
mod session;
mod split_request;
#[cfg(test)]
mod tests;

pub use crate::source::server_info::{ExportInfo, ServerInfo};
pub use discover::{exports, info, list};
pub use disk::NbdDisk;

/// The version of libnbd, which need not be the one that was there for the build. `None`: it is not built in.
pub fn version() -> crate::error::Result<Option<String>> {
    Ok(Some(ffi::Handle::new()?.version()))
}
