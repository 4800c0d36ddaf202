//! The program: words → configuration → what was asked for → exit status.

use std::io::Write;
use std::process::ExitCode;

use vmdkfuse::cli::{self, Parsed};
use vmdkfuse::config::{Action, Config, DiskConfig, MountConfig};
use vmdkfuse::error::Result;
use vmdkfuse::fuse::{DiskFs, session};
use vmdkfuse::overlay::commit_command;
use vmdkfuse::process::daemon;
use vmdkfuse::process::run::{self, Opened};
use vmdkfuse::{inspect, volume};

/// The words can't be understood.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let parsed = cli::parse(std::env::args_os());
    let handed_over = if let Ok(Parsed::Run(config)) = &parsed {
        config.action.handed_over()
    } else {
        Vec::new()
    };
    daemon::close_inherited(&handed_over);
    daemon::raise_file_limit();
    daemon::share_heap();
    match parsed {
        Ok(Parsed::Run(config)) => act(*config),
        Ok(Parsed::Print(text)) => match std::io::stdout().lock().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(e) => {
            eprintln!("vmdkfuse: {e}");
            ExitCode::from(USAGE)
        }
    }
}

fn act(config: Config) -> ExitCode {
    let Config { action, log } = config;
    match action {
        Action::Mount(mount) => run::serve(&mount, &log, |_| open(&mount)),
        Action::Info(q) => status(inspect::info(&q)),
        Action::List(q) => status(inspect::list(&q)),
        Action::Map(q) => status(inspect::map(&q)),
        Action::Check(q) => status(inspect::check(&q)),
        Action::Create(disks) => status(volume::create(&disks).map(|()| 0)),
        Action::Commit(disk) => status(commit_command::commit(&disk)),
        Action::Dump { json } => status(inspect::dump(json)),
    }
}

/// Opens the disks of a mount.
fn open(mount: &MountConfig) -> Result<Opened<DiskFs>> {
    let wanted = |disk: &DiskConfig| DiskConfig {
        read_only: disk.read_only || mount.options.read_only,
        ..disk.clone()
    };
    let disks = volume::open_all(&mount.disks.iter().map(wanted).collect::<Vec<_>>())?;
    let source = mount.disks.first().map(inspect::source_name).unwrap_or_default();
    // Exports that are found are connected to when they are used: the first read is not to do it.
    let files = mount
        .disks
        .iter()
        .filter(|d| !volume::is_dynamic(d))
        .map(|d| d.name.clone())
        .collect();
    let why = disks
        .iter()
        .filter_map(|(disk, volume)| Some((disk.name.display(), volume.why_read_only()?)));
    let warnings = why
        .map(|(name, why)| format!("{name}: it is read-only: {why}"))
        .collect();
    let remote = disks.iter().all(|(_, volume)| volume.is_remote());
    let loops = session::loops(mount.threads, remote);
    let mut filesystem = DiskFs::new(mount.target.kind, disks, &mount.options, loops);
    filesystem.make_required_views()?;
    Ok(Opened {
        error_log: filesystem.error_log(),
        disks: filesystem.disks(),
        requests: filesystem.requests(),
        loops,
        read_only: !filesystem.is_writable(),
        filesystem,
        source,
        files,
        warnings,
    })
}

fn status(done: Result<u8>) -> ExitCode {
    match done {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            eprintln!("vmdkfuse: {e}");
            ExitCode::FAILURE
        }
    }
}
