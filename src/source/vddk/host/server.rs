//! NBD server of a host: fixed newstyle handshake, structured replies, block status.
//!
//! ```text
//!   accept thread ─► connection thread: handshake.rs ─► requests ─► Disk::submit, jobs ─► replies, in any order
//!                        └─ with a transport that works within the call: up to MAX_THREADS, one of which reads the next
//!                           request while the others work
//! ```
//! The only client is the parent, which has the other end of the listening socket. All the same nothing that it sends is
//! trusted: a request that the protocol does not allow is refused, or closes the connection. The disk has one handle for
//! all connections, so a flush covers the writes of all of them.
//!
//! Replies are in `reply.rs`.

mod handshake;

use std::io::{self, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use self::handshake::Negotiated;
use super::disk::{Disk, Job, MAX_REQUEST, Transfer};
use super::reply::{Client, Reply};
use crate::error::{Error, Result};
use crate::mutex::lock;
use crate::source::vddk::abi::SECTOR;

/// Threads of a connection whose transport works within the call.
const MAX_THREADS: usize = 16;

/// Connections at a time. The parent makes fewer.
const MAX_CONNECTIONS: usize = 32;

/// Size in bytes of the buffer for requests: many of them without data arrive together.
const READ_BUFFER: usize = 8 << 10;

/// Size in bytes of a socket's send buffer, so that a reply to a long read fits, if the system permits.
const SEND_BUFFER: usize = 1 << 20;

const REQUEST_MAGIC: u32 = 0x2560_9513;

/// Commands of the protocol.
mod command {
    pub(super) const READ: u16 = 0;
    pub(super) const WRITE: u16 = 1;
    pub(super) const DISCONNECT: u16 = 2;
    pub(super) const FLUSH: u16 = 3;
    pub(super) const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
mod flag {
    pub(super) const FUA: u16 = 1;
    pub(super) const DF: u16 = 1 << 2;
    pub(super) const REQ_ONE: u16 = 1 << 3;
}

/// Header of a request.
struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

/// Starts the thread that accepts connections to the disk.
pub(super) fn start(listener: UnixListener, disk: Arc<Disk>) -> Result<()> {
    let failed = |e| Error::io("starting the server of the disk", e);
    let connections = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                // Out of descriptors, for example: not at once again.
                Err(e) => {
                    tracing::warn!("accepting a connection: {e}");
                    thread::sleep(std::time::Duration::from_millis(100));
                    continue;
                }
            };
            // Dropping the stream closes it; the client sees the end of the connection.
            if connections.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
                connections.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (disk, count) = (Arc::clone(&disk), Arc::clone(&connections));
            let serve = move || {
                if let Err(e) = serve(stream, &disk) {
                    tracing::debug!("connection: {e}");
                }
                count.fetch_sub(1, Ordering::SeqCst);
            };
            if let Err(e) = thread::Builder::new().name("vddk-nbd".into()).spawn(serve) {
                connections.fetch_sub(1, Ordering::SeqCst);
                tracing::warn!("starting a thread: {e}");
            }
        }
    };
    let thread = thread::Builder::new().name("vddk-accept".into()).spawn(accept);
    thread.map(drop).map_err(failed)
}

/// Serves a connection to its end.
fn serve(stream: UnixStream, disk: &Arc<Disk>) -> io::Result<()> {
    raise_send_buffer(&stream);
    let mut reader = BufReader::with_capacity(READ_BUFFER, stream.try_clone()?);
    let Some(negotiated) = handshake::negotiate(&mut reader, &stream, disk)? else {
        return Ok(());
    };
    let client = Arc::new(Client::new(stream));
    let connection = Connection {
        disk,
        client: &client,
        negotiated,
        reader: Mutex::new(Some(reader)),
        readers: AtomicUsize::new(0),
        threads: AtomicUsize::new(1),
    };
    // Returns when all threads of the connection have ended; replies to requests in flight may still come afterwards.
    let result = thread::scope(|scope| connection.run(scope));
    // The stream itself lives on in those replies, so it must be ended and not only dropped.
    client.shut_down();
    result
}

/// The threads of a connection share this.
struct Connection<'d> {
    disk: &'d Arc<Disk>,
    client: &'d Arc<Client>,
    negotiated: Negotiated,
    /// `None` after the end of the connection.
    reader: Mutex<Option<BufReader<UnixStream>>>,
    /// Threads that read a request, or wait for their turn to read.
    readers: AtomicUsize,
    threads: AtomicUsize,
}

impl<'d> Connection<'d> {
    /// Reads and submits requests until the end of the connection. Starts another thread if no thread is left to read.
    fn run<'s>(&'s self, scope: &'s thread::Scope<'s, '_>) -> io::Result<()> {
        loop {
            self.readers.fetch_add(1, Ordering::SeqCst);
            let next = self.next();
            let left = self.readers.fetch_sub(1, Ordering::SeqCst) - 1;
            let Some((request, data)) = next? else {
                return Ok(());
            };
            // Another thread has to read while this one is occupied in the call.
            let more = self.disk.is_inline() && left == 0 && self.threads.load(Ordering::SeqCst) < MAX_THREADS;
            if more {
                self.threads.fetch_add(1, Ordering::SeqCst);
                let thread = thread::Builder::new().name("vddk-nbd".into());
                if thread.spawn_scoped(scope, || drop(self.run(scope))).is_err() {
                    self.threads.fetch_sub(1, Ordering::SeqCst);
                }
            }
            self.perform(&request, data);
        }
    }

    /// Reads the next request, with the data of a write. Returns `None` at the end of the connection.
    fn next(&self) -> io::Result<Option<(Request, Vec<u8>)>> {
        let mut guard = lock(&self.reader);
        let Some(reader) = guard.as_mut() else {
            return Ok(None);
        };
        let next = self.read_request(reader);
        // Position in the stream is lost after an error, so no other thread may read on.
        if !matches!(next, Ok(Some(_))) {
            *guard = None;
        }
        next
    }

    fn read_request(&self, reader: &mut BufReader<UnixStream>) -> io::Result<Option<(Request, Vec<u8>)>> {
        let mut head = [0; 28];
        reader.read_exact(&mut head)?;
        let request = Request::parse(&head)?;
        if request.command == command::DISCONNECT {
            return Ok(None);
        }
        let mut data = Vec::new();
        if request.command == command::WRITE {
            if request.len > MAX_REQUEST {
                // Its data would have to be read and thrown away.
                return Err(invalid("a write is longer than the maximum"));
            }
            data = self.disk.buffer(request.len as usize);
            if let Some(data) = data.get_mut(..request.len as usize) {
                reader.read_exact(data)?;
            }
        }
        Ok(Some((request, data)))
    }

    /// Checks a request and submits it.
    fn perform(&self, request: &Request, data: Vec<u8>) {
        // Only these two have structured replies, also for an error.
        let is_structured = matches!(request.command, command::READ | command::BLOCK_STATUS);
        let reply = Reply {
            client: Arc::clone(self.client),
            structured: is_structured && self.negotiated.structured,
            cookie: request.cookie,
            offset: request.offset,
        };
        let (disk, offset, len) = (self.disk, request.offset, request.len);
        if let Err(errno) = self.check(request) {
            if !data.is_empty() {
                disk.give_back(data);
            }
            return reply.error(errno as u32);
        }
        let write = request.command == command::WRITE;
        match request.command {
            command::READ | command::WRITE => disk.submit(Transfer {
                write,
                fua: request.flags & flag::FUA != 0,
                offset,
                len: len as usize,
                buffer: if write { data } else { disk.buffer(len as usize) },
                reply,
                disk: Arc::clone(disk),
            }),
            command::FLUSH => disk.send(Job::Flush(reply)),
            _ => disk.send(Job::Extents {
                offset,
                len: len.into(),
                one: request.flags & flag::REQ_ONE != 0,
                reply,
            }),
        }
    }

    /// Checks that a request is one that the protocol and the disk allow.
    fn check(&self, request: &Request) -> Result<(), i32> {
        let end = request.offset.checked_add(request.len.into()).ok_or(libc::EINVAL)?;
        let aligned = request.offset.is_multiple_of(SECTOR) && u64::from(request.len).is_multiple_of(SECTOR);
        let ranged = aligned && request.len > 0 && end <= self.disk.size();
        let (flags, valid) = match request.command {
            command::READ => (flag::DF | flag::FUA, ranged && request.len <= MAX_REQUEST),
            command::WRITE if !self.disk.is_writable() => return Err(libc::EPERM),
            command::WRITE if ranged => (flag::FUA, true),
            // The answer of the protocol for a write beyond the end.
            command::WRITE if aligned && request.len > 0 => return Err(libc::ENOSPC),
            command::FLUSH => (flag::FUA, request.len == 0 && request.offset == 0),
            command::BLOCK_STATUS => (flag::REQ_ONE, ranged && self.negotiated.block_status),
            _ => (0, false),
        };
        if valid && request.flags & !flags == 0 {
            Ok(())
        } else {
            Err(libc::EINVAL)
        }
    }
}

impl Request {
    fn parse(head: &[u8; 28]) -> io::Result<Self> {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = *head;
        if u32::from_be_bytes([m0, m1, m2, m3]) != REQUEST_MAGIC {
            return Err(invalid("a request does not start with its magic number"));
        }
        let number = |at: usize| {
            rest.get(at..at + 8)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u64::from_be_bytes)
        };
        let len = rest
            .get(16..20)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_be_bytes);
        Ok(Self {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([c0, c1]),
            cookie: number(0),
            offset: number(8),
            len,
        })
    }
}

/// Raises the send buffer of a socket, as far as the system permits.
fn raise_send_buffer(stream: &UnixStream) {
    use nix::sys::socket::{setsockopt, sockopt};
    let _ = setsockopt(stream, sockopt::SndBuf, &SEND_BUFFER);
    // Beyond the limit of the system; only with a privilege.
    let _ = setsockopt(stream, sockopt::SndBufForce, &SEND_BUFFER);
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}
