//! The watchdog of systemd watches the event loops, not the servers.

use std::thread;

use fuse_tests::harness::{NotifySocket, Scratch};
use nix::sys::signal::Signal;

use super::{SOON, Server, can_read, ready};

/// "WATCHDOG=1 only while the FUSE loops answer (a dead upstream does not stop it)"
#[test]
fn a_server_that_hangs_does_not_stop_the_watchdog() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let manager = NotifySocket::new(&scratch);
    let server = Server::nbdkit(&scratch, &["memory", "8M"]);
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("cache=none")
        .arg("timeout=3")
        .env("NOTIFY_SOCKET", manager.name())
        .env("WATCHDOG_USEC", "300000")
        .start();
    manager.wait_for("WATCHDOG=1");
    server.signal(Signal::SIGSTOP);
    let disk = mount.file("disk.raw");
    // More readers than the mount has event loops.
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let disk = disk.clone();
            thread::spawn(move || can_read(&disk, SOON))
        })
        .collect();
    manager.drain();
    for _ in 0..10 {
        manager.wait_for("WATCHDOG=1");
    }
    assert!(
        readers.iter().all(|reader| !reader.is_finished()),
        "the server answered, or the time limit came too early"
    );
    for reader in readers {
        assert!(!reader.join().unwrap(), "a read succeeded without a server");
    }
    server.signal(Signal::SIGCONT);
    mount.unmount();
}
