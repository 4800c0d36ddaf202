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
//!
//! # End
//!
//! A host ends when its parent asks (SIGTERM, also sent by the kernel if the parent dies), and when the connection to
//! the server is lost: the parent then starts another host, and repeats there what was not answered, as it does after a
//! crash. A host that does not manage to close within [`END_WITHIN`] exits without it.

#![allow(unsafe_code)] // Changes the environment before any thread runs, and exits from a thread.

mod disk;
mod extents;
mod log;
mod server;

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use self::disk::{Disk, Job};
use super::abi::{Connection, cred_type, open_flag, spec_type};
use super::failure::{Circumstances, Failure, Trouble, trouble};
use super::library::{DiskHandle, Params, Vddk};
use super::spec::{self, CreateSpec, DiskSpec, HostSpec, RemoteSpec};
use super::statistics::Statistics;
use super::{EXIT_LOST, EXIT_MAINTENANCE, FATAL};
use crate::error::{Error, Result};
use crate::escape;
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

/// Set when the disk is open: then an end has to close it.
static OPEN: AtomicBool = AtomicBool::new(false);

/// Reason for the end of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The parent asked for it.
    Asked,
    /// The connection to the server is lost.
    Lost(Trouble),
}

/// Runs a host process. Called first in the program, before any thread starts.
pub(crate) fn run() -> ExitCode {
    handed_over::take_inherited(&[]);
    daemon::raise_file_limit();
    match start() {
        Ok(End::Asked) => ExitCode::SUCCESS,
        Ok(End::Lost(Trouble::Maintenance)) => ExitCode::from(EXIT_MAINTENANCE),
        Ok(End::Lost(_)) => ExitCode::from(EXIT_LOST),
        Err(e) => {
            let _ = writeln!(io::stderr(), "{FATAL}{}", escape::printable(e.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// Performs the task of the parent.
fn start() -> Result<End> {
    let not_started = |e| Error::io("this command is started by vmdkfuse itself, with a task", e);
    let memory = File::from(io::stdout().as_fd().try_clone_to_owned().map_err(not_started)?);
    let listener = io::stdin().as_fd().try_clone_to_owned().map_err(not_started)?;
    let spec: HostSpec = spec::take(&memory).map_err(not_started)?;
    let statistics = Statistics::map(&memory).map_err(not_started)?;
    daemon::release_standard_streams()?;
    nix::sys::prctl::set_no_new_privs().map_err(|e| Error::io("no_new_privs", e.into()))?;
    restore_library_path(&spec);
    log::install(spec.verbosity)?;
    let (jobs, received) = channel();
    watch_signals(jobs.clone())?;
    let loaded = Vddk::load(&spec.library, statistics).map_err(|e| match &spec.disk {
        Some(disk) => e.within(disk.file.display().to_string()),
        None => e,
    })?;
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
    remove_leftovers(Path::new(&spec.private_dir));
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
        if !OPEN.load(Ordering::SeqCst) {
            exit_now(0);
        }
        let _ = jobs.send(Job::End(End::Asked));
        thread::sleep(END_WITHIN);
        exit_now(1);
    };
    let thread = thread::Builder::new().name("vddk-signals".into()).spawn(wait);
    thread.map(drop).map_err(|e| Error::io("starting a thread", e))
}

/// Ends the process without the library's consent.
fn exit_now(status: u8) -> ! {
    // SAFETY: ends the process at once. Nothing of it is needed afterwards.
    unsafe { libc::_exit(status.into()) }
}

/// Removes the private folder of this host if the parent is gone, which removes it otherwise.
fn remove_leftovers(dir: &Path) {
    if Pid::parent() == Pid::from_raw(1) || Path::new("/proc").join(Pid::parent().to_string()).read_dir().is_err() {
        let _ = fs::remove_dir_all(dir);
    }
}

/// Opens the disk and serves it until the end.
fn serve(
    vddk: &'static Vddk,
    spec: &DiskSpec,
    at: &Circumstances,
    (jobs, received): (Sender<Job>, Receiver<Job>),
    listener: OwnedFd,
) -> Result<End> {
    let listener = UnixListener::from(listener);
    let params = params(vddk, spec)?;
    let prepared = spec.remote.as_ref().is_some_and(|remote| remote.prepare_for_access);
    if prepared {
        vddk.prepare_for_access(&params, IDENTITY).map_err(|f| f.describe(at))?;
    }
    let Some((connection, handle)) = open(vddk, &params, spec, at, &received)? else {
        return Ok(End::Asked);
    };
    OPEN.store(true, Ordering::SeqCst);
    let served = Disk::new(vddk, handle, spec, at, jobs).and_then(|disk| {
        let disk = Arc::new(disk);
        server::start(listener, Arc::clone(&disk))?;
        let end = disk.run_jobs(&received);
        Ok((disk, end))
    });
    let end = match served {
        Ok((disk, end)) => {
            if end != End::Asked {
                exit_after(END_WITHIN / 2, end);
            }
            disk.wait_idle(END_WITHIN / 2);
            Ok(end)
        }
        Err(e) => Err(e),
    };
    let log = |result: Result<(), Failure>| {
        if let Err(failure) = result {
            tracing::warn!("{}", failure.describe(at));
        }
    };
    log(vddk.wait(handle));
    log(vddk.close(handle));
    log(vddk.disconnect(connection));
    if prepared {
        log(vddk.end_access(&params, IDENTITY));
        log(vddk.clean_up(&params));
    }
    end
}

/// Limits the time for closing a disk whose server is gone: the library may wait for the server.
fn exit_after(limit: Duration, end: End) {
    let status = match end {
        End::Lost(Trouble::Maintenance) => EXIT_MAINTENANCE,
        _ => EXIT_LOST,
    };
    let limited = move || {
        thread::sleep(limit);
        exit_now(status);
    };
    if thread::Builder::new().spawn(limited).is_err() {
        exit_now(status);
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
) -> Result<Option<(Connection, DiskHandle)>> {
    let deadline = Instant::now() + Duration::from_millis(spec.open_within);
    let mut pause = Duration::from_millis(spec.pause);
    let mut attempts = 0;
    let mut create = spec.create;
    loop {
        match received.recv_timeout(pause) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return Ok(None),
        }
        let failure = match attempt(vddk, params, spec, &mut create)? {
            Ok(open) => return Ok(Some(open)),
            Err(failure) => failure,
        };
        attempts += 1;
        let next = match trouble(failure.error) {
            Trouble::Network if attempts < NETWORK_ATTEMPTS => RETRY_PAUSE * (1 << attempts.min(8)) / 2,
            Trouble::Maintenance => MAINTENANCE_PAUSE * (1 << attempts.min(8)) / 2,
            _ => return Err(failure.describe(at)),
        };
        pause = next.min(LONGEST_PAUSE);
        if Instant::now() + pause > deadline {
            return Err(failure.describe(at));
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
    if created.is_ok() {
        *create = None;
    }
    let read_only = if spec.writable { 0 } else { open_flag::READ_ONLY };
    let opened = created.and_then(|()| vddk.open(connection, &path, spec.flags | read_only));
    if opened.is_err() {
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

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_nul| Error::unsupported("a parameter of VDDK has a NUL byte"))
}
