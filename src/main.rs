//! The program: words → configuration → what was asked for → exit status.

use std::io::Write;
use std::process::ExitCode;

use vmdkfuse::cli::{self, Parsed};
use vmdkfuse::config::{Action, Config, MountConfig};
use vmdkfuse::error::{Error, Result};
use vmdkfuse::fuse::DiskFs;
use vmdkfuse::run::{self, Opened};
use vmdkfuse::{daemon, image, query};

/// The words can't be understood.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    daemon::close_inherited(&cli::inherited(std::env::args_os()));
    daemon::raise_file_limit();
    daemon::share_heap();
    match cli::parse(std::env::args_os()) {
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
        Action::Info(q) => status(query::info(&q)),
        Action::List(q) => status(query::list(&q)),
        Action::Map(q) => status(query::map(&q)),
        Action::Check(q) => status(query::check(&q)),
        Action::Create(disks) => status(image::create(&disks).map(|()| 0)),
        Action::Commit(_) => status(Err(Error::unsupported("merging an overlay is not in this build yet"))),
        Action::Dump { json } => status(query::dump(json)),
    }
}

/// Opens the disks of a mount.
fn open(mount: &MountConfig) -> Result<Opened<DiskFs>> {
    let disks = image::open_all(&mount.disks)?;
    let source = mount.disks.first().map(query::source_name).unwrap_or_default();
    // Exports that are found are connected to when they are used: the first read is not to do it.
    let files = mount.disks.iter().filter(|d| !image::is_dynamic(d)).map(|d| d.name.clone()).collect();
    let filesystem = DiskFs::new(mount.target.kind, disks, &mount.options);
    Ok(Opened { faults: filesystem.faults(), filesystem, source, files, read_only: true })
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
