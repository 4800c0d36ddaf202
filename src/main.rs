//! The program `vmdkfuse`: command line → configuration → action → exit status.
//!
//! Exit status: 0 success, 1 the action failed, 2 the command line is invalid. `--check` has further statuses, and the helpers
//! of mount(8) have its.

use std::process::ExitCode;

use vmdkfuse::cli::{self, ExitStatuses, Parsed};
use vmdkfuse::config::{Action, Config, DiskConfig, MountConfig, Query};
use vmdkfuse::error::Result;
use vmdkfuse::fuse::{DiskFs, session};
use vmdkfuse::overlay::commit_command;
use vmdkfuse::process::daemon::Failure;
use vmdkfuse::process::run::{self, Opened};
use vmdkfuse::process::{self, daemon, handed_over, output};
use vmdkfuse::source::vddk;
use vmdkfuse::volume::OpenedDisks;
use vmdkfuse::{inspect, volume};

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    // By the name of the program: the helpers of mount(8) have other statuses.
    let statuses = ExitStatuses::of(&std::env::args_os().next().unwrap_or_default());
    // The first action: from the next call on, an ordinary user's process may not write to its memory through /proc.
    process::arguments::hide_secrets();
    if let Err(e) = daemon::forbid_dumps() {
        output::message(&mut std::io::stderr(), &e.to_string());
        return ExitCode::FAILURE;
    }
    // Called once here, so that it remembers the directory before anything changes it.
    process::start_dir();
    process::inherited::ignore_file_size_signal();
    if let Some(status) = vddk::run_host(&args) {
        return status;
    }
    let parsed = cli::parse(args);
    let sockets = if let Ok(Parsed::Run(config)) = &parsed {
        config.action.handed_over()
    } else {
        Vec::new()
    };
    // The order matters: first the descriptors of the caller are closed, before this process opens its own; the heap is
    // configured before any thread starts.
    handed_over::take_inherited(&sockets);
    daemon::raise_file_limit();
    daemon::share_heap();
    match parsed {
        Ok(Parsed::Run(config)) => run_action(*config, statuses),
        Ok(Parsed::Print(text)) => exit_status(output::print(&text).map(|()| 0), statuses),
        Err(e) => {
            output::message(&mut std::io::stderr(), &e.to_string());
            ExitCode::from(statuses.usage)
        }
    }
}

/// Performs the action and returns the exit status.
fn run_action(config: Config, statuses: ExitStatuses) -> ExitCode {
    let Config { action, log } = config;
    if !matches!(action, Action::Mount(_)) {
        // Only those about the connection: other settings matter to a mount alone.
        let all = |disk: &&DiskConfig| disk.source.settings().warns_of_connection();
        for warning in action.disks().iter().filter(all).flat_map(|disk| &disk.warnings) {
            output::message(&mut std::io::stderr(), &format!("warning: {warning}"));
        }
    }
    let result = match action {
        Action::Mount(mount) => {
            let served = run::serve(&mount, &log, |_| open(&mount));
            return served.map_or_else(|failure| statuses.failed(failure).into(), |()| ExitCode::SUCCESS);
        }
        Action::Info(q) => on_found(&q, inspect::info),
        Action::List(q) => inspect::list(&q),
        Action::Map(q) => on_found(&q, inspect::map),
        Action::Check(q) => on_found(&q, inspect::check),
        Action::Prefetch(q) => on_found(&q, inspect::prefetch),
        Action::CacheDir {
            dir,
            check: false,
            json,
            ..
        } => inspect::list_cache(&dir, json),
        Action::CacheDir { dir, limit, json, .. } => inspect::check_cache(&dir, limit, json),
        Action::Create(disks) => volume::create(&disks).map(|()| 0),
        Action::Unmount(mounts) => process::unmount::unmount(&mounts).map(|()| 0),
        Action::Commit(disk) => commit_command::commit(&disk),
        Action::Fingerprint { server, port, json } => inspect::fingerprint(&server, port, json),
        Action::Dump { json, library } => inspect::dump(json, &library),
    };
    exit_status(result, statuses)
}

/// Performs an action on the disks of a query, after patterns on servers were expanded.
fn on_found(query: &Query, action: fn(&Query) -> Result<u8>) -> Result<u8> {
    let found = volume::find_disks(&query.disks)?;
    action(&Query {
        disks: found.disks,
        json: query.json,
    })
}

/// Opens the disks of a mount.
fn open(mount: &MountConfig) -> Result<Opened<DiskFs>> {
    let found = volume::find_disks(&mount.disks)?;
    let wanted = &found.disks;
    cli::check_found(wanted)?;
    let with_mount_options = |disk: &DiskConfig| DiskConfig {
        read_only: disk.read_only || mount.options.read_only,
        ..disk.clone()
    };
    let OpenedDisks {
        disks,
        exports,
        skipped,
    } = volume::open_all(&wanted.iter().map(with_mount_options).collect::<Vec<_>>())?;
    let mut warnings: Vec<String> = skipped.iter().map(|e| format!("skipped: {e}")).collect();
    let empty = exports.iter().filter(|exports| exports.names().is_empty());
    warnings.extend(empty.map(|exports| format!("{}: the server lists no export yet", exports.label())));
    let of_disk = || wanted.first().map(inspect::source_name);
    let source = mount.source.clone().or_else(of_disk).unwrap_or_default();
    // Exports that are discovered on a server are connected on first use, so the first read at the start skips them. It
    // also skips a disk whose user knows that a part of it cannot be read.
    let files = wanted
        .iter()
        .filter(|d| {
            !d.source.settings().is_dynamic()
                && !d.source.settings().accepts_loss()
                && disks.iter().any(|(disk, _)| disk.name == d.name)
        })
        .map(|d| d.name.clone())
        .collect();
    let why = disks
        .iter()
        .filter_map(|(disk, volume)| Some((disk.name.display(), volume.why_read_only()?)));
    let read_only = why.map(|(name, why)| format!("{name}: read-only: {why}"));
    let of_settings = wanted.iter().flat_map(|disk| {
        disk.warnings
            .iter()
            .map(|warning| format!("{}: {warning}", disk.name.display()))
    });
    warnings.extend(read_only.chain(of_settings));
    let remote = disks.iter().all(|(_, volume)| volume.is_remote());
    let loops = session::loops(mount.threads, remote);
    let mut filesystem = DiskFs::new(mount.target.kind, disks, exports, &mount.options, loops);
    // Before the mount: a disk whose required view cannot be built must not appear at all.
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

/// Converts the result of an action to an exit status. Prints an error on standard error.
fn exit_status(result: Result<u8>, statuses: ExitStatuses) -> ExitCode {
    match result {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            output::message(&mut std::io::stderr(), &e.to_string());
            ExitCode::from(statuses.failed(Failure::of(&e)))
        }
    }
}
