//! Sockets that the caller of the program passed to it by number (`socket-fd=`).
//!
//! They are taken at the start, before this process opens any descriptor. So a number can never be that of a descriptor
//! of this process, and each socket has one owner: the first caller that takes it.

#![allow(unsafe_code)] // Only for taking ownership of the descriptors that the caller passed.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Mutex;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::mutex::lock;

/// First descriptor after the standard streams.
const FIRST: u32 = 3;

/// Sockets that no part of the program has taken yet, by the number that the caller gave them.
static SOCKETS: Mutex<BTreeMap<i32, OwnedFd>> = Mutex::new(BTreeMap::new());

/// Closes the descriptors that this process inherited, except for the standard streams and for the sockets among
/// `numbers`, of which it takes ownership.
///
/// A daemon that inherited an open file of another mount would keep that mount busy. If the file is in its own mount,
/// closing it later could deadlock, because the close waits for the daemon's own answer.
///
/// Must be called right after the arguments are parsed, before the process opens any descriptor of its own.
pub fn take_inherited(numbers: &[u32]) {
    let mut sockets = BTreeMap::new();
    // Ascending and without duplicates, so that no number gets two owners.
    let mut numbers: Vec<u32> = numbers.iter().copied().filter(|fd| *fd >= FIRST).collect();
    numbers.sort_unstable();
    numbers.dedup();
    // Closes the gaps between the sockets; the final `None` stands for the gap after the last one.
    let mut first = FIRST;
    let kept = numbers.into_iter().filter_map(|number| {
        let socket = take_socket(i32::try_from(number).ok()?)?;
        sockets.insert(number as i32, socket);
        Some(number)
    });
    for number in kept.map(Some).chain([None]) {
        let last = number.map_or(libc::c_uint::MAX, |number| number - 1);
        if first <= last {
            // SAFETY: no object of this program owns a descriptor in this range: it starts after the sockets that were
            // taken so far, and the process has opened none itself.
            unsafe { libc::close_range(first, last, 0) };
        }
        first = number.map_or(first, |number| number + 1);
    }
    // Only now, after all else is closed: from here on other code may take the sockets.
    *lock(&SOCKETS) = sockets;
}

/// Returns the socket that the caller passed as descriptor `number`. Returns `None` if it passed none, or if the socket
/// was taken before.
pub fn take(number: i32) -> Option<OwnedFd> {
    lock(&SOCKETS).remove(&number)
}

/// Takes ownership of descriptor `number` if it is an open socket, and keeps it from child processes.
fn take_socket(number: i32) -> Option<OwnedFd> {
    // SAFETY: borrowed for two calls, which fail with EBADF if there is no such descriptor; nothing closes it meanwhile,
    // because the process has no other thread yet.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let kind = nix::sys::stat::fstat(borrowed).ok()?.st_mode & libc::S_IFMT;
    // Also for what is no socket: it stays open then, and must not reach child processes.
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    // SAFETY: the descriptor is open, the caller passed it for this use, and the process has opened none itself, so it
    // has no other owner. Each number is taken once.
    (kind == libc::S_IFSOCK).then(|| unsafe { OwnedFd::from_raw_fd(number) })
}
