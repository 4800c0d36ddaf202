//! Where messages go: standard error or a file, as text or JSON.
//!
//! The place is opened before daemonizing, so that a path that cannot be written is told to the user; the
//! subscriber is installed after it, in the process that lives on. No message carries a secret: values of
//! options are logged by those who know which of them are none.
//!
//! fuser speaks through the `log` crate, a record for every request. That stays switched off (one comparison
//! of a static) unless `-vvv` asks for everything.

use std::fs::{File, OpenOptions};
use std::io;
use std::sync::Arc;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogConfig;
use crate::error::{Error, ErrorKind, Result};

/// The place for messages, open but not yet in use.
#[derive(Debug)]
pub struct Sink {
    file: Option<File>,
    json: bool,
    verbosity: u8,
}

impl Sink {
    /// Opens the place that `config` names; a file is appended to.
    pub fn open(config: &LogConfig) -> Result<Self> {
        let open = |path| OpenOptions::new().append(true).create(true).open(path);
        let file = match &config.file {
            Some(path) => Some(open(path).map_err(|e| Error::io(format!("log file {}", path.display()), e))?),
            None => None,
        };
        Ok(Self {
            file,
            json: config.json,
            verbosity: config.verbosity,
        })
    }

    /// Whether messages go elsewhere than to standard error.
    pub fn is_file(&self) -> bool {
        self.file.is_some()
    }

    /// Makes it the place for the messages of this process. Once in a process.
    pub fn install(self) -> Result<()> {
        let level = level(self.verbosity);
        let json = self.json;
        let writer = match self.file {
            Some(file) => BoxMakeWriter::new(Arc::new(file)),
            None => BoxMakeWriter::new(io::stderr),
        };
        // Its complaint about a message that can't be written would go to standard error, and panic where that is closed.
        let builder = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .log_internal_errors(false);
        let builder = builder.with_writer(writer);
        let result = if json {
            install(builder.json().finish(), level)
        } else {
            install(builder.with_target(level > LevelFilter::INFO).finish(), level)
        };
        result.map_err(|e| Error::new(ErrorKind::Usage, format!("log: {e}")))
    }
}

fn level(verbosity: u8) -> LevelFilter {
    match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

/// With everything asked for, records of the `log` crate come too.
fn install<S>(subscriber: S, level: LevelFilter) -> Result<(), Box<dyn std::error::Error>>
where
    S: Into<tracing::Dispatch> + tracing::Subscriber + Send + Sync + 'static,
{
    if level == LevelFilter::TRACE {
        return subscriber.try_init().map_err(Into::into);
    }
    tracing::subscriber::set_global_default(subscriber).map_err(Into::into)
}

/// Makes a panic a message like any other, in place of the runtime's text on standard error.
pub fn panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        tracing::error!("panic in the thread {name}: {info}");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_opened_at_once_and_an_error_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let config = |name: &str| LogConfig {
            file: Some(dir.path().join(name)),
            ..Default::default()
        };
        assert!(Sink::open(&config("log")).unwrap().is_file());
        assert!(dir.path().join("log").exists());
        let e = Sink::open(&config("none/log")).unwrap_err();
        assert!(e.to_string().starts_with("log file "), "{e}");
        assert!(!Sink::open(&LogConfig::default()).unwrap().is_file());
    }

    #[test]
    fn levels() {
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
