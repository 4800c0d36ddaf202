//! Host process: loads the library, opens one disk, and serves it to its parent as an NBD server.
//!
//! ```text
//!   main thread ("owner")   InitEx ─ ConnectEx ─ Open ─┬─ Flush, QueryAllocatedBlocks ─┬─ Close ─ Disconnect ─ Exit
//!                                          jobs ▲      │                               ▲
//!   connection threads    NBD requests ─────────┘      ├─ ReadAsync, WriteAsync        │
//!   threads of VDDK       callbacks ─► NBD replies     │                               │
//!   signal thread         SIGTERM ─────────────────────┴───────────────────────────────┘
//! ```
//! # Rules of the library
//!
//! - InitEx is called once, on the main thread, before any other thread of this process runs VDDK's code.
//! - One thread opens, closes, flushes and queries the disk: the main thread. Other threads send it jobs.
//! - Data moves by asynchronous requests only, which may be in flight together. Mixing them with synchronous ones on one
//!   handle is an error. A callback may come before the call returns, and on any thread.
//! - The transports `file`, `hotadd` and `san` do the work within the call, so several threads submit at a time
//!   (`server.rs`). The others only queue the request, one submission at a time.
//! - Nothing is closed before the requests have ended: Wait, Close, Disconnect, EndAccess, Exit.
//! - Each PrepareForAccess has its EndAccess, also if the disk cannot be opened: the virtual machine could not migrate
//!   for the rest of its life otherwise.
//!
//! # End
//!
//! A host ends when its parent asks (SIGTERM, also sent by the kernel if the parent dies), and when the connection to
//! the server is lost: the parent then starts another host, and repeats there what was not answered, as it does after a
//! crash. A host that does not manage to close within [`END_WITHIN`] exits without it. An error that ends the host is
//! reported before anything is closed, because the library may hang there.

#![allow(unsafe_code)] // Changes the environment before any thread runs, and exits from a thread.

mod disk;
mod extents;
mod log;
mod privileges;
mod reply;
mod server;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

use self::disk::{Disk, Job};
use super::abi::{Connection, cred_type, open_flag, spec_type};
use super::failure::{Circumstances, Failure, Trouble, trouble};
use super::library::{DiskHandle, Params, Vddk, c_string};
use super::spec::{self, CreateSpec, DiskSpec, HostSpec, RemoteSpec};
use super::statistics::Statistics;
use super::{EXIT_LOST, EXIT_MAINTENANCE, EXIT_REFUSED, FATAL};
use crate::error::{Error, Result};
use crate::process::{daemon, handed_over};

/// Time for an orderly end.
const END_WITHIN: Duration = Duration::from_secs(8);

/// First pause before the next attempt to open a disk. It doubles with each attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// The same while the server is in maintenance.
const MAINTENANCE_PAUSE: Duration = Duration::from_secs(5);

/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Attempts to open a disk while the network fails. The parent repeats the whole after a reconnect.
const NETWORK_ATTEMPTS: u32 = 4;

/// Identity for PrepareForAccess, at most 50 characters.
const IDENTITY: &std::ffi::CStr = c"vmdkfuse";

/// Set when the server has something of this host that only an orderly end takes back: access that was prepared, or an
/// open disk.
static HOLDS_ACCESS: AtomicBool = AtomicBool::new(false);

/// Exit status of the end that is decided, for a signal that comes later.
static STATUS: AtomicU8 = AtomicU8::new(0);

/// Private folder of this host, which it removes at its end: its parent may be gone, or about to be.
static PRIVATE_DIR: OnceLock<PathBuf> = OnceLock::new();

/// Reason for the end of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The parent asked for it.
    Asked,
    /// The connection to the server is lost, or the server is in maintenance.
    Lost(Trouble),
    /// An error that has been reported.
    Failed,
    /// The same, where the server refuses the login or the disk: the next attempt would meet it too.
    Refused,
}

impl End {
    /// Returns the exit status that tells the parent about the end.
    fn status(self) -> u8 {
        match self {
            Self::Asked => 0,
            Self::Lost(Trouble::Maintenance) => EXIT_MAINTENANCE,
            Self::Lost(_) => EXIT_LOST,
            Self::Failed => 1,
            Self::Refused => EXIT_REFUSED,
        }
    }
}

/// Runs a host process. Called first in the program, before any thread starts.
pub(crate) fn run() -> ExitCode {
    // Closes what the parent passed by mistake: a file of a mount would keep that mount busy as long as this host runs.
    handed_over::take_inherited(&[]);
    daemon::raise_file_limit();
    let end = start().unwrap_or_else(|e| {
        report(&e);
        End::Failed
    });
    remove_private_dir();
    ExitCode::from(end.status())
}

/// Tells the parent why this host ends.
fn report(e: &Error) {
    log::write_line(&format!("{FATAL}{e}"));
}

/// Performs the task of the parent.
fn start() -> Result<End> {
    let not_started = |e| Error::io("this command is started by vmdkfuse itself, with a task", e);
    let memory = File::from(io::stdout().as_fd().try_clone_to_owned().map_err(not_started)?);
    let listener = io::stdin().as_fd().try_clone_to_owned().map_err(not_started)?;
    // Taken from standard output, before anything is printed there.
    let spec: HostSpec = spec::take(&memory).map_err(not_started)?;
    let statistics = Statistics::map(&memory).map_err(not_started)?;
    // Standard output is the memory file: whatever the library prints there would overwrite it.
    daemon::release_standard_streams()?;
    privileges::drop_for(spec.disk.as_ref())?;
    restore_library_path(&spec);
    log::install(spec.verbosity)?;
    let (jobs, received) = channel();
    let _ = PRIVATE_DIR.set(PathBuf::from(&spec.private_dir));
    watch_signals(jobs.clone())?;
    let loaded = Vddk::load(&spec.library, statistics).map_err(|e| match &spec.disk {
        Some(disk) => e.within(disk.file.display().to_string()),
        None => e,
    })?;
    // Callbacks of the library may come until the process ends.
    let vddk: &'static Vddk = Box::leak(Box::new(loaded));
    let libdir = spec.libdir.as_deref().map(|dir| c_string(dir.as_bytes())).transpose()?;
    let config = c_string(spec.config.as_bytes())?;
    let at = circumstances(&spec, vddk.version());
    let described = |failure: Failure| failure.describe(&at);
    vddk.init(log::FUNCTIONS, libdir.as_deref(), &config)
        .map_err(described)?;
    let end = match &spec.disk {
        None => spec::put(&memory, &vddk.describe())
            .map(|()| End::Asked)
            .map_err(|e| Error::io("answer to the parent", e)),
        Some(disk) => serve(vddk, disk, &at, (jobs, received), listener),
    };
    drop(memory);
    vddk.exit();
    end
}

/// Gives children of this process the library path of the parent: they would otherwise load the libraries that come
/// with VDDK. The dynamic linker read the variable at the start and does not look at it again.
fn restore_library_path(spec: &HostSpec) {
    // SAFETY: no other thread runs yet.
    unsafe {
        match &spec.library_path {
            Some(path) => std::env::set_var("LD_LIBRARY_PATH", path),
            None => std::env::remove_var("LD_LIBRARY_PATH"),
        }
    }
}

fn circumstances(spec: &HostSpec, version: u32) -> Circumstances {
    let disk = spec.disk.as_ref();
    let remote = disk.and_then(|disk| disk.remote.as_ref());
    Circumstances {
        disk: disk.map_or_else(|| "VDDK".to_owned(), |disk| disk.file.display().to_string()),
        remote: remote.is_some(),
        thumbprint: remote.and_then(|remote| remote.thumbprint.clone()),
        version,
        writable: disk.is_some_and(|disk| disk.writable),
        snapshot: remote.is_some_and(|remote| remote.snapshot.is_some()),
    }
}

/// Starts the thread that waits for the signal to end.
fn watch_signals(jobs: Sender<Job>) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    // Every thread that is started later inherits the mask, also those of VDDK.
    signals
        .thread_block()
        .map_err(|e| Error::io("blocking signals", e.into()))?;
    let wait = move || {
        while signals.wait().is_err() {}
        if HOLDS_ACCESS.load(Ordering::SeqCst) {
            let _ = jobs.send(Job::End(End::Asked));
            // The main thread ends the process if it can close everything; this is for a library that hangs.
            thread::sleep(END_WITHIN);
            exit_now(1);
        }
        exit_now(STATUS.load(Ordering::SeqCst));
    };
    let thread = thread::Builder::new().name("vddk-signals".into()).spawn(wait);
    thread.map(drop).map_err(|e| Error::io("starting a thread", e))
}

/// Ends the process without the library's consent.
fn exit_now(status: u8) -> ! {
    remove_private_dir();
    // SAFETY: ends the process at once. Nothing of it is needed afterwards.
    unsafe { libc::_exit(status.into()) }
}

/// Removes the private folder. The parent removes that of a host that crashed.
fn remove_private_dir() {
    if let Some(dir) = PRIVATE_DIR.get() {
        let _ = fs::remove_dir_all(dir);
    }
}

/// Serves the disk until the end, between PrepareForAccess and EndAccess if the user wants them.
fn serve(
    vddk: &'static Vddk,
    spec: &DiskSpec,
    at: &Circumstances,
    jobs: (Sender<Job>, Receiver<Job>),
    listener: OwnedFd,
) -> Result<End> {
    let params = params(vddk, spec)?;
    if !prepares(spec) {
        return Ok(serve_disk(vddk, (spec, &params), at, jobs, listener));
    }
    HOLDS_ACCESS.store(true, Ordering::SeqCst);
    // After a failure EndAccess is called as well: the server may have accepted the call before the connection broke.
    let end = match vddk.prepare_for_access(&params, IDENTITY) {
        Ok(()) => serve_disk(vddk, (spec, &params), at, jobs, listener),
        Err(failure) => end_early(end_of(&failure), &failure.describe(at)),
    };
    end_access(vddk, &params, at);
    Ok(end)
}

/// Returns true if the user wants migration of the virtual machine to be forbidden while the disk is open.
fn prepares(spec: &DiskSpec) -> bool {
    spec.remote.as_ref().is_some_and(|remote| remote.prepare_for_access)
}

/// Permits migration again, and removes what is left at the server.
fn end_access(vddk: &Vddk, params: &Params, at: &Circumstances) {
    warn_of(vddk.end_access(params, IDENTITY), at);
    warn_of(vddk.clean_up(params), at);
}

/// Opens the disk, serves it until the end, and closes it. Reports an error before it closes anything.
fn serve_disk(
    vddk: &'static Vddk,
    (spec, params): (&DiskSpec, &Params),
    at: &Circumstances,
    (jobs, received): (Sender<Job>, Receiver<Job>),
    listener: OwnedFd,
) -> End {
    let (connection, handle) = match open(vddk, params, spec, at, &received) {
        Ok(Some(open)) => open,
        Ok(None) => return End::Asked,
        Err((end, e)) => return end_early(end, &e),
    };
    HOLDS_ACCESS.store(true, Ordering::SeqCst);
    let served = Disk::new(vddk, handle, spec, at, jobs).and_then(|disk| {
        let disk = Arc::new(disk);
        server::start(UnixListener::from(listener), Arc::clone(&disk))?;
        let end = disk.run_jobs(&received);
        Ok((disk, end))
    });
    let end = match served {
        Ok((disk, end)) => {
            exit_after(END_WITHIN / 2, end);
            // Requests in flight own buffers that the library writes to, and the handle must not be closed under them.
            if !disk.wait_idle(END_WITHIN / 4) {
                // The library may use the handle as long as this process lives, so nothing can be closed.
                tracing::warn!("{}: requests do not end: the disk is not closed", at.disk);
                if prepares(spec) {
                    end_access(vddk, params, at);
                }
                exit_now(end.status());
            }
            end
        }
        Err(e) => end_early(End::Failed, &e),
    };
    warn_of(vddk.wait(handle), at);
    warn_of(vddk.close(handle), at);
    warn_of(vddk.disconnect(connection), at);
    end
}

/// Reports an error, and limits the time until the exit.
fn end_early(end: End, e: &Error) -> End {
    STATUS.store(end.status(), Ordering::SeqCst);
    report(e);
    exit_after(END_WITHIN / 2, end);
    end
}

/// Returns the end that a failure to open a disk leads to.
fn end_of(failure: &Failure) -> End {
    match trouble(failure.error) {
        Trouble::Other => End::Refused,
        Trouble::Network => End::Failed,
        Trouble::Maintenance => End::Lost(Trouble::Maintenance),
    }
}

fn warn_of(result: Result<(), Failure>, at: &Circumstances) {
    if let Err(failure) = result {
        tracing::warn!("{}", failure.describe(at));
    }
}

/// Limits the time for an end that the parent did not ask for: the library may wait for a server that is gone. The
/// parent limits the time of an end that it asked for, as does the thread that received its signal.
fn exit_after(limit: Duration, end: End) {
    if end == End::Asked {
        return;
    }
    let limited = move || {
        thread::sleep(limit);
        exit_now(end.status());
    };
    if thread::Builder::new().spawn(limited).is_err() {
        exit_now(end.status());
    }
}

/// Connects and opens the disk, and repeats that while the network fails or the server is in maintenance. Returns `None`
/// if the parent asked for the end meanwhile.
fn open(
    vddk: &Vddk,
    params: &Params,
    spec: &DiskSpec,
    at: &Circumstances,
    received: &Receiver<Job>,
) -> Result<Option<(Connection, DiskHandle)>, (End, Error)> {
    let deadline = Instant::now() + Duration::from_millis(spec.open_within);
    let mut pause = Duration::from_millis(spec.pause);
    let mut attempts = 0;
    let mut create = spec.create;
    if !pause.is_zero() {
        tracing::info!("{}: opening the disk in {} s", at.disk, pause.as_secs_f32());
    }
    loop {
        // Waits on the channel of jobs, so that a request to end interrupts the pause.
        match received.recv_timeout(pause) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return Ok(None),
        }
        let failure = match attempt(vddk, params, spec, &mut create).map_err(|e| (End::Failed, e))? {
            Ok(open) => return Ok(Some(open)),
            Err(failure) => failure,
        };
        attempts += 1;
        let next = match trouble(failure.error) {
            // Doubles from the first pause on: attempt 1 waits once, 2 twice, 3 four times as long.
            Trouble::Network if attempts < NETWORK_ATTEMPTS => RETRY_PAUSE * (1 << attempts.min(8)) / 2,
            Trouble::Maintenance => MAINTENANCE_PAUSE * (1 << attempts.min(8)) / 2,
            _ => return Err((end_of(&failure), failure.describe(at))),
        };
        pause = next.min(LONGEST_PAUSE);
        if Instant::now() + pause > deadline {
            return Err((end_of(&failure), failure.describe(at)));
        }
        tracing::info!("{}: trying again in {} s", failure.describe(at), pause.as_secs_f32());
    }
}

/// Connects, creates the disk if it is still to be created, and opens it.
fn attempt(
    vddk: &Vddk,
    params: &Params,
    spec: &DiskSpec,
    create: &mut Option<CreateSpec>,
) -> Result<Result<(Connection, DiskHandle), Failure>> {
    let path = c_string(spec.file.as_bytes())?;
    let transports = c_string(spec.transports.as_bytes())?;
    let snapshot = spec.remote.as_ref().and_then(|remote| remote.snapshot.as_deref());
    let snapshot = snapshot.map(|snapshot| c_string(snapshot.as_bytes())).transpose()?;
    let connection = match vddk.connect(params, !spec.writable, snapshot.as_deref(), &transports) {
        Ok(connection) => connection,
        Err(failure) => return Ok(Err(failure)),
    };
    let created = create.map_or(Ok(()), |disk| vddk.create(connection, &path, disk));
    // Never twice: the second attempt would fail because the disk exists, and hide the error of the first.
    if created.is_ok() {
        *create = None;
    }
    let read_only = if spec.writable { 0 } else { open_flag::READ_ONLY };
    let opened = created.and_then(|()| vddk.open(connection, &path, spec.flags | read_only));
    if opened.is_err() {
        // The error of the open is the one that counts.
        let _ = vddk.disconnect(connection);
    }
    Ok(opened.map(|handle| (connection, handle)))
}

/// Returns the connection parameters of a disk.
fn params(vddk: &Vddk, spec: &DiskSpec) -> Result<Params> {
    let mut params = Params::new(vddk);
    if let Some(remote) = &spec.remote {
        fill(&mut params, remote, &spec.file.to_string_lossy())?;
    }
    Ok(params)
}

fn fill(params: &mut Params, remote: &RemoteSpec, file: &str) -> Result<()> {
    params.set(|raw, keep| {
        raw.server_name = keep(&remote.server)?;
        if let Some(thumbprint) = &remote.thumbprint {
            raw.thumb_print = keep(thumbprint)?;
        }
        let (user, password) = (keep(&remote.user)?, keep(&remote.password)?);
        match &remote.cookie {
            None => {
                raw.cred_type = cred_type::UID;
                raw.creds[0] = user;
                raw.creds[1] = password;
            }
            Some(cookie) => {
                raw.cred_type = cred_type::SESSION_ID;
                // With a cookie the "password" is its key, and both may be empty.
                raw.creds = [keep(cookie)?, user, password];
            }
        }
        raw.port = remote.port.unwrap_or(0);
        raw.nfc_host_port = remote.nfc_host_port.unwrap_or(0);
        raw.spec_type = spec_type::VMX;
        if let Some(vm) = &remote.vm {
            raw.vmx_spec = keep(vm)?;
        }
        if let Some(datastore) = &remote.datastore {
            raw.spec_type = spec_type::DATASTORE;
            raw.spec[0] = keep(datastore)?;
            raw.spec[1] = keep(folder_in_datastore(file))?;
        }
        Ok(())
    })
}

/// Returns the folder of `[datastore] folder/disk.vmdk`.
fn folder_in_datastore(file: &str) -> &str {
    let path = file.split_once(']').map_or(file, |(_, path)| path).trim_start();
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}
