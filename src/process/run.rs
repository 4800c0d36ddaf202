//! The order of life of a mount.
//!
//! ```text
//!   log opened, mount point looked at       errors to the user at once
//!   fork, unless in the foreground          daemon.rs; the parent waits
//!   log installed, signals blocked, prober and watcher forked (fuse/): all before any thread
//!   sources opened ─ mounted ─ session ─ read-ahead raised ─ first read ─ pidfile
//!   "ready" to the parent
//!   wait ── SIGTERM, SIGINT, SIGHUP: unmount, or detach when busy; then wait for the session's end
//!        └─ the session ends: somebody unmounted (status 0), or an error (status 1)
//!   disks closed: what was written is durable      an error: status 1
//! ```
//! Everything that was made is undone by its owner's `Drop`, so a failure or a panic on the way leaves no mount
//! and no pidfile. A second SIGTERM or SIGINT does not wait for the last user, and for the disks only so long.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use fuser::Filesystem;
use nix::sys::signal::Signal;

use crate::config::{Distance, LogConfig, MountConfig, MountOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::error_log::ErrorLog;
use crate::fuse::auto_unmount::AutoUnmount;
use crate::fuse::mount::{Mount, Target, Unmounted};
use crate::fuse::probe::Prober;
use crate::fuse::readahead::{self, Window};
use crate::fuse::session::Running;
use crate::fuse::{Disks, Requests};
use crate::process::daemon::{self, Started, Status, Verdict};
use crate::process::log;
use crate::process::pidfile::Pidfile;
use crate::process::signals::{self, Signals};

/// How long the first reads may take: a mount that needs longer is of no use.
const FIRST_READ: Duration = Duration::from_secs(30);

/// How long the disks may take to be closed by an end that does not wait: what is on its way to a slow store arrives,
/// and one that is dead holds nobody up for ever.
const LAST_CLOSE: Duration = Duration::from_secs(10);

/// What is to be served, opened.
#[derive(Debug)]
pub struct Opened<F> {
    /// Answers the kernel's requests.
    pub filesystem: F,
    /// What mount tables show as the source.
    pub source: String,
    /// Names of the disks in the root folder, each of which has to be readable before "ready" is said. Where
    /// the mount covers a file, that one is read instead.
    pub files: Vec<OsString>,
    /// No disk can be written to, so the mount is made read-only.
    pub read_only: bool,
    /// What the user should know although it works.
    pub warnings: Vec<String>,
    /// The disks, to be closed at the end.
    pub disks: Disks,
    /// What wants to know where requests come from.
    pub requests: Requests,
    /// Event loops that it is made for.
    pub loops: usize,
    /// Where the file system notes requests that failed.
    pub error_log: Arc<ErrorLog>,
}

/// Mounts, serves and unmounts what `open` opens: the whole life. Prints the error, if there is one.
///
/// In the background (see [`MountConfig::foreground`]) the calling process returns as soon as the mount can be
/// read, and `open` runs in the daemon. Call it before any thread is started.
pub fn serve<F, O>(config: &MountConfig, log: &LogConfig, open: O) -> ExitCode
where
    F: Filesystem,
    O: FnOnce(&Target) -> Result<Opened<F>>,
{
    let started = log::Sink::open(log).and_then(|sink| {
        let target = Target::resolve(&config.target.path)?;
        Ok((sink, target, daemon::start(config.foreground)?))
    });
    match started {
        Err(e) => {
            daemon::say(&mut std::io::stderr(), &e.to_string());
            ExitCode::FAILURE
        }
        Ok((_, _, Started::Parent(Verdict::Ready))) => ExitCode::SUCCESS,
        Ok((_, _, Started::Parent(Verdict::Failed))) => ExitCode::FAILURE,
        Ok((sink, target, Started::Daemon(status))) => live(config, sink, &target, status, open),
    }
}

/// The daemon's part of [`serve`].
fn live<F, O>(config: &MountConfig, sink: log::Sink, target: &Target, mut status: Status, open: O) -> ExitCode
where
    F: Filesystem,
    O: FnOnce(&Target) -> Result<Opened<F>>,
{
    let has_log_file = sink.is_file();
    let begun = sink.install().and_then(|()| {
        log::panics();
        MountedDaemon::begin(config, target, open, |warning| {
            if has_log_file {
                tracing::warn!("{warning}");
            }
            status.warn(warning);
        })
    });
    match begun {
        Err(e) => {
            // On standard error it would be there twice.
            if has_log_file {
                tracing::error!("{e}");
            }
            status.failed(&e);
            ExitCode::FAILURE
        }
        Ok(life) => match status.ready().and_then(|()| life.serve()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                tracing::error!("{e}");
                ExitCode::FAILURE
            }
        },
    }
}

/// A mount that can be read. Fields are dropped in this order: first the mount, so that nobody new comes in.
#[derive(Debug)]
struct MountedDaemon {
    mount: Mount,
    session: Running,
    /// With auto_unmount. Dropped as it is, it detaches what is mounted then.
    watcher: Option<AutoUnmount>,
    signals: Signals,
    /// Last but one: after the session nobody writes, and while there is a pidfile nobody may take it for done.
    disks: CloseOnDrop,
    /// Only for its `Drop`.
    _pidfile: Option<Pidfile>,
}

/// Disks that are closed when they are dropped.
#[derive(Debug)]
struct CloseOnDrop(Option<Disks>);

impl CloseOnDrop {
    /// Closes them now.
    fn close(&mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |disks| disks.close())
    }

    /// Closes them now, as far as that goes within a time.
    fn close_within(&mut self, time: Duration) -> Result<()> {
        let Some(disks) = self.0.take() else { return Ok(()) };
        let (done, closed) = channel();
        let thread = std::thread::Builder::new().name("close".to_owned()).spawn(move || {
            // nobody waits any more after the time
            let _ = done.send(disks.close());
        });
        thread.map_err(|e| Error::io("thread that closes the disks", e))?;
        closed.recv_timeout(time).unwrap_or_else(|_| {
            let text = format!("the disks were not closed within {} s", time.as_secs());
            Err(Error::new(ErrorKind::Os(libc::ETIMEDOUT), text))
        })
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        // each error was logged
        let _ = self.close_within(LAST_CLOSE);
    }
}

impl MountedDaemon {
    /// All that comes before "ready". `warn` is given what the user should know although it works.
    fn begin<F, O>(config: &MountConfig, target: &Target, open: O, mut warn: impl FnMut(&str)) -> Result<Self>
    where
        F: Filesystem,
        O: FnOnce(&Target) -> Result<Opened<F>>,
    {
        let signals = Signals::block()?;
        let mut prober = Prober::fork()?;
        let mut watcher = if config.options.auto_unmount {
            Some(AutoUnmount::fork()?)
        } else {
            None
        };
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
        let wanted = &config.options;
        let options = &MountOptions {
            read_only: read_only || wanted.read_only,
            // where others may look in, owner and mode have to hold for them, and the kernel only checks when told
            default_permissions: wanted.default_permissions || wanted.allow_other || wanted.allow_root,
            ..wanted.clone()
        };
        let (mount, device) = Mount::new(target, options, &source)?;
        if let Some(watcher) = &mut watcher {
            watcher.start(&mount)?;
        }
        requests.from(device.try_clone().map_err(|e| Error::io("/dev/fuse", e))?);
        let session = Running::start(filesystem, device, options, loops)?;
        let distance = config
            .disks
            .iter()
            .map(|d| d.source.distance())
            .max()
            .unwrap_or(Distance::Here);
        match readahead::set(
            mount.device(),
            Window::of(config.disks.iter().map(|d| d.readahead), distance),
        ) {
            Ok(kib) => tracing::debug!("read-ahead of the mount: {kib} KiB"),
            Err(e) => tracing::info!("read-ahead of the mount stays as it is, which costs speed: {e}"),
        }
        let paths = if target.is_file {
            vec![target.point.clone()]
        } else {
            files.iter().map(|name| target.point.join(name)).collect()
        };
        prober.start(&paths)?;
        let deadline = Instant::now() + FIRST_READ;
        let caused = |e: Error| error_log.cause().map_or(e.clone(), |cause| cause.within(e.to_string()));
        while let Some(warning) = first_read(&mut prober, &signals, &session, deadline).map_err(caused)? {
            warn(
                &error_log
                    .cause()
                    .map_or(warning.clone(), |cause| format!("{warning}: {cause}")),
            );
        }
        error_log.started();
        prober.finish();
        let _pidfile = config.pidfile.as_deref().map(Pidfile::write).transpose()?;
        tracing::info!("ready: {}", target.point.display());
        Ok(Self {
            mount,
            session,
            watcher,
            signals,
            disks,
            _pidfile,
        })
    }

    /// From "ready" to the end.
    fn serve(mut self) -> Result<()> {
        let mut stopping = false;
        loop {
            let [signalled, ended] = signals::wait([self.signals.as_fd(), self.session.ended()], None)?;
            if ended {
                break;
            }
            let signal = if signalled { self.signals.take()? } else { None };
            match signal {
                Some(signal) if !stopping => stopping = self.stop(signal),
                // Closing the terminal may follow another signal by itself: no second wish of anybody.
                Some(Signal::SIGHUP) | None => {}
                Some(signal) => {
                    let text = format!("second signal ({signal}): ending although the disk is still in use");
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
            mut disks,
            _pidfile,
            ..
        } = self;
        let served = session.result();
        // whatever became of the session, what was written is kept; each error was logged
        let closed = disks.close();
        served?;
        let dead = mount.clear_dead()?;
        if let Some(watcher) = watcher {
            watcher.dismiss();
        }
        // Served no more, but mounted still: /sys/fs/fuse/connections/*/abort does that.
        if dead {
            let text = "the kernel's connection to the mount was aborted";
            return Err(Error::new(ErrorKind::Os(libc::ECONNABORTED), text));
        }
        tracing::info!("unmounted");
        closed
    }

    /// Unmounts for `signal`. Whether that worked: if not, the next signal is a new attempt.
    fn stop(&mut self, signal: Signal) -> bool {
        tracing::info!("{signal}: unmounting");
        match self.mount.unmount() {
            Ok(Unmounted::Clean | Unmounted::Gone) => true,
            Ok(Unmounted::Detached) => {
                tracing::warn!("the mount was busy and is detached; this process ends when its last user is gone");
                true
            }
            Err(e) => {
                tracing::error!("not unmounted: {e}");
                false
            }
        }
    }
}

/// What the first reads through the mount say next: a warning, `None` when all were good, or why the mount
/// cannot be said to be ready.
fn first_read(prober: &mut Prober, signals: &Signals, session: &Running, deadline: Instant) -> Result<Option<String>> {
    let fds = [prober.answered(), signals.as_fd(), session.ended()];
    let no_mount = |errno, text: String| Err(Error::new(ErrorKind::Os(errno), text));
    match signals::wait(fds, Some(deadline))? {
        [_, _, true] => no_mount(libc::ENOTCONN, "the mount ended before its first read".into()),
        [true, ..] => prober.hear(),
        [_, true, _] => {
            let name = signals.take()?.map_or("a signal", Signal::as_str);
            no_mount(libc::EINTR, format!("ended by {name} before the first read"))
        }
        [false, false, false] => {
            let seconds = FIRST_READ.as_secs();
            no_mount(
                libc::ETIMEDOUT,
                format!("no answer to the first read within {seconds} s"),
            )
        }
    }
}
