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
//! A reply is written in one piece under the lock of its connection, by whichever thread has the result. A client that
//! reads no replies stops its own connection.

mod handshake;

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use self::handshake::Negotiated;
use super::disk::{Disk, Job, Transfer};
use super::extents::{Content, Extent};
use crate::error::{Error, Result};
use crate::mutex::lock;
use crate::source::vddk::abi::SECTOR;

/// Longest request in bytes. Larger ones exhaust the buffers of a host's NFC service.
pub(super) const MAX_REQUEST: u32 = 2 << 20;

/// Threads of a connection whose transport works within the call.
const MAX_THREADS: usize = 16;

/// Connections at a time. The parent makes fewer.
const MAX_CONNECTIONS: usize = 32;

/// Size in bytes of the buffer for requests: many of them without data arrive together.
const READ_BUFFER: usize = 8 << 10;

/// Size in bytes of a socket's send buffer, so that a reply to a long read fits, if the system permits.
const SEND_BUFFER: usize = 1 << 20;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

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

/// Chunks of a structured reply.
mod chunk {
    pub(super) const DONE: u16 = 1;
    pub(super) const OFFSET_DATA: u16 = 1;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const ERROR: u16 = (1 << 15) + 1;
}

/// States of `base:allocation`.
mod state {
    pub(super) const HOLE: u32 = 1;
    pub(super) const ZERO: u32 = 2;
}

/// A connection, and what was negotiated on it.
pub(super) struct Client {
    stream: UnixStream,
    /// Held while a reply is written.
    writing: Mutex<()>,
    negotiated: Negotiated,
}

/// Receiver of the result of one request.
pub(super) struct Reply {
    client: Arc<Client>,
    command: u16,
    cookie: u64,
    offset: u64,
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
    let client = Arc::new(Client {
        stream,
        writing: Mutex::default(),
        negotiated,
    });
    let connection = Connection {
        disk,
        client: &client,
        reader: Mutex::new(Some(reader)),
        readers: AtomicUsize::new(0),
        threads: AtomicUsize::new(1),
    };
    // Returns when all threads of the connection have ended; replies to requests in flight may still come afterwards.
    let result = thread::scope(|scope| connection.run(scope));
    // The stream itself lives on in those replies, so it must be ended and not only dropped.
    let _ = client.stream.shutdown(Shutdown::Both);
    result
}

/// The threads of a connection share this.
struct Connection<'d> {
    disk: &'d Arc<Disk>,
    client: &'d Arc<Client>,
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
        let reply = Reply {
            client: Arc::clone(self.client),
            command: request.command,
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
        let negotiated = &self.client.negotiated;
        let (flags, valid) = match request.command {
            command::READ => (flag::DF | flag::FUA, ranged && request.len <= MAX_REQUEST),
            command::WRITE if !self.disk.is_writable() => return Err(libc::EPERM),
            command::WRITE if ranged => (flag::FUA, true),
            // The answer of the protocol for a write beyond the end.
            command::WRITE if aligned && request.len > 0 => return Err(libc::ENOSPC),
            command::FLUSH => (flag::FUA, request.len == 0 && request.offset == 0),
            command::BLOCK_STATUS => (flag::REQ_ONE, ranged && negotiated.block_status),
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

impl Reply {
    /// Answers a request that has succeeded and returns nothing.
    pub(super) fn done(self) {
        self.simple(0, &[]);
    }

    /// Answers a read.
    pub(super) fn data(self, data: &[u8]) {
        if !self.client.negotiated.structured {
            return self.simple(0, data);
        }
        self.chunk(chunk::OFFSET_DATA, &self.offset.to_be_bytes(), data);
    }

    /// Answers a request that has failed.
    pub(super) fn error(self, errno: u32) {
        // The error of a command with structured replies is a chunk.
        let structured = matches!(self.command, command::READ | command::BLOCK_STATUS);
        if !(structured && self.client.negotiated.structured) {
            return self.simple(errno, &[]);
        }
        let [a, b, c, d] = errno.to_be_bytes();
        self.chunk(chunk::ERROR, &[a, b, c, d, 0, 0], &[]);
    }

    /// Answers a request for block status.
    pub(super) fn extents(self, extents: &[Extent]) {
        let mut text = handshake::CONTEXT_ID.to_be_bytes().to_vec();
        for extent in extents {
            let flags = match extent.content {
                Content::Data => 0,
                Content::Zero => state::HOLE | state::ZERO,
            };
            // An extent lies within a request, whose length has 32 bits.
            text.extend(u32::try_from(extent.len).unwrap_or(u32::MAX).to_be_bytes());
            text.extend(flags.to_be_bytes());
        }
        self.chunk(chunk::BLOCK_STATUS, &text, &[]);
    }

    /// Leaves a request without an answer: the host ends, and the parent repeats it.
    pub(super) fn abandon(self) {}

    fn simple(&self, errno: u32, data: &[u8]) {
        let mut head = [0; 16];
        head[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        head[4..8].copy_from_slice(&errno.to_be_bytes());
        head[8..].copy_from_slice(&self.cookie.to_be_bytes());
        self.client.send(&head, data);
    }

    /// Sends a structured reply of one chunk.
    fn chunk(&self, kind: u16, start: &[u8], data: &[u8]) {
        let len = u32::try_from(start.len() + data.len()).unwrap_or(u32::MAX);
        let mut head = Vec::with_capacity(20 + start.len());
        head.extend(CHUNK_MAGIC.to_be_bytes());
        head.extend(chunk::DONE.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(self.cookie.to_be_bytes());
        head.extend(len.to_be_bytes());
        head.extend(start);
        self.client.send(&head, data);
    }
}

impl Client {
    /// Sends a reply. Closes the connection if that fails: the parent sees it and repeats the request.
    fn send(&self, head: &[u8], data: &[u8]) {
        // A reply in two pieces would be torn apart by one of another thread.
        let _writing = lock(&self.writing);
        let mut slices = [IoSlice::new(head), IoSlice::new(data)];
        let mut left = slices.as_mut_slice();
        while left.iter().any(|slice| !slice.is_empty()) {
            match (&self.stream).write_vectored(left) {
                Ok(n @ 1..) => IoSlice::advance_slices(&mut left, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    let _ = self.stream.shutdown(Shutdown::Both);
                    return;
                }
            }
        }
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
