//! The system log of a daemon without a log file: datagrams to `/dev/log`, which journald and every syslog daemon read.
//!
//! The C library's `syslog(3)` is not used because it blocks: a log daemon that does not read would stop the threads that
//! serve the mount. Here such a message is dropped.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Socket of the log daemon.
const SOCKET: &str = "/dev/log";

/// Facility `daemon` of syslog, in the upper bits of a priority.
const DAEMON: u8 = 3 << 3;

/// Largest message in bytes. A longer one is truncated: a datagram is limited, and rsyslog cuts at 8 KiB.
const MESSAGE_MAX: usize = 8 << 10;

/// Connection to the system log.
#[derive(Debug)]
pub(super) struct Syslog {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Syslog {
    /// Creates the connection; `None` if the system has no log daemon.
    pub(super) fn open() -> Option<Self> {
        Self::at(Path::new(SOCKET))
    }

    fn at(path: &Path) -> Option<Self> {
        if !path.exists() {
            return None;
        }
        let socket = UnixDatagram::unbound().ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(Self {
            socket,
            path: path.to_owned(),
        })
    }
}

impl<'a> MakeWriter<'a> for Syslog {
    type Writer = Message<'a>;

    fn make_writer(&'a self) -> Message<'a> {
        Message { log: self, severity: 6 }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Message<'a> {
        let severity = match *meta.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        Message { log: self, severity }
    }
}

/// Writer of one message. The subscriber passes it in one call.
#[derive(Debug)]
pub(super) struct Message<'a> {
    log: &'a Syslog,
    severity: u8,
}

impl Write for Message<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        // A datagram is one message, so the line end would become part of the text.
        let line = text.strip_suffix(b"\n").unwrap_or(text);
        let mut message = format!("<{}>vmdkfuse[{}]: ", DAEMON | self.severity, std::process::id()).into_bytes();
        message.extend_from_slice(line);
        message.truncate(MESSAGE_MAX);
        // The socket is named in each call, so a log daemon that was restarted is found again. An error has no place left
        // where it could be reported.
        let _ = self.log.socket.send_to(&message, &self.log.path);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_priority_name_and_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert!(Syslog::at(&path).is_none());
        let daemon = UnixDatagram::bind(&path).unwrap();
        let log = Syslog::at(&path).unwrap();
        let receive = || {
            let mut message = vec![0; 2 * MESSAGE_MAX];
            let len = daemon.recv(&mut message).unwrap();
            message.truncate(len);
            String::from_utf8(message).unwrap()
        };
        log.make_writer().write_all(b"hello\n").unwrap();
        assert_eq!(receive(), format!("<30>vmdkfuse[{}]: hello", std::process::id()));
        log.make_writer().write_all(&[b'x'; 2 * MESSAGE_MAX]).unwrap();
        assert_eq!(receive().len(), MESSAGE_MAX);
    }

    #[test]
    fn a_log_daemon_that_does_not_read_blocks_no_caller() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let _daemon = UnixDatagram::bind(&path).unwrap();
        let log = Syslog::at(&path).unwrap();
        // More than any queue of a socket holds.
        for _ in 0..20_000 {
            log.make_writer().write_all(&[b'x'; 1000]).unwrap();
        }
    }
}
