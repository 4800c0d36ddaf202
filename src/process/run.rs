//! Life of a mount, from start to exit status.
//!
//! ```text
//!   log opened, mount point checked         errors reach the user directly
//!   fork, unless in the foreground          daemon.rs; the parent waits
//!   log installed, signals blocked, prober, watchdog and watcher forked: all before any thread
//!   sources opened ─ mounted ─ session ─ read-ahead raised ─ first read ─ pidfile
//!   "ready" to the parent
//!   wait ── SIGTERM, SIGINT, SIGHUP: unmount, or detach when busy; then wait until the session has ended
//!        ├─ no file open, and the mount lives on in another mount namespace: end
//!        └─ the session ends: unmounted by another process (status 0), or an error (status 1)
//!   disks closed: all completed writes are durable      an error: status 1
//! ```
//! The owner of each resource releases it in its `Drop`, so a failure or a panic during the start leaves no mount and
//! no pidfile. After a second SIGTERM or SIGINT the process exits although the disk is in use, and waits at most
//! `LAST_CLOSE` for the disks to be closed.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use fuser::Filesystem;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use crate::config::{DiskConfig, LogConfig, MountConfig, MountOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::error_log::ErrorLog;
use crate::fuse::auto_unmount::AutoUnmount;
use crate::fuse::mount::{Mount, Unmounted};
use crate::fuse::probe::Prober;
use crate::fuse::readahead::{self, DiskReads, Window};
use crate::fuse::session::Running;
use crate::fuse::target::Target;
use crate::fuse::{Disks, Requests};
use crate::mountinfo;
use crate::process::daemon::{self, Failure, Started, Status, Verdict};
use crate::process::notify::{ServiceManager, Watchdog};
use crate::process::pidfile::Pidfile;
use crate::process::signals::{self, Signals};
use crate::process::{inherited, log, output};

/// Time limit for the first reads through the mount. If they take longer, the start fails.
const FIRST_READ: Duration = Duration::from_secs(30);

/// Time limit for closing the disks when the process exits without waiting for its users. Writes in flight to a slow
/// source can complete, and a dead source does not block the exit forever.
const LAST_CLOSE: Duration = Duration::from_secs(10);

/// Time between two checks whether a mount that was to end is still in use.
const USE_CHECK: Duration = Duration::from_millis(500);

/// Opened disks and their file system, ready to be mounted.
#[derive(Debug)]
pub struct Opened<F> {
    /// Answers the kernel's requests.
    pub filesystem: F,
    /// The source that mount tables show.
    pub source: String,
    /// Names of the disks in the root folder that must be readable before "ready" is reported. If the mount covers a
    /// file, that file is read instead.
    pub files: Vec<OsString>,
    /// True if no disk can be written to, so that the mount is created read-only.
    pub read_only: bool,
    /// Warnings to report although the start succeeds.
    pub warnings: Vec<String>,
    /// The disks, which are closed when the session has ended.
    pub disks: Disks,
    /// Receives the FUSE device that requests are read from, once the mount exists.
    pub requests: Requests,
    /// Number of event loops that the file system is built for.
    pub loops: usize,
    /// Log of failed requests that the file system writes to.
    pub error_log: Arc<ErrorLog>,
}

/// Opens the disks with `open`, mounts them, serves until the mount ends, and closes them. Prints an error, if any.
///
/// In the background (see [`MountConfig::foreground`]) the calling process returns as soon as the mount can be read,
/// and `open` runs in the daemon. Must be called before any thread is started.
///
/// Errors: the mount failed, or ended with an error; it has been printed or logged.
pub fn serve<F, O>(config: &MountConfig, log: &LogConfig, open: O) -> Result<(), Failure>
where
    F: Filesystem,
    O: FnOnce(&Target) -> Result<Opened<F>>,
{
    // Log and mount point are opened with the caller's working directory, which the daemon leaves later.
    let started = log::Sink::open(log, !config.foreground).and_then(|sink| {
        let target = Target::resolve(&config.target.path, config.options.nonempty)?;
        Ok((sink, target, daemon::start(config.foreground)?))
    });
    match started {
        Err(e) => {
            output::message(&mut std::io::stderr(), &e.to_string());
            Err(Failure::of(&e))
        }
        Ok((_, _, Started::Parent(Verdict::Ready))) => Ok(()),
        Ok((_, _, Started::Parent(Verdict::Failed(failure)))) => Err(failure),
        Ok((sink, target, Started::Daemon(status))) => run_daemon(config, sink, &target, status, open),
    }
}

/// Runs the daemon's part of [`serve`].
fn run_daemon<F, O>(
    config: &MountConfig,
    sink: log::Sink,
    target: &Target,
    mut status: Status,
    open: O,
) -> Result<(), Failure>
where
    F: Filesystem,
    O: FnOnce(&Target) -> Result<Opened<F>>,
{
    let has_log_file = sink.is_file();
    let started = sink.install().and_then(|()| {
        log::install_panic_hook();
        MountedDaemon::begin(config, target, open, |warning| {
            if has_log_file {
                tracing::warn!("{warning}");
            }
            status.warn(warning);
        })
    });
    match started {
        Err(e) => {
            // Logged only to a file: on standard error the message would appear twice, as `failed` prints it too.
            if has_log_file {
                tracing::error!("{e}");
            }
            let failure = Failure::of(&e);
            status.failed(&e);
            Err(failure)
        }
        Ok(mut daemon) => match status.ready().and_then(|()| {
            if config.foreground {
                let ready = format!("ready: {} (Ctrl-C unmounts)", target.point.display());
                output::message(&mut std::io::stderr(), &ready);
            }
            daemon.tell_ready(&target.point, config.disks.len());
            daemon.serve()
        }) {
            Ok(()) => Ok(()),
            Err(e) => {
                tracing::error!("{e}");
                Err(Failure::of(&e))
            }
        },
    }
}

/// Mount that can be read.
///
/// Fields are dropped in the order of their declaration: the mount first, so that no new open reaches the session.
#[derive(Debug)]
struct MountedDaemon {
    mount: Mount,
    session: Running,
    /// Watcher process for auto_unmount. Dropping it without `dismiss` makes it detach the mount if it still exists.
    watcher: Option<AutoUnmount>,
    signals: Signals,
    manager: ServiceManager,
    /// Dropped when the mount is to end: from then on the service manager waits without it.
    watchdog: Option<Watchdog>,
    /// Dropped after the session, when no request can write any more, and before the pidfile, whose removal tells other
    /// processes that the daemon has finished.
    disks: CloseOnDrop,
    /// The file that describes the mount, if there is one. Kept open because it is the source in the mount table: other
    /// processes find the mount of a lock's holder by a source that the holder has open.
    _description: Option<OwnedFd>,
    /// Kept only for its `Drop`.
    _pidfile: Option<Pidfile>,
}

/// Disks that are closed when they are dropped.
#[derive(Debug)]
struct CloseOnDrop(Option<Disks>);

impl CloseOnDrop {
    /// Closes the disks and waits until that is complete. Does nothing if they are closed already.
    fn close(&mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |disks| disks.close())
    }

    /// Returns true if a file of the mount is open.
    fn are_open(&self) -> bool {
        self.0.as_ref().is_some_and(|disks| disks.open_files() > 0)
    }

    /// Closes the disks on a thread and waits at most `time` for it. Returns `ETIMEDOUT` if that is not enough; the
    /// thread then continues until the process exits.
    fn close_within(&mut self, time: Duration) -> Result<()> {
        let Some(disks) = self.0.take() else { return Ok(()) };
        let (done, closed) = channel();
        let thread = std::thread::Builder::new().name("close".to_owned()).spawn(move || {
            // After a timeout the receiver is gone, so the send fails.
            let _ = done.send(disks.close());
        });
        thread.map_err(|e| Error::io("starting the thread that closes the disks", e))?;
        closed.recv_timeout(time).unwrap_or_else(|_| {
            let text = format!(
                "closing the disks timed out after {} s: recent writes may be lost",
                time.as_secs()
            );
            Err(Error::new(ErrorKind::Os(libc::ETIMEDOUT), text))
        })
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        // The error is ignored because each disk has logged its own.
        let _ = self.close_within(LAST_CLOSE);
    }
}

impl MountedDaemon {
    /// Performs the start up to "ready". Calls `warn` with each problem that does not prevent the start.
    fn begin<F, O>(config: &MountConfig, target: &Target, open: O, mut warn: impl FnMut(&str)) -> Result<Self>
    where
        F: Filesystem,
        O: FnOnce(&Target) -> Result<Opened<F>>,
    {
        // These come first: a thread that is started later inherits the blocked signals, and the helper processes
        // must be forked while there is only one thread.
        let signals = Signals::block()?;
        let mut prober = Prober::fork()?;
        let watchdog = Watchdog::fork()?;
        let mut watcher = if config.options.auto_unmount {
            Some(AutoUnmount::fork()?)
        } else {
            None
        };
        // After the helpers, which write nothing, and before any thread.
        if !config.options.read_only {
            inherited::become_io_flusher();
        }
        let Opened {
            filesystem,
            source,
            files,
            read_only,
            warnings,
            disks,
            requests,
            loops,
            error_log,
        } = open(target)?;
        let disks = CloseOnDrop(Some(disks));
        warnings.iter().for_each(|warning| warn(warning));
        let requested = &config.options;
        let options = &MountOptions {
            read_only: read_only || requested.read_only,
            // If other users have access, owner and mode must be enforced, and the kernel checks them only with this
            // option.
            default_permissions: requested.default_permissions || requested.allow_other || requested.allow_root,
            ..requested.clone()
        };
        // Before the mount: one that covers its own source could wait for itself at the first read.
        let sources = disks.0.as_ref().map_or_else(Vec::new, Disks::files);
        target.refuse_sources(sources.iter().map(|file| &**file))?;
        // From here on an early return drops `mount`, which unmounts.
        let (mount, device) = Mount::new(target, options, &source)?;
        if let Some(watcher) = &mut watcher {
            watcher.start(&mount)?;
        }
        // A duplicate, which is only polled: a lone event loop may wait for a source until the kernel has a request
        // (`volume/loop_budget.rs`).
        requests.from(device.try_clone().map_err(|e| Error::io("/dev/fuse", e))?);
        let session = Running::start(filesystem, device, options, loops)?;
        let reads = |disk: &DiskConfig| DiskReads {
            bound: disk.readahead,
            locality: disk.source.settings().locality(),
            read_ahead_by_daemon: disk.source.settings().reads_ahead(),
        };
        let reads: Vec<DiskReads> = config.disks.iter().map(reads).collect();
        // Only an optimization, so a failure (usually missing privileges) is logged and ignored.
        match readahead::set(mount.device(), Window::of(&reads)) {
            Ok(kib) => tracing::debug!("read-ahead of the mount: {kib} KiB"),
            Err(e) => tracing::info!("read-ahead of the mount not changed, sequential reads are slower: {e}"),
        }
        let paths = if target.is_file {
            vec![target.point.clone()]
        } else {
            files.iter().map(|name| target.point.join(name)).collect()
        };
        // By another process: a read of this process through its own mount could wait for an event loop that waits for
        // this thread.
        prober.start(&paths)?;
        let deadline = Instant::now() + FIRST_READ;
        // The prober receives only an errno. The error that the file system recorded first is the actual cause.
        let caused = |e: Error| error_log.cause().map_or(e.clone(), |cause| cause.within(e.to_string()));
        while let Some(warning) = next_probe_result(&mut prober, &signals, &session, deadline).map_err(caused)? {
            warn(
                &error_log
                    .cause()
                    .map_or(warning.clone(), |cause| format!("{warning}: {cause}")),
            );
        }
        // Until here the error log kept the first failure and logged nothing; from now on it logs.
        error_log.started();
        prober.finish();
        let _pidfile = config.pidfile.as_deref().map(Pidfile::write).transpose()?;
        tracing::info!("ready: {}", target.point.display());
        Ok(Self {
            mount,
            session,
            watcher,
            signals,
            manager: ServiceManager::of_environment(),
            watchdog,
            disks,
            _description: config.source.as_deref().and_then(|source| open_path(source).ok()),
            _pidfile,
        })
    }

    /// Tells the service manager that the mount can be read, and lets the watchdog start.
    fn tell_ready(&mut self, point: &Path, disks: usize) {
        self.manager.ready(point, disks);
        // Without it the service manager ends this process in time, and the log has the reason.
        if let Some(Err(e)) = self.watchdog.as_mut().map(|watchdog| watchdog.start(point)) {
            tracing::error!("{e}");
        }
    }

    /// Serves from "ready" until the session ends, then closes the disks.
    fn serve(mut self) -> Result<()> {
        let mut stopping = false;
        loop {
            // Set anew in each round, as it is the time until the next check and not the end of the wait.
            let deadline = stopping.then(|| Instant::now() + USE_CHECK);
            let [signalled, ended] = self.wait(deadline)?;
            if ended {
                break;
            }
            // A mount that is gone from here may live on in another mount namespace, which never ends the session.
            // Without an open file nothing is lost when the daemon ends.
            if stopping && !signalled && !self.disks.are_open() {
                return self.end_unused();
            }
            let signal = if signalled { self.signals.take()? } else { None };
            match signal {
                Some(signal) if !stopping => stopping = self.stop(signal),
                // A SIGHUP can follow another signal automatically when the terminal closes, so it does not count as a
                // second request to exit.
                Some(Signal::SIGHUP) | None => {}
                Some(signal) => {
                    let text = format!("second signal ({signal}): exiting although the disk is still in use");
                    if let Err(e) = self.disks.close_within(LAST_CLOSE) {
                        return Err(e.within(text));
                    }
                    return Err(Error::new(ErrorKind::Os(libc::EINTR), text));
                }
            }
        }
        let Self {
            mut mount,
            session,
            watcher,
            manager,
            watchdog,
            mut disks,
            _pidfile,
            ..
        } = self;
        if !stopping {
            manager.stopping("unmounted: closing the disks");
        }
        drop(watchdog);
        let served = session.result();
        // The disks are closed even if the session failed, so that completed writes are durable. An error of `closed`
        // that is not returned has been logged.
        let closed = disks.close();
        served?;
        // After the disks are closed, so that a failure here costs no data.
        let dead = mount.clear_dead()?;
        if let Some(watcher) = watcher {
            watcher.dismiss();
        }
        // The session has ended but the mount still exists: the connection was aborted, for example by a write to
        // /sys/fs/fuse/connections/*/abort.
        if dead {
            let text = "the kernel's connection to the mount was aborted";
            return Err(Error::new(ErrorKind::Os(libc::ECONNABORTED), text));
        }
        tracing::info!("unmounted");
        closed
    }

    /// Waits for a signal or the end of the session, and returns which of them came, or neither: also after an answer of
    /// the watchdog, which is passed on.
    fn wait(&mut self, deadline: Option<Instant>) -> Result<[bool; 2]> {
        let (signals, ended) = (self.signals.as_fd(), self.session.ended());
        let Some(watchdog) = &mut self.watchdog else {
            return signals::wait([signals, ended], deadline);
        };
        let [signalled, ended, alive] = signals::wait([signals, ended, watchdog.answered()], deadline)?;
        if alive && !watchdog.pass_on(&self.manager) {
            self.watchdog = None;
        }
        Ok([signalled, ended])
    }

    /// Ends the daemon of a mount that was to end and is gone from this mount namespace, but lives on elsewhere, with no
    /// file open.
    fn end_unused(mut self) -> Result<()> {
        // For the log only: the list may be out of date at once.
        let holders = mountinfo::holders(self.mount.device());
        let by = if holders.is_empty() {
            "another mount namespace, or a program that has its folder open".to_owned()
        } else {
            holders.join(", ")
        };
        tracing::warn!("ending although the mount is still there, as no file of it is open; it is held by {by}");
        let closed = self.disks.close();
        if let Some(watcher) = self.watcher.take() {
            watcher.dismiss();
        }
        closed
    }

    /// Unmounts because of `signal`. Returns false if that failed; the next signal then tries again.
    fn stop(&mut self, signal: Signal) -> bool {
        tracing::info!("{signal}: unmounting");
        self.manager.stopping("unmounting");
        self.watchdog = None;
        match self.mount.unmount() {
            Ok(Unmounted::Clean | Unmounted::Gone) => true,
            Ok(Unmounted::Detached) => {
                tracing::warn!("the mount is busy and was detached: exiting when the last user has closed its files");
                self.manager
                    .stopping("detached: waiting until the last user has closed its files");
                true
            }
            Err(e) => {
                tracing::error!("unmount failed: {e}");
                false
            }
        }
    }
}

/// Opens the file at `path` for neither reading nor writing.
fn open_path(path: &str) -> nix::Result<OwnedFd> {
    nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
}

/// Waits for the prober's next message. Returns a warning, or `None` when all first reads have succeeded.
///
/// Fails if a read failed, the session ended, a signal arrived, or the deadline passed.
fn next_probe_result(
    prober: &mut Prober,
    signals: &Signals,
    session: &Running,
    deadline: Instant,
) -> Result<Option<String>> {
    let fds = [prober.answered(), signals.as_fd(), session.ended()];
    let fail = |errno, text: String| Err(Error::new(ErrorKind::Os(errno), text));
    match signals::wait(fds, Some(deadline))? {
        [_, _, true] => fail(
            libc::ENOTCONN,
            "the mount ended before its first read was answered".into(),
        ),
        [true, ..] => prober.hear(),
        [_, true, _] => {
            let name = signals.take()?.map_or("a signal", Signal::as_str);
            fail(
                libc::EINTR,
                format!("{name} received before the first read was answered"),
            )
        }
        [false, false, false] => {
            let seconds = FIRST_READ.as_secs();
            fail(
                libc::ETIMEDOUT,
                format!("first read through the mount: no answer within {seconds} s"),
            )
        }
    }
}
