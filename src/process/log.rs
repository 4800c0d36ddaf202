//! Log output, as text or JSON: a file, or standard error and, in the background, the system log too. The daemon's standard
//! error ends when the mount can be read.
//!
//! The log file is opened before the process forks, so that an error about its path reaches the user. The subscriber is
//! installed after the fork, in the process that serves. No message contains a secret: the value of an option is logged
//! only by code that knows that it is not secret.
//!
//! fuser writes to the `log` crate, one record for every request. These records stay disabled (one comparison of a
//! static) unless `-vvv` enables everything.

use std::fs::File;
use std::io;
use std::sync::Arc;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::escape::LogLines;
use crate::process::admin_file;
use crate::process::syslog::Syslog;

/// Log destination that is open but not yet installed.
#[derive(Debug)]
pub struct Sink {
    file: Option<File>,
    syslog: Option<Syslog>,
    json: bool,
    verbosity: u8,
}

impl Sink {
    /// Opens the destination that `config` names. A file is created if needed and appended to. Without a file, a process
    /// that goes to the background (`background`) writes to the system log.
    pub fn open(config: &LogConfig, background: bool) -> Result<Self> {
        let open = |path| admin_file::open("log file", path, File::options().append(true).create(true));
        let file = config.file.as_deref().map(open).transpose()?;
        // In the foreground standard error stays, which the service manager or the terminal shows.
        let syslog = if background && file.is_none() {
            Syslog::open()
        } else {
            None
        };
        Ok(Self {
            file,
            syslog,
            json: config.json,
            verbosity: config.verbosity,
        })
    }

    /// Returns true if messages go to a file instead of standard error.
    pub fn is_file(&self) -> bool {
        self.file.is_some()
    }

    /// Installs the destination as the global subscriber of this process. Fails if one is installed already.
    pub fn install(self) -> Result<()> {
        let level = level(self.verbosity);
        let json = self.json;
        let writer = match self.file {
            Some(file) => BoxMakeWriter::new(Arc::new(file)),
            None => BoxMakeWriter::new(io::stderr),
        };
        if let Some(syslog) = self.syslog {
            return install_with_syslog(writer, syslog, level);
        }
        // The subscriber reports a message that it cannot write on standard error, and panics if that is closed.
        let builder = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .log_internal_errors(false);
        let builder = builder.with_writer(LogLines::new(writer, json));
        let result = if json {
            install(builder.json().finish(), level)
        } else {
            install(builder.with_target(level > LevelFilter::INFO).finish(), level)
        };
        result.map_err(|e| Error::new(ErrorKind::Usage, format!("log: {e}")))
    }
}

/// Installs standard error and the system log, which adds the time and the level by itself.
fn install_with_syslog(stderr: BoxMakeWriter, syslog: Syslog, level: LevelFilter) -> Result<()> {
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .log_internal_errors(false)
        .with_target(level > LevelFilter::INFO);
    let kept = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .log_internal_errors(false)
        // The system log adds time, level and program itself.
        .without_time()
        .with_level(false)
        .with_target(false);
    let subscriber = tracing_subscriber::registry()
        .with(level)
        .with(layer.with_writer(LogLines::new(stderr, false)))
        .with(kept.with_writer(LogLines::new(BoxMakeWriter::new(syslog), false)));
    install(subscriber, level).map_err(|e| Error::new(ErrorKind::Usage, format!("log: {e}")))
}

/// Converts the number of `-v` options to a level.
fn level(verbosity: u8) -> LevelFilter {
    match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

/// Installs the subscriber, and at the level TRACE the bridge from the `log` crate too.
fn install<S>(subscriber: S, level: LevelFilter) -> Result<(), Box<dyn std::error::Error>>
where
    S: Into<tracing::Dispatch> + tracing::Subscriber + Send + Sync + 'static,
{
    if level == LevelFilter::TRACE {
        return subscriber.try_init().map_err(Into::into);
    }
    // Without the bridge, each record of fuser costs only the comparison with the static maximum level of `log`.
    tracing::subscriber::set_global_default(subscriber).map_err(Into::into)
}

/// Installs a panic hook that logs a panic as an error, in place of the runtime's text on standard error.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        tracing::error!("panic in thread {name}: {info}");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_creates_the_file_and_its_error_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let config = |name: &str| LogConfig {
            file: Some(dir.path().join(name)),
            ..Default::default()
        };
        assert!(Sink::open(&config("log"), true).unwrap().is_file());
        assert!(dir.path().join("log").exists());
        let e = Sink::open(&config("none/log"), true).unwrap_err();
        assert!(e.to_string().starts_with("log file "), "{e}");
        assert!(!Sink::open(&LogConfig::default(), false).unwrap().is_file());
    }

    #[test]
    fn each_verbosity_has_its_level() {
        let levels = [
            LevelFilter::WARN,
            LevelFilter::INFO,
            LevelFilter::DEBUG,
            LevelFilter::TRACE,
            LevelFilter::TRACE,
        ];
        for (verbosity, expected) in (0..).zip(levels) {
            assert_eq!(level(verbosity), expected);
        }
    }
}
