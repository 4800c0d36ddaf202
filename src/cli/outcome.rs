//! Outcome of parsing: what to run or print, or the error.

use std::fmt;

use crate::config::Config;

/// Outcome of parsing a command line.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    /// Run the program with this configuration.
    Run(Box<Config>),
    /// Print this text unchanged and exit with status 0. The text may be empty.
    Print(String),
}

/// Invalid command line or configuration file; the program exits with status 2.
///
/// `Display` writes the reason as one line, without the program's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageError {
    /// Place in a configuration file.
    place: Option<String>,
    /// Key that the error is about.
    key: Option<&'static str>,
    message: String,
}

impl UsageError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self {
            place: None,
            key: None,
            message: message.into(),
        }
    }

    /// Creates an error about a key. The message is `KEY=` and `rest`.
    pub(super) fn of(key: &'static str, rest: impl fmt::Display) -> Self {
        Self::new(format!("{key}={rest}")).about(key)
    }

    /// Returns the error with the key that it is about.
    pub(super) fn about(self, key: &'static str) -> Self {
        Self { key: Some(key), ..self }
    }

    /// Returns the key that the error is about.
    pub(super) fn key(&self) -> Option<&'static str> {
        self.key
    }

    /// Creates the error for an option, key or value that is documented but missing from this build.
    pub(super) fn not_yet(what: impl fmt::Display) -> Self {
        Self::new(format!("{what} is not in this build yet"))
    }

    /// Creates the error for an error of clap, as one line: without the `error:` prefix, the usage and the pointer to
    /// `--help`.
    pub(super) fn of_clap(error: &clap::Error) -> Self {
        let text = error.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let ends = ["\n\nUsage:", "\n\nFor more information"];
        let end = ends.iter().filter_map(|end| text.find(end)).min().unwrap_or(text.len());
        let sentences = text[..end]
            .split("\n\n")
            .map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
        Self::new(sentences.collect::<Vec<_>>().join("; "))
    }

    /// Returns the error with a place in a configuration file, unless it has one.
    pub(super) fn at(mut self, place: &str) -> Self {
        self.place.get_or_insert_with(|| place.to_owned());
        self
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for UsageError {}
