//! Connecting to servers: retries, sockets that are passed to the daemon, config files.

use std::fs;
use std::process::Command;

use fuse_tests::harness::{Scratch, free_port, is_running, poll_until, read_range, unmount};

use crate::{SOON, Server, can_read, children, noise, put, ready, vmdkfuse_with_socket};

#[test]
fn a_mount_retries_to_connect_as_often_as_retry_says() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let uri = format!("nbd+unix:///?socket={}", scratch.path("s").display());
    scratch.mount().arg(&uri).refused(1).one_error(1, &["connect", "s"]);
    // A server that is not up yet when the mount starts.
    let script = format!("sleep 0.5; exec nbdkit -f -U {} memory 1M", scratch.path("s").display());
    let mut command = Command::new("sh");
    command.args(["-c", &script]);
    let _server = Server::spawn(command);
    let mount = scratch.mount().arg(&uri).arg("retry=100").start();
    assert!(can_read(&mount.file("disk.raw"), SOON));
}

#[test]
fn socket_fd_uses_a_socket_that_is_passed_to_the_daemon() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "1M"]);
    let info = vmdkfuse_with_socket(&server).args(["--info", "socket-fd=9"]).run();
    assert!(info.ok().stdout.contains("size             1048576 bytes"));
    let refused = scratch.mount().arg("socket-fd=9").refused(1);
    refused.one_error(1, &["socket-fd=9"]);
}

#[test]
fn a_passed_socket_is_used_by_one_disk_only() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "1M"]);
    let text = "[[disk]]\nname = \"a\"\nsocket-fd = 9\n[[disk]]\nname = \"b\"\nsocket-fd = 9\n";
    vmdkfuse_with_socket(&server)
        .args(["-f", "--config"])
        .arg(scratch.write("twice.toml", text))
        .arg(scratch.mkdir("mnt"))
        .run()
        .one_error(2, &["socket-fd=9", "two disks"]);
    // Descriptors that the program opens itself are never taken for one that was passed.
    for number in 3..12 {
        let word = format!("socket-fd={number}");
        scratch.mount().arg(&word).refused(1).one_error(1, &[word.as_str()]);
    }
}

#[test]
fn a_config_file_names_servers_by_socket_port_command_and_descriptor() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "1M"]);
    let port = free_port();
    let _other = Server::nbdkit_on(port, &["memory", "2M"]);
    // Paths are relative to the folder of the config file.
    let text = format!(
        "retry = 50\n[[disk]]\nname = \"socket\"\nsocket = \"s\"\n[[disk]]\nhostname = \"127.0.0.1\"\nport = {port}\n\
         name = \"port\"\n[[disk]]\ncommand = \"nbdkit\"\narg = [\"memory\", \"3M\"]\nname = \"command\"\n"
    );
    let mount = scratch
        .mount()
        .arg("--config")
        .arg(scratch.write("vms.toml", text))
        .start();
    assert_eq!(mount.names(), ["command", "port", "socket"]);
    for (name, size) in [("socket", 1u64), ("port", 2), ("command", 3)] {
        assert_eq!(fs::metadata(mount.file(name)).unwrap().len(), size << 20, "{name}");
    }
    assert_eq!(read_range(&mount.file("socket"), 4096, 8), 4096u64.to_be_bytes());
    let data = scratch.write("data", noise(1 << 20, 12));
    for name in ["port", "command"] {
        put(&data, &mount.file(name));
        assert_eq!(
            read_range(&mount.file(name), 0, 1 << 20),
            fs::read(&data).unwrap(),
            "{name}"
        );
    }
    let captive = children(mount.pid()).pop().expect("a server");
    mount.unmount();
    assert!(poll_until(SOON, || !is_running(captive)), "the server still runs");
    // The daemon must not close a descriptor that only the config file names when it closes inherited ones.
    let config = scratch.write("fd.toml", "[[disk]]\nsocket-fd = 9\nname = \"fd\"\n");
    let mnt = scratch.mkdir("by-descriptor");
    vmdkfuse_with_socket(&server)
        .arg("--config")
        .arg(config)
        .arg(&mnt)
        .run()
        .ok();
    let read = read_range(&mnt.join("fd"), 8, 8);
    unmount(&mnt);
    assert_eq!(read, 8u64.to_be_bytes());
}
