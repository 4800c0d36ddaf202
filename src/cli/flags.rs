//! Options of `vmdkfuse` itself, as clap parses them. The help, the manual and the completions are generated from them, too.
//!
//! All other arguments are collected as raw strings.

use std::ffi::OsString;

use clap::{ArgAction, Args, Command, CommandFactory as _, FromArgMatches as _, Parser};

use super::help::{EXAMPLES, USAGE, after_long_help, help_width};
use super::options::LogFormat;

/// Arguments of the program.
#[derive(Debug, Parser)]
#[command(
    name = "vmdkfuse",
    about = env!("CARGO_PKG_DESCRIPTION"),
    version,
    no_binary_name = true,
    override_usage = USAGE,
    disable_help_flag = true,
    disable_version_flag = true,
    term_width = help_width(),
    help_template = "{about-with-newline}\n{usage-heading} {usage}\n\n{all-args}{after-help}",
    after_help = EXAMPLES,
    after_long_help = after_long_help()
)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) mount: MountFlags,
    #[command(flatten)]
    pub(super) log: LogFlags,
    #[command(flatten)]
    pub(super) actions: ActionFlags,
    /// JSON output
    #[arg(long, help_heading = ACTIONS)]
    pub(super) json: bool,
    #[command(flatten)]
    information: InformationFlags,
    #[command(flatten)]
    pub(super) later: LaterFlags,
    #[arg(hide = true)]
    pub(super) words: Vec<OsString>,
}

/// Options that describe a mount. They conflict with every other action, but what a file describes can be unmounted.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of a mount")]
pub(super) struct MountFlags {
    /// Mount read-only
    #[arg(short, long, conflicts_with = "ActionFlags")]
    pub(super) read_only: bool,
    /// Stay in the foreground
    #[arg(short, long, conflicts_with = "ActionFlags")]
    pub(super) foreground: bool,
    /// Mount options, and keys that apply to all disks
    #[arg(short, value_name = "OPT[,OPT...]", conflicts_with = "ActionFlags")]
    pub(super) options: Vec<OsString>,
    /// Write the process ID to FILE
    #[arg(short = 'P', long, value_name = "FILE", conflicts_with = "ActionFlags")]
    pub(super) pidfile: Option<OsString>,
    /// Number of event loops
    #[arg(long, value_name = "N", conflicts_with = "ActionFlags")]
    pub(super) threads: Option<OsString>,
    /// Mount the disks that a TOML file describes
    #[arg(long, value_name = "FILE", conflicts_with_all = ["list", "info", "map", "check", "prefetch", "create", "commit", "fingerprint", "dump"])]
    pub(super) config: Option<OsString>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Log")]
pub(super) struct LogFlags {
    /// Verbose output (repeatable)
    #[arg(short, long, action = ArgAction::Count)]
    pub(super) verbose: u8,
    /// Append log messages to FILE
    #[arg(long, value_name = "FILE")]
    pub(super) log_file: Option<OsString>,
    /// Format of log messages
    #[arg(long, value_name = "FORMAT")]
    pub(super) log_format: Option<LogFormat>,
}

/// Heading of the options that select an action.
const ACTIONS: &str = "Actions other than a mount";

/// Options that select an action other than a mount.
#[derive(Debug, Args)]
#[command(next_help_heading = ACTIONS)]
#[group(multiple = false)]
pub(super) struct ActionFlags {
    /// List the exports of an NBD server, the datastores of server=HOST, a folder on a web server, or the files of
    /// cache-dir=DIR
    #[arg(long)]
    pub(super) list: bool,
    /// Show what a source is: size, format, extents, chain
    #[arg(long)]
    pub(super) info: bool,
    /// Show where data, holes and zeroes are
    #[arg(long)]
    pub(super) map: bool,
    /// Check a VMDK's tables and chain, or the blocks of cache-dir=DIR; exit status 3: leaks only, 4: corrupt
    #[arg(long)]
    pub(super) check: bool,
    /// Complete the disk cache (cache-dir=) of a disk on a web server
    #[arg(long)]
    pub(super) prefetch: bool,
    /// Create a VMDK without mounting it
    #[arg(long)]
    pub(super) create: bool,
    /// Commit the overlay cow=FILE to its base
    #[arg(long)]
    pub(super) commit: bool,
    /// Unmount, and return when the daemon has ended and its locks are gone
    #[arg(long)]
    pub(super) unmount: bool,
    /// Show the thumbprints of server=HOST's certificate
    #[arg(long)]
    pub(super) fingerprint: bool,
    /// Print versions and back ends
    #[arg(long)]
    pub(super) dump: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Information")]
struct InformationFlags {
    #[arg(short = 'h', action = ArgAction::HelpShort, hide = true)]
    _short_help: Option<bool>,
    /// Print all options and keys; -h prints examples
    #[arg(long = "help", action = ArgAction::HelpLong)]
    _help: Option<bool>,
    /// Print the version
    #[arg(short = 'V', long = "version", action = ArgAction::Version)]
    _version: Option<bool>,
}

/// Options that are documented but not in this build.
#[derive(Debug, Args)]
pub(super) struct LaterFlags {
    #[arg(long, hide = true)]
    pub(super) status: bool,
    #[arg(long, hide = true)]
    pub(super) watch: bool,
    #[arg(long, hide = true)]
    pub(super) doctor: bool,
}

impl Cli {
    /// Parses the arguments after the program's name.
    pub(super) fn read(args: &[OsString]) -> Result<Self, clap::Error> {
        Self::from_arg_matches(&command().try_get_matches_from(args)?)
    }
}

/// Returns the options as clap takes them.
pub(super) fn command() -> Command {
    Cli::command().mut_args(|arg| arg.hide_short_help(true))
}
