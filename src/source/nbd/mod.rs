//! Exports of NBD servers as disks. libnbd is the client.
//!
//! A disk turns requests into commands, its session keeps them until they are answered, and a connection sends them. A
//! connection that breaks is replaced: the session replays the writes that no flush covers, and sends the unanswered
//! commands again. Each request ends by its deadline.
//!
//! ```text
//!   disk.rs           sectors ─► commands              extent_cache.rs  holes and zeroes, which are not fetched
//!   split_request.rs  requests of several commands     command.rs       one command, from submission to result
//!   session.rs        queues, deadlines, results       replay_log.rs, unflushed.rs  writes that no flush covers
//!     session/serve.rs     which thread polls          session/reconnect.rs  manager thread: connect, replay
//!   connection.rs     sockets retired together: send   poller.rs        poll, read answers (handoff.rs, sync.rs)
//!   bulk.rs           threads for long requests        buffer_pool.rs   reused buffers
//!   connect.rs        address ─► connected handle      own_server.rs, captive.rs  server that the daemon starts itself
//!   discover.rs       --list, --info                   export.rs        size, block sizes, flags; their checks
//!   export_identity.rs  the same disk after a reconnect?
//!   catalog.rs        exports that the server has now  backend.rs, export_source.rs, served_disk.rs  sources
//!   tls.rs            trusted certificates             private_dir.rs   folder for them, for the handshake
//!   ffi.rs            the only calls of libnbd
//! ```
//! Nothing that a server sends is trusted. All numbers are checked where they enter (`export.rs`, `extent_cache.rs`,
//! the chunks of a read in `ffi/ticket.rs`, which bounds the number of extents too). A handshake has a limit of steps,
//! of bytes that are stored, and of time (`ffi/handshake.rs`). libnbd closes the connection of a server that violates the
//! protocol.

mod backend;
mod buffer_pool;
mod bulk;
mod captive;
mod catalog;
mod command;
mod connect;
mod connection;
mod discover;
mod disk;
mod export;
mod export_identity;
mod export_source;
mod extent_cache;
mod ffi;
mod handoff;
mod own_server;
mod poller;
mod private_dir;
mod replay_log;
mod served_disk;
mod session;
mod split_request;
mod sync;
#[cfg(test)]
mod tests;
mod tls;
mod unflushed;

pub(in crate::source) use captive::{CaptiveServer, MAX_LINE};
pub use catalog::{ExportCatalog, FoundExport};
pub use disk::NbdDisk;
pub(in crate::source) use disk::longest_answer;
pub(in crate::source) use own_server::{Cancel, OwnServer};
pub(in crate::source) use private_dir::PrivateDir;
pub(in crate::source) use served_disk::{FETCHES, ServedDisk};

/// Returns the version of the installed libnbd. Errors: it is not installed, or too old.
pub fn version() -> crate::error::Result<String> {
    Ok(ffi::Handle::new()?.version())
}
