//! Tests of mounts of real NBD servers (nbdkit, qemu-nbd, nbd-server), also while a server restarts, hangs, is gone or
//! violates the protocol.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod captive;
mod connect;
mod data;
mod durable;
mod exports;
mod faults;
mod handshake;
mod library;
mod overlay;
mod tls;
mod watchdog;

use std::fs;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, need, need_fuse, poll_until, program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(60);

/// Server process, usually on a Unix socket. Killed on drop.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts nbdkit on the socket `s` in the folder of the test, and waits until it accepts connections.
    fn nbdkit(scratch: &Scratch, words: &[&str]) -> Self {
        let socket = scratch.path("s");
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).args(words);
        Self::start(command, socket)
    }

    fn start(command: Command, socket: PathBuf) -> Self {
        // A crashed server leaves its socket behind.
        let _ = fs::remove_file(&socket);
        let mut server = Self::spawn(command);
        server.socket = socket;
        let up = poll_until(SOON, || UnixStream::connect(&server.socket).is_ok());
        assert!(up, "the server did not come up: {:?}", server.child.try_wait());
        server
    }

    /// Starts nbdkit on a TCP port of this machine. Does not wait until it accepts connections.
    fn nbdkit_on(port: u16, words: &[&str]) -> Self {
        let mut command = Command::new("nbdkit");
        command
            .args(["-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", &port.to_string()])
            .args(words);
        Self::spawn(command)
    }

    /// Starts a server. Does not wait until it accepts connections.
    fn spawn(mut command: Command) -> Self {
        // In a process group of its own: the kernel sends SIGHUP to a stopped process whose group becomes orphaned.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        Self {
            child: command.spawn().expect("starting a server"),
            socket: PathBuf::new(),
        }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Kills the server, so that it loses what it has not written.
    fn crash(mut self) {
        self.end();
    }

    /// Lets the server end by SIGTERM, and waits until it has: what it writes at its end is complete then.
    fn shut_down(mut self) {
        self.signal(Signal::SIGTERM);
        assert!(
            poll_until(SOON, || self.child.try_wait().unwrap().is_some()),
            "the server still runs"
        );
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Returns a command that runs vmdkfuse with a connection to the server as its descriptor 9.
fn vmdkfuse_with_socket(server: &Server) -> Cmd {
    let code = "import os,socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\nos.dup2(s.fileno(),9)\n\
                os.execv(sys.argv[2],sys.argv[2:])";
    Cmd::new("python3")
        .args(["-c", code])
        .arg(&server.socket)
        .arg(program())
}

/// Returns true if FUSE and nbdkit are available.
fn ready() -> bool {
    need_fuse() && need("nbdkit")
}

/// Returns pseudo-random bytes, the same for the same seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend(state.to_be_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Copies a file over the start of another one with `dd`, and makes it durable.
fn put(from: &Path, to: &Path) {
    let (input, output) = (format!("if={}", from.display()), format!("of={}", to.display()));
    Cmd::new("dd")
        .args([&input, &output])
        .args(["bs=1M", "conv=notrunc,fsync", "status=none"])
        .run()
        .ok();
}

/// Returns true if `dd` can read the first block of a file within `deadline`, without the page cache.
fn can_read(path: &Path, deadline: Duration) -> bool {
    let input = format!("if={}", path.display());
    let words = ["of=/dev/null", "bs=4k", "count=1", "iflag=direct", "status=none"];
    Cmd::new("dd")
        .arg(input)
        .args(words)
        .deadline(deadline)
        .run()
        .ended
        .code
        == Some(0)
}

/// Returns the child processes of `pid`.
fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|n| n.parse().unwrap()).collect()
}
