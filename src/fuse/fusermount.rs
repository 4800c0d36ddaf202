//! The setuid helper `fusermount3`, which mounts and unmounts for ordinary users.
//!
//! The helper sends the descriptor of `/dev/fuse` over a socket whose number is in its environment. That socket is its
//! standard input (`_FUSE_COMMFD=0`), so no descriptor has to be made inheritable, which other child processes would
//! inherit too. Its own auto_unmount is not used; `auto_unmount.rs` says why.

#![allow(unsafe_code)] // Only for taking ownership of the descriptor that the helper sends.

use std::io::{self, Read};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use nix::errno::Errno;

use super::own_mounts::SUBTYPE;
use super::target::Target;
use crate::config::MountOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::process::inherited;

/// Names to try: first in PATH, then by full path, since services often run with a short PATH.
const PROGRAMS: [&str; 3] = ["fusermount3", "/usr/bin/fusermount3", "/bin/fusermount3"];

/// Mounts on `target` and returns the FUSE device.
///
/// The helper is started in the directory that `target` holds, so that a directory which another user puts in its place
/// meanwhile is not mounted on.
pub(super) fn mount(target: &Target, options: &MountOptions, source: &str) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| Error::io("socket for fusermount3", e))?;
    let theirs = OwnedFd::from(theirs);
    let (folder, name) = target.folder_and_name();
    let mut helper = spawn(|command| {
        let stdin = theirs.try_clone()?;
        command
            .arg("-o")
            .arg(option_words(options, source))
            .arg("--")
            .arg(&name)
            .current_dir(&folder);
        command.env("_FUSE_COMMFD", "0").stdin(stdin);
        Ok(())
    })?;
    // Only the helper may hold its end from now on. Otherwise its exit would not end the receive below.
    drop(theirs);
    match receive(&ours) {
        Ok(device) => {
            helper.wait().map_err(|e| Error::io("fusermount3", e))?;
            Ok(device)
        }
        Err(errno) => Err(refusal(&target.point, helper, errno)),
    }
}

/// Unmounts `point` at once, or, if `lazy`, detaches it, so that it ends with its last user.
pub(super) fn unmount(point: &Path, lazy: bool) -> Result<()> {
    let helper = spawn(|command| {
        command
            .arg("-u")
            .args(lazy.then_some("-z"))
            .arg("--")
            .arg(point)
            .stdin(Stdio::null());
        Ok(())
    })?;
    let Output { status, stderr, .. } = helper.wait_with_output().map_err(|e| Error::io("fusermount3", e))?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::Os(libc::EBUSY), stderr_text(&stderr)))
    }
}

/// Starts the helper, with the arguments and descriptors that `arguments` adds.
fn spawn(arguments: impl Fn(&mut Command) -> io::Result<()>) -> Result<Child> {
    for program in PROGRAMS {
        let mut command = Command::new(program);
        inherited::reset_in_child(&mut command);
        arguments(&mut command).map_err(|e| Error::io("fusermount3", e))?;
        match command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn() {
            Ok(child) => return Ok(child),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(program, e)),
        }
    }
    let hint = if nix::unistd::geteuid().is_root() {
        "this process has no capability CAP_SYS_ADMIN, which mounting needs, and fusermount3 is not installed: start it \
         with the capability (docker run --cap-add SYS_ADMIN --device /dev/fuse), or install the package fuse3"
    } else {
        "fusermount3 is not installed, and without it only root can mount: install the package fuse3"
    };
    Err(Error::new(ErrorKind::NotFound, hint))
}

/// Formats the options for the helper's `-o`.
fn option_words(options: &MountOptions, source: &str) -> String {
    let mut words = format!("fsname={},subtype={},nosuid,nodev", escape(source), SUBTYPE);
    words.push_str(if options.read_only { ",ro" } else { ",rw" });
    for (on, word) in [
        (options.allow_other || options.allow_root, ",allow_other"),
        (options.default_permissions, ",default_permissions"),
    ] {
        words.push_str(if on { word } else { "" });
    }
    for option in options
        .flags
        .iter()
        .copied()
        .chain(options.contexts.iter().map(String::as_str))
    {
        words.push(',');
        words.push_str(&escape(option));
    }
    words
}

/// Escapes a value for the helper's option parser, which splits at commas and takes `\` as the escape of the next
/// character.
fn escape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, ',' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Buffer for the control message that carries the descriptor. The alignment is that of its header, and a message of two
/// descriptors fits, which is also the smallest size that the kernel's rounding allows for one.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fds: [RawFd; 2],
}

/// Receives the descriptor. Errors: `ECONNRESET` if the helper exits without sending one, `EPROTO` if it sends another
/// number of them.
fn receive(socket: &UnixStream) -> nix::Result<OwnedFd> {
    let mut byte = [0u8; 1];
    let mut data = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: byte.len(),
    };
    let header = libc::cmsghdr {
        cmsg_len: 0,
        cmsg_level: 0,
        cmsg_type: 0,
    };
    let mut control = Control { header, fds: [-1; 2] };
    // SAFETY: all fields of the structure may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut data, 1);
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    loop {
        // SAFETY: the message points to `data` and `control`, with their sizes, and both live until the end of this
        // function.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        match Errno::result(received) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    let Control { header, fds } = control;
    let is_rights = message.msg_controllen >= size_of::<libc::cmsghdr>()
        && (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS);
    let count = if is_rights {
        header.cmsg_len.saturating_sub(offset_of!(Control, fds)) / size_of::<RawFd>()
    } else {
        0
    };
    // SAFETY: the kernel has just created these descriptors for this process, and no other code knows their numbers.
    let own = |fd: &RawFd| unsafe { OwnedFd::from_raw_fd(*fd) };
    // All are owned, so that those beyond the first are closed.
    let mut received: Vec<OwnedFd> = fds.iter().take(count).map(own).collect();
    match (
        received.pop(),
        received.is_empty(),
        message.msg_flags & libc::MSG_CTRUNC,
    ) {
        (Some(device), true, 0) => Ok(device),
        (None, ..) => Err(Errno::ECONNRESET),
        _ => Err(Errno::EPROTO),
    }
}

/// Returns the error of a helper that sent no descriptor: its own message, with advice where the cause is known.
fn refusal(point: &Path, mut helper: Child, errno: Errno) -> Error {
    let mut text = Vec::new();
    if let Some(mut stderr) = helper.stderr.take()
        && let Err(e) = stderr.read_to_end(&mut text)
    {
        tracing::debug!("fusermount3: reading its error output: {e}");
    }
    let status = helper.wait();
    let text = stderr_text(&text);
    let point = point.display();
    if text.contains("user_allow_other") {
        return Error::new(
            ErrorKind::Os(libc::EPERM),
            format!(
                "{point}: allow_other and allow_root are refused to ordinary users here: add the line \
                 `user_allow_other` to /etc/fuse.conf, or run as root ({text})"
            ),
        );
    }
    match status {
        _ if !text.is_empty() => Error::new(ErrorKind::Os(libc::EPERM), format!("{point}: {text}")),
        Ok(status) => Error::io(format!("{point}: fusermount3 ended with {status}"), errno.into()),
        Err(e) => Error::io(format!("{point}: fusermount3"), e),
    }
}

/// Returns the helper's standard error as one line.
fn stderr_text(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    text.lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_words_escape_the_source() {
        let options = MountOptions {
            read_only: true,
            allow_root: true,
            ..Default::default()
        };
        assert_eq!(
            option_words(&options, "a,b\\c.vmdk"),
            "fsname=a\\,b\\\\c.vmdk,subtype=vmdkfuse,nosuid,nodev,ro,allow_other"
        );
        assert_eq!(
            option_words(&MountOptions::default(), "x"),
            "fsname=x,subtype=vmdkfuse,nosuid,nodev,rw"
        );
    }

    #[test]
    fn messages_become_one_line() {
        assert_eq!(stderr_text(b"fusermount3: one\n\n two \n"), "fusermount3: one; two");
    }

    #[test]
    fn an_exit_without_a_descriptor_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(receive(&ours).unwrap_err(), Errno::ECONNRESET);
    }

    #[test]
    fn exactly_one_descriptor_is_received() {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        let (ours, theirs) = UnixStream::pair().unwrap();
        let send = |fds: &[RawFd]| {
            let data = [std::io::IoSlice::new(b"x")];
            let rights = [ControlMessage::ScmRights(fds)];
            sendmsg::<()>(theirs.as_raw_fd(), &data, &rights, MsgFlags::empty(), None).unwrap();
        };
        let fd = theirs.as_raw_fd();
        send(&[fd]);
        let received = receive(&ours).unwrap();
        assert!(received.as_raw_fd() != fd);
        for several in [&[fd, fd][..], &[fd, fd, fd], &[fd; 20]] {
            send(several);
            assert_eq!(receive(&ours).unwrap_err(), Errno::EPROTO);
        }
    }
}
