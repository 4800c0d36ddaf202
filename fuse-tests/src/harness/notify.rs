//! A service manager's side of sd_notify(3).

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Scratch;

/// Socket that a daemon sends its messages to.
#[derive(Debug)]
pub struct NotifySocket {
    socket: UnixDatagram,
    path: PathBuf,
}

impl NotifySocket {
    /// Creates the socket in the folder of the test, which every user may write to.
    pub fn new(scratch: &Scratch) -> Self {
        let path = scratch.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        Self { socket, path }
    }

    /// Returns the value of `NOTIFY_SOCKET`.
    pub fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Receives a message within `limit`.
    pub fn receive(&self, limit: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(limit)).unwrap();
        let mut message = vec![0; 4096];
        let len = self.socket.recv(&mut message).ok()?;
        message.truncate(len);
        Some(String::from_utf8(message).unwrap())
    }

    /// Receives messages until one has the line `line`, and returns it. Panics if none comes within 60 seconds.
    #[track_caller]
    pub fn wait_for(&self, line: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Some(left) = deadline
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
        {
            match self.receive(left) {
                Some(message) if message.lines().any(|found| found == line) => return message,
                _ => {}
            }
        }
        panic!("no message {line} within 60 s");
    }

    /// Discards the messages that are there already.
    pub fn drain(&self) {
        while self.receive(Duration::from_millis(1)).is_some() {}
    }
}
