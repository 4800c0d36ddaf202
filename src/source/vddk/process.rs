//! Host processes, as the daemon sees them: started with a task, replaced when they crash or hang, ended with the disk.
//!
//! ```text
//!   first connection, or a reconnect ─► end the old host ─► start a host ─► connect
//!   further connections                                    ────────────────► connect
//! ```
//! A host is replaced whenever all connections to it are lost, also if it still runs: it may hang, or its disk may be in a
//! state that no further request can change. Its requests end with it, so that none takes effect after those that are
//! repeated on the next host.
//!
//! The mutex guards the current host, and is held while that is started or ended. No other lock is acquired meanwhile.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::level_filters::LevelFilter;

use super::abi::SECTOR;
use super::library_file::{self, LibraryFile};
use super::spec::{self, CreateSpec, DiskSpec, HostSpec, LibraryDescription, STATISTICS_LEN};
use super::{EXIT_MAINTENANCE, EXIT_REFUSED, FATAL, HOST_ARGUMENT, statistics};
use crate::config::{
    AdapterType, CreateConfig, CreateType, NbdAddress, NbdConfig, SourceSettings, VddkConfig, VddkLibrary,
};
use crate::error::{Error, ErrorKind, Result};
use crate::escape::printable;
use crate::mutex::{lock, unlocked};
use crate::process;
use crate::source::nbd::{Cancel, CaptiveServer, NbdDisk, OwnServer, PrivateDir};

/// Default of `timeout=`: a login and the opening of a disk on a busy vCenter take up to half a minute.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// Part of the timeout within which a host stops to try again, so that its error is reported and not a timeout.
const OPEN_SHARE: f32 = 0.8;

/// Pause before a disk of a server in maintenance is opened again.
const MAINTENANCE_PAUSE: Duration = Duration::from_secs(5);

/// Pause after a refused login or disk: servers lock an account after a few wrong passwords.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// Time for a host to describe the library.
const DESCRIBE_WITHIN: Duration = Duration::from_secs(60);

/// Time for a host that is replaced to close its disk.
const REPLACE_WITHIN: Duration = Duration::from_secs(2);

/// Name of the variable that the dynamic linker searches by.
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";

/// Length in bytes at which a report leaves out further disks: the kernel passes at most 64 KiB.
const MAX_REPORT: usize = 60 << 10;

/// The open disks, for [`report`].
static HOSTS: Mutex<Vec<Weak<HostProcess>>> = Mutex::new(Vec::new());

/// The hosts of one disk, one at a time.
#[derive(Debug)]
pub(super) struct HostProcess {
    config: VddkConfig,
    writable: bool,
    starter: Starter,
    current: Mutex<CurrentHost>,
}

/// The host of now.
#[derive(Debug, Default)]
struct CurrentHost {
    host: Option<Host>,
    /// The disk was created by an earlier host.
    created: bool,
    /// Time of the next login, after one that was refused or while the server is in maintenance. Also if a host is replaced
    /// while it waits for that.
    not_before: Option<Instant>,
}

/// A host. The process ends before its folder is removed.
#[derive(Debug)]
struct Host {
    server: CaptiveServer,
    _private_dir: PrivateDir,
}

/// Files and settings that all hosts of a disk use.
#[derive(Debug)]
struct Starter {
    library: Vec<LibraryFile>,
    libdir: Option<PathBuf>,
    config: Option<PathBuf>,
    memory: File,
}

/// Opens a disk: starts its host, and connects to it.
pub(super) fn connect(config: &VddkConfig, writable: bool) -> Result<NbdDisk> {
    if config.create.is_some() && !writable {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{}: create=true needs a writable disk", config.label()),
        ));
    }
    let nbd = NbdConfig {
        timeout: Some(config.timeout.unwrap_or(TIMEOUT)),
        retry: config.retry,
        ..NbdConfig::new(NbdAddress::Own(config.label()))
    };
    let host = HostProcess {
        config: config.clone(),
        writable,
        starter: Starter::new(&config.library)?,
        current: Mutex::default(),
    };
    // Shared with the session, which asks for further connections as long as the disk is open.
    let host = Arc::new(host);
    let mut hosts = lock(&HOSTS);
    // Disks that were closed meanwhile. Weak references keep no host alive.
    hosts.retain(|host| host.strong_count() > 0);
    hosts.push(Arc::downgrade(&host));
    drop(hosts);
    let disk = NbdDisk::connect_to_own(Arc::clone(&host) as Arc<dyn OwnServer>, &nbd, writable)?;
    // Only now: the host that has answered has created the disk, and another one must not create it anew.
    lock(&host.current).created = true;
    Ok(disk)
}

/// Returns the statistics of all disks that VDDK has open: the name of each, then a line for each function. `None` if there
/// is no such disk.
pub(crate) fn report() -> Option<String> {
    let hosts = lock(&HOSTS);
    let open: Vec<_> = hosts.iter().filter_map(Weak::upgrade).collect();
    // Dropping the last reference to a disk waits for its process: not with the lock.
    drop(hosts);
    let mut text = String::new();
    for host in &open {
        let lines = statistics::read(&host.starter.memory).unwrap_or_default();
        if text.len() + lines.len() < MAX_REPORT {
            let _ = writeln!(text, "{}", printable(host.config.label()));
            text += &lines;
        }
    }
    (!open.is_empty()).then_some(text)
}

/// Describes the library, which a host loads.
pub(crate) fn describe(library: &VddkLibrary) -> Result<LibraryDescription> {
    let starter = Starter::new(library)?;
    let host = starter.start("VDDK", None)?;
    match host.server.exit_within(DESCRIBE_WITHIN) {
        None => Err(Error::new(
            ErrorKind::Os(libc::ETIMEDOUT),
            format!("VDDK: loading it took more than {} s", DESCRIBE_WITHIN.as_secs()),
        )),
        // The host has ended, so its answer is complete.
        Some(_) => spec::take(&starter.memory).map_err(|_no_answer| Error::unsupported(exit_message(&host.server))),
    }
}

impl Starter {
    fn new(library: &VddkLibrary) -> Result<Self> {
        let found = library_file::find(library)?;
        let context = |e| Error::io("preparing a VDDK process", e);
        // Not inherited by other children: the host gets it as its standard output.
        let memory = memfd_create("vmdkfuse-vddk", MFdFlags::MFD_CLOEXEC).map_err(|e| context(e.into()))?;
        let memory = File::from(memory);
        // The host maps these bytes, and a mapping beyond the end of the file would kill it with SIGBUS.
        memory.set_len(STATISTICS_LEN).map_err(context)?;
        Ok(Self {
            library: found,
            libdir: library.libdir.clone(),
            config: library.config.clone(),
            memory,
        })
    }

    /// Starts a host with a task. Must be called from a thread that lives as long as the host should.
    fn start(&self, name: &str, disk: Option<DiskSpec>) -> Result<Host> {
        let context = |e: io::Error| Error::io(format!("{name}: starting a VDDK process"), e);
        let private_dir = PrivateDir::new().map_err(context)?;
        let config = match &self.config {
            Some(config) => config.clone(),
            None => write_config(private_dir.path()).map_err(context)?,
        };
        let inherited = std::env::var_os(LIBRARY_PATH);
        let spec = HostSpec {
            library: self.library.clone(),
            libdir: self.libdir.as_ref().map(|dir| dir.clone().into_os_string()),
            config: config.into_os_string(),
            private_dir: private_dir.path().as_os_str().to_owned(),
            library_path: inherited.clone(),
            verbosity: verbosity(),
            disk,
        };
        // Before the start, and overwritten by the host when it has read it: the login is in the file for that time
        // only.
        spec::put(&self.memory, &spec).map_err(context)?;
        // The same program, also if its file was replaced by an update since.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("vmdkfuse")
            .arg(HOST_ARGUMENT)
            .current_dir(process::start_dir())
            .stdout(Stdio::from(self.memory.try_clone().map_err(context)?));
        let folder = self.library.first().and_then(|file| Path::new(&file.path).parent());
        if let Some(folder) = folder.filter(|folder| folder.is_absolute()) {
            let mut path = folder.as_os_str().to_owned();
            if let Some(inherited) = inherited.filter(|path| !path.is_empty()) {
                path.push(":");
                path.push(inherited);
            }
            // VDDK brings libraries of its own, which the dynamic linker must find before those of the system.
            command.env(LIBRARY_PATH, path);
        }
        Ok(Host {
            server: CaptiveServer::spawn(name.to_owned(), command, log)?,
            _private_dir: private_dir,
        })
    }
}

impl HostProcess {
    /// Ends the current host, and starts the next one.
    fn replace(&self, current: &mut CurrentHost) -> Result<()> {
        if let Some(mut host) = current.host.take() {
            let old = &mut host.server;
            // A host that still runs is replaced because its connections were lost, which the session has logged.
            if old.exit().is_some() {
                tracing::warn!("{}: {}: starting another one", self.config.label(), exit_message(old));
            }
            old.end(REPLACE_WITHIN);
            if let Some(pause) = exit_code(old).and_then(pause_after) {
                current.not_before = Some(Instant::now() + pause);
            }
        }
        // Shorter than the deadline of the connection, so that the host's own error comes before the timeout.
        let timeout = self.config.timeout.unwrap_or(TIMEOUT).mul_f32(OPEN_SHARE);
        let mut disk = DiskSpec::new(&self.config, self.writable, timeout.as_millis() as u64)?;
        disk.create = self
            .config
            .create
            .as_ref()
            .filter(|_| !current.created)
            .map(create_spec)
            .transpose()?;
        let pause = current.not_before.map(|t| t.saturating_duration_since(Instant::now()));
        // The host waits and not this thread, which holds the mutex.
        disk.pause = pause.map_or(0, |pause| pause.as_millis() as u64);
        current.host = Some(self.starter.start(&self.config.label(), Some(disk))?);
        Ok(())
    }
}

impl OwnServer for HostProcess {
    fn connect(&self, first: bool, deadline: Instant, cancel: Cancel<'_>) -> Result<OwnedFd> {
        let mut current = lock(&self.current);
        // The first connection after a loss. The further ones of the same session join the host that it started.
        if first {
            self.replace(&mut current)?;
        }
        match &current.host {
            Some(host) => host.server.connect(deadline, cancel),
            None => Err(Error::new(
                ErrorKind::Os(libc::ENOTCONN),
                "the VDDK process was not started",
            )),
        }
    }

    fn exit_within(&self, within: Duration) -> Option<String> {
        let current = lock(&self.current);
        let server = &current.host.as_ref()?.server;
        // A host that has said why it ends may take long to close its disk.
        let exit = server.exit_within(within).map(|_| exit_message(server));
        exit.or_else(|| server.reported())
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        let current = unlocked(&mut self.current);
        // First: the calls that end the host count too.
        drop(current.host.take());
        match statistics::read(&self.starter.memory) {
            Ok(text) => text
                .lines()
                .for_each(|line| tracing::info!("{}: {line}", self.config.label())),
            Err(e) => tracing::info!("{}: statistics of VDDK: {e}", self.config.label()),
        }
    }
}

/// Returns why a host ended: its own message, or its status.
fn exit_message(host: &CaptiveServer) -> String {
    match host.exit() {
        Some((_, message)) if !message.is_empty() => message,
        Some((Ok(status), _)) => format!("its VDDK process ended ({status})"),
        Some((Err(e), _)) => format!("its VDDK process: {e}"),
        None => "its VDDK process still runs".to_owned(),
    }
}

fn exit_code(host: &CaptiveServer) -> Option<u8> {
    host.exit().and_then(|(status, _)| status.ok()?.code()?.try_into().ok())
}

/// Returns the pause before the next login after a host that exited with this status, if there is one.
fn pause_after(status: u8) -> Option<Duration> {
    match status {
        EXIT_MAINTENANCE => Some(MAINTENANCE_PAUSE),
        EXIT_REFUSED => Some(REFUSED_PAUSE),
        _ => None,
    }
}

/// Writes the private configuration file of the library.
fn write_config(dir: &Path) -> io::Result<PathBuf> {
    let path = dir.join("config");
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    io::Write::write_all(&mut &file, &spec::private_config(dir))?;
    Ok(path)
}

/// Returns the number of `-v` options that the log of this process corresponds to.
fn verbosity() -> u8 {
    match LevelFilter::current() {
        LevelFilter::TRACE => 3,
        LevelFilter::DEBUG => 2,
        LevelFilter::INFO => 1,
        _ => 0,
    }
}

/// Logs a line of a host with its level. Returns the reason for its end, if the line is one.
fn log(name: &str, line: &str, _closing: bool) -> Option<String> {
    if let Some(reason) = line.strip_prefix(FATAL) {
        return Some(reason.to_owned());
    }
    // The host's subscriber puts the level first, padded on the left.
    let (level, text) = line.trim_start().split_once(' ').unwrap_or(("", line));
    let text = text.trim_start();
    match level {
        "ERROR" => tracing::error!("{text}"),
        "WARN" => tracing::warn!("{text}"),
        "INFO" => tracing::info!("{text}"),
        "DEBUG" | "TRACE" => tracing::debug!("{text}"),
        // Written by the library itself.
        _ => tracing::warn!("{name}: {line}"),
    }
    None
}

/// Returns the properties of a disk to create with the numbers of the library. Errors: it has none for one of them.
fn create_spec(create: &CreateConfig) -> Result<CreateSpec> {
    let disk_type = match create.kind {
        CreateType::MonolithicSparse => 1,
        CreateType::MonolithicFlat => 2,
        CreateType::SplitSparse => 3,
        CreateType::SplitFlat => 4,
        CreateType::VmfsFlat => 5,
        CreateType::StreamOptimized => 6,
        CreateType::VmfsThin => 7,
    };
    let adapter_type = match create.adapter {
        AdapterType::Ide => 1,
        AdapterType::BusLogic => 2,
        AdapterType::LsiLogic => 3,
        AdapterType::LegacyEsx | AdapterType::PvScsi => {
            let text = "create-adapter-type=: VDDK creates disks for ide, buslogic and lsilogic";
            return Err(Error::new(ErrorKind::Usage, text));
        }
    };
    let hw_version = u16::try_from(create.hardware_version)
        .map_err(|_too_large| Error::new(ErrorKind::Usage, "create-hwversion= is too large"))?;
    Ok(CreateSpec {
        sectors: create.size / SECTOR,
        disk_type,
        adapter_type,
        hw_version,
    })
}
