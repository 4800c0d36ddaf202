//! The setuid helper `fusermount3`, which mounts and unmounts for ordinary users.
//!
//! The helper sends the descriptor of `/dev/fuse` over a socket whose number is in its environment. That socket is its
//! standard input (`_FUSE_COMMFD=0`), so no descriptor has to be made inheritable, which other child processes would
//! inherit too. Its own auto_unmount is not used; `auto_unmount.rs` says why.

#![allow(unsafe_code)] // Only for taking ownership of the descriptor that the helper sends.

use std::io::{self, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::target::Target;
use crate::config::MountOptions;
use crate::error::{Error, ErrorKind, Result};

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
        arguments(&mut command).map_err(|e| Error::io("fusermount3", e))?;
        match command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn() {
            Ok(child) => return Ok(child),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(program, e)),
        }
    }
    let hint = "fusermount3 is not installed, and without it only root can mount: install the package fuse3";
    Err(Error::new(ErrorKind::NotFound, hint))
}

/// Formats the options for the helper's `-o`.
fn option_words(options: &MountOptions, source: &str) -> String {
    let mut words = format!(
        "fsname={},subtype={},nosuid,nodev",
        escape(source),
        super::mount::SUBTYPE
    );
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

/// Receives the descriptor. Errors: `ECONNRESET` if the helper exits without sending one.
fn receive(socket: &UnixStream) -> nix::Result<OwnedFd> {
    let mut byte = [0u8; 1];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message = loop {
        match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel has just created this descriptor for this process, the control buffer has space for
            // one only, and no other code knows its number.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(Errno::ECONNRESET)
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
}
